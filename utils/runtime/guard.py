"""Stops a run whose loss or gradients are no longer finite, before the optimizer would spread it over every weight."""

import json
import math
from pathlib import Path

import torch

from utils import errors
from utils.runtime import startup

MOST_SKIPS = 10  # in a row, with --on_nan skip
MOST_SCALER_SKIPS = 40  # in a row: more halvings of the fp16 loss scale than it has room for
REMEDIES = (
    "Try a lower --learning_rate, --mixed_precision bf16 instead of fp16, or for SDXL a VAE that is made for fp16 "
    "(--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix); --on_nan skip leaves such steps out."
)


class Guard:
    def __init__(self, output_dir: Path, on_nan: str = "stop", is_main: bool = True, world: int = 1):
        self.output_dir, self.on_nan, self.is_main, self.world = Path(output_dir), on_nan, is_main, world
        self.in_a_row = 0

    def allows(self, step: int, loss: float, norm: float, scaled: bool, examples: list[dict]) -> bool:
        """May the optimizer take `step`? All processes call this with the same numbers, so they decide alike.

        `scaled`: under the fp16 loss scale an overflow now and then is how the scale is found, not a divergence.
        `examples`: what is known of this process's micro batches (ids, keys, timesteps, error).
        """
        if math.isfinite(norm) and math.isfinite(loss):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        if scaled and self.in_a_row < MOST_SCALER_SKIPS:
            return False
        where = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        named = self._report(step, loss, norm, examples)
        if not scaled and self.on_nan == "skip" and self.in_a_row <= MOST_SKIPS:
            if self.is_main:
                errors.warn(f"{where}; this step is left out ({self.in_a_row} in a row, at most {MOST_SKIPS}). {named}")
            return False
        if self.is_main:
            errors.refuse(f"{where}; stopped before it could harm the weights. {named} {REMEDIES}", errors.DIVERGED)
        raise SystemExit(errors.DIVERGED)

    def _report(self, step: int, loss: float, norm: float, examples: list[dict]) -> str:
        """Names the examples, those whose own error is not finite first; nonfinite.json tells the rest."""
        own = [
            {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in facts.items()}
            for facts in examples
        ]
        by_rank = [own]
        if self.world > 1:
            by_rank = [None] * self.world
            torch.distributed.all_gather_object(by_rank, own)
        guilty, every = [], []
        for facts in (facts for own in by_rank for facts in own):
            names = facts.get("keys") or facts.get("ids") or []
            every += names
            guilty += [name for name, error in zip(names, facts.get("error") or []) if not math.isfinite(error)]
        if self.is_main:
            told = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "micro_batches_by_process": by_rank}
            startup.write_whole(self.output_dir / "nonfinite.json", json.dumps(told, indent=1, default=str))
        return f"Examples: {', '.join(map(str, (guilty or every)[:8]))} (details in nonfinite.json)."


def gradient_norm(parameters) -> torch.Tensor:
    """Of all gradients together, as clipping defines it; not yet fetched from the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise RuntimeError("no parameter received a gradient: the loss does not depend on what should learn")
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 shards it
