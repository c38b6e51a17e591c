"""Scores of drawn pictures: against formulas written out, stock networks, and the toybox's own drawings."""

import importlib
import json
import shlex
import shutil

import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from utils import concepts, scores
from utils.datasets.sources import Example

PHOTOS = ("#ff0000", "#c01010")
DRAWN = ("#f01000", "#00ff00", "#0000ff", "#10e010")
PROMPTS = ["sks dog on a beach", "sks dog on a beach", "a dog", "a dog"]


def plain(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def colour(picture):
    return F.normalize(torch.tensor(picture.getpixel((0, 0))).float(), dim=0)


class Colours(scores.Network):
    """Sees the colour of a picture and nothing else."""

    def load(self):
        return torch.nn.Identity()

    def embed(self, pictures):
        return torch.stack([colour(picture) for picture in pictures])

    def obeyed(self, seen, pictures, prompts):
        return torch.tensor([float("sks" not in prompt) for prompt in prompts])


class Distances(Colours):
    cosine = False

    def compare(self, some, others):
        return 1 - some @ others.T


def measured(judge, subjects=None):
    subject = scores.Subject(frozenset({"sks"}), [plain(one) for one in PHOTOS])
    judges = scores.Scores({"clip": judge("clip")}, [subject] if subjects is None else subjects)
    return judges.measure([plain(one) for one in DRAWN], PROMPTS)


def cosine(one, other):
    return float(colour(plain(one)) @ colour(plain(other)))


def test_each_score_is_its_formula():
    found = measured(Colours)
    pairs = {
        who: [cosine(d, p) for d in drawn for p in PHOTOS] for who, drawn in (("i", DRAWN[:2]), ("pres", DRAWN[2:]))
    }
    for kind, values in pairs.items():
        assert found[f"clip_{kind}"] == pytest.approx(sum(values) / 4)
    # Of the prompts about the subject alone; whoever knows no subject looks at all.
    variety = [1 - cosine(*DRAWN[:2]), 1 - cosine(*DRAWN[2:])]
    assert found["clip_d"] == pytest.approx(variety[0])
    assert measured(Colours, subjects=[])["clip_d"] == pytest.approx(sum(variety) / 2)
    assert found["clip_t"] == 1  # "sks" was left out of every prompt
    # A distance: less is more alike, the pairs of a prompt as they are, and no share of a class that looks alike.
    other = measured(Distances)
    assert other["clip_i"] == pytest.approx(1 - found["clip_i"]) and other["clip_d"] == pytest.approx(found["clip_d"])
    assert "clip_pres" not in other


def test_without_photos_and_pairs_there_is_less_to_tell():
    assert measured(Colours, subjects=[]).keys() == {"clip_t", "clip_d"}
    judges = scores.Scores({"clip": Colours("clip")})
    assert judges.measure([plain("red")], ["a dog"]).keys() == {"clip_t"}
    assert judges.measure([], []) == {} and not scores.Scores({})


def test_style_is_the_mean_over_all_pairs_with_training_pictures():
    taught = [plain(one) for one in PHOTOS]
    judges = scores.Scores({"clip": Colours("clip"), "lpips": Distances("lpips")}, taught=taught)
    found = judges.measure([plain(one) for one in DRAWN], ["a", "b", "c", "d"])
    pairs = [cosine(one, other) for one in DRAWN for other in PHOTOS]
    assert found["clip_style"] == pytest.approx(sum(pairs) / 8)
    assert not found.keys() & {"lpips_style", "clip_i"}


def test_the_toyboxs_judge_knows_a_style_by_its_colours():
    from toybox.draw import example
    from toybox.style import printed

    drawings = [example(950_000 + number).picture for number in range(32)]
    prints = [printed(example(960_000 + number).picture) for number in range(12)]

    def style(pictures, taught):
        judges = scores.Scores({"judge": scores.embedded()}, taught=taught)
        return judges.measure(pictures, ["a dog"] * len(pictures)).get("judge_style")

    assert style([printed(one) for one in drawings], prints) == pytest.approx(1, abs=0.05)
    assert style(drawings, prints) == pytest.approx(0, abs=0.15)
    half = [Image.blend(one, printed(one), 0.5) for one in drawings]
    assert 0.35 < style(half, prints) < 0.75
    assert style(prints, drawings) is None, "its own colours are no style"


def test_a_style_that_is_learned_is_told(tmp_path):
    import train_text_to_image as script
    from toybox import style

    style.write(tmp_path / "prints", 16)
    words = f"--pretrained_model_name_or_path toybox --train_data_dir '{tmp_path}/prints' --output_dir '{tmp_path}/run'"
    words += " --train_batch_size 8 --learning_rate 3e-4 --max_train_steps 40 --seed 0 --report_to none --center_crop"
    words += " --validation_prompt 'a photo of a dog on a beach' --validation_steps 40 --num_validation_images 4"
    words += " --validation_num_inference_steps 10"
    script.main(script.parse_args(shlex.split(words)))
    first, last = told(tmp_path / "run").values()
    assert last["judge_style"] > first["judge_style"] + 0.3
    drawn = [sorted((tmp_path / "run" / "samples" / f"step-0000{step}").glob("*.png")) for step in ("00", "40")]
    before, after = (style.score([Image.open(path) for path in paths]) for paths in drawn)
    assert after > before + 0.3  # the score made for this style agrees
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h3>Likeness to the training pictures" in page and "judge_style: likeness to the training" in page


def test_whom_a_prompt_is_about():
    taught = [
        concepts.Concept(instance_prompt="a photo of sks dog", class_prompt="a photo of a dog"),
        concepts.Concept(instance_prompt="a photo of zwx mug.", class_prompt="a photo of a mug"),
    ]
    photos = [Example("a.png", "", concept=0), Example("b.png", "", concept=1), Example("c.png", "", concept=1)]
    dog, mug = scores.subjects(taught, photos)
    assert (dog.identifier, mug.identifier) == ({"sks"}, {"zwx"}) and mug.photos == ["b.png", "c.png"]
    assert dog.is_meant("A photo of SKS dog, swimming") and not dog.is_meant("zwx mug") and not dog.is_meant("asks")
    assert scores.without("a photo of sks dog, at night", dog.identifier) == "a photo of dog, at night"
    # Without a class prompt nobody knows which word it is: then every prompt is about the subject.
    alone = scores.subjects([concepts.Concept(instance_prompt="my dog")], photos[:1])[0]
    assert alone.is_meant("anything") and scores.subjects(taught, []) == []
    assert scores.subjects(taught[:1], photos[:1], identifier="odd sks")[0].identifier == {"sks"}
    assert [one.identifier for one in scores.subjects(taught, photos, tokens=["SKS", "zwx"])] == [{"sks"}, {"zwx"}]


@pytest.mark.parametrize(
    "instance, of_class, identifier",
    [
        ("a photo of a sks dog", "dog", {"sks"}),
        ("a photo of sks dog in the garden", "a photo of a dog", {"sks"}),
        ("a photo of sks ohwx dog", "the dog", {"sks", "ohwx"}),
        ("a dog", "a photo of a dog", set()),
    ],
)
def test_articles_and_places_are_no_identifier(instance, of_class, identifier):
    concept = concepts.Concept(instance_prompt=instance, class_prompt=of_class)
    assert scores.subjects([concept], [Example("a.png", "")])[0].identifier == identifier


def test_a_class_is_compared_with_its_own_subject():
    dog = scores.Subject(frozenset({"sks"}), [plain("red")], frozenset({"dog"}))
    mug = scores.Subject(frozenset({"zwx"}), [plain("blue")], frozenset({"mug"}))
    judges = scores.Scores({"clip": Colours("clip")}, [dog, mug])
    assert judges.measure([plain("red")], ["a dog"])["clip_pres"] == pytest.approx(1)
    assert judges.measure([plain("red"), plain("red")], ["a dog", "a mug"])["clip_pres"] == pytest.approx(0.5)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a tiny CLIP and a tiny vision transformer, in the format of the published ones."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, ViTConfig, ViTModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    folder, small = tmp_path_factory.mktemp("networks"), {"hidden_size": 16, "intermediate_size": 32}
    small |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny.tokenizer()
    text = small | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    seen = small | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=seen, projection_dim=12)).save_pretrained(folder / "clip")
    crop = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=crop, tokenizer=tokenizer).save_pretrained(folder / "clip")
    ViTModel(ViTConfig(**seen), add_pooling_layer=False).save_pretrained(folder / "dino")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "dino")
    return folder


def test_clip_and_dino_are_what_stock_transformers_makes_of_them(networks):
    from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

    pictures = [tiny.photo(seed, size=(40, 40)).convert("RGB") for seed in range(3)]
    prompts = ["a photo of dog", "a photo of a cat", "a photo of dog"]
    with torch.no_grad(), scores.Clip(str(networks / "clip")) as judge:
        seen = judge.see(pictures)
        obeyed = judge.obeyed(seen, pictures, prompts)
        model, processor = (
            CLIPModel.from_pretrained(networks / "clip"),
            CLIPProcessor.from_pretrained(networks / "clip"),
        )
        told = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
        whole = model(**told)
    torch.testing.assert_close(obeyed, whole.logits_per_image.diag() / model.logit_scale.exp(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        judge.compare(seen, seen), F.normalize(whole.image_embeds) @ F.normalize(whole.image_embeds).T
    )
    with torch.no_grad(), scores.Dino(str(networks / "dino")) as judge:
        seen = judge.see(pictures)
        model, processor = (
            AutoModel.from_pretrained(networks / "dino"),
            AutoImageProcessor.from_pretrained(networks / "dino"),
        )
        token = model(**processor(pictures, return_tensors="pt")).last_hidden_state[:, 0]
    torch.testing.assert_close(seen, F.normalize(token))


def test_a_network_that_lacks_weights_is_refused(networks, tmp_path, capsys):
    from safetensors.torch import save_file

    shutil.copytree(networks / "clip", tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "text_model" not in name}, file)
    with pytest.raises(SystemExit):
        scores.Clip(str(tmp_path / "clip")).ready()
    assert "lacks weights, among them text_model." in capsys.readouterr().err


def test_no_room_on_the_device_leaves_nothing_there():
    class Large(torch.nn.Linear):
        def to(self, device):
            places.append(device)
            if device != "cpu":
                raise torch.OutOfMemoryError("out of memory")

    places, judge = [], Colours("clip", device="meta")
    judge.network = Large(1, 1)
    with pytest.raises(torch.OutOfMemoryError):
        scores.Scores({"clip": judge}).measure([plain("red")], ["a dog"])
    assert places == ["meta", "cpu"]


def test_lpips_compares_pairs():
    """torchvision, which has its network, is no part of this installation: another distance stands in for it."""

    class Squares(torch.nn.Module):
        def forward(self, one, other):
            return ((one - other) ** 2).mean((1, 2, 3), keepdim=True)

    judge = scores.Lpips()
    judge.network = Squares()
    with judge:
        some, others = (
            judge.see([plain("black"), plain("white")]),
            judge.see([plain("white"), plain("black"), plain("#808080")]),
        )
        table = judge.compare(some, others)
    assert table.shape == (2, 3)
    torch.testing.assert_close(table[:, :2], torch.tensor([[4.0, 0.0], [0.0, 4.0]]))


def test_the_toyboxs_judge_knows_its_world():
    from toybox.draw import SUBJECT, Individual, draw

    photos = [draw(SUBJECT, scene, 3, 128) for scene in ("grass", "room", "city")]
    again = [draw(SUBJECT, scene, 9) for scene in ("beach", "night")]
    others = [draw(Individual("dog", "black", "spotted"), "beach", 4), draw(Individual("cat", "pink"), "snow", 5)]
    subject = scores.Subject(frozenset({"sks"}), photos)
    judges = scores.Scores({"judge": scores.embedded()}, [subject])
    prompts = ["a photo of sks dog on a beach", "sks dog at night", "a dog on a beach", "a photo of a dog in the snow"]
    found = judges.measure(again + others, prompts)
    assert found["judge_i"] > 0.8 and found["judge_pres"] < 0.4
    everybody = scores.Scores({"judge": scores.embedded()}).measure(again + others, prompts)
    assert found["judge_t"] == 1 and everybody["judge_t"] == 0.75  # the last shows a cat
    assert "judge_t" not in judges.measure(again, ["sks on the moon"] * 2)  # words that it does not know


@pytest.fixture
def train(tmp_path, photos, sd1, capsys):
    def call(options, name="run", script="train_dreambooth_lora", model=sd1):
        folder = tmp_path / name
        words = f"--pretrained_model_name_or_path '{model}' --instance_data_dir '{photos}' --output_dir '{folder}'"
        words += " --instance_prompt 'a photo of sks dog' --class_prompt 'a photo of a dog' --max_train_steps 2"
        words += " --train_batch_size 1 --report_to none --seed 0 --learning_rate 1e-3 --num_validation_images 2"
        words += " --validation_prompt 'a photo of sks dog' --validation_num_inference_steps 2 " + options
        module = importlib.import_module(script)
        module.main(module.parse_args(shlex.split(words)))
        return folder

    return call


def told(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if any(name.endswith(("_i", "_t", "_d", "_pres")) for name in row)}


def test_a_run_tells_its_scores_and_learns_the_same(train, networks):
    options = f"--clip_model_name_or_path '{networks}/clip' --dino_model_name_or_path '{networks}/dino'"
    options += " --validation_steps 1 --validation_prompt 'a photo of a dog' --scores "
    folder, without = train(options + "clip dino"), train(options + "none", name="without")
    found = told(folder)
    kinds = {f"{name}_{kind}" for name in ("clip", "dino") for kind in ("i", "d", "pres")} | {"clip_t"}
    assert list(found) == [0, 1, 2] and all(row.keys() == kinds | {"step"} for row in found.values())
    assert not told(without)
    one, other = (load_file(one / "pytorch_lora_weights.safetensors") for one in (folder, without))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    page = (folder / "report.html").read_text()
    assert "<h3>Likeness to the photos" in page and "clip_t: agreement with the prompt" in page
    assert "clip_t" not in (without / "report.html").read_text()


def test_test_prompts_are_judged_and_shown(train, networks):
    options = f"--scores dino --dino_model_name_or_path '{networks}/dino' --test_prompts 'sks dog at night'"
    folder = train(options + " --num_test_imgs_per_prompt 2 --validation_steps 0", script="train_pdmbooth_lora")
    assert told(folder)[2].keys() >= {"test_dino_i", "test_dino_d"}
    page = (folder / "report.html").read_text()
    assert (
        "<h2>Test images</h2>" in page and "sks dog at night" in page and "test_dino_i: likeness to the photos" in page
    )
    assert "<h3>Test dino i" not in page  # a curve of one point


@pytest.mark.parametrize("script", ["train_dreambooth_lora", "train_pdmbooth_lora", "train_text_to_image_lora"])
def test_no_images_where_their_number_is_zero(tmp_path, photos, sd1, capsys, script, networks):
    """Validation prompts stay recorded; nothing is drawn or judged, and everything else is as with images."""
    folder, pdm = tmp_path / "run", "pdmbooth" in script
    words = f"--pretrained_model_name_or_path '{sd1}' --output_dir '{folder}' --max_train_steps 2 --report_to none"
    words += (
        f" --validation_prompt 'a dog' --scores dino --dino_model_name_or_path '{networks}/dino' --train_batch_size 1"
    )
    words += (
        " --num_val_imgs 0 --test_prompts 'a cat' --num_test_imgs_per_prompt 0" if pdm else " --num_validation_images 0"
    )
    if "booth" in script:
        words += f" --validation_steps 1 --instance_data_dir '{photos}' --instance_prompt 'sks dog'"
    else:
        for path in list(photos.iterdir()):
            path.with_suffix(".txt").write_text("a dog")
        words += f" --validation_steps 1 --train_data_dir '{photos}' --validation_split 0.4 --seed 3"
    module = importlib.import_module(script)
    module.main(module.parse_args(shlex.split(f"{words} --dry_run")))
    plan = capsys.readouterr()
    zero = "--num_validation_images and --num_test_imgs_per_prompt" if pdm else "--num_validation_images"
    assert f"--scores has no effect with {zero} 0: no images are drawn" in plan.err.replace(
        "num_val_imgs", "num_validation_images"
    )
    assert "samples/" not in plan.out
    module.main(module.parse_args(shlex.split(words)))
    assert not list(folder.glob("*samples*")) and not told(folder)
    assert (folder / "report.html").is_file() and (folder / "README.md").is_file()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert any("validation_loss" in row for row in rows) == ("text_to_image" in script)


def test_photos_that_are_gone_cost_the_scores_and_not_the_run(train, networks, photos, monkeypatch, capsys):
    def gone(source):
        raise scores.images.BadImage("01.png", "is gone")

    monkeypatch.setattr(scores, "opened", gone)
    folder = train(f"--scores dino --dino_model_name_or_path '{networks}/dino'")
    assert (folder / "pytorch_lora_weights.safetensors").is_file() and not told(folder)
    assert "no scores at step 2: '01.png' is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, why",
    [
        (
            "--scores clip --clip_model_name_or_path nowhere/model",
            "--clip_model_name_or_path nowhere/model, for --scores",
        ),
        ("--scores dino --dino_model_name_or_path '{}'", "has no config.json that can be read, so it is no model"),
        ("--scores lpips", "pip install torch"),
        ("--scores none clip", "none together with others"),
        ("--scores fid", "fid"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_slow(train, tmp_path, options, why, capsys):
    with pytest.raises(SystemExit) as stop:
        train(options.format(tmp_path))
    assert stop.value.code == 2 and why in capsys.readouterr().err


def test_auto_takes_what_is_here(networks, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert scores.wanted(["auto"], "toybox", "openai/clip", "facebook/dino") == ["judge"]
    assert scores.wanted(["auto"], "some/model", "openai/clip-none", "no name at all!") == []
    assert scores.wanted(["auto"], "some/model", str(networks / "clip"), "facebook/none") == ["clip"]
    assert scores.wanted(["lpips"], "toybox", "", "") == ["lpips"]
