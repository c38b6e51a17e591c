"""The instruments of benchmarks/: a measurement that cannot be trusted is worse than none."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = """
import sys
import torch
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([weight])
for _ in range(int(sys.argv[1])):
    weight.square().sum().backward()
    optimizer.step()
print(sys.argv, __name__)
"""


@pytest.fixture(autouse=True)
def _beside(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # its files import each other by name


def test_the_probe_sees_every_step_and_changes_nothing(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "steps.json"
    script.write_text(SCRIPT)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "probe.py", out, script, "7"], capture_output=True, text=True, check=True
    )
    ends = json.loads(out.read_text())
    assert done.stdout == f"[{str(script)!r}, '7'] __main__\n"
    assert len(ends) == 7
    walls = [wall for wall, _ in ends]
    assert walls == sorted(walls) and began < walls[0] < time.monotonic()


def test_blocks_take_turns_and_are_timed_apart():
    import overhead

    turns = overhead.Turns(block=2, batch_size=1, resolution=64, precision=None)
    order = []

    def bare():
        order.append("bare")
        time.sleep(0.01)

    turns.bare_step = bare
    for item in turns.alternate(iter(range(6)), "cpu"):
        order.append(item)
        time.sleep(0.03)
    assert order == [0, 1, "bare", "bare", 2, 3, "bare", "bare", 4, 5, "bare", "bare"]
    assert len(turns.script) == len(turns.bare) == 2  # the first block of each warmed up
    for (script, script_cpu), (bare, _) in zip(turns.script, turns.bare):
        assert script >= 0.03 and bare >= 0.01
        assert script_cpu < script / 2  # sleeping takes no CPU time


def test_whole_processes_are_measured(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nblock = bytearray(200_000_000)\nsum(range(3_000_000))\nsys.exit(2)")
    # From a small process: what a child takes is never told as less than its parent had when it started.
    code = "import json, pathlib, sys, compare, results; results.WORK = pathlib.Path(sys.argv[1]);"
    code += "print(json.dumps(compare.measure(pathlib.Path(sys.argv[2]), [], trains=False)))"
    command = [sys.executable, "-c", code, str(tmp_path), str(script)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=BENCHMARKS).stdout
    found = json.loads(told)
    assert found["exit_code"] == 2
    assert 190 < found["peak_mb"] < 300
    assert 0.01 < found["cpu_s"] <= found["wall_s"] + 0.1


def test_ratios_are_taken_within_a_round():
    import compare

    runs = {
        "ours": [{"wall_s": 1.0, "cpu_s": 1.0, "peak_mb": 1.0}, {"wall_s": 10.0, "cpu_s": 1.0, "peak_mb": 1.0}],
        "other": [{"wall_s": 2.0, "cpu_s": 1.0, "peak_mb": 1.0}, {"wall_s": 20.0, "cpu_s": 1.0, "peak_mb": 1.0}],
    }
    ratio = compare.summarise(runs)["measures"]["wall_s"]["ratio"]
    assert (ratio["min"], ratio["max"]) == (0.5, 0.5)


def test_every_result_says_where_it_comes_from():
    import results

    found = results.circumstances()
    text = results.conditions(found)
    assert all(str(found[name]) in text for name in ("date", "processor", "threads", "python"))
    assert found["versions"]["torch"] in text


def test_the_published_way_of_pdms_targets(sd1, photos, monkeypatch):
    """One photo after the other, there and back, the queries of the way back in the order of their timesteps."""
    import pdm_targets
    import torch

    monkeypatch.setattr(pdm_targets, "STEPS", 3)
    monkeypatch.setitem(pdm_targets.MODELS, "toybox", (sd1, 64, 2))
    monkeypatch.setattr(pdm_targets, "SUBJECT", photos)
    family, data, examples = pdm_targets.prepared("toybox")
    asked, real = [], family.predict

    def predict(latents, timesteps, condition):
        asked.append((len(latents), int(timesteps)))
        return real(latents, timesteps, condition)

    monkeypatch.setattr(family, "predict", predict)
    layer, targets, kept = pdm_targets.published(family, data, examples)
    assert asked == [(1, t) for t in (0, 1, 2, 3, 2, 1)] * 2
    assert list(targets) == [example.key for example in examples] and kept == 2 * 3 * 64 * 8 * 4
    rows = targets[examples[0].key]
    assert rows.dtype == torch.float32 and rows.shape == (3, 64, 8)
    assert not family.unet.get_submodule(f"{layer}.to_q")._forward_hooks
