"""Pictures that were whole when the run began and cannot be read any more: tried again, then a policy decides."""

import time
from collections.abc import Callable, Iterable

from utils import images

RETRIES = (0.5, 2.0)  # seconds between attempts: a network drive may blink, and the preflight has seen the file whole
MOST = 0.1  # share of the pictures that others may stand in for; one in any case


def patiently(read: Callable):
    for pause in RETRIES:
        try:
            return read()
        except images.BadImage:
            time.sleep(pause)
    return read()


class Lost:
    """What one process knows to be lost; once lost is lost, so that a visit is a function of its position again."""

    def __init__(self, on_bad_image: str = "error"):
        self.on_bad_image = on_bad_image
        self.reasons: dict[str, str] = {}  # key of a picture => why it cannot be read

    def stand_in(self, candidates: Iterable, record: Callable):
        """The record of the first candidate that can be read, the wanted one before others; None if none can be."""
        for example in candidates:
            if example.key not in self.reasons:
                try:
                    return record(example)
                except images.BadImage as bad:
                    self.reasons[example.key] = str(bad)
        return None

    def verdict(self, key: str, count: int) -> tuple[str, bool]:
        """Why the picture is lost, and whether the run must stop for it."""
        why, most = self.reasons[key], max(1, int(MOST * count))
        if self.on_bad_image == "error":
            return f"{why}; mend it and go on, or begin anew with --on_bad_image skip", True
        if len(self.reasons) > most:
            return f"{why}: {len(self.reasons)} of {count} pictures are lost, and at most {most} may be", True
        return f"{why}; others stand in for it from now on", False
