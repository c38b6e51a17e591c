"""Where examples come from: folders of pictures, Hugging Face datasets, several subjects at once."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils import captions as caption_files
from utils import errors, images, masks, randomness, shards


@dataclass(frozen=True)
class Example:
    source: Any  # whatever images.open_rgb takes
    caption: str | tuple[str, ...]  # several: one is drawn at each visit
    is_class: bool = False
    key: str = ""  # short identity of the picture's content
    mask: Any = None  # a masks.Mask: where the picture counts; None: everywhere
    concept: int = 0  # which subject it belongs to: a class example stands beside an instance example of its own
    repeats: int = 1  # how often it counts in an epoch, beside those that all examples have


class Row:
    """One picture of a Hugging Face dataset, read when it is asked for."""

    def __init__(self, table, index: int, column: str):
        self.table, self.index, self.column = table, index, column
        self.name = f"row {index} of the dataset"

    def __call__(self) -> dict:
        return self.table[self.index][self.column]  # {"bytes", "path"}


def photos(
    concepts: Sequence,  # concepts.Concept
    dataset_name: str | None = None,  # instead of the folder
    dataset_config_name: str | None = None,
    image_column: str = "image",
    cache_dir: str | None = None,
    *,
    caption_column: str | None = None,
    on_bad_image: str = "error",
    identifier: str | None = None,
    class_noun: str | None = None,
    masked_loss: bool = False,
    masks_dir: str | None = None,  # instead of NAME.mask.png beside the photos
    alpha_mask: bool = False,  # instead of files
    sam_model_name_or_path: str | None = None,  # makes those that are missing, see sam.attach
) -> list[Example]:
    """The photos of what is taught, each knowing its concept: what the options of a DreamBooth script name."""
    how = {"caption_column": caption_column, "on_bad_image": on_bad_image}
    how |= {"identifier": identifier, "class_noun": class_noun}
    found: list[Example] = []
    for number, concept in enumerate(concepts):
        where, prompt = concept.instance_data_dir, concept.instance_prompt
        if dataset_name:
            own = hub(
                dataset_name, dataset_config_name, image_column=image_column, cache_dir=cache_dir, prompt=prompt, **how
            )
        else:
            own = folder(where, prompt, **how)
        if masked_loss:
            needed = len(concepts) == 1 and not sam_model_name_or_path
            own = masks.attach(own, where, masks_dir, alpha_mask, needed)
        found += [dataclasses.replace(example, concept=number, repeats=concept.repeats) for example in own]
    return found


def class_pictures(drawn: Sequence[Sequence[Path]], concepts: Sequence) -> list[Example]:
    """The class images of each concept, as prior.fill_all returns them."""
    return [
        dataclasses.replace(example, concept=number)
        for number, (paths, concept) in enumerate(zip(drawn, concepts))
        for example in pictures(paths, concept.class_prompt, is_class=True)
    ]


def captioned(
    train_data_dir: str | None = None,
    dataset_name: str | None = None,  # instead of the folder
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    image_column: str = "image",
    caption_column: str | None = None,
    cache_dir: str | None = None,
    on_bad_image: str = "skip",
    max_train_samples: int | None = None,
    masked_loss: bool = False,
    masks_dir: str | None = None,
    alpha_mask: bool = False,
    sam_model_name_or_path: str | None = None,
    streaming: bool = False,
    *,
    seed: int,
    share: Callable | None = None,
) -> Sequence[Example]:
    """Captioned pictures: what the options of a text-to-image script name; a sample of them if fewer are wanted.

    share: names in the data set, captions => places of those that are wanted. Nothing else is opened.
    """
    if streaming:
        if dataset_name:
            files = shards.of_hub(dataset_name, dataset_config_name, dataset_split, cache_dir)
        else:
            files = shards.local(train_data_dir)
        return shards.Shards(files, image_column, caption_column, on_bad_image)
    how = {"on_bad_image": on_bad_image, "share": share}
    if dataset_name:
        how |= {"image_column": image_column, "caption_column": caption_column or "text", "cache_dir": cache_dir}
        found = hub(dataset_name, dataset_config_name, dataset_split, **how)
    else:
        found = folder(train_data_dir, caption_column=caption_column, **how)
    if max_train_samples and max_train_samples < len(found):
        chosen = randomness.rng(seed, "samples").sample(range(len(found)), max_train_samples)
        found = [found[place] for place in sorted(chosen)]
    if masked_loss:
        found = masks.attach(found, train_data_dir, masks_dir, alpha_mask, needed=not sam_model_name_or_path)
    return found


def folder(
    path: str | os.PathLike | None,
    prompt: str | None = None,  # for pictures without a caption of their own
    captions: bool = True,  # False: every picture gets the prompt
    is_class: bool = False,
    caption_column: str | None = None,  # of metadata.jsonl, .csv or .parquet
    on_bad_image: str = "error",  # "skip": leave out what cannot be decoded
    share: Callable | None = None,  # as in `captioned`
    within: str = "",  # a folder in it: only the pictures there
    **words: str | None,  # identifier, class_noun: what placeholders in captions stand for
) -> list[Example]:
    """The pictures under a folder with their captions, sorted; [] when there is no folder to read."""
    if path is None:
        return []
    found = images.list_images(path)
    texts, complaints = [prompt or ""] * len(found), []
    if captions:
        texts, complaints = caption_files.read(path, found, prompt, caption_column, **words)
    if complaints:
        errors.refuse(complaints, errors.DATA)
    bad, part = set(), Path(path, within)
    inside = [place for place, one in enumerate(found) if one.is_relative_to(part)]
    found, texts = ([values[place] for place in inside] for values in (found, texts))
    if share:
        wanted = share([one.relative_to(path).as_posix() for one in found], texts)
        found, texts = ([values[place] for place in wanted] for values in (found, texts))
    if on_bad_image == "skip":
        bad = {report.path for report in images.inspect(found) if report.problem}
    examples = [_example(one, text, is_class) for one, text in zip(found, texts) if one not in bad]
    if not examples and not share:
        errors.refuse(f"'{path}' holds no pictures that can be used")
    return examples


def pictures(paths: Iterable[str | os.PathLike], prompt: str, is_class: bool = False) -> list[Example]:
    """Given files, all with one prompt: the class images that prior.fill returns."""
    return [_example(path, prompt, is_class) for path in paths]


def _example(path, caption, is_class: bool) -> Example:
    # By its content: a picture replaced in place is another picture, also for a resumed run.
    return Example(str(path), caption, is_class, content_key(Path(path).read_bytes()))


def content_key(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def hub(
    name: str,
    config: str | None = None,
    split: str | None = None,  # None: train; of a folder of pictures, all of them
    image_column: str = "image",
    caption_column: str | None = None,
    prompt: str | None = None,  # without a caption column
    cache_dir: str | None = None,
    on_bad_image: str = "error",
    share: Callable | None = None,  # as in `captioned`
    **words: str | None,
) -> list[Example]:
    """A dataset of the hub or in a local folder. A plain folder of pictures, or its sub-folder that is named like the
    split, goes the way of `folder`."""
    if Path(name).is_dir() and config is None and images.list_images(name):
        within = split if split and Path(name, split).is_dir() else ""  # as `datasets` takes a folder of pictures
        if split not in (None, "train", within):
            errors.refuse(f"--dataset_split {split}: '{name}' is a folder of pictures, without a folder '{split}'")
        how = {"caption_column": caption_column, "on_bad_image": on_bad_image, "share": share, "within": within}
        return folder(name, prompt, **how, **words)
    import datasets

    try:
        table = datasets.load_dataset(name, config, split=split or "train", cache_dir=cache_dir)
    except Exception as problem:  # the library raises many kinds: no such name, gated, offline, malformed files
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        errors.refuse(f"--dataset_name {name} cannot be read: {reason}")
    for option, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column and column not in table.column_names:
            errors.refuse(f"{option} {column}: {name} has only the columns {', '.join(table.column_names)}")
    texts = list(table[caption_column]) if caption_column else [prompt] * len(table)
    # A column of plain text is no picture, even if it names files: a stranger's table may name any file of yours.
    if not isinstance(table.features[image_column], datasets.Image):
        errors.refuse(f"--image_column {image_column} of {name} holds no pictures: {table.features[image_column]}")
    table = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    examples, complaints = [], []
    wanted = share([f"row {index}" for index in range(len(table))], texts) if share else range(len(table))
    for index in wanted:
        text = texts[index]
        text = tuple(text) if isinstance(text, (list, tuple)) and len(text) else text or prompt
        if not text or not all(isinstance(one, str) for one in (text if isinstance(text, tuple) else [text])):
            complaints.append(f"{name}, row {index}: no caption, and no --instance_prompt stands in")
            text = ""
        if any("\0" in one for one in (text if isinstance(text, tuple) else [text])):
            complaints.append(f"{name}, row {index}: its caption {caption_files.NUL}")
        row = Row(table, index, image_column)
        complaints += caption_files.unfilled([(f"{name}, row {index}", text)], **words)
        examples.append(Example(row, caption_files.fill(text, **words)))
    # All of them decoded now: one that cannot be would otherwise end the run at whatever step it is drawn.
    reports = images.inspect([example.source for example in examples])
    bad = sum(bool(report.problem) for report in reports)
    if on_bad_image == "error" or bad > images.MOST_BAD * len(reports):
        complaints += [
            f"{name}, row {index}: {report.problem}" for index, report in zip(wanted, reports) if report.problem
        ]
    if complaints:
        errors.refuse(complaints, errors.DATA)
    examples = [
        replace(one, key=content_key(one.source()["bytes"] or Path(one.source()["path"]).read_bytes()))
        for one, report in zip(examples, reports)
        if not report.problem
    ]
    if not examples and not share:
        errors.refuse(f"--dataset_name {name} holds no pictures that can be used")
    return examples
