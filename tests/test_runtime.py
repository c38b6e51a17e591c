"""The runtime with a toy network: counting, accumulation, guard, signals, locks, and two real processes."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests import toy_training
from tests.toy_training import Family, Learns, train
from utils import checkpoints, errors, report, runtime
from utils.runtime import guard, progress, signals, startup

BIN = Path(sys.executable).parent
PROGRAM = str(Path(__file__).with_name("toy_training.py"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
MEETING_POINT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def closed():
    yield
    if runtime._current:
        runtime._current.close()


def told(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def environment(**extra):
    return {**os.environ, **ONE_THREAD, **extra}


# Counting


def test_steps_count_optimizer_steps_from_one(tmp_path):
    run = runtime.start(tmp_path, seed=1, accumulate=3)
    family, learns = Family(), Learns()
    optimizer = run.prepare(family, learns, torch.optim.SGD(learns.parameters(), lr=0.1))
    seen, due = [], []
    before = learns.digest()
    for step, batch in run.steps(toy_training.loader(4, accumulate=3), 4, 7):
        seen.append((step, batch["ids"].tolist()))
        assert learns.digest() == before or step > 5
        with run.accumulate(learns):
            run.backward(family.unet(torch.ones(2, 4)).sum(), learns, optimizer)
        if run.due(step, 2):
            due.append(step)
        assert not run.due(step, None)
        assert not run.due(step, 0)
    assert [step for step, _ in seen] == [5, 5, 5, 6, 6, 6, 7, 7, 7]
    assert [ids for _, ids in seen] == [[2 * k, 2 * k + 1] for k in range(12, 21)]
    assert due == [6]
    assert run.step == 7
    assert run.finish() == 0


def test_accumulated_gradients_are_divided_once(tmp_path):
    """Batch 4 = batch 2 twice, and = plain torch without any of this."""
    one = train(tmp_path / "a", total=3, batch=4, accumulate=1, dropout=False)
    assert train(tmp_path / "b", total=3, batch=4, accumulate=1, dropout=False) == one
    train(tmp_path / "c", total=3, batch=2, accumulate=2, dropout=False)
    for whole, split in zip(told(tmp_path / "a"), told(tmp_path / "c"), strict=True):
        assert whole["loss"] == pytest.approx(split["loss"], rel=1e-5)
        assert whole["grad_norm"] == pytest.approx(split["grad_norm"], rel=1e-5)


def test_parts_of_a_loss_are_means_over_the_batches_that_have_them(tmp_path):
    """Batch 2 four times: two of them hold a class image, and the other two count as no loss of zero."""
    options = {"accumulate": 4, "dropout": False, "classes": True}
    train(tmp_path / "whole", total=3, every=1, **options)
    learns, rows = Learns(), told(tmp_path / "whole")
    for step, row in enumerate(rows):
        if step:
            learns.load(tmp_path / "whole" / f"checkpoint-{step}")
        x = toy_training.randomness.Draws(7, torch.arange(8 * step, 8 * step + 8)).normal("x", (4,))
        error = (learns.net.eval()(x).squeeze(1) - x.sum(dim=1)).square().tolist()
        photos = [error[1], (error[2] + error[3]) / 2, error[5], (error[6] + error[7]) / 2]  # a number for each batch
        assert row["loss_instance"] == pytest.approx(sum(photos) / 4, rel=1e-5)
        assert row["loss_prior"] == pytest.approx((error[0] + error[4]) / 2, rel=1e-5)
        assert row["loss"] == pytest.approx(row["loss_instance"] + 0.5 * row["loss_prior"] * 2 / 4, rel=1e-5)

    train(tmp_path / "cut", total=2, **options)
    train(tmp_path / "cut", total=3, resume="latest", **options)
    parts = [
        [{n: v for n, v in row.items() if "loss" in n} for row in told(tmp_path / name)] for name in ("whole", "cut")
    ]
    assert parts[0] == parts[1] and len(parts[1]) == 3
    train(tmp_path / "alone", total=1, batch=1, classes=True)
    assert "loss_prior" not in told(tmp_path / "alone")[0], "one part alone is the loss"


def test_equals_a_plain_loop(tmp_path):
    train(tmp_path, total=3, batch=4, dropout=False, max_norm=0.5)
    learns = Learns()
    optimizer = torch.optim.AdamW(learns.parameters(), lr=1e-2, fused=True)
    expected = []
    for step, batch in zip(range(3), toy_training.loader(0, 4)):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + 0.1 * step)
        x = toy_training.randomness.Draws(7, batch["ids"]).normal("x", (4,))
        learns.net[1].p = 0.0
        loss = (learns.net(x).squeeze(1) - x.sum(dim=1)).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learns.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item(), optimizer.param_groups[0]["lr"]))
    assert [(row["loss"], row["grad_norm"], row["lr"]) for row in told(tmp_path)] == expected


def test_clipping_clips(tmp_path):
    digests = {train(tmp_path / str(norm), total=2, max_norm=norm, optimizer="adafactor") for norm in (1e-9, None)}
    assert len(digests) == 2


def test_environment_cannot_change_the_accumulation(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "5")
    run = runtime.start(tmp_path, seed=1, accumulate=2)
    assert run.accelerator.gradient_accumulation_steps == 2


def test_a_loop_without_backward_is_an_error(tmp_path):
    run = runtime.start(tmp_path, seed=1)
    with pytest.raises(RuntimeError, match="backward"):
        for _ in run.steps(toy_training.loader(0), 0, 2):
            pass


def test_data_that_end_are_an_error(tmp_path):
    run = runtime.start(tmp_path, seed=1)
    with pytest.raises(RuntimeError, match="endless"):
        list(run.steps([], 0, 2))


def test_nothing_that_learns_is_an_error(tmp_path):
    run = runtime.start(tmp_path, seed=1)
    learns = Learns()
    optimizer = run.prepare(Family(), learns, torch.optim.SGD(learns.parameters(), lr=0.1))
    for _ in run.steps(toy_training.loader(0), 0, 1):
        with run.accumulate(learns), pytest.raises(RuntimeError, match="no parameter received a gradient"):
            run.backward(torch.ones(1, requires_grad=True).sum(), learns, optimizer)
        break


def test_dropout_is_a_function_of_the_step(tmp_path):
    assert train(tmp_path / "a") == train(tmp_path / "b")
    assert train(tmp_path / "a2", dropout=False) != train(tmp_path / "b2")


# Precision, several runs in one process


def test_precision_by_option_and_by_environment(tmp_path, monkeypatch):
    assert runtime.start(tmp_path, seed=1, mixed_precision="bf16").dtype == torch.bfloat16
    assert runtime.start(tmp_path, seed=1).dtype == torch.float32  # the run before is closed, its settings are gone
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert runtime.start(tmp_path, seed=1).dtype == torch.bfloat16
    assert runtime.start(tmp_path, seed=1, mixed_precision="no").dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_fp16_without_a_gpu_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        runtime.start(tmp_path, seed=1, mixed_precision="fp16")
    assert stopped.value.code == 2
    assert "bf16" in capsys.readouterr().err


def test_deterministic_is_switched_off_again(tmp_path):
    runtime.start(tmp_path, seed=1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    runtime.start(tmp_path, seed=1)
    assert not torch.are_deterministic_algorithms_enabled()


# What is written


def test_settings_are_saved_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    config = {
        "learning_rate": 1e-4,
        "seed": None,
        "hub_token": "hf_aaaaaaaaaaaaaaaaaaaaaaaa",
        "tokenizer_name": "words",
        "prompts": ["a hf_bbbbbbbbbbbbbbbbbbbbbbbb", "key 0123456789abcdef"],
        "revision": "a" * 40,
    }
    run = runtime.start(tmp_path, config=config, report_to="tensorboard")
    learns = Learns()
    optimizer = run.prepare(Family(), learns, torch.optim.SGD(learns.parameters(), lr=0.1))
    for step, _ in run.steps(toy_training.loader(0), 0, 1):
        with run.accumulate(learns):
            run.backward(learns.net(torch.ones(2, 4)).sum(), learns, optimizer)
        run.log(step, extra=torch.tensor(2.5))
    from PIL import Image

    run.log_images(1, {"validation": [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))]})
    assert run.trackers.active  # no warning switched it off
    run.finish()
    saved = yaml.safe_load((tmp_path / "training_config.yaml").read_text())
    assert saved["seed"] == run.seed
    assert saved["learning_rate"] == 1e-4
    assert saved["tokenizer_name"] == "words"
    assert saved["revision"] == "a" * 40
    assert told(tmp_path)[0]["extra"] == 2.5
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        for secret in (b"hf_aaaa", b"hf_bbbb", b"0123456789abcdef"):
            assert secret not in content, path


def test_a_drawn_seed_is_said_saved_and_found_again(tmp_path, capsys):
    seed = runtime.start(tmp_path, config={"seed": None}).seed
    assert f"--seed {seed}" in capsys.readouterr().out
    assert runtime.start(tmp_path, config={"seed": None}, resuming="latest").seed == seed
    assert runtime.start(tmp_path, seed=5, config={"seed": 5}, resuming="latest").seed == 5
    others = {runtime.start(tmp_path, config={"seed": None}).seed for _ in range(3)}
    assert len(others) == 3


def test_the_seed_of_a_run_comes_with_its_checkpoint(tmp_path, capsys):
    """Also of another run's, which the output folder knows nothing of, and of one whose settings are lost."""
    for seed, name in ((5, "theirs"), (6, "mine")):
        checkpoints.Checkpoints(tmp_path / name, state={}, identity={"seed": seed}).save(3)
    startup.write_settings(tmp_path / "mine", {"seed": 7})
    theirs = str(tmp_path / "theirs" / "checkpoint-3")
    for which, seed in ((theirs, 5), ("checkpoint-3", 6), ("latest", 6)):
        assert startup.settle_seed(None, tmp_path / "mine", which) == seed
    assert startup.settle_seed(9, tmp_path / "mine", theirs) == 9
    assert startup.settle_seed(None, tmp_path / "theirs", "latest") == 5
    assert "drawn" not in capsys.readouterr().out
    (tmp_path / "theirs" / "checkpoint-3" / "manifest.json").write_text("[1]")
    startup.settle_seed(None, tmp_path / "theirs", "latest")
    assert "drawn" in capsys.readouterr().out


def test_the_last_line_names_what_is_there(tmp_path, capsys):
    run = runtime.start(tmp_path, seed=1)
    for more, said in (
        ("", "the adapters"),
        ("report.html", "the adapters and report.html"),
        ("test_samples", "the adapters, test_samples/ and report.html"),
        ("samples", "the adapters, samples/, test_samples/ and report.html"),
    ):
        (tmp_path / more).mkdir(exist_ok=True)
        run.done("the adapters")
        assert capsys.readouterr().out.endswith(f"done: '{tmp_path}' holds {said}\n")


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    train(tmp_path, total=6, every=4)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 7, "lo')  # cut by a kill
    for folder in ("checkpoint-6",):
        (tmp_path / folder).rename(tmp_path / f"gone-{folder}")
    train(tmp_path, total=8, every=4, resume="latest")
    assert [row["step"] for row in told(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    sessions = json.loads((tmp_path / "timings.json").read_text())["sessions"]
    assert sessions[-1]["first_step"] == 4
    assert sessions[-1]["peak_memory_gib"] > 0
    assert {"saving", "training"} <= set(sessions[-1]["phases"])
    train(tmp_path, total=2)
    assert [row["step"] for row in told(tmp_path)] == [1, 2]


def test_metrics_are_strict_json(tmp_path):
    metrics = progress.Metrics(tmp_path)
    metrics.open(0)
    metrics.write(1, {"loss": float("nan"), "lr": 0.1})
    metrics.close()
    assert told(tmp_path) == [{"step": 1, "loss": "nan", "lr": 0.1}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_costs_lines_but_not_the_training(tmp_path, capsys):
    metrics = progress.Metrics(tmp_path)
    metrics.open(0)
    metrics.file.close()
    metrics.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115 - closed in close()
    for step in (1, 2):
        metrics.write(step, {"loss": 0.5})
    metrics.close()
    assert capsys.readouterr().err.count("training goes on") == 1


def test_plain_lines_are_few_and_a_terminal_gets_one(tmp_path):
    class Screen:
        def __init__(self, terminal):
            self.text, self.terminal = "", terminal

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return self.terminal

    for terminal in (False, True):
        screen = Screen(terminal)
        line = progress.Line(0, 1000, torch.device("cpu"), screen)
        for step in range(1, 1001):
            line.step(step, 0.5, 0.25, 1e-4)
        assert "step 1000/1000  smoothed loss 0.5       lr 1.00e-04  4.00 steps/s  0:00 left" in screen.text
        if terminal:
            assert screen.text.count("\n") == 1
        else:
            assert screen.text.count("\n") == 51
            assert "\r" not in screen.text
        assert re.search(r"step +1/1000 .* 4:10 left", screen.text)


def test_terminal_and_report_tell_one_loss(tmp_path, capsys):
    """Also of a resumed run, whose curve begins before this session."""
    train(tmp_path, total=4, every=2)
    train(tmp_path, total=7, resume="latest")
    (line,) = (one for one in capsys.readouterr().out.splitlines() if "step 7/7" in one)
    tiles = dict(report._tiles(report.curves.read_metrics(tmp_path / "metrics.jsonl"), 7, 7, []))
    assert f"smoothed loss {tiles['smoothed loss (mean of about 50 steps)']} " in line
    losses = [row["loss"] for row in told(tmp_path)]
    assert report.curves.smoothed_end(losses) == pytest.approx(sum(losses) / 7, rel=0.1)


def test_phases_do_not_count_as_steps(tmp_path):
    clock = progress.Clock()
    clock.begin()
    with clock.phase("outer"), clock.phase("inner"):
        time.sleep(0.2)
    assert clock.step() < 0.1
    assert clock.phases["outer"] >= 0.2
    assert "inner" not in clock.phases


# Not finite


def test_nan_stops_before_the_optimizer_step(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, total=8, poison=3, every=1)
    assert stopped.value.code == 4
    said = capsys.readouterr().err
    assert "step 3" in said
    assert "photo-5" in said  # the second of batch 3, and only it
    assert "photo-4" not in said
    assert "bf16" in said
    assert [row["step"] for row in told(tmp_path)] == [1, 2]
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["micro_batches_by_process"][0][0]["ids"] == [4, 5]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_nan_can_be_skipped(tmp_path):
    train(tmp_path, total=5, poison=3, on_nan="skip")
    rows = told(tmp_path)
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 1, 0, 0]
    assert rows[2]["loss"] == "nan"
    assert all(math.isfinite(row["loss"]) for row in rows[3:])


def test_skipping_has_an_end(tmp_path):
    watch = guard.Guard(tmp_path, "skip")
    for _ in range(guard.MOST_SKIPS):
        assert not watch.allows(1, float("nan"), 1.0, False, [])
    assert watch.allows(1, 1.0, 1.0, False, [])
    for _ in range(guard.MOST_SKIPS):
        assert not watch.allows(1, 1.0, float("inf"), False, [])
    with pytest.raises(SystemExit) as stopped:
        watch.allows(1, 1.0, float("inf"), False, [])
    assert stopped.value.code == 4


def test_overflows_of_the_loss_scale_are_no_divergence(tmp_path):
    watch = guard.Guard(tmp_path, "stop")
    for _ in range(guard.MOST_SCALER_SKIPS - 1):
        assert not watch.allows(1, 1.0, float("inf"), True, [])
    with pytest.raises(SystemExit) as stopped:
        watch.allows(1, 1.0, float("inf"), True, [])
    assert stopped.value.code == 4


def test_a_loss_scale_that_overflows_leaves_the_step_out(tmp_path):
    """The fp16 path with a scaler on the CPU: weights stay, the scale falls, the next step is taken."""
    run = runtime.start(tmp_path, seed=1)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    family, learns = Family(), Learns()
    optimizer = run.prepare(family, learns, torch.optim.AdamW(learns.parameters(), lr=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    digests = [learns.digest()]
    for step, _ in run.steps(toy_training.loader(0), 0, 3):
        with run.accumulate(learns):
            run.backward(family.unet(torch.full((2, 4), 0.5)).sum(), learns, optimizer, schedule)
        run.log(step)
        digests.append(learns.digest())
    skipped = [row.get("skipped", 0) for row in told(tmp_path)]
    assert skipped == [1, 0, 0]
    assert digests[0] == digests[1] != digests[2]
    assert run.scaler.get_scale() == 2.0**126
    assert schedule.last_epoch == 3


# Loss spikes


def jumping(count, seed, batch=1):
    """Losses as diffusion training gives them: a hundredfold between timesteps, so most of a step's loss is chance."""
    rng = random.Random(seed)
    one = lambda: math.exp(math.log(0.6) - 5 * rng.random()) * rng.gammavariate(8, 1 / 8)  # noqa: E731
    return [sum(one() for _ in range(batch)) / batch for _ in range(count)]


@pytest.mark.parametrize("batch", [1, 4])
def test_chance_is_no_spike_and_a_loss_that_leaves_its_course_is_one(batch):
    course, losses = guard.Course(), jumping(3000, seed=batch, batch=batch)
    assert not any(course.follow(loss) for loss in losses)
    assert not course.follow(1e3) and not course.follow(float("nan")), "one step is no course"
    told = [course.follow(max(1.0, loss)) for loss in jumping(200, seed=9, batch=batch)]
    begins = [step for step, times in enumerate(told) if times]
    assert len(begins) == 1 and begins[0] < 20 and told[begins[0]] > 1.5
    calm = [course.follow(loss) for loss in jumping(600, seed=10, batch=batch)]
    again = [course.follow(max(1.0, loss)) for loss in jumping(100, seed=11, batch=batch)]
    assert not any(calm) and sum(bool(times) for times in again) == 1, "told anew only after it had calmed down"


def test_a_resumed_course_remembers(tmp_path):
    losses = jumping(300, seed=3) + [1.0] * 40
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    whole = guard.Guard(tmp_path, on_loss_spike="stop")
    again = guard.Guard(tmp_path, on_loss_spike="stop")
    again.recall(tmp_path / "metrics.jsonl", 290)
    stops = []
    for watch, first in ((whole, 0), (again, 290)):
        with pytest.raises(SystemExit) as stopped:
            for step in range(first, len(losses)):
                watch.spike(step + 1, losses[step])
        stops.append((stopped.value.code, step))
    assert stops[0] == stops[1] and stops[0][0] == 4 and stops[0][1] > 300


@pytest.mark.parametrize("option", ["warn", "stop", "off"])
def test_a_spike_is_told_or_stops_before_the_optimizer_step(tmp_path, monkeypatch, capsys, option):
    asked = []
    monkeypatch.setattr(
        guard.Course, "follow", lambda course, loss: asked.append(loss) or (7.0 if len(asked) == 3 else None)
    )
    if option == "stop":
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path, total=5, every=1, on_loss_spike=option)
        assert stopped.value.code == 4
    else:
        train(tmp_path, total=5, every=1, on_loss_spike=option)
    rows, said = told(tmp_path), capsys.readouterr().err
    assert [row["step"] for row in rows] == ([1, 2] if option == "stop" else [1, 2, 3, 4, 5])
    assert [row.get("spike") for row in rows][2:] == {"warn": [7.0, None, None], "stop": [], "off": [None] * 3}[option]
    assert ("step 3: the loss, smoothed over 32 steps, is 7.0 times" in said) == (option != "off")
    assert len(asked) == {"warn": 5, "stop": 3, "off": 0}[option]


# Stopping


def test_minutes(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, total=1000, pause=0.01, max_minutes=0.005, every=0)
    assert stopped.value.code == 75
    step = told(tmp_path)[-1]["step"]
    assert step < 1000
    assert (tmp_path / f"checkpoint-{step}" / "manifest.json").is_file()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75)])
def test_a_signal_stops_after_the_step_and_saves(tmp_path, capsys, name, code):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    import threading

    threading.Timer(0.3, lambda: os.kill(os.getpid(), number)).start()
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, total=2000, pause=0.01, every=0)
    assert stopped.value.code == code
    assert signal.getsignal(number) == before  # a notebook's kernel gets its own handlers back
    step = told(tmp_path)[-1]["step"]
    assert f"stopped after step {step} of 2000" in capsys.readouterr().out
    assert train(tmp_path, total=step + 3, every=0, resume="latest") == train(tmp_path / "b", total=step + 3, every=0)


def test_torchrun_passes_a_wish_on_late(monkeypatch):
    for launched in (False, True):
        monkeypatch.setitem(os.environ, "TORCHELASTIC_RUN_ID", "x") if launched else monkeypatch.delenv(
            "TORCHELASTIC_RUN_ID", raising=False
        )
        left = []
        monkeypatch.setattr(signals.os, "_exit", left.append)
        stop = signals.Stop()
        stop._receive(signal.SIGINT, None)
        stop.since -= 2
        stop._receive(signal.SIGINT, None)
        assert left == ([] if launched else [130])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["torchrun", "--nproc_per_node", "2", "x.py", "--rank", "4"], {"torchrun": 0}),
        (["accelerate", "launch", "x.py"], {"accelerate": 0}),
        (["accelerate-launch", "x.py"], {"accelerate": ["accelerate", "launch", "x.py"]}),
        (["train.py", "--name", "torchrun"], {}),
    ],
)
def test_the_launchers_own_words(tmp_path, monkeypatch, words, found):
    """Asked of a real process list: the parent here is a program of that name that only waits."""
    (tmp_path / words[0]).write_text("import sys; print('here', flush=True); sys.stdin.read()")
    command = [sys.executable, str(tmp_path / words[0]), *words[1:]]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout.readline() == "here\n"
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        for name, trace in signals.TRACES.items():
            monkeypatch.delenv(trace, raising=False)
            assert signals.launcher_words(name) == []  # it has left no trace in the environment
            monkeypatch.setenv(trace, "no")
            assert signals.launcher_words(name) == (words if found.get(name) == 0 else found.get(name, []))
    finally:
        parent.communicate("")


def test_two_of_the_same_wish_are_one(tmp_path):
    stop = signals.Stop()
    stop._receive(signal.SIGINT, None)
    stop._receive(signal.SIGINT, None)  # a launcher forwards what the terminal already sent
    assert stop.requested()
    assert stop.code == 130
    stop.since -= 5
    stop._receive(signal.SIGHUP, None)  # the launcher dies a little later
    assert stop.code == 130


def test_a_second_signal_in_a_notebook_leaves_the_kernel_alive(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    stop = signals.Stop()
    stop._receive(signal.SIGINT, None)
    stop.since -= 5
    with pytest.raises(KeyboardInterrupt):
        stop._receive(signal.SIGINT, None)


def test_outside_the_main_thread_only_the_clock_stops(tmp_path):
    import threading

    results = []

    def work():
        try:
            results.append(train(tmp_path, total=3))
        except BaseException as problem:  # would be lost with the thread
            results.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(results[0], str)


# Whose folder, how many processes


def test_a_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as stopped:
        runtime.start(tmp_path / "file", seed=1)
    assert stopped.value.code == 2
    assert "--output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["link", "hard link", "file", "folder"])
def test_a_lock_that_is_not_a_lock_is_left_alone(tmp_path, capsys, kind):
    """A run folder from elsewhere may hold anything under that name; what is ours is emptied and written."""
    mine, lock = tmp_path / "thesis.txt", tmp_path / "run" / ".run.lock"
    mine.write_text("years of work")
    lock.parent.mkdir()
    if kind == "link":
        lock.symlink_to(mine)
    elif kind == "hard link":
        os.link(mine, lock)
    elif kind == "file":
        lock.write_text("years of work")
    else:
        lock.mkdir()
    with pytest.raises(SystemExit) as stopped:
        runtime.start(tmp_path / "run", seed=1)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "--output_dir" in said and ("lock" in said or kind == "folder")
    assert mine.read_text() == "years of work" and (kind != "file" or lock.read_text() == "years of work")


def test_settings_are_not_written_through_a_link(tmp_path):
    mine = tmp_path / "thesis.txt"
    mine.write_text("years of work")
    for name in (f".{startup.SETTINGS}.{os.getpid()}", startup.SETTINGS):
        (tmp_path / name).symlink_to(mine)
    startup.write_settings(tmp_path, {"seed": 1})
    assert mine.read_text() == "years of work" and "seed: 1" in (tmp_path / startup.SETTINGS).read_text()


def test_two_locks(tmp_path):
    one, two = startup.FolderLock(tmp_path), startup.FolderLock(tmp_path)
    assert one.take() is None
    assert f"process {os.getpid()} on " in two.take()
    child = os.fork()
    if child == 0:  # a worker that outlives its parent must not hold the folder
        time.sleep(5)
        os._exit(0)
    one.release()
    assert two.take() is None
    two.release()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("words", "extra", "count"),
    [
        (["python", "accelerate", "launch", "--num_processes", "2", "x.py"], {}, 2),
        (["python", "accelerate", "launch", "--num-processes=3", "x.py"], {}, 3),
        (
            ["python", "accelerate", "launch", "--num_processes", "1", "x.py"],
            {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
            1,
        ),
        (["python", "accelerate", "launch", "x.py"], {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, 2),
        (["python", "accelerate", "launch", "x.py"], {}, 1),
        ([], {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, 1),
    ],
)
def test_how_many_processes_a_launcher_was_asked_for(monkeypatch, words, extra, count):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in extra.items():
        monkeypatch.setenv(name, value)
    assert startup._launched_alone(words) == count


@pytest.mark.slow
def test_lost_processes_are_refused(tmp_path):
    command = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2", PROGRAM, str(tmp_path / "a")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2" in done.stderr
    if not torch.cuda.is_available():
        command = [str(BIN / "torchrun"), "--nproc_per_node", "2", PROGRAM, str(tmp_path / "b")]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert done.stderr.count("ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2") == 1
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.slow
def test_two_processes_are_one_training(tmp_path):
    """Real gloo processes: the same numbers as one process with the whole batch; stop and resume in both."""
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2", PROGRAM, str(tmp_path / "two")]
    options = ["accumulate=2", "batch=2", "dropout=False", "classes=True"]
    two = environment(ACCELERATE_USE_CPU="true")

    def launch(*more):
        return subprocess.run([*torchrun, *options, *more], env=two, capture_output=True, text=True, timeout=180)

    done = launch("total=3")
    assert done.returncode == 0, done.stderr
    done = launch("total=6", "resume=latest")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed from") == 1
    # Only the first process has class images: batch by batch that is what one process sees.
    train(tmp_path / "one", total=6, batch=2, accumulate=4, dropout=False, classes=True)
    assert [row["step"] for row in told(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]
    for one, both in zip(told(tmp_path / "one"), told(tmp_path / "two"), strict=True):
        for name in ("loss", "loss_instance", "loss_prior"):
            assert both[name] == pytest.approx(one[name], rel=1e-5)
        assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)

    # One process cannot read a picture: all of them stop before that step, and save the one before it.
    done = launch("total=9", "resume=latest", "lost=8")
    assert "'x.jpg' cannot be read" in done.stderr and "stopped after step 7 of 9" in done.stdout
    assert (tmp_path / "two" / "checkpoint-7" / "manifest.json").is_file() and "exitcode  : 3" in done.stderr

    # One process is told to stop (as a scheduler may): all of them stop at the same step, and save it once.
    process = subprocess.Popen(
        [*torchrun, *options, "total=5000", "pause=0.01", "every=0", "resume=latest"],
        env=two,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step "):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    rest, _ = process.communicate(timeout=120)
    step = int(re.search(r"stopped after step (\d+) of 5000", rest)[1])
    assert (tmp_path / "two" / f"checkpoint-{step}" / "manifest.json").is_file()


@pytest.mark.slow
def test_signals_to_real_processes(tmp_path):
    """SIGTERM before training, a second one that leaves at once, and a launcher that passes none on."""

    def begin(*command, until):
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            if line.startswith(until):
                return process
        raise AssertionError("the program ended early")

    # In a long phase before training: nothing to save, its own exit code.
    process = begin(sys.executable, PROGRAM, str(tmp_path / "a"), "hold=phase", until="holding")
    # A second run in the same folder is refused while the first holds it.
    other = subprocess.run(
        [sys.executable, PROGRAM, str(tmp_path / "a")], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert other.returncode == 2
    assert f"process {process.pid} on " in other.stderr
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 143, rest
    assert "stopped during holding" in rest

    # Twice, while the step takes long; the second only after the first was heard.
    process = begin(sys.executable, PROGRAM, str(tmp_path / "b"), "pause=60.0", until="step ")
    process.send_signal(signal.SIGTERM)
    for line in process.stdout:
        if "stopping after this step" in line:
            break
    time.sleep(2 * signals.SAME_WISH_SECONDS)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "again: leaving at once" in rest and not list((tmp_path / "b").glob("checkpoint-*"))

    if sys.platform.startswith("linux"):
        launch = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", PROGRAM, str(tmp_path / "c")]
        process = begin(*launch, "total=100000", "pause=0.01", "every=0", until="step ")
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list((tmp_path / "c").glob("checkpoint-*")):
            time.sleep(0.1)
        assert len(list((tmp_path / "c").glob("checkpoint-*"))) == 1
        rest = process.stdout.read()  # ends when the orphan does
        assert "stopped after step" in rest


def test_out_of_memory_names_ways_out_cheapest_first(tmp_path, capsys):
    config = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    run = runtime.start(tmp_path, seed=1, config=config)
    with pytest.raises(SystemExit) as left, run.accumulate(None):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert left.value.code == errors.FAILED
    said = capsys.readouterr().err
    assert "step 1: out of memory" in said and "--gradient_checkpointing" not in said
    ways = ["--train_batch_size 2 --gradient_accumulation_steps 4", "--mixed_precision bf16", "--use_8bit_adam"]
    places = [said.index(way) for way in [*ways, "LoRA", "--resolution"]]
    assert places == sorted(places)
