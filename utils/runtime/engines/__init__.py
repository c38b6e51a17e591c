"""Where the weights that learn, their gradients and the optimizer's state are kept, if not all in one place.

`accelerate` hands such engines the step, the clipping and the checkpoint too. Here they only keep tensors: what a step
does, and what a checkpoint holds, is the same with each of them and without.
"""

import contextlib
import os

import torch

from utils.arguments.relations import ENGINES, engine_asked_for


@contextlib.contextmanager
def unseen():
    """Inside, accelerate does not know of the engine and so leaves all of it to this room."""
    hidden = {name: os.environ.pop(name) for name in ENGINES.values() if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def made_for(accelerator, accumulate: int):
    """The keeper of what learns: `Whole`, or what accelerate is configured for."""
    name, world = engine_asked_for(), accelerator.num_processes
    if name == "DeepSpeed":
        from utils.runtime.engines import deepspeed_zero2

        os.environ["DS_ACCELERATOR"] = accelerator.device.type
        return deepspeed_zero2.Offloaded(accelerator, accumulate, deepspeed_zero2.settings(world))
    if name == "FSDP":
        from utils.runtime.engines import fsdp2

        fsdp2.check_settings()
        if world > 1:  # one has nothing to share
            return fsdp2.Sharded(accelerator, Whole(accelerator))
    return Whole(accelerator)


class Whole:
    """Everything on every process: one process, or several that average their gradients (DDP)."""

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def prepare(self, modules: dict[str, torch.nn.Module], optimizer) -> tuple[dict, torch.optim.Optimizer]:
        *wrapped, optimizer = self.accelerator.prepare(*modules.values(), optimizer)
        return dict(zip(modules, wrapped)), optimizer

    def begin(self) -> None:
        """The weights are now what training starts from."""

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)  # divides by the accumulation steps

    def holders(self, parameters: list[torch.Tensor], optimizer) -> list[torch.Tensor]:
        """The tensors whose `grad` holds the gradients, after the last micro batch of a step."""
        return parameters

    def step(self, optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def skip(self, optimizer) -> None:
        """Instead of step: the gradients are dropped."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # to a lower scale
        optimizer.zero_grad(set_to_none=True)

    def whole(self):
        """Around what reads whole weights, by all processes."""
        return contextlib.nullcontext()

    def close(self) -> None:
        pass
