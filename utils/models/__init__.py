"""Which family a model belongs to. A family hides what differs between networks behind the same few methods.

Every family has: load, posterior, latents, encode_prompts, cache_prompts, condition, predict, sampling_prompts,
pipeline, pipeline_from_disk, words_for, configure, save_pipeline, use, and the attributes label, names, encoders,
lora_targets, trainable, scheduler, resolution_default, side_factor, latent_channels, prompt_limit, caches_latents,
stored_prompts, abstractions, settled.
"""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from utils import errors

# Read by diffusers when it is imported: no model may bring code of its own, whatever a caller asks for.
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")

ROOT = Path(__file__).resolve().parent.parent.parent
# The models this repository contains. No module here imports the code beside them.
EMBEDDED = {"toybox": "toybox/sd", "toybox-sdxl": "toybox/sdxl", "toybox-sam": "toybox/sam"}
EMBEDDED["toybox-judge"] = "toybox/judge"

# "_class_name" in model_index.json -> (file in this folder, class). Further image-to-image pipelines of a family
# share its networks, so a folder saved from one of them is as good a base model.
FAMILIES = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionImg2ImgPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "StableDiffusionInpaintPipeline": ("inpainting", "StableDiffusionInpainting"),
    "StableDiffusionXLInpaintPipeline": ("inpainting", "StableDiffusionXLInpainting"),
}
LIBRARIES = ("diffusers", "transformers")  # whose classes a model may name
LATER = {"IFPipeline": "IF comes with its family", "IFSuperResolutionPipeline": "IF comes with its family"}
LATER["AltDiffusionPipeline"] = "not yet: its text encoder is of another kind, and diffusers lists it as deprecated"


def resolve(name: str) -> str:
    """The embedded models by their short names, unless the working folder holds a model of that name."""
    if name in EMBEDDED and not any(Path(name, mark).is_file() for mark in ("model_index.json", "config.json")):
        return str(ROOT / EMBEDDED[name])
    return name


def family_of(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,  # instead of the one the model's scheduler names
    allow_pickle: bool = False,  # weights that are no safetensors; even then only tensors are read from them
    rescale_betas_zero_snr: bool = False,  # a noise schedule that ends in pure noise, whatever the model's own does
    clip_skip: int | None = None,  # last layers of the text encoders that are left out
    vae_tiling: bool = False,  # the VAE works on a large picture in overlapping tiles
):
    """The family object of a pipeline folder or hub model, from its model_index.json alone: no weights are read."""
    kind = class_name(read_index(name, revision))
    if kind in LATER:
        errors.refuse(f"--pretrained_model_name_or_path {name} is a {kind}: {LATER[kind]}")
    if kind not in FAMILIES:
        errors.refuse(
            f"--pretrained_model_name_or_path {name} is a {kind}, which this script cannot train; "
            f"give a model of one of: {', '.join(FAMILIES)}"
        )
    module, cls = FAMILIES[kind]
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)(
        name,
        revision=revision,
        variant=variant,
        prediction_type=prediction_type,
        allow_pickle=allow_pickle,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        clip_skip=clip_skip,
        vae_tiling=vae_tiling,
    )


def class_name(index: dict) -> str | None:
    """Which pipeline it says it is; a list there names a file of code, which is never run."""
    kind = index.get("_class_name")
    return kind if isinstance(kind, str) or kind is None else f"{kind} (code of its own)"


def component_class(name: str, revision: str | None, part: str) -> type:
    """The class that a model's index names for one of its parts. The index is data: it chooses among two libraries'
    classes, and imports nothing else."""
    entry = read_index(name, revision).get(part)
    library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    cls = getattr(importlib.import_module(library), str(kind), None) if library in LIBRARIES else None
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        known = " or ".join(LIBRARIES)
        errors.refuse(f"--pretrained_model_name_or_path {name}: its {part} is {entry}, no class of {known}")
    return cls


def side_factor(vae: Mapping, unet: Mapping) -> int:
    """Pixels of which a picture's side should be a multiple, from two configurations: both networks halve it often."""
    return 2 ** (len(vae["block_out_channels"]) - 1 + len(unet["block_out_channels"]) - 1)


def read_index(name: str, revision: str | None = None, option: str = "pretrained_model_name_or_path") -> dict:
    """model_index.json of a local folder or of the hub."""
    path = Path(resolve(name)).expanduser()
    file = path / "model_index.json"
    if path.is_dir() and not file.is_file():
        errors.refuse(f"--{option} {name} is a folder without model_index.json, so no pipeline")
    if not path.is_dir():
        try:
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(name, "model_index.json", revision=revision)
        except Exception as problem:  # many kinds: no such model, gated, offline, no network, not a valid name
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            errors.refuse(
                f"--{option} {name} is neither a folder here nor a model the hub gave us "
                f"({reason}); check the name, or log in with: hf auth login"
            )
    try:
        index = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as problem:
        errors.refuse(f"{file} is not valid JSON: {problem}")
    if not isinstance(index, dict):
        errors.refuse(f"{file} is no model index: it holds no names of parts")
    return index


def read_scheduler(name: str, revision: str | None = None) -> dict:
    """The configuration of a pipeline's scheduler; {} where it cannot be read, of which loading the model complains."""
    path = Path(resolve(name)).expanduser()
    file = path / "scheduler" / "scheduler_config.json"
    try:
        if not path.is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(name, "scheduler/scheduler_config.json", revision=revision))
        config = json.loads(file.read_text(encoding="utf-8"))
    except Exception:  # many kinds: see read_index
        return {}
    return config if isinstance(config, dict) else {}
