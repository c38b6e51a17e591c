"""How alike, how obedient, how varied drawn pictures are, in the numbers that papers about personalising report.

    *_i     likeness: mean cosine of drawn pictures and photos (LPIPS: mean distance, less is more alike)
    *_t     obedience: mean cosine of a picture and its prompt, without the identifier that no judge knows
    *_d     variety: mean distance of two pictures drawn for the same prompt
    *_pres  mean cosine of pictures that are not to show the subject and its photos: as high as *_i, all look like it

CLIP-I, CLIP-T and DINO as in Ruiz et al. 2022 (arXiv 2208.12242), section 4.2, and PRES and DIV as in its section 4.3
(DIV is lpips_d, PRES dino_pres). Nothing heavy is imported before something is measured.
"""

import importlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils import errors, images, models

NAMES = ("clip", "dino", "lpips", "judge")
KINDS = {"i": "likeness to the photos", "t": "agreement with the prompt", "d": "variety", "pres": "class likeness"}
KINDS |= {"style": "likeness to the training pictures"}
SCORE = re.compile(rf"(?:test_)?({'|'.join(NAMES)})_({'|'.join(KINDS)})")
# Words that tell no subject from its class.
COMMON = {"a", "an", "the", "my", "one", "of", "in", "on", "at", "with", "and", "or", "is"}
COMMON |= {"photo", "picture", "image", "painting", "drawing"}
AT_ONCE = 32  # pictures
TAUGHT = 64  # of the training pictures stand for all of them
LPIPS_SIDE = 256  # pixels, at which its networks learned


@dataclass(frozen=True)
class Subject:
    """Whom a prompt may be about."""

    identifier: frozenset[str] = frozenset()  # words, lower case; empty: every prompt is about it
    photos: Sequence[Any] = field(default=(), hash=False)  # whatever images.open_rgb takes, or PIL images
    noun: frozenset[str] = frozenset()  # what it is, where there are others

    def is_meant(self, prompt: str) -> bool:
        return not self.identifier or bool(self.identifier & set(words(prompt)))

    def is_of_its_class(self, prompt: str) -> bool:
        return not self.noun or bool(self.noun & set(words(prompt)))


def meanings(names: Iterable[str]) -> dict[str, str]:
    """Those of a run's numbers that are scores, and what each of them tells."""
    found = {name: match for name in names if (match := SCORE.fullmatch(name))}
    texts = {name: KINDS[match[2]] for name, match in found.items()}
    return texts | {name: "distance from the photos" for name in texts if name.endswith("lpips_i")}


def words(text: str) -> list[str]:
    return re.findall(r"[^\s.,;:!?\"'()]+", text.lower())


def without(prompt: str, identifier: Iterable[str]) -> str:
    """The prompt as somebody who does not know the identifier would say it."""
    kept = [word for word in prompt.split() if not set(words(word)) & set(identifier)]
    return " ".join(kept)


def subjects(concepts: Sequence, examples: Sequence, identifier: str | None = None, tokens: Sequence[str] = ()) -> list:
    """Each concept's photos. Its identifier is what its instance prompt first says beyond its class prompt."""
    found = []
    for number, concept in enumerate(concepts):
        photos = [one.source for one in examples if one.concept == number]
        said, of_class = words(concept.instance_prompt or ""), set(words(concept.class_prompt or ""))
        own = set(words(identifier or "")) | set(map(str.lower, tokens))
        own &= set(said) or own
        if not own and of_class:
            own = set(_first_run(said, of_class | COMMON))
        found.append(Subject(frozenset(own), photos, frozenset(of_class - COMMON)))
    return [subject for subject in found if subject.photos]


def _first_run(said: Sequence[str], known: set[str]) -> Iterable[str]:
    """The first words on end that are not known."""
    rest = itertools.dropwhile(known.__contains__, said)
    return itertools.takewhile(lambda word: word not in known, rest)


class Scores:
    """`measure(pictures, prompts)` => {"clip_i": 0.71, ...}; what cannot be told from the pictures is left out."""

    def __init__(self, judges: Mapping[str, Any], subjects: Sequence[Subject] = (), taught: Sequence = ()):
        self.judges, self.subjects = judges, subjects
        self.taught = taught  # pictures of no subject, but of a style
        self._seen: dict[tuple, Any] = {}  # of the photos, which do not change

    def __bool__(self) -> bool:
        return bool(self.judges)

    def measure(self, pictures: Sequence, prompts: Sequence[str]) -> dict[str, float]:
        """pictures: PIL; prompts: one a picture."""
        import torch

        found: dict[str, float] = {}
        if not pictures:
            return found
        about = [[subject for subject in self.subjects if subject.is_meant(prompt)] for prompt in prompts]
        with torch.no_grad():
            for name, judge in self.judges.items():
                with judge:
                    found |= {f"{name}_{kind}": value for kind, value in self._one(judge, pictures, prompts, about)}
        return found

    def _one(self, judge, pictures, prompts, about):
        seen = judge.see([square(picture) for picture in pictures])
        alike, others = [], []
        several = len(self.subjects) > 1
        for number, subject in enumerate(self.subjects):
            photos = self._photos(judge, number)
            shown = [i for i, meant in enumerate(about) if subject in meant]
            rest = [i for i, meant in enumerate(about) if not meant]
            rest = [i for i in rest if not several or subject.is_of_its_class(prompts[i])]
            alike += [judge.compare(seen[shown], photos).flatten()] if shown else []
            others += [judge.compare(seen[rest], photos).flatten()] if rest else []
        yield from [("i", _mean(alike))] if alike else ()
        yield from [("pres", _mean(others))] if others and judge.cosine else ()
        if self.taught and judge.cosine:
            if (judge.name, "taught") not in self._seen:
                self._seen[judge.name, "taught"] = judge.learn([square(opened(source)) for source in self.taught])
            like = judge.style(seen, pictures, self._seen[judge.name, "taught"])
            yield from [("style", like)] if like == like else ()
        # The rest is about the subject's prompts alone, if there are any: its class is easier to draw and more varied.
        shown = [i for i, meant in enumerate(about) if meant] or list(range(len(prompts)))
        known = {word for subject in self.subjects for word in subject.identifier}
        obeyed = judge.obeyed(seen[shown], [pictures[i] for i in shown], [without(prompts[i], known) for i in shown])
        told = obeyed[~obeyed.isnan()] if obeyed is not None else ()
        yield from [("t", float(told.mean()))] if len(told) else ()
        spread = []
        for prompt in dict.fromkeys(prompts[i] for i in shown):
            own = [i for i in shown if prompts[i] == prompt]
            pairs = list(itertools.combinations(range(len(own)), 2))
            if pairs:
                table = judge.compare(seen[own], seen[own])
                mean = sum(float(table[a, b]) for a, b in pairs) / len(pairs)
                spread.append(1 - mean if judge.cosine else mean)
        yield from [("d", sum(spread) / len(spread))] if spread else ()

    def _photos(self, judge, number: int):
        if (judge.name, number) not in self._seen:
            photos = [square(opened(source)) for source in self.subjects[number].photos]
            self._seen[judge.name, number] = judge.see(photos)
        return self._seen[judge.name, number]


def _mean(parts: Sequence) -> float:
    import torch

    return float(torch.cat(list(parts)).mean())


def opened(source):
    return source if hasattr(source, "convert") else images.open_rgb(source)


def square(picture):
    """The centre, as large as it can be: what a crop for training shows."""
    from PIL import ImageOps

    side = min(picture.size)
    return ImageOps.fit(picture.convert("RGB"), (side, side))


class Network:
    """A judge whose network is on the device only while it looks."""

    cosine = True  # compare() gives cosines; otherwise distances

    def __init__(self, name: str, device="cpu"):
        self.name, self.device, self.network = name, device, None

    def ready(self) -> "Network":
        """Loaded before training: what is missing must not be found out after it."""
        self.network = self.network or self.load().eval().requires_grad_(False)
        return self

    def __enter__(self):
        try:
            self.ready().network.to(self.device)
        except RuntimeError:  # no room for all of it: no part of it must stay
            self.__exit__()
            raise
        return self

    def __exit__(self, *problem) -> None:
        import torch

        self.network.to("cpu")
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    def see(self, pictures: Sequence):
        """=> (n, d) unit vectors, in main memory."""
        import torch
        import torch.nn.functional as F

        parts = [self.embed(pictures[i : i + AT_ONCE]).float().cpu() for i in range(0, len(pictures), AT_ONCE)]
        return F.normalize(torch.cat(parts), dim=1)

    def compare(self, some, others):
        return some @ others.T

    def learn(self, taught: Sequence):
        """What `style` compares with, of training pictures that show no subject."""
        return self.see(taught)

    def style(self, seen, pictures: Sequence, learned) -> float:
        return float(self.compare(seen, learned).mean())

    def obeyed(self, seen, pictures: Sequence, prompts: Sequence[str]):
        return None


class Clip(Network):
    def __init__(self, source: str, device="cpu", allow_pickle: bool = False):
        super().__init__("clip", device)
        self.source, self.allow_pickle = source, allow_pickle

    def load(self):
        from transformers import CLIPModel, CLIPProcessor

        self.processor, network = _loaded(CLIPProcessor, CLIPModel, self.source, "clip", self.allow_pickle)
        return network

    def embed(self, pictures):
        told = self.processor.image_processor(pictures, return_tensors="pt").to(self.device)
        return self.network.get_image_features(**told).pooler_output

    def obeyed(self, seen, pictures, prompts):
        import torch.nn.functional as F

        distinct = list(dict.fromkeys(prompts))
        limit = self.network.config.text_config.max_position_embeddings
        told = self.processor.tokenizer(
            distinct, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self.device)
        heard = F.normalize(self.network.get_text_features(**told).pooler_output.float().cpu(), dim=1)
        return (seen * heard[[distinct.index(prompt) for prompt in prompts]]).sum(1)


class Dino(Network):
    def __init__(self, source: str, device="cpu", allow_pickle: bool = False):
        super().__init__("dino", device)
        self.source, self.allow_pickle = source, allow_pickle

    def load(self):
        from transformers import AutoImageProcessor, AutoModel

        self.processor, network = _loaded(AutoImageProcessor, AutoModel, self.source, "dino", self.allow_pickle)
        return network

    def embed(self, pictures):
        told = self.processor(pictures, return_tensors="pt").to(self.device)
        return self.network(**told).last_hidden_state[:, 0]  # the class token


class Lpips(Network):
    """Learned distance of two pictures (Zhang et al. 2018, arXiv 1801.03924), by torchmetrics, with AlexNet."""

    cosine = False

    def __init__(self, device="cpu"):
        super().__init__("lpips", device)

    def load(self):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex").net

    def see(self, pictures):
        """Their pixels: what is compared are pairs. (n, 3, s, s) in [-1, 1]"""
        import torch

        return torch.stack([images.to_tensor(one.resize((LPIPS_SIDE, LPIPS_SIDE))) for one in pictures])

    def compare(self, some, others):
        import torch

        rows = [self.network(one.expand_as(others).to(self.device), others.to(self.device)) for one in some[:, None]]
        return torch.stack([row.flatten().float().cpu() for row in rows])


def embedded(device="cpu") -> Network:
    """The judge that comes with the embedded models. Its configuration names its class, as `module:class`."""
    folder = models.ROOT / models.EMBEDDED["toybox-judge"]
    module, name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["class"].split(":")
    return getattr(importlib.import_module(module), name)(device)


def _loaded(processors, networks, source: str, option: str, allow_pickle: bool):
    """=> (processor, network); a network that lacks weights would judge by chance."""
    how = {"trust_remote_code": False, "local_files_only": is_here(source)}
    try:
        processor = processors.from_pretrained(source, **how)
        how |= {"use_safetensors": None if allow_pickle else True, "output_loading_info": True}
        network, told = networks.from_pretrained(source, **how)
    except Exception as problem:  # no such model, offline, no safetensors, of another kind
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        errors.refuse(f"--{option}_model_name_or_path {source} cannot be loaded: {reason}")
    if missing := sorted(name for name in told["missing_keys"] if not name.startswith("pooler.")):  # nobody asks it
        errors.refuse(f"--{option}_model_name_or_path {source} lacks weights, among them {', '.join(missing[:3])}")
    return processor, network


def wanted(names: Sequence[str], base: str, clip: str, dino: str) -> list[str]:
    """Which judges `auto` means: embedded models have their own, of the others those that need no download."""
    if "auto" not in names:
        return [name for name in names if name != "none"]
    if base in models.EMBEDDED:
        return ["judge"]
    return [name for name, source in (("clip", clip), ("dino", dino)) if is_here(source)]


def is_here(source: str) -> bool:
    """A folder, or in the hub's cache."""
    import os

    from huggingface_hub import try_to_load_from_cache

    if os.path.isdir(source):
        return True
    try:
        needed = ("config.json", "preprocessor_config.json", "model.safetensors")
        return all(isinstance(try_to_load_from_cache(source, name), str) for name in needed)
    except ValueError:  # huggingface_hub's word for a name that is none
        return False


def create(
    run,
    examples: Sequence = (),  # what is learned from: photos, each knowing its concept, or, without concepts, pictures
    concepts: Sequence = (),
    *,
    identifier: str | None = None,
    train_text_encoder_ti: bool = False,
    token_abstraction: Sequence[str] = (),
    scores: Sequence[str] = ("auto",),
    validation_prompt: Sequence[str] = (),
    num_validation_images: int = 1,
    test_prompts: Sequence[str] = (),
    num_test_imgs_per_prompt: int = 1,
    pretrained_model_name_or_path: str = "",
    clip_model_name_or_path: str = "",
    dino_model_name_or_path: str = "",
    allow_pickle: bool = False,
) -> Scores:
    """What the options of a script ask for; the main process measures it."""
    drawn = (validation_prompt and num_validation_images) or (test_prompts and num_test_imgs_per_prompt)
    if not (run.is_main and drawn):
        return Scores({})
    tokens = token_abstraction if train_text_encoder_ti else ()
    found = judges(
        scores,
        run.device,
        pretrained_model_name_or_path,
        clip_model_name_or_path,
        dino_model_name_or_path,
        allow_pickle,
    )
    if concepts:
        return Scores(found, subjects(concepts, examples, identifier, tokens))
    few = min(TAUGHT, len(examples))
    return Scores(found, taught=[examples[k * len(examples) // few].source for k in range(few)])


def judges(names: Sequence[str], device, base: str, clip: str, dino: str, allow_pickle: bool = False) -> dict:
    """The networks of --scores, loaded."""
    makers = {
        "clip": lambda: Clip(clip, device, allow_pickle),
        "dino": lambda: Dino(dino, device, allow_pickle),
        "lpips": lambda: Lpips(device),
        "judge": lambda: embedded(device),
    }
    return {name: makers[name]().ready() for name in wanted(names, base, clip, dino)}
