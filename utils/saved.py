"""What a training script left behind, recognised on disk without loading it: LoRA files, checkpoints, the base model.

Everything here is read from names, JSON headers and small text files, so mistakes are told within milliseconds.
"""

import contextlib
import itertools
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from utils import errors, models, strict

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"  # the same for A1111, ComfyUI and kohya's scripts
PICKLED_LORA_FILE = "pytorch_lora_weights.bin"  # as in 2023
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # files that can run code when they are loaded carelessly
SETTINGS_FILE = "training_config.yaml"
WARN_ABOVE, REFUSE_ABOVE = 2, 10  # strengths of an adapter: beyond 2 few images hold, beyond 10 only noise is left
EMBEDDINGS_FILE = "learned_embeddings.safetensors"
STAGED = ".tmp-result-"  # while a result is replaced, the new one is in a folder of this name
READY = "ready.json"  # in it: names the files of the result; written when all of them are complete
EMBEDDINGS_KEYS = ("clip_l", "clip_g")  # in it, the rows of the first text encoder and of the second
ONE_ENCODER = "emb_params"  # the first's name in the files of one word where there is no second, as A1111 writes them
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Options of a run that are of its model, and what they may be in a settings file that anybody may have written.
CHANGED = {"prediction_type": str, "rescale_betas_zero_snr": bool, "clip_skip": int}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
MODULES = ("unet", "text_encoder", "text_encoder_2")  # what a full checkpoint can hold
UMASK = os.umask(0o077)  # it can only be read by being set
os.umask(UMASK)
# Options that name a folder of this machine or a repository of the hub, and those that only name places here.
NAMED = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "tokenizer_name", "dataset_name")
NAMED += ("sam_model_name_or_path", "clip_model_name_or_path", "dino_model_name_or_path")
PLACES = ("instance_data_dir", "class_data_dir", "train_data_dir", "masks_dir", "features_data_dir", "precomputed_dir")
PLACES += ("concepts_list", "validation_images", "cache_dir", "output_dir", "logging_dir", "wandb_dir")
HERE = "# Folders of this machine: "  # in training_config.yaml, before those of NAMED that were folders
ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")  # where something was read
AVERAGED = "_ema"  # in a checkpoint, behind the names of files and networks that hold the averages of the others


INTERRUPTED = (
    "its result was being replaced when the run ended; the training command with --resume_from_checkpoint latest "
    "completes it"
)


@dataclass
class Lora:
    given: str  # as the user wrote it, without the scale
    file: Path
    scale: float
    part: str = ""  # content or style: only that block of a B-LoRA


@dataclass
class Embeddings:
    file: Path
    names: list[str]  # of the tokens, a row each
    words: dict[str, str]  # word in prompts -> the tokens that were learned for it


@dataclass
class Base:
    name: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None  # that the run used instead of the model's own
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None
    clip_skip: int | None = None
    encoders: "Base | None" = None  # the model that brings the text encoders, where this one was saved without


def lora(text: str, wrong: list, option: str = "--lora", part: str = "", allow_pickle: bool = False) -> Lora | None:
    """`PATH[:SCALE]` -> the file that holds the adapters; a complaint is added to `wrong` when there is none."""
    path, scale = split_scale(text)
    complaints = []
    if not abs(scale) <= REFUSE_ABOVE:  # nan is not, either
        complaints.append(
            f"--lora {text}: the strength must be a number from -{REFUSE_ABOVE} to {REFUSE_ABOVE}; 0.5 to 1 is usual"
        )
    elif abs(scale) > WARN_ABOVE:
        errors.warn(f"{option} {text}: a strength beyond {WARN_ABOVE} usually destroys the image; 0.5 to 1 is usual")
    file = lora_file(path, complaints, allow_pickle)
    wrong += [complaint.replace("--lora", option, 1) for complaint in complaints]
    return Lora(path, file, scale, part) if file else None


def twice(loras: list) -> list[str]:
    """Complaints about adapters that were given more than once: their strengths would add up."""
    complaints = []
    for number, lora in enumerate(loras):
        for other in loras[:number]:
            same = other.file.resolve() == lora.file.resolve()
            if same and (other.part == lora.part or not (other.part and lora.part)):
                names = [f"{one.given}:{one.scale:g}" for one in (other, lora)]
                complaints.append(
                    f"--lora {' and '.join(names)} are the same file ({lora.file}), whose strengths would add up; "
                    "give it once, with one strength"
                )
    return complaints


def split_scale(text: str) -> tuple[str, float]:
    """A path may itself hold colons: only a number after the last one is a scale, and not if that path exists."""
    path, colon, scale = text.rpartition(":")
    if colon and path and not Path(text).exists():
        try:
            return path, float(scale)
        except ValueError:
            pass
    return text, 1.0


def lora_file(name: str, wrong: list, allow_pickle: bool = False) -> Path | None:
    path = Path(name).expanduser()
    if not path.exists():
        path = from_hub(name, wrong, allow_pickle)
        if path is None:
            return None
    if not path.is_dir():
        found = [path]
    elif (path / LORA_FILE).is_file():
        found = [path / LORA_FILE]
    else:
        found = sorted(file for file in path.glob("*.safetensors") if looks_like_lora(file))
    if not found and (path / PICKLED_LORA_FILE).is_file():
        found = [path / PICKLED_LORA_FILE]
    if interrupted(path):
        wrong.append(f"--lora {name}: {INTERRUPTED}")
    elif len(found) > 1:
        wrong.append(f"--lora {name} holds {len(found)} LoRA files; name one: {', '.join(file.name for file in found)}")
    elif not found and (path / "model_index.json").is_file():
        wrong.append(f"--lora {name} is a whole pipeline; give it as --pretrained_model_name_or_path")
    elif not found and any((path / module).is_dir() for module in MODULES):
        wrong.append(f"--lora {name} is a checkpoint of a full training run; give it as --checkpoint")
    elif not found:
        pickled = [file.name for file in path.iterdir() if file.suffix in PICKLES]
        remedy = f"; {pickled[0]} can run code when loaded: name the file and add --allow_pickle" if pickled else ""
        wrong.append(f"--lora {name} holds no LoRA (no {LORA_FILE}){remedy}")
    elif found[0].suffix in PICKLES and not allow_pickle:
        wrong.append(
            f"--lora {found[0]} is a pickle file, which can run code when loaded: add --allow_pickle to read only the "
            "tensors in it"
        )
    elif found[0].suffix not in (".safetensors", *PICKLES):
        wrong.append(f"--lora {name} is not a .safetensors file")
    elif problem := cut_short(found[0]):
        wrong.append(f"--lora {problem}")
    elif not looks_like_lora(found[0]):
        wrong.append(f"--lora {found[0]} holds no LoRA weights, or is damaged")
    else:
        return found[0]
    return None


def from_hub(name: str, wrong: list, allow_pickle: bool = False) -> Path | None:
    """A LoRA repository on the hub -> its folder in the local cache. Only names such as `user/lora` are looked up."""
    if not HUB_NAME.fullmatch(name) or "/" not in name or name.endswith((".safetensors", *PICKLES)):
        wrong.append(f"--lora {name} does not exist")
        return None
    file = fetched(name, LORA_FILE) or (allow_pickle and fetched(name, PICKLED_LORA_FILE))
    if not file:
        if not allow_pickle and on_hub(name, PICKLED_LORA_FILE):
            wrong.append(
                f"--lora {name} holds only {PICKLED_LORA_FILE}, a pickle file, which can run code when loaded: add "
                "--allow_pickle to read only the tensors in it"
            )
        else:
            wrong.append(f"--lora {name} is no folder here, and the hub gave no {LORA_FILE} under that name")
        return None
    for other in ("README.md", SETTINGS_FILE, EMBEDDINGS_FILE):  # the first two name the base model
        fetched(name, other)
    return file.parent


def fetched(name: str, file: str, revision: str | None = None) -> Path | None:
    """One file of a repository on the hub, in the local cache; None when it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        return None


def on_hub(name: str, file: str) -> bool:
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return file_exists(name, file)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return False


def embeddings(loras: list, given: list[str], wrong: list) -> list[Embeddings]:
    """Learned tokens beside the LoRA files, then those given; of a name that two have, the later one gets another."""
    files = [path for lora in loras if (path := lora.file.parent / EMBEDDINGS_FILE).is_file()]
    for name in given:
        path = Path(name).expanduser()
        files.append(path / EMBEDDINGS_FILE if path.is_dir() else path)
    found, taken = [], set()
    for file in dict.fromkeys(files):
        if problem := cut_short(file):
            wrong.append(f"--embeddings {problem}")
            continue
        entries = header(file)
        rows = {tuple(entries[key].get("shape", ()))[:1] for key in (*EMBEDDINGS_KEYS, ONE_ENCODER) if key in entries}
        if len(rows) != 1 or () in rows:
            wrong.append(f"--embeddings {file} holds no learned embeddings (clip_l, clip_g, emb_params), or is damaged")
            continue
        ((count,),) = rows
        try:
            told = json.loads(entries.get("__metadata__", {}).get("tokens", "{}"))
        except ValueError:
            told = {}
        names = [name for each in told.values() for name in each] or [f"<s{k}>" for k in range(count)]
        free = (name for k in itertools.count() if (name := f"<s{k}>") not in taken | set(names))
        renamed = {name: next(free) if name in taken else name for name in names}
        words = {word: "".join(renamed[name] for name in each) for word, each in told.items()}
        twice = [word for word in words for other in found if word in other.words]
        wrong += [f"--embeddings: two files teach {word}, {file} and another; give one of them" for word in twice]
        taken |= set(renamed.values())
        found.append(Embeddings(file, list(renamed.values()), words))
    return found


def word_files(words: Iterable[str]) -> dict[str, str]:
    """Word -> name of the file in which other programs find its rows, and by which their prompts call it. Safe on every
    system, and no two alike where case does not count: A1111 ignores it, and so do some file systems."""
    names, taken = {}, {"pytorch_lora_weights", "pytorch_lora_weights_kohya", "learned_embeddings"}
    for word in words:
        safe = re.sub(r"[^\w.-]+", "-", word).strip("-.")[:80] or "word"
        stems = (f"{safe}-{k}" if k else safe for k in itertools.count())
        stem = next(each for each in stems if each.casefold() not in taken)
        taken.add(stem.casefold())
        names[word] = f"{stem}.safetensors"
    return names


def word_of(file: Path) -> str | None:
    """The word whose rows a file holds, as a run writes one beside EMBEDDINGS_FILE; None for any other file."""
    if file.suffix != ".safetensors" or not file.is_file() or file.is_symlink():
        return None
    return header(file).get("__metadata__", {}).get("word")


def checkpoint(name: str, wrong: list) -> Lora | dict | None:
    """`checkpoint-N` -> a Lora, or {module name: folder} of a full training run."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        wrong.append(f"--checkpoint {name} is no folder; give the checkpoint-N of a run")
        return None
    if (folder / LORA_FILE).is_file():
        return lora(name, wrong)
    modules = {module: folder / module for module in MODULES if (folder / module / "config.json").is_file()}
    if not modules:
        inside = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
        remedy = f"; inside are {', '.join(inside)}" if inside else ""
        if (folder / "config.json").is_file():
            remedy = f"; it is one network: give the folder around it, {folder.parent}"
        wrong.append(f"--checkpoint {name} holds neither {LORA_FILE} nor unet/{remedy}")
    for module, path in modules.items():
        weights = list(path.glob("*.safetensors"))
        if not weights:
            wrong.append(f"--checkpoint {name} has no safetensors weights in {module}/")
        wrong += [f"--checkpoint: {problem}" for file in weights if (problem := cut_short(file))]
    return modules or None


def shared(path: str | Path) -> None:
    """A file, or the weights in a folder, as readable as new files are: safetensors writes for the owner alone."""
    path = Path(path)
    for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
        with contextlib.suppress(OSError):  # another person's, or on a mount without modes
            file.chmod(0o666 & ~UMASK)


def folders_here(settings: Mapping) -> list[str]:
    """Those of NAMED that are folders: known only where and while the run goes on, for `owner/name` may be both."""
    return [name for name in NAMED if isinstance(settings.get(name), str) and Path(settings[name]).exists()]


def without_origins(value):
    """A configuration without the places that its part was read from: no reader needs them, and they name the user."""
    if isinstance(value, dict):
        return {key: without_origins(entry) for key, entry in value.items() if key not in ORIGINS}
    return [without_origins(entry) for entry in value] if isinstance(value, list) else value


def forget_origins(folder: str | Path) -> None:
    """In every *config.json and model_index.json of a part or pipeline that was saved just now."""
    for file in [*Path(folder).rglob("*config.json"), *Path(folder).glob("model_index.json")]:
        told = json.loads(file.read_text(encoding="utf-8"))
        if (kept := without_origins(told)) != told:
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def snapshot_steps(total_steps: int, given: int | None, interval: int) -> int:
    """Optimizer steps between snapshots of averages: a twentieth of the run, rounded up to an update."""
    return given or math.ceil(total_steps / 20 / interval) * interval


def marked(path: Path, mark: str) -> Path:
    """unet, weights.safetensors => unet_ema, weights_ema.safetensors"""
    return path.with_name(path.stem + mark + path.suffix)


def averaged(path: Path) -> Path:
    """What to draw with: the averages beside a file or network of a checkpoint, where there are some, for they are
    what its run draws and saves in the end."""
    averages = marked(path, AVERAGED)
    if (path.parent / "ema.safetensors").is_file():  # where they stood before they had the weights' own format
        errors.refuse(f"{path.parent} keeps its averages in ema.safetensors, as earlier versions did; draw with those")
    return averages if averages.exists() and (path.parent / "manifest.json").is_file() else path


def with_averages(file: Path, averages: dict, target: Path) -> Path:
    """A copy of a file of adapters or tokens that holds these averages instead of its weights."""
    from safetensors.torch import load_file, save_file

    from utils.adapters.files import own_key

    whole = load_file(file)
    names = {own_key(key): key for key in whole}  # averages have one naming, whatever the file's is
    for key, average in averages.items():
        # The file holds more than what learns: alphas, and in PiSSA and OLoRA files of earlier versions as many frozen
        # ranks after the learned ones. And tokens that were learned beside the adapters have a file of their own.
        if key := names.get(key):
            whole[key][tuple(slice(size) for size in average.shape)] = average
    told = header(file).get("__metadata__") or {}
    # The hashes are of the weights that were replaced.
    save_file(whole, str(target), metadata={key: text for key, text in told.items() if not key.startswith("sshs_")})
    shared(target)
    return target


def base(given: str | None, loras: list, full_checkpoint: str | None, wrong: list) -> Base | None:
    """The base model: the one given, else the one that everything saved agrees on."""
    files = ([Path(full_checkpoint).expanduser()] if full_checkpoint else []) + [lora.file for lora in loras]
    if given:
        path = Path(given).expanduser()
        if interrupted(path):
            wrong.append(f"--pretrained_model_name_or_path {given}: {INTERRUPTED}")
            return None
        if path.is_dir() and not is_pipeline(given):
            option = "--lora" if (path / LORA_FILE).is_file() else "--checkpoint" if (path / "unet").is_dir() else None
            remedy = f"; what it holds belongs to {option}" if option else ""
            wrong.append(f"--pretrained_model_name_or_path {given} is no pipeline folder (no model_index.json){remedy}")
            return None
        return as_trained(Base(given), [*files, *([path] if path.is_dir() else [])])
    if not files:
        wrong.append("there is no model; give --pretrained_model_name_or_path, --lora or --checkpoint")
        return None
    found = {each.name: each for file in files if (each := recorded_base(file))}
    if not found:
        wrong.append(f"no base model is recorded beside {files[0]}; give --pretrained_model_name_or_path")
    elif len(found) > 1:
        names = ", ".join(sorted(found))
        wrong.append(f"what was saved belongs to several base models ({names}); give --pretrained_model_name_or_path")
    return as_trained(next(iter(found.values())), files) if len(found) == 1 else None


def as_trained(base: Base, paths: list[Path]) -> Base:
    """What the options of a run changed about its model holds wherever that is taken from now; the first run that
    left its settings decides. Without settings a file's header may say that it learned velocities; `epsilon` there
    says nothing of a base that predicts velocities: such adapters are commonly put on both."""
    records = (record for path in paths if (record := settings_of(path)))
    settings = next(records, {})
    for name in CHANGED:
        setattr(base, name, settings.get(name))
    if not base.prediction_type and any(said_to_predict(path) == "v" for path in paths):
        base.prediction_type = "v_prediction"
    return base


def settings_of(path: Path) -> dict:
    """The settings that a run left beside a file or in a folder; values of another type are left out."""
    for place in _places(path):
        found = read_yaml(place / SETTINGS_FILE)
        if "pretrained_model_name_or_path" in found:
            strange = [name for name, kind in CHANGED.items() if not isinstance(found.get(name), kind)]
            strange += ["prediction_type"] if found.get("prediction_type") not in PREDICTION_TYPES else []
            return {name: value for name, value in found.items() if name not in strange}
    return {}


def said_to_predict(path: Path) -> str | None:
    """What the header of a file of adapters says: v or epsilon."""
    told = header(path).get("__metadata__", {}) if path.is_file() else {}
    return told.get("modelspec.prediction_type")


def _places(path: Path) -> tuple[Path, ...]:
    """Where a run may have written down what it was: beside the file, for a checkpoint also beside that."""
    folder = path if path.is_dir() else path.parent
    return (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)


def recorded_base(path: Path) -> Base | None:
    """The base model as a run wrote it down: in its settings, the adapter file, or the model card.

    A run may have been moved since: the first record that still leads to a model counts, else the first one, so that
    the complaint can name it.
    """
    records = []
    for place in _places(path):
        settings = read_yaml(place / SETTINGS_FILE)
        if name := settings.get("pretrained_model_name_or_path"):
            own = {"vae": settings.get("pretrained_vae_model_name_or_path")}
            records.append(Base(str(name), settings.get("revision"), settings.get("variant"), **own))
        if name := read_yaml(place / "README.md").get("base_model"):
            records.append(Base(str(name[0] if isinstance(name, list) else name)))
    if path.is_file() and (name := header(path).get("__metadata__", {}).get("base_model")):
        records.append(Base(name))
    here = (record for record in records if is_pipeline(record.name))
    on_the_hub = (record for record in records if HUB_NAME.fullmatch(record.name))
    return next(here, None) or next(on_the_hub, None) or next(iter(records), None)


def interrupted(folder: Path) -> bool:
    """A kill came while the result was being replaced: what the folder holds may be of two runs."""
    return any((staged / READY).is_file() for staged in folder.glob(f"{STAGED}*"))


def is_pipeline(name: str) -> bool:
    return Path(models.resolve(name)).expanduser().joinpath("model_index.json").is_file()


def lent_encoders(base: Base, parts: dict, wrong: list) -> Base | None:
    """Where the text encoders of a pipeline that was saved without them are found: in the base that its run recorded.

    parts: its model_index.json.
    """
    lacking = without(parts)
    if not lacking:
        return None
    folder = Path(models.resolve(base.name)).expanduser()
    if not folder.is_dir():
        file = fetched(base.name, SETTINGS_FILE, base.revision) or fetched(base.name, "README.md", base.revision)
        folder = file.parent if file else folder
    recorded = recorded_base(folder)
    if recorded and (is_pipeline(recorded.name) or _is_on_hub(recorded)):
        if any(name in without(models.read_index(recorded.name, recorded.revision)) for name in lacking):
            wrong.append(f"{base.name} has no {' or '.join(lacking)}, and {recorded.name}, its base, neither")
        return recorded
    found = f"its recorded base {recorded.name} is not found" if recorded else "no base is recorded in it"
    wrong.append(
        f"{base.name} was saved without {' and '.join(lacking)}, and {found}; name the base with "
        f"--pretrained_model_name_or_path, and give {base.name} as --checkpoint"
    )
    return None


def without(parts: dict) -> list[str]:
    """The text encoders that a model_index.json names as absent."""
    return [name for name in MODULES[1:] if name in parts and not any(parts[name] or ())]


def _is_on_hub(base: Base) -> bool:
    return bool(HUB_NAME.fullmatch(base.name)) and fetched(base.name, "model_index.json", base.revision) is not None


def misfit(lora: Lora, base_name: str, parts: dict) -> str | None:
    """Why a LoRA cannot belong to a base model, as far as names and shapes tell; None if it may.

    parts: the base's model_index.json. Widths are compared only for a base in a local folder.
    """
    tensors = {name: value.get("shape", []) for name, value in header(lora.file).items() if name != "__metadata__"}
    if any(re.match(r"text_encoder_2\.|lora_te2_", name) for name in tensors) and "text_encoder_2" not in parts:
        return f"--lora {lora.given} belongs to a model with two text encoders (SDXL), {base_name} has one"
    folder = Path(models.resolve(base_name)).expanduser()
    writes = read_json(folder / "unet" / "config.json").get("cross_attention_dim")
    reads = [
        shape for name, shape in tensors.items() if re.search(r"attn2.(?:processor.)?to_k.*(lora_A|lora[._]down)", name)
    ]
    if isinstance(writes, int) and reads and reads[0][1:] != [writes]:
        return (
            f"--lora {lora.given} belongs to a model of another family: it reads text of width {reads[0][-1]}, "
            f"that of {base_name} has {writes}"
        )
    return None


# Small readers. A file that is missing or broken says nothing; what needs it complains.


def header(file: Path) -> dict:
    """A safetensors file's JSON header: {tensor name: {dtype, shape}}, "__metadata__"; the like of a pickle."""
    if not file.is_file():  # a named pipe would be waited for
        return {}
    if file.suffix in PICKLES:
        return {name: {"shape": list(tensor.shape)} for name, tensor in unpickled(file).items()}
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(file.stat().st_size, 100_000_000):
                return {}
            found = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error):
        return {}
    return found if isinstance(found, dict) else {}


def whole_header(file: Path) -> dict:
    """The table of contents of a safetensors file; ValueError where the file is cut short or is something else."""
    try:
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            entries = json.loads(opened.read(min(length, 100_000_000)))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (struct.error, ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"'{file}' is damaged: it is no safetensors file") from None
    expected, found = 8 + length + max(ends, default=0), file.stat().st_size
    if found != expected:
        raise ValueError(f"'{file}' is damaged: {found} bytes, its header says {expected}")
    return entries


def cut_short(file: Path) -> str | None:
    """What is wrong with a safetensors file whose header promises another size; None for one that is whole."""
    try:
        if file.suffix == ".safetensors" and file.is_file():
            whole_header(file)
    except (OSError, ValueError) as problem:
        return f"{problem}; copy or download it again"
    return None


def parts_cut_short(name: str) -> list[str]:
    """What is wrong with the weights of a pipeline in a folder here."""
    folder = Path(models.resolve(name)).expanduser()
    return [problem for file in sorted(folder.glob("*/*.safetensors")) if (problem := cut_short(file))]


def unpickled(file: Path) -> dict:
    """The tensors of a pickle, which runs nothing: torch's own reader refuses everything that is not one."""
    import pickle

    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as problem:
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        errors.refuse(f"{file} cannot be read as tensors and nothing else ({reason[:120]})")
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        errors.refuse(f"{file} does not hold a dictionary of tensors, so it is not a LoRA file that can be read")
    return found


def looks_like_lora(file: Path) -> bool:
    return any("lora" in name.lower() for name in header(file) if name != "__metadata__")


def read_json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_yaml(file: Path) -> dict:
    """A YAML file, or the front matter of a Markdown file."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".md":
            text = text.split("---\n")[1] if text.startswith("---\n") else ""
        found = strict.yaml(text)
    except (OSError, IndexError):
        return {}
    except ValueError as problem:
        errors.warn(f"{file} cannot be read and is ignored: {problem}")
        return {}
    return found if isinstance(found, dict) else {}
