"""What each photo of a folder shows, in its owner's words: metadata.jsonl, .csv or .parquet, NAME.txt or NAME.caption.

A folder may come from a stranger, so text is only ever read from inside it, and every mistake in it is reported
with its line, all at once. Nothing heavy is imported before a parquet file is there: the preflight reads captions.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath

from utils import strict

COLUMNS = ("text", "caption", "prompt")  # the names in use for a caption, tried in this order
LARGEST = 2**20  # bytes; a longer NAME.txt is no caption
NUL = "holds NUL characters, as UTF-16 text read as UTF-8 does; write it as UTF-8"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # marks with which such text begins
FORMS = (
    "NFC",
    "NFD",
)  # spellings of accented letters in names of files: composed (Linux, Windows), taken apart (macOS)
PLACEHOLDERS = {"{identifier}": "identifier", "{class}": "class_noun"}  # in captions and prompts => option


def read(
    folder: str | os.PathLike,
    pictures: Sequence[Path],  # as images.list_images(folder) finds them
    prompt: str | None = None,  # for pictures that nothing describes
    column: str | None = None,  # of metadata.*; None: the first of COLUMNS that a row has
    **words: str | None,  # identifier, class_noun: what placeholders stand for
) -> tuple[list[str | tuple[str, ...]], list[str]]:
    """=> (a caption, or several to choose from, for each picture; complaints). Use no caption while one complains."""
    folder = Path(folder)
    complaints: list[str] = []
    described = _tables(folder, pictures, column, complaints)
    found, whole = [], not complaints  # what is wrong with a table would be said again of each of its pictures
    for picture in pictures:
        caption = described.get(_key(picture))
        caption = caption or _beside(folder, picture, complaints) or prompt
        if not caption and whole:
            name = picture.with_suffix(".txt").name
            complaints.append(f"'{picture}' has no caption, and no prompt stands in: write one into {name} beside it")
        found.append(caption or "")
    complaints += unfilled(zip((f"'{picture}'" for picture in pictures), found), **words)
    return [fill(caption, **words) for caption in found], complaints


def fill(text, identifier: str | None = None, class_noun: str | None = None):
    """{identifier} and {class} in a text, or in each of several, => the words they stand for, where these are given."""
    if not isinstance(text, str):
        return tuple(fill(one, identifier, class_noun) for one in text)
    for placeholder, word in zip(PLACEHOLDERS, (identifier, class_noun)):
        text = text.replace(placeholder, word or placeholder)
    return text


def unfilled(named: Iterable[tuple[str, str | tuple[str, ...]]], **words: str | None) -> list[str]:
    """(whose text it is, text or texts) => one complaint for each placeholder that no option gives a word for."""
    named, complaints = list(named), []
    for placeholder, option in PLACEHOLDERS.items():
        if not words.get(option):
            those = [
                name for name, text in named if placeholder in (text if isinstance(text, str) else "\n".join(text))
            ]
            more = f" and {len(those) - 1} more" if len(those) > 1 else ""
            complaints += [f"the text of {those[0]}{more} holds {placeholder}: give --{option}"] if those else []
    return complaints


def replaced(text: str, words: Mapping[str, str]) -> str:
    """The text with whole words in place of others: {"TOK": "<s0><s1>"} leaves TOKEN as it is."""
    if not words:
        return text
    return re.sub(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)", lambda found: words[found[0]], text)


def contained(path: Path, folder: Path) -> bool:
    """Whether `path`, links followed, lies in `folder`; the hub's cache links a snapshot's files to its blobs."""
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.is_relative_to(blobs)


def _key(path: Path) -> str:
    """macOS stores é as two characters, a metadata file written elsewhere as one."""
    return unicodedata.normalize("NFC", os.path.normpath(path))


def _beside(folder: Path, picture: Path, complaints: list[str]) -> str | tuple[str, ...] | None:
    """NAME.txt or NAME.caption; each of its lines is one caption of the picture."""
    for path in _names_beside(picture):
        if not os.path.isfile(path):  # Path's own raises where the name is longer than a file may have
            continue
        text = _text(folder, path, complaints)
        lines = tuple(line.strip() for line in (text or "").splitlines() if line.strip())
        if text is not None and not lines:
            complaints.append(f"'{path}' is empty: write a caption into it, or delete it to use the prompt")
        return lines[0] if len(lines) == 1 else lines or None
    return None


def _names_beside(picture: Path) -> Iterator[Path]:
    """In the spelling of the picture, then in the others: é is one character or two, and copies change it."""
    for suffix in (".txt", ".caption"):
        path = picture.with_suffix(suffix)
        yield from dict.fromkeys([path, *(path.with_name(unicodedata.normalize(form, path.name)) for form in FORMS)])


def _text(folder: Path, path: Path, complaints: list[str], largest: int = LARGEST) -> str | None:
    if not contained(path, folder):
        complaints.append(f"'{path}' links to a file outside of '{folder}'")
        return None
    try:
        if path.stat().st_size > largest:
            complaints.append(f"'{path}' has {path.stat().st_size:,} bytes: too long for a caption")
            return None
        data = path.read_bytes()
        if not data.startswith(UTF_16) and b"\0" in data:  # UTF-16 without a mark passes for UTF-8 full of them
            line = data[: data.index(b"\0")].count(b"\n") + 1
            complaints.append(f"{path}:{line}: holds NUL characters, as UTF-16 text does; save it as UTF-8")
            return None
        return data.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        complaints.append(f"{path}:{line}: is not UTF-8 text; save it as UTF-8")
    except OSError as error:
        complaints.append(f"'{path}' cannot be read: {error}")
    return None


def _tables(folder: Path, pictures: Sequence[Path], column: str | None, complaints: list[str]) -> dict:
    """{picture: caption} of every metadata file; file names in it are relative to the folder it lies in."""
    known = {_key(picture) for picture in pictures}
    captions: dict[str, str | tuple[str, ...]] = {}
    for parent in sorted({folder, *(picture.parent for picture in pictures)}):
        for path in (parent / "metadata.jsonl", parent / "metadata.csv", parent / "metadata.parquet"):
            if not path.is_file():
                continue
            for place, row in _rows(folder, path, column, complaints):
                name, caption, complaint = _row(row, column)
                if not complaint:
                    complaint = _misplaced(parent, name, folder, known)
                if not complaint and _key(parent / name) in captions:
                    complaint = f"'{name}' has a caption already"
                if complaint:
                    complaints.append(f"{place}: {complaint}")
                else:
                    captions[_key(parent / name)] = caption
    return captions


def _rows(folder: Path, path: Path, column: str | None, complaints: list[str]) -> Iterator[tuple[str, object]]:
    """=> (where it stands, row)"""
    if path.suffix == ".parquet":
        yield from _parquet_rows(folder, path, column, complaints)
        return
    text = _text(folder, path, complaints, largest=2**30) or ""
    for line, row in (_json_rows if path.suffix == ".jsonl" else _csv_rows)(text):
        yield f"{path}:{line}", row


def _parquet_rows(folder: Path, path: Path, column: str | None, complaints: list[str]) -> Iterator[tuple[str, dict]]:
    """Its names and captions alone; of the other columns only what they are called. Rows are counted from 0."""
    if not contained(path, folder):
        complaints.append(f"'{path}' links to a file outside of '{folder}'")
        return
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            wanted = [name for name in ("file_name", column, *COLUMNS) if name in names]
            for batch in table.iter_batches(32, columns=list(dict.fromkeys(wanted)), use_threads=False):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", dict.fromkeys(names) | row
                    number += 1
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as problem:
        complaints.append(f"'{path}' cannot be read: {problem}")


def _json_rows(text: str) -> Iterator[tuple[int, object]]:
    for line, row in enumerate(text.split("\n"), start=1):  # splitlines() would cut inside of strings, at U+2028
        if row.strip():
            try:
                yield line, strict.parsed_json(row)
            except ValueError as error:
                yield line, f"is not valid JSON: {error}"


def _csv_rows(text: str) -> Iterator[tuple[int, object]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        yield rows.line_num, f"is not valid CSV: {error}"


def _row(row, column: str | None) -> tuple[str, str | tuple[str, ...], str | None]:
    """=> (file name, caption, complaint)"""
    if not isinstance(row, dict):
        return "", "", row if isinstance(row, str) and row.startswith("is not valid") else "is not a JSON object"
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        return "", "", "has no file_name"
    column = column or next((one for one in COLUMNS if one in row), None)
    if column not in row:
        wanted = f"'{column}'" if column else " or ".join(f"'{one}'" for one in COLUMNS)
        return (
            name,
            "",
            f"has no column {wanted}, only: {', '.join(map(str, row))}; --caption_column NAME takes another",
        )
    texts = row[column] if isinstance(row[column], list) else [row[column]]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        return (
            name,
            "",
            f"its '{column}' must be text or a list of texts, and is {json.dumps(row[column], default=str)}",
        )
    if any("\0" in text for text in texts):
        return name, "", f"its '{column}' {NUL}"
    if problem := next(filter(None, map(strict.unwritable, texts)), None):
        return name, "", f"its '{column}' {problem}"
    if any(len(text) > LARGEST for text in texts):
        return name, "", f"its '{column}' is longer than {LARGEST:,} characters: too long for a caption"
    texts = tuple(text.strip() for text in texts)
    return name, texts[0] if len(texts) == 1 else texts, None


def _misplaced(parent: Path, name: str, folder: Path, known: set[str]) -> str | None:
    """Why `name` may not be used. Nothing outside of the folder is touched, not even to see whether it exists."""
    inside = os.path.relpath(os.path.normpath(parent / name), folder).split(os.sep)[0] != os.pardir
    if "://" in name or "\0" in name or os.path.isabs(name) or PureWindowsPath(name).drive or not inside:
        return f"file_name {name!r} leads out of the folder; only files inside of it are used"
    if not contained(parent / name, folder):
        return f"file_name {name!r} is a link to a file outside of the folder"
    if _key(parent / name) not in known:
        exists = os.path.exists(parent / name)
        return f"file_name {name!r} " + ("is no picture" if exists else "does not exist")
    return None
