"""Averaged weights: smoother than any single step's, and what is saved and sampled under --use_ema."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from utils import errors, sharded
from utils.ema import posthoc
from utils.saved import AVERAGED, snapshot_steps


class Average:
    """An exponential moving average of some weights, of whole networks or adapters alike.

    average <- d * average + (1 - d) * weight, where d grows to `decay` with the updates n, so that a young average
    forgets the untrained start quickly: as (1 + n) / (10 + n), or as 1 - (1 + n) ** -power. With `gamma` it is that
    of a power-function average (see `posthoc`), which grows for ever.
    """

    snapshot_steps = 0

    def __init__(
        self,
        learns,  # learning.Full, adapters.Adapters
        decay: float = 0.9999,
        offload: bool = False,  # keep the averages in main memory: slower, and frees one copy on the device
        power: float | None = None,
        interval: int = 1,  # optimizer steps between updates
        gamma: float | None = None,
        mark: str = AVERAGED,  # behind the names of its files
    ):
        named = learns.named()
        self.learns, self.mark, self.names, self.weights = learns, mark, list(named), list(named.values())
        self.decay, self.power, self.gamma = decay, power, gamma
        self.interval, self._swapped = interval, False
        self.updated = 0  # the last step that is in them; None while one is being added
        self.averages = [w.detach().to("cpu" if offload else w.device, copy=True) for w in self.weights]

    def decay_at(self, step: int) -> float:
        updates = step // self.interval
        if self.gamma is not None:
            return posthoc.beta(updates, self.gamma)
        young = (1 + updates) / (10 + updates) if self.power is None else 1 - (1 + updates) ** -self.power
        return min(self.decay, young)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, counted from 1: a function of the number, so a resumed run needs no counter."""
        self._refuse_when_swapped("update")
        self.updated = None
        if step % self.interval == 0:
            # Copies only when offloaded; one call for all weights.
            weights = [w.detach().to(a.device) for w, a in zip(self.weights, self.averages)]
            torch._foreach_lerp_(self.averages, weights, 1.0 - self.decay_at(step))
        self.updated = step

    @contextmanager
    def swapped(self):
        """Inside, the networks hold the averages: to draw with them or to save them. Restored bit for bit after."""
        self._refuse_when_swapped("swapped")
        self._swapped = True
        try:
            with exchanged(self.weights, self.averages):
                yield self
        finally:
            self._swapped = False

    def snapshot(self, step: int) -> None:
        """Of this average nothing is stored but in checkpoints."""

    def state(self) -> dict[str, torch.Tensor]:
        """Name -> average, for `write`. All processes call it."""
        self._refuse_when_swapped("state")
        return {name: sharded.whole(average) for name, average in zip(self.names, self.averages)}

    def write(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Beside the weights of a checkpoint and in their format: unet_ema/, pytorch_lora_weights_ema.safetensors. The
        main process alone calls it, while sharded weights are whole, and so others than those that are averaged."""
        named = self.learns.named()
        with exchanged([named[name] for name in state], state.values()):
            self.learns.save(folder, mark=self.mark)

    def load(self, folder: Path) -> None:
        """The exact inverse of write. All processes call it."""
        self._refuse_when_swapped("load")
        if not any(folder.glob(f"*{self.mark}*")):
            errors.refuse(f"{folder} holds no averaged weights to go on with; leave --use_ema out, or begin anew")
        with self.swapped():
            self.learns.load(folder, mark=self.mark)

    def _refuse_when_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what}: the networks hold the averages just now")


@contextmanager
def exchanged(some: Iterable[torch.Tensor], others: Iterable[torch.Tensor]):
    """Inside, each of two rows of tensors, wherever they are, holds the values of the other."""
    pairs = list(zip(some, others, strict=True))
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


@torch.no_grad()
def _exchange(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for one, other in pairs:  # one at a time: no third copy of the whole model
        kept = one.detach().to(other.device, copy=True)
        one.copy_(other)
        other.copy_(kept)


class NoAverage:
    """Stands in where nothing is averaged, so that the scripts need no condition."""

    snapshot_steps = 0  # never

    def update(self, step: int) -> None:
        pass

    def snapshot(self, step: int) -> None:
        pass

    @contextmanager
    def swapped(self):
        yield self


def create(
    learns,
    total_steps: int,
    use_ema: bool = False,
    ema_decay: float = 0.9999,
    ema_power: float | None = None,
    ema_interval: int = 1,
    offload_ema: bool = False,
    posthoc_ema: bool = False,
    ema_sigma_rel: Sequence[float] = (0.05, 0.1),
    ema_snapshot_steps: int | None = None,  # None: a twentieth of the run
    output_dir: str = ".",
) -> Average | NoAverage | posthoc.PowerAverages:
    if not use_ema:
        return NoAverage()
    how = {"offload": offload_ema, "interval": ema_interval}
    if not posthoc_ema:
        return Average(learns, ema_decay, power=ema_power, **how)
    marks = [AVERAGED, *(f"{AVERAGED}_{one:g}" for one in ema_sigma_rel[1:])]  # who draws looks for the first
    averages = {
        one: Average(learns, gamma=posthoc.gamma_of(one), mark=mark, **how) for one, mark in zip(ema_sigma_rel, marks)
    }
    every = snapshot_steps(total_steps, ema_snapshot_steps, ema_interval)
    return posthoc.PowerAverages(averages, output_dir, every)
