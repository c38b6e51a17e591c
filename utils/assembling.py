"""What infer.py draws with: a base model, networks of a checkpoint in place of its own, adapters, a refiner."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from utils import models, samplers, saved, targets
from utils.adapters import files, merging
from utils.errors import refuse

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pipeline(
    base: saved.Base,
    loras: list[saved.Lora],
    modules: dict[str, Path],  # network -> folder with its weights
    device: torch.device,
    dtype: torch.dtype,
    scheduler: str | None = None,  # class name; None: the model's own
    changes: dict | None = None,  # to the scheduler's configuration
    allow_pickle: bool = False,
    embeddings: Sequence[saved.Embeddings] = (),
):
    own = {"prediction_type": base.prediction_type, "rescale_betas_zero_snr": base.rescale_betas_zero_snr}
    own |= {"allow_pickle": allow_pickle}
    family = models.family_of(base.name, base.revision, base.variant, **own)
    lent = saved.without(models.read_index(base.name, base.revision)) if base.encoders else []
    lent = [name for name in lent if name not in modules]
    family.load(device, dtype, vae=base.vae, parts=[name for name in family.names if name not in (*modules, *lent)])
    if lent:
        lender = models.family_of(
            base.encoders.name, base.encoders.revision, base.encoders.variant, allow_pickle=allow_pickle
        )
        if type(lender) is not type(family):
            refuse(
                f"{base.name} was saved without text encoders, and {base.encoders.name}, its base, is of another kind"
            )
        lender.load(device, dtype, parts=lent)
        for name in lent:
            setattr(family, name, getattr(lender, name))
    for name, path in modules.items():
        setattr(family, name, load_module(base, name, path, dtype).to(device).eval())
    for name in family.names:
        files.refuse_not_finite(
            f"{modules.get(name, base.name)}, {name}", dict(getattr(family, name).named_parameters())
        )
    drawing = family.pipeline()
    add_embeddings(drawing, embeddings, base.name)
    add_loras(drawing, loras, base.name)
    change_scheduler(drawing, scheduler, changes)
    return drawing


def words(drawing, base: saved.Base, prompts: list[str], negative: str | None) -> dict:
    """What the pipeline is called with. A run with --clip_skip is drawn from by the encoders as it trained them."""
    family = models.family_of(base.name, base.revision, base.variant, clip_skip=base.clip_skip)
    return family.words_for(drawing, prompts, negative or "")


def add_embeddings(drawing, embeddings: Sequence[saved.Embeddings], base_name: str) -> None:
    """As diffusers adds them: new words of the tokenizers, new rows of the text encoders."""
    for one in embeddings:
        found = load_file(saved.averaged(one.file))
        if saved.ONE_ENCODER in found:  # a file of one word
            found = {saved.EMBEDDINGS_KEYS[0]: found[saved.ONE_ENCODER]}
        for key, end in zip(saved.EMBEDDINGS_KEYS, ("", "_2")):
            if key not in found:
                continue
            if not hasattr(drawing, f"text_encoder{end}"):
                refuse(f"--embeddings {one.file} belongs to a model with two text encoders (SDXL), {base_name} has one")
            parts = {part: getattr(drawing, part + end) for part in ("tokenizer", "text_encoder")}
            try:
                rows = found[key].to(parts["text_encoder"].dtype)
                drawing.load_textual_inversion(rows, token=one.names, **parts)
            except ValueError as problem:
                refuse(f"--embeddings {one.file} does not fit {base_name}: {str(problem).strip().splitlines()[0]}")


def add_loras(drawing, loras: list[saved.Lora], base_name: str) -> None:
    """As diffusers adds them. What it does not read (LoHa, LoKr), or not whole (DoRA named as kohya does), is read by
    `adapters.files`; LoHa and LoKr are merged into the weights, so they come first."""
    loras = sorted(loras, key=lambda lora: not files.is_lycoris(lora.file))
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are what is asked for
    beside = {}
    for number, lora in enumerate(loras):
        try:
            if add_lora(drawing, lora, saved.averaged(lora.file), f"lora{number}"):
                beside[f"lora{number}"] = lora.scale
        except (ValueError, RuntimeError, KeyError, IndexError) as problem:  # shapes or names of another network
            refuse(f"--lora {lora.given} does not fit {base_name}: {str(problem).strip().splitlines()[0]}")
    if beside:
        drawing.set_adapters(list(beside), list(beside.values()))


def add_lora(drawing, lora: saved.Lora, file: Path, name: str) -> bool:
    """False where it was merged instead of put beside the weights under that name."""
    if files.is_named_by_diffusers(file) and not lora.part:
        files.check(file, files.tensors(file)[0])
        drawing.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        return True
    found, _ = files.read(file)
    if lora.part:
        found = only(found, targets.BLOCKS[lora.part], lora)
    if all("down" in parts for layers in found.values() for parts in layers.values()):
        drawing.load_lora_weights(files.stock(found), adapter_name=name)
        return True
    merging.merge({network: getattr(drawing, network) for network in found}, [(found, lora.scale)], lora.given)
    return False


def only(found: dict, block: str, lora: saved.Lora) -> dict:
    layers = {name: parts for name, parts in found.get("unet", {}).items() if targets.lies_in(name, block)}
    if not layers:
        refuse(f"--{lora.part}_lora {lora.given} holds nothing of {block}, where B-LoRA keeps {lora.part}")
    return {"unet": layers}


def change_scheduler(drawing, kind: str | None, changes: dict | None) -> None:
    if kind:
        drawing.scheduler = samplers.make(kind, drawing.scheduler.config, changes)


def refiner(name: str, drawing, scheduler: str | None = None, changes: dict | None = None):
    """The pipeline that goes on with the latents of `drawing`, whose VAE and second text encoder it shares."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    shared = {"vae": drawing.vae, "text_encoder_2": drawing.text_encoder_2, "tokenizer_2": drawing.tokenizer_2}
    try:
        refining = StableDiffusionXLImg2ImgPipeline.from_pretrained(
            models.resolve(name), torch_dtype=drawing.unet.dtype, use_safetensors=True, add_watermarker=False, **shared
        )
    except (OSError, ValueError) as problem:
        refuse(f"--refiner {name} cannot be read: {str(problem).strip().splitlines()[0]}")
    refining.to(drawing._execution_device)
    refining.set_progress_bar_config(disable=True)
    change_scheduler(refining, scheduler, changes)
    return refining


def load_module(base: saved.Base, name: str, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """One network of a full checkpoint, of the class that the base model has in its place; averaged, if it can be."""
    cls = models.component_class(base.name, base.revision, name)
    try:
        return cls.from_pretrained(saved.averaged(path), use_safetensors=True).to(dtype)
    except (OSError, ValueError, RuntimeError) as problem:
        refuse(f"--checkpoint: {path} cannot be read as a {cls.__name__}: {str(problem).strip().splitlines()[0]}")


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Names -> torch's device and dtype; a device that is not there is refused before the model is read."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        refuse(f"--device {device} cannot be used here: {str(problem).strip().splitlines()[0]}")
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "fp16"
    return torch.device(device), DTYPES[dtype]
