"""What is taught: one subject named by the options, or several in a JSON file, each with its photos, prompt and class.

Standard library only: options are checked before anything heavy is imported.
"""

import difflib
import json
import os
from dataclasses import dataclass

from utils import errors, strict

PATHS = ("instance_data_dir", "class_data_dir")
TEXTS = ("instance_prompt", "class_prompt")
COUNTS = ("repeats", "num_class_images")
KEYS = ("instance_prompt", "class_prompt", "instance_data_dir", "class_data_dir", *COUNTS)


@dataclass(frozen=True)
class Concept:
    instance_data_dir: str | None = None  # None: a dataset holds the photos
    instance_prompt: str | None = None
    class_data_dir: str | None = None
    class_prompt: str | None = None
    repeats: int = 1  # how often its photos count in an epoch, times --repeats
    num_class_images: int = 100
    number: int = 0  # in the file, from 1 on; 0: the options name it
    option: str = "instance_data_dir"  # that names its folder

    def named(self, field: str) -> str:
        """How a sentence to a person calls one of the fields."""
        if self.number:
            return f"--concepts_list, concept {self.number}: {field}"
        return f"--{self.option if field == 'instance_data_dir' else field}"


def read(source: str | list) -> tuple[list[dict], list[str]]:
    """A JSON file's path, or its content as a saved configuration repeats it => (concepts, complaints).

    Relative paths in a file are meant from where the file lies.
    """
    where, folder = "--concepts_list", ""
    if isinstance(source, str):
        where, folder = f"--concepts_list {source}", os.path.dirname(source)
        try:
            source = strict.parsed_json(errors.readable(source).decode("utf-8"))
        except (OSError, ValueError) as problem:  # no UTF-8 is a ValueError too
            return [], [f"{where}: {getattr(problem, 'strerror', None) or f'is not valid JSON: {problem}'}"]
    if not isinstance(source, list) or not source or not all(isinstance(row, dict) for row in source):
        return [], [f"{where} must hold a list of one or more objects with the keys {', '.join(KEYS)}"]
    complaints: list[str] = []
    for number, row in enumerate(source, start=1):
        complaints += [f"{where}, concept {number}: {complaint}" for complaint in _complaints(row)]
    if complaints:
        return [], complaints
    rows = [{key: row[key] for key in KEYS if row.get(key) is not None} for row in source]
    for row in rows:
        row |= {key: os.path.join(folder, os.path.expanduser(row[key])) for key in PATHS if key in row}
    return rows, []


def _complaints(row: dict) -> list[str]:
    found = []
    for key, value in row.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            known = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(KEYS)}"
            found.append(f"'{key}' is no key of a concept{known}")
        elif value is None:
            continue
        elif key in COUNTS and (type(value) is not int or value < 1):
            found.append(f"{key} is {json.dumps(value)}: it must be a whole number of at least 1")
        elif key not in COUNTS and not (isinstance(value, str) and value.strip()):
            found.append(f"{key} is {json.dumps(value)}: it must be a text that is not empty")
        elif key not in COUNTS and (problem := strict.unwritable(value)):
            found.append(f"{key} is {json.dumps(value)}: it {problem}")
    return found


def settle(rows: list[dict] | None, options: dict) -> list[Concept]:
    """All that is taught: the concepts of a file, or the one that ordinary options name."""
    counts = {"num_class_images": options.get("num_class_images") or 100}
    if rows:
        return [Concept(**(counts | row), number=number) for number, row in enumerate(rows, start=1)]
    if "train_data_dir" in options:
        listed = None if options.get("streaming") else options["train_data_dir"]
        return [Concept(listed, option="train_data_dir")]
    return [Concept(**counts, **{name: options.get(name) for name in (*PATHS, *TEXTS)})]
