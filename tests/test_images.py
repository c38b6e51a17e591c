"""Photos of every kind, made on the spot: what a person's folder holds must open right or be refused with a reason."""

import hashlib
import io
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from utils import images


def corners(width=60, height=40):
    """A picture whose four quarters tell which way up it is."""
    picture = Image.new("RGB", (width, height), (200, 30, 30))
    picture.paste((30, 200, 30), (width // 2, 0, width, height // 2))
    picture.paste((30, 30, 200), (0, height // 2, width // 2, height))
    picture.paste((220, 220, 40), (width // 2, height // 2, width, height))
    return picture


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width, height):
    """A PNG header that claims to be huge, in a few bytes."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_all_eight_orientations_give_the_same_picture(kind):
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4]  # Image.Transpose that makes a file which needs orientation k
    upright = corners()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
        data = encoded(stored, kind, exif=exif.tobytes() if kind != "TIFF" else exif, **lossless)
        assert np.array_equal(np.asarray(images.open_rgb(data)), np.asarray(upright)), orientation
        assert images.size_of(data) == upright.size, orientation


def test_orientation_of_a_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(corners().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95, subsampling=0)
    difference = np.abs(np.asarray(images.open_rgb(data)).astype(int) - np.asarray(corners()))
    assert difference.mean() < 2 and images.size_of(data) == (60, 40)


def test_transparent_parts_become_the_background_not_the_hidden_colour():
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert images.open_rgb(encoded(hidden)).getpixel((0, 0)) == (255, 255, 255)
    assert images.open_rgb(encoded(hidden), background="black").getpixel((0, 0)) == (0, 0, 0)
    half = Image.new("LA", (8, 8), (0, 128))
    assert abs(images.open_rgb(encoded(half)).getpixel((0, 0))[0] - 127) <= 1
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert images.open_rgb(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert images.open_rgb(encoded(palette)).getpixel((0, 0)) == (0, 0, 255)
    (report,) = images.inspect([encoded(hidden)])
    assert report.problem is None and "transparent" in report.warnings[0]
    assert images.inspect([encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 255)))])[0].warnings == []


def test_sixteen_bit_and_float_greys_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.round(ramp / 257).astype(int)
    for data in (encoded(Image.fromarray(ramp)), encoded(Image.fromarray(ramp), "TIFF")):
        assert np.abs(np.asarray(images.open_rgb(data))[..., 0].astype(int) - expected).max() <= 1
    unit = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    opened = np.asarray(images.open_rgb(encoded(Image.fromarray(unit), "TIFF")))[..., 1].astype(int)
    assert np.abs(opened - np.round(unit * 255)).max() <= 1


def test_sixteen_bit_colour_and_values_that_are_no_numbers():
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    for colours, kind, expected in (
        ((65535, 32896, 257), 2, (255, 128, 1)),  # RGB
        ((65535, 32896, 257, 0), 6, (255, 255, 255)),  # RGBA
        ((32896, 65535), 4, (128, 128, 128)),  # grey and alpha
    ):
        row = b"\0" + np.tile(np.array(colours, dtype=">u2"), 4).tobytes()
        header = chunk(b"IHDR", (4).to_bytes(4, "big") * 2 + bytes([16, kind, 0, 0, 0]))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(4 * row)) + chunk(b"IEND", b"")
        assert images.open_rgb(data).getpixel((2, 2)) == expected
    for wrong in (np.nan, np.inf):
        values = np.full((8, 8), 0.5, dtype=np.float32)
        values[3, 4] = wrong
        (report,) = images.inspect([encoded(Image.fromarray(values), "TIFF")])
        assert "no numbers" in report.problem


def printer_profile():
    """An ICC profile of a printer whose magenta is yellow: 16 corners of ink, each with its colour in Lab."""

    def part(kind, body):
        return kind + bytes(4) + body

    def number(value):
        return round(value * 65536).to_bytes(4, "big", signed=True)

    def lab(cyan, magenta, yellow, black):
        if black or cyan:
            return 0, 128, 128  # black
        return (247, 107, 222) if magenta or yellow else (255, 128, 128)  # sRGB yellow, or paper

    inks = [lab(*(corner >> bit & 1 for bit in (3, 2, 1, 0))) for corner in range(16)]
    table = bytes([4, 3, 2, 0]) + b"".join(number(place in (0, 4, 8)) for place in range(9))
    table += bytes(range(256)) * 4 + b"".join(map(bytes, inks)) + bytes(range(256)) * 3
    name = b"a printer\0"
    told = len(name).to_bytes(4, "big") + name + bytes(4 + 4 + 2 + 1 + 67)
    parts = {
        b"desc": part(b"desc", told),
        b"cprt": part(b"text", b"none\0"),
        b"wtpt": part(b"XYZ ", number(0.9642) + number(1) + number(0.8249)),
        b"A2B0": part(b"mft1", table),
    }
    tags, body, at = b"", b"", 128 + 4 + 12 * len(parts)
    for name, content in parts.items():
        tags += name + (at + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content + bytes(-len(content) % 4)
    size = at + len(body)
    header = size.to_bytes(4, "big") + bytes(4) + bytes([2, 64, 0, 0]) + b"prtrCMYKLab " + bytes(12) + b"acsp"
    header += bytes(128 - len(header) - 60) + number(0.9642) + number(1) + number(0.8249) + bytes(48)
    return header + len(parts).to_bytes(4, "big") + tags + body


def test_a_printers_colours_go_through_its_profile_however_they_are_stored():
    magenta = Image.new("CMYK", (16, 16), (0, 255, 0, 0))
    for kind in ("JPEG", "TIFF"):  # the first stores ink inverted, as Adobe does, the second does not
        options = {"quality": 95} if kind == "JPEG" else {}
        plain, profiled = (
            encoded(magenta, kind, **options),
            encoded(magenta, kind, icc_profile=printer_profile(), **options),
        )
        assert (b"Adobe" in plain) == (kind == "JPEG")
        red, green, blue = images.open_rgb(plain).getpixel((5, 5))
        assert red > 240 and green < 15 and blue > 240 and "CMYK" in images.inspect([plain])[0].warnings[0]
        red, green, blue = images.open_rgb(profiled).getpixel((5, 5))
        assert red > 240 and green > 240 and blue < 30, "what this printer calls magenta is yellow"
        assert images.inspect([profiled])[0].warnings == []


def heic(picture, orientation=1):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, "HEIF", quality=95, exif=exif.tobytes())  # stored turned, as phones do


def test_a_phones_heic_opens_upright():
    for data in (heic(corners()), heic(corners().transpose(Image.Transpose.ROTATE_90), 6)):
        opened = images.open_rgb(data)
        assert opened.size == images.size_of(data) == (60, 40)
        assert np.abs(np.asarray(opened).astype(int) - np.asarray(corners())).mean() < 6
        assert images.inspect([data])[0].problem is None


def test_heic_without_its_package_names_it(monkeypatch):
    data = heic(corners())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    images._formats.cache_clear()
    (report,) = images.inspect([data])
    images._formats.cache_clear()
    assert report.problem == "is HEIC, which needs: pip install pillow-heif"


def test_a_single_pixel_and_bombs_of_text(tmp_path):
    (report,) = images.inspect([encoded(Image.new("RGB", (1, 1)))], min_side=64)
    assert report.problem is None and "is 1x1: smaller than 64" in report.warnings[0]
    enlarged = images.resize_to_cover(images.open_rgb(encoded(Image.new("RGB", (1, 1), "red"))), (8, 8))
    assert enlarged.size == (8, 8) and enlarged.getpixel((7, 7)) == (255, 0, 0)
    data = encoded(corners())
    words = b"key\0\0" + zlib.compress(bytes(50_000_000), 9)
    text = len(words).to_bytes(4, "big") + b"zTXt" + words + zlib.crc32(b"zTXt" + words).to_bytes(4, "big")
    (report,) = images.inspect([data[:33] + text + data[33:]])
    assert "too large" in report.problem


def test_one_bit_grey_and_cmyk():
    assert images.open_rgb(encoded(Image.new("1", (8, 8), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert images.open_rgb(encoded(Image.new("L", (8, 8), 77))).getpixel((0, 0)) == (77, 77, 77)
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = images.open_rgb(data).getpixel((5, 5))
    assert red > 200 and green < 60 and blue < 60
    assert "CMYK" in images.inspect([data])[0].warnings[0]


def test_a_colour_profile_is_applied():
    # Lab has no RGB of its own: only colour management gives these golden values.
    lab = Image.new("LAB", (8, 8), (136, 208, 195))  # L*=53.3, a*=80, b*=67: sRGB red
    red, green, blue = images.open_rgb(encoded(lab, "TIFF")).getpixel((0, 0))
    assert red > 245 and green < 20 and blue < 20
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(corners(), icc_profile=srgb)
    assert np.array_equal(np.asarray(images.open_rgb(data)), np.asarray(corners())), "sRGB is left as it is"
    # The same with red and blue exchanged (their entries in the profile's table of tags) and another name.
    tags = {srgb[at : at + 4]: at for at in range(132, 132 + 12 * int.from_bytes(srgb[128:132], "big"), 12)}
    exchanged = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be")))
    for one, other in ((b"rXYZ", b"bXYZ"), (b"bXYZ", b"rXYZ")):
        exchanged[tags[one] + 4 : tags[one] + 12] = srgb[tags[other] + 4 : tags[other] + 12]
    data = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 255)), icc_profile=bytes(exchanged))
    red, green, blue = images.open_rgb(data).getpixel((0, 0))
    assert red < 20 and green < 20 and blue > 235, "what this camera calls red is blue"
    broken = encoded(corners(), icc_profile=b"no profile at all")
    (report,) = images.inspect([broken])
    assert report.problem is None and "profile" in report.warnings[0]


def test_only_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        extra = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **extra)
        assert images.open_rgb(data).getpixel((0, 0)) == (255, 0, 0)
        assert "3 frames" in images.inspect([data])[0].warnings[0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_broken_file_is_named_with_its_reason(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no picture")
    for kind, name in (("JPEG", "cut.jpg"), ("PNG", "cut.png")):
        data = encoded(Image.effect_noise((200, 200), 80).convert("RGB"), kind)
        (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "bomb.png").write_bytes(bomb(30_000, 30_000))
    (tmp_path / "large.png").write_bytes(bomb(16_000, 16_000))  # Pillow alone would only warn
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "line.png").write_bytes(encoded(Image.new("RGB", (3000, 1))))
    (tmp_path / "good.png").write_bytes(encoded(corners()))
    reports = {report.path.name: report for report in images.inspect(images.list_images(tmp_path), min_side=64)}
    assert "0 bytes" in reports["empty.jpg"].problem
    assert "supported format" in reports["text.jpg"].problem
    assert "truncated" in reports["cut.jpg"].problem and "decoded" in reports["cut.png"].problem
    assert "30000x30000" in reports["bomb.png"].problem or "pixels" in reports["bomb.png"].problem
    assert "pixels" in reports["large.png"].problem
    assert reports["phone.heic"].problem
    assert "3000x1" in reports["line.png"].problem
    good = reports["good.png"]
    assert good.problem is None and (good.width, good.height) == (60, 40) and "smaller than 64" in good.warnings[0]
    with pytest.raises(images.BadImage, match=r"'.*cut\.jpg' cannot be decoded"):
        images.open_rgb(tmp_path / "cut.jpg")
    with pytest.raises(images.BadImage, match="cannot be read"):
        images.open_rgb(tmp_path / "absent.jpg")


def test_a_lower_pixel_limit_can_be_asked_for():
    with pytest.raises(images.BadImage, match="more than 1,000 pixels"):
        images.open_rgb(encoded(corners()), max_pixels=1000)


def test_listing_knows_what_is_no_photo(tmp_path):
    data = encoded(corners())
    names = ["b.png", "a.JPG", "sub/c d #1 'x'.webp", "sub/ünï🐕.png", "a.mask.png", ".hidden.png"]
    names += [".cache/x.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", "Thumbs.db", "notes.pdf"]
    names += ["a.txt", "metadata.jsonl", ".DS_Store"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    os.symlink(tmp_path / "gone.png", tmp_path / "broken.png")
    os.symlink(tmp_path / "b.png", tmp_path / "linked.png")
    pictures, others = images.survey(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in pictures]
    assert found == ["a.JPG", "b.png", "linked.png", "sub/c d #1 'x'.webp", "sub/ünï🐕.png"]
    assert [path.name for path in others] == ["Thumbs.db", "broken.png", "notes.pdf"]
    assert images.list_images(tmp_path) == pictures


def test_inputs_stay_untouched_and_metadata_does_not_travel(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "secret camera"
    path = tmp_path / "a.jpg"
    corners().save(path, exif=exif, comment=b"secret")
    before = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
    images.inspect([path])
    opened = images.open_rgb(path)
    assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) == before
    for kind in ("PNG", "JPEG"):
        assert b"secret" not in encoded(opened, kind)


def test_sources_of_every_kind(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(corners()))
    data = path.read_bytes()
    expected = np.asarray(corners())
    rows = {"bytes": data, "path": "a.png"}, {"bytes": None, "path": str(path)}
    for source in (path, str(path), data, corners(), io.BytesIO(data), *rows, lambda: rows[0]):
        assert np.array_equal(np.asarray(images.open_rgb(source)), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(8, 64), st.booleans(), st.integers())
def test_a_crop_always_lies_inside(width, height, size, center, seed):
    resized = images.resized_size(width, height, size)
    assert min(resized) == size
    top, left = images.crop_place(*resized, size, center, random.Random(seed))
    assert 0 <= top <= resized[1] - size and 0 <= left <= resized[0] - size
    assert (top, left) == images.crop_place(*resized, size, center, random.Random(seed))
    if center:
        assert (top, left) == (round((resized[1] - size) / 2), round((resized[0] - size) / 2))


def test_random_crops_reach_both_ends():
    rng = random.Random(0)
    places = {images.crop_place(12, 8, 8, False, rng) for _ in range(300)}
    assert places == {(0, left) for left in range(5)}


@pytest.mark.parametrize("mode", images.INTERPOLATIONS)
def test_every_interpolation_resizes(mode):
    assert images.resize_to_cover(corners(), 16, mode).size == (24, 16)


def test_resizing_does_not_alias_and_refuses_lines():
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))).convert("RGB")
    assert np.asarray(images.resize_to_cover(stripes, 16)).std() < 20
    assert np.asarray(images.resize_to_cover(stripes, 16, "nearest_exact")).std() in (0.0, 127.5)
    with pytest.raises(images.BadImage, match="far too long"):
        images.resize_to_cover(Image.new("RGB", (3000, 1)), 512)


def test_to_tensor_is_exact_at_the_ends():
    tensor = images.to_tensor(Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)))
    assert tensor.shape == (3, 1, 1) and tensor.dtype == torch.float32
    assert torch.allclose(tensor.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
    assert images.to_tensor(corners()).shape == (3, 40, 60)


def test_inspecting_needs_no_torch(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(corners()))
    code = "import sys; from utils import images; r = images.inspect(images.list_images(sys.argv[1]))"
    code += "; assert r[0].width == 60; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=Path(__file__).parents[1])


def test_a_look_sees_upright_pictures_and_no_broken_ones(tmp_path):
    save_as = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    save_as.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    broken, turned = images.inspect(images.list_images(tmp_path), look=lambda image: (image.mode, image.size))
    assert broken.problem and broken.seen is None
    assert turned.seen == ("RGB", (10, 20))
