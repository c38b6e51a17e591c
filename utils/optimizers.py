"""The named optimizers, and learning-rate schedules that are pure functions of the optimizer step."""

import math
from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR

from utils import errors

NAMES = ("adamw", "adamw8bit", "prodigy", "adafactor", "lion", "sgd", "paged_adamw8bit")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
WARMUP = 500  # steps, or a tenth of all if that is less, where the schedule warms up and the user gave no number


def create(
    name: str,
    groups: Sequence[dict],  # of learns.groups(...): params, lr, weight_decay, name
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eight_bit: bool = False,  # keep the moments in 8 bits: a quarter of their memory
    prodigy_beta3: float | None = None,
    prodigy_decouple: bool = True,
    prodigy_use_bias_correction: bool = True,
    prodigy_safeguard_warmup: bool = True,
) -> torch.optim.Optimizer:
    """An optimizer over parameter groups that bring their own rates and decays."""
    name = name.lower()
    groups = [dict(group) for group in groups]
    rate = groups[0]["lr"]
    if eight_bit and name not in ("adamw", "adamw8bit", "paged_adamw8bit", "lion"):
        errors.refuse(f"--use_8bit_adam works with --optimizer adamw or lion, not {name}")
    if name == "adamw" and not eight_bit:
        # One kernel over all weights instead of a dozen: about three times faster, on CPUs and GPUs alike.
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=fused_works(groups))
    if name == "paged_adamw8bit":  # its moments move to main memory when the GPU's is short
        return bitsandbytes(name).PagedAdamW8bit(groups, lr=rate, betas=betas, eps=eps)
    if name in ("adamw", "adamw8bit"):
        return bitsandbytes(name).AdamW8bit(groups, lr=rate, betas=betas, eps=eps)
    if name == "lion":
        library = bitsandbytes(name)
        return (library.Lion8bit if eight_bit else library.Lion)(groups, lr=rate, betas=betas)
    if name == "prodigy":
        return prodigy(
            groups,
            betas=betas,
            eps=eps,
            beta3=prodigy_beta3,
            decouple=prodigy_decouple,
            use_bias_correction=prodigy_use_bias_correction,
            safeguard_warmup=prodigy_safeguard_warmup,
        )
    if name == "adafactor":
        # Its second moments are one row and one column a matrix: nearly no memory. It scales steps by the weights'
        # size, so its rates are larger than Adam's (1e-3 is usual).
        return torch.optim.Adafactor(groups, lr=rate)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=betas[0])
    return errors.refuse(f"--optimizer {name} is unknown; choose one of: {', '.join(NAMES)}")


def fused_works(groups: Sequence[dict]) -> bool:
    """Where torch has a fused AdamW: every weight a floating-point tensor on one of these kinds of device."""
    weights = [weight for group in groups for weight in group["params"]]
    return all(w.is_floating_point() and w.device.type in ("cpu", "cuda", "mps", "xpu") for w in weights)


def bitsandbytes(name: str):
    """The optimizers of bitsandbytes, imported where they are used: the import takes seconds."""
    try:
        from bitsandbytes import optim
    except ImportError:
        errors.refuse(f"--optimizer {name} (8-bit Adam, Lion) needs bitsandbytes: pip install bitsandbytes")
    return optim


def prodigy(groups: list[dict], **options) -> torch.optim.Optimizer:
    """Prodigy finds the step size itself; the learning rate is a factor on it, usually 1."""
    try:
        from prodigyopt import Prodigy
    except ImportError:
        errors.refuse("--optimizer prodigy needs prodigyopt: pip install prodigyopt")
    rates = {group["lr"] for group in groups}
    if len(rates) > 1:
        errors.refuse(
            f"--optimizer prodigy estimates one step size for all weights, so --text_encoder_lr must equal "
            f"--learning_rate; they are {', '.join(f'{rate:g}' for rate in sorted(rates))}"
        )
    if (rate := rates.pop()) < 0.1:
        errors.warn(f"--learning_rate {rate:g} is very small for prodigy, which multiplies it; 1.0 is usual")
    return Prodigy(groups, lr=rate, **options)


def schedule(
    optimizer: torch.optim.Optimizer,
    name: str = "constant",
    warmup_steps: int | None = None,  # None: none for "constant", WARMUP for the others
    total_steps: int = 1,
    cycles: int = 1,  # hard restarts of "cosine_with_restarts"
    power: float = 1.0,  # of "polynomial"
) -> LambdaLR:
    """Learning rate by optimizer step; `schedule.step()` once after each optimizer step, however many processes.

    A number of warm-up steps that was given is never ignored: "constant" then warms up too.
    """
    if name not in SCHEDULES:
        errors.refuse(f"--lr_scheduler {name} is unknown; choose one of: {', '.join(SCHEDULES)}")
    if warmup_steps is None:
        warmup_steps = 0 if name == "constant" else min(WARMUP, total_steps // 10)

    def factor_for(rate: float):
        return lambda step: factor(name, step, warmup_steps, total_steps, cycles, power, rate)

    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [factor_for(rate) for rate in rates])


def factor(name, step, warmup_steps=0, total_steps=1, cycles=1, power=1.0, rate=1.0) -> float:
    """What the learning rate is multiplied by for the optimizer step after `step` finished ones."""
    if step < warmup_steps:
        return step / warmup_steps
    if name.startswith("constant"):
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if name == "linear":
        return 1.0 - progress
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if name == "cosine_with_restarts":
        return 0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (cycles * progress % 1.0)))
    if not rate:
        return 1.0
    end = min(1e-7 / rate, 1.0)  # "polynomial" falls to a rate of 1e-7, not to zero
    return (1.0 - end) * (1.0 - progress) ** power + end
