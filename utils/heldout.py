"""A validation loss that can be compared between steps and runs: the same pictures, noise and timesteps every time.

The loss of a training step jumps with the timestep it happened to draw. Here every held-out picture is seen at a few
draws that depend on the seed alone, so that a curve that rises means memorising and not chance.
"""

from collections.abc import Sequence

import torch

from utils import datasets, errors, losses, randomness

VISITS = 4  # draws of noise and timestep a picture


def split(examples: Sequence, share: float, seed: int) -> tuple[Sequence, Sequence]:
    """=> (examples to train on, examples held out). Chosen by content, so that a new picture moves no other."""
    if not share:  # a stream is not gone through
        return examples, []
    chosen = {example.key for example in examples if randomness.rng(seed, f"held out {example.key}").random() < share}
    if not chosen:  # a small set
        chosen = {min(examples, key=lambda example: randomness.seed_of(seed, f"held out {example.key}")).key}
    left = [one for one in examples if one.key not in chosen]
    if not left:
        errors.refuse(f"--validation_split {share:g} holds all {len(examples)} pictures out: nothing is left to learn")
    return left, [one for one in examples if one.key in chosen]


class Loss:
    """`measure()` gives the mean over the held-out pictures; every process must call it. None without pictures."""

    def __init__(self, run, family, corruption, dataset, batch_size: int, unmasked_weight: float = 0.0):
        self.run, self.family, self.corruption, self.dataset = run, family, corruption, dataset
        self.batch_size, self.unmasked_weight = batch_size, unmasked_weight
        self._told: set[str] = set()

    @torch.no_grad()
    def measure(self) -> float | None:
        count = len(self.dataset.instance) if self.dataset else 0
        if not count:
            return None
        own = range(self.run.rank, count * VISITS, self.run.world)
        total = torch.zeros(2, dtype=torch.float64, device=self.run.device)
        modules = [m for m in vars(self.family).values() if isinstance(m, torch.nn.Module) and m.training]
        for module in modules:
            module.eval()  # dropout in adapters would be chance
        for start in range(0, len(own), self.batch_size):
            items = [self.dataset.visit(number % count, number) for number in own[start : start + self.batch_size]]
            items = [item for item in items if not self._lost(item)]
            if not items:
                continue
            batch = datasets.collate(items)
            batch = {n: v.to(self.run.device) if torch.is_tensor(v) and n != "ids" else v for n, v in batch.items()}
            draws = randomness.Draws(randomness.seed_of(self.run.seed, "held out"), batch["ids"], self.run.device)
            noisy = self.corruption(self.family.latents(batch, draws), draws)
            prediction = self.family.predict(noisy.inputs, noisy.timesteps, self.family.condition(batch, draws))
            error = losses.squared_error(prediction, noisy.target, batch.get("mask"), self.unmasked_weight)
            total += torch.stack([error.double().sum(), torch.tensor(float(len(error)), device=error.device).double()])
        for module in modules:
            module.train()
        if self.run.world > 1:
            torch.distributed.all_reduce(total)
        total, number = total.tolist()
        return total / number if number else None

    def _lost(self, item: list[dict]) -> bool:
        """A picture that cannot be read any more is named, and left out of the mean from now on."""
        for why in [record["lost"].split("; ")[0] for record in item if record["lost"]]:
            if why not in self._told:
                self._told.add(why)
                errors.warn(f"{why}; the validation loss goes on without it", everywhere=True)
        return any(record["lost"] for record in item)
