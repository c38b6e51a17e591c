"""Whole networks that learn: precision, order, groups, exact files."""

import pytest
import torch
from safetensors.torch import load_file
from test_models import loaded, predict_once

from utils import adapters, learning


def test_learns_in_full_precision_from_the_unrounded_weights(sd1):
    family = loaded(sd1, torch.bfloat16)
    learns = learning.full(family)
    stored = load_file(sd1 / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(p, stored[key.removeprefix("unet.")]) for key, p in learns.named().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in learns.parameters())
    assert {p.dtype for p in family.text_encoder.parameters()} == {torch.bfloat16}
    assert set(family.trainable) == {"unet"} and family.unet.training
    with torch.autocast("cpu", torch.bfloat16):
        predict_once(family).square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learns.parameters())


def test_fp32_networks_are_not_read_twice(sd1):
    family = loaded(sd1)
    unet = family.unet
    assert learning.full(family).modules == {"unet": unet}


@pytest.mark.parametrize("make", [learning.full, adapters.attach])
def test_groups_hold_every_weight_once_with_its_own_rate(sd1, make):
    learns = make(loaded(sd1), text_encoder=True)
    groups = learns.groups(1e-4, 1e-5, weight_decay=0.01, text_encoder_weight_decay=0.001)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("unet", 1e-4, 0.01),
        ("text_encoder", 1e-5, 0.001),
    ]
    assert [id(p) for g in groups for p in g["params"]] == [id(p) for p in learns.parameters()]
    assert len(learns.named()) == len({id(p) for p in learns.parameters()})
    # Without numbers of its own the text encoder learns like the rest; a rate of 0 is a number.
    assert {(g["lr"], g["weight_decay"]) for g in learns.groups(1e-4, weight_decay=0.02)} == {(1e-4, 0.02)}
    assert learns.groups(1e-4, 0.0)[1]["lr"] == 0.0
    assert [g["name"] for g in make(loaded(sd1)).groups(1e-4)] == ["unet"]


@pytest.mark.parametrize("text_encoder", [False, True])
def test_saved_folders_load_bit_for_bit_and_stock(sd1, tmp_path, text_encoder):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    learns = learning.full(loaded(sd1), text_encoder=text_encoder)
    with torch.no_grad():
        for weight in learns.parameters():
            weight.add_(torch.randn_like(weight))
    learns.save(tmp_path)
    fresh = learning.full(loaded(sd1), text_encoder=text_encoder)
    places = [p.data_ptr() for p in fresh.parameters()]
    fresh.load(tmp_path)
    assert places == [p.data_ptr() for p in fresh.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(learns.parameters(), fresh.parameters()))
    stock = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    for name, module in learns.modules.items():
        again = stock[name].from_pretrained(tmp_path, subfolder=name).state_dict()
        assert all(torch.equal(weight, again[key]) for key, weight in module.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(learns.modules)


def test_weights_of_another_model_are_refused_before_anything_changes(sd1, sd2, tmp_path, capsys):
    learning.full(loaded(sd2)).save(tmp_path)
    learns = learning.full(loaded(sd1))
    before = [p.clone() for p in learns.parameters()]
    with pytest.raises(SystemExit) as stop:
        learns.load(tmp_path)
    assert stop.value.code == 2
    assert "does not fit" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(before, learns.parameters()))


def test_describe_tells_methods_apart(sd1):
    assert learning.full(loaded(sd1)).describe() == {"method": "full", "modules": ["unet"]}
    assert learning.full(loaded(sd1), text_encoder=True).describe()["modules"] == ["text_encoder", "unet"]
    assert adapters.attach(loaded(sd1), dora=True).describe()["method"] == "dora"
