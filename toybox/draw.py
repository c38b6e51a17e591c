"""The pictures the toybox model is trained on: simple things in simple scenes, with captions.

Everything is a pure function of a seed, so no picture is stored:

    python -m toybox.draw --seed 0 --count 64 --output grid.png

A picture shows one *individual*: a thing with a colour, a pattern and, if it is an animal, marks,
ears, a tail and a collar. About a hundred rare words ("dwza", "jvk", ...) each name one fixed
individual, so that the model learns that an unknown word before a noun names someone in particular.
"""

import argparse
import random
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageEnhance

from toybox.scenes import paint_scene
from toybox.things import BASE_LINES, COLOURS, draw_thing

SIZE = 64  # what the model sees
SCALE = 3  # pictures are drawn larger and box-filtered, which antialiases them

PATTERNS = ("plain", "striped", "spotted")
THINGS = ("dog", "cat", "bird", "fish", "car", "house", "boat", "flower", "star", "heart", "mug", "mushroom")
THING_WEIGHTS = (9, 4) + (2,) * 10  # half of the pictures show a dog or a cat: people teach pets
SCENES = {
    "beach": "on a beach",
    "snow": "in the snow",
    "forest": "in a forest",
    "desert": "in the desert",
    "night": "at night",
    "water": "under water",
    "city": "in the city",
    "grass": "on the grass",
    "room": "in a room",
    "sunset": "at sunset",
}
EARS = ("floppy", "pointed", "round")
TAILS = ("long", "curly", "short")
MARKS = ("saddle", "patch", "socks", "muzzle", "ears", "tip")


@dataclass(frozen=True)
class Individual:
    """All that stays the same when the same thing is met again somewhere else."""

    thing: str
    colour: str
    pattern: str = "plain"
    second: str = "white"  # colour of stripes, spots and marks
    ears: str = "floppy"
    tail: str = "long"
    marks: tuple[str, ...] = ()  # which parts of an animal wear the second colour
    collar: str | None = None


# The subject that DreamBooth teaches. No picture in training shows an orange and blue animal.
SUBJECT = Individual("dog", "orange", "plain", "blue", "floppy", "curly", ("saddle", "ears", "socks"), "white")
HELD_OUT = ({"orange", "blue"},)


def random_individual(rng: random.Random, thing: str | None = None) -> Individual:
    thing = thing or rng.choices(THINGS, THING_WEIGHTS)[0]
    pattern = rng.choices(PATTERNS, (62, 19, 19))[0]
    while True:
        colour, second = rng.sample(list(COLOURS), 2)
        if {colour, second} in HELD_OUT or _too_alike(colour, second):
            continue
        break
    if thing not in ("dog", "cat"):
        return Individual(thing, colour, pattern, second)
    marks = tuple(mark for mark in MARKS if rng.random() < 0.4) if pattern == "plain" and rng.random() < 0.75 else ()
    collar = rng.choice([name for name in COLOURS if name != colour]) if rng.random() < 0.4 else None
    return Individual(thing, colour, pattern, second, rng.choice(EARS), rng.choice(TAILS), marks, collar)


def _too_alike(colour: str, second: str) -> bool:
    return sum(abs(a - b) for a, b in zip(COLOURS[colour], COLOURS[second])) < 130


def rare_words(count: int, seed: int, avoid: tuple[str, ...] = ()) -> list[str]:
    """Short words without a meaning."""
    rng, words = random.Random(seed), []
    while len(words) < count:
        word = "".join(rng.choice(letters) for letters in ("bcdfghjkqvwxz", "aoubdkmqrvwxyz", "bdfgkmpqtvxz"))
        word += rng.choice(["", "", "a", "o", "x"])
        if word not in words and word not in avoid:
            words.append(word)
    return words


# Words that training never shows; their embeddings are drawn like those of the words it does show.
UNSEEN_WORDS = ("sks", "ohwx", "tok", "shs", "zwx", "xyz", "olis", "hta", "ukj", "pll", "bnha", "cjw", "mljk", "fcu")
_NAMED_THINGS = ["dog"] * 60 + ["cat"] * 20 + [thing for thing in THINGS[2:] for _ in range(2)]
NAMED = {
    word: random_individual(random.Random(f"named {word}"), thing)
    for word, thing in zip(rare_words(len(_NAMED_THINGS), seed=1, avoid=UNSEEN_WORDS), _NAMED_THINGS)
}
_NAMES_OF = {thing: [word for word, named in NAMED.items() if named.thing == thing] for thing in THINGS}
_NAMED_SHARE = {"dog": 0.4, "cat": 0.4}


def draw(individual: Individual, scene: str, seed: int, size: int = SIZE) -> Image.Image:
    """One picture; the seed chooses the place, the pose and the details of the scene."""
    rng = random.Random(f"draw {seed}")
    canvas = Image.new("RGB", (size * SCALE, size * SCALE))
    draw_thing(canvas, individual, *_set(canvas, individual, scene, rng), rng)
    picture = canvas.resize((size, size), Image.BOX)
    return ImageEnhance.Brightness(picture).enhance(rng.uniform(0.94, 1.04))


def mask_of(individual: Individual, scene: str, seed: int, size: int = SIZE) -> Image.Image:
    """Where the thing in that picture is ("L", white): what looks the same whatever lies behind it."""
    rng = random.Random(f"draw {seed}")
    canvas = Image.new("RGB", (size * SCALE, size * SCALE))
    place, grounds = _set(canvas, individual, scene, rng), []
    pose = rng.getstate()
    for ground in ("black", "white"):
        rng.setstate(pose)
        grounds.append(Image.new("RGB", canvas.size, ground))
        draw_thing(grounds[-1], individual, *place, rng)
    return ImageChops.invert(ImageChops.difference(*grounds)).convert("L").resize((size, size), Image.BOX)


def _set(canvas: Image.Image, individual: Individual, scene: str, rng: random.Random) -> tuple:
    """Paints the scene => (centre, radius, mirrored) of the thing in it."""
    side = canvas.width
    ground = paint_scene(canvas, scene, rng)  # where things stand, as a share of the height
    radius = rng.uniform(0.31, 0.42) * side
    base = min(max(ground + rng.uniform(0.1, 0.24), 0.78), 0.94) * side
    if scene == "water" or individual.thing == "star":
        base = rng.uniform(0.82, 0.92) * side
    radius = min(radius, base / (BASE_LINES.get(individual.thing, 0.95) + 1.06))  # keep its head in the picture
    centre = ((0.5 + rng.uniform(-0.09, 0.09)) * side, base - BASE_LINES.get(individual.thing, 0.95) * radius)
    return centre, radius, rng.random() < 0.15  # most look to the right: a small model that must choose draws two heads


PREFIXES = ("a photo of a", "a photo of", "a picture of a", "a", "the", "")
PREFIX_WEIGHTS = (40, 26, 8, 10, 8, 8)


def caption_of(individual: Individual, scene: str, rng: random.Random, name: str | None = None) -> str:
    """What a person might write below the picture; words are left out at random."""
    words = [rng.choices(PREFIXES, PREFIX_WEIGHTS)[0]]
    if name:
        words[0] = rng.choices(PREFIXES, (25, 55, 4, 6, 2, 8))[0]
        words.append(name)
    else:
        if rng.random() < 0.65:
            words.append(individual.colour)
        if individual.pattern != "plain" and rng.random() < 0.85:
            words.append(individual.pattern)
    words.append(individual.thing)
    if rng.random() < 0.75:
        words.append(SCENES[scene])
    text = " ".join(word for word in words if word)
    return f" {text}".replace(" a orange", " an orange").strip()


@dataclass(frozen=True)
class Example:
    picture: Image.Image
    caption: str
    individual: Individual
    scene: str
    name: str | None


def example(seed: int) -> Example:
    """The training picture with this number."""
    rng = random.Random(f"example {seed}")
    thing = rng.choices(THINGS, THING_WEIGHTS)[0]
    name = rng.choice(_NAMES_OF[thing]) if rng.random() < _NAMED_SHARE.get(thing, 0.15) else None
    individual = NAMED[name] if name else random_individual(rng, thing)
    scene = rng.choice(list(SCENES))
    caption = caption_of(individual, scene, rng, name)
    return Example(draw(individual, scene, seed), caption, individual, scene, name)


def grid(pictures: list[Image.Image], columns: int = 8, gap: int = 2) -> Image.Image:
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="number of the first picture")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--output", default="grid.png", help="PNG with all pictures; captions are printed")
    args = parser.parse_args()
    examples = [example(args.seed + i) for i in range(args.count)]
    for i, one in enumerate(examples):
        print(f"{args.seed + i:6d}  {one.caption}")
    grid([one.picture for one in examples]).save(args.output)


if __name__ == "__main__":
    main()
