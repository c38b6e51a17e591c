"""What families with CLIP text encoders and diffusers UNets have in common."""

import gc
import json
from pathlib import Path

import torch

from utils import errors


def enable_text_checkpointing(encoder) -> None:
    """Recompute instead of keep, without the old re-entrant kind, which needs an input that requires gradients."""
    options = {"use_reentrant": False}
    if hasattr(encoder, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        encoder.activation_checkpointing_enable(options)
    else:
        encoder.gradient_checkpointing_enable(options)


def enable_xformers(unet, device: torch.device) -> None:
    """Refuses where it cannot work: PyTorch's own attention, the default, does the same job there."""
    option = "--enable_xformers_memory_efficient_attention"
    if device.type != "cuda":
        errors.refuse(f"{option} needs a CUDA device, and this run is on {device.type}; leave the option out")
    try:
        import xformers.ops  # noqa: F401

        unet.enable_xformers_memory_efficient_attention()
    except ImportError:
        errors.refuse(f"{option} needs xformers: pip install xformers; or leave the option out")
    except Exception as problem:
        errors.refuse(f"{option} does not work here ({problem}); leave the option out")


def with_prefix(file: Path) -> None:
    """Key a CLIP text encoder with `text_model.`, as every published one is.

    transformers 5 writes it without; transformers 4 would then start from random weights, and only warn.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    if not any(key.startswith("text_model.") for key in weights):  # one with a projection beside it has kept its prefix
        save_file({f"text_model.{key}": w for key, w in weights.items()}, file, metadata={"format": "pt"})


def save_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json: transformers 4 and other programs read only those."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def collect() -> None:
    """Give freed memory back to the device at once, for what comes next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_own_precision(vae):
    """A VAE that computes in the precision of its weights also inside autocast, which would narrow it again."""

    def guarded(compute):
        def call(images, *args, **options):
            weight = next(vae.parameters())
            with torch.autocast(weight.device.type, enabled=False):
                return compute(images.to(weight.dtype), *args, **options)

        return call

    vae.encode, vae.decode = guarded(vae.encode), guarded(vae.decode)
    return vae
