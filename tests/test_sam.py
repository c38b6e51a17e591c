"""Masks by SAM: a box or a point shows the same thing in the photo and to the model, and no mask is made twice."""

import contextlib
import hashlib
import importlib
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_arguments
import torch
from PIL import Image
from test_exactness import Killed, stop  # noqa: F401 - a fixture
from test_preflight import parse, refused  # noqa: F401 - parse is a fixture
from test_scripts import losses, same, train  # noqa: F401 - train is a fixture

from toybox.draw import SCENES, draw, mask_of, random_individual
from toybox.make_subject import PHOTOS, take_photo
from utils import datasets, errors, images, masks, models, report, sam
from utils.preflight import model_folder

TOY = models.resolve("toybox-sam")
HALVES = {"left": (0, 0, 0.5, 1), "right": (0.5, 0, 1, 1), "upper": (0, 0, 1, 0.5), "lower": (0, 0.5, 1, 1)}


@pytest.fixture(scope="module")
def toy():
    return sam.load(Path(TOY))


@pytest.fixture
def run(tmp_path):
    return fake_run(tmp_path / "out")


def fake_run(folder, rank=0, world=1, barrier=lambda: None):
    return SimpleNamespace(
        output_dir=folder, rank=rank, world=world, device=torch.device("cpu"), interrupted=False,
        say=lambda text: None, barrier=barrier, phase=lambda name: contextlib.nullcontext(),
    )  # fmt: skip


@pytest.fixture
def subject(tmp_path):
    """The toybox's five photos: three shapes, three formats, one stored on its side."""
    return shutil.copytree(models.ROOT / "toybox" / "subject", tmp_path / "subject")


def attach(run, *lists, **options):
    return sam.attach(run, *lists, **{"sam_model_name_or_path": "toybox-sam", "masked_loss": True} | options)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.*"))}


def share(mask, other):
    """Intersection over union."""
    one, two = (np.asarray(each.convert("L")) > 127 for each in (mask, other))
    return (one & two).sum() / (one | two).sum()


def two_things(seed, tall, side=120):
    """A photo of two things beside or above each other => (photo, mask of the first, of the second)."""
    rng = random.Random(f"two {seed}")
    size = (side, 2 * side) if tall else (2 * side, side)
    photo, found = Image.new("RGB", size), []
    for number in (0, 1):
        what = random_individual(rng), rng.choice(list(SCENES)), rng.randrange(1 << 30)
        place = (0, number * side) if tall else (number * side, 0)
        photo.paste(draw(*what, size=side), place)
        found.append(Image.new("L", size))
        found[-1].paste(mask_of(*what, size=side), place)
    return photo, *found


# Geometry


@pytest.mark.parametrize("asked_for", ["box", "point"])
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
def test_a_prompt_means_the_place_it_names(toy, tall, asked_for):
    """Of two things: with x and y exchanged, a padded side stretched or shares misread it would be the other one."""
    right, wrong = [], []
    for seed in range(6):
        photo, *true = two_things(seed, tall)
        for number in (0, 1):
            half = HALVES[("upper", "lower")[number] if tall else ("left", "right")[number]]
            rows, columns = np.nonzero(np.asarray(true[number]) > 127)
            middle = len(rows) // 2  # a pixel of the thing
            point = (columns[middle] / photo.width, rows[middle] / photo.height)
            prompt = {"box": half} if asked_for == "box" else {"box": (), "point": point}
            mask = sam.segment(*toy, photo, **prompt)
            assert mask.size == photo.size and mask.mode == "L"
            right.append(share(mask, true[number]))
            wrong.append(share(mask, true[1 - number]))
    assert np.mean(right) > 0.75 and np.mean(wrong) < 0.05, (right, wrong)


def test_the_subjects_photos_are_masked_upright_without_any_prompt(run, subject):
    examples = datasets.folder(subject, "p")
    (found,) = attach(run, examples)
    for example, (name, scene, seed, size) in zip(found, PHOTOS, strict=True):
        assert Path(example.source).name == name
        mask = example.mask.open()
        assert mask.size == size and set(mask.tobytes()) == {0, 255}  # 04.jpg lies on its side in its file
        assert share(mask, take_photo(scene, seed, size, mask=True)) > 0.8, name


def test_the_best_mask_is_the_one_with_the_highest_score(toy):
    """Whichever of the three it is."""
    model, processor = toy
    photo = two_things(0, tall=False)[0]
    drawn = {}

    def rate(best):
        def change(module, inputs, out):
            drawn["masks"] = out.pred_masks
            out.iou_scores = torch.tensor([[[0.2, 0.1, 0.3]]])
            out.iou_scores[..., best] = 0.9

        return model.register_forward_hook(change)

    for best in range(3):
        with contextlib.closing(SimpleNamespace(close=rate(best).remove)):
            mask = sam.segment(model, processor, photo, box=(), point=(0.5, 0.5))
        small = np.asarray(mask.resize((48, 24), Image.Resampling.BOX)) > 127  # 24 of the 48 rows are padding
        assert (small == (drawn["masks"][0, 0, best, :24] > 0).numpy()).mean() > 0.97
    three = drawn["masks"][0, 0] > 0
    assert not torch.equal(three[0], three[1]) and not torch.equal(three[1], three[2])


def test_the_stock_classes_load_the_embedded_model():
    from transformers import SamModel, SamProcessor

    model, processor = SamModel.from_pretrained(TOY).eval(), SamProcessor.from_pretrained(TOY)
    photo, _, true = two_things(1, tall=False)
    inputs = processor(photo, input_boxes=[[[120.0, 0.0, 240.0, 120.0]]], return_tensors="pt")
    with torch.no_grad():
        out = model(**{name: inputs[name].to(model.dtype) for name in ("pixel_values", "input_boxes")})
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    best = processor.post_process_masks(out.pred_masks.float(), *sizes)[0][0, int(out.iou_scores[0, 0].argmax())]
    assert share(Image.fromarray(best.numpy()), true) > 0.7


def test_the_embedded_model_is_worth_testing_with():
    from toybox import train_sam

    told = train_sam.evaluate(*sam.load(Path(TOY)), count=60)
    for prompt in train_sam.PROMPTS:
        found = told[prompt]
        assert found["by score"] > 0.8 and found["by score"] > min(found["always"]) + 0.01, told
    assert sum(path.stat().st_size for path in Path(TOY).iterdir()) < 300_000


# Which pictures, and how often


def test_nothing_is_made_twice_and_a_mask_of_ones_own_comes_first(run, subject, monkeypatch):
    asked, real = [], sam.segment
    monkeypatch.setattr(sam, "segment", lambda *given: asked.append(given[2].size) or real(*given))
    mine = Image.new("L", (128, 128))
    mine.paste(255, (0, 0, 64, 64))
    mine.save(subject / "01.mask.png")
    before = hashes(subject)

    def examples():
        return masks.attach(datasets.folder(subject, "p"), subject, needed=False)

    (first,) = attach(run, examples())
    assert sorted(asked) == [(64, 64), (96, 120), (160, 128), (192, 160)]
    assert first[0].mask.source == subject / "01.mask.png"
    made = hashes(run.output_dir)
    assert len(made) == 4 and {Path(one.mask.source).parent.name for one in first[1:]} == {"sam_masks"}

    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(sam, "load", lambda *given: pytest.fail("SAM was loaded"))
        (again,) = attach(run, examples())
    assert again == first and not asked
    attach(run, examples(), sam_box=[0.1, 0.1, 0.9, 0.9])
    assert len(asked) == 4
    attach(run, examples(), sam_box=[0.1, 0.1, 0.9, 0.9], sam_point=[0.5, 0.5])
    attach(run, examples(), alpha_background="black")
    assert len(asked) == 12
    take_photo("night", 5, (64, 64)).save(subject / "05.png")
    attach(run, examples())
    assert len(asked) == 13 and len(hashes(run.output_dir)) == 17
    assert {name: digest for name, digest in hashes(subject).items() if name != "05.png"} == {
        name: digest for name, digest in before.items() if name != "05.png"
    }


def test_only_what_is_asked_for_is_masked(run, subject):
    photos = datasets.folder(subject, "p")
    drawn = datasets.pictures([subject / "01.jpg", subject / "02.png"], "c", is_class=True)
    assert sam.attach(run, photos, drawn, masked_loss=True, mask_prior=True) == [photos, drawn]
    assert not (run.output_dir).exists()
    for masked_loss, mask_prior in ((True, False), (False, True), (True, True)):
        shown, beside = attach(run, photos, drawn, masked_loss=masked_loss, mask_prior=mask_prior)
        assert [bool(one.mask) for one in shown] == [masked_loss] * 5
        assert [bool(one.mask) for one in beside] == [mask_prior] * 2


def test_processes_share_the_work_and_all_see_all(tmp_path, subject, toy, monkeypatch):
    asked, real = [], sam.segment
    monkeypatch.setattr(sam, "segment", lambda *given: asked.append(given[2].size) or real(*given))
    examples = datasets.folder(subject, "p")
    with pytest.raises(SystemExit) as stopped:  # the other one is not there, or writes elsewhere
        attach(fake_run(tmp_path / "alone", rank=1, world=2), examples)
    assert stopped.value.code == errors.FAILED and len(asked) == 2
    asked.clear()
    both = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(sam, "load", lambda *given: toy)  # two threads must not load at once
    runs = [fake_run(tmp_path / "out", rank, 2, both.wait) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        (one,), (other,) = pool.map(lambda run: attach(run, examples), runs)
    assert one == other and all(example.mask for example in one) and len(asked) == 5


@pytest.mark.parametrize("level, word", [(0, "black"), (255, "all white")])
def test_a_mask_that_tells_nothing_is_refused_by_name(run, subject, monkeypatch, capsys, level, word):
    monkeypatch.setattr(sam, "segment", lambda model, processor, photo, *more: Image.new("L", photo.size, level))
    photos = datasets.folder(subject, "p")
    with pytest.raises(SystemExit) as stopped:
        attach(run, photos)
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == errors.DATA and len(said) == 5
    assert f"SAM's mask of '{subject / '01.jpg'}' is {word}: put NAME.mask.png beside it" in said[0]
    drawn = datasets.pictures([subject / "02.png"], "c", is_class=True)
    assert attach(run, drawn, mask_prior=True) == [drawn]
    assert "02.png' is " + word + ": the class image counts as a whole" in capsys.readouterr().err


def test_a_mask_that_lies_elsewhere_than_its_box_is_told(run, subject, monkeypatch, capsys):
    def segment(model, processor, photo, *more):
        mask = Image.new("L", photo.size)
        mask.paste(255, (0, 0, photo.width // 2, photo.height))
        return mask

    monkeypatch.setattr(sam, "segment", segment)
    photos = datasets.folder(subject, "p")
    attach(run, photos, sam_box=[0.1, 0, 1, 1])
    assert not capsys.readouterr().err
    attach(run, photos, sam_box=[0.3, 0, 1, 1])
    assert capsys.readouterr().err.count("lies mostly outside of --sam_box") == 5


# Whole scripts


@pytest.mark.parametrize("script", ["train_pdmbooth", "train_pdmbooth_lora"])
def test_all_three_losses_and_an_exact_resume(train, stop, script, subject, tmp_path, monkeypatch):  # noqa: F811
    classes = tmp_path / "classes"
    classes.mkdir()
    for number in range(2):
        take_photo("forest", number, (96, 80)).save(classes / f"{number}.png")
    kept = hashes(subject), hashes(classes)
    options = (
        f"--inst_data_dir '{subject}' --instance_data_dir '{subject}' --use_inst_loss --use_pdm_loss --use_prior_loss"
        f" --cls_prompt 'a photo of dog' --cls_data_dir '{classes}' --num_cls_imgs 2 --mask_pdm --mask_dm --mask_prior"
        " --sam_model_name_or_path toybox-sam --save_pdm_masks --pdm_inversion_steps 4 --resolution 64 --lr 1e-3"
        " --train_batch_size 2 --ckpting_steps 2 --max_train_steps 4"
    )
    whole = train(script, options, "whole")
    assert len(list((whole / "sam_masks").glob("*.png"))) == 7 and not list((whole / "sam_masks").glob(".*"))
    assert {Image.open(path).size for path in (whole / "pdm_masks").iterdir()} == {(64, 64)}
    assert len(list((whole / "pdm_masks").iterdir())) == 5
    assert losses(whole) != losses(train(script, options.replace("--mask_prior", ""), "less"))
    stop("kill", 3)
    with pytest.raises(Killed):
        train(script, options, "cut")
    monkeypatch.setattr(sam, "load", lambda *given: pytest.fail("SAM was loaded"))
    cut = train(script, f"{options} --resume_from_ckpt latest", "cut")
    assert same(whole, cut) and losses(whole) == losses(cut)
    assert kept == (hashes(subject), hashes(classes))


def test_other_masks_are_another_run(train, stop, subject, capsys):  # noqa: F811
    options = f"--instance_data_dir '{subject}' --resolution 64 --max_train_steps 3 --checkpointing_steps 1"
    options += " --sam_model_name_or_path toybox-sam"
    stop("kill", 2)
    with pytest.raises(Killed):
        train("train_dreambooth_lora", options)
    with pytest.raises(SystemExit):
        train("train_dreambooth_lora", f"{options} --sam_point 0.1 0.1 --resume_from_checkpoint latest")
    assert "dataset  checkpoint:" in capsys.readouterr().err
    train("train_dreambooth_lora", f"{options} --resume_from_checkpoint latest")


def test_text_to_image_takes_them_too(sd1, subject, tmp_path):
    module = importlib.import_module("train_text_to_image_lora")
    for path in list(subject.iterdir()):
        path.with_suffix(".txt").write_text("a dog")
    words = f"--pretrained_model_name_or_path {sd1} --train_data_dir {subject} --max_train_steps 1 --resolution 64"
    words += f" --sam_model_name_or_path toybox-sam --report_to none --output_dir {tmp_path / 'out'}"
    module.main(module.parse_args(words.split()))
    assert len(list((tmp_path / "out" / "sam_masks").iterdir())) == 5


def test_the_report_shows_the_masks_of_every_loss(run, subject):
    photos = datasets.folder(subject, "p")
    masked, drawn = attach(run, photos, datasets.pictures([photos[4].source], "c", is_class=True), mask_prior=True)
    dataset = datasets.DreamBooth(photos[:4], drawn, size=64, center_crop=True)
    report.contact_sheet(dataset, run.output_dir)
    plain = np.asarray(images.open_rgb(run.output_dir / "data_preview.png")).astype(int)
    report.contact_sheet(dataset, run.output_dir, photos=masked[:4])
    veiled = np.asarray(images.open_rgb(run.output_dir / "data_preview.png")).astype(int)
    assert (veiled != plain).any() and (veiled - plain)[..., 1].min() < -20
    report.preview(dataset, run.output_dir)
    (shown,) = (run.output_dir / "preview").glob("class-*.png")
    outside = np.asarray(drawn[0].mask.open().resize((64, 64), Image.Resampling.BOX)) == 0
    both = (images.open_rgb(source).resize((64, 64)) for source in (shown, photos[4].source))
    seen, true = (np.asarray(picture).astype(int) for picture in both)
    reddened = (seen[..., 0] - seen[..., 2]) - (true[..., 0] - true[..., 2])
    assert reddened[outside].mean() > 60 and abs(reddened[~outside].mean()) < 30


# What is refused


def test_options_about_prompts(capsys):
    asked = ["--sam_model_name_or_path=toybox-sam"]
    args = test_arguments.parse(*asked, "--sam_box", "0", "0.1", "0.5", "1", "--sam_point", "0.2", "0.3")
    assert args.masked_loss and args.sam_box == [0, 0.1, 0.5, 1] and args.sam_point == [0.2, 0.3]
    for box in (["0.5", "0", "0.1", "1"], ["0", "0", "1"], ["0", "0", "100", "200"]):
        assert "shares of width and height" in test_arguments.refused(capsys, *asked, "--sam_box", *box)[0]
    assert "x and y are needed" in test_arguments.refused(capsys, *asked, "--sam_point", "0.5")[0]
    test_arguments.parse("--sam_point", "0.5", "0.5")
    assert "--sam_point has no effect without --sam_model_name_or_path" in capsys.readouterr().err


def test_models_that_are_no_sam_are_refused_before_anything_slow(parse, tmp_path, sd1, capsys):  # noqa: F811
    def said(name, *more):
        return refused(capsys, parse(f"--sam_model_name_or_path={name}", *more))[0]

    assert parse("--sam_model_name_or_path=toybox-sam").masked_loss
    assert "is neither" in said("nobody/sam") or "is no folder here, not in the cache" in said("nobody/sam")
    assert "does not exist here" in said(tmp_path / "none")
    assert "has no config.json" in said(sd1)
    assert "is a model of type clip_text_model; needed is sam" in said(sd1 / "text_encoder")
    (tmp_path / "sam_vit_h.pth").write_bytes(b"x")
    assert "is a single file" in said(tmp_path / "sam_vit_h.pth")
    copy = shutil.copytree(TOY, tmp_path / "copy")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1])
    assert "is damaged" in said(copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "only as a pickle" in said(copy)
    assert not model_folder.sam(parse(f"--sam_model_name_or_path={copy}", "--allow_pickle"))
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "processor_config.json").unlink()
    assert "lacks preprocessor_config.json" in said(copy)


def test_a_model_of_the_hub_is_read_from_its_cache(parse, run, subject, tmp_path, monkeypatch):  # noqa: F811
    snapshot, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "cache" / "models--someone--sam"
    shutil.copytree(TOY, cache / "snapshots" / snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    args = parse("--sam_model_name_or_path=someone/sam")
    assert model_folder.sam(args) == []
    (found,) = attach(run, datasets.folder(subject, "p"), sam_model_name_or_path="someone/sam")
    with monkeypatch.context() as patch:  # by content, whatever the name
        patch.setattr(sam, "load", lambda *given: pytest.fail("SAM was loaded"))
        assert attach(run, datasets.folder(subject, "p")) == [found]
    (cache / "snapshots" / snapshot / "model.safetensors").unlink()
    assert "has no weights" in model_folder.sam(args)[0]


def test_weights_of_another_shape_or_less_are_refused(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(TOY, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights.pop("mask_decoder.iou_token.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        sam.load(copy)
    assert "lacks weights, among them mask_decoder.iou_token.weight" in capsys.readouterr().err
