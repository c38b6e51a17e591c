"""Averages whose length is chosen after training, as in EDM2: Karras et al. 2024, https://arxiv.org/abs/2312.02696.

Two averages with power-function weights are kept, and snapshots of both stored now and then. Afterwards the average of
any length is put together from them (section 3.1 and appendix C): the combination of their weights over training that
comes nearest to the weights asked for is, applied to the snapshots, nearest to the average asked for.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, groupby
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils import errors, saved, sums
from utils.checkpoints import manifests

FOLDER, LEFT = "ema_snapshots", "left"  # in the output folder; in it, those of a course that was left
NAME, STAGED = re.compile(r"step-(\d+)-\d[\d.]*\.safetensors"), ".tmp-"
SHORTEST, LONGEST = 0.001, 12**-0.5  # sigma_rel; the longest, of gamma = 0, is the plain mean of all steps
CLOSE = 0.1  # the error of a profile, relative to its size, up to which it counts as reached


# --- Profiles: the weight of each moment of training in an average -------------------------------------------------


def gamma_of(sigma_rel: float) -> float:
    """The power whose profile has this standard deviation, relative to the length of training.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma with one root that is not negative.
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def sigma_rel_of(gamma: float) -> float:
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def beta(t: int, gamma: float) -> float:
    """The decay at update t, counted from 1: update s then counts (s^(gamma+1) - (s-1)^(gamma+1)) / t^(gamma+1)."""
    return (1 - 1 / t) ** (gamma + 1)


@dataclass(frozen=True)
class Profile:
    """(gamma + 1) s^gamma / t^(gamma + 1) for 0 <= s <= t, the weights of an average after t updates."""

    t: int
    gamma: float

    def dot(self, other: "Profile") -> float:
        """The integral of their product: the shorter ends first, and the longer alone keeps a power of their ratio."""
        short, long = sorted((self, other), key=lambda one: one.t)
        both = (self.gamma + 1) * (other.gamma + 1) / (self.gamma + other.gamma + 1)
        return both * (short.t / long.t) ** long.gamma / long.t


def combine(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """(how much of each stored average makes the wanted one, the error of its profile relative to the profile's size).

    Least squares as in the paper's Algorithm 3, under the condition that the shares sum to 1: what training does not
    move must come out as it is. Without it 20 snapshots give 0.987 of every weight at sigma_rel 0.25, and fine-tuning
    may change less.
    """
    if wanted in stored:
        return np.array([float(one == wanted) for one in stored]), 0.0
    sizes = np.sqrt([one.dot(one) for one in stored] + [wanted.dot(wanted)])  # equations of one scale
    products = _products(tuple(stored)) / np.outer(sizes[:-1], sizes[:-1])
    target = np.array([one.dot(wanted) for one in stored]) / sizes[:-1] / sizes[-1]
    sums = sizes.max() / sizes[:-1]
    system = np.block([[products, sums[:, None]], [sums[None], np.zeros((1, 1))]])
    found = np.linalg.solve(system, np.append(target, sizes.max() / sizes[-1]))[:-1]
    error = math.sqrt(max(0.0, 1 - 2 * found @ target + found @ products @ found))
    return found * sizes[-1] / sizes[:-1], error


@lru_cache(1)
def _products(stored: tuple[Profile, ...]) -> np.ndarray:
    return np.array([[one.dot(other) for other in stored] for one in stored])


def reach(stored: Sequence[Profile], t: int) -> list[tuple[float, float]]:
    """(from, to) of each stretch of sigma_rel, to three digits, whose profiles the stored ones make closely."""
    raster = range(round(1000 * SHORTEST), math.ceil(1000 * LONGEST))
    close = [combine(stored, Profile(t, gamma_of(one / 1000)))[1] <= CLOSE for one in raster]
    stretches = [list(group) for met, group in groupby(zip(raster, close), key=lambda one: one[1]) if met]
    return [(one[0][0] / 1000, one[-1][0] / 1000) for one in stretches]


# --- During training -----------------------------------------------------------------------------------------------


class PowerAverages:
    """Averages of several lengths and their snapshots. The first is what is validated, saved, and drawn from."""

    def __init__(
        self,
        averages: Mapping,  # sigma_rel -> its Average
        output_dir: str | Path,
        snapshot_steps: int,  # optimizer steps between snapshots
    ):
        self.averages, self.folder, self.snapshot_steps = dict(averages), Path(output_dir, FOLDER), snapshot_steps
        self.first = next(iter(self.averages.values()))
        self._going_on, self._kept = False, None

    def update(self, step: int) -> None:
        if not self._going_on:
            self._forget(step)
            self._going_on = True
        for average in self.averages.values():
            average.update(step)

    @property
    def updated(self) -> int | None:
        steps = {average.updated for average in self.averages.values()}
        return steps.pop() if len(steps) == 1 else None

    def _forget(self, step: int) -> None:
        """Snapshots of this step and later are of a course that was left: by a kill after the last checkpoint, or by
        going on from an earlier one. This course makes its own."""
        if not _is_main() or not self.folder.is_dir():
            return
        moved, left = 0, None
        for path in sorted(self.folder.iterdir()):
            stored = NAME.fullmatch(path.name)
            if path.name.startswith(STAGED):
                path.unlink()
            elif stored and int(stored[1]) >= step:
                left = left or self._new_folder()
                path.rename(left / path.name)
                moved += 1
        if moved:
            told = f"{moved} snapshots of averages were made after step {step - 1}"
            print(f"{self.folder}: {told}; now in {LEFT}/{left.name}/", flush=True)

    def _new_folder(self) -> Path:
        names = (self.folder / LEFT / str(number) for number in count(1))
        chosen = next(name for name in names if not name.exists())
        chosen.mkdir(parents=True)
        return chosen

    def snapshot(self, step: int) -> None:
        """A file for each average as after this step. All processes call it.

        In fp32: fp16 rounds a weight by up to 1/2048 of it, which is much of what fine-tuning changes, and shares of
        unlike sign magnify it.
        """
        interval = self.first.interval
        updates = step // interval
        if updates in (0, self._kept):
            return
        self._kept = updates
        for sigma_rel, average in self.averages.items():
            state = average.state()  # whole ones are put together by all, and kept by the main process
            if _is_main():
                try:
                    self._write(updates * interval, updates, sigma_rel, state)
                except (OSError, SafetensorError) as problem:
                    errors.warn(f"{self.folder}: no snapshot after step {step} ({problem}); training goes on")

    def _write(self, step: int, updates: int, sigma_rel: float, state: dict) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.folder / name_of(step, sigma_rel)
        staged = self.folder / f"{STAGED}{file.name}"
        told = {"format": "pt", "step": str(step), "updates": str(updates), "sigma_rel": repr(sigma_rel)}
        tensors = {name: value.cpu().contiguous() for name, value in state.items()}
        told["sha256"] = sums.Sum(sorted(tensors.items())).hex()
        try:
            save_file(tensors, str(staged), metadata=told)
            saved.shared(staged)
            manifests.sync(staged)
            os.replace(staged, file)
            manifests.sync(self.folder)
        finally:
            staged.unlink(missing_ok=True)

    def swapped(self):
        return self.first.swapped()

    def state(self) -> dict[float, dict[str, torch.Tensor]]:
        return {sigma_rel: average.state() for sigma_rel, average in self.averages.items()}

    def write(self, folder: Path, state: Mapping[float, dict]) -> None:
        for sigma_rel, average in self.averages.items():
            average.write(folder, state[sigma_rel])

    def load(self, folder: Path) -> None:
        for average in self.averages.values():
            average.load(folder)


def name_of(step: int, sigma_rel: float) -> str:
    return f"step-{step:06d}-{sigma_rel:g}.safetensors"


def _is_main() -> bool:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


# --- Afterwards ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    file: Path
    step: int
    updates: int
    sigma_rel: float
    shapes: dict[str, tuple]
    sha256: str | None = None  # of its values; None: an older version wrote it

    @property
    def profile(self) -> Profile:
        return Profile(self.updates, gamma_of(self.sigma_rel))


def listed(folder: Path) -> list[Snapshot]:
    """By step, then length; a file that is damaged or something else is refused by its name."""
    found = []
    for file in sorted(path for path in folder.glob("*") if NAME.fullmatch(path.name)):
        try:
            with safe_open(str(file), framework="pt") as stored:
                told = stored.metadata() or {}
                shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
            numbers = int(told["step"]), int(told["updates"]), float(told["sigma_rel"])
            one = Snapshot(file, *numbers, shapes, told.get("sha256"))
        except (SafetensorError, OSError, KeyError, ValueError) as problem:
            errors.refuse(f"{file} is no snapshot of an average, or damaged ({problem}); move it away")
        if file.name != name_of(one.step, one.sigma_rel):
            errors.refuse(
                f"{file} holds the average of {name_of(one.step, one.sigma_rel)}: it was renamed, or copied over "
                "another snapshot; move it away"
            )
        if found and one.shapes != found[0].shapes:
            errors.refuse(f"{file} and {found[0].file.name} are of different weights; move one run's away")
        found.append(one)
    return sorted(found, key=lambda one: (one.step, one.sigma_rel))


def choose(snapshots: Sequence[Snapshot], sigma_rel: float) -> tuple[np.ndarray, float]:
    """(the share of each in the average of this length as after the last of them, the error of its profile)."""
    stored, t = [one.profile for one in snapshots], snapshots[-1].updates
    shares, error = combine(stored, Profile(t, gamma_of(sigma_rel)))
    if error > CLOSE:
        stretches = [f"from {first:g} to {last:g}" for first, last in reach(stored, t)]
        within = f"lengths {' and '.join(stretches)} are" if stretches else "no length but those that were stored is"
        errors.refuse(
            f"--sigma_rel {sigma_rel:g}: the {len(stored)} snapshots meet it within {100 * error:.0f} % only; {within}"
            f" met within {100 * CLOSE:.0f} %. More snapshots (--ema_snapshot_steps) reach further"
        )
    return shares, error


@torch.no_grad()
def blend(snapshots: Sequence[Snapshot], shares: Iterable[float]):
    """(name, the weighted sum of all snapshots) for each weight, one in memory at a time; summed in fp64.

    Nothing that came out of it may be saved before it has ended: at the end damaged snapshots are refused.
    """
    parts = [(one, share) for one, share in zip(snapshots, shares) if share]
    opened = [(safe_open(str(one.file), framework="pt"), share, sums.Sum()) for one, share in parts]
    for name in sorted(snapshots[0].shapes):
        total = 0
        for file, share, found in opened:
            value = file.get_tensor(name)
            found.add(name, value)
            total = total + share * value.double()
        yield name, total.float()
    damaged = [one.file for (one, _), (_, _, found) in zip(parts, opened) if found.differs(one.sha256)]
    if damaged:
        remedy = "move them away, and the average is made of the others; only the run can write them again"
        errors.refuse([f"'{file}' is damaged: its values have changed since they were written" for file in damaged]
                      + [remedy], errors.DATA)  # fmt: skip
    if older := sum(one.sha256 is None for one, _ in parts):
        errors.warn(f"{older} snapshots have no checksum (older version): only impossible values are noticed in them")
