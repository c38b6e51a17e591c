"""The reason for all of it, on the embedded model: five photos teach one dog, and other dogs stay other dogs."""

import argparse
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
