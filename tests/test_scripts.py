"""Whole scripts, called as a user calls them, on tiny random pipelines: what they leave behind and compute."""

import importlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

BOTH = pytest.mark.parametrize("script", ["train_dreambooth", "train_dreambooth_lora"])
ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a photo of sks dog"


@pytest.fixture
def train(sd1, photos, tmp_path, capsys):
    """train(script, "--options ...", name="run") -> output folder"""

    def call(script, options="", name="run", model=sd1):
        module = importlib.import_module(script)
        folder = tmp_path / name
        base = f"--pretrained_model_name_or_path '{model}' --output_dir '{folder}'"
        given = shlex.split(f"{base} {options}")
        if "--instance_data_dir" not in options and "--dataset_name" not in options:
            given += ["--instance_data_dir", str(photos)]
        if "--instance_prompt" not in options:
            given += ["--instance_prompt", PROMPT]
        if "--seed" not in options:
            given += ["--seed", "3"]
        if "--report_to" not in options:
            given += ["--report_to", "none"]
        module.main(module.parse_args(given))
        return folder

    return call


def weights(folder):
    """Every learned tensor of a result or checkpoint, by file and name."""
    adapters = ("pytorch_lora_weights.safetensors", "learned_embeddings.safetensors")
    files = [folder / name for name in adapters if (folder / name).is_file()] or sorted(
        file for name in ("unet", "text_encoder") for file in folder.glob(f"{name}/*.safetensors")
    )
    assert files, f"{folder} holds no weights"
    return {f"{file.relative_to(folder)}: {key}": value for file in files for key, value in load_file(file).items()}


def same(one, two):
    one, two = weights(one), weights(two)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder) if "loss" in row]


def parts(folder):
    """What the losses are made of: for each step instance, prior and pdm, as far as there are."""
    return [value for row in rows(folder) for name, value in row.items() if name.startswith("loss_")]


def stock(model):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, seed, steps=4):
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=7.5, generator=generator, height=64, width=64)
    return np.asarray(image.images[0], dtype=int)


VALIDATE = f"--validation_prompt '{PROMPT}' --num_validation_images 2 --validation_num_inference_steps 4"


def test_lora_leaves_what_it_promises_and_stock_diffusers_draws_the_same(train, sd1):
    folder = train(
        "train_dreambooth_lora",
        f"--max_train_steps 4 --train_batch_size 1 --learning_rate 0.05 --checkpointing_steps 2 {VALIDATE}",
    )
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == {
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors",
        "README.md",
        "report.html",
        "metrics.jsonl",
        "timings.json",
        "training_config.yaml",
        "samples",
        "preview",
        "data_preview.png",
        "checkpoint-2",
        "checkpoint-4",
    }
    assert len(losses(folder)) == 4 and all(math.isfinite(loss) for loss in losses(folder))
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-000000", "step-000004"]
    assert same(folder, folder / "checkpoint-4")

    pipeline = stock(sd1)
    before = drawn(pipeline, seed=4)
    pipeline.load_lora_weights(folder)
    for number, seed in enumerate((3, 4)):  # image i of a prompt has seed + i
        ours = np.asarray(Image.open(folder / "samples" / "step-000004" / f"00-{number:02d}.png"), dtype=int)
        assert np.abs(drawn(pipeline, seed) - ours).max() <= 1
    assert np.abs(drawn(pipeline, seed=4) - before).max() > 1, "the adapters change nothing"

    # infer.py, which finds the base model in what the run left, draws the very same pictures.
    infer = importlib.import_module("infer")
    given = f"--lora '{folder}' --prompt '{PROMPT}' --seed 3 --width 64 --height 64 --output_dir '{folder / 'drawn'}'"
    given += " --num_images 2 --num_inference_steps 4 --scheduler dpm++"
    infer.main(infer.parse_args(shlex.split(given)))
    samples = sorted((folder / "samples" / "step-000004").iterdir())
    pictures = [path for path in sorted((folder / "drawn").rglob("*.png")) if path.name != "grid.png"]
    assert len(pictures) == 2
    for ours, theirs in zip(samples, pictures):
        assert np.array_equal(np.asarray(Image.open(ours)), np.asarray(Image.open(theirs)))


def test_infer_draws_with_the_prediction_type_that_was_trained(train, sd1):
    folder = train("train_dreambooth_lora", f"--max_train_steps 1 --prediction_type v_prediction {VALIDATE}")
    infer = importlib.import_module("infer")
    given = f"--lora '{folder}' --prompt '{PROMPT}' --seed 3 --width 64 --height 64 --output_dir '{folder / 'drawn'}'"
    infer.main(infer.parse_args(shlex.split(given + " --num_images 1 --num_inference_steps 4")))
    theirs = next(path for path in (folder / "drawn").rglob("*.png") if path.name != "grid.png")
    ours = folder / "samples" / "step-000001" / "00-00.png"
    ours, theirs = (np.asarray(Image.open(path), dtype=int) for path in (ours, theirs))
    assert np.abs(ours - theirs).max() <= 1  # drawn in batches of different sizes: some CPUs round differently


def test_full_leaves_a_stock_pipeline(train, sd1):
    folder = train(
        "train_dreambooth",
        "--max_train_steps 3 --train_batch_size 1 --learning_rate 1e-3 --train_text_encoder --checkpointing_steps 0 "
        + VALIDATE,
    )
    ours = np.asarray(Image.open(folder / "samples" / "step-000003" / "00-00.png"), dtype=int)
    assert np.abs(drawn(stock(folder), seed=3) - ours).max() <= 1
    assert np.abs(drawn(stock(sd1), seed=3) - ours).max() > 1
    text = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in text)


@BOTH
def test_a_resume_names_every_option_that_changed(train, script, photos, sd1, capsys):
    options = "--max_train_steps 2 --train_batch_size 1 --checkpointing_steps 1 --use_ema"
    folder = train(script, options)
    for path in photos.glob("*.png"):
        Image.new("L", (80, 96), 255).save(path.with_suffix(".mask.png"))
    changed = {"input_perturbation": 0.1, "caption_dropout": 0.5, "image_interpolation_mode": "box", "ema_decay": 0.9}
    changed |= {"random_flip": "yes", "center_crop": "yes", "tokenizer_name": sd1 / "tokenizer", "allow_tf32": "yes"}
    changed |= {"pretrained_vae_model_name_or_path": sd1, "unmasked_weight": 0.5, "alpha_background": "black"}
    changed |= {"lora_dropout": 0.2} if "lora" in script else {}
    changed |= {"snr_gamma": 5, "noise_offset": 0.1, "prior_loss_weight": 0.5, "seed": 9, "optimizer": "adafactor"}
    changed |= {"rank": 3} if "lora" in script else {}
    words = " ".join(f"--{name} '{value}'" for name, value in changed.items())
    names, later = ",".join(sorted(changed)), "alpha,dataset" if "lora" in script else "dataset"
    more = f"{options} {words} --masked_loss --resume_from_checkpoint '{folder / 'checkpoint-1'}'"
    # Those that options tell by themselves before anything is loaded, what pictures tell when they were looked at.
    for allowed, loaded, told in (("", False, names), (f"--allow_resume_mismatch {names}", True, later)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as refused:
            train(script, f"{more} {allowed}")
        said = capsys.readouterr()
        assert refused.value.code == 2 and f"--allow_resume_mismatch {told}" in said.err
        assert ("photos in" in said.out) == loaded


@BOTH
def test_a_batch_equals_its_accumulated_parts(train, script):
    options = "--center_crop --max_train_steps 2 --learning_rate 1e-3 --checkpointing_steps 0"
    one = train(script, f"{options} --train_batch_size 4", "one")
    two = train(script, f"{options} --train_batch_size 2 --gradient_accumulation_steps 2", "two")
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    left, right = weights(one), weights(two)
    assert all(torch.allclose(left[key], right[key], rtol=1e-4, atol=2e-5) for key in left)
    assert not same(one, train(script, f"{options} --train_batch_size 3", "three")), "the comparison could not fail"


@BOTH
def test_cached_equals_uncached(train, script):
    options = "--center_crop --random_flip --max_train_steps 3 --train_batch_size 1 --learning_rate 1e-3"
    cached = train(script, f"{options} --cache_latents on", "cached")
    uncached = train(script, f"{options} --cache_latents off", "uncached")
    assert losses(cached) == pytest.approx(losses(uncached), rel=1e-5)


@BOTH
def test_masks_change_what_is_learned_and_a_white_one_changes_nothing(train, script, photos, class_photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "masked")
    words = (
        f"--instance_data_dir '{folder}' --center_crop --random_flip --max_train_steps 3 --train_batch_size 2"
        " --learning_rate 1e-3 --with_prior_preservation --num_class_images 4 --class_prompt 'a dog'"
        f" --class_data_dir '{class_photos}'"
    )
    plain = train(script, words, "plain")
    for path in folder.glob("photo-*.png"):
        Image.new("L", (80, 96), 255).save(path.with_suffix(".mask.png"))
    unused = train(script, words, "unused")
    white = train(script, f"{words} --masked_loss", "white")
    assert losses(white) == losses(plain) == losses(unused) and same(plain, unused)
    assert same(white, plain), "not even the last bit"
    for path in folder.glob("*.mask.png"):
        mask = Image.new("L", (80, 96))
        mask.paste(255, (20, 20, 52, 60))
        mask.save(path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    cached = train(script, f"{words} --masked_loss --cache_latents on", "cached")
    uncached = train(script, f"{words} --masked_loss --cache_latents off", "uncached")
    assert losses(cached) == pytest.approx(losses(uncached), rel=1e-5)
    assert losses(cached)[0] != pytest.approx(losses(plain)[0], rel=1e-3)
    partly = train(script, f"{words} --masked_loss --unmasked_weight 0.5", "partly")
    assert losses(partly)[0] != pytest.approx(losses(cached)[0], rel=1e-3)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@BOTH
def test_checkpointed_activations_change_nothing(train, script):
    options = "--max_train_steps 2 --train_batch_size 1 --train_text_encoder"
    assert losses(train(script, options, "plain")) == pytest.approx(
        losses(train(script, f"{options} --gradient_checkpointing", "recomputed")), rel=1e-5
    )


@BOTH
def test_pictures_and_checkpoints_are_no_part_of_a_steps_seconds(train, script, monkeypatch):
    from utils import checkpoints, validation

    slow = [(validation.Sampler, "draw"), (checkpoints.Checkpoints, "save")]
    for kind, name in slow:
        monkeypatch.setattr(kind, name, lambda self, step: time.sleep(3))
    folder = train(script, "--max_train_steps 4 --train_batch_size 1 --checkpointing_steps 1 --validation_steps 1")
    assert max(row["seconds"] for row in rows(folder)) < 3
    phases = json.loads((folder / "timings.json").read_text())["sessions"][-1]["phases"]
    assert phases["validation"] > 9 and phases["saving"] > 9


@BOTH
def test_a_result_that_cannot_be_saved_leaves_a_checkpoint(train, script, tmp_path, monkeypatch):
    from utils.adapters import Adapters
    from utils.models.stable_diffusion import StableDiffusion

    owner, name = (StableDiffusion, "save_pipeline") if script == "train_dreambooth" else (Adapters, "save")
    real = getattr(owner, name)

    def fail(self, folder, **options):
        if folder.name == "run":
            raise OSError("the base model has gone")
        return real(self, folder, **options)

    options = "--max_train_steps 2 --train_batch_size 1 --use_ema"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(OSError, match="has gone"):
            train(script, options)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert same(train(script, f"{options} --resume_from_checkpoint latest"), train(script, options, "whole"))


@BOTH
def test_clipping_clips(train, script):
    options = "--max_train_steps 2 --train_batch_size 1 --optimizer sgd --learning_rate 0.1"
    loose = train(script, f"{options} --max_grad_norm 1e6", "loose")
    tight = train(script, f"{options} --max_grad_norm 1e-6", "tight")
    assert not same(loose, tight)


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_first_step_of_new_adapters_has_the_base_models_loss(train, model, request):
    """Neither script has changed anything yet, so both see the loss of the base model."""
    folder = request.getfixturevalue(model)
    options = "--max_train_steps 1 --train_batch_size 1 --center_crop"
    full = train("train_dreambooth", options, f"{model}-full", model=folder)
    lora = train("train_dreambooth_lora", options, f"{model}-lora", model=folder)
    assert losses(full) == pytest.approx(losses(lora), rel=1e-6)


# First losses of each script, written down once. A change that should not change numbers leaves them as they are.
GOLDEN = {
    "train_dreambooth": [1.6599607, 1.5186367, 1.9431119],
    "train_dreambooth_lora": [1.6599607, 1.5445777, 2.0273232],
}


@BOTH
def test_golden_losses(train, script, class_photos):
    options = (
        "--max_train_steps 3 --train_batch_size 2 --learning_rate 1e-3 --center_crop --snr_gamma 5 --noise_offset 0.1"
        f" --with_prior_preservation --class_data_dir '{class_photos}' --class_prompt 'a dog' --num_class_images 4"
    )
    folder = train(script, options)
    assert losses(folder) == pytest.approx(GOLDEN[script], rel=1e-4)
    sums = [row["loss_instance"] + row["loss_prior"] for row in rows(folder)]
    assert losses(folder) == pytest.approx(sums, rel=1e-6)


@BOTH
def test_bf16_trains_in_fp32_weights(train, script):
    folder = train(script, "--mixed_precision bf16 --max_train_steps 2 --train_batch_size 1")
    assert all(value.dtype == torch.float32 for value in weights(folder).values())
    assert all(math.isfinite(loss) for loss in losses(folder))


def test_dora_loads_in_stock_diffusers(train, sd1):
    folder = train(
        "train_dreambooth_lora",
        f"--use_dora --rank 2 --lora_alpha 4 --max_train_steps 2 --learning_rate 0.05 {VALIDATE}",
    )
    assert any("lora_magnitude_vector" in key for key in weights(folder))
    pipeline = stock(sd1)
    pipeline.load_lora_weights(folder)
    ours = np.asarray(Image.open(folder / "samples" / "step-000002" / "00-00.png"), dtype=int)
    assert np.abs(drawn(pipeline, seed=3) - ours).max() <= 1


@BOTH
def test_class_images_are_drawn_and_reused(train, script, tmp_path):
    options = (
        f"--max_train_steps 1 --train_batch_size 1 --with_prior_preservation --class_data_dir '{tmp_path / 'class'}'"
        " --class_prompt 'a dog' --num_class_images 3 --sample_batch_size 2"
    )
    train(script, options, "first")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "class").glob("*.png")}
    assert len(files) == 3
    train(script, options, "second")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "class").glob("*.png")}
    with pytest.raises(SystemExit) as refused:
        train(script, options.replace("'a dog'", "'a cat'"), "third")
    assert refused.value.code == 2


@BOTH
def test_captions_beside_the_photos_are_used(train, script, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "captioned")
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        path.with_suffix(".txt").write_text(f"sks dog number {number}", encoding="utf-8")
    out = train(script, f"--instance_data_dir '{folder}' --max_train_steps 1 --train_batch_size 1")
    told = json.loads((out / "preview" / "preview.json").read_text())
    assert sorted(image["caption"] for image in told["images"]) == [f"sks dog number {k}" for k in range(3)]


@BOTH
def test_placeholders_become_words_and_captions_are_dropped(train, script, photos, tmp_path, capsys):
    folder = shutil.copytree(photos, tmp_path / "captioned")
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a drawing of {identifier} {class}", encoding="utf-8")
    options = (
        f"--instance_data_dir '{folder}' --instance_prompt 'a photo of {{identifier}} {{class}}' --class_noun dog"
        " --max_train_steps 2 --train_batch_size 2"
    )
    with pytest.raises(SystemExit):
        train(script, options, "unnamed")
    assert "--instance_prompt holds {identifier}: give --identifier" in capsys.readouterr().err
    kept = train(script, f"{options} --identifier sks", "kept")
    told = json.loads((kept / "preview" / "preview.json").read_text())
    assert {image["caption"] for image in told["images"]} == {"a drawing of sks dog"}
    assert "instance_prompt: a photo of sks dog" in (kept / "training_config.yaml").read_text()
    dropped = train(script, f"{options} --identifier sks --caption_dropout 0.9", "dropped")
    assert losses(dropped) != losses(kept)


@BOTH
def test_a_finished_run_run_again_trains_nothing(train, script, capsys):
    options = "--max_train_steps 2 --train_batch_size 1 --checkpointing_steps 2"
    folder = train(script, options)
    before = weights(folder)
    train(script, f"{options} --resume_from_checkpoint latest")
    assert "already complete" in capsys.readouterr().out
    assert all(torch.equal(before[key], value) for key, value in weights(folder).items())


@BOTH
def test_a_folder_with_a_run_is_not_overwritten(train, script, capsys):
    train(script, "--max_train_steps 1 --train_batch_size 1")
    with pytest.raises(SystemExit) as refused:
        train(script, "--max_train_steps 1 --train_batch_size 1")
    assert refused.value.code == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    train(script, "--max_train_steps 1 --train_batch_size 1 --overwrite_output_dir")


@pytest.fixture
def losing(photos, monkeypatch):
    """A photo vanishes or is cut short after the second step, while every visit opens it anew."""
    from utils import datasets, lost, runtime

    monkeypatch.setattr(datasets, "REMEMBERED", 0)
    monkeypatch.setattr(lost, "RETRIES", ())
    path, log = sorted(photos.glob("*.png"))[1], runtime.Run.log
    whole = path.read_bytes()

    def lose(run, step, **values):
        log(run, step, **values)
        if step == 2:
            path.write_bytes(whole[:200]) if lose.cut else path.unlink()

    monkeypatch.setattr(runtime.Run, "log", lose)
    lose.path, lose.whole, lose.patched = path, whole, monkeypatch
    return lose


LOSING = "--cache_latents off --max_train_steps 8 --train_batch_size 1 --learning_rate 1e-3 --checkpointing_steps 0"


@BOTH
@pytest.mark.parametrize("cut, policy", [(True, "error"), (False, "skip")])
def test_a_photo_lost_while_training_ends_the_run_saved_and_named(
    train, script, losing, cut, policy, photos, tmp_path, capsys
):
    """Whatever --on_bad_image says: it decides before the run begins."""
    losing.cut = cut
    with pytest.raises(SystemExit) as stop:
        train(script, f"{LOSING} --on_bad_image {policy}")
    said = capsys.readouterr()
    assert stop.value.code == 3 and ("cannot be decoded" if cut else "cannot be read") in said.err
    assert said.err.count(str(losing.path)) == 1 and "stand_ins" not in rows(tmp_path / "run")[-1]
    step = len(losses(tmp_path / "run"))
    assert 2 <= step < 8 and (tmp_path / "run" / f"checkpoint-{step}").is_dir()
    assert f"stopped after step {step} of 8" in said.out
    losing.patched.undo()
    losing.path.write_bytes(losing.whole)
    again = train(script, f"{LOSING} --on_bad_image {policy} --resume_from_checkpoint latest")
    assert same(again, train(script, LOSING, "whole")), "what could not be seen was not trained on"


# The commands that users already type, shortened.
COMMANDS = {
    "train_dreambooth": [
        "--resolution=64 --train_batch_size=1 --gradient_accumulation_steps=1 --learning_rate=5e-6 "
        '--lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=2',
        "--resolution=64 --train_batch_size=1 --gradient_accumulation_steps=2 --gradient_checkpointing --use_8bit_adam "
        "--max_train_steps=2",
        "--resolution=64 --train_batch_size=1 --gradient_checkpointing --use_8bit_adam --set_grads_to_none "
        "--learning_rate=2e-6 --max_train_steps=2",
        "--resolution=64 --train_batch_size=1 --train_text_encoder --use_8bit_adam --gradient_checkpointing "
        "--learning_rate=2e-6 --max_train_steps=2",
        "--resolution=64 --train_batch_size=1 --sample_batch_size=1 --gradient_accumulation_steps=1 "
        "--gradient_checkpointing --mixed_precision=bf16 --max_train_steps=2",
    ],
    "train_dreambooth_lora": [
        "--resolution=64 --train_batch_size=1 --gradient_accumulation_steps=1 --checkpointing_steps=100 "
        '--learning_rate=1e-4 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=2 '
        '--validation_prompt="A photo of sks dog in a bucket" --validation_epochs=50 --seed="0" '
        "--num_validation_images=1 --validation_num_inference_steps=2",
        "--resolution=64 --train_batch_size=1 --learning_rate=1e-4 --max_train_steps=2 --train_text_encoder --scale_lr",
    ],
}


@pytest.mark.parametrize("script, options", [(script, line) for script, lines in COMMANDS.items() for line in lines])
def test_commands_that_users_already_type(train, script, options):
    folder = train(script, options)
    assert len(losses(folder)) == 2


@BOTH
def test_xformers_is_refused_where_it_cannot_work(train, script, capsys):
    with pytest.raises(SystemExit) as refused:
        train(script, "--enable_xformers_memory_efficient_attention --max_train_steps 1")
    assert refused.value.code == 2
    assert "xformers" in capsys.readouterr().err


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_lets(sd1, photos, tmp_path, umask, mode):
    """safetensors, for one, writes files that only their owner can read."""
    words = f"train_dreambooth.py --pretrained_model_name_or_path {sd1} --instance_data_dir {photos} --report_to none"
    words += f" --output_dir {tmp_path / 'run'} --max_train_steps 1 --checkpointing_steps 1 --train_text_encoder"
    words += " --use_ema --posthoc_ema --train_batch_size 1 --seed 0"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    mine = tmp_path / "run" / "mine" / "private.safetensors"
    mine.parent.mkdir(parents=True)
    mine.touch(0o600)
    command = [sys.executable, *shlex.split(words), "--instance_prompt", "p"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, umask=umask)
    assert done.returncode == 0, done.stderr
    assert mine.stat().st_mode & 0o777 == 0o600, "what no run wrote stays as it is"
    shutil.rmtree(mine.parent)
    modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*.*")}
    files = {path: found for path, found in modes.items() if (tmp_path / path).is_file() and path.name[0] != "."}
    assert len(files) > 20 and {path for path, found in files.items() if found != mode} == set()
