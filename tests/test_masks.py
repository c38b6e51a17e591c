"""Masks go where their photos go: found, checked, turned, cropped and mirrored alike, part of the data's identity."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils import cache, datasets, errors, images, lost, masks, report
from utils.randomness import Draws

WHITE = (255, 255, 255)


def subject(size=(60, 40), box=(10, 8, 30, 24)):
    """A photo that is white exactly where its mask is, so that the one tells whether the other was moved alike."""
    photo, mask = Image.new("RGB", size, (20, 90, 160)), Image.new("L", size)
    photo.paste(WHITE, box)
    mask.paste(255, box)
    return photo, mask


@pytest.fixture
def folder(tmp_path):
    """Three photos: one with a mask, one stored on its side with an upright mask, one without."""
    here = tmp_path / "photos"
    (here / "sub").mkdir(parents=True)
    photo, mask = subject()
    photo.save(here / "a.png")
    mask.save(here / "a.mask.png")
    photo, mask = subject((40, 60), (4, 30, 20, 52))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(here / "sub" / "Turned.png", exif=exif)
    mask.save(here / "sub" / "turned.MASK.png")
    Image.new("RGB", (50, 50), "red").save(here / "whole.png")
    return here


def masked(folder, **options):
    return masks.attach(datasets.folder(folder, "p"), folder, **options)


def test_masks_are_found_and_are_no_photos(folder, tmp_path):
    photos = images.list_images(folder)
    assert [path.name for path in photos] == ["a.png", "Turned.png", "whole.png"]
    beside = masks.files(photos, folder)
    assert [path and path.name for path in beside] == ["a.mask.png", "turned.MASK.png", None]
    (tmp_path / "masks" / "sub").mkdir(parents=True)
    (folder / "a.mask.png").rename(tmp_path / "masks" / "a.png")
    (folder / "sub" / "turned.MASK.png").rename(tmp_path / "masks" / "sub" / "Turned.mask.png")
    assert masks.files(photos, folder) == [None] * 3
    elsewhere = masks.files(photos, folder, str(tmp_path / "masks"))
    assert [path and path.name for path in elsewhere] == ["a.png", "Turned.mask.png", None]


def test_unusable_masks_are_named(folder, capsys):
    def found(alpha=False):
        reports = images.inspect(images.list_images(folder))
        paths = [report.path for report in reports]
        return masks.check(reports, paths if alpha else masks.files(paths, folder), alpha)

    assert found() == ([], 2)
    Image.new("L", (60, 40), 3).save(folder / "a.mask.png")
    Image.new("L", (60, 40), 255).save(folder / "sub" / "turned.MASK.png")  # as the photo lies in its file
    (folder / "whole.mask.png").write_text("no picture")
    (black, size, text), count = found()
    assert count == 3 and "a.mask.png' is black" in black and "whole.mask.png' is not a picture" in text
    assert "turned.MASK.png' is 60x40 and its photo" in size and "Turned.png' 40x60" in size and "upright" in size
    assert found(alpha=True) == ([], 0)
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(folder / "clear.png")
    (complaint,), count = found(alpha=True)
    assert count == 1 and "clear.png' is black" in complaint
    with pytest.raises(SystemExit) as stop:
        masks.attach(datasets.folder(folder, "p"), alpha=True)
    assert stop.value.code == errors.DATA and "clear.png" in capsys.readouterr().err


def test_masked_loss_without_a_mask_is_refused(folder, capsys):
    (folder / "a.mask.png").unlink()
    (folder / "sub" / "turned.MASK.png").unlink()
    for options in ({}, {"alpha": True}):
        with pytest.raises(SystemExit) as stop:
            masked(folder, **options)
        assert stop.value.code == errors.DATA and "no photo has a mask" in capsys.readouterr().err


def test_a_cut_out_subject_is_a_mask_too(tmp_path):
    cut = Image.new("RGBA", (8, 8), (255, 255, 255, 0))  # white hides under what is transparent
    cut.paste((255, 255, 255, 255), (0, 0, 4, 8))
    cut.save(tmp_path / "cut.png")
    assert list(masks.open_grey(tmp_path / "cut.png").resize((8, 1)).tobytes()) == [255] * 4 + [0] * 4
    palette = Image.new("P", (8, 8))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.paste(1, (0, 0, 2, 8))
    palette.save(tmp_path / "palette.png", transparency=0)
    assert list(masks.open_grey(tmp_path / "palette.png", alpha=True).resize((8, 1)).tobytes()) == [255] * 2 + [0] * 6


@pytest.mark.parametrize("center", [True, False])
def test_a_mask_moves_as_its_photo_does(folder, center):
    dataset = datasets.DreamBooth(masked(folder), size=20, center_crop=center, random_flip=True, interpolation="box")
    places, flips = set(), set()
    for position in range(60):
        (record,) = dataset[position]
        assert record["mask"].shape == (1, 20, 20) and record["mask"].dtype == torch.uint8
        red = (record["pixels"][:1] + 1) / 2  # red goes from 20 outside of the subject to 255 inside
        if record["keys"] == dataset.instance[2].key:
            assert (record["mask"] == 255).all(), "a photo without a mask counts as a whole"
            continue
        covered = (red * 255 - 20) / 235
        assert (covered - record["mask"] / 255).abs().max() < 0.01
        places.add(record["crop_top_left"])
        flips.add(bool(record["mask"][..., :10].sum() > record["mask"][..., 10:].sum()))
    assert len(places) > 10 or center
    assert flips == {True, False}


def _beside(size, box, masks_of="L"):
    photo, mask = subject(size, box)
    return datasets.Example(photo, "p", key=str(size), mask=masks.Mask(mask, key=f"mask {size} {box}"))


@pytest.mark.parametrize("kind", ["photo", "class image", "bucket"])
def test_a_mask_outside_of_every_crop_is_refused(capsys, kind):
    """White at the right edge of a wide photo: the centre crop shows none of it, and every loss would be 0."""
    outside, fine = _beside((96, 32), (88, 0, 96, 32)), _beside((96, 32), (40, 0, 50, 32))
    how = {"center_crop": True}
    if kind == "bucket":
        how = {"resolution_buckets": "32x32,32x64", "center_crop": True}

    def made(example, **how):
        classes = [datasets.Example(example.source, "c", True, "c", example.mask)] if kind == "class image" else ()
        photo = datasets.Example(subject()[0], "p", key="photo") if classes else example
        return datasets.DreamBooth([photo], classes, size=32, **how)

    with pytest.raises(SystemExit) as stop:
        made(outside, **how)
    said = capsys.readouterr().err
    assert stop.value.code == errors.DATA and "lies outside of the crop of 32x32: nothing of its photo" in said
    made(fine, **how)
    made(outside, resolution_buckets="96x32" if kind != "class image" else "off")
    dot = _beside((3200, 3200), (0, 0, 1, 1))
    with pytest.raises(SystemExit):
        made(dot)
    assert "too small to be seen at 32x32" in capsys.readouterr().err


@pytest.mark.parametrize("flip", [False, True])
def test_random_crops_show_something_of_the_mask(flip):
    """One in five crops would show any of it; the others are drawn again, and those that do are as they always were."""
    example = _beside((320, 32), (310, 0, 312, 32))
    dataset = datasets.DreamBooth([example], size=32, seed=4, random_flip=flip)
    plain = datasets.DreamBooth(masks.without([example]), size=32, seed=4, random_flip=flip)
    same = 0
    for position in range(60):
        (record,), (free,) = dataset[position], plain[position]
        assert record["mask"].max() == 255 and torch.equal(record["pixels"], dataset[position][0]["pixels"])
        left, there = free["crop_top_left"][1], (8, 10) if record["crop_top_left"][1] < 160 and flip else (310, 312)
        if left < there[1] and left + 32 > there[0]:
            assert record["crop_top_left"] == free["crop_top_left"]
            same += 1
    assert 0 < same < 60
    assert len({dataset[position][0]["crop_top_left"] for position in range(60)}) > 5


def test_a_mask_that_chance_does_not_meet_is_still_seen(monkeypatch):
    monkeypatch.setattr(datasets, "MOST_CROPS", 1)
    for box in ((0, 0, 2, 32), (3000, 0, 3002, 32), (3198, 0, 3200, 32)):
        dataset = datasets.DreamBooth([_beside((3200, 32), box)], size=32, seed=4)
        assert all(dataset[position][0]["mask"].max() == 255 for position in range(5))


def test_alpha_masks_are_the_photos_own(tmp_path):
    photo, mask = subject()
    photo.putalpha(mask)
    exif = Image.Exif()
    exif[0x0112] = 3
    photo.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "a.png", exif=exif)
    (example,) = masks.attach(datasets.folder(tmp_path, "p"), alpha=True)
    assert np.array_equal(np.asarray(example.mask.open()), np.asarray(mask))
    (record,) = datasets.DreamBooth([example], size=40)[0]
    assert {0, 255} <= set(record["mask"].flatten().tolist())


def test_the_mask_is_part_of_the_datas_identity(folder):
    def fingerprint(examples):
        return datasets.DreamBooth(examples, size=16).fingerprint()

    plain, before = fingerprint(datasets.folder(folder, "p")), fingerprint(masked(folder))
    assert before == fingerprint(masked(folder)) != plain
    _, mask = subject(box=(10, 8, 30, 25))
    mask.save(folder / "a.mask.png")
    assert before != fingerprint(masked(folder)) and plain == fingerprint(datasets.folder(folder, "p"))
    (folder / "a.mask.png").unlink()
    assert before != fingerprint(masked(folder))


def test_class_images_are_never_masked_and_cached_equals_uncached(folder, class_photos):
    from test_cache import Family, Run, some

    classes = datasets.folder(class_photos, "c", captions=False, is_class=True)
    dataset = datasets.DreamBooth(masked(folder), classes, size=16, center_crop=True, random_flip=True)
    uncached = some(dataset)
    family = Family()
    expected = [family.latents(batch, Draws(2, batch["ids"])) for batch in uncached]
    cache.latents(Run(), family, dataset, "on")
    for batch, before, latents in zip(some(dataset), uncached, expected, strict=True):
        assert torch.equal(batch["mask"], before["mask"])
        assert torch.equal(family.latents(batch, Draws(2, batch["ids"])), latents)
        assert (batch["mask"][batch["is_class"]] == 255).all()
        assert batch["mask"].shape == (6, 1, 16, 16)
    assert "mask" not in some(datasets.DreamBooth(datasets.folder(folder, "p"), classes, size=16), count=1)[0]


def test_a_mask_lost_while_training_is_handled_as_a_lost_photo(tmp_path, monkeypatch):
    from test_cache import Family, Run

    monkeypatch.setattr(lost, "RETRIES", ())
    monkeypatch.setattr(datasets, "REMEMBERED", 0)
    for name, size in (("wide-0", (64, 32)), ("wide-1", (64, 32)), ("high", (32, 64))):
        photo, mask = subject(size, (2, 2, 20, 20))
        photo.putpixel((0, 0), (len(name), ord(name[-1]), 0))  # no two are one picture
        photo.save(tmp_path / f"{name}.png")
        mask.save(tmp_path / f"{name}.mask.png")
    dataset = datasets.DreamBooth(masked(tmp_path), size=32, center_crop=True,
                                  resolution_buckets="auto", side_factor=8)  # fmt: skip
    cache.latents(Run(), Family(), dataset, "on")
    (tmp_path / "wide-1.mask.png").unlink()
    records = [dataset[position][0] for position in range(3)]
    (told,) = (record for record in records if record["lost"])
    assert "wide-1.mask.png' cannot be read" in told["lost"]
    (tmp_path / "high.mask.png").unlink()
    records = [dataset[position][0] for position in range(3)]
    (high,) = (record for record in records if record["lost"] and "high" in record["lost"])
    wide = next(record for record in records if record is not high)
    assert high["latent_mean"].shape[-2:] == wide["latent_mean"].shape[:0:-1]


def test_the_contact_sheet_shows_the_mask(folder, tmp_path):
    dataset = datasets.DreamBooth(masked(folder), size=40)
    report.contact_sheet(dataset, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "data_preview.png").convert("RGB")).astype(int)
    report.contact_sheet(datasets.DreamBooth(datasets.folder(folder, "p"), size=40), tmp_path)
    plain = np.asarray(Image.open(tmp_path / "data_preview.png").convert("RGB")).astype(int)
    changed = np.abs(sheet - plain).sum(axis=2) > 0
    assert changed.any() and (sheet[changed][:, 0] > plain[changed][:, 0]).all(), "red where nothing is learned"
    assert not changed[(plain == 255).all(axis=2)].any(), "the subject stays as it is"
