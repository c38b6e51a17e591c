"""The pictures a run leaves: PNGs that say how they were made, small copies, photos as they are trained on.

Nothing here knows what trains: names of files, settings inside them, and writing them whole.
"""

import base64
import copy
import io
import json
import os
import re
import textwrap
from pathlib import Path

from utils import writing

SIDE = 240  # pixels of an embedded copy: about 1.6 times its size on the page
MOST_PHOTOS = 12  # instance and class images shown, each
PREVIEW = "preview"
SHEET = "data_preview.png"
MOST_ON_SHEET = 60


def png_bytes(image, settings: dict) -> bytes:
    """A PNG that says how it was made: `settings` as JSON under the name "settings"."""
    from PIL import PngImagePlugin

    told = PngImagePlugin.PngInfo()
    told.add_itxt("settings", json.dumps(settings, ensure_ascii=False))
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=told)
    return stream.getvalue()


def save_png(image, path: Path, settings: dict) -> None:
    writing.write(path, png_bytes(image, settings))


def save_beside(image, path: Path, settings: dict) -> Path:
    """Saved as NAME.png, or where something else lies under that name as NAME-2.png and so on. => where"""
    data, number, chosen = png_bytes(image, settings), 1, Path(path)
    while chosen.exists() and not (chosen.is_file() and chosen.read_bytes() == data):
        number += 1
        chosen = path.with_name(f"{path.stem}-{number}{path.suffix}")
    writing.write(chosen, data)
    return chosen


def small_copy(path: Path, box: tuple[int, int] = (SIDE, SIDE)) -> dict:
    from PIL import Image

    with Image.open(path, formats=["PNG", "JPEG"]) as image:
        image.load()
        settings = png_settings(image)
        image = image.convert("RGB")
    image.thumbnail(box, reducing_gap=2)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=86)
    data = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return {"data": data, "width": image.width, "height": image.height, "settings": settings}


def png_settings(image) -> dict:
    """What validation and infer.py wrote into the file; anything else counts as nothing."""
    try:
        told = json.loads(image.info.get("settings", "{}"))
    except (TypeError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def sample_files(folder: Path, kind: str = "samples") -> dict[int, dict[tuple[int, int], Path]]:
    """step -> (prompt number, image number) -> file, for samples/step-000100/00-00.png."""
    found = {}
    for path in Path(folder).glob(f"{kind}/step-*/*.png"):
        where = re.fullmatch(r"step-(\d+)", path.parent.name)
        which = re.fullmatch(r"(\d+)-(\d+)", path.stem)
        if where and which:
            found.setdefault(int(where[1]), {})[int(which[1]), int(which[2])] = path
    return found


def preview(dataset, output_dir) -> None:
    with writing.unless_it_fails(Path(output_dir) / PREVIEW):
        _preview(dataset, output_dir)


def _preview(dataset, output_dir) -> None:
    """Save the first records of a dataset as the network will see them, for the report.

    Records are a pure function of their position, so looking at them changes nothing. What a mask leaves out is red.
    Main process only.
    """
    from PIL import Image

    from utils import sheets

    dataset = copy.copy(dataset)
    dataset.latents = None  # a dataset whose latents are cached shows pixels no more; this copy does
    dataset.caption_dropout = 0.0  # the words that are trained on, not whether this visit goes without
    folder = Path(output_dir) / PREVIEW
    folder.mkdir(parents=True, exist_ok=True)
    counts = {False: len(dataset.instance), True: len(dataset.classes)}
    want = {kind: min(count, MOST_PHOTOS) for kind, count in counts.items()}
    listed, seen = [], set()
    for position in range(min(len(dataset), 4 * MOST_PHOTOS)):  # the same photo twice would never fill the list
        for record in dataset[position]:
            kind, key = bool(record["is_class"]), record["keys"]
            if want[kind] == 0 or key in seen:
                continue
            seen.add(key)
            want[kind] -= 1
            pixels = ((record["pixels"] + 1) * 127.5).round().clip(0, 255).byte()  # (3, h, w) in [-1, 1]
            name = f"{'class' if kind else 'instance'}-{len(listed):02d}.png"
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            masked = "mask" in record and bool((record["mask"] < 255).any())
            if masked:
                picture = sheets.veiled(picture, Image.fromarray(record["mask"][0].numpy()))
            with writing.aside(folder / name) as staged:
                picture.save(staged)
            listed.append({"file": name, "is_class": kind, "caption": record["captions"], "masked": masked})
        if not any(want.values()):
            break
    told = {"images": listed, "instance_count": counts[False], "class_count": counts[True]}
    writing.write(folder / "preview.json", json.dumps(told, ensure_ascii=False, indent=1))


def contact_sheet(dataset, output_dir, count_tokens=None, limit: int = 0, photos=None) -> None:
    with writing.unless_it_fails(Path(output_dir) / SHEET):
        _contact_sheet(dataset, output_dir, count_tokens, limit, photos)


def _contact_sheet(dataset, output_dir, count_tokens, limit: int, photos) -> None:
    """data_preview.png: the first photos with their crop, caption and tokens, to find mistakes before they are learned.

    What a mask leaves out is red. Main process only.
    count_tokens: a caption => its tokens, of which the model reads `limit`.
    photos: the dataset's own, with masks that it does not know of.
    """
    from utils import images, sheets

    if photos:
        dataset = copy.copy(dataset)
        dataset.instance = photos

    cells, notes, marked = [], [], []
    for example, caption, picture, corner, shape, mask in dataset.first_views(MOST_ON_SHEET):
        picture = sheets.veiled(picture, mask) if mask else picture
        # Shrunk at once: sixty photos of a large resolution would fill the memory.
        cells.append(sheets.shrink(sheets.lit(picture, *corner, shape), SIDE))
        lines = textwrap.wrap(caption, 32, max_lines=3, placeholder="…")
        several = 1 if isinstance(example.caption, str) else len(example.caption)
        tokens = count_tokens(caption) if count_tokens else 0
        told = [f"{tokens} of {limit} tokens"] if count_tokens else []
        told += [f"1 of {several} captions"] if several > 1 else []
        told += [f"{shape[0]}x{shape[1]}"] if dataset.bucketed else []
        name = os.path.basename(images.name_of(example.source))
        notes.append([name, *lines, ", ".join(told)])
        marked.append(tokens > limit)
    if not cells:
        return
    stream = io.BytesIO()
    sheets.contact(cells, notes, marked).save(stream, "PNG")
    writing.write(Path(output_dir) / SHEET, stream.getvalue())
