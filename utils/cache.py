"""Latents computed once. The VAE is half to nine tenths of a small training step, and says the same every time.

Kept are the posterior's mean and standard deviation, not a sample: a cached run draws from the same distribution
as an uncached one, and with the same draws it sees the same latents.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from utils import errors

AUTO_LIMIT = 8 * 2**30  # bytes in main memory that `auto` takes at most; `on` takes what is needed


class Latents:
    """Posterior mean and standard deviation for every (picture, mirrored or not), fp32 in main memory.

    Not pinned itself: the loader copies rows into batches, and pins those.
    """

    def __init__(self, rows: dict[tuple[str, bool], int], mean: torch.Tensor, std: torch.Tensor):
        self.rows, self.mean, self.std = rows, mean, std  # mean, std: (rows, channels, height, width)

    def get(self, key: str, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.rows[key, bool(flip)]
        return self.mean[row], self.std[row]

    @property
    def bytes(self) -> int:
        return 2 * self.mean.numel() * self.mean.element_size()


def latents(run, family, dataset, mode: str = "auto") -> None:
    """Fills dataset.latents if `mode` (auto, on, off) and the crops allow it, then lets the VAE's encoder go."""
    if mode == "off":
        return
    if dataset.varying_crops():
        if mode == "on":
            errors.refuse(
                "--cache_latents on needs crops that stay where they are, and these photos are not square: "
                "add --center_crop, or use --cache_latents auto"
            )
        run.say("latents are not cached: crops vary, add --center_crop (or use square photos) to train faster")
        return
    with run.phase("caching latents"):
        found = _encode(run, family, dataset, limit=AUTO_LIMIT if mode == "auto" else None)
    if found is not None:
        dataset.latents = found
        dataset.forget()
        family.release_image_encoder()


def _encode(run, family, dataset, limit: int | None) -> Latents | None:
    flips = (False, True) if dataset.random_flip else (False,)
    distinct = {example.key: example for example in dataset.examples}  # the same picture twice is encoded once
    todo = [(example, flip) for example in distinct.values() for flip in flips]
    rows = {(example.key, flip): row for row, (example, flip) in enumerate(todo)}
    # Each rank encodes its share. Batches are cut alike each time, so that a resumed run computes the same bits.
    share = range(run.rank, len(todo), run.world)
    batch = max(1, min(16, 4 * 512**2 // dataset.size**2))
    mean = std = None
    done = []
    with ThreadPoolExecutor(max(1, min(batch, os.cpu_count() or 1))) as pool:
        for start in range(0, len(share), batch):
            if run.stopping:
                break
            chunk = list(share[start : start + batch])
            pixels = torch.stack(list(pool.map(lambda row: dataset.pixels(*todo[row], remember=False), chunk)))
            found = [part.float().cpu() for part in family.posterior(pixels.to(run.device))]  # (b, c, h, w) each
            if mean is None:
                mean, std = (torch.empty(len(todo), *part.shape[1:]) for part in found)
                if limit is not None and 2 * 4 * mean.numel() > limit:
                    run.say(f"latents are not cached: they would take {8 * mean.numel() / 2**30:.0f} GiB of memory")
                    return None
            mean[chunk], std[chunk] = found
            done += chunk
    if run.world > 1:
        from accelerate.utils import gather_object

        for row, one_mean, one_std in gather_object([(row, mean[row].clone(), std[row].clone()) for row in done]):
            if mean is None:
                mean, std = torch.empty(len(todo), *one_mean.shape), torch.empty(len(todo), *one_std.shape)
            mean[row], std[row] = one_mean, one_std
            done.append(row)
    if len(set(done)) < len(todo):  # a signal came; every rank sees the same gap
        return None
    run.say(f"{len(todo)} latents cached, {2 * 4 * mean.numel() / 2**20:.1f} MiB")
    return Latents(rows, mean, std)
