"""Which layers get adapters, decided by their names alone: before anything is loaded, and again when it is."""

import difflib

# What --lora_conv_rank adds: the convolutions of residual blocks, and those that change the size.
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
# B-LoRA, https://arxiv.org/abs/2403.14572: in SDXL these two hold what is shown and how it looks.
BLOCKS = {"content": "up_blocks.0.attentions.0", "style": "up_blocks.0.attentions.1"}

# The layer whose queries PDMBooth compares: of Stable Diffusion 1.x and 2.x the last but one self-attention.
PDM_LAYER = "up_blocks.3.attentions.2.transformer_blocks.0.attn1"


def choose(
    layers: dict[str, list[str]],  # network -> names of its linear and convolution layers
    defaults: dict[str, list[str]],  # network -> ends of names
    targets=None,  # --lora_target_modules: ends of names; None: the defaults
    blocks=None,  # --lora_unet_blocks: parts of the UNet's names; None: the whole UNet
    conv: bool = False,  # --lora_conv_rank: CONVOLUTIONS too
) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Network -> names or ends of names; which of the UNet's are the convolutions of `conv`; complaints."""
    targets = [target.strip() for target in targets.split(",")] if isinstance(targets, str) else list(targets or ())
    targets = [target for target in targets if target]
    complaints = [
        f"--lora_target_modules {target}: no linear or convolution layer of the model ends so"
        f"{_alike(target, {end for names in layers.values() for name in names for end in _ends(name)})}; "
        f"the default is {','.join(defaults['unet'])}, others are e.g. proj_in, ff.net.2, conv1"
        for target in targets
        if not any(ends(name, target) for names in layers.values() for name in names)
    ]
    chosen = {}
    for network, names in layers.items():
        fitting = [target for target in targets if any(ends(name, target) for name in names)]
        # Names given for one network leave the other at its default: it was asked to learn.
        chosen[network] = fitting or list(defaults[network])
    convolutions = []
    if conv:
        convolutions = [end for end in CONVOLUTIONS if any(ends(name, end) for name in layers["unet"])]
        chosen["unet"] = list(dict.fromkeys([*chosen["unet"], *convolutions]))
    if blocks:
        blocks = [BLOCKS.get(block, block.removeprefix("unet.")) for block in blocks]
        for block in blocks:
            if not any(lies_in(name, block) for name in layers["unet"]):
                there = {part for name in layers["unet"] for part in _beginnings(name)}
                complaints.append(f"--lora_unet_blocks {block}: the UNet has no such block{_alike(block, there)}")
        inside = [name for name in layers["unet"] if any(lies_in(name, block) for block in blocks)]
        whole = [name for name in inside if any(ends(name, end) for end in chosen["unet"])]
        convolutions = [name for name in whole if any(ends(name, end) for end in convolutions)]
        if inside and not whole:
            complaints.append(
                f"--lora_unet_blocks {','.join(blocks)}: no layer there ends in {', '.join(chosen['unet'])}; name "
                "others with --lora_target_modules"
            )
        chosen["unet"] = whole
    if conv and not convolutions and not complaints:
        complaints.append("--lora_conv_rank: the chosen part of the UNet holds no convolution; leave the option out")
    return chosen, convolutions, complaints


def self_attention(layers, wanted: str | None = None) -> tuple[str | None, str | None]:
    """(the self-attention layer whose queries PDM compares, a complaint or None), from the names of a UNet's layers."""
    there = {name.removesuffix(".to_q") for name in layers if name.endswith(".attn1.to_q")}
    ordered = sorted(there, key=lambda name: (("down", "mid", "up").index(name.split("_")[0]), _numbers(name)))
    if not ordered:
        return None, "--use_pdm_loss: the model has no self-attention layer"
    if wanted and (wanted := wanted.removeprefix("unet.").removesuffix(".to_q")) not in there:
        return None, f"--pdm_layer {wanted}: no self-attention layer of the model; choose one of {', '.join(ordered)}"
    return wanted or (PDM_LAYER if PDM_LAYER in there else ordered[-1]), None


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def lies_in(name: str, block: str) -> bool:
    """By whole parts of the name: attentions.1 is not part of attentions.10."""
    return f".{block}." in f".{name}."


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:stop]) for stop in range(1, len(parts))]


def _alike(name: str, there) -> str:
    found = difflib.get_close_matches(name, sorted(there), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""
