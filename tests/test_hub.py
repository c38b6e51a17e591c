"""The model card, what is selected for the hub, and real uploads by the real client to a hub of our own."""

import html
import importlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys

import fake_hub
import pytest
import torch
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save

from utils import arguments, hub, saved
from utils.arguments import settings
from utils.report import gallery
from utils.runtime import startup

TOKEN = "hf_" + "Secret7" * 5
WEIGHTS = save({"weight": torch.ones(300)})
EVIL = "a ``sks`` dog\n---\nlicense: mit\n---\n<script>alert(1)</script> | ![x](http://evil)"
SECRETS = [b"optimizer states", b"tensorboard events", b"pickle", b"training photo", b"report page", b"older sample"]


@pytest.fixture
def folder(tmp_path):
    """An output folder with everything a run leaves, and with what must stay here marked."""
    out = tmp_path / "my dog"
    (out / "unet").mkdir(parents=True)
    for name, data in {
        "pytorch_lora_weights.safetensors": WEIGHTS,
        "unet/diffusion_pytorch_model.safetensors": WEIGHTS,
        "unet/config.json": b"{}",
        "unet/optimizer.bin": b"pickle",
        "checkpoint-100/pytorch_lora_weights.safetensors": b"optimizer states",
        "checkpoint-100/optimizer.safetensors": b"optimizer states",
        ".tmp-checkpoint-200-x/optimizer.safetensors": b"optimizer states",
        "logs/events.out.tfevents": b"tensorboard events",
        "metrics.jsonl": b"tensorboard events",
        "preview/instance-00.png": b"training photo",
        "report.html": b"report page",
        "scheduler.bin": b"pickle",
        "samples/step-000050/00-00.png": b"older sample",
    }.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    photos = tmp_path / "family photos"
    photos.mkdir()
    settings = {"pretrained_model_name_or_path": "owner/base", "instance_data_dir": str(photos), "rank": 4}
    (out / "training_config.yaml").write_text(yaml.safe_dump(settings | {"hub_token": TOKEN, "tokenizer_name": None}))
    (out / "samples/step-000100").mkdir()
    for k in range(2):
        settings = {"prompt": "a photo of sks dog in a bucket", "seed": k}
        gallery.save_png(Image.new("RGB", (32, 32), (k, 0, 0)), out / f"samples/step-000100/00-0{k}.png", settings)
    os.symlink("/etc/hostname", out / "unet" / "link.json")
    return out


def make_card(folder, **changes):
    options = {"base_model": "owner/base", "kind": "dreambooth", "adapters": "lora", "prompt": "a photo of sks dog"}
    return hub.card(folder, **options | {"facts": {"steps": 100, "final loss": 0.123456}} | changes)


def test_pictures_of_a_course_that_was_left_are_not_shown(folder):
    """Resumed from step 50 for ten steps more: what stands at step 100 was drawn by other weights."""
    (folder / "metrics.jsonl").write_text('{"step": 60, "loss": 0.1}\n')
    shown = folder / "samples/step-000060"
    (folder / "samples/step-000100").rename(folder / "samples/step-000200")
    shown.mkdir()
    gallery.save_png(Image.new("RGB", (32, 32)), shown / "00-00.png", {"prompt": "a", "seed": 0})
    text = make_card(folder).read_text()
    assert "step-000060" in text and "step-000200" not in text
    assert "samples/step-000060/00-00.png" in hub.selected(folder)


def test_card_says_what_the_hub_and_a_person_need(folder):
    card = ModelCard.load(make_card(folder))
    data = card.data.to_dict()
    assert data["base_model"] == "owner/base" and data["license"] == "creativeml-openrail-m"
    assert data["library_name"] == "diffusers" and data["instance_prompt"] == "a photo of sks dog"
    assert {"text-to-image", "lora", "dreambooth", "diffusers-training", "stable-diffusion"} <= set(data["tags"])
    urls = [entry["output"]["url"] for entry in data["widget"]]
    assert urls == ["samples/step-000100/00-00.png", "samples/step-000100/00-01.png"]
    assert all((folder / url).is_file() and f"({url})" in card.text for url in urls)
    assert "| steps | 100 |" in card.text and "| final loss | 0.1235 |" in card.text and "diffusers 0" in card.text
    assert 'load_lora_weights("my-dog")' in card.text and 'from_pretrained("owner/base"' in card.text


def width(tmp_path, number):
    base = tmp_path / f"base{number}"
    (base / "unet").mkdir(parents=True)
    (base / "unet" / "config.json").write_text(json.dumps({"cross_attention_dim": number}))
    return str(base)


def test_licence_is_that_of_the_base_model(folder, tmp_path):
    for base, family, want in (
        ("stabilityai/stable-diffusion-2-1", "stable-diffusion", "openrail++"),
        ("stabilityai/stable-diffusion-2-inpainting", "stable-diffusion-inpainting", "openrail++"),
        (width(tmp_path, 1024), "stable-diffusion", "openrail++"),
        (width(tmp_path, 768), "stable-diffusion", "creativeml-openrail-m"),
        ("CompVis/stable-diffusion-v1-4", "stable-diffusion", "creativeml-openrail-m"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl", "openrail++"),
        ("toybox", "stable-diffusion", "apache-2.0"),
    ):
        assert ModelCard.load(make_card(folder, base_model=base, family=family)).data.license == want, base


def test_sdxl_loras_get_the_hubs_gallery(folder):
    for kind in ("lora", "dora"):
        card = ModelCard.load(make_card(folder, family="stable-diffusion-xl", adapters=kind))
        assert {"template:sd-lora", "lora", "stable-diffusion-xl", "diffusers"} <= set(card.data.tags)
        assert "\n<Gallery />\n" in card.text and card.data.instance_prompt and card.data.widget[0]["output"]["url"]
    for changes in ({"family": "stable-diffusion"}, {"family": "stable-diffusion-xl", "adapters": None}):
        card = ModelCard.load(make_card(folder, **changes))
        assert "template:sd-lora" not in card.data.tags and "<Gallery />" not in card.text


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_what_diffusers_cannot_load_does_not_say_so(folder, kind):
    data = ModelCard.load(make_card(folder, family="stable-diffusion-xl", adapters=kind)).data.to_dict()
    assert "library_name" not in data and not [tag for tag in data["tags"] if "diffusers" in tag]
    assert {kind, "lycoris", "text-to-image", "stable-diffusion-xl"} <= set(data["tags"])


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, ['load_lora_weights("someone/dog")', 'pipeline("my-dog"']),
        ({"model_id": "my-dog"}, ['load_lora_weights("someone/dog")']),
        ({"adapters": None}, ['from_pretrained("someone/dog"']),
        ({"adapters": "loha"}, ['infer.py --lora "someone/dog"']),
    ],
)
def test_the_card_that_is_uploaded_names_its_repository(folder, changes, code):
    for shown in (folder / "samples").iterdir():
        shutil.rmtree(shown)
    make_card(folder, **{"prompt": "my-dog"} | changes)
    text = hub._named(hub.selected(folder)["README.md"].decode(), "someone/dog")
    assert "\n# someone/dog\n" in text and all(line in text for line in code), text
    assert "# my-dog" in (folder / "README.md").read_text()  # the one here stays as it is


def test_card_of_what_the_toybox_learned(folder):
    card = ModelCard.load(make_card(folder, base_model="toybox"))
    assert card.data.license == "apache-2.0" and 'from_pretrained("toybox/sd"' in card.text


def test_card_of_whole_networks_loads_as_a_pipeline(folder):
    text = ModelCard.load(make_card(folder, adapters=None, kind="text-to-image", prompt=None, model_id="me/it")).text
    assert 'from_pretrained("me/it"' in text and "load_lora_weights" not in text and "dreambooth" not in text.lower()


def test_the_code_in_the_card_is_python(folder):
    text = make_card(folder, prompt=EVIL, base_model="ow```ner").read_text()
    block = text.split("```python\n")[1].split("\n```")[0]
    compile(block, "card", "exec")
    assert "ow```ner" not in block


def test_prompts_stay_text(folder):
    card = ModelCard.load(make_card(folder, prompt=EVIL, facts={"class prompt": EVIL}))
    assert card.data.license == "creativeml-openrail-m" and card.data.instance_prompt == EVIL
    flat = " ".join(EVIL.split())
    assert f"``` {flat} ```" in card.text  # inside a code span, longer than any run of backticks in it
    outside = card.text.replace(f"``` {flat} ```", "")
    assert "<script>" not in outside and "![x]" not in outside and r"!\[x\](http://evil)" in outside
    assert html.escape("<script>") in outside


def test_selected_is_an_allow_list(folder):
    make_card(folder)
    assert sorted(hub.selected(folder)) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
        "samples/step-000100/00-00.png",
        "samples/step-000100/00-01.png",
        "training_config.yaml",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def test_folders_of_this_machine_and_tokens_stay_here(folder, tmp_path):
    base = tmp_path / "my models" / "base"
    base.mkdir(parents=True)
    make_card(folder, base_model=str(base), facts={"note": f"token {TOKEN}"})
    subjects = [{"instance_data_dir": str(tmp_path / "home of Ann"), "instance_prompt": "a photo of sks dog"}]
    with (folder / "training_config.yaml").open("a") as settings:
        settings.write(yaml.safe_dump({"concepts_list": subjects}))
    assert ModelCard.load(folder / "README.md").data.base_model == str(base)  # here it can be loaded from the card
    sent = hub.selected(folder, TOKEN)
    for name in ("README.md", "training_config.yaml"):
        text = sent[name].decode()
        assert str(tmp_path) not in text and TOKEN not in text
    assert ModelCard(sent["README.md"].decode()).data.base_model is None
    settings = yaml.safe_load(sent["training_config.yaml"])
    assert settings["concepts_list"] == [subjects[0] | {"instance_data_dir": "home of Ann"}]
    assert (
        settings["instance_data_dir"] == "family photos"
        and "hub_token" not in settings
        and "tokenizer_name" in settings
    )


@pytest.mark.parametrize(
    "name, wanted", [("my dog", "my-dog"), ("--x..y--", "x-y"), ("ÄÖ", "model"), ("a" * 200, "a" * 96)]
)
def test_folder_names_become_repository_names(tmp_path, name, wanted):
    assert hub.hub_name(tmp_path / name) == wanted


def publish(server_url, folder, token=TOKEN, model_id="someone/dog", cwd=ROOT, **options):
    """In a process of its own: the client reads HF_ENDPOINT when it is imported."""
    code = (
        "import sys; from utils import hub\n"
        f"ok = hub.publish({str(folder)!r}, {model_id!r}, token='env:THE_TOKEN', waits=(0.01, 0.01), **{options})\n"
        "sys.exit(0 if ok else hub.NOT_PUBLISHED)"
    )
    env = dict(os.environ, HF_ENDPOINT=server_url, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", THE_TOKEN=token)
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert TOKEN not in done.stdout + done.stderr
    return done


def check_nothing_secret(server):
    for body in server.received:
        assert TOKEN.encode() not in body
        for secret in SECRETS:
            assert secret not in body
            assert json.dumps(secret.decode()).encode() not in body


def test_upload(folder):
    make_card(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with fake_hub.Hub() as server:
        done = publish(server.url, folder)
    assert done.returncode == 0, done.stderr
    assert server.files == {
        name: data if isinstance(data, bytes) else data.read_bytes()
        for name, data in hub.selected(folder, TOKEN).items()
        if name != "README.md"
    } | {"README.md": hub._named(hub.selected(folder, TOKEN)["README.md"].decode(), "someone/dog").encode()}
    assert b'load_lora_weights("someone/dog")' in server.files["README.md"]
    assert server.repos == {"someone/dog": "private"}
    assert server.tokens == {TOKEN}
    check_nothing_secret(server)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    calls = [call.split("?")[0] for call in server.calls]
    assert calls[0] == "POST /api/repos/create" and calls[-1] == "POST /api/models/someone/dog/commit/main"
    assert sum(call.startswith("PUT /put/") for call in calls) == 4


def test_upload_succeeds_after_a_bad_moment(folder):
    make_card(folder)
    with fake_hub.Hub(fail={"/api/repos/create": 1, "/api/validate-yaml": 1, "/preupload/": 1}) as server:
        done = publish(server.url, folder)
    assert done.returncode == 0, done.stderr
    assert "once more in" in done.stderr and len(server.files) == 7
    check_nothing_secret(server)


def test_token_that_may_only_read_is_not_tried_again(folder):
    make_card(folder)
    with fake_hub.Hub(role="read") as server:
        done = publish(server.url, folder)
    assert done.returncode == hub.NOT_PUBLISHED
    assert "once more" not in done.stderr and server.files == {}
    assert f"python -m utils.hub {shlex.quote(str(folder))} --hub_model_id someone/dog" in done.stderr
    assert sum("repos/create" in call for call in server.calls) == 1


def test_unreachable_hub_leaves_the_result_and_says_how_to_try_again(folder):
    make_card(folder)
    done = publish("http://127.0.0.1:9", folder)
    assert done.returncode == hub.NOT_PUBLISHED
    assert (
        done.stderr.count("once more") == 2 and "not published" in done.stderr and "python -m utils.hub" in done.stderr
    )
    assert (folder / "pytorch_lora_weights.safetensors").is_file()


def test_the_command_that_tries_again(folder):
    make_card(folder)
    with fake_hub.Hub() as server:
        env = dict(os.environ, HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_TOKEN=TOKEN)
        command = [sys.executable, "-m", "utils.hub", str(folder), "--public"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert server.repos == {"someone/my-dog": "public"} and len(server.files) == 7


def test_an_empty_folder_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        hub.selected(tmp_path)


def test_settings_are_cut_by_what_an_option_is_and_not_by_its_looks(folder, tmp_path, monkeypatch):
    """A prompt may begin like a path, and a folder like a repository: it is one where the run was started."""
    (tmp_path / "smith_models" / "base").mkdir(parents=True)
    (tmp_path / "smith_data" / "pets").mkdir(parents=True)
    prompts = ["./a dog", "~ a dog", "/ dog", "smith_models", ". a dog"]
    given = {
        "pretrained_model_name_or_path": "smith_models/base",
        "pretrained_vae_model_name_or_path": "stabilityai/sd-vae-ft-mse",
        "dataset_name": "smith_data/pets",
        "instance_data_dir": "smith_children/2019",
        "class_data_dir": "smith_children/others",
        "validation_images": ["smith_children/1.png"],
        "validation_prompt": prompts,
        "test_prompts": prompts,
        "instance_prompt": "/a/dog",
        "lora_target_modules": ["to_q"],
    }
    monkeypatch.chdir(tmp_path)
    startup.write_settings(folder, given)
    make_card(folder, base_model="smith_models/base", dataset="smith_data/pets")
    monkeypatch.chdir("/")
    sent = hub.selected(folder)
    assert not [name for name, data in sent.items() if isinstance(data, bytes) and b"smith_children" in data]
    told = yaml.safe_load(sent["training_config.yaml"])
    cut = {"pretrained_model_name_or_path": "base", "dataset_name": "pets", "instance_data_dir": "2019"}
    cut |= {"class_data_dir": "others", "validation_images": ["1.png"]}
    assert told == given | cut
    assert "smith" not in sent["README.md"].decode() and ModelCard(sent["README.md"].decode()).data.base_model is None
    # Settings of an earlier version do not say which were folders: only what the hub gave this machine is kept whole.
    text = (folder / "training_config.yaml").read_text().split("\n", 1)[1]
    (folder / "training_config.yaml").write_text(text)
    cache = tmp_path / "cache" / "models--stabilityai--sd-vae-ft-mse"
    cache.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    assert yaml.safe_load(hub.selected(folder)["training_config.yaml"]) == given | cut


def test_every_option_that_names_a_folder_is_known(monkeypatch):
    found = set()

    def remember(parser, argv=None):
        found.update(a.dest for a in parser._actions if a.type in (settings.folder, settings.concepts_file))
        raise KeyboardInterrupt

    monkeypatch.setattr(arguments, "parse", remember)
    for script in ROOT.glob("train_*.py"):
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(script.stem).parse_args([])
    assert found - set(settings.OCCASIONAL) == {*saved.PLACES, *saved.NAMED}


def pipeline_of(folder):
    """The result of a full run in place of the adapters."""
    (folder / "pytorch_lora_weights.safetensors").unlink()
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDPMScheduler"}
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_name_or_path": "/home/smith/base",
        "safety_checker": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index | {part: ["diffusers", parts[part]] for part in parts}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_name_or_path": "/home/smith/base", "sample_size": 8}')
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(WEIGHTS)
    return folder


DAMAGES = {
    "nothing": None,
    "'{unet}' is damaged: 1000 bytes, its header says": lambda unet: unet.write_bytes(unet.read_bytes()[:1000]),
    "'{unet}' is damaged: it is no safetensors file": lambda unet: unet.write_bytes(b""),
    "is not a whole pipeline: unet/ has no safetensors weights": lambda unet: unet.unlink(),
    "is not a whole pipeline: vae/ has no config.json": lambda unet: (unet.parents[1] / "vae/config.json").unlink(),
    "scheduler/ has no scheduler_config.json": lambda unet: (
        unet.parents[1] / "scheduler/scheduler_config.json"
    ).unlink(),
    "config.json' is damaged": lambda unet: (unet.parent / "config.json").write_text("{"),
    "names b.safetensors, which is not there": lambda unet: (unet.parent / "x.safetensors.index.json").write_text(
        '{"weight_map": {"w": "b.safetensors"}}'
    ),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_what_nobody_could_load_is_not_published(folder, said):
    pipeline_of(folder)
    make_card(folder, adapters=None)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.write_bytes(save({"weight": torch.ones(3000)}))
    if DAMAGES[said]:
        DAMAGES[said](unet)
    with fake_hub.Hub() as server:
        done = publish(server.url, folder)
    if DAMAGES[said]:
        assert done.returncode == hub.NOT_PUBLISHED and said.format(unet=unet) in done.stderr, done.stderr
        assert server.calls == [] and "once more" not in done.stderr
    else:
        assert done.returncode == 0 and "model_index.json" in server.files, done.stderr
        assert not [name for name, data in server.files.items() if b"smith" in data]


def test_a_hub_that_never_answers_is_given_up_and_the_printed_command_works_anywhere(folder, tmp_path):
    make_card(folder)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = publish(address, folder.name, cwd=folder.parent, patience=0.3)
    assert done.returncode == hub.NOT_PUBLISHED and "timed out" in done.stderr, done.stderr
    command = done.stderr.split("To try again: ")[1].strip()
    env = dict(os.environ, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_TOKEN=TOKEN)
    env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
    with fake_hub.Hub() as server:
        env["HF_ENDPOINT"] = server.url
        done = subprocess.run(command, shell=True, cwd="/", env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert server.repos == {"someone/dog": "private"} and len(server.files) == 7
