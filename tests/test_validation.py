"""Sample images: the same each time, however the work is cut up, and without a trace in the training."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

from utils import samplers, validation
from utils.models import family_of
from utils.report import gallery

PROMPTS = ["a photo of sks dog", "a photo of sks dog in the snow"]


def make_run(folder, rank=0, world=1, dtype=torch.float32):
    from contextlib import nullcontext

    shown = {}
    return SimpleNamespace(
        output_dir=folder, rank=rank, world=world, is_main=rank == 0, seed=11, dtype=dtype, interrupted=False,
        device=torch.device("cpu"), phase=lambda name: nullcontext(), shown=shown,
        log_images=lambda step, images: shown.update({step: images}),
    )  # fmt: skip


def load(folder, dtype=torch.float32):
    family = family_of(str(folder))
    family.load("cpu", dtype)
    return family


@pytest.fixture(scope="module")
def family(sd1):
    return load(sd1)


def sampler(run, family, **changes):
    options = {"count": 3, "steps": 2, "size": 64} | changes
    return validation.Sampler(run, family, PROMPTS, **options)


def pixels(paths):
    return [Image.open(path).convert("RGB").tobytes() for path in paths]


def test_files_their_settings_and_the_trackers(family, tmp_path):
    run = make_run(tmp_path)
    paths = sampler(run, family).draw(100)
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == [f"samples/step-000100/0{p}-0{i}.png" for p in range(2) for i in range(3)]
    with Image.open(paths[4]) as image:
        told = json.loads(image.info["settings"])
        assert image.size == (64, 64)
    assert told["prompt"] == PROMPTS[1] and told["seed"] == 12 and told["train_step"] == 100
    assert told["scheduler"] == "DPMSolverMultistepScheduler" and told["base_model"] == "sd1"  # no folder of ours
    assert {name: len(images) for name, images in run.shown[100].items()} == {"validation/0": 3, "validation/1": 3}
    assert len(set(pixels(paths))) == 6
    assert not list(tmp_path.rglob(".*"))


def test_same_seeds_give_the_same_images_however_they_are_batched(family, tmp_path):
    first = pixels(sampler(make_run(tmp_path / "a"), family, batch_size=1).draw(1))
    again = pixels(sampler(make_run(tmp_path / "b"), family, batch_size=1).draw(2))
    assert first == again
    batched = pixels(sampler(make_run(tmp_path / "c"), family, batch_size=3).draw(1))
    for one, other in zip(first, batched):
        assert max(abs(a - b) for a, b in zip(one, other)) <= 2  # sums in another order


def test_any_image_can_be_drawn_alone_and_the_stock_pipeline_draws_it_too(family, sd1, tmp_path):
    drawn = pixels(sampler(make_run(tmp_path), family, batch_size=1).draw(1))[4]  # prompt 1, seed 12
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    words = {"prompt": PROMPTS[1], "negative_prompt": ""}
    [(index, image)] = validation.draw(stock, words, [12], steps=2, width=64, height=64)
    assert index == 0 and image.tobytes() == drawn
    plain = stock(PROMPTS[1], num_inference_steps=2, generator=torch.Generator().manual_seed(12), width=64, height=64)
    assert plain.images[0].tobytes() == drawn


def test_work_is_split_over_processes(family, tmp_path, monkeypatch):
    whole = sampler(make_run(tmp_path / "one"), family).draw(1)
    shares = [list(sampler(make_run(tmp_path, rank, 4), family)._mine(1)) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 2, 1, 1]
    monkeypatch.setattr(validation, "_gather", lambda mine, world: [each for share in shares for each in share])
    assert [path.name for path in sampler(make_run(tmp_path / "other", 1, 4), family).draw(1)] == [
        p.name for p in whole
    ]
    assert not (tmp_path / "other").exists()  # only the main process writes
    main = sampler(make_run(tmp_path / "main", 0, 4), family).draw(1)
    for one, other in zip(pixels(main), pixels(whole)):
        assert max(abs(a - b) for a, b in zip(one, other)) <= 2


def test_every_process_learns_what_all_have_drawn(tmp_path):
    code = (
        "import sys, torch; from utils import validation; rank = int(sys.argv[1])\n"
        f"torch.distributed.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=rank, world_size=2)\n"
        "print(validation._gather([(rank, k, bytes([k])) for k in range(2 - rank)], 2))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0].strip() for process in both]
    assert told == [str([(0, 0, b"\x00"), (0, 1, b"\x01"), (1, 0, b"\x00")])] * 2


def test_training_does_not_notice(sd1, tmp_path):
    import numpy as np

    family = load(sd1)
    family.unet.train().requires_grad_(True)
    family.unet.mid_block.eval()  # a part in another mode than its parent
    family.unet.conv_in.weight.grad = torch.ones_like(family.unet.conv_in.weight)
    modes = [module.training for module in family.unet.modules()]
    weights = [weight.detach().clone() for weight in family.unet.parameters()]
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random(), np.random.get_state()[1].copy()  # noqa: NPY002
    torch.manual_seed(5)
    random.seed(5)
    paths = sampler(make_run(tmp_path), family, scheduler="DDPMScheduler").draw(1)
    assert len(paths) == 6
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert np.array_equal(np.random.get_state()[1], expected[2])  # noqa: NPY002
    assert [module.training for module in family.unet.modules()] == modes
    assert torch.equal(family.unet.conv_in.weight.grad, torch.ones_like(family.unet.conv_in.weight))
    assert all(torch.equal(a, b) for a, b in zip(weights, family.unet.parameters()))
    assert all(weight.requires_grad for weight in family.unet.parameters()) and torch.is_grad_enabled()


def test_modes_come_back_after_an_error(family):
    family.unet.train()
    pipeline = family.pipeline()
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match="broken"), validation.undisturbed(pipeline):
        assert not family.unet.training
        torch.rand(1), random.random()
        raise RuntimeError("broken")
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert family.unet.training and all(module.training for module in family.unet.modules())
    family.unet.eval()


def test_a_released_text_encoder_and_unequal_prompts(sd1, family, tmp_path):
    wanted = pixels(sampler(make_run(tmp_path / "a"), family).draw(1))
    released = load(sd1)
    released.cache_prompts(PROMPTS)
    assert released.text_encoder is None
    assert pixels(sampler(make_run(tmp_path / "b"), released).draw(1)) == wanted


def test_half_precision_base_with_trained_fp32_weights(sd1, tmp_path):
    family = load(sd1, torch.bfloat16)
    family.unet.float().train().requires_grad_(True)
    half = pixels(sampler(make_run(tmp_path / "half", dtype=torch.bfloat16), family).draw(1))
    full = pixels(sampler(make_run(tmp_path / "full"), load(sd1)).draw(1))
    for one, other in zip(half, full):  # rounding, not another picture
        distance = sum(abs(a - b) for a, b in zip(one, other)) / len(one)
        assert 0 < distance < 12


def test_prompts_one_for_all_or_one_for_each(family):
    pipeline = family.pipeline(samplers.make("DPMSolverMultistepScheduler", family.scheduler.config))
    size = {"steps": 2, "width": 64, "height": 64, "batch_size": 2}
    each = dict(validation.draw(pipeline, {"prompt": [*PROMPTS, PROMPTS[0]], "negative_prompt": ""}, [1, 1, 1], **size))
    assert sorted(each) == [0, 1, 2] and each[0].tobytes() != each[1].tobytes()
    alone = dict(validation.draw(pipeline, {"prompt": PROMPTS[1]}, [1], **size))
    assert max(abs(a - b) for a, b in zip(alone[0].tobytes(), each[1].tobytes())) <= 2
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        list(validation.draw(pipeline, {"prompt": PROMPTS}, [1, 2, 3], **size))


def test_a_signal_ends_the_drawing_and_keeps_what_is_there(family, tmp_path):
    run = make_run(tmp_path)
    run.interrupted = True
    assert [path.name for path in sampler(run, family, batch_size=1).draw(1)] == ["00-00.png"]


def test_out_of_memory_costs_a_warning_only(family, tmp_path, monkeypatch, capsys):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(validation, "draw", no_room)
    assert sampler(make_run(tmp_path), family).draw(7) == []
    assert "step 7: out of memory" in capsys.readouterr().err


def test_no_prompts_no_work(tmp_path):
    family = SimpleNamespace(resolution_default=64)  # nothing else may be asked of it
    assert validation.Sampler(make_run(tmp_path), family, []).draw(1) == []
    assert validation.Sampler(make_run(tmp_path), family, ["a dog"], count=0).draw(1) == []


def test_an_unknown_scheduler_is_refused(family, capsys):
    with pytest.raises(SystemExit) as end:
        samplers.make("FastScheduler", family.scheduler.config)
    assert end.value.code == 2 and "FastScheduler is not a scheduler" in capsys.readouterr().err


def test_settings_of_a_picture_survive_any_text(tmp_path):
    told = {"prompt": 'ünïcode 犬 "quotes"\nnew line', "seed": 2**62}
    gallery.save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", told)
    with Image.open(tmp_path / "a.png") as image:
        assert gallery.png_settings(image) == told


@pytest.mark.parametrize(
    "name, shown", [("owner/model", "owner/model"), ("/secret/place/base", "base"), ("tests", "tests")]
)
def test_public_names(name, shown):
    assert validation.public_name(name) == shown
