"""Measures the toybox: does DreamBooth behave on it as on Stable Diffusion, and do the scores tell models apart?

    python -m toybox.evaluate --output table.json --pictures sheets    # train and draw; about 30 core-minutes
    python -m toybox.evaluate --score sheets                           # the table again, with another judge
    python -m toybox.evaluate --samples toybox/samples.png             # only a sheet of 32 pictures

Runs already in the output are not repeated. The table is printed in Markdown, for toybox/README.md.
"""

import argparse
import importlib
import json
import os
import shlex
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from toybox.draw import SCENES, SIZE, THINGS, grid
from toybox.judge import Judge, load_photos, memorised

NEW_SCENES = ("beach", "forest", "desert", "night", "water")  # the photos show none of them
FULL = "train_dreambooth --learning_rate 1e-4 --max_train_steps 150"
LORA = "train_dreambooth_lora --rank 4 --learning_rate 1e-3 --max_train_steps 200"
PRIOR = (
    " --with_prior_preservation --class_prompt 'a photo of a dog' --num_class_images 100 --class_guidance_scale 4"
    " --caption_dropout 0.1"
)
RECIPES = {
    "full": FULL,
    "full, prior": FULL + PRIOR,
    "LoRA": LORA,
    "LoRA, prior": LORA + PRIOR,
    "overfitted": "train_dreambooth --learning_rate 1e-3 --max_train_steps 600",
    "SDXL LoRA": LORA.replace("_lora", "_lora_sdxl"),
    "SDXL LoRA, prior": LORA.replace("_lora", "_lora_sdxl") + PRIOR,
}
MODELS = ("untrained", "base", *RECIPES)
SHEET = (
    "a photo of a red car in the snow", "a photo of a dog on a beach", "a yellow star at night", "a photo of a house",
    "a blue boat under water", "a photo of a black cat in a room", "a pink flower on the grass", "a green fish",
    "a photo of a white dog in the city", "a red mushroom in a forest", "a photo of a purple heart in the desert",
    "a photo of a brown bird on the grass", "a photo of a striped mug in a room", "an orange cat at sunset",
    "a photo of a yellow car in the city", "a spotted dog in the snow", "a photo of a brown dog in the desert",
    "a photo of a gray house in a forest", "a white boat at sunset", "a photo of a pink striped fish under water",
    "a photo of a blue bird", "a red flower in the desert", "a photo of a spotted cat on a beach",
    "a green car at night", "a photo of a yellow house on the grass", "a photo of a black dog at sunset",
    "a red heart at night",
    "a photo of an orange star on a beach", "a blue mug in the snow", "a purple mushroom on the grass",
    "a photo of a dog", "a photo of a cat",
)  # fmt: skip


def load_pipeline(folder: Path):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_all(pipeline, seed: int) -> list:
    """16 pictures of the subject, 4 in each of 5 new scenes, 32 of its class."""
    subject = draw_pictures(pipeline, ["a photo of sks dog"] * 16, seed)
    elsewhere = [f"a photo of sks dog {SCENES[scene]}" for scene in NEW_SCENES for _ in range(4)]
    others = draw_pictures(pipeline, ["a photo of a dog"] * 32, seed + 100)
    return subject + draw_pictures(pipeline, elsewhere, seed + 50) + others


def measure(pictures: list, judge: Judge, photos) -> dict[str, float]:
    """Scores of what draw_all drew."""
    subject, elsewhere, others = pictures[:16], pictures[16:36], pictures[36:]
    scenes = [scene for scene in NEW_SCENES for _ in range(4)]
    right = [seen["thing"] == "dog" and seen["scene"] == scene for seen, scene in zip(judge.words(elsewhere), scenes)]
    return {
        "likeness": judge.likeness(subject, photos).mean().item(),
        "likeness in new scenes": judge.likeness(elsewhere, photos).mean().item(),
        "dog and new scene right": sum(right) / len(right),
        "class likeness": judge.likeness(others, photos).mean().item(),
        "class diversity": judge.diversity(others),
        "class right": judge.agreement(others, thing="dog")["thing"],
        "memorised": memorised(subject, photos).mean().item(),
    }


def follow_captions(pipeline, judge: Judge, count: int = 4) -> dict[str, float]:
    """The share of all things, in all scenes and several colours, that the judge sees where they were asked for."""
    colours = judge.names["colour"]
    asked = [(thing, colours[(i * 3 + k) % len(colours)], list(SCENES)[(i + 3 * k) % len(SCENES)])
             for i, thing in enumerate(THINGS) for k in range(count)]  # fmt: skip
    seen = judge.words(draw_pictures(pipeline, [f"a photo of a {c} {t} {SCENES[s]}" for t, c, s in asked]))
    right = [(one["thing"] == t, one["colour"] == c, one["scene"] == s) for one, (t, c, s) in zip(seen, asked)]
    shares = dict(zip(("thing", "colour", "scene"), (sum(column) / len(right) for column in zip(*right))))
    return {**shares, "all three": sum(all(one) for one in right) / len(right)}


@torch.no_grad()
def draw_pictures(pipeline, prompts: list[str], seed: int = 0, steps: int = 20, guidance: float = 5.0, batch: int = 32):
    """One picture a prompt; the same seed gives the same noise whatever the model."""
    pictures = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(texts))]
        pictures += pipeline(texts, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return pictures


def personalise(recipe: str, args, seed: int):
    """Train with a script of the suite, as a user would; => what the stock pipeline loads of its result."""
    script, *options = shlex.split(recipe)
    with tempfile.TemporaryDirectory() as folder:
        options += f"--pretrained_model_name_or_path {args.model} --instance_data_dir {args.subject}".split()
        options += ["--instance_prompt", "a photo of sks dog", "--output_dir", folder, "--seed", str(seed)]
        options += ["--center_crop", "--train_batch_size", "4", "--checkpointing_steps", "0", "--report_to", "none"]
        if "--with_prior_preservation" in options:  # both recipes that want them share a seed's class images
            options += ["--class_data_dir", str(args.output.parent / f"class-{seed}")]
        module = importlib.import_module(script)
        module.main(module.parse_args(options))
        lora = "lora" in script
        pipeline = load_pipeline(args.model if lora else folder)
        if lora:
            pipeline.load_lora_weights(folder)
    return pipeline


def prepare(name: str, args, seed: int):
    """=> the pipeline to measure, and the seconds it took to train it."""
    started = time.time()
    if name in RECIPES:
        return personalise(RECIPES[name], args, seed), time.time() - started
    pipeline = load_pipeline(args.model)
    if name == "untrained":
        torch.manual_seed(seed)
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config)
    return pipeline, time.time() - started


def run_all(args, judge: Judge, photos) -> dict:
    def results() -> dict:  # read anew each time: two processes may share the work
        return json.loads(args.output.read_text()) if args.output.exists() else {}

    def keep(name: str, numbers: dict) -> None:
        rounded = {key: round(value, 3) for key, value in numbers.items()}
        args.output.write_text(json.dumps({**results(), name: rounded}, indent=2) + "\n")
        print(name, rounded, flush=True)

    if "captions" not in results() and "base" in args.models:
        keep("captions", follow_captions(load_pipeline(args.model), judge))
    for seed in args.seeds:
        for name in args.models:
            if f"{name} / {seed}" in results():
                continue
            pipeline, seconds = prepare(name, args, seed)
            pictures = draw_all(pipeline, seed)
            if args.pictures:
                grid(pictures, columns=4).save(args.pictures / f"{name.replace(', ', '-')}-{seed}.png")
            keep(f"{name} / {seed}", {**measure(pictures, judge, photos), "seconds": seconds})
    return results()


def score_sheets(folder: Path, judge: Judge, photos) -> dict:
    """The results of runs whose pictures were kept, as this judge sees them."""
    results = {}
    for file in sorted(folder.glob("*-[0-9].png")):
        sheet, step = Image.open(file).convert("RGB"), SIZE + 2
        corners = [(left, top) for top in range(0, sheet.height, step) for left in range(0, sheet.width, step)]
        pictures = [sheet.crop((left, top, left + SIZE, top + SIZE)) for left, top in corners]
        name, seed = file.stem.replace("-prior", ", prior").rsplit("-", 1)
        results[f"{name} / {seed}"] = measure(pictures, judge, photos)
    return results


def table(results: dict) -> str:
    """Means over the seeds in Markdown, with the single values in brackets for the two that matter most."""
    kinds = [kind for kind in MODELS if any(name.startswith(f"{kind} / ") for name in results)]
    columns = ["likeness", "likeness in new scenes", "dog and new scene right", "class likeness", "class diversity",
               "class right", "memorised"]  # fmt: skip
    lines = ["| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for kind in kinds:
        runs = [value for name, value in results.items() if name.split(" / ")[0] == kind]
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            cell = f"{sum(values) / len(values):.2f}"
            if column in ("likeness", "class diversity"):
                cell += f" ({', '.join(f'{value:.2f}' for value in values)})"
            cells.append(cell)
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("toybox/sd"))
    parser.add_argument("--judge", type=Path, default=Path("toybox/judge"))
    parser.add_argument("--subject", type=Path, default=Path("toybox/subject"))
    parser.add_argument("--output", type=Path, default=Path("toybox/.build/table.json"))
    usual = [name for name in MODELS if not name.startswith("SDXL")]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=usual, help="those of SDXL: --model toybox/sdxl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two processes may share them")
    parser.add_argument("--pictures", type=Path, help="folder for a sheet with the 68 pictures of each run")
    parser.add_argument("--score", type=Path, help="only print the table for the sheets in this folder (of --pictures)")
    parser.add_argument("--samples", type=Path, help="only draw the sheet of 32 pictures, to this file")
    return parser.parse_args(argv)


def main(args) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.samples:
        pictures = draw_pictures(load_pipeline(args.model), list(SHEET), steps=30)
        grid([picture.resize((128, 128), 0) for picture in pictures], gap=4).save(args.samples, optimize=True)
        return
    if args.score:
        photos = load_photos(args.subject)
        print(table(score_sheets(args.score, Judge.load(args.judge), photos)))
        return
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    results = run_all(args, Judge.load(args.judge), load_photos(args.subject))
    print(table(results))


if __name__ == "__main__":
    main(parse_args())
