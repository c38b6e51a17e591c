"""How long a run is that names neither --max_train_steps nor --num_train_epochs, and how fast it learns.

The published commands are for about five photos, one photo a step: 400 steps for all weights, 800 with class images,
500 for LoRA, 700 for PDMBooth. So the table counts visits of each photo, and never fewer optimizer steps than those,
because a step of several photos moves the weights about as far as one of a single photo.
"""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path

# method => (visits of each photo, the same with prior preservation, fewest optimizer steps)
TABLE = {"all weights": (80, 160, 400), "LoRA": (100, 200, 500), "PDMBooth": (140, 140, 700)}

# The embedded models are some hundred times smaller than Stable Diffusion: at its rates they would take hours.
EMBEDDED = ("toybox", "toybox-sdxl", "toybox/sd", "toybox/sdxl")
EMBEDDED_RATES = {"all weights": 1e-4, "LoRA": 1e-3}

# Beyond these learning rates a run of AdamW most probably diverges; other optimizers: times this. SGD's depend on the
# gradient's size, and have no usual range.
MOST = {"all weights": 2e-3, "LoRA": 2e-2}
LEAST = {"all weights": 1e-8, "LoRA": 1e-7}
BY_OPTIMIZER = {"adamw": 1, "adamw8bit": 1, "paged_adamw8bit": 1, "adafactor": 1, "lion": 0.3}
PRODIGY_MOST = 10.0  # a factor of the step size that it finds


def kind(args: argparse.Namespace) -> str:
    return "LoRA" if "rank" in args else "all weights"


def method(args: argparse.Namespace) -> str:
    return "PDMBooth" if "use_pdm_loss" in args else kind(args)


def rate(args: argparse.Namespace, given: Mapping) -> float | None:
    """The learning rate on the embedded models where none is given; None: the script's default."""
    embedded = str(getattr(args, "pretrained_model_name_or_path", None) or "").rstrip("/") in EMBEDDED
    if not embedded or "instance_data_dir" not in args or "learning_rate" in given:
        return None
    if args.optimizer not in BY_OPTIMIZER:
        return None
    return EMBEDDED_RATES[kind(args)] * BY_OPTIMIZER[args.optimizer]


def far_off(args: argparse.Namespace, default: float) -> str | None:
    """The warning about a learning rate with which hardly any run succeeds."""
    factor = args.train_batch_size * args.gradient_accumulation_steps * max(1, int(os.environ.get("WORLD_SIZE") or 1))
    value = args.learning_rate * (factor if args.scale_lr else 1)
    scaled = f" (times {factor} by --scale_lr)" if args.scale_lr and factor > 1 else ""
    told = f"--learning_rate {args.learning_rate:g}{scaled}"
    if args.optimizer == "prodigy" and value > PRODIGY_MOST:
        return f"{told} is far above the 1.0 that is usual with prodigy: the run will probably diverge"
    if args.optimizer not in BY_OPTIMIZER:
        return None
    most, least = (BY_OPTIMIZER[args.optimizer] * limits[kind(args)] for limits in (MOST, LEAST))
    if least <= value <= most:
        return None
    how, limit, end = ("above", most, "diverge") if value > most else ("below", least, "learn next to nothing")
    usual = f"{kind(args)} with {args.optimizer} (at {'most' if value > most else 'least'} {limit:g})"
    return f"{told} is far {how} the usual range of {usual}: the run will probably {end}; the default is {default:g}"


def automatic(args: argparse.Namespace) -> bool:
    return not (args.max_train_steps or args.num_train_epochs)


def steps(args: argparse.Namespace, photos: int, examples_per_step: int) -> int:
    visits, with_prior, fewest = TABLE[method(args)]
    visits = with_prior if args.with_prior_preservation else visits
    return max(fewest, math.ceil(visits * photos / examples_per_step))


def settle(
    args: argparse.Namespace, photos: int | None, examples_per_step: int, earlier: Path | None = None
) -> str | None:
    """Sets max_train_steps where no length is given => a line that says so. None: given, or not to be told yet.

    `earlier`: folder of the run that is resumed. Its length holds, whatever the photos have become since.
    """
    if not automatic(args):
        return None
    recorded = _recorded(earlier) if earlier else {}
    if isinstance(recorded.get("max_train_steps"), int):
        args.max_train_steps = recorded["max_train_steps"]
        return f"length: {args.max_train_steps} steps, as the resumed run has recorded"
    if not photos:
        return None
    args.max_train_steps = steps(args, photos, examples_per_step)
    told = (
        f"length: {args.max_train_steps} steps of {examples_per_step} examples, from the table for {method(args)} and"
    )
    told += f" {photos} photo{'s' * (photos != 1)} (docs/train_dreambooth.md); --max_train_steps sets another"
    if epochs := recorded.get("num_train_epochs"):
        told += f". The resumed run was of {epochs} epoch{'s' * (epochs != 1)}: --num_train_epochs {epochs} keeps that"
    return told


def _recorded(folder: Path) -> dict:
    import yaml

    try:
        found = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
