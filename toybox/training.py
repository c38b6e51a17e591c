"""What the training scripts of the toybox share: one process or several, resuming, averaged weights.

Every script runs alone (`python -m toybox.train_sd`) or with its gradients averaged over processes
(`torchrun --nproc_per_node 2 -m toybox.train_sd`), and continues when the same command is run again.
"""

import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

BUILD = Path(__file__).parent / ".build"  # states, caches and logs; not in version control


class Run:
    """The place of this process among its siblings, the saved state, and the log."""

    def __init__(self, name: str, save_minutes: float = 3.0):
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1:
            dist.init_process_group("gloo")
        if not torch.cuda.is_available():
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        BUILD.mkdir(exist_ok=True)
        self.state_file, self.log_file = BUILD / f"{name}.pt", BUILD / f"{name}.jsonl"
        self.save_seconds, self.saved_at, self.started = save_minutes * 60, time.time(), time.time()

    def resume(self) -> dict | None:
        if self.state_file.exists():
            return torch.load(self.state_file, map_location=self.device, weights_only=True)
        return None

    def save(self, state: dict, due: bool = False) -> None:
        """Writes the state if asked to, or if the last time was minutes ago."""
        if self.rank == 0 and (due or time.time() - self.saved_at > self.save_seconds):
            torch.save(state, self.state_file.with_suffix(".tmp"))
            self.state_file.with_suffix(".tmp").replace(self.state_file)
            self.saved_at = time.time()

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view(gradient.shape))
            start += gradient.numel()

    def log(self, **numbers) -> None:
        if self.rank == 0:
            numbers = {key: round(value, 5) if isinstance(value, float) else value for key, value in numbers.items()}
            numbers["seconds"] = round(time.time() - self.started)
            with self.log_file.open("a") as file:
                file.write(json.dumps(numbers) + "\n")
            print(numbers, flush=True)


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Factor of the learning rate: a short rise, then down to almost nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def average_into(average: list[torch.Tensor], current: list[torch.Tensor], decay: float) -> None:
    """Exponential moving average, in place."""
    torch._foreach_lerp_(average, [tensor.detach() for tensor in current], 1 - decay)


def pixels_of(pictures) -> torch.Tensor:
    """PIL pictures => (batch, 3, height, width) between -1 and 1."""
    import numpy as np

    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
