"""Optimizer groups: which rate and decay each weight has, what decay alone does, and older checkpoints' groups."""

import copy

import pytest
import torch
from test_adapter_kinds import KINDS
from test_models import loaded, predict_once

from utils import adapters, checkpoints, learning, optimizers
from utils.checkpoints import nested

RATES = {"text_encoder_lr": 1e-5, "weight_decay": 0.01, "text_encoder_weight_decay": 0.001}
MAKERS = {
    "full": learning.full,
    "lora": adapters.attach,
    "dora": lambda family, **more: adapters.attach(family, dora=True, **more),
    "loha": lambda family, **more: adapters.attach(family, adapter="loha", **more),
    "lokr": lambda family, **more: adapters.attach(family, adapter="lokr", **more),
    "lora plus": lambda family, **more: adapters.attach(family, loraplus_lr_ratio=16, **more),
    "dora plus": lambda family, **more: adapters.attach(family, dora=True, loraplus_lr_ratio=16, **more),
}


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", MAKERS)
def test_rate_and_decay_follow_the_network_that_owns_the_weight(kind, model, request):
    family = loaded(request.getfixturevalue(model))
    learns = MAKERS[kind](family, text_encoder=True)
    groups = learns.groups(1e-4, **RATES)
    found = {id(weight): (group["lr"], group["weight_decay"]) for group in groups for weight in group["params"]}
    count = 0
    for name in ["unet", *family.encoders]:
        for key, weight in getattr(family, name).named_parameters():
            if not weight.requires_grad:
                continue
            rate, decay = (1e-4, 0.01) if name == "unet" else (1e-5, 0.001)
            rate *= 16 if "plus" in kind and "lora_B" in key else 1
            decay = 0 if "magnitude" in key else decay
            assert found[id(weight)] == (pytest.approx(rate), decay), (name, key)
            count += 1
    assert count == len(found) == sum(len(group["params"]) for group in groups) == len(learns.named())
    # A rate or decay of 0 is a number, and without numbers the text encoders have those of the UNet.
    still = learns.groups(1e-4, 0.0, 0.01, 0.0)
    assert {group["lr"] for group in still if group["name"].startswith("text_encoder")} == {0.0}
    assert len({group["lr"] for group in learns.groups(1e-4)}) == (2 if "plus" in kind else 1)


@pytest.mark.parametrize("kind", [*KINDS, "dora", "dora plus"])
def test_decay_alone_leaves_the_model_as_it_is(sd1, kind):
    family = loaded(sd1)
    options = KINDS.get(kind) or {"dora": True, "loraplus_lr_ratio": 4.0 if "plus" in kind else None}
    learns = adapters.attach(family, text_encoder=True, **options)
    base = predict_once(family)
    words = family.text_encoder(torch.arange(77)[None]).last_hidden_state
    optimizer = optimizers.create("adamw", learns.groups(1e-2, weight_decay=0.1))
    for weight in learns.parameters():
        weight.grad = torch.zeros_like(weight)
    for _ in range(300):  # shrinks what decays by a quarter
        optimizer.step()
    assert torch.allclose(predict_once(family), base, atol=1e-5)
    assert torch.allclose(family.text_encoder(torch.arange(77)[None]).last_hidden_state, words, atol=1e-5)


def older(learns, ratio):
    """The groups of earlier versions: by the beginning of a weight's name, DoRA's magnitudes among the others."""
    made, named = [], learns.named()
    for text in (False, True):
        for fast in (False, True) if ratio else (None,):
            weights = [
                weight
                for name, weight in named.items()
                if name.startswith("text_encoder") == text and fast in (None, name.endswith(".up.weight"))
            ]
            if weights:
                name = ("text_encoder" if text else "unet") + ("_up" if fast else "")
                made.append({"params": weights, "lr": 1e-3, "weight_decay": 0.01, "name": name})
    return made


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "full"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_older_checkpoints_give_each_weight_its_own_state(sdxl, kind, text_encoder, tmp_path):
    learns = MAKERS[kind](loaded(sdxl), text_encoder=text_encoder)
    earlier = optimizers.create("adamw", older(learns, "plus" in kind))
    for step in range(2):
        for number, weight in enumerate(learns.parameters()):
            weight.grad = torch.full_like(weight, 0.1 * number + step)
        earlier.step()
    checkpoints.Checkpoints(tmp_path, state={"optimizer": earlier}).save(2)
    groups = learns.groups(1e-4, **RATES)
    now = optimizers.create("adamw", groups)
    saved = checkpoints.Checkpoints(tmp_path, state={"optimizer": now})
    assert saved.resume("latest") == 2
    for weight in learns.parameters():
        assert now.state[weight].keys() == earlier.state[weight].keys()
        assert all(torch.equal(value, earlier.state[weight][name]) for name, value in now.state[weight].items())
    assert [
        (group["name"], group["lr"], group["weight_decay"], list(map(id, group["params"])))
        for group in now.param_groups
    ] == [(group["name"], group["lr"], group["weight_decay"], list(map(id, group["params"]))) for group in groups]
    # Under DeepSpeed each group holds its weights in one row.
    stored = nested.load(tmp_path / "checkpoint-2" / "optimizer.safetensors")
    rows = [{**group, "params": group["params"][:1]} for group in groups]
    assert learning.regrouped(stored, rows) == learning.regrouped(stored, groups)
    # A checkpoint of today comes back too, and one of other groups is refused.
    before = copy.deepcopy(now.state_dict()["state"])
    saved.save(3)
    again = optimizers.create("adamw", learns.groups(1e-4, **RATES))
    assert checkpoints.Checkpoints(tmp_path, state={"optimizer": again}).resume("latest") == 3
    after = again.state_dict()["state"]
    assert all(torch.equal(after[n][k], value) for n, own in before.items() for k, value in own.items())
    other = optimizers.create("adamw", learns.groups(1e-4)[:1] + [{"params": [torch.nn.Parameter(torch.ones(2))]}] * 1)
    with pytest.raises(SystemExit):
        checkpoints.Checkpoints(tmp_path, state={"optimizer": other}).resume("latest")
