"""From words to settings: types with ranges, --config, the command line, and every complaint at once.

argparse stops at the first mistake and cannot tell a value that was given from a default. So its types and defaults
are taken over here: argparse only splits the command line, the same conversion then serves it and the YAML file.
"""

import argparse
import difflib
import errno
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils import strict
from utils.arguments import relations
from utils.errors import outlast_readers, readable, refuse, warn

MOST_BYTES = 3800  # of a path: systems take 4,096, and names of files come behind it

# About one start of the script, not about the run that it makes; and a name by which a secret is found.
OCCASIONAL = ("config", "dry_run", "overwrite_output_dir", "resume_from_checkpoint", "allow_resume_mismatch")
NOT_PUBLIC = (*OCCASIONAL, "hub_token", "local_rank", "concepts")  # concepts: made of other options

# Ways to say one thing: what the command line says takes back what the file says with the other name.
ONE_CHOICE = (
    ("validation_prompt", "validation_prompts"),
    ("validation_steps", "validation_epochs"),
    ("noise_offset", "offset_noise"),
    ("optimizer", "use_8bit_adam"),
    ("instance_data_dir", "dataset_name", "concepts_list"),
    ("instance_prompt", "concepts_list"),
    ("class_data_dir", "concepts_list"),
    ("class_prompt", "concepts_list"),
    ("train_data_dir", "dataset_name"),
    ("num_train_epochs", "max_train_steps"),
)


@dataclass(frozen=True)
class Kind:
    """How one written value is read: convert raises ValueError; `needs` finishes the sentence about it."""

    metavar: str
    needs: str
    convert: Callable[[str], object]
    commas: bool = False  # in a list, "a,b" is two values
    rows: bool = False  # a YAML file may hold a list in its place, which is handed on as it is
    removed: tuple[tuple[str, str], ...] = ()  # (value of earlier versions, what to use instead)

    def __call__(self, written: str) -> object:
        return self.convert(written)


def whole(minimum: int) -> Kind:
    return Kind("N", f"a whole number of at least {minimum}", lambda written: _within(int(written), minimum=minimum))


def number(minimum: float | None = None, above: float | None = None, below: float | None = None) -> Kind:
    limits = (("at least", minimum), ("above", above), ("below", below))
    needs = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
    return Kind("X", f"a number {needs}".strip(), lambda written: _within(float(written), minimum, above, below))


def choice(*names: str, removed: tuple[tuple[str, str], ...] = ()) -> Kind:
    def convert(written: str) -> str:
        return {name.lower(): name for name in names}[written.strip().lower()]

    return Kind("{" + ",".join(names) + "}", f"one of {', '.join(names)}", convert, commas=True, removed=removed)


def _within(value, minimum=None, above=None, below=None):
    too_small = (minimum is not None and value < minimum) or (above is not None and value <= above)
    if too_small or (below is not None and value >= below) or value != value or abs(value) == float("inf"):
        raise ValueError
    return value


def _filled(written: str) -> str:
    if not written.strip():
        raise ValueError
    return written


def _path(written: str) -> str:
    """A folder, file or hub name that can be looked for: longer ones are an OSError of every function that looks."""
    path = os.path.expanduser(_filled(written))
    try:
        os.stat(path)
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            raise ValueError from None
    longest = max(map(len, os.fsencode(path).split(b"/")))
    if longest > 255 or len(os.fsencode(path)) > MOST_BYTES or "\0" in path:
        raise ValueError
    return path


def _colour(written: str) -> str:
    if not re.fullmatch("white|black|gr[ae]y|#[0-9a-f]{6}", written.lower()):
        raise ValueError
    return written.lower()


def _yes_or_no(written: str) -> bool:
    answers = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}
    return answers[written.strip().lower()]


flag = Kind("{yes,no}", "yes or no", _yes_or_no)
colour = Kind("COLOUR", "white, black, grey or #rrggbb", _colour)
text = Kind("TEXT", "something that is not empty", _filled, commas=True)
prompt = Kind("PROMPT", "a text", str)  # an empty prompt is a prompt
concepts_file = Kind("FILE.json", "a file", lambda written: os.path.expanduser(_filled(written)), rows=True)
folder = Kind("PATH", f"a path without a loop of links, of names of 1 to 255 bytes, {MOST_BYTES:,} in all", _path)


class Settings(argparse.Namespace):
    """The settings of a run; what they would be by default stands beside them, not among them."""

    __slots__ = ("defaults",)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Defaults < --config < command line, each checked and all compared; refuses once, naming everything."""
    outlast_readers()
    words = list(sys.argv[1:] if argv is None else argv)
    if wrong := _about_surroundings():
        refuse(wrong, once=True)
    complaints: list[str] = []
    actions = {action.dest: action for action in parser._actions if isinstance(action.type, Kind)}
    kinds = {name: action.type for name, action in actions.items()}
    defaults = {name: action.default for name, action in actions.items()}
    required = [name for name, action in actions.items() if action.required]

    typed = _split(parser, actions.values(), words, complaints)
    given = {name: _convert(f"--{name}", kinds[name], value, complaints) for name, value in typed.items()}
    if isinstance(given.get("config"), str):
        for name, value in _config(given["config"], actions, kinds, complaints).items():
            alike = {other for names in ONE_CHOICE if name in names for other in names} | {name}
            if not alike & typed.keys():
                given[name] = _convert(f"{given['config']}: {name}", kinds[name], value, complaints)

    complaints += [f"--{name} is required" for name in required if name not in given]
    misread = {name for name, value in given.items() if value is None}
    given = {name: value for name, value in given.items() if value is not None}
    args = Settings(**(defaults | given))
    args.defaults = Settings(**defaults)
    found = relations.check(args, given, defaults, misread)
    for name, values in _repeated(actions.values(), words):
        told = f"--{name} is given {len(values)} times ({', '.join(values)})"
        if name in getattr(parser, "only_once", ()):
            complaints.append(f"{told}: give one, and run the command once for each")
        else:
            found.warnings.append(f"{told}: the last value is used")
    relations.check(args.defaults, {}, defaults, set())  # settles those that follow from others; complains in vain
    complaints += found.complaints
    if complaints:
        refuse([_as_typed(complaint, actions.values(), words) for complaint in complaints], once=True)
    for warning in found.warnings:
        warn(_as_typed(warning, actions.values(), words))
    return args


def _about_surroundings() -> list[str]:
    """What no option says, and no run could start with."""
    complaints = []
    if sys.flags.optimize > 1:
        complaints.append("python -OO (PYTHONOPTIMIZE=2) removes texts that transformers reads; run without it")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not re.fullmatch(r"-?\d*", given := os.environ.get(name, "")):
            complaints.append(f"the environment variable {name} is '{given}': a number is needed; unset it")
    try:
        os.getcwd()
    except OSError:
        complaints.append("the folder that this command runs in was removed; cd to one that exists")
    return complaints


def _as_typed(message: str, actions, words: list[str]) -> str:
    """An option that has several names bears the one that was typed."""
    typed = {word.split("=")[0] for word in words}
    for action in actions:
        name, *others = action.option_strings
        if chosen := next((other for other in others if other in typed), None):
            message = re.sub(rf"{name}\b", chosen, message)
    return message


def defaults(args: argparse.Namespace) -> dict | None:
    """Option -> what it is when nobody gives it; the report shows what differs first."""
    return vars(args.defaults) if isinstance(args, Settings) else None


def public(args: argparse.Namespace) -> dict:
    """Every setting that makes the run what it is: no token, nothing about this one start. For trackers and files."""
    return {name: value for name, value in vars(args).items() if name not in NOT_PUBLIC}


def caller(args: argparse.Namespace):
    """A function `call(f, ...)` that calls f with, beside what it is given, every option named like a keyword of f.

    So rooms take plain keywords, an option and the keyword it sets are one name, and no script can forget to pass it.
    """

    def call(function, *values, **named):
        signature = inspect.signature(function)
        given = signature.bind_partial(*values, **named).arguments
        options = {
            name: getattr(args, name) for name in signature.parameters if name not in given and hasattr(args, name)
        }
        return function(*values, **named, **options)

    return call


def save(args: argparse.Namespace, path: str | Path) -> None:
    """Write the settings as a file that --config reads back to the same settings."""
    import yaml

    lines = "# Settings of this run; usable with --config.\n" + yaml.safe_dump(public(args), sort_keys=False)
    Path(path).write_text(lines, encoding="utf-8")


def nearest(name: str, names) -> str:
    """', did you mean x?' or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def _split(parser, actions, words: list[str], complaints: list[str]) -> dict[str, object]:
    """The raw words of each option that was typed; what argparse refuses is noted, left out, and the rest read on."""
    for action in actions:
        action.type, action.default, action.required = None, argparse.SUPPRESS, False
    while True:
        try:
            namespace, strangers = parser.parse_known_args(words)
            break
        except argparse.ArgumentError as problem:
            names = (problem.argument_name or "").split("/")
            rest = [word for word in words if word.split("=")[0] not in names]
            if rest == words:  # nothing to leave out: argparse's own sentence must do
                refuse([*complaints, str(problem)], once=True)
            complaints.append(f"{names[0]}: {problem.message}")
            words = rest
    complaints += _about_strangers(parser, words, strangers)
    return vars(namespace)


def _repeated(actions, words: list[str]):
    """(name, values) of options that take one value and were given several."""
    for action in actions:
        values = []
        for word, after in zip(words, [*words[1:], "--"]):
            option, equals, value = word.partition("=")
            if option in action.option_strings:
                values.append(value if equals else str(action.const) if after.startswith("--") else after)
        if len(set(values)) > 1 and not isinstance(action, argparse._AppendAction):
            yield action.dest, values


def _about_strangers(parser, words: list[str], strangers: list[str]) -> list[str]:
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    complaints, unknown = [], False
    stray: list[str] = []
    for word in strangers:
        if word.startswith("-") and len(word) > 1:
            unknown = True
            name = word.split("=")[0]
            complaints.append(f"{name} is not an option of {parser.prog}{nearest(name, known)}")
        elif not unknown:  # words after an unknown option are probably its values
            stray.append(word)
    if stray:
        complaints.append(f"'{' '.join(stray)}' belongs to no option; put quotes around a value that holds spaces")
    return complaints


def _config(path: str, actions: dict, kinds: dict[str, Kind], complaints: list[str]) -> dict[str, object]:
    """What a YAML file gives; null stands for the default, as in a file that a run wrote."""
    try:
        content = strict.yaml(readable(path).decode("utf-8"), as_written=True)
    except (OSError, ValueError) as problem:  # no UTF-8 is a ValueError too
        complaints.append(f"--config {path}: {getattr(problem, 'strerror', None) or problem}")
        return {}
    if not isinstance(content, dict | None):
        complaints.append(f"--config {path}: lines of the form 'option: value' are needed")
        return {}
    values = {}
    for key, value in (content or {}).items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in actions or name == "config":
            complaints.append(f"--config {path}: {key} is not an option{nearest(name, actions)}")
        elif name == "hub_token" and not str(value).startswith("env:"):
            complaints.append(f"--config {path}: a token does not belong in a file; write hub_token: env:HF_TOKEN")
        elif isinstance(value, list) and not isinstance(actions[name], argparse._AppendAction) and not kinds[name].rows:
            complaints.append(f"--config {path}: {name} takes one value, not a list")
        elif not kinds[name].rows and (strange := _no_text(value)):
            complaints.append(f"--config {path}: {name} holds a {strange} where a text or number is needed")
        elif value is not None:
            takes_list = isinstance(actions[name], argparse._AppendAction)
            values[name] = [value] if takes_list and not isinstance(value, list) else value
    return values


def _no_text(value) -> str | None:
    """The type of what YAML can hold and the command line cannot: mappings, sets, bytes, lists in lists."""
    values = value if isinstance(value, list) else [value]
    return next((type(one).__name__ for one in values if not isinstance(one, str | bool | int | float | None)), None)


def _convert(where: str, kind: Kind, value, complaints: list[str]):
    """The value as its kind reads it; None after a complaint, so that the default stands in for further checks."""
    if isinstance(value, list) and kind.rows:
        return value
    if isinstance(value, list):
        parts = [part for item in value for part in (str(item).split(",") if kind.commas else [item])]
        values = [_convert(where, kind, part, complaints) for part in parts]
        return None if None in values else values
    if problem := strict.unwritable(str(value)):
        complaints.append(f"{where} {problem}")
        return None
    spellings = [str(value)]
    if isinstance(value, bool):  # YAML reads a bare no or on as a boolean, where a choice of that name was meant
        spellings += ["yes", "on"] if value else ["no", "off"]
    for spelling in spellings:
        try:
            return kind.convert(spelling)
        except (ValueError, KeyError, OverflowError):
            continue
    shown = f"'{value}'" if isinstance(value, str) and (" " in value or not value) else value
    shown = f"{shown[:100]}..." if isinstance(shown, str) and len(shown) > 150 else shown
    names = kind.metavar.strip("{}").split(",") if kind.metavar.startswith("{") else []
    instead = dict(kind.removed).get(str(value).strip().lower())
    needed = f"it must be {kind.needs}{nearest(str(value), names)}"
    complaints.append(f"{where} is {shown}: {f'this value was removed; use {instead}' if instead else needed}")
    return None
