"""The arithmetic of corruption against closed forms that are computed another way: by hand, in plain Python."""

import math
from types import SimpleNamespace

import pytest
import torch

from utils import noise


class Scheduled:
    """As much of a diffusers scheduler as corruption reads."""

    def __init__(self, alphas_cumprod, prediction_type="epsilon"):
        self.alphas_cumprod = torch.tensor(alphas_cumprod)
        self.config = SimpleNamespace(prediction_type=prediction_type, num_train_timesteps=len(alphas_cumprod))


class FixedDraws:
    """Hands out the given numbers by purpose, so that a test knows every one of them."""

    def __init__(self, timesteps, seed=0):
        self.timesteps, self.seed, self.asked = timesteps, seed, []

    def integers(self, purpose, high):
        assert high > max(self.timesteps)
        return torch.tensor(self.timesteps)

    def normal(self, purpose, shape):
        self.asked.append(purpose)
        generator = torch.Generator().manual_seed(self.seed + sum(map(ord, purpose)))
        return torch.randn((len(self.timesteps), *shape), generator=generator)


ALPHAS = [0.99, 0.8, 0.5, 0.1, 0.0]  # the last is zero terminal SNR
IMAGES = torch.randn((5, 4, 6, 6), generator=torch.Generator().manual_seed(3))
EVERY = [0, 1, 2, 3, 4]


def corrupt(prediction_type="epsilon", images=IMAGES, **options):
    draws = FixedDraws(EVERY)
    return noise.corruption_for(Scheduled(ALPHAS, prediction_type), **options)(images, draws), draws


def test_inputs_follow_the_forward_process():
    noisy, draws = corrupt()
    eps = draws.normal("noise", IMAGES.shape[1:])
    for row, alpha in enumerate(ALPHAS):
        expected = math.sqrt(alpha) * IMAGES[row] + math.sqrt(1 - alpha) * eps[row]
        torch.testing.assert_close(noisy.inputs[row], expected)
    assert noisy.timesteps.tolist() == EVERY
    assert noisy.weight.tolist() == [1.0] * 5


def test_targets_of_the_three_predictions():
    eps = FixedDraws(EVERY).normal("noise", IMAGES.shape[1:])
    torch.testing.assert_close(corrupt("epsilon")[0].target, eps)
    torch.testing.assert_close(corrupt("sample")[0].target, IMAGES)
    velocity = corrupt("v_prediction")[0].target
    for row, alpha in enumerate(ALPHAS):
        # An angle φ with cos φ = √ᾱ turns (x0, ε) into (x_t, v): v is the derivative of x_t by φ.
        phi = math.acos(math.sqrt(alpha))
        torch.testing.assert_close(velocity[row], math.cos(phi) * eps[row] - math.sin(phi) * IMAGES[row])


def test_velocity_and_input_give_back_the_clean_image():
    noisy, _ = corrupt("v_prediction")
    alpha = torch.tensor(ALPHAS).view(-1, 1, 1, 1)
    torch.testing.assert_close(alpha.sqrt() * noisy.inputs - (1 - alpha).sqrt() * noisy.target, IMAGES)


@pytest.mark.parametrize(
    ("prediction_type", "formula"),
    [
        ("epsilon", lambda snr, gamma: min(snr, gamma) / snr if snr else 1.0),
        ("v_prediction", lambda snr, gamma: min(snr, gamma) / (snr + 1)),
        ("sample", lambda snr, gamma: min(snr, gamma)),
    ],
)
def test_min_snr_weights(prediction_type, formula):
    noisy, _ = corrupt(prediction_type, snr_gamma=3.0)
    expected = [formula(alpha / (1 - alpha), 3.0) for alpha in ALPHAS]
    assert noisy.weight.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(noisy.weight).all()
    assert noisy.weight.dtype == torch.float32


def test_min_snr_makes_one_objective_of_the_three_predictions():
    """However the network is parametrised, a given error in x0 must cost the same."""
    alpha, wrong_by = 0.7, 0.3
    snr = torch.tensor([alpha / (1 - alpha)], dtype=torch.float64)
    # The same x0 error, seen as an error of noise or of velocity at fixed x_t.
    errors = {
        "sample": wrong_by,
        "epsilon": wrong_by * math.sqrt(alpha / (1 - alpha)),
        "v_prediction": wrong_by / math.sqrt(1 - alpha),
    }
    costs = [float(noise.min_snr_weight(snr, 1.5, kind)) * error**2 for kind, error in errors.items()]
    assert costs == pytest.approx([costs[0]] * 3)


def test_weights_can_be_differentiated():
    snr = torch.tensor([0.2, 1.0, 4.0, 30.0], dtype=torch.float64, requires_grad=True)
    for kind in noise.TARGETS:
        assert torch.autograd.gradcheck(lambda value, kind=kind: noise.min_snr_weight(value, 5.0, kind), (snr,))


def test_noise_offset_shifts_whole_channels_and_is_part_of_the_target():
    plain, _ = corrupt()
    offset, draws = corrupt(noise_offset=0.1)
    shift = 0.1 * draws.normal("noise_offset", (4, 1, 1))
    torch.testing.assert_close(offset.target - plain.target, shift.expand_as(IMAGES))
    sigma = (1 - torch.tensor(ALPHAS)).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(offset.inputs - plain.inputs, (sigma * shift).expand_as(IMAGES), atol=1e-6, rtol=1e-4)


def test_input_perturbation_is_hidden_from_the_target():
    plain, _ = corrupt("v_prediction")
    perturbed, draws = corrupt("v_prediction", input_perturbation=0.2)
    assert torch.equal(perturbed.target, plain.target)
    sigma = (1 - torch.tensor(ALPHAS)).sqrt().view(-1, 1, 1, 1)
    extra = sigma * 0.2 * draws.normal("input_perturbation", IMAGES.shape[1:])
    torch.testing.assert_close(perturbed.inputs - plain.inputs, extra, atol=1e-6, rtol=1e-4)


def test_options_at_their_defaults_draw_nothing_more():
    _, draws = corrupt()
    assert draws.asked == ["noise"]


def test_half_precision_images_are_mixed_in_full_precision():
    exact, _ = corrupt()
    half, _ = corrupt(images=IMAGES.bfloat16())
    assert half.inputs.dtype == torch.bfloat16
    assert half.target.dtype == torch.float32
    assert torch.equal(half.target, exact.target)


def test_agrees_with_the_scheduler_of_diffusers():
    from diffusers import DDPMScheduler

    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind, steps_offset=1
        )
        draws = FixedDraws([0, 1, 500, 998, 999])
        noisy = noise.corruption_for(scheduler, snr_gamma=5.0)(IMAGES, draws)
        eps = draws.normal("noise", IMAGES.shape[1:])
        torch.testing.assert_close(noisy.inputs, scheduler.add_noise(IMAGES, eps, noisy.timesteps))
        if kind == "v_prediction":
            torch.testing.assert_close(noisy.target, scheduler.get_velocity(IMAGES, eps, noisy.timesteps))


def test_refuses_what_it_cannot_honour(capsys):
    for scheduler, options in (
        (Scheduled(ALPHAS), {"prediction_type": "noise"}),
        (Scheduled(ALPHAS), {"snr_gamma": 0.0}),
        (Scheduled(ALPHAS), {"snr_gamma": float("nan")}),
    ):
        with pytest.raises(SystemExit) as stopped:
            noise.corruption_for(scheduler, **options)
        assert stopped.value.code == 2
        assert next(iter(options)) in capsys.readouterr().err
