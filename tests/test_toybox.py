"""The toybox: its drawings, and that its committed model and judge are worth building on."""

import json
import statistics
from pathlib import Path

import pytest

from toybox import draw, make_tokenizer
from toybox.things import COLOURS

TOYBOX = Path(draw.__file__).parent
MAX_BYTES = 12 * 1024 * 1024


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOYBOX / "sd" / "tokenizer")


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(TOYBOX / "sd")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def judge():
    from toybox.judge import Judge

    return Judge.load()


@pytest.fixture(scope="module")
def photos():
    from toybox.judge import load_photos

    return load_photos(TOYBOX / "subject")


def test_a_seed_always_draws_the_same():
    first, again, other = draw.example(7), draw.example(7), draw.example(8)
    assert first == again
    assert first.picture.size == (64, 64)
    assert first.picture.tobytes() != other.picture.tobytes()


def test_captions_say_what_the_picture_shows():
    scene_words = {phrase: scene for scene, phrase in draw.SCENES.items()}
    for one in map(draw.example, range(300)):
        words = one.caption.split()
        assert one.individual.thing in words
        assert [word for word in words if word in COLOURS] in ([], [one.individual.colour])
        assert [word for word in words if word in draw.PATTERNS] in ([], [one.individual.pattern])
        assert [scene for phrase, scene in scene_words.items() if phrase in one.caption] in ([], [one.scene])
        assert [word for word in words if word in draw.NAMED] == ([one.name] if one.name else [])
        assert one.name is None or one.individual == draw.NAMED[one.name]


def test_the_mask_is_where_the_thing_is():
    """Of one picture in two colours nothing differs outside of it; the outline is inside."""
    from dataclasses import replace

    import numpy as np

    for seed, one in enumerate(map(draw.example, range(40))):
        red, blue = (replace(one.individual, colour=colour, pattern="plain") for colour in ("red", "blue"))
        pictures = [np.asarray(draw.draw(each, one.scene, seed)).astype(int) for each in (red, blue)]
        mask = np.asarray(draw.mask_of(red, one.scene, seed))
        assert (pictures[0] == pictures[1])[mask == 0].all() and 0.05 < (mask > 127).mean() < 0.7
        assert (pictures[0] != pictures[1]).any(axis=2)[mask == 255].mean() > 0.2
        assert (mask == np.asarray(draw.mask_of(blue, one.scene, seed))).all()


def test_training_never_shows_the_subject_or_its_colours():
    colours = {draw.SUBJECT.colour, draw.SUBJECT.second}
    shown = [draw.NAMED[word] for word in draw.NAMED] + [draw.example(i).individual for i in range(300)]
    assert all({one.colour, one.second} != colours for one in shown)


def test_every_caption_word_and_rare_word_is_one_token(tokenizer):
    words = [*make_tokenizer.caption_words(), "sks", "ohwx", "tok", "shs"]
    assert len(words) > 150
    assert {word: len(tokenizer(word).input_ids) for word in words} == dict.fromkeys(words, 3)
    assert tokenizer.model_max_length == 77


def test_any_text_can_be_encoded_and_read_back(tokenizer):
    text = "jumping over 3 fences, élan 漢字!"
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_a_rare_word_is_as_visible_as_a_colour(pipeline):
    """If "sks dog" were nearly "dog", prior preservation could not tell the subject from its class."""
    import torch

    def hidden(prompt):
        tokens = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return pipeline.text_encoder(tokens).last_hidden_state

    def distance(a, b):
        return ((a - b).norm() / b.norm()).item()

    dog = hidden("a photo of a dog")
    colour = statistics.mean(distance(hidden(f"a photo of {word} dog"), dog) for word in ("red", "white", "purple"))
    for word in ("sks", "ohwx", "shs"):
        assert distance(hidden(f"a photo of {word} dog"), dog) > 0.6 * colour


def test_the_stock_pipeline_draws_what_it_is_asked_for(pipeline, judge):
    from toybox.evaluate import draw_pictures

    asked = [("red", "car", "snow"), ("black", "cat", "grass"), ("yellow", "house", "night"), ("blue", "boat", "beach")]
    prompts = [f"a photo of a {colour} {thing} {draw.SCENES[scene]}" for colour, thing, scene in asked]
    seen = judge.words(draw_pictures(pipeline, prompts, seed=3, steps=15))
    right = sum(
        (one["colour"] == colour) + (one["thing"] == thing) + (one["scene"] == scene)
        for one, (colour, thing, scene) in zip(seen, asked)
    )
    assert right >= 9, seen  # of 12; guessing gets 1.2


def test_the_stock_pipeline_of_sdxl_does_so_too(judge):
    from diffusers import StableDiffusionXLPipeline

    from toybox import evaluate

    sibling = StableDiffusionXLPipeline.from_pretrained(TOYBOX / "sdxl")
    sibling.set_progress_bar_config(disable=True)
    shares = evaluate.follow_captions(sibling, judge, count=1)
    assert shares["thing"] >= 0.6 and shares["scene"] >= 0.8, shares  # guessing gets 0.08 and 0.1


def test_the_judge_tells_the_subject_from_other_dogs(judge, photos):
    import random

    subject = [draw.draw(draw.SUBJECT, scene, 500 + i) for i, scene in enumerate(draw.SCENES)]
    rng = random.Random(0)
    dogs = [draw.draw(draw.random_individual(rng, "dog"), scene, i) for i, scene in enumerate([*draw.SCENES] * 3)]
    same, others = judge.likeness(subject, photos), judge.likeness(dogs, photos)
    assert same.min() > 0.6 and same.mean() > others.mean() + 0.4
    assert others.max() < same.median()
    assert judge.diversity(dogs) > judge.diversity(subject) + 0.4


def test_the_judge_reads_things_colours_and_scenes(judge):
    examples = [draw.example(10**8 + i) for i in range(60)]
    seen = judge.words([one.picture for one in examples])
    assert sum(s["thing"] == one.individual.thing for s, one in zip(seen, examples)) >= 54
    assert sum(s["colour"] == one.individual.colour for s, one in zip(seen, examples)) >= 45
    assert sum(s["scene"] == one.scene for s, one in zip(seen, examples)) >= 54


def test_a_copied_photo_is_noticed(photos):
    from PIL import ImageOps

    from toybox.judge import memorised

    assert memorised([photos[0], ImageOps.mirror(photos[2])], photos).min() > 0.999
    elsewhere = [draw.draw(draw.SUBJECT, scene, 900) for scene in ("beach", "night", "forest")]
    assert memorised(elsewhere, photos).max() < 0.95


def test_the_photos_differ_in_size_shape_and_format():
    from PIL import Image

    from toybox.judge import load_photo

    files = sorted((TOYBOX / "subject").iterdir())
    assert len(files) == 5
    shapes, turned = set(), 0
    for file in files:
        with Image.open(file) as image:
            shapes.add(image.size)
            turned += image.getexif().get(0x0112, 1) != 1
        assert load_photo(file).size == (64, 64)
    assert len(shapes) == 5 and {width > height for width, height in shapes} == {True, False}
    assert {file.suffix for file in files} == {".jpg", ".png", ".webp"} and turned == 1


def test_everything_is_small_and_safe():
    files = [file for file in TOYBOX.rglob("*") if file.is_file() and not {".build", "__pycache__"} & set(file.parts)]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert len([file for file in files if file.suffix == ".safetensors"]) >= 4


def test_every_weight_has_the_name_that_transformers_4_looks_for(judge):
    """Names of transformers 4.38 to 4.57. They start a weight of another name at random, with no more than a warning.
    A weight that is tied to another is stored once. Networks of diffusers are compared with their own classes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from utils import saved

    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    names = json.loads((Path(__file__).parent / "names" / "transformers_4.json").read_text(encoding="utf-8"))
    names["judge"] = list(judge.network.state_dict())
    for file in TOYBOX.rglob("*.safetensors"):
        folder = file.parent.relative_to(TOYBOX).as_posix()
        if own := classes.get(file.parent.name):
            names[folder] = list(own.from_config(own.load_config(file.parent)).state_dict())
        assert saved.header(file).keys() - {"__metadata__"} == set(names.pop(folder)), folder
    assert not names, "a model is missing"


@pytest.mark.parametrize("projection", [None, 24])
def test_saved_text_encoders_have_these_names_too(tmp_path, projection):
    """Where the toybox is made, and where a training script saves; the second encoder of SDXL has a projection, whose
    name has no prefix."""
    import tiny

    from toybox.train_sd import save_text_encoder
    from utils import learning, saved

    encoder = tiny.text_encoder(projection=projection)
    part = "text_encoder_2" if projection else "text_encoder"
    save_text_encoder(encoder, tmp_path / "toybox")
    learning.Full({part: encoder.float()}).save(tmp_path)
    names = json.loads((Path(__file__).parent / "names" / "transformers_4.json").read_text(encoding="utf-8"))
    want = {name for name in names[f"sdxl/{part}"] if ".layers.2." not in name}  # the tiny one has two layers
    for folder in ("toybox", part):
        assert saved.header(tmp_path / folder / "model.safetensors").keys() - {"__metadata__"} == want
