"""What Stable Diffusion and Stable Diffusion XL have in common: CLIP text and a UNet on the latents of a VAE.

A family says which text encoders it has, how they are heard, and what its UNet and pipeline are called with.
"""

import copy
import inspect
import os
import pickle
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from utils import captions, errors, models, samplers, saved
from utils.models import clip

# A bar for every network that is read would bury the one that counts.
transformers_logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()

UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")  # the attention projections
ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
# Raised for what is missing, damaged, of another shape, or a pickle that holds more than tensors.
UNREADABLE = (OSError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError)
ON_DEVICE = 256 * 2**20  # bytes of cached prompts kept beside the model; a larger table stays in main memory


class LatentDiffusion:
    """One model's networks, and how to feed, call, sample and save them.

    `unet`, `vae` and the text encoders are always the plain modules. What prepares them for training (DDP,
    torch.compile) hands its wrapper to `use`; only the training forward goes through it, so no wrapper reaches a file
    or pipeline.
    """

    label = ""  # its name in model cards
    encoders = types.MappingProxyType({})  # text encoder -> its class
    tokenizers = ("tokenizer",)  # one for each encoder
    pipeline_class, pipeline_options = DiffusionPipeline, types.MappingProxyType({})
    more_channels = 0  # of the UNet's input, beside the noisy latents
    caches_latents = True  # whether every picture is encoded alike each time it is seen

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        variant: str | None = None,
        prediction_type: str | None = None,  # instead of the one the model's scheduler names
        allow_pickle: bool = False,  # weights that are no safetensors; even then only tensors are read from them
        rescale_betas_zero_snr: bool = False,  # a noise schedule that ends in pure noise, whatever the model's own does
        clip_skip: int | None = None,  # last layers of the text encoders that are left out
        vae_tiling: bool = False,  # the VAE works on a large picture in overlapping tiles
    ):
        self.name, self.revision, self.variant = name, revision, variant
        self.prediction_type, self.rescale_betas_zero_snr = prediction_type, rescale_betas_zero_snr
        self.clip_skip, self.vae_tiling = clip_skip or 0, vae_tiling
        self.use_safetensors = None if allow_pickle else True  # None: preferred
        self.path = os.path.expanduser(models.resolve(name))
        self.names = ("unet", *self.encoders, "vae")
        self.lora_targets = {"unet": UNET_TARGETS} | dict.fromkeys(self.encoders, ENCODER_TARGETS)
        for part in (*self.names, *self.tokenizers, "scheduler", "own_scheduler"):
            setattr(self, part, None)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.vae_source = self.tokenizer_source = None
        self._wrapped = {}  # name -> what the training forward calls instead of the plain module
        self._prompts = {}  # text -> {"text": (77, c), ...}, where every text was encoded once
        self.stored_prompts = {}  # the same, of texts that were encoded before the run (precomputed.Texts)
        self._warned, self._vae_works = set(), False
        self.abstractions = {}  # word in prompts -> tokens that were learned for it
        self.settled = False  # text encoders that learned no longer do
        self.retargeted = False  # what is to be predicted is not what the base model has learned to predict

    # --- Loading -----------------------------------------------------------------------------------------------

    def load(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        tokenizer: str | None = None,  # --tokenizer_name: another folder or hub name
        vae: str | None = None,  # --pretrained_vae_model_name_or_path: another folder or hub name
        parts: Sequence[str] | None = None,  # which of the networks; None: all
    ) -> None:
        """Read the networks, frozen, in evaluation mode and in `dtype`. What is to learn is raised to fp32 later."""
        self.device, self.dtype = torch.device(device), dtype
        self.vae_source, self.tokenizer_source = vae and models.resolve(vae), tokenizer
        kind = models.component_class(self.name, self.revision, "scheduler")
        self.own_scheduler = self._as_trained(self._read(kind, "scheduler", weights=False))
        edm = type(self.own_scheduler).__name__.startswith("EDM")
        self.scheduler = self.own_scheduler if edm else DDPMScheduler.from_config(self.own_scheduler.config)
        for part in self.tokenizers:
            setattr(self, part, self._read_tokenizer(part))
        for name in self.names if parts is None else parts:
            self.load_module(name, dtype)

    def _as_trained(self, scheduler):
        if self.prediction_type:
            self.retargeted = self.prediction_type != scheduler.config.prediction_type
            scheduler.register_to_config(prediction_type=self.prediction_type)
        if self.rescale_betas_zero_snr:
            known = "rescale_betas_zero_snr" in inspect.signature(type(scheduler).__init__).parameters
            kind = type(scheduler) if known else DDIMScheduler
            # Trailing: sampling must begin at the last timestep, where there is nothing but noise.
            changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            changes |= samplers.not_clipped(scheduler.config)
            if scheduler.config.get("use_karras_sigmas"):  # see samplers.NOT_ZERO_SNR
                changes["use_karras_sigmas"] = False
            scheduler = kind.from_config(scheduler.config, **changes)
        return scheduler

    def load_module(self, name: str, dtype: torch.dtype) -> torch.nn.Module:
        """(Re)read one network. Full training calls it for fp32: raising rounded half-precision weights loses bits."""
        setattr(self, name, None)  # before the new one is read: never two copies in memory
        setattr(self, name, self._read_module(name, dtype).to(self.device).eval().requires_grad_(False))
        return getattr(self, name)

    def _read_module(self, name: str, dtype: torch.dtype) -> torch.nn.Module:
        if name in self.encoders:
            return self._with_layers_to_skip(self._read(self.encoders[name], name, dtype=dtype))
        if name == "vae":
            vae = self._read_vae(dtype)
            if self.vae_tiling:
                vae.enable_tiling()
                vae.enable_slicing()  # and one picture after the other
            return vae
        unet = self._read(UNet2DConditionModel, name, torch_dtype=dtype)
        if unet.config.in_channels != unet.config.out_channels + self.more_channels:
            errors.refuse(
                f"--pretrained_model_name_or_path {self.name}: its UNet takes {unet.config.in_channels} channels, "
                f"and a {self.pipeline_class.__name__}, which its model_index.json names, is trained with "
                f"{unet.config.out_channels + self.more_channels}: 4 for text-to-image, 9 for in-painting"
            )
        return unet

    def _with_layers_to_skip(self, encoder: torch.nn.Module) -> torch.nn.Module:
        if self.clip_skip >= encoder.config.num_hidden_layers - 1:
            errors.refuse(
                f"--clip_skip {self.clip_skip}: a text encoder of {self.name} has {encoder.config.num_hidden_layers}"
                " layers; 1 or 2 are usual"
            )
        return encoder

    def _read_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        if self.vae_source:
            try:  # a VAE of its own, or the one inside a whole pipeline
                return AutoencoderKL.from_pretrained(self.vae_source, torch_dtype=dtype, **self._weights())
            except OSError:
                return self._read(AutoencoderKL, "vae", source=self.vae_source, torch_dtype=dtype)
        return self._read(AutoencoderKL, "vae", torch_dtype=dtype)

    def _read(self, cls, folder: str, source: str | None = None, weights: bool = True, **options):
        if weights:
            options |= self._weights() | {"variant": self.variant if source is None else None}
        if source is None:
            options["revision"] = self.revision
        try:
            return cls.from_pretrained(source or self.path, subfolder=folder, **options)
        except UNREADABLE as problem:
            self._refuse(source or self.name, folder, problem)

    def _weights(self) -> dict:
        return {"use_safetensors": self.use_safetensors}

    def _refuse(self, source: str, part: str, problem: Exception) -> NoReturn:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        wanted = (
            "safetensors (or, with --allow_pickle, a pickle)" if self.use_safetensors else "tensors and nothing else"
        )
        variant = f", variant {self.variant}" if self.variant else ""
        errors.refuse(f"{source}: cannot read its {part} ({reason}); weights must be {wanted}{variant}")

    def _read_tokenizer(self, part: str) -> CLIPTokenizer:
        if self.tokenizer_source:
            tokenizer = self._other_tokenizer(self.tokenizer_source)
        else:
            tokenizer = self._read(CLIPTokenizer, part, weights=False)
        if tokenizer.model_max_length > 10**6:  # a folder without tokenizer_config.json says 1e30
            tokenizer.model_max_length = 77
        return tokenizer

    def _other_tokenizer(self, source: str) -> CLIPTokenizer:
        for folder in ("", "tokenizer"):  # one of its own, or the one inside a whole pipeline
            try:
                tokenizer = CLIPTokenizer.from_pretrained(source, subfolder=folder)
            except Exception as problem:  # many kinds: no such folder, not a hub name, no network, broken JSON
                reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
                continue
            if len(tokenizer) > 2:  # transformers makes an empty one of a folder that holds none
                return tokenizer
            reason = "it holds no vocabulary"
        errors.refuse(f"--tokenizer_name {source}: no CLIP tokenizer can be read there ({reason}); give its folder")

    # --- What the family knows about itself --------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        return self.unet.config.out_channels

    @property
    def shrinking(self) -> int:
        """Pixels of a picture's side that one latent stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution_default(self) -> int:
        return self.unet.config.sample_size * self.shrinking

    @property
    def side_factor(self) -> int:
        """Pixels of which a picture's side should be a multiple."""
        return models.side_factor(self.vae.config, self.unet.config)

    @property
    def prompt_limit(self) -> int:
        """Tokens a prompt may have, begin and end marks included."""
        return self.tokenizer.model_max_length

    @property
    def trainable(self) -> dict[str, torch.nn.Module]:
        """The modules with at least one weight that learns."""
        found = {name: getattr(self, name) for name in self.names}
        return {n: m for n, m in found.items() if m is not None and any(p.requires_grad for p in m.parameters())}

    # --- Preparing for training --------------------------------------------------------------------------------

    def configure(self, gradient_checkpointing: bool = False, xformers: bool = False) -> None:
        """Switches that trade time for memory. After it is settled what learns, before anything is wrapped."""
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()  # non-reentrant: adapters alone may need gradients
            for name in self.encoders.keys() & self.trainable.keys():  # a frozen one keeps no activations anyway
                clip.enable_text_checkpointing(getattr(self, name))
        if xformers:
            clip.enable_xformers(self.unet, self.device)

    def use(self, name: str, wrapped) -> None:
        """Let the training forward of `name` go through a wrapper of the plain module (DDP, torch.compile)."""
        self._wrapped[name] = wrapped

    def _called(self, name: str):
        """The wrapper for training; without gradients the plain module, since processes may then differ in what they
        draw, and a DDP forward that not all of them make would hang."""
        plain = getattr(self, name)
        return self._wrapped.get(name, plain) if torch.is_grad_enabled() else plain

    # --- Images ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels in [-1, 1] (b, 3, H, W) => mean and std of the VAE's posterior, each (b, 4, H/8, W/8), fp32."""
        if self.vae.encoder is None:
            raise RuntimeError("the VAE's encoder was released: every image should have been cached by then")
        weight = self.vae.encoder.conv_in.weight
        encoded = self.vae.encode(pixels.to(weight.device, weight.dtype)).latent_dist
        if not self._vae_works:  # looked at once: a look at every batch would wait for the device
            self.refuse_broken(encoded.mean)
            self._vae_works = True
        return encoded.mean.float(), encoded.std.float()

    def refuse_broken(self, latents: torch.Tensor) -> None:
        """Latents that are no numbers would end the training later, with less to say."""
        if not torch.isfinite(latents).all():
            dtype = str(next(self.vae.parameters()).dtype).removeprefix("torch.")
            errors.refuse(
                f"the VAE of {self.vae_source or self.name} gives values that are no numbers in {dtype}. Cures: a VAE"
                " that is safe in fp16 (--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix for SDXL),"
                " or --mixed_precision bf16",
                errors.DIVERGED,
            )

    def latents(self, batch: dict, draws) -> torch.Tensor:
        """Pixels, or their cached posterior => a fresh sample of the latents the UNet works on (b, 4, h, w), fp32."""
        if "latent_mean" in batch:
            mean, std = batch["latent_mean"].float(), batch["latent_std"].float()
        else:
            mean, std = self.posterior(batch["pixels"])
        return self._sampled(mean, std, draws)

    def _sampled(self, mean: torch.Tensor, std: torch.Tensor, draws, purpose: str = "posterior") -> torch.Tensor:
        sample = mean
        if draws is not None:  # else what is most likely
            sample = mean + std * draws.normal(purpose, tuple(mean.shape[1:])).to(mean.device)
        config = self.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            shift, width = (
                torch.tensor(values, device=mean.device).view(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            return (sample - shift) / width * config.scaling_factor
        return sample * config.scaling_factor

    def release_image_encoder(self) -> None:
        """Free the half of the VAE that is not needed once all latents are cached; the decoder stays for samples."""
        self.vae.encoder = self.vae.quant_conv = None
        clip.collect()

    # --- Prompts -----------------------------------------------------------------------------------------------

    def encode_prompts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Prompts => {"text": (b, 77, c), ...}, with gradients where grad mode and the encoders allow."""
        for text in texts:
            self._warn_when_cut(text)
            if any(getattr(self, name) is None for name in self.encoders):
                raise RuntimeError(f"the text encoder was released before this prompt was encoded: {text!r}")
        return self._hear([self._spelled(text) for text in texts])

    def _hear(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """What the encoders make of prompts; each family listens in its own way."""
        raise NotImplementedError

    def _tokens(self, texts: list[str], tokenizer: str = "tokenizer"):
        """ids and attention mask, (b, 77) each."""
        return getattr(self, tokenizer)(
            texts, padding="max_length", max_length=self.prompt_limit, truncation=True, return_tensors="pt"
        ).to(self.device)

    def _spelled(self, text: str) -> str:
        """As tokenizers are given it."""
        return captions.replaced(text, self.abstractions)

    def count_tokens(self, text: str) -> int:
        """Begin and end marks included, to be compared with `prompt_limit`."""
        return len(self.tokenizer(self._spelled(text), truncation=False, verbose=False).input_ids)

    def cut_text(self, text: str) -> str:
        """The end of a prompt that the encoder will not see, or ''."""
        ids = self.tokenizer(self._spelled(text), truncation=False, verbose=False).input_ids
        # The last place that is read belongs to the end mark, so the text stops one token earlier.
        return self.tokenizer.decode(ids[self.prompt_limit - 1 : -1]).strip() if len(ids) > self.prompt_limit else ""

    def _warn_when_cut(self, text: str) -> None:
        # Shorter ones cannot be too long: a token is a byte at least (an emoji has four), lower case at most doubles
        if text not in self._warned and len(self._spelled(text).encode()) > self.prompt_limit // 2:
            self._warned.add(text)
            if cut := self.cut_text(text):
                errors.warn(f"a prompt is longer than {self.prompt_limit} tokens; the model will not see: {cut!r}")

    @torch.no_grad()
    def cache_prompts(self, texts: Iterable[str], release: bool = True, batch_size: int = 16) -> None:
        """Run the frozen text encoders once for every distinct prompt (and the empty one), then let go of them."""
        if self.encoders.keys() & self.trainable.keys():
            raise ValueError("the text encoder learns: its embeddings change and cannot be cached")
        new = sorted({"", *texts} - self._prompts.keys() - self.stored_prompts.keys())
        for start in range(0, len(new), batch_size):
            chunk = new[start : start + batch_size]
            encoded = self.encode_prompts(chunk)
            for k, text in enumerate(chunk):  # rows of their own, so that no prompt keeps its whole batch alive
                self._prompts[text] = {name: rows[k].clone() for name, rows in encoded.items()}
        one = next(iter(self._prompts.values()), {})
        if len(self._prompts) * sum(row.nbytes for row in one.values()) > ON_DEVICE:
            for rows in self._prompts.values():
                rows.update({name: row.cpu() for name, row in rows.items()})
        if release:
            for name in self.encoders:
                setattr(self, name, None)
                self._wrapped.pop(name, None)
            clip.collect()

    def _encoded(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """{"text": (b, 77, c), ...} from the cache, else from the encoders."""
        known = [self._prompts.get(text) or self.stored_prompts.get(text) for text in texts]
        if not all(known):
            return self.encode_prompts(texts)
        stored = {"dtype": self.dtype} if self.stored_prompts else {}  # these may be kept in another precision
        names = known[0]
        return {name: torch.stack([rows[name].to(self.device, **stored) for rows in known]) for name in names}

    def condition(self, batch: dict, draws=None) -> dict[str, torch.Tensor]:
        """What the UNet listens to besides the noisy latents: {"text": (b, 77, c), ...}."""
        encoders = {name: getattr(self, name) for name in self.encoders}
        learn = any(name in self._wrapped or (module and module.training) for name, module in encoders.items())
        if learn and not self.settled:
            return self.encode_prompts(batch["captions"])
        with torch.no_grad():  # what was encoded once is of encoders that never learned
            return self.encode_prompts(batch["captions"]) if learn else self._encoded(batch["captions"])

    # --- The training forward ----------------------------------------------------------------------------------

    def predict(self, inputs: torch.Tensor, timesteps: torch.Tensor, condition: dict) -> torch.Tensor:
        """Noisy latents (b, 4, h, w), t (b,) => what the model predicts (b, 4, h, w): noise or velocity, fp32."""
        dtype = self.unet.conv_in.weight.dtype  # a half-precision base needs half-precision inputs outside autocast
        text, more = condition["text"].to(dtype), self._more_conditions(condition)
        return self._called("unet")(inputs.to(dtype), timesteps, text, **more, return_dict=False)[0].float()

    def _more_conditions(self, condition: dict) -> dict:
        """What a family's UNet takes besides text."""
        return {}

    # --- Sampling and saving -----------------------------------------------------------------------------------

    def pipeline(self, scheduler=None) -> DiffusionPipeline:
        """The stock pipeline around the modules in memory, the model's own scheduler unless another is given.

        Its text encoders are None once they were released: give `sampling_prompts(...)` to the call. After
        mixed-precision training call it under autocast: what learns is fp32, the frozen rest is not.
        """
        parts = {part: getattr(self, part) for part in (*self.names, *self.tokenizers)}
        scheduler = scheduler or copy.deepcopy(self.own_scheduler)
        pipeline = self.pipeline_class(**parts, scheduler=scheduler, **self.pipeline_options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def sampling_prompts(self, prompts: Sequence[str], negative: Sequence[str] | str = "") -> dict[str, torch.Tensor]:
        """Keyword arguments for a pipeline call, from the cache where the encoders are frozen."""
        negative = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        dtype = self.unet.conv_in.weight.dtype
        found = {}
        for sign, words in (("", self._encoded(prompts)), ("negative_", self._not_wanted(negative))):
            for name, kind in (("text", "prompt_embeds"), ("pooled", "pooled_prompt_embeds")):
                if name in words:
                    found[sign + kind] = words[name].to(dtype)
        return found

    def _not_wanted(self, negative: list[str]) -> dict[str, torch.Tensor]:
        return self._encoded(negative)

    def pipeline_from_disk(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The untouched base model on its own, e.g. for drawing class images before anything is loaded."""
        options = {name: value for name, value in self.pipeline_options.items() if name != "feature_extractor"}
        options |= self._weights() | {"revision": self.revision, "variant": self.variant, "torch_dtype": dtype}
        try:
            pipeline = self.pipeline_class.from_pretrained(self.path, **options)
        except UNREADABLE as problem:
            self._refuse(self.name, "pipeline", problem)
        if self.prediction_type:  # and its own noise schedule, whatever training's: it has learned no other
            pipeline.scheduler.register_to_config(prediction_type=self.prediction_type)
        return pipeline

    def words_for(self, pipeline, prompts: Sequence[str], negative: str = "") -> dict:
        """Keyword arguments for a call of any pipeline of this family, which then hears the layers that training does.

        Stock pipelines would skip layers for what is wanted only, and that of SD not at all under transformers 5.
        """
        if not self.clip_skip:
            return {"prompt": list(prompts)} | ({"negative_prompt": negative} if negative else {})
        family = copy.copy(self)
        family.device = pipeline.device
        for part in (*self.names, *self.tokenizers):
            setattr(family, part, getattr(pipeline, part))
        for name in self.encoders:
            self._with_layers_to_skip(getattr(pipeline, name))
        return family.sampling_prompts(prompts, negative)

    def save_pipeline(self, folder: str | Path, skip_text_encoder: bool = False) -> None:
        """A stock pipeline folder: what learned from memory, the frozen rest from disk again in full precision."""
        learned = self.trainable
        whole = copy.copy(self)
        for name in self.names:
            setattr(whole, name, learned.get(name) or self._read_module(name, torch.float32))
        if skip_text_encoder:
            for name in self.encoders:
                setattr(whole, name, None)
        whole.pipeline().save_pretrained(folder, safe_serialization=True)
        for name in self.encoders if not skip_text_encoder else ():
            clip.with_prefix(Path(folder, name, "model.safetensors"))
        for name in self.names:
            saved.shared(Path(folder, name))
            saved.forget_origins(Path(folder, name))
        for part in self.tokenizers:
            clip.save_vocabulary(Path(folder, part))
