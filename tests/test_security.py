"""Models, checkpoints and settings that mean harm, and what must never leave this machine."""

import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys

import fake_hub
import pytest
import torch
import yaml
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from test_scripts import losses, train  # noqa: F401 - train is a fixture

from utils import hub
from utils.checkpoints import manifests

TOKEN = "hf_" + "Secret7" * 5
HOSTILE = "a <script>alert(1)</script> dog\n---\nlicense: mit\n---\n{{ 7*7 }} `x` | ![y](http://evil)"
ONE = "--max_train_steps 1 --train_batch_size 1 --center_crop"


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.fixture
def trap(tmp_path):
    """A path at which nothing may ever appear; the payload that would make it is proved to work."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "proof"))).close()
    assert (tmp_path / "proof").exists()
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code from a file was run"


def refused(call, capsys):
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 2
    return capsys.readouterr().err


# Pickles


def pickled(model, folder, part, content=None):
    """The model with the weights of one part in a .bin file: its own, or `content`."""
    copy = shutil.copytree(model, folder)
    (file,) = (copy / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file) if content is None else content, copy / part / name)
    file.unlink()
    return copy


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_pickles_are_refused_and_with_consent_only_tensors_are_read(train, sd1, tmp_path, trap, capsys, part):  # noqa: F811
    evil = pickled(sd1, tmp_path / "evil", part, {"conv_in.weight": Payload(trap)})
    said = refused(lambda: train("train_dreambooth_lora", ONE, "a", model=evil), capsys)
    assert "only as a pickle" in said and "--allow_pickle" in said and part in said
    said = refused(lambda: train("train_dreambooth_lora", f"{ONE} --allow_pickle", "b", model=evil), capsys)
    assert f"cannot read its {part}" in said and "Traceback" not in said
    infer = importlib.import_module("infer")
    words = ["--pretrained_model_name_or_path", str(evil), "--prompt", "dog", "--output_dir", str(tmp_path / "drawn")]
    for more in ([], ["--allow_pickle"]):
        assert part in refused(lambda more=more: infer.main(infer.parse_args([*words, *more])), capsys)


def test_an_honest_pickle_trains_the_same_with_consent(train, sd1, tmp_path):  # noqa: F811
    honest = pickled(pickled(sd1, tmp_path / "one", "unet"), tmp_path / "two", "text_encoder")
    old = train("train_dreambooth_lora", f"{ONE} --allow_pickle", "pickled", model=honest)
    assert losses(old) == losses(train("train_dreambooth_lora", ONE, "safe"))


def test_class_images_are_not_drawn_by_a_pickle_either(train, sd1, tmp_path, trap, capsys):  # noqa: F811
    evil = pickled(sd1, tmp_path / "evil", "unet", {"conv_in.weight": Payload(trap)})
    options = (
        f"{ONE} --allow_pickle --with_prior_preservation --class_data_dir '{tmp_path / 'class'}' --class_prompt dog"
    )
    said = refused(lambda: train("train_dreambooth_lora", f"{options} --num_class_images 1", model=evil), capsys)
    assert "cannot read its pipeline" in said


# Code that a model brings


def test_an_index_chooses_among_known_classes_and_imports_nothing(train, sd1, tmp_path, trap, capsys, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(tmp_path)
    code = f"open({str(trap)!r}, 'w')\nclass Evil:\n    pass\n"
    infer = importlib.import_module("infer")
    for number, (part, entry) in enumerate(
        [
            ("scheduler", ["evil_module", "Evil"]),
            ("scheduler", ["diffusers", "NoSuchScheduler"]),
            ("scheduler", ["diffusers", "utils"]),
            ("_class_name", ["evil_module", "Evil"]),
            ("_class_name", "EvilPipeline"),
        ]
    ):
        model = shutil.copytree(sd1, tmp_path / f"model{number}")
        for place in (tmp_path, model, model / part):
            place.mkdir(exist_ok=True)
            (place / "evil_module.py").write_text(code)
        index = json.loads((model / "model_index.json").read_text())
        (model / "model_index.json").write_text(json.dumps(index | {part: entry}))
        assert str(model) in refused(lambda m=model: train("train_dreambooth_lora", ONE, "run", model=m), capsys)
        words = ["--pretrained_model_name_or_path", str(model), "--prompt", "dog", "--num_images", "1"]
        assert str(model) in refused(lambda w=words: infer.main(infer.parse_args(w)), capsys)


def test_remote_code_is_switched_off_before_diffusers_is_imported():
    entries = [path.stem for path in ROOT.glob("*.py")] + ["toybox", "utils.hub"]
    code = f"""
import importlib, os, sys
for entry in {entries!r}:
    importlib.import_module(entry)
    assert "diffusers" not in sys.modules, entry
    if entry != "utils.hub":  # which never imports it
        assert os.environ.pop("DIFFUSERS_DISABLE_REMOTE_CODE") == "1", entry
    for name in [name for name in sys.modules if name.split(".")[0] in ("utils", "toybox", entry)]:
        del sys.modules[name]  # each entry as the first
import utils.models
import diffusers.utils.constants as constants
assert constants.DIFFUSERS_DISABLE_REMOTE_CODE
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIFFUSERS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_asks_for_code_or_unpickles():
    forbidden = re.compile(
        r"custom_pipeline|trust_remote_code(?!\W+False)|weights_only\s*=\s*False|pickle\.loads?\(|register_for_checkpointing"
        r"|torch\.load\((?!.*weights_only=True)|use_safetensors\s*=\s*False"
    )
    for file in [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py"), *ROOT.glob("toybox/**/*.py")]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            assert not forbidden.search(line), f"{file}:{number}: {line}"


# Checkpoints


@pytest.mark.parametrize("script", ["train_dreambooth", "train_dreambooth_lora"])
def test_a_checkpoint_is_tensors_and_json(train, script):  # noqa: F811
    folder = train(script, f"{ONE} --use_ema --train_text_encoder --checkpointing_steps 1") / "checkpoint-1"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
            continue
        with safe_open(str(path), framework="pt") as stored:
            assert len(list(stored.keys()))


def test_a_checkpoint_that_means_harm_is_refused(train, trap, capsys):  # noqa: F811
    options = f"{ONE} --checkpointing_steps 1 --use_ema"
    whole = train("train_dreambooth_lora", options) / "checkpoint-1"
    manifest = json.loads((whole / "manifest.json").read_text())
    pickles, empty = pickle.dumps(Payload(trap)), b"\x02" + b"\0" * 7 + b"{}"
    for name, contents in (
        ("optimizer.safetensors", [pickles, empty]),
        ("pytorch_lora_weights_ema.safetensors", [pickles, empty]),
        ("pytorch_lora_weights.safetensors", [pickles]),
    ):
        before = (whole / name).read_bytes()
        for content in contents:
            (whole / name).write_bytes(content)
            entry = {"size": len(content), "sha256": manifests.digest(whole / name)}
            changed = manifest | {"files": manifest["files"] | {name: entry}}
            (whole / "manifest.json").write_text(json.dumps(changed))
            more = options.replace("steps 1", "steps 2", 1) + f" --resume_from_checkpoint '{whole}'"
            said = refused(lambda more=more: train("train_dreambooth_lora", more, "again"), capsys)
            assert "checkpoint-1" in said and "Traceback" not in said
        (whole / name).write_bytes(before)
    (whole / "manifest.json").write_text(json.dumps(manifest))
    for name in ("optimizer.bin", "pytorch_model.bin", "random_states_0.pkl"):  # what other programs would read
        (whole / name).write_bytes(pickle.dumps(Payload(trap)))
    train("train_dreambooth_lora", options.replace("steps 1", "steps 2", 1) + " --resume_from_checkpoint latest")


# Secrets


def searched(folder, *texts):
    """Every byte under a folder, and every text, holds no token."""
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not [text for text in texts if TOKEN in text]


def launch(script, words, server, token=None, code=None, **more):
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("OFFLINE", "TOKEN"))}
    environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), **more}
    if token:
        environment["HF_TOKEN"] = token
    start = [sys.executable, "-c", code] if code else [sys.executable, str(ROOT / f"{script}.py")]
    return subprocess.run([*start, *map(str, words)], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["environment", "option"])
def test_a_token_stays_in_memory_and_a_hostile_prompt_stays_text(sd1, photos, tmp_path, given):
    out = tmp_path / "run"
    words = ["--pretrained_model_name_or_path", sd1, "--instance_data_dir", photos, "--output_dir", out]
    words += ["--instance_prompt", HOSTILE, *shlex.split(ONE), "--report_to", "tensorboard", "--push_to_hub"]
    words += ["--hub_token", TOKEN] if given == "option" else []
    words += ["--checkpointing_steps", 1, "--validation_prompt", HOSTILE, "--validation_num_inference_steps", 1]
    with fake_hub.Hub() as server:
        done = launch(
            "train_dreambooth_lora", words, server, TOKEN if given == "environment" else None, HOME=str(tmp_path)
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.tokens == {TOKEN}, "the upload was made with it"
    assert list((out / "logs").rglob("events*"))
    searched(out, done.stdout, done.stderr, *(body.decode("latin1") for body in server.received))
    # What went to the hub: a list of names, into a repository that nobody else sees.
    assert set(server.repos.values()) == {"private"}
    kinds = {re.sub(r"samples/.*", "samples", name) for name in server.files}
    weights = {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"}
    assert kinds == {*weights, "README.md", "training_config.yaml", "samples"}
    # The prompt is shown, and is nothing but text.
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "{{ 7*7 }}" in page
    front = yaml.safe_load(card.split("\n---\n")[0])
    assert front["instance_prompt"] == HOSTILE and front["license"] != "mit"
    body = re.sub(r"(`+) .*? \1|```.*?```", "", card.split("\n---\n\n", 1)[1], flags=re.DOTALL)
    assert "<script>" not in body and "](http://evil)" not in body


@pytest.mark.slow
def test_a_traceback_and_a_failed_upload_do_not_tell_the_token(sd1, photos, tmp_path):
    words = ["--pretrained_model_name_or_path", sd1, "--instance_data_dir", photos, "--instance_prompt", "sks dog"]
    words += [*shlex.split(ONE), "--report_to", "tensorboard", "--push_to_hub", "--hub_token", TOKEN]
    code = "import sys, os, train_dreambooth_lora as t\nfrom utils import cache\ndef latents(*_):\n"
    code += "    raise RuntimeError('Bearer ' + os.environ['HF_TOKEN'])\n"
    code += "cache.latents = latents\nt.main(t.parse_args())"
    with fake_hub.Hub() as server:
        broken = launch(None, [*words, "--output_dir", tmp_path / "broken"], server, code=code, HOME=str(tmp_path))
    assert broken.returncode == 1 and "Bearer [secret]" in broken.stderr and "Traceback" in broken.stderr
    with fake_hub.Hub(fail={"/api/repos/create": 9}, status=403) as server:
        late = launch("train_dreambooth_lora", [*words, "--output_dir", tmp_path / "late"], server, HOME=str(tmp_path))
    assert late.returncode == 6 and "python -m utils.hub" in late.stderr
    searched(tmp_path, broken.stdout, broken.stderr, late.stdout, late.stderr)


KINDS = {  # script and options => what it leaves: adapters in each format, whole pipelines, tokens, PDM's
    "lora": ("train_dreambooth_lora", "--train_text_encoder --output_kohya_format"),
    "lokr": ("train_dreambooth_lora", "--adapter lokr --output_kohya_format"),
    "tokens": ("train_dreambooth_lora", "--train_text_encoder_ti --instance_prompt 'a photo of TOK dog'"),
    "full": ("train_dreambooth", "--train_text_encoder --use_ema"),
    "pdm": ("train_pdmbooth_lora", "--class_prompt dog --use_pdm_loss --pdm_inversion_steps 2"),
    "sdxl": ("train_dreambooth_lora_sdxl", "--train_text_encoder"),
    "full sdxl": ("train_dreambooth", ""),
    "captioned": ("train_text_to_image_lora", ""),
    "captioned full": ("train_text_to_image", ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_folder_of_this_machine_is_in_any_uploaded_byte(sd1, sdxl, photos, tmp_path, monkeypatch, kind):
    """Base model and photos by relative names, whose first part tells whose they are; uploaded from elsewhere."""
    script, options = KINDS[kind]
    home = tmp_path / "home"
    shutil.copytree(sdxl if "sdxl" in kind else sd1, home / "smith_models" / "base")
    shutil.copytree(photos, home / "smith_children" / "2019")
    monkeypatch.chdir(home)
    base = "smith_models/base" if "full" not in kind else home / "smith_models" / "base"
    words = shlex.split(f"--pretrained_model_name_or_path '{base}' --output_dir run --report_to none {options} {ONE}")
    if "captioned" in kind:
        for photo in list((home / "smith_children" / "2019").glob("*.png")):
            photo.with_suffix(".txt").write_text("a dog")
        words += ["--train_data_dir", "smith_children/2019", "--resolution", "64"]
    else:
        words += ["--instance_data_dir", "smith_children/2019"]
        words += [] if "--instance_prompt" in words else ["--instance_prompt", "./sks dog"]
    words += ["--validation_prompt", "~ sks", "--validation_num_inference_steps", "1", "--checkpointing_steps", "1"]
    words += ["--num_validation_images", "1", "--seed", "1"]
    module = importlib.import_module(script)
    module.main(module.parse_args(words))
    monkeypatch.chdir("/")
    sent = hub.selected(home / "run")
    hub.check_whole(home / "run", sent)
    for name, data in sent.items():
        data = data if isinstance(data, bytes) else data.read_bytes()
        assert b"smith" not in data and str(home).encode() not in data, name
    assert yaml.safe_load(sent["training_config.yaml"])["validation_prompt"] == ["~ sks"]
    for file in (home / "run").rglob(
        "config.json"
    ):  # nor where they might be copied from by hand, checkpoints included
        assert "smith" not in file.read_text()
