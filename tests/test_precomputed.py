"""Latents and embeddings computed beforehand: the same files however the work was cut, the same losses, or refused."""

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils import datasets, models, precomputed
from utils.cache import __main__ as tool

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "--resolution 64 --center_crop --random_flip"


@pytest.fixture
def pictures(tmp_path):
    """Nine captioned pictures, one with two captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(9):
        pixels = rng.integers(0, 255, (70, 64 + 4 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    describe(folder)
    return folder


def describe(folder, first="the first picture"):
    rows = [{"file_name": f"{n}.png", "text": f"picture {n}" if n else [first, "number zero"]} for n in range(9)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def compute(sd1, pictures, tmp_path):
    def call(name="store", options="", model=sd1):
        given = f"--pretrained_model_name_or_path '{model}' --output_dir '{tmp_path / name}'"
        given += "" if "--dataset_name" in options else f" --train_data_dir '{pictures}'"
        tool.main(tool.parse_args(shlex.split(f"{given} {SHAPE} {options}")))
        return tmp_path / name

    return call


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KILLED = """
import os, runpy, signal, sys
from utils import precomputed
precomputed.BLOCK, fsync, calls = 2, os.fsync, []
def counted(file):
    fsync(file)
    calls.append(file)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = counted
runpy.run_module("utils.cache", run_name="__main__")
"""


def kill(monkeypatch, work):
    """As much as a kill leaves: nothing is tidied up after the second file was written and not renamed."""
    fsync, calls = os.fsync, []

    def counted(file):
        fsync(file)
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", counted)
        work()


def test_killed_shards_leave_what_one_shard_leaves(compute, sd1, pictures, tmp_path, monkeypatch, capsys):
    """Two of four are killed in the middle of writing (kill -9 before a block is renamed) and started again."""
    monkeypatch.setattr(precomputed, "BLOCK", 2)
    whole = contents(compute("whole"))
    assert len(whole) > 8 and not any(name.startswith(".") for name in whole)
    options = "--num_shards 4 --shard_index"
    for shard in (0, 2):
        compute("four", f"{options} {shard}")
    kill(monkeypatch, lambda: compute("four", f"{options} 1"))
    words = shlex.split(f"--pretrained_model_name_or_path '{sd1}' --train_data_dir '{pictures}' {SHAPE} {options} 3")
    command = [sys.executable, "-c", KILLED, *words, "--output_dir", str(tmp_path / "four")]
    assert subprocess.run(command, cwd=ROOT, timeout=600).returncode == -signal.SIGKILL
    left = contents(tmp_path / "four")
    assert len(left) < len(whole) + 2 and any(name.startswith(".") for name in left), "a piece of a block is there"
    capsys.readouterr()
    compute("four", f"{options} 1 --dry_run")
    assert " 1 were there" in capsys.readouterr().out and contents(tmp_path / "four") == left, "only told"
    for shard in (1, 3):
        folder = compute("four", f"--num_shards 4 --shard_index {shard}")
    assert contents(folder) == whole
    said = capsys.readouterr().out
    assert " 0 were there" not in said and "shard 3 of 4" in said, "what the killed ones finished was not done again"
    for shard in range(4):
        compute("four", f"--num_shards 4 --shard_index {shard}")
    assert capsys.readouterr().out.count(" 0 blocks written") == 4


def test_a_new_picture_and_a_damaged_block_cost_one_block(compute, pictures, monkeypatch, capsys):
    monkeypatch.setattr(precomputed, "BLOCK", 4)
    before = contents(folder := compute())
    damaged = folder / sorted(name for name in before if name.startswith("latents"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    assert contents(compute()) == before
    assert "1 blocks written" in capsys.readouterr().out
    Image.new("RGB", (64, 64), "red").save(pictures / "new.png")
    (pictures / "new.txt").write_text("picture 1")
    compute()
    assert "1 blocks written" in capsys.readouterr().out
    examples = datasets.captioned(str(pictures), seed=0)
    store = precomputed.Store(folder)
    assert {(one.key, flip, (64, 64)) for one in examples for flip in (False, True)} == store.rows.keys()
    assert store.texts.keys() == {"", "the first picture", "number zero", *(f"picture {n}" for n in range(1, 9))}


def test_rows_are_what_the_model_computes(compute, pictures, sd1, tmp_path):
    """Also from a table, in half precision, and with names that say nothing: what counts is the content."""
    store = precomputed.Store(compute("half", "--dtype float16"))
    family = models.family_of(str(sd1))
    family.load("cpu", torch.float32)
    dataset = datasets.DreamBooth(datasets.captioned(str(pictures), seed=0), size=64, center_crop=True)
    for example in dataset.instance:
        for flip in (False, True):
            expected = family.posterior(dataset.pixels(example, flip, (64, 64))[None])
            for found, wanted in zip(store.get(example.key, flip, (64, 64)), expected, strict=True):
                assert found.dtype == torch.float32 and torch.allclose(found, wanted[0], atol=2e-3, rtol=2e-3)
    expected = family.encode_prompts(["picture 3"])["text"][0]
    assert torch.allclose(store.texts["picture 3"]["text"].float(), expected, atol=1e-2, rtol=1e-2)
    assert store.rounding == ["float16", "float32"] and "no" not in store.texts
    import datasets as library

    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    texts = [row["text"] if isinstance(row["text"], list) else [row["text"]] for row in rows]
    table = {"image": [str(pictures / row["file_name"]) for row in rows], "text": texts}
    table = library.Dataset.from_dict(table).cast_column("image", library.Image())
    table.to_parquet(tmp_path / "table" / "train.parquet")
    again = precomputed.Store(compute("table_store", f"--dataset_name '{tmp_path / 'table'}'"))
    assert again.rows.keys() == store.rows.keys() and again.texts.keys() == store.texts.keys()


@pytest.fixture
def train(sd1, pictures, tmp_path):
    def call(script, options="", name="run", model=sd1):
        module = importlib.import_module(script)
        given = f"--pretrained_model_name_or_path '{model}' --output_dir '{tmp_path / name}' --report_to none"
        given += f" --train_data_dir '{pictures}' --train_batch_size 2 --seed 3 --max_train_steps 4 {SHAPE} {options}"
        module.main(module.parse_args(shlex.split(given)))
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [row.get("loss", row.get("validation_loss")) for row in rows]

    return call


def test_precomputed_is_as_not_precomputed(train, compute, monkeypatch):
    script = "train_text_to_image"
    options = "--validation_split 0.2 --validation_steps 2 --caption_dropout 0.3"
    expected = train(script, options, "plain")
    store = compute()
    monkeypatch.setattr(models.latent_diffusion.LatentDiffusion, "posterior", None)  # nothing is encoded any more
    found = train(script, f"{options} --precomputed_dir '{store}'", "stored")
    assert len(found) == 4 + 3 and np.allclose(found, expected, rtol=1e-4)


def test_a_text_encoder_that_learns_is_asked_anew(train, compute, monkeypatch):
    """Samples too show what it says now, not what was stored when it had learned nothing."""
    from utils.models.latent_diffusion import LatentDiffusion

    heard = []
    asked = LatentDiffusion.sampling_prompts

    def listen(family, *words):
        found = asked(family, *words)
        heard.append(found["negative_prompt_embeds"])
        return found

    monkeypatch.setattr(LatentDiffusion, "sampling_prompts", listen)
    options = "--train_text_encoder --learning_rate 1e-2 --validation_steps 2 --validation_num_inference_steps 1"
    options += " --validation_prompt 'picture 3' --num_validation_images 1"
    train("train_text_to_image", f"{options} --precomputed_dir '{compute()}'")
    assert len(heard) == 3 and not torch.allclose(heard[0], heard[-1], atol=1e-4)


def _spoil(path, how):
    """As a disk does: the size and the header stay."""
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    if how == "zeros":
        data[(begin + len(data)) // 2 :] = bytes(len(data) - (begin + len(data)) // 2)
    if how == "bit":
        data[-5] ^= 1
    if how == "nan":
        data[-4:] = np.float32("nan").tobytes()
    path.write_bytes(data)


def _without_sums(folder):
    """As an older version wrote it."""
    for path in precomputed.blocks(folder):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        rows = json.dumps(json.loads(header["__metadata__"]["rows"])["rows"])
        text = json.dumps(header | {"__metadata__": {"rows": rows}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("how, kind", [("zeros", "latents"), ("bit", "texts"), ("bit", "latents"), ("nan", "texts")])
def test_a_damaged_block_is_refused_by_who_reads_and_mended_by_who_writes(compute, capsys, how, kind):
    folder = compute()
    before = contents(folder)
    path = next(folder.glob(f"{kind}-*"))
    _spoil(path, how)
    with pytest.raises(SystemExit):
        precomputed.Store(folder)
    said = capsys.readouterr().err
    assert f"'{path}' is damaged: python -m utils.cache with the same options computes it again" in said
    compute()
    assert "1 blocks written" in capsys.readouterr().out and contents(folder) == before
    precomputed.Store(folder)
    assert not capsys.readouterr().err


def test_blocks_without_checksums_are_read_and_impossible_values_are_noticed(compute, capsys):
    folder = compute()
    _without_sums(folder)
    capsys.readouterr()
    assert precomputed.Store(folder).rows
    said = capsys.readouterr().err
    assert "2 of 2 blocks" in said and "without checksums" in said and said.count("\n") == 1
    compute()
    assert " 0 blocks written" in capsys.readouterr().out, "what is there is not computed again for a checksum"
    for kind, how in (("latents", "zeros"), ("texts", "nan")):
        _spoil(next(folder.glob(f"{kind}-*")), how)
        with pytest.raises(SystemExit):
            precomputed.Store(folder)
        compute()
        assert "1 blocks written" in capsys.readouterr().out


def test_two_processes_with_other_options_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    """Both found it empty; who comes second to the manifest is refused."""
    link = os.link

    def late(temporary, path):
        monkeypatch.setattr(os, "link", link)
        precomputed.write_manifest(tmp_path, {"resolution": 64})
        return link(temporary, path)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(SystemExit):
        precomputed.write_manifest(tmp_path, {"resolution": 128})
    assert "its resolution is 64, not 128" in capsys.readouterr().err
    assert json.loads((tmp_path / precomputed.MANIFEST).read_text()) == {"resolution": 64}
    assert [path.name for path in tmp_path.iterdir()] == [precomputed.MANIFEST]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_leaves_a_folder_that_the_same_command_fills(compute, monkeypatch, capsys, tmp_path, at):
    calls, fsync = [], os.fsync

    def full(file):
        calls.append(file)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(os, "fsync", full)
        compute()
    assert stop.value.code == 1 and "cannot be written (No space left on device)" in capsys.readouterr().err
    assert len(list((tmp_path / "store").iterdir())) == at - 1 and not list((tmp_path / "store").glob(".*"))
    assert contents(compute()) == contents(compute("other"))


def test_processes_that_write_the_same_do_not_trip_each_other(tmp_path, monkeypatch):
    """All shards begin with the same manifest; whoever is first takes the files of the others for leftovers."""
    path, renaming = tmp_path / precomputed.MANIFEST, Path.rename

    def late(temporary, target):
        monkeypatch.setattr(Path, "rename", renaming)
        temporary.with_name(f"{temporary.name}-other").write_bytes(b"same")
        temporary.with_name(f"{temporary.name}-other").rename(target)
        temporary.unlink()  # by the other, at its end
        return renaming(temporary, target)

    monkeypatch.setattr(Path, "rename", late)
    precomputed._write(path, b"same")
    assert path.read_bytes() == b"same" and list(tmp_path.iterdir()) == [path]


def test_buckets_are_stored_too_and_held_out_pictures_stay_square(train, compute, sdxl):
    """With two text encoders and what one of them pools."""
    shapes = "--resolution_buckets 64x64,128x64"
    options = f"--validation_split 0.2 --validation_steps 2 {shapes}"
    expected = train("train_text_to_image_lora", options, "plain", sdxl)
    store = compute(options=shapes, model=sdxl)
    assert set(precomputed.Store(store).texts["picture 1"]) == {"text", "pooled"}
    found = train("train_text_to_image_lora", f"{options} --precomputed_dir '{store}'", "stored", sdxl)
    assert np.allclose(found, expected, rtol=1e-4)


def test_what_is_foreign_or_stale_is_refused_by_name(train, compute, pictures, sd2, tmp_path, capsys):
    store = compute()
    script = "train_text_to_image_lora"

    def refused(options="", **how):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train(script, f"--precomputed_dir '{store}' {options}", "refused", **how)
        assert stop.value.code == 2
        return capsys.readouterr().err

    said = refused("--resolution 128 --image_interpolation_mode box --resolution_buckets no")
    assert "its resolution is 64, not 128" in said and "its interpolation is lanczos, not box" in said
    said = refused(model=sd2)
    assert "its text_encoders is" in said and "another text encoder" in said
    (tmp_path / "other").mkdir()
    shutil.copytree(sd2 / "vae", tmp_path / "other" / "vae")
    assert "its vae is" in refused(f"--pretrained_vae_model_name_or_path '{tmp_path / 'other' / 'vae'}'")
    assert "--precomputed_dir with --cache_latents off" in refused("--cache_latents off")
    describe(pictures, first="words that nobody encoded")
    assert "1 captions are not in it ('words that nobody encoded'" in refused()
    describe(pictures)
    Image.new("RGB", (64, 64), "blue").save(pictures / "3.png")
    said = refused()
    assert "2 of 18 views are not in it" in said and "3.png" in said
    plain = compute("plain", "--random_flip no")
    store, there = plain, store
    assert "its mirrored is False, not True; compute it with --random_flip" in refused()
    shutil.copy(next(there.glob("latents-*")), plain)
    assert "does not belong to the manifest.json" in refused("--random_flip no")
    store = tmp_path / "nothing"
    assert "holds no manifest.json: fill it with python -m utils.cache" in refused()
    with pytest.raises(SystemExit) as stop:
        compute("plain")
    assert stop.value.code == 2 and "holds other latents" in capsys.readouterr().err


def test_the_tool_refuses_what_it_cannot_compute(compute, capsys):
    for options, said in (
        ("--num_shards 2 --shard_index 2", "--shard_index counts from 0"),
        ("--center_crop no", "add --center_crop"),
        ("--train_data_dir nowhere", "'nowhere' is not a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            compute(options=options)
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_what_can_be_told_at_once_is_told_before_anything_is_loaded(compute, pictures, tmp_path, monkeypatch, capsys):
    compute("mirrored")
    monkeypatch.setattr(models, "family_of", None)

    def refused(name="store", options="", code=2):
        with pytest.raises(SystemExit) as stop:
            compute(name, options)
        assert stop.value.code == code
        return capsys.readouterr().err

    assert "is --train_data_dir" in refused("pictures")
    assert "lies inside --train_data_dir" in refused("pictures/latents")
    assert "lies around --train_data_dir" in refused("")
    for name in ("training_config.yaml", "model_index.json", "pytorch_lora_weights.safetensors"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
        assert name in (said := refused("run")) and "holds a run or a model" in said and "name a folder" in said
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert "its resolution is 64, not 128" in refused("mirrored", "--resolution 128")
    assert "its mirrored is True, not False" in refused("mirrored", "--random_flip no"), "blocks would not belong"
    (tmp_path / "file").touch()
    assert "--output_dir" in (said := refused("file")) and "cannot be written to" in said
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused(options=f"--train_data_dir '{tmp_path / 'empty'}'")
    Image.new("RGB", (64, 64)).save(pictures / "silent.png")
    assert "silent.png' has no caption" in refused(code=3) and not (tmp_path / "store").exists()


def test_unreadable_pictures_are_named(compute, pictures, capsys):
    for number in range(12):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(pictures / f"new{number:02}.png")
        (pictures / f"new{number:02}.txt").write_text("picture 1")
    for number in range(8):
        (pictures / f"{number}.png").write_bytes(b"nothing")
    compute()
    said = capsys.readouterr()
    assert said.err.count("warning: left out: ") == 8 and "0.png' is not a picture" in said.err
    assert "13 pictures" in said.out and "8 pictures left out" in said.out
    for number in range(4):
        (pictures / f"new{number:02}.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit) as stop:
        compute("other")
    said = capsys.readouterr().err
    assert (
        stop.value.code == 3 and "12 of 21 pictures cannot be used" in said and said.count("' is not a picture") == 10
    )


@pytest.mark.slow
def test_the_slurm_example_runs(sd1, pictures, tmp_path):
    """As an array of one task; only the variables that SLURM and a user would set are given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    given = {"MODEL": str(sd1), "PICTURES": str(pictures), "LATENTS": str(tmp_path / "store"), "RESOLUTION": "64"}
    given |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_COUNT": "1"}
    given |= {"SLURM_ARRAY_TASK_ID": "0"}
    given |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["bash", "accelerate_configs/slurm_precompute.sh"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    store = precomputed.Store(tmp_path / "store")
    assert len(store.rows) == 2 * 9 and len(store.texts) == 11
