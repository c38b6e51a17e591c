"""Run any training script unchanged, and write down when each of its optimizer steps ended.

    python benchmarks/probe.py OUT.json script.py --its_option ...

The times come from torch's own hook after `Optimizer.step`, set when the script first imports torch: the probe imports
nothing itself, so it does not change what is measured.
"""

import atexit
import importlib.abc
import importlib.util
import json
import runpy
import sys
import time
from pathlib import Path

WATCHED = "torch.optim.optimizer"


class Watch(importlib.abc.MetaPathFinder):
    """Lets the watched module load as usual, then hangs a clock on it."""

    def __init__(self, ends: list):
        self.ends = ends

    def find_spec(self, name, path=None, target=None):
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_watch(module):
            load(module)
            # CLOCK_MONOTONIC is one clock for all processes: the parent's start can be subtracted.
            module.register_optimizer_step_post_hook(
                lambda *_: self.ends.append((time.monotonic(), time.process_time()))
            )

        spec.loader.exec_module = load_and_watch
        return spec


def main(out: str, script: str, *options: str) -> None:
    ends = []
    sys.meta_path.insert(0, Watch(ends))
    atexit.register(lambda: Path(out).write_text(json.dumps(ends)))
    sys.argv = [script, *options]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
