"""Class images: what the untouched model draws for the class prompt, so that training can hold on to it.

The folder's owner comes first: pictures found there are used and never touched. What is missing is drawn, image k
always from the seed of k, whatever the batch size or number of processes, and a stopped run goes on where it was.
"""

import contextlib
import gc
import hashlib
import json
import os
from pathlib import Path

import torch

from utils import errors, images, randomness, samplers, validation

SIDECAR = "class_images.json"
MARK = "drawn"  # text in a file: what its pixels were when it was drawn
STEPS = 25  # of DPM-Solver++, which needs half of what the default solvers do
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def fill(
    run,
    family,
    folder: str | os.PathLike,
    *,
    prompt: str,
    count: int,
    batch_size: int = 4,
    guidance: float = 7.5,  # as pipelines draw; less is closer to all that the model knows of the class
    precision: str | None = None,  # no, fp32, fp16, bf16; None or "no": fp16 on a GPU, fp32 elsewhere
    resolution: int | None = None,  # of training; images are drawn at the model's own size or this, if it is larger
) -> list[Path]:
    """=> exactly `count` pictures for training, the owner's before ours; fewer only when a signal stopped us."""
    folder = Path(folder).expanduser()
    record = _record(folder)
    mine, ours = _found(run, folder, record)
    mine = mine[:count]
    # A name that the owner uses, even for a broken file, is not ours to write to.
    taken = {path.name for path in folder.glob("class-*")} - record.get("images", {}).keys()
    names = (name for name in map("class-{:05d}.png".format, range(count + len(taken))) if name not in taken)
    wanted = {name: folder / name for name, _ in zip(names, range(count - len(mine)))}
    identity = {"prompt": prompt, "model": family.name, "revision": family.revision, "guidance_scale": guidance}
    identity["prediction_type"] = family.prediction_type  # None, as in older records: the model's own
    identity["clip_skip"] = family.clip_skip or None
    if wanted and ours:
        _refuse_strangers(folder, record, identity, len(ours))
    missing = [name for name in wanted if name not in ours]
    run.accelerator.wait_for_everyone()  # every rank has looked before one of them writes
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with run.phase("class images"):
            seeds = {name: randomness.seed_of(run.seed, "class", _number(name)) for name in missing}
            if run.is_main:
                kept = {name: seed for name, seed in record.get("images", {}).items() if name in ours}
                _write(folder, identity | {"steps": STEPS, "images": dict(sorted((kept | seeds).items()))})
                run.say(f"drawing {len(missing)} class images into '{folder}' ({len(mine)} found there are yours)")
            run.accelerator.wait_for_everyone()  # what is ours is written down before the first of it exists
            share = {name: seeds[name] for name in missing[run.rank :: run.world]}
            if share:
                _draw(run, family, folder, prompt, share, batch_size, guidance, precision, resolution, len(missing))
            run.accelerator.wait_for_everyone()
    chosen = mine + [path for path in wanted.values() if path.is_file()]
    if len(chosen) < count and not run.stopping:
        errors.refuse(
            f"--class_data_dir '{folder}' has {len(chosen)} of {count} class images after drawing: "
            "all processes must see the same folder",
            errors.FAILED,
        )
    return chosen


def fill_all(run, family, concepts, resolution: int | None = None, **how) -> list[list[Path]]:
    """The class images of each concept. After a signal fewer; but as many lists as there are concepts."""
    return [
        fill(
            run,
            family,
            one.class_data_dir,
            prompt=one.class_prompt,
            count=one.num_class_images,
            resolution=resolution,
            **how,
        )
        for one in concepts
    ]


def remove_drawn(concepts) -> None:
    """Deletes the class images that a script drew, and their folder once it is empty: never one of the owner's, even
    where it has taken the name of a drawn one."""
    for folder in {Path(one.class_data_dir).expanduser() for one in concepts if one.class_data_dir}:
        if not (record := _record(folder)).get("images"):
            continue
        left, deleted = {}, 0
        for name, seed in record["images"].items():
            path = folder / name
            if path.parent != folder:  # a record is a file, and files can be edited
                continue
            if _is_drawn(path, seed):
                path.unlink()
                deleted += 1
            elif path.exists():
                left[name] = seed
        print(f"--del_cls_imgs_dir: {deleted} class images deleted from '{folder}'", flush=True)
        if left:
            _write(folder, record | {"images": left})
            names = ", ".join(list(left)[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            errors.warn(
                f"--del_cls_imgs_dir leaves {names} in '{folder}': not as they were drawn, or by an old version"
            )
        else:
            (folder / SIDECAR).unlink()
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _mark(picture, seed: int) -> str:
    return hashlib.blake2b(f"{seed} {picture.size} ".encode() + picture.tobytes(), digest_size=16).hexdigest()


def _is_drawn(path: Path, seed: int) -> bool:
    """Whether a file holds the very pixels that were drawn from this seed, as only a drawn one says of itself."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return MARK in picture.info and picture.info[MARK] == _mark(picture, seed)
    except Exception:  # a broken file, or no picture at all
        return False


def _number(name: str) -> int:
    return int(Path(name).stem.removeprefix("class-"))


def _record(folder: Path) -> dict:
    """The sidecar: which prompt and model drew the images here, and each one's seed."""
    path = folder / SIDECAR
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record.get("images"), dict):
            raise ValueError("it lists no images")
        return record
    except (OSError, ValueError, AttributeError) as problem:
        errors.refuse(f"'{path}' cannot be read ({problem}): choose another --class_data_dir", errors.DATA)


def _found(run, folder: Path, record: dict) -> tuple[list[Path], set[str]]:
    """=> (the owner's usable pictures, names of usable ones that we drew)"""
    mine, ours = [], set()
    for report in images.inspect(images.list_images(folder)):
        drawn = report.path.parent == folder and report.path.name in record.get("images", {})
        if report.problem and run.is_main:
            errors.warn(f"'{report.path}' {report.problem}; " + ("drawn again" if drawn else "not used"))
        if not report.problem and drawn:
            ours.add(report.path.name)
        elif not report.problem:
            mine.append(report.path)
    return mine, ours


def _refuse_strangers(folder: Path, record: dict, identity: dict, count: int) -> None:
    """Images of another prompt would teach something else under this one's name."""
    for field, new in identity.items():
        old = record.get(field)
        if old != new:
            errors.refuse(
                f"--class_data_dir '{folder}' holds {count} images drawn for {field} {old!r}, and this run has "
                f"{new!r}: choose another --class_data_dir, or delete class-*.png and {SIDECAR} there"
            )


def _write(folder: Path, record: dict) -> None:
    temporary = folder / f".{SIDECAR}.tmp"
    temporary.unlink(missing_ok=True)  # it might be a link that leads anywhere
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, folder / SIDECAR)


def _draw(
    run, family, folder, prompt, share: dict[str, int], batch_size, guidance, precision, resolution, total
) -> None:
    """Draws {file name: seed}, this process's share of `total`; each file is complete or absent."""
    from PIL.PngImagePlugin import PngInfo

    if precision in (None, "no"):
        precision = "fp16" if run.device.type in ("cuda", "xpu", "mps") else "fp32"
    pipeline = family.pipeline_from_disk(PRECISIONS[precision]).to(run.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = _fast_solver(pipeline.scheduler)
    native = _native_size(pipeline)
    size = {"height": resolution, "width": resolution} if native and resolution and resolution > native else {}
    todo = list(share.items())
    with torch.no_grad():
        for start in range(0, len(todo), batch_size):
            if run.stopping:
                break
            names, seeds = zip(*todo[start : start + batch_size])
            # On the CPU, so that one seed means one image on every machine.
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            drawn = pipeline(
                generator=generators,
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                **size,
                **family.words_for(pipeline, [prompt] * len(names)),
                **validation.canvas(pipeline, len(names)),
            ).images
            for name, seed, picture in zip(names, seeds, drawn, strict=True):
                mark = PngInfo()
                mark.add_text(MARK, _mark(picture, seed))
                temporary = folder / f".{name}.tmp"  # hidden; what a kill leaves is overwritten by the next run
                temporary.unlink(missing_ok=True)  # it might be a link that leads anywhere
                picture.save(temporary, "PNG", pnginfo=mark)
                os.replace(temporary, folder / name)
            run.say(f"class images: {min(run.world * (start + batch_size), total)}/{total}")
    del pipeline
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def _fast_solver(scheduler):
    return samplers.make("DPMSolverMultistepScheduler", scheduler.config)


def _native_size(pipeline) -> int | None:
    """Pixels a side that the pipeline draws when no size is given."""
    size = pipeline.unet.config.sample_size
    return size * getattr(pipeline, "vae_scale_factor", 1) if isinstance(size, int) else None
