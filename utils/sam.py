"""Masks by SAM: what a box or a point in the picture shows (Kirillov et al. 2023, arXiv 2304.02643).

Each picture without a mask of its own goes through SAM once, before the model that learns takes the memory. The masks
lie in the output folder, named after picture, model and prompt, so that a run that goes on, or the same command given
again, finds them there. Nothing is written beside the pictures.
"""

import dataclasses
import gc
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from utils import errors, images, masks, models, precomputed

FOLDER = "sam_masks"  # in the output folder
FORMAT = 1
# A point leaves open whether a part or the whole is meant, and need not lie on the subject.
BOX = (0.05, 0.05, 0.95, 0.95)  # nearly all of the picture: its subject
LEAST, MOST = 0.001, 0.999  # share of the picture that a mask covers; beyond these it says nothing


def attach(
    run,
    *lists: Sequence,  # of datasets.Example, which may have masks of their own
    sam_model_name_or_path: str | None = None,
    sam_box: Sequence[float] = (),  # left, top, right, bottom as shares of the picture
    sam_point: Sequence[float] = (),  # x, y
    masked_loss: bool = False,  # photos need masks
    mask_prior: bool = False,  # class images do
    alpha_background: str = "white",
    allow_pickle: bool = False,
) -> list[Sequence]:
    """The same lists; where masks are needed, pictures without one now have SAM's."""
    if not sam_model_name_or_path:
        return list(lists)

    def lacks(one) -> bool:
        return not one.mask and (mask_prior if one.is_class else masked_loss)

    wanted = {one.key: one for each in lists for one in each if lacks(one)}
    box = tuple(sam_box) or (() if sam_point else BOX)
    how = {"box": box, "point": tuple(sam_point), "alpha_background": alpha_background}
    folder = _model_folder(sam_model_name_or_path, allow_pickle)
    name = precomputed.digest(FORMAT, precomputed.fingerprint(str(folder), "", None, None), how)
    paths = {key: Path(run.output_dir, FOLDER, f"{key}-{name}.png") for key in wanted}
    missing = [key for key, path in paths.items() if not _whole(path)]
    run.barrier()  # every process has looked before one of them writes
    if missing:
        run.say(f"masks of {len(missing)} pictures by SAM")
        with run.phase("masks by SAM"):
            todo = {paths[key]: wanted[key].source for key in missing[run.rank :: run.world]}
            if todo:
                _fill(run, folder, todo, how, allow_pickle)
            run.barrier()
    found = _checked(wanted, paths, sam_box)
    return [
        [dataclasses.replace(one, mask=found.get(one.key)) if lacks(one) else one for one in each] for each in lists
    ]


def _whole(path: Path) -> bool:
    """There and readable: a machine that lost its power may have left an empty file."""
    try:
        return path.is_file() and masks.from_file(path).open() is not None
    except images.BadImage:
        return False


def _checked(wanted: dict, paths: dict, box: Sequence[float] = ()) -> dict:
    """The masks by their pictures' keys. A photo's must tell something; a class image's that does not is left out."""
    found, complaints = {}, []
    for key, path in paths.items():
        if not path.is_file():
            errors.refuse(f"'{path}' is missing: all processes must see the same --output_dir", errors.FAILED)
        example, mask = wanted[key], masks.from_file(path)
        seen = mask.open()
        covered = _white(seen) / (255 * seen.width * seen.height)
        name = images.name_of(example.source)
        if LEAST <= covered <= MOST:
            found[key] = mask
            inside = seen.crop([round(share * side) for share, side in zip(box, seen.size * 2)]) if box else seen
            if 2 * _white(inside) < _white(seen):
                errors.warn(f"SAM's mask of '{name}' lies mostly outside of --sam_box: look at it in report.html")
            continue
        told = f"SAM's mask of '{name}' is {'black' if covered < LEAST else 'all white'}"
        if example.is_class:
            errors.warn(f"{told}: the class image counts as a whole")
        else:
            complaints.append(f"{told}: put NAME.mask.png beside it, or name another --sam_box or --sam_point")
    if complaints:
        errors.refuse(complaints, errors.DATA, once=True)
    return found


def _white(mask) -> int:
    return sum(level * count for level, count in enumerate(mask.histogram()))


def _fill(run, folder: Path, todo: dict, how: dict, allow_pickle: bool) -> None:
    """This process's share; each file is whole or absent."""
    model, processor = load(folder, allow_pickle)
    model.to(run.device)
    for path, source in todo.items():
        if run.interrupted:
            break
        photo = images.open_rgb(source, how["alpha_background"])
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)  # it might be a link that leads anywhere
        segment(model, processor, photo, how["box"], how["point"]).save(temporary, "PNG")
        os.replace(temporary, path)
    del model
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def segment(model, processor, photo, box: Sequence[float] = BOX, point: Sequence[float] = ()):
    """What SAM thinks the best of its three masks, as large as the photo: "L", white on what was asked for."""
    from PIL import Image

    asked = {}
    if box:
        asked["input_boxes"] = [[[share * side for share, side in zip(box, photo.size * 2)]]]
    if point:
        asked["input_points"] = [[[[share * side for share, side in zip(point, photo.size)]]]]
    inputs = processor(photo, **asked, return_tensors="pt")
    out = model(**{name: inputs[name].float().to(model.device) for name in ("pixel_values", *asked)})
    best = int(out.iou_scores[0, 0].argmax())
    drawn = out.pred_masks[:, :, best : best + 1].cpu()  # (1, 1, 1, a quarter of the model's side, the same)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    white = processor.post_process_masks(drawn, *sizes)[0][0, 0]  # (height, width) bool
    return Image.fromarray(white.numpy().astype("uint8") * 255)


def load(folder: Path, allow_pickle: bool = False):
    """=> (model, processor), both of transformers, in fp32 whatever the weights are stored in."""
    from transformers import SamImageProcessorPil, SamModel, SamProcessor

    how = {"use_safetensors": None if allow_pickle else True, "local_files_only": True}
    try:
        model, told = SamModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
        # Pillow's, so that a torchvision which may be there changes no mask.
        processor = SamProcessor(SamImageProcessorPil.from_pretrained(folder, local_files_only=True))
    except Exception as problem:  # of many kinds: a damaged file, other shapes, a configuration of something else
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        errors.refuse(f"--sam_model_name_or_path '{folder}' cannot be loaded: {reason}")
    if told["missing_keys"]:
        some = ", ".join(sorted(told["missing_keys"])[:3])
        errors.refuse(f"--sam_model_name_or_path '{folder}' lacks weights, among them {some}")
    return model.eval(), processor


def _model_folder(name: str, allow_pickle: bool) -> Path:
    """Where the model is; one of the hub is fetched unless the cache has it."""
    folder = Path(models.resolve(name)).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if allow_pickle and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
    except Exception as problem:  # no network in one of its many shapes
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        errors.refuse(f"--sam_model_name_or_path {name} cannot be fetched: {reason}")
    return folder
