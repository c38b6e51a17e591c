"""In-painting models: what is hidden, what the UNet is told, and that the result is an in-painting pipeline again."""

import importlib
import shlex

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_scripts import PROMPT, VALIDATE, losses, same, weights

from utils import models
from utils.models import inpainting
from utils.randomness import Draws


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    return tiny.save(tiny.inpainting(tiny.stable_diffusion()), tmp_path_factory.mktemp("models") / "nine")


@pytest.fixture
def train(nine, photos, tmp_path):
    def call(options="", name="run", script="train_dreambooth_lora", model=nine):
        module = importlib.import_module(script)
        given = f"--pretrained_model_name_or_path '{model}' --output_dir '{tmp_path / name}' --report_to none --seed 3"
        given += f" --instance_data_dir '{photos}' --instance_prompt '{PROMPT}' {options}"
        module.main(module.parse_args(shlex.split(given)))
        return tmp_path / name

    return call


def test_holes_are_rectangles_and_ellipses_inside_the_picture():
    holes = inpainting.random_holes(Draws(1, range(400)), 48, 64)
    assert holes.shape == (400, 1, 48, 64) and set(holes.unique().tolist()) == {0.0, 1.0}
    full = 0
    for hole in holes[:, 0].bool():
        rows, columns = hole.any(dim=1).nonzero(), hole.any(dim=0).nonzero()
        if min(len(rows), len(columns)) > 15:
            # A box is full of a rectangle; an ellipse fills π/4 of it.
            box = hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            share = box.float().mean().item()
            assert share == 1 or share == pytest.approx(np.pi / 4, abs=0.06)
            full += share == 1
    assert 60 < full < 240  # of those that are large enough to tell
    assert 0.15 < holes.mean() < 0.3  # E[height] E[width] (1 + π/4) / 2 = 0.22
    assert torch.equal(inpainting.random_holes(Draws(1, [7]), 48, 64)[0], holes[7])  # whatever else is in the batch


def test_the_unet_sees_noise_mask_and_the_rest_of_the_picture(nine):
    family = models.family_of(str(nine))
    family.load("cpu", torch.float32)
    assert family.latent_channels == 4
    draws, pixels = Draws(5, [0, 3]), torch.rand(2, 3, 64, 64) * 2 - 1
    condition = family.condition({"pixels": pixels, "captions": [PROMPT, "x"]}, draws)
    holes = inpainting.random_holes(draws, 64, 64)
    mean, std = family.posterior(torch.where(holes.bool(), 0, pixels))  # grey where it is hidden
    seen = (mean + std * draws.normal("posterior_seen", (4, 8, 8))) * family.vae.config.scaling_factor
    got = []
    family.unet.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))
    noisy = torch.randn(2, 4, 8, 8)
    prediction = family.predict(noisy, torch.tensor([10, 700]), condition)
    assert prediction.shape == (2, 4, 8, 8)
    torch.testing.assert_close(got[0], torch.cat([noisy, holes[:, :, ::8, ::8], seen], dim=1))


@pytest.mark.parametrize("script", ["train_dreambooth", "train_dreambooth_lora"])
def test_result_is_an_in_painting_pipeline_that_draws_the_same(train, nine, script, tmp_path):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionInpaintPipeline

    options = (
        f"--max_train_steps 3 --train_batch_size 2 --learning_rate 0.01 --checkpointing_steps 2 {VALIDATE}"
        f" --with_prior_preservation --class_data_dir '{tmp_path / 'class'}' --class_prompt 'a dog'"
        " --num_class_images 2"
    )
    folder = train(options, script=script)
    again = train(f"{options} --resume_from_checkpoint '{folder / 'checkpoint-2'}'", "again", script=script)
    assert same(folder, again) and losses(folder)[2:] == losses(again)
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    whole = script == "train_dreambooth"
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder if whole else nine, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if not whole:
        pipeline.load_lora_weights(folder)

    def drawn(mask):
        image = Image.new("RGB", (64, 64), "grey")
        options = {"num_inference_steps": 4, "height": 64, "width": 64, "generator": torch.Generator().manual_seed(3)}
        return np.asarray(pipeline(PROMPT, image=image, mask_image=Image.new("L", (64, 64), mask), **options).images[0])

    ours = np.asarray(Image.open(folder / "samples" / "step-000003" / "00-00.png"), dtype=int)
    assert np.abs(drawn(255) - ours).max() <= 2
    assert np.abs(drawn(0) - ours).max() > 2
    if not whole:
        infer = importlib.import_module("infer")
        words = f"--lora '{folder}' --prompt '{PROMPT}' --seed 3 --width 64 --height 64 --num_inference_steps 4"
        words += f" --num_images 1 --scheduler dpm++ --output_dir '{tmp_path / 'images'}' --device cpu"
        (file, *_) = infer.main(infer.parse_args(shlex.split(words)))
        assert np.abs(np.asarray(Image.open(file), dtype=int) - ours).max() <= 2


def test_a_batch_equals_its_accumulated_parts(train):
    options = "--resolution_buckets 48x56,64x64 --max_train_steps 2 --learning_rate 1e-3 --checkpointing_steps 0"
    one = train(f"{options} --train_batch_size 4", "one")
    two = train(f"{options} --train_batch_size 2 --gradient_accumulation_steps 2", "two")
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    assert weights(one).keys() == weights(two).keys()


def test_sdxl_and_what_is_refused(train, tmp_path, capsys):
    big = tiny.save(tiny.inpainting(tiny.stable_diffusion_xl()), tmp_path / "model")
    assert len(losses(train(f"--max_train_steps 1 --train_batch_size 1 {VALIDATE}", "big", model=big))) == 1
    with pytest.raises(SystemExit) as refused:
        train("--max_train_steps 1 --center_crop --cache_latents on", "cached")
    assert refused.value.code == 2 and "--cache_latents on" in capsys.readouterr().err
