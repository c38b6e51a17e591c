"""What a run tells while it goes on: metrics.jsonl, one line on the screen, and where its time and memory went."""

import json
import math
import os
import statistics
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from utils import errors, writing
from utils.report import curves

METRICS = "metrics.jsonl"
TIMINGS = "timings.json"


class Metrics:
    """One JSON object a line, flushed at once: a killed run has told everything up to its last step."""

    def __init__(self, folder: Path):
        self.path, self.file, self.silent = Path(folder) / METRICS, None, False
        self.early = []  # told before the first step, when it is not known yet where a resumed run goes on

    def open(self, first_step: int) -> None:
        """Keeps the lines up to `first_step`: the steps after it will be run, and told, again."""
        lines = []
        if first_step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= first_step:
                        lines.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # the line that a kill cut off
        self._begin("".join(lines))
        early, self.early = self.early, []
        for step, values in early:
            self.write(step, values)

    def _begin(self, text: str) -> None:
        writing.write(self.path, text)
        self.file = open(self.path, "a+", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed in close()

    def reopen(self) -> None:
        """In a folder that was made anew: the file that is still open knows every line."""
        if self.file:
            self.file.seek(0)
            text = self.file.read()
            self.close()
            self._begin(text)

    def restore(self) -> None:
        """Where the file was renamed or removed."""
        if self.file and not self.path.exists():
            self.reopen()

    def write(self, step: int, values: dict) -> None:
        if not self.file:
            self.early.append((step, values))
        else:
            # Strict JSON: a browser that reads NaN gives up on the whole file.
            told = {n: v if not isinstance(v, float) or math.isfinite(v) else str(v) for n, v in values.items()}
            try:
                self.file.write(json.dumps({"step": step, **told}, ensure_ascii=False) + "\n")
            except OSError as problem:  # a full disk: the lines wait in memory, and the training goes on
                if not self.silent:
                    errors.warn(f"{self.path}: {problem.strerror}; training goes on")
                self.silent = True

    def close(self) -> None:
        if self.file:
            with suppress(OSError):
                self.file.close()
            self.file = None


class Clock:
    """Where the time of this session went. Phases may stand inside each other; only the outermost counts."""

    def __init__(self):
        self.started = time.monotonic() - _age()
        self.phases = {}  # name -> seconds
        self.steps = []  # seconds of each optimizer step, without the phases between them
        self.first_step_after = None
        self._inside, self._aside, self._last = None, 0.0, None

    @contextmanager
    def phase(self, name: str):
        if self._inside:
            yield
            return
        self._inside, start = name, time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self._inside = None
            self._aside += seconds
            self.phases[name] = self.phases.get(name, 0.0) + seconds

    def begin(self) -> None:
        self._last, self._aside = time.monotonic(), 0.0

    def step(self) -> float:
        """Call at the end of each optimizer step; its seconds."""
        now = time.monotonic()
        seconds = now - self._last - self._aside
        self._last, self._aside = now, 0.0
        self.steps.append(seconds)
        self.phases["training"] = self.phases.get("training", 0.0) + seconds
        if self.first_step_after is None:
            self.first_step_after = now - self.started
        return seconds

    def summary(self, device: torch.device) -> dict:
        told = {
            "seconds": time.monotonic() - self.started,
            "phases": dict(self.phases),
            "seconds_to_first_step": self.first_step_after,
            "median_step_seconds": statistics.median(self.steps) if self.steps else None,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "peak_memory_gib": peak_memory(device),
        }
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in told.items()
            if value is not None
        }


def _age() -> float:
    """Seconds since this process began: imports are part of what a person waits for."""
    try:
        import psutil

        return max(0.0, time.time() - psutil.Process().create_time())
    except Exception:  # some sandboxes hide it; then count from here
        return 0.0


def peak_memory(device: torch.device) -> float:
    """GiB: of the GPU if there is one, of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def write_timings(folder: Path, session: dict, resumed: bool) -> None:
    """One entry a session: a run that was stopped and resumed has several."""
    path = Path(folder) / TIMINGS
    earlier = []
    if resumed:
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))["sessions"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
    earlier = [entry for entry in earlier if entry.get("began") != session["began"]]
    writing.write(path, json.dumps({"sessions": [*earlier, session]}, indent=1))


class Line:
    """A line that is redrawn on a terminal; elsewhere about fifty plain lines a run, so that a log stays readable."""

    def __init__(self, first_step: int, total: int, device: torch.device, stream=None, losses=()):
        self.stream = stream or sys.stdout
        self.redrawn = bool(getattr(self.stream, "isatty", lambda: False)())
        self.total, self.first, self.device = total, first_step, device
        self.every = max(1, total // 50)
        self.losses = list(losses)  # of all sessions: at random timesteps they jump too much to be read one by one
        self.pace = None
        self.steps, self._drawn = 0, 0.0

    def step(self, step: int, loss: float, seconds: float, lr: float) -> None:
        self.steps += 1
        if math.isfinite(loss):
            self.losses.append(loss)
        if self.steps <= 2:  # the first step warms up caches and compilers: it says nothing about the next
            self.pace = seconds
        else:
            self.pace += max(0.05, 1 / self.steps) * (seconds - self.pace)
        now = time.monotonic()
        last = step >= self.total
        if last or (now - self._drawn > 0.1 if self.redrawn else step % self.every == 0 or step == self.first + 1):
            self._drawn = now
            self._write(self._text(step, lr), last)

    def _text(self, step: int, lr: float) -> str:
        left = (self.total - step) * self.pace
        rate = f"{1 / self.pace:.2f} steps/s" if self.pace < 1 else f"{self.pace:.2f} s/step"
        parts = [
            f"step {step:>{len(str(self.total))}}/{self.total}",
            f"smoothed loss {curves.number(curves.smoothed_end(self.losses)) if self.losses else '-':<8}",
            f"lr {lr:.2e}",
            rate,
            f"{_clock(left)} left",
            f"{peak_memory(self.device):.1f} GiB",
        ]
        return "  ".join(parts)

    def _write(self, text: str, last: bool) -> None:
        if not self.redrawn:
            print(text, file=self.stream, flush=True)
            return
        width = max(20, _columns() - 1)
        self.stream.write("\r" + text[:width] + "\x1b[K" + ("\n" if last else ""))
        self.stream.flush()

    def clear(self) -> None:
        """Before something else is printed, so that it does not stand behind half a line."""
        if self.redrawn and self._drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def _columns() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 100


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
