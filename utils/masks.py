"""Subject masks: where a photo counts. NAME.mask.png beside NAME.jpg, a folder of masks, the photo's own alpha, or SAM.

White is learned, black is not, grey in between. A mask is upright and as large as its photo as a person sees it, so
that every turn, resize, crop and flip of the photo means the same for both.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import errors, images

BLACK = 8  # of 255: a mask that is nowhere brighter is black, whatever its compression has left in it


@dataclass(frozen=True)
class Mask:
    source: Any  # the mask's file, or the photo that carries it
    alpha: bool = False
    key: str = ""  # short identity of the mask's content, beside that of the photo

    def open(self):
        """The upright "L" image."""
        return open_grey(self.source, self.alpha)


def open_grey(source, alpha: bool = False):
    """A mask file, or a photo's alpha channel => "L" image, upright; None for a photo without alpha channel."""
    if alpha:
        return images.open_alpha(source)
    # On black: a subject that was cut out and saved with transparency is a mask too.
    return images.open_rgb(source, background="black").convert("L")


def shows(mask, place: tuple[int, int], shape: tuple[int, int]) -> bool:
    """Whether the crop of (width, height) `shape` at (top, left) shows any of a mask."""
    top, left = place
    return mask.crop((left, top, left + shape[0], top + shape[1])).getextrema()[1] >= BLACK


def files(photos: Sequence[Path], folder: str | os.PathLike, masks_dir: str | None = None) -> list[Path | None]:
    """The mask of each photo: NAME.mask.png beside it; in `masks_dir`, NAME.png or NAME.mask.png at the same place."""
    if any(map(callable, photos)):  # rows of a data set, which lie in no folder
        return [None] * len(photos)
    found: list[Path | None] = []
    listed: dict[Path, dict[str, Path]] = {}
    for photo in map(Path, photos):
        parent = photo.parent if masks_dir is None else Path(masks_dir, photo.parent.relative_to(folder))
        if parent not in listed:
            names = sorted(os.listdir(parent)) if parent.is_dir() else []
            pictures = [name for name in names if os.path.splitext(name)[1].lower() in images.SUFFIXES]
            listed[parent] = {os.path.splitext(name)[0].lower(): parent / name for name in reversed(pictures)}
        stem = photo.stem.lower()
        there = listed[parent].get(f"{stem}.mask")
        found.append(there or (listed[parent].get(stem) if masks_dir is not None else None))
    return found


def check(photos: Sequence, sources: Sequence, alpha: bool = False) -> tuple[list[str], int]:
    """=> (complaints about masks that cannot be used, how many photos have one).

    photos: reports of images.inspect; sources: their masks' files, None where there is none, or the photos themselves.
    """
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1, len(sources)))) as pool:
        problems = list(pool.map(lambda pair: _problem(*pair, alpha), zip(photos, sources)))
    complaints = [problem for problem in problems if problem]
    return complaints, sum(problem is not None for problem in problems)


def _problem(photo, source, alpha: bool) -> str | None:
    """None: there is no mask; "": it can be used."""
    if source is None:
        return None
    try:
        mask = open_grey(source, alpha)
    except images.BadImage as bad:
        return f"the mask {bad}"
    if mask is None:
        return None
    if mask.size != (photo.width, photo.height):
        return (
            f"the mask '{source}' is {mask.width}x{mask.height} and its photo '{photo.path}' {photo.width}x"
            f"{photo.height}: both must have the same size, upright as the photo is shown"
        )
    if mask.getextrema()[1] < BLACK:
        return _black(source)
    return ""


def attach(
    examples: Sequence,  # datasets.Example, each gets its `mask`
    folder: str | os.PathLike | None = None,  # that the photos were found in
    masks_dir: str | None = None,
    alpha: bool = False,
    needed: bool = True,  # one of them must have a mask
) -> list:
    """Examples whose mask is known; a photo without one counts as a whole."""
    sources = [example.source for example in examples]
    found = _alphas(examples) if alpha else [path and from_file(path) for path in files(sources, folder, masks_dir)]
    if needed and not any(found):
        errors.refuse(none("--masked_loss"), errors.DATA)
    return [dataclasses.replace(example, mask=mask) for example, mask in zip(examples, found)]


def without(examples: Sequence) -> list:
    return [dataclasses.replace(example, mask=None) for example in examples]


def from_file(path: Path) -> Mask:
    return Mask(path, key="mask-" + hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest())


def _alphas(examples: Sequence) -> list[Mask | None]:
    found, complaints = [], []
    for example in examples:  # those of a dataset were not seen by the preflight
        alpha = images.open_alpha(example.source)
        found.append(alpha and Mask(example.source, True, f"alpha-{example.key}"))
        if alpha and alpha.getextrema()[1] < BLACK:
            complaints.append(_black(example.source))
    if complaints:
        errors.refuse(complaints, errors.DATA)
    return found


def _black(source) -> str:
    return f"the mask '{images.name_of(source)}' is black: nothing of its photo would be learned"


def none(option: str) -> str:
    return (
        f"{option}: no photo has a mask; put NAME.mask.png beside NAME.jpg, name a folder with --masks_dir, take the"
        " photos' transparency with --alpha_mask, or let --sam_model_name_or_path make them"
    )
