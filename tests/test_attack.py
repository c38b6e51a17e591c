"""Faults of the surroundings: closed streams, terminals, schedulers, YAML, names of files, changed checkpoints."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import fake_hub
import pytest
import tiny

from utils import captions, concepts, errors, hub, interrupts, strict
from utils.checkpoints import manifests

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [path.stem for path in sorted(ROOT.glob("train_*.py"))]
TOKEN = "hf_" + "aB3" * 8
LORA = "train_dreambooth_lora"


def refused(capsys, *words, script=LORA, code=2):
    """What a script answers to a command line that it refuses."""
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).parse_args(list(map(str, words)))
    assert stopped.value.code == code
    return capsys.readouterr().err


def given(config, tmp_path, *words, script=LORA):
    """The settings that a YAML file and a command line make together."""
    file = tmp_path / "run.yaml"
    file.write_text(config, encoding="utf-8")
    base = ["--config", file, "--pretrained_model_name_or_path", tmp_path, "--instance_data_dir", tmp_path]
    base += [] if "instance_prompt" in config else ["--instance_prompt", "sks"]
    return importlib.import_module(script).parse_args(list(map(str, [*base, *words])))


# Standard streams.


def started(code, redirected="", **environment):
    command = f'exec "$0" -c "$1" {redirected}'
    return subprocess.run(
        ["/bin/bash", "-c", command, sys.executable, code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_does_not_send_messages_into_the_files_of_a_run(tmp_path, closed):
    """The next file that is opened gets the number of a stream that was closed, and a signal's message goes there."""
    file = tmp_path / "metrics.jsonl"
    code = f"""
import os, sys
from utils import errors
errors.outlast_readers()
with open({str(file)!r}, "w") as file:
    os.write(1, b"progress"), os.write(2, b"SIGTERM: stopping after this step")
    print("told"), print("told", file=sys.stderr), sys.stderr.isatty()
    file.write("a line")
"""
    done = started(code, closed)
    assert done.returncode == 0 and file.read_text() == "a line"


def test_a_terminal_without_accents_does_not_swallow_the_rest():
    code = "from utils import errors; errors.outlast_readers(); print('h\\u00e9'); print('done')"
    done = started(code, PYTHONIOENCODING="ascii:strict")
    assert done.stdout.split() == [b"h\\xe9", b"done"]


def test_names_of_files_do_not_command_the_terminal():
    hostile = "bad\x1b]0;title\x07\x1b[2J.png"
    code = f"from utils import errors; errors.outlast_readers(); print({hostile!r}); print('\\x1b[31mred\\x1b[K\\r')"
    assert started(code).stdout == b"bad\\x1b]0;title\\x07\\x1b[2J.png\n\x1b[31mred\x1b[K\r\n"


# Secrets.


@pytest.mark.parametrize("script", [*SCRIPTS, "infer"])
def test_a_token_in_the_wrong_place_is_not_repeated(capsys, script):
    wrong = [TOKEN, f"--seed={TOKEN}", "--config", f"{TOKEN}.yaml", "--output_dir", TOKEN]
    told = refused(capsys, *wrong, script=script)
    assert TOKEN not in told and "[secret]" in told


def test_a_token_in_a_config_is_not_repeated(capsys, tmp_path):
    for config in (f"{TOKEN}: 1", f"seed: {TOKEN}", f"seed: !!int {TOKEN}", f"hub_token: [{TOKEN}"):
        with pytest.raises(SystemExit):
            given(config, tmp_path)
        assert TOKEN not in capsys.readouterr().err


# Signals of schedulers.


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGXCPU"])
def test_what_schedulers_send_before_a_kill_saves(monkeypatch, name):
    from utils.runtime import signals

    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("left without saving"))
    number = getattr(signal, name)
    stop = signals.Stop()
    stop.install()
    try:
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.code == errors.STOPPED_UNFINISHED
        if name == "SIGXCPU":  # the kernel sends it every second from then on
            stop.since -= 60
            os.kill(os.getpid(), number)
    finally:
        stop.restore()
    assert signal.getsignal(number) == signal.SIG_DFL and name in interrupts.CODES


def test_a_run_at_its_limit_of_cpu_time_is_saved(sd1, photos, tmp_path):
    """A real one: LSF, Grid Engine and `ulimit -S -t` send SIGXCPU."""
    out = tmp_path / "run"
    words = ["--pretrained_model_name_or_path", sd1, "--instance_data_dir", photos, "--instance_prompt", "sks dog"]
    words += ["--output_dir", out, "--max_train_steps", 200_000, "--train_batch_size", 1, "--report_to", "none"]
    with subprocess.Popen([sys.executable, ROOT / f"{LORA}.py", *map(str, words)], stderr=subprocess.PIPE) as run:
        while run.poll() is None and not ((out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size):
            time.sleep(0.1)
        run.send_signal(signal.SIGXCPU)
        run.communicate(timeout=60)
    assert run.returncode == errors.STOPPED_UNFINISHED
    (checkpoint,) = out.glob("checkpoint-*")
    assert manifests.fault(checkpoint, "full") is None


# Options and --config.


def test_a_config_says_what_stands_in_it(tmp_path):
    """YAML reads these as false, 8, 1, and a date."""
    args = given("instance_prompt: no\nseed: 010\nmax_train_steps: 0001\ntracker_project_name: 2020-01-01", tmp_path)
    assert (args.instance_prompt, args.seed, args.max_train_steps) == ("no", 10, 1)
    assert args.tracker_project_name == "2020-01-01"
    args = given("center_crop: on\nlearning_rate: 1e-4\nvalidation_prompt: [yes, 1_0]\nrank: null", tmp_path)
    assert args.center_crop is True and args.learning_rate == 1e-4 and args.rank == args.defaults.rank
    assert args.validation_prompt == ["yes", "1_0"]


@pytest.mark.parametrize(
    "line, told",
    [
        ("resolution: 1:30", "resolution is 1:30"),  # 90 to YAML
        ("validation_prompt: [[a, b], [c]]", "holds a list"),
        ("instance_prompt: {a: b}", "holds a dict"),
        ("instance_prompt: !!binary aGVsbG8=", "holds a bytes"),
        ("validation_prompt: !!set {a, b}", "holds a set"),
        ('instance_prompt: "a\\0b"', "NUL"),
        ('instance_prompt: "a\\ud800b"', "not UTF-8"),
    ],
)
def test_a_config_that_holds_no_option_is_refused(tmp_path, capsys, line, told):
    with pytest.raises(SystemExit):
        given(line, tmp_path)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--instance_prompt", "--validation_prompt", "--output_dir", "--class_prompt"])
def test_bytes_that_are_no_text_are_refused_at_once(capsys, option):
    told = refused(capsys, option, os.fsdecode(b"sks \xff dog"))
    assert f"{option} holds characters that are not UTF-8" in told and "PYTHONUTF8" in told


def test_texts_from_files_that_cannot_be_written_are_refused(tmp_path):
    tiny.photos(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "photo-0.png", "text": "a \\ud800 dog"}\n')
    _, complaints = captions.read(tmp_path, [tmp_path / "photo-0.png"])
    assert len(complaints) == 1 and "metadata.jsonl:1" in complaints[0] and "not UTF-8" in complaints[0]
    _, complaints = concepts.read([{"instance_data_dir": "x", "instance_prompt": "a \ud800"}])
    assert "not UTF-8" in complaints[0]
    assert strict.unwritable("犬 \U0001f415 \u202e") is None


def test_a_loop_of_links_is_refused(tmp_path, capsys):
    os.symlink("loop", tmp_path / "loop")
    options = ("--output_dir", "--instance_data_dir", "--pretrained_model_name_or_path", "--config")
    for option in options:
        assert f"{option} is {tmp_path / 'loop'}" in refused(capsys, option, tmp_path / "loop")


def test_a_negative_number_in_any_notation_is_a_value(capsys):
    for number in ("-1e-4", "-1", "-.5", "-2E+3"):
        told = refused(capsys, "--learning_rate", number)
        assert f"--learning_rate is {number}: it must be a number above 0" in told


def test_surroundings_that_no_run_can_start_in_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE is 'two'" in refused(capsys)
    monkeypatch.delenv("WORLD_SIZE")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "was removed; cd to one that exists" in refused(capsys)
    done = subprocess.run([sys.executable, "-OO", ROOT / "infer.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "python -OO" in done.stderr


# Names of files.


@pytest.mark.parametrize("picture, text", [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_caption_is_found_whichever_way_its_accents_are_written(tmp_path, picture, text):
    """Otherwise a prompt takes its place without a word."""
    tiny.photo().save(tmp_path / unicodedata.normalize(picture, "fété.png"))
    (tmp_path / unicodedata.normalize(text, "fété.txt")).write_text("a party", encoding="utf-8")
    assert captions.read(tmp_path, list(tmp_path.glob("*.png")), prompt="sks")[0] == ["a party"]


# Checkpoints that somebody changed.


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    manifests.write(folder, 2, {"seed": 3})
    assert manifests.fault(folder, "full") is None
    return folder


def test_a_checkpoint_under_another_number_is_not_the_newest(checkpoint):
    """`latest` goes by the name, so every later resume would fall back to it."""
    renamed = checkpoint.rename(checkpoint.with_name("checkpoint-30"))
    assert "holds step 2: rename it to checkpoint-2" in manifests.fault(renamed, "full")
    kept = renamed.rename(checkpoint.with_name("the-good-one"))
    assert manifests.fault(kept, "full") is None


@pytest.mark.parametrize(
    "change, told",
    [
        ({"step": -5}, "names no step"),
        ({"files": {}}, "names no file"),
        ({"format": 99}, "newer version"),
        ({"format": "x"}, "cannot be read"),
    ],
)
def test_a_manifest_that_says_nothing_is_refused(checkpoint, change, told):
    file = checkpoint / manifests.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert told in manifests.fault(checkpoint, "full")


def test_a_manifest_that_is_no_file_or_endless_is_refused(checkpoint):
    file = checkpoint / manifests.MANIFEST
    file.write_text("[" * 100_000)
    assert manifests.fault(checkpoint, "full") == "manifest.json cannot be read"
    file.unlink()
    os.mkfifo(file)  # would be waited for
    assert manifests.fault(checkpoint, "full") == "manifest.json is missing"


def test_a_checkpoint_may_be_named_with_a_slash_behind_it(checkpoint):
    from utils import preflight

    assert manifests.named(checkpoint.parent, "checkpoint-2/") == checkpoint
    assert preflight._named(checkpoint.parent, "checkpoint-2/") == checkpoint


# The output folder.


def test_metrics_that_are_taken_away_during_a_run_are_written_again(tmp_path):
    from utils.runtime import progress

    metrics = progress.Metrics(tmp_path)
    metrics.open(0)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 0.5})
        if step == 2:
            metrics.path.unlink()
            metrics.restore()
    metrics.close()
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2, 3]


# The hub.


def test_a_hub_that_refuses_or_talks_nonsense_is_called_by_its_name(sd1, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(
        next(Path(sd1, "unet").glob("*.safetensors")).read_bytes()
    )
    with fake_hub.Hub(role="read") as one:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", one.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", one.url, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", one.url)
        assert hub.publish(folder, token=TOKEN, waits=()) is False
    told = capsys.readouterr().err
    assert "the token may not write there" in told and TOKEN not in told
    portal = json.JSONDecodeError("Expecting value", "<html>", 0)
    assert "a proxy or a log-in page may be in between" in hub._reason(portal, None)
