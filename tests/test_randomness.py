"""Draws and data order are pure functions: the properties that exact resuming and batch splitting rest on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import randomness
from utils.randomness import Draws

SEEDS = st.integers(-(2**70), 2**70)


def test_seeds_are_pinned():
    """Another value here would change every run that is resumed."""
    assert randomness.seed_of(0, "noise", 1) == 4331743028374165210
    assert list(randomness.order(0, 0, 8)) == [7, 6, 5, 0, 2, 3, 4, 1]
    assert torch.equal(Draws(0, [1]).integers("timestep", 1000), torch.tensor([674]))


@given(SEEDS, st.integers(0, 2**40), st.integers(0, 2**40))
def test_seeds_are_63_bit_and_unrelated(seed, one, other):
    value = randomness.seed_of(seed, "noise", one)
    assert 0 <= value < 2**63
    assert (value == randomness.seed_of(seed, "noise", other)) == (one == other)
    assert value != randomness.seed_of(seed + 1, "noise", one) and value != randomness.seed_of(seed, "crop", one)
    assert randomness.seed_of(seed, "x", 1, 23) != randomness.seed_of(seed, "x", 12, 3)


@given(SEEDS, st.integers(0, 10**6), st.integers(1, 200))
def test_an_epoch_is_a_permutation(seed, epoch, count):
    assert sorted(randomness.order(seed, epoch, count)) == list(range(count))


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 30), st.integers(0, 5))
def test_the_stream_shows_every_example_once_an_epoch(seed, count, epoch):
    shown = [randomness.slot(seed, position, count) for position in range(epoch * count, (epoch + 1) * count)]
    assert sorted(shown) == list(range(count))


def test_epochs_and_purposes_differ():
    orders = [list(randomness.order(3, epoch, 50)) for epoch in range(3)]
    orders += [list(randomness.order(3, 0, 50, "class order")), list(randomness.order(4, 0, 50))]
    assert len({tuple(one) for one in orders}) == 5


@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_positions_of_all_ranks_are_disjoint_and_complete(step, accumulate, world, batch):
    seen = [
        position
        for micro in range(accumulate)
        for rank in range(world)
        for position in randomness.positions(step, micro, rank, batch=batch, world=world, accumulate=accumulate)
    ]
    examples = accumulate * world * batch
    assert seen == list(range(step * examples, (step + 1) * examples))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=6, unique=True), st.data())
def test_a_row_depends_on_its_id_only(ids, data):
    whole = Draws(5, ids)
    cut = data.draw(st.integers(0, len(ids)))
    parts = [Draws(5, torch.tensor(ids[:cut], dtype=torch.int64)), Draws(5, ids[cut:])]
    for draw in (
        lambda draws: draws.normal("noise", (4, 3, 2)),
        lambda draws: draws.integers("timestep", 1000),
        lambda draws: draws.uniform("drop"),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))
    assert torch.equal(whole.normal("noise", (4, 3, 2)), Draws(5, ids).normal("noise", (4, 3, 2))), "asked twice"


def test_draws_have_the_promised_shapes_and_statistics():
    draws = Draws(0, range(4000))
    noise = draws.normal("noise", (2, 4))
    assert noise.shape == (4000, 2, 4) and noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1].abs() < 0.02
    steps = draws.integers("timestep", 10)
    assert steps.dtype == torch.int64 and steps.bincount(minlength=10).min() > 320 and steps.max() == 9
    uniform = draws.uniform("drop")
    assert uniform.dtype == torch.float32 and uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.std() - 12**-0.5) < 0.02
    assert Draws(0, [3]).normal("offset", (4, 1, 1)).shape == (1, 4, 1, 1)


def test_purposes_and_seeds_do_not_share_numbers():
    noise = Draws(0, [1]).normal("noise", (100,))
    for other in (Draws(0, [1]).normal("posterior", (100,)), Draws(1, [1]).normal("noise", (100,))):
        assert not torch.isclose(noise, other).any()


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Draws(0, [1, 2]).normal("noise", (3,))
    assert torch.equal(torch.rand(3), expected)


def test_dropout_seeds_differ_between_steps_micro_batches_and_ranks():
    drawn = set()
    for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        randomness.seed_step(7, *numbers)
        first = torch.rand(1).item()
        randomness.seed_step(7, *numbers)
        assert torch.rand(1).item() == first
        drawn.add(first)
    assert len(drawn) == 4


def test_another_process_draws_the_same():
    """Python's own hash() would not: it is salted in each process."""
    code = "from utils.randomness import *; print(seed_of(3, 'é', 4), list(order(1, 2, 9)), Draws(1, [2]).uniform('x'))"
    there = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    here = f"{randomness.seed_of(3, 'é', 4)} {list(randomness.order(1, 2, 9))} {Draws(1, [2]).uniform('x')}"
    assert there.stdout.strip() == here, there.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_numbers():
    here, there = Draws(0, range(3)), Draws(0, range(3), "cuda")
    assert torch.equal(here.normal("noise", (4, 8, 8)), there.normal("noise", (4, 8, 8)).cpu())
    assert torch.equal(here.integers("timestep", 1000), there.integers("timestep", 1000).cpu())
