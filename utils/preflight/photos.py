"""Every photo, caption, mask and class image there is, looked at before any model is loaded."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import buckets, captions, images, masks, models, shards
from utils.concepts import Concept
from utils.errors import warn
from utils.preflight import model_folder, quality

SAM = "facebook/sam-vit-huge"  # PDMBooth's
SHOWN = 10  # warnings about photos; the rest is counted


@dataclass
class Found:
    """What one concept's folders hold."""

    concept: Concept
    photos: list | None = None  # reports of those that can be used; None where a dataset is used instead
    drawn: list | None = None  # of class images; None without prior preservation
    bad: list[Path] = field(default_factory=list)  # to be left out


def look(args: argparse.Namespace, problems) -> list[Found]:
    """One for each concept; what is wrong is added to `problems`."""
    if args.masks_dir and not Path(args.masks_dir).is_dir():
        problems.options.append(f"--masks_dir '{args.masks_dir}' is not a folder (looked in {Path.cwd()})")
    found, with_mask, classes_with_mask = [], 0, 0
    for concept in args.concepts:
        one = Found(concept)
        found.append(one)
        if getattr(args, "streaming", False) and args.train_data_dir:
            problem = shards.complaint(args.train_data_dir)
            problems.options += [f"--train_data_dir {problem}"] if problem else []
        if concept.instance_data_dir:
            one.photos, one.bad = _folder(args, concept, "instance_data_dir", problems)
            with_mask += _masks(args, concept, one.photos, problems)
        if prior(args) and concept.class_data_dir:
            one.drawn, bad = _folder(args, concept, "class_data_dir", problems)
            one.bad += bad
            if getattr(args, "mask_prior", False):
                complaints, usable = masks.check(one.drawn, masks.files([photo.path for photo in one.drawn], ""))
                problems.data += complaints
                classes_with_mask += usable
    photos = count(found)
    missed = args.masked_loss and not args.sam_model_name_or_path  # which makes those that are not there
    lacking = []
    if missed and photos and not with_mask:
        asked = [f"--{name}" for name in ("mask_dm", "mask_pdm") if getattr(args, name, False)]
        lacking.append(masks.none(" ".join(asked) or "--masked_loss"))
    if getattr(args, "mask_prior", False) and not (args.sam_model_name_or_path or classes_with_mask):
        drawn = "are drawn first, and have none" if not any(one.drawn for one in found) else "have none"
        lacking.append(
            f"--mask_prior: class images {drawn}; put NAME.mask.png beside NAME.png, let --sam_model_name_or_path make"
            " masks, or leave it out"
        )
    problems.data += _by_sam(args, lacking)
    if missed and 0 < with_mask < photos and not args.sam_model_name_or_path:
        warn(f"{photos - with_mask} of {photos} photos have no mask and count as a whole")
    return found


def _by_sam(args, lacking: list[str]) -> list[str]:
    """Masks asked for without saying whence: PDMBooth has SAM make them. => what then still lacks"""
    if not lacking or not hasattr(args, "mask_dm") or args.masks_dir or args.alpha_mask:
        return lacking
    args.sam_model_name_or_path = "toybox-sam" if args.pretrained_model_name_or_path in models.EMBEDDED else SAM
    if problems := model_folder.sam(args):
        args.sam_model_name_or_path = None
        return [f"{complaint} ({problems[0]})" for complaint in lacking]
    if os.environ.get("RANK", "0") == "0":
        print(f"no masks beside the pictures: {args.sam_model_name_or_path} makes them", flush=True)
    return []


def listed(args: argparse.Namespace) -> list[Found]:
    """The photos and their sizes again, from their headers alone and without a word about what is wrong."""
    found = []
    for concept in args.concepts:
        one = Found(concept, [] if concept.instance_data_dir else None)
        for path in images.list_images(concept.instance_data_dir) if concept.instance_data_dir else ():
            with contextlib.suppress(images.BadImage):
                one.photos.append(images.Report(path, *images.size_of(path)))
        found.append(one)
    return found


def count(found: Sequence[Found]) -> int:
    return sum(len(one.photos or ()) for one in found)


def visits(found: Sequence[Found]) -> int | None:
    """Photos of an epoch, before --repeats; None where a dataset holds them."""
    if any(one.photos is None for one in found):
        return None
    return sum(len(one.photos) * one.concept.repeats for one in found)


def class_images(args: argparse.Namespace) -> int:
    """How many there will be."""
    return sum(concept.num_class_images for concept in args.concepts) if prior(args) else 0


def prior(args: argparse.Namespace) -> bool:
    return getattr(args, "with_prior_preservation", False)


def sizes(found: Sequence[Found]) -> list[tuple[str, int, int, int]]:
    """(name, width, height, times in an epoch) of every photo, as `buckets.fill` takes them."""
    named = []
    for one in found:  # cameras number their photos: in several folders names are no longer enough
        folder = os.path.basename(one.concept.instance_data_dir or "") + "/" if len(found) > 1 else ""
        for report in one.photos or ():
            name = folder + os.path.basename(report.path)
            named.append((name, report.width, report.height, one.concept.repeats))
    return named


def _folder(args, concept: Concept, kind: str, problems) -> tuple[list, list[Path]]:
    """Reports of the usable pictures of a folder, and paths of those to leave out."""
    needed, option, folder = kind == "instance_data_dir", concept.named(kind), getattr(concept, kind)
    if not Path(folder).is_dir():
        if needed or Path(folder).exists():
            what = "is not a folder" if Path(folder).exists() else "does not exist"
            problems.options.append(f"{option} '{folder}' {what} (looked in {Path.cwd()})")
        return [], []
    pictures, others = images.survey(folder)
    if needed and not pictures:
        found = "only captions, masks or hidden files" if any(Path(folder).iterdir()) else "it is empty"
        found = _other_files(len(others)) if others else found
        streamed = hasattr(args, "streaming") and shards.local(folder)
        remedy = "--streaming reads the shards in it" if streamed else "put the photos there"
        what = shards.mosaicml(folder) or f"holds no pictures ({found}); {remedy}"
        problems.options.append(f"{option} '{folder}' {what}")
    if needed:
        words = {name: getattr(args, name, None) for name in ("identifier", "class_noun")}
        texts, complaints = captions.read(folder, pictures, concept.instance_prompt, args.caption_column, **words)
        problems.data += complaints
        problems.captions += [text for each in texts for text in ([each] if isinstance(each, str) else each or ())]
    # Class images are the model's own, and may look alike.
    square = args.resolution_buckets == buckets.OFF  # else the report of the buckets tells what is cut and enlarged
    wanted = {"min_side": square and args.resolution, "look": quality.look, "square": square} if needed else {}
    wanted |= {"background": args.alpha_background}
    reports = images.inspect(pictures, **wanted)
    bad = [report for report in reports if report.problem]
    good = [report for report in reports if not report.problem]
    too_many = len(bad) > images.MOST_BAD * len(reports)
    if needed and (args.on_bad_image == "error" or too_many):
        problems.data += [f"'{report.path}' {report.problem}" for report in bad]
    else:  # a class image that cannot be read is replaced by a new one
        _few([f"left out: '{report.path}' {report.problem}" for report in bad])
    if needed and too_many:
        problems.data.append(f"{len(bad)} of {len(reports)} pictures cannot be used: too many to leave out")
    elif needed and bad and args.on_bad_image == "error":
        problems.data.append("repair or remove these pictures, or leave them out with --on_bad_image skip")
    links = [path for path in pictures if path.is_symlink() and not captions.contained(path, Path(folder))]
    _few([f"'{path}' is a link to '{path.resolve()}', outside of the folder" for path in links])
    _few([f"'{report.path}' {warning}" for report in good for warning in report.warnings])
    _few(quality.remarks(good) if needed else [])
    return good, [Path(report.path) for report in bad]


def _masks(args, concept: Concept, photos: list, problems) -> int:
    """How many of the usable photos have a mask; each is opened as the photos were."""
    paths = [photo.path for photo in photos]
    sources = paths if args.alpha_mask else masks.files(paths, concept.instance_data_dir, args.masks_dir)
    if not args.masked_loss:
        there = sum(source is not None for source in sources)
        if there:
            wanted = "--mask_dm or --mask_pdm" if hasattr(args, "mask_dm") else "--masked_loss"
            warn(f"{there} photos have a mask beside them, which is not used: add {wanted}")
        return 0
    complaints, usable = masks.check(photos, sources, args.alpha_mask)
    problems.data += complaints
    return usable


def summary(args: argparse.Namespace, found: Sequence[Found]) -> list[str]:
    """A line for each concept."""
    said = []
    for one in found:
        line = f"dataset '{args.dataset_name or getattr(args, 'train_data_dir', None)}'"
        if one.photos is not None:
            by_area = sorted((report.width * report.height, f"{report.width}x{report.height}") for report in one.photos)
            line = f"{len(one.photos)} photos in '{one.concept.instance_data_dir}', {by_area[0][1]}"
            line += f" to {by_area[-1][1]}" if by_area[0][1] != by_area[-1][1] else ""
            others = [path.name for path in images.survey(one.concept.instance_data_dir)[1]]
            line += f"; {_other_files(len(others))} ignored ({', '.join(others[:3])})" if others else ""
        if one.drawn is not None:
            line += f"; {len(one.drawn)} of {one.concept.num_class_images} class images in"
            line += f" '{one.concept.class_data_dir}'"
        said.append(line + (f"; {len(one.bad)} left out" if one.bad else ""))
    return said


def _other_files(count: int) -> str:
    return f"{count} other file{'s' * (count > 1)}"


def _few(messages: list[str]) -> None:
    for message in messages[:SHOWN]:
        warn(message)
    if len(messages) > SHOWN:
        warn(f"... and {len(messages) - SHOWN} more about pictures")
