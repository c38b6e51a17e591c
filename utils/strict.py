"""YAML and JSON that people write or send: read without surprises, in time and memory that the file's size bounds.

Both formats let a key stand twice and take the last one silently. YAML also lets a few hundred bytes name each other
until they stand for gigabytes, and a list hold itself. All three are refused, by the line.
"""

import json

MOST_VALUES = 100_000  # that a YAML file may stand for, aliases written out


def yaml(text: str, as_written: bool = False):
    """The content of a YAML document. Raises ValueError with a reason that finishes the sentence "FILE: ...".

    as_written: options as the command line has them. YAML reads a bare `no` as false, 010 as 8 and 1:30 as 90; here
    the values of the outer mapping and of lists in it are the text that stands there, and null."""
    import yaml as library

    try:
        root = library.compose(text, Loader=library.SafeLoader)
        if root is None:
            return None
        _check(library, root, {})
        if as_written and isinstance(root, library.MappingNode):
            for node in (node for pair in root.value for node in pair):
                _keep_text(library, node)
        return library.SafeLoader("").construct_document(root)
    except library.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        reason = getattr(problem, "problem", None) or problem
        raise ValueError(f"{reason}" + (f" in line {mark.line + 1}" if mark else "")) from problem
    except RecursionError as problem:
        raise ValueError("lists or mappings are nested too deeply") from problem


def _keep_text(library, node) -> None:
    if isinstance(node, library.ScalarNode) and node.tag.rpartition(":")[2] in ("bool", "int", "float", "timestamp"):
        node.tag = "tag:yaml.org,2002:str"
    for child in node.value if isinstance(node, library.SequenceNode) else ():
        if isinstance(child, library.ScalarNode):
            _keep_text(library, child)


def unwritable(text: str) -> str | None:
    """Why a text cannot be trained on, drawn with or written down; finishes the sentence "TEXT ..."."""
    if "\0" in text:
        return "holds NUL characters; remove them"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds characters that are not UTF-8; in a terminal without UTF-8, run `export PYTHONUTF8=1` first"
    return None


def _check(library, node, sizes: dict) -> int:
    """How many values a node stands for; None in `sizes` while it is being looked at."""
    line = node.start_mark.line + 1
    if id(node) in sizes:
        if sizes[id(node)] is None:
            raise ValueError(f"the list or mapping in line {line} contains itself; write its values out")
        return sizes[id(node)]
    sizes[id(node)], size = None, 1
    if isinstance(node, library.MappingNode):
        lines = {}
        for key, _ in node.value:
            if isinstance(key, library.ScalarNode):
                name = key.value.lstrip("-").replace("-", "_")  # two spellings of one option
                here = key.start_mark.line + 1
                if name in lines and key.value != "<<":
                    raise ValueError(f"{key.value} is given in line {lines[name]} and again in line {here}; remove one")
                lines[name] = here
        children = [child for pair in node.value for child in pair]
    else:
        children = node.value if isinstance(node, library.SequenceNode) else []
    for child in children:
        size += _check(library, child, sizes)
        if size > MOST_VALUES:
            raise ValueError(f"the anchors in line {line} stand for more than {MOST_VALUES:,} values; write them out")
    sizes[id(node)] = size
    return size


def parsed_json(text: str | bytes):
    """The content of a JSON document. Raises ValueError, also for a key that an object holds twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as problem:
        raise ValueError("lists or objects are nested too deeply") from problem


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {json.dumps(twice)} is given twice in one object; remove one")
    return found
