"""The averaged weights of another length, after a run with --use_ema --posthoc_ema.

    python -m utils.ema runs/style --sigma_rel 0.075 --output_dir style-075
    python -m utils.ema runs/style --sigma_rel 0.15 --step 4000 --output_dir style-early

Leaves what the run itself leaves: a pipeline folder, or pytorch_lora_weights.safetensors.
"""

import argparse
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from utils import arguments, errors, interrupts, saved
from utils.ema import posthoc


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m utils.ema", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="output folder of the run, which may still be going on")
    help = "the average's length: the standard deviation of its weights, relative to the length of training"
    parser.add_argument("--sigma_rel", type=float, required=True, help=help)
    parser.add_argument("--step", type=int, help="as after this step, of which there is a snapshot (default: the last)")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the result goes; must not exist")
    help = "where the base model is now (default: where the run found it)"
    parser.add_argument("--pretrained_model_name_or_path", help=help)
    return parser.parse_args(argv)


@interrupts.answered("stopped; nothing was written")
def main(args) -> None:
    settings = saved.read_yaml(args.run / "training_config.yaml")
    if problems := check(args, settings):
        errors.refuse(problems)

    snapshots = posthoc.listed(args.run / posthoc.FOLDER)
    steps = sorted({one.step for one in snapshots})
    step = steps[-1] if args.step is None else args.step
    if step not in steps:
        errors.refuse(f"--step {step} has no snapshot; there are those of {', '.join(map(str, steps))}")
    snapshots = [one for one in snapshots if one.step <= step]
    shares, error = posthoc.choose(snapshots, args.sigma_rel)
    write = lora if "rank" in settings else pipeline
    told = f"# Averaged afterwards: sigma_rel {args.sigma_rel:g} after step {step}.\n"
    record = (args.run / "training_config.yaml").read_text(encoding="utf-8")  # names the base model for infer.py
    # Whole or absent: a folder that a kill or a full disk left would be refused by the same command.
    folder = args.output_dir
    staged = folder.absolute().with_name(f".tmp-{folder.absolute().name}-ema")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        write(args, staged, settings, snapshots, shares)
        (staged / "training_config.yaml").write_text(told + record, encoding="utf-8")
        os.replace(staged, folder)
    except (OSError, SafetensorError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        errors.refuse(f"--output_dir {folder} cannot be written ({reason}); nothing is left of it", errors.FAILED)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    said = f"sigma_rel {args.sigma_rel:g} after step {step}, of {len(snapshots)} snapshots"
    met = f"within {100 * error:.2g} %" if error else "exactly"
    print(f"{args.output_dir}: {said}; its weights over the run are met {met}")


def check(args, settings: dict) -> list[str]:
    problems = []
    if not settings.get("pretrained_model_name_or_path"):
        problems.append(f"{args.run} is no output folder of a run (no training_config.yaml that names a model)")
    elif not any((args.run / posthoc.FOLDER).glob("step-*.safetensors")):
        why = "none is due yet" if settings.get("posthoc_ema") else "it had no --posthoc_ema"
        problems.append(f"{args.run} holds no snapshots of averages: {why}")
    if not posthoc.SHORTEST <= args.sigma_rel < posthoc.LONGEST:
        between = f"{posthoc.SHORTEST:g} and {posthoc.LONGEST:.4f}, the mean of all steps"
        problems.append(f"--sigma_rel {args.sigma_rel:g}: lengths lie between {between}")
    if args.output_dir.is_file() or (args.output_dir.is_dir() and any(args.output_dir.iterdir())):
        problems.append(f"--output_dir {args.output_dir} exists; name another, or remove it")
    return problems


def pipeline(args, folder: Path, settings: dict, snapshots: list, shares) -> None:
    """The networks that learned, averaged, among the rest of the base model."""
    import torch

    from utils import learning, models
    from utils.runtime import startup

    startup.quiet()
    call = arguments.caller(argparse.Namespace(**settings))
    family = call(models.family_of, args.pretrained_model_name_or_path or settings["pretrained_model_name_or_path"])
    own = {"tokenizer": settings.get("tokenizer_name"), "vae": settings.get("pretrained_vae_model_name_or_path")}
    family.load("cpu", torch.float32, parts=[], **own)
    weights = learning.full(family, text_encoder=bool(settings.get("train_text_encoder"))).named()
    if {name: tuple(weight.shape) for name, weight in weights.items()} != snapshots[0].shapes:
        errors.refuse(f"{snapshots[0].file.parent} holds averages of other weights than {family.name} has")
    with torch.no_grad():
        for name, value in posthoc.blend(snapshots, shares):
            weights[name].copy_(value)
    family.save_pipeline(folder, skip_text_encoder=bool(settings.get("skip_save_text_encoder")))


def lora(args, folder: Path, settings: dict, snapshots: list, shares) -> None:
    """Files as the run saved them, result or checkpoint, with these averages in the place of their weights."""
    from utils.adapters import write_kohya
    from utils.adapters.files import own_key
    from utils.checkpoints import manifests

    places = [args.run, *(path for _, path in reversed(manifests.listed(args.run)))]
    like = next((place for place in places if (place / saved.LORA_FILE).is_file()), None)
    if not like:
        errors.refuse(f"{args.run} holds no {saved.LORA_FILE} yet that tells what its weights belong to")
    files = [like / name for name in (saved.LORA_FILE, saved.EMBEDDINGS_FILE) if (like / name).is_file()]
    if strange := snapshots[0].shapes.keys() - {own_key(name) for file in files for name in saved.header(file)}:
        errors.refuse(f"{like} and {snapshots[0].file.parent} are of different adapters: {sorted(strange)[0]}")
    averages = dict(posthoc.blend(snapshots, shares))
    for file in files:
        saved.with_averages(file, averages, folder / file.name)
    if (folder / saved.EMBEDDINGS_FILE).is_file():
        from utils import tokens

        tokens.split(folder / saved.EMBEDDINGS_FILE, folder)
    if settings.get("output_kohya_format"):
        write_kohya(folder, settings.get("kohya_dtype") or "fp32")


if __name__ == "__main__":
    main(parse_args())
