"""Numbers that are far from anything in use: above the first bound a run warns, above the second it does not start.

One table for every script and tool. Bounds that depend on the model (a rank, a timestep) are compared in the preflight.
"""

from collections.abc import Callable, Iterator

NO_BOUND = float("inf")

# option => (largest usual value, largest value that is accepted, why)
LARGEST = {
    "noise_offset": (1, 10, "0.05 to 0.1 is usual; from 1 on the offset is as strong as the noise"),
    "input_perturbation": (1, 10, "0.1 is usual; from 1 on it is as strong as the noise"),
    "multires_noise_iterations": (10, 32, "6 to 10 are usual; each level halves the size of the noise"),
    "snr_gamma": (20, NO_BOUND, "5 is usual; large values switch the weighting off"),
    "huber_c": (10, NO_BOUND, "0.1 is usual; large values make the loss l2"),
    "timestep_bias_multiplier": (100, NO_BOUND, "values up to 10 are usual; the other timesteps are hardly trained"),
    "dream_detail_preservation": (50, NO_BOUND, "1 to 20 is usual; large values switch DREAM off"),
    "caption_dropout": (0.5, NO_BOUND, "0.1 is usual; most images are trained without a caption"),
    "lora_dropout": (0.5, NO_BOUND, "values up to 0.3 are usual; the adapters hardly learn"),
    "rank": (512, 4096, "4 to 128 is usual; a rank above the smaller side of a layer adds nothing"),
    "lora_conv_rank": (512, 4096, "4 to 64 is usual; a rank above the smaller side of a layer adds nothing"),
    "lora_alpha": (1024, 1e6, "up to twice the rank is usual; adapters act with strength alpha / rank"),
    "loraplus_lr_ratio": (64, 1e4, "16 is usual; B learns so many times faster than A"),
    "prior_loss_weight": (10, 1e4, "1 is usual; the photos hardly count beside the class images"),
    "pdm_loss_weight": (100, 1e6, "0.1 is the default; the photos hardly count beside this loss"),
    "adam_weight_decay": (1, 1e4, "0.01 is usual; the weights shrink towards zero"),
    "adam_weight_decay_text_encoder": (1, 1e4, "0.01 is usual; the weights shrink towards zero"),
    "adam_epsilon": (1e-2, NO_BOUND, "1e-8 is usual; Adam no longer adapts the step of each weight"),
    "lr_power": (10, NO_BOUND, "1 to 3 is usual; the learning rate falls to almost 0 at once"),
    "num_new_tokens_per_abstraction": (16, 70, "2 is usual; a prompt holds 75 tokens"),
    "class_guidance_scale": (30, 1000, "3 to 8 is usual; images oversaturate"),
    "validation_guidance_scale": (30, 1000, "3 to 8 is usual; images oversaturate"),
    "guidance_scale": (30, 1000, "3 to 8 is usual; images oversaturate"),
    "num_images": (10_000, 1_000_000, "4 is the default; so many images of each prompt"),
    "clip_skip": (4, 32, "1 is usual; CLIP's text encoders have 12 to 32 layers"),
    "seed": (2**62, 2**62, "the seeds of several images count up from it, and the last must have 63 bits"),
    "resolution": (2048, 16384, "512 to 1024 is usual; memory grows with the square"),
    "height": (4096, 16384, "512 to 1024 is usual; memory grows with the square"),
    "width": (4096, 16384, "512 to 1024 is usual; memory grows with the square"),
    "num_class_images": (10_000, 1_000_000, "100 to 1,000 is usual; each of them is drawn before training"),
    "repeats": (1000, 1_000_000, "each photo counts so often in an epoch"),
    "train_batch_size": (1024, 65536, "1 to 64 is usual; memory grows with it"),
    "gradient_accumulation_steps": (1024, 65536, "so many batches make one optimizer step"),
    "num_train_epochs": (100_000, 10_000_000, "so many passes over the data"),
    "max_train_steps": (10_000_000, 10_000_000_000, "500 to 100,000 is usual"),
    "sample_batch_size": (256, 65536, "4 is the default; memory grows with it"),
    "batch_size": (256, 65536, "4 is the default; memory grows with it"),
    "num_validation_images": (100, 100_000, "4 is the default; all of them are drawn at each validation"),
    "num_test_imgs_per_prompt": (1000, 100_000, "4 is the default"),
    "validation_num_inference_steps": (250, 1000, "20 to 50 is usual; models have 1,000 timesteps"),
    "num_inference_steps": (250, 1000, "20 to 50 is usual; models have 1,000 timesteps"),
    "pdm_inversion_steps": (250, NO_BOUND, "50 is the default; each step is a pass of the network and a row on disk"),
    "dataloader_num_workers": (64, 1024, "2 to 16 is usual; each is a process with its own memory"),
    "shuffle_buffer": (1_000_000, NO_BOUND, "1,000 is the default; so many rows are kept in memory"),
    "num_shards": (100_000, NO_BOUND, "one for each process is usual"),
    "edm_p_mean": (5, 50, "-1.2 is the paper's; levels are far outside those of the model"),
    "edm_p_std": (5, 50, "1.2 is the paper's; levels are far outside those of the model"),
}


def check(has: Callable, called: str = "--{}") -> Iterator[tuple[bool, str]]:
    """=> (whether it must be refused, what to say) for each number beyond its bound; has(option): its value or None."""
    for name, (usual, most, why) in LARGEST.items():
        value = has(name)
        if not isinstance(value, int | float) or value <= usual:
            continue
        refused = value > most
        bound = f"at most {_written(most)} is accepted" if refused else f"values above {_written(usual)} are unusual"
        yield refused, f"{called.format(name)} is {_written(value)}: {bound} ({why})"


def _written(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
