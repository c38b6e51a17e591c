"""Noise, weights and distances of choice in whole scripts: numbers that must not move, and what each option changes."""

import importlib
import shlex
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_scripts import PROMPT, VALIDATE, losses, same

from utils import models

SHORT = "--center_crop --max_train_steps 2 --train_batch_size 2 --learning_rate 1e-3 --checkpointing_steps 0"


@pytest.fixture(scope="module")
def edm(tmp_path_factory):
    """A tiny SDXL with the scheduler of Playground v2.5, whose VAE says how its latents are distributed."""
    from diffusers import EDMDPMSolverMultistepScheduler

    pipeline = tiny.stable_diffusion_xl()
    pipeline.scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    pipeline.vae.register_to_config(
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 4.0, 0.5], scaling_factor=0.5
    )
    return tiny.save(pipeline, tmp_path_factory.mktemp("models") / "edm")


@pytest.fixture
def train(sd1, photos, tmp_path):
    def call(options="", name="run", model=sd1, script="train_dreambooth_lora"):
        module = importlib.import_module(script)
        given = f"--pretrained_model_name_or_path '{model}' --output_dir '{tmp_path / name}' --report_to none --seed 3"
        given += f" --instance_data_dir '{photos}' --instance_prompt '{PROMPT}' {options}"
        module.main(module.parse_args(shlex.split(given)))
        return tmp_path / name

    return call


def refused(train, capsys, options, **more):
    with pytest.raises(SystemExit) as stopped:
        train(options, "refused", **more)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# First losses on the tiny SDXL with class images, written down once.
GOLDEN = {
    "epsilon": [2.3850994, 2.3921499],
    "v_prediction": [1.4511154, 1.4988682],
    "euler": [2.3850994, 2.3921499],
    "euler, velocity": [1.1052207, 1.1746461],
    "edm": [0.6473577, 0.5866594],
    "edm, log-normal": [2.83184, 2.484334],
}
OBJECTIVES = {
    "epsilon": "",
    "v_prediction": "--prediction_type v_prediction",
    "euler": "--do_edm_style_training",
    "euler, velocity": "--do_edm_style_training --prediction_type v_prediction",
    "edm": "",
    "edm, log-normal": "--edm_sigmas lognormal",
}


@pytest.mark.parametrize("objective", GOLDEN)
def test_golden_losses(train, sdxl, edm, class_photos, objective):
    model = edm if objective.startswith("edm") else sdxl
    options = f"{SHORT} --with_prior_preservation --class_data_dir '{class_photos}' --class_prompt 'a dog'"
    options += f" --num_class_images 4 {OBJECTIVES[objective]}"
    got = losses(train(options, model=model, script="train_dreambooth_lora_sdxl"))
    assert got == pytest.approx(GOLDEN[objective], rel=1e-4)
    if objective == "euler":
        assert GOLDEN["euler"] == GOLDEN["epsilon"]


def test_a_model_with_an_edm_scheduler(train, edm, tmp_path, capsys):
    """Class images, training, resume and samples all know its noise; the result draws the same in stock diffusers."""
    from diffusers import EDMDPMSolverMultistepScheduler, StableDiffusionXLPipeline

    options = (
        f"--max_train_steps 3 --train_batch_size 2 --learning_rate 0.01 --checkpointing_steps 2 {VALIDATE}"
        f" --with_prior_preservation --class_data_dir '{tmp_path / 'class'}' --class_prompt 'a dog'"
        " --num_class_images 2"
    )
    script = {"model": edm, "script": "train_dreambooth_lora_sdxl"}
    folder = train(options, **script)
    again = train(f"{options} --resume_from_checkpoint '{folder / 'checkpoint-2'}'", "again", **script)
    assert same(folder, again) and losses(folder)[2:] == losses(again)
    pipeline = StableDiffusionXLPipeline.from_pretrained(edm, add_watermarker=False)
    assert isinstance(pipeline.scheduler, EDMDPMSolverMultistepScheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder)
    generator = torch.Generator().manual_seed(3)
    image = pipeline(PROMPT, num_inference_steps=4, guidance_scale=7.5, generator=generator, height=64, width=64)
    ours = np.asarray(Image.open(folder / "samples" / "step-000003" / "00-00.png"), dtype=int)
    assert np.abs(np.asarray(image.images[0], dtype=int) - ours).max() <= 2
    for option in (
        "--snr_gamma 5",
        "--debiased_estimation",
        "--timestep_bias_strategy later --timestep_bias_multiplier 2",
    ):
        said = refused(train, capsys, option, **script)
        assert option.split()[0] in said and "EDM-style" in said
    assert "--snr_gamma" in refused(train, capsys, "--do_edm_style_training --snr_gamma 5")


@pytest.mark.parametrize(
    "options",
    [
        "--loss_type huber --huber_c 0.05 --multires_noise_iterations 6 --timestep_bias_strategy later"
        " --timestep_bias_multiplier 50 --debiased_estimation",
        "--loss_type smooth_l1 --huber_schedule constant --do_edm_style_training --edm_sigmas lognormal"
        " --prediction_type v_prediction",
    ],
    ids=["ddpm", "edm"],
)
def test_a_batch_equals_its_accumulated_parts(train, options):
    one = f"--center_crop --max_train_steps 2 --learning_rate 1e-3 --checkpointing_steps 0 {options}"
    whole = losses(train(f"{one} --train_batch_size 2", "whole"))
    parts = losses(train(f"{one} --train_batch_size 1 --gradient_accumulation_steps 2", "parts"))
    assert whole == pytest.approx(parts, rel=1e-5) and np.isfinite(whole).all()


def test_what_contradicts_itself_is_refused(train, capsys):
    for options, says in (
        ("--snr_gamma 5 --debiased_estimation", "leave one out"),
        ("--timestep_bias_strategy range --timestep_bias_begin 500 --timestep_bias_end 400", "is not before"),
        ("--edm_sigmas lognormal", "needs --do_edm_style_training"),
        ("--rescale_betas_zero_snr", "--prediction_type v_prediction"),
        ("--do_edm_style_training --loss_type huber --huber_schedule exponential", "snr fits"),
    ):
        assert says in refused(train, capsys, f"--max_train_steps 1 {options}")


def test_zero_terminal_snr_reaches_training_sampling_and_the_saved_pipeline(train, sd1, sd2):
    family = models.family_of(str(sd2), rescale_betas_zero_snr=True)
    family.load("cpu", torch.float32, parts=["unet", "vae"])
    assert family.scheduler.alphas_cumprod[-1] == 0
    folder = train(f"{SHORT} --rescale_betas_zero_snr --snr_gamma 5", model=sd2, script="train_dreambooth")
    assert np.isfinite(losses(folder)).all()
    # The saved pipeline says so itself, and training on it needs no option.
    family = models.family_of(str(folder))
    family.load("cpu", torch.float32, parts=["unet", "vae"])
    assert family.scheduler.alphas_cumprod[-1] == 0
    assert family.own_scheduler.config.timestep_spacing == "trailing"


# --- Text encoders and VAE ---------------------------------------------------------------------------------------


def test_clip_skip_listens_to_an_earlier_layer(sd1, sdxl, tmp_path, capsys):
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = shutil.copytree(sd1, tmp_path / "deep")
    config = CLIPTextConfig.from_pretrained(sd1 / "text_encoder")
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    family = models.family_of(str(folder), clip_skip=1)
    family.load("cpu", torch.float32)
    got = family.encode_prompts([PROMPT])["text"]
    # The same encoder without its last layer.
    family.clip_skip, encoder = 0, family.text_encoder
    inner = getattr(encoder, "text_model", encoder)
    inner.encoder.layers = inner.encoder.layers[:3]
    torch.testing.assert_close(got, family.encode_prompts([PROMPT])["text"])
    with pytest.raises(SystemExit) as stopped:
        models.family_of(str(sdxl), clip_skip=1).load("cpu", torch.float32)
    assert stopped.value.code == 2 and "--clip_skip 1" in capsys.readouterr().err


def test_infer_draws_with_the_layers_that_were_trained(train, sd1, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    model = shutil.copytree(sd1, tmp_path / "model")
    config = CLIPTextConfig.from_pretrained(sd1 / "text_encoder")
    config.num_hidden_layers = 4
    CLIPTextModel(config).save_pretrained(model / "text_encoder")
    folder = train(f"--max_train_steps 1 --train_text_encoder --clip_skip 1 {VALIDATE}", model=model)
    infer = importlib.import_module("infer")
    words = (
        f"--lora '{folder}' --prompt '{PROMPT}' --seed 3 --width 64 --height 64 --num_inference_steps 4 --device cpu"
    )
    ours = np.asarray(Image.open(folder / "samples" / "step-000001" / "00-00.png"), dtype=int)
    named = f"--pretrained_model_name_or_path '{model}'"  # says nothing about how the run listened to it
    for skip, alike in (("", True), ("--clip_skip 0", False), (named, True)):
        given = f"{words} --num_images 1 {skip} --output_dir '{tmp_path / f'images{alike}'}'"
        (file, *_) = infer.main(infer.parse_args(shlex.split(given)))
        assert (np.abs(np.asarray(Image.open(file), dtype=int) - ours).max() <= 2) == alike


def test_sdxl_clip_skip_as_in_the_stock_pipeline(sdxl, tmp_path):
    folder = tmp_path / "deep"
    pipeline = tiny.stable_diffusion_xl()
    for name in ("text_encoder", "text_encoder_2"):
        config = getattr(pipeline, name).config
        config.num_hidden_layers = 4
        setattr(pipeline, name, type(getattr(pipeline, name))(config))
    tiny.save(pipeline, folder)
    family = models.family_of(str(folder), clip_skip=1)
    family.load("cpu", torch.float32)
    ours = family.encode_prompts([PROMPT])
    text, _, pooled, _ = pipeline.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False, clip_skip=1)
    torch.testing.assert_close(ours["text"], text)
    torch.testing.assert_close(ours["pooled"], pooled)


@pytest.mark.parametrize("crops", ["--center_crop", "--cache_latents off"])
def test_a_vae_that_overflows_is_named_with_its_cure(train, sd1, tmp_path, capsys, crops):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(sd1, tmp_path / "broken")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"] * float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SystemExit) as stopped:
        train(f"--max_train_steps 1 {crops}", model=folder)
    said = capsys.readouterr().err
    assert stopped.value.code == 4 and "sdxl-vae-fp16-fix" in said and "--mixed_precision bf16" in said


def test_vae_tiling_encodes_in_tiles(sd1):
    plain, tiled = models.family_of(str(sd1)), models.family_of(str(sd1), vae_tiling=True)
    for family in (plain, tiled):
        family.load("cpu", torch.float32, parts=["vae"])
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    one, other = plain.posterior(pixels)[0], tiled.posterior(pixels)[0]
    assert one.shape == other.shape and not torch.equal(one, other)
    small = pixels[..., :64, :64]  # no larger than a tile
    torch.testing.assert_close(plain.posterior(small)[0], tiled.posterior(small)[0])
