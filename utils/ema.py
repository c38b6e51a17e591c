"""Averaged weights: smoother than any single step's, and what is saved and sampled under --use_ema."""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager

import torch

from utils import sharded


class Average:
    """An exponential moving average of some weights, of whole networks or adapters alike.

    average <- d * average + (1 - d) * weight, where d grows to `decay` with the updates n, so that a young average
    forgets the untrained start quickly: as (1 + n) / (10 + n), or as 1 - (1 + n) ** -power.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor] | Iterable[torch.Tensor],  # learns.named() or learns.parameters()
        decay: float = 0.9999,
        offload: bool = False,  # keep the averages in main memory: slower, and frees one copy on the device
        power: float | None = None,
        interval: int = 1,  # optimizer steps between updates
    ):
        if not isinstance(parameters, Mapping):
            parameters = {str(number): weight for number, weight in enumerate(parameters)}
        self.names, self.weights = list(parameters), list(parameters.values())
        self.decay, self.power, self.interval, self._swapped = decay, power, interval, False
        self.averages = [w.detach().to("cpu" if offload else w.device, copy=True) for w in self.weights]

    def decay_at(self, step: int) -> float:
        updates = step // self.interval
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

    def update(self, step: int) -> None:
        pass

    @contextmanager
    def swapped(self):
        yield self


def create(
    parameters: Mapping[str, torch.Tensor],
    use_ema: bool = False,
    ema_decay: float = 0.9999,
    ema_power: float | None = None,
    ema_interval: int = 1,
    offload_ema: bool = False,
) -> Average | NoAverage:
    if not use_ema:
        return NoAverage()
    return Average(parameters, ema_decay, offload=offload_ema, power=ema_power, interval=ema_interval)
