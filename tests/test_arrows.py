"""Which part of `utils` imports which: from a layer to itself or downwards, without cycles. Exceptions only get fewer.

Measured in the source, so imports inside functions count too. Modules named `__main__` are programs, as the scripts
are: they may import everything, and nothing imports them.
"""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top. Scripts and other programs are above all of these.
LAYERS = {
    "results": "assembling hub report results saved scores sheets validation",
    "training": "adapters checkpoints ema heldout learning losses noise optimizers pdm prior runtime sharded tokens "
    "weightwise",
    "models": "models quantize sam samplers targets",
    "data": "buckets cache captions concepts datasets images lost masks precomputed shards streams",
    "options": "arguments",
    "ground": "divergence errors interrupts launchers randomness strict sums writing",
}
HEIGHT = {part: -place for place, parts in enumerate(LAYERS.values()) for part in parts.split()}
# What is checked before anything slow starts: above models, and below nothing but programs.
PREFLIGHT = "preflight"

# Imports that the rule forbids and that still exist. Remove those that are gone; add none.
EXCEPTIONS = [
    "adapters -> saved",
    "arguments -> buckets",
    "arguments -> captions",
    "arguments -> concepts",
    "checkpoints -> saved",
    "ema -> saved",
    "hub -> preflight",
    "learning -> saved",
    "models -> saved",
    "pdm -> saved",
    "pdm -> validation",
    "preflight -> runtime",
    "preflight -> saved",
    "prior -> validation",
    "runtime -> report",
    "runtime -> results",
    "runtime -> saved",
    "tokens -> saved",
    "writing -> saved",
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, at_top: bool = False) -> set[str]:
    """Dotted names, of `from a import b` as a.b: b may be a module. at_top: only what an import of the file runs."""
    found, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports inside the project are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
        if not (at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return found


@cache
def modules() -> dict[str, ast.Module]:
    return {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("utils/**/*.py")}


def part_of(module: str) -> str | None:
    """The file or folder of utils that a dotted name lies in."""
    found = re.match(r"utils\.(\w+)", module)
    return found and found[1]


@cache
def arrows() -> set[tuple[str, str]]:
    found = set()
    for module, tree in modules().items():
        if module != "utils" and not module.endswith(".__main__"):
            found |= {(part_of(module), part_of(name)) for name in imported(tree) if part_of(name)}
    return {(a, b) for a, b in found if a != b}


def forbidden(a: str, b: str) -> bool:
    if a == PREFLIGHT:
        return HEIGHT[b] > HEIGHT["models"]
    return b == PREFLIGHT or HEIGHT[b] > HEIGHT[a]


@cache
def needs_torch(module: str) -> bool:
    """When it is imported."""
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "accelerate", "peft"):
            return True
        while name and name not in modules():  # a function of a module
            name = name.rpartition(".")[0]
        if name and name not in found:
            found.add(name)
            todo += [*imported(modules()[name], at_top=True), name.rpartition(".")[0]]
    return False


def test_every_part_has_its_layer():
    names = [name for parts in LAYERS.values() for name in parts.split()] + [PREFLIGHT]
    there = {part_of(module) for module in modules() if module != "utils"}
    assert len(names) == len(set(names)) and set(names) == there


def test_imports_go_down():
    found = {f"{a} -> {b}" for a, b in arrows() if forbidden(a, b)}
    assert not found - set(EXCEPTIONS), "new imports against the order of the layers"
    assert not set(EXCEPTIONS) - found, "these are gone: remove them from the list"


def test_without_the_exceptions_there_is_no_cycle():
    below = {}
    for a, b in arrows():
        if not forbidden(a, b):
            below.setdefault(a, set()).add(b)
    assert len(list(TopologicalSorter(below).static_order())) > 30


def test_the_preflight_imports_nothing_slow():
    names = {name for module, tree in modules().items() if part_of(module) == PREFLIGHT for name in imported(tree)}
    names = {name for name in names if part_of(name) not in (None, PREFLIGHT)}
    assert len(names) > 10
    assert not {name for name in names if not forbidden(PREFLIGHT, part_of(name)) and needs_torch(name)}


def test_utils_imports_no_program_and_not_the_toybox():
    programs = {path.stem for path in ROOT.glob("*.py")} | {"toybox", "tests", "benchmarks"}
    for module, tree in modules().items():
        names = imported(tree)
        assert not {name.split(".")[0] for name in names} & programs, module
        assert not [name for name in names if name.startswith("utils.") and "__main__" in name], module
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not [text for text in texts if re.search(r"\btoybox[.:]\w", text)], module


@pytest.mark.parametrize(
    "source",
    [
        "import utils.a",
        "from utils import a",
        "from utils.a import b",
        "def f():\n    from utils import a",
        "class F:\n    import utils.a.b as c",
        "importlib.import_module('utils.a')",
    ],
)
def test_every_way_of_importing_is_seen(source):
    assert {part_of(name) for name in imported(ast.parse(source))} == {"a"}
    assert bool(imported(ast.parse(source), at_top=True)) == ("def f" not in source)
