"""Whether the base model is there and whole, told in one sentence from names, JSON and file headers alone."""

import argparse
import json
import re
from pathlib import Path

from utils import models, samplers
from utils.arguments import relations
from utils.preflight import plan, remote

# model_type in config.json of what --scores may name
JUDGES = {"clip": ("clip",), "dino": ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")}
PARTS = (*plan.NETWORKS, "tokenizer", "tokenizer_2", "scheduler")


def find(args: argparse.Namespace) -> tuple[Path | None, str | None]:
    """(the pipeline's folder, here or in the hub's cache, or None; a complaint or None)."""
    name = models.resolve(args.pretrained_model_name_or_path)
    folder, problem = Path(name), None
    if folder.is_file():
        problem = (
            "is a single file; a pipeline folder is needed: load it once with"
            " StableDiffusionPipeline.from_single_file and save it with save_pretrained"
        )
    elif folder.is_dir():
        problem = _incomplete(folder, args)
    else:
        folder, problem = _from_hub(name, args.revision)
        if folder and remote.offline():  # what the cache lacks cannot be fetched later
            problem = _incomplete(folder, args)
    if problem:
        return None, f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path} {problem}"
    return folder, None


def _incomplete(folder: Path, args: argparse.Namespace) -> str | None:
    """What a pipeline folder lacks."""
    if not (folder / "model_index.json").is_file():
        return "is a folder without model_index.json, so it is no diffusers pipeline"
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        kind = models.class_name(index)
    except (ValueError, AttributeError) as problem:
        return f"has a model_index.json that cannot be read: {problem}"
    if kind not in models.FAMILIES:
        return f"is a {kind}: {models.LATER.get(kind, 'this script trains ' + ', '.join(models.FAMILIES))}"
    given = {"vae": args.pretrained_vae_model_name_or_path, "tokenizer": args.tokenizer_name}  # from elsewhere
    named = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    wanted = [name for name in named if name in PARTS and not given.get(name)]
    missing = [f"{name}/" for name in wanted if not (folder / name).is_dir()]
    if missing:
        return f"lacks {', '.join(missing)}: the copy is incomplete, download or save it again"
    networks = [folder / name for name in wanted if name in plan.NETWORKS]
    complaints = [_no_weights(network, args.variant, args.allow_pickle) for network in networks]
    return next((complaint for complaint in complaints if complaint), None)


def elsewhere(args: argparse.Namespace) -> list[str]:
    """Complaints about a VAE or tokenizer of its own. A name that is no folder here is left to the hub."""
    complaints = []
    for option, part, marks, misfit in (
        ("pretrained_vae_model_name_or_path", "vae", ("config.json",), _no_vae),
        ("tokenizer_name", "tokenizer", ("tokenizer.json", "vocab.json"), _no_tokenizer),
    ):
        name = getattr(args, option, None)
        if not name:
            continue
        folder = Path(models.resolve(name)).expanduser()
        there = (folder / sub for sub in ("", part) if any((folder / sub / mark).is_file() for mark in marks))
        if found := next(there, None):
            if problem := misfit(found, args):
                complaints.append(f"--{option} {name} {problem}")
        elif folder.exists():
            complaints.append(f"--{option} {name} holds no {part} ({' or '.join(marks)}, there or in {part}/)")
        elif not remote.REPOSITORY.fullmatch(name) or name.startswith("."):
            complaints.append(f"--{option} {name} does not exist here, and is no hub name of the form owner/model")
    return complaints


def _no_vae(folder: Path, args: argparse.Namespace) -> str | None:
    """Why a folder with a config.json is not the VAE of a Stable Diffusion, or not a whole one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("_class_name") or (config.get("architectures") or ["AutoencoderKL"])[0]
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as problem:
        return f"has a config.json that cannot be read: {problem}"
    if kind != "AutoencoderKL":
        return f"is a {kind}; give an AutoencoderKL, the VAE of Stable Diffusion"
    return _no_weights(folder, None, args.allow_pickle)


def _no_tokenizer(folder: Path, args: argparse.Namespace) -> str | None:
    """Why a folder with a vocabulary is not CLIP's tokenizer."""
    try:
        for name in ("tokenizer.json", "vocab.json"):
            if (folder / name).is_file():
                json.loads((folder / name).read_text(encoding="utf-8"))
        file = folder / "tokenizer_config.json"
        kind = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None
    except (OSError, ValueError, AttributeError) as problem:
        return f"has a file that cannot be read: {problem}"
    if kind and not str(kind).startswith("CLIP"):
        return f"is a {kind}; give a CLIPTokenizer, that of Stable Diffusion"
    return None


def judges(args: argparse.Namespace) -> list[str]:
    """Complaints about networks that --scores asks for by name."""
    complaints = []
    for kind in [kind for kind in JUDGES if kind in args.scores]:
        name = getattr(args, f"{kind}_model_name_or_path")
        if problem := _unusable(name, JUDGES[kind], args.allow_pickle):
            complaints.append(f"--{kind}_model_name_or_path {name}, for --scores {kind}, {problem}")
    return complaints


def sam(args: argparse.Namespace) -> list[str]:
    """Complaints about the model that makes masks."""
    name = args.sam_model_name_or_path
    problem = name and _unusable(name, ("sam",), args.allow_pickle)
    return [f"--sam_model_name_or_path {name} {problem}"] if problem else []


def _unusable(name: str, kinds: tuple[str, ...], allow_pickle: bool) -> str | None:
    """Why a model of transformers cannot be had, or is of another kind."""
    folder = Path(models.resolve(name)).expanduser()
    if folder.is_file():
        return "is a single file; a folder or hub name in the format of transformers is needed"
    if folder.is_dir():
        return _lacking(folder, kinds, allow_pickle)
    folder, problem = _from_hub(name, None, "config.json", "model of transformers")
    return problem or _lacking(folder, kinds, allow_pickle, whole=remote.offline())


def _lacking(folder: Path, kinds: tuple[str, ...], allow_pickle: bool, whole: bool = True) -> str | None:
    """What a folder lacks of such a model; not `whole`: only its configuration was fetched yet."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return "has no config.json that can be read, so it is no model of transformers"
    if kind not in kinds:
        return f"is a model of type {kind}; needed is {' or '.join(kinds)}"
    if not whole:
        return None
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return "lacks preprocessor_config.json: the copy is incomplete, download or save it again"
    return _no_weights(folder, None, allow_pickle)


def objective(args: argparse.Namespace, folder: Path | None) -> list[str]:
    """Options about noise and loss that the model's own schedule leaves no room for."""
    config = models.read_scheduler(str(folder)) if folder else {}
    if not config:  # not here yet
        return []
    kind, predicts = str(config.get("_class_name")), config.get("prediction_type", "epsilon")
    model = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    if kind.startswith("EDM"):
        clashes = relations.against_edm(vars(args).get)
        clashes += ["--rescale_betas_zero_snr: there are no betas"] if args.rescale_betas_zero_snr else []
        return [f"{model} has an {kind}, so training is EDM-style. {clash}: leave it out" for clash in clashes]
    if args.edm_sigmas == "lognormal" and not args.do_edm_style_training:
        return [f"--edm_sigmas lognormal needs --do_edm_style_training: {model} has no EDM scheduler"]
    predicts = args.prediction_type or predicts
    if getattr(args, "dream_training", False) and predicts != "epsilon":
        return [f"--dream_training is made for epsilon prediction, and {model} predicts {predicts}; leave it out"]
    if args.rescale_betas_zero_snr and predicts == "epsilon":
        return [
            f"--rescale_betas_zero_snr: {args.pretrained_model_name_or_path} predicts epsilon, and noise cannot be told"
            " from pure noise; train velocity: --prediction_type v_prediction"
        ]
    return []


def sampler(args: argparse.Namespace, folder: Path | None) -> list[str]:
    """The complaint about --validation_scheduler where images will be drawn."""
    config = models.read_scheduler(str(folder)) if folder else {}
    if args.rescale_betas_zero_snr:
        config["rescale_betas_zero_snr"] = True
    complaint = samplers.misfit(args.validation_scheduler, config, "--validation_scheduler")
    return [complaint] if complaint and relations.drawn(args) else []


def commit(folder: Path | None) -> str | None:
    """The commit that a folder of the hub's cache holds; None for any other folder."""
    return folder.name if folder and folder.parent.name == "snapshots" else None


def _no_weights(network: Path, variant: str | None, allow_pickle: bool = False) -> str | None:
    try:
        if plan.shapes(network, variant):
            return None
    except ValueError as problem:
        return f"cannot be loaded: {problem}; download or save it again"
    files = sorted(path.name for path in network.iterdir())
    variants = sorted({m["variant"] for m in map(plan.WEIGHTS.fullmatch, files) if m and m["variant"]})
    if variants and not variant:
        return f"has weights of {network.name} only as variant {', '.join(variants)}; add --variant {variants[0]}"
    pickled = any(re.search(r"\.(bin|ckpt|pt)$", file) for file in files)
    if pickled and allow_pickle:
        return None
    if variant:
        return f"has no weights of {network.name} as variant {variant}; leave --variant out or name another"
    if pickled:
        return (
            f"has weights of {network.name} only as a pickle, which can hold code; save them as safetensors,"
            " or add --allow_pickle to read the tensors in it and nothing else"
        )
    return f"has no weights in {network.name}/: the copy is incomplete, download or save it again"


def _from_hub(
    name: str, revision: str | None, file: str = "model_index.json", kind: str = "diffusers pipeline"
) -> tuple[Path | None, str | None]:
    """(snapshot folder in the cache, None) or (None, what is wrong with the name)."""
    if not remote.REPOSITORY.fullmatch(name) or name.startswith("."):
        return None, "does not exist here, and is no hub name of the form owner/model"
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_download

    unknown = "is no folder here, not in the cache, and the hub cannot be reached; download it or name a folder"
    try:  # a cached model needs no network
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=True)).parent, None
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError):
        if remote.offline() or not remote.reachable():
            return None, unknown
    try:
        return Path(hf_hub_download(name, file, revision=revision)).parent, None
    except hub_errors.GatedRepoError:
        return None, f"is gated: accept its terms on https://huggingface.co/{name}, then log in with: hf auth login"
    except hub_errors.RevisionNotFoundError:
        return None, f"has no revision {revision}; leave --revision out or name a branch, tag or commit"
    except hub_errors.RepositoryNotFoundError:
        return None, "is neither a folder here nor a model on the hub; if it is private, log in with: hf auth login"
    except hub_errors.LocalEntryNotFoundError:  # before its parent, EntryNotFoundError
        return None, unknown
    except hub_errors.EntryNotFoundError:
        return None, f"is on the hub but has no {file}, so it is no {kind}"
    except Exception as problem:  # no network in one of its many shapes
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        return None, f"is no folder here and could not be asked for on the hub: {reason}"
