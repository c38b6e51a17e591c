"""Losses against sums written out in plain Python, and their gradients against finite differences."""

import pytest
import torch

from utils import losses


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_squared_error_is_one_mean_per_example():
    prediction, target = numbers(3, 2, 4, 4), numbers(3, 2, 4, 4, seed=1)
    expected = [
        sum((p - t) ** 2 for p, t in zip(prediction[row].flatten().tolist(), target[row].flatten().tolist())) / 32
        for row in range(3)
    ]
    assert losses.squared_error(prediction, target).tolist() == pytest.approx(expected, rel=1e-6)


def test_squared_error_ignores_a_predicted_variance():
    mean, variance, target = numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=5), numbers(2, 3, 4, 4, seed=1)
    both = losses.squared_error(torch.cat([mean, variance], dim=1), target)
    assert torch.equal(both, losses.squared_error(mean, target))


def test_squared_error_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="does not match"):
        losses.squared_error(numbers(2, 4, 4, 4), numbers(1, 4, 4, 4))


def test_half_precision_is_summed_in_full():
    prediction = numbers(2, 4, 8, 8).bfloat16()
    error = losses.squared_error(prediction, numbers(2, 4, 8, 8, seed=1))
    assert error.dtype == torch.float32
    assert torch.equal(error, losses.squared_error(prediction.float(), numbers(2, 4, 8, 8, seed=1)))


def test_dreambooth_weights_then_groups_then_averages():
    error = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    weight = torch.tensor([0.5, 3.0, 0.25, 7.0, 1.0])
    is_class = torch.tensor([False, True, False, True, False])
    instance = (1 * 0.5 + 4 * 0.25 + 16 * 1.0) / 3
    assert losses.dreambooth(error, weight, is_class, 0.7).item() == pytest.approx(instance + 0.7 * (2 + 8) / 2)
    weighed = losses.dreambooth(error, weight, is_class, 0.7, weigh_class=True).item()
    assert weighed == pytest.approx(instance + 0.7 * (2 * 3 + 8 * 7) / 2)


def test_dreambooth_does_not_care_about_the_order_of_a_batch():
    error, weight = numbers(6).square(), numbers(6, seed=1).square()
    is_class = torch.tensor([False, True, True, False, True, False])
    shuffle = torch.tensor([3, 1, 5, 0, 2, 4])
    expected = losses.dreambooth(error, weight, is_class, 1.0)
    torch.testing.assert_close(losses.dreambooth(error[shuffle], weight[shuffle], is_class[shuffle], 1.0), expected)


def test_dreambooth_without_class_images_is_the_weighted_mean():
    error, weight = numbers(4).square(), numbers(4, seed=1).square()
    alone = losses.dreambooth(error, weight, torch.zeros(4, dtype=torch.bool), 1.0)
    torch.testing.assert_close(alone, losses.average(error, weight))
    torch.testing.assert_close(alone.item(), (error * weight).sum().item() / 4)


def test_gradients_are_exact():
    prediction = numbers(4, 2, 3, 3, dtype=torch.float64).requires_grad_()
    target = numbers(4, 2, 3, 3, seed=1, dtype=torch.float64).requires_grad_()
    weight = numbers(4, seed=2, dtype=torch.float64).square()
    is_class = torch.tensor([False, True, False, True])
    assert torch.autograd.gradcheck(losses.squared_error, (prediction, target))

    def whole(prediction, target):
        return losses.dreambooth(losses.squared_error(prediction, target), weight, is_class, 0.5)

    assert torch.autograd.gradcheck(whole, (prediction, target))
    assert torch.autograd.gradcheck(lambda p: losses.average(losses.squared_error(p, target), weight), (prediction,))
