"""Our files in the real readers of other programs, in their own environments: benchmarks/other_programs.py.

OTHER_PROGRAMS=FOLDER names a folder of virtual environments (how to make them stands in that script). Without it these
tests are skipped, and pytest says so.
"""

import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import other_programs

FOLDER = Path(os.environ.get("OTHER_PROGRAMS") or "/nowhere")


def test_a_reader_that_cannot_start_is_reported_as_skipped(tmp_path, capsys):
    assert other_programs.main(["--environments", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("skipped: ")
    answer = other_programs.read(Path(sys.executable), [{"way": "x"}], tmp_path / "..")  # no key "file"
    assert (
        "KeyError" in answer["answers"]["0"]["error"] and other_programs.verdict(answer["answers"]["0"])[:5] == "error"
    )
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no torch >&2\nexit 1\n")
    broken.chmod(0o755)
    assert other_programs.read(broken, [], tmp_path) == {"skipped": "no torch"}


def test_what_a_difference_means():
    told = {"exact": (0.001, 0.5), "NOTHING LOADED": (0.5, 0.0), "OTHER (0.5)": (0.5, 0.4)}
    for want, (difference, change) in told.items():
        assert other_programs.verdict({"difference": difference, "change": change}) == want


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="OTHER_PROGRAMS names no folder of environments")
def test_other_programs_draw_what_we_draw(tmp_path):
    jobs = other_programs.make(tmp_path)
    for name, python in other_programs.environments(FOLDER, []).items():
        found = other_programs.read(python, jobs, tmp_path)
        if "skipped" in found:
            pytest.skip(f"{name}: {found['skipped']}")
        for number, answer in found["answers"].items():
            job, said = jobs[int(number)], other_programs.verdict(answer)
            if job["way"] in ("peft", "pipeline") or (job["way"], job["kind"]) == ("kohya", "LoRA"):
                assert said == "exact", (name, job["model"], job["kind"], job["way"])
