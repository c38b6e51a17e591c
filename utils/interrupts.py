"""Signals before a run is there to be stopped, and in tools that need no saving: one line and an exit code, at once."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from utils import errors

CODES = {"SIGINT": errors.INTERRUPTED, "SIGTERM": errors.TERMINATED, "SIGUSR1": errors.STOPPED_UNFINISHED}


@contextlib.contextmanager
def answered(what: str) -> Iterator[None]:
    """Inside, a signal ends the process with "SIGNAL: what" instead of a traceback or a silent death.

    Only the main thread may install handlers, and handlers of others (a notebook's, a run's) stay.
    """

    def leave(number, frame):
        name = signal.Signals(number).name
        errors.warn(f"{name}: {what}")
        raise SystemExit(CODES[name])

    previous = {}
    if threading.current_thread() is threading.main_thread() and not (
        hasattr(sys, "ps1") or "ipykernel" in sys.modules
    ):
        for number in (getattr(signal, name) for name in CODES if hasattr(signal, name)):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
