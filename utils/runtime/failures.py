"""What happens when training breaks: weights that are whole are saved, and one process of several does not wait for
another that is gone.

An error between two optimizer steps leaves whole weights in memory, so a checkpoint is written before the error ends
the run. An error within a step's update does not: then the newest checkpoint is what remains.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time

import torch

from utils import errors
from utils.runtime import signals, startup

STUCK = 20.0  # seconds after a signal without any progress, phases apart; torchrun kills 30 s after its own
RESCUED_WITHIN = 5.0  # seconds in which the main process says that it is saving, if it can
FIRST, RESCUED = "suite/failed_first", "suite/rescued"  # keys of the store that all processes can read
# What a process sees of the end of another one.
GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting|NCCL|ncclRemoteError|gloo", re.I)


@contextlib.contextmanager
def saving_first(run, saved):
    """Around the loop and the final save: an error inside ends the run, and what it has learned is saved before."""
    with Watch(run, saved) if run.world > 1 else contextlib.nullcontext():
        try:
            yield
        except BaseException as problem:
            if run.lock is None:  # run.finish: a stop that was asked for
                raise
            first = announce(run, problem) if run.world > 1 else None
            concerned = run.is_main or GONE.search(str(problem))
            if concerned and run.learned and getattr(problem, "code", None) != errors.DIVERGED:
                rescue(run, saved)
            if run.world > 1:
                leave(run, problem, first)
            if saved.saved_step == run.step and run.learned:  # once more after the traceback, where a person looks
                problem.last_words = [f"saved after step {run.step}; --resume_from_checkpoint latest resumes from it"]
            raise


def rescue(run, saved) -> None:
    """The main process saves; another one does if the main process is gone."""
    if not run.is_main and saved_by_main():
        return
    if not run.updating.acquire(blocking=False):
        errors.warn(
            f"step {run.step + 1}: the error came while weights were being updated, so they are not saved; "
            "the newest checkpoint is what remains",
            everywhere=True,
        )
        return
    if run.is_main and run.world > 1:
        with contextlib.suppress(RuntimeError, OSError):
            store().set(RESCUED, "saving")
    # On a stream of its own: the usual one may wait for a process that is gone.
    stream = torch.cuda.Stream() if run.device.type == "cuda" and run.world > 1 else None
    saved.folder = run.output_dir
    try:
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            saved.rescue(run.step, alone=True)
    finally:
        run.updating.release()


def saved_by_main() -> bool:
    """The main process lives and says that it saves."""
    until = time.monotonic() + RESCUED_WITHIN
    while time.monotonic() < until:
        try:
            if store().check([RESCUED]):
                return True
        except (RuntimeError, OSError):  # it kept the store, and is gone
            return False
        time.sleep(0.1)
    return False


def store():
    return torch.distributed.distributed_c10d._get_default_store()


def announce(run, problem: BaseException) -> str:
    """Tells the others why this process ends; returns what the first of them said."""
    line = f"process {run.rank}: {in_a_line(problem)}"
    if GONE.search(line):
        line = f"another process ended without a message (noticed by process {run.rank})"
    try:
        return store().compare_set(FIRST, "", line).decode()
    except (RuntimeError, OSError):
        return line


def in_a_line(problem: BaseException) -> str:
    first = (str(problem).strip().splitlines() or [""])[0]
    return errors.without_secrets(f"{type(problem).__name__}: {first}")


def leave(run, problem: BaseException, first: str) -> None:
    """The end of one process of several after an error. What failed first is the last line on the screen."""
    refused = isinstance(problem, SystemExit)  # its reason is on the screen, and the others came to the same
    if first.startswith(f"process {run.rank}:") and not refused:
        sys.excepthook(type(problem), problem, problem.__traceback__)
    if not refused:
        print(f"error: {first}", file=sys.stderr, flush=True)
    run.close(broken=True)
    startup.leave(problem.code if refused and problem.code else errors.FAILED)


class Watch:
    """Ends a process whose main thread waits for another process that is gone.

    A signal then finds nobody: Python's handlers run in the main thread, which stays inside the library that waits
    (NCCL does not notice that a process is gone). The number of a signal also goes into a pipe, which a thread reads.
    In a phase (images, a large checkpoint) nothing is ended: who works for long cannot be told from who waits.
    """

    def __init__(self, run, saved):
        self.run, self.saved = run, saved
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        self.over = threading.Event()

    def __enter__(self):
        self.previous = None
        with contextlib.suppress(ValueError):  # not the main thread
            self.previous = signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
        threading.Thread(target=self._follow, daemon=True).start()
        return self

    def __exit__(self, *problem):
        self.over.set()
        if self.previous is not None:
            signal.set_wakeup_fd(self.previous)
        os.close(self.writing)

    def _follow(self) -> None:
        while number := os.read(self.reading, 1):
            name = signal.Signals(number[0]).name
            if name not in signals.NAMES:
                continue
            where, since = self.run.progress, time.monotonic()
            while not self.over.wait(0.5) and time.monotonic() - since < STUCK:
                if self.run.in_phase or self.run.progress != where:
                    where, since = self.run.progress, time.monotonic()
            if not self.over.is_set():
                self._end(name)
        os.close(self.reading)

    def _end(self, name: str) -> None:
        errors.warn(
            f"{name}: no progress for {STUCK:.0f} s, another process is gone or stopped; process {self.run.rank} ends",
            everywhere=True,
        )
        if self.run.learned:
            rescue(self.run, self.saved)
        sys.stderr.flush()
        os._exit(signals.CODES.get(name, errors.FAILED))
