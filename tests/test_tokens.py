"""New tokens beside adapters: only their rows learn, stop, are saved, resumed, and read by stock diffusers."""

import importlib
import json
import shlex

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_scripts import same
from test_sdxl import stock as stock_xl

from utils import adapters, assembling, captions, hub, models, saved, tokens

FILE = "learned_embeddings.safetensors"
PROMPT = "a photo of TOK dog"
FAST = "--num_validation_images 1 --validation_num_inference_steps 4"


@pytest.fixture
def train(sd1, sdxl, photos, tmp_path):
    """train("--options ...", name="a/run") -> output folder"""

    def call(options="", name="run", script="train_dreambooth_lora_sdxl", prompt=PROMPT):
        module, folder = importlib.import_module(script), tmp_path / name
        given = (
            f"--pretrained_model_name_or_path '{sdxl if 'sdxl' in script else sd1}' --output_dir '{folder}' --seed 3"
        )
        given += f" --instance_data_dir '{photos}' --instance_prompt '{prompt}' --report_to none --train_batch_size 1"
        given += " --learning_rate 0.05 --text_encoder_lr 0.05 --checkpointing_steps 1"
        module.main(module.parse_args(shlex.split(f"{given} {options}")))
        return folder

    return call


def learned(folder):
    return load_file(folder / FILE)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def infer(folder, *options):
    module = importlib.import_module("infer")
    given = ["--seed", "3", "--width", "64", "--height", "64", "--num_images", "1", "--num_inference_steps", "4"]
    return module.main(module.parse_args([*given, *map(str, options), "--output_dir", str(folder)]))


# --- The room ----------------------------------------------------------------------------------------------------


def test_only_the_new_rows_are_parameters_and_every_forward_asks_for_them():
    base = torch.nn.Embedding(10, 4).requires_grad_(False).bfloat16()
    table = tokens.Embedding(base, first=12, rows=torch.full((2, 4), 1.001))
    ids = torch.tensor([[3, 12, 13, 9]])
    out = table(ids)
    assert out.dtype == torch.bfloat16 and torch.equal(out[0, [0, 3]], base(ids[0, [0, 3]]))
    assert torch.equal(out[0, 1], table.learned.weight[0].bfloat16())
    out[0, 1].float().sum().backward()
    assert torch.equal(table.learned.weight.grad, torch.tensor([[1.0] * 4, [0.0] * 4])) and base.weight.grad is None
    table.learned.weight.grad = None
    table(torch.tensor([[3, 4]])).float().sum().backward()
    assert torch.equal(table.learned.weight.grad, torch.zeros(2, 4)), "processes without a new token must agree"


def test_words_become_tokens_of_their_own(sdxl):
    def attached(seed=0, taken=(), **options):
        family = models.family_of(str(sdxl))
        family.load("cpu", torch.float32)
        family.tokenizer_2.add_tokens(list(taken))
        return family, adapters.attach(family, train_text_encoder_ti=True, seed=seed, **options)

    plain = models.family_of(str(sdxl))
    plain.load("cpu", torch.float32)
    family, learns = attached(token_abstraction=["TOK", "STY"], num_new_tokens_per_abstraction=3)
    assert learns.describe()["tokens"] == {"TOK": "<s0><s1><s2>", "STY": "<s3><s4><s5>"}
    assert {key: tuple(rows.shape) for key, rows in learns.weights.items()} == {"clip_l": (6, 16), "clip_g": (6, 24)}
    # What is there already draws as before, and the new rows are like the old ones in size.
    texts = ["a photo of a dog", "TOKEN", ""]
    for key, heard in plain.encode_prompts(texts).items():
        assert torch.equal(heard, family.encode_prompts(texts)[key])
    for key, encoder in zip(learns.weights, (plain.text_encoder, plain.text_encoder_2)):
        spread = encoder.get_input_embeddings().weight.std()
        assert 0.7 < learns.weights[key].std() / spread < 1.3
    ids = family.tokenizer("TOK dog", truncation=True).input_ids
    assert family.count_tokens("a TOK dog") == 4 + family.count_tokens("a dog") - 1
    assert family.encode_prompts(["TOK"])["text"].shape == (1, 77, 40) and len(ids) > 3
    assert not torch.equal(family.encode_prompts(["TOK"])["text"], family.encode_prompts(["STY"])["text"])
    # By the seed and the name alone; names that a model knows already are passed over.
    assert equal(
        learns.weights, attached(token_abstraction=["TOK", "STY"], num_new_tokens_per_abstraction=3)[1].weights
    )
    assert not equal(learns.weights, attached(1, num_new_tokens_per_abstraction=6)[1].weights)
    assert attached(taken=["<s0>"])[1].describe()["tokens"] == {"TOK": "<s1><s2>"}
    learns_too = {name for name, module in family.trainable.items()}
    assert learns_too == {"unet", "text_encoder", "text_encoder_2"}
    trained = [p for name in family.encoders for p in getattr(family, name).parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in learns.weights.values()}


def test_whole_words_are_replaced_in_one_go():
    words = {"TOK": "<s0><s1>", "s0": "<s2>"}
    assert captions.replaced("TOK, TOKEN and s0: TOK.", words) == "<s0><s1>, TOKEN and <s2>: <s0><s1>."
    assert captions.replaced("a dog", {}) == "a dog"


# --- The scripts -------------------------------------------------------------------------------------------------


def test_sdxl_learns_resumes_and_stock_diffusers_draws_the_same(train, sdxl, tmp_path, capsys):
    options = f"--train_text_encoder_ti --train_text_encoder_ti_frac 0.6 --max_train_steps 4 {FAST}"
    options += f" --validation_prompt '{PROMPT} on the beach'"
    folder = train(options, name="deep/er/run")
    steps = [learned(folder / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert {key: tuple(rows.shape) for key, rows in steps[0].items()} == {"clip_l": (2, 16), "clip_g": (2, 24)}
    assert not equal(steps[0], steps[1]) and not equal(steps[1], steps[2])
    assert equal(steps[2], steps[3]) and equal(steps[3], learned(folder)), "ceil(0.6 * 4) steps, and no decay after"
    for key, rows in steps[0].items():
        assert (rows != steps[1][key]).any(dim=1).all(), "each token learns in each encoder"
    assert not same(folder / "checkpoint-3", folder / "checkpoint-4"), "the adapters go on"

    # Resumed while they learn, and after they stopped: bit for bit, the final picture included.
    for done in (2, 3):
        again = tmp_path / f"again-{done}"
        train(options, name=f"again-{done}").joinpath("checkpoint-4", "manifest.json").unlink()
        for step in range(done + 1, 5):
            (again / f"checkpoint-{step}" / "manifest.json").unlink(missing_ok=True)
        train(f"{options} --resume_from_checkpoint latest", name=f"again-{done}")
        assert f"checkpoint-{done}" in "".join(capsys.readouterr()), "it was resumed from there"
        assert same(again, folder)
        final = "samples/step-000004/00-00.png"
        assert np.array_equal(picture(again / final), picture(folder / final))

    # Stock diffusers, by the names in the header and the lines of the model card.
    ours = picture(folder / "samples" / "step-000004" / "00-00.png")
    with safe_open(folder / FILE, "pt") as file:
        assert json.loads(file.metadata()["tokens"]) == {"TOK": ["<s0>", "<s1>"]}
    card = (folder / "README.md").read_text()
    assert 'rows["clip_g"], token=["<s0>", "<s1>"], tokenizer=pipeline.tokenizer_2' in card and "`TOK`" in card
    assert '"a photo of <s0><s1> dog on the beach"' in card
    assert FILE in hub.selected(folder) and b"token_abstraction" in hub.selected(folder)["training_config.yaml"]
    pipeline = stock_xl(sdxl)

    def drawn():
        generator = torch.Generator("cpu").manual_seed(3)
        size = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 7.5}
        prompt = "a photo of <s0><s1> dog on the beach"
        return np.asarray(pipeline(prompt, generator=generator, **size).images[0], dtype=int)

    pipeline.load_lora_weights(folder)
    without = drawn()
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(pipeline, part + end) for part in ("tokenizer", "text_encoder")}
        pipeline.load_textual_inversion(learned(folder)[key], token=["<s0>", "<s1>"], **parts)
    assert np.abs(drawn() - ours).max() <= 1
    assert np.abs(without - ours).max() > 1, "the tokens change nothing"

    # infer.py finds them, understands the word, and lets a LoRA of another folder be given its embeddings.
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / saved.LORA_FILE).write_bytes((folder / saved.LORA_FILE).read_bytes())
    ways = [["--lora", folder], ["--lora", alone, "--embeddings", folder / FILE]]
    for number, way in enumerate(ways):
        base = ["--pretrained_model_name_or_path", sdxl, "--prompt", f"{PROMPT} on the beach"]
        (file,) = infer(tmp_path / f"drawn-{number}", *way, *base)
        assert np.abs(picture(file) - ours).max() <= 1


def test_stable_diffusion_averages_and_draws_from_a_checkpoint(train, sd1, tmp_path):
    options = f"--train_text_encoder_ti --token_abstraction sks --num_new_tokens_per_abstraction 1 --use_ema {FAST}"
    options += " --with_prior_preservation --num_class_images 1 --class_prompt 'a dog'"
    options += f" --class_data_dir '{tiny.photos(tmp_path / 'dogs', 1)}' --validation_prompt 'a sks dog'"
    options += " --max_train_steps 2 --train_text_encoder_ti_frac 1 --gradient_checkpointing"
    folder = train(options, script="train_dreambooth_lora", prompt="a photo of sks dog")
    assert learned(folder).keys() == {"clip_l"} and learned(folder)["clip_l"].shape == (1, 16)
    averages = load_file(saved.averaged(folder / "checkpoint-2" / FILE))
    assert torch.equal(averages["clip_l"], learned(folder)["clip_l"])
    assert not equal(learned(folder), learned(folder / "checkpoint-2")), "what is saved in the end is the average"
    ours = picture(folder / "samples" / "step-000002" / "00-00.png")
    (file,) = infer(tmp_path / "drawn", "--checkpoint", folder / "checkpoint-2", "--prompt", "a sks dog")
    assert np.abs(picture(file) - ours).max() <= 1
    family = models.family_of(str(sd1))
    family.load("cpu", torch.float32)
    pipeline = family.pipeline()
    assembling.add_embeddings(pipeline, saved.embeddings([], [folder / "checkpoint-2"], []), "sd1")
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[-1], averages["clip_l"][0])


def test_adapters_of_text_encoders_stop_too(train):
    options = "--train_text_encoder --train_text_encoder_frac 0.5 --max_train_steps 2 --adam_weight_decay 0.1"
    folder = train(options, script="train_dreambooth_lora", prompt="a photo of sks dog")
    one, two = (load_file(folder / f"checkpoint-{step}" / saved.LORA_FILE) for step in (1, 2))
    moved = {key.split(".")[0] for key in one if not torch.equal(one[key], two[key])}
    assert moved == {"unet"}


def test_what_cannot_be_is_refused(train, tmp_path, capsys, monkeypatch):
    def refused(options, **more):
        with pytest.raises(SystemExit):
            train(f"--max_train_steps 1 {options}", **more)
        return " ".join(capsys.readouterr().err.split())

    on = "--train_text_encoder_ti"
    said = refused(f"{on} --train_text_encoder --pre_compute_text_embeddings --train_text_encoder_ti_frac 1.5")
    assert f"{on} with --train_text_encoder:" in said and f"{on} with --pre_compute_text_embeddings" in said
    assert "--train_text_encoder_ti_frac is 1.5: a share of the steps is at most 1" in said
    assert "it must be a number above 0" in refused(f"{on} --train_text_encoder_ti_frac 0")
    said = refused(f"{on} --with_prior_preservation --class_data_dir '{tmp_path / 'c'}' --class_prompt 'a TOK dog'")
    assert "--class_prompt names TOK, which the model does not know yet" in said
    said = refused(f"{on} --token_abstraction TOK,STY")
    assert "--token_abstraction STY stands in no prompt or caption" in said and "TOK stands" not in said
    assert "'a b' must be one word" in refused(f"{on} --token_abstraction 'a b'")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert f"{on} with FSDP" in refused(on)


def test_embeddings_of_two_runs_keep_apart_and_strangers_are_refused(tmp_path, sd1, capsys):
    def made(name, words, rows):
        (tmp_path / name).mkdir()
        from safetensors.torch import save_file

        save_file(rows, tmp_path / name / FILE, metadata={"tokens": json.dumps(words)} if words else None)
        return str(tmp_path / name)

    one = made("one", {"TOK": ["<s0>", "<s1>"]}, {"clip_l": torch.ones(2, 16)})
    two = made("two", {"STY": ["<s0>"]}, {"clip_l": torch.ones(1, 16)})
    bare = made("bare", None, {"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 24)})  # of another program
    wrong = []
    found = saved.embeddings([], [one, two, bare], wrong)
    assert [each.names for each in found] == [["<s0>", "<s1>"], ["<s2>"], ["<s3>", "<s4>"]] and not wrong
    assert [each.words for each in found] == [{"TOK": "<s0><s1>"}, {"STY": "<s2>"}, {}]
    base = ["--pretrained_model_name_or_path", sd1, "--prompt", "TOK"]
    for given, words in (
        ([tmp_path / "none"], "holds no learned embeddings"),
        ([one, made("three", {"TOK": ["<s0>"]}, {"clip_l": torch.ones(1, 16)})], "two files teach TOK"),
        ([bare], "belongs to a model with two text encoders"),
        ([made("wide", None, {"clip_l": torch.ones(1, 99)})], "does not fit"),
    ):
        with pytest.raises(SystemExit):
            infer(tmp_path / "out", *base, *(word for each in given for word in ("--embeddings", each)))
        assert words in capsys.readouterr().err


# --- Files for other programs ------------------------------------------------------------------------------------


def test_names_of_word_files_are_safe_and_differ():
    words = ["TOK", "tok", "<my:dog>", "<my/dog>", "../..", "...", "learned_embeddings", "Hündin", "w" * 300]
    names = saved.word_files(words)
    assert list(names.values())[:6] == [
        "TOK.safetensors",
        "tok-1.safetensors",
        "my-dog.safetensors",
        "my-dog-1.safetensors",
        "word.safetensors",
        "word-1.safetensors",
    ]
    assert names["learned_embeddings"] == "learned_embeddings-1.safetensors"
    assert names["Hündin"] == "Hündin.safetensors" and len(names["w" * 300]) < 100


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_each_word_has_a_file_as_comfyui_and_a1111_read_it(model, request, tmp_path, capsys):
    """ComfyUI takes the rows called clip_l or clip_g, else the first tensor; A1111 takes a file with both, or with a
    single tensor; each takes all rows for one word, which is the name of the file."""
    folder = request.getfixturevalue(model)
    family = models.family_of(str(folder))
    family.load("cpu", torch.float32)
    words = ["TOK", "<a:b>"]
    learns = adapters.attach(family, train_text_encoder_ti=True, token_abstraction=words, rank=2)
    learns.save(tmp_path / "checkpoint-1")
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir()) == [FILE, saved.LORA_FILE]
    out = tmp_path / "run"
    learns.save(out, token_abstraction=words)
    rows = learned(out)
    for name, part in (("TOK", slice(0, 2)), ("a-b", slice(2, 4))):
        own = load_file(out / f"{name}.safetensors")
        want = {key: each[part] for key, each in rows.items()}
        want = want if model == "sdxl" else {"emb_params": want["clip_l"]}
        assert equal(own, want) and all(each.dim() == 2 for each in own.values())
    assert saved.word_of(out / "a-b.safetensors") == "<a:b>" and saved.word_of(out / FILE) is None
    sent = hub.selected(out)
    assert {"TOK.safetensors", "a-b.safetensors", FILE} <= sent.keys()
    # infer.py and the export know them too.
    found = saved.embeddings([], [str(out / "a-b.safetensors")], [])
    assert found[0].words == {"<a:b>": "<s2><s3>"}
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assembling.add_embeddings(pipeline, found, str(folder))
    (number,) = pipeline.tokenizer("<s3>", add_special_tokens=False).input_ids
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[number], rows["clip_l"][3])
    from utils.adapters import __main__ as command

    assert command.main(["export", str(out), str(tmp_path / "other" / "dog.safetensors")]) == 0
    assert "the embedding of <a:b>" in capsys.readouterr().out
    assert equal(load_file(tmp_path / "other" / "a-b.safetensors"), load_file(out / "a-b.safetensors"))
    (tmp_path / "other" / "dog.safetensors").unlink()
    with pytest.raises(SystemExit):
        command.main(["export", str(out), str(tmp_path / "other" / "dog.safetensors")])
    assert "TOK.safetensors exists" in capsys.readouterr().err


def test_word_files_of_a_run_are_replaced_and_those_of_others_kept(train, tmp_path, capsys):
    options = f"--train_text_encoder_ti --max_train_steps 1 {FAST}"
    folder = train(options)
    assert (folder / "TOK.safetensors").is_file()
    train(f"{options} --token_abstraction sks --overwrite_output_dir", prompt="a photo of sks dog")
    assert (folder / "sks.safetensors").is_file() and not (folder / "TOK.safetensors").exists()
    mine = tmp_path / "new" / "TOK.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(SystemExit):
        train(options, name="new")
    assert "would be written over" in capsys.readouterr().err and mine.read_bytes() == b"mine"
