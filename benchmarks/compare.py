"""Our script and another one, in turn, on the same model, photos, options and seed.

    python benchmarks/compare.py --other path/to/their/train_dreambooth_lora.py --method lora --profiles startup tiny

Each round runs both, in alternating order, as whole processes: wall and CPU time, peak memory, time to the first
step, median step. Only ratios from one such call mean something: machines are shared, and their speed wanders.
Without --other our script is measured alone.
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import results

# One thread: two on shared cores run slower, and disturb each other. No run looks for the hub.
for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"full": "train_dreambooth.py", "lora": "train_dreambooth_lora.py"}
MEASURES = {  # key: (heading, digits)
    "wall_s": ("wall s", 2),
    "cpu_s": ("CPU s", 2),
    "peak_mb": ("peak MB", 0),
    "first_step_s": ("first step s", 2),
    "step_wall_s": ("step wall s", 4),
    "step_cpu_s": ("step CPU s", 4),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="the script to compare with")
    parser.add_argument("--ours", type=Path, help="our script (by --method)")
    parser.add_argument("--method", nargs="+", choices=list(SCRIPTS), default=["lora"])
    parser.add_argument("--profiles", nargs="+", choices=["startup", "tiny", "job", "mid"], default=["startup", "tiny"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="training steps (tiny 60, mid 12, job 100)")
    parser.add_argument("--ours_options", default="", help="more options for ours, in one string")
    parser.add_argument("--other_options", default="", help="more options for the other script, in one string")
    args = parser.parse_args(argv)
    if args.other and not args.other.is_file():
        parser.error(f"--other {args.other} is no file")
    if args.other and len(args.method) > 1:
        parser.error("--other is one script: give its one --method")
    return args


def main(args):
    for method in args.method:
        scripts = {"ours": args.ours or ROOT / SCRIPTS[method]}
        if args.other:
            scripts["other"] = args.other
        more = {"ours": shlex.split(args.ours_options), "other": shlex.split(args.other_options)}
        for profile in args.profiles:
            compare(scripts, more, method, profile, args.rounds, args.steps)


def compare(scripts: dict, more: dict, method: str, profile: str, rounds: int, steps: int | None) -> None:
    data = {
        "profile": profile,
        "method": method,
        "rounds": rounds,
        "circumstances": results.circumstances(),
        "scripts": {who: script.name for who, script in scripts.items()},
        "more_options": more,
        "cases": {},
    }
    for case, options in cases(profile, method, steps).items():
        runs = {who: [] for who in scripts}
        for number in range(rounds):
            turn = list(scripts) if number % 2 == 0 else list(scripts)[::-1]  # neither always meets the warmer machine
            for who in turn:
                found = measure(scripts[who], [*options, *more[who]], trains=profile != "startup")
                runs[who].append(found)
                took = f"{found['wall_s']:.1f} s wall, exit code {found['exit_code']}"
                print(f"{profile} {case} {who} round {number + 1}: {took}", flush=True)
        data["cases"][case] = summarise(runs)
    results.write(f"compare-{profile}-{method}", f"{profile}, {method}: ours and another script", page(data), data)


def cases(profile: str, method: str, steps: int | None) -> dict:
    """What is run: {name: options}. Only options that the field's reference scripts know as well."""
    if profile == "startup":
        needed = ["--pretrained_model_name_or_path", "nowhere", "--instance_prompt", "a photo of sks dog"]
        return {
            "--help": ["--help"],
            "a typo": [*needed, "--instance_data_dir", "nowhere", "--learning_rat", "1e-4"],
            "a missing folder": [*needed, "--instance_data_dir", "nowhere"],
        }
    size = "mid" if profile == "mid" else "tiny"
    # In a process of its own: a child's peak memory starts from its parent's.
    subprocess.run([sys.executable, Path(__file__).with_name("models.py"), size, results.WORK], check=True)
    resolution = {"tiny": 64, "mid": 256}[size]
    steps = steps or {"tiny": 60, "mid": 12, "job": 100}[profile]
    options = {
        "pretrained_model_name_or_path": results.WORK / size,
        "instance_data_dir": results.WORK / "photos",
        "instance_prompt": "a photo of sks dog",
        "resolution": resolution,
        "train_batch_size": 1,
        "learning_rate": 1e-4 if method == "lora" else 5e-6,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": steps,
        "seed": 0,
    }
    flags = []
    if profile == "job":  # five validations on the way, twenty class images before
        every = {"validation_epochs": steps // 25} if method == "lora" else {"validation_steps": steps // 5}
        options |= {"validation_prompt": "a photo of sks dog in a bucket", "num_validation_images": 2} | every
        options |= {"class_data_dir": "FRESH/class", "class_prompt": "a photo of dog", "num_class_images": 20}
        flags = ["--with_prior_preservation"]
    options = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return {f"{steps} steps": [*options, *flags]}


def measure(script: Path, options: list, trains: bool) -> dict:
    """One whole process. Its own memory and CPU time, with those of the children it waited for."""
    fresh = results.WORK / "run"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    command = [sys.executable, str(script.resolve()), *(text.replace("FRESH", str(fresh)) for text in options)]
    if trains:
        command[1:1] = [str(Path(__file__).with_name("probe.py").resolve()), str(fresh / "steps.json")]
        command += ["--output_dir", str(fresh / "out"), "--logging_dir", str(fresh / "logs")]
    log = results.WORK / "last-run.log"
    with log.open("w") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=fresh, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.monotonic()
    process.returncode = os.waitstatus_to_exitcode(status)
    found = {
        "exit_code": process.returncode,
        "wall_s": ended - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10),
    }
    if trains:
        if process.returncode:
            raise SystemExit(f"{script} failed with {process.returncode}; its last words:\n" + log.read_text()[-2000:])
        steps = json.loads((fresh / "steps.json").read_text())
        pairs = list(itertools.pairwise(steps))[len(steps) // 5 :]  # the first fifth warms up
        found["steps"] = len(steps)
        found["first_step_s"] = steps[0][0] - began
        found["step_wall_s"] = statistics.median(after[0] - before[0] for before, after in pairs)
        found["step_cpu_s"] = statistics.median(after[1] - before[1] for before, after in pairs)
    return found


def summarise(runs: dict) -> dict:
    case = {"runs": runs, "measures": {}}
    for measure_name in MEASURES:
        if measure_name not in runs["ours"][0]:
            continue
        values = {who: [run[measure_name] for run in found] for who, found in runs.items()}
        entry = {who: results.spread(found) for who, found in values.items()}
        if "other" in values:  # of the two runs of one round, which met the same machine
            entry["ratio"] = results.spread([ours / other for ours, other in zip(values["ours"], values["other"])])
        case["measures"][measure_name] = entry
    return case


def page(data: dict) -> str:
    both = "other" in data["scripts"]
    rows = []
    for case, found in data["cases"].items():
        for name, entry in found["measures"].items():
            heading, digits = MEASURES[name]
            row = [case, heading, results.show(entry["ours"], digits)]
            rows.append(row + ([results.show(entry["other"], digits), results.show(entry["ratio"], 3)] if both else []))
    columns = ["case", "measure", "ours", *(["other", "ours / other"] if both else [])]
    return f"min / median / max of {data['rounds']} rounds, each script in turn.\n\n" + results.table(columns, rows)


if __name__ == "__main__":
    main(parse_args())
