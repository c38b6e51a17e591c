"""Photos that can be used and may still teach something unwanted: nearly the same one twice, and very blurred ones.

Only pointed out, never refused: a person may mean it. Pillow alone, on a small copy, so that it costs little beside
decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

SIDE = 256  # pixels of the shorter side on which sharpness is measured: what is soft here is soft in training
# See `_sharpness`: sharp pictures measure 0.3 to 3; one with a photo's spectrum comes below this when blurred by 2 to 3
# of those pixels (Gaussian), which is 5 pixels at 512.
BLURRED = 0.004
DISTANCE = 5  # of 64 bits: saved again, scaled, a hundredth cut off; different photos differ in 16 and more
MOST = 1000  # photos compared, each with each
NAMED = 4  # of a group of like photos
ROUNDING = 20 / 12  # variance that whole numbers alone give a Laplacian: weights 16 + 4, each off by 1 / 12


@dataclass
class Look:
    print: int  # 64 bits
    sharpness: float


def look(image) -> Look:
    """An upright RGB image => what is remembered of it."""
    from PIL import Image

    grey = image.reduce(max(1, min(image.size) // SIDE)).convert("L")
    if min(grey.size) > SIDE:
        scale = SIDE / min(grey.size)
        grey = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.BILINEAR)
    return Look(_print(grey), _sharpness(grey))


def _print(grey) -> int:
    """Difference hash: whether each of 8 x 8 cells is darker than its right neighbour; blind to size and exposure."""
    from PIL import Image

    cells = grey.resize((9, 8), Image.Resampling.BOX).tobytes()
    bits = 0
    for row in range(0, 72, 9):
        for column in range(row, row + 8):
            bits = bits << 1 | (cells[column] < cells[column + 1])
    return bits


def _sharpness(grey) -> float:
    """Variance of the Laplacian in the sharpest of 16 tiles, relative to the variance of the whole picture.

    Relative, since a pale picture is not a blurred one; of the sharpest, since behind a sharp subject blur is welcome.
    """
    from PIL import ImageFilter, ImageStat

    contrast = ImageStat.Stat(grey).var[0]
    if contrast < 1:
        return 1.0  # one colour: nothing in it could be sharp
    edges = grey.filter(ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128))
    edges = edges.crop((1, 1, edges.width - 1, edges.height - 1))  # the filter leaves the margin as it was
    width, height = edges.width / 4, edges.height / 4
    tiles = [(round(c * width), round(r * height), round(c * width + width), round(r * height + height))
             for r in range(4) for c in range(4)]  # fmt: skip
    sharpest = max(ImageStat.Stat(edges.crop(tile)).var[0] for tile in tiles)
    return max(0.0, sharpest - ROUNDING) / contrast


def remarks(reports: Sequence) -> list[str]:
    """One sentence a group of like photos and a blurred photo; `reports` of images.inspect(..., look=look)."""
    groups: list[list] = []
    for report in reports[:MOST]:
        like, rest = [], []
        for group in groups:
            (like if any(_alike(report, other) for other in group) else rest).append(group)
        groups = [*rest, [*chain(*like), report]]
    said = []
    for group in groups:
        if len(group) > 1:
            names = ", ".join(f"'{report.path}'" for report in group[:NAMED])
            names += f" and {len(group) - NAMED} more" if len(group) > NAMED else ""
            said.append(f"{names} look nearly the same: what they share weighs {len(group)} times; keep the best one")
    blurred = [report for report in reports if report.seen.sharpness < BLURRED]
    return said + [f"'{report.path}' is very blurred, and the blur is learned too" for report in blurred]


def _alike(one, other) -> bool:
    return (one.seen.print ^ other.seen.print).bit_count() <= DISTANCE
