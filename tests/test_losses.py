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


def blob(*rows):
    """Masks (b, 1, H, W) uint8 from rows of weights, each worth one cell of 2 x 2 pixels; 0.5: its left half."""
    cells = torch.tensor(rows).repeat_interleave(2, 1).repeat_interleave(2, 2)  # (b, H, W)
    left = torch.arange(cells.shape[-1]) % 2 == 0
    return (torch.where(cells == 0.5, left.float(), cells) * 255).to(torch.uint8).unsqueeze(1)


@pytest.mark.parametrize("unmasked", [0.0, 0.25])
def test_masked_error_is_divided_by_the_covered_area(unmasked):
    weights = [[[1.0, 0.5], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]
    prediction, target = numbers(2, 3, 2, 2), numbers(2, 3, 2, 2, seed=1)
    expected = []
    for row in range(2):
        above = below = 0.0
        for channel in range(3):
            for y in range(2):
                for x in range(2):
                    weight = max(weights[row][y][x], 0) + unmasked * (1 - weights[row][y][x])
                    difference = prediction[row, channel, y, x].item() - target[row, channel, y, x].item()
                    above, below = above + weight * difference**2, below + weight
        expected.append(above / below)
    found = losses.squared_error(prediction, target, blob(*weights), unmasked)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_nothing_outside_of_a_mask_is_learned():
    mask = blob([[1.0, 0.0], [0.5, 0.0]])
    for unmasked in (0.0, 0.1):
        prediction = numbers(1, 3, 2, 2).requires_grad_()
        losses.squared_error(prediction, numbers(1, 3, 2, 2, seed=1), mask, unmasked).sum().backward()
        assert (prediction.grad[..., 0] != 0).all() and bool((prediction.grad[..., 1] == 0).all()) == (unmasked == 0)
    double = numbers(1, 3, 2, 2, dtype=torch.float64).requires_grad_()
    target = numbers(1, 3, 2, 2, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: losses.squared_error(p, target, mask, 0.1), (double,))


@pytest.mark.parametrize("unmasked", [0.0, 0.3])
def test_a_white_mask_is_no_mask_bit_for_bit(unmasked):
    results = []
    for mask in (None, torch.full((3, 1, 24, 40), 255, dtype=torch.uint8)):
        prediction = numbers(3, 4, 3, 5).requires_grad_()
        error = losses.squared_error(prediction, numbers(3, 4, 3, 5, seed=1), mask, unmasked)
        (error * torch.tensor([0.3, 1.0, 7.0])).sum().backward()
        results.append((error.detach(), prediction.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_a_crop_beside_the_mask_has_no_error_and_no_gradient():
    prediction = numbers(1, 4, 2, 2).requires_grad_()
    error = losses.squared_error(prediction, numbers(1, 4, 2, 2, seed=1), torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    error.sum().backward()
    assert error.item() == 0 and not prediction.grad.any()


def test_dreambooth_weights_then_groups_then_averages():
    error = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    weight = torch.tensor([0.5, 3.0, 0.25, 7.0, 1.0])
    is_class = torch.tensor([False, True, False, True, False])
    instance = (1 * 0.5 + 4 * 0.25 + 16 * 1.0) / 3
    total, parts = losses.dreambooth(error, weight, is_class, 0.7)
    assert total.item() == pytest.approx(instance + 0.7 * (2 + 8) / 2)
    told = {name: (part.mean.item(), part.found.item()) for name, part in parts.items()}
    assert told == {"instance": (pytest.approx(instance), 1), "prior": (5, 1)}, "before their weights"
    weighed, _ = losses.dreambooth(error, weight, is_class, 0.7, weigh_class=True)
    assert weighed.item() == pytest.approx(instance + 0.7 * (2 * 3 + 8 * 7) / 2)
    without, parts = losses.dreambooth(error, weight, is_class, 0.7, instance_weight=0)
    assert without.item() == pytest.approx(0.7 * 5) and parts["instance"].mean.item() == pytest.approx(instance)


def test_dreambooth_does_not_care_about_the_order_of_a_batch():
    error, weight = numbers(6).square(), numbers(6, seed=1).square()
    is_class = torch.tensor([False, True, True, False, True, False])
    shuffle = torch.tensor([3, 1, 5, 0, 2, 4])
    expected, _ = losses.dreambooth(error, weight, is_class, 1.0)
    shuffled, _ = losses.dreambooth(error[shuffle], weight[shuffle], is_class[shuffle], 1.0)
    torch.testing.assert_close(shuffled, expected)


def test_dreambooth_without_class_images_is_the_weighted_mean():
    error, weight = numbers(4).square(), numbers(4, seed=1).square()
    alone, parts = losses.dreambooth(error, weight, torch.zeros(4, dtype=torch.bool), 1.0)
    torch.testing.assert_close(alone, losses.average(error, weight))
    torch.testing.assert_close(alone.item(), (error * weight).sum().item() / 4)
    assert [part.found.item() for part in (*parts.values(), losses.part(error[:0]))] == [1, 0, 0]
    assert losses.part(error).mean.item() == pytest.approx(sum(error.tolist()) / 4)


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_the_loss_of_zeros_is_the_loss_of_a_prediction_of_zeros(loss_type):
    """Same targets, weights, masks, scale and groups: measured by the functions that measure the loss."""
    target, prediction = numbers(5, 4, 2, 2), numbers(5, 4, 2, 2, seed=1).requires_grad_()
    deltas, scale = numbers(5, seed=2).square() + 0.1, numbers(5, seed=3).square()
    noisy = described(target, loss_type, deltas, scale)
    noisy = noisy._replace(weight=numbers(5, seed=4).square()) if hasattr(noisy, "_replace") else noisy
    mask = (255 * torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(5))).to(torch.uint8)
    is_class = torch.tensor([False, True, False, True, False])

    def whole(prediction):
        return losses.dreambooth(losses.error(prediction, noisy, mask, 0.2), noisy.weight, is_class, 0.7)[0]

    error = losses.error(prediction, noisy, mask, 0.2)
    found = losses.against_zero(error, noisy, {"mask": mask, "is_class": is_class}, 0.2, 0.7)
    torch.testing.assert_close(found, torch.stack([whole(prediction), whole(0 * prediction)]).detach())
    assert not found.requires_grad
    alone = losses.against_zero(losses.error(prediction, noisy), noisy, {})
    torch.testing.assert_close(alone[0], losses.average(losses.error(prediction, noisy), noisy.weight).detach())


def test_gradients_are_exact():
    prediction = numbers(4, 2, 3, 3, dtype=torch.float64).requires_grad_()
    target = numbers(4, 2, 3, 3, seed=1, dtype=torch.float64).requires_grad_()
    weight = numbers(4, seed=2, dtype=torch.float64).square()
    is_class = torch.tensor([False, True, False, True])
    assert torch.autograd.gradcheck(losses.squared_error, (prediction, target))

    def whole(prediction, target):
        return losses.dreambooth(losses.squared_error(prediction, target), weight, is_class, 0.5)[0]

    assert torch.autograd.gradcheck(whole, (prediction, target))
    assert torch.autograd.gradcheck(lambda p: losses.average(losses.squared_error(p, target), weight), (prediction,))


def described(target, loss_type="l2", delta=None, scale=None):
    from utils.noise import Noisy

    return Noisy(target, None, target, None, scale, delta, loss_type)


@pytest.mark.parametrize(
    ("loss_type", "formula"),
    [
        ("l2", lambda d, c: d * d),
        ("l1", lambda d, c: abs(d)),
        ("huber", lambda d, c: 2 * c * ((d * d + c * c) ** 0.5 - c)),
        ("smooth_l1", lambda d, c: 2 * ((d * d + c * c) ** 0.5 - c)),
    ],
)
def test_every_distance_against_its_formula(loss_type, formula):
    """Of the objective's error, √scale times that of the prediction: Huber's δ is in its units."""
    prediction, target = numbers(3, 2, 4, 4, dtype=torch.float64), numbers(3, 2, 4, 4, seed=1, dtype=torch.float64)
    deltas, scale = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64), torch.tensor([1.0, 3.0, 0.5])
    got = losses.error(prediction, described(target, loss_type, deltas, scale))
    for row in range(3):
        pairs = zip(prediction[row].flatten().tolist(), target[row].flatten().tolist())
        factor = scale[row].item() ** 0.5
        mean = sum(formula(factor * (p - t), deltas[row].item()) for p, t in pairs) / 32
        assert got[row].item() == pytest.approx(mean)
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: losses.error(p, described(target, loss_type, deltas, scale)), (prediction,)
    )


def test_huber_lies_between_square_and_straight():
    d = torch.tensor([[0.01], [3.0]], dtype=torch.float64)
    near, far = torch.full((2,), 1e3, dtype=torch.float64), torch.full((2,), 1e-6, dtype=torch.float64)
    zero = torch.zeros_like(d)
    torch.testing.assert_close(losses.error(d, described(zero, "huber", near)), d[:, 0] ** 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.error(d, described(zero, "smooth_l1", far)), 2 * d[:, 0], rtol=1e-3, atol=0)
    flat = torch.zeros(1, 1, requires_grad=True)
    losses.error(flat, described(torch.zeros(1, 1), "huber", torch.tensor([0.1]))).sum().backward()
    assert flat.grad == 0  # and not 0/0
