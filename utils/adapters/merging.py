"""From adapters to weights and back: what they add to each layer, and the adapters nearest to a difference."""

import torch

from utils import errors
from utils.adapters import files


def added(weight: torch.Tensor, so_far: torch.Tensor, parts: dict, scale: float = 1.0) -> torch.Tensor:
    """A layer's weight with one adapter more; fp32. `weight`, (out, in) or (out, in, k, k), is the base's own,
    `so_far` holds the adapters before this one, too: DoRA turns to the first and stretches the second, as in PEFT."""
    parts = {name: part.float().to(weight.device) if name != "alpha" else part for name, part in parts.items()}
    strength = scale * files.strength(parts)
    if "diff" in parts:
        return so_far + strength * parts["diff"].view_as(weight)
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
        layers, merged = _layers(network, module), {}
        for found, scale in adapters:
            for name, parts in found.get(network, {}).items():
                merged[name] = _added_to(layers, network, name, merged.get(name), parts, scale, what)
        files.refuse_not_finite(what, {f"{network}.{name}": weight for name, weight in merged.items()})
        for name, weight in merged.items():
            layers[name].weight.copy_(weight)


def _layers(network: str, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {files.with_text_model(network, name): layer for name, layer in module.named_modules()}


def _added_to(layers: dict, network: str, name: str, so_far: torch.Tensor | None, parts: dict, scale: float, what: str):
    weight = getattr(layers.get(name), "weight", None)
    if weight is None:
        errors.refuse(f"{what}: the base model has no layer {network}.{name}; it is another family's")
    weight = weight.float()
    try:
        return added(weight, weight if so_far is None else so_far, parts, scale)
    except RuntimeError:
        errors.refuse(f"{what}: {network}.{name} has another size in the base model")


@torch.no_grad()
def without_dora(
    modules: dict[str, torch.nn.Module],
    found: dict,
    rank: int | None,  # None: whole differences, which are exact
    what: str,
) -> tuple[dict, dict[str, float]]:
    """A DoRA in a form that other programs read as it was trained: what each weight changes by, or the LoRA nearest to
    that; and the share of the squared change that is kept in each network."""
    made, shares = {}, {}
    for network, layers in found.items():
        of_base, squares = _layers(network, modules[network]), [0.0, 0.0]
        made[network] = dict(layers)
        for name, parts in layers.items():
            if "magnitude" not in parts:
                continue
            change = _added_to(of_base, network, name, None, parts, 1.0, what) - of_base[name].weight.float()
            if rank is None:
                made[network][name] = {"diff": change, "alpha": 1}
            else:
                made[network][name], *of_layer = nearest(change, rank)
                squares = [sum(pair) for pair in zip(squares, of_layer)]
        shares[network] = squares[0] / squares[1] if squares[1] else 1.0
    return made, shares


def nearest(change: torch.Tensor, rank: int) -> tuple[dict, float, float]:
    """The LoRA nearest to a weight's change, (out, in) or (out, in, k, k); the squared sizes of it and of the change.

    The largest singular values, half of each in A and half in B: no other product of this rank comes nearer (Eckart and
    Young, 1936).
    """
    left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    if change.dim() == 4:
        down, up = down.reshape(rank, *change.shape[1:]), up.reshape(-1, rank, 1, 1)
    kept, whole = (float(some.square().sum()) for some in (values[:rank], values))
    return {"down": down, "up": up, "alpha": rank}, kept, whole


@torch.no_grad()
def extract(
    network: str,
    base: torch.nn.Module,
    tuned: torch.nn.Module,
    rank: int,
    conv_rank: int | None = None,  # of convolutions larger than 1 x 1; None: rank
) -> tuple[dict, float]:
    """The LoRA nearest to what was learned, and how much of it that is: ({layer: parts}, its squared share)."""
    others = dict(tuned.named_modules())
    found, kept, whole = {}, 0.0, 0.0
    for name, layer in base.named_modules():
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        weight, other = layer.weight.float(), others[name].weight.float()
        if weight.shape != other.shape:
            errors.refuse(f"{network}.{name} differs in size: the two pipelines are of different families")
        for whose, one in (("the base", weight), ("the tuned pipeline", other)):
            files.refuse_not_finite(whose, {f"{network}.{name}.weight": one})
        if torch.equal(weight, other):
            continue
        large = weight.dim() == 4 and weight.shape[-1] > 1
        parts, *squares = nearest(other - weight, conv_rank if conv_rank and large else rank)
        found[files.with_text_model(network, name)] = parts
        kept, whole = kept + squares[0], whole + squares[1]
    return found, kept / whole if whole else 1.0
