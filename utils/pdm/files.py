"""Files of the bank: one for each photo, fp16, named after everything that went into it; whole or absent."""

import errno
import json
import os
import struct
import tempfile
from pathlib import Path

import torch

from utils import precomputed, saved, sums

UNKNOWN = "0" * 64  # until all rows are there


def name_of(identity: dict) -> str:
    return f"pdm-{precomputed.digest(identity)}.safetensors"


def read_identity(path: Path) -> dict | None:
    """What a file says it holds; None where it is cut short or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stored:
            identity = json.loads((stored.metadata() or {})["identity"])
            whole = list(stored.keys()) == ["queries"] and isinstance(identity, dict)
            shape = stored.get_slice("queries").get_shape() if whole else [0]
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    return identity if whole and len(shape) == 3 and shape[0] == identity.get("steps") else None


def is_damaged(path: Path) -> bool:
    """Whether values are not as they were written or, without a checksum, cannot be the queries of a network."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stored:
            recorded, rows = (stored.metadata() or {}).get("sha256"), stored.get_tensor("queries")
    except (SafetensorError, OSError):
        return True
    return not bool(rows.flatten(1).any(1).all()) or sums.Sum([("queries", rows)]).differs(recorded)


def _allocate(handle: int, size: int) -> None:
    try:
        os.posix_fallocate(handle, 0, size)
    except (AttributeError, OSError) as problem:
        if getattr(problem, "errno", errno.EOPNOTSUPP) not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(handle, size)  # not every system and file system can


class Writer:
    """A safetensors file filled row by row, since one photo's rows need not fit into memory; whole or absent."""

    def __init__(self, path: Path, identity: dict, shape: tuple[int, int, int]):
        import numpy

        self.path, size = path, 2 * shape[0] * shape[1] * shape[2]
        entry = {"dtype": "F16", "shape": list(shape), "data_offsets": [0, size]}
        told = {"identity": json.dumps(identity), "sha256": UNKNOWN}
        header = json.dumps({"__metadata__": told, "queries": entry}).encode()
        header += b" " * (-len(header) % 8)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        self.temporary, self.place = Path(name), 8 + header.index(UNKNOWN.encode())
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                file.flush()
                # Taken from the disk now: a page of a mapped file that finds none later kills the process.
                _allocate(file.fileno(), 8 + len(header) + size)
            self.rows = numpy.memmap(self.temporary, numpy.float16, "r+", 8 + len(header), shape)
        except BaseException:
            self.temporary.unlink(missing_ok=True)
            raise

    def finish(self) -> None:
        self.rows.flush()
        found = sums.Sum([("queries", torch.from_numpy(self.rows))]).hex()
        self.rows = None
        with self.temporary.open("r+b") as file:
            file.seek(self.place)
            file.write(found.encode())
        saved.shared(self.temporary)
        os.replace(self.temporary, self.path)

    def drop(self) -> None:
        self.rows = None
        self.temporary.unlink(missing_ok=True)
