"""In-painting models: the UNet also sees which part of a picture is hidden, and the rest of that picture.

Training hides another random part of every photo each time, as the model was trained; the loss is of the whole picture.
"""

import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline

from utils.models.sdxl import StableDiffusionXL
from utils.models.stable_diffusion import StableDiffusion


def random_holes(draws, height: int, width: int) -> torch.Tensor:
    """A rectangle or an ellipse for each example, of any size and wholly inside the picture: (b, 1, H, W), 1 = hidden.

    As the DreamBooth in-painting script of diffusers' research projects draws them.
    """
    device = draws.device

    def extent(side: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Distance of each pixel from the hole's middle in halves of its size: (b, side)."""
        size = (draws.uniform(f"hole_{name}") * side).view(-1, 1)
        middle = size / 2 + draws.uniform(f"hole_{name}_place").view(-1, 1) * (side - size)
        return (torch.arange(side, device=device) + 0.5 - middle).abs() / (size / 2).clamp(min=0.5)

    down, across = extent(height, "height")[:, :, None], extent(width, "width")[:, None, :]  # (b, H, 1), (b, 1, W)
    rectangle, ellipse = (down <= 1) & (across <= 1), down.square() + across.square() <= 1
    is_ellipse = draws.integers("hole_shape", 2).bool().view(-1, 1, 1)
    return torch.where(is_ellipse, ellipse, rectangle).float()[:, None]


class Inpainting:
    """Put before a family: its UNet's input is noisy latents (4 channels), mask (1), latents of what is seen (4)."""

    more_channels = 5
    caches_latents = False  # a part of each picture is encoded that was not seen before

    def condition(self, batch: dict, draws=None) -> dict[str, torch.Tensor]:
        pixels = batch["pixels"]
        holes = random_holes(draws, *pixels.shape[-2:]).to(pixels.device)
        seen = self._sampled(*self.posterior(pixels * (1 - holes)), draws, "posterior_seen")
        small = torch.nn.functional.interpolate(holes, size=seen.shape[-2:])  # nearest, as the pipelines do
        return super().condition(batch, draws) | {"around": torch.cat([small, seen], dim=1)}  # (b, 5, h, w)

    def predict(self, inputs: torch.Tensor, timesteps: torch.Tensor, condition: dict) -> torch.Tensor:
        return super().predict(torch.cat([inputs, condition["around"].to(inputs.dtype)], dim=1), timesteps, condition)


class StableDiffusionInpainting(Inpainting, StableDiffusion):
    label = "stable-diffusion-inpainting"
    pipeline_class = StableDiffusionInpaintPipeline


class StableDiffusionXLInpainting(Inpainting, StableDiffusionXL):
    label = "stable-diffusion-xl-inpainting"
    pipeline_class = StableDiffusionXLInpaintPipeline
