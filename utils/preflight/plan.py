"""What a run would take, told before it takes it: sizes read from the headers of the weight files, nothing loaded."""

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import buckets, saved, targets
from utils.arguments import relations
from utils.arguments.relations import engine_asked_for
from utils.errors import warn
from utils.preflight.shapes import latents

# A stored network: its optional variant (fp16) and shard number stand between name and ending.
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
LORA_TARGETS = {
    "unet": ("to_k", "to_q", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "text_encoder_2": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
# Bytes of optimizer state a parameter. Adafactor keeps a row and a column a matrix, Prodigy Adam's two and two more.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2, "prodigy": 16, "adafactor": 0.1, "sgd": 4, "lion": 4}


@dataclass
class Plan:
    """Counts of parameters, of steps and of bytes. None: not known before something is downloaded."""

    networks: dict[str, int] = field(default_factory=dict)  # parameters of each network
    learns: dict[str, int] = field(default_factory=dict)  # parameters that learn in each
    examples: int | None = None  # in an epoch
    examples_per_step: int = 1
    steps: int | None = None
    epochs: float | None = None
    checkpoints: int | None = None  # that will stay on disk
    checkpoint_bytes: int = 0
    result_bytes: int = 0
    snapshots: list[int] = field(default_factory=list)  # of averages, as after which steps; all of them stay
    snapshot_bytes: int = 0
    bank_bytes: int = 0  # of PDM's targets
    memory: dict[str, int] = field(default_factory=dict)  # what holds it -> bytes on each GPU
    main_memory: int = 0  # bytes that an engine keeps there


def outline(
    args: argparse.Namespace,
    model: Path | None,  # the pipeline's folder; None when it is still on the hub
    photos: int | None,  # None when a dataset holds them
    class_images: int = 0,
    in_buckets: Sequence[int] = (),  # photos in each of the buckets that are used
    inverted: int = 0,  # photos whose targets PDM keeps
) -> Plan:
    plan = Plan(examples_per_step=examples_per_step(args))
    _length(plan, args, photos, class_images, in_buckets)
    stored = {name: shapes(model / name, args.variant) for name in NETWORKS} if model else {}
    plan.networks = {name: sum(map(math.prod, found.values())) for name, found in stored.items() if found}
    if "unet" not in plan.networks:  # a hub model that is downloaded in part
        plan.networks = {}
        return plan
    adapters = "rank" in args
    learning = {name: stored[name] for name in _adapted(args, plan.networks)}
    plan.learns = _adapter_sizes(learning, args) if adapters else {name: plan.networks[name] for name in learning}
    _memory_and_disk(plan, args, adapters)
    if getattr(args, "use_pdm_loss", False):
        plan.bank_bytes = inverted * _queries(args, model, stored["unet"])
    return plan


def shapes(folder: Path, variant: str | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored weight of a network: the file's header, a few kilobytes, says them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        match = WEIGHTS.fullmatch(file.name)
        if match and match["variant"] == variant:
            entries = saved.whole_header(file)
            found |= {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    return found


def examples_per_step(args: argparse.Namespace) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * _processes()


def _processes() -> int:
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


def _length(plan: Plan, args, photos: int | None, class_images: int, in_buckets: Sequence[int]) -> None:
    if photos:
        photos = max(1, round(photos * (1 - getattr(args, "validation_split", 0))))  # who is held out, contents decide
        shown = buckets.steps(in_buckets, plan.examples_per_step, args.repeats) * plan.examples_per_step
        plan.examples = max(shown or photos * args.repeats, class_images)
    if args.max_train_steps:
        plan.steps = args.max_train_steps
    elif plan.examples and args.num_train_epochs:
        plan.steps = math.ceil(args.num_train_epochs * plan.examples / plan.examples_per_step)
    if plan.steps and plan.examples:
        plan.epochs = plan.steps * plan.examples_per_step / plan.examples
    if plan.steps:
        every = args.checkpointing_steps or plan.steps
        plan.checkpoints = min(max(1, plan.steps // every), args.checkpoints_total_limit or plan.steps)


def unknown_layers(args: argparse.Namespace, model: Path | None) -> list[str]:
    """Complaints about --lora_target_modules and --lora_unet_blocks, before class images are drawn."""
    if not model or "rank" not in args:
        return []
    stored = {name: shapes(model / name, args.variant) for name in _adapted(args, NETWORKS)}
    if not stored["unet"]:
        return []
    return _chosen(stored, args)[2] or _useless_ranks(stored, args)


def _useless_ranks(stored: dict, args) -> list[str]:
    """A product of two matrices has at most the rank of the layer beside it: what is above that is only memory."""
    if args.adapter != "lora":  # LoHa's and LoKr's products have other ranks
        return []
    chosen, convolutions, _ = _chosen(stored, args)
    sides: dict[str, list[int]] = {"rank": [], "lora_conv_rank": []}
    for network, ends in chosen.items():
        for layer, shape in _layers(stored[network]):
            if any(targets.ends(layer, end) for end in ends):
                odd = network == "unet" and any(targets.ends(layer, end) for end in convolutions)
                sides["lora_conv_rank" if odd else "rank"].append(min(shape[0], math.prod(shape[1:])))
    found = []
    for name, those in sides.items():
        rank, above = getattr(args, name), [side for side in those if side < (getattr(args, name) or 0)]
        if above and len(above) == len(those):
            found.append(f"--{name} is {rank}: no layer of the model has a rank above {max(those)}; give that or less")
        elif above:
            few = f"{len(above)} of {len(those)} layers have a lower rank, down to {min(above)}"
            warn(f"--{name} is {rank}: {few}; there the adapters take more memory than they can use")
    return found


def unknown_queries(args: argparse.Namespace, model: Path | None) -> list[str]:
    """Complaints about --pdm_layer and --pdm_inversion_steps."""
    if not model or not getattr(args, "use_pdm_loss", False):
        return []
    stored = shapes(model / "unet", args.variant)
    _, problem = (
        targets.self_attention([layer for layer, _ in _layers(stored)], args.pdm_layer) if stored else (0, None)
    )
    try:
        config = json.loads((model / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        total = int(config["num_train_timesteps"])
    except (OSError, ValueError, KeyError, TypeError):
        total = args.pdm_inversion_steps  # not here: told later
    found = [problem] if problem else []
    if args.pdm_inversion_steps > total:
        found.append(f"--pdm_inversion_steps {args.pdm_inversion_steps}: the model has {total} timesteps; give fewer")
    return found


def _queries(args, model: Path, unet: dict) -> int:
    """Bytes of one photo's PDM targets; 0 where the model's files do not tell."""
    layer, _ = targets.self_attention([layer for layer, _ in _layers(unet)], args.pdm_layer)
    side = latents(args, model, layer.split(".attentions")[0]) if layer else None
    return args.pdm_inversion_steps * side**2 * unet[f"{layer}.to_q.weight"][0] * 2 if side else 0


def _adapted(args, networks) -> list[str]:
    return [name for name in networks if name == "unet" or (args.train_text_encoder and name.startswith("text"))]


def _chosen(stored: dict, args) -> tuple:
    layers = {network: [layer for layer, _ in _layers(weights)] for network, weights in stored.items() if weights}
    blocks, conv = args.lora_unet_blocks, bool(args.lora_conv_rank)
    return targets.choose(layers, LORA_TARGETS, args.lora_target_modules, blocks, conv)


def _layers(stored: dict):
    """Linear and convolution layers among the weights of a network, with their shapes."""
    for weight, shape in stored.items():
        layer = weight.removesuffix(".weight")
        if layer != weight and len(shape) > 1 and not layer.endswith("embedding"):
            yield layer, shape


def _adapter_sizes(stored: dict, args) -> dict[str, int]:
    """Parameters of the adapters in each network."""
    chosen, convolutions, _ = _chosen(stored, args)
    sizes = {}
    for network, ends in chosen.items():
        sizes[network] = 0
        for layer, shape in _layers(stored[network]):
            if any(targets.ends(layer, end) for end in ends):
                odd = network == "unet" and any(targets.ends(layer, end) for end in convolutions)
                rank = args.lora_conv_rank if odd else args.rank
                sizes[network] += _adapter_size(shape, rank, args)
    return sizes


def _adapter_size(shape: tuple[int, ...], rank: int, args) -> int:
    outputs, inputs, kernel = shape[0], shape[1], math.prod(shape[2:])
    if args.adapter == "lokr":  # two factors; the larger one in two halves where they are smaller
        first, second = (_factor(size, args.lokr_factor) for size in (outputs, inputs))
        rows, columns = outputs // first, inputs // second
        halved = rank < max(rows, columns) / 2
        return first * second + (rank * (rows + columns * kernel) if halved else rows * columns * kernel)
    size = rank * (outputs + inputs * kernel)
    return 2 * size if args.adapter == "loha" else size + (outputs if args.use_dora else 0)


def _factor(size: int, wanted: int | None) -> int:
    if wanted and size % wanted == 0:
        return min(wanted, size // wanted)
    limit = min(wanted or size, math.isqrt(size))
    return max(n for n in range(1, limit + 1) if size % n == 0)


def _memory_and_disk(plan: Plan, args, adapters: bool) -> None:
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    frozen = 4 if precision == "no" else 2  # bytes a parameter
    learning = sum(plan.learns.values())
    kept = 2 if getattr(args, "train_weights_in", "fp32") == "bf16" else 4
    for name, count in plan.networks.items():
        whole_learns = not adapters and name in plan.learns
        plan.memory[name] = count * (kept if whole_learns else frozen)
    if adapters:
        plan.memory["adapters"] = 4 * learning
    plan.memory["gradients"] = 0 if args.fused_backward else 4 * learning
    plan.memory["optimizer"] = int(STATE_BYTES[args.optimizer] * learning)
    if args.use_ema:
        copies = len(args.ema_sigma_rel) if args.posthoc_ema else 1
        plan.memory["average"] = copies * 4 * learning
        if args.posthoc_ema:
            steps = plan.steps or 20
            every = saved.snapshot_steps(steps, args.ema_snapshot_steps, args.ema_interval)
            plan.snapshots = sorted({*range(every, steps, every), steps // args.ema_interval * args.ema_interval} - {0})
            plan.snapshot_bytes = plan.memory["average"]
    plan.checkpoint_bytes = kept * learning + plan.memory["optimizer"] + plan.memory.get("average", 0)
    plan.result_bytes = 4 * learning if adapters else sum(plan.memory[name] for name in plan.networks)
    if adapters and args.output_kohya_format:
        plan.result_bytes += (2 if args.kohya_dtype == "fp16" else 4) * learning
    if engine_asked_for() == "DeepSpeed":  # and its own copy of the weights
        plan.main_memory = plan.memory.pop("gradients") + plan.memory.pop("optimizer") + 4 * learning
    if engine_asked_for() == "FSDP":
        for name in {*plan.learns, "adapters", "gradients", "optimizer", "average"} & plan.memory.keys():
            plan.memory[name] //= _processes()


def lines(plan: Plan, args: argparse.Namespace) -> list[str]:
    """The plan as a person reads it."""

    def has(name: str):
        return getattr(args, name, None)

    said = [f"model     {args.pretrained_model_name_or_path}: " + (_counts(plan.networks) or "not downloaded yet")]
    kinds = {"lora": "DoRA" if args.use_dora else "LoRA", "loha": "LoHa", "lokr": "LoKr"} if "rank" in args else {}
    how = f"{kinds[args.adapter]} of rank {args.rank}" if kinds else "all weights"
    said.append(f"learns    {how}" + (f": {_counts(plan.learns)}" if plan.learns else ""))
    if plan.examples:
        pixels = f"{args.resolution} px" if args.resolution else "the model's own size"
        about = "about " if has("validation_split") else ""
        said.append(f"data      {about}{plan.examples} examples an epoch, {pixels}")
    batch = f"{args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x {_processes()} processes"
    length = f"{args.num_train_epochs} epochs" if args.num_train_epochs else "from the table, once photos are counted:"
    length = f"{plan.steps} steps" if plan.steps else length
    epochs = f", {plan.epochs:.1f} epochs" if plan.epochs else ""
    said.append(f"length    {length} of {plan.examples_per_step} examples ({batch}){epochs}")
    if plan.memory:
        total = size(sum(plan.memory.values()))
        said.append(f"memory    at least {total}, activations come on top:")
        said += [f"          {name:<16}{size(count):>10}" for name, count in plan.memory.items()]
        if plan.main_memory:
            said.append(f"          gradients and optimizer take {size(plan.main_memory)} of main memory instead")
        if not (args.train_text_encoder or getattr(args, "train_text_encoder_ti", False)):
            said.append("          text encoders leave once the prompts are encoded")
        kept = f"{plan.checkpoints or 'some'} checkpoints of {size(plan.checkpoint_bytes)}"
        kept += f", {len(plan.snapshots)} snapshots of {size(plan.snapshot_bytes)}" if plan.snapshots else ""
        kept += f", PDM targets of {size(plan.bank_bytes)}" if plan.bank_bytes else ""
        said.append(f"disk      {size(plan.result_bytes)} for the result, {kept}")
    weights = (
        "pytorch_lora_weights.safetensors" if "rank" in args else "a pipeline folder (model_index.json, unet/, ...)"
    )
    weights += ", pytorch_lora_weights_kohya.safetensors" if has("output_kohya_format") else ""
    weights += ", learned_embeddings.safetensors" if getattr(args, "train_text_encoder_ti", False) else ""
    said.append(
        f"writes    {args.output_dir}/: {weights}, training_config.yaml, metrics.jsonl, report.html, README.md,"
    )
    drawn = relations.drawn(args)
    folders = {
        "ema_snapshots": plan.snapshots,
        "pdm_features": has("use_pdm_loss") and not has("features_data_dir"),
        "pdm_masks": has("save_pdm_masks") and has("mask_pdm"),
        "sam_masks": has("sam_model_name_or_path"),
        "samples": "validation_prompt" in drawn,
        "test_samples": "test_prompts" in drawn,
    }
    said.append("          " + ", ".join(["checkpoint-N/", *(f"{name}/" for name, there in folders.items() if there)]))
    return said


def size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _counts(parameters: dict[str, int]) -> str:
    return ", ".join(f"{name} {_millions(count)}" for name, count in parameters.items())


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
