"""The reason for all of it, on the embedded model: five photos teach one dog, and other dogs stay other dogs."""

import argparse
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUBJECT, CLASS = ["a photo of sks dog on a beach"] * 8, ["a photo of a dog"] * 16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Likeness of the subject in a new place, likeness and diversity of the class: before, and after two trainings."""
    from toybox import evaluate
    from toybox.judge import Judge, load_photos

    judge, photos = Judge.load(ROOT / "toybox/judge"), load_photos(ROOT / "toybox/subject")
    folder = tmp_path_factory.mktemp("personalising")
    args = argparse.Namespace(model=ROOT / "toybox/sd", subject=ROOT / "toybox/subject", output=folder / "results.json")
    few = evaluate.PRIOR.replace("--num_class_images 100", "--num_class_images 48")
    recipes = {"full": evaluate.FULL, "full, prior": evaluate.FULL + few}
    pipelines = {"base": evaluate.load_pipeline(args.model)}
    pipelines |= {name: evaluate.personalise(recipe, args, seed=0) for name, recipe in recipes.items()}
    found = {}
    for name, pipeline in pipelines.items():
        subject = evaluate.draw_pictures(pipeline, SUBJECT, seed=1, steps=12)
        others = evaluate.draw_pictures(pipeline, CLASS, seed=2, steps=12)
        found[name] = {
            "likeness": judge.likeness(subject, photos).mean().item(),
            "class likeness": judge.likeness(others, photos).mean().item(),
            "diversity": judge.diversity(others),
            "dogs": judge.agreement(others, thing="dog")["thing"],
        }
    print(found)
    return found


@pytest.mark.parametrize("run", ["full", "full, prior"])
def test_the_subject_is_learned(scores, run):
    assert scores[run]["likeness"] > scores["base"]["likeness"] + 0.15


def test_without_class_images_the_class_becomes_the_subject(scores):
    assert scores["full"]["class likeness"] > scores["base"]["class likeness"] + 0.15
    assert scores["full"]["diversity"] < 0.5 * scores["base"]["diversity"]


def test_with_class_images_it_stays_itself(scores):
    assert scores["full, prior"]["diversity"] > scores["full"]["diversity"] + 0.2
    assert scores["full, prior"]["class likeness"] < scores["full"]["class likeness"] - 0.2
    assert scores["full, prior"]["dogs"] > 0.8


def test_the_sdxl_sibling_learns_the_subject_too(tmp_path):
    from toybox import evaluate
    from toybox.judge import Judge, load_photos

    judge, photos = Judge.load(ROOT / "toybox/judge"), load_photos(ROOT / "toybox/subject")
    args = argparse.Namespace(model=ROOT / "toybox/sdxl", subject=ROOT / "toybox/subject", output=tmp_path / "none")
    found = {}
    for name in ("base", "SDXL LoRA"):
        pipeline, _ = evaluate.prepare(name, args, seed=0)
        found[name] = judge.likeness(evaluate.draw_pictures(pipeline, SUBJECT, seed=1, steps=12), photos).mean().item()
    print(found)
    assert found["SDXL LoRA"] > found["base"] + 0.25


def test_captioned_pictures_teach_a_style(tmp_path):
    """Forty pictures in two inks, with their usual captions, turn the model's drawings into such prints."""
    import train_text_to_image
    from toybox import evaluate, style
    from toybox.judge import Judge

    style.write(tmp_path / "pictures", 40)
    options = "--train_batch_size 8 --learning_rate 3e-4 --max_train_steps 100 --use_ema --ema_decay 0.95 --seed 0"
    options += " --checkpointing_steps 0 --report_to none --validation_split 0.1 --validation_steps 50"
    words = ["--pretrained_model_name_or_path", "toybox", "--train_data_dir", str(tmp_path / "pictures")]
    words += ["--output_dir", str(tmp_path / "run"), *options.split()]
    train_text_to_image.main(train_text_to_image.parse_args(words))

    prompts = ["a photo of a dog on a beach", "a photo of a house in the snow", "a red car in the city"] * 2
    found = {}
    for name, model in {"base": ROOT / "toybox/sd", "style": tmp_path / "run"}.items():
        drawn = evaluate.draw_pictures(evaluate.load_pipeline(model), prompts, seed=3, steps=12)
        things = [Judge.load(ROOT / "toybox/judge").agreement(drawn[k::3], thing=thing)["thing"]
                  for k, thing in enumerate(("dog", "house", "car"))]  # fmt: skip
        found[name] = style.score(drawn), sum(things) / 3
    print(found)
    assert found["style"][0] > found["base"][0] + 0.3
    assert found["style"][1] > 0.3  # chance is 1 in 12; the judge has never seen such prints
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert held_out[-1] < 0.7 * held_out[0]
