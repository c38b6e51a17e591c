"""The queries of one layer: how they are taken, how a photo gets to the bank's timesteps, how they are compared."""

from collections.abc import Callable, Iterator, Sequence

import torch

from utils import losses


class Tap:
    """Inside `with tap:` a layer's output is kept in `taken`; outside there is no hook, and so nothing to pay."""

    def __init__(self, module: torch.nn.Module, layer: str):
        self.layer, self.taken, self._hook = module.get_submodule(layer), None, None

    def __enter__(self) -> "Tap":
        self.taken = None
        self._hook = self.layer.register_forward_hook(self._take)
        return self

    def __exit__(self, *problem) -> None:
        # Before backward: activations that are computed a second time there are not taken again.
        self._hook.remove()

    def _take(self, module, inputs, output) -> None:
        self.taken = output


def keep_activations(module: torch.nn.Module, layer: str) -> None:
    """The smallest block around `layer` that would compute its activations twice keeps them: what is taken inside a
    checkpoint gets lost when that is compiled."""
    parts = layer.split(".")
    around = [module.get_submodule(".".join(parts[:stop])) for stop in range(len(parts), 0, -1)]
    for block in around:
        if getattr(block, "gradient_checkpointing", False):
            block.gradient_checkpointing = False
            return


def timesteps_of(steps: int, total: int) -> list[int]:
    """`steps` of `total` timesteps, each in the middle of what it stands for."""
    return [(2 * k + 1) * total // (2 * steps) for k in range(steps)]


def invert(
    predict: Callable,  # (latents, timestep) => what the network predicts
    latents: torch.Tensor,  # clean
    alphas_cumprod: torch.Tensor,
    timesteps: Sequence[int],  # rising
    prediction_type: str = "epsilon",
    back: bool = False,  # the way back to the photo is what is wanted: its reconstruction
) -> Iterator[tuple[int | None, torch.Tensor]]:
    """x_t = √ᾱ_t x̂0 + √(1-ᾱ_t) ε̂ from one timestep to the next noisier one: Song et al. 2020 (arXiv 2010.02502),
    equation 12 without its noise, in the direction of noise and, if asked, back again.

    Yields (number of a timestep, its latents) once for each, as soon as it was predicted; None is the number of those
    on the way there if the way back is wanted. Each is predicted at latents that belong to it, so the way there needs
    no second pass.
    """
    alphas = alphas_cumprod.double()
    signal, sigma = alphas.sqrt().tolist(), (1 - alphas).sqrt().tolist()
    at, first = latents, timesteps[0]
    clean, noise = latents, _parts(predict(latents, first), at, signal[first], sigma[first], prediction_type)[1]
    numbers = range(len(timesteps))
    way = [*numbers, *numbers[-2::-1]] if back else numbers  # the last timestep is the turning point
    for step, number in enumerate(way):
        t = timesteps[number]
        at = signal[t] * clean + sigma[t] * noise
        found = predict(at, t)
        yield (number if step >= len(way) - len(numbers) else None), at
        clean, noise = _parts(found, at, signal[t], sigma[t], prediction_type)


def _parts(found, at, signal: float, sigma: float, prediction_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(clean latents, noise) that a prediction means."""
    if prediction_type == "epsilon":
        return (at - sigma * found) / max(signal, 1e-12), found
    if prediction_type == "v_prediction":  # Salimans & Ho 2022, appendix D
        return signal * at - sigma * found, sigma * at + signal * found
    return found, (at - signal * found) / max(sigma, 1e-12)  # "sample"


def difference(
    queries: torch.Tensor,  # (b, tokens, c) of the network that learns
    wanted: torch.Tensor,  # (b, tokens, c) of the bank
    mask: torch.Tensor | None = None,  # (b, 1, H, W) uint8, square, as in losses.masked_mean
    unmasked_weight: float = 0.0,
) -> torch.Tensor:
    """Mean squared difference of each photo's queries, where its mask is white: (b,)."""
    side = round(queries.shape[1] ** 0.5)
    queries, wanted = (rows.transpose(1, 2).unflatten(2, (side, side)) for rows in (queries, wanted))  # (b, c, s, s)
    return losses.squared_error(queries, wanted, mask, unmasked_weight)
