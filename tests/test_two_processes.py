"""Two real processes over gloo against one: the same losses, the same weights, no noise drawn twice."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_scripts import losses, parts, weights

from utils import images

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("two_processes.py")
PHOTOS = 3  # divides neither batch

JOBS = {
    "lora": "train_dreambooth_lora sd1 --train_text_encoder --snr_gamma 5 --noise_offset 0.1 --random_flip",
    "full": "train_dreambooth sd1 --use_ema",
    "buckets": "train_dreambooth_lora sd1 --resolution_buckets --resolution 64 --center_crop",
    "pdm": "train_pdmbooth_lora sd1 --use_inst_loss --use_pdm_loss --pdm_inversion_steps 8 --resolution 64"
    " --mask_dm --mask_pdm --mask_prior --sam_model_name_or_path toybox-sam",
    "tokens": "train_dreambooth_lora_sdxl sdxl --train_text_encoder_ti --token_abstraction sks --text_encoder_lr 0.05",
    "sdxl": "train_dreambooth_lora_sdxl sdxl --train_text_encoder",
}


def words(name, photos, classes, models, folder, *more):
    script, model, *options = JOBS[name].split()
    given = ["--pretrained_model_name_or_path", models[model], "--instance_data_dir", photos, "--output_dir", folder]
    given += ["--instance_prompt", "a photo of sks dog", "--with_prior_preservation", "--class_prompt", "a dog"]
    given += ["--class_data_dir", classes, "--num_class_images", 5, "--sample_batch_size", 2, "--report_to", "none"]
    given += ["--max_train_steps", 3, "--seed", 3, "--learning_rate", "1e-3", "--optimizer", "sgd"]
    return script, [str(word) for word in (*given, *options, *more)]


def free_port():
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


@pytest.fixture(scope="module")
def ran(sd1, sdxl, tmp_path_factory):
    """The jobs of two processes, all of them in one start: (folder, what each process told)."""
    base = tmp_path_factory.mktemp("two")
    photos, models = tiny.photos(base / "photos", PHOTOS - 1), {"sd1": sd1, "sdxl": sdxl}
    tiny.photo(7, size=(130, 70)).save(photos / "wide.png")
    jobs = []
    for name in JOBS:
        classes = tiny.photos(base / "drawn", 5, seed=9) if "sdxl" in JOBS[name] else base / "class"
        jobs.append([*words(name, photos, classes, models, base / name, "--train_batch_size", 2), None, free_port()])
    jobs.append([*words("full", photos, base / "class", models, base / "nan"), [1, 2], free_port()])
    (base / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(PROGRAM.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", PROGRAM]
    done = subprocess.run(
        [*command, base / "jobs.json"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=PROGRAM.parents[1],
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads((base / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return base, photos, models, told, done


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(ran, name, tmp_path):
    """batch 4 = batch 2 x accumulate 2 = 2 processes x batch 2."""
    base, photos, models, told, _ = ran
    assert [process[list(JOBS).index(name)]["code"] for process in told] == [0, 0]
    classes = base / ("drawn" if "sdxl" in JOBS[name] else "class")
    for folder, split in ((tmp_path / "four", [4, 1]), (tmp_path / "accumulated", [2, 2])):
        more = ["--train_batch_size", split[0], "--gradient_accumulation_steps", split[1]]
        script, given = words(name, photos, classes, models, folder, *more)
        module = importlib.import_module(script)
        module.main(module.parse_args(given))
        assert losses(folder) == pytest.approx(losses(base / name), rel=1e-6)
        assert parts(folder) == pytest.approx(parts(base / name), rel=1e-6)
        one, two = weights(folder), weights(base / name)
        assert one.keys() == two.keys()
        for key in one:  # of what was learned, not of the weights, most of which hardly move
            assert torch.allclose(one[key], two[key], rtol=1e-5, atol=1e-7), key
    assert losses(base / name)[0] != losses(base / name)[1]
    assert len(parts(base / name)) == 3 * (3 if name == "pdm" else 2)


def test_no_two_processes_draw_the_same(ran):
    _, _, _, told, _ = ran
    for job, name in enumerate(JOBS):
        rows = [[tuple(row) for row in process[job]["rows"]] for process in told]
        assert len(rows[0]) == len(rows[1]) >= 3 * 2 * 2 * 2, (
            "steps x batch x (photo, class image) x (posterior, noise)"
        )
        both = rows[0] + rows[1]
        assert len(set(both)) == len(both), name


def test_class_images_are_exactly_as_many_and_all_different(ran):
    base = ran[0]
    drawn = images.list_images(base / "class")
    assert len(drawn) == 5
    assert len({images.open_rgb(path).tobytes() for path in drawn}) == 5


def test_both_processes_stop_at_a_loss_that_is_no_number(ran):
    base, _, _, told, done = ran
    assert [process[-1]["code"] for process in told] == [4, 4]
    report = json.loads((base / "nan" / "nonfinite.json").read_text())
    assert report["step"] == 2 and len(losses(base / "nan")) == 1
    ours, theirs = (process[0] for process in report["micro_batches_by_process"])
    assert all(error != error for error in theirs["error"]) and all(error == error for error in ours["error"])
    assert len(theirs["timesteps"]) == len(theirs["keys"])
    said = next(line for line in done.stderr.splitlines() if line.startswith("error: step 2"))
    named = said.split("Examples: ")[1].split(" (details")[0].split(", ")
    assert set(named) <= set(theirs["keys"]) and "lower --learning_rate" in said
