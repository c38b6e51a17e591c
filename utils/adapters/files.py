"""Files of adapters in the three namings there are: diffusers', PEFT's, and that of kohya, A1111, ComfyUI, LyCORIS.

A file is read into {network: {layer: parts}}, whatever its naming. The parts of a layer are `down` and `up` (and
`magnitude`, for DoRA), or LoHa's hada_w1_a, ..., or LoKr's lokr_w1, ...; and `alpha`, a number: the layer's change
counts alpha / rank. Layers are called as in diffusers; those of text encoders begin with text_model, although
transformers 5 dropped that level inside CLIPTextModel, because every other program reads them so.
"""

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from utils import errors, saved, writing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METADATA = "lora_adapter_metadata"  # where diffusers looks for rank and alpha in the file's header
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}  # kohya's, for SDXL
NETWORKS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}

DIFFUSERS = re.compile(
    r"(unet|text_encoder|text_encoder_2)\.(?:base_model\.model\.)?(.+?)\."
    r"(lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up|lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.weight)?"
)
PARTS = {"down": "down", "up": "up", "lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}
# Layers of 2023, when attention had processors: to_q_lora.down for to_q.lora.down, in a UNet without a prefix, too.
PROCESSORS = re.compile(r"(?:\.processor)?\.(to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(down|up)(?=\.weight$)")
OF_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
OF_UNET = re.compile(r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\.")
KOHYA = re.compile(r"(lora_unet|lora_te1|lora_te2|lora_te)_(\w+)\.(lora_down\.weight|lora_up\.weight|\w+)")
KOHYA_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "dora_scale": "magnitude", "alpha": "alpha"}
KOHYA_PARTS |= {"diff": "diff"}  # what a layer's weight changes by, whole: LyCORIS calls it "full"
LYCORIS_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LYCORIS_PARTS += ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

# What only counts together.
HALVES = (
    (r"(?<=[._])down(?=\.weight$)", "up"),
    (r"(?<=[._])up(?=\.weight$)", "down"),
    (r"lora_A(?=\.weight$)", "lora_B"),
    (r"lora_B(?=\.weight$)", "lora_A"),
)
# kohya writes . as _; these parts of names have an underscore of their own.
COMPOUND = (
    r"down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out add_k_proj add_v_proj proj_in proj_out"
    r" time_emb_proj conv_shortcut conv_in conv_out time_embedding add_embedding linear_1 linear_2 cond_proj"
    r" text_model self_attn q_proj k_proj v_proj out_proj text_projection"
)
WORDS = re.compile(rf"(?:{COMPOUND.replace(' ', '|')})(?=_|$)|[^_]+")
# The names of Stability's own UNet code, in which kohya trains SDXL.
SGM_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
SGM_ALONE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
OWN_RESNET, OWN_ALONE = ({own: sgm for sgm, own in names.items()} for names in (SGM_RESNET, SGM_ALONE))
# Layers of the published SDXL. A UNet of another shape has no names in Stability's code.
SDXL = re.compile(
    r"down_blocks\.[0-2]\.resnets\.[01]\..+|down_blocks\.[12]\.attentions\.[01]\..+|down_blocks\.[01]\.downsamplers\..+"
    r"|up_blocks\.[0-2]\.resnets\.[0-2]\..+|up_blocks\.[01]\.attentions\.[0-2]\..+|up_blocks\.[01]\.upsamplers\..+"
    r"|mid_block\..+|conv_in|conv_out|(time|add)_embedding\..+"
)


# --- Reading -----------------------------------------------------------------------------------------------------


def read(file: str | Path, finite: bool = True) -> tuple[dict, dict]:
    """Any adapter file => ({network: {layer: parts}}, its header); what is not understood is refused.

    finite: numbers that are not are refused, too."""
    weights, header = tensors(file)
    check(file, weights, finite)
    config = json.loads(header.get(METADATA) or "{}")
    found, strange, names = {}, [], {}
    for key, weight in weights.items():
        network, layer, part = _parse(key)
        if part is None:
            strange.append(key)
            continue
        other = names.setdefault((network, layer, part), key)
        if other != key:
            errors.refuse(f"{file} holds one layer under two names, {other} and {key}: remove one of the two")
        found.setdefault(network, {}).setdefault(layer, {})[part] = weight
    if strange:
        errors.refuse(f"{file} holds weights that are not understood: {', '.join(sorted(strange)[:3])}")
    kohya_like = any(map(KOHYA.fullmatch, weights))
    for network, layers in found.items():
        own = {key.removeprefix(f"{network}."): v for key, v in config.items() if key.startswith(f"{network}.")}
        for layer, parts in layers.items():
            _settle(file, parts, layer, own, kohya_like)
    return found, header


def tensors(file: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(weights, header) of a safetensors file, or of a pickle, which has no header."""
    if Path(file).suffix in saved.PICKLES:
        return saved.unpickled(Path(file)), {}
    with safe_open(str(file), framework="pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata() or {}  # noqa: SIM118


def check(file: str | Path, weights: dict[str, torch.Tensor], finite: bool = True) -> None:
    """Refuse weights that draw nothing, or something else, without a word: halves of layers, and no numbers."""
    partners = [re.sub(one, other, key) for key in weights for one, other in HALVES if re.search(one, key)]
    lacking = [key for key in partners if key not in weights]
    if lacking:
        named = ", ".join(sorted(set(lacking))[:3])
        why = "so a layer has only one of the two matrices of its LoRA"
        errors.refuse(f"{file} is incomplete: it lacks {named}, {why}; download or save it again")
    if finite:
        refuse_not_finite(file, weights)


def refuse_not_finite(file: str | Path, weights: dict[str, torch.Tensor], remedy: str = "") -> None:
    wrong = [key for key, weight in weights.items() if not torch.isfinite(weight).all()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        remedy = remedy or "the training diverged or the file is damaged: take an earlier checkpoint or another copy"
        errors.refuse(f"{file}: {wrong[0]}{more} holds numbers that are not finite (NaN or inf); {remedy}")


def current(key: str) -> str:
    """A key of 2023 => the one that diffusers writes now; others stay.

    down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight
    => unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.up.weight
    text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight
    => text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight
    """
    if OF_UNET.match(key):
        key = f"unet.{key}"

    def renamed(match: re.Match) -> str:
        name, half = match.groups()
        if key.startswith("text_encoder"):
            return f".{OF_CLIP.get(name, name)}.lora_linear_layer.{half}"
        return f".{'to_out.0' if name == 'to_out' else name}.lora.{half}"

    return PROCESSORS.sub(renamed, key)


def _parse(key: str) -> tuple:
    key = current(key)
    if match := DIFFUSERS.fullmatch(key):
        network, layer, part = match.groups()
        return (
            network,
            with_text_model(network, layer),
            PARTS[part.removeprefix("lora.").removeprefix("lora_linear_layer.")],
        )
    if match := KOHYA.fullmatch(key):
        prefix, layer, part = match.groups()
        part = KOHYA_PARTS.get(part, part if part in LYCORIS_PARTS else None)
        return NETWORKS[prefix], dotted(from_sgm(layer)), part
    return None, None, None


def is_named_by_diffusers(file: str | Path) -> bool:
    """As diffusers names them now, in a file that it opens."""
    keys = saved.header(Path(file)).keys() - {"__metadata__"}
    return Path(file).suffix not in saved.PICKLES and not any(
        KOHYA.fullmatch(key) or current(key) != key for key in keys
    )


def is_lycoris(file: str | Path) -> bool:
    """Whether stock diffusers does not load it: LoHa, LoKr, whole differences."""
    return any(key.endswith((*LYCORIS_PARTS, ".diff")) for key in saved.header(Path(file)))


def network_of(key: str) -> str:
    """The network that a weight of any file belongs to."""
    match = KOHYA.fullmatch(key)
    return NETWORKS[match[1]] if match else current(key).split(".")[0]


def _settle(file, parts: dict, layer: str, config: dict, named_by_kohya: bool) -> None:
    """alpha as a number, whether it stood beside the weights, in the header or nowhere; magnitudes as a vector."""
    rank = rank_of(parts)
    if "magnitude" in parts and "up" not in parts:
        errors.refuse(f"{file}: {layer} has a DoRA of another kind than LoRA (dora_scale), which is not supported")
    loha = all(part in parts for part in LYCORIS_PARTS[:4])
    lokr = all(f"lokr_w{n}" in parts or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= parts.keys() for n in (1, 2))
    if not ("down" in parts or "diff" in parts or loha or lokr):
        errors.refuse(f"{file}: of {layer} there is only {', '.join(parts)}; the file is damaged")
    if "alpha" in parts:
        parts["alpha"] = float(parts["alpha"])
    elif rank and "lora_alpha" in config:
        alpha = _by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
        parts["alpha"] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    else:
        parts["alpha"] = rank or 1
    if "magnitude" in parts:
        lengths = parts["magnitude"]
        by_input = parts["up"].shape[0] != (len(lengths) if named_by_kohya else lengths.numel())
        if by_input:
            errors.refuse(f"{file}: the DoRA of {layer} measures lengths by input; only those by output are read")
        parts["magnitude"] = lengths.flatten()


def _by_pattern(patterns: dict | None, layer: str, otherwise):
    return next(
        (value for name, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({name})", layer)), otherwise
    )


def rank_of(parts: dict) -> int | None:
    """None for a LoKr of two whole matrices and for a whole difference, which have no rank and no alpha."""
    return next((len(parts[name]) for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in parts), None)


def strength(parts: dict) -> float:
    rank = rank_of(parts)
    return parts["alpha"] / rank if rank else 1.0


def with_text_model(network: str, layer: str) -> str:
    if network == "unet" or layer.startswith(("text_model.", "text_projection")):
        return layer
    return f"text_model.{layer}"


def dotted(name: str) -> str:
    """down_blocks_0_attentions_0_proj_in => down_blocks.0.attentions.0.proj_in"""
    return ".".join(WORDS.findall(name))


def from_sgm(name: str) -> str:
    """input_blocks_4_1_proj_in => down_blocks_1_attentions_0_proj_in; other names stay. Blocks of two layers: SDXL."""
    if name in SGM_ALONE:
        return SGM_ALONE[name]
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)_(\d+)_(.+)", name)
    if not match:
        return name
    side, number, rest = match[1], int(match[2]), match[3]
    if side == "middle_block":
        place = "attentions_0" if number == 1 else f"resnets_{number // 2}"
        return f"mid_block_{place}_{SGM_RESNET.get(rest, rest)}"
    number -= side == "input_blocks"
    place, layer = f"{'down' if side == 'input_blocks' else 'up'}_blocks_{number // 3}", number % 3
    _, rest = rest.split("_", 1)
    if rest in SGM_RESNET:
        return f"{place}_resnets_{layer}_{SGM_RESNET[rest]}"
    if rest in ("op", "conv"):
        return f"{place}_{'downsamplers' if rest == 'op' else 'upsamplers'}_0_conv"
    return f"{place}_attentions_{layer}_{rest}"


def to_sgm(name: str) -> str:
    """down_blocks_1_attentions_0_proj_in => input_blocks_4_1_proj_in: the inverse of `from_sgm`, for SDXL."""
    match = re.fullmatch(r"(down|mid|up)_blocks?_(?:(\d)_)?([a-z]+)_(\d)_(.+)", name)
    if not match:
        return OWN_ALONE[name]
    side, block, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = OWN_RESNET.get(rest, rest) if kind == "resnets" else rest
    if side == "mid":
        return f"middle_block_{1 if kind == 'attentions' else 2 * layer}_{rest}"
    if kind == "downsamplers":
        return f"input_blocks_{3 * block + 3}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{3 * block + 2}_2_conv"
    number = f"input_blocks_{3 * block + layer + 1}" if side == "down" else f"output_blocks_{3 * block + layer}"
    return f"{number}_{int(kind == 'attentions')}_{rest}"


def is_sgm_key(key: str) -> bool:
    return key.startswith("lora_unet_") and own_key(key) != key


def own_key(key: str) -> str:
    """lora_unet_input_blocks_4_1_proj_in.alpha => lora_unet_down_blocks_1_attentions_0_proj_in.alpha"""
    match = KOHYA.fullmatch(key)
    return f"lora_unet_{from_sgm(match[2])}.{match[3]}" if match and match[1] == "lora_unet" else key


def sgm_key(key: str) -> str:
    match = KOHYA.fullmatch(key)
    return f"lora_unet_{to_sgm(match[2])}.{match[3]}" if match[1] == "lora_unet" else key


def has_sgm_names(found: dict, header: dict) -> bool:
    """Whether kohya's programs name the UNet of these adapters as Stability's code does: SDXL as it is published."""
    layers = found.get("unet", {})
    version = header.get("ss_base_model_version") or header.get("modelspec.architecture")
    wide = any(
        ".transformer_blocks.1." in layer
        or ("attn2.to_k" in layer and "down" in parts and parts["down"].shape[1] == 2048)
        for layer, parts in layers.items()
    )
    sdxl = "xl" in version if version else wide or "text_encoder_2" in found
    return sdxl and all(map(SDXL.fullmatch, layers))


# --- Writing -----------------------------------------------------------------------------------------------------


def kohya(found: dict, sgm: bool) -> dict[str, torch.Tensor]:
    """Weights as kohya, A1111, ComfyUI and LyCORIS name them; `sgm`: SDXL's UNet as in Stability's code.

    One alpha for a network: the reader of diffusers mixes up several. The rest of a layer's strength goes into `up`.
    """
    weights = {}
    for network, layers in found.items():
        common = max(parts["alpha"] for parts in layers.values())
        for layer, parts in layers.items():
            name = kohya_name(network, layer, sgm or "text_encoder_2" in found, sgm)
            if "magnitude" in parts:
                # ComfyUI divides the rows by |W| instead of |W + delta|, A1111 measures columns, kohya ignores lengths.
                raise ValueError(
                    "no program reads a DoRA in kohya's naming as it was trained; see merging.without_dora"
                )
            if "down" not in parts:
                weights |= {f"{name}.{part}": weight for part, weight in parts.items() if part != "alpha"}
                if "diff" not in parts:
                    weights[f"{name}.alpha"] = torch.tensor(float(parts["alpha"]))
                continue
            weights[f"{name}.lora_down.weight"] = parts["down"]
            weights[f"{name}.lora_up.weight"] = parts["up"] * (parts["alpha"] / common)
            weights[f"{name}.alpha"] = torch.tensor(float(common))
    return weights


def kohya_name(network: str, layer: str, two_encoders: bool = False, sgm: bool = False) -> str:
    prefix = PREFIXES[network] if network != "text_encoder" or two_encoders else "lora_te"
    name = with_text_model(network, layer).replace(".", "_")
    return f"{prefix}_{to_sgm(name) if sgm and network == 'unet' else name}"


def diffusers(found: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights as stock `load_lora_weights` reads them, and what its header says of ranks and alphas."""
    weights, config = {}, {}
    for network, layers in found.items():
        need_lora(layers)
        layer_name = "lora" if network == "unet" else "lora_linear_layer"
        for layer, parts in layers.items():
            weights[f"{network}.{layer}.{layer_name}.down.weight"] = parts["down"]
            weights[f"{network}.{layer}.{layer_name}.up.weight"] = parts["up"]
            if "magnitude" in parts:
                ending = "lora_magnitude_vector" if network == "unet" else "lora_magnitude_vector.weight"
                weights[f"{network}.{layer}.{ending}"] = peft_magnitude(parts)
        config |= {f"{network}.{key}": value for key, value in peft_config(layers).items()}
    return weights, config


def peft(found: dict) -> dict[str, tuple[dict, dict]]:
    """{network: (weights, adapter_config.json)} as PEFT's own `from_pretrained` reads them, a folder a network."""
    folders = {}
    for network, layers in found.items():
        need_lora(layers)
        weights = {}
        for layer, parts in layers.items():
            # PEFT finds layers by the ends of their names, but weights by their whole names. CLIPTextModel lost its
            # level text_model in transformers 5, so its weights have both names: PEFT takes the one that fits.
            short = layer.removeprefix("text_model.") if network == "text_encoder" else layer
            for name in dict.fromkeys((layer, short)):
                weights[f"base_model.model.{name}.lora_A.weight"] = parts["down"].clone()
                weights[f"base_model.model.{name}.lora_B.weight"] = parts["up"].clone()
                if "magnitude" in parts:
                    weights[f"base_model.model.{name}.lora_magnitude_vector"] = peft_magnitude(parts).clone()
        folders[network] = weights, {"peft_type": "LORA", "bias": "none", **peft_config(layers)}
    return folders


def peft_magnitude(parts: dict) -> torch.Tensor:
    """PEFT keeps the lengths of a linear layer's rows as (out,), those of a convolution's as (1, out, 1, 1)."""
    return parts["magnitude"] if parts["down"].dim() == 2 else parts["magnitude"].view(1, -1, 1, 1)


def peft_config(layers: dict) -> dict:
    """The usual rank and alpha, and the layers that have others."""
    # By the ends of their names, which are the same with and without text_model.
    layers = {layer.removeprefix("text_model."): parts for layer, parts in layers.items()}
    ranks = {layer: rank_of(parts) for layer, parts in layers.items()}
    alphas = {layer: parts["alpha"] for layer, parts in layers.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(layers),
        "use_dora": any("magnitude" in parts for parts in layers.values()),
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
    }


def need_lora(layers: dict) -> None:
    if any("down" not in parts for parts in layers.values()):
        kinds = "LoHa, LoKr and whole differences"
        errors.refuse(f"{kinds} have no form that diffusers or PEFT folders read; they stay in kohya's naming")


def is_dora(found: dict) -> bool:
    return any("magnitude" in parts for layers in found.values() for parts in layers.values())


def narrowed(weights: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """In this precision; OverflowError names a weight that it cannot hold."""
    made = {key: weight.detach().to(DTYPES[dtype]) for key, weight in weights.items()}
    for key, weight in made.items():
        if not weight.isfinite().all() and weights[key].isfinite().all():
            raise OverflowError(f"{key} holds {weights[key].abs().max():.4g}, more than {dtype} can; use bf16 or fp32")
    return made


def save(
    weights: dict[str, torch.Tensor],
    file: str | Path,
    header: dict[str, str],
    hashed: bool = False,  # with the hashes by which A1111 and others know a file in kohya's naming
) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    weights = {key: weight.detach().cpu().contiguous() for key, weight in weights.items()}
    with writing.aside(file) as staged:
        if hashed:  # of a file whose header holds the ss_ entries alone, so that others may be edited
            plain = {key: text for key, text in header.items() if key.startswith("ss_")}
            save_file(weights, str(staged), metadata=plain)
            header = header | hashes(staged)
        save_file(weights, str(staged), metadata=header)


def hashes(file: str | Path) -> dict[str, str]:
    """As the first program that showed LoRA files defined them: of all weights, and of 64 KiB one MiB into the file."""
    whole = hashlib.sha256()
    with open(file, "rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while block := stream.read(2**20):
            whole.update(block)
        stream.seek(2**20)
        old = hashlib.sha256(stream.read(2**16))
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": old.hexdigest()[:8]}


def stock(found: dict) -> dict[str, torch.Tensor]:
    """Weights for stock `load_lora_weights` in memory, where no header says an alpha: strengths go into `up`."""
    even = {
        network: {
            layer: parts | {"up": parts["up"] * strength(parts), "alpha": rank_of(parts)}
            for layer, parts in layers.items()
        }
        for network, layers in found.items()
    }
    return diffusers(even)[0]
