"""Everything that can be known before something slow starts: folders, photos, packages, disk, log-ins.

The one room that sees `args`: it looks at the options as a whole, as a person would before pressing return. It gathers
every problem, refuses once, and imports neither torch nor diffusers.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from utils import buckets, captions, concepts, interrupts, precomputed, saved
from utils.arguments import length
from utils.arguments.identity import changed, mistaken
from utils.errors import DATA, OPTIONS, refuse, warn
from utils.preflight import model_folder, photos, plan, remote, shapes

# By these an earlier run is recognised; a start that failed leaves less, and may be repeated.
STARTED = (".run.lock", "training_config.yaml")
FINISHED = ("model_index.json", "pytorch_lora_weights.safetensors")  # written last
RESULTS = ("metrics.jsonl", "unet", *FINISHED)
# What --overwrite_output_dir removes beside them.
RUN_FILES = (*RESULTS, "training_config.yaml", "report.html", "samples", "README.md", "preview", "data_preview.png")
RUN_FILES += ("test_samples", "pdm_features", "pdm_masks", "sam_masks", "ema_snapshots", "timings.json")
RUN_FILES += (
    "pytorch_lora_weights_kohya.safetensors",
    "learned_embeddings.safetensors",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)
CHECKPOINT = re.compile(r"checkpoint-\d+|\.tmp-checkpoint-.+")


class Problems:
    """Complaints and the exit code they deserve: 3 when only photos are at fault."""

    def __init__(self):
        self.options: list[str] = []
        self.data: list[str] = []
        self.captions: list[str] = []  # what the photos are said to show

    def refuse_if_any(self) -> None:
        if self.options or self.data:
            refuse([*self.options, *self.data], OPTIONS if self.options else DATA, once=True)


@interrupts.answered("stopped during the checks, before training began")
def check(args: argparse.Namespace) -> list[Path]:
    """Refuse what cannot work, create the output folder, say what was found; returns photos to leave out."""
    problems = Problems()
    _output(args, problems)
    _separate(args, problems)
    model, problem = model_folder.find(args)
    problems.options += [*([problem] if problem else plan.unknown_layers(args, model)), *model_folder.elsewhere(args)]
    problems.options += model_folder.sam(args)
    problems.options += model_folder.objective(args, model) + model_folder.sampler(args, model)
    problems.options += plan.unknown_queries(args, model)
    # A branch moves; what a run records must name for ever what it was trained on.
    args.revision = model_folder.commit(model) or args.revision
    found = photos.look(args, problems)
    problems.data += _unspoken(args, problems.captions)
    filled = shapes.fill(args, model, photos.sizes(found))
    counts = photos.visits(found), photos.class_images(args), buckets.counts(filled), photos.count(found)
    chosen = length.settle(args, photos.count(found), plan.examples_per_step(args), _run_of(args))
    outline = plan.outline(args, model, *counts)
    if (chosen or not args.max_train_steps) and outline.steps and (args.lr_warmup_steps or 0) >= outline.steps:
        problems.options.append(
            f"--lr_warmup_steps {args.lr_warmup_steps} leaves nothing of the {outline.steps} steps that "
            + (f"--num_train_epochs {args.num_train_epochs} makes" if args.num_train_epochs else "are chosen")
            + f"; {outline.steps // 10} would be a tenth"
        )
    _disk(args, outline, problems)
    problems.options += _precomputed(args)
    problems.options += [*model_folder.judges(args), *remote.packages(args)]
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
    if os.environ.get("RANK", "0") == "0" and (alone or not problems.options):
        # Asked once, and in a group of processes last: one that waits here must not be killed by one that refused.
        problems.options += [*remote.trackers(args), *remote.hub(args)]
    problems.refuse_if_any()
    # By epochs, and with pictures held out by their contents, the number of steps is known about only.
    _already(args, args.max_train_steps or (None if getattr(args, "validation_split", 0) else outline.steps))
    if args.resume_from_checkpoint:
        _resumed(args)
    if not args.dry_run:
        create(args.output_dir)
        if args.overwrite_output_dir and os.environ.get("RANK", "0") == "0":
            _clear(Path(args.output_dir))
    if os.environ.get("RANK", "0") == "0":
        told = buckets.report(filled, plan.examples_per_step(args), args.repeats)
        print("\n".join([*photos.summary(args, found), *told, *([chosen] if chosen else [])]), flush=True)
    return [path for one in found for path in one.bad]


def print_plan(args: argparse.Namespace) -> None:
    """--dry_run: what would learn, for how long, with how much memory and disk. Nothing is loaded or written."""
    if os.environ.get("RANK", "0") != "0":
        return
    found, model = photos.listed(args), model_folder.find(args)[0]
    in_buckets = buckets.counts(shapes.fill(args, model, photos.sizes(found)))
    counts = photos.visits(found), photos.class_images(args), in_buckets, photos.count(found)
    outline = plan.outline(args, model, *counts)
    print("\n".join(["plan (nothing was loaded, nothing was written)", *plan.lines(outline, args)]))


def _clear(folder: Path) -> None:
    """Remove what an earlier run left and nothing else; a run that is still going on keeps its folder."""
    from utils import runtime  # it may load torch: everything is checked by now
    from utils.runtime import startup

    runtime.close_last()
    lock = startup.FolderLock(folder)
    try:
        owner = lock.take()
    except OSError as problem:
        refuse(f"--output_dir {folder} cannot be written: {problem.strerror}.", once=True)
    if owner:
        refuse(f"--overwrite_output_dir: a run is going on in {folder} ({owner})", once=True)
    for entry in folder.iterdir():
        if _is_of_a_run(entry):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    lock.release()


def _is_of_a_run(path: Path) -> bool:
    return path.name in RUN_FILES or bool(CHECKPOINT.fullmatch(path.name)) or bool(saved.word_of(path))


def _output(args, problems: Problems) -> None:
    folder = Path(args.output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        problems.options.append(f"--output_dir {folder}: '{existing}' is a file; name a folder")
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        problems.options.append(f"--output_dir {folder}: '{existing}' is read-only for this user; name another folder")
    words = args.token_abstraction if getattr(args, "train_text_encoder_ti", False) else ()
    for word, name in saved.word_files(words).items():
        if os.path.lexists(folder / name) and not saved.word_of(folder / name):
            problems.options.append(
                f"--token_abstraction {word}: its embedding would be written over {folder / name}, which is not of a"
                " run; rename that file, or name another folder"
            )
    resume = args.resume_from_checkpoint
    if resume and resume != "latest" and not Path(resume).is_dir() and not (folder / resume).is_dir():
        names = sorted(path.name for path in folder.glob("checkpoint-*")) if folder.is_dir() else []
        there = f"there are {', '.join(names)}" if names else "there is none in --output_dir"
        problems.options.append(f"--resume_from_checkpoint {resume}: no such folder; {there}; latest takes the newest")
    if resume == "latest" and folder.is_dir() and not any(folder.glob("checkpoint-*")):
        left = [name for name in FINISHED if (folder / name).is_file()]
        if left:  # without a word a new run would begin, and write over the result
            problems.options.append(
                f"--resume_from_checkpoint latest: {folder} holds a finished run ({left[0]}) and no checkpoint to go on"
                " from; --overwrite_output_dir trains anew, --checkpointing_steps N leaves checkpoints"
            )
    if resume:
        problems.options += _another(args, folder, resume)
    first = os.environ.get("RANK", "0") == "0"  # the others may already see what the first one of this run wrote
    entries = sorted(folder.iterdir()) if first and folder.is_dir() else []
    left = [entry.name for entry in entries if _is_result(entry)]
    run = any((folder / name).is_file() for name in (*STARTED, "metrics.jsonl")) or any(folder.glob("checkpoint-*"))
    if left and resume and not _goes_on(folder, resume):
        problems.options.append(
            f"--output_dir {folder} already holds a run ({', '.join(left[:3])}{', ...' if left[3:] else ''}), and"
            f" --resume_from_checkpoint {resume} is of another: name an empty folder, or latest to go on with this run"
        )
    if not args.overwrite_output_dir and (link := _leads_out(folder, entries, args.logging_dir)):
        problems.options.append(
            f"--output_dir {folder}: '{link}' is a link to '{os.path.realpath(link)}', outside of the folder, and a run"
            " would write there; remove the link, or name another folder"
        )
    if run and left and not resume and not args.overwrite_output_dir:
        problems.options.append(
            f"--output_dir {folder} already holds a run ({', '.join(left[:3])}{', ...' if left[3:] else ''}): add"
            " --resume_from_checkpoint latest to go on, --overwrite_output_dir to replace it, or rename it"
        )
    if not run:  # there never was one here
        theirs = [entry.name for entry in entries if _is_of_a_run(entry)]
        if theirs:
            problems.options.append(
                f"--output_dir {folder} holds {', '.join(theirs)}, not written by a run, which this one would replace;"
                " name another folder"
            )


def _leads_out(folder: Path, entries: list[Path], logging_dir: str) -> Path | None:
    """The first link that a run would write through, out of its folder: files are written into `unet`, `samples`, ...
    by their names. What replaces a checkpoint takes the link's place and leaves what it leads to alone."""
    inside = folder.resolve()
    ours = [entry for entry in entries if entry.name in (*RUN_FILES, *STARTED, *Path(logging_dir).parts[:1])]
    for entry in ours:
        below = (Path(place, name) for place, *names in os.walk(entry) for name in itertools.chain(*names))
        for path in itertools.chain([entry], () if entry.is_symlink() else below):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                return path
    return None


def _another(args, folder: Path, resume: str) -> list[str]:
    """A resume that options alone forbid: said before photos are encoded and inverted."""
    if resume == "latest":
        found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        path = max(found, key=lambda one: int(one.name.split("-")[1]), default=None)
    else:
        path = _named(folder, resume)
    complaint = path and mistaken(args, path)
    return [complaint] if complaint else []


def _resumed(args) -> None:
    """What a resume would otherwise do in silence: begin anew, or go on in another way."""
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    there = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    if resume == "latest" and not there:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"--resume_from_checkpoint latest: {folder} holds no checkpoint, so training starts from the beginning",
                flush=True,
            )
        return
    for line in changed(args, _run_of(args) / STARTED[1]):
        warn(line)


def _run_of(args) -> Path | None:
    """The folder of the run that is resumed."""
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    return (folder if resume == "latest" else _named(folder, resume).parent) if resume else None


def _goes_on(folder: Path, resume: str) -> bool:
    """Whether the checkpoint is one of the run in this folder."""
    return resume == "latest" or _named(folder, resume).resolve().parent == folder.resolve()


def _named(folder: Path, resume: str) -> Path:
    return folder / resume if Path(resume).name == str(Path(resume)) else Path(resume).expanduser()


def _is_result(entry: Path) -> bool:
    if entry.is_file() and not entry.stat().st_size:
        return False
    return entry.name in RESULTS or bool(re.fullmatch(r"checkpoint-\d+", entry.name))


def _separate(args, problems: Problems) -> None:
    """Pictures are looked for in sub-folders too, so a folder inside another one would be trained on by mistake."""
    folders = _searched(args) + [(f"--{name}", getattr(args, name, None)) for name in ("masks_dir", "output_dir")]
    folders = [(name, Path(path).resolve()) for name, path in folders if path]
    for outer, outside in folders:
        for inner, inside in folders:
            if inner == outer or outer in ("--masks_dir", "--output_dir"):  # these are not searched
                continue
            if inside == outside and folders.index((inner, inside)) > folders.index((outer, outside)):
                problems.options.append(f"{inner} and {outer} are the same folder, '{outside}'; name two")
            elif inside != outside and inside.is_relative_to(outside):
                problems.options.append(f"{inner} lies inside {outer}, so its pictures would be taken for photos of it")
    model, output = Path(args.pretrained_model_name_or_path).resolve(), Path(args.output_dir).resolve()
    if model.is_dir() and model == output:
        problems.options.append("--output_dir is the base model's folder and would overwrite it; name another folder")
    read = ("masks_dir", "dataset_name", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path")
    named = [(one.named(name), getattr(one, name)) for one in args.concepts for name in concepts.PATHS]
    read += ("tokenizer_name", "precomputed_dir", "train_data_dir", "features_data_dir", "sam_model_name_or_path")
    named += [(f"--{name}", getattr(args, name, None)) for name in read]
    for name, path in named if args.overwrite_output_dir else ():
        path = Path(path or output.parent).resolve()
        inner = path.relative_to(output).parts if path.is_relative_to(output) else ()
        if inner and _is_of_a_run(output / inner[0]):
            problems.options.append(f"--overwrite_output_dir would remove {name} '{path}'; move it out of --output_dir")


def _searched(args) -> list[tuple[str, str]]:
    """(how it is called, folder) of all that pictures are looked for in; concepts of one class share its pictures."""
    found = [(one.named("instance_data_dir"), one.instance_data_dir) for one in args.concepts]
    classes: dict[tuple, tuple] = {}
    for one in args.concepts if photos.prior(args) else ():
        path = one.class_data_dir
        classes.setdefault((path and Path(path).resolve(), one.class_prompt), (one.named("class_data_dir"), path))
    return found + list(classes.values())


def _precomputed(args) -> list[str]:
    """What the options alone tell about it; its encoders are compared once the model is loaded."""
    if not getattr(args, "precomputed_dir", None):
        return []
    wanted = {"resolution": args.resolution, "interpolation": args.image_interpolation_mode}
    wanted |= {"mirrored": args.random_flip, "alpha_background": args.alpha_background}
    wanted |= {"resolution_buckets": buckets.OFF if args.resolution_buckets == buckets.OFF else None}
    return precomputed.complaints(args.precomputed_dir, **wanted)


def _unspoken(args, texts: list[str]) -> list[str]:
    """New tokens that no caption stands for would learn nothing. Captions of a dataset are not known yet."""
    words = args.token_abstraction if getattr(args, "train_text_encoder_ti", False) and texts else ()
    return [
        f"--token_abstraction {word} stands in no prompt or caption; write it where the subject is named,"
        f" e.g. 'a photo of {word} dog'"
        for word in words
        if all(captions.replaced(text, {word: ""}) == text for text in texts)
    ]


def _disk(args, outline: plan.Plan, problems: Problems) -> None:
    """The result and two checkpoints must fit: the one that is kept while the next is written, and that one. And all
    snapshots of averages, but for those that a resumed run left there."""
    folder = Path(args.output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    kept = outline.checkpoints or 1
    names = [f"step-{step:06d}-*.safetensors" for step in outline.snapshots]  # others stay beside them
    there = sum(file.stat().st_size for name in names for file in (folder / "ema_snapshots").glob(name))
    snapshots = max(0, len(outline.snapshots) * outline.snapshot_bytes - there)
    there = sum(file.stat().st_size for file in (folder / "pdm_features").glob("*.safetensors"))
    bank = 0 if getattr(args, "features_data_dir", None) else max(0, outline.bank_bytes - there)
    settled = outline.result_bytes + snapshots + bank
    least = settled + min(2, kept + 1) * outline.checkpoint_bytes
    told = f", {len(outline.snapshots)} snapshots of averages {plan.size(snapshots)}" if snapshots else ""
    told += f", PDM targets {plan.size(bank)}" if bank else ""
    if free < least:
        problems.options.append(
            f"--output_dir {args.output_dir}: {plan.size(free)} are free and at least {plan.size(least)} are needed"
            f" (result {plan.size(outline.result_bytes)}, a checkpoint {plan.size(outline.checkpoint_bytes)}{told})"
        )
    elif free < settled + (kept + 1) * outline.checkpoint_bytes:
        fits = max(1, int((free - settled) // outline.checkpoint_bytes) - 1)
        warn(f"{plan.size(free)} are free: {kept} checkpoints will not fit; --checkpoints_total_limit {fits} does")


def _already(args, steps: int | None) -> None:
    """A result of more steps than are asked for stays as it is: the newest checkpoint would make a lesser one."""
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    if not (resume and steps and _goes_on(folder, resume) and any((folder / name).is_file() for name in FINISHED)):
        return
    try:
        sessions = json.loads((folder / "timings.json").read_text(encoding="utf-8"))["sessions"]
        done = ([0] + [session["last_step"] for session in sessions if session.get("finished")])[-1]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if steps >= done:
        return
    if resume != "latest":
        refuse(
            f"--resume_from_checkpoint {resume}: {folder} holds a result of {done} steps, which one of {steps} would"
            " replace; name another --output_dir",
            once=True,
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"already complete: {done} steps are done, {steps} were asked for; {folder} is left as it is", flush=True)
    raise SystemExit(0)


def create(output_dir: str) -> None:
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()  # permissions lie on network mounts, and for root
    except OSError as problem:
        refuse(f"--output_dir {output_dir} cannot be written to: {problem.strerror}; name another folder", once=True)
