"""Whether a folder is whole: a manifest, written last, lists every file with its size and sha256."""

import errno
import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FORMAT = 1
MANIFEST = "manifest.json"
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}  # answers of mounts that know no fsync


def write(folder: Path, step: int, identity: dict) -> None:
    """Returns when the folder, its files and the manifest are on the disk and not only in the kernel's memory."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter
        digests = list(pool.map(_sync_and_digest, files))
    manifest = {
        "format": FORMAT,
        "step": step,
        "saved": time.strftime("%Y-%m-%d %H:%M:%S"),
        "identity": identity,
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(files, digests)
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [folder / MANIFEST, *{path.parent for path in files}, folder]:
        sync(path)


def listed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), oldest first; `checkpoint-10.bak` and `checkpoint-tmp` are somebody else's."""
    if not folder.is_dir():
        return []
    matches = ((re.fullmatch(r"checkpoint-([0-9]+)", path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def named(folder: Path, which: str) -> Path:
    """A path is that path; only a bare name is looked for in the output folder first."""
    inside = folder / which
    return inside if Path(which).name == str(Path(which)) and inside.exists() else Path(which).expanduser()


def read(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def fault(folder: Path, verify: str) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    if not folder.is_dir():
        return "is not a folder"
    if not (folder / MANIFEST).is_file():  # a pipe would be waited for
        return f"{MANIFEST} is missing"
    try:
        manifest = read(folder)
        if manifest["format"] > FORMAT:
            return f"was written by a newer version (format {manifest['format']}, this one reads {FORMAT})"
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        step, _ = int(manifest["step"]), dict(manifest["identity"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    if step < 0 or not files:
        return f"{MANIFEST} names no {'file' if step >= 0 else 'step'}"
    named = re.fullmatch(r"checkpoint-([0-9]+)", folder.name)
    if named and int(named[1]) != step:  # the newest is chosen by its name
        return f"holds step {step}: rename it to checkpoint-{step}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{MANIFEST} names a file outside ({name})"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if verify == "full" and digest(path) != sha256:
            return f"{name} has changed since it was saved"
    return None


def digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def _sync_and_digest(path: Path) -> str:
    sync(path)
    return digest(path)


def sync(path: Path) -> None:
    """To the disk, not only to the kernel. Some mounts (FUSE, Colab's Drive) cannot; a real failure is one."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)
