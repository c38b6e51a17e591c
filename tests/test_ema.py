"""The average of weights: its formula, its exact swap and its exact state."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils import learning
from utils.ema import Average


class Learns:
    """What an average needs of networks or adapters."""

    def __init__(self, named):
        self.named = lambda: named

    def save(self, folder, mark):
        save_file({name: weight.detach().clone() for name, weight in self.named().items()}, folder / f"w{mark}")

    def load(self, folder, mark):
        learning.copy_from(folder / f"w{mark}", self.named())


def weights():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.nn.Parameter(torch.randn(3, 4, generator=generator)), "b": torch.nn.Parameter(torch.ones(2))}


def walk(named, step):
    with torch.no_grad():
        for weight in named.values():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))


@pytest.mark.parametrize("offload", [False, True])
def test_follows_the_formula(offload):
    named = weights()
    average = Average(Learns(named), decay=0.5, offload=offload)
    want = {key: weight.detach().double() for key, weight in named.items()}
    for step in range(1, 30):
        walk(named, step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        want = {key: decay * want[key] + (1 - decay) * named[key].detach().double() for key in named}
    for key, value in average.state().items():
        assert torch.allclose(value.double(), want[key], atol=1e-6)
    assert (average.decay_at(1), average.decay_at(10**6)) == (2 / 11, 0.5)


def test_swap_shows_the_averages_and_restores_every_bit(tmp_path):
    named = weights()
    average = Average(Learns(named))
    for step in range(1, 4):
        walk(named, step)
        average.update(step)
    raw = {key: weight.clone() for key, weight in named.items()}
    kept = {key: value.clone() for key, value in average.state().items()}
    places = [weight.data_ptr() for weight in named.values()]
    with pytest.raises(KeyError):
        with average.swapped():
            assert all(torch.equal(named[key], kept[key]) for key in named)
            assert not torch.equal(named["a"], raw["a"])
            for forbidden in (average.state, lambda: average.update(4), lambda: average.load(tmp_path)):
                with pytest.raises(RuntimeError):
                    forbidden()
            raise KeyError  # also when drawing fails
    assert all(torch.equal(named[key], raw[key]) for key in named)
    assert all(torch.equal(average.state()[key], kept[key]) for key in named)
    assert places == [weight.data_ptr() for weight in named.values()]


@pytest.mark.parametrize("offload", [False, True])
def test_a_loaded_average_goes_on_as_if_never_stopped(tmp_path, offload):
    straight = weights()
    one = Average(Learns(straight), decay=0.9)
    for step in range(1, 9):
        walk(straight, step)
        one.update(step)
        if step == 4:
            raw = {key: weight.clone() for key, weight in straight.items()}
            one.write(tmp_path, one.state())
            assert all(torch.equal(straight[key], raw[key]) for key in raw), "the weights are themselves again"
            resumed = {key: torch.nn.Parameter(weight.detach().clone()) for key, weight in straight.items()}
    two = Average(Learns(resumed), decay=0.9, offload=offload)  # starts at the weights of step 4, not at their average
    before = two.state()["a"].clone()
    two.load(tmp_path)
    assert not torch.equal(two.state()["a"], before) and torch.equal(resumed["a"], raw["a"])
    for step in range(5, 9):
        walk(resumed, step)
        two.update(step)
    assert all(torch.equal(one.state()[key], two.state()[key]) for key in straight)


def test_what_whole_weights_are_written_through_may_be_others(tmp_path):
    """As under FSDP: while weights are whole they are other tensors than those that are averaged."""
    named = weights()
    learns = Learns(named)
    average = Average(learns)
    walk(named, 1)
    state = {key: value.clone() for key, value in average.state().items()}
    whole = {key: torch.nn.Parameter(weight.detach().clone()) for key, weight in named.items()}
    learns.named = lambda: whole
    average.write(tmp_path, {key: value.clone() for key, value in state.items()})
    stored = load_file(tmp_path / "w_ema")
    assert all(torch.equal(stored[key], state[key]) and torch.equal(whole[key], named[key]) for key in state)


def test_foreign_averages_are_refused(tmp_path, capsys):
    average = Average(Learns(weights()))
    for state, told in (
        ({}, "holds no averaged weights to go on with; leave --use_ema out"),
        ({"a": torch.zeros(3, 4)}, "missing b"),
        ({"a": torch.zeros(4, 3), "b": torch.zeros(2)}, "a is (4, 3), expected (3, 4)"),
    ):
        if state:
            save_file(state, tmp_path / "w_ema")
        with pytest.raises(SystemExit):
            average.load(tmp_path)
        assert told in capsys.readouterr().err
    assert average.state()["b"].tolist() == [1, 1], "they stay what they were"


def test_does_not_alias_the_weights():
    named = weights()
    average = Average(Learns(named))
    walk(named, 1)
    assert not torch.equal(average.state()["a"], named["a"])
    assert not any(value.requires_grad for value in average.state().values())
