"""Latents computed once. The VAE is half to nine tenths of a small training step, and says the same every time.

Kept are the posterior's mean and standard deviation, not a sample: a cached run draws from the same distribution
as an uncached one, and with the same draws it sees the same latents.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from utils import errors, images

AUTO_LIMIT = 8 * 2**30  # bytes in main memory that `auto` takes at most; `on` takes what is needed


class Latents:
    """Posterior mean and standard deviation for every (picture, mirrored or not, shape), fp32 in main memory.

    Not pinned itself: the loader copies rows into batches, and pins those.
    """

    def __init__(self, rows: dict[tuple[str, bool, tuple[int, int]], tuple[torch.Tensor, torch.Tensor]]):
        self.rows = rows  # => mean, std: (channels, height, width)

    def get(self, key: str, flip: bool, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows[key, bool(flip), shape]

    @property
    def bytes(self) -> int:
        return sum(mean.nbytes + std.nbytes for mean, std in self.rows.values())


def latents(run, family, dataset, mode: str = "auto", beside=None) -> None:
    """Fills dataset.latents if `mode` (auto, on, off) and the crops allow it, then lets the VAE's encoder go.

    `beside`, a data set whose crops stay (held-out pictures), is cached with it or not at all.
    """
    if mode == "off":
        return
    try:
        _fill(run, family, dataset, mode, beside)
    except images.BadImage as bad:
        errors.refuse(f"{bad}; it was whole when the run began", errors.DATA)


def _fill(run, family, dataset, mode: str, beside) -> None:
    if not family.caches_latents:
        if mode == "on":
            errors.refuse(
                "--cache_latents on: an in-painting model sees another part of each picture every time; use auto or off"
            )
        return
    if dataset.varying_crops():
        if mode == "on":
            errors.refuse(
                "--cache_latents on needs crops that stay where they are, and these photos are not as wide and high as "
                "their crop: add --center_crop, or use --cache_latents auto"
            )
        run.say("latents are not cached: crops vary, add --center_crop (or use square photos) to train faster")
        return
    with run.phase("caching latents"):
        limit = AUTO_LIMIT if mode == "auto" else None
        both = [(one, _encode(run, family, one, limit)) for one in (dataset, beside) if one is not None]
    if all(found is not None for _, found in both):
        for one, found in both:
            one.latents = found
            one.forget()
        family.release_image_encoder()


def _encode(run, family, dataset, limit: int | None) -> Latents | None:
    flips = (False, True) if dataset.random_flip else (False,)
    todo = [(example, flip, shape) for example, shape in dataset.pairs() for flip in flips]
    rows = [(example.key, flip, shape) for example, flip, shape in todo]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1))) as pool:
        for chunk in _batches([shape for *_, shape in todo], run.rank, run.world):
            if run.stopping:
                break
            pixels = torch.stack(list(pool.map(lambda row: dataset.pixels(*todo[row], remember=False), chunk)))
            parts = [part.float().cpu() for part in family.posterior(pixels.to(run.device))]  # (b, c, h, w) each
            if not found and limit is not None:
                each = 2 * parts[0].nbytes / pixels[:, 0].numel()  # bytes a pixel
                needed = each * sum(width * height for *_, (width, height) in todo)
                if needed > limit:
                    run.say(f"latents are not cached: they would take {needed / 2**30:.0f} GiB of memory")
                    return None
            # Rows of their own, so that none keeps its whole batch alive.
            found |= {row: tuple(part[k].clone() for part in parts) for k, row in enumerate(chunk)}
    if run.world > 1:
        from accelerate.utils import gather_object

        found = {row: parts for row, *parts in gather_object([(row, *parts) for row, parts in found.items()])}
    if len(found) < len(todo):  # a signal came; every rank sees the same gap
        return None
    latents = Latents({rows[row]: tuple(parts) for row, parts in sorted(found.items())})
    run.say(f"{len(todo)} latents cached, {latents.bytes / 2**20:.1f} MiB")
    return latents


def _batches(shapes: Sequence[tuple[int, int]], rank: int, world: int) -> Iterator[list[int]]:
    """This rank's share of the rows, in batches of one shape; cut alike each time, so that a resumed run computes the
    same bits."""
    for shape in dict.fromkeys(shapes):
        share = [row for row, other in enumerate(shapes) if other == shape][rank::world]
        size = max(1, min(16, 4 * 512**2 // (shape[0] * shape[1])))
        yield from (share[start : start + size] for start in range(0, len(share), size))
