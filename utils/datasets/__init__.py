"""Folders and Hugging Face datasets => named examples => batches, in an order that is a pure function of the seed.

One example stays one record from disk to loss: its picture, caption, sizes, crop, identity and whether it shows the
class never travel in separate lists.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils import buckets, errors, images, lost, masks, randomness
from utils.datasets.sources import Example, captioned, class_pictures, content_key, folder, hub, photos, pictures

__all__ = ["Example", "captioned", "class_pictures", "content_key", "folder", "hub", "photos", "pictures"]  # and below

MOST_CROPS = 100  # random crops of a photo until one shows something of its mask
REMEMBERED = 2**29  # bytes of resized pictures kept between visits, so that a photo is decoded once and not each epoch


class DreamBooth(Dataset):
    """Instance examples, each with a class example beside it when there are any.

    Items are asked for by global position, any integer from 0 on, and the stream never ends: epoch after epoch each
    shows every example once. dataset[position] is a list of one or two records with

        pixels            (3, height, width) fp32 in [-1, 1]; or, once `latents` holds them,
        latent_mean, latent_std  (channels, height, width) fp32
        captions, keys    text
        mask              (1, height, width) uint8, white where the picture counts; only if some photo has a mask
        is_class          bool
        ids               2 * position for the instance, 2 * position + 1 for the class: noise is drawn by it
        original_size     (height, width) of the upright photo
        crop_top_left     (top, left) of the crop in the resized (and mirrored) photo
        lost              None; or why the picture cannot be read any more. The rest is then blank, and the run must
                          stop before the step that the record is in

    All pictures are square, or with `resolution_buckets` each photo has the nearest of several shapes. Then those of a
    whole optimizer step share one, class examples included, however it is split over micro-steps and processes;
    an epoch is as many steps as show every photo, and what a shape lacks to fill its last step is shown again.
    """

    def __init__(
        self,
        instance: Sequence[Example],
        classes: Sequence[Example] = (),
        size: int = 512,
        center_crop: bool = False,
        random_flip: bool = False,
        interpolation: str = "lanczos",
        seed: int = 0,
        repeats: int = 1,  # how often an instance picture counts in an epoch
        caption_dropout: float = 0.0,  # share of visits with an empty caption: what guidance compares with
        alpha_background: str = "white",  # what transparent parts become
        resolution_buckets: str = buckets.OFF,  # off, auto, or shapes as buckets.spelled writes them
        side_factor: int = buckets.SIDE,  # pixels of which the model wants sides to be a multiple; for buckets
        examples_per_step: int = 1,  # of all processes and micro-steps; for buckets
    ):
        self.instance, self.classes = list(instance), list(classes)
        self.size, self.center_crop, self.random_flip = size, center_crop, random_flip
        self.interpolation, self.seed, self.repeats = interpolation, seed, repeats
        self.caption_dropout, self.examples_per_step = caption_dropout, examples_per_step
        self.masked = any(example.mask for example in self.examples)
        self.visits = [place for place, one in enumerate(self.instance) for _ in range(one.repeats)]
        self._class_of: dict[int, list[Example]] = {one.concept: [] for one in self.instance}
        for one in self.classes:
            self._class_of.setdefault(one.concept, []).append(one)
        self.latents = None  # cache.latents puts the posteriors here
        self._sizes: dict[str, tuple[int, int]] = {}
        self._remembered: dict[tuple[str, tuple[int, int]], Any] = {}
        self.alpha_background = alpha_background
        self.unreadable: dict[str, str] = {}  # key of a picture that was lost since the run began => why
        self._room = REMEMBERED
        self.shapes = buckets.shapes(resolution_buckets, size, side_factor) or [(size, size)]
        self._in_shape: dict[tuple[int, int], list[int]] = {}  # visits; shapes that no photo has are not here
        fitting = [
            buckets.nearest(*self._size_of(one), self.shapes) if self.bucketed else self.shapes[0]
            for one in self.instance
        ]
        for place in self.visits:
            self._in_shape.setdefault(fitting[place], []).append(place)
        if complaints := self._black_crops():
            errors.refuse(complaints, errors.DATA, once=True)

    def _black_crops(self) -> list[str]:
        """Masks of which no crop of the photo shows anything: its loss would be 0, and nothing of it be learned."""
        found = []
        for example, shape in self.pairs() if self.masked else ():
            if example.mask is None:
                continue
            try:
                mask = self._resized_mask(example, shape)
            except images.BadImage:  # lost since the preflight: training tells
                continue
            place, where = images.crop_place(*mask.size, shape, center=True), None
            if mask.getextrema()[1] < masks.BLACK:
                where = "is too small to be seen at"
            elif self._crop_stays(mask.size, shape) and not masks.shows(mask, place, shape):
                where = "lies outside of the crop of"
            if where:
                where = f"the mask '{images.name_of(example.mask.source)}' {where} {buckets.label(shape)}"
                remedy = "crop the photo around its subject, or use --resolution_buckets or random crops"
                found.append(f"{where}: nothing of its photo would be learned; {remedy}")
        return found

    def _crop_stays(self, resized: tuple[int, int], shape: tuple[int, int]) -> bool:
        return self.center_crop or resized == shape

    @property
    def examples(self) -> list[Example]:
        return self.instance + self.classes

    def captions(self) -> list[str]:
        texts = [example.caption for example in self.examples]
        texts += [""] if self.caption_dropout else []
        return sorted({one for text in texts for one in ([text] if isinstance(text, str) else text)})

    def fingerprint(self) -> str:
        """Changes when a picture is added, removed, edited or renamed into another place, or a caption is edited."""
        rows = [
            [example.key, example.caption, example.is_class, *([example.mask.key] if example.mask else [])]
            for example in self.examples
        ]
        if any(example.concept or example.repeats > 1 for example in self.examples):  # else as it always was
            rows += [[example.concept, example.repeats] for example in self.examples]
        if self.bucketed:
            rows += [self.resolution, self.repeats]
        rows += getattr(self.latents, "rounding", [])  # of latents that were stored in less than full precision
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()

    @property
    def bucketed(self) -> bool:
        return self.shapes != [(self.size, self.size)]

    @property
    def resolution(self) -> int | str:
        """As people and checkpoints are told it."""
        return f"{self.size} in buckets {', '.join(map(buckets.label, self.shapes))}" if self.bucketed else self.size

    def __len__(self) -> int:
        return max(self._epoch * (1 if self.bucketed else self.repeats), len(self.classes))

    @property
    def _epoch(self) -> int:
        """Visits after which a new order begins."""
        if not self.bucketed:
            return len(self.visits)
        counts = map(len, self._in_shape.values())
        return self.examples_per_step * buckets.steps(counts, self.examples_per_step, self.repeats)

    def _visit(self, position: int) -> tuple[int, tuple[int, int]]:
        """Which instance example is shown at `position`, and in which shape."""
        if not self.bucketed:
            return self.visits[randomness.slot(self.seed, position, len(self.visits))], self.shapes[0]
        epoch, rest = divmod(position, self._epoch)
        counts = tuple(map(len, self._in_shape.values()))
        groups = randomness.groups(self.seed, epoch, counts, self.examples_per_step, self.repeats)
        which, group = groups[rest // self.examples_per_step]
        shape = list(self._in_shape)[which]
        return self._in_shape[shape][group[rest % self.examples_per_step]], shape

    def __getitem__(self, position: int) -> list[dict]:
        place, shape = self._visit(position)
        example = self.instance[place]
        records = [self._record(example, 2 * position, shape)]
        if classes := self._class_of[example.concept]:
            place = randomness.slot(self.seed, position, len(classes), "class order")
            records.append(self._record(classes[place], 2 * position + 1, shape))
        return records

    def visit(self, place: int, number: int) -> list[dict]:
        """The square record of an instance example out of the order, with the draws of that number."""
        return [self._record(self.instance[place], number, (self.size, self.size))]

    def first_views(self, most: int) -> Iterator[tuple[Example, str, Any, tuple[int, int], tuple[int, int], Any]]:
        """The first photos in their order, each as its first visit shows it: example, caption, the resized (and
        mirrored) picture, (top, left) of the crop and its (width, height), its mask. Like every view a pure function:
        looking changes nothing."""
        visits: dict[int, int] = {}
        for position in range(self._epoch):
            visits.setdefault(self._visit(position)[0], position)
        for place, example in enumerate(self.instance[:most]):
            shape = self._visit(visits[place])[1]
            try:
                caption, flip, corner = self._view(example, 2 * visits[place], shape)
                mask = mirrored(self._resized_mask(example, shape), flip) if example.mask else None
                picture = mirrored(self._picture(example, shape, remember=True), flip)
            except images.BadImage:  # lost since the preflight: training will tell
                continue
            yield example, caption, picture, corner, shape, mask

    def centred(self, example: Example) -> dict:
        """The square crop in the middle of a picture, never mirrored, as far as a record tells of it."""
        shape = (self.size, self.size)
        place = images.crop_place(*images.resized_size(*self._size_of(example), shape), shape, center=True)
        return {
            "pixels": self.pixels(example, False, shape, place),
            "mask": self._mask(example, False, shape, place),
            "original_size": self._size_of(example)[::-1],
            "crop_top_left": place,
        }

    def pairs(self) -> list[tuple[Example, tuple[int, int]]]:
        """Every example with every shape it is shown in."""
        found = {}
        for shape, places in self._in_shape.items():
            shown = [self.instance[place] for place in dict.fromkeys(places)]
            beside = [one for concept in dict.fromkeys(one.concept for one in shown) for one in self._class_of[concept]]
            found |= {(example.key, shape): example for example in shown + beside}
        return [(example, shape) for (_, shape), example in found.items()]

    def _view(self, example: Example, number: int, shape: tuple[int, int]) -> tuple[str, bool, tuple[int, int]]:
        """Which caption, whether mirrored, and (top, left) of the crop."""
        caption = example.caption
        if not isinstance(caption, str):
            caption = randomness.rng(self.seed, "caption", number).choice(caption)
        flip = self.random_flip and randomness.rng(self.seed, "flip", number).random() < 0.5
        resized = images.resized_size(*self._size_of(example), shape)
        # With cached latents too: the place is then the only one possible.
        rng = randomness.rng(self.seed, "crop", number)
        place = images.crop_place(*resized, shape, self.center_crop, rng)
        if example.mask is not None and not self._crop_stays(resized, shape):
            place = self._crop_with_white(example, flip, shape, place, rng)
        return caption, flip, place

    def _crop_with_white(self, example: Example, flip: bool, shape: tuple[int, int], place, rng) -> tuple[int, int]:
        """A random crop that shows nothing of the mask is drawn again: its loss would be 0 and the step wasted."""
        mask = mirrored(self._resized_mask(example, shape), flip)
        for _ in range(MOST_CROPS):
            if masks.shows(mask, place, shape):
                return place
            place = images.crop_place(*mask.size, shape, False, rng)
        left, top, right, bottom = mask.point(lambda value: 255 * (value >= masks.BLACK)).getbbox()
        middle = (top + bottom - shape[1]) // 2, (left + right - shape[0]) // 2
        return tuple(min(max(0, at), side - size) for at, side, size in zip(middle, mask.size[::-1], shape[::-1]))

    def _record(self, example: Example, number: int, shape: tuple[int, int]) -> dict:
        """The record of an example; if its picture cannot be read any more, a blank one that says why."""
        if example.key not in self.unreadable:  # else another three attempts at each visit
            try:
                return self._seen(example, number, shape) | {"lost": None}
            except images.BadImage as bad:
                self.unreadable[example.key] = str(bad)
        why = f"{self.unreadable[example.key]}; restore the file, then resume"
        return self._blank(example, number, shape) | {"lost": why}

    def _blank(self, example: Example, number: int, shape: tuple[int, int]) -> dict:
        """In the place of a record whose picture cannot be read: the step under way will not be taken."""
        width, height = shape
        record = {"captions": "", "keys": example.key, "is_class": example.is_class, "ids": number}
        record |= {"original_size": (height, width), "crop_top_left": (0, 0)}
        if self.masked:
            record["mask"] = torch.full((1, height, width), 255, dtype=torch.uint8)
        if self.latents is None:
            return record | {"pixels": torch.zeros(3, height, width)}
        return record | dict(zip(("latent_mean", "latent_std"), self.latents.get(example.key, False, shape)))

    def _seen(self, example: Example, number: int, shape: tuple[int, int]) -> dict:
        caption, flip, place = self._view(example, number, shape)
        if self.caption_dropout and randomness.rng(self.seed, "dropout", number).random() < self.caption_dropout:
            caption = ""
        record = {
            "captions": caption,
            "keys": example.key,
            "is_class": example.is_class,
            "ids": number,
            "original_size": self._size_of(example)[::-1],
            "crop_top_left": place,
        }
        if self.masked:
            record["mask"] = self._mask(example, flip, shape, place)
        if self.latents is None:
            return record | {"pixels": self.pixels(example, flip, shape, place)}
        mean, std = self.latents.get(example.key, flip, shape)
        return record | {"latent_mean": mean, "latent_std": std}

    # Pictures

    def varying_crops(self) -> bool:
        """Whether a picture is seen through different crops; one that has its shape once resized never is."""
        # All of them are looked at: once latents are cached, no picture is opened any more.
        fits = [images.resized_size(*self._size_of(example), shape) == shape for example, shape in self.pairs()]
        return not self.center_crop and not all(fits)

    def pixels(
        self,
        example: Example,
        flip: bool,
        shape: tuple[int, int],
        place: tuple[int, int] | None = None,  # None: the centre
        remember: bool = True,
    ):
        """(3, height, width): the crop at `place` of a picture that is mirrored first."""
        picture = mirrored(self._picture(example, shape, remember), flip)
        top, left = place or images.crop_place(*picture.size, shape, center=True)
        return images.to_tensor(picture.crop((left, top, left + shape[0], top + shape[1])))

    def _mask(self, example: Example, flip: bool, shape: tuple[int, int], place: tuple[int, int]) -> torch.Tensor:
        """The same crop of the photo's mask, uint8; class images and photos without one count whole."""
        width, height = shape
        if example.mask is None:
            return torch.full((1, height, width), 255, dtype=torch.uint8)
        top, left = place
        mask = mirrored(self._resized_mask(example, shape), flip).crop((left, top, left + width, top + height))
        return torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(1, height, width)

    def forget(self) -> None:
        """Lets go of the decoded pictures."""
        self._remembered.clear()
        self._room = REMEMBERED

    def _size_of(self, example: Example) -> tuple[int, int]:
        if example.key not in self._sizes:
            self._sizes[example.key] = lost.patiently(lambda: images.size_of(example.source))
        return self._sizes[example.key]

    def _picture(self, example: Example, shape: tuple[int, int], remember: bool):
        """Decoded and resized; remembered while there is room."""
        read = lambda: images.open_rgb(example.source, self.alpha_background)  # noqa: E731
        return self._resized(example.key, read, shape, self.interpolation, remember)

    def _resized_mask(self, example: Example, shape: tuple[int, int]):
        # "box" is the share of area: other filters would let a little of what is masked shine through.
        return self._resized(example.mask.key, example.mask.open, shape, "box")

    def _resized(self, key: str, read: Callable, shape: tuple[int, int], interpolation: str, remember: bool = True):
        if (key, shape) in self._remembered:
            return self._remembered[key, shape]
        picture = images.resize_to_cover(lost.patiently(read), shape, interpolation)
        worker = get_worker_info()  # each worker process remembers for itself
        needed = len(picture.getbands()) * picture.width * picture.height * (worker.num_workers if worker else 1)
        if remember and needed <= self._room:
            self._room -= needed
            self._remembered[key, shape] = picture
        return picture


def mirrored(picture, flip: bool):
    from PIL import Image

    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture


def collate(items: Sequence[list[dict]]) -> dict:
    """Items of DreamBooth => one batch, instance examples before class examples."""
    records = sorted(itertools.chain.from_iterable(items), key=lambda record: record["is_class"])  # a stable sort
    batch: dict[str, Any] = {}
    for name in records[0]:
        values = [record[name] for record in records]
        if name in ("captions", "keys"):
            batch[name] = values
        elif name == "lost":
            batch[name] = [value for value in values if value]
        elif isinstance(values[0], torch.Tensor):
            batch[name] = torch.stack(values)
        else:  # is_class bool (b,), ids int64 (b,), original_size and crop_top_left int64 (b, 2)
            batch[name] = torch.tensor(values)
    return batch


@dataclass
class Positions:
    """The global positions that one rank visits, batch by batch, from `first_step` (0: the very first) on."""

    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    first_step: int = 0

    def __iter__(self):
        shape = {"batch": self.batch_size, "world": self.world, "accumulate": self.accumulate}
        for step in itertools.count(self.first_step):
            for micro in range(self.accumulate):
                yield list(randomness.positions(step, micro, self.rank, **shape))


def loader(
    dataset: Dataset,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    first_step: int = 0,  # optimizer steps that are done already
    workers: int = 0,
) -> DataLoader:
    """Endless batches of this rank. Every optimizer step has the same number of examples: no ragged last batch."""
    if dataset.bucketed and dataset.examples_per_step != batch_size * world * accumulate:
        raise ValueError("the buckets were filled for steps of another size")
    workers = 0 if dataset.latents is not None else workers  # nothing is left to prepare
    return DataLoader(
        dataset,
        batch_sampler=Positions(batch_size, rank, world, accumulate, first_step),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
