"""Which family a model belongs to. A family hides what differs between networks behind the same few methods.

Every family has: load, posterior, latents, encode_prompts, cache_prompts, condition, predict, sampling_prompts,
pipeline, pipeline_from_disk, configure, save_pipeline, use, and the attributes label, names, encoders, lora_targets,
trainable, scheduler, resolution_default, latent_channels, prompt_limit.
"""

import importlib
import json
from pathlib import Path

from utils import errors

ROOT = Path(__file__).resolve().parent.parent.parent
EMBEDDED = {"toybox": "toybox/sd", "toybox-sdxl": "toybox/sdxl"}  # the models this repository carries

# "_class_name" in model_index.json -> (file in this folder, class). Further image-to-image pipelines of a family
# share its networks, so a folder saved from one of them is as good a base model.
FAMILIES = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionImg2ImgPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
}
LATER = {"IFPipeline": "IF comes with its family", "IFSuperResolutionPipeline": "IF comes with its family"}


def resolve(name: str) -> str:
    """The embedded models by their short names, unless the working folder holds a pipeline of that name."""
    if name in EMBEDDED and not Path(name, "model_index.json").is_file():
        return str(ROOT / EMBEDDED[name])
    return name


def family_of(name: str, revision: str | None = None, variant: str | None = None):
    """The family object of a pipeline folder or hub model, from its model_index.json alone: no weights are read."""
    kind = read_index(name, revision).get("_class_name")
    if kind in LATER:
        errors.refuse(f"--pretrained_model_name_or_path {name} is a {kind}: {LATER[kind]}")
    if kind not in FAMILIES:
        errors.refuse(
            f"--pretrained_model_name_or_path {name} is a {kind}, which this script cannot train; "
            f"give a model of one of: {', '.join(FAMILIES)}"
        )
    module, cls = FAMILIES[kind]
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)(name, revision=revision, variant=variant)


def read_index(name: str, revision: str | None = None) -> dict:
    """model_index.json of a local folder or of the hub."""
    path = Path(resolve(name)).expanduser()
    file = path / "model_index.json"
    if path.is_dir() and not file.is_file():
        errors.refuse(f"--pretrained_model_name_or_path {name} is a folder without model_index.json, so no pipeline")
    if not path.is_dir():
        try:
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(name, "model_index.json", revision=revision)
        except Exception as problem:  # many kinds: no such model, gated, offline, no network, not a valid name
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            errors.refuse(
                f"--pretrained_model_name_or_path {name} is neither a folder here nor a model the hub gave us "
                f"({reason}); check the name, or log in with: hf auth login"
            )
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as problem:
        errors.refuse(f"{file} is not valid JSON: {problem}")
