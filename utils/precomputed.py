"""Latents and text embeddings of a data set, computed once by `python -m utils.cache` and read by many runs.

A folder of blocks, each written whole or not at all, and named after everything that went into it: what encoded it,
how pictures were cut, and the content of each. So machines that know nothing of each other may fill one folder, a block
that is there need not be computed again, and one that does not belong is told by its name. Nothing is unpickled.
"""

import functools
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils import errors

MANIFEST = "manifest.json"
FORMAT = 1
BLOCK = 256  # pictures or captions in a block, more or less: a tenth of a gigabyte for the largest latents
OPEN = 64  # files kept open
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")
# Field of the manifest => what to do about it; pictures may be shown unmirrored although mirrored ones are there.
REMEDIES = {
    "format": "compute it anew",
    "vae": "another VAE made it: give that one, or compute another folder",
    "text_encoders": "another text encoder or tokenizer made it: give that model, or compute another folder",
    "resolution": "give the same --resolution to both",
    "resolution_buckets": "give the same --resolution_buckets to both",
    "crop": "compute it anew",
    "interpolation": "give the same --image_interpolation_mode to both",
    "alpha_background": "give the same --alpha_background to both",
    "mirrored": "compute it with --random_flip, or train without",
}


def digest(*parts) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def identity(
    encoders: dict[str, str],  # of `encoders`
    resolution: int,
    resolution_buckets: str,
    interpolation: str,
    mirrored: bool,
    alpha_background: str,
    dtype: str = "float32",  # in which it is stored
    precision: str = "float32",  # in which it was computed
) -> dict:
    """What all blocks of a folder have in common."""
    return {
        "format": FORMAT,
        **encoders,
        "resolution": resolution,
        "resolution_buckets": resolution_buckets,
        "crop": "centre",
        "interpolation": interpolation,
        "mirrored": mirrored,
        "alpha_background": alpha_background,
        "dtype": dtype,
        "precision": precision,
    }


def encoders(family) -> dict[str, str]:
    """By the content of their files, since the same folder may have another name on another machine."""
    text = [fingerprint(family.path, name, family.revision, family.variant) for name in family.encoders]
    source, revision = family.tokenizer_source or family.path, None if family.tokenizer_source else family.revision
    text += [fingerprint(source, name, revision, None) for name in family.tokenizers]
    text += [f"{family.clip_skip} layers left out"] if family.clip_skip else []
    own = (
        (family.vae_source, "vae", None, None)
        if family.vae_source
        else (family.path, "vae", family.revision, family.variant)
    )
    vae = fingerprint(*own) + (" tiled" if family.vae_tiling else "")
    return {"vae": vae, "text_encoders": digest(*text)}


def networks(family) -> dict[str, str]:
    """And the UNet, for what is computed with all of them."""
    return encoders(family) | {"unet": fingerprint(family.path, "unet", family.revision, family.variant)}


@functools.cache
def fingerprint(source: str, part: str, revision: str | None, variant: str | None) -> str:
    folder = Path(source)
    if not folder.is_dir():  # a model of the hub, which was loaded a moment ago
        folder = _snapshot(source, revision)
    folder = folder / part if (folder / part).is_dir() else folder
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path for path in files if (match := WEIGHTS.fullmatch(path.name)) and match["variant"] == variant]
    weights = weights or [path for path in files if path.suffix in (".safetensors", ".bin")]
    told = []
    for path in [*(path for path in files if path.suffix in (".json", ".txt", ".model")), *weights]:
        content = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                content.update(chunk)
        told.append([path.name, content.hexdigest()])
    return digest(told)


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    for file in ("model_index.json", "config.json", "vae/config.json", "tokenizer_config.json", "vocab.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parents[file.count("/")]
    return errors.refuse(f"{name} is not in the hub's cache, although it was loaded")


# Writing


def strangers(folder: Path, wanted: dict) -> list[str]:
    """Why what is to be written does not belong into a folder, as far as `wanted` fields of its manifest tell."""
    if not (folder / MANIFEST).exists():
        return [f"--output_dir {folder} holds blocks and no {MANIFEST}: name another folder"] if blocks(folder) else []
    try:
        differing = _differing(read_manifest(folder), wanted, reading=False)
    except ValueError as problem:
        return [f"--output_dir: {problem}"]
    table = _table(differing)
    return [f"--output_dir {folder} holds other latents:", *table, "name another folder"] if table else []


def write_manifest(folder: Path, identity: dict) -> None:
    """Every process writes the same; a folder of something else is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    if complaints := strangers(folder, identity):
        errors.refuse(complaints)
    if not (folder / MANIFEST).exists():
        _write(folder / MANIFEST, (json.dumps(identity, indent=1, sort_keys=True) + "\n").encode(), first=True)
        if complaints := strangers(folder, identity):  # a process with other options was faster
            errors.refuse(complaints)


def block_name(kind: str, identity: dict, rows: Sequence) -> str:
    return f"{kind}-{digest(identity, rows)}.safetensors"


def write_block(folder: Path, kind: str, identity: dict, rows: Sequence, tensors: dict) -> None:
    """`tensors` have a row for each of `rows`: [key, mirrored, [width, height]] of pictures, or captions."""
    from safetensors.torch import save

    from utils import sums

    told = {"rows": rows, "sha256": sums.Sum(sorted(tensors.items())).hex()}
    # One entry: several would be written in an order that changes from run to run.
    data = save({name: value.contiguous() for name, value in tensors.items()}, {"rows": json.dumps(told)})
    _write(folder / block_name(kind, identity, rows), data)


def _write(path: Path, data: bytes, first: bool = False) -> None:
    """Whole or not at all; nothing is left where the disk is full. `first`: a file that is there stays."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    temporary.unlink(missing_ok=True)  # it might be a link that leads anywhere
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _put(temporary, path, first)
    except FileNotFoundError:  # another process wrote the same just now, and took ours for a leftover
        if not path.exists():
            raise
    except OSError as problem:
        reason = problem.strerror or problem
        remedy = "free some space; the same command resumes and keeps what is there"
        errors.refuse(f"'{path}' cannot be written ({reason}): {remedy}", errors.FAILED)
    finally:
        temporary.unlink(missing_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):  # of a process that was killed here
        left.unlink(missing_ok=True)


def _put(temporary: Path, path: Path, first: bool) -> None:
    if first:
        try:
            os.link(temporary, path)  # which never replaces
            return
        except FileExistsError:
            return
        except OSError:  # some file systems know no links
            pass
    temporary.rename(path)


def is_whole(path: Path) -> bool:
    """There, and every value as it was written."""
    try:
        verify(path)
    except (OSError, ValueError):
        return False
    return True


# Reading


def blocks(folder: Path) -> list[Path]:
    return sorted([*folder.glob("latents-*.safetensors"), *folder.glob("texts-*.safetensors")])


def rows_of(path: Path) -> list:
    return told_of(path)[0]


def verify(path: Path) -> bool:
    """Compares every value with the block's checksum; False where an older version wrote none. ValueError: damaged."""
    from safetensors import SafetensorError, safe_open

    from utils import sums

    recorded = told_of(path)[1]
    try:
        with safe_open(str(path), framework="pt") as stored:
            found, impossible = sums.Sum(), False
            for name in sorted(stored.keys()):
                value = stored.get_tensor(name)
                found.add(name, value)
                rows = value.reshape(len(value), -1)
                # No posterior is certain, and no embedding is nothing: zeros are what a lost page of a disk leaves.
                impossible |= not bool(rows.all() if name == "std" else rows.any(1).all())
    except SafetensorError:
        impossible = True
    if impossible or found.differs(recorded):
        raise ValueError(f"{_damaged(path)}")
    return recorded is not None


def _damaged(path: Path) -> str:
    return f"'{path}' is damaged: python -m utils.cache with the same options computes it again"


def told_of(path: Path) -> tuple[list, str | None]:
    """(what a block holds, the checksum of its values), from its header; ValueError where it is cut short or something
    else. Older versions wrote no checksum."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, 100_000_000)))
        told = json.loads(header.pop("__metadata__")["rows"])
        rows, recorded = (told["rows"], str(told["sha256"])) if isinstance(told, dict) else (told, None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        whole = path.stat().st_size == 8 + length + max(ends)
    except (struct.error, ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(_damaged(path))
    return rows, recorded


def read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"'{folder / MANIFEST}' cannot be read: {problem}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"'{folder / MANIFEST}' is no manifest")
    return manifest


def complaints(folder: str | None, **wanted) -> list[str]:
    """What is wrong with a folder, as far as `wanted` fields of its manifest tell; None is not known yet."""
    if not folder:
        return []
    if not Path(folder, MANIFEST).is_file():
        return [f"--precomputed_dir {folder} holds no {MANIFEST}: fill it with python -m utils.cache"]
    try:
        there = read_manifest(Path(folder))
    except ValueError as problem:
        return [f"--precomputed_dir: {problem}"]
    wanted = {name: value for name, value in wanted.items() if value is not None}
    return [f"--precomputed_dir {folder}: {line}" for line in _table(_differing(there, wanted))]


def _differing(there: dict, wanted: dict, reading: bool = True) -> dict:
    found = {name: (there.get(name), value) for name, value in wanted.items() if there.get(name) != value}
    if reading and found.get("mirrored") == (True, False):
        del found["mirrored"]
    return found


def _table(differing: dict) -> list[str]:
    remedies = {name: f"; {REMEDIES[name]}" if name in REMEDIES else "" for name in differing}
    return [f"its {name} is {old}, not {new}{remedies[name]}" for name, (old, new) in differing.items()]


class Store:
    """The blocks of a folder, memory-mapped: a row is read when it is asked for. `get` is that of cache.Latents."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            self.identity = read_manifest(self.folder)
            self.rows: dict[tuple, tuple[str, int]] = {}
            texts: dict[str, tuple[str, int]] = {}
            found = blocks(self.folder)
            with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
                summed = list(pool.map(verify, found))
            for path in found:
                rows = rows_of(path)
                kind = path.name.partition("-")[0]
                if path.name != block_name(kind, self.identity, rows):
                    raise ValueError(f"'{path}' does not belong to the {MANIFEST} beside it: remove it")
                for number, row in enumerate(rows):
                    if kind == "texts":
                        texts[row] = path.name, number
                    else:
                        self.rows[row[0], row[1], tuple(row[2])] = path.name, number
        except (OSError, ValueError) as problem:
            errors.refuse(f"--precomputed_dir: {problem}")
        if unsummed := summed.count(False):
            errors.warn(
                f"--precomputed_dir: {unsummed} of {len(summed)} blocks in {self.folder} were written without checksums"
                " by an older version; only impossible values are noticed in them"
            )
        self.texts = Texts(self, texts)
        # Like lru_cache on a method, but for this folder only.
        self.opened = functools.lru_cache(OPEN)(self._open)

    def _open(self, name: str):
        from safetensors import safe_open

        return safe_open(str(self.folder / name), framework="pt")

    def read(self, place: tuple[str, int], names: Sequence[str] | None = None) -> dict:
        opened, row = self.opened(place[0]), place[1]
        return {name: opened.get_slice(name)[row : row + 1][0] for name in names or sorted(opened.keys())}

    def get(self, key: str, flip: bool, shape: tuple[int, int]):
        found = self.read(self.rows[key, bool(flip), shape], ("mean", "std"))
        return found["mean"].float(), found["std"].float()

    @property
    def kinds(self) -> dict[str, str]:
        return {"dtype": self.identity["dtype"], "precision": self.identity["precision"]}

    @property
    def rounding(self) -> list[str]:
        """Precisions in which it was computed and is stored; [] where both are full."""
        return list(self.kinds.values()) if set(self.kinds.values()) != {"float32"} else []

    def differing(self, **wanted) -> list[str]:
        return [f"--precomputed_dir {self.folder}: {line}" for line in _table(_differing(self.identity, wanted))]


class Texts(Mapping):
    """Caption => {"text": (tokens, c), ...}."""

    def __init__(self, store: Store, places: dict[str, tuple[str, int]]):
        self.store, self.places = store, places

    def __getitem__(self, text: str) -> dict:
        return self.store.read(self.places[text])

    def __contains__(self, text) -> bool:  # Mapping's own would read the row
        return text in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
