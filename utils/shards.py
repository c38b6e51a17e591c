"""Shards of a large data set: parquet and tar files whose rows are read one after the other, in bounded memory.

Tar files (WebDataset) are read by explicit decoders: pictures, plain text, JSON; anything else stays unread, so nothing
is ever unpickled. The preflight looks here too: nothing heavy is imported before a file is opened.
"""

import functools
import itertools
import json
import os
import posixpath
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from utils import captions, errors, images

LARGEST = 2**28  # bytes of a picture's file; a larger one is no photo, and would fill the memory
ROWS = 32  # taken out of a parquet file at once


@dataclass(frozen=True)
class Piece:
    """What is read from front to back: a row group, or a whole tar file (group None)."""

    file: str
    group: int | None
    first: int  # row of the file with which it begins
    rows: int


@dataclass(frozen=True)
class Row:
    name: str  # file and number, for people
    picture: bytes = b""  # as the file holds it, not decoded
    text: str | tuple[str, ...] = ""
    problem: str | None = None

    def source(self):
        """What images.open_rgb takes."""
        return self._refuse if self.problem else {"bytes": self.picture, "path": self.name}

    def _refuse(self):
        raise images.BadImage(self.name, self.problem)


# Finding


def local(folder: str | os.PathLike) -> list[str]:
    """Every shard under a folder, sorted."""
    shards = [path for path in _files(folder) if path.endswith((".parquet", ".tar"))]
    return sorted(shards, key=lambda path: Path(path).relative_to(folder).as_posix())


def _files(folder: str | os.PathLike) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def complaint(folder: str) -> str | None:
    """Why a folder cannot be streamed, from its names alone."""
    if not os.path.isdir(folder):
        return f"'{folder}' is not a folder (looked in {os.getcwd()})"
    if unread := mosaicml(folder):
        return f"'{folder}' {unread}"
    if local(folder):
        return None
    if images.list_images(folder):
        return f"'{folder}' holds pictures and no shards; leave --streaming out, or pack them into shards"
    return f"'{folder}' holds no *.parquet or *.tar"


def mosaicml(folder: str | os.PathLike) -> str | None:
    """Why a folder with MosaicML's shards, compressed ones included, is refused."""
    mds = re.compile(r".*\.mds(\.(br|bz2|gz|snappy|zstd))?")
    named = next(filter(mds.fullmatch, map(os.path.basename, _files(folder))), None)
    remedy = "convert them to tar or parquet, reading them with MosaicML's package mosaicml-streaming"
    return named and f"holds MosaicML shards ({named}), which are not read: {remedy}"


def of_hub(name: str, config: str | None, split: str, cache_dir: str | None) -> list[str]:
    """The shards of a data set of the hub, as addresses, or of a local folder of one; nothing is downloaded."""
    import datasets as library

    try:
        builder = library.load_dataset_builder(name, config, cache_dir=cache_dir)
        found = sorted(map(str, (builder.config.data_files or {}).get(split, [])))
    except Exception as problem:  # the library raises many kinds: no such name, gated, offline, malformed files
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        errors.refuse(f"--dataset_name {name} cannot be read: {reason}")
    others = [path for path in found if not path.endswith((".parquet", ".tar"))]
    if others or not found:
        what = f"has files like {posixpath.basename(others[0])}" if others else f"has no split {split}"
        errors.refuse(f"--streaming: {name} {what}; only parquet and tar shards are read row by row")
    return found


class Shards(Sequence):
    """All rows, in the order of the files."""

    def __init__(
        self,
        files: Sequence[str],
        image_column: str = "image",
        caption_column: str | None = None,
        on_bad_image: str = "error",  # "skip": of a damaged shard only what comes before the damage
    ):
        self.files, self.image_column, self.caption_column = list(files), image_column, caption_column
        with ThreadPoolExecutor(16) as pool:  # on the hub each is a question and its answer
            found = list(pool.map(self._pieces, self.files))
        self.pieces = [piece for pieces, _ in found for piece in pieces if piece.rows]
        _judge({file: (pieces, why) for file, (pieces, why) in zip(self.files, found)}, on_bad_image)
        self.starts = list(itertools.accumulate((piece.rows for piece in self.pieces), initial=0))
        if not self.pieces:
            errors.refuse(f"--streaming: the {len(self.files)} shards hold no rows")
        if os.environ.get("RANK", "0") == "0":
            print(f"--streaming: {len(self):,} pictures in {len(self.files)} shards", flush=True)
        self._reader: tuple | None = None  # (process, piece, next row, its iterator)

    def __getstate__(self) -> dict:  # on the way to a worker process, which opens files of its own
        return vars(self) | {"_reader": None}

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> Row:
        row = range(len(self))[row]
        number = bisect_right(self.starts, row) - 1
        return self.read(self.pieces[number], row - self.starts[number], 1)[0]

    def facts(self) -> list:
        """Changes when a file is added, renamed, or written anew with another size or number of rows.

        An address of the hub names the commit, so anything that is committed there changes it.
        """
        here = [file for file in self.files if "://" not in file]
        told = [[os.path.basename(file), os.path.getsize(file)] for file in here]
        told += [[file, None] for file in self.files if "://" in file]
        return [told, [piece.rows for piece in self.pieces], self.image_column, self.caption_column]

    def read(self, piece: Piece, start: int, count: int) -> list[Row]:
        """Rows of a piece. Going on where the last reading ended costs nothing twice."""
        here = (os.getpid(), piece, start)  # a worker process must not share an open file with its parent
        try:
            if self._reader is None or self._reader[:3] != here:
                self._reader = None
                rows = self._kind(piece.file)[1](piece, start)
            else:
                rows = self._reader[3]
            found = list(itertools.islice(rows, count))
            if len(found) < count:  # a tar file that was cut short ends like any other
                raise OSError("it has fewer rows than when the run began")
        except Exception as problem:  # of the file system, of parquet, of tar
            self._reader = None
            _index.cache_clear()  # the file may be mended
            raise images.BadImage(piece.file, f"cannot be read: {problem}") from None
        self._reader = (*here[:2], start + count, rows) if start + count < piece.rows else None
        return found

    def _pieces(self, file: str) -> tuple[list[Piece], str | None]:
        """=> (what can be read, why there is not more)"""
        damage: list[str] = []
        try:
            with _opened(file) as opened:
                return self._kind(file)[0](file, opened, damage), next(iter(damage), None)
        except ValueError as problem:  # pyarrow's about the content
            return [], f"cannot be read: {problem}"
        except Exception as problem:  # of the file system or the network: no reason to train on less
            return errors.refuse(f"--streaming: '{file}' cannot be read: {problem}", errors.DATA)

    def _kind(self, file: str) -> tuple[Callable, Callable]:
        """How its pieces are found, and how one is read."""
        return (self._whole_tar, self._tar) if file.endswith(".tar") else (self._row_groups, self._parquet)

    def _check(self, file: str, names: Sequence[str]) -> None:
        for option, column in (("--image_column", self.image_column), ("--caption_column", self._texts)):
            if column not in names:
                errors.refuse(f"{option} {column}: '{file}' has only the columns {', '.join(names)}")

    # Parquet

    def _row_groups(self, file: str, opened, damage: list) -> list[Piece]:
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(opened)
        self._check(file, table.schema_arrow.names)
        counts = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
        firsts = itertools.accumulate(counts, initial=0)
        return [Piece(file, group, first, rows) for group, (first, rows) in enumerate(zip(firsts, counts))]

    @property
    def _texts(self) -> str:
        return self.caption_column or "text"

    def _parquet(self, piece: Piece, start: int) -> Iterator[Row]:
        import pyarrow.parquet

        columns, done = [self.image_column, self._texts], 0
        with _opened(piece.file) as opened:
            # Without a buffer of its own it would read the whole row group at once.
            table = pyarrow.parquet.ParquetFile(opened, buffer_size=2**20, pre_buffer=False)
            how = {"row_groups": [piece.group], "columns": columns, "use_threads": False}
            for batch in table.iter_batches(ROWS, **how):
                if done + batch.num_rows > start:
                    pictures, texts = (batch.column(name).to_pylist() for name in columns)
                    for row in range(max(0, start - done), batch.num_rows):
                        yield _row(piece, piece.first + done + row, pictures[row], texts[row])
                done += batch.num_rows

    # Tar

    def _whole_tar(self, file: str, opened, damage: list) -> list[Piece]:
        return [Piece(file, None, 0, sum(1 for _ in _groups(opened, damage)))]

    def _tar(self, piece: Piece, start: int) -> Iterator[Row]:
        with _opened(piece.file) as opened:
            for row, members in enumerate(itertools.islice(_index(piece.file), start, None), start=start):
                picture = _member(opened, members["picture"], LARGEST)
                text = None
                if "text" in members:
                    text = _text(_member(opened, members["text"], captions.LARGEST), str)
                elif "json" in members:
                    text = _text(_member(opened, members["json"], captions.LARGEST), self._described)
                yield _row(piece, row, picture, text)

    def _described(self, text: str):
        row = json.loads(text)
        names = [self.caption_column] if self.caption_column else captions.COLUMNS
        return next((row[name] for name in names if isinstance(row, dict) and row.get(name)), None)


def _row(piece: Piece, row: int, picture, text) -> Row:
    """The names that rows give to pictures are not looked at: a stranger's may name any file of yours."""
    name = f"{piece.file}, row {row}"
    data = picture.get("bytes") if isinstance(picture, dict) else picture
    text = tuple(text) if isinstance(text, list) else text
    if not text or not all(isinstance(one, str) and one for one in (text if isinstance(text, tuple) else [text])):
        return Row(name, problem="has no caption")
    if any("\0" in one for one in (text if isinstance(text, tuple) else [text])):
        return Row(name, problem=f"has a caption that {captions.NUL}")
    if not isinstance(data, bytes) or not data:
        return Row(name, problem="holds no picture")
    return Row(name, data, text)


def _opened(file: str):
    if "://" not in file:
        return open(file, "rb")
    import fsspec

    return fsspec.open(file, "rb").open()


def _judge(found: dict[str, tuple[list[Piece], str | None]], on_bad_image: str) -> None:
    """Damaged shards: an error, or left out from the damage on and named."""
    damaged = {file: (sum(piece.rows for piece in pieces), why) for file, (pieces, why) in found.items() if why}
    too_many = len(damaged) > images.MOST_BAD * len(found)
    if damaged and (on_bad_image == "error" or too_many):
        told = [f"--streaming: '{file}' {why}" for file, (_, why) in damaged.items()]
        many = f"{len(damaged)} of {len(found)} shards are damaged"
        remedy = "too many to leave out" if too_many else "--on_bad_image skip trains on the pictures before the damage"
        errors.refuse([*told, f"--streaming: {many}: copy or download them again; {remedy}"], errors.DATA, once=True)
    for file, (rows, why) in damaged.items():
        errors.warn(f"'{file}' {why}: {rows} pictures before the damage are used, the rest is left out")


def _groups(opened, damage: list[str]) -> Iterator[dict[str, tuple[int, int]]]:
    """WebDataset's rows: members next to each other with one name up to its first dot; => what: (offset, bytes).

    The row in which a shard is damaged is not among them; `damage` then holds the reason.
    """
    import tarfile

    key, members = None, {}
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                tar.members = []  # it would keep them all
                folder, name = posixpath.split(member.name)
                stem, _, ending = name.partition(".")
                if (folder, stem) != key:
                    if "picture" in members:
                        yield members
                    key, members = (folder, stem), {}
                ending = f".{ending.lower()}"
                if not member.isreg():
                    continue
                if ending in images.SUFFIXES:
                    members.setdefault("picture", (member.offset_data, member.size))
                elif ending in (".txt", ".caption", ".json"):
                    members.setdefault("json" if ending == ".json" else "text", (member.offset_data, member.size))
            reason = _end_of_tar(opened, tar.offset)
    except tarfile.TarError as problem:  # an empty file, something else, or an end within a member
        reason = f"is cut short or is not a tar file ({problem})"
    if reason:
        damage.append(reason)
    elif "picture" in members:
        yield members


def _end_of_tar(opened, offset: int) -> str | None:
    """Why a tar file has not ended where tarfile stopped reading, as it also does at a bad header."""
    opened.seek(offset)
    block = opened.read(512)
    if len(block) < 512:
        return f"is cut short at byte {offset + len(block):,}: it lacks the mark at the end of a tar file"
    if any(block):
        return f"has a damaged header at byte {offset:,}"
    while block := opened.read(2**20):
        if any(block):
            return f"holds more after its end at byte {offset:,}: tar files that were joined are not read"
    return None


@functools.lru_cache(maxsize=2)
def _index(file: str) -> list[dict[str, tuple[int, int]]]:
    with _opened(file) as opened:
        return list(_groups(opened, []))


def _member(opened, place: tuple[int, int], largest: int) -> bytes:
    offset, size = place
    if size > largest:
        return b""
    opened.seek(offset)
    data = opened.read(size)
    if len(data) < size:
        raise OSError("it was cut short")
    return data


def _text(data: bytes, read: Callable):
    try:
        return read(data.decode("utf-8-sig").strip())
    except (ValueError, RecursionError):
        return None
