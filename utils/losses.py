"""From predictions to one number: an error per example, weighted, grouped into instance and class, then averaged.

Nothing here selects rows by a mask, because that would make the processor wait for the device at every step.
"""

from typing import NamedTuple

import torch


def pseudo_huber(difference: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """√(d² + δ²) - δ, without cancellation: Charbonnier et al. 1997; square below δ, straight above."""
    square = difference.square()
    return square / ((square + delta**2).sqrt() + delta)


DISTANCES = {  # named and scaled as in the scripts that have them; where δ is, see noise.huber_delta
    "l2": lambda difference, delta: difference.square(),
    "l1": lambda difference, delta: difference.abs(),
    "huber": lambda difference, delta: 2 * delta * pseudo_huber(difference, delta),  # d² for small d
    "smooth_l1": lambda difference, delta: 2 * pseudo_huber(difference, delta),  # 2 |d| for large d
}


def error(
    prediction: torch.Tensor,
    noisy,  # noise.Noisy: target, loss_type, delta, scale
    mask: torch.Tensor | None = None,  # (b, 1, H, W) uint8: where the picture counts, as in `masked_mean`
    unmasked_weight: float = 0.0,
) -> torch.Tensor:
    """What each example's prediction is off its target, by the run's measure: (b, ...) -> (b,).

    √scale times the difference is the difference that the objective is about (of x0, with an EDM scheduler). A distance
    is taken of that one, so Huber's δ is in its units; squares are multiplied afterwards, which is the same.
    """
    measured = (mask, unmasked_weight, noisy.loss_type, noisy.delta)
    if noisy.scale is None or noisy.loss_type == "l2":
        found = distance(prediction, noisy.target, *measured)
        return found if noisy.scale is None else found * noisy.scale
    return distance(prediction, noisy.target, *measured, factor=noisy.scale.sqrt())


def squared_error(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None, unmasked_weight: float = 0.0
) -> torch.Tensor:
    return distance(prediction, target, mask, unmasked_weight)


def distance(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    unmasked_weight: float = 0.0,
    loss_type: str = "l2",
    delta: torch.Tensor | None = None,  # (b,)
    factor: torch.Tensor | None = None,  # (b,): of the difference
) -> torch.Tensor:
    """Mean distance of each example, in fp32 at least whatever the networks computed in."""
    if prediction.shape[1] == 2 * target.shape[1]:
        prediction = prediction.chunk(2, dim=1)[0]  # DeepFloyd IF also predicts a variance, which is not trained
    if prediction.shape != target.shape:
        # Broadcasting would turn a mismatch into a plausible number.
        raise ValueError(f"prediction {tuple(prediction.shape)} does not match target {tuple(target.shape)}")
    precise = torch.promote_types(prediction.dtype, torch.float32)
    by_example = (-1, *[1] * (target.dim() - 1))
    delta = None if delta is None else delta.view(by_example)
    difference = prediction.to(precise) - target.to(precise)
    if factor is not None:
        difference = difference * factor.view(by_example)
    error = DISTANCES[loss_type](difference, delta)
    if mask is not None:
        return masked_mean(error, mask, unmasked_weight)
    return error.flatten(1).mean(dim=1)  # (b, ...) -> (b,)


def masked_mean(error: torch.Tensor, mask: torch.Tensor, unmasked_weight: float = 0.0) -> torch.Tensor:
    """sum(w * error) / sum(w) of each example, over positions and channels: (b, c, h, w) -> (b,).

    w = m + unmasked_weight * (1 - m), where m is the share of a cell that the mask covers. Divided by the covered area,
    a small subject weighs as much as a large one. A crop that holds nothing of the mask has no error.
    """
    covered = mask.to(error.dtype) / 255  # (b, 1, H, W)
    covered = torch.nn.functional.adaptive_avg_pool2d(covered, error.shape[-2:])  # (b, 1, h, w)
    weight = covered + unmasked_weight * (1 - covered)
    area = weight.flatten(1).mean(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight * error).flatten(1).mean(dim=1) / area


def average(error: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over examples of weight * error; the weights are not normalised (they are part of the objective)."""
    return (error if weight is None else error * weight).mean()


def dreambooth(
    error: torch.Tensor,  # (b,)
    weight: torch.Tensor,  # (b,)
    is_class: torch.Tensor,  # (b,) bool
    prior_weight: float = 1.0,
    weigh_class: bool = False,  # the timestep weight is meant for the subject; True applies it to class images too
    instance_weight: float = 1.0,  # 0: the photos are learned from in another way
) -> tuple[torch.Tensor, dict[str, "Part"]]:
    """instance_weight * mean(instance) + prior_weight * mean(class): Ruiz et al. 2022, DreamBooth, equation 2.

    A batch without class images has no second term. Beside the sum its parts, for the log.
    """
    weighted = error * weight
    instance = part(weighted, ~is_class)
    prior = part(weighted if weigh_class else error, is_class)
    return instance_weight * instance.mean + prior_weight * prior.mean, {"instance": instance, "prior": prior}


@torch.no_grad()
def against_zero(
    errors: torch.Tensor,  # (b,)
    noisy,  # noise.Noisy
    batch,  # with "mask" and "is_class", where there are any
    unmasked_weight: float = 0.0,
    prior_weight: float = 1.0,
) -> torch.Tensor:
    """(loss, loss of an all-zero prediction) on one batch, (2,): same targets, weights, masks and groups.

    Whoever predicts zeros has learned nothing, so this ratio tells a diverging run whatever the objective.
    """
    zeros = error(torch.zeros_like(noisy.target), noisy, batch.get("mask"), unmasked_weight)
    is_class = batch.get("is_class")
    is_class = torch.zeros_like(zeros, dtype=torch.bool) if is_class is None else is_class
    return torch.stack([dreambooth(each, noisy.weight, is_class, prior_weight)[0] for each in (errors, zeros)])


class Part(NamedTuple):
    """A term of the loss, before its weight."""

    mean: torch.Tensor
    found: torch.Tensor  # 1, or 0: this batch has none of it, which is no loss of 0


def part(values: torch.Tensor, chosen: torch.Tensor | None = None) -> Part:
    """Mean of the chosen values, or of all; of none it is 0."""
    chosen = torch.ones_like(values, dtype=torch.bool) if chosen is None else chosen
    count = chosen.sum()
    return Part(torch.where(chosen, values, 0).sum() / count.clamp(min=1), count.clamp(max=1))
