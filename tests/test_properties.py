"""Properties that hold for any numbers and any words, tried with many (Hypothesis)."""

import itertools
import tempfile
from pathlib import Path

import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_arguments import parse

from utils import captions, datasets, images, randomness
from utils.arguments.settings import number, whole
from utils.checkpoints import manifests

SMALL = st.integers(1, 4)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(SMALL, SMALL, SMALL, st.integers(0, 40), st.integers(1, 30), st.integers(0, 9))
def test_any_position_can_be_resumed_and_ranks_share_the_stream(batch, world, accumulate, first_step, count, seed):
    """Ranks are disjoint and complete at every step, wherever a run begins, and an epoch is a permutation."""
    steps, examples = 3, batch * world * accumulate
    seen = {}
    for rank in range(world):
        stream = iter(datasets.Positions(batch, rank, world, accumulate, first_step))
        whole = iter(datasets.Positions(batch, rank, world, accumulate, 0))
        late = list(itertools.islice(stream, steps * accumulate))
        assert late == list(itertools.islice(whole, (first_step + steps) * accumulate))[first_step * accumulate :]
        for place, positions in enumerate(late):
            seen.setdefault(place // accumulate, []).extend(positions)
    for step, positions in seen.items():
        first = (first_step + step) * examples
        assert sorted(positions) == list(range(first, first + examples))
    epoch = first_step * examples // count
    shown = [randomness.slot(seed, position, count) for position in range(epoch * count, (epoch + 1) * count)]
    assert sorted(shown) == list(range(count))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(8, 90),
    st.integers(8, 90),
    st.sampled_from([8, 16, 24]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_time_ids_tell_the_size_of_the_photo_and_the_place_of_the_crop(width, height, size, center, flip, position):
    from utils.models.sdxl import StableDiffusionXL

    picture = Image.effect_noise((width, height), 90).convert("RGB")
    options = {"size": size, "center_crop": center, "random_flip": flip, "interpolation": "nearest", "seed": 5}
    dataset = datasets.DreamBooth([datasets.Example(picture, "p", key="k")], **options)
    batch = datasets.collate([dataset[position], dataset[position + 1]])
    family = object.__new__(StableDiffusionXL)
    family.device = torch.device("cpu")
    ids = family.time_ids(batch)
    assert ids.dtype == torch.float32 and ids.shape == (2, 6)
    wide, high = images.resized_size(width, height, size)
    for row, (*original, top, left, now_high, now_wide) in enumerate(ids.int().tolist()):
        assert original == [height, width] and [now_high, now_wide] == [size, size]
        resized = picture.resize((wide, high), Image.Resampling.NEAREST)
        views = [resized, resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] if flip else [resized]
        assert 0 <= top <= high - size and 0 <= left <= wide - size
        crops = [images.to_tensor(view.crop((left, top, left + size, top + size))) for view in views]
        assert any(torch.equal(batch["pixels"][row], crop) for crop in crops), "the crop is at the place that is told"


@settings(max_examples=60, deadline=None)
@given(TEXT, st.text("abcdef", min_size=1, max_size=6), st.text("uvwxyz", min_size=1, max_size=6))
def test_captions_change_only_where_a_placeholder_stands(text, identifier, noun):
    words = {"identifier": identifier, "class_noun": noun}
    plain = text.replace("{", "(")
    assert captions.fill(plain, **words) == plain
    filled = captions.fill(f"{plain}{{identifier}} {{class}}{plain}", **words)
    assert filled == f"{plain}{identifier} {noun}{plain}" and not captions.unfilled([("x", filled)])
    assert captions.fill(filled, **words) == filled, "filling twice changes nothing"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 10**12), max_size=4, unique=True),
    st.lists(st.text(st.sampled_from("checkpoint-0123456789.bak _é٣"), max_size=16), max_size=4),
)
@example([7], ["٣", "007", "-1"])
def test_only_checkpoints_are_taken_for_checkpoints(steps, strange):
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        names = {f"checkpoint-{step}" for step in steps}
        for name in names | {f"checkpoint-{text}" for text in strange} | {text for text in strange if text.strip(". ")}:
            (folder / name).mkdir(exist_ok=True)
        listed = manifests.listed(folder)
        assert {path.name for _, path in listed} >= names
        assert listed == sorted(listed) and all(int(path.name.removeprefix("checkpoint-")) == n for n, path in listed)
        assert all(path.name.isascii() for _, path in listed), "other digits are no name that this suite writes"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_default_then_file_then_command_line(data):
    """For any choice of options and values in both places."""
    values = {
        "resolution": st.sampled_from([64, 128, 512]),
        "learning_rate": st.floats(1e-6, 1.0),
        "random_flip": st.booleans(),
        "rank": st.integers(1, 64),
        "seed": st.integers(0, 2**31),
        "lr_scheduler": st.sampled_from(["linear", "cosine", "polynomial"]),
        "instance_prompt": st.text("abc XYZ:#'\"é", min_size=1, max_size=12).filter(str.strip),
        "lora_target_modules": st.lists(st.sampled_from(["to_k", "to_q", "conv1"]), min_size=1, max_size=3),
    }
    pick = st.sets(st.sampled_from(sorted(values)))
    filed, typed = ({name: data.draw(values[name]) for name in sorted(data.draw(pick))} for _ in range(2))
    words = []
    for name, value in typed.items():
        shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        words += [f"--{name}", *map(str, shown)] if isinstance(value, list) else [f"--{name}={shown}"]
    with tempfile.TemporaryDirectory() as made:
        file = Path(made, "c.yaml")
        file.write_text(yaml.safe_dump(filed, allow_unicode=True), encoding="utf-8")
        needed = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d"]
        if "instance_prompt" not in filed | typed:
            words.append("--instance_prompt=p")
        found = vars(parse(f"--config={file}", *words, needed=needed))
        plain = vars(parse("--instance_prompt=p", needed=needed))
    for name in values:
        expected = typed.get(name, filed.get(name, plain[name]))
        assert found[name] == expected, name


@given(st.text(max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_number_is_read_or_refused_and_nothing_in_between(written):
    for kind in (whole(1), number(0, below=1)):
        try:
            value = kind(written)
        except (ValueError, OverflowError):
            continue
        assert value == value and (value >= 1 if isinstance(value, int) else 0 <= value < 1)
