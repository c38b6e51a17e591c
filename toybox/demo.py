"""`make demo`: teach the embedded model one dog from five photos, draw that dog elsewhere, let the judge compare.

    python -m toybox.demo

Runs the real scripts with the options that a user of Stable Diffusion would type, and prints each command. Everything
lands in runs/demo; a second call trains nothing unless the command, the photos or the model changed. After Ctrl-C
the same command resumes the training.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("runs/demo")  # relative to ROOT, so that the commands printed can be typed
PHOTOS = Path("toybox/subject")
SCENES = {"beach": "on a beach", "forest": "in a forest", "desert": "in the desert", "night": "at night"}

TRAIN = f"""
train_dreambooth_lora.py
    --pretrained_model_name_or_path toybox
    --instance_data_dir {PHOTOS} --instance_prompt "a photo of sks dog"
    --with_prior_preservation --class_data_dir {OUTPUT}/class --class_prompt "a photo of a dog" --num_class_images 64
    --center_crop --train_batch_size 4 --learning_rate 1e-3 --max_train_steps 250 --seed 0
    --validation_prompt "a photo of sks dog on a beach" --validation_steps 50 --checkpointing_steps 100
    --output_dir {OUTPUT}/lora --resume_from_checkpoint latest
"""
DRAW = (
    "infer.py\n"
    + "".join(f'    --prompt "a photo of sks dog {scene}"\n' for scene in SCENES.values())
    + "    --identifier sks --also_without_identifier --num_images 4 --guidance_scale 5\n"
)
BEFORE = DRAW + f"    --pretrained_model_name_or_path toybox --output_dir {OUTPUT}/before"
AFTER = DRAW + f"    --lora {OUTPUT}/lora --output_dir {OUTPUT}/after"


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m toybox.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    os.chdir(ROOT)
    started = time.monotonic()
    if already_trained():
        say("Trained already (`make clean` forgets it). The command was:", typed(TRAIN))
    else:
        say("1. Training: five photos, a rare word, small adapters", typed(TRAIN))
        run(TRAIN)
        say(f"   took {time.monotonic() - started:.0f} s")

    for name in ("before", "after"):  # or what another machine drew would stand beside it
        shutil.rmtree(OUTPUT / name, ignore_errors=True)
    say("2. Drawing the dog in places where it was never photographed", typed(AFTER))
    run(AFTER, quiet=True)
    say("   and, to compare, the same prompts and seeds without what was learned")
    run(BEFORE, quiet=True)

    from toybox.judge import load_photos

    photos = load_photos(PHOTOS)
    pictures = {name: drawn(OUTPUT / name) for name in ("before", "after")}
    sheet(photos, OUTPUT / "photos.png", columns=len(photos))
    subject = [picture for scene in SCENES for picture in pictures["after"]["sks dog", scene]]
    sheet(subject, OUTPUT / "drawn.png", columns=8)
    scores = {name: judge(pictures[name], photos) for name in pictures}
    (OUTPUT / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    say("3. The judge's scores", table(scores))
    say(
        f"Photos    {OUTPUT}/photos.png",
        f"Drawn     {OUTPUT}/drawn.png, all in {OUTPUT}/after/grid.png (before: {OUTPUT}/before/grid.png)",
        f"Report    {ROOT / OUTPUT}/lora/report.html",
        f"Weights   {OUTPUT}/lora/pytorch_lora_weights.safetensors",
    )


def already_trained() -> bool:
    """True if exactly this was trained to its end. What an interrupted run of the same command saved is kept."""
    digest = hashlib.sha256(TRAIN.encode())
    for file in sorted([*PHOTOS.iterdir(), *Path("toybox/sd").rglob("*.safetensors")]):
        digest.update(file.name.encode() + file.read_bytes())
    key = OUTPUT / "key"
    if not key.is_file() or key.read_text() != digest.hexdigest():
        shutil.rmtree(OUTPUT, ignore_errors=True)
        OUTPUT.mkdir(parents=True)
        key.write_text(digest.hexdigest())
    return (OUTPUT / "lora" / "report.html").is_file() and (OUTPUT / "lora/pytorch_lora_weights.safetensors").is_file()


def run(command: str, quiet: bool = False) -> None:
    """Ctrl-C reaches the script too, which saves; subprocess.run would kill it after a quarter of a second."""
    words = [sys.executable, *shlex.split(command)]
    before = signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the script would inherit
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE if quiet else None, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    if done.returncode:
        print(done.stdout or "", end="", file=sys.stderr)
        sys.exit(done.returncode)


def say(*lines: str) -> None:
    print("", *lines, sep="\n", flush=True)


def typed(command: str) -> str:
    """The command as a person types it."""
    return "python " + " \\\n".join(command.strip().splitlines())


def drawn(folder: Path) -> dict[tuple[str, str], list]:
    """(who, scene) => what infer.py drew for that prompt; the prompt stands inside each PNG."""
    from PIL import Image

    found = {f"a photo of {who} {SCENES[scene]}": (who, scene) for who in ("sks dog", "dog") for scene in SCENES}
    pictures = {pair: [] for pair in found.values()}
    for file in sorted(folder.glob("*-seed*.png")):
        with Image.open(file) as picture:
            prompt = json.loads(picture.text["settings"])["prompt"]
            if prompt in found:
                pictures[found[prompt]].append(picture.convert("RGB"))
    return pictures


def sheet(pictures: list, file: Path, columns: int) -> None:
    """Pictures of 64 pixels, large enough to be looked at."""
    from toybox.draw import grid

    grid([picture.resize((128, 128)) for picture in pictures], columns=columns, gap=4).save(file)


def judge(pictures: dict[tuple[str, str], list], photos: list) -> dict[str, float]:
    """Means over all scenes: of the subject, and of its class."""
    from toybox.judge import Judge, memorised

    judge = Judge.load()
    subject = [picture for scene in SCENES for picture in pictures["sks dog", scene]]
    others = [picture for scene in SCENES for picture in pictures["dog", scene]]
    right = [judge.agreement(pictures["sks dog", scene], thing="dog", scene=scene)["all"] for scene in SCENES]
    return {
        "likeness": judge.likeness(subject, photos).mean().item(),
        "agreement": sum(right) / len(right),
        "memorised": memorised(subject, photos).mean().item(),
        "diversity": judge.diversity(others),
        "class": judge.agreement(others, thing="dog")["all"],
    }


def table(scores: dict) -> str:
    meaning = {
        "likeness": '"sks dog" is the dog of the photos (1: the same one)',
        "agreement": "and stands, as a dog, in the scene asked for (share)",
        "memorised": "but is not one of the photos again (1: a copy)",
        "diversity": '"dog" stays any dog (0: always the same one)',
        "class": "and a dog at all (share)",
    }
    lines = [f"{'':58}{'before':>8}{'after':>8}"]
    lines += [f"{text:58}{scores['before'][name]:8.2f}{scores['after'][name]:8.2f}" for name, text in meaning.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
