"""Steps within the backward pass: the same numbers, one gradient at a time; and weights in bf16 that still learn."""

import copy
import json
import shlex

import pytest
import torch
import toy_training

from utils import optimizers, weightwise

# The schedule is set back before the first step, and a CPU has no memory to page from.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of:UserWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]


class Networks(torch.nn.Module):
    """Two layers in groups of their own, the first used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = torch.nn.Linear(70, 70), torch.nn.Linear(70, 64)

    def forward(self, inputs):
        return self.two(torch.relu(self.one(torch.relu(self.one(inputs)))))

    def groups(self):
        groups = [{"params": list(part.parameters()), "weight_decay": 0.01} for part in (self.one, self.two)]
        return [group | {"lr": rate, "name": str(rate)} for group, rate in zip(groups, (1e-2, 2e-2))]


def learn(name, fused, steps=5, dtype=torch.float32, resumed=None):
    networks = Networks().to(dtype)
    optimizer = optimizers.create(name, networks.groups(), eight_bit="8bit" in name)
    schedule = optimizers.schedule(optimizer, "cosine", total_steps=10)
    inside = weightwise.FusedBackward(optimizer, seed=5) if fused else None
    first = 0
    if resumed:
        first, weights, state = resumed
        networks.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        schedule.last_epoch = first - 1
        schedule.step()
    norms, alive = [], []
    for weight in networks.parameters():  # behind the hooks that step
        weight.register_post_accumulate_grad_hook(lambda _: alive.append(gradients(networks)))
    for number in range(first + 1, first + steps + 1):
        inputs = torch.randn(8, 70, generator=torch.Generator().manual_seed(number)).to(dtype)
        loss = networks(inputs).square().mean()
        if inside:
            inside.begin(number, loss)
        loss.backward()
        norms.append(
            inside.norm() if inside else torch.nn.utils.get_total_norm([p.grad for p in networks.parameters()])
        )
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return networks, optimizer, torch.stack(norms), max(alive)


def gradients(networks):
    return sum(weight.grad is not None for weight in networks.parameters())


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "paged_adamw8bit"])
def test_fused_is_as_not_fused_and_holds_no_gradient(name):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    ordinary, _, norms, all_at_once = learn(name, fused=False)
    fused, _, same, left = learn(name, fused=True)
    assert all(torch.equal(one, other) for one, other in zip(ordinary.parameters(), fused.parameters(), strict=True))
    assert torch.allclose(norms, same, rtol=1e-6)
    assert (all_at_once, left) == (4, 0), "each was freed before the next was complete"


def test_a_loss_that_is_no_number_moves_nothing():
    networks = Networks()
    optimizer = optimizers.create("adamw", networks.groups())
    inside, before = weightwise.FusedBackward(optimizer), copy.deepcopy(networks.state_dict())
    loss = networks(torch.full((1, 70), 1e30)).square().mean() * 1e30
    inside.begin(1, loss)
    loss.backward()
    assert all(torch.equal(before[name], value) for name, value in networks.state_dict().items())
    assert not gradients(networks) and not inside.norm().isfinite()


def test_a_step_of_pictures_that_the_run_ends_for_moves_nothing(tmp_path):
    how = {"max_norm": None, "fused": True}
    with pytest.raises(SystemExit) as stop:
        toy_training.train(tmp_path / "run", lost=4, **how)
    assert stop.value.code == 3 and (tmp_path / "run" / "checkpoint-3").is_dir()
    assert toy_training.train(tmp_path / "run", resume="latest", **how) == toy_training.train(tmp_path / "whole", **how)


def test_rounding_by_chance_is_right_on_average_and_a_function_of_its_seed():
    values = torch.tensor([1.0, 1.001, -3.14159, 1e-20, 0.0, float("inf"), -float("inf")])
    drawn = torch.stack([weightwise.rounded_by_chance(values, seed).float() for seed in range(4000)])
    assert torch.equal(drawn[:, [0, 4, 5, 6]], values[[0, 4, 5, 6]].expand(4000, 4)), "these bf16 can hold"
    for place in (1, 2, 3):
        found = drawn[:, place].unique()
        assert len(found) == 2 and found[0] < values[place] < found[1], "its two neighbours"
        error = 4 * (found[1] - found[0]) / 2 / 4000**0.5
        assert (drawn[:, place].mean() - values[place]).abs() < error
    many = torch.randn(1000)
    assert torch.equal(weightwise.rounded_by_chance(many, 7), weightwise.rounded_by_chance(many, 7))
    assert not torch.equal(weightwise.rounded_by_chance(many, 7), weightwise.rounded_by_chance(many, 8))
    assert weightwise.rounded_by_chance(torch.tensor(float("nan")), 1).isnan()


def test_small_updates_count_in_bf16():
    """A thousand steps of 1e-4 on weights of 1, where the last digit of bf16 is 0.004."""
    weight = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    inside = weightwise.FusedBackward(optimizer)
    for number in range(1000):
        loss = weight.sum()
        inside.begin(number, loss)
        loss.backward()
    assert weight.dtype == torch.bfloat16 and abs(weight.float().mean().item() - 0.9) < 0.005
    nearest = torch.ones(500, dtype=torch.bfloat16)
    for _ in range(1000):
        nearest -= 1e-4
    assert nearest.eq(1).all(), "rounding to the nearest never moves"


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw8bit"])
def test_bf16_goes_on_exactly(name):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    whole, optimizer, *_ = learn(name, True, 6, torch.bfloat16)
    half, state, *_ = learn(name, True, 3, torch.bfloat16)
    again, *_ = learn(name, True, 3, torch.bfloat16, resumed=(3, half.state_dict(), state.state_dict()))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    kinds = {value.dtype for row in optimizer.state.values() for key, value in row.items() if torch.is_tensor(value)}
    assert torch.bfloat16 not in kinds, "moments are finer than the weights"


@pytest.fixture
def train(sd1, photos, tmp_path):
    import train_dreambooth

    def call(options, name="run"):
        given = f"--pretrained_model_name_or_path '{sd1}' --instance_data_dir '{photos}' --instance_prompt 'sks dog'"
        given += f" --output_dir '{tmp_path / name}' --report_to none --seed 3 --train_batch_size 2 --resolution 64"
        given += " --learning_rate 1e-3 --checkpointing_steps 0 --max_train_steps 4"
        train_dreambooth.main(train_dreambooth.parse_args(shlex.split(f"{given} {options}")))
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [(row["loss"], round(row["grad_norm"], 4)) for row in rows]

    return call


def test_scripts_give_the_same_losses_either_way(train):
    expected = train("--max_grad_norm 0 --train_text_encoder", "ordinary")
    assert train("--max_grad_norm 0 --train_text_encoder --fused_backward", "fused") == expected and len(expected) == 4


def test_scripts_in_bf16_resume_exactly(train, tmp_path):
    from safetensors.torch import load_file

    options = "--max_grad_norm 0 --fused_backward --train_weights_in bf16 --checkpointing_steps 2"
    whole = train(options, "whole")
    train(options, "parts")
    for left in ("report.html", "model_index.json"):
        (tmp_path / "parts" / left).unlink()
    (tmp_path / "parts" / "checkpoint-4").rename(tmp_path / "parts" / "gone")
    assert train(f"{options} --resume_from_checkpoint latest", "parts") == whole
    file = "unet/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("whole", "parts"))
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, two[name]) for name, value in one.items())


def test_what_needs_all_gradients_is_refused_by_name(train, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SystemExit) as stop:
        train("--fused_backward --gradient_accumulation_steps 2 --on_nan skip --optimizer prodigy")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    for name in ("--gradient_accumulation_steps", "--max_grad_norm", "--mixed_precision fp16", "--on_nan skip"):
        assert f"--fused_backward with {name}" in said
    assert "--optimizer prodigy: it estimates" in said
    with pytest.raises(SystemExit):
        train("--train_weights_in bf16 --use_ema")
    said = capsys.readouterr().err
    assert "--train_weights_in bf16 needs --fused_backward" in said and "--use_ema: too coarse" in said
