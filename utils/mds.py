"""MosaicML's shards (MDS), read without their package, which asks for torchvision and for an older transformers.

A shard is the number of its rows, where each of them begins and the last ends (little-endian uint32), what the columns
are (JSON), and the rows: the lengths of those columns that have no fixed one, then the columns. Only what is asked for
is read, so a pickle in another column stays bytes on a disk.
"""

import io
import json
import os
import struct
from dataclasses import dataclass

PICTURES = ("jpeg", "png", "bytes", "pil")  # encodings
TEXTS = ("str", "json")
MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}  # of raw pictures, and bytes of a pixel
LARGEST = 2**20  # bytes that describe columns


@dataclass(frozen=True)
class Header:
    rows: int
    encodings: dict[str, str]
    sizes: dict[str, int | None]  # None: each row tells


def header(opened) -> Header:
    rows, first = _numbers(opened, 0, 2)
    described = first - 4 * (rows + 2)
    if not 0 < described <= LARGEST:
        raise ValueError("it is no MDS shard")
    end = opened.seek(0, os.SEEK_END)
    if end != _numbers(opened, 4 * (rows + 1), 1)[0]:  # it is followed by the description
        raise OSError("it was cut short")
    try:
        told = json.loads(opened.read(described))
        names = told["column_names"]
        encodings, sizes = (dict(zip(names, told[f"column_{what}"], strict=True)) for what in ("encodings", "sizes"))
        known = told["version"] == 2 and told["format"] == "mds"
        known = known and all(isinstance(text, str) for text in (*names, *encodings.values()))
        known = known and all(size is None or (isinstance(size, int) and size >= 0) for size in sizes.values())
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise ValueError("it is no MDS shard of version 2")
    return Header(rows, encodings, sizes)


def places(opened, header: Header, row: int) -> dict[str, tuple[int, int]]:
    """=> column: (offset, bytes)"""
    begin, end = _numbers(opened, 4 * (row + 1), 2)
    varying = [name for name, size in header.sizes.items() if not size]
    lengths = dict(zip(varying, _numbers(opened, begin, len(varying))))
    found, offset = {}, begin + 4 * len(varying)
    for name, size in header.sizes.items():
        found[name] = offset, size or lengths[name]
        offset += found[name][1]
    if offset != end:
        raise OSError(f"row {row} does not end where it should")
    return found


def picture(encoding: str, data: bytes) -> bytes:
    """A picture's file; a raw one becomes one."""
    if encoding != "pil":
        return data
    from PIL import Image

    if len(data) <= 12:
        return b""
    width, height, letters = struct.unpack_from("<3I", data)
    mode, pixels = data[12 : 12 + letters].decode(errors="replace"), data[12 + letters :]
    if not pixels or width * height * MODES.get(mode, 0) != len(pixels):
        return b""
    stream = io.BytesIO()
    Image.frombytes(mode, (width, height), pixels).save(stream, "TIFF")
    return stream.getvalue()


def complaint(index: str) -> str | None:
    """Why shards that an index.json tells of cannot be read: they are compressed, or are not there."""
    folder = os.path.dirname(index)
    try:
        with open(index, encoding="utf-8") as file:
            shards = json.load(file)["shards"]
        told = {shard["raw_data"]["basename"]: shard["compression"] for shard in shards}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # somebody else's
    missing = [name for name in sorted(told) if not os.path.isfile(os.path.join(folder, name))]
    if not missing:
        return None
    if told[missing[0]]:
        how = f"is compressed ({told[missing[0]]}): decompress the shards there, or write them with compression=None"
        return f"'{folder}': {missing[0]} {how}"
    return f"'{folder}': {len(missing)} of the {len(told)} shards in index.json are missing, such as {missing[0]}"


def _numbers(opened, offset: int, count: int) -> tuple[int, ...]:
    opened.seek(offset)
    data = opened.read(4 * count)
    if len(data) < 4 * count:
        raise OSError("it was cut short")
    return struct.unpack(f"<{count}I", data)
