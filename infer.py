"""Draw images from a base model and what a training script saved.

    python infer.py --lora runs/dog --prompt "a photo of sks dog in a bucket"
    python infer.py --lora runs/dog:0.8 --lora ink.safetensors:0.5 --prompt_set all --identifier sks --class_noun dog
    python infer.py --pretrained_model_name_or_path runs/dog-full --prompt_file prompts.txt --num_images 8
    python infer.py --content_lora runs/dog --style_lora runs/ink --prompt "a sks dog in the style of ink"
    python infer.py --checkpoint runs/dog-full/checkpoint-400 --prompt "a photo of sks dog" --seed 17 --num_images 1

The base model is read from what was saved, unless it is given. Every image has a seed of its own, the same ones for
every prompt: --seed, --seed + 1, ... So `--seed 17 --num_images 1` draws the image of seed 17 again, alone. Each PNG
carries the settings it was drawn with.
"""

import functools
import re
from pathlib import Path

from utils import arguments, captions, interrupts, models, preflight, samplers, saved, targets, writing
from utils.arguments.settings import choice, flag, folder, nearest, number, text, whole
from utils.arguments.settings import prompt as prompt_text
from utils.errors import readable, refuse, when_writing_fails
from utils.preflight import model_folder

REFINERS = ("StableDiffusionXLImg2ImgPipeline",)  # what the published one says that it is
# Without an identifier its place closes up: the same scene for the subject and for any other of its class.
PROMPT_SETS = {
    "bucket": "a photo of {identifier} {class} in a bucket",
    "sleeping": "a photo of {identifier} {class} sleeping",
    "acropolis": "a photo of {identifier} {class} in front of the Acropolis",
    "swimming": "a photo of {identifier} {class} swimming in a pool",
    "haircut": "a photo of {identifier} {class} getting a haircut",
    "plain": "a photo of {identifier} {class}",
}


def parse_args(argv=None):
    parser = arguments.new_parser(__doc__)
    parser.epilog = "Order of precedence: defaults, then --config, then the command line."
    add = arguments.group(parser, "Model")
    help = "base model, or a full result of training: a pipeline folder, hub name, or toybox"
    add("pretrained_model_name_or_path", folder, None, help, unset="what --lora or --checkpoint was trained on")
    help = "LoRA folder, file, checkpoint-N or hub name, and its strength (default: 1); repeat it for more"
    add("lora", folder, None, help, append=True, metavar="PATH[:SCALE]")
    help = "learned_embeddings.safetensors or its folder; those beside a LoRA are found; repeat it for more"
    add("embeddings", folder, None, help, append=True)
    help = "B-LoRA of SDXL: of this LoRA only what it says of content (what is shown)"
    add("content_lora", folder, None, help, metavar="PATH[:SCALE]")
    add("style_lora", folder, None, "the same, of style (how it looks)", metavar="PATH[:SCALE]")
    add("checkpoint", folder, None, "checkpoint-N of a full run, whose networks replace the base's, or of a LoRA run")
    add("revision", text, None, "branch, tag or commit of the hub model")
    add("variant", text, None, "file variant of the weights, e.g. fp16")
    add("clip_skip", whole(0), None, "last layers of the text encoders that are left out", unset="as in training")
    add("allow_pickle", flag, False, arguments.ALLOW_PICKLE)
    help = "what the model predicts"
    unset = "as in training, else as the model's scheduler says"
    add("prediction_type", choice(*saved.PREDICTION_TYPES), None, help, unset=unset)
    help = "VAE folder or hub name"
    add("pretrained_vae_model_name_or_path", folder, None, help, unset="what the run used, else the model's own")
    add("refiner", folder, None, "SDXL refiner (folder or hub name) that draws the last part of each image")
    add("refiner_start", number(above=0, below=1), 0.8, "the share of the noise schedule after which it takes over")

    add = arguments.group(parser, "Prompts; {identifier} and {class} in them are replaced")
    add("prompt", prompt_text, None, "repeat it for more", append=True)
    add("prompt_file", folder, None, "one prompt a line; empty lines and lines that begin with # are left out")
    add("prompt_set", choice(*PROMPT_SETS, "all"), None, "scenes to try a subject on", many=True)
    add("identifier", text, None, "the rare word that names the subject, e.g. sks")
    add("class_noun", text, None, "what the subject is, e.g. dog")
    help = "each prompt once more without the identifier: does the model still know others of the class?"
    add("also_without_identifier", flag, False, help)
    add("negative_prompt", prompt_text, "", "what the images should not show")

    add = arguments.group(parser, "Drawing")
    add("num_images", whole(1), 4, "images a prompt")
    add("seed", whole(0), 0, "seed of each prompt's first image; the next ones count up")
    add("num_inference_steps", whole(1), 25, "denoising steps")
    add("guidance_scale", number(0), 7.5, "classifier-free guidance; 1 is none")
    help = f"{', '.join(samplers.SAMPLERS)}, one of their class names, or model for the model's own"
    add("scheduler", text, "dpm++", help, metavar="NAME")
    add("height", whole(8), None, "pixels, a multiple of 8", unset="the model's")
    add("width", whole(8), None, "pixels, a multiple of 8", unset="the model's")
    add("batch_size", whole(1), 4, "images drawn at once: speed and memory, not what is drawn")
    add("dtype", choice("auto", "fp32", "fp16", "bf16"), "auto", "precision; auto is fp16 on a GPU and fp32 elsewhere")
    add("device", text, "auto", "cpu, cuda, cuda:1, mps, ...")

    add = arguments.group(parser, "Output")
    add("output_dir", folder, "images", "where the images go; those of the same names are replaced")
    add("grid", flag, True, "also grid.png, all in one labelled picture: a row a prompt, a column a seed")
    parser.only_once = ("checkpoint",)
    return arguments.parse(parser, argv)


@interrupts.answered("stopped; images that are listed above are complete")
def main(args):
    prompts, base, loras, modules, learned = check(args)  # every complaint, before anything heavy is imported
    seeds = list(range(args.seed, args.seed + args.num_images))
    words = {word: tokens for one in learned for word, tokens in one.words.items()}
    spelled = functools.partial(captions.replaced, words=words)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    files = [Path(args.output_dir, file_name(prompts.index(prompt), prompt, seed)) for prompt, seed in jobs]
    if args.dry_run:
        return print_plan(base, loras, modules, learned, jobs, files)
    preflight.create(args.output_dir)
    writing.sweep(args.output_dir, older_than=3600)
    from utils import assembling, sheets, validation
    from utils.report import gallery
    from utils.runtime import startup

    startup.quiet()
    device, dtype = assembling.place(args.device, args.dtype)
    kind, changes = samplers.find(args.scheduler)
    pipeline = assembling.pipeline(base, loras, modules, device, dtype, kind, changes, args.allow_pickle, learned)
    refiner = assembling.refiner(args.refiner, pipeline, kind, changes) if args.refiner else None
    say_averaged(loras, modules, learned)
    told = {
        "negative_prompt": args.negative_prompt,
        "steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "scheduler": args.scheduler,
        "base_model": validation.public_name(base.name),
        "lora": [
            f"{validation.public_name(lora.given)}:{lora.scale:g}" + (f" ({lora.part})" if lora.part else "")
            for lora in loras
        ],
        **({"embeddings": [f"{one.file.parent.name}/{one.file.name}" for one in learned]} if learned else {}),
        "checkpoint": Path(args.checkpoint).name if args.checkpoint else "",
        "averaged": ", ".join(path.name for path in averaged(loras, modules, learned)),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        **({"refiner": validation.public_name(args.refiner), "refiner_start": args.refiner_start} if refiner else {}),
    }
    images = validation.draw(
        pipeline,
        assembling.words(pipeline, base, [spelled(prompt) for prompt, _ in jobs], spelled(args.negative_prompt)),
        [seed for _, seed in jobs],
        steps=args.num_inference_steps,
        guidance=args.guidance_scale,
        width=args.width,
        height=args.height,
        batch_size=args.batch_size,
        **({"denoising_end": args.refiner_start, "output_type": "latent"} if refiner else {}),
    )
    if refiner:
        images = refined(refiner, images, [(spelled(prompt), seed) for prompt, seed in jobs], args)
    cells = []
    for k, image in images:
        prompt, seed = jobs[k]
        own = {"prompt": prompt, "seed": seed, "width": image.width, "height": image.height}
        with when_writing_fails(f"{files[k]} cannot be written ({len(cells)} of {len(jobs)} images are complete)"):
            files[k] = gallery.save_beside(image, files[k], own | told)
        print(f"{files[k]}  seed {seed}  {prompt}", flush=True)
        cells.append(image)
    if args.grid and len(cells) > 1:
        sheet = sheets.grid(cells, prompts, [f"seed {seed}" for seed in seeds])
        told |= {"prompts": prompts, "seeds": seeds}
        with when_writing_fails(f"{Path(args.output_dir, 'grid.png')} cannot be written; all images are complete"):
            files.append(gallery.save_beside(sheet, Path(args.output_dir, "grid.png"), told))
        print(f"{files[-1]}  prompts down, seeds across")
    return files


def refined(refiner, latents, jobs: list, args):
    """The base's unfinished latents => images: the refiner goes on from the noise that is left."""
    from utils import validation

    for k, latent in latents:
        prompt, seed = jobs[k]
        words = {"prompt": prompt, "negative_prompt": args.negative_prompt or None, "image": latent[None]}
        drawn = validation.draw(
            refiner,
            words,
            [seed],
            steps=args.num_inference_steps,
            guidance=args.guidance_scale,
            denoising_start=args.refiner_start,
        )
        yield k, next(image for _, image in drawn)


def file_name(number: int, prompt: str, seed: int) -> str:
    """The number keeps the prompts in order, and apart where their words are not."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-")
    return f"{number:02d}-{words or 'prompt'}-seed{seed}.png"


# Options -> what will be loaded and drawn, or one sentence a mistake.


def check(args):
    """Refuse what cannot work, all of it at once, before anything heavy is imported."""
    wrong = []
    prompts = all_prompts(args, wrong)
    loras = [lora for given in args.lora if (lora := saved.lora(given, wrong, allow_pickle=args.allow_pickle))]
    for part in targets.BLOCKS:
        given = getattr(args, f"{part}_lora")
        if given and (lora := saved.lora(given, wrong, f"--{part}_lora", part, args.allow_pickle)):
            loras.append(lora)
    modules = saved.checkpoint(args.checkpoint, wrong) if args.checkpoint else {}
    if isinstance(modules, saved.Lora):
        loras, modules = [*loras, modules], {}
    wrong += saved.twice(loras)
    learned = saved.embeddings(loras, args.embeddings, wrong)
    if not samplers.find(args.scheduler):
        names = ["model", *samplers.SAMPLERS]
        wrong.append(f"--scheduler {args.scheduler} is none of: {', '.join(names)}{nearest(args.scheduler, names)}")
    for name, value in (("height", args.height), ("width", args.width)):
        if value and value % 8:
            wrong.append(
                f"--{name} {value} is no multiple of 8; the nearest are {value // 8 * 8} and {value // 8 * 8 + 8}"
            )
    wrong += model_folder.elsewhere(args)
    if args.refiner and models.read_index(args.refiner, option="refiner").get("_class_name") not in REFINERS:
        wrong.append(f"--refiner {args.refiner} is no SDXL refiner; give one of: {', '.join(REFINERS)}")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        wrong.append(f"--output_dir {args.output_dir} is a file; give a folder")
    if wrong:  # what was saved is not all there, so a base recorded in it cannot be looked for
        refuse(wrong)
    base = saved.base(args.pretrained_model_name_or_path, loras, args.checkpoint if modules else None, wrong)
    if base:
        base.revision, base.variant = args.revision or base.revision, args.variant or base.variant
        base.clip_skip = base.clip_skip if args.clip_skip is None else args.clip_skip
        base.vae = args.pretrained_vae_model_name_or_path or base.vae
        parts = models.read_index(base.name, base.revision)  # refuses a name that leads nowhere
        say_prediction_type(base, args.prediction_type, loras)
        base.prediction_type = args.prediction_type or base.prediction_type
        if any(name not in modules for name in saved.without(parts)):
            base.encoders = saved.lent_encoders(base, parts, wrong)
        wrong += [f"--pretrained_model_name_or_path {problem}" for problem in saved.parts_cut_short(base.name)]
        noise = models.read_scheduler(base.name, base.revision)
        if base.rescale_betas_zero_snr:
            noise |= {"rescale_betas_zero_snr": True}
        configs = [noise, *([models.read_scheduler(args.refiner)] if args.refiner else [])]
        misfits = (samplers.misfit(args.scheduler, config, "--scheduler") for config in configs)
        wrong += dict.fromkeys(complaint for complaint in misfits if complaint)
        wrong += [complaint for lora in loras if (complaint := saved.misfit(lora, base.name, parts))]
        if args.refiner and "text_encoder_2" not in parts:
            wrong.append(f"--refiner goes on where an SDXL model stops, and {base.name} is none; leave it out")
        strangers = [name for name in modules if name not in parts]
        wrong += [f"--checkpoint {args.checkpoint} holds {name}/, which {base.name} lacks" for name in strangers]
    if wrong:
        refuse(wrong)
    return prompts, base, loras, modules, learned


def say_prediction_type(base, given: str | None, loras: list) -> None:
    """One line where the model's scheduler, the run and the option do not agree."""
    own = models.read_scheduler(base.name, base.revision).get("prediction_type", "epsilon")
    told = {saved.said_to_predict(lora.file) for lora in loras}
    trained = base.prediction_type or ("epsilon" if told == {"epsilon"} else None)
    used = given or base.prediction_type or own
    if trained and {own, trained, used} != {used}:
        said = f"the base's scheduler says {own}, the training said {trained}"
        print(f"prediction type: {used} is used ({said}); change it with --prediction_type", flush=True)


def all_prompts(args, wrong: list) -> list:
    """In the order --prompt, --prompt_file, --prompt_set, each once."""
    raw = list(args.prompt)
    if args.prompt_file:
        try:
            lines = readable(args.prompt_file).decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            wrong.append(f"--prompt_file {args.prompt_file} cannot be read: {getattr(problem, 'strerror', problem)}")
        else:
            if any("\0" in line for line in lines):
                wrong.append(f"--prompt_file {args.prompt_file} {captions.NUL}")
            found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not found:
                wrong.append(f"--prompt_file {args.prompt_file} holds no prompt")
            raw += found
    raw += [PROMPT_SETS[name] for name in (PROMPT_SETS if "all" in args.prompt_set else args.prompt_set)]
    if not raw and not args.prompt_file:
        wrong.append("there is nothing to draw; give --prompt, --prompt_file or --prompt_set")
    if any("{class}" in each for each in raw) and not args.class_noun:
        wrong.append("a prompt names {class}, as every --prompt_set does; give --class_noun, e.g. dog")
    if args.also_without_identifier and not args.identifier:
        wrong.append("--also_without_identifier needs --identifier, the word to leave out")
    prompts = []
    for each in raw:
        each = each.replace("{class}", args.class_noun or "{class}")
        with_it = each.replace("{identifier}", args.identifier or "{identifier}")
        prompts.append(without(with_it, "{identifier}"))
        if args.also_without_identifier:
            prompts.append(without(with_it, args.identifier or ""))
    return list(dict.fromkeys(prompts))


def without(prompt: str, word: str) -> str:
    """The prompt without a word: "a photo of sks dog" => "a photo of dog"."""
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w) ?", "", prompt).strip() if word else prompt


def print_plan(base, loras: list, modules: dict, learned: list, jobs: list, files: list) -> list:
    print(f"base model: {base.name}" + (f", text encoders of {base.encoders.name}" if base.encoders else ""))
    for lora in loras:
        print(f"LoRA: {lora.file} at {lora.scale:g}" + (f", only its {lora.part}" if lora.part else ""))
    for one in learned:
        print(f"embeddings: {one.file}, " + ", ".join(one.words or one.names))
    for name, path in modules.items():
        print(f"{name}: {path}")
    say_averaged(loras, modules, learned)
    for (prompt, seed), file in zip(jobs, files):
        print(f"{file}  seed {seed}  {prompt}")
    return []


def averaged(loras: list, modules: dict, learned: list) -> list:
    """Checkpoints whose averaged weights are drawn with, as the finished result of their run would be."""
    paths = [*(one.file for one in [*loras, *learned]), *modules.values()]
    return list(dict.fromkeys(path.parent for path in paths if saved.averaged(path) != path))


def say_averaged(loras: list, modules: dict, learned: list) -> None:
    for checkpoint in averaged(loras, modules, learned):
        print(f"{checkpoint.name}: drawn with its averaged weights (--use_ema)", flush=True)


if __name__ == "__main__":
    main(parse_args())
