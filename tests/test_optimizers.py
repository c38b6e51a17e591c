"""Every named optimizer learns and resumes; every schedule is the one users know by that name."""

import builtins

import pytest
import torch

from utils import optimizers

ALL = [("adamw", False), ("adamw8bit", False), ("adamw", True), ("prodigy", False), ("adafactor", False)]
ALL += [("lion", False), ("lion", True), ("sgd", False)]
RATES = {"prodigy": 1.0, "adafactor": 0.05, "lion": 0.01, "sgd": 0.05}


def problem(seed=0):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(64, 80)  # 5120 weights: bitsandbytes keeps smaller ones in 32 bits
    inputs, wanted = torch.randn(32, 64), torch.randn(32, 80)

    def step(optimizer):
        optimizer.zero_grad()
        loss = (layer(inputs) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return layer, step


def groups_of(layer, rate, decay=0.0):
    return [
        {"params": [layer.weight], "lr": rate, "weight_decay": decay, "name": "unet"},
        {"params": [layer.bias], "lr": rate, "weight_decay": decay, "name": "text_encoder"},
    ]


@pytest.mark.parametrize(("name", "eight_bit"), ALL)
def test_learns(name, eight_bit):
    if name in ("adamw8bit", "lion") or eight_bit:
        pytest.importorskip("bitsandbytes")
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    layer, step = problem()
    optimizer = optimizers.create(name.upper(), groups_of(layer, RATES.get(name, 0.01)), eight_bit=eight_bit)
    losses = [step(optimizer) for _ in range(200 if name == "prodigy" else 30)]
    assert losses[-1] < 0.8 * losses[0]
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "prodigy"])
def test_state_is_exact(name, tmp_path):
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    layer, step = problem()

    def make(layer):
        return optimizers.create(name, groups_of(layer, RATES.get(name, 0.01)))

    optimizer = make(layer)
    for _ in range(3):
        step(optimizer)
    weights = {key: value.clone() for key, value in layer.state_dict().items()}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    want = [step(optimizer) for _ in range(3)]
    other, again = problem()
    other.load_state_dict(weights)
    resumed = make(other)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert [again(resumed) for _ in range(3)] == want


def test_each_group_keeps_its_rate_and_decay():
    layer, step = problem()
    groups = groups_of(layer, 0.0)
    groups[1] |= {"lr": 0.1, "weight_decay": 0.5}
    before = layer.weight.clone(), layer.bias.clone()
    step(optimizers.create("adamw", groups))
    assert torch.equal(layer.weight, before[0])
    assert not torch.equal(layer.bias, before[1])
    assert groups[1]["lr"] == 0.1 and set(groups[0]) == {"params", "lr", "weight_decay", "name"}  # left as given


def test_adamw_is_fused_and_counts_like_the_plain_one():
    layer, step = problem()
    fused = optimizers.create("adamw", groups_of(layer, 0.01, 0.01), betas=(0.8, 0.9), eps=1e-6)
    assert fused.defaults["fused"] is True
    other, plain_step = problem()
    plain = torch.optim.AdamW(groups_of(other, 0.01, 0.01), betas=(0.8, 0.9), eps=1e-6, foreach=False, fused=False)
    for _ in range(5):
        step(fused), plain_step(plain)
    assert torch.allclose(layer.weight, other.weight, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "adam"}, "--optimizer adam is unknown"),
        ({"name": "sgd", "eight_bit": True}, "--use_8bit_adam"),
        ({"name": "prodigy", "rates": (1.0, 0.5)}, "--text_encoder_lr"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, says, capsys):
    layer, _ = problem()
    rates = options.pop("rates", (0.01, 0.01))
    groups = [group | {"lr": rate} for group, rate in zip(groups_of(layer, 0.0), rates)]
    with pytest.raises(SystemExit) as stop:
        optimizers.create(groups=groups, **options)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "package"), [("adamw8bit", "bitsandbytes"), ("lion", "bitsandbytes"), ("prodigy", "prodigyopt")]
)
def test_missing_packages_name_their_install_command(name, package, capsys, monkeypatch):
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    layer, _ = problem()
    with pytest.raises(SystemExit) as stop:
        optimizers.create(name, groups_of(layer, 1.0))
    assert stop.value.code == 2
    assert f"pip install {package}" in capsys.readouterr().err


def rates_of(name, total=20, lr=1e-3, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)
    schedule = optimizers.schedule(optimizer, name, total_steps=total, **options)
    found = []
    for _ in range(total + 3):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_are_those_of_diffusers(name, warmup):
    from diffusers.optimization import get_scheduler

    options = {"cycles": 3, "power": 2.0}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    # "constant" with a warm-up that was asked for warms up here; diffusers ignores it.
    theirs = "constant_with_warmup" if name == "constant" else name
    reference = get_scheduler(
        theirs, optimizer, num_warmup_steps=warmup, num_training_steps=20, num_cycles=3, power=2.0
    )
    want = []
    for _ in range(21):  # diffusers' cosine rises again after the last step; ours stays at its end
        want.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates_of(name, warmup_steps=warmup, **options)[:21] == pytest.approx(want, rel=1e-9, abs=1e-15)


def test_warm_up_that_was_not_given():
    assert set(rates_of("constant")) == {1e-3}
    linear = rates_of("linear", total=6000)
    assert linear[250] == pytest.approx(0.5e-3)
    assert linear[500] == pytest.approx(1e-3)
    short = rates_of("cosine", total=100)  # a run shorter than the usual warm-up still reaches its rate
    assert short[10] == pytest.approx(1e-3) and short[99] < 1e-5


def test_schedule_resumes_and_keeps_each_groups_rate():
    def make():
        layer, step = problem()
        groups = groups_of(layer, 0.1)
        groups[1]["lr"] = 0.01
        optimizer = optimizers.create("adamw", groups)
        return optimizer, optimizers.schedule(optimizer, "polynomial", 2, 10), step

    optimizer, schedule, step = make()
    seen = []
    for number in range(8):
        step(optimizer)
        schedule.step()
        seen.append(schedule.get_last_lr())
        if number == 3:
            saved = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule, step = make()
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    again = []
    for _ in range(4):
        step(optimizer)
        schedule.step()
        again.append(schedule.get_last_lr())
    assert again == seen[4:]
    assert all(unet == pytest.approx(10 * text, rel=1e-3) for unet, text in seen[:-1])


def test_unknown_schedule_is_refused(capsys):
    with pytest.raises(SystemExit):
        rates_of("cosin")
    assert "--lr_scheduler cosin is unknown" in capsys.readouterr().err
