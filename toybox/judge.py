"""The toybox's judge: how alike, how obedient, how varied and how copied are these pictures?

    judge = Judge.load()
    judge.likeness(pictures, photos)        # cosine of identity: 1 is the same individual
    judge.agreement(pictures, "dog", "orange", "beach")    # shares of pictures that show what was asked for
    judge.diversity(pictures)               # mean identity distance of pairs: 0 if all are one individual
    memorised(pictures, photos)             # correlation with the nearest photo, background included

The judge learned on the same drawings as the model (toybox/train_judge.py), half of them through the
VAE. It knows nothing else: its scores mean something for pictures of this small world only.
"""

import itertools
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

FOLDER = Path(__file__).parent / "judge"


class JudgeNetwork(nn.Module):
    """Pictures (batch, 3, 64, 64) => logits of each head, and a unit vector (batch, 64) for the identity."""

    def __init__(self, heads: dict[str, int], widths=(32, 64, 96, 128), identity: int = 64):
        super().__init__()
        layers, width = [], 3
        for wider in widths:  # 64 => 32 => 16 => 8 => 4
            layers += [nn.Conv2d(width, wider, 3, 2, 1), nn.GroupNorm(8, wider), nn.SiLU()]
            layers += [nn.Conv2d(wider, wider, 3, 1, 1), nn.GroupNorm(8, wider), nn.SiLU()]
            width = wider
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in heads.items()})
        # Where marks are matters for who it is: the identity sees four quarters, not their average.
        self.identity = nn.Linear(4 * width, identity)

    def forward(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        features = self.trunk(pixels)
        pooled = features.mean((2, 3))
        quarters = F.adaptive_avg_pool2d(features, 2).flatten(1)
        return {name: head(pooled) for name, head in self.heads.items()}, F.normalize(self.identity(quarters), dim=1)


def load_photo(path: Path, size: int = 64) -> Image.Image:
    """A photo as training sees it: turned upright, its centre square, scaled."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)


def load_photos(folder: Path | str) -> list[Image.Image]:
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    return [load_photo(path) for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in kinds]


def as_pixels(pictures: list[Image.Image], size: int = 64) -> torch.Tensor:
    from toybox.training import pixels_of

    return pixels_of([picture.convert("RGB").resize((size, size), Image.Resampling.BOX) for picture in pictures])


class Judge:
    def __init__(self, network: JudgeNetwork, names: dict[str, list[str]]):
        self.network, self.names = network.eval(), names

    @classmethod
    def load(cls, folder: Path = FOLDER) -> "Judge":
        from safetensors.torch import load_file

        names = json.loads((folder / "config.json").read_text())["heads"]
        network = JudgeNetwork({head: len(words) for head, words in names.items()})
        network.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
        return cls(network, names)

    @torch.no_grad()
    def identities(self, pictures: list[Image.Image]) -> torch.Tensor:
        return self.network(as_pixels(pictures))[1]

    @torch.no_grad()
    def words(self, pictures: list[Image.Image]) -> list[dict[str, str]]:
        """What each picture shows, one word a head: thing, colour, pattern, scene."""
        logits, _ = self.network(as_pixels(pictures))
        best = {head: values.argmax(1).tolist() for head, values in logits.items()}
        return [{head: self.names[head][best[head][i]] for head in best} for i in range(len(pictures))]

    def likeness(self, pictures: list[Image.Image], photos: list[Image.Image]) -> torch.Tensor:
        """One number a picture: cosine to the mean identity of the photos."""
        target = F.normalize(self.identities(photos).mean(0), dim=0)
        return self.identities(pictures) @ target

    def agreement(self, pictures: list[Image.Image], **asked: str) -> dict[str, float]:
        """agreement(pictures, thing="dog", scene="beach") => the share of pictures right in each and in all."""
        seen = self.words(pictures)
        shares = {head: sum(one[head] == word for one in seen) / len(seen) for head, word in asked.items()}
        shares["all"] = sum(all(one[head] == word for head, word in asked.items()) for one in seen) / len(seen)
        return shares

    def diversity(self, pictures: list[Image.Image]) -> float:
        """Read it beside the share of pictures that show the class at all: noise is varied, too."""
        identities = self.identities(pictures)
        pairs = list(itertools.combinations(range(len(pictures)), 2))
        return sum(1 - (identities[i] @ identities[j]).item() for i, j in pairs) / len(pairs)


def memorised(pictures: list[Image.Image], photos: list[Image.Image]) -> torch.Tensor:
    """One number a picture: the correlation of its pixels (at 16 x 16) with the nearest photo or its mirror image."""

    def flat(images):
        pixels = as_pixels(images, 16).flatten(1)
        return F.normalize(pixels - pixels.mean(1, keepdim=True), dim=1)

    mirrored = [ImageOps.mirror(photo) for photo in photos]
    return (flat(pictures) @ flat(photos + mirrored).T).max(1).values
