"""Stable Diffusion XL: two CLIP text encoders, and a UNet that is also told how a picture was sized and cropped."""

import types
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from utils import errors, models
from utils.models import clip
from utils.models.latent_diffusion import LatentDiffusion


class StableDiffusionXL(LatentDiffusion):
    label = "stable-diffusion-xl"
    encoders = types.MappingProxyType({"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection})
    tokenizers = ("tokenizer", "tokenizer_2")
    pipeline_class = StableDiffusionXLPipeline

    def __init__(self, name: str, revision: str | None = None, variant: str | None = None, **options):
        super().__init__(name, revision, variant, **options)
        index = models.read_index(name, revision)
        self.zeros_for_nothing = index.get("force_zeros_for_empty_prompt", True)
        # No watermark: class images are trained on.
        self.pipeline_options = {"force_zeros_for_empty_prompt": self.zeros_for_nothing, "add_watermarker": False}

    def load(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        tokenizer: str | None = None,
        vae: str | None = None,
        parts: Sequence[str] | None = None,
    ) -> None:
        if tokenizer:
            errors.refuse(f"--tokenizer_name {tokenizer}: SDXL has two tokenizers, which one is unclear; leave it out")
        super().load(device, dtype, tokenizer, vae, parts)

    def _read_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """In fp32 unless its config says that half precision is safe: the original's activations overflow fp16."""
        vae = super()._read_vae(torch.float32)
        return clip.in_own_precision(vae if vae.config.force_upcast else vae.to(dtype))

    # --- Conditions --------------------------------------------------------------------------------------------

    def _hear(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """{"text": both encoders' last hidden state but one (or more), (b, 77, c1 + c2), "pooled": (b, p)}."""
        hidden = []
        for part, name in zip(self.tokenizers, self.encoders):
            ids = self._tokens(texts, part).input_ids
            heard = self._called(name)(ids, output_hidden_states=True)
            hidden.append(heard.hidden_states[-2 - self.clip_skip])
            if name == "text_encoder" and heard[0].requires_grad:
                # Its last layers are never listened to. A gradient of zero instead of none lets several processes
                # agree on what has been computed.
                hidden[-1] = hidden[-1] + 0 * heard[0].mean()
        return {"text": torch.cat([part.to(hidden[0].dtype) for part in hidden], dim=-1), "pooled": heard[0]}

    def condition(self, batch: dict, draws=None) -> dict[str, torch.Tensor]:
        words = self._silenced(super().condition(batch, draws), batch["captions"])
        return words | {"time_ids": self.time_ids(batch)}

    def time_ids(self, batch: dict) -> torch.Tensor:
        """Original height and width, top and left of the crop, height and width now: (b, 6).

        Always fp32: bf16 cannot tell 1023 from 1024. Podell et al. 2023 (arXiv 2307.01952), section 2.2.
        """
        if "pixels" in batch:
            height, width = batch["pixels"].shape[-2:]
        else:
            height, width = (side * self.shrinking for side in batch["latent_mean"].shape[-2:])
        original, crop = (batch[name].to(self.device, torch.float32) for name in ("original_size", "crop_top_left"))
        now = torch.tensor([height, width], dtype=torch.float32, device=self.device).expand_as(crop)
        return torch.cat([original, crop, now], dim=1)

    def _more_conditions(self, condition: dict) -> dict:
        pooled = condition["pooled"].to(self.unet.conv_in.weight.dtype)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": condition["time_ids"]}}

    def _not_wanted(self, negative: list[str]) -> dict[str, torch.Tensor]:
        return self._silenced(self._encoded(negative), negative)

    def _silenced(self, words: dict[str, torch.Tensor], texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """As the stock pipeline does: most models have learned zeros where nothing is said. With --caption_dropout
        they learn what guidance will compare with."""
        if not self.zeros_for_nothing or all(texts):
            return words
        empty = torch.tensor([not text for text in texts], device=self.device)
        return {name: rows.masked_fill(empty.view(-1, *[1] * (rows.dim() - 1)), 0) for name, rows in words.items()}
