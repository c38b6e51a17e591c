"""Errors in the middle of training: what was learned is saved first, whatever breaks."""

import importlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_two_processes import free_port

from utils import errors, hub, results, runtime, saved
from utils.checkpoints import manifests
from utils.runtime import failures

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "train_dreambooth": "sd1",
    "train_dreambooth_lora": "sd1",
    "train_dreambooth_lora_sdxl": "sdxl",
    "train_text_to_image": "sd1",
    "train_text_to_image_lora": "sd1",
    "train_pdmbooth": "sd1",
    "train_pdmbooth_lora": "sd1",
}


@pytest.fixture
def words(sd1, sdxl, photos, tmp_path):
    models = {"sd1": sd1, "sdxl": sdxl}
    for photo in photos.glob("*.png"):
        photo.with_suffix(".txt").write_text("a photo of sks dog")

    def made(script, options="", name="run"):
        data = (
            "--train_data_dir"
            if "text_to_image" in script
            else "--instance_prompt 'a photo of sks dog' --instance_data_dir"
        )
        return shlex.split(
            f"--pretrained_model_name_or_path '{models[SCRIPTS[script]]}' {data} '{photos}' --resolution 64"
            f" --output_dir '{tmp_path / name}' --report_to none --train_batch_size 1 --seed 3 {options}"
        )

    return made


@pytest.fixture
def train(words):
    """train(script, "--options") -> exit code, or the error that came out."""

    def call(script, options="", name="run"):
        module = importlib.import_module(script)
        try:
            module.main(module.parse_args(words(script, options, name)))
        except SystemExit as left:
            return left.code
        except Exception as problem:
            return problem
        finally:
            runtime.close_last()
        return 0

    return call


def kept(folder):
    return [path.name for _, path in manifests.listed(folder)]


def weights_of(folder):
    files = [file for file in folder.rglob("*.safetensors") if "checkpoint" not in str(file.relative_to(folder))]
    return {str(file.relative_to(folder)): load_file(file) for file in files}


def same(one, two):
    one, two = weights_of(one), weights_of(two)
    assert one.keys() == two.keys() and one
    return all(torch.equal(one[file][key], two[file][key]) for file in one for key in one[file])


# One process


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_error_in_a_step_saves_first_and_the_run_resumes_exactly(train, tmp_path, monkeypatch, capsys, script):
    from utils import losses

    assert train(script, "--max_train_steps 4", "whole") == 0
    real, calls = losses.error, []

    def broken(*given, **named):
        calls.append(0)
        if len(calls) == 5:  # each step compares twice: with the target, and zeros with it
            raise RuntimeError("cosmic ray")
        return real(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(losses, "error", broken)
        assert str(train(script, "--max_train_steps 4")) == "cosmic ray"
    assert kept(tmp_path / "run") == ["checkpoint-2"]
    assert "checkpoint-2 holds what was learned" in capsys.readouterr().err
    assert train(script, "--max_train_steps 4 --resume_from_checkpoint latest") == 0
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("where", ["log", "update", "data", "validation"])
def test_wherever_it_breaks_the_step_and_the_average_are_saved_together(train, tmp_path, monkeypatch, where):
    from utils import ema, validation

    options = "--max_train_steps 4 --use_ema --validation_prompt x --validation_steps 2 --num_validation_images 1"
    options += " --validation_num_inference_steps 1"
    assert train("train_dreambooth_lora", options, "whole") == 0

    def at_two(method, step_of):
        def broken(self, *given, **named):
            if step_of(self, *given) == 2:
                raise OSError(28, "No space left on device")
            return method(self, *given, **named)

        return broken

    with monkeypatch.context() as patched:
        if where == "log":
            patched.setattr(runtime.Run, "log", at_two(runtime.Run.log, lambda self, step: step))
        elif where == "update":
            patched.setattr(
                ema.Average,
                "update",
                at_two(ema.Average.update, lambda self, step: step if sys._getframe(2).f_code.co_name == "main" else 0),
            )
        elif where == "data":
            patched.setattr(runtime.Run, "_to_device", at_two(runtime.Run._to_device, lambda self, value: self.step))
        else:
            patched.setattr(validation.Sampler, "draw", at_two(validation.Sampler.draw, lambda self, step: step))
        assert isinstance(train("train_dreambooth_lora", options), OSError)
    assert kept(tmp_path / "run") == ["checkpoint-2"]
    assert train("train_dreambooth_lora", f"{options} --resume_from_checkpoint latest") == 0
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("fused", ["", "--fused_backward --max_grad_norm 0"])
def test_weights_in_the_middle_of_an_update_are_not_saved(train, tmp_path, monkeypatch, capsys, fused):
    real, steps = torch.optim.AdamW.step, []

    def torn(self, *given, **named):
        steps.append(0)
        result = real(self, *given, **named)
        if runtime._current.step == 2:
            raise RuntimeError("torn")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", torn)
    assert "torn" in str(train("train_dreambooth", f"--max_train_steps 4 --checkpointing_steps 1 {fused}"))
    assert kept(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(torch.optim.AdamW, "step", torn)
    train("train_dreambooth", f"--max_train_steps 4 {fused}")
    assert kept(tmp_path / "run") == [] and "while weights were being updated" in capsys.readouterr().err


def test_a_diverged_step_is_not_saved(train, tmp_path, monkeypatch):
    from utils import losses

    real = losses.error
    broken = lambda *given: real(*given) * (float("nan") if runtime._current.step == 2 else 1)  # noqa: E731
    monkeypatch.setattr(losses, "error", broken)
    assert train("train_dreambooth_lora", "--max_train_steps 4") == errors.DIVERGED
    assert kept(tmp_path / "run") == []


def test_a_killed_loader_process_costs_no_step(train, tmp_path, monkeypatch):
    from utils import losses

    real = losses.error

    def kills(*given):
        if runtime._current.step == 2:
            mine = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
            for pid in mine:
                os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.5)
        return real(*given)

    monkeypatch.setattr(losses, "error", kills)
    problem = train("train_dreambooth_lora", "--max_train_steps 30 --dataloader_num_workers 1")
    assert isinstance(problem, RuntimeError) and "worker" in str(problem)
    (name,) = kept(tmp_path / "run")
    assert manifests.fault(tmp_path / "run" / name, "full") is None


# Output that nobody reads


class Gone(io.StringIO):
    def write(self, text=""):
        raise OSError(5, "Input/output error")

    flush = write


def test_a_terminal_that_is_gone_does_not_stop_training(train, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    assert train("train_dreambooth_lora", "--max_train_steps 3") == 0
    (session,) = json.loads((tmp_path / "run" / "timings.json").read_text())["sessions"]
    assert "Input/output error" in session["lost_output"]


@pytest.mark.parametrize("signals", [["SIGHUP"], []])
def test_a_pipe_without_a_reader(words, tmp_path, signals):
    """`| tee` that dies, and a terminal that hangs up: with the signal 143 and a checkpoint, without it the end."""
    command = [
        sys.executable,
        ROOT / "train_dreambooth_lora.py",
        *words("train_dreambooth_lora", "--max_train_steps 60"),
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    for line in running.stdout:
        if line.startswith("step  3/"):
            break
    running.stdout.close()
    for name in signals:
        running.send_signal(getattr(signal, name))
    assert running.wait(120) == (143 if signals else 0)
    assert bool(kept(tmp_path / "run")) == bool(signals)
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists() != bool(signals)


@pytest.mark.parametrize("options", ["--max_train_steps 2", "--dry_run"])
def test_head_at_the_start(words, options):
    command = shlex.join([sys.executable, "train_dreambooth_lora.py", *words("train_dreambooth_lora", options)])
    command = ["bash", "-c", f"set -o pipefail; {command} | true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "cannot be written" not in done.stderr and "Traceback" not in done.stderr


# The result as a whole


@pytest.mark.parametrize("at", range(1, 30, 4))
def test_a_result_is_replaced_as_a_whole_or_completed_later(tmp_path, monkeypatch, at):
    """A kill between any two changes on the disk."""

    def pipeline(folder, value, shards=1):
        for part in ("unet", "vae"):
            (folder / part).mkdir(exist_ok=True)
            (folder / part / "config.json").write_text(str(value))
            for shard in range(shards):
                name = f"diffusion_pytorch_model{f'-{shard}-of-{shards}' if shards > 1 else ''}.safetensors"
                (folder / part / name).write_text(str(value))
        (folder / "model_index.json").write_text(str(value))

    def values(folder):
        return {path.read_text() for path in folder.rglob("*") if path.is_file() and path.name != "notes.txt"}

    folder = tmp_path / "run"
    folder.mkdir()
    pipeline(folder, 1)
    (folder / "unet" / "notes.txt").write_text("mine")

    class Killed(BaseException):
        pass

    changes = []

    def counted(real):
        def change(*given, **named):
            changes.append(0)
            if len(changes) == at:
                raise Killed
            return real(*given, **named)

        return change

    with monkeypatch.context() as patched:
        patched.setattr(results.os, "replace", counted(os.replace))
        patched.setattr(Path, "unlink", counted(Path.unlink))
        patched.setattr(results.manifests, "sync", counted(manifests.sync))
        rmtree = shutil.rmtree
        patched.setattr(
            results.shutil, "rmtree", lambda *given, **named: None if len(changes) == at else rmtree(*given, **named)
        )
        try:
            with results.replacing(folder) as inside:
                assert inside.name == "run"
                pipeline(inside, 2, shards=2)
        except Killed:
            pass
    if (folder / "model_index.json").exists():
        beside = {
            path.read_text()
            for part in ("unet", "vae")
            for path in (folder / part).glob("*[!x]t*")
            if path.name != "notes.txt"
        }
        assert len({*beside, (folder / "model_index.json").read_text()}) == 1
    assert saved.interrupted(folder) or (folder / "model_index.json").exists()
    if saved.interrupted(folder):
        wrong = []
        assert saved.base(str(folder), [], None, wrong) is None and "being replaced" in wrong[0]
        with pytest.raises(ValueError, match="being replaced"):
            hub.selected(folder)
    results.complete(folder)
    assert values(folder) in ({"1"}, {"2"}) and (folder / "unet" / "notes.txt").read_text() == "mine"
    if values(folder) == {"2"}:
        assert len(list((folder / "unet").glob("*.safetensors"))) == 2
    assert not list(folder.glob(".tmp*"))


def test_a_kill_while_the_result_is_written_leaves_the_older_one(train, tmp_path, monkeypatch):
    assert train("train_dreambooth", "--max_train_steps 2 --checkpointing_steps 2") == 0
    before = weights_of(tmp_path / "run")
    from utils.models.latent_diffusion import LatentDiffusion

    real = LatentDiffusion.save_pipeline

    def half(self, folder, **named):
        real(self, folder, **named)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LatentDiffusion, "save_pipeline", half)
    options = "--max_train_steps 3 --resume_from_checkpoint latest"
    assert isinstance(train("train_dreambooth", options), OSError)
    after = weights_of(tmp_path / "run")
    assert all(torch.equal(before[file][key], after[file][key]) for file in before for key in before[file])
    assert kept(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"] and not list((tmp_path / "run").glob(".tmp*"))


@pytest.mark.parametrize("script", ["train_dreambooth", "train_dreambooth_lora"])
def test_weights_that_are_no_numbers_do_not_replace_a_good_result(train, tmp_path, capsys, script):
    assert train(script, "--max_train_steps 2 --checkpointing_steps 2") == 0
    good = weights_of(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-2"
    (file,) = [*folder.glob("pytorch_lora*"), *folder.glob("unet/*.safetensors")]
    poisoned = load_file(file)
    next(iter(poisoned.values())).view(-1)[0] = float("nan")
    save_file(poisoned, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.relative_to(folder).as_posix()] = {
        "size": file.stat().st_size,
        "sha256": manifests.digest(file),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert train(script, "--max_train_steps 2 --resume_from_checkpoint latest") == errors.DIVERGED
    assert "holds NaN or inf" in capsys.readouterr().err
    after = weights_of(tmp_path / "run")
    assert all(torch.equal(good[file][key], after[file][key]) for file in good for key in good[file])


# The folder


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_a_folder_that_is_taken_away_is_made_again_with_all_that_is_known(train, tmp_path, monkeypatch, capsys, how):
    from utils import losses

    real, run = losses.error, tmp_path / "run"

    def away(*given):
        if runtime._current.step == 2 and run.exists():
            shutil.rmtree(run) if how == "removed" else run.rename(tmp_path / "elsewhere")
        return real(*given)

    monkeypatch.setattr(losses, "error", away)
    assert train("train_dreambooth_lora", "--max_train_steps 4 --checkpointing_steps 4") == 0
    assert "was renamed or removed" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4] and (run / "training_config.yaml").exists() and (run / "report.html").exists()
    assert kept(run) == ["checkpoint-4"]


# Several processes


PROGRAM = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from utils import losses, runtime
from utils.runtime import failures
failures.STUCK = 3.0
rank, real = int(os.environ["RANK"]), losses.error

def error(*given):
    if runtime._current.step == 2 and rank == {who}:
        {what}
    return real(*given)

losses.error = error
import {script} as script
script.main(script.parse_args(sys.argv[1:]))
"""


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("what", ["raise ValueError('cosmic ray')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_one_of_two_processes_ends(words, tmp_path, who, what):
    """The other one does not wait, and what was learned is saved."""
    script = "train_dreambooth_lora"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), who=who, what=what, script=script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    began = time.monotonic()
    done = subprocess.run(
        [*command, *words(script, "--max_train_steps 50")], env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 1 and time.monotonic() - began < 120
    assert (
        kept(tmp_path / "run") == ["checkpoint-2"]
        and manifests.fault(tmp_path / "run" / "checkpoint-2", "full") is None
    )
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    expected = (
        f"process {who}: ValueError: cosmic ray" if "raise" in what else "another process ended without a message"
    )
    assert expected in ours[-1], done.stderr


def test_a_long_phase_after_a_signal_is_not_taken_for_a_wait(tmp_path, monkeypatch):
    """Images are drawn or a large checkpoint is written: only where no phase is under way the process is ended."""
    ended = []
    monkeypatch.setattr(failures, "STUCK", 1.2)
    monkeypatch.setattr(failures.os, "_exit", ended.append)
    run = runtime.start(tmp_path)
    run.total = 5
    try:
        with failures.Watch(run, None):
            with run.phase("saving"):
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(2.5)
                assert not ended
            time.sleep(2.5)
            assert ended
    finally:
        run.close()


def test_a_process_that_waits_for_a_stopped_one_saves_and_leaves(words, tmp_path):
    script = "train_dreambooth_lora"
    program = tmp_path / "program.py"
    what = "os.kill(os.getppid(), signal.SIGUSR2); os.kill(os.getpid(), signal.SIGSTOP)"
    program.write_text(
        PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"), who=1, what=what.split("; ")[1], script=script)
    )
    ports = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, program, *words(script, "--max_train_steps 50")]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | ports | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    until = time.monotonic() + 100
    while time.monotonic() < until and "T (stopped)" not in Path(f"/proc/{ranks[1].pid}/status").read_text():
        time.sleep(0.2)
    time.sleep(1)
    ranks[0].send_signal(signal.SIGTERM)
    assert ranks[0].wait(60) == 143
    assert "no progress" in ranks[0].stderr.read()
    ranks[1].kill()
    ranks[1].wait()
    assert kept(tmp_path / "run") == ["checkpoint-2"]
