"""Adapter files, converted, merged into a model, and taken out of one.

python -m utils.adapters export runs/dog dog_kohya.safetensors              for A1111, ComfyUI, kohya
python -m utils.adapters export runs/dog dog_peft --format peft             a folder a network, for PEFT
python -m utils.adapters export runs/dora dog.safetensors --dora diff       a DoRA as its full differences
python -m utils.adapters import found.safetensors dog                       from kohya's naming to diffusers'
python -m utils.adapters merge MODEL runs/dog:0.8 ink.safetensors --output_dir merged
python -m utils.adapters extract MODEL runs/dog-full dog.safetensors --rank 16
"""

import argparse
import json
import shlex
from pathlib import Path

from utils import errors, interrupts, results, saved


@interrupts.answered("stopped; no file is half-written")
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.adapters", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(dest="what", required=True)
    for what, help in (("export", "to another program's naming"), ("import", "to diffusers' naming")):
        one = kinds.add_parser(what, help=help, allow_abbrev=False)
        one.add_argument("lora", help="LoRA folder or file")
        one.add_argument("output", type=Path, help="file to write; a folder for diffusers and peft")
        formats = ("kohya", "peft", "diffusers") if what == "export" else ("diffusers",)
        one.add_argument("--format", choices=formats, default=formats[0], help="(default: %(default)s)")
        one.add_argument("--allow_pickle", action="store_true", help="read the tensors of a .bin file, nothing else")
        one.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="(default: %(default)s)")
        if what == "export":
            help = "how to write a DoRA for kohya: full differences of the weights (exact, large), or the nearest LoRA"
            one.add_argument("--dora", choices=("diff", "lora"), help=help)
            one.add_argument("--rank", type=_at_least_one, help="rank of --dora lora (default: 16)")
            help = "base model of --dora: pipeline folder, hub name, or toybox (default: the recorded one)"
            one.add_argument("--base", help=help)
    one = kinds.add_parser("merge", help="a base model and adapters => a whole pipeline", allow_abbrev=False)
    one.add_argument("model", help="pipeline folder, hub name, or toybox")
    one.add_argument("lora", nargs="+", metavar="LORA[:SCALE]", help="LoRA folders or files and their strengths")
    one.add_argument("--output_dir", type=Path, required=True, help="where the pipeline goes; must not exist")
    one = kinds.add_parser("extract", help="the difference of two pipelines => a LoRA file", allow_abbrev=False)
    one.add_argument("model", help="the base: pipeline folder, hub name, or toybox")
    one.add_argument("tuned", help="the fine-tuned pipeline")
    one.add_argument("output", type=Path, help="folder to write to")
    one.add_argument("--rank", type=_at_least_one, default=16, help="(default: %(default)s)")
    one.add_argument("--conv_rank", type=_at_least_one, help="rank of 3 x 3 convolutions (default: --rank)")
    args = parser.parse_args(argv)
    target = args.output_dir if args.what == "merge" else args.output
    work = {"export": convert, "import": convert, "merge": merge, "extract": extract}[args.what]
    with errors.when_writing_fails(f"{target} cannot be written"):
        work(args)
    return 0


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def find(names: list[str], allow_pickle: bool = False) -> list[saved.Lora]:
    wrong = []
    loras = [saved.lora(name, wrong, allow_pickle=allow_pickle) for name in names]
    wrong += [] if wrong else saved.twice(loras)
    if wrong:
        errors.refuse([complaint.removeprefix("--lora ") for complaint in wrong])
    for lora in loras:  # as infer.py takes them
        if (average := saved.averaged(lora.file)) != lora.file:
            print(f"{lora.file.parent.name}: its averaged weights are taken (--use_ema)", flush=True)
            lora.file = average
    return loras


def refuse_existing(path: Path) -> None:
    if path.is_dir():
        results.complete(path)  # what a kill left
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        errors.refuse(f"{path} exists; name another, or remove it")


def convert(args) -> None:
    from utils.adapters import FILE, files

    (lora,) = find([args.lora], args.allow_pickle)
    folder = args.format != "kohya"
    target = args.output / FILE if args.format == "diffusers" else args.output
    if not folder and target.suffix != ".safetensors":
        errors.refuse(f"{target}: the file must be called .safetensors")
    refuse_existing(target)
    words = {}
    if args.format == "kohya" and (learned := saved.embeddings([lora], [], [])):  # words that the LoRA needs
        words = saved.word_files(learned[0].words)
        for name in words.values():
            refuse_existing(target.parent / name)
    found, header = files.read(lora.file)
    # The hashes are those of the other file.
    strangers = (files.METADATA, "sshs_model_hash", "sshs_legacy_hash")
    header = {"format": "pt", **{key: value for key, value in header.items() if key not in strangers}}
    if args.what == "export":
        found = settle_dora(args, lora, found, header)

    def narrowed(weights: dict) -> dict:
        try:
            return files.narrowed(weights, args.dtype)
        except OverflowError as problem:
            errors.refuse(f"--dtype {args.dtype}: {problem}")

    if args.format == "kohya":
        files.save(narrowed(files.kohya(found, files.has_sgm_names(found, header))), target, header, hashed=True)
    elif args.format == "diffusers":
        weights, config = files.diffusers(found)
        files.save(narrowed(weights), target, header | {files.METADATA: json.dumps(config, indent=2, sort_keys=True)})
    else:
        with results.replacing(target) as folder:
            for network, (weights, config) in files.peft(found).items():
                files.save(narrowed(weights), folder / network / "adapter_model.safetensors", {"format": "pt"})
                (folder / network / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    print(f"{target}: {sum(map(len, found.values()))} layers of {', '.join(found)}")
    if words:
        from utils import tokens

        tokens.split(saved.averaged(learned[0].file), target.parent)
        for word, name in words.items():
            print(f"{target.parent / name}: the embedding of {word}; put it into the program's folder of embeddings")


def settle_dora(args, lora, found: dict, header: dict) -> dict:
    """What is written of a DoRA for kohya's programs, none of which reads one as it was trained."""
    from utils.adapters import files, merging

    needed = args.format == "kohya" and files.is_dora(found)
    if not needed:
        if args.dora or args.rank or args.base:
            why = f"{args.lora} is not a DoRA" if args.format == "kohya" else f"--format {args.format} keeps a DoRA"
            errors.refuse(f"--dora, --rank and --base write a DoRA for kohya's programs, and {why}: remove them")
        return found
    if not args.dora:
        command = f"python -m utils.adapters export {shlex.join([args.lora, str(args.output)])}"
        errors.refuse(
            f"{args.lora} is a DoRA: ComfyUI and Forge, A1111, and kohya's scripts read one differently, and none as it"
            f" was trained. Write its full differences, which they read exactly: {command} --dora diff; or a small LoRA"
            f" close to it: {command} --dora lora --rank 16"
        )
    if args.rank and args.dora == "diff":
        errors.refuse("--rank with --dora diff: full differences have no rank; remove it or use --dora lora")
    base = saved.Base(args.base) if args.base else saved.recorded_base(lora.file)
    if not base:
        errors.refuse(f"--dora needs the base model, which is not recorded beside {lora.file}: add --base MODEL")
    family = load(base.name, [], base.revision, base.variant)
    if strange := found.keys() - set(family.names):
        errors.refuse(f"--base {base.name} has no {', '.join(sorted(strange))}: {args.lora} belongs to another family")
    modules = {name: family.load_module(name, family.dtype) for name in found}
    rank = None if args.dora == "diff" else args.rank or 16
    made, shares = merging.without_dora(modules, found, rank, args.lora)
    for key in ("ss_network_dim", "ss_network_alpha", "ss_network_args"):
        header.pop(key, None)
    if rank:
        header |= {"ss_network_module": "networks.lora", "ss_network_dim": f"{rank}", "ss_network_alpha": f"{rank}"}
        for network, share in shares.items():
            print(f"{network}: rank {rank} keeps {100 * share:.1f} % of the squared change")
    else:
        header |= {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": "full"})}
    return made


def load(
    name: str, parts=None, revision: str | None = None, variant: str | None = None, vae: str | None = None, **changes
):
    import torch

    from utils import models
    from utils.runtime import startup

    startup.quiet()
    family = models.family_of(name, revision, variant, **changes)
    family.load("cpu", torch.float32, vae=vae, parts=parts)
    return family


def merge(args) -> None:
    from utils import assembling
    from utils.adapters import files, merging

    loras = find(args.lora)
    refuse_existing(args.output_dir)
    wrong = saved.parts_cut_short(args.model)
    learned = saved.embeddings(loras, [], wrong)
    base = as_trained(args.model, loras, wrong)
    if wrong:
        errors.refuse(wrong)
    adapters = [(files.read(lora.file)[0], lora.scale) for lora in loras]
    touched = {network for found, _ in adapters for network in found}
    own = {"prediction_type": base.prediction_type, "rescale_betas_zero_snr": base.rescale_betas_zero_snr}
    family = load(args.model, parts=[], vae=base.vae, **own)
    if strange := touched - set(family.names):
        errors.refuse(
            f"{args.model} has no {', '.join(sorted(strange))}: what is to be merged belongs to another family"
        )
    if learned:
        touched |= set(family.encoders)
    modules = {name: family.load_module(name, family.dtype) for name in family.names if name in touched}
    merging.merge(modules, adapters, ", ".join(args.lora))
    if learned:
        assembling.add_embeddings(family.pipeline(), learned, args.model)
    for module in modules.values():
        module.requires_grad_(True)  # as after training: these are saved, the others are copied from the base
    with results.replacing(args.output_dir) as folder:
        family.save_pipeline(folder)
        if base.clip_skip:  # a pipeline has no place for it: infer.py reads it from the settings beside one
            settings = {"pretrained_model_name_or_path": args.model, "clip_skip": base.clip_skip}
            (folder / saved.SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")
    if base.clip_skip:
        print(f"clip skip {base.clip_skip}, as in training: infer.py finds it, other programs must be told")
    for name, value in {**own, "VAE": base.vae}.items():
        if value:
            print(f"{name}: {value}, as in training")
    for one in learned:
        for word, names in one.words.items():
            print(f"in prompts write {names} for {word}")
    print(f"{args.output_dir}: {args.model} with {', '.join(f'{lora.given} at {lora.scale:g}' for lora in loras)}")


def as_trained(model: str, loras: list[saved.Lora], wrong: list) -> saved.Base:
    """The base with what the runs changed about it; runs that changed it differently cannot be merged into one."""
    bases = [saved.as_trained(saved.Base(model), [lora.file]) for lora in loras]
    for lora, base in zip(loras, bases):
        base.vae = getattr(saved.recorded_base(lora.file), "vae", None)
    for name in (*saved.CHANGED, "vae"):
        values = {str(value): lora for lora, base in zip(loras, bases) if (value := getattr(base, name))}
        if len(values) > 1:
            told = " and ".join(f"{lora.given} with {value}" for value, lora in values.items())
            wrong.append(f"the adapters were trained with different values of {name} ({told}); merge one of them")
        value = next((value for base in bases if (value := getattr(base, name))), None)
        setattr(bases[0], name, value)
    return bases[0]


def extract(args) -> None:
    from utils.adapters import FILE, describe_base, files, merging

    target = args.output / FILE
    refuse_existing(target)
    if wrong := [problem for name in (args.model, args.tuned) for problem in saved.parts_cut_short(name)]:
        errors.refuse(wrong)
    base, tuned = load(args.model, parts=["unet"]), load(args.tuned, parts=["unet"])
    if base.label != tuned.label:
        errors.refuse(f"{args.model} is a {base.label}, {args.tuned} a {tuned.label}: they have no difference")
    found = {}
    header = {"format": "pt", **describe_base(base)}
    for network in ("unet", *base.encoders):
        modules = [getattr(family, network) or family.load_module(network, family.dtype) for family in (base, tuned)]
        layers, share = merging.extract(network, *modules, args.rank, args.conv_rank)
        for family in (base, tuned):
            setattr(family, network, None)  # one pair in memory at a time
        if layers:
            found[network] = layers
            print(f"{network}: {len(layers)} layers, {100 * share:.1f} % of their squared change")
    if not found:
        errors.refuse(f"{args.tuned} has the same weights as {args.model}: there is nothing to extract")
    weights, config = files.diffusers(found)
    files.save(weights, target, header | {files.METADATA: json.dumps(config, indent=2, sort_keys=True)})
    print(f"{target}")


if __name__ == "__main__":
    raise SystemExit(main())
