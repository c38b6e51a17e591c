"""Aspect-ratio buckets: which shape a photo goes to, and an order that is complete, resumable, one shape a step."""

import importlib
import itertools
import json
import shlex
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cache import Family, Run
from test_scripts import losses, same

from utils import buckets, cache, datasets, images, masks, models
from utils.randomness import Draws

AUTO = {"resolution_buckets": "auto", "side_factor": 16}
SHAPES = buckets.shapes(buckets.AUTO, 64, 16)


def examples(sizes, is_class=False, concepts=(), repeats=()):
    """One noise picture for each (width, height)."""
    found = []
    for number, (size, concept, times) in enumerate(itertools.zip_longest(sizes, concepts, repeats)):
        picture = Image.effect_noise(size, 70).convert("RGB")
        key = f"{'c' if is_class else 'i'}{number}"
        found.append(
            datasets.Example(picture, f"p{concept or 0}", is_class, key, concept=concept or 0, repeats=times or 1)
        )
    return found


def test_automatic_shapes_are_those_that_users_know():
    assert list(map(buckets.label, buckets.shapes(buckets.AUTO, 512, 64))) == [
        "256x1024", "320x768", "384x640", "448x576", "512x512", "576x448", "640x384", "768x320", "1024x256",
    ]  # fmt: skip
    large = buckets.shapes(buckets.AUTO, 1024, 32)
    assert {(1024, 1024), (832, 1216), (1216, 832), (896, 1152), (768, 1344), (512, 2048)} <= set(large)
    assert SHAPES == [(32, 128), (48, 80), (64, 64), (80, 48), (128, 32)], "small models: their own factor"
    assert buckets.shapes(buckets.AUTO, 40, 64) == [(40, 40)], "nothing between: the square remains"
    assert buckets.shapes(buckets.OFF, 512, 64) == []


@given(st.integers(1, 32), st.sampled_from([8, 16, 32, 64]))
@settings(max_examples=60, deadline=None)
def test_automatic_shapes_are_alike_in_area_and_come_in_both_orientations(units, factor):
    resolution = units * 64
    found = buckets.shapes(buckets.AUTO, resolution, factor)
    assert (resolution, resolution) in found and {(high, wide) for wide, high in found} == set(found)
    step = 64 if resolution >= 512 else factor
    for wide, high in found:
        assert not wide % step and not high % step and max(wide, high) <= 4 * min(wide, high)
        assert resolution**2 - max(wide, high) * step < wide * high <= resolution**2 or (wide, high) == (high, wide)


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(8, 1024))
@settings(max_examples=200, deadline=None)
def test_a_photo_goes_to_the_nearest_aspect_and_covers_its_shape(width, height, resolution):
    among = buckets.shapes(buckets.AUTO, resolution, 8)
    shape = buckets.nearest(width, height, among)

    def away(other):
        return max(width * other[1] / (height * other[0]), height * other[0] / (width * other[1]))

    assert away(shape) <= min(map(away, among)) * (1 + 1e-6)
    resized = images.resized_size(width, height, shape)
    assert resized[0] >= shape[0] and resized[1] >= shape[1], "covered"
    assert resized[0] == shape[0] or resized[1] == shape[1], "and no more than that"
    kept = shape[0] * shape[1] / (resized[0] * resized[1])
    assert 1 - buckets.lost(width, height, shape) == pytest.approx(kept, abs=1 / min(shape))


def test_shapes_of_one_aspect_are_told_apart_by_size():
    among = [(256, 256), (512, 512), (1024, 1024)]
    assert [buckets.nearest(side, side, among) for side in (100, 600, 5000)] == [(256, 256), (512, 512), (1024, 1024)]


def test_spellings():
    assert [buckets.spelled(word) for word in ("auto", "yes", "On", "off", "no")] == ["auto"] * 3 + ["off"] * 2
    assert buckets.spelled("512x512, 448X576,512x512") == "448x576,512x512"
    assert buckets.shapes("448x576,512x512", 0, 64) == [(448, 576), (512, 512)]
    for wrong in ("", "512", "512x", "500x512", "0x64", "512*512", "x"):
        with pytest.raises(ValueError):
            buckets.spelled(wrong)


SIZES = st.lists(st.sampled_from([(80, 96), (64, 64), (96, 48), (200, 40), (33, 90)]), min_size=1, max_size=9)


@given(SIZES, st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2), (3, 2, 1), (2, 2, 2)]), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_complete_in_steps_of_one_shape_on_every_rank(sizes, split, repeats, data):
    batch, world, accumulate = split
    group = batch * world * accumulate
    times = data.draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes)))
    photos = examples(sizes, repeats=times)
    dataset = datasets.DreamBooth(
        photos, size=64, **AUTO, examples_per_step=group, repeats=repeats, seed=data.draw(st.integers(0, 99))
    )
    filled = buckets.fill([(one.key, *size, one.repeats) for one, size in zip(photos, sizes)], SHAPES)
    length = group * buckets.steps(buckets.counts(filled), group, repeats)
    if filled.keys() == {(64, 64)}:
        assert not dataset.bucketed or len(dataset) == length
    assert len(dataset) == length
    for epoch in range(2):
        seen = [dataset._visit(position) for position in range(epoch * length, (epoch + 1) * length)]
        shown = Counter(place for place, _ in seen)
        for inside in filled.values():
            extra = -sum(one[3] for one in inside) * repeats % group
            assert sum(shown[int(one[0][1:])] - one[3] * repeats for one in inside) == extra, "stated repeats, no more"
        for place, size in enumerate(sizes):
            assert shown[place] >= times[place] * repeats, "no photo is dropped"
            assert {shape for which, shape in seen if which == place} == {buckets.nearest(*size, SHAPES)}
        for start in range(0, length, group):
            assert len({shape for _, shape in seen[start : start + group]}) == 1, "a step has one shape"
    ranks = [datasets.Positions(batch, rank, world, accumulate) for rank in range(world)]
    steps = 3
    shares = [list(itertools.chain(*itertools.islice(rank, steps * accumulate))) for rank in ranks]
    assert sorted(itertools.chain(*shares)) == list(range(steps * group)), "disjoint and together complete"


SOME = [(80, 96), (64, 64), (96, 48), (64, 70), (200, 40), (64, 64), (100, 60)]


def some(count, dataset, *arguments, **options):
    return list(itertools.islice(datasets.loader(dataset, *arguments, **options), count))


def mixed(group=4, center_crop=False, seed=5, repeats=1):
    return datasets.DreamBooth(
        examples(SOME), examples([(64, 64), (90, 64), (64, 64)], True), size=64, **AUTO, repeats=repeats,
        examples_per_step=group, center_crop=center_crop, random_flip=True, seed=seed,
    )  # fmt: skip


def test_class_pictures_take_the_shape_of_their_step_and_all_sizes_are_told_truly():
    dataset, seen = mixed(), set()
    for batch in some(12, dataset, 4):
        height, width = batch["pixels"].shape[-2:]
        assert (width, height) in SHAPES and batch["is_class"].tolist() == [False] * 4 + [True] * 4
        seen.add((width, height))
        for row, key in enumerate(batch["keys"]):
            example = next(one for one in dataset.examples if one.key == key)
            assert tuple(batch["original_size"][row].tolist()) == example.source.size[::-1]
            resized = example.source.resize(images.resized_size(*example.source.size, (width, height)), 1)
            top, left = batch["crop_top_left"][row].tolist()
            views = [resized, resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
            crops = [images.to_tensor(view.crop((left, top, left + width, top + height))) for view in views]
            assert any(torch.equal(batch["pixels"][row], crop) for crop in crops)
    assert len(seen) == len({buckets.nearest(*size, SHAPES) for size in SOME})


@pytest.mark.parametrize(("batch", "world", "accumulate"), [(2, 1, 2), (2, 2, 1), (1, 2, 2)])
def test_splitting_a_step_changes_nothing(batch, world, accumulate):
    dataset = mixed()
    whole = some(8, dataset, 4)
    parts = [some(8 * accumulate, dataset, batch, rank, world, accumulate) for rank in range(world)]
    for step, expected in enumerate(whole):
        pieces = [parts[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(world)]
        rows = {number: piece["pixels"][k] for piece in pieces for k, number in enumerate(piece["ids"].tolist())}
        assert sorted(rows) == sorted(expected["ids"].tolist())
        for row, number in enumerate(expected["ids"].tolist()):
            assert torch.equal(rows[number], expected["pixels"][row])
    with pytest.raises(ValueError, match="another size"):
        datasets.loader(dataset, 3)


def test_resuming_anywhere_goes_on_the_same():
    dataset = mixed(repeats=2)
    whole = some(14, dataset, 4)
    for first in (1, 5, 11):
        for one, again in zip(whole[first:], some(14 - first, dataset, 4, first_step=first), strict=True):
            assert one["keys"] == again["keys"] and torch.equal(one["pixels"], again["pixels"])
    assert [batch["keys"] for batch in whole] != [batch["keys"] for batch in some(14, mixed(repeats=2, seed=6), 4)]


def test_cached_equals_uncached_in_every_shape():
    dataset, family = mixed(center_crop=True), Family()
    uncached = [(batch, family.latents(batch, Draws(2, batch["ids"]))) for batch in some(10, dataset, 4)]
    cache.latents(Run(), family, dataset, "on")
    used = {buckets.nearest(*size, SHAPES) for size in SOME}
    assert len(dataset.latents.rows) == 2 * (len(SOME) + 3 * len(used)), "class pictures in each shape that is used"
    for batch, (before, expected) in zip(some(10, dataset, 4), uncached, strict=True):
        assert "pixels" not in batch and batch["keys"] == before["keys"]
        assert torch.equal(family.latents(batch, Draws(2, batch["ids"])), expected)


def test_sdxl_hears_of_the_original_the_crop_and_the_shape(sdxl):
    family = models.family_of(str(sdxl))
    family.load("cpu", torch.float32, parts=("vae",))
    for batch in some(6, mixed(), 4):
        expected = torch.cat([batch["original_size"], batch["crop_top_left"]], dim=1).tolist()
        expected = [[*row, *batch["pixels"].shape[-2:]] for row in expected]
        mean, std = family.posterior(batch["pixels"])
        assert family.time_ids(batch).tolist() == expected
        del batch["pixels"]
        assert family.time_ids(batch | {"latent_mean": mean, "latent_std": std}).tolist() == expected


def test_masks_are_cropped_like_their_photos():
    photo, mask = Image.new("RGB", (40, 90), (20, 90, 160)), Image.new("L", (40, 90))
    photo.paste((255, 255, 255), (8, 20, 30, 61))
    mask.paste(255, (8, 20, 30, 61))
    plain = datasets.Example(Image.new("RGB", (64, 64)), "p", key="plain")
    one = datasets.Example(photo, "p", key="one", mask=masks.Mask(mask, key="m"))
    dataset = datasets.DreamBooth([one, plain], size=64, examples_per_step=1, random_flip=True, **AUTO)
    for position in range(20):
        (record,) = dataset[position]
        assert record["mask"].shape[1:] == record["pixels"].shape[1:] and record["mask"].dtype == torch.uint8
        if record["keys"] == "one":
            bright = record["pixels"][0] > 0.9
            assert bright.any() and (record["mask"][0][bright] > 128).all()


def test_identity_knows_the_buckets_and_a_single_square_is_none():
    plain = datasets.DreamBooth(examples(SOME), size=64)
    square = datasets.DreamBooth(plain.instance, size=64, resolution_buckets="64x64", examples_per_step=4)
    sorted_ = datasets.DreamBooth(plain.instance, size=64, **AUTO, examples_per_step=4)
    assert square.fingerprint() == plain.fingerprint() and square.resolution == 64 and len(square) == len(SOME)
    assert sorted_.fingerprint() != plain.fingerprint()
    assert sorted_.resolution == "64 in buckets 32x128, 48x80, 64x64, 80x48, 128x32"


def test_the_report_names_what_is_repeated_and_cropped():
    photos = [("a.jpg", 64, 64, 1), ("b.jpg", 80, 96, 1), ("long.jpg", 310, 30, 1)]
    assert buckets.report(buckets.fill(photos, SHAPES), 2) == [
        "buckets (width x height), in steps of 2 photos of one shape:",
        "  64x64     2 photos; b.jpg loses 17% to its crop",
        "  128x32    1 photo (long.jpg), 1 of 2 visits an epoch are repeats; long.jpg loses 61% to its crop;"
        " 1 smaller and enlarged",
    ]
    assert buckets.report({}, 2) == []


# Whole scripts


@pytest.fixture
def train(request, tmp_path, class_photos):
    """train(script, "--options", name) -> output folder of a run on photos of three shapes, in buckets."""
    import tiny

    for number, size in enumerate([(64, 64), (80, 90), (60, 100), (130, 70), (70, 72)]):
        tiny.photos(tmp_path / "photos" / str(number), 1, seed=number, size=size)

    def call(script, options, name):
        model = request.getfixturevalue("sdxl" if "sdxl" in script else "sd1")
        module, folder = importlib.import_module(script), tmp_path / name
        given = (
            f"--pretrained_model_name_or_path '{model}' --instance_data_dir '{tmp_path / 'photos'}' --report_to none"
        )
        given += f" --output_dir '{folder}' --instance_prompt 'a photo of sks dog' --seed 3 --learning_rate 1e-3"
        given += f" --with_prior_preservation --class_data_dir '{class_photos}' --class_prompt 'a dog'"
        module.main(module.parse_args(shlex.split(f"{given} --num_class_images 4 --resolution_buckets {options}")))
        return folder

    return call


@pytest.mark.parametrize("script", ["train_dreambooth", "train_dreambooth_lora", "train_dreambooth_lora_sdxl"])
def test_scripts_train_in_buckets_and_resume_exactly(train, script, capsys):
    options = (
        "--max_train_steps 4 --train_batch_size 2 --gradient_accumulation_steps 2 --checkpointing_steps 2 --repeats 2"
    )
    whole = train(script, options, "whole")
    said = capsys.readouterr().out
    assert "buckets (width x height), in steps of 4 photos of one shape:\n  48x80     1 photo (" in said
    again = train(script, f"{options} --resume_from_checkpoint '{whole / 'checkpoint-2'}'", "again")
    assert losses(whole)[2:] == losses(again) and same(whole, again)
    identity = json.loads((whole / "checkpoint-4" / "manifest.json").read_text())["identity"]
    assert identity["resolution"] == "64 in buckets 32x128, 48x80, 64x64, 80x48, 128x32"
    if script == "train_dreambooth_lora":
        one = train(script, "--max_train_steps 4 --train_batch_size 4 --checkpointing_steps 0 --repeats 2", "one")
        assert losses(one) == pytest.approx(losses(whole), rel=1e-5)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train(script, f"off {options} --resume_from_checkpoint '{whole / 'checkpoint-2'}'", "square")
        assert stop.value.code == 2 and "resolution" in capsys.readouterr().err
