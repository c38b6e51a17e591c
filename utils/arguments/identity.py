"""Which options a resume compares, because they change what is learned and nothing else tells of them.

What networks, data and optimizer say of themselves is compared beside these: see `identity=` in the scripts. Learning
rate, schedule, clipping and length may change from one session to the next. A test sorts every option of every script
into one of these kinds, so that a new one cannot be forgotten.
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

# option => the value with which checkpoints were made that do not know the option
COMPARED = {
    "variant": None,
    "tokenizer_name": None,
    "pretrained_vae_model_name_or_path": None,
    "center_crop": False,
    "random_flip": False,
    "image_interpolation_mode": "lanczos",
    "alpha_background": "white",
    "train_weights_in": "fp32",
    "caption_dropout": 0.0,
    "unmasked_weight": 0.0,
    "lora_dropout": 0.0,
    "train_text_encoder_frac": 1.0,
    "train_text_encoder_ti_frac": 0.5,
    "input_perturbation": 0.0,
    "debiased_estimation": False,
    "multires_noise_iterations": 0,
    "multires_noise_discount": 0.3,
    "timestep_bias_strategy": None,
    "timestep_bias_multiplier": 1.0,
    "timestep_bias_begin": 0,
    "timestep_bias_end": 1000,
    "timestep_bias_portion": 0.25,
    "snr_gamma": None,
    "noise_offset": 0.0,
    "prior_loss_weight": 1.0,
    "pdm_inversion_steps": 50,
    "pdm_targets": "inversion",
    "dream_training": False,
    "loss_type": "l2",
    "huber_c": 0.1,
    "huber_schedule": "snr",
    "do_edm_style_training": False,
    "edm_sigmas": "scheduler",
    "edm_p_mean": -1.2,
    "edm_p_std": 1.2,
    "rescale_betas_zero_snr": False,
    "clip_skip": None,
    "vae_tiling": False,
    "dream_detail_preservation": 1.0,
    "ema_decay": 0.9999,
    "ema_power": None,
    "ema_interval": 1,
    "posthoc_ema": False,
    "ema_sigma_rel": [0.05, 0.1],
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "allow_tf32": False,
    "use_inst_loss": True,
}

REMOVED_STARTS = ("pissa", "olora")  # --init_lora_weights of earlier versions; checkpoints tell it as "start"

# May change between two sessions, and the rest of the course is another one: a resume says so.
COURSE = ("learning_rate", "text_encoder_lr", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles")
COURSE += ("lr_power", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "repeats")
COURSE += ("adam_weight_decay", "adam_weight_decay_text_encoder")
LENGTH = ("max_train_steps", "num_train_epochs")  # what a falling learning rate is stretched to


def identity(args: argparse.Namespace) -> dict:
    """Only what is not as it always was, so that an option added later leaves older checkpoints resumable."""
    named = {name: getattr(args, name) for name in COMPARED if hasattr(args, name)}
    return {name: value for name, value in named.items() if value != COMPARED[name]}


def differing(earlier: Mapping, now: Mapping, allowed: str | Iterable[str] | None = None) -> tuple[list, list]:
    """=> (what differs and must not, what may): rows of (name, value in the checkpoint, value now)."""
    words = allowed.split(",") if isinstance(allowed, str) else list(allowed or [])
    allowed = {word.strip() for word in words}
    names = [name for name in sorted({*earlier, *now}) if earlier.get(name) != now.get(name)]
    rows = [(name, *(side.get(name, COMPARED.get(name)) for side in (earlier, now))) for name in names]
    may = [row for row in rows if row[0] in allowed or "all" in allowed]
    return [row for row in rows if row not in may], may


def removed(folder: Path, earlier: Mapping) -> str | None:
    """Why a checkpoint cannot be resumed with any options: it was made with something that was removed."""
    if earlier.get("start") not in REMOVED_STARTS:
        return None
    return (
        f"{folder} cannot be resumed: it was made with --init_lora_weights {earlier['start']}, which was removed;"
        " its LoRA file still loads, and to train further start a new run in another --output_dir"
    )


def another_run(folder: Path, rows: list) -> str:
    width = max(len(name) for name, _, _ in rows)
    table = "".join(f"\n  {name:<{width}}  checkpoint: {old}  now: {new}" for name, old, new in rows)
    if any(name == "use_inst_loss" and not old for name, old, _ in rows):
        # Once --use_pdm_loss alone meant this.
        table += "\nThat run did not learn from the photos themselves: give --use_inst_loss no to resume it."
    return (
        f"{folder} belongs to another run:{table}\nUse the options of that run, another --output_dir, or"
        f" --allow_resume_mismatch {','.join(name for name, _, _ in rows)} if you know why."
    )


def mistaken(args: argparse.Namespace, checkpoint: Path) -> str | None:
    """The complaint of a resume, as far as options alone tell: networks and data are compared when they are there."""
    try:
        earlier = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # told when it is read as a whole
    if complaint := removed(checkpoint, earlier):
        return complaint
    now = identity(args) | {"base_model": args.pretrained_model_name_or_path, "optimizer": args.optimizer}
    world = max(1, int(os.environ.get("WORLD_SIZE") or 1))
    now["examples_per_step"] = [args.train_batch_size, args.gradient_accumulation_steps, world]
    now |= {name: getattr(args, name) for name in ("rank", "seed") if getattr(args, name, None) is not None}
    now |= {"pdm_loss_weight": args.pdm_loss_weight} if getattr(args, "use_pdm_loss", False) else {}
    known = {name: value for name, value in earlier.items() if name in COMPARED or name in now}
    rows, _ = differing(known, json.loads(json.dumps(now)), args.allow_resume_mismatch)
    return another_run(checkpoint, rows) if rows else None


def changed(args: argparse.Namespace, settings: Path) -> list[str]:
    """A line for each option of the course that is not as in the run's saved settings; [] where there are none."""
    import yaml

    try:
        earlier = yaml.safe_load(settings.read_text(encoding="utf-8"))
        names = [name for name in (*COURSE, *LENGTH) if name in earlier and hasattr(args, name)]
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return []
    if args.lr_scheduler.startswith("constant"):
        names = [name for name in names if name not in LENGTH]
    pairs = {name: (earlier[name], getattr(args, name)) for name in names}
    return [
        f"--{name} was {_told(old)} and is now {_told(new)}: the resumed steps use the new value"
        for name, (old, new) in pairs.items()
        if old != new
    ]


def _told(value) -> str:
    return "not given" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
