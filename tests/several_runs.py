"""Several trainings one after another in the same processes, which import everything once.

torchrun --nproc_per_node 2 tests/several_runs.py FILE.json, a list of [script, words, variables].
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate.state import PartialState

from utils.runtime import startup

# A run of several processes ends with its processes; these go on with the next one.
startup.leave = lambda code: None
PartialState.destroy_process_group = lambda self, group=None: None

for script, words, variables in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    os.environ.update(variables)
    module = importlib.import_module(script)
    module.main(module.parse_args(words))
    for name in variables:
        os.environ.pop(name)
sys.stdout.flush()
os._exit(0)
