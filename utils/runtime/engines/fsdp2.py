"""FSDP2: what learns is sharded over several processes."""

import contextlib
import os

import torch

from utils import errors, sharded


def check_settings() -> None:
    """Of accelerate's FSDP settings: version 2, and nothing that is not done here."""
    told = {name: value.lower() for name, value in os.environ.items() if name.startswith("FSDP_")}
    complaints = []
    if (version := told.get("FSDP_VERSION", "1")) != "2":
        complaints.append(
            f"accelerate is set to FSDP version {version}; use version 2 (fsdp_version: 2), as in "
            "accelerate_configs/fsdp2.yaml"
        )
    if told.get("FSDP_OFFLOAD_PARAMS") == "true":
        complaints.append("fsdp_offload_params: true is not supported; leave it out")
    if told.get("FSDP_ACTIVATION_CHECKPOINTING") == "true":
        complaints.append("fsdp_activation_checkpointing: true; leave it out and add --gradient_checkpointing")
    if complaints:
        errors.refuse(complaints, once=True)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would leave other processes without weights


class Sharded:
    """FSDP2: each process keeps a part of every weight of the networks that learn, of its gradient and its state.

    The blocks of a network are made whole one after another, for their forward and backward pass only. accelerate's own
    way is not taken: it does nothing on a CPU, and its checkpoints have another layout.
    """

    def __init__(self, accelerator, like):
        self.accelerator = accelerator
        self.classes = {}  # network -> its own class: sharding puts another in its place, which files would name
        self.blocks = []
        for name in ("begin", "backward", "holders", "step", "skip", "close"):  # as with DDP
            setattr(self, name, getattr(like, name))

    def prepare(self, modules, optimizer):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        parts = {}
        for module in modules.values():
            weights = dict(module.named_parameters())
            self.classes[module] = type(module)
            for block in [*blocks_of(module), module]:
                self.blocks.append(fully_shard(block, mesh=mesh))
            parts |= {id(weights[name]): part for name, part in module.named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [parts[id(weight)] for weight in group["params"]]
        prepare = self.accelerator.prepare_model  # "evaluation": precision only, no DDP
        wrapped = {name: prepare(module, evaluation_mode=True) for name, module in modules.items()}
        prepared = self.accelerator.prepare_optimizer(optimizer)
        optimizer.register_state_dict_post_hook(self._whole_state)
        optimizer.register_load_state_dict_pre_hook(self._parts_of_state)
        return wrapped, prepared

    @contextlib.contextmanager
    def whole(self):
        """Inside, every process has all weights, may call the networks as often as it likes, and may write them."""
        layers = [layer for module in self.classes for layer in module.modules()]
        hooks = {layer: layer._state_dict_pre_hooks for layer in layers}  # they would shard again before a file is made
        for block in self.blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        others = {module: type(module) for module in self.classes}
        for layer in layers:
            layer._state_dict_pre_hooks = type(hooks[layer])()
        for module, own in self.classes.items():
            module.__class__ = own
        try:
            yield
        finally:
            for module, other in others.items():
                module.__class__ = other
            for layer in layers:
                layer._state_dict_pre_hooks = hooks[layer]
            for block in self.blocks:
                block.set_reshard_after_forward(block not in self.classes, recurse=False)
                block.reshard()

    @staticmethod
    def _whole_state(optimizer, state: dict) -> dict:
        by_weight = {
            number: {
                name: sharded.whole(value) if isinstance(value, torch.Tensor) else value for name, value in own.items()
            }
            for number, own in state["state"].items()
        }
        return {**state, "state": by_weight}

    @staticmethod
    def _parts_of_state(optimizer, state: dict) -> dict:
        weights = {
            number: weight
            for group, now in zip(state["param_groups"], optimizer.param_groups)
            for number, weight in zip(group["params"], now["params"])
        }
        by_weight = {
            number: {
                name: sharded.part(value, weights[number])
                if isinstance(value, torch.Tensor) and value.shape == weights[number].shape
                else value
                for name, value in own.items()
            }
            for number, own in state["state"].items()
        }
        return {**state, "state": by_weight}


def blocks_of(module: torch.nn.Module):
    """The members of its outermost lists of layers: the UNet's blocks, the layers of an encoder."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from blocks_of(child)
