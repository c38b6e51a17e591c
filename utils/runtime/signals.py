"""How a run is asked to stop: by a signal, by the clock, or because its launcher died.

A handler only sets a flag. The loop looks at it between steps, all processes agree, a checkpoint is written, and the
exit code says whether the same command should be run again.
"""

import ctypes
import os
import signal
import sys
import threading
import time

from utils import errors, interrupts
from utils.launchers import TRACES, launcher_words

# Ctrl-C under a launcher arrives twice, from the terminal and from the launcher: so close together it is one wish.
SAME_WISH_SECONDS = 0.5
SAME_WISH_SECONDS_LAUNCHED = 5.0  # torchrun on a busy machine takes its time to pass a signal on
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")  # the middle three: schedulers, before a kill
ONCE = ("SIGHUP", "SIGXCPU")  # comes again by itself: no second wish
CODES = {"SIGINT": errors.INTERRUPTED, "SIGTERM": errors.TERMINATED, "SIGHUP": errors.TERMINATED}


class Stop:
    """What has been asked of this process; `reason` is None until then."""

    def __init__(self, max_minutes: float | None = None):
        self.reason = None
        self.since = 0.0  # when the first signal came
        self.deadline = None if not max_minutes else time.monotonic() + 60 * max_minutes
        self.previous = {}  # handlers to put back

    def install(self) -> None:
        """Only the main thread may install handlers; elsewhere (a notebook's worker thread) the clock still works."""
        if threading.current_thread() is not threading.main_thread():
            return
        interrupts.give_back()
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue  # Windows has two of them; nohup means what it says
            self.previous[number] = signal.signal(number, self._receive)
        follow_launcher()

    def restore(self) -> None:
        """Put the old handlers back: a notebook's kernel outlives the run."""
        if self.previous and threading.current_thread() is threading.main_thread():
            for number, handler in self.previous.items():
                if signal.getsignal(number) == self._receive:
                    signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            self.previous = {}

    def requested(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = "max_train_minutes"
        return self.reason is not None

    @property
    def code(self) -> int:
        return CODES.get(self.reason, errors.STOPPED_UNFINISHED)

    def _receive(self, number, frame) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        # A launcher that dies of the same Ctrl-C hangs up a little later: also no second wish.
        close = SAME_WISH_SECONDS_LAUNCHED if TRACES["torchrun"] in os.environ else SAME_WISH_SECONDS
        repeated = self.since and now - self.since > close and name not in ONCE
        if not repeated:
            if not self.since:
                self.reason, self.since = name, now
                _say(f"\n{name}: stopping after this step and saving; once more stops at once, without saving\n")
            return
        if _interactive():  # in a notebook, leaving at once must not take the kernel along
            self.restore()
            raise KeyboardInterrupt
        _say(f"{name} again: leaving at once, without saving\n")
        os._exit(CODES.get(name, 128 + number))


def _say(text: str) -> None:
    """print() is not safe inside a handler: it may interrupt another print()."""
    if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
        try:
            os.write(2, text.encode())
        except OSError:
            pass


def _interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules


def follow_launcher() -> None:
    """`accelerate launch` with one process passes no SIGTERM on: ask Linux to hang up on us when the launcher dies.

    torchrun forwards signals itself; a shell must be allowed to go away.
    """
    if not sys.platform.startswith("linux") or not launcher_words():
        return
    hangup = signal.SIGHUP if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else signal.SIGTERM
    parent_death = 1  # PR_SET_PDEATHSIG
    try:
        ctypes.CDLL(None, use_errno=True).prctl(parent_death, int(hangup), 0, 0, 0)
    except (OSError, AttributeError):
        errors.warn("`kill` of `accelerate launch` will not reach this process: send the signal to it directly.")
