"""Averaged weights: smoother than any single step's, and what is saved and sampled under --use_ema."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager

import torch

from utils import sharded
from utils.ema import posthoc


class Average:
    """An exponential moving average of some weights, of whole networks or adapters alike.

    average <- d * average + (1 - d) * weight, where d grows to `decay` with the updates n, so that a young average
    forgets the untrained start quickly: as (1 + n) / (10 + n), or as 1 - (1 + n) ** -power. With `gamma` it is that
    of a power-function average (see `posthoc`), which grows for ever.
    """

    snapshot_steps = 0

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor] | Iterable[torch.Tensor],  # learns.named() or learns.parameters()
        decay: float = 0.9999,
        offload: bool = False,  # keep the averages in main memory: slower, and frees one copy on the device
        power: float | None = None,
        interval: int = 1,  # optimizer steps between updates
        gamma: float | None = None,
    ):
        if not isinstance(parameters, Mapping):
            parameters = {str(number): weight for number, weight in enumerate(parameters)}
        self.names, self.weights = list(parameters), list(parameters.values())
        self.decay, self.power, self.gamma = decay, power, gamma
        self.interval, self._swapped = interval, False
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
        if step % self.interval:
            return
        weights = [w.detach().to(a.device) for w, a in zip(self.weights, self.averages)]  # copies only when offloaded
        torch._foreach_lerp_(self.averages, weights, 1.0 - self.decay_at(step))  # one call for all weights

    @contextmanager
    def swapped(self):
        """Inside, the networks hold the averages: to draw with them or to save them. Restored bit for bit after."""
        self._refuse_when_swapped("swapped")
        self._exchange()
        self._swapped = True
        try:
            yield self
        finally:
            self._exchange()
            self._swapped = False

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self.weights, self.averages):  # one at a time: no third copy of the whole model
            kept = weight.detach().to(average.device, copy=True)
            weight.copy_(average)
            average.copy_(kept)

    def snapshot(self, step: int) -> None:
        """Of this average nothing is stored but in checkpoints."""

    def state(self) -> dict[str, torch.Tensor]:
        """Name -> average, for a safetensors file. All processes call it."""
        self._refuse_when_swapped("state")
        return {name: sharded.whole(average) for name, average in zip(self.names, self.averages)}

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """The exact inverse of state."""
        self._refuse_when_swapped("restore")
        if set(state) != set(self.names):
            odd = sorted(set(state) ^ set(self.names))
            raise ValueError(f"these averages belong to other weights: {', '.join(odd[:3])} stand on one side only")
        for name, average in zip(self.names, self.averages):
            if state[name].shape != average.shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)}, expected {tuple(average.shape)}")
            average.copy_(sharded.part(state[name], average))

    def _refuse_when_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what}: the networks hold the averages just now")


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
    parameters: Mapping[str, torch.Tensor],
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
        return Average(parameters, ema_decay, power=ema_power, **how)
    averages = {one: Average(parameters, gamma=posthoc.gamma_of(one), **how) for one in ema_sigma_rel}
    twentieth = math.ceil(total_steps / 20 / ema_interval) * ema_interval
    return posthoc.PowerAverages(averages, output_dir, ema_snapshot_steps or twentieth)
