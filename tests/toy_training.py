"""A whole training of a toy network through the real runtime and checkpoints; also a program, for tests of processes.

python tests/toy_training.py FOLDER [key=value ...]
"""

import hashlib
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import checkpoints, ema, losses, randomness, runtime


class Family:
    def use(self, name, module):
        setattr(self, name, module)


class Learns:
    """What `learning` and `adapters` offer, for one small network with dropout."""

    def __init__(self, width=4):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [torch.nn.Linear(width, width), torch.nn.Dropout(0.2), torch.nn.Tanh(), torch.nn.Linear(width, 1)]
            self.net = torch.nn.Sequential(*layers)
        self.modules = {"unet": self.net}

    def parameters(self):
        return list(self.net.parameters())

    def named(self):
        return dict(self.net.named_parameters())

    def save(self, folder, mark=""):
        save_file(self.net.state_dict(), str(Path(folder) / f"weights{mark}.safetensors"))

    def load(self, folder, mark=""):
        self.net.load_state_dict(load_file(str(Path(folder) / f"weights{mark}.safetensors")))

    def digest(self):
        parts = b"".join(p.detach().contiguous().numpy().tobytes() for p in self.parameters())
        return hashlib.sha256(parts).hexdigest()[:16]


def loader(first_step, batch=2, rank=0, world=1, accumulate=1, lost=0):
    """Endless; the batch at a position is a function of the position. In step `lost` the last rank misses a picture."""
    step = first_step
    while True:
        for micro in range(accumulate):
            ids = list(randomness.positions(step, micro, rank, batch=batch, world=world, accumulate=accumulate))
            missing = ["'x.jpg' cannot be read"] if step + 1 == lost and rank == world - 1 else []
            yield {"ids": torch.tensor(ids), "keys": [f"photo-{number}" for number in ids], "lost": missing}
        step += 1


def make_optimizer(name, parameters):
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=1e-2)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=1e-2, min_8bit_size=16)
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, lr=1.0, safeguard_warmup=True, use_bias_correction=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def train(
    folder,
    total=8,
    batch=2,
    accumulate=1,
    every=2,
    keep=None,
    resume=None,
    optimizer="adamw",
    max_norm=1.0,
    pause=0.0,
    poison=None,  # the step in which a loss becomes NaN; if negative, infinite with finite gradients
    width=4,
    dropout=True,
    lost=0,  # the step in which a picture cannot be read by the last rank
    hold=None,  # "phase": wait inside a phase before training
    scale=None,  # of the loss, as in fp16
    fused=False,  # steps within the backward pass
    classes=False,  # every fourth example is of the class: with two processes and batches of 2 the second has none
    **options,
):
    run = runtime.start(folder, seed=7, accumulate=accumulate, resuming=resume, **options)
    family, learns = Family(), Learns(width)
    if scale:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    if not dropout:
        learns.net[1].p = 0.0
    chosen = run.prepare(family, learns, make_optimizer(optimizer, learns.parameters()), fused_backward=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 / (1 + 0.1 * step))
    average = ema.Average(learns)
    saved = checkpoints.Checkpoints(
        folder,
        state={
            "learns": (learns.save, learns.load),
            "optimizer": chosen,
            "schedule": schedule,
            "ema": average,
            "scaler": run.scaler,
        },
        identity={"batch": batch * accumulate * run.world, "optimizer": optimizer},
        keep=keep,
    )
    if hold == "phase":
        with run.phase("holding"):
            run.say("holding")
            while not run.interrupted:
                time.sleep(0.05)
    first_step = saved.resume(resume)
    for step, records in run.steps(loader(first_step, batch, run.rank, run.world, accumulate, lost), first_step, total):
        draws = randomness.Draws(run.seed, records["ids"], run.device)
        with run.accumulate(learns):
            x = draws.normal("x", (width,))
            error = (family.unet(x).squeeze(1) - x.sum(dim=1)).square()
            loss, parts = error.mean(), None
            if classes:
                loss, parts = losses.dreambooth(error, torch.ones_like(error), records["ids"] % 4 == 0, 0.5)
            if poison == step:
                error = error * torch.tensor([1.0] * (batch - 1) + [float("nan")])
                loss = error.mean()
            if poison == -step:
                loss = loss + float("inf")
            run.backward(loss, learns, chosen, schedule, max_norm=max_norm, parts=parts, error=error.detach())
        if run.due(step, 1):
            average.update(step)
        run.log(step)
        if run.due(step, every):
            with run.phase("saving"):
                saved.save(step)
        time.sleep(pause)
    with run.phase("saving"):
        saved.save(run.step)
    run.say(f"weights {learns.digest()} after {run.step}")
    run.finish()
    return learns.digest()


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    options = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            options[name] = float(value) if "." in value else int(value)
        except ValueError:
            options[name] = {"True": True, "False": False}.get(value, value)
    train(folder, **options)
