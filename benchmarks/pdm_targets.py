"""What the targets of PDMBooth cost, as published and as they are made here, and whether training can tell.

    python benchmarks/pdm_targets.py cost --model toybox       # 3 core-minutes; mid: about 10
    python benchmarks/pdm_targets.py effect --seeds 0 1 2      # after it; about 30

The published procedure is written here from its description: one photo at a time, 999 steps of deterministic DDIM
inversion, 999 back, the queries of each of these kept in fp32. Ours is the suite's room with its defaults. Each runs
in a process of its own, on the same photos. `effect` trains on the toybox with targets of several kinds and lets the
judge look at what the results draw.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import results  # noqa: E402

SUBJECT = ROOT / "toybox" / "subject"
MODELS = {  # folder, pixels a side, photos
    "toybox": (ROOT / "toybox" / "sd", 64, 5),
    "mid": (results.WORK / "mid", 128, 1),  # see models.py; random weights
}
STEPS = 999
PROMPT, CLASS = "a photo of sks dog", "a photo of a dog"
TRAINING = f"train_pdmbooth --use_inst_loss --learning_rate 1e-4 --max_train_steps 150 --class_prompt '{CLASS}'"
TARGETS = {
    "none": "",
    "ours: 50, inversion": "--use_pdm_loss",
    "50, reconstruction": "--use_pdm_loss --pdm_targets reconstruction",
    "as published: 1000, reconstruction": "--use_pdm_loss --pdm_targets reconstruction --pdm_inversion_steps 1000",
}
SCORES = {
    "likeness": "likeness",
    "dog and new scene right": "scene right",
    "class likeness": "class likeness",
    "class diversity": "class diversity",
    "distance": "distance of queries",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["cost", "effect", "published", "ours"]
    parser.add_argument("what", choices=kinds, help="the last two: one process of cost")
    parser.add_argument("--model", choices=list(MODELS), default="toybox", help="of cost")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1], help="--pdm_loss_weight of effect")
    return parser.parse_args(argv)


# What they cost


def cost(args) -> None:
    circumstances, found = results.circumstances(), {}
    if args.model == "mid":
        subprocess.run([sys.executable, HERE / "models.py", "mid", results.WORK], check=True)
    for who in ("published", "ours"):  # in processes of their own: peak memory never falls
        subprocess.run([sys.executable, __file__, who, "--model", args.model], check=True, cwd=ROOT)
        found[who] = json.loads(place(who, args.model, "json").read_text())
    found["difference"] = difference(args.model)
    ours, theirs = found["ours"], found["published"]
    rows = [
        [f"{heading} a photo", f"{theirs[key]:{form}}", f"{ours[key]:{form}}", f"{theirs[key] / ours[key]:.1f}"]
        for key, heading, form in (
            ("evaluations", "evaluations of the network", ".0f"),
            ("seconds", "seconds", ".2f"),
            ("cpu_s", "CPU seconds", ".2f"),
            ("megabytes", "MB kept", ".2f"),
        )
    ]
    peaks = [one["peak_mb"] for one in (theirs, ours)]
    rows.append(["peak MB of the process", *(f"{peak:.0f}" for peak in peaks), f"{peaks[0] / peaks[1]:.1f}"])
    text = f"Photos: {ours['photos']}, at {MODELS[args.model][1]} px; layer {ours['layer']}, {ours['shape'][1]} x"
    text += f" {ours['shape'][2]} numbers a timestep. Of a batch every photo counts.\n\n"
    text += results.table(["", "as published", "ours", "ratio"], rows)
    text += f"\n\nMean squared difference of the targets, at ours' timesteps: {100 * found['difference']:.3f} % of the"
    text += " queries' mean square."
    data = {"circumstances": circumstances, "model": args.model, **found}
    results.write(f"pdm-targets-{args.model}", f"PDM's targets as published and ours: {args.model}", text, data)


def place(who: str, model: str, kind: str) -> Path:
    return results.WORK / f"pdm-{who}-{model}.{kind}"


def difference(model: str) -> float:
    import torch

    from utils import pdm

    theirs, ours = (torch.load(place(who, model, "pt")) for who in ("published", "ours"))
    number, square = 0.0, 0.0
    for key, rows in ours.items():
        wanted = theirs[key][[t - 1 for t in pdm.timesteps_of(len(rows), 1000)]]  # row 0 is timestep 1
        number += (rows.float() - wanted).square().mean().item()
        square += wanted.square().mean().item()
    return number / square


def prepared(model: str):
    """(family, data set, its photos): what both procedures begin with."""
    import torch

    from utils import datasets, models

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folder, resolution, count = MODELS[model]
    family = models.family_of(str(folder))
    family.load("cpu", torch.float32)
    examples = datasets.folder(SUBJECT, PROMPT)[:count]
    return family, datasets.DreamBooth(examples, size=resolution), examples


def one_of_cost(args, procedure) -> None:
    family, data, examples = prepared(args.model)
    evaluated, real = [], family.unet.forward

    def forward(sample, *more, **options):
        evaluated.append(len(sample))
        return real(sample, *more, **options)

    family.unet.forward = forward
    began, cpu = time.perf_counter(), time.process_time()
    layer, targets, kept = procedure(family, data, examples)
    count, shape = len(examples), list(next(iter(targets.values())).shape)
    found = {"photos": count, "layer": layer, "shape": shape, "evaluations": sum(evaluated) / count}
    found |= {"seconds": (time.perf_counter() - began) / count, "cpu_s": (time.process_time() - cpu) / count}
    found |= {"megabytes": kept / count / 1e6, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    import torch

    torch.save(targets, place(args.what, args.model, "pt"))
    place(args.what, args.model, "json").write_text(json.dumps(found))


def published(family, data, examples):
    import torch

    from utils import targets

    layer, _ = targets.self_attention([name for name, _ in family.unet.named_modules()])
    alphas, queries, kept = family.scheduler.alphas_cumprod.double(), [], {}
    hook = family.unet.get_submodule(f"{layer}.to_q").register_forward_hook(lambda *call: queries.append(call[2]))

    def moved(latents, t, to):
        noise = family.predict(latents, torch.tensor([t]), condition)
        clean = (latents - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        return (alphas[to].sqrt() * clean + (1 - alphas[to]).sqrt() * noise).float()

    with torch.no_grad():
        for example in examples:
            record = data.centred(example)
            pixels, place = record["pixels"][None], {}
            for name in ("original_size", "crop_top_left"):
                place[name] = torch.tensor([record[name]])
            condition = family.condition({"captions": [CLASS], **place})
            mean, std = family.posterior(pixels)
            latents = family.latents({"latent_mean": mean, "latent_std": std}, None)
            for t in range(STEPS):
                latents = moved(latents, t, t + 1)
            queries.clear()
            for t in range(STEPS, 0, -1):
                latents = moved(latents, t, t - 1)
            kept[example.key] = torch.cat(queries[::-1])  # index = timestep - 1
            queries.clear()
    hook.remove()
    return layer, kept, sum(rows.nbytes for rows in kept.values())


def ours(family, data, examples):
    import shutil

    import torch
    from safetensors import safe_open

    from utils import pdm

    folder = results.WORK / "pdm-bank"
    shutil.rmtree(folder, ignore_errors=True)
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, rank=0, world=1, is_main=True, seed=0)
    run.output_dir, run.interrupted, run.say, run.barrier = folder, False, print, lambda: None
    run.phase, run.compiles = lambda name: contextlib.nullcontext(), False
    bank = pdm.prepare(run, family, data, examples, [SimpleNamespace(class_prompt=CLASS)])
    kept = {}
    for example in examples:  # rows are read from the open file, as in training
        with safe_open(str(bank.path(example.key)), framework="pt") as file:
            kept[example.key] = file.get_tensor("queries")
    return bank.identity["layer"], kept, sum(bank.path(key).stat().st_size for key in kept)


# Whether training can tell


def effect(args) -> None:
    from toybox.evaluate import draw_all, measure, personalise
    from toybox.judge import Judge, load_photos

    judge, photos, ruler = Judge.load(ROOT / "toybox/judge"), load_photos(SUBJECT), Ruler()
    work = SimpleNamespace(model=ROOT / "toybox/sd", subject=SUBJECT, output=results.WORK / "effect")
    kept = results.WORK / "pdm-effect.json"  # runs that are there are not repeated
    found = json.loads(kept.read_text()) if kept.is_file() else {"circumstances": results.circumstances(), "runs": {}}
    for seed in args.seeds:
        for weight in args.weights:
            for name, options in TARGETS.items():
                row = f"{name}; weight {weight:g}" if options else name
                if f"{row} / {seed}" in found["runs"]:
                    continue
                bank = results.WORK / "banks" / name.replace(" ", "-")
                if options:
                    options = f"{options} --pdm_loss_weight {weight:g} --features_data_dir '{bank}'"
                pipeline = personalise(f"{TRAINING} {options}", work, seed)
                scores = measure(draw_all(pipeline, seed), judge, photos) | {"distance": ruler.distance(pipeline)}
                found["runs"][f"{row} / {seed}"] = scores
                kept.write_text(json.dumps(found))
                print(seed, row, {key: round(scores[key], 3) for key in SCORES}, flush=True)
    write_effect(found, ruler.distance())


def write_effect(found: dict, before: float) -> None:
    rows, by_targets = [], {}
    for name, scores in sorted(found["runs"].items(), key=lambda run: run[0].rpartition(" / ")[2]):
        by_targets.setdefault(name.rpartition(" / ")[0], []).append(scores)
    for name, scores in by_targets.items():
        columns = [[one[key] for one in scores] for key in SCORES]
        rows.append([name] + [f"{sum(c) / len(c):.3f} ({', '.join(f'{value:.3f}' for value in c)})" for c in columns])
    text = f"`{TRAINING}`, batch 4, on the toybox's five photos; means over the seeds, single values in brackets. The"
    text += " last column: how far what the trained network asks about the photos, noised to 20 timesteps under their"
    text += " prompt, is from the published targets, as a share of the targets' mean square; before training"
    text += f" {before:.3f}.\n\n" + results.table(["targets", *SCORES.values()], rows)
    data = {**found, "training": TRAINING, "targets": TARGETS, "distance_before": before}
    results.write("pdm-effect", "What training makes of PDM's targets", text, data)


class Ruler:
    """How far a UNet's queries about the photos are from the published targets."""

    def __init__(self):
        import torch

        self.targets = torch.load(place("published", "toybox", "pt"))  # `cost` has left them
        self.family, data, examples = prepared("toybox")
        self.rows, self.inputs = [], []
        condition = self.family.condition({"captions": [PROMPT] * len(examples)})
        latents = []
        for example in examples:
            mean, std = self.family.posterior(data.centred(example)["pixels"][None])
            latents.append(self.family.latents({"latent_mean": mean, "latent_std": std}, None))
        latents, alphas = torch.cat(latents), self.family.scheduler.alphas_cumprod
        noise = torch.Generator().manual_seed(0)
        for t in range(25, 1000, 50):
            drawn = torch.randn(latents.shape, generator=noise)
            self.inputs.append((alphas[t].sqrt() * latents + (1 - alphas[t]).sqrt() * drawn, t, condition["text"]))
            self.rows.append(torch.stack([self.targets[example.key][t - 1] for example in examples]))

    def distance(self, pipeline=None) -> float:
        import torch

        from utils import targets
        from utils.pdm.features import Tap

        unet = (pipeline or self.family).unet
        layer, _ = targets.self_attention([name for name, _ in unet.named_modules()])
        apart, square = 0.0, 0.0
        with torch.no_grad():
            for (noisy, t, text), wanted in zip(self.inputs, self.rows):
                with (tap := Tap(unet, f"{layer}.to_q")):
                    unet(noisy, t, text)
                apart += (tap.taken - wanted).square().mean().item()
                square += wanted.square().mean().item()
        return apart / square


def main(args) -> None:
    results.WORK.mkdir(parents=True, exist_ok=True)
    if args.what in ("published", "ours"):
        one_of_cost(args, {"published": published, "ours": ours}[args.what])
    else:
        {"cost": cost, "effect": effect}[args.what](args)


if __name__ == "__main__":
    main(parse_args())
