"""Whole scripts on a bad day: a full disk, folders of others, damaged checkpoints, kills. And: the table of faults."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from utils import results, runtime
from utils.checkpoints import manifests

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "train_dreambooth_lora"


@pytest.fixture
def train(sd1, photos, tmp_path):
    """train("--options ...", name="run") -> exit code; each run in tmp_path / name"""

    def call(options="", name="run", seed="--seed 3"):
        module = importlib.import_module(SCRIPT)
        words = f"""--pretrained_model_name_or_path '{sd1}' --instance_data_dir '{photos}' --output_dir
            '{tmp_path / name}' --instance_prompt 'a photo of sks dog' --report_to none --train_batch_size 1
            --learning_rate 1e-3 {seed} {options}"""
        try:
            module.main(module.parse_args(shlex.split(words)))
        except SystemExit as left:
            return left.code
        finally:
            runtime.close_last()
        return 0

    return call


def weights(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def same(one, two):
    one, two = weights(one), weights(two)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def kept(folder):
    return [path.name for _, path in manifests.listed(folder)]


# A disk that is full


@pytest.fixture
def small_files():
    """small_files(bytes): no file may grow beyond that, as on a full disk; None: as before. A real limit."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def test_a_disk_full_for_a_while_costs_one_checkpoint(train, tmp_path, capsys, monkeypatch, small_files):
    assert train("--max_train_steps 3", "whole") == 0
    write = manifests.write

    def at_step(folder, step, identity):
        write(folder, step, identity)
        small_files(2000 if step == 1 else None)  # of the second checkpoint, whose first file is larger

    monkeypatch.setattr(manifests, "write", at_step)
    from utils.checkpoints import Checkpoints

    save = Checkpoints.save

    def lifted(self, step):
        done = save(self, step)
        if step == 2:
            assert done is None
            small_files(None)
        return done

    monkeypatch.setattr(Checkpoints, "save", lifted)
    assert train("--max_train_steps 3 --checkpointing_steps 1") == 0
    said = capsys.readouterr().err
    assert "checkpoint-2: not saved" in said and "training goes on" in said
    assert kept(tmp_path / "run") == ["checkpoint-1", "checkpoint-3"]
    assert not list((tmp_path / "run").glob(".tmp*")) and same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("room_for_a_checkpoint", [False, True])
def test_a_disk_full_at_the_end_leaves_what_was_learned(
    train, tmp_path, capsys, monkeypatch, small_files, room_for_a_checkpoint
):
    from utils.adapters import Adapters

    options = "--max_train_steps 3 --checkpointing_steps 2"
    assert train(options, "whole") == 0
    save = Adapters.save

    def full(self, folder, *given, **named):
        result = Path(folder).parent.name.startswith(results.STAGED)
        small_files(2000 if result or (not room_for_a_checkpoint and runtime._current.step == 3) else None)
        return save(self, folder, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Adapters, "save", full)
        with pytest.raises(Exception, match=r"(?i)file too large|I/O error|write"):
            train(options)
    small_files(None)
    said = capsys.readouterr().err
    if room_for_a_checkpoint:
        assert "checkpoint-3 holds what was learned" in said
        assert kept(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    else:
        assert "checkpoint-3: not saved either" in said
        assert kept(tmp_path / "run") == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob("*.safetensors"))  # no half of a result under its final name
    assert train(f"{options} --resume_from_checkpoint latest") == 0
    assert same(tmp_path / "run", tmp_path / "whole")


# Folders


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses even root")
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(train, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda *given, **named: pytest.fail("something slow began"))
    assert train(name="/proc/self/run") == 2
    said = capsys.readouterr().err
    assert "--output_dir /proc/self/run" in said and "name another folder" in said


def test_another_runs_checkpoint_continues_with_its_seed_in_a_folder_of_its_own(train, tmp_path, capsys):
    options = "--max_train_steps 4 --checkpointing_steps 2"
    assert train(options, "theirs", seed="") == 0  # a seed is drawn
    checkpoint = f"--resume_from_checkpoint '{tmp_path / 'theirs' / 'checkpoint-2'}'"
    assert train(f"{options} {checkpoint}", "mine", seed="") == 0
    assert capsys.readouterr().out.count("(drawn;") == 1
    assert same(tmp_path / "mine", tmp_path / "theirs")
    # A folder that holds a third run is not mixed with it.
    assert train(options, "third") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "third").rglob("*") if path.is_file()}
    assert train(f"{options} {checkpoint}", "third", seed="") == 2
    assert "is of another" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "third").rglob("*") if path.is_file()}
    # Nor is it taken for this one by `latest`, when something that matters differs.
    assert train(f"{options} --rank 8 --resume_from_checkpoint latest", "third") == 2
    assert re.search(r"rank\s+checkpoint: 4\s+now: 8", capsys.readouterr().err)


def test_a_run_that_broke_off_in_a_notebook_gives_its_folder_back(train, tmp_path, monkeypatch):
    """An exception leaves the run open, with its lock; the next cell may start over in the same folder."""
    from utils import losses

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "close_last", lambda: None)  # a notebook calls nothing after an exception
        patched.setattr(losses, "error", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("--max_train_steps 2")
    assert runtime._current is not None
    assert train("--max_train_steps 2 --overwrite_output_dir") == 0


# Checkpoints


def test_a_damaged_newest_checkpoint_costs_its_steps_only(train, tmp_path, capsys):
    options = "--max_train_steps 4 --checkpointing_steps 1 --use_ema"
    assert train(options, "whole") == 0
    assert train("--max_train_steps 3 --checkpointing_steps 1 --use_ema") == 0
    newest, older = tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-2"
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-3] ^= 16
    (newest / "optimizer.safetensors").write_bytes(content)
    (older / "pytorch_lora_weights_ema.safetensors").unlink()
    for stray in ("checkpoint-10.bak", "checkpoint-tmp", "checkpoint-99x"):
        (tmp_path / "run" / stray).mkdir()
    assert train(f"{options} --resume_from_checkpoint latest") == 0
    said = capsys.readouterr()
    assert "checkpoint-3: skipped, optimizer.safetensors has changed" in said.err
    assert "checkpoint-2: skipped, pytorch_lora_weights_ema.safetensors is missing" in said.err
    assert "checkpoint-1 after step 1" in said.out
    assert same(tmp_path / "run", tmp_path / "whole")
    assert all(manifests.fault(path, "full") is None for _, path in manifests.listed(tmp_path / "run"))


def test_more_and_fewer_steps_than_before(train, tmp_path, capsys):
    """A raised target goes on, a lowered one trains nothing, says so, and leaves what there is; the course stays."""
    options = "--checkpointing_steps 2 --lr_scheduler constant"
    assert train(f"--max_train_steps 6 {options}", "whole") == 0
    assert train(f"--max_train_steps 5 {options}") == 0  # its newest checkpoint is that of step 4
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(f"--max_train_steps 2 {options} --resume_from_checkpoint latest") == 0
    assert "already complete: 5 steps are done, 2 were asked for" in capsys.readouterr().out
    assert train(f"--max_train_steps 4 {options} --resume_from_checkpoint checkpoint-2") == 2
    assert "holds a result of 5 steps, which one of 4 would replace" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").unlink()  # as if killed before it was written
    assert train(f"--max_train_steps 2 {options} --resume_from_checkpoint latest") == 0
    assert "already complete: 4 steps are done, 2 were asked for" in capsys.readouterr().out
    timings = json.loads((tmp_path / "run" / "timings.json").read_text())
    timings["sessions"].insert(
        0, {"began": "before", "last_step": 100, "finished": True}
    )  # and was then gone back from
    (tmp_path / "run" / "timings.json").write_text(json.dumps(timings))
    assert train(f"--max_train_steps 6 {options} --resume_from_checkpoint latest") == 0
    assert same(tmp_path / "run", tmp_path / "whole")
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6]


# Kills


@pytest.mark.slow
def test_killed_three_times_a_run_ends_with_the_same_weights(sd1, photos, tmp_path, monkeypatch):
    """The short version of benchmarks/soak.py, whose long version is in benchmarks/results/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    import soak

    options = ["--pretrained_model_name_or_path", str(sd1), "--instance_data_dir", str(photos), "--center_crop"]
    options += [*shlex.split(soak.OPTIONS.split("--with_prior")[0]), "--lora_dropout", "0.2"]
    module = importlib.import_module(SCRIPT)

    def here(words):
        try:
            module.main(module.parse_args(words))
        finally:
            runtime.close_last()

    told = soak.soak(SCRIPT, options, tmp_path / "soak", kills=3, mid_save=1, seed=1, run=here)
    assert soak.passed(told), told
    assert len(told["kills"]) >= 3 and any(kill["where"] == soak.PLACES[0] for kill in told["kills"])


# What docs/reliability.md says


def existing_tests() -> set[str]:
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        found |= {
            f"{path.stem}::{name}" for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
        }
    return found


def test_every_test_that_the_table_of_faults_names_exists():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+::test_\w+)`", text))
    gone = sorted(named - existing_tests())
    assert len(named) > 40 and not gone, f"renamed or removed: correct docs/reliability.md: {gone}"
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| (R?\d+|S\d+) ", line)]
    silent = [row[1].strip() for row in rows if "`test_" not in row[4] and "not yet" not in row[4]]
    assert not silent, f"rows {silent} name neither a test nor say that they do not hold yet"


def test_the_committed_soak_is_what_it_says():
    told = json.loads((ROOT / "benchmarks" / "results" / f"soak-{SCRIPT}.json").read_text())
    assert len(told["kills"]) >= 20 and sum(kill["where"] == "in mid-save" for kill in told["kills"]) >= 4
    assert told["killed"]["differ"] == told["damaged"] == 0 < told["control"]["differ"]
