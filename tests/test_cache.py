"""Cached latents must be the latents: same rows, same draws, other pictures' never."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from utils import cache, datasets, lost
from utils.randomness import Draws


class Run(SimpleNamespace):
    def __init__(self, rank=0, world=1):
        super().__init__(rank=rank, world=world, is_main=rank == 0, device=torch.device("cpu"), stopping=False)
        self.phases = []

    def say(self, text):
        if self.is_main:
            print(text)

    @contextlib.contextmanager
    def phase(self, name):
        self.phases.append(name)
        yield


class Family:
    """Its "VAE" shrinks by 2 and gives every picture a posterior of its own; it counts what it encodes."""

    caches_latents = True

    def __init__(self):
        self.encoded, self.released, self.sizes = 0, 0, []

    def posterior(self, pixels):
        assert not self.released
        self.encoded += len(pixels)
        self.sizes.append(len(pixels))
        mean = torch.nn.functional.avg_pool2d(pixels, 2)
        mean = torch.cat([mean, mean[:, :1] ** 2], dim=1)  # (b, 4, h, w)
        return mean, mean.abs() * 0.1 + 0.01

    def latents(self, batch, draws):
        mean, std = (
            (batch["latent_mean"], batch["latent_std"]) if "latent_mean" in batch else self.posterior(batch["pixels"])
        )
        return mean + std * draws.normal("posterior", mean.shape[1:])

    def release_image_encoder(self):
        self.released += 1


def examples(count, is_class=False, size=(16, 16)):
    noise = [Image.effect_noise(size, 70).convert("RGB") for _ in range(count)]
    return [datasets.Example(one, "p", is_class, f"{is_class}{number}") for number, one in enumerate(noise)]


def some(dataset, count=8, batch=3):
    return list(itertools.islice(datasets.loader(dataset, batch), count))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "center"), [((16, 16), False), ((33, 20), True)])
def test_cached_equals_uncached_given_the_same_draws(flip, size, center):
    dataset = datasets.DreamBooth(
        examples(5, size=size), examples(3, True, size=size), size=16, center_crop=center, random_flip=flip, seed=2
    )
    family = Family()
    uncached = [(batch, family.latents(batch, Draws(2, batch["ids"]))) for batch in some(dataset)]
    run, family = Run(), Family()
    cache.latents(run, family, dataset, "on")
    assert family.encoded == 8 * (1 + flip) and family.released == 1 and run.phases == ["caching latents"]
    for batch, (before, expected) in zip(some(dataset), uncached, strict=True):
        assert "pixels" not in batch and batch["latent_mean"].dtype == torch.float32
        assert torch.equal(family.latents(batch, Draws(2, batch["ids"])), expected)
        for name in ("ids", "is_class", "crop_top_left", "original_size"):
            assert torch.equal(batch[name], before[name])
        assert batch["keys"] == before["keys"] and batch["captions"] == before["captions"]
    assert not dataset._remembered, "pictures are not kept beside their latents"
    if flip:
        one, other = (dataset.latents.get("False0", mirrored, (16, 16))[0] for mirrored in (False, True))
        assert not torch.equal(one, other)


def test_sampling_stays_stochastic():
    dataset = datasets.DreamBooth(examples(1), size=16)
    cache.latents(Run(), family := Family(), dataset, "auto")
    one, other = some(dataset, count=2, batch=1)
    assert not torch.equal(family.latents(one, Draws(0, one["ids"])), family.latents(other, Draws(0, other["ids"])))


def test_repeats_and_copies_are_encoded_once(capsys):
    one, other = examples(2)
    copy = datasets.Example(one.source, "another caption", key=one.key)
    dataset = datasets.DreamBooth([one, other, copy], size=16, repeats=10)
    cache.latents(Run(), family := Family(), dataset, "on")
    assert family.encoded == 2 and dataset.latents.bytes == 2 * 2 * 4 * 8 * 8 * 4
    assert capsys.readouterr().out == "2 latents cached\n", "without 0.0 MiB"


def test_many_pictures_go_in_small_batches():
    dataset = datasets.DreamBooth(examples(35), size=16)
    cache.latents(Run(), family := Family(), dataset, "on")
    assert family.sizes == [16, 16, 3] and len(dataset.latents.rows) == 35


def test_varying_crops(capsys):
    dataset = datasets.DreamBooth(examples(2, size=(40, 16)), size=16)
    cache.latents(Run(), family := Family(), dataset, "auto")
    assert dataset.latents is None and family.encoded == family.released == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "--center_crop" in out
    cache.latents(Run(rank=1, world=2), family, dataset, "auto")
    assert capsys.readouterr().out == "", "one line for all processes"
    with pytest.raises(SystemExit) as stop:
        cache.latents(Run(), family, dataset, "on")
    assert stop.value.code == 2 and "--cache_latents" in capsys.readouterr().err


def test_off_and_too_large(monkeypatch, capsys):
    dataset = datasets.DreamBooth(examples(2), size=16)
    cache.latents(Run(), family := Family(), dataset, "off")
    assert dataset.latents is None and family.encoded == 0
    monkeypatch.setattr(cache, "AUTO_LIMIT", 100)
    cache.latents(Run(), family, dataset, "auto")
    assert dataset.latents is None and not family.released and "memory" in capsys.readouterr().out
    cache.latents(Run(), family, dataset, "on")
    assert dataset.latents is not None


def test_a_photo_that_vanished_after_the_preflight_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lost, "RETRIES", ())
    for size in ((16, 16), (32, 16)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        dataset = datasets.DreamBooth(datasets.folder(tmp_path, "p"), size=16)
        (tmp_path / "a.png").unlink()
        with pytest.raises(SystemExit) as stop:
            cache.latents(Run(), Family(), dataset, "auto")
        assert stop.value.code == 3 and "a.png' cannot be read: No such file" in capsys.readouterr().err


def test_a_signal_leaves_everything_as_it_was():
    run = Run()
    run.stopping = True
    dataset = datasets.DreamBooth(examples(2), size=16)
    cache.latents(run, family := Family(), dataset, "on")
    assert dataset.latents is None and not family.released


def test_two_ranks_share_the_work(monkeypatch):
    import accelerate.utils

    family = Family()
    alone = datasets.DreamBooth(examples(5), size=16, random_flip=True)
    cache.latents(Run(), Family(), alone, "on")
    sent = {}
    for rank in (0, 1, 0):  # the last one meets what both of them sent
        dataset = datasets.DreamBooth(alone.instance, size=16, random_flip=True)

        def gather(mine, rank=rank):
            sent[rank] = mine
            return list(itertools.chain.from_iterable(sent.values()))

        monkeypatch.setattr(accelerate.utils, "gather_object", gather)
        family = Family()
        cache.latents(Run(rank, 2), family, dataset, "on")
        assert family.encoded == 5
    assert list(dataset.latents.rows) == list(alone.latents.rows)
    for row, parts in alone.latents.rows.items():
        assert all(map(torch.equal, parts, dataset.latents.rows[row]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_pinned():
    dataset = datasets.DreamBooth(examples(2), size=16)
    cache.latents(Run(), Family(), dataset, "on")
    (batch,) = some(dataset, count=1)
    assert batch["latent_mean"].is_pinned()


def test_a_real_vae(sd1):
    """Cached and uncached through a diffusers VAE: equal up to what the batch size does to fp32 convolutions."""
    from utils import models

    dataset = datasets.DreamBooth(examples(3, size=(64, 64)), size=64, random_flip=True)
    family = models.family_of(str(sd1))
    family.load("cpu", torch.float32, parts=("vae",))
    uncached = [family.latents(batch, Draws(0, batch["ids"])) for batch in some(dataset, count=3, batch=2)]
    cache.latents(Run(), family, dataset, "on")
    for batch, expected in zip(some(dataset, count=3, batch=2), uncached, strict=True):
        torch.testing.assert_close(family.latents(batch, Draws(0, batch["ids"])), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="released"):
        family.posterior(torch.zeros(1, 3, 64, 64))
