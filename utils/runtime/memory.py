"""What to do when a GPU's memory is not enough: cheapest first, without what is on already."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils import errors


@contextmanager
def told(config: dict, device: torch.device, step: int) -> Iterator[None]:
    """Around a training step: running out of memory ends the run with advice in place of a traceback."""
    try:
        yield
    except torch.OutOfMemoryError:
        found = "out of memory"
        if device.type == "cuda":
            peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
            found += f": {peak / 2**30:.1f} of {total / 2**30:.1f} GiB of {device} were in use"
        message = f"step {step}: {found}. Try, in this order: {'; '.join(ways(config))}"
        errors.refuse(f"{message}. Checkpoints that were written stay good.", errors.FAILED)


def ways(config: dict) -> list[str]:
    """`config`: the options of the run; what one of them costs stands behind it."""
    has, batch = config.get, config.get("train_batch_size") or 1
    adapters = "rank" in config
    smaller = f"--train_batch_size {batch // 2} --gradient_accumulation_steps"
    smaller += f" {-(-batch * (has('gradient_accumulation_steps') or 1) // max(1, batch // 2))}"
    found = {
        "--gradient_checkpointing (a third more time, the same result)": not has("gradient_checkpointing"),
        f"{smaller} (as many examples a step)": batch > 1,
        "--mixed_precision bf16 (a little less exact)": has("mixed_precision") in (None, "no"),
        "--use_8bit_adam": not adapters and not has("use_8bit_adam"),
        "--fused_backward --max_grad_norm 0 (gradients freed at once, nothing clipped)": not adapters
        and has("fused_backward") is False
        and has("gradient_accumulation_steps") == 1,
        "--offload_ema (slower)": has("use_ema") and not has("offload_ema"),
        "--quantize_base nf4 (a coarser base)": adapters and "quantize_base" in config and not has("quantize_base"),
        "a LoRA script (a hundredth of the weights learns)": not adapters,
        "a smaller --resolution (activations shrink with its square)": True,
    }
    return [way for way, useful in found.items() if useful]
