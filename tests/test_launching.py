"""What `accelerate launch` and its configuration say, and what trackers get: the same run as by our own options."""

import os
import shlex
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_scripts import PROMPT, VALIDATE, losses, same, train, weights  # noqa: F401
from test_two_processes import free_port

LORA = "train_dreambooth_lora"
SHORT = "--max_train_steps 3 --train_batch_size 2 --center_crop --learning_rate 1e-3"


def test_compiled_computes_the_same_and_leaves_no_trace(train, monkeypatch):  # noqa: F811
    """Graph capture and its backward without a compiler, set as `accelerate launch --dynamo_backend` does."""
    options = f"{SHORT} --checkpointing_steps 2"
    eager = train(LORA, options, "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    compiled = train(LORA, options, "compiled")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    on = train(LORA, f"{options} --resume_from_checkpoint '{eager / 'checkpoint-2'}'", "on")
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    off = train(LORA, f"{options} --resume_from_checkpoint '{compiled / 'checkpoint-2'}'", "off")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    for again in (on, off):
        assert losses(again) == pytest.approx(losses(eager)[2:], rel=1e-4)
    for folder in (compiled, compiled / "checkpoint-2", on, off):
        assert weights(folder).keys() == weights(eager).keys()
        assert not any("_orig_mod" in key for key in weights(folder))


def test_the_option_compiles_what_learns(train, monkeypatch):  # noqa: F811
    """A pipeline for `from_pretrained` comes out of it; inductor itself is too slow for a test."""
    real, asked = torch.compile, []

    def compile(module, backend, **options):
        asked.append((type(module).__name__, str(backend)))
        return real(module, backend="eager")

    eager = train("train_dreambooth", SHORT, "eager")
    monkeypatch.setattr(torch, "compile", compile)
    compiled = train("train_dreambooth", f"{SHORT} --compile", "compiled")
    assert asked == [("UNet2DConditionModel", "inductor")]
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    assert weights(compiled).keys() == weights(eager).keys()


def test_bf16_by_option_and_by_the_launchers_word_are_one_run(train, monkeypatch):  # noqa: F811
    by_option = train(LORA, f"{SHORT} --mixed_precision bf16", "option")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what the launcher tells its child
    by_launcher = train(LORA, SHORT, "launcher")
    assert losses(by_launcher) == losses(by_option) and same(by_launcher, by_option)
    plain = train(LORA, f"{SHORT} --mixed_precision no", "plain")  # our own option has the last word
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert losses(plain) == losses(train(LORA, SHORT, "neither")) != losses(by_option)


@pytest.mark.slow
def test_bf16_by_accelerate_launch_and_by_its_configuration(train, sd1, photos, tmp_path):  # noqa: F811
    by_option = train(LORA, f"{SHORT} --mixed_precision bf16", "option")
    file = tmp_path / "bf16.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\nuse_cpu: true\n"
    )
    for name, words in (("said", "--cpu --mixed_precision bf16"), ("configured", f"--config_file '{file}'")):
        launched = f"-m accelerate.commands.accelerate_cli launch {words} --num_processes 1 --num_machines 1"
        launched += f" '{ROOT / LORA}.py' --pretrained_model_name_or_path '{sd1}' --instance_data_dir '{photos}'"
        launched += f" --instance_prompt '{PROMPT}' --output_dir '{tmp_path / name}' --seed 3 --report_to none {SHORT}"
        done = subprocess.run([sys.executable, *shlex.split(launched)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert losses(tmp_path / name) == losses(by_option)
        assert same(tmp_path / name, by_option)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("single_gpu", "--mixed_precision no"),  # as the file says for a machine without a GPU
        ("cpu_2proc", ""),
        ("multi_gpu", "--mixed_precision no"),
        ("multi_node", "--mixed_precision no --num_machines 1 --num_processes 2 --main_process_ip 127.0.0.1"),
    ],
)
def test_our_launch_configurations_train_on_a_cpu(sd1, photos, tmp_path, name, more):
    words = f"--config_file '{ROOT / 'accelerate_configs' / name}.yaml' {more}"
    if name != "single_gpu":
        words += f" --main_process_port {free_port()}"
    words += f" '{ROOT / LORA}.py' --pretrained_model_name_or_path '{sd1}' --instance_data_dir '{photos}' --seed 3"
    words += f" --instance_prompt '{PROMPT}' --output_dir '{tmp_path / 'run'}' --report_to none {SHORT}"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *shlex.split(words)]
    environment = os.environ | ({} if name == "single_gpu" else {"ACCELERATE_USE_CPU": "true"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 3
    text = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text()
    assert name != "single_gpu" or more in text


def test_wandb_without_a_login_asks_nobody_and_keeps_all(train, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Numbers, settings and pictures, in the run's own folder, for `wandb sync`."""
    monkeypatch.delenv("WANDB_MODE")  # set for tests
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", "remote", "add", "origin", "https://example.org/smith.git"], check=True)
    for name in ("WANDB_API_KEY", "WANDB_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "smith-laptop")
    monkeypatch.setattr(sys, "argv", ["smith.py", "--instance_data_dir", "smith_children"])
    folder = train(LORA, f"{SHORT} --report_to wandb --validation_steps 1 {VALIDATE}")
    assert "wandb is not logged in" in capsys.readouterr().err
    assert not (tmp_path / "wandb").exists()
    (recorded,) = (folder / "logs" / "wandb").glob("offline-run-*")
    pictures = [path.name.split("_")[:2] for path in recorded.rglob("*.png")]
    assert sorted(pictures) == [["validation", str(step)] for step in (0, 1, 2, 3) for _ in range(2)]
    names, until = (b"grad_norm", b"learning_rate", b"lora_alpha"), time.monotonic() + 30
    while not all(name in next(recorded.glob("*.wandb")).read_bytes() for name in names):
        assert time.monotonic() < until, "wandb's own process writes the record, on a busy machine a little later"
        time.sleep(0.5)
    # Nothing of the machine: command line, host, the remote of the folder's repository.
    for file in [path for path in recorded.rglob("*") if path.is_file()]:
        assert not [word for word in (b"smith-laptop", b"smith_children", b"smith.git") if word in file.read_bytes()]
