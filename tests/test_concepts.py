"""Several subjects in one run: what a list may say, which class image stands beside which photo, and whole scripts."""

import dataclasses
import importlib
import json
import os
import shlex
from collections import Counter

import pytest
import test_arguments
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_buckets import AUTO, examples
from test_scripts import losses, same

from utils import arguments, concepts, datasets, errors, preflight

DOG = {"instance_prompt": "a photo of sks dog", "instance_data_dir": "dog"}
CAT = {"instance_prompt": "a photo of red cat", "instance_data_dir": "cat"}
TWO = [
    DOG | {"class_prompt": "a dog", "class_data_dir": "dogs"},
    CAT | {"class_prompt": "a cat", "class_data_dir": "cats"},
]


@pytest.fixture
def listed(tmp_path):
    """listed(rows=TWO, **changes of the second) -> path of a JSON file beside folders with photos of both subjects."""
    tiny.photos(tmp_path / "set" / "dog", 3, seed=1)
    tiny.photos(tmp_path / "set" / "cat", 2, seed=2)

    def write(rows=None, **changes):
        rows = rows if rows is not None else [TWO[0], TWO[1] | changes]
        (tmp_path / "set" / "concepts.json").write_text(json.dumps(rows))
        return str(tmp_path / "set" / "concepts.json")

    return write


def parse(*words):
    return test_arguments.parse(*words, needed=["--pretrained_model_name_or_path=m"])


def test_a_list_is_read_as_users_know_it(listed, tmp_path):
    home = os.path.expanduser("~/photos")
    args = parse(
        "--concepts_list", listed(instance_data_dir="~/photos", repeats=3, num_class_images=7, class_prompt=None)
    )
    one, two = args.concepts
    assert one.instance_data_dir == str(tmp_path / "set" / "dog"), "relative to the file"
    assert two.instance_data_dir == home and two.class_prompt is None
    assert (one.repeats, one.num_class_images, two.repeats, two.num_class_images) == (1, 100, 3, 7)
    assert parse("--concepts_list", listed(), "--num_class_images=5").concepts[0].num_class_images == 5
    (alone,) = test_arguments.parse().concepts
    assert alone == concepts.Concept("dog", "a photo of sks dog") and alone.named("class_prompt") == "--class_prompt"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ('[{"instance_prompt": "x", "instance_prompt": "y"}]', 'the key "instance_prompt" is given twice'),
        ("[]", "must hold a list of one or more objects with the keys instance_prompt, class_prompt"),
        ('{"instance_prompt": "x"}', "must hold a list"),
        ('[{"instance_promt": "x"}]', "concept 1: 'instance_promt' is no key of a concept; did you mean"),
        ('[{"token": "x"}]', "'token' is no key of a concept; known are instance_prompt, class_prompt,"),
        ('[{"repeats": true}]', "repeats is true: it must be a whole number of at least 1"),
        ('[{"repeats": 0}]', "repeats is 0"),
        ('[{"instance_prompt": 5}]', "instance_prompt is 5: it must be a text"),
        ('[{"instance_prompt": "x"}]', "--concepts_list, concept 1: instance_data_dir is missing"),
        ('[{"instance_data_dir": "x"}]', "--concepts_list, concept 1: instance_prompt is missing"),
    ],
)  # fmt: skip
def test_wrong_lists_are_refused(tmp_path, capsys, content, said):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(SystemExit):
        parse("--concepts_list", str(tmp_path / "c.json"))
    assert said in capsys.readouterr().err


def test_contradictions_are_refused(listed, tmp_path, capsys):
    def refused(*words):
        with pytest.raises(SystemExit) as stop:
            parse("--concepts_list", *words)
        assert stop.value.code == errors.OPTIONS
        return capsys.readouterr().err

    assert "No such file" in refused(str(tmp_path / "no.json"))
    for option in (
        "instance_data_dir",
        "instance_prompt",
        "class_data_dir",
        "class_prompt",
        "dataset_name",
        "masks_dir",
    ):
        assert f"--concepts_list with --{option}" in refused(listed(), f"--{option}=x")
    said = refused(listed(class_prompt=None, class_data_dir=None), "--with_prior_preservation")
    assert "concept 2: class_data_dir is missing" in said and "concept 2: class_prompt is missing" in said
    assert "concept 2: class_prompt holds {class}: give --class_noun" in refused(listed(class_prompt="a {class}"))
    filled = parse("--concepts_list", listed(class_prompt="a {class}"), "--class_noun=cat")
    assert filled.concepts[1].class_prompt == "a cat"
    assert "class_prompt has no effect without --with_prior_preservation" in capsys.readouterr().err


def test_saved_settings_hold_the_list_itself(listed, tmp_path):
    args = parse("--concepts_list", listed(repeats=2))
    arguments.save(args, tmp_path / "saved.yaml")
    listed([TWO[0]])  # what happens to the file later does not matter
    again = test_arguments.parse("--config", str(tmp_path / "saved.yaml"), needed=[])
    assert again.concepts == args.concepts and arguments.public(again) == arguments.public(args)
    assert "concepts" not in yaml.safe_load((tmp_path / "saved.yaml").read_text())
    words = ["--config", str(tmp_path / "saved.yaml"), "--instance_data_dir=d", "--instance_prompt=p"]
    assert test_arguments.parse(*words, needed=[]).concepts[0].instance_data_dir == "d", "the command line comes first"


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=4), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_class_images_are_of_the_photos_concept_and_photos_count_as_often_as_told(described, bucketed):
    owners = [number for number, (photos, *_) in enumerate(described) for _ in range(photos)]
    drawn = [number for number, (_, classes, _) in enumerate(described) for _ in range(classes)]
    sizes = [(64, 64), (40, 90)] if bucketed else [(24, 24)]
    dataset = datasets.DreamBooth(
        examples([sizes[k % len(sizes)] for k in range(len(owners))], concepts=owners,
                 repeats=[described[owner][2] for owner in owners]),
        examples([(24, 24)] * len(drawn), True, concepts=drawn),
        size=64, seed=3, examples_per_step=2, **(AUTO if bucketed else {}),
    )  # fmt: skip
    shown, beside = Counter(), Counter()
    for position in range(2 * dataset._epoch):
        one, other = dataset[position]
        place = int(one["keys"][1:])
        assert one["captions"] == other["captions"] == f"p{owners[place]}", "both of one concept"
        shown[place] += 1
        beside[other["keys"]] += 1
    for place, owner in enumerate(owners):
        extra = shown[place] - 2 * described[owner][2]
        assert extra == 0 or (bucketed and extra > 0)


def test_identity_knows_concepts_and_repeats():
    def fingerprint(**options):
        found = examples([(8, 8)] * 2, **options)
        return datasets.DreamBooth([dataclasses.replace(one, caption="p") for one in found]).fingerprint()

    told = [fingerprint(), fingerprint(concepts=[0, 1]), fingerprint(repeats=[1, 2]), fingerprint(repeats=[2, 1])]
    assert len(set(told)) == 4 and told[0] == fingerprint(concepts=[0, 0], repeats=[1, 1])


def test_the_preflight_looks_into_every_folder(listed, sd1, tmp_path, capsys):
    def check(path, *words):
        given = ["--concepts_list", path, "--output_dir", str(tmp_path / "out"), "--resolution=64", "--dry_run", *words]
        preflight.check(test_arguments.parse(*given, needed=[f"--pretrained_model_name_or_path={sd1}"]))
        return capsys.readouterr().out

    prior = ["--with_prior_preservation", "--num_class_images=4"]
    where = tmp_path / "set"
    tiny.photos(where / "cats", 1)
    assert check(listed(), *prior).splitlines() == [
        f"3 photos in '{where / 'dog'}', 80x96; 0 of 4 class images in '{where / 'dogs'}'",
        f"2 photos in '{where / 'cat'}', 80x96; 1 of 4 class images in '{where / 'cats'}'",
    ]
    assert "2 photos" in check(listed(class_data_dir="dogs", class_prompt="a dog"), *prior), "one class may be shared"
    for changes, said in [
        ({"instance_data_dir": "none"}, "--concepts_list, concept 2: instance_data_dir"),
        ({"instance_data_dir": "dog"}, "2: instance_data_dir and --concepts_list, concept 1: instance_data_dir are"),
        ({"class_data_dir": "dogs"}, "2: class_data_dir and --concepts_list, concept 1: class_data_dir are the same"),
        ({"class_data_dir": "dog/more"}, "2: class_data_dir lies inside --concepts_list, concept 1: instance_data_dir"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit):
            check(listed(**changes), *prior)
        assert said in capsys.readouterr().err
    (where / "cat" / "broken.png").write_text("no picture")
    with pytest.raises(SystemExit) as stop:
        check(listed())
    assert stop.value.code == errors.DATA and "broken.png" in capsys.readouterr().err
    assert "1 left out" in check(listed(), "--on_bad_image=skip")


@pytest.fixture
def train(request, tmp_path):
    def call(script, options, name):
        model = request.getfixturevalue("sdxl" if "sdxl" in script else "sd1")
        module, folder = importlib.import_module(script), tmp_path / name
        given = f"--pretrained_model_name_or_path '{model}' --output_dir '{folder}' --report_to none --seed 3"
        given += " --learning_rate 1e-3 --train_batch_size 2 --with_prior_preservation --num_class_images 2"
        module.main(module.parse_args(shlex.split(f"{given} {options}")))
        return folder

    return call


@pytest.mark.parametrize("script", ["train_dreambooth", "train_dreambooth_lora", "train_dreambooth_lora_sdxl"])
def test_scripts_teach_two_subjects_and_resume_exactly(train, script, listed, tmp_path, capsys):
    options = f"--concepts_list '{listed(repeats=2)}' --max_train_steps 4 --checkpointing_steps 2"
    if "sdxl" in script:  # with all that photos can bring along; only one concept has a mask
        Image.new("L", (80, 96), 255).save(tmp_path / "set" / "cat" / "photo-0.mask.png")
        options += " --masked_loss --resolution_buckets 48x80,80x80"
    whole = train(script, options, "whole")
    for name, prompt in (("dogs", "a dog"), ("cats", "a cat")):
        assert json.loads((tmp_path / "set" / name / "class_images.json").read_text())["prompt"] == prompt
        assert len(list((tmp_path / "set" / name).glob("*.png"))) == 2
    told = json.loads((whole / "preview" / "preview.json").read_text())
    shown = Counter((image["caption"], image["is_class"]) for image in told["images"])
    assert shown == {(TWO[0]["instance_prompt"], False): 3, (TWO[1]["instance_prompt"], False): 2,
                     ("a dog", True): 2, ("a cat", True): 2}  # fmt: skip
    for page in ("README.md", "report.html"):
        text = (whole / page).read_text()
        assert TWO[0]["instance_prompt"] in text and TWO[1]["instance_prompt"] in text
    again = train(script, f"{options} --resume_from_checkpoint '{whole / 'checkpoint-2'}'", "again")
    assert losses(whole)[2:] == losses(again) and same(whole, again)
    if script == "train_dreambooth_lora":
        capsys.readouterr()
        other = f"--concepts_list '{listed()}' --max_train_steps 4"
        with pytest.raises(SystemExit) as stop:
            train(script, f"{other} --resume_from_checkpoint '{whole / 'checkpoint-2'}'", "other")
        assert stop.value.code == 2 and "belongs to another run" in capsys.readouterr().err
        # A list of one is what the options say.
        one = train(script, f"--concepts_list '{listed([TWO[0]])}' --max_train_steps 2", "one")
        where = tmp_path / "set"
        words = f"--instance_data_dir '{where / 'dog'}' --instance_prompt '{TWO[0]['instance_prompt']}'"
        words += f" --class_data_dir '{where / 'dogs'}' --class_prompt 'a dog'"
        assert losses(one) == losses(train(script, f"{words} --max_train_steps 2", "plain"))
