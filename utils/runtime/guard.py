"""Stops a run whose loss or gradients are no longer finite, before the optimizer would spread it over every weight.

Also notices a loss that is finite and far above its usual course, which may be the beginning of the same end, and one
that is no better than that of a network which predicts zeros, which is that end already.
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path

import torch

from utils import divergence, errors, writing
from utils.report import curves

MOST_SKIPS = 10  # in a row, with --on_nan skip
MOST_SCALER_SKIPS = 40  # in a row: more halvings of the fp16 loss scale than it has room for
REMEDIES = (
    "Try a lower --learning_rate, --mixed_precision bf16 instead of fp16, or for SDXL a VAE that is made for fp16 "
    "(--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix); --on_nan skip leaves such steps out."
)
AFTER_A_SPIKE = (
    "It may calm down by itself. If it does not: --resume_from_checkpoint with a checkpoint from before it and a lower "
    "--learning_rate, more --lr_warmup_steps or a smaller --max_grad_norm."
)
HAS_DIVERGED = (
    "The run diverges: what the network knew is probably lost. Start again with a lower --learning_rate (a tenth), or "
    "--resume_from_checkpoint with a checkpoint from before it. At the end it counts as diverged (exit code 4) unless "
    "the loss has come down by then."
)


class Guard:
    def __init__(
        self,
        output_dir: Path,
        on_nan: str = "stop",
        is_main: bool = True,
        world: int = 1,
        on_loss_spike: str = "off",  # or "warn", "stop"
    ):
        self.output_dir, self.on_nan, self.is_main, self.world = Path(output_dir), on_nan, is_main, world
        self.in_a_row = 0
        self.on_loss_spike, self.course, self.divergence = on_loss_spike, Course(), divergence.Divergence()

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

    def spike(self, step: int, loss: float) -> float | None:
        """How many times its usual value the smoothed loss has reached, in the step in which that begins.

        All processes call this with the same numbers and have recalled the same past, so they decide alike.
        """
        times = self.course.follow(loss) if self.on_loss_spike != "off" else None
        if times is not None:
            told = f"step {step}: the loss, smoothed over {Course.RECENT} steps, is {times:.1f} times its usual value."
            self._warn_or_stop(told, AFTER_A_SPIKE)
        return times

    def diverges(self, step: int, ratio: float) -> None:
        """Follows losses.against_zero; says so in the step in which the run begins to diverge."""
        if self.divergence.follow(ratio):
            self._warn_or_stop(f"step {step}: over the last {divergence.RECENT} steps {self.divergence}.", HAS_DIVERGED)

    def _warn_or_stop(self, told: str, remedy: str) -> None:
        if self.on_loss_spike == "stop":
            if self.is_main:
                errors.refuse(f"{told} Stopped, as --on_loss_spike stop asks. {remedy}", errors.DIVERGED)
            raise SystemExit(errors.DIVERGED)
        if self.is_main:
            errors.warn(f"{told} {remedy}")

    def recall(self, metrics: Path, last_step: int) -> None:
        """What the loss did before a resume."""
        if not last_step:
            return
        rows = [row for row in curves.read_metrics(metrics) if row["step"] <= last_step]
        self.divergence = divergence.of(rows)  # the first step counts for as long as the run lasts
        if self.on_loss_spike != "off":
            for loss in curves.series(rows, "loss")[1][-self.course.logs.maxlen :]:
                self.course.follow(loss)

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
            writing.write(self.output_dir / "nonfinite.json", json.dumps(told, indent=1, default=str))
        return f"Examples: {', '.join(map(str, (guilty or every)[:8]))} (details in nonfinite.json)."


class Course:
    """The usual course of a loss that jumps: a step's loss depends more on its timesteps than on the training.

    In logarithms, because losses of early and late timesteps differ a hundredfold: the mean of the last RECENT steps
    against that of up to HISTORY steps before them, where values more than three deviations from the median count as
    three. Both the median and the deviation (1.4826 MAD) hardly feel a few extreme steps.
    """

    RECENT, HISTORY, LEAST = 32, 400, 100  # steps; no opinion before LEAST of them are behind
    DEVIATIONS, TIMES = 4.0, 1.5  # a spike is above both: deviations of such a mean, and times the usual loss

    def __init__(self):
        self.logs = deque(maxlen=self.RECENT + self.HISTORY)
        self.high = False

    def follow(self, loss: float) -> float | None:
        """The factor by which the loss is too high, once when that begins."""
        if not math.isfinite(loss):
            return None
        self.logs.append(math.log(max(loss, 1e-12)))
        if len(self.logs) < self.RECENT + self.LEAST:
            return None
        logs = list(self.logs)
        past, recent = logs[: -self.RECENT], logs[-self.RECENT :]
        middle = statistics.median(past)
        spread = 1.4826 * statistics.median([abs(value - middle) for value in past])
        low, top = middle - 3 * spread, middle + 3 * spread
        above = math.fsum(recent) / self.RECENT - math.fsum(min(max(v, low), top) for v in past) / len(past)
        limit = max(math.log(self.TIMES), self.DEVIATIONS * spread / math.sqrt(self.RECENT))
        began = above > limit and not self.high
        self.high = above > (limit / 2 if self.high else limit)  # it must calm down before it can begin again
        return math.exp(above) if began else None


def gradient_norm(parameters) -> torch.Tensor:
    """Of all gradients together, as clipping defines it; not yet fetched from the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise RuntimeError("no parameter received a gradient: the loss does not depend on what should learn")
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 shards it
