"""Asked to stop in any phase, by any signal, under any launcher: the run saves, says so, and goes on exactly."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fake_hub
import pytest
import torch
from safetensors.torch import load_file

from utils import errors, hub, losses, prior, runtime, validation
from utils.adapters import Adapters
from utils.checkpoints import manifests
from utils.models.latent_diffusion import LatentDiffusion
from utils.runtime import signals

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SCRIPT = "train_dreambooth_lora"
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}
PATIENCE = 300  # seconds; nothing here depends on speed
TOTAL = 4
TOKEN = "hf_" + "Secret7" * 5


@pytest.fixture(scope="module", autouse=True)
def quick_class_images():
    """Three solver steps draw as well as 25 what nobody looks at."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prior, "STEPS", 3)
        yield


@pytest.fixture(scope="module")
def asked(sd1, tmp_path_factory):
    """The command of every run here, as words; two of its four steps are followed by a checkpoint and pictures."""
    import tiny

    folder = tmp_path_factory.mktemp("inputs")
    options = f"""--pretrained_model_name_or_path '{sd1}' --instance_data_dir '{tiny.photos(folder / "photos", 3)}'
        --instance_prompt 'a photo of sks dog' --seed 3 --report_to none --train_batch_size 1 --center_crop
        --max_train_steps {TOTAL} --checkpointing_steps 2 --learning_rate 1e-3 --validation_prompt 'a photo of sks dog'
        --validation_steps 2 --num_validation_images 2 --validation_num_inference_steps 2 --use_ema
        --with_prior_preservation --class_prompt 'a dog' --num_class_images 3 --sample_batch_size 1
        --resume_from_checkpoint latest"""
    return shlex.split(options)


def run(words, folder, *more):
    """The script in this process; returns its exit code."""
    module = importlib.import_module(SCRIPT)
    try:
        module.main(module.parse_args([*words, "--output_dir", str(folder), *more]))
    except SystemExit as left:
        return left.code
    finally:
        runtime.close_last()
    return 0


@pytest.fixture(scope="module")
def uninterrupted(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(asked, folder / "run", "--class_data_dir", str(folder / "class")) == 0
    return folder


def same(one, two):
    one, two = (load_file(folder / "run" / "pytorch_lora_weights.safetensors") for folder in (one, two))
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def interrupt(monkeypatch, owner, name, number, call=1):
    """The signal comes while `owner.name` is called for the `call`-th time, before it does its work."""
    real, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    return calls


# phase -> (where the signal comes, the how-many-eth call, optimizer steps that are saved then; None: nothing to save)
PHASES = {
    "class images": (prior.os, "replace", 2, None),
    "caching": (LatentDiffusion, "posterior", 1, None),
    "first validation": (validation.gallery, "png_bytes", 1, None),
    "step": (losses, "error", 5, 3),  # twice a step: of the prediction, and of zero
    "validation": (validation.gallery, "png_bytes", 3, 2),
    "saving": (manifests, "write", 1, 2),
}


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGUSR1"))]
)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(asked, uninterrupted, tmp_path, monkeypatch, capfd, phase, name):
    owner, function, call, step = PHASES[phase]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    drawn = (tmp_path if phase == "class images" else uninterrupted) / "class"
    folders = (tmp_path / "run", "--class_data_dir", str(drawn))
    with monkeypatch.context() as patched:
        calls = interrupt(patched, owner, function, getattr(signal, name), call)
        assert run(asked, *folders) == CODES[name]
    assert len(calls) >= call
    said = capfd.readouterr()
    assert f"{name}: stopping after this step" in said.err
    found = [path.name for _, path in manifests.listed(tmp_path / "run")]
    if step is None:
        assert found == [] and "stopped during" in said.out
    else:
        assert found[-1] == f"checkpoint-{step}" and f"stopped after step {step} of {TOTAL}" in said.out
        assert all(manifests.fault(path, "full") is None for _, path in manifests.listed(tmp_path / "run"))
    assert not list(tmp_path.glob("*/.tmp*"))
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]

    # The same command goes on, and nobody can tell.
    assert run(asked, *folders) == 0
    assert same(tmp_path, uninterrupted)
    names = [sorted(path.name for path in folder.glob("*.png")) for folder in (drawn, uninterrupted / "class")]
    assert names[0] == names[1] and len(names[0]) == 3


def test_a_stop_after_the_last_step_only_shortens_the_pictures(asked, uninterrupted, tmp_path, monkeypatch):
    """Nothing is left to stop: the result is written and the run is done."""
    with monkeypatch.context() as patched:
        interrupt(patched, Adapters, "save", signal.SIGTERM, call=3)  # checkpoints 2 and 4, then the result
        assert run(asked, tmp_path / "run", "--class_data_dir", str(uninterrupted / "class")) == 0
    assert same(tmp_path, uninterrupted)
    assert (tmp_path / "run" / "README.md").is_file()
    assert len(list((tmp_path / "run").glob(f"samples/step-{TOTAL:06d}/*.png"))) == 1


# Real processes


class Process:
    """A command whose lines are waited for; whatever happens, it and its children are gone afterwards."""

    def __init__(self, *words, **environment):
        given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        words = [str(word) for word in words]
        self.process = subprocess.Popen(
            words,
            env=given,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a process group of its own, as a terminal gives every command
        )
        self.said = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.stdout.close()
        self.process.wait()

    def until(self, pattern):
        watch = threading.Timer(PATIENCE, self.process.kill)  # or a word that never comes would be waited for for ever
        watch.start()
        try:
            for line in self.process.stdout:
                self.said += line
                if re.search(pattern, line):
                    return line
        finally:
            watch.cancel()
        raise AssertionError(f"ended without saying {pattern!r}:\n{self.said}")

    def rest(self):
        """What is said until the last process that holds the pipe has gone; then the launcher's exit code."""
        self.said += self.process.stdout.read()
        return self.process.wait(PATIENCE)


def toy(folder, *more):
    """A toy network in the real runtime: starts in half the time, and signals do not know the difference."""
    return [ROOT / "tests" / "toy_training.py", folder, "total=100000", "pause=0.01", "every=0", *more]


LAUNCHERS = {  # the words before a script, and what they leave with after Ctrl-C: theirs, or that of their child's end
    "accelerate": ([BIN / "accelerate", "launch", "--cpu", "--num_processes", "1"], (-signal.SIGINT, 1)),
    "torchrun": ([BIN / "torchrun", "--nproc_per_node", "1", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"], (1,)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "name"), [("accelerate", "SIGINT"), ("torchrun", "SIGINT"), ("torchrun", "SIGUSR1")]
)
def test_a_launcher_passes_the_wish_on(tmp_path, launcher, name):
    """Ctrl-C reaches a whole process group, launchers included, which pass it on: one wish all the same."""
    words, left_with = LAUNCHERS[launcher]
    with Process(*words, *toy(tmp_path)) as process:
        process.until(r"^step ")
        if name == "SIGINT":
            os.killpg(process.process.pid, signal.SIGINT)
        else:  # as SLURM's --signal=USR1@120; torchrun knows it when it is told
            process.process.send_signal(getattr(signal, name))
        assert process.rest() in left_with, process.said
    assert f"{name}: stopping after this step" in process.said and "again" not in process.said
    step = int(re.search(r"stopped after step (\d+) of", process.said)[1])
    assert manifests.fault(tmp_path / f"checkpoint-{step}", "full") is None
    # accelerate is gone with its traceback after a quarter of a second; a run that saved sooner announces it.
    last = process.said.strip().splitlines()[-1]
    code = errors.INTERRUPTED if name == "SIGINT" else errors.STOPPED_UNFINISHED
    gone = launcher == "accelerate" and last.startswith("stopped after step")
    assert gone or f"exit code {code}, for the reason above" in process.said


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("code", [errors.OPTIONS, errors.STOPPED_UNFINISHED])
def test_our_last_line_says_whose_traceback_follows(tmp_path, code, quiet):
    """A refusal and a time limit under `accelerate launch`, which answers both with a traceback of its own."""
    words = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "1", *["--quiet"] * quiet]
    script = (
        [ROOT / f"{SCRIPT}.py", "--resolution", "3"] if code == errors.OPTIONS else toy(tmp_path, "max_minutes=0.001")
    )
    with Process(*words, *script) as process:
        assert process.rest() == 1
    ours, _, theirs = process.said.partition("Traceback")
    if quiet:
        assert "exit code" not in ours and not theirs
        return
    last = ours.strip().splitlines()[-1]
    assert last.startswith(f"exit code {code}, for the reason above. A traceback below is that of accelerate launch")
    assert last.endswith(f"`python {script[0]} ...` ends without it.") and "CalledProcessError" in theirs
    assert ("--resolution is 3" if code == errors.OPTIONS else "stopped after step") in ours


@pytest.mark.slow
def test_a_stop_during_an_upload_that_fails_does_not_wait_for_the_hub(asked, uninterrupted, tmp_path):
    """A whole script in a process of its own, with a hub that has a bad day."""
    words = [sys.executable, ROOT / f"{SCRIPT}.py", *asked, "--push_to_hub", "--hub_model_id", "someone/dog"]
    words += ["--class_data_dir", uninterrupted / "class", "--output_dir", tmp_path / "run"]
    with fake_hub.Hub(fail={"/commit/": 1000}) as server:
        client = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        with Process(*words, **client) as process:
            process.until("upload failed")
            process.process.send_signal(signal.SIGTERM)
            assert process.rest() == hub.NOT_PUBLISHED, process.said
    assert process.said.count("once more in") == 1 and "not published" in process.said
    assert TOKEN not in process.said and server.files == {}
    assert same(tmp_path, uninterrupted)


def test_a_stop_during_an_upload_that_goes_well_lets_it_end(asked, uninterrupted, tmp_path, monkeypatch):
    import huggingface_hub

    from utils.preflight import remote

    class Api:
        def __init__(self, token):
            self.create_repo = lambda name, **options: SimpleNamespace(repo_id=name)

        def create_commit(self, repo, operations, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            sent.extend(operation.path_in_repo for operation in operations)
            return SimpleNamespace(repo_url=repo)

    sent = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(remote, "hub", lambda args: [])
    folders = ["--class_data_dir", str(uninterrupted / "class"), "--push_to_hub", "--hub_model_id", "someone/dog"]
    assert run(asked, tmp_path / "run", *folders) == 0
    assert "pytorch_lora_weights.safetensors" in sent


# What ipykernel does with a cell: the main thread runs it, whatever it raises is shown, and the kernel goes on.
KERNEL = """
import signal, sys, traceback
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs these tests in the background ignores it
sys.ps1 = "In [1]: "
for cell in sys.stdin:
    try:
        exec(cell)
    except BaseException:
        traceback.print_exc()
"""


@pytest.mark.slow
def test_a_notebook_cell_is_stopped_and_the_kernel_lives(asked, uninterrupted, tmp_path):
    words = [*asked, "--class_data_dir", str(uninterrupted / "class"), "--output_dir", str(tmp_path / "run")]
    long = [*words, "--max_train_steps", "100000", "--lr_scheduler", "constant"]
    long += ["--checkpointing_steps", "0", "--validation_steps", "0"]
    with Process(sys.executable, "-c", KERNEL) as kernel:
        cell = kernel.process.stdin

        def run_cell(text):
            cell.write(text + "\n")
            cell.flush()

        run_cell(f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r}); import {SCRIPT} as script")
        run_cell(f"script.main(script.parse_args({long}))")
        kernel.until(r"^step ")
        kernel.process.send_signal(signal.SIGINT)  # the stop button
        kernel.until("SystemExit: 130")
        step = int(re.search(r"stopped after step (\d+) of", kernel.said)[1])
        assert manifests.fault(tmp_path / "run" / f"checkpoint-{step}", "full") is None
        run_cell("print('alive', 6 * 7, signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
        kernel.until("alive 42 True")

        # Pressed twice, the cell ends at once without saving; then the same kernel trains again, in the same folder.
        run_cell("import time; from utils import losses; real = losses.error")
        # In short sleeps: a signal that comes just before a sleep begins is handled after it.
        run_cell("losses.error = lambda *given: (print('a long step'), [time.sleep(0.1) for _ in range(36000)])")
        run_cell(f"script.main(script.parse_args({long}))")
        kernel.until("a long step")
        kernel.process.send_signal(signal.SIGINT)
        kernel.until("stopping after this step")
        time.sleep(2 * signals.SAME_WISH_SECONDS)
        kernel.process.send_signal(signal.SIGINT)
        kernel.until("KeyboardInterrupt")
        run_cell("losses.error = real")
        finished = [word for word in words if word not in ("--resume_from_checkpoint", "latest")]
        run_cell(f"script.main(script.parse_args({[*finished, '--overwrite_output_dir']}))")
        kernel.until("^done: ")
        cell.close()
        kernel.rest()
    assert same(tmp_path, uninterrupted)
