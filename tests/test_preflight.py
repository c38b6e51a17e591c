"""What is refused before anything slow starts: the sentence, the exit code, and that nothing was touched."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_hub
import pytest
import test_arguments
from PIL import Image, ImageFilter

from utils import arguments, errors, preflight
from utils.arguments import length
from utils.preflight import model_folder, plan, quality, remote

ROOT = Path(__file__).resolve().parent.parent
PRIOR = "--with_prior_preservation --class_data_dir=cls --class_prompt=dog"


@pytest.fixture
def parse(tmp_path, sd1, photos):
    """Options of a run that nothing is wrong with, plus the words of a test."""

    def parsed(*words, model=sd1, folder=photos, lora=True):
        needed = [f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={folder}"]
        needed += ["--instance_prompt=a photo of sks dog", f"--output_dir={tmp_path / 'out'}", "--resolution=64"]
        needed = [one for one in needed if one.split("=")[0] not in words]
        return test_arguments.parse(*words, needed=needed, lora=lora)

    return parsed


def refused(capsys, args, code=errors.OPTIONS):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        preflight.check(args)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == code, said
    return [line.removeprefix("error: ") for line in said if line.startswith("error: ")]


def test_a_good_run_passes_with_one_line(parse, photos, tmp_path, capsys):
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in photos.iterdir()}
    assert preflight.check(parse("--output_dir", str(tmp_path / "a" / "b"))) == []
    assert (tmp_path / "a" / "b").is_dir() and not any((tmp_path / "a" / "b").iterdir())
    assert before == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in photos.iterdir()}
    said = capsys.readouterr()
    warned = [line for line in said.err.splitlines() if "--output_dir is given 2 times" not in line]
    assert said.out == f"3 photos in '{photos}', 80x96\n" and not warned


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGUSR1", 75), ("SIGTERM", 143)])
def test_a_signal_during_the_checks_is_answered_at_once(sd1, tmp_path, name, code):
    """3,000 photos of a few milliseconds each: one line, the exit code, no traceback, nothing left."""
    (tmp_path / "photos").mkdir()
    Image.effect_noise((400, 400), 60).convert("RGB").save(tmp_path / "photos" / "0.png")
    for number in range(1, 3000):
        os.link(tmp_path / "photos" / "0.png", tmp_path / "photos" / f"{number}.png")
    words = ["--pretrained_model_name_or_path", str(sd1), "--instance_data_dir", str(tmp_path / "photos")]
    words += ["--instance_prompt", "a dog", "--output_dir", str(tmp_path / "out")]
    source = (
        "import sys, utils.images as images, train_dreambooth_lora as script\n"
        "look = images.inspect\n"
        "images.inspect = lambda *given, **named: print('checking', flush=True) or look(*given, **named)\n"
        "script.main(script.parse_args())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", source, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "checking\n"
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code and time.monotonic() - began < 3, "a second, on a machine that others use too"
    assert said == f"{name}: stopped during the checks, before training began\n"
    assert not (tmp_path / "out").exists()


def test_everything_wrong_is_said_at_once(parse, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    args = parse("--with_prior_preservation", f"--class_data_dir={__file__}", "--class_prompt=x", model=tmp_path / "no",
                 folder=tmp_path / "missing")  # fmt: skip
    said = "\n".join(refused(capsys, args))
    assert f"'{tmp_path / 'out'}' is a file; name a folder" in said
    assert f"--instance_data_dir '{tmp_path / 'missing'}' does not exist" in said
    assert f"--class_data_dir '{__file__}' is not a folder" in said
    assert f"--pretrained_model_name_or_path {tmp_path / 'no'} does not exist here" in said


def test_unusable_photos_are_data_errors(parse, photos, capsys):
    whole = min(photos.iterdir())
    (photos / "text.jpg").write_text("hello")
    (photos / "empty.png").write_bytes(b"")
    (photos / f"cut{whole.suffix}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (photos / ".DS_Store").write_bytes(b"x")
    said = refused(capsys, parse(), errors.DATA)
    assert [any(name in line for line in said) for name in ("text.jpg", "empty.png", f"cut{whole.suffix}")] == [
        True
    ] * 3
    assert "--on_bad_image skip" in said[-1] and ".DS_Store" not in "\n".join(said)
    bad = preflight.check(parse("--on_bad_image=skip"))
    assert sorted(path.name for path in bad) == sorted(["text.jpg", "empty.png", f"cut{whole.suffix}"])
    (photos / "more.jpg").write_bytes(b"")
    assert "4 of 7 pictures cannot be used: too many" in refused(capsys, parse("--on_bad_image=skip"), errors.DATA)[-1]
    (photos / "more.jpg").unlink()
    preflight.check(parse("--on_bad_image=skip"))
    said = capsys.readouterr()
    assert "3 photos" in said.out and "3 left out" in said.out and "warning: left out:" in said.err


def test_like_and_blurred_photos_are_pointed_out(parse, photos, capsys):
    first, second, third = sorted(photos.iterdir())
    with Image.open(first) as image:
        image.resize((160, 192)).convert("RGB").save(photos / "again.jpg", quality=80)
    with Image.open(second) as image:
        big = image.convert("RGB").resize((640, 768)).transpose(Image.Transpose.ROTATE_90)
        big.filter(ImageFilter.GaussianBlur(20)).save(photos / "shaken.jpg", quality=90)
    preflight.check(parse())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert "look nearly the same" in said[0] and "again.jpg" in said[0] and first.name in said[0]
    assert third.name not in said[0]
    assert "'{}' is very blurred".format(photos / "shaken.jpg") in said[1]


def test_sharpness_is_a_matter_of_the_picture_and_not_of_its_size_or_contrast():
    noise = Image.effect_noise((1024, 1280), 100)  # sharp at any size
    for picture in (noise, noise.resize((256, 320), Image.Resampling.BOX), noise.point(lambda value: 100 + value // 8)):
        assert quality.look(picture.convert("RGB")).sharpness > 20 * quality.BLURRED
    for scale in (1, 4):  # the same blur, seen from the same distance
        drawn = Image.new("RGB", (256 * scale, 256 * scale), "white")
        drawn.paste("black", (60 * scale, 60 * scale, 190 * scale, 170 * scale))
        sharp, soft = drawn, drawn.filter(ImageFilter.GaussianBlur(8 * scale))
        assert quality.look(soft).sharpness < quality.BLURRED < quality.look(sharp).sharpness / 10
    assert quality.look(Image.new("RGB", (64, 64), "red")).sharpness > quality.BLURRED


def test_what_is_no_photo_is_counted_and_links_outside_are_told(parse, photos, tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "elsewhere.png")
    (photos / "linked.png").symlink_to(tmp_path / "elsewhere.png")
    (photos / "broken.png").symlink_to(photos / "gone.png")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "Read me.pdf"):
        (photos / name).write_bytes(b"x")
    (photos / ".ipynb_checkpoints").mkdir()
    preflight.check(parse())
    said = capsys.readouterr()
    assert (
        said.out.startswith("4 photos") and "; 3 other files ignored (Read me.pdf, Thumbs.db, broken.png)" in said.out
    )
    assert f"linked.png' is a link to '{tmp_path / 'elsewhere.png'}', outside of the folder" in said.err


def test_masks_are_checked(parse, photos, tmp_path, capsys):
    first, second, _ = sorted(photos.iterdir())
    assert refused(capsys, parse("--masked_loss"), errors.DATA)[0].startswith("--masked_loss: no photo has a mask")
    assert "no photo has a mask" in refused(capsys, parse("--alpha_mask"), errors.DATA)[0]
    Image.new("L", (80, 96), 255).save(first.with_suffix(".mask.png"))
    preflight.check(parse())
    assert "1 photos have a mask beside them, which is not used: add --masked_loss" in capsys.readouterr().err
    preflight.check(parse("--masked_loss"))
    said = capsys.readouterr()
    assert said.out.startswith("3 photos") and "2 of 3 photos have no mask and count as a whole" in said.err
    Image.new("L", (80, 96)).save(first.with_suffix(".mask.png"))
    Image.new("L", (96, 80), 255).save(second.with_suffix(".mask.png"))
    said = refused(capsys, parse("--masked_loss"), errors.DATA)
    assert len(said) == 2 and f"{first.stem}.mask.png' is black" in said[0] and "96x80" in said[1]
    assert "is not a folder" in refused(capsys, parse(f"--masks_dir={tmp_path / 'none'}"))[0]
    (photos / "masks").mkdir()
    said = refused(capsys, parse(f"--masks_dir={photos / 'masks'}"))
    assert "--masks_dir lies inside --instance_data_dir" in said[0]


def test_placeholders_in_captions_need_their_options(parse, photos, capsys):
    for path in photos.iterdir():
        path.with_suffix(".txt").write_text("{identifier} the {class}")
    first = sorted(photos.glob("*.png"))[0]
    said = refused(capsys, parse("--class_noun=dog"), errors.DATA)
    assert said == [f"the text of '{first}' and 2 more holds {{identifier}}: give --identifier"]
    preflight.check(parse("--class_noun=dog", "--identifier=sks"))


def test_no_photos(parse, tmp_path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    assert "holds no pictures (it is empty)" in refused(capsys, parse(folder=folder))[0]
    (folder / "readme.txt").write_text("x")
    assert "holds no pictures (only captions, masks or hidden files)" in refused(capsys, parse(folder=folder))[0]
    (folder / "a.pdf").write_text("x")
    assert "holds no pictures (1 other file)" in refused(capsys, parse(folder=folder))[0]
    (folder / "a.jpg").write_text("x")  # skipping may not leave nothing
    assert "a.jpg" in refused(capsys, parse("--on_bad_image=skip", folder=folder), errors.DATA)[0]


def test_captions_are_read(parse, photos, capsys):
    (photos / "metadata.jsonl").write_text('{"file_name": "../secret.png", "text": "x"}\n{"file_name":\n')
    said = refused(capsys, parse(), errors.DATA)
    assert "metadata.jsonl:1:" in said[0] and "metadata.jsonl:2:" in said[1]


def test_a_mistake_of_many_pictures_is_said_a_few_times(parse, photos, capsys):
    names = [f"{number}.png" for number in range(50)]
    for name in names:
        Image.new("RGB", (64, 64), "red").save(photos / name)
    rows = [json.dumps({"file_name": name, "words": "x"}) for name in names]
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    said = refused(capsys, parse(), errors.DATA)
    assert len(said) == 21 and said[-1].startswith("... and ") and "--caption_column NAME" in said[0]
    assert not any("has no caption" in line for line in said)


def test_folder_with_a_run(parse, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (out / "checkpoint-10").mkdir(parents=True)
    (out / "mine").mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    (out / "timings.json").write_text("{}")
    said = refused(capsys, parse())[0]
    assert "already holds a run (checkpoint-10, metrics.jsonl)" in said
    assert "--resume_from_checkpoint latest" in said and "--overwrite_output_dir" in said
    preflight.check(parse("--resume_from_checkpoint=latest"))
    preflight.check(parse("--resume_from_checkpoint=checkpoint-10"))
    preflight.check(parse("--overwrite_output_dir", "--dry_run"))
    assert (out / "checkpoint-10").is_dir()
    monkeypatch.setenv("RANK", "1")  # by the time a second process looks, the first one's run is there
    preflight.check(parse())
    preflight.check(parse("--overwrite_output_dir"))
    assert (out / "checkpoint-10").is_dir()
    monkeypatch.setenv("RANK", "0")
    preflight.check(parse("--overwrite_output_dir"))
    assert {path.name for path in out.iterdir()} - {".run.lock"} == {"mine"}
    # A checkpoint of another run continues in a folder of its own, not in one that holds a third.
    (tmp_path / "other" / "checkpoint-5").mkdir(parents=True)
    elsewhere = f"--resume_from_checkpoint={tmp_path / 'other' / 'checkpoint-5'}"
    preflight.check(parse(elsewhere))
    (out / "checkpoint-10").mkdir()
    preflight.check(parse(f"--resume_from_checkpoint={out / 'checkpoint-10'}"))
    said = refused(capsys, parse(elsewhere))[0]
    assert "already holds a run (checkpoint-10)" in said and "is of another" in said
    (out / "checkpoint-10").rmdir()
    (out / "training_config.yaml").write_text("a start that failed")
    preflight.check(parse())
    said = refused(capsys, parse("--resume_from_checkpoint=checkpoint-7"))[0]
    assert "--resume_from_checkpoint checkpoint-7: no such folder; there is none in --output_dir" in said


def test_a_run_that_is_going_on_is_not_removed(parse, tmp_path, capsys):
    from utils.runtime import startup

    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
         f"from utils.runtime import startup\nfrom pathlib import Path\nlock = startup.FolderLock(Path({str(out)!r}))\n"
         "assert lock.take() is None\nprint('held', flush=True)\nsys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        said = refused(capsys, parse("--overwrite_output_dir"))[0]
        assert f"a run is going on in {out}" in said and str(holder.pid) in said
        assert (out / "metrics.jsonl").exists()
    finally:
        holder.communicate("")
    preflight.check(parse("--overwrite_output_dir"))
    assert not (out / "metrics.jsonl").exists() and startup.FolderLock(out).take() is None


def test_a_finished_run_without_a_checkpoint_is_not_trained_anew_by_latest(parse, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    preflight.check(parse("--resume_from_checkpoint=latest"))  # killed before its first checkpoint: from the beginning
    (out / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    said = refused(capsys, parse("--resume_from_checkpoint=latest"))[0]
    assert "holds a finished run" in said and "no checkpoint" in said
    (out / "checkpoint-10").mkdir()
    preflight.check(parse("--resume_from_checkpoint=latest"))


def test_a_resume_says_what_it_changes_and_that_it_begins_anew(parse, tmp_path, capsys):
    folder = tmp_path / "out"
    preflight.check(parse("--resume_from_checkpoint=latest"))
    said = capsys.readouterr()
    assert f"latest: {folder} holds no checkpoint, so training starts from the beginning" in said.out
    earlier = parse("--learning_rate=1e-4", "--lr_scheduler=cosine", "--max_train_steps=50", "--seed=1")
    arguments.save(earlier, folder / "training_config.yaml")
    (folder / "checkpoint-5").mkdir()
    same = ["--learning_rate=1e-4", "--lr_scheduler=cosine", "--max_train_steps=50"]
    for which in ("latest", "checkpoint-5", str(folder / "checkpoint-5")):
        preflight.check(parse(f"--resume_from_checkpoint={which}", *same))
        said = capsys.readouterr()
        assert not said.err and "from the beginning" not in said.out
    more = ["--learning_rate=2e-4", "--lr_scheduler=linear", "--max_train_steps=60", "--max_grad_norm=0.5"]
    preflight.check(parse("--resume_from_checkpoint=latest", *more, "--adam_beta1=0.8"))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: --learning_rate was 0.0001 and is now 0.0002: the resumed steps use the new value"
    names = ["learning_rate", "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "adam_beta1", "max_train_steps"]
    assert [line.split()[1].removeprefix("--") for line in said] == names
    earlier.lr_scheduler = "constant"
    arguments.save(earlier, folder / "training_config.yaml")
    preflight.check(parse("--resume_from_checkpoint=latest", "--learning_rate=1e-4", "--max_train_steps=60"))
    assert "max_train_steps" not in capsys.readouterr().err, "more steps at a constant rate are the same course"


def test_a_rank_that_no_layer_can_use_is_refused(parse, capsys):
    """The largest layer of the tiny UNet's attention has a rank of 16, the smallest one of 8."""
    said = "--rank is 17: no layer of the model has a rank above 16; give that or less"
    assert refused(capsys, parse("--rank=17")) == [said]
    preflight.check(parse("--rank=9"))
    assert "layers have a lower rank, down to 8" in capsys.readouterr().err
    preflight.check(parse("--rank=17", "--adapter=loha"))
    preflight.check(parse("--rank=8"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint=latest"]])
def test_files_that_no_run_wrote_are_not_replaced(parse, tmp_path, capsys, words):
    out = tmp_path / "out"
    (out / "samples").mkdir(parents=True)
    (out / "README.md").write_text("mine")
    (out / "notes.txt").write_text("mine")
    said = refused(capsys, parse(*words))[0]
    assert "holds README.md, samples, not written by a run" in said
    for name in ("unet", "mine"):
        (out / name).mkdir()
        (out / name / "x.txt").write_text("mine")
    said = refused(capsys, parse(*words))  # a name that a run's result has too
    assert len(said) == 1 and "holds README.md, samples, unet, not written by a run" in said[0]
    shutil.rmtree(out / "unet")
    assert (out / "README.md").read_text() == "mine" and (out / "samples").is_dir()
    (out / ".run.lock").write_text("")  # of a run that was killed early
    preflight.check(parse(*words))


@pytest.mark.parametrize(
    "place", ["samples", "unet/config.json", "preview/instance-00.png", "logs", "report.html", ".run.lock"]
)
def test_a_link_that_leads_out_of_the_folder_is_refused(parse, tmp_path, capsys, place):
    out, mine = tmp_path / "out", tmp_path / "mine"
    (out / place).parent.mkdir(parents=True)
    (out / "training_config.yaml").write_text("seed: 1\n")
    mine.write_text("years of work")
    (out / "checkpoint-7").symlink_to(tmp_path)  # is replaced, not written through
    (out / place).symlink_to(mine)
    said = refused(capsys, parse("--resume_from_checkpoint=latest"))
    assert any(f"'{out / place}' is a link to '{mine}', outside of the folder" in line for line in said), said
    anew = parse("--overwrite_output_dir")
    if place == ".run.lock":
        assert "is a link; remove the link" in refused(capsys, anew)[0]
        return
    preflight.check(anew)  # removes the links
    assert mine.read_text() == "years of work" and not os.path.lexists(out / "samples")


def test_warm_up_longer_than_the_epochs(parse, capsys):
    said = refused(capsys, parse("--lr_warmup_steps=500", "--num_train_epochs=20"))[0]
    assert "leaves nothing of the 15 steps that --num_train_epochs 20 makes" in said


def test_fresh_folder_may_be_resumed(parse, tmp_path):
    preflight.check(parse("--resume_from_checkpoint=latest", f"--output_dir={tmp_path / 'new'}"))
    assert (tmp_path / "new").is_dir()


def test_dry_run_creates_nothing(parse, tmp_path):
    preflight.check(parse("--dry_run"))
    assert not (tmp_path / "out").exists()


def test_folders_inside_each_other(parse, photos, sd1, tmp_path, capsys):
    said = refused(capsys, parse(f"--output_dir={photos / 'out'}"))[0]
    assert "--output_dir lies inside --instance_data_dir" in said
    words = ["--with_prior_preservation", "--class_prompt=x"]
    said = refused(capsys, parse(*words, f"--class_data_dir={photos / 'class'}"))[0]
    assert "--class_data_dir lies inside --instance_data_dir" in said
    said = refused(capsys, parse(*words, f"--class_data_dir={photos}"))[0]
    assert "--class_data_dir and --instance_data_dir are the same folder" in said
    said = "\n".join(refused(capsys, parse("--overwrite_output_dir", f"--output_dir={sd1}")))
    assert "--output_dir is the base model's folder" in said
    shutil.copytree(photos, tmp_path / "out" / "samples")
    (tmp_path / "out" / ".run.lock").write_text("")
    said = refused(capsys, parse("--overwrite_output_dir", folder=tmp_path / "out" / "samples"))[0]
    assert "would remove --instance_data_dir" in said and any((tmp_path / "out" / "samples").iterdir())


def damage(folder, kind):
    index = json.loads((folder / "model_index.json").read_text())
    weights = next((folder / "unet").glob("*.safetensors"))
    if kind == "index":
        (folder / "model_index.json").unlink()
    elif kind == "unet":
        shutil.rmtree(folder / "unet")
    elif kind == "weights":
        weights.unlink()
    elif kind == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    elif kind == "variant":
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif kind == "text":
        weights.write_text("not a network")
    else:
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("index", "is a folder without model_index.json"),
        ("unet", "lacks unet/: the copy is incomplete"),
        ("weights", "has no weights in unet/"),
        ("pickle", "only as a pickle, which can hold code"),
        ("variant", "only as variant fp16; add --variant fp16"),
        ("cut", "is damaged: "),
        ("text", "is damaged: it is no safetensors file"),
        ("IFPipeline", "is a IFPipeline: IF comes with its family"),
        ("FluxPipeline", "is a FluxPipeline: this script trains StableDiffusionPipeline"),
    ],
)
def test_broken_model_folders(parse, sd1, tmp_path, capsys, kind, expected):
    folder = tmp_path / "model"
    shutil.copytree(sd1, folder)
    damage(folder, kind)
    said = refused(capsys, parse(model=folder))
    assert len(said) == 1 and expected in said[0] and str(folder) in said[0], said


def test_single_file_and_hub_names(parse, tmp_path, capsys, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "is a single file" in refused(capsys, parse(model=tmp_path / "model.safetensors"))[0]
    assert "no hub name of the form owner/model" in refused(capsys, parse(model="./nowhere"))[0]
    assert "not in the cache, and the hub cannot be reached" in refused(capsys, parse(model="owner/unknown-model"))[0]
    monkeypatch.delenv("HF_HUB_OFFLINE")  # and no half minute of retries where there is no network
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached" in refused(capsys, parse(model="owner/unknown-model"))[0]


def test_missing_packages_are_named_with_the_way_to_get_them(parse, capsys, monkeypatch):
    found = remote.importlib.util.find_spec
    absent = {"wandb", "xformers", "bitsandbytes", "prodigyopt", "trackio"}
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    args = parse("--report_to=wandb,trackio", "--enable_xformers_memory_efficient_attention", "--use_8bit_adam")
    said = "\n".join(refused(capsys, args))
    for package in ("wandb", "trackio", "xformers", "bitsandbytes"):
        assert f"pip install {package}" in said
    assert "pip install prodigyopt" in refused(capsys, parse("--optimizer=prodigy", "--learning_rate=1"))[0]


def test_trackers_never_ask(parse, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert remote.trackers(parse("--report_to=wandb")) == []
    assert os.environ["WANDB_MODE"] == "offline" and "wandb is not logged in" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_MODE", "online")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    remote.trackers(parse("--report_to=wandb"))
    assert os.environ["WANDB_MODE"] == "online" and not capsys.readouterr().err
    assert "export COMET_API_KEY" in remote.trackers(parse("--report_to=comet_ml"))[0]


def test_rights_on_the_hub(parse, capsys, monkeypatch, tmp_path):
    import huggingface_hub

    assert "HF_HUB_OFFLINE=1" in remote.hub(parse("--push_to_hub"))[0]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "nobody is logged in" in remote.hub(parse("--push_to_hub"))[0]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    assert "no repository name" in remote.hub(parse("--push_to_hub", "--hub_model_id=a/b/c"))[0]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert remote.hub(parse("--push_to_hub")) == [] and "cannot be reached now" in capsys.readouterr().err
    for role, model, expected in (
        ("write", "someone/dog", None),
        ("write", "stranger/dog", "cannot write to stranger"),
        ("read", "dog", "the token may only read"),
    ):
        with fake_hub.Hub(role=role) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            monkeypatch.setattr(huggingface_hub, "whoami", huggingface_hub.HfApi(hub.url, token="hf_test").whoami)
            said = remote.hub(parse("--push_to_hub", f"--hub_model_id={model}"))
            assert (said == []) if expected is None else expected in said[0]
            assert "GET /api/whoami-v2" in hub.calls


def test_disk(parse, capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    said = refused(capsys, parse(lora=False))[0]
    assert "50 kB are free and at least" in said and "a checkpoint" in said
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=20_000_000))
    preflight.check(parse("--max_train_steps=5000", "--checkpointing_steps=10", lora=False))
    assert "--checkpoints_total_limit" in capsys.readouterr().err
    args = parse("--max_train_steps=100", "--use_ema", "--posthoc_ema", lora=False)
    needs = plan.outline(args, Path(args.pretrained_model_name_or_path), 3)
    enough = needs.result_bytes + 2 * needs.checkpoint_bytes + 20 * needs.snapshot_bytes
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=enough - 1))
    said = refused(capsys, args)[0]
    assert f"20 snapshots of averages {plan.size(20 * needs.snapshot_bytes)})" in said
    (left := Path(args.output_dir) / "ema_snapshots").mkdir(parents=True, exist_ok=True)  # by a run that goes on
    (left / "step-000005-0.05.safetensors").write_bytes(b"1")
    args.resume_from_checkpoint = "latest"
    preflight._disk(args, needs, problems := preflight.Problems())
    assert not problems.options
    (left / "step-000005-0.05.safetensors").rename(left / "step-000007-0.05.safetensors")  # with --ema_snapshot_steps 7
    preflight._disk(args, needs, problems := preflight.Problems())
    assert problems.options, "all 20 come beside it"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--use_dora --rank=3 --lora_conv_rank=2",
        "--lora_target_modules=to_q,conv1,k_proj --train_text_encoder",
        "--train_text_encoder --lora_unet_blocks=up_blocks.1.attentions.0",
        "--adapter=loha --rank=2 --lora_conv_rank=3 --train_text_encoder",
        "--adapter=lokr --rank=2 --lora_conv_rank=1",
        "--adapter=lokr --rank=1 --lokr_factor=2",
    ],
)
def test_planned_parameters_are_those_that_learn(parse, sd1, words):
    import torch

    from utils import adapters, arguments, models

    args = parse(*words.split())
    said = plan.outline(args, Path(sd1), photos=3)
    family = models.family_of(str(sd1))
    family.load("cpu", torch.float32)
    assert said.networks["unet"] == sum(weight.numel() for weight in family.unet.parameters())
    more = {
        "targets": args.lora_target_modules,
        "dora": args.use_dora,
        "text_encoder": args.train_text_encoder,
        "seed": 0,
    }
    learns = arguments.caller(args)(adapters.attach, family, **more)
    for name, network in learns.modules.items():
        assert said.learns[name] == sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def test_layers_that_the_model_lacks_are_named_before_anything_is_loaded(parse, capsys):
    said = refused(capsys, parse("--lora_target_modules=to_x,to_q", "--lora_unet_blocks=up_blocks.2,up_blocks.1"))
    assert len(said) == 2
    assert "--lora_target_modules to_x" in said[0] and "did you mean to_" in said[0]
    assert "--lora_unet_blocks up_blocks.2" in said[1] and "did you mean up_blocks." in said[1]


def test_planned_length(parse, sd1, monkeypatch):
    words = ["--train_batch_size=2", "--gradient_accumulation_steps=2", "--num_train_epochs=3", "--repeats=4"]
    said = plan.outline(parse(*words), Path(sd1), photos=5)
    assert (said.examples, said.examples_per_step, said.steps) == (20, 4, 15)
    assert plan.outline(parse(*words), Path(sd1), photos=5, class_images=100).examples == 100
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = plan.outline(parse("--max_train_steps=10"), Path(sd1), photos=4)
    assert (said.steps, said.epochs, said.checkpoints) == (10, 20.0, 1)
    assert plan.outline(parse(), None, photos=None).steps is None


@pytest.mark.parametrize(
    ("words", "photos", "steps"),
    [
        ("--train_batch_size=1", 5, 400),
        ("--train_batch_size=4", 5, 400),
        ("--train_batch_size=1", 20, 1600),
        ("--train_batch_size=4 --gradient_accumulation_steps=2", 41, 410),
        (f"--train_batch_size=1 {PRIOR}", 5, 800),
        ("--train_batch_size=1 --repeats=9", 20, 1600),
    ],
)
def test_length_from_the_table(parse, words, photos, steps):
    args = parse(*words.split(), lora=False)
    args.num_train_epochs = None
    told = length.settle(args, photos, plan.examples_per_step(args))
    assert args.max_train_steps == steps and told.startswith(f"length: {steps} steps of ")
    assert f"for all weights and {photos} photos" in told


def test_length_that_is_given_stays_and_other_methods_have_rows_of_their_own(parse):
    for words in (["--num_train_epochs=3"], ["--max_train_steps=7"]):
        args = parse(*words)
        assert length.settle(args, 5, 4) is None and args.max_train_steps == (7 if "max" in words[0] else None)
    args = parse("--train_batch_size=1")
    args.num_train_epochs = None
    assert [length.steps(args, count, 1) for count in (1, 5, 6)] == [500, 500, 600]
    args.use_pdm_loss = True
    assert [length.steps(args, count, 1) for count in (5, 6)] == [700, 840]
    assert length.settle(args, None, 1) is None, "photos of a data set are counted later"


def test_a_resumed_run_keeps_its_length(parse, tmp_path, capsys):
    """Whether it was chosen or given, and whatever the photos have become; a run of one epoch gets the table's."""
    out, words = tmp_path / "out", ["--resume_from_checkpoint=latest", "--dry_run"]
    (out / "checkpoint-3").mkdir(parents=True)
    for recorded, steps, said in (
        ("max_train_steps: 431\nnum_train_epochs: null", 431, "as the resumed run has recorded"),
        ("max_train_steps: null\nnum_train_epochs: 1", 500, "--num_train_epochs 1 keeps that"),
        ("max_train_steps: [", 500, "from the table"),
    ):
        (out / "training_config.yaml").write_text(recorded)
        args = parse(*words)
        args.num_train_epochs = None
        preflight.check(args)
        assert args.max_train_steps == steps and said in capsys.readouterr().out
    args = parse("--lr_warmup_steps=500", f"--output_dir={tmp_path / 'new'}")
    args.num_train_epochs = None
    assert "leaves nothing of the 500 steps that are chosen; 50 would be" in refused(capsys, args)[0]


def test_printed_plan(parse, sd1, capsys):
    args = parse("--dry_run", "--max_train_steps=30", "--use_ema", "--validation_prompt=x", lora=False)
    preflight.print_plan(args)
    said = capsys.readouterr().out
    size = model_folder.plan.outline(args, Path(sd1), 3).networks["unet"]
    assert f"learns    all weights: unet {size:,}" in said
    assert "length    30 steps of 4 examples (4 x 1 accumulated x 1 processes), 40.0 epochs" in said
    for word in ("optimizer", "gradients", "average", "disk", "a pipeline folder", "samples/", "3 examples an epoch"):
        assert word in said
    assert "snapshots" not in said
    words = ("--max_train_steps=30", "--use_ema", "--posthoc_ema", "--ema_snapshot_steps=7")
    args = parse("--dry_run", *words, lora=False)
    preflight.print_plan(args)
    said = capsys.readouterr().out
    assert f", 5 snapshots of {plan.size(8 * size)}" in said and "checkpoint-N/, ema_snapshots/" in said
    assert re.search(rf"average +{re.escape(plan.size(8 * size))}", said)
    args.validation_split = 0.4
    assert any("about 2 examples an epoch" in line for line in plan.lines(plan.outline(args, Path(sd1), 3), args))


def test_refusal_and_plan_answer_at_once(sd1, photos, tmp_path):
    script = tmp_path / "train.py"
    source = (ROOT / "tests" / "test_arguments.py").read_text()
    build = source[source.index("def build(") : source.index("def parse(")]
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom utils import arguments, preflight\n{build}\n"
        "args = arguments.parse(build())\npreflight.check(args)\npreflight.print_plan(args)\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
    )
    words = ["--instance_prompt=x", "--pretrained_model_name_or_path", str(sd1), "--output_dir", str(tmp_path / "out")]
    for folder, code in ((photos, 0), (tmp_path / "none", 2)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, str(script), *words, "--dry_run", "--instance_data_dir", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == code, done.stderr
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_a_branch_of_a_hub_model_is_recorded_as_its_commit(parse, sd1, tmp_path, monkeypatch):
    """With the hub's cache alone: what `main` or no name at all means now is what the run writes down."""
    sha = "0123456789abcdef" * 2 + "01234567"
    cache = tmp_path / "cache" / "models--someone--dog"
    shutil.copytree(sd1, cache / "snapshots" / sha)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for words in ([], ["--revision", "main"], ["--revision", sha]):
        args = parse(*words, "--dry_run", model="someone/dog")
        preflight.check(args)
        assert args.revision == sha and test_arguments.arguments.public(args)["revision"] == sha
    args = parse("--dry_run")
    preflight.check(args)
    assert args.revision is None, "a folder has no commit"


@pytest.mark.parametrize("option", ["tokenizer_name", "pretrained_vae_model_name_or_path"])
def test_a_tokenizer_or_vae_of_its_own_must_be_one(parse, sd1, tmp_path, capsys, option):
    part = "vae" if "vae" in option else "tokenizer"
    for good in (sd1, sd1 / part):
        preflight.check(parse(f"--{option}={good}", "--dry_run"))
    (tmp_path / "empty").mkdir()
    for bad, says in ((tmp_path / "empty", f"holds no {part}"), (tmp_path / "no" / "such", "does not exist here")):
        said = refused(capsys, parse(f"--{option}={bad}", "--dry_run"))
        assert len(said) == 1 and says in said[0] and f"--{option}" in said[0]
