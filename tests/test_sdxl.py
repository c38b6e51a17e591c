"""Stable Diffusion XL: both text encoders, what the UNet is told of sizes and crops, the script as users call it."""

import importlib
import math
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_scripts import PROMPT, VALIDATE, losses, same, weights

from utils import adapters, learning, models
from utils.randomness import Draws

SCRIPT = "train_dreambooth_lora_sdxl"


@pytest.fixture
def train(sdxl, photos, tmp_path):
    """train("--options ...", name="run") -> output folder"""

    def call(options="", name="run", script=SCRIPT, model=sdxl):
        module = importlib.import_module(script)
        folder = tmp_path / name
        base = f"--pretrained_model_name_or_path '{model}' --output_dir '{folder}' --report_to none --seed 3"
        base += f" --instance_data_dir '{photos}' --instance_prompt '{PROMPT}'"
        module.main(module.parse_args(shlex.split(f"{base} {options}")))
        return folder

    return call


def loaded(folder, dtype=torch.float32, **options):
    family = models.family_of(str(folder))
    family.load("cpu", dtype, **options)
    return family


def batch_of(**more):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sizes = {"original_size": torch.tensor([[1023, 769], [80, 96]]), "crop_top_left": torch.tensor([[257, 3], [0, 16]])}
    return {"pixels": pixels, "captions": [PROMPT, "a photo of a red cat"], **sizes, **more}


def stock(model):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipeline(PROMPT, num_inference_steps=4, guidance_scale=7.5, generator=generator, height=64, width=64)
    return np.asarray(image.images[0], dtype=int)


def shown(folder, step, number=0):
    return np.asarray(Image.open(folder / "samples" / f"step-{step:06d}" / f"00-{number:02d}.png"), dtype=int)


# --- The family --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [True, False])
def test_a_caption_left_out_is_what_guidance_compares_with(sdxl, zeros):
    family = loaded(sdxl)
    family.zeros_for_nothing = zeros
    batch = {"captions": ["", PROMPT], "pixels": torch.zeros(2, 3, 64, 64)}
    batch |= {"original_size": torch.full((2, 2), 64), "crop_top_left": torch.zeros(2, 2, dtype=torch.int64)}
    heard, guided = family.condition(batch), family.sampling_prompts([PROMPT], "")
    for name, kind in (("text", "prompt_embeds"), ("pooled", "pooled_prompt_embeds")):
        nothing, something = heard[name]
        assert torch.allclose(nothing, guided[f"negative_{kind}"][0], atol=1e-5) and nothing.any() != zeros
        assert torch.allclose(something, guided[kind][0], atol=1e-5)


def test_prompts_encode_as_in_the_stock_pipeline(sdxl):
    family, texts = loaded(sdxl), [PROMPT, "a red cat"]
    ours = family.encode_prompts(texts)
    text, _, pooled, _ = family.pipeline_from_disk(torch.float32).encode_prompt(
        texts, device="cpu", do_classifier_free_guidance=False
    )
    assert ours["text"].shape == (2, 77, 40) and ours["pooled"].shape == (2, 20)
    assert torch.equal(ours["text"], text) and torch.equal(ours["pooled"], pooled)


def test_cached_prompts_draw_the_same_and_both_encoders_go(sdxl):
    family = loaded(sdxl)
    pipeline, same_seed = family.pipeline(), {"num_inference_steps": 3, "output_type": "np", "height": 64, "width": 64}
    before = [
        pipeline(PROMPT, negative_prompt=negative, generator=torch.Generator().manual_seed(1), **same_seed).images
        for negative in (None, "blue")
    ]
    assert abs(before[0] - before[1]).max() > 1e-3
    family.cache_prompts([PROMPT, "blue"])
    assert family.text_encoder is None and family.text_encoder_2 is None
    for negative, want in zip(("", "blue"), before):
        words = family.sampling_prompts([PROMPT], negative)
        got = family.pipeline()(**words, generator=torch.Generator().manual_seed(1), **same_seed).images
        assert abs(got - want).max() < 1e-4  # far below one grey level, 4e-3


@pytest.mark.parametrize("cached", [False, True])
def test_time_ids_reach_the_unet_exactly_in_bf16(sdxl, cached):
    family, batch = loaded(sdxl, torch.bfloat16), batch_of()
    if cached:
        mean, std = family.posterior(batch.pop("pixels"))
        batch |= {"latent_mean": mean, "latent_std": std}
    got = []
    family.unet.add_time_proj.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        family.predict(torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), family.condition(batch))
    assert got[0].dtype == torch.float32
    # Original height and width, crop top and left, height and width now; bf16 would make 1024 of 1023.
    assert got[0].view(2, 6).tolist() == [[1023, 769, 257, 3, 64, 64], [80, 96, 0, 16, 64, 64]]


def test_predict_is_the_unets_forward(sdxl):
    family, batch = loaded(sdxl), batch_of()
    inputs, timesteps, words = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), family.encode_prompts([PROMPT, "x"])
    batch["captions"] = [PROMPT, "x"]
    added = {"text_embeds": words["pooled"], "time_ids": family.time_ids(batch)}
    want = family.unet(inputs, timesteps, words["text"], added_cond_kwargs=added).sample
    assert torch.equal(family.predict(inputs, timesteps, family.condition(batch)), want)
    moved = family.condition(batch | {"crop_top_left": torch.tensor([[0, 0], [0, 0]])})
    assert not torch.allclose(family.predict(inputs, timesteps, moved), want)


def test_vae_keeps_full_precision_unless_its_config_says_half_is_safe(sdxl, tmp_path):
    import tiny

    tiny.vae(force_upcast=False).save_pretrained(tmp_path / "safe")
    assert loaded(sdxl, torch.bfloat16, vae=str(tmp_path / "safe")).vae.dtype == torch.bfloat16
    family = loaded(sdxl, torch.bfloat16)
    assert family.vae.dtype == torch.float32 and family.unet.dtype == torch.bfloat16
    pixels, latents = batch_of()["pixels"], torch.randn(1, 4, 8, 8)
    exact = *family.posterior(pixels), family.vae.decode(latents).sample
    with torch.autocast("cpu", torch.bfloat16):  # which would narrow it again
        again = *family.posterior(pixels), family.vae.decode(latents).sample
    assert all(torch.equal(one, two) for one, two in zip(exact, again))


def test_latents_are_normalised_as_the_vaes_config_says(sdxl):
    family, batch = loaded(sdxl), batch_of()
    plain = family.latents(batch, Draws(3, [0, 2]))
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 4.0, 0.5]
    family.vae.register_to_config(latents_mean=mean, latents_std=std)
    shift, width = torch.tensor(mean).view(1, 4, 1, 1), torch.tensor(std).view(1, 4, 1, 1)
    want = (plain / 0.13025 - shift) / width * 0.13025
    assert torch.allclose(family.latents(batch, Draws(3, [0, 2])), want, atol=1e-6)


def test_saved_pipeline_is_stock_and_draws_the_same(sdxl, tmp_path):
    family = loaded(sdxl)
    learns = learning.full(family, text_encoder=True)
    assert sorted(learns.modules) == ["text_encoder", "text_encoder_2", "unet"]
    with torch.no_grad():
        for weight in learns.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    family.save_pipeline(tmp_path / "out")
    learns.save(tmp_path / "weights")
    family.own_scheduler = stock(tmp_path / "out").scheduler
    ours = drawn(family.pipeline(), seed=1)
    assert np.abs(drawn(stock(tmp_path / "out"), seed=1) - ours).max() <= 1
    assert np.abs(drawn(stock(sdxl), seed=1) - ours).max() > 1
    for folder in ("out", "weights"):
        for encoder in ("text_encoder", "text_encoder_2"):
            keys = load_file(tmp_path / folder / encoder / "model.safetensors").keys()
            assert all(key.startswith("text_model.") or key == "text_projection.weight" for key in keys)
    again = learning.full(loaded(sdxl), text_encoder=True)
    again.load(tmp_path / "weights")
    assert all(torch.equal(one, two) for one, two in zip(learns.parameters(), again.parameters(), strict=True))


def test_every_adapter_of_both_encoders_gets_a_gradient(sdxl):
    """Also those of the layer that is not listened to: several processes must agree on what was computed."""
    family = loaded(sdxl)
    learns = adapters.attach(family, text_encoder=True)
    family.predict(torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), family.condition(batch_of())).mean().backward()
    assert all(weight.grad is not None for weight in learns.parameters())
    heard = {key.split(".")[0] for key, weight in learns.named().items() if weight.grad.abs().sum() > 0}
    assert heard == {"unet", "text_encoder", "text_encoder_2"}


def test_what_it_cannot_do_is_refused_by_name(sdxl, capsys):
    with pytest.raises(SystemExit) as refused:
        loaded(sdxl, tokenizer="other")
    assert refused.value.code == 2 and "--tokenizer_name" in capsys.readouterr().err


# --- The script --------------------------------------------------------------------------------------------------


def test_defaults_are_those_users_know(sdxl):
    words = ["--pretrained_model_name_or_path", str(sdxl), "--instance_data_dir", "d", "--instance_prompt", "p"]
    args = importlib.import_module(SCRIPT).parse_args(words)
    assert (args.learning_rate, args.adam_weight_decay, args.rank, args.train_batch_size) == (1e-4, 1e-4, 4, 4)
    assert (args.text_encoder_lr, args.adam_weight_decay_text_encoder, args.validation_epochs) == (5e-6, 1e-3, 50)
    assert args.output_dir == "lora-dreambooth-model" and args.resolution is None


@pytest.mark.parametrize("encoders", ["", "--train_text_encoder --text_encoder_lr 0.05"], ids=["unet", "encoders"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_lora_draws_the_same_in_stock_diffusers(train, sdxl, encoders, precision):
    folder = train(
        f"--max_train_steps 3 --train_batch_size 1 --learning_rate 0.05 --checkpointing_steps 0 {VALIDATE} {encoders}"
        f" --mixed_precision {precision} --output_kohya_format"
    )
    assert len(losses(folder)) == 3 and all(math.isfinite(loss) for loss in losses(folder))
    trained = {key.split(": ")[1].split(".")[0] for key in weights(folder)}
    assert trained == ({"unet", "text_encoder", "text_encoder_2"} if encoders else {"unet"})
    assert "stable-diffusion-xl" in (folder / "README.md").read_text()
    if precision == "bf16":  # rounding differs from the stock pipeline's; that it draws is enough
        return
    pipeline = stock(sdxl)
    before = drawn(pipeline, seed=4)
    pipeline.load_lora_weights(folder)
    for number, seed in enumerate((3, 4)):
        assert np.abs(drawn(pipeline, seed) - shown(folder, 3, number)).max() <= 1
    assert np.abs(drawn(pipeline, seed=4) - before).max() > 1, "the adapters change nothing"
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights_kohya.safetensors")
    assert np.abs(drawn(pipeline, seed=3) - shown(folder, 3)).max() <= 1
    if encoders:  # both encoders' part arrives too
        pipeline.unload_lora_weights()
        whole = load_file(folder / "pytorch_lora_weights.safetensors")
        for encoder in ("text_encoder.", "text_encoder_2."):
            pipeline.load_lora_weights({key: w for key, w in whole.items() if not key.startswith(encoder)})
            assert np.abs(drawn(pipeline, seed=3) - shown(folder, 3)).max() > 1
            pipeline.unload_lora_weights()


@pytest.mark.parametrize("crops", ["--random_flip", "--center_crop"], ids=["uncached", "cached"])
def test_resumed_equals_uninterrupted(train, crops, class_photos):
    options = (
        f"{crops} --train_text_encoder --use_ema --gradient_accumulation_steps 2 --lr_scheduler cosine --snr_gamma 5"
        " --lora_dropout 0.2 --train_batch_size 2 --checkpointing_steps 2 --learning_rate 1e-3 --max_train_steps 4"
        f" --with_prior_preservation --class_data_dir '{class_photos}' --class_prompt 'a dog' --num_class_images 2"
    )
    whole = train(options, "whole")
    again = train(f"{options} --resume_from_checkpoint '{whole / 'checkpoint-2'}'", "again")
    assert same(whole, again) and losses(whole)[2:] == losses(again)
    assert not same(whole, whole / "checkpoint-2"), "the comparison could not fail"


def test_min_snr_with_prior_weighs_instance_examples_only(train, class_photos):
    options = (
        "--center_crop --max_train_steps 1 --train_batch_size 2 --with_prior_preservation --class_prompt 'a dog'"
        f" --class_data_dir '{class_photos}' --num_class_images 4 --checkpointing_steps 0"
    )

    def loss(name, more=""):
        return losses(train(f"{options} {more}", name))[0]

    plain, weighted = loss("plain"), loss("weighted", "--snr_gamma 0.01")
    instance = loss("instance", "--prior_loss_weight 0")
    weighted_instance = loss("weighted-instance", "--prior_loss_weight 0 --snr_gamma 0.01")
    assert weighted_instance < 0.9 * instance
    assert weighted - weighted_instance == pytest.approx(plain - instance, rel=1e-4)


# The commands that users already type, shortened.
COMMANDS = [
    "--resolution=64 --train_batch_size=1 --gradient_accumulation_steps=4 --learning_rate=1e-4"
    ' --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=2'
    ' --validation_prompt="A photo of sks dog in a bucket"'
    ' --validation_epochs=25 --seed="0" --num_validation_images=1 --validation_num_inference_steps=2'
    " --pretrained_vae_model_name_or_path='{vae}' --mixed_precision=bf16",
    "--resolution=64 --train_batch_size=1 --gradient_checkpointing --use_8bit_adam --mixed_precision=bf16"
    " --train_text_encoder --max_train_steps=2",
    "--resolution=64 --train_batch_size=2 --gradient_checkpointing --gradient_accumulation_steps=4 --snr_gamma=5.0"
    " --checkpointing_steps=100 --max_train_steps=2 --use_8bit_adam",
    "--resolution=64 --train_batch_size=2 --gradient_checkpointing --gradient_accumulation_steps=2 --snr_gamma=5.0"
    " --with_prior_preservation --class_data_dir='{classes}' --prior_loss_weight=1.0 --class_prompt='photo of cat'"
    " --num_class_images=2 --max_train_steps=2 --use_8bit_adam",
    "--resolution=64 --train_batch_size=1 --use_dora --max_train_steps=2",
]


@pytest.mark.parametrize("options", COMMANDS)
def test_commands_that_users_already_type(train, options, sdxl, tmp_path):
    folder = train(options.format(vae=sdxl / "vae", classes=tmp_path / "class"))
    assert len(losses(folder)) == 2 and all(math.isfinite(loss) for loss in losses(folder))


def test_xformers_is_refused_where_it_cannot_work(train, capsys):
    with pytest.raises(SystemExit) as refused:
        train("--enable_xformers_memory_efficient_attention --max_train_steps 1")
    assert refused.value.code == 2 and "xformers" in capsys.readouterr().err


def test_the_other_scripts_take_sdxl_too(train, sdxl):
    options = f"--max_train_steps 2 --train_batch_size 1 --checkpointing_steps 0 --learning_rate 1e-3 {VALIDATE}"
    lora = train(options, "lora", script="train_dreambooth_lora")
    pipeline = stock(sdxl)
    pipeline.load_lora_weights(lora)
    assert np.abs(drawn(pipeline, seed=3) - shown(lora, 2)).max() <= 1
    full = train(f"{options} --train_text_encoder", "full", script="train_dreambooth")
    assert np.abs(drawn(stock(full), seed=3) - shown(full, 2)).max() <= 1


def test_infer_draws_what_stock_diffusers_draws(train, sdxl, tmp_path):
    import infer

    folder = train("--max_train_steps 2 --train_batch_size 1 --checkpointing_steps 0 --learning_rate 0.05")
    words = f"--lora '{folder}' --prompt '{PROMPT}' --num_images 1 --seed 3 --num_inference_steps 4 --device cpu"
    words += f" --output_dir '{tmp_path / 'images'}' --height 64 --width 64"
    (file, *_) = infer.main(infer.parse_args(shlex.split(words)))
    pipeline = stock(sdxl)
    pipeline.load_lora_weights(folder)
    assert np.abs(drawn(pipeline, seed=3) - np.asarray(Image.open(file), dtype=int)).max() <= 1
