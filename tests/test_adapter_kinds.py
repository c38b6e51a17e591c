"""Kinds, starts and places of adapters: all begin at the base model, learn, and come back from their file exactly."""

import importlib
import shlex

import pytest
import torch
from safetensors.torch import load_file
from test_models import batch_of, loaded, predict_once

from utils import adapters, checkpoints, saved, targets
from utils.adapters import starts

KINDS = {
    "use_rslora": {"use_rslora": True, "alpha": 3},
    "kaiming": {"init_lora_weights": "kaiming"},
    "orthogonal": {"init_lora_weights": "orthogonal", "lora_conv_rank": 2},
    "orthogonal dora": {"init_lora_weights": "orthogonal", "dora": True},
    "loha": {"adapter": "loha", "lora_conv_rank": 2},
    "lokr": {"adapter": "lokr", "rank": 1, "lora_conv_rank": 2},
    "lokr of two whole factors": {"adapter": "lokr", "rank": 30, "alpha": 3, "lokr_factor": 2},
    "plus": {"loraplus_lr_ratio": 16.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_begins_at_the_base_learns_and_comes_back_from_its_file(sd1, kind, tmp_path):
    family = loaded(sd1)
    base, frozen = predict_once(family), {n: p.clone() for n, p in family.unet.named_parameters()}
    learns = adapters.attach(family, text_encoder=True, **KINDS[kind])
    assert torch.allclose(predict_once(family), base, atol=1e-5)
    optimizer = torch.optim.SGD(learns.groups(0.5, weight_decay=0.0))
    for _ in range(2):  # one factor starts at zero, so the others get their first gradient in the second step
        optimizer.zero_grad()
        predict_once(family).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learns.parameters())
    ours = predict_once(family)
    assert not torch.allclose(ours, base, atol=1e-4)
    now = {n.replace("base_layer.", ""): p for n, p in family.unet.named_parameters()}
    assert all(torch.equal(now[name], weight) for name, weight in frozen.items())  # the base is never touched

    learns.save(tmp_path)
    fresh_family = loaded(sd1)
    fresh = adapters.attach(fresh_family, text_encoder=True, seed=5, **KINDS[kind])
    places = [p.data_ptr() for p in fresh.parameters()]
    fresh.load(tmp_path)
    assert places == [p.data_ptr() for p in fresh.parameters()] and list(learns.named()) == list(fresh.named())
    assert all(torch.equal(a, b) for a, b in zip(learns.weights().values(), fresh.weights().values(), strict=True))
    assert torch.equal(predict_once(fresh_family), ours)
    assert fresh.describe() == learns.describe()


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "orthogonal"}, {"adapter": "loha"}, {"adapter": "lokr"}], ids=str
)
def test_half_precision_base_with_a_start_in_full_precision(sd1, options):
    family = loaded(sd1, torch.bfloat16)
    base = predict_once(family)
    learns = adapters.attach(family, **options)
    assert {p.dtype for p in learns.parameters()} == {torch.float32}
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            found = predict_once(family)
            assert torch.allclose(found, base, atol=0.05 * base.abs().max().item())
            found.square().mean().backward()
    assert any(p.grad.abs().sum() > 0 for p in learns.parameters())


def test_rslora_divides_by_the_root(sd1):
    family = loaded(sd1)
    adapters.attach(family, rank=4, alpha=6, use_rslora=True, lora_conv_rank=9)
    scales = {n: m.scaling["default"] for n, m in family.unet.named_modules() if hasattr(m, "lora_A")}
    assert {scale for name, scale in scales.items() if name.endswith("to_q")} == {3.0}
    assert {round(scale, 6) for name, scale in scales.items() if name.endswith("conv1")} == {6 * 9 / 4 / 3}


def test_loraplus_lets_b_learn_faster_in_every_network(sd1):
    learns = adapters.attach(loaded(sd1), text_encoder=True, loraplus_lr_ratio=16)
    groups = learns.groups(1e-4, 1e-5, weight_decay=0.01)
    assert [(g["name"], round(g["lr"] * 1e5, 6), g["weight_decay"]) for g in groups] == [
        ("unet", 10, 0.01),
        ("unet_up", 160, 0.01),
        ("text_encoder", 1, 0.01),
        ("text_encoder_up", 16, 0.01),
    ]
    named = {id(weight): key for key, weight in learns.named().items()}
    for group in groups:
        assert all((".up." in named[id(p)]) == group["name"].endswith("_up") for p in group["params"])
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(named)


# --- Places ------------------------------------------------------------------------------------------------------


def chosen(**options):
    layers = [f"up_blocks.1.attentions.{n}.to_q" for n in (1, 10)] + ["up_blocks.10.attentions.1.to_q"]
    layers += ["up_blocks.1.resnets.1.conv1", "mid_block.attentions.0.ff.net.2"]
    return targets.choose({"unet": layers, "text_encoder": ["l.0.k_proj"]}, DEFAULTS, **options)


DEFAULTS = {"unet": ["to_q"], "text_encoder": ["k_proj"]}


def test_blocks_are_matched_by_whole_parts_of_names():
    assert chosen(blocks=["up_blocks.1.attentions.1"])[0]["unet"] == ["up_blocks.1.attentions.1.to_q"]
    # As users of other scripts write it; and wherever the parts stand.
    assert chosen(blocks=["unet.up_blocks.1.attentions.1"])[0]["unet"] == ["up_blocks.1.attentions.1.to_q"]
    found = ["up_blocks.1.attentions.1.to_q", "up_blocks.10.attentions.1.to_q"]
    assert chosen(blocks=["attentions.1"])[0] == {"unet": found, "text_encoder": ["k_proj"]}
    names, convolutions, complaints = chosen(blocks=["up_blocks.1"], conv=True)
    assert names["unet"] == [f"up_blocks.1.attentions.{n}.to_q" for n in (1, 10)] + ["up_blocks.1.resnets.1.conv1"]
    assert convolutions == ["up_blocks.1.resnets.1.conv1"] and not complaints


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"blocks": ["up_blocks.1.attentions.11"]}, "did you mean up_blocks.1.attentions.1"),
        ({"blocks": ["content"]}, "up_blocks.0.attentions.0: the UNet has no such block"),
        ({"targets": "to_x,to_q"}, "--lora_target_modules to_x"),
        ({"targets": ["ff.net.3"]}, "did you mean ff.net.2"),
        ({"blocks": ["mid_block"]}, "no layer there ends in to_q"),
        ({"blocks": ["attentions.1"], "conv": True}, "--lora_conv_rank"),
    ],
)
def test_names_that_fit_nothing_are_refused_with_the_nearest(options, says):
    complaints = chosen(**options)[2]
    assert len(complaints) == 1 and says in complaints[0]


# --- Options -----------------------------------------------------------------------------------------------------


def parsed(words, sd1="toybox"):
    needed = f"--pretrained_model_name_or_path {sd1} --instance_data_dir d --instance_prompt p "
    return importlib.import_module("train_dreambooth_lora").parse_args(shlex.split(needed + words))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--adapter loha --use_dora", "--use_dora with --adapter loha"),
        ("--adapter lokr --use_rslora", "--use_rslora with --adapter lokr"),
        ("--adapter loha --init_lora_weights kaiming", "--init_lora_weights with --adapter loha"),
        ("--adapter lokr --lora_dropout 0.1", "--lora_dropout with --adapter lokr"),
        ("--adapter loha --loraplus_lr_ratio 16", "--loraplus_lr_ratio with --adapter loha"),
        ("--init_lora_weights orthogonal --rank 3", "even ranks"),
        ("--loraplus_lr_ratio 16 --optimizer prodigy --learning_rate 1", "one step size"),
        ("--use_blora --lora_unet_blocks content", "--use_blora means"),
        ("--init_lora_weights kaimin", "did you mean kaiming?"),
        ("--init_lora_weights pissa", "--init_lora_weights is pissa: this value was removed; use gaussian"),
        ("--init_lora_weights OLoRA", "--init_lora_weights is OLoRA: this value was removed; use gaussian"),
    ],
)
def test_combinations_that_cannot_work_are_refused(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(words)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_a_config_with_a_removed_start_is_refused_in_one_sentence(tmp_path, capsys):
    config = tmp_path / "training_config.yaml"
    config.write_text("init_lora_weights: olora\n")
    with pytest.raises(SystemExit) as stop:
        parsed(f"--config '{config}'")
    told = f"error: {config}: init_lora_weights is olora: this value was removed; use gaussian"
    assert stop.value.code == 2 and told in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_checkpoint_with_a_removed_start_is_not_resumed(start, photos, tmp_path, capsys):
    folder = tmp_path / "out" / "checkpoint-2"
    optimizer = {"optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)}
    checkpoints.Checkpoints(folder.parent, state=optimizer, identity={"start": start, "rank": 4}).save(2)
    options = f"--output_dir '{folder.parent}' --instance_data_dir '{photos}' --allow_resume_mismatch all --dry_run"
    script = importlib.import_module("train_dreambooth_lora")
    for which in ("latest", folder):
        with pytest.raises(SystemExit) as stop:  # before anything is loaded
            script.main(parsed(f"{options} --resume_from_checkpoint '{which}'"))
        (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert stop.value.code == 2 and f"{folder} cannot be resumed" in told and f"--init_lora_weights {start}" in told
    with pytest.raises(SystemExit):  # where the preflight saw a newer one that is damaged
        checkpoints.Checkpoints(folder.parent, state=optimizer, identity={"rank": 4}).resume("latest", "all")
    assert f"{folder} cannot be resumed" in capsys.readouterr().err


def test_every_option_of_the_group_reaches_attach():
    import inspect

    from utils import arguments

    group = next(g for g in arguments_of_lora() if g.title == "Adapters")
    known = inspect.signature(adapters.attach).parameters
    spelled = {"lora_alpha", "lora_dropout", "use_dora", "lora_target_modules"}  # shorter in the room
    elsewhere = {"use_blora", "output_kohya_format", "kohya_dtype"}
    options = {action.dest for action in group._group_actions}
    assert options - spelled - elsewhere <= known.keys()
    args = parsed("")
    for name in options & known.keys():  # the defaults of the options are those of the room
        assert (getattr(args, name) or None) == (known[name].default or None), name
    assert parsed("--use_blora").lora_unet_blocks == ["content", "style"]
    assert all(hasattr(starts, name) for name in arguments.STARTS)


def arguments_of_lora():
    from utils import arguments

    parser = arguments.new_parser("")
    arguments.add_lora(parser)
    return parser._action_groups


@pytest.mark.parametrize(
    "words", ["--init_lora_weights kaiming", "--adapter lokr", "--loraplus_lr_ratio 4 --use_rslora"]
)
def test_a_script_resumes_exactly_with_an_average(sd1, photos, tmp_path, words):
    import shutil

    from test_scripts import same

    script = importlib.import_module("train_dreambooth_lora")

    def train(name, more=""):
        options = (
            f"--pretrained_model_name_or_path '{sd1}' --output_dir '{tmp_path / name}' --report_to none --seed 3"
            f" --instance_data_dir '{photos}' --instance_prompt 'a sks dog' --learning_rate 1e-2 --train_batch_size 1"
            f" --max_train_steps 4 --checkpointing_steps 2 --use_ema --output_kohya_format {words} {more}"
        )
        script.main(script.parse_args(shlex.split(options)))
        return tmp_path / name

    whole = train("whole")
    (tmp_path / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert same(whole, train("resumed", "--resume_from_checkpoint latest"))
    averaged = load_file(saved.averaged(whole / "checkpoint-4" / adapters.FILE))
    final = load_file(whole / adapters.FILE)  # what infer.py draws a checkpoint with is what the run ends with
    assert averaged.keys() == final.keys() and all(torch.equal(averaged[key], final[key]) for key in final)
    with pytest.raises(SystemExit):  # other adapters are another run
        words = ""
        train("resumed", "--resume_from_checkpoint latest --max_train_steps 6")


def test_every_gradient_of_blocks_is_in_those_blocks(sd1):
    family = loaded(sd1)
    learns = adapters.attach(family, lora_unet_blocks=["up_blocks.1.attentions.0"])
    assert learns.named() and all(key.startswith("unet.up_blocks.1.attentions.0.") for key in learns.named())
    family.predict(torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), family.condition(batch_of())).mean().backward()
    assert all(p.grad is not None for p in learns.parameters())
    assert learns.describe()["blocks"] == ["up_blocks.1.attentions.0"]
