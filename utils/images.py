"""Any photo a person can have, opened safely and turned into what a network sees.

Only Pillow is needed, and only inside functions: the preflight looks at every photo before anything heavy is
imported. Files are read, never written, and refused by their header before a decoder may fill the memory.
"""

import functools
import io
import math
import os
import threading
import warnings
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SUFFIXES |= {".ppm", ".pgm", ".avif", ".heic", ".heif"}
# A decoder is code that reads strangers' bytes: only those that photos need are allowed to run.
FORMATS = ["JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF"]
MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; a 109 kB file can claim to be far more
MOST_BAD = 0.5  # share of unreadable pictures above which leaving them out would hide what is wrong with all of them
MAX_RATIO = 100  # longer than this is no photo, and resizing its shorter side would fill the memory
CAPTION_FILES = {".txt", ".caption", ".jsonl", ".csv", ".json", ".parquet"}
INTERPOLATIONS = {  # torchvision's names; "nearest_exact" differs from "nearest" on tensors only, not in Pillow
    "nearest": "NEAREST",
    "nearest_exact": "NEAREST",
    "bilinear": "BILINEAR",
    "bicubic": "BICUBIC",
    "box": "BOX",
    "hamming": "HAMMING",
    "lanczos": "LANCZOS",
}
_one_large_at_a_time = threading.Lock()


class BadImage(ValueError):
    """A picture that cannot be used; the message names it and says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"'{name}' {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):  # travels from data workers to the main process
        return BadImage, (self.name, self.reason)


@dataclass
class Report:
    """What `inspect` found out about one picture; width and height are 0 when even the header is unreadable."""

    path: Any
    width: int = 0
    height: int = 0
    problem: str | None = None
    warnings: list[str] = field(default_factory=list)
    seen: Any = None  # what `look` returned


# Finding


def survey(folder: str | os.PathLike) -> tuple[list[Path], list[Path]]:
    """All pictures under `folder`, and the files that are neither pictures nor captions, both sorted.

    Hidden files and folders (.cache, .ipynb_checkpoints, .DS_Store) belong to tools, NAME.mask.png to NAME.
    """
    folder = Path(folder)
    pictures, others = [], []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        for name in names:
            path = Path(parent, name)
            stem, suffix = os.path.splitext(name.lower())
            if name.startswith(".") or stem.endswith(".mask"):
                continue
            if suffix in SUFFIXES and path.is_file():  # False for a broken link
                pictures.append(path)
            elif suffix not in CAPTION_FILES:
                others.append(path)

    def place(path):  # the same order on every file system
        return path.relative_to(folder).as_posix()

    return sorted(pictures, key=place), sorted(others, key=place)


def list_images(folder: str | os.PathLike) -> list[Path]:
    return survey(folder)[0]


# Opening


def open_rgb(source, background: str = "white", max_pixels: int = MAX_PIXELS):
    """A path, bytes, Pillow image, {"bytes", "path"} row or a function returning one => an upright RGB image."""
    return _decode(source, background, max_pixels)[0]


def open_alpha(source, max_pixels: int = MAX_PIXELS):
    """How opaque a picture is, as an upright "L" image; None if it knows no transparency."""
    from PIL import ImageOps

    with _opened(source, max_pixels) as image:
        try:
            image.load()
            if not image.has_transparency_data:
                return None
            if _orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
            return image.convert("RGBA").getchannel("A")
        except Exception as error:
            raise BadImage(name_of(source), f"cannot be decoded: {error}") from None


def size_of(source) -> tuple[int, int]:
    """(width, height) of the upright picture, from the header alone where the format allows it."""
    with _opened(source, MAX_PIXELS) as image:
        if image.format == "TIFF":  # Pillow turns these by itself while decoding
            return _decode(source, "white", MAX_PIXELS)[0].size
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def inspect(
    paths,
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    look=None,
    square: bool = True,
    background: str = "white",
) -> list[Report]:
    """Decodes every picture completely, since a header says nothing about a truncated file; never raises.

    look: what else to find out about each upright RGB image, while it is decoded.
    square: crops will be, so that much of a long picture is lost.
    """
    paths = list(paths)
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1, len(paths)))) as pool:
        return list(pool.map(lambda path: _inspect(path, min_side, max_pixels, look, square, background), paths))


def _inspect(path, min_side: int | None, max_pixels: int, look, square: bool, background: str) -> Report:
    report = Report(path)
    try:
        with _opened(path, max_pixels) as image:
            report.width, report.height = width, height = image.size
        if width * height > 16_000_000:  # the memory of a check stays bounded, whatever the number of threads
            with _one_large_at_a_time:
                image, report.warnings = _decode(path, background, max_pixels)
        else:
            image, report.warnings = _decode(path, background, max_pixels)
        report.width, report.height = width, height = image.size
        shorter, longer = sorted((width, height))
        if longer > MAX_RATIO * shorter:
            report.problem = f"is {width}x{height}: the longer side is more than {MAX_RATIO} times the shorter"
        elif square and longer > 3 * shorter:
            report.warnings.append(f"is {width}x{height}: a square crop shows {shorter / longer:.0%} of it")
        if min_side and shorter < min_side:
            report.warnings.append(f"is {width}x{height}: smaller than {min_side}, it will be enlarged and soft")
        if look and not report.problem:
            report.seen = look(image)
    except BadImage as error:
        report.problem = error.reason
    return report


def name_of(source) -> str:
    if isinstance(source, dict):
        source = source.get("path") or ""
    if isinstance(source, (str, os.PathLike)) and os.fspath(source):
        return os.fspath(source)
    return str(getattr(source, "name", "picture in memory"))


def _opened(source, max_pixels: int):
    """An open Pillow image whose header was checked and whose pixels were not read yet."""
    from PIL import Image, UnidentifiedImageError

    name = name_of(source)
    if callable(source):
        source = source()
    if isinstance(source, dict):
        source = source.get("bytes") or source["path"]
    if isinstance(source, Image.Image):
        return source.copy()  # the caller's image is never closed
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    try:
        image = Image.open(source, formats=_formats())
    except UnidentifiedImageError:
        raise BadImage(name, _why_unknown(source)) from None
    except Image.DecompressionBombError:
        raise BadImage(name, f"claims to have more than {max_pixels:,} pixels") from None
    except Exception as error:  # a broken header raises whatever its plugin stumbled over
        raise BadImage(name, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise BadImage(name, f"claims to be {width}x{height}: more than {max_pixels:,} pixels")
    return image


@functools.cache
def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow only warns up to twice its limit; we refuse, so no warning is needed
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    if "HEIF" not in Image.OPEN:
        try:
            import pillow_heif

            pillow_heif.register_heif_opener()
        except ImportError:
            pass
    return [name for name in FORMATS if name in Image.OPEN]


def _why_unknown(source) -> str:
    try:
        with source if isinstance(source, io.BytesIO) else open(source, "rb") as file:
            file.seek(0)
            head = file.read(16)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not head:
        return "is empty (0 bytes)"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "is HEIC, which needs: pip install pillow-heif"
    return "is not a picture in a supported format (JPEG, PNG, WebP, AVIF, HEIC, TIFF, GIF, BMP, PPM)"


def _orientation(image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a camera's broken EXIF block is no reason to lose the photo
        return 1


def _decode(source, background: str, max_pixels: int):
    """=> (upright RGB image without metadata, what a person should know about the conversion)."""
    from PIL import Image, ImageColor, ImageOps

    notes: list[str] = []
    with _opened(source, max_pixels) as image:
        try:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # MPO: a phone's photo with a preview behind it
                notes.append(f"has {frames} frames: the first one is used")
            image.load()
            if _orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
            profile = image.info.get("icc_profile")
            if image.mode in ("P", "PA"):
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
                image = _eight_bits(image)
            if image.mode == "CMYK" and not profile:
                notes.append("is CMYK without a colour profile: its colours are approximate")
            if (profile and image.mode in ("RGB", "RGBA", "CMYK")) or image.mode == "LAB":
                image = _to_srgb(image, profile, notes)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    notes.append(f"has transparent parts: they become {background}")
                ground = Image.new("RGBA", image.size, ImageColor.getrgb(background))
                image = Image.alpha_composite(ground, image)
            image = image.convert("RGB")  # always a copy that no longer needs the file
        except Exception as error:  # decoders raise many kinds of errors over broken files
            raise BadImage(name_of(source), f"cannot be decoded: {error}") from None
    image.info = {}  # no EXIF, GPS or comments in anything that is saved from here on
    return image, notes


def _eight_bits(image):
    """16-bit, 32-bit or float grey => 8-bit grey; Pillow's own conversion clips everything above 255 to white."""
    high = image.getextrema()[1]
    if image.mode == "F":
        if not math.isfinite(sum(array("f", image.tobytes()))):
            raise ValueError("some of its values are no numbers")
        scale = 255.0 if high <= 1.0 else 1.0 if high <= 255 else 255 / max(high, 65535.0)
        return image.point(lambda value: value * scale + 0.5).convert("L")
    sixteen = image.mode.startswith("I;16") or 255 < high <= 65535
    scale = 1 / 257 if sixteen else 255 / high if high > 65535 else 1.0
    return image.convert("I").convert("F").point(lambda value: value * scale + 0.5).convert("L")


def _to_srgb(image, profile: bytes | None, notes: list[str]):
    """Display P3 of a phone, Adobe RGB of a camera, CMYK of a printer: the network knows sRGB only."""
    from PIL import ImageCms

    try:
        source = ImageCms.createProfile("LAB")
        if image.mode != "LAB":
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode.startswith("RGB") and "sRGB" in ImageCms.getProfileDescription(source):
            return image
        mode = image.mode if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("has a colour profile that cannot be applied: its colours are approximate")
        return image.convert("RGB") if image.mode == "CMYK" else image


# Fitting


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a crop that is given by its side or by both."""
    return (size, size) if isinstance(size, int) else size


def resized_size(width: int, height: int, size: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) once the picture just covers `size`: of a square, once its shorter side is that long.

    Rounded down like torchvision's Resize.
    """
    wide, high = sides(size)
    if width * high <= height * wide:
        return wide, int(wide * height / width)
    return int(high * width / height), high


def resize_to_cover(image, size: int | tuple[int, int], interpolation: str = "lanczos"):
    from PIL import Image

    width, height = resized_size(*image.size, size)
    if max(width, height) > MAX_RATIO * max(sides(size)):
        raise BadImage(name_of(image), f"is {image.width}x{image.height}: far too long for its shorter side")
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling[INTERPOLATIONS[interpolation]])


def crop_place(width: int, height: int, size: int | tuple[int, int], center: bool, rng=None) -> tuple[int, int]:
    """(top, left) of a crop of `size` inside a width x height picture; `rng` is a random.Random."""
    wide, high = sides(size)
    spare_rows, spare_columns = max(0, height - high), max(0, width - wide)
    if center:
        return round(spare_rows / 2), round(spare_columns / 2)
    return rng.randint(0, spare_rows), rng.randint(0, spare_columns)


def to_tensor(image):
    """RGB image => (3, height, width) fp32 in [-1, 1]."""
    import numpy
    import torch

    pixels = torch.from_numpy(numpy.array(image, dtype=numpy.uint8))  # (height, width, 3)
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0).contiguous()
