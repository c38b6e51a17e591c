"""Pictures that were whole when the run began and cannot be read now: tried again before anybody is told."""

import time
from collections.abc import Callable

from utils import images

RETRIES = (0.5, 2.0)  # seconds between attempts: a network drive may blink, and the preflight has seen the file whole


def patiently(read: Callable):
    for pause in RETRIES:
        try:
            return read()
        except images.BadImage:
            time.sleep(pause)
    return read()
