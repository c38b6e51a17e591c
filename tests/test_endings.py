"""One sentence and an exit code instead of a traceback: signals while libraries are imported, disks that fill up after
the weights are saved, folders that cannot be written, and models that are something else."""

import errno
import importlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import infer
from utils import runtime
from utils.adapters import __main__ as adapters_tool

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
CODES = {"SIGINT": 130, "SIGUSR1": 75, "SIGTERM": 143}
# Sends a signal to the process in which a module is being looked for.
TRAP = """
import os, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == os.environ["TRAP"]:
            os.kill(os.getpid(), getattr(signal, os.environ["TRAP_SIGNAL"]))
            for _ in range(1000): pass
sys.meta_path.insert(0, Finder)
"""


@pytest.fixture
def train(sd1, photos, tmp_path):
    """train("--options ...", name="run") -> exit code; each run in tmp_path / name"""

    def call(options="", name="run"):
        module = importlib.import_module("train_dreambooth_lora")
        words = f"""--pretrained_model_name_or_path '{sd1}' --instance_data_dir '{photos}' --output_dir
            '{tmp_path / name}' --instance_prompt 'a photo of sks dog' --report_to none --train_batch_size 1
            --max_train_steps 1 --seed 3 {options}"""
        try:
            module.main(module.parse_args(shlex.split(words)))
        except SystemExit as left:
            return left.code
        finally:
            runtime.close_last()
        return 0

    return call


@pytest.fixture
def full_for(monkeypatch):
    """full_for("README.md", ...): files of these names, or below folders of these names, cannot be put in place."""

    def fill(*names):
        replace, save = os.replace, None

        def failing(source, target, **more):
            if set(names) & set(Path(target).parts):
                raise OSError(errno.ENOSPC, "No space left on device")
            return replace(source, target, **more)

        monkeypatch.setattr(os, "replace", failing)
        from PIL import Image

        save = Image.Image.save

        def saving(image, file, *given, **named):
            if isinstance(file, str | os.PathLike) and set(names) & set(Path(file).parts):
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(image, file, *given, **named)

        monkeypatch.setattr(Image.Image, "save", saving)

    return fill


@pytest.fixture
def small_files():
    """small_files(bytes): no file may grow beyond that, as on a full disk; None: as before. A real limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


# Signals while libraries are imported

PROGRAMS = [f"train_{name}.py" for name in ("dreambooth", "dreambooth_lora", "dreambooth_lora_sdxl", "pdmbooth")]
PROGRAMS += [f"train_{name}.py" for name in ("pdmbooth_lora", "text_to_image", "text_to_image_lora")]
PROGRAMS += ["infer.py", "-m utils.cache", "-m utils.ema", "-m utils.adapters", "-m utils.hub"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_while_libraries_are_imported(sd1, sdxl, photos, tmp_path, program):
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "sitecustomize.py").write_text(TRAP)
    model = f"--pretrained_model_name_or_path '{sdxl if 'sdxl' in program else sd1}'"
    out = f"--output_dir '{tmp_path / 'out'}'"
    for photo in photos.glob("*.png"):
        photo.with_suffix(".txt").write_text("a photo of sks dog")
    if "train" in program:
        data = "--train_data_dir" if "text" in program else "--instance_prompt 'sks' --instance_data_dir"
        words = f"{model} {data} '{photos}' {out} --max_train_steps 1 --resolution 64 --report_to none"
    else:
        words = {
            "infer.py": f"{model} --prompt dog {out}",
            "-m utils.adapters": f"extract '{sd1}' '{sd1}' '{tmp_path}'",
        }
        words["-m utils.ema"] = f"'{tmp_path}' --sigma_rel 0.1 {out}"
        words["-m utils.cache"] = f"{model} --train_data_dir '{photos}' {out}"
        words["-m utils.hub"] = f"'{tmp_path}'"
        words = words[program]
    library = "huggingface_hub" if program == "-m utils.hub" else "torch"
    path = f"{tmp_path / 'trap'}{os.pathsep}{ROOT}"
    for name, code in CODES.items():
        env = os.environ | {"TRAP": library, "TRAP_SIGNAL": name, "PYTHONPATH": path}
        command = [sys.executable, *shlex.split(f"{program} {words}")]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, (name, done.stderr[-2000:])
        assert done.stderr.startswith(f"{name}: stopped") and done.stderr.count("\n") == 1, done.stderr


def test_importing_the_package_elsewhere_changes_no_handler():
    told = "import signal; before = signal.getsignal(2); import utils; assert signal.getsignal(2) is before"
    assert subprocess.run([sys.executable, "-c", told], cwd=ROOT).returncode == 0


def test_a_signal_while_drawing(sd1, tmp_path, monkeypatch, capfd):
    """What is drawn stays, nothing is half-written, one line."""
    from utils.report import gallery

    save = gallery.save_beside

    def then_stopped(*given):
        save(*given)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(gallery, "save_beside", then_stopped)
    words = f"--pretrained_model_name_or_path '{sd1}' --prompt dog --num_inference_steps 1 --num_images 2 --device cpu"
    with pytest.raises(SystemExit) as stop:
        infer.main(infer.parse_args([*shlex.split(words), "--output_dir", str(tmp_path / "out")]))
    assert stop.value.code == 130
    assert capfd.readouterr().err == "SIGINT: stopped; images that are listed above are complete\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00-dog-seed0.png"]


# Disks that fill up when the result is saved already


@pytest.mark.parametrize("name", ["README.md", "report.html", "samples", "preview", "data_preview.png", "timings.json"])
def test_what_comes_beside_the_result_may_fail(train, tmp_path, capsys, full_for, name):
    full_for(name)
    assert train("--validation_prompt 'a dog' --num_validation_images 1 --validation_num_inference_steps 1") == 0
    said = capsys.readouterr()
    assert "No space left on device" in said.err or name == "timings.json"
    assert said.err.count("warning:") <= 3 and "done: " in said.out
    run = tmp_path / "run"
    assert (run / "pytorch_lora_weights.safetensors").is_file() and not (run / name).is_file()
    assert name in ("samples", "preview") or f" {name}" not in said.out.splitlines()[-1]
    assert not [path for path in run.rglob(".*") if path.name != ".run.lock"]


def test_leftovers_of_killed_runs_are_removed_at_the_next_start(train, tmp_path):
    assert train("--checkpointing_steps 1") == 0
    run = tmp_path / "run"
    (run / "samples/step-000001").mkdir(parents=True)
    left = [".timings.json.4711", ".metrics.jsonl.4711", ".report.html-ab12cd34", ".tmp-file-0123abcd.json"]
    left += ["samples/step-000001/.tmp-file-0123abcd.png", "preview/.tmp-file-0123abcd.png"]
    others = [".notes", ".README.md.swp", ".training_config.yaml.swp", ".report.html.bak"]  # of people and editors
    for name in [*left, *others]:
        (run / name).write_text("x")
    assert train("--checkpointing_steps 1 --max_train_steps 2 --resume_from_checkpoint latest") == 0
    assert not [name for name in left if (run / name).exists()] and all((run / name).exists() for name in others)


# Where images go


@pytest.mark.parametrize("where", ["file/in/the/way", "/proc/self/images", "x" * 300])
def test_a_folder_for_images_that_cannot_be_made_is_refused_before_loading(sd1, tmp_path, monkeypatch, capsys, where):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    from utils import assembling

    monkeypatch.setattr(assembling, "pipeline", lambda *given: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as stop:
        infer.main(infer.parse_args(f"--pretrained_model_name_or_path {sd1} --prompt dog --output_dir {where}".split()))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    if len(where) > 255:
        assert "names of 1 to 255 bytes" in said and len(said) < 400
    else:
        assert f"error: --output_dir {where} cannot be written to" in said


def test_a_disk_full_while_drawing_keeps_what_is_drawn(sd1, tmp_path, capsys, full_for):
    full_for("00-dog-seed1.png")
    words = f"--pretrained_model_name_or_path {sd1} --prompt dog --num_inference_steps 1 --num_images 2 --device cpu"
    with pytest.raises(SystemExit) as stop:
        infer.main(infer.parse_args([*words.split(), "--output_dir", str(tmp_path / "out")]))
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1
    assert "00-dog-seed1.png cannot be written (1 of 2 images are complete): No space left on device" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00-dog-seed0.png"]


# Models that are something else


@pytest.fixture
def strangers(sd1, tmp_path):
    made = tmp_path / "strangers"
    for name in ("no vae", "bad", "empty"):
        (made / name).mkdir(parents=True)
    (made / "bad/config.json").write_text("{")
    (made / "bad/tokenizer.json").write_text("{")
    (made / "file").write_text("x")
    shutil.copy(sd1 / "vae/config.json", made / "no vae")
    shutil.copytree(sd1 / "tokenizer", made / "t5")
    (made / "t5/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    return made


@pytest.mark.parametrize("program", ["train", "infer", "cache"])
@pytest.mark.parametrize(
    "option, name, finding",
    [
        ("pretrained_vae_model_name_or_path", "{sd1}/unet", "is a UNet2DConditionModel; give an AutoencoderKL"),
        ("pretrained_vae_model_name_or_path", "{sd1}/text_encoder", "is a CLIPTextModel; give an AutoencoderKL"),
        ("pretrained_vae_model_name_or_path", "bad", "has a config.json that cannot be read"),
        ("pretrained_vae_model_name_or_path", "no vae", "has no weights"),
        ("pretrained_vae_model_name_or_path", "empty", "holds no vae"),
        ("pretrained_vae_model_name_or_path", "file", "holds no vae"),
        ("tokenizer_name", "t5", "is a T5Tokenizer; give a CLIPTokenizer"),
        ("tokenizer_name", "bad", "has a file that cannot be read"),
    ],
)
def test_another_kind_of_model_is_refused(
    sd1, photos, tmp_path, capsys, strangers, monkeypatch, program, option, name, finding
):
    if program == "infer" and option == "tokenizer_name":
        pytest.skip("infer.py has no such option")
    name = name.format(sd1=sd1) if "{" in name else str(strangers / name)
    words = f"--pretrained_model_name_or_path '{sd1}' --{option} '{name}' --output_dir '{tmp_path / 'out'}'"
    module = importlib.import_module(
        {"train": "train_dreambooth_lora", "cache": "utils.cache.__main__"}.get(program, program)
    )
    data = {"train": f"--instance_data_dir '{photos}' --instance_prompt sks", "infer": "--prompt dog"}
    from utils.models.latent_diffusion import LatentDiffusion

    monkeypatch.setattr(LatentDiffusion, "load", lambda *given, **named: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as stop:
        module.main(module.parse_args(shlex.split(f"{words} {data.get(program, f'--train_data_dir {photos}')}")))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: --{option} {name} {finding}" in said and "Traceback" not in said


# Snapshots of averages


def test_a_snapshot_copied_over_another_is_named(tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    from utils.ema import posthoc

    for step in (1, 2):
        told = {"step": str(step), "updates": str(step), "sigma_rel": "0.1"}
        save_file({"x": torch.zeros(2)}, tmp_path / f"step-00000{step}-0.1.safetensors", metadata=told)
    assert len(posthoc.listed(tmp_path)) == 2
    shutil.copy(tmp_path / "step-000001-0.1.safetensors", tmp_path / "step-000002-0.1.safetensors")
    with pytest.raises(SystemExit) as stop:
        posthoc.choose(posthoc.listed(tmp_path), 0.07)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "step-000002-0.1.safetensors holds the average of step-000001-0.1.safetensors: it was renamed" in said


# Tools on a full disk


@pytest.mark.parametrize("what", ["export", "peft", "import", "merge", "extract"])
def test_tools_on_a_full_disk_leave_nothing_and_can_be_repeated(sd1, tmp_path, capsys, small_files, what):
    from test_infer import make_lora

    lora = make_lora(sd1, tmp_path / "lora", recorded=sd1)
    tuned = tmp_path / "tuned"
    if what == "extract":
        adapters_tool.main(["merge", str(sd1), str(lora), "--output_dir", str(tuned)])
    words = {
        "export": ["export", lora, tmp_path / "out.safetensors"],
        "peft": ["export", lora, tmp_path / "out", "--format", "peft"],
        "import": ["import", lora, tmp_path / "out"],
        "merge": ["merge", sd1, lora, "--output_dir", tmp_path / "out"],
        "extract": ["extract", sd1, tuned, tmp_path / "out"],
    }[what]
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    small_files(2000)
    with pytest.raises(SystemExit) as stop:
        adapters_tool.main([*map(str, words)])
    small_files(None)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1, said
    assert "out" in said and "cannot be written" in said
    assert before == {path for path in tmp_path.rglob("*") if path.is_file()}
    assert adapters_tool.main([*map(str, words)]) == 0
    assert json.dumps([path.name for path in tmp_path.rglob(".tmp*")]) == "[]"


# Files that are something else


@pytest.mark.parametrize("option", ["prompt_file", "config", "lora", "embeddings"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "bytes"])
def test_files_that_never_end_or_never_answer_are_refused_at_once(tmp_path, option, kind):
    file = {"zero": Path("/dev/zero")}.get(kind, tmp_path / "given")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "bytes":
        file.write_bytes(bytes(range(128, 256)))
    prompt = "" if option == "prompt_file" else "--prompt dog"
    words = f"infer.py --pretrained_model_name_or_path toybox --dry_run {prompt} --{option} {file}"
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr[-1000:]
    assert done.stderr.startswith(f"error: --{option} {file}") and done.stderr.count("\n") == 1, done.stderr


def test_a_refiner_that_is_no_pipeline_is_named_by_its_option(sd1, capsys):
    words = f"--pretrained_model_name_or_path {sd1} --prompt dog --refiner {sd1}/unet --dry_run"
    with pytest.raises(SystemExit):
        infer.main(infer.parse_args(words.split()))
    assert capsys.readouterr().err.startswith(f"error: --refiner {sd1}/unet is a folder without model_index.json")


def test_a_list_of_subjects_from_a_pipe_is_refused_at_once(sd1, tmp_path):
    os.mkfifo(tmp_path / "given")
    words = f"train_dreambooth_lora.py --pretrained_model_name_or_path {sd1} --concepts_list {tmp_path / 'given'}"
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "is not a regular file" in done.stderr and "Traceback" not in done.stderr
