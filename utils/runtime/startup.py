"""Settled before a run starts: how many processes, what arithmetic, whose folder, which seed, what may be told."""

import atexit
import contextlib
import errno
import json
import logging
import math
import os
import re
import secrets
import socket
import stat
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch

from utils import errors, launchers, saved, strict, writing
from utils.checkpoints import manifests
from utils.runtime import engines, signals

SETTINGS = "training_config.yaml"
LOCK = ".run.lock"
# `token`, `hub_token`, but neither `tokenizer_name` nor `token_abstraction`.
SECRET_NAMES = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|credentials?)$", re.IGNORECASE)


def quiet() -> None:
    """Libraries tell their story to their authors; a person who trains wants to see the training."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer warns in each loader process otherwise
    # Where DeepSpeed is installed others import it, and it tells what it looks for.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for name in ("bitsandbytes", "accelerate", "torch.distributed", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.utils._pytree.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|accelerate|peft)\..*")
    sys.excepthook = _tell_without_secrets


def _tell_without_secrets(kind, problem, trace) -> None:
    """A traceback goes into logs and bug reports, and an error of a client may quote what it sent."""
    sys.stderr.write(errors.without_secrets("".join(traceback.format_exception(kind, problem, trace))))
    for note in getattr(problem, "last_words", ()):
        errors.warn(note, everywhere=True)
    launchers.last_words(errors.FAILED)


def accelerator(mixed_precision, accumulate, report_to, output_dir, logging_dir, compile):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import (
        AutocastKwargs,
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        ProjectConfiguration,
    )

    # A second run in one process (a notebook) may have another precision.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    # Casts of weights are not kept between the forward passes of a step: under DeepSpeed memory is what counts.
    narrow = [AutocastKwargs(cache_enabled=False)] if engines.engine_asked_for() == "DeepSpeed" else []
    try:
        with engines.unseen():
            made = Accelerator(
                mixed_precision=mixed_precision,
                # As a plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS would overrule the plain argument.
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=accumulate, sync_with_dataloader=False
                ),
                log_with=tracker_names(report_to) or None,
                project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / logging_dir)),
                dynamo_backend="inductor" if compile else None,
                kwargs_handlers=[
                    *narrow,
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                    # One process draws class images or saves while the others wait.
                    InitProcessGroupKwargs(backend=None, timeout=timedelta(hours=2)),
                ],
            )
    except ValueError as problem:
        errors.refuse(f"accelerate refuses these settings: {problem}")
    if made.mixed_precision == "fp16" and made.device.type == "cpu":
        errors.refuse("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no.")
    return made


def settle_arithmetic(allow_tf32: bool, deterministic: bool) -> None:
    torch.set_float32_matmul_precision("high" if allow_tf32 and not deterministic else "highest")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(deterministic)


def tracker_names(report_to: str | list[str] | None) -> list[str]:
    """`tensorboard`, `wandb,tensorboard`, `all`, or none."""
    entries = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [name for entry in entries for name in entry.replace(" ", "").split(",") if name not in ("none", "")]


def refuse_lost_processes(world: int) -> None:
    """Two ways to start several processes end in one, or in several that do not know of each other."""
    if world > 1:
        return
    script = "torchrun --nproc_per_node {count} SCRIPT ..."
    count = int(os.environ.get("WORLD_SIZE") or _mpi_size() or 1)
    if count > 1:
        if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) != "0":
            raise SystemExit(errors.OPTIONS)  # rank 0 says it
        errors.refuse(
            f"{count} processes were started, but without a GPU they do not find each other: each would train alone "
            f"into the same folder. Start them with: ACCELERATE_USE_CPU=true {script.format(count=count)}"
        )
    count = _launched_alone(signals.launcher_words())
    if count > 1:
        errors.refuse(
            f"accelerate launch was asked for {count} processes and started one. On CPUs start them with: "
            f"ACCELERATE_USE_CPU=true {script.format(count=count)}; on {count} GPUs with: "
            f"accelerate launch --multi_gpu --num_processes {count} SCRIPT ..."
        )


def _mpi_size() -> int:
    return max(int(os.environ.get(name) or 0) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))


def _launched_alone(words: list[str]) -> int:
    """How many processes `accelerate launch` was told to start, by its command line or else by its traces."""
    for place, word in enumerate(words):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes":
            value = value or (words[place + 1] if place + 1 < len(words) else "")
            return int(value) if value.isdigit() else 1
    # From a config file: the one-process launcher sets a meeting point only if it was asked for several processes.
    met = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and "RANK" not in os.environ
    return 2 if words and met else 1


def leave(code: int) -> None:
    """Ends one process of several without taking the interpreter down piece by piece.

    The threads of the process group outlive it, and one that asks for the interpreter's lock during the dismantling
    aborts the process: a training that succeeded would be reported as failed.
    """
    atexit._run_exitfuncs()  # loader processes, trackers, logs
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class FolderLock:
    """At most one run in a folder. The kernel drops the lock with the process: a killed run leaves nothing behind."""

    def __init__(self, folder: Path, name: str = LOCK):
        self.path, self.handle = Path(folder) / name, None

    def take(self) -> str | None:
        """None, or who holds the folder."""
        try:
            import fcntl
        except ImportError:  # Windows: nothing to lock with
            return None
        handle = self._opened()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 4096)
            os.close(handle)
            return self._told(owner)
        except OSError as problem:  # some network mounts cannot lock
            os.close(handle)
            errors.warn(f"{self.path.parent}: cannot be locked ({problem}); do not start a second run in it.")
            return None
        self.handle = handle
        # A loader's worker must not keep the folder locked after its parent was killed.
        os.register_at_fork(after_in_child=self._forget)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(note).encode())
        return None

    def _opened(self) -> int:
        """Not through a link, and nothing but what a lock left: a folder from elsewhere may hold any file here."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as problem:
            if self.path.is_symlink():
                raise OSError(problem.errno, f"{self.path.name} in it is a link; remove the link") from None
            raise
        held = os.fstat(handle)
        content = os.pread(handle, 4096, 0) if stat.S_ISREG(held.st_mode) else None
        if content is None or (content and held.st_nlink > 1) or (content and not content.startswith(b'{"pid": ')):
            os.close(handle)
            raise OSError(errno.EINVAL, f"{self.path.name} in it is not the lock of a run; move the file away")
        return handle

    def holds(self) -> bool:
        """The folder at this path is still the one that was taken."""
        if self.handle is None:  # what cannot be locked cannot be told apart
            return self.path.parent.is_dir()
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        """The file stays: to delete it would let a third run lock a new file while a second holds the old one."""
        if self.handle is not None:
            import fcntl

            os.ftruncate(self.handle, 0)
            # Said aloud: a worker that was forked just now may still hold a copy of the handle.
            fcntl.flock(self.handle, fcntl.LOCK_UN)
            self._forget()

    def is_current(self) -> bool:
        """Whether others that look for the file find the one that is locked: `remove` may have come before."""
        if self.handle is None:
            return True
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Leaves no file behind; whoever takes such a lock asks `is_current` afterwards."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        self.release()

    def _forget(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    @staticmethod
    def _told(owner: bytes) -> str:
        try:
            note = json.loads(owner)
            return f"process {note['pid']} on {note['host']}, started {note['started']}"
        except (ValueError, KeyError, TypeError):
            return "another process"


def settle_seed(seed: int | None, folder: Path, resuming: str | None) -> int:
    """The seed of the command, else that of the run being resumed, else a new one (said and written, so repeatable)."""
    if seed is None and resuming:
        seed = _earlier_seed(Path(folder), resuming)
    if seed is not None:
        return int(seed)
    seed = secrets.randbelow(2**31)
    print(f"seed {seed} (drawn; --seed {seed} repeats this run)", flush=True)
    return seed


def _earlier_seed(folder: Path, resuming: str) -> int | None:
    """From the checkpoint itself, which may be another run's; a run that has none yet told its settings."""
    if resuming == "latest":
        candidates = [path for _, path in reversed(manifests.listed(folder))]
    else:
        candidates = [manifests.named(folder, resuming)]
    for path in candidates:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(manifests.read(path)["identity"]["seed"])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(strict.yaml((folder / SETTINGS).read_text(encoding="utf-8"))["seed"])
    return None


def write_settings(folder: Path, config: dict) -> None:
    """Every option, without secrets; usable as --config."""
    import yaml

    here = saved.folders_here(config)
    text = f"{saved.HERE}{', '.join(here)}\n" if here else f"{saved.HERE}none\n"
    text += yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True)
    writing.write(Path(folder) / SETTINGS, text)


def redact(config: dict) -> dict:
    """Drops what is named like a secret and blots out what looks like one."""
    kept = {}
    for name, value in config.items():
        if SECRET_NAMES.search(str(name)) and not isinstance(value, bool | int | float):
            continue
        kept[name] = _plain(value)
    return kept


def _plain(value):
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return redact(value)
    return value if value is None or isinstance(value, bool | int | float) else errors.without_secrets(str(value))


def for_trackers(config: dict) -> dict:
    """Trackers take flat words and numbers only; the home folder's name is nobody's business."""
    home = os.path.expanduser("~")
    flat = {}
    for name, value in redact(config).items():
        if not isinstance(value, bool | int) and not (isinstance(value, float) and math.isfinite(value)):
            value = str(value)
            if len(home) > 1:
                value = value.replace(home, "~")
        flat[str(name)] = value
    return flat
