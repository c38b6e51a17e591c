"""What every measurement carries (machine, threads, date, versions), and how it is written down."""

import json
import os
import platform
import statistics
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
WORK = HERE.parent / "runs" / "benchmarks"  # models and runs: ignored by git, reused next time
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def circumstances() -> dict:
    """Where a number comes from: figures of different machines or moments must not be compared."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The short commit, with a + when files under version control differ from it."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=HERE, capture_output=True)
    except OSError:
        return None
    return name.stdout.strip() + ("+" if changed.returncode == 1 else "") if name.returncode == 0 else None


def spread(values: list) -> dict:
    """Smallest, median and largest; noise on a shared machine is part of the result."""
    values = [value for value in values if value is not None]
    if not values:
        return {"min": None, "median": None, "max": None, "count": 0}
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "count": len(values)}


def show(values: dict, digits: int = 3) -> str:
    if values["median"] is None:
        return "-"
    return " / ".join(f"{values[name]:.{digits}f}" for name in ("min", "median", "max"))


def table(columns: list, rows: list) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def conditions(found: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    return (
        f"{found['date']}; {found['processor']}, {found['cores']} cores, {found['threads']} thread(s), "
        f"load {found['load_before']} before; Python {found['python']}, {versions}; commit {found['commit']}."
    )


def write(name: str, title: str, text: str, data: dict) -> None:
    """results/NAME.json for programs, results/NAME.md for people; the table is printed too."""
    RESULTS.mkdir(exist_ok=True)
    RESULTS.joinpath(f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = f"# {title}\n\n{text}\n\n{conditions(data['circumstances'])}\n"
    RESULTS.joinpath(f"{name}.md").write_text(page, encoding="utf-8")
    print(f"\n{page}\nwritten to {RESULTS / name}.json and .md")
