"""The average of weights: its formula, its exact swap and its exact state."""

import pytest
import torch

from utils.ema import Average


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
    average = Average(named, decay=0.5, offload=offload)
    want = {key: weight.detach().double() for key, weight in named.items()}
    for step in range(1, 30):
        walk(named, step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        want = {key: decay * want[key] + (1 - decay) * named[key].detach().double() for key in named}
    for key, value in average.state().items():
        assert torch.allclose(value.double(), want[key], atol=1e-6)
    assert (average.decay_at(1), average.decay_at(10**6)) == (2 / 11, 0.5)


def test_swap_shows_the_averages_and_restores_every_bit():
    named = weights()
    average = Average(named)
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
            for forbidden in (average.state, lambda: average.update(4), lambda: average.restore(kept)):
                with pytest.raises(RuntimeError):
                    forbidden()
            raise KeyError  # also when drawing fails
    assert all(torch.equal(named[key], raw[key]) for key in named)
    assert all(torch.equal(average.state()[key], kept[key]) for key in named)
    assert places == [weight.data_ptr() for weight in named.values()]


def test_a_restored_average_goes_on_as_if_never_stopped():
    straight = weights()
    one = Average(straight, decay=0.9)
    for step in range(1, 9):
        walk(straight, step)
        one.update(step)
        if step == 4:
            saved = {key: value.clone() for key, value in one.state().items()}
            resumed = {key: torch.nn.Parameter(weight.detach().clone()) for key, weight in straight.items()}
    two = Average(resumed, decay=0.9)  # starts at the weights of step 4, not at their average
    assert not torch.equal(two.state()["a"], saved["a"])
    two.restore(saved)
    for step in range(5, 9):
        walk(resumed, step)
        two.update(step)
    assert all(torch.equal(one.state()[key], two.state()[key]) for key in straight)


def test_foreign_state_is_refused():
    average = Average(weights())
    with pytest.raises(ValueError, match="other weights"):
        average.restore({"a": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="expected"):
        average.restore({"a": torch.zeros(4, 3), "b": torch.zeros(2)})


def test_takes_a_list_and_does_not_alias_the_weights():
    named = weights()
    average = Average(list(named.values()))
    walk(named, 1)
    assert not torch.equal(average.state()["0"], named["a"])
    assert not any(value.requires_grad for value in average.state().values())
