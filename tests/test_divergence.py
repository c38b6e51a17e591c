"""A run whose network knows nothing any more: when that is noticed, what follows, and that healthy runs stay quiet."""

import importlib
import json
import random
import shlex
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from utils import divergence, hub, models
from utils.runtime import guard

SUBJECT = models.ROOT / "toybox" / "subject"


def ratios(count, level, seed=0, first=None):
    """Of single photos: easy and hard timesteps differ twentyfold."""
    draws = random.Random(seed)
    values = [level * draws.choice((0.2, 0.6, 1.0, 2.2)) for _ in range(count)]
    return values if first is None else [first, *values]


def begins(values):
    course = divergence.Divergence()
    return [step for step, value in enumerate(values, start=1) if course.follow(value)], course.diverged


@pytest.mark.parametrize("seed", range(5))
def test_a_network_that_knew_more_than_zeros_diverges_where_it_does_not(seed):
    healthy = ratios(3000, 0.3, seed)
    assert begins(healthy) == ([], False)
    steps, diverged = begins(healthy + [1.02] * 60)
    assert diverged and len(steps) == 1 and 3000 < steps[0] <= 3020
    assert begins([0.03, 2.9, 1.8, 1.9, 1.1, 1.6, *[1.02] * 40])[0] == [divergence.RECENT]


def test_a_network_that_knew_nothing_is_measured_against_its_own_beginning():
    assert begins([1.1, *[1.05, 1.4] * 100]) == ([], False)
    assert begins([1.1, *[1.0] * 30, *[1.8] * 30]) == ([48], True)


def test_what_comes_down_again_has_recovered_and_may_diverge_anew():
    steps, diverged = begins([0.1, *[1.1] * 40, *[0.6] * 40])
    assert len(steps) == 1 and diverged, "below the bound is not yet back: half of the way counts"
    steps, diverged = begins([0.1, *[1.1] * 40, *[0.3] * 40])
    assert len(steps) == 1 and not diverged
    assert len(begins([0.1, *[1.1] * 40, *[0.3] * 40, *[1.1] * 40])[0]) == 2


def test_steps_without_a_ratio_are_passed_over():
    assert begins([float("nan"), None, 0.1, float("inf"), *[1.1] * 18]) == ([], False)
    assert begins([float("nan"), None, 0.1, float("inf"), *[1.1] * 19])[1]


@pytest.mark.parametrize("stopped", [1, 15, 25, 60])
def test_a_resumed_run_decides_as_if_never_stopped(tmp_path, capsys, stopped):
    values = [*ratios(30, 0.3, first=0.05), *[1.1] * 40]
    lines = [json.dumps({"step": step, "loss": 0.1, "against_zero": v}) for step, v in enumerate(values, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    told = []
    for first in (0, stopped):
        watch = guard.Guard(tmp_path, on_loss_spike="warn")
        watch.recall(tmp_path / "metrics.jsonl", first)
        capsys.readouterr()
        for step in range(first, len(values)):
            watch.diverges(step + 1, values[step])
        told.append((str(watch.divergence), watch.divergence.diverged, capsys.readouterr().err))
    assert told[0][:2] == told[1][:2] and told[0][1]
    assert told[0][2].count("The run diverges") == 1 and (stopped > 50 or told[0][2] == told[1][2])


def test_stop_stops_before_the_step(tmp_path, capsys):
    watch = guard.Guard(tmp_path, on_loss_spike="stop")
    with pytest.raises(SystemExit) as stopped:
        for step in range(1, 30):
            watch.diverges(step, 0.1 if step == 1 else 2.0)
    assert stopped.value.code == 4 and "step 20: over the last 20 steps the loss is 1.91" in capsys.readouterr().err


def run(script, folder, options, model="toybox"):
    module = importlib.import_module(script)
    words = f"--pretrained_model_name_or_path {model} --output_dir '{folder}' --report_to none --seed 0"
    data = f"--instance_data_dir '{SUBJECT}' --instance_prompt 'a photo of sks dog'"
    if "text_to_image" in script:
        pictures = shutil.copytree(SUBJECT, folder.parent / "pictures")
        for picture in list(pictures.iterdir()):
            picture.with_suffix(".txt").write_text("a photo of a dog")
        data = f"--train_data_dir '{pictures}' --resolution 64"
    module.main(module.parse_args(shlex.split(f"{words} {data} {options}")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model", "rate"),
    [
        ("train_dreambooth", "toybox", "1e-2"),
        ("train_text_to_image", "toybox", "1e-2"),
        ("train_pdmbooth", "toybox", "1e-2"),
        ("train_dreambooth_lora", "toybox", "1e-1"),
        ("train_text_to_image_lora", "toybox", "1e-1"),
        ("train_pdmbooth_lora", "toybox", "1e-1"),
        ("train_dreambooth_lora_sdxl", "toybox-sdxl", "1e-1"),
    ],
)
def test_a_run_that_diverges_says_so_keeps_its_result_and_does_not_publish_it(
    script, model, rate, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("utils.preflight.remote.hub", lambda args: [])
    folder, options = tmp_path / "run", f"--train_batch_size 1 --learning_rate {rate}"
    with pytest.raises(SystemExit) as left:
        run(script, folder, f"{options} --max_train_steps 40 --checkpointing_steps 30 --push_to_hub", model)
    said = capsys.readouterr()
    assert left.value.code == 4
    assert f"--learning_rate {float(rate):g} is far above the usual range" in said.err
    noticed = [line for line in said.err.splitlines() if "The run diverges" in line]
    assert len(noticed) == 1 and "times that of predicting zeros" in noticed[0] and "--learning_rate" in noticed[0]
    last = said.out.splitlines()[-1]
    assert last.startswith("diverged: the loss is ") and f"'{folder}' holds" in last
    assert "not published: the run has diverged" in said.err and "--allow_diverged" in said.err
    assert (folder / "README.md").is_file() and any(folder.rglob("*.safetensors"))
    assert ModelCard.load(folder / "README.md").data.to_dict()["diverged"] is True
    assert 'class="card alarm"' in (folder / "report.html").read_text()
    assert "times that of predicting zeros" in hub.diverged(folder)
    if script == "train_dreambooth_lora":  # the decision comes back with the checkpoint
        with pytest.raises(SystemExit) as left:
            run(script, folder, f"{options} --max_train_steps 41 --resume_from_checkpoint latest", model)
        assert left.value.code == 4 and capsys.readouterr().out.splitlines()[-1].startswith("diverged: ")


@pytest.mark.slow
def test_a_healthy_run_is_done(tmp_path, capsys):
    run("train_dreambooth_lora", tmp_path / "run", "--train_batch_size 1 --learning_rate 1e-3 --max_train_steps 30")
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("done: ") and "diverge" not in said.err
    assert hub.diverged(tmp_path / "run") is None
    card = (tmp_path / "run" / "README.md").read_text()
    assert "diverged" not in card and "alarm" not in (tmp_path / "run" / "report.html").read_text().split("<main>")[1]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["against_zero"] < 1.5 for row in rows if "loss" in row)


@pytest.mark.slow
def test_a_new_prediction_type_is_not_called_diverged(tmp_path, capsys):
    """Seed 3 draws a first timestep at which this base is good by chance: the loss of zeros says nothing here."""
    options = "--prediction_type v_prediction --train_batch_size 1 --max_train_steps 60 --seed 3"
    run("train_dreambooth_lora", tmp_path / "run", options)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("done: ") and "diverge" not in said.err
    assert "against_zero" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_what_diverged_is_uploaded_only_when_that_is_asked_for(tmp_path, capsys, monkeypatch):
    (tmp_path / "timings.json").write_text(json.dumps({"sessions": [{"diverged": "far"}, {"diverged": "3 times"}]}))
    assert hub.main([str(tmp_path), "--hub_model_id", "me/it"]) == hub.NOT_PUBLISHED
    said = capsys.readouterr().err
    assert "the run has diverged (3 times)" in said and "--hub_model_id me/it --allow_diverged" in said
    save_file({"unet.x.lora.down.weight": torch.ones(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: asked.append(1) or 1 / 0)
    hub.main([str(tmp_path), "--allow_diverged"])
    assert asked == [1]
    (tmp_path / "timings.json").write_text(json.dumps({"sessions": [{"diverged": "far"}, {"last_step": 3}]}))
    assert hub.diverged(tmp_path) is None, "a later session came to something better"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model"),
    [
        ("train_dreambooth", "toybox"),
        ("train_dreambooth_lora", "toybox"),  # the other three were measured so: docs/log.md
    ],
)
def test_five_photos_without_a_length_are_learned(script, model, tmp_path, capsys):
    """The judge's likeness of 16 pictures to the photos: 0.1 to 0.3 before, one other dog in a hundred has 0.6."""
    folder = tmp_path / "run"
    run(
        script,
        folder,
        "--validation_prompt 'a photo of sks dog' --num_validation_images 16 --validation_steps 0",
        model,
    )
    said = capsys.readouterr()
    assert "length: " in said.out and "5 photos" in said.out and "warning" not in said.err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["judge_i"] for row in rows if "judge_i" in row][-1] >= 0.6
    saved = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert (
        saved["max_train_steps"] == rows[-1]["step"]
        and f"| steps | {rows[-1]['step']} |" in (folder / "README.md").read_text()
    )
