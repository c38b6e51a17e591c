"""What adapters start from. Every draw depends on the seed and the weight's name only."""

import math

import torch


def gaussian(shape, generator: torch.Generator) -> torch.Tensor:
    """Std 1 / rank, as the reference scripts have it."""
    return torch.randn(shape, generator=generator) / shape[0]


def kaiming(shape, generator: torch.Generator) -> torch.Tensor:
    """Uniform within 1 / sqrt(inputs): PEFT's own default, and that of LyCORIS."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def orthogonal(down_shape, up_shape, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Neither half is zero and their product is: A and B live on the two halves of one orthogonal basis."""
    rank = down_shape[0]
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    inputs, outputs = math.prod(down_shape[1:]), up_shape[0]
    down = basis[0::2].T @ torch.randn(rank // 2, inputs, generator=generator) / 10
    up = torch.randn(outputs, rank // 2, generator=generator) @ basis[1::2] / 10
    return down.view(down_shape), up.view(up_shape)


def lycoris(part: str, shape, generator: torch.Generator) -> torch.Tensor:
    """As LyCORIS starts LoHa and LoKr: one factor is zero, so the product is."""
    if part in ("hada_w2_a", "lokr_w2", "lokr_w2_b"):
        return torch.zeros(shape)
    if part.startswith("hada"):
        return torch.randn(shape, generator=generator) * (0.1 if part == "hada_w1_a" else 1.0)
    return kaiming(shape, generator)
