"""The samplers that infer.py offers and that draw during training, and what each of them can draw.

Everything here is known without diffusers, so a sampler that does not fit a model is refused before anything is loaded.
"""

import importlib.util
from collections.abc import Mapping

from utils import errors

# A name on the command line -> class in diffusers, and what its configuration changes. Class names do as well.
SAMPLERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# What the usual samplers are called for models trained with EDM noise.
EDM_TWINS = {
    "DPMSolverMultistepScheduler": "EDMDPMSolverMultistepScheduler",
    "EulerDiscreteScheduler": "EDMEulerScheduler",
}
# Their classes do not know --rescale_betas_zero_snr and would draw by the schedule before it. With Karras' noise levels
# several steps fall on the last timestep, and diffusers loses count of them.
NOT_ZERO_SNR = ("deis", "dpm++_karras", "heun", "lms", "pndm")


def find(name: str) -> tuple[str | None, dict] | None:
    """(class name or None for the model's own, changes); None if there is no such sampler."""
    by_class = {kind.lower(): (kind, {}) for kind, _ in SAMPLERS.values()}
    return (SAMPLERS | by_class | {"model": (None, {})}).get(name.lower())


def misfit(name: str, config: Mapping, option: str) -> str | None:
    """Why a sampler cannot draw from a model whose scheduler has this configuration; None if it can."""
    kind, changes = find(name) or (name, {})
    if is_edm(config) and kind and not kind.startswith("EDM") and kind not in EDM_TWINS:
        names = _names(lambda one: SAMPLERS[one][0] in EDM_TWINS, name)
        return f"{option} {name} cannot draw from a model that was trained with EDM noise; use {names}"
    if config.get("rescale_betas_zero_snr") and _short(kind, changes) in NOT_ZERO_SNR:
        names = _names(lambda one: one not in NOT_ZERO_SNR, name)
        return f"{option} {name} cannot draw a noise schedule with zero terminal SNR; use {names}"
    if kind == "LMSDiscreteScheduler" and not importlib.util.find_spec("scipy"):
        return f"{option} {name} needs scipy: pip install scipy"
    return None


def make(name: str, config: Mapping, changes: Mapping | None = None):
    """A sampler by its class name, with the model's own noise schedule."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_config"):
        errors.refuse(f"{name} is not a scheduler of diffusers; e.g. DPMSolverMultistepScheduler, DDPMScheduler")
    changes = dict(changes or {})
    if complaint := misfit(_short(name, changes), config, "sampler"):
        errors.refuse(complaint)
    changes = not_clipped(config) | changes
    if is_edm(config):
        cls = getattr(diffusers, EDM_TWINS.get(name, name))
    if str(config.get("variance_type", "")).startswith("learned"):  # the learned half is thrown away in training
        changes["variance_type"] = "fixed_small"
    return cls.from_config({**config, **changes})


def not_clipped(config: Mapping) -> dict:
    """What to change where a model's scheduler does not say whether x0 is clipped to [-1, 1]: DDIM and DDPM would by
    default, and latents are larger. Pipelines of diffusers correct the scheduler that they are made with, no other."""
    said = "clip_sample" in config and "clip_sample" not in config.get("_use_default_values", ())
    return {} if said else {"clip_sample": False}


def is_edm(config: Mapping) -> bool:
    return str(config.get("_class_name", "")).startswith("EDM")


def _short(kind: str | None, changes: Mapping) -> str:
    return next((name for name, found in SAMPLERS.items() if found == (kind, changes)), kind)


def _names(fits, given: str) -> str:
    """The samplers that fit, in the way the given one is named: by class, or by short name."""
    names = [name for name in SAMPLERS if fits(name)]
    if given not in SAMPLERS:
        names = list(dict.fromkeys(SAMPLERS[name][0] for name in names))
    return ", ".join(names)
