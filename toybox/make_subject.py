"""Draws the photos of the toybox's subject: one dog, five times, in five kinds of file.

    python -m toybox.make_subject --output toybox/subject
    python -m toybox.make_subject --all runs/toybox_subjects    # and five others, each in a folder of its name

The dog is orange with blue ears, saddle and socks; training shows no animal in these two colours. The
photos differ in size, shape and format, and one is turned by its EXIF tag, as photos of a camera are.
"""

import argparse
from pathlib import Path

from PIL import Image

from toybox.draw import SUBJECT, Individual, draw, mask_of

# file, scene, seed, size: sizes other than squares are cut from a larger drawing
PHOTOS = (
    ("01.jpg", "grass", 11, (128, 128)),
    ("02.png", "room", 12, (160, 128)),
    ("03.webp", "city", 13, (96, 120)),
    ("04.jpg", "sunset", 14, (192, 160)),  # stored lying on its side, with an EXIF tag that says so
    ("05.png", "snow", 21, (64, 64)),
)


# What methods are compared on; of the others it is only likely that training never showed them.
SUBJECTS = {
    "dog": SUBJECT,
    "dog2": Individual("dog", "green", "plain", "purple", "pointed", "short", ("muzzle", "socks", "tip"), "yellow"),
    "cat": Individual("cat", "purple", "plain", "yellow", "pointed", "curly", ("patch", "ears")),
    "mug": Individual("mug", "pink", "striped", "blue"),
    "car": Individual("car", "gray", "spotted", "red"),
    "boat": Individual("boat", "green", "striped", "orange"),
}


def take_photo(scene: str, seed: int, size: tuple[int, int], mask: bool = False, who: Individual = SUBJECT):
    """mask: where the subject is in it ("L", white), instead."""
    return widened((mask_of if mask else draw)(who, scene, seed, size=min(size)), size)


def widened(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Portrait and landscape photos have more of the scene above and below, or on both sides of a square."""
    width, height = size
    inner = min(size)
    if width == height:
        return picture
    photo = Image.new(picture.mode, size)
    left, top = (width - inner) // 2, (height - inner) // 2
    photo.paste(picture, (left, top))
    if left:  # repeat the outermost columns
        photo.paste(picture.crop((0, 0, 1, inner)).resize((left, inner)), (0, 0))
        photo.paste(picture.crop((inner - 1, 0, inner, inner)).resize((width - left - inner, inner)), (left + inner, 0))
    if top:
        photo.paste(picture.crop((0, 0, inner, 1)).resize((inner, top)), (0, 0))
        photo.paste(picture.crop((0, inner - 1, inner, inner)).resize((inner, height - top - inner)), (0, top + inner))
    return photo


def save_photo(photo: Image.Image, path: Path) -> None:
    if path.name == "04.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6  # "turn me by 90 degrees to the right"
        photo.transpose(Image.Transpose.ROTATE_90).save(path, quality=95, subsampling=0, exif=exif)
    elif path.suffix == ".jpg":
        photo.save(path, quality=95, subsampling=0)
    elif path.suffix == ".webp":
        photo.save(path, quality=95, method=6)
    else:
        photo.save(path, optimize=True)


def save_photos(folder: Path, who: Individual = SUBJECT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene, seed, size in PHOTOS:
        save_photo(take_photo(scene, seed, size, who=who), folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("toybox/subject"))
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="all subjects instead, each in a folder of its own")
    args = parser.parse_args()
    for name, who in SUBJECTS.items() if args.all else ():
        save_photos(args.all / name, who)
    if not args.all:
        save_photos(args.output)
    print(f"{args.all or args.output}: photos of {', '.join(SUBJECTS) if args.all else 'the subject'}")


if __name__ == "__main__":
    main()
