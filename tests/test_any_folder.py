"""A folder as people have them, through every script: odd names, odd pictures, odd words, and nothing of it touched."""

import importlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

SCRIPTS = sorted(path.stem for path in Path(__file__).parents[1].glob("train_*.py"))
WORDS = "a photo of {identifier} {class} 🐕 كلب\nnext line <b>&amp;</b> 'quoted' \"twice\" %s \\n"


def tree(folder):
    """Everything under a folder: names, bytes, kinds, times. A folder's own time tells of a file that came and went."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        state = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[path.relative_to(folder).as_posix()] = (state.st_mode, state.st_mtime_ns, content)
    return found


@pytest.fixture
def anything(tmp_path):
    folder = tmp_path / "Фото 🐕 of 'dogs' \"#1\" {x} %s"
    for name in ("sub dir", ".ipynb_checkpoints", ".cache"):
        (folder / name).mkdir(parents=True)
    picture = tiny.photo(1, (80, 96))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "с пробелом & #.JPG", exif=exif)
    picture.convert("CMYK").save(folder / "print.jpeg")
    Image.fromarray(np.arange(80 * 96, dtype=np.uint16).reshape(96, 80) * 8).save(folder / "sixteen bit.png")
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((80, 96)))
    clear.save(folder / "clear;rm -rf.webp")
    picture.save(folder / "moving.gif", save_all=True, append_images=[tiny.photo(2, (80, 96))])
    picture.quantize(16).save(folder / "CON.png", transparency=3)  # a name that Windows reserves
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    picture.resize((400, 40)).save(folder / ("long" * 50 + ".png"))
    tiny.photo(3).save(folder / "sub dir" / "ünï 🐕.png")
    Image.new("L", (80, 96), 255).save(folder / "sub dir" / "ünï 🐕.mask.png")
    for name in (".DS_Store", "Thumbs.db", "notes.pdf", ".ipynb_checkpoints/print.jpeg", ".cache/x.png"):
        (folder / name).write_bytes(b"\0not a picture")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "again.png").symlink_to(folder / "dot.png")
    (folder / "print.txt").write_text(
        "\ufeffone of {identifier}\r\n\r\nanother of {identifier} 🐕\r\n", encoding="utf-8"
    )
    row = {"file_name": "с пробелом & #.JPG", "text": ["several", "captions"]}
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\r\n")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_of_anything_trains_and_stays_as_it_was(
    script, anything, class_photos, tmp_path, request, monkeypatch
):
    model = request.getfixturevalue("sdxl" if "sdxl" in script else "sd1")
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "Résultat 🐕 #2"
    given = ["--pretrained_model_name_or_path", str(model), "--output_dir", f"~/{out.name}", "--report_to=none"]
    given += ["--masked_loss", "--random_flip", "--max_train_steps=3", "--train_batch_size=4", "--seed=1"]
    given += ["--validation_prompt", WORDS.format(identifier="sks", **{"class": "dog"}), "--validation_prompt", ""]
    given += ["--num_validation_images=1", "--validation_num_inference_steps=2"]
    if "booth" in script:
        given += ["--instance_data_dir", f"~/{anything.name}", "--instance_prompt", WORDS, "--identifier=sks"]
        given += ["--class_noun=dog", "--with_prior_preservation", "--class_prompt", "a {class} 🐕\n"]
        given += ["--class_data_dir", str(class_photos), "--num_class_images=2"]
    else:
        for path in anything.rglob("*"):
            if path.suffix.lower() in (".jpg", ".png", ".gif", ".webp", ".jpeg") and ".mask" not in path.name:
                beside = path.with_suffix(".txt")
                if len(beside.name.encode()) < 250 and path.is_file() and not path.parent.name.startswith("."):
                    beside.write_text("words 🐕", encoding="utf-8")
        given += ["--train_data_dir", f"~/{anything.name}"]
    before = {folder: tree(folder) for folder in (anything, class_photos, model)}
    program = importlib.import_module(script)
    program.main(program.parse_args(given))
    for folder, was in before.items():
        assert tree(folder) == was
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert len(list(out.glob("samples/step-*/*.png"))) >= 2 and (out / "report.html").is_file()
