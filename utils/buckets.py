"""Aspect-ratio buckets: photos keep their shape, and each step holds pictures of one shape.

Which shapes there are, which of them a photo goes to, and what that costs, told before training. Standard library
only: the preflight asks before anything heavy is imported. All shapes are (width, height) in pixels.
"""

import math
import re
from collections.abc import Iterable, Sequence

OFF, AUTO = "off", "auto"
SIDE = 64  # pixels between the sides of automatic shapes, as users of SDXL know them
SMALLEST = 512  # --resolution from which that leaves enough shapes; below, the model's own factor takes its place
WIDEST = 4.0  # longer side by shorter side of automatic shapes, as in SDXL (arXiv 2307.01952, appendix I)
MULTIPLE = 8  # pixels: the autoencoder's downscaling
NAMED = 5  # photos named in a line of the report

Shape = tuple[int, int]


def spelled(written: str) -> str:
    """What --resolution_buckets was given => off, auto, or the shapes in one spelling; ValueError for anything else."""
    written = written.strip().lower()
    if written in (OFF, "no", "false", "0"):
        return OFF
    if written in (AUTO, "yes", "true", "on", "1"):
        return AUTO
    found = list(map(_shape, written.split(",")))
    return ",".join(map(label, sorted(set(found), key=lambda shape: (shape[0] / shape[1], shape))))


def _shape(written: str) -> Shape:
    match = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", written.strip())
    if not match or any(not int(side) or int(side) % MULTIPLE for side in match.groups()):
        raise ValueError
    return int(match[1]), int(match[2])


def label(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def shapes(spelling: str, resolution: int, factor: int) -> list[Shape]:
    """The shapes that there are, narrow to wide; [] without buckets.

    Automatic ones have `resolution` squared pixels or a little less, so that none needs more memory than the square.
    factor: pixels of which the model wants a picture's side to be a multiple.
    """
    if spelling == OFF:
        return []
    if spelling != AUTO:
        return list(map(_shape, spelling.split(",")))
    step = min(SIDE if resolution >= SMALLEST else factor, resolution)
    found = set()
    for shorter in range(step, resolution + 1, step):
        longer = resolution**2 // shorter // step * step
        if longer <= WIDEST * shorter:
            found |= {(shorter, longer), (longer, shorter)}
    return sorted(found, key=lambda shape: (shape[0] / shape[1], shape))


def nearest(width: int, height: int, among: Sequence[Shape]) -> Shape:
    """The shape whose aspect ratio is nearest; of two alike the largest that needs no enlarging."""

    def fit(shape: Shape):
        distance = abs(math.log(width / height * shape[1] / shape[0]))
        enlarged = shape[0] > width or shape[1] > height
        return round(distance, 9), enlarged, shape[0] * shape[1] * (1 if enlarged else -1)

    return min(among, key=fit)


def lost(width: int, height: int, shape: Shape) -> float:
    """Share of a picture that lies outside of the crop."""
    wide, narrow = sorted((width / height, shape[0] / shape[1]), reverse=True)
    return 1 - narrow / wide


def fill(photos: Iterable[tuple], among: Sequence[Shape]) -> dict[Shape, list[tuple]]:
    """The shapes that are used, in their order, each with its photos (name, width, height, times in an epoch)."""
    filled: dict[Shape, list[tuple]] = {shape: [] for shape in among}
    for photo in photos if among else ():
        filled[nearest(photo[1], photo[2], among)].append(photo)
    return {shape: inside for shape, inside in filled.items() if inside}


def steps(counts: Iterable[int], group: int, repeats: int = 1) -> int:
    """Optimizer steps of `group` examples that show each photo `repeats` times, where no step mixes shapes."""
    return sum(-(-count * repeats // group) for count in counts)


def counts(filled: dict[Shape, list[tuple]]) -> list[int]:
    return [sum(times for *_, times in inside) for inside in filled.values()]


def report(filled: dict[Shape, list[tuple]], group: int, repeats: int = 1) -> list[str]:
    """What a person should know before training, a line a bucket: photos, repetitions, the largest loss by cropping."""
    said = [f"buckets (width x height), in steps of {group} photos of one shape:"] if filled else []
    for (shape, inside), count in zip(filled.items(), counts(filled)):
        names = [name for name, *_ in inside]
        line = f"  {label(shape):<10}{len(inside)} photo{'s' if len(inside) > 1 else ''}"
        visits = steps([count], group, repeats) * group
        if visits > count * repeats:
            named = f"{', '.join(names[:NAMED])}{', ...' if names[NAMED:] else ''}"
            line += f" ({named}), {visits - count * repeats} of {visits} visits an epoch are repeats"
        share, name = max((lost(width, height, shape), name) for name, width, height, _ in inside)
        line += f"; {name} loses {share:.0%} to its crop" if share >= 0.005 else ""
        small = [name for name, width, height, _ in inside if width < shape[0] or height < shape[1]]
        said.append(line + (f"; {len(small)} smaller and enlarged" if small else ""))
    return said
