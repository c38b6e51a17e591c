"""Which buckets photos will go to, told before the model that is to learn from them is loaded."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from utils import buckets, models


def fill(args: argparse.Namespace, model: Path | None, photos: Sequence[tuple]) -> dict[buckets.Shape, list]:
    """{shape: photos, as `buckets.fill` takes them}; {} without buckets, or where only the hub knows the model."""
    return buckets.fill(photos, _shapes(args, model)) if photos else {}


def _shapes(args, model: Path | None) -> list[buckets.Shape]:
    unet, vae = (_settings(path) for path in (model and model / "unet", _vae(args, model)))
    resolution, factor = args.resolution, buckets.SIDE
    if vae.get("block_out_channels") and unet.get("block_out_channels"):
        factor = models.side_factor(vae, unet)
        shrinking = 2 ** (len(vae["block_out_channels"]) - 1)
        if not resolution and isinstance(unet.get("sample_size"), int):
            resolution = unet["sample_size"] * shrinking
    if not resolution and args.resolution_buckets == buckets.AUTO:
        return []
    found = buckets.shapes(args.resolution_buckets, resolution or 0, factor)
    return [] if found == [(resolution, resolution)] else found


def _vae(args, model: Path | None) -> Path | None:
    """Where the VAE's own settings lie: a folder of its own, one inside a pipeline, or the model's."""
    given = args.pretrained_vae_model_name_or_path
    places = [Path(given), Path(given, "vae")] if given else []
    return next((place for place in places if (place / "config.json").is_file()), model and model / "vae")


def _settings(folder: Path | None) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):  # what is wrong with the model is said elsewhere
        return {}
