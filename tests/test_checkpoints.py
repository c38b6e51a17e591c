"""Checkpoints with toy networks: whole or absent, newest whole one, identity, rotation, exactness to the bit."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.toy_training import train
from utils import arguments, checkpoints
from utils.arguments.identity import COMPARED
from utils.checkpoints import manifests, nested

PROGRAM = [sys.executable, str(Path(__file__).with_name("toy_training.py"))]


def counter(start=0):
    """The smallest state: one number in one file."""
    state = {"value": start}

    def save(folder):
        save_file({"value": torch.tensor([state["value"]])}, str(Path(folder) / "value.safetensors"))

    def load(folder):
        from safetensors.torch import load_file

        state["value"] = int(load_file(str(Path(folder) / "value.safetensors"))["value"])

    return state, (save, load)


def saved_at(folder, *steps, **options):
    state, entry = counter()
    saved = checkpoints.Checkpoints(folder, state={"counter": entry}, **options)
    for step in steps:
        state["value"] = step
        assert saved.save(step) == folder / f"checkpoint-{step}"
    return saved


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def resumed(folder, which="latest", allow=None, **options):
    state, entry = counter(-1)
    step = checkpoints.Checkpoints(folder, state={"counter": entry}, **options).resume(which, allow)
    return step, state["value"]


# Whole or absent


def test_save_and_resume(tmp_path):
    saved_at(tmp_path, 2, 4)
    assert resumed(tmp_path) == (4, 4)
    assert resumed(tmp_path, None) == (0, -1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_dropped_averages_are_said(tmp_path, capsys):
    averages = (lambda folder: (folder / "unet_ema").mkdir(), None)
    checkpoints.Checkpoints(tmp_path, state={"counter": counter()[1], "ema": averages}).save(2)
    assert resumed(tmp_path) == (2, 0)
    assert "add --use_ema" in capsys.readouterr().err


def test_going_back_points_at_what_latest_would_take(tmp_path, capsys):
    saved_at(tmp_path, 2, 4, 6)
    assert resumed(tmp_path, "checkpoint-2") == (2, 2)
    assert "checkpoint-4, checkpoint-6 in" in capsys.readouterr().err
    assert resumed(tmp_path) == (6, 6)
    assert not capsys.readouterr().err


def test_latest_in_a_fresh_folder_starts_fresh(tmp_path):
    assert resumed(tmp_path) == (0, -1)
    assert resumed(tmp_path / "missing") == (0, -1)


def test_manifest_lists_every_file_and_is_written_last(tmp_path, monkeypatch):
    order = []
    sync = manifests.sync
    monkeypatch.setattr(manifests, "sync", lambda path: (order.append(Path(path).name), sync(path)))
    saved_at(tmp_path, 3, identity={"rank": 4})
    manifest = json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["identity"] == {"rank": 4}
    assert set(manifest["files"]) == {"value.safetensors"}
    assert order[:2] == ["value.safetensors", "manifest.json"]
    assert order[-1] == tmp_path.name  # the rename itself is made durable


def test_a_save_that_breaks_leaves_nothing(tmp_path):
    def broken(folder):
        (folder / "half").write_text("half")
        raise KeyError("a bug, not the disk")

    saved = checkpoints.Checkpoints(tmp_path, state={"broken": (broken, None)})
    with pytest.raises(KeyError):
        saved.save(1)
    assert names(tmp_path) == []


def test_stale_staging_is_removed_and_strange_names_are_ignored(tmp_path):
    saved_at(tmp_path, 5)
    (tmp_path / ".tmp-checkpoint-9-dead").mkdir()
    for strange in ("checkpoint-10.bak", "checkpoint-tmp", "checkpoint-", "mycheckpoint-99"):
        (tmp_path / strange).mkdir()
    (tmp_path / "checkpoint-77").write_text("a file, not a folder")
    assert resumed(tmp_path) == (5, 5)
    assert ".tmp-checkpoint-9-dead" not in names(tmp_path)
    assert "checkpoint-10.bak" in names(tmp_path)


def damage_truncate(folder):
    path = folder / "value.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(folder):
    path = folder / "value.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (damage_truncate, "bytes instead of"),
    "flipped": (damage_flip, "has changed"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"format": 1,'), "cannot be read"),
    "strange manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), "cannot be read"),
    "file gone": (lambda folder: (folder / "value.safetensors").unlink(), "value.safetensors is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_skips_what_is_damaged_and_says_why(tmp_path, capsys, damage):
    saved_at(tmp_path, 1, 2, 10)
    harm, words = DAMAGES[damage]
    harm(tmp_path / "checkpoint-10")
    assert resumed(tmp_path) == (2, 2)
    said = capsys.readouterr().err
    assert "checkpoint-10" in said
    assert words in said
    # Named explicitly, it is refused.
    with pytest.raises(SystemExit) as stopped:
        resumed(tmp_path, str(tmp_path / "checkpoint-10"))
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_nothing_whole_is_refused_not_restarted(tmp_path, capsys):
    saved_at(tmp_path, 1)
    damage_truncate(tmp_path / "checkpoint-1")
    with pytest.raises(SystemExit) as stopped:
        resumed(tmp_path)
    assert stopped.value.code == 2


def test_sizes_only_does_not_read_the_files(tmp_path):
    saved_at(tmp_path, 1)
    damage_flip(tmp_path / "checkpoint-1")
    _, (save, _) = counter()
    saved = checkpoints.Checkpoints(tmp_path, state={"counter": (save, lambda folder: None)}, verify="sizes")
    assert saved.resume("latest") == 1


def test_a_manifest_cannot_point_outside(tmp_path):
    saved_at(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../secret"] = {"size": 1, "sha256": ""}
    path.write_text(json.dumps(manifest))
    assert "outside" in manifests.fault(tmp_path / "checkpoint-1", "full")


def test_a_newer_format_is_not_guessed_at(tmp_path):
    saved_at(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert "newer version" in manifests.fault(tmp_path / "checkpoint-1", "full")


# Which one


def test_an_absolute_path_is_that_path(tmp_path):
    """Not the checkpoint of the same name in the output folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    saved_at(there, 3)
    saved_at(here, 3, 8)
    state, entry = counter()
    other = checkpoints.Checkpoints(there, state={"counter": entry})
    state["value"] = 33
    (there / "checkpoint-3").rename(there / "old")
    other.save(3)
    assert resumed(here, str(there / "checkpoint-3")) == (3, 33)
    assert resumed(here, "checkpoint-3") == (3, 3)


@pytest.mark.parametrize("option", COMPARED)
def test_no_option_that_changes_what_is_learned_changes_unseen(tmp_path, capsys, option):
    """All scripts hand `arguments.identity` over; which options that must be is in test_arguments.py."""
    before = COMPARED[option]
    other = {bool: not before, float: 0.125, int: 3}.get(type(before), "other")

    def identity(value):
        return arguments.identity(argparse.Namespace(unrelated=1, **(COMPARED | {option: value})))

    saved_at(tmp_path, 2, identity={"rank": 4} | identity(before))
    assert resumed(tmp_path, identity={"rank": 4}) == (2, 2), "a checkpoint that does not know the option"
    with pytest.raises(SystemExit):
        resumed(tmp_path, identity={"rank": 4} | identity(other))
    assert f"--allow_resume_mismatch {option} if" in capsys.readouterr().err
    assert resumed(tmp_path, identity={"rank": 4} | identity(other), allow=option) == (2, 2)


def test_identity_mismatch_is_a_table(tmp_path, capsys):
    saved_at(tmp_path, 2, identity={"rank": 4, "targets": ("to_k", "to_q"), "seed": 1})
    same = {"rank": 4, "targets": ["to_k", "to_q"], "seed": 1}
    assert resumed(tmp_path, identity=same) == (2, 2)
    other = same | {"rank": 8, "seed": 2}
    with pytest.raises(SystemExit) as stopped:
        resumed(tmp_path, identity=other)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "rank  checkpoint: 4  now: 8" in said
    assert "--allow_resume_mismatch rank,seed" in said
    with pytest.raises(SystemExit):
        resumed(tmp_path, identity=other, allow="rank")
    assert resumed(tmp_path, identity=other, allow="rank, seed") == (2, 2)
    assert resumed(tmp_path, identity=other, allow=["rank", "seed"]) == (2, 2)


# Rotation


def test_a_link_to_a_checkpoint_is_removed_and_not_followed(tmp_path):
    """Neither what it leads to nor a staged link is left: the latter would stay for ever."""
    elsewhere = saved_at(tmp_path / "elsewhere", 1).folder / "checkpoint-1"
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint-1").symlink_to(elsewhere)
    (folder / "checkpoint-3").symlink_to(tmp_path / "nowhere")
    (folder / ".tmp-checkpoint-9-x").symlink_to(elsewhere)
    saved_at(folder, 2, 3, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3"]
    assert not (folder / "checkpoint-3").is_symlink()
    assert manifests.fault(elsewhere, "full") is None


def test_rotation_keeps_the_newest(tmp_path):
    saved_at(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    saved_at(tmp_path / "one", 1, 2, keep=1)
    assert names(tmp_path / "one") == ["checkpoint-2"]


def test_the_old_one_lives_until_the_new_one_is_durable(tmp_path, monkeypatch):
    saved = saved_at(tmp_path, 1, keep=1)
    seen = []
    replace = os.replace

    def watched(*paths):
        seen.append((tmp_path / "checkpoint-1").exists())
        replace(*paths)

    monkeypatch.setattr(os, "replace", watched)
    saved.save(2)
    assert seen == [True]
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_one_resumed_from_lives_until_a_newer_one_is_durable(tmp_path, monkeypatch):
    """Two are there while a third is written, whatever --checkpoints_total_limit says; a save that fails costs none."""
    saved_at(tmp_path, 1, 2, 5)
    _, entry = counter()
    saved = checkpoints.Checkpoints(tmp_path, state={"counter": entry}, keep=1)
    assert saved.resume("checkpoint-2") == 2
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        assert saved.save(3) is None
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-5"]
    seen, write = [], manifests.write
    monkeypatch.setattr(manifests, "write", lambda *given: (seen.extend(names(tmp_path)), write(*given)))
    saved.save(4)
    assert {"checkpoint-1", "checkpoint-2", "checkpoint-5"} <= set(seen)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]  # what is newer is another course: not ours to delete


def test_a_checkpoint_that_cannot_be_deleted_costs_a_warning(tmp_path, monkeypatch, capsys):
    saved = saved_at(tmp_path, 1, keep=1)
    rename = Path.rename

    def refused(self, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        saved.save(2)
    assert "checkpoint-1: could not be deleted" in capsys.readouterr().err
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"] and rename is Path.rename


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    saved = saved_at(tmp_path, 1, 2, 3)
    damage_truncate(tmp_path / "checkpoint-2")
    damage_truncate(tmp_path / "checkpoint-3")
    saved.keep = 2
    saved.save(4)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path):
    saved_at(tmp_path, 1, 2)
    damage_flip(tmp_path / "checkpoint-2")
    assert resumed(tmp_path) == (1, 1)
    saved_at(tmp_path, 2)
    assert resumed(tmp_path) == (2, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


# Disk


def test_a_full_disk_costs_a_warning_and_the_next_save_is_tried(tmp_path, monkeypatch, capsys):
    saved = saved_at(tmp_path, 1, keep=1)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "sync", full)
        assert saved.save(2) is None
    assert names(tmp_path) == ["checkpoint-1"]
    assert "No space left" in capsys.readouterr().err
    assert saved.save(3) == tmp_path / "checkpoint-3"
    assert names(tmp_path) == ["checkpoint-3"]


def test_too_many_failures_in_a_row_stop_the_run(tmp_path, monkeypatch):
    saved = saved_at(tmp_path, 1)
    monkeypatch.setattr(manifests, "sync", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    assert saved.save(2) is None
    assert saved.save(3) is None
    with pytest.raises(SystemExit) as stopped:
        saved.save(4)
    assert stopped.value.code == 1
    assert resumed(tmp_path) == (1, 1)


def test_the_main_process_rescues_alone(tmp_path, monkeypatch, capsys):
    """When the result could not be written, the others may be gone: nothing is asked of them."""
    saved = saved_at(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "_from_main", lambda value: pytest.fail("waits for the others"))
    monkeypatch.setattr(checkpoints, "_is_main", lambda: False)
    saved.rescue(2)
    assert names(tmp_path) == ["checkpoint-1"]
    monkeypatch.setattr(checkpoints, "_is_main", lambda: True)
    saved.rescue(2)
    assert "checkpoint-2 holds what was learned" in capsys.readouterr().err
    assert manifests.fault(tmp_path / "checkpoint-2", "full") is None
    monkeypatch.setattr(manifests, "sync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    saved.rescue(3)
    assert "not saved either" in capsys.readouterr().err
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_mount_without_fsync_is_tolerated_but_a_failing_disk_is_not(tmp_path, monkeypatch):
    def answer(number):
        def fsync(handle):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", answer(errno.EINVAL))
    saved = saved_at(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", answer(errno.EIO))
    assert saved.save(2) is None
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no file size limits on this system")
def test_a_file_that_cannot_grow(tmp_path):
    """A real short write, in the middle of a tensor file."""
    program = f"""
import resource, signal, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from safetensors.torch import save_file
from utils import checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = [10]
entry = (lambda folder: save_file({{"x": torch.zeros(size[0])}}, str(folder / "x.safetensors")), None)
saved = checkpoints.Checkpoints({str(tmp_path)!r}, state={{"x": entry}})
assert saved.save(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
size[0] = 1_000_000
assert saved.save(2) is None
size[0] = 10
assert saved.save(3)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


# Nested state


def test_nested_state_comes_back_exactly(tmp_path):
    table = torch.arange(256, dtype=torch.uint8)
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).t(), "qmap": table, "none": None},
            1: {"step": 7, "exp_avg": torch.randn(4).bfloat16(), "qmap": table, "empty": torch.zeros(0, 2)},
        },
        "param_groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "names": ["a", "b"], "flag": True, "params": [0, 1]}],
        "dict": {"tensor": 1, "inf": float("inf")},
    }
    nested.save(state, tmp_path / "state.safetensors")
    back = nested.load(tmp_path / "state.safetensors")
    assert back["param_groups"] == state["param_groups"]
    assert back["dict"] == state["dict"]
    for key in (0, 1):
        assert set(back["state"][key]) == set(state["state"][key])
        for name, value in state["state"][key].items():
            other = back["state"][key][name]
            if isinstance(value, torch.Tensor):
                assert other.dtype == value.dtype
                assert torch.equal(other, value)
            else:
                assert other == value
    assert back["state"][0]["qmap"] is back["state"][1]["qmap"]
    nested.save({"only": [1, 2]}, tmp_path / "plain.safetensors")
    assert nested.load(tmp_path / "plain.safetensors") == {"only": [1, 2]}


def test_nested_state_refuses_objects(tmp_path):
    for state in ({"x": object()}, {(1, 2): 3}, {"x": lambda: None}):
        with pytest.raises(TypeError, match="cannot store"):
            nested.save(state, tmp_path / "state.safetensors")


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    train(tmp_path, total=2)
    files = sorted(path.name for path in (tmp_path / "checkpoint-2").iterdir())
    assert files == ["manifest.json", "optimizer.safetensors", "weights.safetensors", "weights_ema.safetensors"]


# Exact


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy", "adamw8bit"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, optimizer):
    options = {"optimizer": optimizer, "accumulate": 2, "width": 8}
    straight = train(tmp_path / "straight", total=7, every=3, **options)
    train(tmp_path / "parts", total=3, every=3, **options)
    train(tmp_path / "parts", total=5, every=3, resume="latest", **options)
    assert train(tmp_path / "parts", total=7, every=3, resume="latest", **options) == straight
    whole = nested.load(tmp_path / "straight" / "checkpoint-7" / "optimizer.safetensors")
    parts = nested.load(tmp_path / "parts" / "checkpoint-7" / "optimizer.safetensors")
    assert str(whole) == str(parts)
    for name in ("weights", "weights_ema", "optimizer"):
        path = f"checkpoint-7/{name}.safetensors"
        assert (tmp_path / "straight" / path).read_bytes() == (tmp_path / "parts" / path).read_bytes()
    told = []
    for part in ("straight", "parts"):
        lines = (tmp_path / part / "metrics.jsonl").read_text().splitlines()
        told.append([json.loads(line) for line in lines])
    for one, other in zip(*told, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_the_exactness_test_can_fail(tmp_path):
    """Negative control: without the optimizer's memory the weights differ."""
    straight = train(tmp_path / "straight", total=6, every=3)
    train(tmp_path / "parts", total=3, every=3)
    path = tmp_path / "parts" / "checkpoint-3"
    state = nested.load(path / "optimizer.safetensors")
    state["state"] = {}
    nested.save(state, path / "optimizer.safetensors")
    identity = manifests.read(path)["identity"]
    (path / "manifest.json").unlink()
    manifests.write(path, 3, identity)
    assert train(tmp_path / "parts", total=6, every=3, resume="latest") != straight


def test_a_new_learning_rate_takes_effect_on_resume(tmp_path):
    def make(rate):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        saved = checkpoints.Checkpoints(tmp_path, state={"optimizer": optimizer, "schedule": schedule})
        return weight, optimizer, schedule, saved

    weight, optimizer, schedule, saved = make(0.1)
    for _ in range(3):
        weight.sum().backward()
        optimizer.step()
        schedule.step()
    saved.save(3)
    weight, optimizer, schedule, saved = make(0.5)
    assert saved.resume("latest") == 3
    assert schedule.last_epoch == 3
    assert optimizer.param_groups[0]["lr"] == 0.5 / 4
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.state[weight]["step"] == 3
