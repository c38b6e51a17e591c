"""Streams: every row once an epoch, in an order that resumes at the very row, in bounded memory."""

import importlib
import io
import itertools
import json
import pickle
import shlex
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import fake_hub
import pytest
import torch
from PIL import Image
from test_security import launch

from utils import datasets, heldout, lost, shards, streams

pyarrow = pytest.importorskip("pyarrow")


def png(number, size=(10, 8)):
    """A picture that tells its number."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 77)).save(stream, "PNG")
    return stream.getvalue()


def number_of(record):
    colour = ((record["pixels"][:, 0, 0] + 1) * 127.5).round().int().tolist()
    assert record["captions"] == f"row {colour[0] + 256 * colour[1]}" and colour[2] == 77
    return colour[0] + 256 * colour[1]


def parquet(path, numbers, group=7, **columns):
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": png(n), "path": "/etc/passwd"} for n in numbers], "text": [f"row {n}" for n in numbers]}
    pyarrow.parquet.write_table(pyarrow.table(rows | columns), path, row_group_size=group)


class Payload:
    def __reduce__(self):
        return Path("unpickled").write_text, ("by whoever reads it",)


def tar(path, numbers):
    """As WebDataset lays it out: the second of three has its words in JSON, and something to unpickle beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for number in numbers:
            described = json.dumps({"caption": f"row {number}"}).encode()
            words = {"json": described, "pkl": pickle.dumps(Payload())} if number % 3 == 1 else {}
            for ending, data in {"png": png(number), **(words or {"txt": f"row {number}\n".encode()})}.items():
                member = tarfile.TarInfo(f"./part/{number:05d}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    """100 rows in two parquet files of several row groups and two tar files."""
    parquet(tmp_path / "shards" / "a.parquet", range(30))
    parquet(tmp_path / "shards" / "more" / "b.parquet", range(30, 41), group=100)
    tar(tmp_path / "shards" / "c.tar", range(41, 60))
    tar(tmp_path / "shards" / "d.tar", range(60, 100))
    (tmp_path / "shards" / "notes.txt").write_text("not a shard")
    return tmp_path / "shards"


def stream(folder, seed=3, **options):
    options = {"size": 8, "center_crop": True, "shuffle_buffer": 13} | options
    return streams.Stream(shards.Shards(shards.local(folder)), seed=seed, **options)


def seen(dataset, positions):
    return [number_of(dataset[position][0]) for position in positions]


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own(folder):
    dataset = stream(folder)
    assert len(dataset) == 100 and [dataset.instance[row].text for row in (0, -1)] == ["row 0", "row 40"]
    first, second = seen(dataset, range(100)), seen(dataset, range(100, 200))
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second and first != seen(stream(folder, seed=4), range(100)), "another order each time"
    assert sum(abs(one - other) == 1 for one, other in itertools.pairwise(first)) < 30, "and not that of the files"
    assert not Path("unpickled").exists()


def test_a_position_is_a_function_of_the_seed_alone(folder):
    """A stream that is opened anew anywhere goes on as one that was never closed; blocks of any size, any epoch."""
    for buffer in (1, 13, 1000):
        whole = seen(stream(folder, shuffle_buffer=buffer), range(230))
        for start in (0, 1, 12, 13, 14, 99, 100, 187):
            assert seen(stream(folder, shuffle_buffer=buffer), range(start, 230)) == whole[start:]
    dataset = stream(folder)
    course = [number_of(dataset[position][0]) for position in (150, 3, 99, 4, 150)]
    assert course[0] == course[-1] and course[1:4] == seen(stream(folder), (3, 99, 4)), "looking back changes nothing"


def test_processes_and_workers_take_what_one_would_take(folder):
    def batches(count, **how):
        loader = datasets.loader(stream(folder, random_flip=True), how.pop("batch", 2), **how)
        return [batch["captions"] for batch in itertools.islice(loader, count)]

    alone = [sorted(batch) for batch in batches(20, batch=4)]
    ranks = [batches(20, rank=rank, world=2) for rank in (0, 1)]
    assert [sorted(one + other) for one, other in zip(*ranks, strict=True)] == alone
    assert not set(itertools.chain(*ranks[0])) & set(itertools.chain(*ranks[1])), "an epoch of 100 is not over yet"
    assert batches(6, batch=4, first_step=14, workers=2) == batches(20, batch=4)[14:]


def test_no_more_than_a_block_is_in_memory_and_no_row_is_read_twice(folder, monkeypatch):
    made = []
    monkeypatch.setattr(shards, "Row", lambda *values, row=shards.Row, **named: made.append(1) or row(*values, **named))
    dataset, largest = stream(folder), 0
    for position in range(200):
        dataset[position]
        largest = max(largest, len(dataset._block[1]))
    assert largest == 13 and len(made) == 200
    assert not dataset._sizes and not dataset._remembered


def test_bad_rows_follow_the_policy(tmp_path, capsys):
    numbers = list(range(40))
    pictures = [{"bytes": png(n), "path": ""} for n in numbers]
    pictures[5] = {"bytes": b"no picture", "path": ""}
    pictures[6] = {"bytes": None, "path": str(tmp_path / "mine.png")}
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    texts = [f"row {n}" for n in numbers]
    texts[7] = None
    texts[8] = "r\0o\0w\0"
    parquet(tmp_path / "shards" / "a.parquet", numbers, image=pictures, text=texts)
    dataset = stream(tmp_path / "shards", on_bad_image="skip", shuffle_buffer=40)
    good = stream(tmp_path / "shards", on_bad_image="skip", shuffle_buffer=40)
    shown = [dataset[position][0] for position in range(40)]
    assert not any(record["lost"] for record in shown)
    said = capsys.readouterr().err
    assert said.count("; skipped") == 4
    assert "row 8' has a caption that holds NUL" in said
    assert "row 7' has no caption" in said and "row 6' holds no picture" in said and "row 5' is not a picture" in said
    times = Counter(map(number_of, shown))
    assert set(times) == set(numbers) - {5, 6, 7, 8} and sum(times.values()) == 40, "other rows are used instead"
    assert seen(good, range(20, 40)) == [number_of(record) for record in shown[20:]]
    capsys.readouterr()
    strict = stream(tmp_path / "shards", on_bad_image="error", shuffle_buffer=40)
    told = [record["lost"] for record in (strict[position][0] for position in range(40)) if record["lost"]]
    assert len(told) == 4 and all("--on_bad_image skip" in why for why in told)
    assert "skipped" not in capsys.readouterr().err
    parquet(tmp_path / "worse" / "a.parquet", numbers, text=[None] * 9 + texts[9:])
    worse = stream(tmp_path / "worse", on_bad_image="skip", shuffle_buffer=40)
    told = [record["lost"] for record in (worse[position][0] for position in range(40)) if record["lost"]]
    assert told and "5 of 40 rows cannot be used, and at most 4 may be skipped" in told[0]


def _boundaries(path):
    """Where each member of a tar file begins, and where the mark at the end does."""
    with tarfile.open(path) as file:
        return [member.offset for member in file] + [file.offset]


@pytest.mark.parametrize("damage", ["boundary", "picture", "header", "no end", "empty", "joined", "text"])
def test_a_damaged_tar_is_an_error_or_left_out_from_the_damage_on(folder, capsys, damage):
    """19 rows of two or three members each: what tarfile takes for the end of the file is not one."""
    path, whole = folder / "c.tar", (folder / "c.tar").read_bytes()
    places, used = _boundaries(path), 0
    sixth, at = places[_first_of(path, 5)], places[_first_of(path, 7)]
    if damage == "boundary":  # nobody knows that the fifth row was complete
        path.write_bytes(whole[:sixth])
        used, why = 4, f"is cut short at byte {sixth:,}: it lacks the mark"
    if damage == "picture":
        path.write_bytes(whole[: sixth + 600])
        used, why = 5, "is cut short or is not a tar file (unexpected end of data)"
    if damage == "header":
        path.write_bytes(whole[:at] + b"?" * 512 + whole[at + 512 :])
        used, why = 6, f"has a damaged header at byte {at:,}"
    if damage == "no end":
        path.write_bytes(whole[: places[-1]])
        used, why = 18, f"is cut short at byte {places[-1]:,}: it lacks the mark at the end"
    if damage == "empty":
        path.write_bytes(b"")
        why = "is cut short or is not a tar file (empty file)"
    if damage == "joined":
        path.write_bytes(whole + (folder / "d.tar").read_bytes())
        used, why = 18, "holds more after its end"
    if damage == "text":
        path.write_bytes(b"<html>not found</html>" * 100)
        why = "is cut short or is not a tar file"
    with pytest.raises(SystemExit) as stop:
        shards.Shards(shards.local(folder))
    said = capsys.readouterr().err
    assert stop.value.code == 3 and f"'{path}' {why}" in said and "1 of 4 shards are damaged" in said
    rows = shards.Shards(shards.local(folder), on_bad_image="skip")
    said = capsys.readouterr()
    assert f"'{path}' {why}" in said.err and f"{used} pictures before the damage are used" in said.err
    assert len(rows) == 81 + used and f"{81 + used} pictures in 4 shards" in said.out
    assert all(not row.problem for row in map(rows.__getitem__, range(len(rows))))
    alone = [str(path)]
    with pytest.raises(SystemExit) as stop:
        shards.Shards(alone, on_bad_image="skip")
    assert stop.value.code == 3 and "too many to leave out" in capsys.readouterr().err


def _first_of(path, row):
    """Number of the member with which a row begins; before the tar file is damaged."""
    with tarfile.open(path) as file:
        stems = [member.name.split(".")[1] for member in file]
    return stems.index(list(dict.fromkeys(stems))[row])


@pytest.mark.parametrize("how", ["cut", "empty", "text"])
def test_a_damaged_parquet_file_is_an_error_or_left_out(folder, capsys, how):
    path = folder / "a.parquet"
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"<html>" * 100}[how])
    with pytest.raises(SystemExit) as stop:
        shards.Shards(shards.local(folder))
    assert stop.value.code == 3 and f"'{path}' cannot be read: " in capsys.readouterr().err
    assert len(shards.Shards(shards.local(folder), on_bad_image="skip")) == 70
    said = capsys.readouterr()
    assert f"'{path}' cannot be read: " in said.err and "0 pictures before the damage" in said.err


@pytest.mark.parametrize("name", ["a.parquet", "d.tar"])
def test_a_shard_that_is_gone_ends_the_run_whatever_the_policy(folder, name, monkeypatch):
    monkeypatch.setattr(lost, "RETRIES", (0,))
    dataset = stream(folder, on_bad_image="skip")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    told = [dataset[position][0]["lost"] for position in range(100)]
    assert any(why and name in why and "cannot be read" in why for why in told)
    (folder / name).write_bytes(data)
    assert sorted(seen(stream(folder), range(100))) == list(range(100))


def test_shards_behind_an_address_and_of_a_data_set(folder, tmp_path, capsys):
    fsspec = pytest.importorskip("fsspec")
    files = ["memory://set/a.parquet", "memory://set/c.tar"]
    for file in files:
        fsspec.filesystem("memory").pipe(file, (folder / Path(file).name).read_bytes())
    dataset = streams.Stream(shards.Shards(files), size=8, seed=1)
    assert sorted(number_of(dataset[position][0]) for position in range(49)) == [*range(30), *range(41, 60)]
    parquet(tmp_path / "table" / "train-00000.parquet", range(5))
    parquet(tmp_path / "table" / "test-00000.parquet", range(5, 7))
    for split, count in (("train", 5), ("test", 2)):
        found = shards.of_hub(str(tmp_path / "table"), None, split, str(tmp_path / "cache"))
        assert len(shards.Shards(found)) == count
    with pytest.raises(SystemExit):
        shards.of_hub(str(tmp_path / "table"), None, "nothing", str(tmp_path / "cache"))
    with pytest.raises(SystemExit):
        shards.Shards(found, caption_column="words")
    said = capsys.readouterr().err
    assert "has no split nothing" in said and "--caption_column words" in said and "image, text" in said


def test_the_fingerprint_knows_files_and_mixing(folder):
    before = stream(folder).fingerprint()
    assert stream(folder).fingerprint() == before != stream(folder, shuffle_buffer=14).fingerprint()
    parquet(folder / "e.parquet", range(100, 103))
    assert stream(folder).fingerprint() != before
    assert heldout.split(rows := stream(folder).instance, 0.0, 1) == (rows, [])


@pytest.fixture
def train(sd1, folder, tmp_path):
    def call(options="", name="run", script="train_text_to_image_lora"):
        module = importlib.import_module(script)
        given = f"--pretrained_model_name_or_path '{sd1}' --output_dir '{tmp_path / name}' --report_to none --seed 3"
        given += f" --streaming --train_data_dir '{folder}' --train_batch_size 2 --resolution 64 {options}"
        module.main(module.parse_args(shlex.split(given)))
        return losses(tmp_path / name)

    return call


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_killed_and_resumed_is_as_uninterrupted(train, tmp_path):
    """Blocks of 5 rows: the resume falls into the middle of one, after two epochs' worth of pieces were drawn."""
    from safetensors.torch import load_file

    options = "--shuffle_buffer 5 --random_flip --caption_dropout 0.2 --max_train_steps 8"
    whole = train(f"{options} --validation_prompt 'a cat' --validation_num_inference_steps 1", "whole")
    train(f"{options} --checkpointing_steps 3", "parts")
    for left in ("report.html", "pytorch_lora_weights.safetensors"):
        (tmp_path / "parts" / left).unlink()
    (tmp_path / "parts" / "checkpoint-6").rename(tmp_path / "parts" / "gone")
    parts = train(f"{options} --resume_from_checkpoint latest", "parts")
    assert whole == parts and list(whole) == list(range(1, 9))
    weights = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert (tmp_path / "whole" / "data_preview.png").is_file() and "row " in (
        tmp_path / "whole" / "report.html"
    ).read_text()


CARD = """---
configs:
- config_name: large
  data_files: large.parquet
- config_name: small
  data_files:
  - split: train
    path: tables/seen-0.parquet
  - split: seen
    path: tables/seen-*.parquet
---
"""
RUNS = """
import importlib, json, sys
script = importlib.import_module("train_text_to_image_lora")
for words in json.load(open(sys.argv[1])):
    script.main(script.parse_args(words))
"""


def test_a_data_set_of_the_hub_over_http(train, sd1, tmp_path):
    """The real client against a hub of our own: config, split, columns, lists of captions; streamed, resumed, whole."""
    import datasets as library

    tables = tmp_path / "set" / "tables"
    tables.mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text(CARD)
    (tmp_path / "set" / "large.parquet").write_bytes(b"nobody asked for it")
    for part in (0, 1):
        numbers = range(9 * part, 9 * part + 9)
        says = [[f"row {number}", f"number {number}"] for number in numbers]
        table = library.Dataset.from_dict({"photo": [{"bytes": png(number), "path": None} for number in numbers]})
        table = table.add_column("says", says).cast_column("photo", library.Image())
        table.to_parquet(tables / f"seen-{part}.parquet", batch_size=4)

    def words(name, more):
        given = f"--pretrained_model_name_or_path '{sd1}' --output_dir '{tmp_path / name}' --report_to none --seed 3"
        return shlex.split(f"{given} --train_batch_size 2 --resolution 64 --center_crop {columns} {more}")

    columns = "--image_column photo --caption_column says"
    streamed = "--streaming --shuffle_buffer 5 --max_train_steps 6 --checkpointing_steps 4"
    named = "--dataset_config_name small --dataset_split seen --dataset_name"
    runs = [
        words("hub", f"{named} someone/pictures {streamed}"),
        words("on", f"{named} someone/pictures {streamed} --resume_from_checkpoint '{tmp_path / 'hub/checkpoint-4'}'"),
        words("whole", f"{named} someone/pictures --max_train_steps 2"),
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    with fake_hub.Hub() as server:
        folder = tmp_path / "set"
        server.table = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        done = launch(None, [tmp_path / "runs.json"], server, code=RUNS, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name, _, _ in server.ranges} == {"tables/seen-0.parquet", "tables/seen-1.parquet"}
    assert not any("large.parquet" in call for call in server.calls)
    expected = train(f"{streamed} {columns} --center_crop --train_data_dir '{tables}'", "here")
    assert losses(tmp_path / "hub") == expected and list(expected) == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "on") == {step: expected[step] for step in (5, 6)}
    script = importlib.import_module("train_text_to_image_lora")
    script.main(script.parse_args(words("whole_here", f"{named} '{tmp_path / 'set'}' --max_train_steps 2")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "whole_here") and len(losses(tmp_path / "whole")) == 2


def test_what_needs_the_whole_set_is_refused_by_name(train, tmp_path, capsys):
    options = "--validation_split 0.1 --resolution_buckets --max_train_samples 5 --repeats 2 --cache_latents on"
    with pytest.raises(SystemExit) as stop:
        train(f"{options} --alpha_mask")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--streaming needs --max_train_steps" in said
    for name in ("validation_split", "resolution_buckets", "max_train_samples", "repeats", "cache_latents on"):
        assert f"--{name} with --streaming" in said
    assert "--masked_loss with --streaming" in said
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        train(f"--max_train_steps 1 --train_data_dir '{tmp_path / 'empty'}'")
    assert stop.value.code == 2 and "no *.parquet" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["shard.00000.mds", "shard.00000.mds.zstd"])
@pytest.mark.parametrize("streaming", ["yes", "no"])
def test_shards_of_mosaicml_are_refused_in_one_sentence(train, folder, tmp_path, capsys, name, streaming):
    """Beside shards that are read too: leaving rows out in silence would be another data set."""
    (tmp_path / "mds" / "part").mkdir(parents=True)
    (tmp_path / "mds" / "part" / name).write_bytes(b"rows")
    shutil.copy(folder / "c.tar", tmp_path / "mds")
    with pytest.raises(SystemExit) as stop:
        train(f"--max_train_steps 1 --train_data_dir '{tmp_path / 'mds'}' --streaming {streaming}")
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and f"--train_data_dir '{tmp_path / 'mds'}' holds MosaicML shards ({name})" in told
    assert "tar or parquet" in told and "mosaicml-streaming" in told and not (tmp_path / "run").exists()
