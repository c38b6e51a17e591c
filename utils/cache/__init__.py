"""Latents computed once. The VAE is half to nine tenths of a small training step, and says the same every time.

Kept are the posterior's mean and standard deviation, not a sample: a cached run draws from the same distribution
as an uncached one, and with the same draws it sees the same latents.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from utils import buckets, errors, images, precomputed

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


def latents(run, family, dataset, mode: str = "auto", beside=None, precomputed_dir: str | None = None) -> None:
    """Fills dataset.latents if `mode` (auto, on, off) and the crops allow it, then lets the VAE's encoder go.

    `beside`, a data set whose crops stay (held-out pictures), is cached with it or not at all. With `precomputed_dir`
    nothing is encoded but what a held-out picture needs in a shape of its own.
    """
    if mode == "off":
        return
    try:
        if precomputed_dir:
            _stored(run, family, dataset, beside, precomputed_dir)
        else:
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


def _stored(run, family, dataset, beside, folder: str) -> None:
    """What `python -m utils.cache` wrote, if it is of these pictures, these captions and this model."""
    refuse_varying(family, dataset, "--precomputed_dir")
    store = precomputed.Store(folder)
    complaints = store.differing(**precomputed.identity(precomputed.encoders(family), **facts(dataset), **store.kinds))
    wanted = {row: example for example, *row in views(dataset) for row in [(example.key, *row)]}
    missing = [example for row, example in wanted.items() if row not in store.rows]
    again = "run python -m utils.cache again for this data set, every shard of it"
    if missing and not complaints:
        names = images.name_of(missing[0].source)
        complaints.append(f"--precomputed_dir {folder}: {len(missing)} of {len(wanted)} views are not in it ({names}, "
                          f"...); {again}")  # fmt: skip
    learning = family.encoders.keys() & family.trainable.keys()  # what they said beforehand is soon out of date
    strangers = sorted(set(dataset.captions()) - store.texts.keys()) if store.texts and not learning else []
    if strangers and not complaints:
        complaints.append(f"--precomputed_dir {folder}: {len(strangers)} captions are not in it ({strangers[0]!r}, "
                          f"...); {again}")  # fmt: skip
    if complaints:
        errors.refuse(complaints)
    dataset.latents, family.stored_prompts = store, {} if learning else store.texts
    if beside is not None:
        there = all((example.key, *row) in store.rows for example, *row in views(beside))
        beside.latents = store if there else _encode(run, family, beside, None)
    run.say(f"{len(wanted)} latents and {len(family.stored_prompts)} captions are read from '{folder}'")
    family.release_image_encoder()


def refuse_varying(family, dataset, option: str) -> None:
    if not family.caches_latents:
        errors.refuse(f"{option}: an in-painting model sees another part of each picture every time")
    if dataset.varying_crops():
        errors.refuse(
            f"{option} needs crops that stay where they are, and these pictures are not as wide and high as their"
            " crop: add --center_crop"
        )


def facts(dataset) -> dict:
    """What a data set does to its pictures before they are encoded, as precomputed.identity takes it."""
    shapes = ",".join(map(buckets.label, dataset.shapes)) if dataset.bucketed else buckets.OFF
    return {
        "resolution": dataset.size,
        "resolution_buckets": shapes,
        "interpolation": dataset.interpolation,
        "mirrored": dataset.random_flip,
        "alpha_background": dataset.alpha_background,
    }


def views(dataset) -> list[tuple]:
    """(example, mirrored, shape) of everything that a cached data set shows."""
    flips = (False, True) if dataset.random_flip else (False,)
    return [(example, flip, shape) for example, shape in dataset.pairs() for flip in flips]


def encode(family, dataset, todo: Sequence[tuple], chunks: Iterable[list[int]], device) -> Iterator[tuple]:
    """(rows of `todo`, mean, std) chunk by chunk; pictures are prepared by many threads."""
    with ThreadPoolExecutor(max(1, min(16, os.cpu_count() or 1))) as pool:
        for chunk in chunks:
            pixels = torch.stack(list(pool.map(lambda row: dataset.pixels(*todo[row], remember=False), chunk)))
            mean, std = (part.float().cpu() for part in family.posterior(pixels.to(device)))  # (b, c, h, w) each
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
                family.refuse_broken(mean + std)
            yield chunk, mean, std


def _encode(run, family, dataset, limit: int | None) -> Latents | None:
    todo = views(dataset)
    rows = [(example.key, flip, shape) for example, flip, shape in todo]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    chunks = batches([shape for *_, shape in todo], run.rank, run.world)
    chunks = itertools.takewhile(lambda _: not run.stopping, chunks)
    for chunk, *parts in encode(family, dataset, todo, chunks, run.device):
        if not found and limit is not None:
            width, height = todo[chunk[0]][2]
            each = 2 * parts[0][0].nbytes / (width * height)  # bytes a pixel
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
    mebibytes = f"{latents.bytes / 2**20:.1f}"
    run.say(f"{len(todo)} latents cached" + (f", {mebibytes} MiB" if mebibytes != "0.0" else ""))
    return latents


def batches(shapes: Sequence[tuple[int, int]], rank: int, world: int) -> Iterator[list[int]]:
    """This rank's share of the rows, in batches of one shape; cut alike each time, so that a resumed run computes the
    same bits."""
    for shape in dict.fromkeys(shapes):
        share = [row for row, other in enumerate(shapes) if other == shape][rank::world]
        size = max(1, min(16, 4 * 512**2 // (shape[0] * shape[1])))
        yield from (share[start : start + size] for start in range(0, len(share), size))
