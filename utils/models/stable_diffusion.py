"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, epsilon or v-prediction."""

import types

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from utils.models.latent_diffusion import LatentDiffusion


class StableDiffusion(LatentDiffusion):
    label = "stable-diffusion"
    encoders = types.MappingProxyType({"text_encoder": CLIPTextModel})
    pipeline_class = StableDiffusionPipeline
    pipeline_options = types.MappingProxyType(
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )

    def _hear(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """{"text": (b, 77, c)}, the encoder's last hidden state, or an earlier one, normalised as the last."""
        tokens = self._tokens(texts)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        if not self.clip_skip:
            return {"text": self._called("text_encoder")(tokens.input_ids, attention_mask=mask)[0]}
        encoder = self._called("text_encoder")
        heard = encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=True)
        hidden = heard.hidden_states[-1 - self.clip_skip]
        inner = getattr(self.text_encoder, "text_model", self.text_encoder)  # transformers 5 has it flat
        # Zero times the last state: layers that are left out get a gradient too, so that several processes agree.
        return {"text": inner.final_layer_norm(hidden) + 0 * heard[0]}
