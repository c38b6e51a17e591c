"""Checkpoints that are whole or absent, and a resume that goes on exactly where the run was.

A checkpoint is written under another name, its manifest last, and renamed in one step; so every `checkpoint-N` that
exists was complete once, and the manifest tells whether it still is.
"""

import contextlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError

from utils import errors, learning
from utils.arguments.identity import another_run, differing, removed
from utils.checkpoints import manifests, nested

STAGED = ".tmp-checkpoint-"  # must not begin with "checkpoint-"
# What a file of another content raises: no safetensors, no such entry, a tensor of another shape.
UNREADABLE = (
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    RecursionError,
)
MOST_FAILURES = 3  # saves in a row that may fail before the run is stopped
# What a new command may change on resume; everything else in an optimizer's groups is its own memory (Prodigy's d).
OPTIONS = ("lr", "initial_lr", "betas", "eps", "momentum", "weight_decay")


class Checkpoints:
    def __init__(
        self,
        output_dir,
        *,
        state: dict,  # name -> (save(folder), load(folder)), or an object with state_dict / load_state_dict, kept in
        # name.safetensors, or with state / write / load, or a schedule, which is set to the step; None is left out
        identity: dict | None = None,  # what must be the same for a resume to be the same run
        keep: int | None = None,  # newest checkpoints that stay; None: all
        verify: str = "full",  # "sizes" reads no file before loading it
        whole: Callable = contextlib.nullcontext,  # run.whole: inside, weights that are sharded are whole
    ):
        self.folder, self.keep, self.verify, self.whole = Path(output_dir), keep, verify, whole
        self.state = {name: entry for name, entry in state.items() if entry is not None}
        self.identity = json.loads(json.dumps(identity or {}))  # as it will be read back: tuples are lists
        self.saved_step, self.failures = None, 0

    # Saving

    def save(self, step: int) -> Path | None:
        """All processes call this; the main one writes. None if the disk refused: the run goes on without."""
        target = self.folder / f"checkpoint-{step}"
        if self.saved_step == step:
            return target
        problem = None
        with self.whole():
            # Read by all: what is sharded is put together from all.
            read = {name: _state_of(entry) for name, entry in self.state.items()}
            if _is_main():
                try:
                    self._write(step, target, read)
                except (OSError, SafetensorError) as error:
                    problem = str(error)
        problem = _from_main(problem)  # the others wait here
        if problem is None:
            self.saved_step, self.failures = step, 0
            if _is_main():
                self._rotate(step)
            return target
        self.failures += 1
        if self.failures >= MOST_FAILURES:
            message = f"{target}: {self.failures} checkpoints in a row could not be written ({problem})."
            if _is_main():
                errors.refuse(message, errors.FAILED)
            raise SystemExit(errors.FAILED)
        if _is_main():
            errors.warn(f"{target}: not saved ({problem}); older checkpoints are untouched, training goes on.")
        return None

    def rescue(self, step: int, alone: bool = False) -> Path | None:
        """After a failure: the main process writes alone, for the others may be gone; or the caller does, who knows
        that the main one is. None if nothing was written."""
        target = self.folder / f"checkpoint-{step}"
        if self.saved_step == step or not (alone or _is_main()):
            return None
        if _several() and any(_is_sharded(entry) for entry in self.state.values()):
            errors.warn(
                f"{target}: not saved, for each process holds a part only; older checkpoints are untouched.",
                everywhere=True,
            )
            return None
        try:
            average = self.state.get("ema")
            if average is not None and average.updated != step:
                if average.updated is None:
                    raise RuntimeError("the error came while weights were being averaged")
                average.update(step)
            self._write(step, target, {name: _state_of(entry) for name, entry in self.state.items()})
        except (OSError, SafetensorError, RuntimeError) as problem:
            errors.warn(f"{target}: not saved either ({problem}); older checkpoints are untouched.", everywhere=True)
            return None
        self.saved_step = step
        errors.warn(f"the run ends early; {target} holds what was learned: resume from it.", everywhere=True)
        return target

    def _write(self, step: int, target: Path, read: dict) -> None:
        staged = self.folder / f"{STAGED}{step}-{uuid.uuid4().hex[:8]}"
        try:
            staged.mkdir(parents=True)
            for name, entry in self.state.items():
                if isinstance(entry, tuple):
                    entry[0](staged)
                elif hasattr(entry, "write"):
                    entry.write(staged, read[name])
                elif read[name] is not None:
                    nested.save(read[name], staged / f"{name}.safetensors")
            manifests.write(staged, step, self.identity)
            if os.path.lexists(target):  # cut short or abandoned by an earlier session, which is why it is saved again
                target.rename(self.folder / f"{STAGED}{step}-replaced-{uuid.uuid4().hex[:8]}")
            os.replace(staged, target)
            manifests.sync(self.folder)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        self._remove_staged()

    def _rotate(self, step: int) -> None:
        """Deletes only what is older than the checkpoint just made durable; damaged ones do not count as kept."""
        if not self.keep:
            return
        older = [(number, path) for number, path in manifests.listed(self.folder) if number < step]
        kept = 1
        for _, path in reversed(older):
            if kept < self.keep and manifests.fault(path, "sizes") is None:
                kept += 1
                continue
            try:
                if path.is_symlink():  # what it leads to is not ours
                    path.unlink()
                    continue
                # Renamed first: what a kill leaves half deleted must not look like a checkpoint.
                doomed = path.rename(self.folder / f"{STAGED}{path.name}-{uuid.uuid4().hex[:8]}")
                shutil.rmtree(doomed)
            except OSError as problem:
                errors.warn(f"{path}: could not be deleted ({problem})")

    def _remove_staged(self) -> None:
        for path in self.folder.glob(f"{STAGED}*"):
            if path.is_symlink():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path, ignore_errors=True)

    # Resuming

    def resume(self, which: str | None, allow_mismatch: str | Iterable[str] | None = None) -> int:
        """Loads `latest` (the newest whole one, if any) or the named checkpoint; returns the steps already done."""
        found = None
        if _is_main():
            self._remove_staged()
            found = self._find(which, allow_mismatch) if which else None
        found = _from_main(found)
        if found is None:
            return 0
        if "complaints" in found:
            if _is_main():
                errors.refuse(found["complaints"])
            raise SystemExit(errors.OPTIONS)
        folder, step = Path(found["folder"]), found["step"]
        for name, entry in self.state.items():
            try:
                _load_entry(name, entry, folder, step)
            except UNREADABLE as problem:  # nothing in a checkpoint is unpickled, so nothing in it can run
                reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
                errors.refuse(
                    f"--resume_from_checkpoint {which}: {folder}: its {name} cannot be read ({reason}); "
                    "--verify_checkpoint full tells which file has changed since it was saved."
                )
        if _is_main():
            print(f"resumed from {folder} after step {step}", flush=True)
            if any(folder.glob("*_ema*")) and "ema" not in self.state:
                errors.warn(f"{folder} holds averaged weights, which are dropped; add --use_ema to go on with them")
            newer = [path.name for number, path in manifests.listed(self.folder) if number > step]
            if newer and which != "latest":
                errors.warn(
                    f"{', '.join(newer)} in {self.folder} are of the course left here: move them away, or a later "
                    "--resume_from_checkpoint latest goes on with them"
                )
        if folder.resolve() == (self.folder / f"checkpoint-{step}").resolve():
            self.saved_step = step
        return step

    def _find(self, which: str, allow_mismatch) -> dict | None:
        if which != "latest":
            folder = manifests.named(self.folder, which)
            fault = manifests.fault(folder, self.verify)
            if fault:
                return {"complaints": f"--resume_from_checkpoint {which}: {folder}: {fault}."}
            return self._fitting(folder, allow_mismatch)
        listed = manifests.listed(self.folder)
        for _, folder in reversed(listed):
            fault = manifests.fault(folder, self.verify)
            if fault is None:
                return self._fitting(folder, allow_mismatch)
            errors.warn(f"{folder}: skipped, {fault}")
        if not listed:
            return None
        return {"complaints": f"--resume_from_checkpoint latest: none in {self.folder} is whole; remove them first."}

    def _fitting(self, folder: Path, allow_mismatch) -> dict:
        manifest = manifests.read(folder)
        if complaint := removed(folder, manifest["identity"]):
            return {"complaints": complaint}
        refused, allowed = differing(manifest["identity"], self.identity, allow_mismatch)
        for name, old, new in allowed:
            errors.warn(f"{folder}: resumed although {name} was {old} and is now {new}")
        if refused:
            return {"complaints": another_run(folder, refused)}
        return {"folder": str(folder), "step": manifest["step"]}


def _state_of(entry):
    """None where there is nothing to write: a schedule is a function of the step, a pair of functions writes itself."""
    if isinstance(entry, tuple | torch.optim.lr_scheduler.LRScheduler):
        return None
    return (getattr(entry, "state_dict", None) or entry.state)()


def _load_entry(name: str, entry, folder: Path, step: int) -> None:
    if isinstance(entry, torch.optim.lr_scheduler.LRScheduler):
        with warnings.catch_warnings():  # it thinks that it was stepped before its optimizer
            warnings.simplefilter("ignore")
            entry.last_epoch = step - 1
            entry.step()
        return
    if isinstance(entry, tuple) or hasattr(entry, "write"):
        (entry[1] if isinstance(entry, tuple) else entry.load)(folder)
        return
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        errors.refuse(f"{folder} holds no {name}.safetensors: it was saved with other options.")
    state = nested.load(path)
    if isinstance(entry, torch.optim.Optimizer):
        state = learning.regrouped(state, entry.param_groups)
        for group, now in zip(state["param_groups"], entry.param_groups):
            group.update({option: now[option] for option in OPTIONS if option in now})
    entry.load_state_dict(state)


def _is_sharded(entry) -> bool:
    groups = getattr(entry, "param_groups", [])
    return any(hasattr(weight, "full_tensor") for group in groups for weight in group["params"])


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_main() -> bool:
    return not _several() or torch.distributed.get_rank() == 0


def _from_main(value):
    """The main process's value, in every process; also a barrier."""
    if not _several():
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
