"""Sample images during training, drawn by the modules already in memory, and the drawing that infer.py shares.

The same prompts with the same seeds each time, so that only the training changes what they show. Drawing leaves no
trace in the training: train mode, gradients and every random state are as they were.
"""

import contextlib
import inspect
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from utils import errors, samplers, writing
from utils.report import gallery

save_png = gallery.save_png  # infer.py writes its pictures the same way
SMALL = 128  # pixels a side up to which all images of a prompt are drawn at once


class Sampler:
    """`draw(step)` leaves samples/step-000100/<prompt>-<image>.png; the work is split over all processes."""

    def __init__(
        self,
        run,
        family,
        prompts: Sequence[str],
        count: int = 4,  # images a prompt; image i has seed + i, whatever the prompt
        steps: int = 25,
        guidance: float = 7.5,
        scheduler: str = "DPMSolverMultistepScheduler",
        seed: int | None = None,  # None: the run's
        size: int | tuple[int, int] | None = None,  # pixels, or (width, height); None: the model's own
        negative: str = "",
        batch_size: int | None = None,  # images at once; None: one, or all of a prompt when they are small
        folder: str = "samples",  # in the output folder
        judges=None,  # scores.Scores of what is drawn
    ):
        self.run, self.family, self.prompts, self.count = run, family, list(prompts), count
        self.steps, self.guidance, self.scheduler, self.negative = steps, guidance, scheduler, negative
        self.seed = run.seed if seed is None else seed
        self.folder, self.judges = folder, judges
        size = size or family.resolution_default
        self.width, self.height = (size, size) if isinstance(size, int) else size
        self.batch_size = batch_size or (count if max(self.width, self.height) <= SMALL else 1)

    def draw(self, step: int) -> list[Path]:
        """Every process must call it. Returns the files of all processes; empty without prompts or images of them."""
        if not (self.prompts and self.count):
            return []
        try:
            mine = list(self._mine(step))
        except torch.OutOfMemoryError:  # the weights are worth more than a look at them
            errors.warn(
                f"no sample images at step {step}: out of memory; lower --num_validation_images or --resolution"
            )
            mine = []
        # The pictures travel to the main process, so the output folder need not be shared between machines.
        drawn = sorted(_gather(mine, self.run.world))
        folder = Path(self.run.output_dir) / self.folder / f"step-{step:06d}"
        if self.run.is_main and drawn:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for prompt, image, data in drawn:
                    writing.write(folder / f"{prompt:02d}-{image:02d}.png", data)
            except OSError as problem:  # a full disk
                errors.warn(f"{folder}: not all sample images were written ({problem.strerror or problem})")
            self._show(drawn, step)
            self._judge(drawn, step)
        return [folder / f"{prompt:02d}-{image:02d}.png" for prompt, image, _ in drawn]

    def _show(self, drawn: list[tuple[int, int, bytes]], step: int) -> None:
        """Hand the images to the trackers, each prompt under its own name."""
        from PIL import Image

        shown = {}
        for number, _, data in drawn:
            kind = "validation" if self.folder == "samples" else self.folder
            name = kind if len(self.prompts) == 1 else f"{kind}/{number}"
            shown.setdefault(name, []).append(Image.open(io.BytesIO(data)).convert("RGB"))
        self.run.log_images(step, shown)

    def _judge(self, drawn: list[tuple[int, int, bytes]], step: int) -> None:
        """Scores into metrics.jsonl and the trackers; those of other folders under names of their own."""
        from PIL import Image

        if not self.judges or len(drawn) < len(self.prompts) * self.count:  # interrupted: not comparable
            return
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for _, _, data in drawn]
        try:
            found = self.judges.measure(pictures, [self.prompts[number] for number, _, _ in drawn])
        except (OSError, RuntimeError, ValueError) as problem:  # out of memory, a photo that is gone
            errors.warn(f"no scores at step {step}: {(str(problem).splitlines() or [type(problem).__name__])[0]}")
            return
        kind = "" if self.folder == "samples" else self.folder.removesuffix("_samples") + "_"
        self.run.also(step, **{kind + name: value for name, value in found.items()})

    def _mine(self, step: int) -> Iterator[tuple[int, int, bytes]]:
        """This process's share as (prompt number, image number, PNG)."""
        run, family = self.run, self.family
        pipeline = family.pipeline(samplers.make(self.scheduler, family.pipeline().scheduler.config))
        jobs = [(prompt, image) for prompt in range(len(self.prompts)) for image in range(self.count)]
        for prompt in range(len(self.prompts)):
            images = [image for which, image in jobs[run.rank :: run.world] if which == prompt]
            seeds = [(self.seed + image) % 2**63 for image in images]
            with undisturbed(pipeline), torch.no_grad():
                words = family.sampling_prompts([self.prompts[prompt]], self.negative)
            told = {
                "prompt": self.prompts[prompt],
                "negative_prompt": self.negative,
                "steps": self.steps,
                "guidance_scale": self.guidance,
                "scheduler": self.scheduler,
                "base_model": public_name(family.name),
                "train_step": step,
            }
            pictures = draw(
                pipeline,
                words,
                seeds,
                steps=self.steps,
                guidance=self.guidance,
                width=self.width,
                height=self.height,
                batch_size=self.batch_size,
                dtype=run.dtype,
            )
            for k, picture in pictures:
                yield prompt, images[k], gallery.png_bytes(picture, {**told, "seed": seeds[k]})
                if run.interrupted:  # what is drawn is kept
                    return


def draw(
    pipeline,
    prompt_kwargs: dict,  # {"prompt": ..., "negative_prompt": ...} or {"prompt_embeds": (n, 77, c), ...}: one for all
    # images, or a list / rows of a tensor with one for each
    seeds: Sequence[int],  # one an image: any image can be drawn again alone, and the batch size does not matter
    *,
    steps: int = 25,
    guidance: float = 7.5,
    width: int | None = None,
    height: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,  # autocast to it, unless it is fp32
    **more,  # anything else the pipeline's call takes
) -> Iterator[tuple[int, "Image.Image"]]:  # noqa: F821
    """Yield (index into seeds, image) as they are finished. The caller may stop at any time."""
    device = pipeline._execution_device
    for start in range(0, len(seeds), batch_size):
        chunk = range(start, min(start + batch_size, len(seeds)))
        # On the CPU, because a GPU's generator gives other numbers than a CPU's.
        generators = [torch.Generator("cpu").manual_seed(seeds[k]) for k in chunk]
        narrow = torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with undisturbed(pipeline), torch.no_grad(), narrow:
            images = pipeline(
                **{name: _rows(value, chunk, len(seeds)) for name, value in prompt_kwargs.items()},
                generator=generators,
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=width,
                height=height,
                **(canvas(pipeline, len(chunk)) | more),
            ).images
        yield from enumerate(images, start)


def canvas(pipeline, count: int) -> dict:
    """What an in-painting pipeline wants besides a prompt when all of the picture is to be drawn; {} for others."""
    if "mask_image" not in inspect.signature(pipeline.__call__).parameters:
        return {}
    from PIL import Image

    # Resized to what is drawn; one for each image, since each has a generator of its own.
    grey, all_of_it = Image.new("RGB", (64, 64), "grey"), Image.new("L", (64, 64), 255)
    return {"image": [grey] * count, "mask_image": [all_of_it] * count, "strength": 1.0}


def _rows(value, chunk: range, count: int):
    """The part of a prompt argument that belongs to the images of `chunk`."""
    if value is None:
        return None
    if isinstance(value, str):
        return [value] * len(chunk)
    if len(value) not in (1, count):
        raise ValueError(f"{len(value)} prompts for {count} images")
    if isinstance(value, torch.Tensor):
        return value[chunk.start : chunk.stop] if len(value) > 1 else value.expand(len(chunk), *value.shape[1:])
    return list(value[chunk.start : chunk.stop]) if len(value) > 1 else list(value) * len(chunk)


@contextlib.contextmanager
def undisturbed(pipeline):
    """Evaluation mode inside; outside, each module's own mode and every global random state are as before."""
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    modes = [(module, module.training) for part in modules for module in part.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    state = random.getstate()
    try:
        for module in modules:
            module.eval()
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        for module, mode in modes:  # one by one: frozen parts may well be in evaluation mode inside trained ones
            module.training = mode


def public_name(name: str) -> str:
    """A model's name as it may be shown to others: of a local folder only its last part."""
    return Path(name).name if Path(name).expanduser().exists() or Path(name).is_absolute() else name


def _gather(mine: list, world: int) -> list:
    if world == 1:
        return mine
    shares = [None] * world
    torch.distributed.all_gather_object(shares, mine)
    return [each for share in shares for each in share]
