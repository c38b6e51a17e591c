"""What the repository says about itself is true: its tree, its links, its requirements, its launch configurations."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked() -> list[str]:
    """Files of the repository, new ones included, without what is ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def texts() -> dict[str, str]:
    found = {}
    for name in tracked():
        try:
            found[name] = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found


def tree() -> dict[str, str]:
    """The README's tree as {path: phrase}; what is indented lies in the folder above it."""
    found, folder = {}, ""
    for line in README.split("## Files")[1].split("```")[1].strip().splitlines():
        name, phrase = re.fullmatch(r" *(\S+) +(\S.*)", line).groups()
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            found[name.rstrip("/")] = phrase
        else:
            found[folder + name.rstrip("/")] = phrase
    return found


def test_the_tree_in_the_readme_is_the_tree():
    there = {name.split("/")[0] for name in tracked() if not name.startswith(".")}
    there |= {"/".join(name.split("/")[:2]) for name in tracked() if name.startswith("utils/")} - {"utils/__init__.py"}
    assert set(tree()) == there


def test_every_room_and_script_says_why_it_exists():
    silent = []
    for name, text in texts().items():
        code = name.endswith(".py") and name.split("/")[0] in ("utils", "toybox", "benchmarks", "tests")
        if (code or re.fullmatch(r"\w+\.py", name)) and text.strip() and not text.startswith('"""'):
            silent.append(name)
    assert not silent


def test_links_lead_somewhere():
    broken = []
    for name, text in texts().items():
        if name.endswith(".md"):
            for link in re.findall(r"\]\(([^)#\s]+)", text):
                if "://" not in link and not (ROOT / name).parent.joinpath(link).exists():
                    broken.append(f"{name}: {link}")
    assert not broken


def test_nothing_points_at_one_machine_or_one_package_index():
    # Spelled in parts, so that this file does not find itself.
    strings = ["index" + "-url", "find" + "-links", "pypi" + ".org", "python" + "hosted", "download.py" + "torch"]
    pattern = re.compile("|".join(map(re.escape, strings)) + r"|(?<![\w.~)/-])/(?:work|opt|root)/\w")
    found = {
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    }
    assert not found


def names_in(file: str) -> set[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {re.split(r"[=<>;\s\[]", line)[0].lower().replace("_", "-") for line in lines if re.match(r"\w", line)}


def test_every_requirement_is_a_range_and_has_a_tested_version():
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if re.match(r"\w", line):
            pin = Requirement(line)
            assert len(pin.specifier) == 1, f"{line} is not one exact version"
            pins.setdefault(pin.name.lower().replace("_", "-"), []).append(next(iter(pin.specifier)))
    for file in ("requirements.txt", "requirements_dev.txt"):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if re.match(r"\w", line):
                wanted = Requirement(line.split(" #")[0])
                exact = pins.get(wanted.name.lower().replace("_", "-"))
                assert exact, f"{wanted.name} of {file} is not in constraints.txt"
                assert any(limit.operator == ">=" for limit in wanted.specifier), f"{line} has no floor"
                assert any(limit.operator == "<" for limit in wanted.specifier), f"{line} has no ceiling"
                assert all(wanted.specifier.contains(pin.version) for pin in exact), f"{line}, tested with {exact}"


def test_every_requirement_has_its_reason():
    reasons = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8").lower()
    for file in ("requirements.txt", "requirements_sdxl.txt", "requirements_dev.txt"):
        for name in names_in(file):
            assert re.search(rf"(\*\*|\| ){re.escape(name)}\b", reasons.replace("_", "-")), name


def test_documents_recommend_the_command_that_prints_no_traceback_of_a_launcher():
    """Where one process is enough; the first command of every page and script."""
    for file in [ROOT / "README.md", *ROOT.glob("docs/train_*.md"), *ROOT.glob("train_*.py")]:
        text = file.read_text(encoding="utf-8")
        first = re.search(r"^ *(python|accelerate launch)\b.*train_\w+\.py", text, re.MULTILINE)
        assert first and first[1] == "python", f"{file}: {first and first[0]}"


def test_launch_configurations_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted(set((ROOT / "accelerate_configs").glob("*.yaml")) - {ROOT / "accelerate_configs" / "skypilot.yaml"})
    processes = {file.stem: load_config_from_file(str(file)).num_processes for file in files}
    assert processes == {
        "cpu_2proc": 2,
        "deepspeed_zero2_offload": 1,
        "fsdp2": 2,
        "multi_gpu": 2,
        "multi_node": 16,
        "single_gpu": 1,
    }
