"""Single files that are whole or absent: written under another name beside their place, then renamed."""

import contextlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from utils import errors, saved

STAGED = ".tmp-file-"
# What killed runs left under the names of the first versions, for example .timings.json.1234 or .report.html-ab12cd34
EARLIER = re.compile(
    r"\.(timings\.json|metrics\.jsonl|training_config\.yaml|report\.html|README\.md|nonfinite\.json|preview\.json"
    r"|data_preview\.png|\d\d-\d\d\.png)(\.\d+|-[a-z0-9_]{8})"  # and nothing of an editor's, as .README.md.swp
)


@contextlib.contextmanager
def aside(path: str | Path) -> Iterator[Path]:
    """Yields a name to write to. At the end that file replaces `path`; after an error it is removed."""
    path = Path(path)
    staged = path.with_name(f"{STAGED}{uuid.uuid4().hex[:8]}{path.suffix[:16]}")
    try:
        yield staged
        saved.shared(staged)
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise


def write(path: str | Path, content: bytes | str) -> None:
    with aside(path) as staged, open(staged, "xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sweep(folder: str | Path, older_than: float = 0) -> None:
    """Removes what killed processes left in a folder and in the folders of it. `older_than`: seconds, where others may
    be writing."""
    now = time.time()
    for pattern in (".*", "*/.*", "*/*/.*"):
        for path in Path(folder).glob(pattern):
            with contextlib.suppress(OSError):
                ours = path.name.startswith(STAGED) or EARLIER.fullmatch(path.name)
                if ours and path.is_file() and now - path.stat().st_mtime >= older_than:
                    path.unlink()


@contextlib.contextmanager
def unless_it_fails(what: str | Path) -> Iterator[None]:
    """Around what may be missing without harm (pictures, pages): an error in writing is a warning, and the run goes
    on."""
    try:
        yield
    except OSError as problem:
        errors.warn(f"{what}: not written ({problem.strerror or problem}); the run continues")
