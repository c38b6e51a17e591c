"""Averages of a length chosen after training: their formulas, their snapshots, what is put together from them."""

import importlib
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from utils import saved
from utils.ema import __main__ as program
from utils.ema import create, posthoc

LENGTHS = (0.05, 0.1)
RUN = "--use_ema --posthoc_ema --train_batch_size 1 --learning_rate 1e-3 --max_train_steps"


def direct(history: torch.Tensor, sigma_rel: float) -> torch.Tensor:
    """The weighted sum over all weights there were: (s^(g+1) - (s-1)^(g+1)) / t^(g+1), in fp64."""
    power, t = posthoc.gamma_of(sigma_rel) + 1, len(history)
    s = torch.arange(t + 1, dtype=torch.float64)
    return torch.einsum("s,s...->...", (s[1:] ** power - s[:-1] ** power) / t**power, history.double())


def walk(folder, steps, **options):
    """Random weights that drift, as in training: (each step's weights, the averages that saw them)."""
    weight = torch.nn.Parameter(torch.full((6,), 10.0))
    learns = SimpleNamespace(named=lambda: {"w": weight})
    average = create(learns, steps, use_ema=True, posthoc_ema=True, output_dir=folder, **options)
    generator = torch.Generator().manual_seed(0)
    history = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight += 0.01 * torch.randn(6, generator=generator) + 0.003
        history.append(weight.detach().clone())
        average.update(step)
        if step % average.snapshot_steps == 0:
            average.snapshot(step)
    average.snapshot(steps)
    return torch.stack(history), average


def test_lengths_are_powers_and_powers_are_lengths():
    for sigma_rel in (0.01, 0.05, 0.1, 0.2, 0.28):
        low, high = 0.0, 1000.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if posthoc.sigma_rel_of(middle) > sigma_rel else (low, middle)
        assert posthoc.gamma_of(sigma_rel) == pytest.approx(low, abs=1e-8)
    assert [round(posthoc.gamma_of(one), 2) for one in LENGTHS] == [16.97, 6.94]  # as in the paper
    assert posthoc.sigma_rel_of(0) == pytest.approx(posthoc.LONGEST)
    # and the standard deviation of the profile, by numbers
    s = (np.arange(100_000) + 0.5) / 100_000
    weights = s ** posthoc.gamma_of(0.1)
    mean = np.average(s, weights=weights)
    assert np.average((s - mean) ** 2, weights=weights) ** 0.5 == pytest.approx(0.1, rel=1e-6)


def test_products_of_profiles_are_their_integrals():
    s = (np.arange(400_000) + 0.5) / 1000
    one, other = posthoc.Profile(400, 3.5), posthoc.Profile(250, 7.0)

    def values(profile):
        power = (profile.gamma + 1) * s**profile.gamma / profile.t ** (profile.gamma + 1)
        return np.where(s <= profile.t, power, 0)

    for a in (one, other):
        for b in (one, other):
            assert a.dot(b) == pytest.approx((values(a) * values(b)).sum() / 1000, rel=1e-5)
            assert a.dot(b) == b.dot(a)


@pytest.mark.parametrize("options", [{}, {"offload_ema": True}, {"ema_interval": 5}])
def test_an_average_is_the_weighted_sum_over_all_steps(tmp_path, options):
    history, average = walk(tmp_path, 200, **options)
    seen = history[options.get("ema_interval", 1) - 1 :: options.get("ema_interval", 1)]
    for sigma_rel, one in average.averages.items():
        assert torch.allclose(one.state()["w"].double(), direct(seen, sigma_rel), atol=2e-5, rtol=0)
    assert posthoc.beta(1, 16.97) == 0  # what was there before the first update counts nothing


def put_together(folder, sigma_rel, step=None):
    snapshots = posthoc.listed(folder / posthoc.FOLDER)
    snapshots = [one for one in snapshots if step is None or one.step <= step]
    shares, error = posthoc.choose(snapshots, sigma_rel)
    return dict(posthoc.blend(snapshots, shares))["w"], error


def test_any_length_is_put_together_afterwards(tmp_path):
    """The weights drift by 0.6 and two averages lie up to 0.1 apart; what is put together lies within 0.001."""
    history, _ = walk(tmp_path, 200)
    (tmp_path / posthoc.FOLDER / ".tmp-step-000201-0.05.safetensors").write_text("is being written just now")
    assert len(posthoc.listed(tmp_path / posthoc.FOLDER)) == 40
    for sigma_rel, within in ((0.03, 1e-3), (0.06, 1e-4), (0.075, 1e-4), (0.12, 2e-4), (0.2, 1e-3)):
        found, error = put_together(tmp_path, sigma_rel)
        assert (found.double() - direct(history, sigma_rel)).abs().max() < within, sigma_rel
        assert error < 0.03
    found, _ = put_together(tmp_path, 0.075, step=120)
    assert (found.double() - direct(history[:120], 0.075)).abs().max() < 2e-4
    assert (direct(history, 0.05) - direct(history, 0.1)).abs().max() > 0.02


def test_updates_are_counted_and_not_steps(tmp_path):
    history, _ = walk(tmp_path, 203, ema_interval=4)
    steps = [one.step for one in posthoc.listed(tmp_path / posthoc.FOLDER)]
    assert steps[::2] == [*range(12, 200, 12), 200]  # a twentieth, rounded up to an update; the last one there was
    found, _ = put_together(tmp_path, 0.075)
    assert (found.double() - direct(history[3::4], 0.075)).abs().max() < 2e-4


def test_a_stored_length_comes_out_to_the_bit(tmp_path):
    _, average = walk(tmp_path, 40)
    stored = [one.profile for one in posthoc.listed(tmp_path / posthoc.FOLDER)]
    for place, sigma_rel in enumerate(LENGTHS, start=len(stored) - 2):
        found, error = put_together(tmp_path, sigma_rel)
        assert torch.equal(found, average.averages[sigma_rel].state()["w"]) and error == 0
        # and the least squares come to it
        shares, _ = posthoc.combine(stored, posthoc.Profile(40, posthoc.gamma_of(sigma_rel) + 1e-9))
        assert shares == pytest.approx(np.eye(len(stored))[place], abs=1e-6)


def test_what_training_does_not_move_stays_as_it_is():
    """The paper's own least squares give 0.987 of it, and a fine-tuned model moves by less."""
    stored = [posthoc.Profile(10 * k, posthoc.gamma_of(one)) for k in range(1, 21) for one in LENGTHS]
    for sigma_rel in (0.03, 0.075, 0.15, 0.25):
        wanted = posthoc.Profile(200, posthoc.gamma_of(sigma_rel))
        shares, error = posthoc.combine(stored, wanted)
        assert shares.sum() == pytest.approx(1, abs=1e-9)
        products = np.array([[one.dot(other) for other in stored] for one in stored])
        free = np.linalg.solve(products, [one.dot(wanted) for one in stored])
        left = 1 - 2 * free @ [one.dot(wanted) for one in stored] / wanted.dot(wanted)
        left = (left + free @ products @ free / wanted.dot(wanted)) ** 0.5
        assert left <= error < 1.05 * left  # the condition costs next to nothing
    assert free.sum() == pytest.approx(0.987, abs=1e-3)


# --- Whole scripts -------------------------------------------------------------------------------------------------


@pytest.fixture
def train(sd1, tmp_path):
    import tiny

    pictures = tiny.photos(tmp_path / "pictures", 3, captions=["a photo of sks", "a red dog", "a cat"])

    def call(script, options="", name="run"):
        module = importlib.import_module(script)
        data = f"--train_data_dir '{pictures}'" if "text_to_image" in script else f"--instance_data_dir '{pictures}'"
        data += "" if "text_to_image" in script else " --instance_prompt 'a photo of sks'"
        given = f"--pretrained_model_name_or_path '{sd1}' --output_dir '{tmp_path / name}' --report_to none --seed 3"
        module.main(module.parse_args(shlex.split(f"{given} {data} {RUN} {options}")))
        return tmp_path / name

    return call


def after(folder, out, *words):
    program.main(program.parse_args([str(folder), "--output_dir", str(out), *map(str, words)]))
    return out


def weights(folder):
    """Of a result: the file of adapters (and of tokens), or those of the networks that learned."""
    files = [*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors"), *folder.glob("text_encoder/*.saf*")]
    return {f"{file.parent.name if file.parent != folder else ''} {key}": w for file in files
            for key, w in load_file(file).items()}  # fmt: skip


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def snapshots(folder):
    return {file.name: load_file(file) for file in sorted((folder / posthoc.FOLDER).glob("*.safetensors"))}


@pytest.mark.parametrize(
    "script, options",
    [
        ("train_text_to_image", ""),
        ("train_dreambooth", "--train_text_encoder"),
        ("train_text_to_image_lora", "--adapter loha --rank 2"),
        (
            "train_dreambooth_lora",
            "--train_text_encoder_ti --token_abstraction sks --num_new_tokens_per_abstraction 1",
        ),
    ],
)
def test_the_first_length_at_the_last_step_is_what_the_run_left(train, tmp_path, sd1, script, options):
    folder = train(script, f"4 --checkpointing_steps 0 {options}")
    assert list(snapshots(folder)) == [
        f"step-{step:06d}-{length}.safetensors" for step in (1, 2, 3, 4) for length in ("0.05", "0.1")
    ]
    same = weights(after(folder, tmp_path / "same", "--sigma_rel", 0.05))
    assert equal(same, weights(folder))
    other = weights(after(folder, tmp_path / "other", "--sigma_rel", 0.08))
    early = weights(after(folder, tmp_path / "early", "--sigma_rel", 0.08, "--step", 3))
    longer = weights(after(folder, tmp_path / "longer", "--sigma_rel", 0.1))
    assert not equal(other, same) and not equal(other, early)
    moved = max(same, key=lambda name: (same[name] - longer[name]).abs().max())
    apart = [(one[moved] - other[moved]).norm() for one in (same, longer)]
    assert max(apart) < (same[moved] - longer[moved]).norm()  # it lies between its neighbours

    from diffusers import StableDiffusionPipeline

    if "lora" not in script:
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "other")
        assert equal({f"unet {name}": weight for name, weight in pipeline.unet.state_dict().items()},
                     {name: weight for name, weight in other.items() if name.startswith("unet ")})  # fmt: skip
    infer = importlib.import_module("infer")
    model = "--lora" if "lora" in script else "--pretrained_model_name_or_path"
    given = f"{model} '{tmp_path / 'other'}' --prompt 'a photo of sks' --num_images 1 --num_inference_steps 1"
    files = infer.main(infer.parse_args(shlex.split(f"{given} --height 64 --width 64 --output_dir '{tmp_path / 'x'}'")))
    assert files[0].is_file()


@pytest.mark.parametrize("script", ["train_text_to_image", "train_text_to_image_lora"])
def test_a_resumed_run_leaves_the_same_snapshots(train, script, capsys):
    options = "6 --ema_snapshot_steps 2 --checkpointing_steps 3 --checkpoints_total_limit 1 --ema_sigma_rel 0.1 0.06"
    whole = train(script, options, "whole")
    parts = train(script, options.replace("6", "3", 1), "parts")
    assert list(snapshots(parts)) == [f"step-{step:06d}-{one}.safetensors" for step in (2, 3) for one in (0.06, 0.1)]
    mine = ("step-000009-mine.safetensors", "step-9-0.1.safetensors.bak")
    left = ("step-000004-0.1.safetensors", "step-000005-0.1.safetensors")
    for name in (*mine, *left, ".tmp-step-000004-0.06.safetensors"):
        (parts / posthoc.FOLDER / name).write_text("what was written in step 4 before a kill")
    train(script, f"{options} --resume_from_checkpoint latest", "parts")
    assert "2 snapshots of averages were made after step 3; now in left/1/" in capsys.readouterr().out
    assert sorted(path.name for path in (parts / posthoc.FOLDER / posthoc.LEFT / "1").iterdir()) == list(left)
    for name in mine:  # no name of a snapshot
        (parts / posthoc.FOLDER / name).unlink()
    mine, theirs = snapshots(parts), snapshots(whole)
    assert mine.keys() - theirs.keys() == {"step-000003-0.06.safetensors", "step-000003-0.1.safetensors"}
    assert len(theirs) == 6 and all(equal(mine[name], theirs[name]) for name in theirs)
    assert equal(weights(parts), weights(whole))
    assert [path.name for path in whole.glob("checkpoint-*")] == ["checkpoint-6"]  # rotation leaves snapshots alone

    ends = weights(whole)  # what a checkpoint is drawn with is what the run ends with
    for mark, other in (("_ema", False), ("_ema_0.06", True)):
        stored = [saved.marked(whole / "checkpoint-6" / name, mark) for name in ("unet", saved.LORA_FILE)]
        files = [path if path.is_file() else path / "diffusion_pytorch_model.safetensors" for path in stored]
        (kept,) = [load_file(file) for file in files if file.is_file()]
        same = [torch.equal(kept[name.split()[-1]], end) for name, end in ends.items() if name.split()[-1] in kept]
        assert same and other != all(same)
    with pytest.raises(SystemExit):
        train(script, f"{options.replace('0.06', '0.05')} --resume_from_checkpoint latest", "parts")


def test_what_cannot_be_put_together_is_refused(train, tmp_path, capsys):
    folder = train("train_text_to_image_lora", "2 --checkpointing_steps 0")

    def refused(*words, run=folder, out=tmp_path / "out"):
        with pytest.raises(SystemExit) as left:
            after(run, out, *words)
        assert left.value.code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    said = refused("--sigma_rel", 0.01)
    assert "--sigma_rel 0.01: the 4 snapshots meet it within 6" in said and "; lengths from 0.0" in said
    assert "between 0.001 and 0.2887" in refused("--sigma_rel", 0.29) and "between" in refused("--sigma_rel", 0)
    assert "--step 3 has no snapshot; there are those of 1, 2" in refused("--sigma_rel", 0.05, "--step", 3)
    assert f"{folder} exists" in refused("--sigma_rel", 0.05, out=folder)
    assert "is no output folder of a run" in refused("--sigma_rel", 0.05, run=tmp_path / "pictures")
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "away")
    assert "holds no pytorch_lora_weights.safetensors yet" in refused("--sigma_rel", 0.05)
    file = folder / posthoc.FOLDER / "step-000002-0.1.safetensors"
    save_file({"x": torch.zeros(2)}, file, metadata={"step": "2", "updates": "2", "sigma_rel": "0.1"})
    assert "are of different weights" in refused("--sigma_rel", 0.05)
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is no snapshot of an average, or damaged" in refused("--sigma_rel", 0.05)
    for path in file.parent.iterdir():
        path.unlink()
    assert "holds no snapshots of averages: none is due yet" in refused("--sigma_rel", 0.05)


@pytest.mark.parametrize("how", ["bit", "nan", "huge", "old nan", "old huge", "old"])
def test_damaged_snapshots_go_into_no_average(train, tmp_path, capsys, how):
    folder = train("train_text_to_image_lora", "2 --checkpointing_steps 0")
    file = folder / posthoc.FOLDER / "step-000001-0.1.safetensors"
    tensors, (one,) = load_file(file), [one for one in posthoc.listed(file.parent) if one.file == file]
    name = sorted(tensors)[0]
    if "nan" in how or "huge" in how:
        tensors[name].view(-1)[0] = float("nan") if "nan" in how else 1e37
    if how == "bit":
        tensors[name].view(torch.int32).view(-1)[0] ^= 1
    told = {"step": "1", "updates": "1", "sigma_rel": "0.1"} | ({} if "old" in how else {"sha256": one.sha256})
    save_file(tensors, file, metadata=told)
    capsys.readouterr()
    if how == "old":
        after(folder, tmp_path / "out", "--sigma_rel", 0.07)
        assert "1 snapshots have no checksum" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as stop:
        after(folder, tmp_path / "out", "--sigma_rel", 0.07)
    assert stop.value.code == 3 and f"'{file}' is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("script", ["train_text_to_image_lora", "train_text_to_image"])
def test_a_full_disk_or_a_kill_leaves_no_folder_that_the_same_command_refuses(
    train, tmp_path, monkeypatch, capsys, script
):
    folder, out = train(script, "2 --checkpointing_steps 0"), tmp_path / "out"
    written = Path.write_text

    def full(path, *given, **named):
        if path.name == "training_config.yaml":
            raise OSError(28, "No space left on device")
        return written(path, *given, **named)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(Path, "write_text", full)
        after(folder, out, "--sigma_rel", 0.07)
    assert stop.value.code == 1 and "cannot be written (No space left on device)" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".tmp-*"))
    (tmp_path / ".tmp-out-ema").mkdir()  # a killed one's
    (tmp_path / ".tmp-out-ema" / "half").write_text("")
    after(folder, out, "--sigma_rel", 0.07)
    assert (out / "training_config.yaml").is_file() and not (out / "half").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_courses_that_were_left_lie_beside_each_other(tmp_path):
    for course in range(3):
        walk(tmp_path, 4 + course)
        names = sorted(path.name for path in (tmp_path / posthoc.FOLDER).glob("*.safetensors"))
        assert len(names) == 2 * (4 + course)
        for left in range(1, course + 1):
            assert len(list((tmp_path / posthoc.FOLDER / posthoc.LEFT / str(left)).iterdir())) == 2 * (3 + left)
    (tmp_path / posthoc.FOLDER / posthoc.LEFT / "1").rename(tmp_path / "taken away")
    walk(tmp_path, 3)
    kept = sorted(path.name for path in (tmp_path / posthoc.FOLDER / posthoc.LEFT).iterdir())
    assert kept == ["1", "2"] and len(list((tmp_path / posthoc.FOLDER / posthoc.LEFT / "1").iterdir())) == 12


def test_a_full_disk_costs_a_snapshot_and_not_the_run(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(posthoc, "save_file", full)
        walk(tmp_path, 10)
    assert "no snapshot after step 3" in capsys.readouterr().err
    assert not list((tmp_path / posthoc.FOLDER).iterdir())
