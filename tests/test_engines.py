"""Engines that keep weights or states elsewhere: the numbers, the files and the resume are those without them."""

import importlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.toy_training import train
from utils import runtime
from utils.checkpoints import nested

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def closed():
    yield
    if runtime._current:
        runtime._current.close()


def told(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows]


def asks_for_deepspeed(monkeypatch, **more):
    if importlib.util.find_spec("deepspeed") is None:  # not imported here: the engine does that as it wants it
        pytest.skip("DeepSpeed is not installed: ITS ENGINE IS NOT TESTED HERE")
    told = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "2", "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", **more}
    for name, value in told.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


def state(folder, step=8):
    return nested.load(Path(folder) / f"checkpoint-{step}" / "optimizer.safetensors")["state"]


CLIPPED = {"optimizer": "sgd", "max_norm": 0.05}


@pytest.mark.parametrize("options", [{}, {"accumulate": 3} | CLIPPED, {"scale": 2.0**10} | CLIPPED], ids=str)
def test_deepspeed_is_the_same_training(tmp_path, monkeypatch, options):
    """Losses, norms, rates, checkpoints as without it; resumed bit for bit; either goes on with the other's."""
    train(tmp_path / "plain", **options)
    train(tmp_path / "switched", total=4, **options)
    asks_for_deepspeed(monkeypatch)
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "cut", total=4, **options)
    assert train(tmp_path / "cut", resume="latest", **options) == whole
    train(tmp_path / "switched", total=6, resume="latest", **options)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    train(tmp_path / "switched", resume="latest", **options)
    assert min(norm for _, _, norm, _ in told(tmp_path / "plain")) > CLIPPED["max_norm"]
    for name in ("whole", "switched"):
        for one, two in zip(told(tmp_path / name), told(tmp_path / "plain"), strict=True):
            assert one == pytest.approx(two, rel=1e-5)
        for number, entries in state(tmp_path / "plain").items():
            for kind, value in entries.items():
                torch.testing.assert_close(state(tmp_path / name)[number][kind], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{"on_nan": "skip", "poison": 3}, {"on_nan": "skip", "poison": -3}, {"scale": 2.0**10, "poison": 3}],
    ids=str,
)
def test_deepspeed_takes_no_step_that_is_not_finite(tmp_path, monkeypatch, options):
    train(tmp_path / "plain", **CLIPPED, **options)
    asks_for_deepspeed(monkeypatch)
    train(tmp_path / "left_out", **CLIPPED, **options)
    left_out = [json.loads(line) for line in (tmp_path / "left_out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in left_out if "skipped" in row] == [3]
    for one, two in list(zip(told(tmp_path / "left_out"), told(tmp_path / "plain"), strict=True))[3:]:
        assert one == pytest.approx(two, rel=1e-5)
    if "scale" not in options:
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "stopped", poison=3)
        assert stopped.value.code == 4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage is 3"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}, "offload_optimizer_device must be cpu"),
        ({"DEEPSPEED_CONFIG_FILE": {"zero_optimization": {"stage": 2}, "scheduler": {"type": "x"}}}, "scheduler"),
    ],
)
def test_deepspeed_settings_that_cannot_be_honoured_are_refused(tmp_path, monkeypatch, capsys, settings, complaint):
    if isinstance(file := settings.get("DEEPSPEED_CONFIG_FILE"), dict):
        file["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        (tmp_path / "ds.json").write_text(json.dumps(file))
        settings = {"DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    asks_for_deepspeed(monkeypatch, **settings)
    with pytest.raises(SystemExit) as refused:
        runtime.start(tmp_path / "run", seed=0)
    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err


def test_optimizers_that_need_whole_weights_are_refused(monkeypatch, capsys, sd1, photos):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    script = importlib.import_module("train_dreambooth_lora")
    for words in ("--use_8bit_adam", "--optimizer prodigy", "--compile", "--offload_ema", "--quantize_base nf4"):
        with pytest.raises(SystemExit) as refused:
            script.parse_args(shlex.split(f"{command(sd1, photos, 'run')} {words}"))
        assert refused.value.code == 2
        assert f"{words.removesuffix(' nf4')} with FSDP" in capsys.readouterr().err


def test_the_plan_knows_where_memory_is_taken(monkeypatch, capsys, sd1, photos):
    script = importlib.import_module("train_dreambooth")

    def planned(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        script.main(script.parse_args(shlex.split(f"{command(sd1, photos, 'run')} --dry_run")))
        for name in variables:
            monkeypatch.delenv(name)
        said = capsys.readouterr().out
        return {words[0]: words[1:] for words in map(str.split, said.splitlines()) if words}

    alone, offloaded = planned(), planned(ACCELERATE_USE_DEEPSPEED="true")
    shared = planned(ACCELERATE_USE_FSDP="true", WORLD_SIZE="2")
    assert "optimizer" in alone and "optimizer" not in offloaded
    assert offloaded["disk"] == alone["disk"] == shared["disk"]
    assert float(shared["unet"][0]) == pytest.approx(float(alone["unet"][0]) / 2, rel=0.01)
    assert shared["vae"] == alone["vae"]


def command(model, photos, folder):
    return (
        f"--pretrained_model_name_or_path '{model}' --instance_data_dir '{photos}' --output_dir '{folder}' --seed 3 "
        "--instance_prompt 'a photo of sks dog' --report_to none --learning_rate 1e-3 --train_batch_size 2"
    )


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_dreambooth", "--train_text_encoder --use_ema --gradient_checkpointing --gradient_accumulation_steps 2"),
        ("train_dreambooth_lora", "--mixed_precision bf16 --text_encoder_lr 2e-3 --train_text_encoder --use_dora"),
    ],
)
def test_whole_scripts_under_deepspeed(tmp_path, monkeypatch, sd1, photos, script, options):
    module = importlib.import_module(script)

    def run(name, more=""):
        words = f"{command(sd1, photos, tmp_path / name)} {options} --max_train_steps 4 --checkpointing_steps 2 {more}"
        module.main(module.parse_args(shlex.split(words)))
        return learned(tmp_path / name)

    plain = run("plain")
    asks_for_deepspeed(monkeypatch)
    whole = run("whole")
    again = run("again", f"--resume_from_checkpoint '{tmp_path / 'whole' / 'checkpoint-2'}'")
    exact = "bf16" not in options
    for one, two in zip(told(tmp_path / "whole"), told(tmp_path / "plain"), strict=True):
        assert one == pytest.approx(two, rel=1e-4 if exact else 2e-2)
    assert plain.keys() == whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def learned(folder):
    files = [*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors"), *folder.glob("text_enc*/*.safetensors")]
    return {f"{file.stem} {key}": value for file in files for key, value in load_file(file).items()}


def averaged(folder):
    from safetensors.torch import load_file

    return {
        f"{file.parent.name} {key}": value
        for file in folder.glob("*_ema/*.safetensors")
        for key, value in load_file(file).items()
    }


@pytest.mark.slow
def test_the_command_for_8_gb(tmp_path, sd1, photos, class_photos):
    """As users type it, but for the precision: fp16 needs a GPU."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: ITS LAUNCHER IS NOT TESTED HERE")
    words = (
        f"launch --config_file accelerate_configs/deepspeed_zero2_offload.yaml --mixed_precision=bf16 "
        f"train_dreambooth.py {command(sd1, photos, tmp_path / 'run')} --with_prior_preservation "
        f"--class_data_dir '{class_photos}' --class_prompt 'a dog' --num_class_images 5 --sample_batch_size=1 "
        "--gradient_accumulation_steps=1 --gradient_checkpointing --max_train_steps 2 --checkpointing_steps 1"
    )
    done = subprocess.run(
        [str(BIN / "accelerate"), *shlex.split(words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in told(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "model_index.json").is_file()


def test_every_script_reads_whole_weights():
    for script in ROOT.glob("train_*.py"):
        text = script.read_text(encoding="utf-8")
        assert "whole=run.whole," in text, script
        assert text.count("average.swapped()") == text.count("average.swapped(), run.whole():"), script


DDP, FSDP = {}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FULL = "--train_text_encoder --use_ema --posthoc_ema --gradient_checkpointing --gradient_accumulation_steps 2"
LORA = "--mixed_precision bf16 --train_text_encoder --validation_prompt 'a dog' --num_validation_images 1"


def two_processes(runs, file):
    """Each (script, words, variables) in turn, in the same two gloo processes."""
    file.write_text(json.dumps([[script, shlex.split(words), variables] for script, words, variables in runs]))
    done = subprocess.run(
        [str(BIN / "torchrun"), "--nproc_per_node", "2", str(ROOT / "tests" / "several_runs.py"), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_averaged_or_sharded_are_one(tmp_path, sd1, photos, capsys):
    """DDP, FSDP2 and one process learn the same; each resumes exactly, and goes on with a checkpoint of the others."""

    def full(name, more="", batch=1):
        words = f"{command(sd1, photos, tmp_path / name)} {FULL} --max_train_steps 3 --checkpointing_steps 2 {more}"
        return f"{words} --train_batch_size {batch}"

    def lora(name, more=""):
        return f"{command(sd1, photos, tmp_path / name)} {LORA} --max_train_steps 3 --checkpointing_steps 2 {more}"

    def from_two(name, step=2):
        return f"--resume_from_checkpoint '{tmp_path / name / f'checkpoint-{step}'}'"

    one, adapters = "train_dreambooth", "train_dreambooth_lora"
    runs = [
        (one, full("ddp"), DDP),
        (one, full("ddp_again", from_two("ddp")), DDP),
        (one, full("fsdp"), FSDP),
        (one, full("fsdp_again", from_two("fsdp")), FSDP),
        (one, full("fsdp_from_ddp", from_two("ddp")), FSDP),
        (adapters, lora("lora_ddp"), DDP),
        (adapters, lora("lora_fsdp"), FSDP),
        (adapters, lora("lora_fsdp_again", from_two("lora_fsdp")), FSDP),
    ]
    two_processes(runs, tmp_path / "runs.json")
    script = importlib.import_module(one)
    script.main(script.parse_args(shlex.split(full("one", batch=2))))
    words = shlex.split(full("one_from_fsdp", from_two("fsdp"), batch=2))
    with pytest.raises(SystemExit):
        script.main(script.parse_args(words))
    assert "--allow_resume_mismatch examples_per_step" in capsys.readouterr().err
    script.main(script.parse_args([*words, "--allow_resume_mismatch", "examples_per_step"]))

    rows = told(tmp_path / "one")
    for name in ("ddp", "fsdp", "fsdp_from_ddp", "one_from_fsdp", "ddp_again", "fsdp_again"):
        for here, there in zip(told(tmp_path / name), rows[-len(told(tmp_path / name)) :], strict=True):
            assert here == pytest.approx(there, rel=1e-4), name
    for here, there in zip(told(tmp_path / "lora_fsdp"), told(tmp_path / "lora_ddp"), strict=True):
        assert here == pytest.approx(there, rel=2e-2)
    for name in ("ddp", "fsdp", "lora_fsdp"):
        whole, again = learned(tmp_path / name), learned(tmp_path / f"{name}_again")
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[key], again[key]) for key in whole), name
    assert learned(tmp_path / "fsdp").keys() == learned(tmp_path / "one").keys()
    averages = [averaged(tmp_path / name / "checkpoint-2") for name in ("one", "ddp", "fsdp")]
    for key, value in averages[0].items():
        for other in averages[1:]:
            torch.testing.assert_close(other[key], value, rtol=1e-2, atol=2e-4)
    for name in ("ddp", "fsdp", "fsdp_again"):
        files = sorted((tmp_path / name / "ema_snapshots").iterdir())
        assert [file.name for file in files][-2:] == ["step-000003-0.05.safetensors", "step-000003-0.1.safetensors"]
        for file in files:
            mine, theirs = load_file(file), load_file(tmp_path / "one" / "ema_snapshots" / file.name)
            assert mine.keys() == theirs.keys()
            for key in (key for key in mine if not key.endswith("k_proj.bias")):  # nothing teaches it but rounding
                torch.testing.assert_close(mine[key], theirs[key], rtol=1e-2, atol=2e-4)

    from diffusers import StableDiffusionPipeline

    for name in ("one", "fsdp"):
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / name, safety_checker=None)
        assert torch.equal(
            pipeline.unet.state_dict()["conv_in.weight"],
            learned(tmp_path / name)["diffusion_pytorch_model conv_in.weight"],
        )
    pipeline.load_lora_weights(tmp_path / "lora_fsdp")
    assert len(list((tmp_path / "lora_fsdp" / "samples").glob("*/*.png"))) >= 2


def test_fsdp_settings_that_cannot_be_honoured_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(SystemExit) as refused:
        runtime.start(tmp_path / "run", seed=0)
    assert refused.value.code == 2
    told = capsys.readouterr().err
    assert "use version 2" in told
    assert "fsdp_offload_params" in told
