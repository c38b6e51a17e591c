"""Signals before a run is there to be stopped, and in tools that need no saving: one line and an exit code, at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from utils import errors

CODES = {"SIGINT": errors.INTERRUPTED, "SIGTERM": errors.TERMINATED}
CODES |= dict.fromkeys(("SIGUSR1", "SIGUSR2", "SIGXCPU"), errors.STOPPED_UNFINISHED)
ROOT = Path(__file__).resolve().parent.parent

_messages: list[str] = []  # the innermost last
_previous: dict = {}  # signal -> the handler that was there before ours
_leaving = False


def from_the_start() -> None:
    """Called when this package is imported: imports of the libraries take seconds. Only where one of our scripts or
    tools is the program; in a notebook or a test nothing changes."""
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    ours = sys.argv[:1] == ["-m"] or (program and Path(program).resolve().parent == ROOT)
    if ours:
        errors.outlast_readers()
    if ours and _install():
        _messages.append("stopped while starting")


@contextlib.contextmanager
def answered(what: str) -> Iterator[None]:
    """Inside, a signal ends the process with "SIGNAL: what" instead of a traceback or a silent death.

    Only the main thread may install handlers, and handlers of others (a notebook's, a run's) stay.
    """
    outermost = not _previous and _install()
    _messages.append(what)
    try:
        yield
    finally:
        _messages.remove(what)
        if outermost:
            give_back()


def give_back() -> None:
    """The handlers that were there before ours, for a run that installs its own."""
    for number, handler in _previous.items():
        if signal.getsignal(number) == _leave:
            signal.signal(number, handler)
    _previous.clear()


def _install() -> bool:
    if threading.current_thread() is not threading.main_thread():
        return False
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        return False
    for number in (getattr(signal, name) for name in CODES if hasattr(signal, name)):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            _previous[number] = signal.signal(number, _leave)
    return bool(_previous)


def _leave(number, frame) -> None:
    global _leaving
    name = signal.Signals(number).name
    if not _leaving and os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
        with contextlib.suppress(OSError):  # print() may be what was interrupted
            os.write(2, f"{name}: {_messages[-1] if _messages else 'stopped'}\n".encode())
    # An exception would be lost in a half-finished import, or end as a library's own error. Nothing is written there.
    if _leaving or _importing(frame):
        os._exit(CODES[name])
    _leaving = True
    raise SystemExit(CODES[name])


def _importing(frame) -> bool:
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
