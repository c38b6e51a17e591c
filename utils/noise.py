"""Corruption: clean images -> what the network sees, what it should answer, and how much the answer counts.

Everything that depends only on the timestep is tabulated once, in float64, and looked up afterwards: a training step
is then three look-ups and a few multiplications, and nothing waits for the device.
"""

from typing import NamedTuple

import torch

from utils import errors


class Noisy(NamedTuple):
    inputs: torch.Tensor  # (b, c, h, w), the images' dtype: what the network gets
    timesteps: torch.Tensor  # (b,) int64
    target: torch.Tensor  # (b, c, h, w) fp32: what it should predict
    weight: torch.Tensor  # (b,) fp32: factor of each example's error


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


def epsilon_target(images, noise, signal, sigma):
    return noise


def velocity_target(images, noise, signal, sigma):
    """v = √ᾱ ε - √(1-ᾱ) x0: Salimans & Ho 2022, Progressive Distillation, appendix D."""
    return signal * noise - sigma * images


def sample_target(images, noise, signal, sigma):
    return images


TARGETS = {"epsilon": epsilon_target, "v_prediction": velocity_target, "sample": sample_target}


class DDPM:
    """x_t = √ᾱ_t x0 + √(1-ᾱ_t) ε with t uniform: Ho et al. 2020, equation 4."""

    def __init__(
        self,
        scheduler,
        prediction_type: str,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,  # strength of a shift of whole channels, so that very dark and bright can be learnt
        input_perturbation: float = 0.0,  # extra noise in the input that the target does not know of
    ):
        alphas_cumprod = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
        snr = signal_to_noise(alphas_cumprod)
        weight = torch.ones_like(snr) if snr_gamma is None else min_snr_weight(snr, snr_gamma, prediction_type)
        # One row a timestep: √ᾱ, √(1-ᾱ), weight.
        self.table = torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), weight], dim=1).float()
        self.prediction_type = prediction_type
        self.target = TARGETS[prediction_type]
        self.noise_offset, self.input_perturbation = noise_offset, input_perturbation

    def __call__(self, images: torch.Tensor, draws) -> Noisy:
        if self.table.device != images.device:
            self.table = self.table.to(images.device)
        clean = images.float()
        timesteps = draws.integers("timestep", len(self.table))  # (b,)
        noise = draws.normal("noise", clean.shape[1:])  # (b, c, h, w)
        if self.noise_offset:
            noise = noise + self.noise_offset * draws.normal("noise_offset", (clean.shape[1], 1, 1))
        signal, sigma, weight = self.table[timesteps].unbind(dim=1)
        signal, sigma = (column.view(-1, *[1] * (clean.dim() - 1)) for column in (signal, sigma))  # (b, 1, 1, 1)
        mixed = noise
        if self.input_perturbation:
            mixed = noise + self.input_perturbation * draws.normal("input_perturbation", clean.shape[1:])
        inputs = signal * clean + sigma * mixed
        return Noisy(inputs.to(images.dtype), timesteps, self.target(clean, noise, signal, sigma), weight)


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
    with torch.no_grad():
        prediction = family.predict(noisy.inputs, noisy.timesteps, condition)
    return dream(noisy, prediction, family.scheduler.alphas_cumprod, detail)


STYLES = {"ddpm": DDPM}


def corruption_for(
    scheduler,
    snr_gamma: float | None = None,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
    prediction_type: str | None = None,  # default: what the scheduler's config says
    style: str = "ddpm",
):
    """(images, draws) -> Noisy. `draws` gives `.normal(purpose, shape)` and `.integers(purpose, high)` per example."""
    prediction_type = prediction_type or scheduler.config.prediction_type
    if prediction_type not in TARGETS:
        errors.refuse(f"--prediction_type {prediction_type}: not known; choose one of {', '.join(TARGETS)}.")
    if snr_gamma is not None and not snr_gamma > 0:
        errors.refuse(f"--snr_gamma {snr_gamma}: must be above 0 (5.0 is usual); leave it out for equal weights.")
    return STYLES[style](scheduler, prediction_type, snr_gamma, noise_offset, input_perturbation)
