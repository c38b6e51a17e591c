"""Commands that the documents show: their options exist, and the README's own chain runs, shrunk to a tiny model."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHRUNK = "--resolution 64 --max_train_steps 2 --num_class_images 2 --num_validation_images 1 --validation_steps 2"
SHRUNK += " --validation_num_inference_steps 2 --report_to none"


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, script, words after it) of every command in a fenced block that starts one of our scripts."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                scripts = [word for word in words if re.fullmatch(r"(train_\w+|infer)\.py", word)]
                if scripts:
                    rest = words[words.index(scripts[0]) + 1 :]
                    found.append((page.name, scripts[0], rest))
    return found


def parse(script: str, words: list[str]):
    return importlib.import_module(script.removesuffix(".py")).parse_args(words)


def test_there_are_commands_to_look_at():
    scripts = {script for _, script, _ in commands()}
    assert scripts >= {"train_dreambooth.py", "train_dreambooth_lora.py", "infer.py"}


@pytest.mark.parametrize("page, script, words", commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_options_in_the_documents_exist(page, script, words, capsys):
    try:
        parse(script, words)
    except SystemExit:
        pytest.fail(f"{page}: {capsys.readouterr().err}")


def test_options_in_tables_and_sentences_exist():
    """Every `--name` that a page on a script mentions is an option of that script or of one it works with."""
    scripts = ("train_dreambooth", "train_dreambooth_lora", "train_dreambooth_lora_sdxl", "infer")
    scripts += ("train_text_to_image", "train_text_to_image_lora", "train_pdmbooth", "train_pdmbooth_lora")
    options = set().union(*map(help_of, (*scripts, "utils.cache.__main__", "utils.ema.__main__"))) | {
        "config_file",
        "dynamo_backend",
        "output",
    }  # the last are accelerate's, and the toybox's
    unknown = []
    for about in (*scripts, "objectives"):
        page = ROOT / "docs" / f"{about.replace('image_lora', 'image').replace('pdmbooth_lora', 'pdmbooth')}.md"
        for name in re.findall(r"(?<![\w-])--(\w+)", page.read_text(encoding="utf-8")):
            if name not in options:
                unknown.append(f"{page.name}: --{name}")
    assert not unknown


def help_of(script: str) -> set[str]:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        parse(f"{script}.py", ["--help"])
    return set(re.findall(r"--(\w+)", text.getvalue()))


def test_the_demo_in_the_readme_is_the_demo():
    from toybox import demo

    assert demo.typed(demo.TRAIN) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_ctrl_c_in_the_demo_lets_the_script_save(tmp_path):
    script, saved = tmp_path / "slow.py", tmp_path / "saved"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(saved)!r}).touch()\n"
        "    sys.exit(130)\n"
    )
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from toybox import demo; demo.run({shlex.quote(str(script))!r})"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and saved.exists() and not said


def test_the_demo_takes_no_options():
    for option, code, told in (("--help", 0, "usage: python -m toybox.demo"), ("--stepz", 2, "--stepz")):
        done = subprocess.run([sys.executable, "-m", "toybox.demo", option], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and told in done.stdout + done.stderr


def test_the_demo_differs_from_the_first_real_command_only_in_values():
    """What the demo shows is what a user of Stable Diffusion types, so it may use no option of its own."""
    real, shown = (words for page, script, words in commands() if page == "README.md" and script.startswith("train"))

    def names(words):
        return [word for word in words if word.startswith("--")]

    assert names(real) == names(shown)


def test_the_first_real_commands_run(sd1, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos.rename("dog")
    train, draw = [(script, words) for page, script, words in commands() if page == "README.md"][:2]
    script, words = train
    args = parse(script, [*words, "--pretrained_model_name_or_path", str(sd1), *SHRUNK.split()])
    importlib.import_module(script.removesuffix(".py")).main(args)
    assert Path("runs/dog/pytorch_lora_weights.safetensors").is_file()
    assert Path("runs/dog/report.html").is_file()
    assert len(list(Path("dog_class").glob("*.png"))) == 2

    script, words = draw
    args = parse(script, [*words, "--num_images", "1", "--num_inference_steps", "2"])
    importlib.import_module(script.removesuffix(".py")).main(args)
    assert len(list(Path("images").glob("*-seed0.png"))) == 1
