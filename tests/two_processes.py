"""Whole scripts in one of several processes, one after the other, for test_two_processes.py.

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/two_processes.py JOBS.json

JOBS.json: [[script, [words of its command line], [process, step] whose loss is to become NaN or null, port], ...].
Beside it each process writes rankR.json: per job the exit code, and what every row of noise was.
"""

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(jobs: Path) -> None:
    from utils import losses, randomness
    from utils.runtime import startup

    # A script's end would be this process's. Its run is kept: a group that is taken down while its thread lets go of a
    # tensor waits for it for ever, holding the lock that the thread needs (gloo, torch 2.13).
    kept = []
    startup.leave = lambda code: kept.append(sys._getframe(1).f_locals.copy())
    rank, told, rows = int(os.environ["RANK"]), [], []
    real_normal, real_error = randomness.Draws.normal, losses.error

    def normal(self, purpose, shape):
        drawn = real_normal(self, purpose, shape)
        rows.extend([purpose, hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16]] for row in drawn)
        return drawn

    randomness.Draws.normal = normal
    for script, words, poison, port in json.loads(jobs.read_text()):
        # A meeting point of its own: what an earlier group left in the launcher's would be taken for this one's.
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
        rows.clear()
        calls = [0]

        def error_of(*values, calls=calls, poison=poison):
            calls[0] += values[0].requires_grad  # not the prediction of zeros
            error = real_error(*values)
            return error * float("nan") if values[0].requires_grad and poison == [rank, calls[0]] else error

        losses.error = error_of
        module = importlib.import_module(script)
        code = 0
        try:
            module.main(module.parse_args(words))
        except SystemExit as stopped:
            code = stopped.code
        told.append({"code": code, "rows": list(rows)})
        jobs.with_name(f"rank{rank}.json").write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
