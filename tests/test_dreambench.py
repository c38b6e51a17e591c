"""The runner over many subjects: what it asks for, what it skips, what it goes on with, and its arithmetic."""

import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from toybox.make_subject import SUBJECTS, save_photos

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
COMMON = "--max_train_steps 10 --train_batch_size 1 --report_to none --checkpointing_steps 1 --resolution 64"
METHODS = {
    "dreambooth": f"train_dreambooth_lora.py {COMMON}",
    "pdmbooth": f"train_pdmbooth_lora.py {COMMON} --use_inst_loss --use_pdm_loss --class_prompt 'a {{class}}'"
    " --pdm_inversion_steps 4",
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("dreambench")


@pytest.fixture
def settings(tmp_path, sd1):
    """write(**changes) -> a YAML file of six subjects of the toybox and two methods"""
    for name, who in SUBJECTS.items():
        save_photos(tmp_path / "photos" / name, who)

    def write(**changes):
        told = {
            "model": str(sd1),
            "photos": str(tmp_path / "photos"),
            "images": 2,
            "draw": "--num_inference_steps 2 --height 64 --width 64",
            "scores": ["judge"],
            "subjects": [{"name": name, "class": who.thing, "kind": "any"} for name, who in SUBJECTS.items()],
            "prompts": {"any": ["a photo of {identifier} {class} on a beach"]},
            "methods": METHODS,
        } | changes
        file = tmp_path / "bench.yaml"
        file.write_text(yaml.safe_dump(told))
        return file

    return write


class InProcess:
    """What a Popen is to the pool, without the start of a process: the calls are listed and really done."""

    calls: list = []

    def __init__(self, words, env=None, stdout=None, **more):
        InProcess.calls.append(words[1:])
        module = importlib.import_module(Path(words[1]).stem)
        try:
            module.main(module.parse_args(words[2:]))
            self.code = 0
        except SystemExit as stop:
            self.code = stop.code or 0

    def wait(self):
        return self.code

    def send_signal(self, number):
        pass


@pytest.fixture
def run(bench, monkeypatch, tmp_path, capsys):
    def call(file, *options):
        monkeypatch.setattr(bench, "subprocess", types.SimpleNamespace(Popen=InProcess))
        monkeypatch.setattr(InProcess, "calls", [])
        code = bench.main(bench.parse_args([str(file), "--output_dir", str(tmp_path / "out"), *options]))
        return code, InProcess.calls, capsys.readouterr()

    return call


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/*/result.json")}


def test_six_subjects_two_methods_and_a_kill_in_the_middle(settings, bench, run, tmp_path):
    file, out = settings(), tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "dreambench.py"), str(file), "--output_dir", str(out)]
    dog = out / "runs/dog/dreambooth/0/train"
    code, _, _ = run(file, "--subjects", "boat", "--methods", "dreambooth")
    finished = stamps(out)
    assert code == 0 and len(finished) == 1

    # A real process, killed with all it started while the first of the runs trains.
    alive = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(6000):
            if list(dog.glob("checkpoint-[12]")):
                break
            time.sleep(0.01)
        trainer = json.loads((dog / ".run.lock").read_text())["pid"]
    finally:
        os.killpg(alive.pid, signal.SIGKILL)
        alive.wait()
    os.kill(trainer, signal.SIGKILL)
    while bench._holds(dog):
        time.sleep(0.05)
    assert not (dog / "pytorch_lora_weights.safetensors").is_file(), "it was too late for this test to show anything"

    code, calls, told = run(file)
    assert code == 0 and "11 runs to do" in told.out and "runs are missing" not in told.out
    assert len(calls) == 2 * 11 and not any("boat" in " ".join(call) and "dreambooth_lora" in call[0] for call in calls)
    assert len(stamps(out)) == 12 and stamps(out).items() >= finished.items()
    first = [row["first_step"] for row in json.loads((dog / "timings.json").read_text())["sessions"]]
    assert first[-1] > 0, "the killed run went on from its checkpoint"
    assert not list(out.glob("runs/*/*/*/images/*grid*"))
    lines = (out / "table.md").read_text().splitlines()
    assert lines[2].startswith("| dreambooth | 6 x 1 | ") and lines[3].startswith("| pdmbooth | 6 x 1 | ")
    assert lines[2].count("±") == 4

    # Nothing is left to do; the killed run came to what one that nobody killed comes to.
    assert run(file)[:2] == (0, [])
    straight = tmp_path / "straight"
    train = importlib.import_module("train_dreambooth_lora")
    words = next(call[1:] for call in calls if str(dog) in call and "train_dreambooth_lora" in call[0])
    words[words.index("--output_dir") + 1] = str(straight)
    train.main(train.parse_args(words))
    one, other = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (dog, straight))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_shards_share_the_runs(bench, settings, tmp_path):
    runs = bench.runs_of(bench.read(settings(seeds=[0, 1])), tmp_path)
    assert len({run.name for run in runs}) == 24 and len({run.folder for run in runs}) == 24
    shards = [run.name for index in range(5) for run in runs[index::5]]
    assert sorted(shards) == sorted(run.name for run in runs)
    dog = runs[1]
    assert dog.name == "dog / pdmbooth / 0" and dog.train[0] == "train_pdmbooth_lora.py"
    assert dog.train[dog.train.index("--class_prompt") + 1] == "a dog"
    assert dog.train[dog.train.index("--instance_prompt") + 1] == "a photo of sks dog"
    asked = [dog.draw[i + 1] for i, word in enumerate(dog.draw) if word == "--prompt"]
    assert asked == ["a photo of sks dog on a beach", "a photo of a dog"]


def test_a_finished_run_of_other_settings_is_no_result(settings, run, tmp_path):
    only = ("--subjects", "mug", "--methods", "dreambooth")
    assert run(settings(), *only)[0] == 0
    (tmp_path / "out/runs/mug/dreambooth/0/result.json").unlink()  # trained, and not yet drawn: no less its own
    with pytest.raises(SystemExit) as stop:
        run(settings(images=3), *only)
    assert stop.value.code == 2


def test_a_failed_run_is_named_and_the_others_go_on(settings, run, tmp_path):
    (tmp_path / "photos/cat/02.png").write_bytes(b"no picture")
    code, _, told = run(settings(), "--subjects", "cat", "mug", "--methods", "dreambooth")
    assert code == 1 and "1 runs failed: cat / dreambooth / 0" in told.err
    assert "cat / dreambooth / 0: train_dreambooth_lora.py ended with 3; see " in told.out
    assert [path.parts[-4] for path in stamps(tmp_path / "out")] == ["mug"]
    assert "1 of 2 runs are missing" in told.out


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"subject": []}, "'subject' is no key"),
        ({"subjects": [{"name": "dog", "kind": "any"}]}, "subject 1 must have name, class and kind"),
        ({"subjects": [{"name": "emu", "class": "bird", "kind": "any"}]}, "emu: no photos in"),
        ({"subjects": [{"name": "dog", "class": "dog", "kind": "live"}]}, "dog is of kind live, for which"),
        ({"seeds": 3}, "seeds is 3: a list"),
        ({"seeds": [1, 1]}, "seeds are [1, 1]"),
        ({"images": -3}, "images is -3"),
        ({"scores": ["auto"]}, "scores: 'auto' is none of"),
        ({"prompts": {"any": "a text"}}, "prompts of any: a list of texts"),
        ({"methods": {"../mine": "train_dreambooth.py"}}, "without /"),
        ({"subjects": [{"name": "/tmp", "class": "dog", "kind": "any"}]}, "the name without /"),
        ({"draw": "--num_inference_step 3"}, "--num_inference_step"),
        ({"methods": {"mine": "infer.py"}}, "method mine: infer.py is no training script"),
        ({"methods": {"mine": "train_dreambooth.py --learning_rat 1"}}, "--learning_rat"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(settings, run, capsys, changes, why):
    with pytest.raises(SystemExit) as stop:
        run(settings(**changes))
    assert stop.value.code == 2 and why in capsys.readouterr().err and not InProcess.calls


def test_the_published_layout_is_whole(bench):
    """30 subjects, 21 of them objects, 25 prompts each; its photos are not here."""
    told = yaml.safe_load((BENCHMARKS / "dreambench.yaml").read_text())
    kinds = [subject["kind"] for subject in told["subjects"]]
    assert (len(kinds), kinds.count("object"), kinds.count("live")) == (30, 21, 9)
    assert {kind: len(set(prompts)) for kind, prompts in told["prompts"].items()} == {"object": 25, "live": 25}
    assert len({subject["name"] for subject in told["subjects"]}) == 30 and set(told) <= set(bench.KEYS)


def test_methods_are_compared_subject_by_subject(bench, settings, tmp_path):
    runs = bench.runs_of(bench.read(settings(seeds=[0, 1])), tmp_path)
    scores = {("dreambooth", "dog"): (0.2, 0.4), ("pdmbooth", "dog"): (0.4, 0.8)}  # seeds
    scores |= {("dreambooth", "cat"): (0.9, None), ("pdmbooth", "cat"): (1.0, 5.0)}  # what has no partner is left out
    found = []
    for run in runs:
        value = scores.get((run.method, run.subject), (None, None))[run.seed]
        found += [(run, {"scores": {"judge_i": value}})] if value is not None else []
    half = 12.706 * statistics.stdev([0.3, 0.1]) / 2**0.5
    assert bench.paired(found, ["judge_i"]) == [("dreambooth", ["pdmbooth", 2, f"+0.200 ± {half:.3f}"])]
    assert bench.paired([one for one in found if one[0].method == "dreambooth"], ["judge_i"]) == []


def test_means_are_over_subjects(bench):
    # Two seeds of one subject count as one subject.
    assert bench.by_subject([("dog", 1.0), ("cat", 5.0), ("dog", 3.0)]) == [2.0, 5.0]
    values = [0.5, 0.7, 0.9, 0.6, 0.8, 0.4]
    half = 2.568 * statistics.stdev(values) / 6**0.5
    assert bench.interval(values) == f"0.650 ± {half:.3f}"
    assert bench.interval([0.25]) == "0.250"
    tabled = {1: 12.706, 2: 4.303, 5: 2.571, 9: 2.262, 29: 2.045}  # of any table of Student's t
    assert {n: round(bench.student(n), 3) for n in tabled} == pytest.approx(tabled, abs=4e-3)
