"""Kills a training run again and again and asks whether it ends with the same weights, bit for bit.

    python benchmarks/soak.py --kills 24 --mid_save 8
    python benchmarks/soak.py --script train_dreambooth_lora_sdxl --model tiny-sdxl --kills 17

A real script trains a toy pipeline, checkpointing after every step, and gets SIGKILL: while a checkpoint is being
written (the staging folder is there when the process is gone), after a random number of steps, while it starts, or
while the result is being replaced.
After each kill every checkpoint must be whole; the same command goes on from the newest. At the end every tensor of
the result and of the last checkpoint must equal those of a run that nobody killed. The negative control does the same
with a checkpoint whose optimizer has forgotten its past: a comparison that could not tell would prove nothing.
"""

import argparse
import hashlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import results  # noqa: E402

from utils import saved  # noqa: E402
from utils.checkpoints import manifests  # noqa: E402

STAGED = re.compile(r"\.tmp-checkpoint-\d+-[0-9a-f]{8}")  # being written; other names: being replaced or deleted
MOST_STEPS = 6  # between two kills
SPARE_STEPS = 6  # for every life: on a busy machine the kill comes late
RESULTS = 2  # kills while the result is being replaced, tried so often at most
PATIENCE = 600  # seconds for any one thing to happen
# Everything that has a state of its own, or a random draw.
OPTIONS = (
    "--instance_prompt 'a photo of sks dog' --report_to none --seed 3 --train_batch_size 1"
    " --gradient_accumulation_steps 2 --train_text_encoder --use_ema --lr_scheduler cosine --lr_warmup_steps 5"
    " --learning_rate 1e-3 --noise_offset 0.1 --random_flip --caption_dropout 0.2"
    " --with_prior_preservation --class_prompt 'a dog' --num_class_images 4"
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="train_dreambooth_lora", help="a training script's name without .py")
    parser.add_argument("--model", default="tiny", choices=("tiny", "tiny-sdxl"))
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--mid_save", type=int, default=8, help="how many of them while a checkpoint is written")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--options", default="", help="more options for the script, in one string")
    return parser.parse_args(argv)


def main(args):
    import models

    circumstances, began = results.circumstances(), time.monotonic()
    options = ["--pretrained_model_name_or_path", str(models.build(args.model, results.WORK))]
    options += ["--instance_data_dir", str(models.photos(results.WORK / "photos"))]
    options += ["--class_data_dir", str(models.photos(results.WORK / "class", 4))]
    options += shlex.split(f"{OPTIONS} {args.options}")
    folder = results.WORK / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    told = soak(args.script, options, folder, args.kills, args.mid_save, args.seed, say=print)
    told = {
        "circumstances": circumstances,
        "seconds": round(time.monotonic() - began),
        "options": f"{OPTIONS} {args.options}",
        **told,
    }
    where = [[place, sum(kill["where"] == place for kill in told["kills"])] for place in PLACES]
    more = f" --options '{args.options}'" if args.options else ""
    text = (
        f"`python benchmarks/soak.py --script {args.script} --model {args.model} --kills {args.kills} --mid_save"
        f" {args.mid_save} --seed {args.seed}{more}`:"
        f" {len(told['kills'])} kills on the way to step {told['steps']}, {told['seconds']} s in all.\n\n"
        + results.table(["SIGKILL came", "times"], where)
        + "\n\n"
        + results.table(
            ["", "tensors compared", "differ"],
            [[name, told[name]["tensors"], told[name]["differ"]] for name in ("killed", "control")],
        )
        + f"\n\nDamaged checkpoints found after a kill: {told['damaged']}. The control resumed with an optimizer that"
        " had forgotten its past, so its weights must differ."
    )
    results.write(f"soak-{args.script}", f"Killed and resumed: {args.script}.py", text, told)
    return 0 if passed(told) else 1


PLACES = (
    "in mid-save",
    "while an old checkpoint was deleted",
    "between saves",
    "before the first step",
    "while the result was replaced",
)


def passed(told: dict) -> bool:
    return told["killed"]["differ"] == 0 and told["damaged"] == 0 and told["control"]["differ"] > 0


def soak(script, options, folder: Path, kills: int, mid_save: int, seed: int, run=None, say=lambda line: None) -> dict:
    """Everything `main` does, without the table. `run(words)`: how the runs that nobody kills are run."""
    total = (MOST_STEPS + SPARE_STEPS) * kills + 20
    command = [sys.executable, str(HERE.parent / f"{script}.py"), *options, "--max_train_steps", str(total)]
    run = run or (lambda words: subprocess.run([*command[:2], *words], check=True, stdout=subprocess.DEVNULL))
    straight, killed, control = folder / "straight", folder / "killed", folder / "control"
    # It checkpoints at another pace: when checkpoints are written must not matter either.
    often = ["--checkpointing_steps", str(total // 2), "--output_dir"]
    run([*command[2:], *often, str(straight)])

    command += ["--checkpointing_steps", "1", "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest"]
    command += ["--output_dir", str(killed)]
    aims = ["save"] * mid_save + ["start"] * (kills // 8) + ["step"] * (kills - mid_save - kills // 8)
    rng = random.Random(seed)
    rng.shuffle(aims)
    log, damaged = [], 0
    with open(folder / "killed.log", "w", encoding="utf-8") as output:
        while any(aim == "save" for aim in aims) or len(log) < kills:  # one that missed its aim is tried again
            aim = aims.pop() if aims else "step"
            kill = one_life(command, killed, aim, rng, output)
            if aim == "save" and kill["where"] != PLACES[0]:
                aims.insert(0, "save")
            faults = [fault for _, path in manifests.listed(killed) if (fault := manifests.fault(path, "full"))]
            damaged += len(faults)
            log.append(kill)
            say(f"kill {len(log)}: {kill['where']}, newest checkpoint {kill['step']} of {total}")
        for _ in range(RESULTS):
            log.append(one_life(command, killed, "result", rng, output))
            say(f"kill {len(log)}: {log[-1]['where']}")
        subprocess.run(command, check=True, stdout=output, stderr=output)

    # Negative control: half way, the optimizer forgets.
    forgetful = shutil.copytree(straight / f"checkpoint-{total // 2}", folder / f"checkpoint-{total // 2}")
    forget(forgetful)
    run([*command[2 : 2 + len(options) + 2], *often, str(control), "--resume_from_checkpoint", str(forgetful)])
    return {
        "script": script,
        "steps": total,
        "kills": log,
        "damaged": damaged,
        "killed": compare(straight, killed, total),
        "control": compare(straight, control, total),
    }


def one_life(command: list, folder: Path, aim: str, rng: random.Random, output) -> dict:
    """Starts the run and kills it: while it starts, after some steps, or as soon as it writes a checkpoint then."""
    first, earlier = newest(folder), hidden(folder)  # what the kill before left lies there until the run resumes
    began, chance = time.monotonic(), rng.random()
    target = first + rng.randint(1, MOST_STEPS)
    process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        if aim == "start":
            wait(process, lambda: time.monotonic() - began > 5 * chance)
        elif aim == "result":
            wait(process, lambda: any(name.startswith(saved.STAGED) for name in hidden(folder) - earlier))
            time.sleep(0.03 * chance)
        else:
            wait(process, lambda: newest(folder) >= target)
        if aim == "save":
            wait(process, lambda: any(map(STAGED.fullmatch, hidden(folder) - earlier)))
        elif aim == "step":
            time.sleep(0.1 * chance)
    finally:
        process.kill()
    code = process.wait(PATIENCE)
    if code != -signal.SIGKILL and not (aim == "result" and code == 0):
        raise SystemExit(f"the run ended by itself with {code} before it could be killed, see {output.name}")
    left = hidden(folder) - earlier
    where = PLACES[3] if newest(folder) == first else PLACES[2]
    if aim == "result":
        where = PLACES[4] if any(name.startswith(saved.STAGED) for name in left) else PLACES[2]
    elif left:
        where = PLACES[0] if any(map(STAGED.fullmatch, left)) else PLACES[1]
    return {"where": where, "step": newest(folder), "seconds": round(time.monotonic() - began, 1)}


def wait(process, happened) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            return
        time.sleep(0.0005)


def newest(folder: Path) -> int:
    return max((step for step, _ in manifests.listed(folder)), default=0)


def hidden(folder: Path) -> set[str]:
    """What is being written, replaced or deleted: it must never be taken for a checkpoint."""
    return {name for name in os.listdir(folder) if name.startswith(".tmp-")} if folder.is_dir() else set()


def forget(checkpoint: Path) -> None:
    """The checkpoint stays valid by its manifest; the optimizer's moments are zero."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = checkpoint / "optimizer.safetensors"
    with safe_open(str(path), framework="pt") as file:
        told = file.metadata()
    # Only floats of some size: step counts and tables stay.
    state = {name: value.zero_() if value.numel() > 1 else value for name, value in load_file(path).items()}
    save_file(state, path, metadata=told)
    manifest = manifests.read(checkpoint)
    (checkpoint / manifests.MANIFEST).unlink()
    manifests.write(checkpoint, manifest["step"], manifest["identity"])


def tensors(folder: Path, step: int) -> dict[str, str]:
    """Digest of every tensor of the result and of the last checkpoint, optimizer and averages included."""
    import torch
    from safetensors.torch import load_file

    files = [
        file
        for part in (".", "unet", "text_encoder", "text_encoder_2")
        for file in folder.glob(f"{part}/*.safetensors")
    ]
    files += (folder / f"checkpoint-{step}").rglob("*.safetensors")
    found = {}
    for file in sorted(files):
        for name, value in load_file(file).items():
            content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[f"{file.relative_to(folder)}: {name}"] = hashlib.sha256(content).hexdigest()
    return found


def compare(one: Path, other: Path, step: int) -> dict:
    left, right = tensors(one, step), tensors(other, step)
    differ = [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
    return {"tensors": len(left), "differ": len(differ), "first": differ[:3]}


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))
