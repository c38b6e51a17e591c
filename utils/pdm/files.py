"""Files of the bank: one for each photo, fp16, named after everything that went into it; whole or absent."""

import json
import os
import struct
import tempfile
from pathlib import Path

from utils import precomputed, saved


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


class Writer:
    """A safetensors file filled row by row, since one photo's rows need not fit into memory; whole or absent."""

    def __init__(self, path: Path, identity: dict, shape: tuple[int, int, int]):
        import numpy

        self.path, size = path, 2 * shape[0] * shape[1] * shape[2]
        entry = {"dtype": "F16", "shape": list(shape), "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {"identity": json.dumps(identity)}, "queries": entry}).encode()
        header += b" " * (-len(header) % 8)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        self.temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)
        self.rows = numpy.memmap(self.temporary, numpy.float16, "r+", 8 + len(header), shape)

    def finish(self) -> None:
        self.rows.flush()
        self.rows = None
        saved.shared(self.temporary)
        os.replace(self.temporary, self.path)

    def drop(self) -> None:
        self.rows = None
        self.temporary.unlink(missing_ok=True)
