"""Adapter files as others leave them: layouts of 2023, pickles, the hub, cut, incomplete, with NaN."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_formats import loaded, stock, trained

import infer
from utils import adapters, saved
from utils.adapters import __main__ as command

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--prompt", "a photo of sks dog", "--num_images", "1", "--num_inference_steps", "2", "--device", "cpu"]
QUICK += ["--width", "64", "--height", "64"]


def draw(folder, *options) -> np.ndarray:
    from PIL import Image

    (file,) = infer.main(infer.parse_args([*QUICK, *map(str, options), "--output_dir", str(folder)]))
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def run(*words) -> None:
    assert command.main([*map(str, words)]) == 0


def refused(capsys, call, *words) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def with_processors(key: str) -> str:
    """unet.x.attn1.to_out.0.lora.up.weight => unet.x.attn1.processor.to_out_lora.up.weight"""
    key = key.replace(".to_out.0.lora.", ".processor.to_out_lora.")
    for name in ("to_q", "to_k", "to_v"):
        key = key.replace(f".{name}.lora.", f".processor.{name}_lora.")
    return key


def of_the_encoder(key: str) -> str:
    """text_encoder.x.self_attn.q_proj.lora_linear_layer.up.weight => text_encoder.x.self_attn.to_q_lora.up.weight"""
    for ours, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        key = key.replace(f".{ours}.lora_linear_layer.", f".{old}_lora.")
    return key


LAYOUTS = {
    "diffusers 0.17": with_processors,
    "encoder with processors": lambda key: of_the_encoder(with_processors(key)),
    "without a prefix": lambda key: with_processors(key).removeprefix("unet."),
    "without processors": lambda key: key.removeprefix("unet."),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_2023_draw_what_the_same_weights_draw_today(name, sd1, tmp_path):
    base = ["--pretrained_model_name_or_path", sd1]
    encoder = "without" not in name
    trained(loaded(sd1), rank=2, text_encoder=encoder).save(tmp_path / "now")
    weights = load_file(tmp_path / "now" / adapters.FILE)
    old = {LAYOUTS[name](key): weight for key, weight in weights.items()}
    assert all("lora_linear_layer" not in key for key in old) or name != "encoder with processors"
    assert not set(old) & set(weights) or encoder
    save_file(old, tmp_path / "old.safetensors")  # no header, as then
    save_file(weights, tmp_path / "bare.safetensors")
    torch.save(old, tmp_path / "old.bin")
    ours = draw(tmp_path / "a", *base, "--lora", tmp_path / "bare.safetensors")
    assert abs(ours - draw(tmp_path / "b", *base)).max() > 5
    assert abs(ours - draw(tmp_path / "c", *base, "--lora", tmp_path / "old.safetensors")).max() <= 1
    pickled = draw(tmp_path / "d", *base, "--lora", tmp_path / "old.bin", "--allow_pickle")
    assert abs(ours - pickled).max() <= 1
    for file in ("old.safetensors", "old.bin"):
        run("import", tmp_path / file, tmp_path / f"from {file}", "--allow_pickle")
        back = load_file(tmp_path / f"from {file}" / adapters.FILE)
        assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in back)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil_was_here",)


def test_pickles_are_read_as_tensors_only_and_only_when_asked(sd1, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ({"unet.x": Evil()}, {"state": {"unet.x": torch.ones(1)}}, [torch.ones(1)]):
        torch.save(content, tmp_path / saved.PICKLED_LORA_FILE)
        said = refused(capsys, command.main, ["import", str(tmp_path), "out"])
        assert "--allow_pickle" in said and "can run code" in said
        said = refused(capsys, command.main, ["import", str(tmp_path), "out", "--allow_pickle"])
        assert "tensors" in said
        options = ["--pretrained_model_name_or_path", sd1, "--lora", tmp_path, "--allow_pickle"]
        assert "tensors" in refused(capsys, draw, tmp_path / "out", *options)
    assert not Path("evil_was_here").exists() and not Path("out").exists()


def test_a_repository_of_the_hub_brings_pickles_when_asked_and_settings(sd1, tmp_path):
    trained(loaded(sd1), rank=2).save(tmp_path / "now")
    weights = load_file(tmp_path / "now" / adapters.FILE)
    torch.save({with_processors(key): weight for key, weight in weights.items()}, tmp_path / "old.bin")
    program = (
        "import sys, infer, pathlib, json\n"
        "from utils import saved, arguments\n"
        "args = infer.parse_args(sys.argv[1:])\n"
        "_, base, loras, _, _ = infer.check(args)\n"
        "print(json.dumps([loras[0].file.name, base.clip_skip, base.prediction_type]))\n"
    )

    def ask(table, *options):
        with fake_hub.Hub() as hub:
            hub.models["someone/lora"] = table
            environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
            environment |= {"HF_HOME": str(tmp_path / f"home{len(list(tmp_path.iterdir()))}"), "PYTHONPATH": str(ROOT)}
            words = ["--lora", "someone/lora", "--prompt", "dog", *options]
            call = [sys.executable, "-c", program, *words]
            return subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path)

    pickled = {saved.PICKLED_LORA_FILE: (tmp_path / "old.bin").read_bytes()}
    base = ["--pretrained_model_name_or_path", str(sd1)]
    done = ask(pickled, *base)
    assert done.returncode == 2 and "holds only pytorch_lora_weights.bin" in done.stderr
    assert "--allow_pickle" in done.stderr and "Traceback" not in done.stderr
    done = ask(pickled, *base, "--allow_pickle")
    assert json.loads(done.stdout.splitlines()[-1]) == [saved.PICKLED_LORA_FILE, None, None], done.stderr
    settings = f"pretrained_model_name_or_path: {sd1}\nclip_skip: 1\nprediction_type: v_prediction\n"
    whole = {saved.LORA_FILE: (tmp_path / "now" / saved.LORA_FILE).read_bytes()}
    done = ask(pickled | whole | {saved.SETTINGS_FILE: settings.encode()}, "--allow_pickle")
    assert json.loads(done.stdout.splitlines()[-1]) == [saved.LORA_FILE, 1, "v_prediction"], done.stderr
    # Anybody may have written such a file: what is no value of these options says nothing.
    settings = f"pretrained_model_name_or_path: {sd1}\nclip_skip: [1]\nprediction_type: eps\n"
    done = ask(whole | {saved.SETTINGS_FILE: settings.encode()})
    assert json.loads(done.stdout.splitlines()[-1]) == [saved.LORA_FILE, None, None], done.stderr
    done = ask({"README.md": b"nothing"})
    assert done.returncode == 2 and "the hub gave no pytorch_lora_weights.safetensors" in done.stderr


def test_what_a_file_predicts_is_read_from_its_header(sd1, tmp_path, capsys):
    base = ["--pretrained_model_name_or_path", str(sd1)]
    trained(loaded(sd1), rank=2).save(tmp_path / "epsilon")
    weights = load_file(tmp_path / "epsilon" / adapters.FILE)
    (tmp_path / "v").mkdir()
    save_file(weights, tmp_path / "v" / adapters.FILE, metadata={"modelspec.prediction_type": "v"})
    one, two = (draw(tmp_path / name, *base, "--lora", tmp_path / name) for name in ("epsilon", "v"))
    assert "prediction type: v_prediction is used" in capsys.readouterr().out
    assert abs(one - two).max() > 5
    asked = draw(tmp_path / "c", *base, "--lora", tmp_path / "v", "--prediction_type", "epsilon")
    assert abs(one - asked).max() == 0
    assert "prediction type: epsilon is used" in capsys.readouterr().out
    asked = draw(tmp_path / "d", *base, "--lora", tmp_path / "epsilon", "--prediction_type", "v_prediction")
    assert abs(two - asked).max() == 0
    settings = f"pretrained_model_name_or_path: {sd1}\nprediction_type: epsilon\n"
    (tmp_path / "v" / saved.SETTINGS_FILE).write_text(settings)
    assert abs(one - draw(tmp_path / "e", "--lora", tmp_path / "v")).max() == 0
    capsys.readouterr()
    draw(tmp_path / "f", *base, "--lora", tmp_path / "epsilon")
    assert "prediction type" not in capsys.readouterr().out


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_a_pipeline_without_text_encoders_takes_those_of_its_base(model, request, tmp_path, capsys):
    folder = request.getfixturevalue(model)
    family = loaded(folder)
    family.unet.requires_grad_(True)
    with torch.no_grad():
        family.unet.conv_out.weight.mul_(1.5)
    family.save_pipeline(tmp_path / "whole")
    family.save_pipeline(tmp_path / "bare", skip_text_encoder=True)
    assert not (tmp_path / "bare" / "text_encoder").exists()
    bare = ["--pretrained_model_name_or_path", tmp_path / "bare"]
    said = refused(capsys, draw, tmp_path / "x", *bare)
    assert "was saved without text_encoder" in said and "no base is recorded" in said and "--checkpoint" in said
    settings = tmp_path / "bare" / saved.SETTINGS_FILE
    settings.write_text("pretrained_model_name_or_path: /gone/model\n")
    said = refused(capsys, draw, tmp_path / "x", *bare)
    assert "its recorded base /gone/model is not found" in said and "--pretrained_model_name_or_path" in said
    whole = draw(tmp_path / "a", "--pretrained_model_name_or_path", tmp_path / "whole")
    # The remedy that was named works.
    remedy = ["--pretrained_model_name_or_path", folder, "--checkpoint", tmp_path / "bare"]
    assert abs(whole - draw(tmp_path / "b", *remedy)).max() == 0
    settings.write_text(f"pretrained_model_name_or_path: {folder}\n")
    assert abs(whole - draw(tmp_path / "c", *bare)).max() == 0
    settings.write_text(f"pretrained_model_name_or_path: {tmp_path / 'bare'}\n")
    assert "neither" in refused(capsys, draw, tmp_path / "x", *bare)


def test_the_base_of_a_pipeline_without_text_encoders_may_be_on_the_hub(sd1, tmp_path):
    family = loaded(sd1)
    family.save_pipeline(tmp_path / "bare", skip_text_encoder=True)
    (tmp_path / "bare" / saved.SETTINGS_FILE).write_text("pretrained_model_name_or_path: someone/base\n")
    with fake_hub.Hub() as hub:
        hub.models["someone/base"] = {
            str(path.relative_to(sd1)): path.read_bytes() for path in Path(sd1).rglob("*") if path.is_file()
        }
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path / "home")}
        words = [*QUICK, "--pretrained_model_name_or_path", tmp_path / "bare", "--output_dir", tmp_path / "images"]
        call = [sys.executable, ROOT / "infer.py", *map(str, words)]
        done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    image = np.asarray(Image.open(next((tmp_path / "images").glob("*.png"))).convert("RGB")).astype(int)
    assert abs(image - draw(tmp_path / "b", "--pretrained_model_name_or_path", sd1)).max() == 0


def test_the_same_adapter_twice_and_strange_strengths(sd1, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(loaded(sd1), rank=2).save(tmp_path / "dog")
    os.symlink(tmp_path / "dog", tmp_path / "link")
    base = ["--pretrained_model_name_or_path", sd1]
    for other in ("dog:0.8", f"dog/{adapters.FILE}:0.8", "link"):
        said = refused(capsys, draw, tmp_path / "x", *base, "--lora", "dog:0.4", "--lora", other)
        assert "dog:0.4" in said and other in said and "same file" in said and "once" in said
    said = refused(capsys, command.main, ["merge", str(sd1), "dog", "link", "--output_dir", "out"])
    assert "same file" in said and not Path("out").exists()
    for strength in ("nan", "inf", "-inf", "70", "-10.5"):
        said = refused(capsys, draw, tmp_path / "x", *base, "--lora", f"dog:{strength}")
        assert f"dog:{strength}: the strength must be a number from -10 to 10" in said
        said = refused(capsys, command.main, ["merge", str(sd1), f"dog:{strength}", "--output_dir", "out"])
        assert "from -10 to 10" in said and not Path("out").exists()
    infer.main(infer.parse_args([*QUICK, *map(str, base), "--lora", "dog:-2.5", "--dry_run"]))
    assert "beyond 2 usually destroys" in capsys.readouterr().err
    infer.main(infer.parse_args([*QUICK, *map(str, base), "--lora", "dog:2", "--dry_run"]))
    assert not capsys.readouterr().err


def changed(source: Path, target: Path, change) -> Path:
    weights = load_file(source)
    change(weights)
    target.parent.mkdir(exist_ok=True)
    save_file(weights, target, metadata=saved.header(source).get("__metadata__"))
    return target


@pytest.mark.parametrize("file", [adapters.FILE, adapters.KOHYA_FILE])
def test_numbers_that_are_none_and_missing_halves_are_refused_by_name(file, sd1, tmp_path, capsys):
    trained(loaded(sd1), rank=2).save(tmp_path / "dog", output_kohya_format=True)
    source = tmp_path / "dog" / file
    up = next(key for key in load_file(source) if key.endswith("up.weight"))
    calls = {
        "infer": lambda one: draw(tmp_path / "x", "--pretrained_model_name_or_path", sd1, "--lora", one),
        "merge": lambda one: command.main(["merge", str(sd1), str(one), "--output_dir", str(tmp_path / "out")]),
        "export": lambda one: command.main(["export", str(one), str(tmp_path / "out.safetensors")]),
        "import": lambda one: command.main(["import", str(one), str(tmp_path / "out")]),
    }
    for value in ("nan", "inf"):
        one = changed(source, tmp_path / f"{value}.safetensors", lambda weights: weights[up].fill_(float(value)))  # noqa: B023
        for call in calls.values():
            said = refused(capsys, call, one)
            assert up in said and "not finite" in said
    one = changed(source, tmp_path / "half.safetensors", lambda weights: weights.pop(up))
    for call in calls.values():
        said = refused(capsys, call, one)
        assert up in said and "incomplete" in said
    assert not [*tmp_path.glob("out*")]


def test_numbers_too_large_for_fp16(sd1, tmp_path, capsys):
    trained(loaded(sd1), rank=2).save(tmp_path / "dog")
    source = tmp_path / "dog" / adapters.FILE
    key = next(iter(load_file(source)))
    one = changed(source, tmp_path / "large.safetensors", lambda weights: weights[key].fill_(1e6))
    target = tmp_path / "out.safetensors"
    said = refused(capsys, command.main, ["export", str(one), str(target), "--dtype", "fp16"])
    assert "--dtype fp16" in said and "holds 1e+06" in said and "use bf16" in said and not target.exists()
    run("export", one, target, "--dtype", "bf16")


def test_pipelines_with_numbers_that_are_none(sd1, tmp_path, capsys):
    trained(loaded(sd1), rank=2).save(tmp_path / "dog")
    shutil.copytree(sd1, tmp_path / "broken")
    (file,) = (tmp_path / "broken" / "unet").glob("*.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    changed(file, tmp_path / "new.safetensors", lambda weights: weights[name].fill_(float("nan"))).rename(file)
    for call in (
        lambda: command.main(["extract", str(sd1), str(tmp_path / "broken"), str(tmp_path / "out")]),
        lambda: command.main(["extract", str(tmp_path / "broken"), str(sd1), str(tmp_path / "out")]),
        lambda: command.main(["merge", str(tmp_path / "broken"), str(tmp_path / "dog"), "--output_dir", "out"]),
        lambda: draw(tmp_path / "x", "--pretrained_model_name_or_path", tmp_path / "broken"),
    ):
        said = refused(capsys, call)
        assert "not finite" in said and name.removesuffix(".weight") in said
    assert not (tmp_path / "out").exists()


def test_files_cut_short_are_noticed_before_anything_is_loaded(sd1, tmp_path, capsys, monkeypatch):
    from utils.models.latent_diffusion import LatentDiffusion

    trained_folder = tmp_path / "dog"
    trained(loaded(sd1), rank=2).save(trained_folder)
    monkeypatch.setattr(LatentDiffusion, "load", lambda *_, **__: pytest.fail("loaded"))
    whole = (trained_folder / adapters.FILE).read_bytes()
    base = ["--pretrained_model_name_or_path", sd1]
    for size in (4, 60, len(whole) - 1, len(whole) + 8):
        one = tmp_path / "cut.safetensors"
        one.write_bytes((whole + b"\0" * 8)[:size])
        said = refused(capsys, draw, tmp_path / "x", *base, "--lora", one)
        assert "is damaged" in said and (size < 100 or f"{size} bytes" in said)
        said = refused(capsys, command.main, ["merge", str(sd1), str(one), "--output_dir", str(tmp_path / "out")])
        assert "is damaged" in said
    (tmp_path / "words").mkdir()
    embeddings = tmp_path / "words" / saved.EMBEDDINGS_FILE
    save_file({"clip_l": torch.ones(2, 16)}, embeddings)
    embeddings.write_bytes(embeddings.read_bytes()[:-1])
    assert "is damaged" in refused(capsys, draw, tmp_path / "x", *base, "--embeddings", tmp_path / "words")
    shutil.copytree(sd1, tmp_path / "model")
    (file,) = (tmp_path / "model" / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    model = str(tmp_path / "model")
    assert "vae" in refused(capsys, draw, tmp_path / "x", "--pretrained_model_name_or_path", model)
    words = ["merge", model, str(trained_folder), "--output_dir", str(tmp_path / "out")]
    assert "is damaged" in refused(capsys, command.main, words)
    assert "is damaged" in refused(capsys, command.main, ["extract", str(sd1), model, str(tmp_path / "out")])
    (tmp_path / "checkpoint-3" / "unet").mkdir(parents=True)
    for path in (Path(sd1) / "unet").iterdir():
        (tmp_path / "checkpoint-3" / "unet" / path.name).write_bytes(path.read_bytes()[:-1])
    assert "is damaged" in refused(capsys, draw, tmp_path / "x", *base, "--checkpoint", tmp_path / "checkpoint-3")


# --- What merge keeps --------------------------------------------------------------------------------------------


def settings(folder, model, **values) -> None:
    lines = {"pretrained_model_name_or_path": str(model), **values}
    (folder / saved.SETTINGS_FILE).write_text(json.dumps(lines), encoding="utf-8")


def test_a_merged_pipeline_keeps_what_the_run_changed_of_the_model(sd1, tmp_path, capsys):
    """Drawn by infer.py, the merged pipeline gives what base and LoRA give."""
    other = loaded(sd1)
    with torch.no_grad():
        other.vae.decoder.conv_out.weight.mul_(-1)
    other.vae.save_pretrained(tmp_path / "vae")
    trained(loaded(sd1), rank=2, text_encoder=True).save(tmp_path / "dog")
    values = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    settings(tmp_path / "dog", sd1, pretrained_vae_model_name_or_path=str(tmp_path / "vae"), **values)
    velocity = {"prediction_type": "v_prediction", "pretrained_vae_model_name_or_path": str(tmp_path / "vae")}
    run("merge", sd1, tmp_path / "dog", "--output_dir", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"]
    settings(tmp_path / "dog", sd1, **velocity)
    run("merge", sd1, tmp_path / "dog", "--output_dir", tmp_path / "drawn")
    ours = draw(tmp_path / "a", "--lora", tmp_path / "dog")
    assert abs(draw(tmp_path / "b", "--pretrained_model_name_or_path", tmp_path / "drawn") - ours).max() <= 1
    # A pipeline has no place for clip skip; infer.py finds it in the settings beside one.
    settings(tmp_path / "dog", sd1, clip_skip=1, **values)
    run("merge", sd1, tmp_path / "dog", "--output_dir", tmp_path / "skipping")
    assert "clip skip 1" in capsys.readouterr().out
    words = [*QUICK, "--pretrained_model_name_or_path", str(tmp_path / "skipping")]
    assert infer.check(infer.parse_args(words))[1].clip_skip == 1
    # Without settings beside it: what the header says.
    trained(loaded(sd1), rank=2).save(tmp_path / "other")
    weights = load_file(tmp_path / "other" / adapters.FILE)
    save_file(weights, tmp_path / "other" / adapters.FILE, metadata={"modelspec.prediction_type": "v"})
    run("merge", sd1, tmp_path / "other", "--output_dir", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    settings(tmp_path / "other", sd1, prediction_type="epsilon")
    words = ["merge", str(sd1), str(tmp_path / "dog"), str(tmp_path / "other"), "--output_dir", str(tmp_path / "no")]
    said = refused(capsys, command.main, words)
    assert "different values of prediction_type" in said and "dog with v_prediction" in said
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_learned_words_are_merged_into_tokenizers_and_encoders(model, request, tmp_path, capsys):
    folder = request.getfixturevalue(model)
    family = loaded(folder)
    trained(family, rank=2).save(tmp_path / "dog")
    rows = {"clip_l": torch.randn(2, family.text_encoder.config.hidden_size)}
    if model == "sdxl":
        rows["clip_g"] = torch.randn(2, family.text_encoder_2.config.hidden_size)
    words = {"tokens": json.dumps({"sks": ["<s0>", "<s1>"]})}
    save_file(rows, tmp_path / "dog" / saved.EMBEDDINGS_FILE, metadata=words)
    base = ["--pretrained_model_name_or_path", folder]
    ours = draw(tmp_path / "a", *base, "--lora", tmp_path / "dog")
    run("merge", folder, tmp_path / "dog", "--output_dir", tmp_path / "merged")
    assert "in prompts write <s0><s1> for sks" in capsys.readouterr().out
    merged = ["--pretrained_model_name_or_path", tmp_path / "merged"]
    plain = draw(tmp_path / "b", *merged)
    file = infer.main(
        infer.parse_args(
            [*QUICK[2:], *map(str, merged), "--prompt", "a photo of <s0><s1> dog", "--output_dir", str(tmp_path / "d")]
        )
    )[0]
    from PIL import Image

    taught = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert abs(taught - ours).max() <= 1 and abs(plain - ours).max() > 1
    pipeline = stock(tmp_path / "merged")
    assert pipeline.tokenizer.tokenize("<s0><s1>") == ["<s0>", "<s1>"]
