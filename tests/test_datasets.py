"""Captions, records, order and batches, with small pictures made on the spot."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils import captions, concepts, datasets, images, lost, randomness


def save(path, size=(48, 32), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.effect_noise(size, 60).convert("RGB")
    picture.paste((seed * 40 % 256, seed * 90 % 256, 128), (0, 0, 9, 9))
    picture.save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["a.png", "b.png", "sub/c.png"]):
        save(tmp_path / name, seed=number)
    return tmp_path


def read(folder, prompt="a photo of sks dog", column=None):
    return captions.read(folder, images.list_images(folder), prompt, column)


def test_captions_come_from_the_nearest_source(folder):
    (folder / "a.txt").write_text("from the text file\n")
    (folder / "b.caption").write_text("\ufeff  first one  \r\n\r\nsecond one\r\n", encoding="utf-8")
    (folder / "sub" / "c.txt").write_text("overruled")
    (folder / "metadata.jsonl").write_text('{"file_name": "sub/c.png", "text": "from the table"}\n')
    assert read(folder) == (["from the text file", ("first one", "second one"), "from the table"], [])
    os.remove(folder / "a.txt")
    assert read(folder)[0][0] == "a photo of sks dog"
    assert "no caption" in read(folder, prompt=None)[1][0]
    examples = datasets.folder(folder, "a photo of sks dog")
    assert [example.caption for example in examples] == read(folder)[0]
    assert [one.caption for one in datasets.folder(folder, "p", captions=False, is_class=True)] == ["p"] * 3
    assert datasets.folder(None) == []


def test_tables_in_subfolders_and_in_csv(folder):
    (folder / "metadata.csv").write_text('\ufefffile_name,prompt\r\na.png,"one, two"\r\nb.png,\u2028x\r\n', "utf-8")
    row = {"file_name": "c.png", "caption": ["x", "y\u2028z"], "text": "chosen"}
    (folder / "sub" / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    assert read(folder) == (["one, two", "x", "chosen"], [])
    assert "no column 'caption'" in read(folder, column="caption")[1][0]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(lambda text: text.strip()))
@settings(max_examples=40, deadline=None)
def test_any_text_survives_the_table(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("texts")
    save(folder / "a.png", (8, 8))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}), "utf-8")
    assert read(folder) == ([text.strip()], [])
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False), "utf-8"
    )
    assert read(folder) == ([text.strip()], [])


def test_every_mistake_in_a_table_is_reported_with_its_line(folder, capsys):
    (folder / "notes.md").write_text("no picture")
    rows = ['{"file_name": "a.png", "text": "fine"}', "{not json", '["list"]', '{"text": "nameless"}']
    rows += ['{"file_name": "gone.png", "text": "x"}', '{"file_name": "b.png", "text": null}']
    rows += ['{"file_name": "a.png", "text": "again"}', '{"file_name": "b.png", "label": 3}']
    rows += ['{"file_name": "notes.md", "text": "x"}', "", '{"file_name": "b.png", "text": ["x", " "]}']
    rows += ['{"file_name": "b.png", "text": "one", "text": "two"}']
    (folder / "metadata.jsonl").write_text("\r\n".join(rows))
    reasons = ["JSON", "object", "file_name", "does not exist", "null", "already", "no column", "no picture", '["x"']
    reasons += ["twice"]
    complaints = read(folder)[1]
    lines = [2, 3, 4, 5, 6, 7, 8, 9, 11, 12]
    for complaint, line, reason in zip(complaints, lines, reasons, strict=True):
        assert complaint.startswith(f"{folder / 'metadata.jsonl'}:{line}: ") and reason in complaint
    with pytest.raises(SystemExit) as stop:
        datasets.folder(folder, "prompt")
    assert stop.value.code == 3 and capsys.readouterr().err.count("error: ") == 10


def table(folder, **columns):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "metadata.parquet", row_group_size=3)


def test_a_parquet_table_is_read_like_the_others(folder):
    """A list of captions, a column of one's own, a table in a sub-folder; columns that nobody asked for stay unread."""
    rows = {"file_name": ["b.png", "a.png"], "text": [["one", " two "], ["three"]], "image": [b"x" * 1000, None]}
    table(folder, **rows, mine=["my own", "another"])
    table(folder / "sub", file_name=["c.png"], prompt=["below"])
    assert read(folder) == (["three", ("one", "two"), "below"], [])
    found, complaints = read(folder, column="mine")
    assert found[:2] == ["another", "my own"] and "only: file_name, prompt" in complaints[0]


def test_a_parquet_table_is_checked_like_the_others(folder, tmp_path_factory):
    names = ["a.png", None, "gone.png", "b.png", "a.png", "../out.png", "/etc/passwd", " "]
    table(folder, file_name=names, text=["fine", "x", "x", None, "again", "x", "x", "x"])
    reasons = {1: "has no file_name", 2: "does not exist", 3: "null", 4: "already", 5: "out of the folder"}
    reasons |= {6: "out of the folder", 7: "has no file_name"}
    complaints = read(folder)[1]
    assert len(complaints) == len(reasons)
    for (row, reason), complaint in zip(reasons.items(), complaints):
        assert complaint.startswith(f"{folder / 'metadata.parquet'}, row {row}: ") and reason in complaint
    table(folder, file_name=["a.png"], label=[3])
    assert "has no column" in read(folder)[1][0] and "only: file_name, label" in read(folder)[1][0]
    table(folder, file_name=["a.png", "b.png"], text=["x" * 2**20, "y" * (2**20 + 1)])
    assert len(said := read(folder)[1]) == 1 and "row 1: its 'text' is longer than 1,048,576" in said[0]
    table(folder, file_name=["a.png"], text=[b"bytes"])
    assert "must be text" in read(folder)[1][0]
    (folder / "metadata.parquet").write_bytes((folder / "metadata.parquet").read_bytes()[:-9])
    assert "metadata.parquet' cannot be read" in read(folder)[1][0]
    outside = tmp_path_factory.mktemp("outside")
    table(outside, file_name=["a.png"], text=["not yours"])
    (folder / "metadata.parquet").unlink()
    (folder / "metadata.parquet").symlink_to(outside / "metadata.parquet")
    found, complaints = read(folder)
    assert "links to a file outside" in complaints[0] and "not yours" not in found


def test_text_that_is_not_text(folder):
    (folder / "a.txt").write_text(" \n ")
    (folder / "b.txt").write_bytes(b"fine\n\xff\xfe")
    (folder / "metadata.csv").write_bytes(b"file_name,text\nsub/c.png,caf\xe9\n")
    complaints = read(folder)[1]
    assert len(complaints) == 3
    assert "metadata.csv:2: is not UTF-8" in complaints[0]
    assert "empty" in complaints[1] and "b.txt:2: is not UTF-8" in complaints[2]


@pytest.mark.parametrize(
    "name",
    ["../out.png", "sub/../../out.png", "/etc/passwd", "file:///etc/passwd", "C:\\out.png", "link.png", "a\0.png"],
)
def test_no_table_leads_out_of_the_folder(tmp_path, name):
    save(tmp_path / "out.png")
    folder = tmp_path / "in"
    save(folder / "sub" / "a.png")
    os.symlink(tmp_path / "out.png", folder / "link.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    (complaint,) = read(folder)[1]
    assert "out of the folder" in complaint or "outside of the folder" in complaint


def test_caption_files_that_link_outside_are_not_read(tmp_path):
    (tmp_path / "secret").write_text("secret words")
    folder = tmp_path / "in"
    save(folder / "a.png")
    os.symlink(tmp_path / "secret", folder / "a.txt")
    found, (complaint,) = read(folder)
    assert "links to a file outside" in complaint and "secret words" not in str(found)


def test_text_in_utf16_is_not_taken_for_utf8(folder, capsys):
    """Without a mark it decodes: every second character is NUL."""
    (folder / "a.txt").write_bytes("a cat\non a mat".encode("utf-16-le"))
    _, complaints = read(folder)
    assert complaints[:1] == [f"{folder / 'a.txt'}:1: holds NUL characters, as UTF-16 text does; save it as UTF-8"]
    (folder / "a.txt").write_bytes("a cat".encode("utf-16"))  # with its mark
    assert "is not UTF-8 text; save it as UTF-8" in read(folder)[1][0]
    os.remove(folder / "a.txt")
    for name, text in (("jsonl", '{"file_name": "a.png", "text": "a cat"}'), ("csv", "file_name,text\na.png,a cat\n")):
        path = folder / f"metadata.{name}"
        path.write_bytes(text.encode("utf-16-be"))
        assert f"{path}:1: holds NUL characters" in read(folder)[1][0]
        os.remove(path)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a\\u0000 cat"}')
    assert "its 'text' holds NUL characters" in read(folder)[1][0]
    row = {"instance_prompt": "a\0dog", "instance_data_dir": "x"}
    assert "it holds NUL characters" in concepts.read([row])[1][0]


def test_names_as_long_as_a_file_may_have(tmp_path):
    """NAME.caption of a name of 252 bytes is longer than any file's name; such a file is not there."""
    name = "ä" * 124 + ".png"
    save(tmp_path / name)
    assert len(name.encode()) == 252 and read(tmp_path) == (["a photo of sks dog"], [])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b" * 300 + ".png", "text": "x"}))
    assert "does not exist" in read(tmp_path)[1][0]


def test_the_hub_cache_links_to_its_blobs(tmp_path):
    blob = save(tmp_path / "blobs" / "0123.png")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    os.symlink(blob, snapshot / "a.png")
    (snapshot / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "fine"}')
    assert read(snapshot) == (["fine"], [])


def test_folders_without_usable_pictures_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        datasets.folder(tmp_path, "p")
    assert stop.value.code == 2 and "no pictures" in capsys.readouterr().err
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    assert len(datasets.folder(tmp_path, "p")) == 2
    assert len(datasets.folder(tmp_path, "p", on_bad_image="skip")) == 1


def test_keys_follow_content(folder):
    before = datasets.DreamBooth(datasets.folder(folder, "p"), size=16)
    assert before.fingerprint() == datasets.DreamBooth(datasets.folder(folder, "p"), size=16).fingerprint()
    assert before.fingerprint() != datasets.DreamBooth(datasets.folder(folder, "q"), size=16).fingerprint()
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    keys = [example.key for example in datasets.folder(folder, "p")]
    assert keys[0] == keys[2] and len(set(keys)) == 3
    save(folder / "a.png", seed=5)  # replaced in place
    os.remove(folder / "copy.png")
    assert before.fingerprint() != datasets.DreamBooth(datasets.folder(folder, "p"), size=16).fingerprint()


def examples(count, is_class=False, size=(24, 16), caption="p"):
    pictures = [Image.new("RGB", size, (number * 10, is_class * 255, 5)) for number in range(count)]
    return [
        datasets.Example(picture, caption, is_class, f"{'c' if is_class else 'i'}{number}")
        for number, picture in enumerate(pictures)
    ]


def test_a_record_is_complete_and_of_one_piece():
    instance, classes = examples(3, size=(40, 20)), examples(5, True, size=(16, 48), caption="class")
    dataset = datasets.DreamBooth(instance, classes, size=16, random_flip=True, seed=3)
    assert len(dataset) == 5 and dataset.captions() == ["class", "p"] and len(dataset.examples) == 8
    assert len(datasets.DreamBooth(instance, classes, repeats=4)) == 12
    seen = {"i": [], "c": []}
    for position in range(15):
        one, other = dataset[position]
        assert (one["ids"], other["ids"]) == (2 * position, 2 * position + 1)
        assert (one["is_class"], other["is_class"]) == (False, True)
        assert (one["captions"], other["captions"]) == ("p", "class")
        assert one["original_size"] == (20, 40) and other["original_size"] == (48, 16)
        assert one["crop_top_left"][0] == 0 and other["crop_top_left"][1] == 0
        for record in (one, other):
            number = int(record["keys"][1])
            red = round((record["pixels"][0, 0, 0].item() + 1) * 127.5)
            assert red == number * 10, "the picture belongs to the key"
            assert record["pixels"].shape == (3, 16, 16)
            seen[record["keys"][0]].append(number)
    for start in range(0, 15, 3):
        assert sorted(seen["i"][start : start + 3]) == [0, 1, 2]
    for start in range(0, 15, 5):
        assert sorted(seen["c"][start : start + 5]) == [0, 1, 2, 3, 4]


def test_crops_and_flips_are_drawn_anew_and_told_truly():
    gradient = Image.linear_gradient("L").rotate(90).resize((64, 16)).convert("RGB")  # brightness tells the column
    dataset = datasets.DreamBooth([datasets.Example(gradient, "p", key="g")], size=16, random_flip=True, seed=1)
    columns, places, flips = gradient.convert("L").load(), set(), set()
    for position in range(40):
        (record,) = dataset[position]
        row = (record["pixels"][0, 0] + 1) * 127.5
        top, left = record["crop_top_left"]
        flip = bool(row[0] < row[-1]) != (columns[0, 0] < columns[63, 0])
        first = columns[63 - left, 0] if flip else columns[left, 0]
        assert top == 0 and row[0].round() == first
        places.add(left)
        flips.add(flip)
        assert all(torch.equal(record["pixels"], again["pixels"]) for again in dataset[position])
    assert len(places) > 15 and flips == {True, False} and dataset.varying_crops()


def test_transparent_parts_become_the_colour_that_was_asked_for():
    clear = datasets.Example(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "p", key="clear")
    for colour, values in (("white", (1, 1, 1)), ("#00ff00", (-1, 1, -1))):
        (record,) = datasets.DreamBooth([clear], size=8, alpha_background=colour)[0]
        assert record["pixels"][:, 3, 3].tolist() == list(values)


def test_when_crops_vary():
    for size, center, varies in [((16, 16), False, False), ((40, 20), False, True), ((40, 20), True, False)]:
        assert datasets.DreamBooth(examples(2, size=size), size=8, center_crop=center).varying_crops() is varies
    assert not datasets.DreamBooth(examples(1, size=(1000, 1001)), size=8).varying_crops(), "square once resized"


def test_several_captions_are_all_used():
    dataset = datasets.DreamBooth([datasets.Example(Image.new("RGB", (8, 8)), ("x", "y"), key="k")], size=8)
    drawn = [dataset[position][0]["captions"] for position in range(30)]
    assert set(drawn) == {"x", "y"} and drawn == [dataset[position][0]["captions"] for position in range(30)]
    assert dataset.captions() == ["x", "y"]


def test_a_batch_has_the_promised_keys_and_shapes():
    dataset = datasets.DreamBooth(examples(3), examples(2, True), size=16, center_crop=True)
    batch = next(iter(datasets.loader(dataset, 2)))
    assert batch["pixels"].shape == (4, 3, 16, 16) and batch["pixels"].dtype == torch.float32
    assert batch["is_class"].tolist() == [False, False, True, True] and batch["is_class"].dtype == torch.bool
    assert batch["ids"].tolist() == [0, 2, 1, 3] and batch["ids"].dtype == torch.int64
    assert batch["original_size"].tolist() == [[16, 24]] * 4 and batch["crop_top_left"].shape == (4, 2)
    assert batch["captions"] == ["p"] * 4 and [key[0] for key in batch["keys"]] == ["i", "i", "c", "c"]


def take(count, dataset, *arguments, **options):
    return list(itertools.islice(datasets.loader(dataset, *arguments, **options), count))


@pytest.mark.parametrize(("batch", "world", "accumulate"), [(4, 1, 1), (2, 1, 2), (1, 4, 1), (2, 2, 1), (1, 2, 2)])
def test_splitting_a_batch_changes_nothing(batch, world, accumulate):
    dataset = datasets.DreamBooth(examples(3), examples(4, True), size=8, random_flip=True, seed=9)
    whole = take(3, dataset, 4)
    parts = [take(3 * accumulate, dataset, batch, rank, world, accumulate) for rank in range(world)]
    for step, expected in enumerate(whole):
        pieces = [
            parts[rank][micro] for micro in range(step * accumulate, (step + 1) * accumulate) for rank in range(world)
        ]
        rows = {
            number: (piece["pixels"][row], piece["keys"][row], piece["crop_top_left"][row].tolist())
            for piece in pieces
            for row, number in enumerate(piece["ids"].tolist())
        }
        assert sorted(rows) == sorted(expected["ids"].tolist())
        for row, number in enumerate(expected["ids"].tolist()):
            pixels, key, place = rows[number]
            assert torch.equal(pixels, expected["pixels"][row]) and key == expected["keys"][row]
            assert place == expected["crop_top_left"][row].tolist()


def test_resuming_goes_on_in_the_middle_of_an_epoch_and_workers_change_nothing():
    dataset = datasets.DreamBooth(examples(5), examples(3, True), size=8, random_flip=True)
    whole = take(6, dataset, 2)
    for other in (take(4, dataset, 2, first_step=2), take(4, dataset, 2, first_step=2, workers=1)):
        for one, again in zip(whole[2:], other, strict=True):
            assert torch.equal(one["pixels"], again["pixels"]) and torch.equal(one["ids"], again["ids"])
            assert one["keys"] == again["keys"]


def test_the_loader_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    take(1, datasets.DreamBooth(examples(2), size=8), 1)
    assert torch.equal(state, torch.get_rng_state())


def test_pictures_are_decoded_once_and_only_while_there_is_room(monkeypatch):
    calls = []
    real = images.open_rgb
    monkeypatch.setattr(images, "open_rgb", lambda source, *more: calls.append(1) or real(source))
    dataset = datasets.DreamBooth(examples(2), size=8)
    take(5, dataset, 2)
    assert len(calls) == 2
    dataset.forget()
    dataset._room = 0
    take(5, dataset, 2)
    assert len(calls) == 12


@pytest.fixture
def at_once(monkeypatch):
    """No pauses between attempts, and no picture is remembered."""
    monkeypatch.setattr(lost.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(datasets, "REMEMBERED", 0)


def test_a_lost_photo_changes_no_other_record(folder, at_once):
    for number in range(17):
        save(folder / f"more-{number:02d}.png", seed=number + 3)
    whole, after = (datasets.DreamBooth(datasets.folder(folder, "p"), size=8, seed=2) for _ in range(2))
    before = [whole[position][0] for position in range(60)]
    assert all(record["lost"] is None for record in before)
    lost = {before[0]["keys"], before[1]["keys"]}
    gone, cut = (next(one.source for one in whole.instance if one.key == before[k]["keys"]) for k in (0, 1))
    os.remove(gone)
    with open(cut, "r+b") as file:
        file.truncate(100)
    found = [after[position][0] for position in range(60)]
    for old, new in zip(before, found, strict=True):
        assert new["ids"] == old["ids"] and new["keys"] == old["keys"]
        if old["keys"] in lost:
            assert ".png' cannot be " in new["lost"] and "restore the file" in new["lost"] and not new["pixels"].any()
        else:
            assert new["lost"] is None and torch.equal(new["pixels"], old["pixels"])
    assert sum(record["lost"] is not None for record in found) == 6, "three epochs"
    save(Path(gone))
    assert after[0][0]["lost"], "what was lost stays lost in this run: it is ending"
    (batch,) = take(1, after, 20)
    assert len(batch["lost"]) == 2 and batch["pixels"].shape == (20, 3, 8, 8)


def test_a_lost_photo_leaves_its_batch_in_shape(tmp_path, at_once):
    for number in range(10):
        save(tmp_path / f"wide-{number}.png", (64, 32), number)
    save(tmp_path / "high.png", (32, 64), 11)
    dataset = datasets.DreamBooth(datasets.folder(tmp_path, "p"), size=32,
                                  resolution_buckets="auto", side_factor=8, examples_per_step=2)  # fmt: skip
    os.remove(tmp_path / "high.png")
    batches = take(12, dataset, 2)
    assert sum(len(batch["lost"]) for batch in batches) >= 2
    for batch in batches:
        _, _, height, width = batch["pixels"].shape
        assert (height > width) == bool(batch["lost"])


@pytest.mark.parametrize("workers", [0, 1])
def test_when_all_photos_are_lost_there_is_still_a_batch_to_end_the_run_with(folder, at_once, workers):
    dataset = datasets.DreamBooth(datasets.folder(folder, "p"), size=8)
    for path in images.list_images(folder):
        os.remove(path)
    (batch,) = take(1, dataset, 3, workers=workers)
    assert len(batch["lost"]) == 3
    assert batch["pixels"].shape == (3, 3, 8, 8) and not batch["pixels"].any()


def test_a_drive_that_blinks_costs_nothing(folder, monkeypatch):
    waited, opened = [], images.open_rgb
    monkeypatch.setattr(lost.time, "sleep", waited.append)

    def blink(source, background):
        if len(waited) < 2:
            raise images.BadImage(str(source), "cannot be read: the drive has gone")
        return opened(source)

    dataset = datasets.DreamBooth(datasets.folder(folder, "p"), size=8)
    monkeypatch.setattr(images, "open_rgb", blink)
    assert dataset[0][0]["lost"] is None and waited == list(lost.RETRIES)


def test_a_dataset_with_columns(tmp_path, capsys):
    library = pytest.importorskip("datasets")
    paths = [str(save(tmp_path / "pictures" / f"{number}.png", seed=number)) for number in range(3)]
    table = library.Dataset.from_dict({"image": paths, "words": ["x", "y", ["z", "w"][0]], "label": [1, 2, 3]})
    table = table.cast_column("image", library.Image())
    table.to_parquet(tmp_path / "table" / "train.parquet")
    options = {"cache_dir": str(tmp_path / "cache")}
    found = datasets.hub(str(tmp_path / "table"), caption_column="words", **options)
    assert [example.caption for example in found] == ["x", "y", "z"] and len({one.key for one in found}) == 3
    again = datasets.hub(str(tmp_path / "table"), prompt="same", **options)
    assert [example.caption for example in again] == ["same"] * 3
    assert [one.key for one in again] == [one.key for one in found], "stable from run to run"
    for example, path in zip(found, paths, strict=True):
        assert images.open_rgb(example.source).tobytes() == images.open_rgb(path).tobytes()
    batches = take(2, datasets.DreamBooth(found, size=8, center_crop=True), 3, workers=1)
    assert batches[0]["pixels"].shape == (3, 3, 8, 8)
    for wrong, word in [({"image_column": "picture"}, "picture"), ({"image_column": "label"}, "no pictures")]:
        with pytest.raises(SystemExit):
            datasets.hub(str(tmp_path / "table"), prompt="p", **wrong, **options)
        assert word in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        datasets.hub(str(tmp_path / "table"), **options)
    assert stop.value.code == 3
    with pytest.raises(SystemExit):
        datasets.hub(str(tmp_path / "table"), caption_column="label", **options)
    assert "row 0: no caption" in capsys.readouterr().err, "a number is no caption"
    filled = datasets.hub(str(tmp_path / "table"), prompt="a {class}", class_noun="dog", **options)
    assert [example.caption for example in filled] == ["a dog"] * 3
    with pytest.raises(SystemExit):
        datasets.hub(str(tmp_path / "table"), prompt="a {class}", **options)
    assert "row 0 holds {class}: give --class_noun" in capsys.readouterr().err
    assert len(datasets.hub(str(tmp_path / "pictures"), prompt="p")) == 3, "a plain folder"
    with pytest.raises(SystemExit):
        datasets.hub(str(tmp_path / "pictures"), split="test", prompt="p")
    assert "--dataset_split test: " in capsys.readouterr().err
    save(tmp_path / "parts" / "train" / "a.png"), save(tmp_path / "parts" / "test" / "b.png", seed=5)
    for split in ("train", "test"):
        (only,) = datasets.hub(str(tmp_path / "parts"), split=split, prompt="p")
        assert f"/{split}/" in only.source
    assert len(datasets.hub(str(tmp_path / "parts"), prompt="p")) == 2, "without a split, all of them"
    rows = [{"file_name": f"{name}.png", "text": name} for name in ("train/a", "test/b")]
    (tmp_path / "parts" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (only,) = datasets.hub(str(tmp_path / "parts"), split="test", caption_column="text")
    assert only.caption == "test/b"
    (tmp_path / "pictures" / "1.png").write_text("no picture")
    table = library.Dataset.from_dict({"image": paths}).cast_column("image", library.Image())
    table.to_parquet(tmp_path / "damaged" / "train.parquet")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        datasets.hub(str(tmp_path / "damaged"), prompt="p", **options)
    assert stop.value.code == 3 and "row 1: is not a picture" in capsys.readouterr().err
    assert len(datasets.hub(str(tmp_path / "damaged"), prompt="p", on_bad_image="skip", **options)) == 2


def test_order_is_the_one_of_randomness():
    dataset = datasets.DreamBooth(examples(7), size=8, seed=4)
    keys = [dataset[position][0]["keys"] for position in range(14)]
    assert keys == [f"i{slot}" for epoch in (0, 1) for slot in randomness.order(4, epoch, 7)]


def test_placeholders_are_filled_in_every_caption(folder):
    (folder / "a.txt").write_text("{identifier} runs\nthe {class} {identifier}\n{other}")
    words = {"identifier": "sks", "class_noun": "dog"}
    examples = datasets.folder(folder, "a photo of {identifier} {class}", **words)
    assert [one.caption for one in examples] == [("sks runs", "the dog sks", "{other}")] + ["a photo of sks dog"] * 2
    assert captions.fill("{identifier} {class}", "sks") == "sks {class}"
    complaints = captions.unfilled([("x", "{class}"), ("y", ("a", "{class}"))], identifier="sks")
    assert complaints == ["the text of x and 1 more holds {class}: give --class_noun"]


def test_dropped_captions_are_a_function_of_the_position(folder):
    def captions_of(share, positions):
        dataset = datasets.DreamBooth(datasets.folder(folder, "p"), size=32, seed=3, caption_dropout=share)
        return [dataset[position][0]["captions"] for position in positions]

    found = captions_of(0.3, range(300))
    assert 60 < found.count("") < 120 and set(found) == {"", "p"}
    assert found[100:150] == captions_of(0.3, range(100, 150)), "a resumed run drops others"
    assert "" not in captions_of(0.0, range(50))
    dropping = datasets.DreamBooth(datasets.folder(folder, "p"), size=32, caption_dropout=0.3)
    assert dropping.captions() == ["", "p"]


def test_first_views_are_what_the_first_visits_see(folder):
    dataset = datasets.DreamBooth(datasets.folder(folder, "p"), size=24, seed=5, random_flip=True)
    records = {record["keys"]: record for position in range(3) for record in dataset[position]}
    views = list(dataset.first_views(2))
    assert [os.path.basename(view[0].source) for view in views] == ["a.png", "b.png"]
    for example, caption, picture, (top, left), shape, mask in views:
        assert shape == (24, 24)
        seen = images.to_tensor(picture.crop((left, top, left + 24, top + 24)))
        assert torch.equal(seen, records[example.key]["pixels"]) and caption == "p" and mask is None
