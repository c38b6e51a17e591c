"""Which buckets photos will go to, told before the model that is to learn from them is loaded."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from utils import buckets, models


def fill(args: argparse.Namespace, model: Path | None, photos: Sequence[tuple]) -> dict[buckets.Shape, list]:
    """{shape: photos, as `buckets.fill` takes them}; {} without buckets, or where only the hub knows the model."""
    return buckets.fill(photos, _shapes(args, model)) if photos else {}


def latents(args, model: Path | None, block: str) -> int | None:
    """Side of a square picture's latents in a block of the UNet, e.g. up_blocks.1; None where nothing tells."""
    unet, vae = _networks(args, model)
    resolution = _resolution(args, unet, vae)
    if not (resolution and vae.get("block_out_channels") and unet.get("block_out_channels")):
        return None
    deepest = len(unet["block_out_channels"]) - 1
    kind, number = (*block.split("."), "0")[:2]
    halved = {"down_blocks": int(number), "mid_block": deepest, "up_blocks": deepest - int(number)}[kind]
    return resolution // 2 ** (len(vae["block_out_channels"]) - 1 + halved)


def _networks(args, model: Path | None) -> tuple[dict, dict]:
    return _settings(model and model / "unet"), _settings(_vae(args, model))


def _resolution(args, unet: dict, vae: dict) -> int | None:
    if not args.resolution and vae.get("block_out_channels") and isinstance(unet.get("sample_size"), int):
        return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    return args.resolution


def _shapes(args, model: Path | None) -> list[buckets.Shape]:
    unet, vae = _networks(args, model)
    resolution, factor = _resolution(args, unet, vae), buckets.SIDE
    if vae.get("block_out_channels") and unet.get("block_out_channels"):
        factor = models.side_factor(vae, unet)
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
