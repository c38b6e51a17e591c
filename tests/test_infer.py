"""infer.py whole, on tiny random pipelines: what is loaded, what is drawn, what is refused before anything is read."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from utils import samplers, saved

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--num_images", "2", "--num_inference_steps", "2"]


def draw(folder, *options):
    return infer.main(infer.parse_args([*map(str, options), "--output_dir", str(folder), "--device", "cpu"]))


def refused(capsys, *options) -> str:
    with pytest.raises(SystemExit) as stop:
        infer.main(infer.parse_args([*map(str, options)]))
    assert stop.value.code == 2
    return capsys.readouterr().err


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def make_lora(base, folder, seed=0, recorded=None):
    """Adapters that change the picture: as after training, their second half is not zero."""
    import torch

    from utils import adapters, models

    family = models.family_of(str(base))
    family.load("cpu", torch.float32)
    learns = adapters.attach(family, rank=2, seed=seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for weight in learns.parameters():
            weight.normal_(std=0.3)  # larger ones would make much of rounding
    learns.save(folder)
    if recorded:
        Path(folder, "training_config.yaml").write_text(f"pretrained_model_name_or_path: {recorded}\n")
    return folder


@pytest.fixture(scope="module")
def lora(sd1, tmp_path_factory):
    return make_lora(sd1, tmp_path_factory.mktemp("runs") / "dog", recorded=sd1)


@pytest.fixture(scope="module")
def base_images(sd1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return draw(folder, "--pretrained_model_name_or_path", sd1, "--prompt", "a photo of dog", *FAST)


def test_files_settings_and_grid(base_images, sd1):
    assert [file.name for file in base_images] == [
        "00-a-photo-of-dog-seed0.png",
        "00-a-photo-of-dog-seed1.png",
        "grid.png",
    ]
    told = json.loads(Image.open(base_images[1]).text["settings"])
    assert (told["prompt"], told["seed"], told["steps"], told["base_model"]) == ("a photo of dog", 1, 2, "sd1")
    assert str(sd1.parent) not in str(told)  # a picture does not tell where its maker keeps things
    assert pixels(base_images[0]).shape == (64, 64, 3)
    assert Image.open(base_images[2]).size == (128, 64 + 2 * 20)
    assert (pixels(base_images[0]) != pixels(base_images[1])).any()


def test_any_image_can_be_drawn_again_alone(base_images, sd1, tmp_path, capsys):
    base = ["--pretrained_model_name_or_path", sd1, "--prompt", "a photo of dog", "--num_inference_steps", 2]
    files = draw(tmp_path, *base, "--seed", 1, "--num_images", 1)
    assert files == [tmp_path / "00-a-photo-of-dog-seed1.png"]  # no grid of one image
    assert np.abs(pixels(files[0]) - pixels(base_images[1])).max() <= 1  # sums of other batch sizes round differently
    assert capsys.readouterr().out == f"{files[0]}  seed 1  a photo of dog\n"


def test_lora_finds_its_base_and_draws_what_stock_diffusers_draws(lora, sd1, base_images, tmp_path):
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    files = draw(tmp_path, "--lora", lora, "--prompt", "a photo of dog", *FAST, "--batch_size", 1)
    pipe = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(lora))
    generator = torch.Generator().manual_seed(1)
    stock = pipe("a photo of dog", num_inference_steps=2, generator=generator).images[0]
    assert np.abs(pixels(files[1]) - np.asarray(stock).astype(int)).max() <= 1
    assert np.abs(pixels(files[1]) - pixels(base_images[1])).max() > 3


def test_scales(lora, sd1, base_images, tmp_path):
    """Scale 0 is the base model; twice the same LoRA at a half is the LoRA once."""
    prompt = ["--prompt", "a photo of dog", *FAST]
    off = draw(tmp_path / "off", "--lora", f"{lora}:0", *prompt)
    assert np.abs(pixels(off[0]) - pixels(base_images[0])).max() <= 1
    whole = draw(tmp_path / "whole", "--lora", lora, *prompt)
    copy = shutil.copytree(lora, tmp_path / "copy")  # another file: one given twice is refused
    halves = draw(tmp_path / "halves", "--lora", f"{lora}:0.5", "--lora", f"{copy / saved.LORA_FILE}:.5", *prompt)
    assert np.abs(pixels(whole[0]) - pixels(halves[0])).mean() < 1  # rounding grows on the way through random networks
    assert json.loads(Image.open(halves[0]).text["settings"])["lora"] == ["dog:0.5", f"{saved.LORA_FILE}:0.5"]


def test_full_checkpoint_and_full_result(sd1, base_images, tmp_path):
    import tiny

    from utils import learning

    run, result = tmp_path / "run", tmp_path / "result"
    other = tiny.stable_diffusion("epsilon", seed=5)  # the same shapes, other weights
    learning.Full({"unet": other.unet, "text_encoder": other.text_encoder}).save(run / "checkpoint-3")
    (run / "training_config.yaml").write_text(f"pretrained_model_name_or_path: {sd1}\n")
    shutil.copytree(sd1, result)
    for name in ("unet", "text_encoder"):
        shutil.rmtree(result / name)
        getattr(other, name).save_pretrained(result / name)
    prompt = ["--prompt", "a photo of dog", *FAST]
    part = draw(tmp_path / "part", "--checkpoint", run / "checkpoint-3", *prompt)
    full = draw(tmp_path / "full", "--pretrained_model_name_or_path", result, *prompt)
    assert (pixels(part[0]) == pixels(full[0])).all()
    assert np.abs(pixels(part[0]) - pixels(base_images[0])).max() > 3


def test_lora_checkpoint(lora, base_images, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    shutil.copy(lora / saved.LORA_FILE, checkpoint)
    shutil.copy(lora / "training_config.yaml", checkpoint.parent)
    files = draw(tmp_path / "out", "--checkpoint", checkpoint, "--prompt", "a photo of dog", *FAST, "--grid", "no")
    assert len(files) == 2
    assert np.abs(pixels(files[0]) - pixels(base_images[0])).max() > 3


def test_schedulers(sd1, tmp_path):
    """Each name leads to a scheduler that draws; they do not all draw the same."""
    base = ["--pretrained_model_name_or_path", sd1, "--prompt", "dog", "--num_images", 1, "--num_inference_steps", 3]
    drawn = {
        name: pixels(draw(tmp_path / name, *base, "--scheduler", name)[0]).tobytes()
        for name in ["model", *samplers.SAMPLERS, "EulerDiscreteScheduler"]
        if name != "lms" or importable("scipy")
    }
    assert drawn["euler"] == drawn["EulerDiscreteScheduler"]
    assert len(set(drawn.values())) >= len(drawn) - 3


def importable(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_size_precision_and_negative_prompt(sd1, base_images, tmp_path):
    base = ["--pretrained_model_name_or_path", sd1, "--prompt", "a photo of dog", *FAST]
    wide = draw(tmp_path / "wide", *base, "--width", 128, "--height", 64, "--dtype", "bf16")
    assert pixels(wide[0]).shape == (64, 128, 3)
    assert json.loads(Image.open(wide[0]).text["settings"])["dtype"] == "bfloat16"
    negative = draw(tmp_path / "negative", *base, "--negative_prompt", "snow")
    assert (pixels(negative[0]) != pixels(base_images[0])).any()


# Prompts.


def prompts_of(*options):
    wrong = []
    found = infer.all_prompts(infer.parse_args([*map(str, options)]), wrong)
    assert not wrong
    return found


def test_prompt_sets_with_and_without_identifier():
    both = [
        "--prompt_set",
        "bucket",
        "plain",
        "--identifier",
        "sks",
        "--class_noun",
        "dog",
        "--also_without_identifier",
    ]
    assert prompts_of(*both) == [
        "a photo of sks dog in a bucket",
        "a photo of dog in a bucket",
        "a photo of sks dog",
        "a photo of dog",
    ]
    assert prompts_of("--prompt_set", "haircut", "--class_noun", "dog") == ["a photo of dog getting a haircut"]
    assert len(prompts_of("--prompt_set", "all", "--class_noun", "dog")) == len(infer.PROMPT_SETS)


def test_prompts_from_options_and_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa {class} at night\r\n\r\n# not this\n a {identifier} car \n".encode())
    given = ["--prompt", "one, two", "--prompt", "{a: b}", "--prompt", "one, two", "--prompt_file", file]
    found = prompts_of(*given, "--class_noun", "dog")
    assert found == ["one, two", "{a: b}", "a dog at night", "a car"]
    # Only the whole word is the identifier.
    assert prompts_of("--prompt", "a cat", "--identifier", "a", "--also_without_identifier") == ["a cat", "cat"]


# What was saved.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("runs/dog", ("runs/dog", 1.0)),
        ("runs/dog:0.8", ("runs/dog", 0.8)),
        ("runs/dog:-1", ("runs/dog", -1.0)),
        (r"C:\runs\dog", (r"C:\runs\dog", 1.0)),
        (r"C:\runs\dog:2", (r"C:\runs\dog", 2.0)),
    ],
)
def test_scale_after_the_last_colon(text, expected):
    assert saved.split_scale(text) == expected


def test_a_path_that_ends_like_a_scale_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dog:1").mkdir()
    assert saved.split_scale("dog:1") == ("dog:1", 1.0)


def test_base_from_settings_adapter_file_and_card(lora, sd1, tmp_path):
    from safetensors.torch import load_file, save_file

    moved = tmp_path / "moved"
    moved.mkdir()
    save_file(load_file(lora / saved.LORA_FILE), moved / saved.LORA_FILE, metadata={"base_model": "toybox"})
    assert saved.recorded_base(moved / saved.LORA_FILE).name == "toybox"
    (moved / "training_config.yaml").write_text(f"pretrained_model_name_or_path: {sd1}\n")
    assert saved.recorded_base(moved / saved.LORA_FILE).name == str(sd1)
    # A record that leads nowhere any more gives way to one that may.
    (moved / "training_config.yaml").write_text("pretrained_model_name_or_path: /gone/model\n")
    assert saved.recorded_base(moved / saved.LORA_FILE).name == "toybox"
    card = tmp_path / "card"
    card.mkdir()
    (card / "README.md").write_text("---\nbase_model: CompVis/stable-diffusion-v1-4\ntags: [lora]\n---\n# dog\n")
    assert saved.recorded_base(card).name == "CompVis/stable-diffusion-v1-4"


def test_settings_of_the_run_give_revision_and_variant(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "training_config.yaml").write_text(
        "pretrained_model_name_or_path: user/model\nrevision: abc\nvariant: fp16\n"
    )
    assert saved.recorded_base(tmp_path / "checkpoint-9") == saved.Base("user/model", "abc", "fp16")


def test_mistakes_are_told_together(capsys, tmp_path):
    said = refused(capsys, "--lora", tmp_path / "none", "--scheduler", "eulr", "--height", 44, "--prompt_set", "all")
    for part in ("none does not exist", "did you mean euler?", "40 and 48", "--class_noun"):
        assert part in said
    assert said.count("error: ") == 4


def test_refusals(capsys, tmp_path, sd1, sd2, lora):
    dog = ["--prompt", "dog"]
    assert "there is no model" in refused(capsys, *dog)
    assert "nothing to draw" in refused(capsys, "--lora", lora)
    assert "is a whole pipeline" in refused(capsys, "--lora", sd1, *dog)
    assert "belongs to --lora" in refused(capsys, "--pretrained_model_name_or_path", lora, *dog)
    assert "another family" in refused(capsys, "--pretrained_model_name_or_path", sd2, "--lora", lora, *dog)
    (tmp_path / "unsafe").mkdir()
    (tmp_path / "unsafe" / "pytorch_lora_weights.bin").write_bytes(b"\x80")
    assert "can run code" in refused(capsys, "--lora", tmp_path / "unsafe", *dog)
    assert "can run code" in refused(capsys, "--lora", tmp_path / "unsafe" / "pytorch_lora_weights.bin", *dog)
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    weights = make_lora(sd1, tmp_path / "x") / saved.LORA_FILE
    from safetensors.torch import load_file, save_file

    save_file(load_file(weights), nameless / "some.safetensors")
    assert "no base model is recorded" in refused(capsys, "--lora", nameless, *dog)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:100])
    assert "damaged" in refused(capsys, "--lora", cut, *dog)
    other = make_lora(sd2, tmp_path / "other", recorded=sd2)
    assert "several base models" in refused(capsys, "--lora", lora, "--lora", other, *dog)
    run = tmp_path / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    assert "inside are checkpoint-5" in refused(capsys, "--checkpoint", run, *dog)
    assert "holds neither" in refused(capsys, "--checkpoint", run / "checkpoint-5", *dog)


def test_dry_run_draws_nothing(lora, tmp_path, capsys):
    assert draw(tmp_path / "out", "--lora", lora, "--prompt", "dog", "--dry_run") == []
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "base model: " in said and "00-dog-seed3.png  seed 3  dog\n" in said


@pytest.mark.parametrize("options", [["--help"], ["--promt", "dog"], ["--lora", "no/such/folder", "--prompt", "dog"]])
def test_answers_at_once(options, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, ROOT / "infer.py", *options], cwd=tmp_path, capture_output=True, env=os.environ
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (0 if options == ["--help"] else 2)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


# Adapters of other programs and kinds, two blocks of two LoRAs, a refiner.


def trained(base, folder, seed=0, **options):
    import torch

    from utils import adapters, models

    family = models.family_of(str(base))
    family.load("cpu", torch.float32)
    learns = adapters.attach(family, rank=2, seed=seed, **options)
    with torch.no_grad():
        for number, weight in enumerate(learns.parameters()):
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + number)))
    learns.save(folder, output_kohya_format=not options.get("dora"))
    if options.get("dora"):
        from test_formats import as_lycoris_keeps_dora

        as_lycoris_keeps_dora(folder)
    return family, folder


def stock_image(pipeline, seed=0):
    from utils import validation

    pipeline.scheduler = samplers.make("DPMSolverMultistepScheduler", pipeline.scheduler.config)
    words = {"prompt": "a photo of dog"}
    (image,) = validation.draw(pipeline, words, [seed], steps=2, width=64, height=64)
    return np.asarray(image[1]).astype(int)


ONE = [
    "--prompt",
    "a photo of dog",
    "--num_images",
    "1",
    "--num_inference_steps",
    "2",
    "--width",
    "64",
    "--height",
    "64",
]


@pytest.mark.parametrize("kind", [{"dora": True}, {"adapter": "loha"}, {"adapter": "lokr"}], ids=str)
def test_files_that_stock_diffusers_does_not_read_whole(sdxl, kind, tmp_path):
    family, folder = trained(sdxl, tmp_path / "dog", text_encoder=True, **kind)
    ours = stock_image(family.pipeline())
    base = ["--pretrained_model_name_or_path", sdxl, *ONE]
    (file,) = draw(tmp_path / "out", *base, "--lora", folder / "pytorch_lora_weights_kohya.safetensors")
    assert np.abs(pixels(file) - ours).max() <= 1
    (off,) = draw(tmp_path / "off", *base, "--lora", f"{folder}:0")
    if "dora" not in kind:  # DoRA keeps its lengths at any strength
        (plain,) = draw(tmp_path / "plain", *base)
        assert np.abs(pixels(off) - pixels(plain)).max() <= 1
    # Beside an ordinary one, whatever the order.
    _, other = trained(sdxl, tmp_path / "ink", seed=50)
    both = [
        draw(tmp_path / name, *base, "--lora", one, "--lora", two)[0]
        for name, one, two in (("first", f"{folder}:0.5", other), ("second", other, f"{folder}:0.5"))
    ]
    assert np.abs(pixels(both[0]) - ours).max() > 1
    if "dora" not in kind:
        assert np.abs(pixels(both[0]) - pixels(both[1])).max() <= 1


@pytest.fixture(scope="module")
def like_sdxl(tmp_path_factory):
    """A tiny SDXL whose blocks have the places that they have in the published one."""
    import tiny
    import torch

    pipeline = tiny.stable_diffusion_xl()
    torch.manual_seed(0)
    pipeline.unet = type(pipeline.unet)(
        **dict(pipeline.unet.config)
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
    )
    return tiny.save(pipeline, tmp_path_factory.mktemp("models") / "blora")


def test_content_of_one_and_style_of_another(like_sdxl, tmp_path, capsys):
    from safetensors.torch import load_file

    _, dog = trained(like_sdxl, tmp_path / "dog", lora_unet_blocks=["content", "style"])
    _, ink = trained(like_sdxl, tmp_path / "ink", seed=100, lora_conv_rank=2)
    base = ["--pretrained_model_name_or_path", like_sdxl, *ONE]
    (file,) = draw(tmp_path / "out", *base, "--content_lora", dog, "--style_lora", f"{ink}:0.8")
    parts = {}
    for folder, block, scale in ((dog, "up_blocks.0.attentions.0.", 1.0), (ink, "up_blocks.0.attentions.1.", 0.8)):
        for key, weight in load_file(folder / saved.LORA_FILE).items():
            if key.startswith(f"unet.{block}"):
                parts[key] = weight * (scale if ".up." in key else 1.0)
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(like_sdxl, add_watermarker=False)
    before = stock_image(pipeline)
    pipeline.load_lora_weights(parts)
    assert np.abs(pixels(file) - stock_image(pipeline)).max() <= 1
    assert np.abs(pixels(file) - before).max() > 1
    assert json.loads(Image.open(file).text["settings"])["lora"] == ["dog:1 (content)", "ink:0.8 (style)"]
    _, mid = trained(like_sdxl, tmp_path / "mid", lora_unet_blocks=["mid_block"])
    assert "holds nothing of up_blocks.0.attentions.1" in refused(capsys, *base, "--style_lora", mid)
    assert "--content_lora none does not exist" in refused(capsys, *base, "--content_lora", "none")


def test_the_refiner_goes_on_where_the_base_stops(sdxl, tmp_path, capsys):
    import tiny
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    donor = tiny.stable_diffusion_xl(seed=9)
    unet = tiny.unet(
        24,
        linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 20,  # as the published one: an aesthetic score, no target size
    )
    StableDiffusionXLImg2ImgPipeline(
        vae=donor.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=donor.text_encoder_2,
        tokenizer_2=donor.tokenizer_2,
        unet=unet,
        scheduler=donor.scheduler,
        requires_aesthetics_score=True,
        add_watermarker=False,
    ).save_pretrained(tmp_path / "refiner")
    base = ["--pretrained_model_name_or_path", sdxl, "--prompt", "a photo of dog", "--num_inference_steps", 5]
    base += ["--num_images", 2, "--width", 64, "--height", 64, "--grid", "no"]
    files = draw(tmp_path / "out", *base, "--refiner", tmp_path / "refiner", "--refiner_start", 0.6)
    plain = draw(tmp_path / "plain", *base)

    first = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    second = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        tmp_path / "refiner", vae=first.vae, text_encoder_2=first.text_encoder_2, add_watermarker=False
    )
    for pipeline in (first, second):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    told = {"prompt": "a photo of dog", "num_inference_steps": 5, "guidance_scale": 7.5}
    for k, file in enumerate(files):
        generator = torch.Generator().manual_seed(k)
        latents = first(
            **told, height=64, width=64, generator=generator, denoising_end=0.6, output_type="latent"
        ).images
        generator = torch.Generator().manual_seed(k)
        image = second(**told, image=latents, generator=generator, denoising_start=0.6).images[0]
        assert np.abs(pixels(file) - np.asarray(image).astype(int)).max() <= 1
        assert np.abs(pixels(file) - pixels(plain[k])).max() > 3
    assert json.loads(Image.open(files[0]).text["settings"])["refiner_start"] == 0.6
    assert "is no SDXL refiner" in refused(capsys, *base, "--refiner", sdxl)


def test_the_vae_can_be_another(sd1, base_images, tmp_path):
    import tiny
    import torch

    torch.manual_seed(5)
    tiny.vae().save_pretrained(tmp_path / "vae")
    base = ["--pretrained_model_name_or_path", sd1, "--prompt", "a photo of dog", *FAST]
    files = draw(tmp_path / "out", *base, "--pretrained_vae_model_name_or_path", tmp_path / "vae")
    assert np.abs(pixels(files[0]) - pixels(base_images[0])).max() > 3


def test_a_checkpoint_is_drawn_with_its_averages(sd1, base_images, tmp_path, capsys):
    """As the final result of a run with --use_ema is; adapters and whole networks alike."""
    import torch

    from utils import ema, learning, models

    prompt = ["--prompt", "a photo of dog", *FAST, "--grid", "no"]
    averaged = make_lora(sd1, tmp_path / "averaged", seed=1, recorded=sd1)
    checkpoint = make_lora(sd1, tmp_path / "checkpoint-3", recorded=sd1)
    shutil.copy(averaged / saved.LORA_FILE, checkpoint / "pytorch_lora_weights_ema.safetensors")
    assert saved.averaged(checkpoint / saved.LORA_FILE) == checkpoint / saved.LORA_FILE, "only in a checkpoint"
    (checkpoint / "manifest.json").write_text("{}")
    one = draw(tmp_path / "one", "--checkpoint", checkpoint, *prompt)
    assert "checkpoint-3: drawn with its averaged weights" in capsys.readouterr().out
    assert json.loads(Image.open(one[0]).text["settings"])["averaged"] == "checkpoint-3"
    assert (pixels(one[0]) == pixels(draw(tmp_path / "two", "--lora", averaged, *prompt)[0])).all()

    family = models.family_of(str(sd1))
    family.load("cpu", torch.float32)
    learns = learning.full(family)
    average = ema.Average(learns)  # the base model itself
    with torch.no_grad():
        for weight in learns.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    learns.save(tmp_path / "full" / "checkpoint-4")
    (tmp_path / "full" / "training_config.yaml").write_text(f"pretrained_model_name_or_path: {sd1}\n")
    raw = draw(tmp_path / "raw", "--checkpoint", tmp_path / "full" / "checkpoint-4", *prompt)
    average.write(tmp_path / "full" / "checkpoint-4", average.state())
    (tmp_path / "full" / "checkpoint-4" / "manifest.json").write_text("{}")
    mean = draw(tmp_path / "mean", "--checkpoint", tmp_path / "full" / "checkpoint-4", *prompt)
    assert np.abs(pixels(raw[0]) - pixels(base_images[0])).max() > 3
    assert np.abs(pixels(mean[0]) - pixels(base_images[0])).max() <= 1


def test_a_picture_that_is_there_stays(sd1, tmp_path):
    prompt = ["--pretrained_model_name_or_path", str(sd1), "--prompt", "a photo of dog", *FAST]
    first = draw(tmp_path / "out", *prompt)
    kept = {path: path.read_bytes() for path in first}
    assert draw(tmp_path / "out", *prompt) == first, "the same again is the same file"
    other = draw(tmp_path / "out", *prompt, "--guidance_scale", "2")
    assert [path.name for path in other] == [f"{path.stem}-2.png" for path in first]
    first[0].write_bytes(b"mine")
    assert draw(tmp_path / "out", *prompt)[0].name == f"{first[0].stem}-3.png" and first[0].read_bytes() == b"mine"
    assert all(path.read_bytes() == data for path, data in kept.items() if path != first[0])


def test_one_checkpoint_at_a_time(capsys, tmp_path):
    said = refused(capsys, "--checkpoint", "runs/a", "--checkpoint", "runs/b", "--prompt", "x")
    assert "--checkpoint is given 2 times (runs/a, runs/b)" in said and "once for each" in said
