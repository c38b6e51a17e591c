"""How a run says no: one sentence a problem, on stderr, and an exit code that a scheduler can act on."""

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from utils import launchers

FAILED = 1  # something broke that no check foresaw
OPTIONS = 2  # an option, a folder or a package: correct the command
DATA = 3  # photos or captions that cannot be used
DIVERGED = 4  # loss or gradients stopped being numbers
STOPPED_UNFINISHED = 75  # saved, not finished (EX_TEMPFAIL): run the same command again
INTERRUPTED = 130  # saved after SIGINT
TERMINATED = 143  # saved after SIGTERM

# What a secret looks like, and where one is kept.
SECRET_VALUES = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bwandb_v1_\w+")
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY")

# Colours, cursor and lines of progress bars pass; titles, clipboards and the like in somebody's file name do not.
CONTROLS = re.compile(r"\x1b(?!\[[0-9;]*[A-HKm])|[\x00-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")

MOST = 20  # complaints that are printed: a thousand photos may all be wrong in the same way


def refuse(message: str | Sequence[str], code: int = OPTIONS, once: bool = False) -> NoReturn:
    """Print every complaint, then leave: a person should need one attempt, not one attempt a mistake.

    `once`: every process on this machine comes to the same complaints, so one of them is enough to print them.
    """
    lines = [message] if isinstance(message, str) else list(message)
    more = [f"... and {len(lines) - MOST} more"] if len(lines) > MOST else []
    for line in [*lines[:MOST], *more]:
        if not once or _first_here():
            print(f"error: {line}", file=sys.stderr, flush=True)
    launchers.last_words(code)
    raise SystemExit(code)


def warn(message: str, everywhere: bool = False) -> None:
    """One line that a person should read although the run goes on; said once a machine, not once a process.

    `everywhere`: what only this process knows.
    """
    if everywhere or _first_here():
        print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def when_writing_fails(what: str) -> Iterator[None]:
    """Around the work of a tool: a disk that is full or fails is one sentence, not a traceback."""
    try:
        yield
    except Exception as problem:
        # safetensors has an error of its own for those of the operating system; it is not imported for its name.
        if not isinstance(problem, OSError) and type(problem).__name__ != "SafetensorError":
            raise
        refuse(f"{what}: {getattr(problem, 'strerror', None) or problem}", FAILED)


def readable(path: str | os.PathLike, most: int = 64 * 2**20) -> bytes:
    """The content of a small file that a person names; OSError for what is not a file, or is larger than `most`.

    Opened without waiting: a named pipe that nobody writes to would be waited for without end.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        held = os.fstat(handle)
        if not (stat.S_ISREG(held.st_mode) or os.path.samefile(path, os.devnull)):
            raise OSError(errno.EINVAL, "is a folder" if stat.S_ISDIR(held.st_mode) else "is not a regular file")
        if held.st_size > most:
            raise OSError(errno.EFBIG, f"has {held.st_size:,} bytes; {most:,} are accepted")
        return file.read()


def without_secrets(text: str) -> str:
    text = SECRET_VALUES.sub("[secret]", text)
    for name in SECRET_VARIABLES:
        if len(secret := os.environ.get(name, "")) >= 8:
            text = text.replace(secret, "[secret]")
    return text


def _first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


class Lasting:
    """A text stream whose reader may disappear (a closed terminal, `| head`, a full disk): what cannot be written is
    dropped, because no message is worth a training run. `lost` holds the reason. Secrets are replaced: a token that was
    typed in the wrong place stands in the message that says so. So are controls of the terminal: names of files may
    come from strangers."""

    def __init__(self, stream):
        self.stream, self.lost = stream, None

    def write(self, text: str) -> int:
        try:
            self.stream.write(CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", without_secrets(text)))
            return len(text)
        except (OSError, ValueError) as problem:  # ValueError: the stream was closed
            return self._drop(problem) or len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as problem:
            self._drop(problem)

    def _drop(self, problem: Exception) -> None:
        self.lost = self.lost or f"{type(problem).__name__}: {problem}"
        # What the stream still holds, and what libraries write past it, must not fail when the process ends.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            handle = self.stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, handle)
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def outlast_readers() -> None:
    """From here on output that cannot be written is dropped, in this process; letters that the terminal does not know
    are written as numbers."""
    _open_what_was_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
        if not isinstance(stream, Lasting):
            with contextlib.suppress(AttributeError, ValueError, OSError):  # a notebook's streams, closed ones
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Lasting(stream))


def _open_what_was_closed() -> None:
    """Standard streams that the caller closed (`2>&-`, some services) become the null device. Otherwise the next file
    that is opened gets their number, and messages that go to that number are written into the file."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is `handle`


def lost_output() -> str | None:
    """Why output could not be written; None if all of it was."""
    return next((stream.lost for stream in (sys.stdout, sys.stderr) if getattr(stream, "lost", None)), None)
