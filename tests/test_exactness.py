"""Interrupted runs equal uninterrupted ones bit for bit, and what should not change a run does not change it."""

import importlib
import os
import shutil
import signal

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_scripts import losses, rows, same, train  # noqa: F401 - train is a fixture

from utils import arguments, checkpoints, images, runtime
from utils.arguments.settings import Kind

# Everything that has a state of its own, together: a resume that forgets one of them gives other weights.
RICH = {
    "train_dreambooth": "--use_ema --gradient_accumulation_steps 2 --train_text_encoder --lr_scheduler cosine"
    " --lr_warmup_steps 2 --snr_gamma 5 --random_flip",
    "train_dreambooth_lora": "--use_ema --gradient_accumulation_steps 2 --train_text_encoder --lr_scheduler cosine"
    " --lr_warmup_steps 2 --noise_offset 0.1 --lora_dropout 0.2 --random_flip",
}
SIMPLE = "--max_train_steps 2 --train_batch_size 2 --learning_rate 1e-3"


class Killed(BaseException):
    """As kill -9: nothing is saved, closed or said."""


@pytest.fixture
def stop(monkeypatch):
    """stop(how, step): the run ends during, or after, this step."""
    real = runtime.Run.log
    asked = {}

    def log(run, step, **values):
        real(run, step, **values)
        if run.step == asked.get("step") and step == run.step:
            how = asked.pop("how", None)
            if how == "kill":
                raise Killed
            if how == "minutes":
                run.stop.deadline = 0.0
            elif how:
                os.kill(os.getpid(), getattr(signal, how))

    monkeypatch.setattr(runtime.Run, "log", log)
    return lambda how, step: asked.update(how=how, step=step)


@pytest.mark.parametrize("script", RICH)
@pytest.mark.parametrize("crops", ["", "--center_crop"], ids=["uncached", "cached"])
def test_however_often_it_is_interrupted(train, stop, script, crops, class_photos, monkeypatch):  # noqa: F811
    """Killed, told to stop, out of time, each in the middle of an epoch of 3 photos: the same bits in the end."""
    options = (
        f"{RICH[script]} {crops} --train_batch_size 2 --checkpointing_steps 2 --learning_rate 1e-3 --max_train_steps 6"
        f" --with_prior_preservation --class_data_dir '{class_photos}' --class_prompt 'a dog' --num_class_images 2"
    )
    whole = train(script, options, "whole")
    again = f"{options} --resume_from_checkpoint latest"
    stop("kill", 3)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoints.Checkpoints, "rescue", lambda *given, **named: None)  # nobody saves after a kill
        train(script, options, "cut")
    for how, step, code in (("SIGTERM", 3, 143), ("minutes", 5, 75)):
        stop(how, step)
        with pytest.raises(SystemExit) as stopped:
            train(script, again, "cut")
        assert stopped.value.code == code
        if step == 5:
            shutil.copytree(whole.parent / "cut", whole.parent / "control")
    cut = train(script, again, "cut")
    assert sorted(path.name for path in cut.glob("checkpoint-*")) == [f"checkpoint-{k}" for k in (2, 3, 4, 5, 6)]
    assert same(whole, cut) and same(whole / "checkpoint-6", cut / "checkpoint-6")
    averages = [
        path.relative_to(whole) for path in (whole / "checkpoint-6").rglob("*.safetensors") if "_ema" in str(path)
    ]
    assert averages
    for path in averages:
        one, other = load_file(whole / path), load_file(cut / path)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses(whole) == losses(cut) and len(losses(cut)) == 6

    # A resume that forgets what the optimizer remembers gives other weights, and this comparison sees it.
    real = checkpoints._load_entry
    monkeypatch.setattr(checkpoints, "_load_entry", lambda name, *more: name == "optimizer" or real(name, *more))
    assert not same(whole, train(script, again, "control"))


def test_loader_processes_and_the_order_on_disk_change_nothing(train, photos, monkeypatch):  # noqa: F811
    plain = train("train_dreambooth_lora", f"{SIMPLE} --random_flip", "plain")
    helped = train("train_dreambooth_lora", f"{SIMPLE} --random_flip --dataloader_num_workers 2", "helped")
    assert same(plain, helped) and losses(plain) == losses(helped)
    walk, listed = os.walk, []

    def backwards(folder):
        for parent, folders, names in walk(folder):
            listed.append(sorted(names, reverse=True))
            yield parent, folders, listed[-1]

    with monkeypatch.context() as patched:
        patched.setattr(images.os, "walk", backwards)
        turned = train("train_dreambooth_lora", f"{SIMPLE} --random_flip", "turned")
    assert ["photo-2.png", "photo-1.png", "photo-0.png"] in listed
    assert same(plain, turned) and losses(plain) == losses(turned)


@pytest.mark.parametrize("script", sorted(path.stem for path in [*ROOT.glob("train_*.py"), ROOT / "infer.py"]))
def test_an_option_at_its_default_changes_nothing(script, monkeypatch):
    """Each option of each script typed with the value that it has anyway: the same settings, so the same run."""
    module, parsers = importlib.import_module(script), []
    with monkeypatch.context() as patched:
        patched.setattr(arguments, "parse", lambda parser, argv=None: parsers.append(parser))
        module.parse_args([])
    defaults = {action.dest: action.default for action in parsers[0]._actions if isinstance(action.type, Kind)}
    needed = {
        "pretrained_model_name_or_path": "base",  # the toybox has learning rates of its own
        "instance_data_dir": "dog",
        "instance_prompt": "a photo of sks dog",
        "train_data_dir": "pictures",
    }
    base = [word for name, value in needed.items() if name in defaults for word in (f"--{name}", value)]
    expected = vars(module.parse_args(base))
    typed = 0
    for name, default in defaults.items():
        if default is None or default == [] or name in needed or name == "local_rank":
            continue
        words = {True: ["yes"], False: ["no"]}.get(default) if isinstance(default, bool) else None
        words = words or ([*map(str, default)] if isinstance(default, list) else [str(default)])
        assert vars(module.parse_args([*base, f"--{name}", *words])) == expected, name
        typed += 1
    assert typed >= 8


@pytest.mark.parametrize(
    ("script", "model", "options"),
    [
        ("train_dreambooth", "sd1", ""),
        ("train_dreambooth", "sd1", "--train_text_encoder --gradient_checkpointing"),
        ("train_dreambooth_lora", "sd2", "--train_text_encoder --use_dora"),
        ("train_dreambooth_lora_sdxl", "sdxl", "--train_text_encoder"),
    ],
)
def test_all_that_learns_gets_gradients_and_nothing_else(train, request, monkeypatch, script, model, options):  # noqa: F811
    seen, modules = [], {}
    real_norm, real_prepare = runtime.guard.gradient_norm, runtime.Run.prepare

    def prepare(run, family, learns, optimizer):
        modules.update({name: getattr(family, name) for name in family.names if getattr(family, name) is not None})
        return real_prepare(run, family, learns, optimizer)

    def gradient_norm(parameters):
        told = {}
        for name, module in modules.items():
            for key, weight in module.named_parameters():
                assert (weight.grad is not None) == weight.requires_grad, f"{name}.{key}"
                if weight.requires_grad:
                    told[f"{name}.{key}"] = bool(weight.grad.abs().max() > 0)
        seen.append(told)
        assert len(told) == len(parameters)
        return real_norm(parameters)

    monkeypatch.setattr(runtime.Run, "prepare", prepare)
    monkeypatch.setattr(runtime.guard, "gradient_norm", gradient_norm)
    train(script, f"{SIMPLE} {options}", model=request.getfixturevalue(model))
    assert len(seen) == 2 and sum(seen[1].values())
    silent = [name for name, heard in seen[1].items() if not heard]
    if script.endswith("sdxl"):  # SDXL listens to the layer before the last of its first encoder
        silent = [name for name in silent if not name.startswith("text_encoder.") or "layers.1." not in name]
    # A projection's bias of the keys moves all scores of a row alike: softmax takes it away again.
    silent = [name for name in silent if not name.endswith("k_proj.bias")]
    assert not silent


def test_settings_are_told_by_group(train):  # noqa: F811
    """Each group of weights has its rate in metrics.jsonl, and --scale_lr holds for both."""
    options = f"{SIMPLE} --train_text_encoder --text_encoder_lr 1e-5 --learning_rate 1e-4 --scale_lr"
    told = rows(train("train_dreambooth_lora", options))[-1]
    assert told["lr"] == pytest.approx(2e-4) and told["lr_text_encoder"] == pytest.approx(2e-5)
