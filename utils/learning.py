"""What learns, when whole networks do. `adapters.Adapters` is its twin with the same methods.

modules, parameters, named, groups, save, load, describe: that is all a script, a checkpoint or an average needs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from utils import errors, saved, sharded
from utils.models import clip

WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors"}
WEIGHTS |= dict.fromkeys(("text_encoder", "text_encoder_2"), "model.safetensors")


def full(family, text_encoder: bool = False, train_weights_in: str = "fp32") -> "Full":
    """Let the UNet learn, and the text encoders if asked, in this precision whatever the frozen rest is in."""
    dtype, modules = {"fp32": torch.float32, "bf16": torch.bfloat16}[train_weights_in], {}
    for name in ["unet", *(family.encoders if text_encoder else [])]:
        module = getattr(family, name)
        if module is None or any(p.dtype != dtype for p in module.parameters()):
            module = family.load_module(name, dtype)
        modules[name] = module.requires_grad_(True).train()
    return Full(modules)


class Full:
    """Every weight of some networks."""

    def __init__(self, modules: dict[str, torch.nn.Module]):
        self.modules = modules

    def named(self) -> dict[str, torch.nn.Parameter]:
        """Unique name -> weight, in an order that never changes."""
        return {f"{name}.{key}": p for name, module in self.modules.items() for key, p in module.named_parameters()}

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.named().values())

    def groups(self, learning_rate, text_encoder_lr=None, weight_decay=0.01, text_encoder_weight_decay=None) -> list:
        owned = {name: list(module.parameters()) for name, module in self.modules.items()}
        return groups(owned, learning_rate, text_encoder_lr, weight_decay, text_encoder_weight_decay)

    def describe(self) -> dict:
        return {"method": "full", "modules": sorted(self.modules)}

    def save(self, folder: str | Path, mark: str = "") -> None:
        """A folder for each network, as in a pipeline: `from_pretrained(..., subfolder="unet")` reads it."""
        for name, module in self.modules.items():
            # One file however large: load() below reads it by name.
            module.save_pretrained(Path(folder, name + mark), safe_serialization=True, max_shard_size="1TB")
            if name.startswith("text_encoder"):
                clip.with_prefix(Path(folder, name + mark, WEIGHTS[name]))
            saved.shared(Path(folder, name + mark))
            saved.forget_origins(Path(folder, name + mark))

    def load(self, folder: str | Path, mark: str = "") -> None:
        """The exact inverse of save, in place: optimizers and wrappers keep pointing at the same weights."""
        for name, module in self.modules.items():
            file = Path(folder, name + mark, WEIGHTS[name])
            targets = module.state_dict()  # shares memory with the weights, so filling it fills them
            if name.startswith("text_encoder") and not any(key.startswith("text_model.") for key in targets):
                targets = {f"text_model.{key}": target for key, target in targets.items()}
            copy_from(file, targets)


def groups(
    owned: dict[str, Sequence[torch.nn.Parameter]],  # network -> its weights
    learning_rate,
    text_encoder_lr=None,
    weight_decay=0.01,
    text_encoder_weight_decay=None,
) -> list[dict]:
    """Optimizer groups: the weights of all text encoders may have a different rate and decay from those of the UNet."""
    made = []
    for text in (False, True):
        params = [weight for network, weights in owned.items() if (network != "unet") == text for weight in weights]
        rate = text_encoder_lr if text and text_encoder_lr is not None else learning_rate
        decay = text_encoder_weight_decay if text and text_encoder_weight_decay is not None else weight_decay
        if params:
            name = "text_encoder" if text else "unet"
            made.append({"params": params, "lr": rate, "weight_decay": decay, "name": name})
    return made


def was(group: dict, name: str, places: Sequence[int]) -> dict:
    """A group whose weights older checkpoints keep in the group `name`, at these places in it."""
    return {**group, "was": [name, *places]}


def regrouped(state: dict, groups: Sequence[dict]) -> dict:
    """An optimizer's state in the groups of an older checkpoint => the same state in today's groups (see `was`).

    Any other state is returned as it is: torch refuses groups that do not fit.
    """
    if not any("was" in group for group in groups):
        return state
    stored = {group.get("name"): group for group in state["param_groups"]}
    origins = []
    for group in groups:  # their own weights may be in one row of an engine, so those of the checkpoint are counted
        alike = stored.get(name := group.get("name"), {"params": ()})["params"]
        origins.append(group.get("was") or [name, *range(len(alike))])
    taken = {}
    for name, *places in origins:
        taken[name] = sorted([*taken.get(name, []), *places])
    if taken != {name: list(range(len(group["params"]))) for name, group in stored.items()}:
        return state
    by_weight, made = {}, []
    for group, (name, *places) in zip(groups, origins):
        start = sum(len(one["params"]) for one in made)
        for number, place in enumerate(places, start):
            if (before := stored[name]["params"][place]) in state["state"]:
                by_weight[number] = state["state"][before]
        own = {key: group[key] for key in ("name", "was") if key in group}
        made.append({**stored[name], **own, "params": list(range(start, start + len(places)))})
    return {**state, "state": by_weight, "param_groups": made}


@torch.no_grad()
def copy_from(file: str | Path, targets: dict[str, torch.Tensor]) -> None:
    """Fill `targets` from a safetensors file that must hold exactly them, by name and shape; nothing is guessed."""
    if not Path(file).is_file():
        errors.refuse(f"{file} is missing: what this run trains was saved with other options")
    with safe_open(str(file), framework="pt") as stored:
        there = set(stored.keys())
        wrong = [f"missing {key}" for key in targets.keys() - there]
        wrong += [f"unexpected {key}" for key in there - targets.keys()]
        for key in there & targets.keys():
            shape = tuple(stored.get_slice(key).get_shape())
            if shape != tuple(targets[key].shape):
                wrong.append(f"{key} is {shape}, expected {tuple(targets[key].shape)}")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            errors.refuse(f"{file} does not fit what this run trains: {'; '.join(sorted(wrong)[:3])}{more}")
        for key, target in targets.items():
            target.copy_(sharded.part(stored.get_tensor(key), target))
