"""Data sets too large to list, shown in an order that is a pure function of the seed.

Nothing remembers how far the stream is. An epoch goes through all pieces of the shards (row groups of parquet files,
whole tar files) in a new order, and through each `shuffle_buffer` rows of that course in an order of their own. So a
resumed run goes on at the very row, processes share the rows without asking each other, and no more than those rows
are in memory.
"""

import functools
import hashlib
import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from utils import datasets, errors, images, lost, randomness
from utils.shards import Row, Shards

MOST_BAD = 0.1  # share of the rows seen so far that may be skipped; one in any case


class Stream(datasets.DreamBooth):
    """Rows of shards as training sees them: records as datasets.DreamBooth makes them, any position from 0 on."""

    def __init__(
        self,
        rows: Shards,
        size: int = 512,
        center_crop: bool = False,
        random_flip: bool = False,
        interpolation: str = "lanczos",
        seed: int = 0,
        caption_dropout: float = 0.0,
        alpha_background: str = "white",
        on_bad_image: str = "skip",
        shuffle_buffer: int = 1000,  # rows that are mixed, and kept in memory as they lie in the files
        **_,  # what buckets want to know
    ):
        super().__init__(
            (),
            size=size,
            center_crop=center_crop,
            random_flip=random_flip,
            interpolation=interpolation,
            seed=seed,
            caption_dropout=caption_dropout,
            alpha_background=alpha_background,
        )
        self.instance, self.shuffle_buffer, self.on_bad_image = rows, shuffle_buffer, on_bad_image
        self._block: tuple | None = None  # (epoch, number), its rows

    def __len__(self) -> int:
        return len(self.instance)

    def captions(self) -> list[str]:
        return []  # nobody has read them all

    def fingerprint(self) -> str:
        rows = ["stream", self.shuffle_buffer, self.instance.facts()]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()

    def __getitem__(self, position: int) -> list[dict]:
        """The record of the first row of `_candidates` that can be used; or, where the policy ends the run, why."""
        number, shape = 2 * position, self.shapes[0]
        seen = min(len(self), position + self.shuffle_buffer)
        most = max(1, int(MOST_BAD * seen))
        try:
            for example in self._candidates(position):
                named = example.key in self.unreadable
                record = self._record(example, number, shape)
                if not record["lost"]:
                    break
                why, bad = self.unreadable[example.key], len(self.unreadable)
                if self.on_bad_image == "error":
                    record["lost"] = f"{why}; repair it and resume, or start a new run with --on_bad_image skip"
                    break
                if bad > most:
                    record["lost"] = f"{why}: {bad} of {seen} rows cannot be used, and at most {most} may be skipped"
                    break
                if not named:
                    errors.warn(f"{why}; skipped: the next row is used instead", everywhere=True)
        except images.BadImage as bad:  # a whole shard is gone: no policy about pictures covers that
            blank = self._blank(datasets.Example(None, "", key=bad.name), number, shape)
            record = blank | {"lost": f"{bad}; restore the file, then resume"}
        return [record]

    def _candidates(self, position: int) -> Iterator[datasets.Example]:
        """The row that is shown at a position, and those of its block that are used instead if it cannot be."""
        epoch, rest = divmod(position, len(self))
        number, place = divmod(rest, self.shuffle_buffer)
        start = number * self.shuffle_buffer
        if self._block is None or self._block[0] != (epoch, number):
            self._block = None  # before the next is read: never two in memory
            stop = min(start + self.shuffle_buffer, len(self))
            self._block = (epoch, number), lost.patiently(lambda: self._rows(epoch, start, stop))
        rows = self._block[1]
        course = randomness.order(self.seed, epoch * len(self) + start, len(rows), "rows of a block")
        for one in itertools.chain(course[place:], course[:place]):
            yield datasets.Example(rows[one].source(), rows[one].text, key=rows[one].name)

    def _rows(self, epoch: int, start: int, stop: int) -> list[Row]:
        """From `start` to `stop` of the course that `epoch` takes through the pieces."""
        pieces, starts = self._course(epoch)
        found = []
        while start < stop:
            which = bisect_right(starts, start) - 1
            piece = self.instance.pieces[pieces[which]]
            count = min(stop, starts[which] + piece.rows) - start
            found += self.instance.read(piece, start - starts[which], count)
            start += count
        return found

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as long as the run
    def _course(self, epoch: int) -> tuple[Sequence[int], list[int]]:
        pieces = randomness.order(self.seed, epoch, len(self.instance.pieces), "pieces")
        counts = (self.instance.pieces[number].rows for number in pieces)
        return pieces, list(itertools.accumulate(counts, initial=0))[:-1]

    def first_views(self, most: int):
        for position in range(min(most, len(self))):
            example = next(self._candidates(position))
            try:
                caption, flip, corner = self._view(example, 2 * position, self.shapes[0])
                picture = datasets.mirrored(self._picture(example, self.shapes[0], remember=False), flip)
            except images.BadImage:  # training will tell
                continue
            yield example, caption, picture, corner, self.shapes[0], None

    # Nothing is remembered of a row once it was shown. Its bytes are in memory: a second attempt would read the same.

    def _size_of(self, example) -> tuple[int, int]:
        return images.size_of(example.source)

    def _resized(self, key, read: Callable, shape: tuple[int, int], interpolation: str, remember: bool = True):
        return images.resize_to_cover(read(), shape, interpolation)
