"""Class images: exact in number, each from its own seed, nobody's pictures touched, no stale ones reused."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils import errors, images, prior, randomness


class Run(SimpleNamespace):
    def __init__(self, rank=0, world=1, seed=5):
        super().__init__(rank=rank, world=world, seed=seed, is_main=rank == 0, stopping=False)
        self.device = torch.device("cpu")
        self.accelerator = SimpleNamespace(wait_for_everyone=lambda: None)

    def say(self, text):
        if self.is_main:
            print(text)

    @contextlib.contextmanager
    def phase(self, name):
        yield


class Pipeline:
    """Draws a picture that only depends on its generator, and remembers how it was called."""

    def __init__(self, run, stop_after=None):
        self.run, self.stop_after, self.calls = run, stop_after, []
        self.scheduler = SimpleNamespace(config={})
        self.unet = SimpleNamespace(config=SimpleNamespace(sample_size=8))
        self.vae_scale_factor = 2

    def to(self, device):
        return self

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, prompt, generator, num_inference_steps, guidance_scale=7.5, **size):
        self.guidance = guidance_scale
        self.calls.append((prompt, num_inference_steps, size))
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            self.run.stopping = True
        drawn = [torch.randint(0, 256, (16, 16, 3), generator=one, dtype=torch.uint8).numpy() for one in generator]
        return SimpleNamespace(images=[Image.fromarray(one) for one in drawn])


@pytest.fixture(autouse=True)
def _any_scheduler(monkeypatch):
    monkeypatch.setattr(prior, "_fast_solver", lambda scheduler: scheduler)


def family(pipeline, name="base", revision=None, prediction_type=None):
    def from_disk(dtype):
        pipeline.dtype = dtype
        return pipeline

    own = {"name": name, "revision": revision, "prediction_type": prediction_type, "clip_skip": 0}
    return SimpleNamespace(**own, pipeline_from_disk=from_disk, words_for=lambda drawing, prompts: {"prompt": prompts})


def fill(folder, count=5, run=None, pipeline=None, prompt="a photo of dog", name="base", kind=None, **options):
    run = run or Run()
    pipeline = pipeline or Pipeline(run)
    options = {"batch_size": 2, "precision": None, "resolution": 16} | options
    base = family(pipeline, name, prediction_type=kind)
    return prior.fill(run, base, folder, prompt=prompt, count=count, **options), pipeline


def hashes(paths):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_an_empty_folder_is_filled_exactly(tmp_path):
    folder = tmp_path / "not" / "there yet"
    found, pipeline = fill(folder)
    assert [path.name for path in found] == [f"class-0000{number}.png" for number in range(5)]
    assert [len(prompts) for prompts, *_ in pipeline.calls] == [2, 2, 1] and pipeline.dtype == torch.float32
    assert pipeline.calls[0] == (["a photo of dog"] * 2, prior.STEPS, {})
    assert len(set(hashes(found).values())) == 5, "no two are alike"
    record = json.loads((folder / prior.SIDECAR).read_text())
    assert record["prompt"] == "a photo of dog" and record["model"] == "base" and record["revision"] is None
    assert record["guidance_scale"] == 7.5
    assert record["images"] == {path.name: randomness.seed_of(5, "class", n) for n, path in enumerate(found)}
    assert sorted(path.name for path in folder.iterdir()) == sorted([prior.SIDECAR, *record["images"]])
    again, pipeline = fill(folder)
    assert again == found and not pipeline.calls
    generator = torch.Generator().manual_seed(record["images"]["class-00003.png"])
    alone = Pipeline(Run())(["x"], [generator], 1).images[0]
    assert alone.tobytes() == images.open_rgb(found[3]).tobytes(), "any image can be redrawn alone"


def test_batch_size_and_number_of_processes_change_nothing(tmp_path):
    whole, _ = fill(tmp_path / "one", count=7, batch_size=7)
    for batch_size in (1, 3):
        assert hashes(fill(tmp_path / f"b{batch_size}", count=7, batch_size=batch_size)[0]) == hashes(whole)
    shares = []
    for rank in (1, 0):  # one after the other here; each sees what a process of two would see at the start
        run = Run(rank, world=2)
        folder = tmp_path / f"rank{rank}"
        with contextlib.suppress(SystemExit):  # alone, a rank finds the folder incomplete
            fill(folder, count=7, run=run)
        shares.append(hashes(images.list_images(folder)))
    assert not shares[0].keys() & shares[1].keys() and shares[0] | shares[1] == hashes(whole)


def test_a_stopped_run_goes_on_to_exactly_the_number(tmp_path, capsys):
    run = Run()
    some, _ = fill(tmp_path, count=6, run=run, pipeline=Pipeline(run, stop_after=2))
    assert len(some) == 4
    (tmp_path / "class-00002.png").write_bytes(some[2].read_bytes()[:300])  # and one was hurt
    (tmp_path / ".class-00005.png.tmp").write_bytes(b"left behind")
    found, pipeline = fill(tmp_path, count=6)
    assert len(found) == 6 and sum(len(prompts) for prompts, *_ in pipeline.calls) == 3
    assert hashes(found) == hashes(fill(tmp_path.parent / "fresh", count=6)[0])
    assert "class-00002.png' cannot be decoded" in capsys.readouterr().err
    more, _ = fill(tmp_path, count=8)
    assert more[:6] == found and len(more) == 8
    fewer, pipeline = fill(tmp_path, count=3)
    assert fewer == found[:3] and not pipeline.calls


def test_links_under_temporary_names_are_not_written_through(tmp_path):
    mine, folder = tmp_path / "thesis.txt", tmp_path / "class"
    mine.write_text("years of work")
    folder.mkdir()
    for name in (".class-00000.png.tmp", f".{prior.SIDECAR}.tmp"):
        (folder / name).symlink_to(mine)
    fill(folder, count=2)
    assert mine.read_text() == "years of work"
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_the_owners_pictures_come_first_and_stay_untouched(tmp_path, capsys):
    for name in ("z.jpg", "sub/class-00000.png", "class-00001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((9, 9), 50).convert("RGB").save(tmp_path / name)
    (tmp_path / "class-00002.png").write_bytes(b"broken, but not ours to replace")
    (tmp_path / "notes.txt").write_text("not counted")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found, _ = fill(tmp_path, count=5)
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["class-00001.png", "sub/class-00000.png", "z.jpg", "class-00000.png", "class-00003.png"]
    assert all(path.read_bytes() == data for path, data in before.items())
    assert "not used" in capsys.readouterr().err
    assert fill(tmp_path, count=5)[0] == found
    assert fill(tmp_path, count=2)[0] == found[:2]
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_file_under_a_drawn_ones_name_is_drawn_only_if_its_pixels_are(tmp_path, capsys):
    """Pictures of the owner's that took the name of a drawn one are theirs: used, never replaced."""
    fill(tmp_path, count=4)
    drawn = [tmp_path / f"class-0000{number}.png" for number in range(4)]
    Image.effect_noise((16, 16), 50).convert("RGB").save(drawn[0])
    drawn[1].write_bytes(b"the owner's notes, or a format that nobody here reads")
    drawn[2].write_bytes(b"")  # a power failure leaves this
    drawn[3].write_bytes(drawn[3].read_bytes()[:300])  # cut, and still says that it was drawn
    before = {path: path.read_bytes() for path in drawn[:2]}
    found, pipeline = fill(tmp_path, count=4)
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in found] == [f"class-0000{number}.png" for number in (0, 2, 3, 4)]
    assert sum(len(prompts) for prompts, *_ in pipeline.calls) == 3
    said = capsys.readouterr()
    assert said.err.count("drawn again") == 2 and said.err.count("not used") == 1 and "(1 found there" in said.out
    assert fill(tmp_path, count=4)[0] == found
    with pytest.raises(SystemExit):
        fill(tmp_path, count=1, prompt="a photo of cat")


HOLDS = """
import sys, time
from pathlib import Path
from test_prior import Run, fill
from utils import prior

prior._fast_solver = lambda scheduler: scheduler
draw = prior._draw

def slowly(*given):
    Path(sys.argv[2]).touch()
    while not Path(sys.argv[3]).exists():
        time.sleep(0.02)
    draw(*given)

prior._draw = slowly
fill(Path(sys.argv[1]), count=3, prompt="a photo of dog")
"""


@pytest.fixture
def another_run(tmp_path):
    """another_run() starts a process that draws dogs into `class` as soon as `go` is there, and waits until it holds
    the folder."""
    script, started = tmp_path / "holds.py", []
    script.write_text(HOLDS)

    def start():
        here = Path(__file__).parent
        paths = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
        words = [sys.executable, script, tmp_path / "class", tmp_path / "holds", tmp_path / "go"]
        started.append(subprocess.Popen(words, env=paths, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        while not (tmp_path / "holds").exists():
            assert started[0].poll() is None
            time.sleep(0.05)
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("prompt", ["a photo of dog", "a photo of cat"])
def test_two_runs_do_not_draw_into_one_folder_at_once(tmp_path, another_run, capsys, monkeypatch, prompt):
    """The second waits; then it finds the images of its prompt, or refuses those of another."""
    monkeypatch.setattr(prior, "WAIT", 0.05)
    folder, process = tmp_path / "class", another_run()
    assert not list(folder.glob("class-*.png"))
    waited, sleep = [], time.sleep

    def slept(seconds):
        waited.append(seconds)
        (tmp_path / "go").touch() if len(waited) == 3 else None
        sleep(seconds)

    monkeypatch.setattr(prior.time, "sleep", slept)
    if prompt == "a photo of dog":
        found, pipeline = fill(folder, count=3, prompt=prompt)
        assert len(found) == 3 and not pipeline.calls
    else:
        with pytest.raises(SystemExit):
            fill(folder, count=3, prompt=prompt)
    said = capsys.readouterr()
    assert said.out.count(f"waiting for the run that draws class images into '{folder}' (process {process.pid}") == 1
    assert process.wait(60) == 0 and ("drawn for prompt 'a photo of dog'" in said.err) == (prompt != "a photo of dog")
    assert sorted(path.name for path in folder.iterdir()) == [*(f"class-0000{n}.png" for n in range(3)), prior.SIDECAR]
    assert len(waited) >= 3


def test_a_stop_ends_the_wait_and_a_killed_run_holds_nothing(tmp_path, another_run, monkeypatch):
    monkeypatch.setattr(prior, "WAIT", 0.05)
    process, run = another_run(), Run()
    monkeypatch.setattr(prior.time, "sleep", lambda seconds: setattr(run, "stopping", True))
    found, pipeline = fill(tmp_path / "class", count=3, run=run)
    assert found == [] and not pipeline.calls
    monkeypatch.undo()
    monkeypatch.setattr(prior, "_fast_solver", lambda scheduler: scheduler)
    process.kill()
    process.wait()
    assert (tmp_path / "class" / prior.LOCK).exists()
    assert len(fill(tmp_path / "class", count=3)[0]) == 3
    assert not (tmp_path / "class" / prior.LOCK).exists()


def test_a_complete_folder_needs_no_lock(tmp_path, monkeypatch):
    """Nor anything else to be written: it may be read-only."""
    fill(tmp_path, count=3)
    monkeypatch.setattr(os, "open", lambda *given: pytest.fail("something is opened for writing"))
    assert len(fill(tmp_path, count=3)[0]) == 3


@pytest.mark.parametrize("what", ["images", "record", "folder"])
def test_a_full_disk_while_drawing_leaves_nothing_half_written(tmp_path, monkeypatch, capsys, what):
    def full(path, *given, **named):
        Path(path).open("wb").close()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        if what == "images":
            patched.setattr(Image.Image, "save", lambda picture, path, *given, **named: full(path))
        if what == "record":
            patched.setattr(Path, "write_bytes", full)
        if what == "folder":
            patched.setattr(Path, "mkdir", lambda *given, **named: full(tmp_path / "x"))
        fill(tmp_path / "class", count=2)
    assert stop.value.code == errors.FAILED and "cannot be written" in capsys.readouterr().err
    left = [path.name for path in (tmp_path / "class").glob("*")] if what != "folder" else []
    assert left == ([prior.SIDECAR] if what == "images" else [])
    assert what == "folder" or not list((tmp_path / "class").glob(".*"))
    assert len(fill(tmp_path / "class", count=2)[0]) == 2


@pytest.mark.parametrize("other", [{"prompt": "a photo of cat"}, {"name": "another base"}, {"kind": "sample"}])
def test_images_of_another_prompt_or_model_are_refused(tmp_path, capsys, other):
    fill(tmp_path, count=2)
    before = hashes(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        fill(tmp_path, count=4, **other)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--class_data_dir" in message and "delete" in message
    assert hashes(tmp_path.iterdir()) == before
    for path in images.list_images(tmp_path):
        path.unlink()
    assert len(fill(tmp_path, count=4, **other)[0]) == 4, "with the images gone, nothing is stale"


def test_enough_pictures_of_the_owner_need_no_model(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    found = prior.fill(Run(), family(None), tmp_path, prompt="p", count=3)
    assert len(found) == 3 and not (tmp_path / prior.SIDECAR).exists()


def test_a_broken_sidecar_is_named(tmp_path, capsys):
    (tmp_path / prior.SIDECAR).write_text("{")
    with pytest.raises(SystemExit) as stop:
        fill(tmp_path)
    assert stop.value.code == 3 and prior.SIDECAR in capsys.readouterr().err


def test_precision_and_size(tmp_path):
    assert fill(tmp_path / "a", precision="bf16")[1].dtype == torch.bfloat16
    assert fill(tmp_path / "b", precision="no")[1].dtype == torch.float32
    assert fill(tmp_path / "c", resolution=8)[1].calls[0][2] == {}, "never below what the model was made for"
    assert fill(tmp_path / "d", resolution=32)[1].calls[0][2] == {"height": 32, "width": 32}


def test_a_real_pipeline(sd1, tmp_path, monkeypatch):
    from utils import models

    monkeypatch.undo()  # the real solver
    monkeypatch.setattr(prior, "STEPS", 2)
    base = models.family_of(str(sd1))
    found = prior.fill(Run(), base, tmp_path / "a", prompt="a photo of dog", count=3, batch_size=2)
    assert [images.open_rgb(path).size for path in found] == [(64, 64)] * 3
    assert len(set(hashes(found).values())) == 3
    alone = prior.fill(Run(), base, tmp_path / "b", prompt="a photo of dog", count=3, batch_size=1)
    for one, other in zip(found, alone, strict=True):
        difference = images.to_tensor(images.open_rgb(one)) - images.to_tensor(images.open_rgb(other))
        assert difference.abs().max() < 0.02, "the batch size changes rounding only"


def test_only_what_was_drawn_is_removed(tmp_path, capsys):
    folder = tmp_path / "class"
    concepts = [SimpleNamespace(class_data_dir=str(folder))]
    fill(folder, count=3)
    prior.remove_drawn(concepts)
    assert not folder.exists() and not capsys.readouterr().err
    fill(folder, count=7)
    drawn = [folder / f"class-0000{number}.png" for number in range(7)]
    photo = Image.effect_noise((16, 16), 50).convert("RGB")
    photo.save(drawn[0])  # the owner's own under a drawn one's name,
    retouched = Image.open(drawn[1])  # one painted over by a program that keeps what the file says,
    told = PngInfo()
    told.add_text(prior.MARK, retouched.info[prior.MARK])
    retouched.putpixel((3, 3), (1, 2, 3))
    retouched.save(drawn[1], pnginfo=told)
    with Image.open(drawn[2]) as picture:  # one of an older version, which left no mark,
        picture.save(drawn[2])
    drawn[3].write_bytes(drawn[4].read_bytes())  # a copy of another,
    drawn[5].write_bytes(b"notes")
    before = {path: path.read_bytes() for path in (*drawn[:4], drawn[5])}
    record = json.loads((folder / prior.SIDECAR).read_text())
    record["images"]["../photo.png"] = 0
    (folder / prior.SIDECAR).write_text(json.dumps(record))
    photo.save(tmp_path / "photo.png")
    prior.remove_drawn(concepts)
    said = capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.glob("class-*")} == before and (tmp_path / "photo.png").exists()
    assert "class-00000.png, class-00001.png, class-00002.png and 2 more" in said and "--del_cls_imgs_dir" in said
    with pytest.raises(SystemExit):  # what is left of them is still not passed off as another prompt's
        fill(folder, count=9, prompt="a photo of cat")


def test_the_class_prompt_is_heard_as_in_training(sd1, sd2, tmp_path, monkeypatch, capsys):
    """--clip_skip: as by encoders without their last layer. The noise schedule is the one the model has learned."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from utils import models

    monkeypatch.undo()  # the real solver
    monkeypatch.setattr(prior, "STEPS", 2)
    config = CLIPTextConfig.from_pretrained(sd1 / "text_encoder", num_hidden_layers=4)
    encoder = CLIPTextModel(config)
    for layers in (4, 3):
        folder = shutil.copytree(sd1, tmp_path / f"layers{layers}")
        inner = getattr(encoder, "text_model", encoder)
        inner.encoder.layers = inner.encoder.layers[:layers]
        encoder.config.num_hidden_layers = layers
        encoder.save_pretrained(folder / "text_encoder")

    def drawn(name, model, **how):
        base = models.family_of(str(model), **how)
        return hashes(prior.fill(Run(), base, tmp_path / name, prompt="a photo of dog", count=2))

    skipped = drawn("skipped", tmp_path / "layers4", clip_skip=1)
    assert skipped == drawn("shorter", tmp_path / "layers3") != drawn("whole", tmp_path / "layers4")
    with pytest.raises(SystemExit):
        prior.fill(
            Run(), models.family_of(str(tmp_path / "layers4")), tmp_path / "skipped", prompt="a photo of dog", count=3
        )
    assert "drawn for clip_skip 1, and this run has None" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        drawn("too many", sd1, clip_skip=2)
    assert "--clip_skip 2" in capsys.readouterr().err
    assert drawn("own", sd2) == drawn("rescaled", sd2, rescale_betas_zero_snr=True)


TWO = """
import json
import sys
import time
from pathlib import Path
import torch
from accelerate import PartialState
from test_cache import Family, Run as CacheRun
from test_prior import Run, fill
from utils import cache, datasets, prior

state = PartialState(cpu=True)
prior._fast_solver = lambda scheduler: scheduler
run = Run(state.process_index, state.num_processes)
run.accelerator = state
found, pipeline = fill(sys.argv[1], count=7, run=run)
dataset = datasets.DreamBooth(datasets.pictures(found, "p"), size=16)
family = Family()
cache.latents(CacheRun(run.rank, run.world), family, dataset, "on")
drawn = sum(len(prompts) for prompts, *_ in pipeline.calls)
latents = sum(mean.double().sum().item() for mean, _ in dataset.latents.rows.values())
told = [len(found), drawn, family.encoded, latents]
Path(sys.argv[1]).with_name(f"rank{run.rank}.json").write_text(json.dumps(told))
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_real_processes_share_drawing_and_caching(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
    }
    result = subprocess.run(
        [*command, script, tmp_path / "c"], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one[:3] == [7, 4, 4] and other[:3] == [7, 3, 3], "found, drawn here, encoded here"
    assert one[3] == other[3], "both hold the same latents"
    drawn = hashes(images.list_images(tmp_path / "c"))
    assert len(set(drawn.values())) == 7 and drawn == hashes(fill(tmp_path / "one", count=7)[0])


RACE = """
import sys
import time
from pathlib import Path
from accelerate import PartialState
from test_prior import Run, fill
from utils import prior

state, folder, look, looks = PartialState(cpu=True), Path(sys.argv[1]), prior._look, []
prior._fast_solver = lambda scheduler: scheduler
run = Run(state.process_index, state.num_processes)
run.accelerator = state

def between(*given):
    looks.append(run.rank)
    if looks == [1]:  # only now another run completes the folder
        while not folder.with_name("seen").exists():
            time.sleep(0.05)
        folder.with_name("late").rename(folder / "class-00002.png")
    found = look(*given)
    if looks == [0]:
        folder.with_name("seen").touch()
    return found

prior._look = between
assert len(fill(folder, count=3, run=run)[0]) == 3
state.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_that_see_another_run_complete_the_folder_do_not_wait_for_each_other(tmp_path):
    fill(tmp_path / "c", count=3)
    (tmp_path / "c" / "class-00002.png").rename(tmp_path / "late")
    script = tmp_path / "race.py"
    script.write_text(RACE)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    environment = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
    }
    result = subprocess.run(
        [*command, tmp_path / "c"], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_link_in_the_place_of_the_lock_is_named(tmp_path, capsys):
    (tmp_path / prior.LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        fill(tmp_path, count=3)
    assert f"{prior.LOCK} in it is a link" in capsys.readouterr().err and not (tmp_path / "elsewhere").exists()


def test_images_drawn_with_another_guidance_are_not_passed_off(tmp_path):
    _, pipeline = fill(tmp_path, count=2, guidance=4.0)
    assert pipeline.guidance == 4.0
    with pytest.raises(SystemExit):
        fill(tmp_path, count=2)
