"""From adapters to weights and back: what they add to each layer, and the adapters nearest to a difference."""

import torch

from utils import errors
from utils.adapters import files


def added(weight: torch.Tensor, so_far: torch.Tensor, parts: dict, scale: float = 1.0) -> torch.Tensor:
    """A layer's weight with one adapter more; fp32. `weight`, (out, in) or (out, in, k, k), is the base's own,
    `so_far` holds the adapters before this one, too: DoRA turns to the first and stretches the second, as in PEFT."""
    parts = {name: part.float().to(weight.device) if name != "alpha" else part for name, part in parts.items()}
    strength = scale * files.strength(parts)
    if "down" in parts:
        product = strength * (parts["up"].flatten(1) @ parts["down"].flatten(1)).view_as(weight)
        if "magnitude" not in parts:
            return so_far + product
        lengths = (weight + product).flatten(1).norm(dim=1)  # https://arxiv.org/abs/2402.09353, equation 5
        return (parts["magnitude"] / lengths).view(-1, *[1] * (weight.dim() - 1)) * (so_far + product)
    if "hada_w1_a" in parts:
        first, second = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
        return so_far + strength * (first * second).view_as(weight)
    first, second = (
        parts[f"lokr_w{n}"] if f"lokr_w{n}" in parts else parts[f"lokr_w{n}_a"] @ parts[f"lokr_w{n}_b"] for n in (1, 2)
    )
    return so_far + strength * torch.kron(first, second.flatten(1)).view_as(weight)


@torch.no_grad()
def merge(modules: dict[str, torch.nn.Module], adapters: list[tuple[dict, float]], what: str = "--lora") -> None:
    """Add adapters, read by `files.read`, each at its scale and in this order, to the networks' weights, in place."""
    for network, module in modules.items():
        layers = {files.with_text_model(network, name): layer for name, layer in module.named_modules()}
        merged = {}
        for found, scale in adapters:
            for name, parts in found.get(network, {}).items():
                weight = getattr(layers.get(name), "weight", None)
                if weight is None:
                    errors.refuse(f"{what}: the base model has no layer {network}.{name}; it is another family's")
                weight = weight.float()
                try:
                    merged[name] = added(weight, merged.get(name, weight), parts, scale)
                except RuntimeError:
                    errors.refuse(f"{what}: {network}.{name} has another size in the base model")
        for name, weight in merged.items():
            layers[name].weight.copy_(weight)


@torch.no_grad()
def extract(
    network: str,
    base: torch.nn.Module,
    tuned: torch.nn.Module,
    rank: int,
    conv_rank: int | None = None,  # of convolutions larger than 1 x 1; None: rank
) -> tuple[dict, float]:
    """The LoRA nearest to what was learned, and how much of it that is: ({layer: parts}, share of the squared change).

    The largest singular values of the difference, half of each in A and half in B: no other product of this rank
    comes nearer (Eckart and Young, 1936).
    """
    others = dict(tuned.named_modules())
    found, kept, whole = {}, 0.0, 0.0
    for name, layer in base.named_modules():
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        weight, other = layer.weight.float(), others[name].weight.float()
        if weight.shape != other.shape:
            errors.refuse(f"{network}.{name} differs in size: the two pipelines are of different families")
        if torch.equal(weight, other):
            continue
        left, values, right = torch.linalg.svd((other - weight).flatten(1), full_matrices=False)
        large = weight.dim() == 4 and weight.shape[-1] > 1
        own = min(conv_rank if conv_rank and large else rank, len(values))
        root = values[:own].sqrt()
        down, up = root[:, None] * right[:own], left[:, :own] * root
        if weight.dim() == 4:
            down, up = down.reshape(own, *weight.shape[1:]), up.reshape(-1, own, 1, 1)
        found[files.with_text_model(network, name)] = {"down": down, "up": up, "alpha": own}
        kept, whole = kept + float(values[:own].square().sum()), whole + float(values.square().sum())
    return found, kept / whole if whole else 1.0
