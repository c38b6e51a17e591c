"""Options: precedence, ranges, contradictions, and that a person hears of every mistake at once and quickly."""

import argparse
import importlib
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from utils import arguments, errors
from utils.arguments import bounds
from utils.arguments.identity import COMPARED, COURSE, LENGTH

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["--pretrained_model_name_or_path=m", "--instance_data_dir=dog", "--instance_prompt=a photo of sks dog"]


def build(lora=True):
    """The parser of train_dreambooth_lora.py (or of train_dreambooth.py)."""
    parser = arguments.new_parser("Teach one subject.")
    arguments.add_model(parser)
    arguments.add_dreambooth_data(parser)
    arguments.add_masks(parser)
    arguments.add_prior_preservation(parser)
    arguments.add_text_encoder(parser)
    if lora:
        arguments.add_pivotal(parser)
        arguments.add_lora(parser, rank=4)
    arguments.add_length(parser, train_batch_size=4, num_train_epochs=1)
    arguments.add_optimizer(parser, learning_rate=5e-4 if lora else 5e-6)
    arguments.add_loss(parser)
    arguments.add_ema(parser)
    arguments.add_memory(parser)
    arguments.add_checkpoints(parser, output_dir="out")
    arguments.add_validation(parser, **({"validation_epochs": 50} if lora else {"validation_steps": 100}))
    arguments.add_scores(parser)
    arguments.add_logging(parser)
    arguments.add_hub(parser)
    return parser


def parse(*words, lora=True, needed=NEEDED):
    return arguments.parse(build(lora), [*needed, *words])


def refused(capsys, *words, code=errors.OPTIONS, **more):
    """The complaints of a command line that must be refused, one a line."""
    with pytest.raises(SystemExit) as stop:
        parse(*words, **more)
    assert stop.value.code == code
    said = capsys.readouterr().err.splitlines()
    return [line.removeprefix("error: ") for line in said if line.startswith("error: ")]


# Accepted because users type them; --help says that they change nothing or wait for their family.
WITHOUT_EFFECT = {
    "local_rank",
    "foreach_ema",
    "set_grads_to_none",
    "pre_compute_text_embeddings",
    "skip_save_text_encoder",
    "tokenizer_max_length",
    "text_encoder_use_attention_mask",
    "class_labels_conditioning",
    "validation_images",
    "save_model_weights",
}


def test_masks_come_from_one_place(capsys):
    assert not parse().masked_loss and parse("--alpha_mask").masked_loss and parse("--masks_dir=m").masked_loss
    assert "a photo has one mask" in refused(capsys, "--alpha_mask", "--masks_dir=m")[0]
    dataset = [NEEDED[0], NEEDED[2], "--dataset_name=d"]
    assert "--alpha_mask takes" in refused(capsys, "--masked_loss", needed=dataset)[0]
    assert parse("--masked_loss", "--alpha_mask", needed=dataset).masked_loss
    parse("--unmasked_weight=0.1")
    assert "no effect without --masked_loss" in capsys.readouterr().err


def test_defaults_are_those_users_know():
    args, full = parse(), parse(lora=False)
    assert (args.learning_rate, full.learning_rate) == (5e-4, 5e-6)
    assert (args.resolution, args.train_batch_size, args.rank, args.lora_alpha) == (None, 4, 4, None)
    assert (args.lr_scheduler, args.lr_warmup_steps) == ("constant", 0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_weight_decay, args.adam_epsilon) == (0.9, 0.999, 1e-2, 1e-8)
    assert (args.checkpointing_steps, args.num_class_images, args.sample_batch_size) == (500, 100, 4)
    assert (args.validation_steps, args.validation_epochs) == (None, 50)
    assert (full.validation_steps, full.validation_epochs) == (100, None)
    assert (args.report_to, args.validation_prompt, args.seed) == (["tensorboard"], [], None)
    assert args.prodigy_decouple is True and args.use_ema is False and args.hub_private is True


def test_every_command_users_type_parses(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    lora = parse(
        "--checkpointing_steps=100", "--learning_rate=1e-4", "--report_to=wandb", "--lr_scheduler=constant",
        "--lr_warmup_steps=0", "--max_train_steps=500", "--validation_prompt=A photo of sks dog in a bucket",
        "--validation_epochs=50", "--seed=0", "--push_to_hub", "--train_text_encoder", "--hub_token", "env:HF_TOKEN",
    )  # fmt: skip
    assert lora.validation_prompt == ["A photo of sks dog in a bucket"] and lora.seed == 0 and lora.push_to_hub
    full = parse(
        "--class_data_dir=C", "--with_prior_preservation", "--prior_loss_weight=1.0", "--class_prompt=a photo of dog",
        "--num_class_images=200", "--max_train_steps=800", "--gradient_accumulation_steps=2", "--use_8bit_adam",
        "--gradient_checkpointing", "--enable_xformers_memory_efficient_attention", "--set_grads_to_none",
        "--sample_batch_size=1", "--mixed_precision=fp16", "--local_rank", "0", lora=False,
    )  # fmt: skip
    assert full.with_prior_preservation and full.num_class_images == 200 and full.optimizer == "adamw8bit"


def test_complaints_come_together(capsys):
    said = refused(
        capsys, "--train_batch_size", "0", "--resolutin", "5", "--resolution=510", "--lr_scheduler=cosin", "--seed=x",
        "--snr_gamma", "--random_flip=perhaps", "--with_prior_preservation", "--learning_rate", "0", needed=(),
    )  # fmt: skip
    text = "\n".join(said)
    assert "--pretrained_model_name_or_path is required" in said
    assert "--train_batch_size is 0: it must be a whole number of at least 1" in said
    assert "--resolutin is not an option" in text and "did you mean --resolution?" in text
    assert "--resolution is 510: it must be a multiple of 8; 504 or 512 are next" in said
    assert "--lr_scheduler is cosin" in text and "did you mean cosine?" in text
    assert "--seed is x: it must be a whole number of at least 0" in said
    assert "--snr_gamma: expected one argument" in said
    assert "--random_flip is perhaps: it must be yes or no" in said
    assert "--learning_rate is 0: it must be a number above 0" in said
    assert any("--with_prior_preservation needs --class_data_dir" in line for line in said)
    assert any("--with_prior_preservation needs --class_prompt" in line for line in said)
    assert any(line.startswith("--instance_data_dir or --dataset_name") for line in said)
    assert len(said) == len(set(said)) == 13  # the thirteenth: --instance_prompt is required


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max_train_ste=5"], "--max_train_ste is not an option"),  # no abbreviations
        (["a", "photo"], "'a photo' belongs to no option; put quotes"),
        (["--train_text_encoder", "--pre_compute_text_embeddings"], "cannot follow a text encoder that learns"),
        (["--train_text_encoder", "--skip_save_text_encoder"], "would throw away"),
        (["--validation_steps=5", "--validation_epochs=5"], "both given"),
        (["--dataset_name=d"], "not both must be given"),
        (["--offset_noise", "--noise_offset=0.3"], "--offset_noise means --noise_offset 0.1"),
        (["--use_8bit_adam", "--optimizer=prodigy"], "8-bit states"),
        (["--lr_warmup_steps=500", "--max_train_steps=400"], "leaves nothing of --max_train_steps 400"),
        (["--resume_from_checkpoint=latest", "--overwrite_output_dir"], "leave one out"),
        (["--deterministic", "--allow_tf32"], "TF32"),
        (["--report_to", "none", "wandb"], "none together with others"),
        (["--report_to=wandbb"], "did you mean wandb?"),
        (["--class_labels_conditioning=timesteps"], "IF comes with its family"),
        (["--tokenizer_max_length=77"], "IF comes with its family"),
        (["--validation_images", "a.png", "b.png"], "IF comes with its family"),
        (["--optimizer=adamx"], "one of adamw, adamw8bit, prodigy"),
        (["--learning_rate=nan"], "--learning_rate is nan"),
        (["--adam_beta2=1"], "a number at least 0 and below 1"),
        (["--instance_prompt", "  "], "--instance_prompt is '  ': it must be something that is not empty"),
        (["--hub_token=env:NO_SUCH_VARIABLE"], "the environment has no NO_SUCH_VARIABLE"),
    ],
)
def test_contradictions_are_refused(capsys, words, expected):
    said = refused(capsys, *words)
    assert len(said) == 1 and expected in said[0], said


def test_numbers_far_from_any_in_use_are_refused_or_pointed_out(capsys, tmp_path):
    said = refused(capsys, "--noise_offset=100", "--rank=100000", "--resolution=100000", "--prior_loss_weight=1e9")
    assert len(said) == 4 and all("is accepted (" in line for line in said)
    assert "--noise_offset is 100: at most 10 is accepted (0.05 to 0.1 is usual" in "\n".join(said)
    assert "--rank is 100,000: at most 4,096 is accepted" in "\n".join(said)
    parse("--noise_offset=2", "--snr_gamma=500", "--caption_dropout=0.9", "--lora_alpha=1e5", "--repeats=5000")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5 and all(line.startswith("warning: --") and "unusual" in line for line in said), said
    rows = '[{"instance_data_dir": "a", "instance_prompt": "p", "repeats": 100000000}]'
    (tmp_path / "concepts.json").write_text(rows)
    words = ["--pretrained_model_name_or_path=m", f"--concepts_list={tmp_path / 'concepts.json'}"]
    assert "concept 1: repeats is 100,000,000" in refused(capsys, needed=words)[0]


def test_every_bound_is_of_an_option_and_above_its_default():
    parsers = [build()]
    for path in sorted([*ROOT.glob("train_*.py"), ROOT / "infer.py", ROOT / "utils" / "cache" / "__main__.py"]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        program = importlib.import_module(name)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(arguments, "parse", lambda parser, argv: parsers.append(parser))
            program.parse_args([])
    actions = {action.dest: action for parser in parsers for action in parser._actions}
    assert bounds.LARGEST.keys() <= actions.keys()
    for name, (usual, most, why) in bounds.LARGEST.items():
        assert (actions[name].default or 0) <= usual <= most and why, name


def test_two_spellings_are_one():
    assert parse("--offset_noise").noise_offset == 0.1 == parse("--noise_offset=0.1").noise_offset
    both = parse("--validation_prompt=a", "--validation_prompt", "b", "--validation_prompts", "c, d", "e")
    assert both.validation_prompt == ["a", "b", "c, d", "e"] and not hasattr(both, "validation_prompts")
    assert parse("--optimizer=AdamW").optimizer == "adamw"
    assert parse("--optimizer=adamw8bit").use_8bit_adam and parse("--use_8bit_adam").optimizer == "adamw8bit"
    assert parse("--report_to=wandb,tensorboard").report_to == parse("--report_to", "wandb", "tensorboard").report_to
    assert parse("--lora_target_modules=to_q,to_k").lora_target_modules == ["to_q", "to_k"]
    assert parse("--cache_latents").cache_latents == "on" and parse("--report_to=none").report_to == []
    assert parse("--output_dir=~/x").output_dir == os.path.expanduser("~/x")


def test_warm_up():
    assert parse("--lr_scheduler=cosine").lr_warmup_steps is None  # settled once the steps are counted
    assert parse("--lr_scheduler=cosine", "--max_train_steps=400").lr_warmup_steps == 40
    given = parse("--lr_warmup_steps=20")
    assert (given.lr_scheduler, given.lr_warmup_steps) == ("constant_with_warmup", 20)


def test_validation_interval_given_replaces_the_scripts_own():
    args = parse("--validation_steps=10")
    assert (args.validation_steps, args.validation_epochs) == (10, None)
    args = parse("--validation_epochs=0", lora=False)
    assert (args.validation_steps, args.validation_epochs) == (None, 0)


def test_booleans_are_real():
    assert parse("--prodigy_decouple", "False").prodigy_decouple is False
    assert parse("--random_flip", "--center_crop=no").random_flip is True


def test_options_without_effect_are_pointed_out(capsys):
    parse("--class_prompt=a dog", "--ema_decay=0.9", "--optimizer=prodigy")
    said = capsys.readouterr().err
    assert "warning: --class_prompt has no effect without --with_prior_preservation" in said
    assert "warning: --ema_decay has no effect without --use_ema" in said
    assert "prodigy finds its own step size" in said
    parse("--use_ema", "--ema_decay=0.9")
    assert not capsys.readouterr().err
    assert refused(capsys, "--posthoc_ema") == ["--posthoc_ema needs --use_ema: nothing would be averaged"]


def test_averages_of_a_later_length_have_no_decay_and_two_lengths(capsys):
    words = ("--use_ema", "--posthoc_ema", "--ema_decay=0.99", "--ema_power=0.7", "--ema_sigma_rel=0.1")
    said = refused(capsys, *words, "--ema_interval=4", "--ema_snapshot_steps=10")
    assert [line.split(":")[0].split(" with")[0] for line in said] == [
        "--ema_decay", "--ema_power", "--ema_sigma_rel 0.1",
        "--ema_snapshot_steps 10 is no multiple of --ema_interval 4, after which averages change",
    ]  # fmt: skip
    args = parse("--use_ema", "--posthoc_ema", "--ema_sigma_rel", "0.03", "0.1", "0.2", "--ema_interval=4")
    assert args.ema_sigma_rel == [0.03, 0.1, 0.2] and arguments.identity(args)["ema_sigma_rel"] == [0.03, 0.1, 0.2]
    assert "0.3: it must be a number" in refused(capsys, "--ema_sigma_rel", "0.3", "0.1")[0]
    assert not capsys.readouterr().err


def test_precedence(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "learning_rate: 1e-4\nresolution: 256\nrandom_flip: true\nmixed_precision: no\ncache_latents: on\n"
        "validation_prompts: [from, file]\nvalidation_epochs: 7\nmax_train_steps: 9\nreport_to: wandb\nseed: null\n"
    )
    args = parse("--config", str(file))
    assert (args.learning_rate, args.resolution, args.random_flip, args.seed) == (1e-4, 256, True, None)
    assert (args.mixed_precision, args.cache_latents, args.report_to) == ("no", "on", ["wandb"])  # YAML's own booleans
    args = parse(
        "--config", str(file), "--resolution=128", "--random_flip=no", "--validation_prompt=typed",
        "--validation_steps=3", "--num_train_epochs=2",
    )  # fmt: skip
    assert (args.resolution, args.random_flip, args.learning_rate) == (128, False, 1e-4)
    assert args.validation_prompt == ["typed"]
    assert (args.validation_steps, args.validation_epochs) == (3, None)
    assert (args.num_train_epochs, args.max_train_steps) == (2, None)


def test_config_may_hold_everything_required(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("pretrained_model_name_or_path: m\ninstance_data_dir: d\n--instance-prompt: p\n")
    assert parse("--config", str(file), needed=()).instance_prompt == "p"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("learning_rat: 1", "learning_rat is not an option; did you mean learning_rate?"),
        ("resolution: big", "resolution is big: it must be a whole number of at least 8"),
        ("resolution: [1, 2]", "resolution takes one value, not a list"),
        ("a: b: c", "mapping values are not allowed here in line 1"),
        ("- x", "lines of the form 'option: value' are needed"),
        ("rank: 4\nseed: 1\nrank: 8", "c.yaml: rank is given in line 1 and again in line 3; remove one"),
        ("lora-alpha: 4\n--lora_alpha: 8", "--lora_alpha is given in line 1 and again in line 2"),
        ("report_to: &a [*a]", "the list or mapping in line 1 contains itself"),
        ("rank: " + 5000 * "[", "nested too deeply"),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]\n" for n in range(1, 30)),
            "the anchors in line 6 stand for more than 100,000 values",
        ),
        ("hub_token: hf_secret", "a token does not belong in a file"),
        ("validation_steps: 1\nvalidation_epochs: 1", "both given"),
    ],
)
def test_wrong_configs_are_refused(tmp_path, capsys, content, expected):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    said = refused(capsys, "--config", str(file))
    assert len(said) == 1 and expected in said[0] and "hf_secret" not in said[0], said
    assert "No such file" in refused(capsys, "--config", str(tmp_path / "none.yaml"))[0]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--offset_noise", "--use_8bit_adam", "--validation_prompt", "é: ünïcode #1\nline", "--validation_steps=5"],
        ["--lr_warmup_steps=3", "--report_to=none", "--lr_scheduler=constant", "--mixed_precision=no"],
        ["--lora_target_modules", "to_q", "--seed=7", "--max_train_steps=5", "--cache_latents=off"],
    ],
)
def test_saved_settings_read_back_the_same(tmp_path, words):
    args = parse(*words)
    arguments.save(args, tmp_path / "training_config.yaml")
    again = arguments.parse(build(), ["--config", str(tmp_path / "training_config.yaml")])
    assert arguments.public(again) == arguments.public(args)
    assert "dry_run" not in arguments.public(args) and "overwrite_output_dir" not in arguments.public(args)


def test_token_is_kept_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")
    token = "hf_" + "x" * 30
    monkeypatch.setattr(sys, "argv", ["train.py", *NEEDED, f"--hub_token={token}"])
    args = arguments.parse(build())
    assert os.environ["HF_TOKEN"] == token  # where the hub's client looks for it
    arguments.save(args, tmp_path / "c.yaml")
    everything = f"{args} {sys.argv} {arguments.public(args)} {(tmp_path / 'c.yaml').read_text()} {capsys.readouterr()}"
    assert token not in everything and "hub_token" not in yaml.safe_load((tmp_path / "c.yaml").read_text())
    said = refused(capsys, "--hub_token", token, "--report_to=wandb")
    assert "they record command lines" in said[0] and token not in said[0]


def test_token_by_name_goes_with_any_tracker(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("MINE", "hf_mine")
    assert parse("--hub_token=env:MINE", "--report_to=wandb").hub_token == "env:HF_TOKEN"
    assert os.environ["HF_TOKEN"] == "hf_mine" and not capsys.readouterr().err


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--resolutin=5"], 2)])
def test_help_and_a_typo_answer_at_once(tmp_path, words, code):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from utils import arguments, preflight\n"
        "sys.modules['pytest'] = sys.modules['yaml'] = None\n"  # neither is needed for an answer
        "source = open(sys.path[1] + '/test_arguments.py').read()\n"
        "start = source.index('def build('); end = source.index('def parse(')\n"
        "exec(source[start:end])\n"
        "arguments.parse(build())\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    assert ("--instance_data_dir" in done.stdout) if code == 0 else ("did you mean --resolution?" in done.stderr)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learning_rate=1e-1", "--learning_rate 0.1 is far above the usual range of LoRA with adamw (at most 0.02)"),
        ("--learning_rate=1e-9", "far below the usual range of LoRA with adamw (at least 1e-07)"),
        ("--learning_rate=1e-2 --optimizer=lion", "far above the usual range of LoRA with lion (at most 0.006)"),
        ("--learning_rate=100 --optimizer=prodigy", "far above the 1.0 that is usual with prodigy"),
        ("--learning_rate=1e-2 --scale_lr --train_batch_size=4", "--learning_rate 0.01 (times 4 by --scale_lr) is far"),
        ("--learning_rate=1e-2", None),
        ("--learning_rate=1e-3 --scale_lr --train_batch_size=4", None),
        ("--learning_rate=1 --optimizer=prodigy", None),
        ("--learning_rate=0.5 --optimizer=sgd", None),
        ("", None),
    ],
)
def test_a_learning_rate_far_outside_its_range_is_named(capsys, words, said):
    parse(*words.split())
    found = [line for line in capsys.readouterr().err.splitlines() if "far" in line]
    assert [said in line for line in found] == ([True] if said else [])


def test_the_toybox_has_learning_rates_of_its_own():
    for base, words, rate in (
        ("toybox", "", 1e-3),
        ("toybox/sdxl/", "", 1e-3),
        ("toybox", "--optimizer=lion", 3e-4),
        ("toybox", "--optimizer=prodigy", 5e-4),
        ("toybox", "--learning_rate=5e-4", 5e-4),
        ("other", "", 5e-4),
    ):
        args = parse(f"--pretrained_model_name_or_path={base}", *words.split())
        assert args.learning_rate == pytest.approx(rate), (base, words)
    assert train_text_to_image_rate() == 1e-4


def train_text_to_image_rate():
    import train_text_to_image

    words = ["--pretrained_model_name_or_path=toybox", "--train_data_dir=x"]
    return train_text_to_image.parse_args(words).learning_rate


def test_help_names_every_default():
    text = " ".join(build().format_help().split())
    assert "1e-4, LoRA 1e-3 (default: 0.0005)" in text
    assert "(default: yes)" in text and "(default: the attention projections)" in text


def test_one_process_speaks_for_all(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert refused(capsys, "--seed=x") == []


def test_call_hands_over_options_by_the_name_of_the_keyword():
    args = argparse.Namespace(rank=8, seed=1, alpha=3.0, unrelated=5)

    def room(family, rank=4, *, seed=0, dropout=0.1):
        return family, rank, seed, dropout

    call = arguments.caller(args)
    assert call(room, "sd") == ("sd", 8, 1, 0.1)
    assert call(room, "sd", seed=7) == ("sd", 8, 7, 0.1)  # what is given comes first
    assert call(room, "sd", 2) == ("sd", 2, 1, 0.1)


# What a resume learns of an option otherwise: networks, data and optimizer tell it themselves, or the script does.
TOLD = """pretrained_model_name_or_path revision concepts_list concepts
    instance_data_dir instance_prompt identifier class_noun dataset_name
    dataset_config_name dataset_split image_column caption_column train_data_dir streaming shuffle_buffer
    max_train_samples validation_split
    resolution resolution_buckets masked_loss masks_dir alpha_mask sam_model_name_or_path sam_box sam_point
    with_prior_preservation class_data_dir class_prompt
    num_class_images class_guidance_scale prior_generation_precision train_text_encoder rank
    train_text_encoder_ti token_abstraction num_new_tokens_per_abstraction
    lora_alpha use_dora lora_target_modules adapter use_rslora lokr_factor init_lora_weights loraplus_lr_ratio
    lora_conv_rank lora_unet_blocks quantize_base train_batch_size gradient_accumulation_steps seed optimizer
    use_8bit_adam prediction_type use_ema mixed_precision
    use_pdm_loss pdm_loss_weight pdm_layer mask_dm mask_pdm mask_prior"""
# What may change between two sessions: how long and how fast a run learns, where and how it is computed and told.
CHANGEABLE = """config dry_run allow_pickle cache_dir repeats on_bad_image precomputed_dir
    dataloader_num_workers sample_batch_size
    text_encoder_lr adam_weight_decay_text_encoder num_train_epochs max_train_steps max_train_minutes learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power max_grad_norm
    fused_backward adam_beta1 adam_beta2 adam_weight_decay
    adam_epsilon offload_ema ema_snapshot_steps gradient_checkpointing enable_xformers_memory_efficient_attention
    cache_latents compile deterministic output_kohya_format kohya_dtype
    output_dir overwrite_output_dir checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    allow_resume_mismatch verify_checkpoint on_nan on_loss_spike validation_prompt num_validation_images
    validation_steps validation_epochs validation_scheduler validation_num_inference_steps validation_guidance_scale
    report_to logging_dir tracker_project_name push_to_hub hub_token hub_model_id hub_private
    features_data_dir save_pdm_fs save_pdm_masks test_prompts num_test_imgs_per_prompt del_cls_imgs_dir wandb_exp
    wandb_dir scores clip_model_name_or_path dino_model_name_or_path"""


@pytest.mark.parametrize("script", sorted(path.stem for path in Path(__file__).parents[1].glob("train_*.py")))
def test_a_resume_knows_of_every_option_that_changes_what_is_learned(script):
    program = importlib.import_module(script)
    needed = ["--train_data_dir=d"] if "text_to_image" in script else ["--instance_data_dir=d", "--instance_prompt=p"]
    args = program.parse_args(["--pretrained_model_name_or_path=m", *needed])
    assert "| arguments.identity(args)" in Path(program.__file__).read_text()
    assert arguments.identity(args) == {}, "options at their defaults leave older checkpoints as they are"
    assert {*COURSE, *LENGTH} <= set(CHANGEABLE.split())
    sorted_in = [COMPARED.keys(), set(TOLD.split()), set(CHANGEABLE.split()), WITHOUT_EFFECT]
    unsorted = {name: sum(name in names for names in sorted_in) for name in vars(args)}
    assert {name for name, times in unsorted.items() if times != 1} == set(), "put it into utils/arguments/identity.py"


@pytest.mark.parametrize("script", sorted(path.stem for path in Path(__file__).parents[1].glob("train_*.py")))
def test_every_option_is_used_somewhere(script):
    """By its script or a room: an option that is only parsed would be a promise."""
    root = Path(__file__).parents[1]
    rooms = [path for path in (root / "utils").rglob("*.py") if path.parent.name != "arguments"]
    told = "\n".join(path.read_text() for path in [root / f"{script}.py", *rooms])
    program = importlib.import_module(script)
    subject = ["--instance_data_dir", "d", "--instance_prompt", "p"]
    required = ["--pretrained_model_name_or_path", "m"]
    required += ["--train_data_dir", "d"] if "text_to_image" in script else subject
    unused = {name for name in vars(program.parse_args(required)) if not re.search(rf"\b{name}\b", told)}
    assert unused <= WITHOUT_EFFECT


def test_defaults_stand_beside_the_settings():
    """Settled like the settings, so that the report calls nothing chosen that nobody chose."""
    args = parse("--rank=8", "--lr_scheduler=cosine", "--max_train_steps=100")
    found = arguments.defaults(args)
    assert "defaults" not in vars(args) and found.keys() == vars(args).keys()
    differ = {name for name, value in vars(args).items() if value != found[name]}
    assert differ - {"concepts"} == {  # concepts are what the photos' options say, in one table
        "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "rank", "lr_scheduler",
        "max_train_steps", "lr_warmup_steps",
    }  # fmt: skip


def test_an_option_of_one_value_given_twice_is_pointed_out(capsys):
    words = [*NEEDED, "--rank", "8", "--rank=16", "--random_flip", "--random_flip", "no", "--seed=1", "--seed=1"]
    args = arguments.parse(build(), [*words, "--validation_prompt", "a", "--validation_prompt", "b"])
    assert (args.rank, args.random_flip, args.validation_prompt) == (16, False, ["a", "b"])
    said = [line for line in capsys.readouterr().err.splitlines() if "times" in line]
    assert said == [
        "warning: --random_flip is given 2 times (yes, no): the last value is used",
        "warning: --rank is given 2 times (8, 16): the last value is used",
    ]
