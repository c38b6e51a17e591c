"""The training pictures as the frozen VAE sees them, computed once and kept in `toybox/.build`."""

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from toybox.draw import example
from toybox.training import BUILD, Run, pixels_of

PART = 4000


@torch.no_grad()
def encode_part(vae: AutoencoderKL, number: int, device: torch.device) -> dict:
    """=> {"mean", "std": (PART, 4, 16, 16) already scaled to unit variance, "captions": list}"""
    means, stds, captions = [], [], []
    for start in range(number * PART, (number + 1) * PART, 100):
        examples = [example(start + i) for i in range(100)]
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels_of([one.picture for one in examples]).to(device)).latent_dist
        means.append((posterior.mean.float() * vae.config.scaling_factor).half().cpu())
        stds.append((posterior.std.float() * vae.config.scaling_factor).half().cpu())
        captions += [one.caption for one in examples]
    return {"mean": torch.cat(means), "std": torch.cat(stds), "captions": captions}


def cached_latents(run: Run, vae: AutoencoderKL, parts: int) -> dict:
    """The first `parts` x 4000 pictures; the processes of a run share the work."""
    files = [BUILD / f"latents-{number:02d}.pt" for number in range(parts)]
    for number, file in enumerate(files):
        if number % run.world == run.rank and not file.exists():
            torch.save(encode_part(vae, number, run.device), file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
    if run.world > 1:
        dist.barrier()
    loaded = [torch.load(file, weights_only=True) for file in files]
    tensors = {key: torch.cat([part[key] for part in loaded]) for key in ("mean", "std")}
    return {**tensors, "captions": [caption for part in loaded for caption in part["captions"]]}
