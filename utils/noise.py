"""Corruption: clean images -> what the network sees, what it should answer, and how much the answer counts.

Inputs and targets are sums of image and noise with factors that depend on the noise level alone. They are tabulated
once, in float64, and looked up afterwards: a training step is then a few look-ups and multiplications, and nothing
waits for the device. EDM-style training differs from DDPM in this table only.
"""

from typing import NamedTuple

import torch

from utils import errors


class Noisy(NamedTuple):
    inputs: torch.Tensor  # (b, c, h, w), the images' dtype: what the network gets
    timesteps: torch.Tensor  # (b,) int64, or fp32 where the network is told of the noise level another way
    target: torch.Tensor  # (b, c, h, w) fp32: what it should predict
    weight: torch.Tensor  # (b,) fp32: factor of each example's error
    scale: torch.Tensor | None = None  # (b,) fp32: squared error of the objective / that of the prediction (EDM)
    delta: torch.Tensor | None = None  # (b,) fp32: where a Huber loss of the objective's error turns to straight
    loss_type: str = "l2"


# --- Weights of timesteps ----------------------------------------------------------------------------------------


def signal_to_noise(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """SNR(t) = ᾱ_t / (1 - ᾱ_t): Kingma et al. 2021, Variational Diffusion Models, for a variance-preserving process."""
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Min-SNR-γ, Hang et al. 2023 (arXiv 2303.09556): min(SNR, γ) as a weight of the x0 error.

    Errors of other predictions are multiples of the x0 error: SNR times for noise, SNR + 1 times for velocity; the
    weight is divided accordingly. Where SNR = 0 (zero terminal SNR) the noise weight takes its limit, 1, not 0/0.
    """
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    return capped  # "sample"


def debiased_weight(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Debiased estimation, Yu et al. 2023 (arXiv 2310.08442): 1/√SNR as a weight of the noise error.

    That is √SNR of the x0 error, and is divided for velocity as in `min_snr_weight`, so that the objective is the same
    whatever the network predicts.
    """
    return {"epsilon": snr.rsqrt(), "v_prediction": snr.sqrt() / (snr + 1), "sample": snr.sqrt()}[prediction_type]


def timestep_probabilities(
    count: int, strategy: str, multiplier: float, begin: int = 0, end: int = 1000, portion: float = 0.25
) -> torch.Tensor:
    """How often each timestep is drawn: `multiplier` times as often as the others in a chosen part, (count,) float64.

    The part: the first or last `portion` (earlier, later), or begin <= t < end (range). A larger t is more noise.
    """
    often = torch.ones(count, dtype=torch.float64)
    part = int(portion * count)
    chosen = {"earlier": slice(0, part), "later": slice(count - part, count), "range": slice(begin, end)}[strategy]
    often[chosen] *= multiplier
    return often / often.sum()


def huber_delta(sigma: torch.Tensor, c: float, schedule: str, passed: torch.Tensor | None = None) -> torch.Tensor:
    """Scheduled pseudo-Huber, Khrapov et al. 2024 (arXiv 2403.16728), section 4: δ falls from 1 to c with the noise.

    sigma: noise over signal; passed: t / T. "exponential": c^(t/T); "snr": (1 - c) / (1 + σ)² + c; or always c.
    """
    if schedule == "exponential":
        return c**passed
    return (1 - c) / (1 + sigma) ** 2 + c if schedule == "snr" else torch.full_like(sigma, c)


# --- Noise -------------------------------------------------------------------------------------------------------


def multires_noise(draws, shape, iterations: int, discount: float) -> torch.Tensor:
    """Noise that is partly the same over larger and larger patches, of variance 1 in each example: (b, c, h, w).

    Whitaker 2023, Multi-Resolution Noise for Diffusion Model Training: level i has patches of 3^i and counts
    discount^i. As published, level 0 is added to the noise that is already there. There each factor is drawn between
    2 and 4 for a whole batch; here it is 3, so that no example depends on its neighbours.
    """
    channels, height, width = shape
    noise = 2**0.5 * draws.normal("noise", shape)
    for level in range(1, iterations):
        small = [max(1, side // 3**level) for side in (height, width)]
        coarse = draws.normal(f"multires_noise_{level}", (channels, *small))
        noise = noise + discount**level * torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        if 1 in small:
            break
    return noise / noise.flatten(1).std(dim=1).view(-1, 1, 1, 1)


# --- What the network gets and answers, as factors of image and noise: columns (signal, sigma, image, noise) ---------


def ddpm_factors(alphas_cumprod: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """x_t = √ᾱ_t x0 + √(1-ᾱ_t) ε: Ho et al. 2020, equation 4; velocity: Salimans & Ho 2022, appendix D."""
    signal, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    none, one = torch.zeros_like(signal), torch.ones_like(signal)
    target = {"epsilon": (none, one), "v_prediction": (-sigma, signal), "sample": (one, none)}[prediction_type]
    return torch.stack([signal, sigma, *target], dim=-1)


def edm_factors(sigma: torch.Tensor, sigma_data: float, prediction_type: str) -> torch.Tensor:
    """Karras et al. 2022 (arXiv 2206.00364), equation 7 and table 1: D = c_skip x + c_out F(c_in x), x = x0 + σ n.

    F is trained directly: D = x0 when F = (x0 - c_skip x) / c_out, which has no cancellation when written out.
    """
    width = (sigma**2 + sigma_data**2).sqrt()
    sign = {"epsilon": 1, "v_prediction": -1}[prediction_type]
    return torch.stack(
        [1 / width, sigma / width, sign * sigma / sigma_data / width, -sign * sigma_data / width], dim=-1
    )


def edm_scale(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """c_out²: the squared error of x0 / that of F (Karras et al. 2022, table 1)."""
    return (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2)


class Corruption:
    """(images, draws) -> Noisy; `draws` gives `.normal`, `.integers` and `.uniform` by purpose, a row an example.

    Subclasses say how the noise level is drawn and what is tabulated for it: `levels(draws)` gives timesteps (b,) and
    rows (b, 7) of signal, sigma, image, noise, weight, scale, delta.
    """

    def __init__(self, prediction_type, noise_offset, input_perturbation, multires, loss_type):
        self.prediction_type, self.loss_type = prediction_type, loss_type
        self.noise_offset, self.input_perturbation, self.multires = noise_offset, input_perturbation, multires
        self.table = None

    def levels(self, draws) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def __call__(self, images: torch.Tensor, draws) -> Noisy:
        if self.table.device != images.device:
            self.table = self.table.to(images.device)
        clean = images.float()
        timesteps, rows = self.levels(draws)
        if self.multires:
            noise = multires_noise(draws, clean.shape[1:], *self.multires)
        else:
            noise = draws.normal("noise", clean.shape[1:])  # (b, c, h, w)
        if self.noise_offset:
            noise = noise + self.noise_offset * draws.normal("noise_offset", (clean.shape[1], 1, 1))
        mixed = noise
        if self.input_perturbation:
            mixed = noise + self.input_perturbation * draws.normal("input_perturbation", clean.shape[1:])
        weight, scale, delta = rows[:, 4:].unbind(dim=1)
        by_image = rows[:, :4].T.reshape(4, -1, *[1] * (clean.dim() - 1))  # (4, b, 1, 1, 1)
        signal, sigma, of_image, of_noise = by_image
        inputs = signal * clean + sigma * mixed
        target = of_image * clean + of_noise * noise
        return Noisy(inputs.to(images.dtype), timesteps, target, weight, scale, delta, self.loss_type)


class DDPM(Corruption):
    """Timesteps of the model's own schedule: uniform, biased, or those nearest to a log-normal noise level."""

    def __init__(self, scheduler, prediction_type, *common, weigh, scale, delta, often=None, lognormal=None):
        super().__init__(prediction_type, *common)
        alphas_cumprod = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
        snr = signal_to_noise(alphas_cumprod)
        sigma, passed = snr.rsqrt(), torch.arange(len(snr), dtype=torch.float64) / len(snr)
        factors = ddpm_factors(alphas_cumprod, prediction_type)
        more = torch.stack([weigh(snr), scale(snr), delta(sigma, passed)], dim=1)
        self.table = torch.cat([factors, more], dim=1).float()
        # Cut points, so that a draw is one search: below the first is timestep 0.
        self.cuts, self.lognormal = None, lognormal
        if often is not None:
            self.cuts = often.cumsum(0)[:-1].float()
        elif lognormal:
            known = sigma.log().clamp(max=50)  # all noise, at zero terminal SNR
            self.cuts = ((known[1:] + known[:-1]) / 2).float()

    def levels(self, draws) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cuts is None:
            timesteps = draws.integers("timestep", len(self.table))  # (b,)
        else:
            drawn = log_sigmas(draws, *self.lognormal) if self.lognormal else draws.uniform("timestep")
            if self.cuts.device != drawn.device:
                self.cuts = self.cuts.to(drawn.device)
            timesteps = torch.searchsorted(self.cuts, drawn, right=True)
        return timesteps, self.table[timesteps]


class EDM(Corruption):
    """x = x0 + σ n for models with an EDM scheduler: σ uniform on its grid, or log-normal as in the paper.

    On the grid the error of x0 has no weight, as in the scripts that users know; log-normal σ comes with the paper's
    weight 1/c_out², so that the error of F counts as it is.
    """

    def __init__(self, scheduler, prediction_type, *common, delta, lognormal=None):
        super().__init__(prediction_type, *common)
        config = scheduler.config
        self.sigma_data, self.delta, self.lognormal = config.sigma_data, delta, lognormal
        sigmas = scheduler.sigmas[: config.num_train_timesteps].double().cpu()  # of the scheduler, largest first
        self.table = torch.cat([self._rows(sigmas), sigmas.log()[:, None] / 4], dim=1).float()

    def _rows(self, sigma: torch.Tensor) -> torch.Tensor:
        factors, one = edm_factors(sigma, self.sigma_data, self.prediction_type), torch.ones_like(sigma)
        scale = one if self.lognormal else edm_scale(sigma, self.sigma_data)
        return torch.cat([factors, torch.stack([one, scale, self.delta(sigma, None)], dim=1)], dim=1)

    def levels(self, draws) -> tuple[torch.Tensor, torch.Tensor]:
        if self.lognormal:
            drawn = log_sigmas(draws, *self.lognormal)
            return drawn / 4, self._rows(drawn.exp())
        rows = self.table[draws.integers("timestep", len(self.table))]
        return rows[:, -1], rows[:, :-1]  # c_noise = ln(σ) / 4


def log_sigmas(draws, mean: float, std: float) -> torch.Tensor:
    """ln σ ~ N(P_mean, P_std²): Karras et al. 2022, table 1, (b,)."""
    return mean + std * draws.normal("log_sigma", ())


def dream(noisy: Noisy, prediction: torch.Tensor, alphas_cumprod: torch.Tensor, detail: float = 1.0) -> Noisy:
    """DREAM, Zhou et al. 2023 (arXiv 2312.00210), equations 7 and 8, for noise prediction.

    λ = √(1-ᾱ)^detail times the network's present error moves the input, and the target with it: training then meets
    what sampling meets, inputs that the network's own errors have spoiled.
    """
    sigma = (1 - alphas_cumprod.to(noisy.timesteps.device)[noisy.timesteps].float()).sqrt().view(-1, 1, 1, 1)
    delta = sigma**detail * (noisy.target - prediction.float())
    inputs = noisy.inputs.float() + sigma * delta
    return noisy._replace(inputs=inputs.to(noisy.inputs.dtype), target=noisy.target + delta)


def dream_with(family, noisy: Noisy, condition, detail: float = 1.0) -> Noisy:
    """One more forward pass, without gradients, tells what the network would answer."""
    predicts = family.scheduler.config.prediction_type
    if predicts != "epsilon":  # the preflight sees only what is on the disk; for others the formulas are others
        errors.refuse(f"--dream_training is made for epsilon prediction, and this model predicts {predicts}")
    with torch.no_grad():
        prediction = family.predict(noisy.inputs, noisy.timesteps, condition)
    return dream(noisy, prediction, family.scheduler.alphas_cumprod, detail)


def is_edm(scheduler) -> bool:
    return type(scheduler).__name__.startswith("EDM")


def corruption_for(
    scheduler,
    snr_gamma: float | None = None,
    debiased_estimation: bool = False,
    noise_offset: float = 0.0,  # strength of a shift of whole channels, so that very dark and bright can be learnt
    multires_noise_iterations: int = 0,
    multires_noise_discount: float = 0.3,
    input_perturbation: float = 0.0,  # extra noise in the input that the target does not know of
    prediction_type: str | None = None,  # default: what the scheduler's config says
    timestep_bias_strategy: str | None = None,
    timestep_bias_multiplier: float = 1.0,
    timestep_bias_begin: int = 0,
    timestep_bias_end: int = 1000,
    timestep_bias_portion: float = 0.25,
    loss_type: str = "l2",
    huber_c: float = 0.1,
    huber_schedule: str = "snr",
    do_edm_style_training: bool = False,  # always with an EDM scheduler
    edm_sigmas: str = "scheduler",
    edm_p_mean: float = -1.2,
    edm_p_std: float = 1.2,
) -> Corruption:
    prediction_type = prediction_type or scheduler.config.prediction_type
    edm = is_edm(scheduler) or do_edm_style_training
    known = ("epsilon", "v_prediction") if is_edm(scheduler) else ("epsilon", "v_prediction", "sample")
    complaints = []
    if prediction_type not in known:
        complaints.append(f"--prediction_type {prediction_type}: not known here; choose one of {', '.join(known)}.")
    if snr_gamma is not None and not snr_gamma > 0:
        complaints.append(f"--snr_gamma {snr_gamma}: must be above 0 (5.0 is usual); leave it out for equal weights.")
    if edm_sigmas == "lognormal" and not edm:
        complaints.append("--edm_sigmas lognormal needs --do_edm_style_training, or a model with an EDM scheduler.")
    if edm and (snr_gamma is not None or debiased_estimation or timestep_bias_strategy):
        complaints.append("EDM-style training has weights and noise levels of its own: leave out those of DDPM.")
    common = (
        prediction_type,
        noise_offset,
        input_perturbation,
        (multires_noise_iterations, multires_noise_discount) if multires_noise_iterations else None,
        loss_type,
    )
    lognormal = (edm_p_mean, edm_p_std) if edm_sigmas == "lognormal" else None

    def delta(sigma, passed):
        return huber_delta(sigma, huber_c, huber_schedule, passed)

    if is_edm(scheduler):
        if complaints:
            errors.refuse(complaints)
        return EDM(scheduler, *common, delta=delta, lognormal=lognormal)
    count = len(scheduler.alphas_cumprod)
    if timestep_bias_strategy == "range" and timestep_bias_end > count:
        complaints.append(f"--timestep_bias_end {timestep_bias_end}: the model has {count} timesteps.")
    if prediction_type == "epsilon" and float(scheduler.alphas_cumprod[-1]) == 0 and debiased_estimation:
        complaints.append(
            "--debiased_estimation: the last timestep is all noise (zero terminal SNR) and would count infinitely in"
            " epsilon prediction; give --prediction_type v_prediction if that is what the model predicts."
        )
    if complaints:
        errors.refuse(complaints)
    often = None
    if timestep_bias_strategy:
        span = (timestep_bias_begin, timestep_bias_end, timestep_bias_portion)
        often = timestep_probabilities(count, timestep_bias_strategy, timestep_bias_multiplier, *span)

    def weigh(snr):
        if debiased_estimation:
            return debiased_weight(snr, prediction_type)
        return torch.ones_like(snr) if snr_gamma is None else min_snr_weight(snr, snr_gamma, prediction_type)

    def scale(snr):
        """EDM with c_in = 1/√(σ²+1) sees what DDPM shows; its weight σ^-2 of the x0 error is SNR: Min-SNR, γ = ∞."""
        return min_snr_weight(snr, float("inf"), prediction_type) if edm else torch.ones_like(snr)

    return DDPM(scheduler, *common, weigh=weigh, scale=scale, delta=delta, often=often, lognormal=lognormal)
