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

    def uniform(self, purpose):
        return torch.tensor([(timestep + 0.5) / 5 for timestep in self.timesteps])

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
    for kind in ("epsilon", "v_prediction", "sample"):
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


# --- Weights, distances and noises of choice ---------------------------------------------------------------------


def test_debiased_estimation_is_one_objective_of_the_three_predictions():
    alpha, wrong_by = 0.7, 0.3
    snr = torch.tensor([alpha / (1 - alpha)], dtype=torch.float64)
    errors = {
        "sample": wrong_by,
        "epsilon": wrong_by * math.sqrt(alpha / (1 - alpha)),
        "v_prediction": wrong_by / math.sqrt(1 - alpha),
    }
    costs = [float(noise.debiased_weight(snr, kind)) * error**2 for kind, error in errors.items()]
    assert costs == pytest.approx([math.sqrt(alpha / (1 - alpha)) * wrong_by**2] * 3)
    assert float(noise.debiased_weight(snr, "epsilon")) == pytest.approx(math.sqrt((1 - alpha) / alpha))
    scheduled = Scheduled(ALPHAS[:4])
    noisy = noise.corruption_for(scheduled, debiased_estimation=True)(IMAGES[:4], FixedDraws(EVERY[:4]))
    assert noisy.weight.tolist() == pytest.approx([math.sqrt((1 - alpha) / alpha) for alpha in ALPHAS[:4]], rel=1e-6)
    snr = torch.tensor([0.2, 1.0, 4.0, 30.0], dtype=torch.float64, requires_grad=True)
    for kind in ("epsilon", "v_prediction", "sample"):
        assert torch.autograd.gradcheck(lambda value, kind=kind: noise.debiased_weight(value, kind), (snr,))


@pytest.mark.parametrize(
    ("strategy", "chosen"), [("earlier", range(20)), ("later", range(80, 100)), ("range", range(30, 50))]
)
def test_timestep_bias_draws_a_part_more_often(strategy, chosen):
    from utils.randomness import Draws

    options = {"timestep_bias_multiplier": 3.0, "timestep_bias_portion": 0.2}
    options |= {"timestep_bias_begin": 30, "timestep_bias_end": 50, "timestep_bias_strategy": strategy}
    corruption = noise.corruption_for(Scheduled(torch.linspace(0.99, 0.01, 100).tolist()), **options)
    ids = range(20000)
    drawn = corruption(torch.zeros(len(ids), 1, 1, 1), Draws(3, ids)).timesteps
    share = sum((drawn == timestep).sum().item() for timestep in chosen) / len(ids)
    assert share == pytest.approx(20 * 3 / (80 + 20 * 3), abs=0.015)  # four standard deviations
    assert drawn.min() == 0 and drawn.max() == 99
    alone = corruption(torch.zeros(1, 1, 1, 1), Draws(3, [17])).timesteps
    assert alone == drawn[17]


def test_multires_noise_is_the_sum_of_its_levels_with_variance_one():
    options = {"multires_noise_iterations": 6, "multires_noise_discount": 0.4}
    images = torch.zeros(5, 4, 6, 9)
    noisy, draws = corrupt(images=images, **options)
    fine = draws.normal("noise", (4, 6, 9))
    middle, coarse = draws.normal("multires_noise_1", (4, 2, 3)), draws.normal("multires_noise_2", (4, 1, 1))
    assert draws.asked.count("multires_noise_2") == 2 and "multires_noise_3" not in draws.asked
    for row in range(5):
        # Bilinear between cell centres, written out: cells are 3 wide, what lies beyond the outer centres is level.
        wide = torch.empty(4, 6, 9)
        for y in range(6):
            for x in range(9):
                v, u = (min(max((place + 0.5) / 3 - 0.5, 0), most) for place, most in ((y, 1), (x, 2)))
                top, left = min(int(v), 0), min(int(u), 1)
                a, b = v - top, u - left
                cell = middle[row, :, top : top + 2, left : left + 2]
                wide[:, y, x] = (1 - a) * ((1 - b) * cell[:, 0, 0] + b * cell[:, 0, 1]) + a * (
                    (1 - b) * cell[:, 1, 0] + b * cell[:, 1, 1]
                )
        whole = math.sqrt(2) * fine[row] + 0.4 * wide + 0.16 * coarse[row]
        torch.testing.assert_close(noisy.target[row], whole / whole.std())


def test_huber_deltas_fall_from_one_to_c():
    noisy, _ = corrupt(loss_type="huber", huber_c=0.2)
    sigmas = [math.sqrt((1 - alpha) / alpha) if alpha else math.inf for alpha in ALPHAS]
    assert noisy.delta.tolist() == pytest.approx([0.8 / (1 + sigma) ** 2 + 0.2 for sigma in sigmas])
    noisy, _ = corrupt(loss_type="huber", huber_c=0.2, huber_schedule="exponential")
    assert noisy.delta.tolist() == pytest.approx([math.exp(-k / 5 * -math.log(0.2)) for k in EVERY])
    noisy, _ = corrupt(loss_type="huber", huber_c=0.2, huber_schedule="constant")
    assert noisy.delta.tolist() == pytest.approx([0.2] * 5) and noisy.loss_type == "huber"


# --- EDM ---------------------------------------------------------------------------------------------------------


def objective(noisy, prediction):
    from utils import losses

    return losses.error(prediction, noisy)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_branch_written_out(kind):
    """x0 + σ n, scaled for the network, its answer turned into x0, its error weighted by σ^-2."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, prediction_type=kind)
    draws = FixedDraws([0, 10, 400, 800, 999])
    noisy = noise.corruption_for(scheduler, do_edm_style_training=True)(IMAGES, draws)
    ordinary = noise.corruption_for(scheduler)(IMAGES, draws)
    prediction = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(8))
    eps = draws.normal("noise", IMAGES.shape[1:])
    sigma = scheduler.sigmas[[999 - t for t in draws.timesteps]].double().view(-1, 1, 1, 1)  # descending
    x = IMAGES.double() + sigma * eps
    torch.testing.assert_close(noisy.inputs, (x / (sigma**2 + 1).sqrt()).float(), atol=1e-5, rtol=1e-4)
    guess = (
        x - sigma * prediction
        if kind == "epsilon"
        else -sigma / (sigma**2 + 1).sqrt() * prediction + x / (sigma**2 + 1)
    )
    written_out = sigma.flatten() ** -2 * (guess - IMAGES).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(objective(noisy, prediction).double(), written_out, rtol=1e-3, atol=0)
    # The identities: for epsilon nothing changes, for v the weight is SNR / (SNR + 1).
    snr = scheduler.alphas_cumprod[draws.timesteps] / (1 - scheduler.alphas_cumprod[draws.timesteps])
    factor = 1 if kind == "epsilon" else snr / (snr + 1)
    torch.testing.assert_close(objective(noisy, prediction), factor * objective(ordinary, prediction))
    assert torch.equal(noisy.inputs, ordinary.inputs) and torch.equal(noisy.timesteps, ordinary.timesteps)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_agrees_with_the_scheduler_of_diffusers(kind, schedule):
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(prediction_type=kind, sigma_schedule=schedule)
    draws = FixedDraws([0, 1, 500, 998, 999])
    noisy = noise.corruption_for(scheduler)(IMAGES, draws)
    sigma = scheduler.sigmas[draws.timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy.timesteps, scheduler.timesteps[draws.timesteps], rtol=1e-4, atol=1e-5)
    x = IMAGES + sigma * draws.normal("noise", IMAGES.shape[1:])
    torch.testing.assert_close(noisy.inputs, scheduler.precondition_inputs(x, sigma), rtol=1e-4, atol=1e-5)
    prediction = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(8))
    guess = scheduler.precondition_outputs(x.double(), prediction.double(), sigma.double())
    unweighted = (guess - IMAGES).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(objective(noisy, prediction).double(), unweighted, rtol=1e-3, atol=1e-9)


def by_hand(kind, error, delta):
    """Each loss of an error, written out; δ is in the units of the error."""
    curve = (error.square() + delta**2).sqrt() - delta
    found = {"l2": error.square(), "l1": error.abs(), "huber": 2 * delta * curve, "smooth_l1": 2 * curve}[kind]
    return found.flatten(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("grid", ["edm", "euler"])
def test_every_distance_of_edm_is_of_the_error_it_is_about(grid, kind, loss_type, masked):
    """Of x0 on an EDM scheduler's levels, of x0 / σ with any other; and so is its gradient."""
    from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

    from utils import losses

    options = {"loss_type": loss_type, "huber_c": 0.2}
    draws = FixedDraws([0, 10, 400, 800, 998])
    if grid == "edm":
        scheduler = EDMEulerScheduler(prediction_type=kind)
        sigma = scheduler.sigmas[draws.timesteps]
    else:
        scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, prediction_type=kind)
        sigma, options["do_edm_style_training"] = scheduler.sigmas[[999 - t for t in draws.timesteps]], True
    sigma = sigma.double().view(-1, 1, 1, 1)
    noisy = noise.corruption_for(scheduler, **options)(IMAGES, draws)
    x = IMAGES.double() + sigma * draws.normal("noise", IMAGES.shape[1:])
    mask = (torch.arange(36).view(1, 1, 6, 6) < 20).expand(5, 1, 6, 6).to(torch.uint8) * 255 if masked else None
    prediction = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(8)).double()
    ours, theirs = (prediction.clone().requires_grad_() for _ in range(2))
    if grid == "edm":
        error = scheduler.precondition_outputs(x, theirs, sigma) - IMAGES
    else:
        guess = x - sigma * theirs if kind == "epsilon" else x / (sigma**2 + 1) - sigma / (sigma**2 + 1).sqrt() * theirs
        error = (guess - IMAGES) / sigma
    expected = by_hand(loss_type, error, 0.8 / (1 + sigma) ** 2 + 0.2)
    if masked:
        expected = expected.view(5, 4, 36)[:, :, :20].flatten(1)
    expected, found = expected.mean(dim=1), losses.error(ours, noisy, mask)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-9)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-7)


def test_log_normal_levels_come_with_the_papers_weight():
    from diffusers import EDMEulerScheduler

    from utils.randomness import Draws

    options = {"edm_sigmas": "lognormal", "edm_p_mean": -0.5, "edm_p_std": 0.7}
    corruption, ids = noise.corruption_for(EDMEulerScheduler(), **options), range(4000)
    noisy = corruption(torch.zeros(len(ids), 1, 2, 2), Draws(3, ids))
    levels = 4 * noisy.timesteps  # ln σ
    assert levels.mean().item() == pytest.approx(-0.5, abs=0.05) and levels.std().item() == pytest.approx(0.7, abs=0.04)
    # λ c_out² = (σ² + σ_d²) / (σ σ_d)² · (σ σ_d)² / (σ² + σ_d²) = 1: Karras et al. 2022, equation 8.
    assert (noisy.scale * noisy.weight == 1).all()
    # With a DDPM schedule: the timestep whose level is nearest.
    scheduled = Scheduled(torch.linspace(0.99, 0.01, 100).tolist())
    noisy = noise.corruption_for(scheduled, do_edm_style_training=True, **options)(
        torch.zeros(4000, 1, 2, 2), Draws(3, ids)
    )
    known = ((1 - scheduled.alphas_cumprod) / scheduled.alphas_cumprod).log() / 2
    nearest = (levels[:, None] - known).abs().argmin(dim=1)
    assert (noisy.timesteps == nearest).float().mean() > 0.999  # but for ties in rounding


def test_edm_factors_can_be_differentiated():
    sigma = torch.tensor([0.01, 0.5, 3.0, 60.0], dtype=torch.float64, requires_grad=True)
    for kind in ("epsilon", "v_prediction"):
        assert torch.autograd.gradcheck(lambda value, kind=kind: noise.edm_factors(value, 0.5, kind), (sigma,))
    assert torch.autograd.gradcheck(lambda value: noise.edm_scale(value, 0.5), (sigma,))


def test_a_schedule_that_ends_in_noise_stays_finite():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] == 0
    for options in (
        {"snr_gamma": 5.0},
        {"debiased_estimation": True},
        {"loss_type": "huber"},
        {"do_edm_style_training": True},
    ):
        draws = FixedDraws([0, 1, 500, 998, 999])
        noisy = noise.corruption_for(scheduler, **options)(IMAGES, draws)
        assert all(torch.isfinite(part).all() for part in noisy if isinstance(part, torch.Tensor)), options
        assert torch.equal(noisy.inputs[4], draws.normal("noise", IMAGES.shape[1:])[4])


CHANGES = [
    {"loss_type": "huber"},
    {"loss_type": "huber", "huber_c": 0.01},
    {"loss_type": "huber", "huber_schedule": "exponential"},
    {"loss_type": "smooth_l1"},
    {"loss_type": "l1"},
    {"debiased_estimation": True},
    {"multires_noise_iterations": 4},
    {"multires_noise_iterations": 4, "multires_noise_discount": 0.8},
    {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 1e3},
    {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 1e3, "timestep_bias_portion": 0.01},
    {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 1e3, "timestep_bias_end": 10},
    {"prediction_type": "v_prediction", "do_edm_style_training": True},
    {"do_edm_style_training": True, "edm_sigmas": "lognormal"},
    {"do_edm_style_training": True, "edm_sigmas": "lognormal", "edm_p_mean": 1.0},
]


def test_every_option_changes_the_error_and_no_example_knows_its_neighbours():
    from diffusers import DDPMScheduler

    from utils.randomness import Draws

    def errors_of(ids, options):
        noisy = noise.corruption_for(DDPMScheduler(), **options)(IMAGES[: len(ids)] * 0 + 0.3, Draws(2, ids))
        return noisy.weight * objective(noisy, torch.full_like(noisy.target, 0.1)) + noisy.inputs[:, 0, 0, 0]

    seen = [errors_of([4, 9, 2], {}).tolist()]
    for options in CHANGES:
        whole = errors_of([4, 9, 2], options)
        torch.testing.assert_close(whole, torch.cat([errors_of([number], options) for number in (4, 9, 2)]))
        assert torch.isfinite(whole).all() and whole.tolist() not in seen, options
        seen.append(whole.tolist())
