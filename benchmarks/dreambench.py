"""Methods against each other over many subjects: trains, draws, scores, and makes one table of it.

    python benchmarks/dreambench.py benchmarks/dreambench_toybox.yaml --output_dir runs/dreambench
    python benchmarks/dreambench.py benchmarks/dreambench.yaml --output_dir /shared/bench --gpus 0 1 2 3
    python benchmarks/dreambench.py ... --num_shards 90 --shard_index "$SLURM_ARRAY_TASK_ID"    # any scheduler's array

A run is one subject, method and seed. The same command again does what is missing: a finished run is skipped, one that
was interrupted goes on from its newest checkpoint. The YAML file (see dreambench_toybox.yaml) names subjects, prompts
and methods; a method is a command of this repository without what every run is given.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from utils import errors, images, scores  # noqa: E402
from utils.preflight import FINISHED  # noqa: E402
from utils.runtime.startup import FolderLock  # noqa: E402

KEYS = {
    "model": (str, None),
    "photos": (str, None),  # a folder with one of photos for each subject
    "subjects": (list, None),  # {name, class, kind}
    "prompts": (dict, None),  # kind of subject => prompts
    "methods": (dict, None),  # name => script and options
    "identifier": (str, "sks"),
    "instance_prompt": (str, "a photo of {identifier} {class}"),
    "class_prompt": (str, "a photo of a {class}"),
    "class_images": (str, ""),  # folder for a method's {class_images}; by default the run's own
    "seeds": (list, [0]),  # of training
    "images": (int, 4),  # of each prompt
    "draw": (str, ""),  # more options for infer.py
    "scores": (list, ["clip", "dino"]),
    "clip_model_name_or_path": (str, "openai/clip-vit-base-patch32"),
    "dino_model_name_or_path": (str, "facebook/dino-vits16"),
}
DONE, ASKED, TRAINED = "result.json", "asked.json", "train"


@dataclass(frozen=True)
class Run:
    subject: str
    method: str
    seed: int
    folder: Path
    train: list[str]  # a script and its options
    draw: list[str]
    asked: dict  # what it comes from: one begun for something else is no part of this table

    @property
    def name(self) -> str:
        return f"{self.subject} / {self.method} / {self.seed}"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="YAML file of subjects, prompts and methods")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--gpus", nargs="+", default=[], help="numbers of GPUs that share the runs, one run each")
    parser.add_argument("--workers", type=int, default=1, help="runs at once where no --gpus are named")
    parser.add_argument("--num_shards", type=int, default=1, help="how many of these commands share the runs")
    parser.add_argument("--shard_index", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--methods", nargs="+", default=[], help="only these")
    parser.add_argument("--subjects", nargs="+", default=[], help="only these")
    parser.add_argument("--table", action="store_true", help="only make the table of what is finished")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least 1")
    if not 0 <= args.shard_index < args.num_shards:
        parser.error(f"--shard_index {args.shard_index} of --num_shards {args.num_shards}: it counts from 0")
    return args


# Settings


def read(file: Path) -> dict:
    """The settings with their defaults; every complaint about them at once."""
    import yaml

    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as problem:
        errors.refuse(f"{file} cannot be read: {problem}")
    if not isinstance(told, dict):
        errors.refuse(f"{file} must hold the keys {', '.join(KEYS)}")
    wrong = [f"'{key}' is no key; known are {', '.join(KEYS)}" for key in told if key not in KEYS]
    settings = {key: told.get(key, default) for key, (_, default) in KEYS.items()}
    for key, (kind, _) in KEYS.items():
        if not isinstance(settings[key], kind) or (key in told and not settings[key]):
            wrong.append(f"{key} is {settings[key]!r}: a {kind.__name__} that is not empty is needed")
    if not wrong:
        wrong += _parts(settings) or _subjects(settings)
    if wrong:
        errors.refuse([f"{file}: {complaint}" for complaint in wrong])
    return settings


def _parts(settings: dict) -> list[str]:
    wrong = [
        f"prompts of {kind}: a list of texts is needed"
        for kind, prompts in settings["prompts"].items()
        if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) and one for one in prompts)
    ]
    wrong += [
        f"method {name!r} must be a script and its options under a name without /"
        for name, command in settings["methods"].items()
        if not _plain(name) or not isinstance(command, str) or not command.split()
    ]
    seeds = settings["seeds"]
    if any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        wrong.append(f"seeds are {seeds}: different whole numbers are needed")
    if settings["images"] < 1:
        wrong.append(f"images is {settings['images']}: at least 1")
    return wrong + [
        f"scores: {one!r} is none of {', '.join(scores.NAMES)}" for one in settings["scores"] if one not in scores.NAMES
    ]


def _plain(name) -> bool:
    """The name of one folder inside another."""
    return isinstance(name, str) and Path(name).name == name and not name.startswith(".")


def _subjects(settings: dict) -> list[str]:
    wrong, names = [], set()
    for number, subject in enumerate(settings["subjects"], start=1):
        if not isinstance(subject, dict) or set(subject) != {"name", "class", "kind"}:
            wrong.append(f"subject {number} must have name, class and kind, and is {subject!r}")
            continue
        if not all(isinstance(value, str) and value for value in subject.values()) or not _plain(subject["name"]):
            wrong.append(f"subject {number}: name, class and kind must be texts, the name without /: {subject!r}")
            continue
        photos = Path(settings["photos"], subject["name"])
        if subject["kind"] not in settings["prompts"]:
            wrong.append(f"{subject['name']} is of kind {subject['kind']}, for which there are no prompts")
        if not photos.is_dir() or not images.list_images(photos):
            wrong.append(f"{subject['name']}: no photos in '{photos}'")
        if subject["name"] in names:
            wrong.append(f"{subject['name']} is named twice")
        names.add(subject["name"])
    return wrong


def runs_of(settings: dict, output_dir: Path) -> list[Run]:
    """Seeds outermost, so that a table of all subjects and methods is there early."""
    return [
        _run(settings, subject, method, seed, output_dir / "runs" / subject["name"] / method / str(seed))
        for seed in settings["seeds"]
        for subject in settings["subjects"]
        for method in settings["methods"]
    ]


def _run(settings: dict, subject: dict, method: str, seed: int, folder: Path) -> Run:
    def fill(text: str, **more) -> str:
        words = {"identifier": settings["identifier"], "class": subject["class"], "name": subject["name"], **more}
        for word, value in words.items():
            text = text.replace(f"{{{word}}}", str(value))
        return text

    where = folder / TRAINED
    own = {"seed": seed, "class_images": fill(settings["class_images"]) or folder / "class_images"}
    script, *options = [fill(word, **own) for word in shlex.split(settings["methods"][method])]
    train = [script, "--pretrained_model_name_or_path", settings["model"]]
    train += ["--instance_data_dir", str(Path(settings["photos"], subject["name"])), "--seed", str(seed)]
    train += ["--instance_prompt", fill(settings["instance_prompt"]), "--output_dir", str(where), *options]
    # The class prompt as well: whether everything of the class has become the subject (*_pres).
    prompts = [fill(text) for text in (*settings["prompts"][subject["kind"]], settings["class_prompt"])]
    draw = ["infer.py", *(word for prompt in prompts for word in ("--prompt", prompt))]
    draw += ["--num_images", str(settings["images"]), "--grid", "no", *shlex.split(settings["draw"])]
    judged = {key: settings[key] for key in ("scores", "clip_model_name_or_path", "dino_model_name_or_path")}
    asked = {"train": train, "draw": draw, "photos": _content(settings["photos"], subject["name"]), **judged}
    # Not where it is done: the folder may move.
    asked = json.loads(json.dumps(asked).replace(json.dumps(str(folder))[1:-1], "."))
    return Run(subject["name"], method, seed, folder, train, draw, asked)


@functools.cache
def _content(photos: str, subject: str) -> str:
    found = hashlib.blake2b(digest_size=8)
    for path in images.list_images(Path(photos, subject)):
        found.update(hashlib.blake2b(path.read_bytes()).digest())
    return found.hexdigest()


def check(runs: list[Run]) -> None:
    """Every method's options once, through the scripts' own parsers; and that what is there is of these settings."""
    for method in dict.fromkeys(run.method for run in runs):
        run = next(run for run in runs if run.method == method)
        if not re.fullmatch(r"train_\w+\.py", run.train[0]) or not (ROOT / run.train[0]).is_file():
            errors.refuse(f"method {method}: {run.train[0]} is no training script of this repository")
        importlib.import_module(Path(run.train[0]).stem).parse_args(run.train[1:])
        importlib.import_module("infer").parse_args(run.draw[1:])
    stale = [run for run in runs if (run.folder / ASKED).is_file() and _read(run.folder / ASKED) != run.asked]
    if stale:
        errors.refuse(
            f"{len(stale)} runs were begun with other settings or photos, e.g. {stale[0].name}: name another"
            f" --output_dir, or remove their folders ('{stale[0].folder}')"
        )


def _read(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def result(run: Run) -> dict | None:
    return _read(run.folder / DONE)


# Work


class Pool:
    """Runs side by side; a signal is passed on to what trains, which saves, and ends the pool."""

    def __init__(self, judges: scores.Scores, photos: dict[str, list], say=print):
        self.judges, self.photos, self.say = judges, photos, say
        self.children: set[subprocess.Popen] = set()
        self.scoring, self.code = threading.Lock(), 0

    def work(self, runs: list[Run], places: list[dict]) -> list[str]:
        """places: for each run at once, what its processes find in the environment. => the runs that failed."""
        free, failed = queue.SimpleQueue(), []
        for place in places:
            free.put(place)

        def one(run: Run) -> None:
            place = free.get()
            try:
                if not self.code and not self._do(run, os.environ | place):
                    failed.append(run.name)
            except Exception as problem:  # the others go on
                self.say(f"{run.name}: {type(problem).__name__}: {problem}")
                failed.append(run.name)
            finally:
                free.put(place)

        with self._listening(), concurrent.futures.ThreadPoolExecutor(len(places)) as threads:
            for done in concurrent.futures.as_completed([threads.submit(one, run) for run in runs]):
                done.result()
        return failed

    @contextlib.contextmanager
    def _listening(self):
        def stop(number, frame):
            self.code = 128 + number
            for child in list(self.children):
                child.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _do(self, run: Run, environment: dict) -> bool:
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(run.folder)
        if owner := lock.take():
            self.say(f"{run.name}: left to {owner}")
            return True
        try:
            if result(run):  # finished by another meanwhile
                return True
            trained = run.folder / TRAINED
            if owner := _holds(trained):  # its pool was killed, it was not
                self.say(f"{run.name}: {owner} is still training it")
                return True
            _write(run.folder / ASKED, json.dumps(run.asked, indent=1))
            missing = not any((trained / name).is_file() for name in FINISHED)
            if missing and not self._call([*run.train, "--resume_from_checkpoint", "latest"], run, environment):
                return False
            base = "--lora" if (trained / FINISHED[1]).is_file() else "--pretrained_model_name_or_path"
            drawn = run.folder / "images"
            shutil.rmtree(drawn, ignore_errors=True)  # what an earlier attempt left
            if not self._call([*run.draw, base, str(trained), "--output_dir", str(drawn)], run, environment):
                return False
            with self.scoring:  # the networks that score are loaded once
                told = self._judge(run, drawn)
            told = {"scores": told, **_cost(trained)}
            _write(run.folder / DONE, json.dumps(told, indent=1))
            self.say(f"{run.name}: {', '.join(f'{name} {value:.3f}' for name, value in told['scores'].items())}")
            return True
        finally:
            lock.release()

    def _call(self, words: list[str], run: Run, environment: dict) -> bool:
        with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
            # A process group of its own: Ctrl-C reaches it once, through the pool.
            child = subprocess.Popen(
                [sys.executable, str(ROOT / words[0]), *words[1:]],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            self.children.add(child)
            if self.code:  # it came between the last look and the start
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            self.children.discard(child)
        if code and not self.code:
            self.say(f"{run.name}: {words[0]} ended with {code}; see {log.name}")
        return code == 0 and not self.code

    def _judge(self, run: Run, drawn: Path) -> dict[str, float]:
        from PIL import Image

        from utils.report import gallery

        pictures, prompts = [], []
        for file in sorted(drawn.glob("*.png")):
            with Image.open(file) as picture:
                prompts.append(gallery.png_settings(picture)["prompt"])
                pictures.append(picture.convert("RGB"))
        identifier = frozenset(scores.words(self.photos["identifier"]))
        subject = scores.Subject(identifier, photos=self.photos[run.subject])
        judges = scores.Scores(self.judges.judges, [subject])
        return {name: round(value, 4) for name, value in judges.measure(pictures, prompts).items()}


def _holds(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    lock = FolderLock(folder)
    owner = lock.take()
    lock.release()
    return owner


def _cost(folder: Path) -> dict[str, float]:
    """Of all sessions of a run: seconds from start to end, and the most memory."""
    sessions = (_read(folder / "timings.json") or {}).get("sessions")
    if not sessions:  # killed between its weights and its times
        return {}
    peak = max(session.get("peak_memory_gib") or 0 for session in sessions)
    return {"seconds": round(sum(session["seconds"] for session in sessions), 1), "peak_memory_gib": round(peak, 2)}


def _write(file: Path, text: str) -> None:
    from utils import writing

    writing.write(file, f"{text}\n")


# Table


def table(runs: list[Run]) -> str:
    """A row a method: mean over subjects of their means over seeds, and its 95 % interval over subjects."""
    found = [(run, told) for run in runs if (told := result(run))]
    names = list(dict.fromkeys(name for _, told in found for name in told["scores"]))
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [(run, told) for run, told in found if run.method == method]
        if not own:
            continue
        columns = [[(run.subject, told["scores"][n]) for run, told in own if n in told["scores"]] for n in names]
        subjects = len({run.subject for run, _ in own})
        cost = [[told[n] for _, told in own if n in told] for n in ("seconds", "peak_memory_gib")]
        cells = [interval(by_subject(values)) if values else "-" for values in columns]
        cells += [f"{statistics.fmean(values):.2f}" if values else "-" for values in cost]
        rows.append([method, f"{subjects} x {len(own) / subjects:.3g}", *cells])
    import results

    head = ["method", "subjects x seeds", *names, "seconds", "GiB"]
    text = results.table(head, rows)
    if pairs := paired(found, names):
        text += f"\n\nDifference from {pairs[0][0]}, subject by subject:\n\n"
        text += results.table(["method", "subjects", *names], [row for _, row in pairs])
    missing = len(runs) - len(found)
    return text + (f"\n\n{missing} of {len(runs)} runs are missing." if missing else "")


def paired(found: list[tuple[Run, dict]], names: list[str]) -> list[tuple[str, list]]:
    """(first method, a row for each other method): subjects differ more than methods do, so they are compared with
    themselves. Over the subjects and seeds that both have."""
    methods = list(dict.fromkeys(run.method for run, _ in found))
    of = {(run.method, run.subject, run.seed): told["scores"] for run, told in found}
    rows = []
    for method in methods[1:]:
        both = [(who, seed) for one, who, seed in of if one == method and (methods[0], who, seed) in of]
        cells = []
        for name in names:
            pairs = [(who, of[method, who, seed], of[methods[0], who, seed]) for who, seed in both]
            values = [(who, one[name] - other[name]) for who, one, other in pairs if name in one and name in other]
            cells.append(interval(by_subject(values), "+.3f") if values else "-")
        if both:
            rows.append((methods[0], [method, len({who for who, _ in both}), *cells]))
    return rows


def by_subject(values: list[tuple[str, float]]) -> list[float]:
    """Seeds of one subject are no independent subjects."""
    return [
        statistics.fmean(v for who, v in values if who == subject) for subject in dict.fromkeys(w for w, _ in values)
    ]


def interval(values: list[float], form: str = ".3f") -> str:
    """Mean ± half of the 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t: tabled where the expansion (Abramowitz & Stegun 26.7.5) is not yet good."""
    if freedom <= 4:
        return (12.706, 4.303, 3.182, 2.776)[freedom - 1]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def main(args) -> int:
    settings = read(args.settings)
    runs = runs_of(settings, args.output_dir.absolute())
    for kind, wanted in (("method", args.methods), ("subject", args.subjects)):
        known = list(dict.fromkeys(getattr(run, kind) for run in runs))
        if unknown := [name for name in wanted if name not in known]:
            errors.refuse(f"--{kind}s {' '.join(unknown)}: {args.settings} has {'; '.join(known)}")
        runs = [run for run in runs if not wanted or getattr(run, kind) in wanted]
    check(runs)
    code = 0
    mine = [run for run in runs[args.shard_index :: args.num_shards] if not result(run)]
    if mine and not args.table:
        code = work(args, settings, mine)
    text = table(runs)
    print(f"\n{text}")
    if not (args.methods or args.subjects):
        args.output_dir.mkdir(parents=True, exist_ok=True)
        _write(args.output_dir / "table.md", text)
        print(f"\nwritten to {args.output_dir / 'table.md'}")
    return code


def work(args, settings: dict, runs: list[Run]) -> int:
    import torch

    from utils.runtime import startup

    startup.quiet()
    device = f"cuda:{args.gpus[0] if args.gpus else 0}" if torch.cuda.is_available() else "cpu"
    judges = scores.judges(
        settings["scores"],
        device,
        settings["model"],
        settings["clip_model_name_or_path"],
        settings["dino_model_name_or_path"],
    )
    names = [subject["name"] for subject in settings["subjects"]]
    photos = {name: images.list_images(Path(settings["photos"], name)) for name in names}
    pool = Pool(scores.Scores(judges), photos | {"identifier": settings["identifier"]})
    places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in args.gpus] or [{}] * args.workers
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"{len(runs)} runs to do, {len(places)} at once", flush=True)
    failed = pool.work(runs, places)
    if pool.code:
        print("interrupted; the same command does what is missing", file=sys.stderr)
    elif failed:
        print(f"{len(failed)} runs failed: {', '.join(failed[:5])}", file=sys.stderr)
    return pool.code or (errors.FAILED if failed else 0)


if __name__ == "__main__":
    raise SystemExit(main(parse_args()))
