"""Every draw is a pure function of (seed, purpose, number): nothing here remembers anything.

So a resumed run draws what an uninterrupted one would have drawn, a batch may be split over accumulation steps
or processes without changing a number, and no two processes draw the same noise.
"""

import functools
import random
from array import array
from hashlib import blake2b

import torch


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed; neighbouring numbers give unrelated seeds, which `seed + number` would not."""
    text = "/".join([str(int(seed)), purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def rng(seed: int, purpose: str, *numbers: int) -> random.Random:
    return random.Random(seed_of(seed, purpose, *numbers))


@functools.lru_cache(maxsize=8)  # a loader asks for the same epoch once per example
def order(seed: int, epoch: int, count: int, purpose: str = "order") -> array:
    """The permutation of range(count) in which `epoch` visits the examples; not to be modified."""
    slots = array("q", range(count))
    rng(seed, purpose, epoch, count).shuffle(slots)
    return slots


def slot(seed: int, position: int, count: int, purpose: str = "order") -> int:
    """Which of `count` examples the endless stream shows at `position`: epoch after epoch, without gaps."""
    return order(seed, position // count, count, purpose)[position % count]


@functools.lru_cache(maxsize=8)
def groups(seed: int, epoch: int, counts: tuple[int, ...], size: int, passes: int = 1) -> list[tuple[int, list[int]]]:
    """The groups of `size` in which `epoch` visits several lists of so many examples: [(which list, which of it)].

    No group mixes lists. Each list is gone through `passes` times, in a new order each time; its last group is filled
    up from its first visits, so nothing is left out and nothing waits. Not to be modified.
    """
    found = []
    for number, count in enumerate(counts):
        purpose = f"order of list {number}"
        visits = [one for k in range(passes) for one in order(seed, epoch * passes + k, count, purpose)]
        for start in range(0, len(visits), size):
            found.append((number, [visits[(start + k) % len(visits)] for k in range(size)]))
    rng(seed, "order of groups", epoch, len(found)).shuffle(found)
    return found


def positions(step: int, micro: int, rank: int, *, batch: int, world: int = 1, accumulate: int = 1) -> range:
    """The global positions of one micro batch; `step` counts optimizer steps from 0, `micro` within the step."""
    first = ((step * accumulate + micro) * world + rank) * batch
    return range(first, first + batch)


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seeds torch's global generators, which dropout inside the networks uses."""
    torch.manual_seed(seed_of(seed, "step", step, micro, rank))


class Draws:
    """The random numbers of one batch, one row for each id, whatever other rows stand beside it.

    The same purpose gives the same numbers each time it is asked for: give every draw a purpose of its own.
    Rows are drawn on the CPU, because a GPU's generator gives other numbers than a CPU's.
    """

    def __init__(self, seed: int, ids, device="cpu"):
        self.seed, self.device = seed, torch.device(device)
        self.ids = ids.tolist() if isinstance(ids, torch.Tensor) else [int(number) for number in ids]

    def normal(self, purpose: str, shape) -> torch.Tensor:  # (batch, *shape) fp32
        rows = torch.empty((len(self.ids), *shape), pin_memory=self.device.type == "cuda")
        for row, number in zip(rows, self.ids, strict=True):
            row.normal_(generator=torch.Generator().manual_seed(seed_of(self.seed, purpose, number)))
        return rows.to(self.device, non_blocking=True)

    def integers(self, purpose: str, high: int) -> torch.Tensor:  # (batch,) int64 in [0, high)
        return self._to_device([seed_of(self.seed, purpose, number) % high for number in self.ids], torch.int64)

    def uniform(self, purpose: str) -> torch.Tensor:  # (batch,) fp32 in [0, 1)
        # 24 bits are all that fp32 holds; more would round up to 1.0 now and then.
        rows = [(seed_of(self.seed, purpose, number) >> 39) / 2**24 for number in self.ids]
        return self._to_device(rows, torch.float32)

    def _to_device(self, rows: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(rows, dtype=dtype, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
