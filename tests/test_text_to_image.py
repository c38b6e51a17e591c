"""The text-to-image scripts whole, on tiny pipelines: captions from a folder or a data set, averages, held-out loss."""

import importlib
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from utils import datasets, heldout, noise

BOTH = pytest.mark.parametrize("script", ["train_text_to_image", "train_text_to_image_lora"])
WEIGHTS = {"train_text_to_image": "unet/diffusion_pytorch_model.safetensors"}
WEIGHTS["train_text_to_image_lora"] = "pytorch_lora_weights.safetensors"


@pytest.fixture
def pictures(tmp_path):
    """Six captioned pictures; one has two captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        pixels = rng.integers(0, 255, (70, 64 + 4 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        caption = f"picture number {number}" if number else ["the first picture", "picture number zero"]
        rows.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def train(sd1, pictures, tmp_path, capsys):
    def call(script, options="", name="run", model=sd1):
        module = importlib.import_module(script)
        given = f"--pretrained_model_name_or_path '{model}' --output_dir '{tmp_path / name}' --report_to none"
        given += "" if "--dataset_name" in options else f" --train_data_dir '{pictures}'"
        given += "" if "--seed" in options else " --seed 3"
        given += "" if "batch_size" in options else " --train_batch_size 2"
        module.main(module.parse_args(shlex.split(f"{given} --checkpointing_steps 0 {options}")))
        return tmp_path / name

    return call


def learned(script, folder):
    return load_file(folder / WEIGHTS[script])


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def column(folder, name):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in rows if name in row}


@BOTH
def test_resumed_equals_uninterrupted_with_everything_on(train, script):
    options = "--use_ema --ema_power 0.7 --ema_interval 2 --validation_split 0.2 --caption_dropout 0.3 --random_flip"
    options += " --gradient_accumulation_steps 2 --snr_gamma 5 --validation_steps 2 --validation_prompts 'a' 'b'"
    options += " --num_validation_images 1 --validation_num_inference_steps 1"
    whole = train(script, f"--max_train_steps 6 {options}", "whole")
    parts = train(script, f"--max_train_steps 6 --checkpointing_steps 3 {options}", "parts")
    for left in ("report.html", WEIGHTS[script], "checkpoint-6/manifest.json"):
        (parts / left).unlink()
    (parts / "checkpoint-6").rename(parts / "gone")
    train(script, f"--max_train_steps 6 --resume_from_checkpoint latest {options}", "parts")
    assert equal(learned(script, whole), learned(script, parts))
    assert list(column(whole, "validation_loss")) == [0, 2, 4, 6]
    assert column(whole, "validation_loss") == column(parts, "validation_loss")
    assert "Validation loss" in (whole / "report.html").read_text()


def test_averages_of_a_checkpoint_are_read_by_stock_diffusers(train, sd1):
    """Under the name that diffusers' own script gives them; they are the weights that the run ends with."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    options = "--max_train_steps 2 --checkpointing_steps 2 --learning_rate 1e-3 --use_ema"
    full = train("train_text_to_image", options, "full")
    raw, final = (UNet2DConditionModel.from_pretrained(path / "unet") for path in (full / "checkpoint-2", full))
    averaged = UNet2DConditionModel.from_pretrained(full / "checkpoint-2", subfolder="unet_ema")
    assert equal(averaged.state_dict(), final.state_dict()) and not equal(averaged.state_dict(), raw.state_dict())
    theirs = EMAModel.from_pretrained(full / "checkpoint-2" / "unet_ema", UNet2DConditionModel)
    assert all(torch.equal(one, other) for one, other in zip(theirs.shadow_params, final.parameters(), strict=True))
    lora = train("train_text_to_image_lora", options, "lora")
    name = "pytorch_lora_weights_ema.safetensors"
    assert equal(load_file(lora / "checkpoint-2" / name), learned("train_text_to_image_lora", lora))
    StableDiffusionPipeline.from_pretrained(sd1).load_lora_weights(lora / "checkpoint-2", weight_name=name)


def test_the_validation_loss_is_of_the_same_pictures_noise_and_weights(train):
    """Without training (a rate of next to nothing) it does not move, whatever the training draws."""
    one = train("train_text_to_image", "--max_train_steps 4 --learning_rate 1e-12 --validation_split 0.2"
                " --validation_steps 2 --max_grad_norm 1e-9", "one")  # fmt: skip
    two = train("train_text_to_image", "--max_train_steps 2 --learning_rate 1e-12 --validation_split 0.2"
                " --validation_steps 1 --cache_latents off --max_grad_norm 1e-9", "two")  # fmt: skip
    values = [*column(one, "validation_loss").values(), *column(two, "validation_loss").values()]
    assert len(values) == 3 + 3 and max(values) - min(values) < 1e-5 * max(values)


def test_the_validation_loss_knows_masks_too(train, pictures):
    options = "--max_train_steps 1 --learning_rate 1e-12 --validation_split 0.2 --validation_steps 1 --center_crop"
    plain = column(train("train_text_to_image", options, "plain"), "validation_loss")
    for path in pictures.glob("?.png"):
        with Image.open(path) as image:
            mask = Image.new("L", image.size)
        mask.paste(255, (24, 24, 40, 40))
        mask.save(path.with_suffix(".mask.png"))
    masked = column(train("train_text_to_image", f"{options} --masked_loss", "masked"), "validation_loss")
    partly = column(
        train("train_text_to_image", f"{options} --masked_loss --unmasked_weight 0.9", "partly"), "validation_loss"
    )
    assert abs(partly[1] - plain[1]) < abs(masked[1] - plain[1])
    assert masked[1] != pytest.approx(plain[1], rel=1e-3)


def test_held_out_pictures_are_never_trained_on(pictures):
    examples = datasets.captioned(str(pictures), seed=1)
    kept, unseen = heldout.split(examples, 0.3, seed=1)
    assert unseen and not {one.key for one in kept} & {one.key for one in unseen}
    assert heldout.split(examples[1:], 0.3, seed=1)[1] == [one for one in unseen if one != examples[0]]
    assert heldout.split(examples, 0.0, seed=1) == (examples, [])
    few = datasets.captioned(str(pictures), seed=1, max_train_samples=3)
    assert len(few) == 3 and set(few) < set(examples)
    assert few == datasets.captioned(str(pictures), seed=1, max_train_samples=3)


def test_a_held_out_picture_that_was_lost_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    for level in (0, 51, 255):
        Image.new("RGB", (16, 16), (level,) * 3).save(tmp_path / f"{level}.png")
    held = datasets.DreamBooth(datasets.folder(tmp_path, "p"), size=16, center_crop=True)
    run = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), seed=1)
    family = SimpleNamespace(
        latents=lambda batch, draws: batch["pixels"],
        condition=lambda batch, draws: None,
        predict=lambda inputs, *_: torch.zeros_like(inputs),
    )
    loss = heldout.Loss(run, family, lambda images, draws: noise.Noisy(images, None, images, None), held, 4)
    assert loss.measure() == pytest.approx((1 + 0.36 + 1) / 3)
    held.forget()
    (tmp_path / "0.png").write_bytes(b"no picture")
    monkeypatch.setattr("utils.lost.time.sleep", lambda seconds: None)
    assert loss.measure() == loss.measure() == pytest.approx((0.36 + 1) / 2)
    assert capsys.readouterr().err.count("0.png' is not a picture") == 1
    with pytest.raises(SystemExit):
        heldout.split(held.instance[:1], 0.1, seed=1)
    assert "nothing is left to learn" in capsys.readouterr().err


@BOTH
def test_clipping_clips(train, script):
    common = "--max_train_steps 3 --optimizer sgd --learning_rate 0.1"
    loose, tight = (train(script, f"{common} --max_grad_norm {norm}", str(norm)) for norm in (1e9, 1e-4))
    assert not equal(learned(script, loose), learned(script, tight))


def test_data_set_of_the_hub_equals_the_folder(train, pictures):
    """A local data set: the column `text`, a list of captions among them, any picture column."""
    from_folder = train("train_text_to_image_lora", "--max_train_steps 1 --center_crop", "folder")
    from_table = train(
        "train_text_to_image_lora", f"--dataset_name '{_table(pictures)}' --max_train_steps 1 --center_crop", "table"
    )
    assert column(from_folder, "loss") == column(from_table, "loss")


def _table(pictures):
    import datasets as hub

    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    captions = [row["text"] if isinstance(row["text"], list) else [row["text"]] for row in rows]
    table = hub.Dataset.from_dict({"image": [str(pictures / row["file_name"]) for row in rows], "text": captions})
    folder = pictures.parent / "table"
    folder.mkdir()
    table.cast_column("image", hub.Image()).to_parquet(folder / "train.parquet")
    return folder


def test_dream_moves_inputs_and_target():
    """Against the paper's equations written out, one example at a time."""
    torch.manual_seed(0)
    alphas = torch.linspace(0.99, 0.01, 10)
    images, epsilon, predicted = torch.randn(3, 2, 4, 4, 4)
    steps = torch.tensor([2, 7])
    signal, sigma = alphas[steps].sqrt().view(2, 1, 1, 1), (1 - alphas[steps]).sqrt().view(2, 1, 1, 1)
    noisy = noise.Noisy(signal * images + sigma * epsilon, steps, epsilon, torch.ones(2))
    moved = noise.dream(noisy, predicted, alphas, detail=2.0)
    for row in range(2):
        weight = (1 - alphas[steps[row]]).sqrt() ** 2.0
        target = epsilon[row] + weight * (epsilon[row] - predicted[row])
        assert torch.allclose(moved.target[row], target, atol=1e-6)
        assert torch.allclose(moved.inputs[row], signal[row] * images[row] + sigma[row] * target, atol=1e-5)


def test_dream_trains_and_is_refused_for_other_predictions(train, capsys):
    plain = train("train_text_to_image", "--max_train_steps 1", "plain")
    moved = train("train_text_to_image", "--max_train_steps 1 --dream_training", "dream")
    assert column(plain, "loss") != column(moved, "loss")
    with pytest.raises(SystemExit) as refused:
        train("train_text_to_image", "--max_train_steps 1 --dream_training --prediction_type v_prediction", "no")
    assert refused.value.code == 2 and "--dream_training" in capsys.readouterr().err


@pytest.mark.parametrize("seen", [True, False])
def test_dream_is_refused_for_a_model_that_predicts_velocity(train, sd2, seen, monkeypatch, capsys):
    """By itself, without an option that says so; also where the model comes from the hub after the preflight."""
    if not seen:
        monkeypatch.setattr("utils.preflight.model_folder.objective", lambda *_: [])
    with pytest.raises(SystemExit) as refused:
        train("train_text_to_image_lora", "--max_train_steps 1 --dream_training", "no", model=sd2)
    assert refused.value.code == 2 and "predicts v_prediction" in capsys.readouterr().err


# The commands people type, with a tiny model and two steps.
COMMANDS = {
    "train_text_to_image": "--use_ema --resolution 64 --center_crop --random_flip --train_batch_size 1"
    " --gradient_accumulation_steps 4 --gradient_checkpointing --max_train_steps 2 --learning_rate 1e-05"
    " --max_grad_norm 1 --lr_scheduler constant --lr_warmup_steps 0",
    "train_text_to_image_lora": "--caption_column text --resolution 64 --random_flip --train_batch_size 1"
    " --num_train_epochs 1 --checkpointing_steps 5000 --learning_rate 1e-04 --lr_scheduler constant"
    " --lr_warmup_steps 0 --seed 42 --validation_prompt 'cute dragon creature' --validation_num_inference_steps 1",
}


@BOTH
def test_commands_with_the_precision_given_to_the_launcher_only(train, script, sd1, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    folder = train(script, COMMANDS[script])
    assert all(weight.dtype == torch.float32 for weight in learned(script, folder).values())
    from diffusers import StableDiffusionPipeline

    if script == "train_text_to_image":
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(sd1)
        pipeline.load_lora_weights(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a dragon", num_inference_steps=1, height=64, width=64, output_type="np").images[0]
    assert np.isfinite(image).all()
    card = (folder / "README.md").read_text()
    assert "trained on captioned images" in card and "dreambooth" not in card


@BOTH
def test_sdxl_too(train, script, sdxl):
    folder = train(script, "--max_train_steps 2 --resolution 64", model=sdxl)
    assert len(column(folder, "loss")) == 2
