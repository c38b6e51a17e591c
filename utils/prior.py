"""Class images: what the untouched model draws for the class prompt, so that training can hold on to it.

The folder's owner comes first: pictures found there are used and never touched. What is missing is drawn, image k
always from the seed of k, whatever the batch size or number of processes, and a stopped run goes on where it was.
"""

import contextlib
import gc
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils import errors, images, randomness, samplers, validation
from utils.runtime import startup

SIDECAR = "class_images.json"
MARK = "drawn"  # text in a file: what its pixels were when it was drawn
LOCK = ".class_images.lock"
WAIT = 1.0  # seconds between attempts to take it
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
    identity = {"prompt": prompt, "model": family.name, "revision": family.revision, "guidance_scale": guidance}
    identity["prediction_type"] = family.prediction_type  # None, as in older records: the model's own
    identity["clip_skip"] = family.clip_skip or None
    here = _look(folder, identity, count)
    # Every rank has looked before one of them writes. They may have seen different things: another run draws as well.
    if any(_everyones(run, bool(here.missing))):
        with run.phase("class images"), _alone(run, folder) as may_draw:
            here = _look(folder, identity, count)  # another run may have drawn them in the meantime
            here.tell(run)
            missing = _everyones(run, here.missing)[0]
            if missing and may_draw:
                _fill(run, family, here, missing, identity, prompt, batch_size, guidance, precision, resolution)
    else:
        here.tell(run)
    mine, wanted = here.mine, here.wanted
    chosen = mine + [path for path in wanted.values() if path.is_file()]
    if len(chosen) < count and not run.stopping:
        errors.refuse(
            f"--class_data_dir '{folder}' has {len(chosen)} of {count} class images after drawing: "
            "all processes must see the same folder",
            errors.FAILED,
        )
    return chosen


def _everyones(run, value) -> list:
    """The value of each process; also a barrier."""
    if run.world == 1 or not torch.distributed.is_initialized():
        return [value]
    values = [None] * run.world
    torch.distributed.all_gather_object(values, value)
    return values


def _fill(run, family, here: "Look", missing, identity, prompt, batch_size, guidance, precision, resolution) -> None:
    """Draws what is missing, each process its share."""
    folder = here.folder
    seeds = {name: randomness.seed_of(run.seed, "class", _number(name)) for name in missing}
    if run.is_main:
        recorded = here.record.get("images", {})
        kept = {name: seed for name, seed in recorded.items() if name in here.ours | here.disputed}
        _write(folder, identity | {"steps": STEPS, "images": dict(sorted((kept | seeds).items()))})
        run.say(f"drawing {len(missing)} class images into '{folder}' ({len(here.mine)} found there are yours)")
    run.accelerator.wait_for_everyone()  # what is ours is written down before the first of it exists
    share = {name: seeds[name] for name in missing[run.rank :: run.world]}
    if share:
        folder.mkdir(parents=True, exist_ok=True)  # a network drive may show it late
        _draw(run, family, folder, prompt, share, batch_size, guidance, precision, resolution, len(missing))
    run.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _alone(run, folder: Path):
    """Inside, no other run draws into the folder; yields whether this one may: not after a stop while it waited.

    The main process waits and tells the others every time that it has to: nobody stands in a barrier for hours.
    """
    lock, said = startup.FolderLock(folder, LOCK), False
    while True:
        state = None
        if run.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                owner = lock.take()
            except OSError as problem:
                owner, state = None, f"--class_data_dir '{folder}' cannot be written: {problem.strerror or problem}"
            if owner is None and state is None:
                if lock.is_current():
                    state = True
                else:  # the run that held it removed the file
                    lock.release()
            elif state is None and run.stopping:
                state = False
        state = _everyones(run, state)[0] if run.is_main or torch.distributed.is_initialized() else True
        if state is not None:
            break
        if run.is_main and owner and not said:
            run.say(f"waiting for the run that draws class images into '{folder}' ({owner})")
            said = True
        time.sleep(WAIT)
    if isinstance(state, str):
        errors.refuse(state, errors.FAILED, once=True)
    try:
        yield state
    finally:
        if run.is_main and state:
            lock.remove()


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
            (folder / LOCK).unlink(missing_ok=True)  # of a run that was killed while it drew
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


def _was_drawn(path: Path) -> bool:
    """Whether an unreadable file may be replaced: it still says that it was drawn, or it is empty."""
    from PIL import Image

    try:
        if not path.stat().st_size:
            return True
        with Image.open(path, formats=["PNG"]) as picture:
            return MARK in picture.info  # it stands before the pixels
    except Exception:
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


@dataclass
class Look:
    """What a folder holds, and what of it a run of `count` class images takes."""

    folder: Path
    record: dict
    mine: list[Path] = field(default_factory=list)  # usable pictures that nobody here drew
    ours: set[str] = field(default_factory=set)  # names of drawn ones, by their pixels
    disputed: set[str] = field(default_factory=set)  # named like drawn ones, and they are not or are changed
    wanted: dict[str, Path] = field(default_factory=dict)  # drawn ones, there or not
    warnings: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        return [name for name in self.wanted if name not in self.ours]

    def tell(self, run) -> None:
        for warning in self.warnings if run.is_main else ():
            errors.warn(warning)


def _look(folder: Path, identity: dict, count: int) -> Look:
    here = Look(folder, _record(folder))
    recorded = here.record.get("images", {})
    paths = images.list_images(folder)
    named = [path for path in paths if path.parent == folder and path.name in recorded]
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1, len(named)))) as pool:
        drawn = dict(zip(named, pool.map(lambda path: _is_drawn(path, recorded[path.name]), named)))
    here.ours, unclear = {path.name for path in named if drawn[path]}, []
    for report in images.inspect([path for path in paths if not drawn.get(path)]):
        again = bool(report.problem) and report.path in drawn and _was_drawn(report.path)
        if report.problem:
            here.warnings.append(f"'{report.path}' {report.problem}; " + ("drawn again" if again else "not used"))
        elif report.path not in drawn:
            here.mine.append(report.path)
        if report.path in drawn and not again:
            here.disputed.add(report.path.name)
            unclear += [] if report.problem else [report.path]
    here.mine = (here.mine + unclear)[:count]
    # A name that the owner uses, even for a broken file, is not ours to write to.
    taken = ({path.name for path in folder.glob("class-*")} - recorded.keys()) | here.disputed
    names = (name for name in map("class-{:05d}.png".format, range(count + len(taken))) if name not in taken)
    here.wanted = {name: folder / name for name, _ in zip(names, range(count - len(here.mine)))}
    # An old version left no mark: what bears the name of a drawn one is not passed off as another prompt's either.
    if (here.wanted and here.ours) or set(unclear) & set(here.mine):
        _refuse_strangers(folder, here.record, identity, len(here.ours) + len(unclear))
    return here


def _refuse_strangers(folder: Path, record: dict, identity: dict, count: int) -> None:
    """Images of another prompt would teach something else under this one's name."""
    for name, new in identity.items():
        old = record.get(name)
        if old != new:
            errors.refuse(
                f"--class_data_dir '{folder}' holds {count} images drawn for {name} {old!r}, and this run has "
                f"{new!r}: choose another --class_data_dir, or delete class-*.png and {SIDECAR} there"
            )


def _write(folder: Path, record: dict) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False).encode()
    _replace(folder, SIDECAR, lambda temporary: temporary.write_bytes(text))


def _replace(folder: Path, name: str, write) -> None:
    """Whole or as before; nothing is left of a file that could not be written."""
    temporary = folder / f".{name}.tmp"  # hidden; what a kill leaves is overwritten by the next run
    try:
        temporary.unlink(missing_ok=True)  # it might be a link that leads anywhere
        write(temporary)
        os.replace(temporary, folder / name)
    except OSError as problem:
        reason = problem.strerror or problem
        more = "free some space or name another folder; the same command resumes the drawing"
        errors.refuse(f"--class_data_dir: '{folder / name}' cannot be written ({reason}): {more}", errors.FAILED)
    finally:
        temporary.unlink(missing_ok=True)


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
                _replace(folder, name, lambda path, one=picture, mark=mark: one.save(path, "PNG", pnginfo=mark))
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
