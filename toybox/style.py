"""A style to fine-tune on: the toybox's pictures printed in two inks, dark blue on cream, with their usual captions.

    python -m toybox.style --output runs/style/pictures          # 40 pictures and metadata.jsonl
    python -m toybox.style --score runs/style/drawn              # how much pictures have of it: 0 none, 1 all

The score needs no judge: a picture printed in two inks has no colour beside the line between them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from toybox.draw import example

INK, PAPER = (24, 36, 92), (250, 240, 214)
FIRST = 900_000  # numbers of pictures that the model was not trained on


def printed(picture: Image.Image) -> Image.Image:
    return ImageOps.colorize(ImageOps.autocontrast(picture.convert("L")), INK, PAPER)


def write(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        one = example(FIRST + number)
        printed(one.picture).save(folder / f"{number:03d}.png")
        rows.append(json.dumps({"file_name": f"{number:03d}.png", "text": one.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def score(pictures: list[Image.Image]) -> float:
    """1 - the mean distance of pixels from the line between the two inks, relative to that of the toybox's own drawings
    (where it is 0 on the average); below 0 a picture is more colourful than those."""
    return float(1 - np.mean([_distance(picture) for picture in pictures]) / np.mean(list(map(_distance, usual()))))


def usual() -> list[Image.Image]:
    """How the toybox draws that was taught no style."""
    return [example(FIRST + 1000 + number).picture for number in range(32)]


class Palette:
    """The same for any style of which there are pictures: `likeness(some)` is 0 for the toybox's own drawings and 1 for
    pictures of the style, by the mean distance of pixels from the nearest colour that the style has."""

    def __init__(self, taught: list[Image.Image]):
        levels, counts = np.unique(np.concatenate(list(map(_pixels, taught))) // 16, axis=0, return_counts=True)
        self.colours = 16 * levels[counts >= 0.001 * counts.sum()] + 8.0
        self.start, self.end = self._away(usual()), self._away(taught)

    def likeness(self, pictures: list[Image.Image]) -> float:
        if self.start < 2 * self.end:  # the toybox's own colours
            return float("nan")
        return (self.start - self._away(pictures)) / (self.start - self.end)

    def _away(self, pictures: list[Image.Image]) -> float:
        pixels = np.concatenate(list(map(_pixels, pictures)))
        nearest = np.full(len(pixels), np.inf)
        for colour in self.colours:
            nearest = np.minimum(nearest, np.linalg.norm(pixels - colour, axis=1))
        return float(nearest.mean())


def _pixels(picture: Image.Image) -> np.ndarray:
    """(64 * 64, 3), for what is fine in a picture is not its style."""
    return np.asarray(ImageOps.fit(picture.convert("RGB"), (64, 64)), int).reshape(-1, 3)


def _distance(picture: Image.Image) -> float:
    ink, paper = np.array(INK, float), np.array(PAPER, float)
    line = (paper - ink) / np.linalg.norm(paper - ink)
    apart = np.asarray(picture.convert("RGB"), float).reshape(-1, 3) - ink
    return float(np.linalg.norm(apart - np.outer(apart @ line, line), axis=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for the captioned pictures")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--score", type=Path, help="folder of PNG pictures")
    args = parser.parse_args()
    if args.output:
        write(args.output, args.count)
    if args.score:
        found = [path for path in sorted(args.score.rglob("*.png")) if path.name != "grid.png"]
        print(f"style {score([Image.open(path) for path in found]):.2f} over {len(found)} pictures")


if __name__ == "__main__":
    main()
