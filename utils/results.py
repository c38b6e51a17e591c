"""A result is replaced as a whole or not at all: `model_index.json` never stands beside the weights of two runs.

New files are written aside. When all of them are on the disk, the file by which a result is recognised goes first and
comes last, so that a kill in between leaves a folder without a result, which the next start of the run completes.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from utils.checkpoints import manifests
from utils.saved import KOHYA_FILE, LORA_FILE, READY, STAGED

KEYS = ("model_index.json", LORA_FILE)  # by these a result is recognised
# Weights as diffusers and transformers call them. Older ones must not stay beside newer ones that are split otherwise.
WEIGHTS = re.compile(r"(diffusion_pytorch_model|model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder of the same name to write a result into. What `folder` holds is replaced at the end;
    after an error it is untouched. Files that are not of a result stay."""
    folder = Path(folder)
    staged = folder / f"{STAGED}{uuid.uuid4().hex[:8]}"
    inside = staged / (folder.name or folder.resolve().name)
    try:
        inside.mkdir(parents=True)
        yield inside
        for path in [*files_of(inside), *(path for path in inside.rglob("*") if path.is_dir()), inside]:
            manifests.sync(path)
        names = [path.relative_to(inside).as_posix() for path in files_of(inside)]
        (staged / READY).write_text(json.dumps(names), encoding="utf-8")
        manifests.sync(staged / READY)
        manifests.sync(staged)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _move(staged, inside, folder)


def complete(folder: Path) -> bool:
    """Finishes what a kill interrupted; what was not complete is removed. True if a result was completed."""
    done = False
    for staged in sorted(Path(folder).glob(f"{STAGED}*")):
        inside = next((path for path in staged.iterdir() if path.is_dir()), None) if staged.is_dir() else None
        if inside and (staged / READY).is_file():
            _move(staged, inside, Path(folder))
            done = True
        else:
            shutil.rmtree(staged, ignore_errors=True)
    return done


def files_of(folder: Path) -> list[Path]:
    """Those that name a result come last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path.parent == folder and path.name in KEYS)


def _move(staged: Path, inside: Path, folder: Path) -> None:
    """Can be repeated after a kill at any place."""
    names = json.loads((staged / READY).read_text(encoding="utf-8"))
    left = files_of(inside)
    if left:
        for key in KEYS:
            if key in names:
                (folder / key).unlink(missing_ok=True)
        if LORA_FILE in names and KOHYA_FILE not in names:  # made of the weights that are replaced
            (folder / KOHYA_FILE).unlink(missing_ok=True)
        manifests.sync(folder)
        for part in {Path(name).parts[0] for name in names if "/" in name}:
            for old in (folder / part).glob("*"):
                if WEIGHTS.fullmatch(old.name) and f"{part}/{old.name}" not in names:
                    old.unlink()
    for file in left:
        target = folder / file.relative_to(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file == left[-1]:  # before the key comes, everything else is in its place, also after a power cut
            for path in {folder, *((folder / name).parent for name in names)}:
                manifests.sync(path)
        os.replace(file, target)
    manifests.sync(folder)
    shutil.rmtree(staged, ignore_errors=True)
