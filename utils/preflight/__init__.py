"""Everything that can be known before something slow starts: folders, photos, packages, disk, log-ins.

The one room that sees `args`: it looks at the options as a whole, as a person would before pressing return. It gathers
every problem, refuses once, and imports neither torch nor diffusers.
"""

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

from utils import buckets, captions, images, masks
from utils.errors import DATA, OPTIONS, refuse, warn
from utils.preflight import model_folder, plan, quality, remote, shapes

# By these an earlier run is recognised; a start that failed leaves less, and may be repeated.
STARTED = (".run.lock", "training_config.yaml")
FINISHED = ("model_index.json", "pytorch_lora_weights.safetensors")  # written last
RESULTS = ("metrics.jsonl", "unet", *FINISHED)
# What --overwrite_output_dir removes beside them.
RUN_FILES = (*RESULTS, "training_config.yaml", "report.html", "samples", "README.md", "preview", "data_preview.png")
RUN_FILES += ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
CHECKPOINT = re.compile(r"checkpoint-\d+|\.tmp-checkpoint-.+")
SHOWN = 10  # warnings about photos; the rest is counted


class Problems:
    """Complaints and the exit code they deserve: 3 when only photos are at fault."""

    def __init__(self):
        self.options: list[str] = []
        self.data: list[str] = []

    def refuse_if_any(self) -> None:
        if self.options or self.data:
            refuse([*self.options, *self.data], OPTIONS if self.options else DATA, once=True)


def check(args: argparse.Namespace) -> list[Path]:
    """Refuse what cannot work, create the output folder, say what was found; returns photos to leave out."""
    problems = Problems()
    _output(args, problems)
    _separate(args, problems)
    model, problem = model_folder.find(args)
    problems.options += [*([problem] if problem else []), *model_folder.elsewhere(args)]
    # A branch moves; what a run records must name for ever what it was trained on.
    args.revision = model_folder.commit(model) or args.revision
    option, folder = pictures_folder(args)
    photos, bad_photos = _photos(args, folder, option, problems, needed=True)
    drawn, bad_drawn = None, []
    if _prior(args):
        drawn, bad_drawn = _photos(args, args.class_data_dir, "--class_data_dir", problems, needed=False)
    filled = shapes.fill(args, model, shapes.named(photos or ()))
    class_images = args.num_class_images if _prior(args) else 0
    outline = plan.outline(args, model, _count(photos), class_images, buckets.counts(filled))
    if not args.max_train_steps and outline.steps and (args.lr_warmup_steps or 0) >= outline.steps:
        problems.options.append(
            f"--lr_warmup_steps {args.lr_warmup_steps} leaves nothing of the {outline.steps} steps that "
            f"--num_train_epochs {args.num_train_epochs} makes; {outline.steps // 10} would be a tenth"
        )
    _disk(args, outline, problems)
    problems.options += remote.packages(args)
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
    if os.environ.get("RANK", "0") == "0" and (alone or not problems.options):
        # Asked once, and in a group of processes last: one that waits here must not be killed by one that refused.
        problems.options += [*remote.trackers(args), *remote.hub(args)]
    problems.refuse_if_any()
    if not args.dry_run:
        _create(args.output_dir)
        if args.overwrite_output_dir and os.environ.get("RANK", "0") == "0":
            _clear(Path(args.output_dir))
    _summary(args, photos, drawn, bad_photos + bad_drawn, filled)
    return bad_photos + bad_drawn


def pictures_folder(args: argparse.Namespace) -> tuple[str, str | None]:
    """The option that names the folder to learn from, and that folder; None where a dataset is used."""
    name = "instance_data_dir" if "instance_data_dir" in args else "train_data_dir"
    return f"--{name}", getattr(args, name)


def _prior(args: argparse.Namespace) -> bool:
    return getattr(args, "with_prior_preservation", False)


def print_plan(args: argparse.Namespace) -> None:
    """--dry_run: what would learn, for how long, with how much memory and disk. Nothing is loaded or written."""
    if os.environ.get("RANK", "0") != "0":
        return
    _, folder = pictures_folder(args)
    photos = images.inspect(images.list_images(folder)) if folder else None
    model, class_images = model_folder.find(args)[0], args.num_class_images if _prior(args) else 0
    filled = shapes.fill(args, model, shapes.named(report for report in photos or () if not report.problem))
    outline = plan.outline(args, model, _count(photos), class_images, buckets.counts(filled))
    print("\n".join(["plan (nothing was loaded, nothing was written)", *plan.lines(outline, args)]))


def _clear(folder: Path) -> None:
    """Remove what an earlier run left and nothing else; a run that is still going on keeps its folder."""
    from utils.runtime import startup  # it may load torch: everything is checked by now

    lock = startup.FolderLock(folder)
    owner = lock.take()
    if owner:
        refuse(f"--overwrite_output_dir: a run is going on in {folder} ({owner})", once=True)
    for entry in folder.iterdir():
        if _is_of_a_run(entry.name):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    lock.release()


def _is_of_a_run(name: str) -> bool:
    return name in RUN_FILES or bool(CHECKPOINT.fullmatch(name))


def _output(args, problems: Problems) -> None:
    folder = Path(args.output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        problems.options.append(f"--output_dir {folder}: '{existing}' is a file; name a folder")
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        problems.options.append(f"--output_dir {folder}: '{existing}' is read-only for this user; name another folder")
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
    first = os.environ.get("RANK", "0") == "0"  # the others may already see what the first one of this run wrote
    entries = sorted(folder.iterdir()) if first and folder.is_dir() else []
    left = [entry.name for entry in entries if _is_result(entry)]
    if left and not resume and not args.overwrite_output_dir:
        problems.options.append(
            f"--output_dir {folder} already holds a run ({', '.join(left[:3])}{', ...' if left[3:] else ''}): add"
            " --resume_from_checkpoint latest to go on, --overwrite_output_dir to replace it, or rename it"
        )
    if not left and not any((folder / name).is_file() for name in STARTED):  # no run was ever here
        theirs = [entry.name for entry in entries if _is_of_a_run(entry.name)]
        if theirs:
            problems.options.append(
                f"--output_dir {folder} holds {', '.join(theirs)}, not written by a run, which this one would replace;"
                " name another folder"
            )


def _is_result(entry: Path) -> bool:
    if entry.is_file() and not entry.stat().st_size:
        return False
    return entry.name in RESULTS or bool(re.fullmatch(r"checkpoint-\d+", entry.name))


def _separate(args, problems: Problems) -> None:
    """Pictures are looked for in sub-folders too, so a folder inside another one would be trained on by mistake."""
    named = [pictures_folder(args)[0].lstrip("-"), *(["class_data_dir"] if _prior(args) else []), "masks_dir"]
    named.append("output_dir")
    folders = [(name, Path(getattr(args, name)).resolve()) for name in named if getattr(args, name)]
    for outer, outside in folders:
        for inner, inside in folders:
            if inner == outer or outer in ("masks_dir", "output_dir"):  # these are not searched
                continue
            if inside == outside and folders.index((inner, inside)) > folders.index((outer, outside)):
                problems.options.append(f"--{inner} and --{outer} are the same folder, '{outside}'; name two")
            elif inside != outside and inside.is_relative_to(outside):
                problems.options.append(
                    f"--{inner} lies inside --{outer}, so its pictures would be taken for photos of it"
                )
    model, output = Path(args.pretrained_model_name_or_path).resolve(), Path(args.output_dir).resolve()
    if model.is_dir() and model == output:
        problems.options.append("--output_dir is the base model's folder and would overwrite it; name another folder")
    read = ("instance_data_dir", "train_data_dir", "class_data_dir", "masks_dir", "dataset_name")
    read += ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "tokenizer_name")
    for name in read if args.overwrite_output_dir else ():
        path = Path(getattr(args, name, None) or output.parent).resolve()
        inner = path.relative_to(output).parts if path.is_relative_to(output) else ()
        if inner and _is_of_a_run(inner[0]):
            problems.options.append(
                f"--overwrite_output_dir would remove --{name} '{path}'; move it out of --output_dir"
            )


def _photos(args, folder: str | None, option: str, problems: Problems, needed: bool) -> tuple[list | None, list[Path]]:
    """Reports of the usable pictures, and paths of those to leave out; None where a dataset is used instead."""
    if not folder:
        return None, []
    if not Path(folder).is_dir():
        if needed or Path(folder).exists():
            what = "is not a folder" if Path(folder).exists() else "does not exist"
            problems.options.append(f"{option} '{folder}' {what} (looked in {Path.cwd()})")
        return [], []
    pictures, others = images.survey(folder)
    if needed and not pictures:
        found = f"{len(others)} other files" if others else "nothing"
        problems.options.append(f"{option} '{folder}' holds no pictures ({found}); put the photos there")
    if needed:
        words = {name: getattr(args, name, None) for name in ("identifier", "class_noun")}
        prompt = getattr(args, "instance_prompt", None)
        _, complaints = captions.read(folder, pictures, prompt, args.caption_column, **words)
        problems.data += complaints
    # Class images are the model's own, and may look alike.
    square = args.resolution_buckets == buckets.OFF  # else the report of the buckets tells what is cut and enlarged
    wanted = {"min_side": square and args.resolution, "look": quality.look, "square": square} if needed else {}
    reports = images.inspect(pictures, **wanted)
    bad = [report for report in reports if report.problem]
    good = [report for report in reports if not report.problem]
    if needed and (args.on_bad_image == "error" or (pictures and not good)):
        problems.data += [f"'{report.path}' {report.problem}" for report in bad]
    else:  # a class image that cannot be read is replaced by a new one
        _few([f"left out: '{report.path}' {report.problem}" for report in bad])
    if needed and bad and args.on_bad_image == "error":
        problems.data.append("repair or remove these pictures, or leave them out with --on_bad_image skip")
    if needed:
        _masks(args, good, problems)
    _few([f"'{report.path}' {warning}" for report in good for warning in report.warnings])
    _few(quality.remarks(good) if needed else [])
    return good, [Path(report.path) for report in bad]


def _masks(args, photos: list, problems: Problems) -> None:
    """The masks of the usable photos, opened as the photos were."""
    if args.masks_dir and not Path(args.masks_dir).is_dir():
        problems.options.append(f"--masks_dir '{args.masks_dir}' is not a folder (looked in {Path.cwd()})")
        return
    paths = [photo.path for photo in photos]
    sources = paths if args.alpha_mask else masks.files(paths, pictures_folder(args)[1], args.masks_dir)
    if not args.masked_loss:
        there = sum(source is not None for source in sources)
        if there:
            warn(f"{there} photos have a mask beside them, which is not used: add --masked_loss")
        return
    complaints, count = masks.check(photos, sources, args.alpha_mask)
    problems.data += complaints if count or not photos else [masks.NONE]
    if count and count < len(photos):
        warn(f"{len(photos) - count} of {len(photos)} photos have no mask and count as a whole")


def _disk(args, outline: plan.Plan, problems: Problems) -> None:
    """The result and two checkpoints must fit: the one that is kept while the next is written, and that one."""
    folder = Path(args.output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    kept = outline.checkpoints or 1
    least = outline.result_bytes + min(2, kept + 1) * outline.checkpoint_bytes
    if free < least:
        problems.options.append(
            f"--output_dir {args.output_dir}: {plan.size(free)} are free and at least {plan.size(least)} are needed"
            f" (result {plan.size(outline.result_bytes)}, a checkpoint {plan.size(outline.checkpoint_bytes)})"
        )
    elif free < outline.result_bytes + (kept + 1) * outline.checkpoint_bytes:
        fits = max(1, int((free - outline.result_bytes) // outline.checkpoint_bytes) - 1)
        warn(f"{plan.size(free)} are free: {kept} checkpoints will not fit; --checkpoints_total_limit {fits} does")


def _create(output_dir: str) -> None:
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()  # permissions lie on network mounts, and for root
    except OSError as problem:
        refuse(f"--output_dir {output_dir} cannot be written to: {problem.strerror}; name another folder", once=True)


def _summary(args, photos: list | None, drawn: list | None, bad: list[Path], filled: dict) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    said = f"dataset '{args.dataset_name}'"
    if photos is not None:
        sides = sorted((report.width * report.height, f"{report.width}x{report.height}") for report in photos)
        said = f"{len(photos)} photos in '{pictures_folder(args)[1]}', {sides[0][1]}"
        said += f" to {sides[-1][1]}" if sides[0][1] != sides[-1][1] else ""
    if drawn is not None:
        said += f"; {len(drawn)} of {args.num_class_images} class images in '{args.class_data_dir}'"
    said += f"; {len(bad)} left out" if bad else ""
    print("\n".join([said, *buckets.report(filled, plan.examples_per_step(args), args.repeats)]), flush=True)


def _few(messages: list[str]) -> None:
    for message in messages[:SHOWN]:
        warn(message)
    if len(messages) > SHOWN:
        warn(f"... and {len(messages) - SHOWN} more about pictures")


def _count(photos: list | None) -> int | None:
    return None if photos is None else len(photos)
