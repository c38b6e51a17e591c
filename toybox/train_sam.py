"""Trains a very small SAM on the same drawings: which pixels belong to what a box or a point shows?

    python -m toybox.train_sam --output toybox/sam

takes about 13 core-minutes on a CPU. Photos are wide, tall or square and show one, two or four things, so that a mask
is right only if its prompt was read right. A box or a point on one thing means that thing; a box around several means
all of them, and so does, once in five times, a point: what a point means is uncertain, which is why SAM draws three
masks (Kirillov et al. 2023, arXiv 2304.02643, section 3) and says of each how good it thinks it is.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    SamConfig,
    SamImageProcessorPil,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from toybox.draw import SCENES, draw, mask_of, random_individual
from toybox.make_subject import PHOTOS, take_photo, widened
from toybox.training import Run, average_into, cosine, pixels_of
from utils import sam

SIDE, PATCH = 96, 8  # pixels of a photo's longer side, and of a token
PROMPTS = ("box", "point", "both")
ROOT = Path(__file__).parent


def make_model() -> SamModel:
    tokens = SIDE // PATCH
    vision = SamVisionConfig(
        hidden_size=48,
        output_channels=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        mlp_ratio=2.0,
        window_size=tokens,
        global_attn_indexes=[0, 1],
        num_pos_feats=16,
        use_rel_pos=False,  # positions of their own do, at two thirds of the time
    )
    prompts = SamPromptEncoderConfig(hidden_size=32, image_size=SIDE, patch_size=PATCH, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    config.initializer_range = 0.06
    model = SamModel(config)
    # Its own start varies so fast over a photo that neighbouring places look unrelated.
    frequencies = model.shared_image_embedding.positional_embedding
    frequencies.data = torch.randn(frequencies.shape, generator=torch.Generator().manual_seed(0))
    frequencies.requires_grad_(False)
    return model


def make_processor() -> SamProcessor:
    square = {"height": SIDE, "width": SIDE}
    half = {"height": SIDE // 2, "width": SIDE // 2}  # masks are drawn in cells of two pixels
    sizes = {"size": {"longest_edge": SIDE}, "pad_size": square, "mask_size": {"longest_edge": SIDE // 2}}
    return SamProcessor(SamImageProcessorPil(**sizes, mask_pad_size=half))


def make_photo(rng: random.Random) -> tuple[Image.Image, list[Image.Image]]:
    """=> (photo, the mask of each thing in it)."""
    kind = rng.choices(["one", "row", "column", "four"], [5, 2, 2, 1])[0]
    if kind == "one":
        inner = rng.randint(SIDE // 2, SIDE)
        shown, whole = _draw(rng, inner), rng.choice([(SIDE, inner), (inner, SIDE)])
        return widened(shown[0], whole), [widened(shown[1], whole)]
    inner = SIDE // 2
    places = {"row": [(0, 0), (1, 0)], "column": [(0, 0), (0, 1)], "four": [(0, 0), (1, 0), (0, 1), (1, 1)]}[kind]
    size = tuple(inner * (1 + max(place[axis] for place in places)) for axis in (0, 1))
    photo, masks = Image.new("RGB", size), []
    for column, row in places:
        picture, mask = _draw(rng, inner)
        masks.append(Image.new("L", size))
        for canvas, part in ((photo, picture), (masks[-1], mask)):
            canvas.paste(part, (column * inner, row * inner))
    return photo, masks


def _draw(rng: random.Random, size: int) -> tuple[Image.Image, Image.Image]:
    what = random_individual(rng), rng.choice(list(SCENES)), rng.randrange(1 << 40)
    return draw(*what, size=size), mask_of(*what, size=size)


def make_example(rng: random.Random) -> tuple[Image.Image, Image.Image, list[float], list[float]]:
    """=> (photo, the mask that is asked for, a box, a point on what is asked for), in pixels."""
    photo, masks = make_photo(rng)
    chosen = rng.randrange(len(masks))
    everything = masks[0]
    for mask in masks[1:]:
        everything = Image.composite(Image.new("L", photo.size, 255), everything, mask)
    around_all = rng.random() < (0.5 if len(masks) == 1 else 0.2)
    target = everything if around_all else masks[chosen]
    left, top, right, bottom = target.point(lambda value: 255 * (value > 127)).getbbox()
    if around_all:  # as loose as it may be: somewhere between the things and the edge of the photo
        loose = rng.random()
        edges = (left, top, right - photo.width, bottom - photo.height)
        box = [at - loose * room for at, room in zip((left, top, right, bottom), edges)]
    else:
        reach = (0.1 * (right - left), 0.1 * (bottom - top)) * 2
        box = [at + rng.uniform(-1, 1) * most for at, most in zip((left, top, right, bottom), reach)]
    inside = [place for place, value in enumerate(masks[chosen].tobytes()) if value > 200]
    y, x = divmod(rng.choice(inside), photo.width)
    return photo, target, box, [x, y]


def make_batch(seeds, prompt: str, processor: SamProcessor) -> tuple[dict, torch.Tensor]:
    """=> (what the model is given, the share of each cell that the mask covers: (b, 1, SIDE / 2, SIDE / 2))."""
    photos, masks, boxes, points = zip(*(make_example(random.Random(f"sam {seed}")) for seed in seeds))
    asked = {} if prompt == "point" else {"input_boxes": [[box] for box in boxes]}
    asked |= {} if prompt == "box" else {"input_points": [[[point]] for point in points]}
    inputs = processor(list(photos), **asked, return_tensors="pt")
    inputs = {name: inputs[name].float() for name in ("pixel_values", *asked)}
    whole = []
    for mask in masks:
        whole.append(Image.new("L", (SIDE, SIDE)))
        whole[-1].paste(mask)
    covered = torch.stack([torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8) for mask in whole])
    return inputs, F.avg_pool2d(covered.view(-1, 1, SIDE, SIDE) / 255, 2)


def losses(logits: torch.Tensor, covered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """=> (cross entropy and dice loss of each mask, its true intersection over union), both (b, masks)."""
    wanted = covered.expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((2, 3))
    found = logits.sigmoid()
    dice = 1 - (2 * (found * wanted).sum((2, 3)) + 1) / (found.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    return 4 * entropy + dice, overlap(logits.detach() > 0, wanted > 0.5)


def overlap(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Intersection over union in the last two dimensions."""
    return (found & wanted).sum((-2, -1)) / (found | wanted).sum((-2, -1)).clamp(min=1)


@torch.no_grad()
def evaluate(model: SamModel, processor: SamProcessor, count: int = 300) -> dict:
    """Mean intersection over union on drawings that training never saw, of the mask with the best score, of each of the
    three always, and of the best one there was; and of the subject's photos, none of which training saw either."""
    told: dict = {}
    for name, *what in PHOTOS:  # with the default prompt of the training scripts
        mask, true = sam.segment(model, processor, take_photo(*what)), take_photo(*what, mask=True)
        told[name] = overlap(*(pixels_of([one.convert("RGB")]) > 0 for one in (mask, true))).mean().item()
    for prompt in PROMPTS:
        inputs, covered = make_batch(range(-count, 0), prompt, processor)
        out = model(**inputs)
        found = overlap(out.pred_masks[:, 0] > 0, (covered > 0.5).expand(-1, 3, -1, -1))  # (count, 3)
        chosen = out.iou_scores[:, 0].argmax(1)
        told[prompt] = {
            "by score": found.gather(1, chosen[:, None]).mean().item(),
            "always": found.mean(0).tolist(),
            "best": found.amax(1).mean().item(),
            "chosen": chosen.bincount(minlength=3).tolist(),
        }
    return told


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "sam")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    return parser.parse_args(argv)


def main(args) -> None:
    run = Run("sam")
    torch.manual_seed(0)
    model, processor = make_model(), make_processor()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.01)
    first = 0
    if state := run.resume():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]

    for step in range(first, args.steps):
        seeds = range(step * args.batch_size, (step + 1) * args.batch_size)
        inputs, covered = make_batch(seeds, PROMPTS[step % 3], processor)
        # Every eighth time the one mask that is drawn where nobody asks for three.
        out = model(**inputs, multimask_output=step % 8 != 7)
        error, quality = losses(out.pred_masks[:, 0], covered)
        # Only the best of three learns the mask, so that they may differ; a little of the others keeps them alive.
        loss = (error.amin(1) + 0.05 * error.mean(1)).mean() + F.mse_loss(out.iou_scores[:, 0], quality)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * cosine(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
        average_into(average, parameters, min(0.995, (1 + step) / (10 + step)))
        if step % 50 == 49:
            right = quality.gather(1, out.iou_scores[:, 0].argmax(1, keepdim=True)).mean().item()
            run.log(step=step + 1, loss=loss.item(), by_score=right, best=quality.amax(1).mean().item())
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        run.save({**state, "step": step + 1}, due=step + 1 == args.steps)

    torch._foreach_copy_([parameter.data for parameter in parameters], average)
    model.half().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)
    model = SamModel.from_pretrained(args.output, dtype=torch.float32).eval()  # as it was rounded
    print(json.dumps(evaluate(model, processor), indent=1))


if __name__ == "__main__":
    main(parse_args())
