"""Adapters: attach them to a family's networks, list what learns, save and load exactly.

LoRA, https://arxiv.org/abs/2106.09685: W x + (alpha / r) B A x; rsLoRA, https://arxiv.org/abs/2312.03732, divides by
sqrt(r). DoRA, https://arxiv.org/abs/2402.09353, also learns the length of each row of W + (alpha / r) B A. LoHa,
https://arxiv.org/abs/2108.06098, is the entrywise product of two LoRAs, LoKr, https://arxiv.org/abs/2309.14859, a
Kronecker product.
"""

import itertools
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from utils import errors, learning, quantize, randomness, saved, tokens
from utils import targets as names
from utils.adapters import files, metadata, starts  # noqa: F401 - scripts call adapters.metadata
from utils.adapters.files import METADATA
from utils.arguments.relations import DORA_EXPORT

FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = saved.KOHYA_FILE
ADAPTER = "default"  # the name peft keeps our adapter under inside each layer


def attach(
    family,
    rank: int = 4,
    alpha: float | None = None,  # None: = rank, so that the scale alpha / rank is 1
    dropout: float = 0.0,
    dora: bool = False,
    targets: Sequence[str] | str | None = None,  # layer names or ends of names; None: the family's attention layers
    text_encoder: bool = False,
    seed: int = 0,
    adapter: str = "lora",  # or loha, lokr
    init_lora_weights: str = "gaussian",  # or kaiming, orthogonal: what LoRA starts from
    use_rslora: bool = False,  # scale alpha / sqrt(rank): large ranks learn as fast as small ones
    lora_conv_rank: int | None = None,  # convolutions of the UNet too, at this rank and the same strength
    lora_unet_blocks: Sequence[str] | None = None,  # parts of the UNet; None: all of it
    lokr_factor: int | None = None,  # LoKr: the smaller factor's size; None: near the square root
    loraplus_lr_ratio: float | None = None,  # LoRA+: how much faster B learns than A
    quantize_base: str | None = None,  # nf4, int8 or fp8: the UNet's frozen weights in less memory
    train_text_encoder_frac: float = 1.0,  # share of the steps after which the text encoders' adapters stay as they are
    train_text_encoder_ti: bool = False,  # new tokens in the text encoders that learn beside the adapters
    token_abstraction: Sequence[str] = ("TOK",),  # the words in prompts that stand for them
    num_new_tokens_per_abstraction: int = 2,
    train_text_encoder_ti_frac: float = 0.5,  # share of the steps after which they stay as they are
) -> "Adapters":
    """Freeze the base and put adapters beside its target layers. The weights that learn are fp32."""
    modules = {name: getattr(family, name) for name in ["unet", *(family.encoders if text_encoder else [])]}
    layers = {name: list(adaptable(module)) for name, module in modules.items()}
    chosen, convolutions, complaints = names.choose(
        layers, family.lora_targets, targets, lora_unet_blocks, bool(lora_conv_rank)
    )
    if complaints:
        errors.refuse(complaints)

    def alpha_of(own_rank: int) -> float:
        nominal = alpha or rank
        nominal = nominal if own_rank == rank else nominal * own_rank / rank
        return nominal * math.sqrt(own_rank) if use_rslora else nominal

    if quantize_base:
        quantize.freeze(family.unet, quantize_base)
    configs = {}
    for name, module in modules.items():
        module.requires_grad_(False)
        odd = convolutions if name == "unet" and lora_conv_rank and lora_conv_rank != rank else []
        configs[name] = {
            "r": rank,
            "lora_alpha": alpha_of(rank),
            "lora_dropout": dropout,
            "target_modules": chosen[name],
            "use_dora": dora,
            # Often empty, but older diffusers look both up in the file and fail without them.
            "rank_pattern": dict.fromkeys(odd, lora_conv_rank),
            "alpha_pattern": {end: alpha_of(lora_conv_rank) for end in odd},
        }
        module.add_adapter(peft_config(configs[name], adapter, lokr_factor), ADAPTER)
        module.train()  # for the dropout
        for weight in module.parameters():
            if weight.requires_grad:
                # peft makes adapters in the base's precision; half-precision weights would lose most small updates.
                weight.data = weight.data.float()
        measure_magnitudes(module)
        forget_alpha_of_whole_factors(module)
    told = {
        "rslora": use_rslora or None,
        "start": init_lora_weights if init_lora_weights != "gaussian" else None,
        "conv_rank": lora_conv_rank,
        "blocks": sorted(lora_unet_blocks) if lora_unet_blocks else None,
        "lokr_factor": lokr_factor,
        "loraplus_lr_ratio": loraplus_lr_ratio,
        "quantize_base": quantize_base,
    }
    adapters = Adapters(modules, configs, family, adapter, alpha or rank, told, describe_base(family))
    adapters.initialise(seed, init_lora_weights)
    adapters.text_share = train_text_encoder_ti_frac if train_text_encoder_ti else train_text_encoder_frac
    if train_text_encoder_ti:
        return tokens.beside(adapters, family, token_abstraction, num_new_tokens_per_abstraction, seed)
    return adapters


def adaptable(module: torch.nn.Module):
    """Names of the layers that can have adapters."""
    return (key for key, layer in module.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)))


def peft_config(config: dict, kind: str = "lora", lokr_factor: int | None = None):
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    if kind == "lora":
        return LoraConfig(init_lora_weights="gaussian", **config)
    shared = {key: config[key] for key in ("r", "target_modules", "rank_pattern", "alpha_pattern")}
    if kind == "loha":
        return LoHaConfig(alpha=config["lora_alpha"], **shared)
    return LoKrConfig(alpha=config["lora_alpha"], decompose_factor=lokr_factor or -1, **shared)


def forget_alpha_of_whole_factors(module: torch.nn.Module) -> None:
    """A LoKr of two whole matrices has no rank to divide alpha by: LyCORIS and ComfyUI apply it as it is."""
    for layer in module.modules():
        if ADAPTER in getattr(layer, "lokr_w1", ()) and ADAPTER in layer.lokr_w2:
            layer.scaling[ADAPTER] = 1.0


def describe_base(family) -> dict[str, str]:
    """What other programs look up in a file's header: the kind of base model, for the lists they show."""
    if not family.label.startswith("stable-diffusion"):
        return {}
    two, wide = "text_encoder_2" in family.encoders, family.unet.config.cross_attention_dim == 1024
    v_prediction = family.own_scheduler.config.prediction_type == "v_prediction"
    version = "sdxl_base_v1-0" if two else ("sd_v2_v" if v_prediction else "sd_v2") if wide else "sd_v1"
    second = "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"
    architecture = "stable-diffusion-xl-v1-base" if two else second if wide else "stable-diffusion-v1"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        # kohya's entry, which tells the naming of a kohya file.
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if two else "diffusers",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "ss_base_model_version": version,
        "ss_v2": str(wide and not two),
    }


@torch.no_grad()
def measure_magnitudes(module: torch.nn.Module) -> None:
    """The lengths that DoRA starts from, in fp32: peft rounds them like the base, and so starts beside it."""
    for layer in module.modules():
        if ADAPTER in getattr(layer, "lora_magnitude_vector", ()):
            base, dora = layer.base_layer.weight.float(), layer.lora_magnitude_vector[ADAPTER]
            dora.weight.copy_(dora.get_weight_norm(base, torch.zeros_like(base), 1.0))


class Adapters:
    """The adapters inside some networks; the twin of `learning.Full`."""

    def __init__(self, modules: dict[str, torch.nn.Module], configs, family, kind, alpha, told, about_base):
        self.modules, self.configs, self.kind, self.alpha = modules, configs, kind, alpha
        self.family, self.base, self.text_share = family, family.name, 1.0
        layers = {name: {} for name, layer in modules["unet"].named_modules() if hasattr(layer, "base_layer")}
        two_layers = family.unet.config.layers_per_block == 2
        self.sgm = two_layers and files.has_sgm_names({"unet": layers}, about_base)  # in files for kohya's programs
        self.told, self.about_base = {key: value for key, value in told.items() if value is not None}, about_base

    def named(self) -> dict[str, torch.nn.Parameter]:
        """Name in the file -> weight, in an order that never changes."""
        return {
            self.file_key(name, key): weight for name in self.modules for key, weight in self._learning(name).items()
        }

    def _learning(self, name: str) -> dict[str, torch.nn.Parameter]:
        """peft's name -> weight of the adapters in one network."""
        return {key: weight for key, weight in self.modules[name].named_parameters() if weight.requires_grad}

    def file_key(self, name: str, key: str) -> str:
        if self.kind == "lora":
            return file_key(name, key)
        layer, part, _ = key.rsplit(".", 2)  # x.to_k.hada_w1_a.default => lora_unet_x_to_k.hada_w1_a
        return f"{files.kohya_name(name, layer, 'text_encoder_2' in self.modules)}.{part}"

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.named().values())

    def groups(self, learning_rate, text_encoder_lr=None, weight_decay=0.01, text_encoder_weight_decay=None) -> list:
        """DoRA's magnitudes do not decay, because zero is not where they start: decay would move the model although no
        gradient asks for it."""
        owned = {name: list(self._learning(name).values()) for name in self.modules}
        rates = (learning_rate, text_encoder_lr, weight_decay, text_encoder_weight_decay)
        made, ratio = learning.groups(owned, *rates), self.told.get("loraplus_lr_ratio")
        layers = [layer for module in self.modules.values() for layer in module.modules()]
        ups = {id(half[ADAPTER].weight) for layer in layers if ADAPTER in (half := getattr(layer, "lora_B", ()))}
        magnitudes = {
            id(vector[ADAPTER].weight)
            for layer in layers
            if ADAPTER in (vector := getattr(layer, "lora_magnitude_vector", ()))
        }
        if self.kind != "lora":  # in older checkpoints the text encoders' weights follow those of the UNet
            ends = itertools.accumulate(len(group["params"]) for group in made)
            return [learning.was(g, "unet", range(end - len(g["params"]), end)) for g, end in zip(made, ends)]
        split = []
        for group in made:
            # LoRA+, https://arxiv.org/abs/2402.12354: B, which starts at zero, learns `ratio` times as fast as A.
            fast = [weight for weight in group["params"] if ratio and id(weight) in ups]
            slow = [weight for weight in group["params"] if not (ratio and id(weight) in ups)]
            decaying = [k for k, weight in enumerate(slow) if id(weight) not in magnitudes]
            lasting = [k for k, weight in enumerate(slow) if id(weight) in magnitudes]
            name, first = group["name"], {**group, "params": [slow[k] for k in decaying]}
            split.append(learning.was(first, name, decaying) if lasting else first)
            if fast:
                split.append({**group, "params": fast, "lr": group["lr"] * ratio, "name": f"{name}_up"})
            if lasting:  # in older checkpoints they stand among the others
                own = {"params": [slow[k] for k in lasting], "weight_decay": 0.0, "name": f"{name}_magnitude"}
                split.append(learning.was({**group, **own}, name, lasting))
        return split

    def settle(self, step: int, total: int) -> None:
        """Before step `step` of `total`: text encoders that have learned for their share of them learn no longer.

        Without a gradient no optimizer touches a weight, and its decay does not either.
        """
        self.family.settled = step > math.ceil(self.text_share * total)
        for name in self.family.encoders if self.family.settled else ():
            if encoder := getattr(self.family, name):
                encoder.eval()  # without dropout

    def describe(self) -> dict:
        config = self.configs["unet"]
        targets = {name: sorted(config["target_modules"]) for name, config in self.configs.items()}
        method = "dora" if config["use_dora"] else self.kind
        return {"method": method, "rank": config["r"], "alpha": self.alpha, "targets": targets} | self.told

    @torch.no_grad()
    def initialise(self, seed: int, start: str = "gaussian") -> None:
        """So that the first step starts from exactly the base model: each product of factors is zero.

        Drawn weight by weight from the seed and the weight's name, so all ranks and any later layer order agree.
        """
        named = self.named()
        for key, weight in named.items():
            generator = torch.Generator().manual_seed(randomness.seed_of(seed, f"adapters/{key}"))
            if self.kind != "lora":
                weight.copy_(starts.lycoris(key.rsplit(".", 1)[1], weight.shape, generator))
            elif key.endswith(".down.weight") and start == "orthogonal":
                up = named[key.replace(".down.", ".up.")]
                for half, value in zip((weight, up), starts.orthogonal(weight.shape, up.shape, generator)):
                    half.copy_(value)
            elif key.endswith(".down.weight"):
                weight.copy_((starts.kaiming if start == "kaiming" else starts.gaussian)(weight.shape, generator))
            elif key.endswith(".up.weight") and start != "orthogonal":
                weight.zero_()

    def weights(self) -> dict[str, torch.Tensor]:
        """What the file holds: beside LoHa and LoKr their alphas too."""
        weights = dict(self.named())
        if self.kind != "lora":
            weights |= self._alphas()
            return {files.sgm_key(key): weight for key, weight in weights.items()} if self.sgm else weights
        return weights

    def _alphas(self) -> dict[str, torch.Tensor]:
        """Beside LoHa and LoKr, as LyCORIS keeps them."""
        return {
            self.file_key(name, f"{key}.alpha.{ADAPTER}"): torch.tensor(float(layer.alpha[ADAPTER]))
            for name, module in self.modules.items()
            for key, layer in module.named_modules()
            if isinstance(getattr(layer, "alpha", None), dict)
        }

    def header(self, title: str) -> dict[str, str]:
        """Rank, alpha, targets and base model, for diffusers and, in their own words, for other programs."""
        unet = self.configs["unet"]
        module = "networks.lora" if self.kind == "lora" and not unet["use_dora"] else "lycoris.kohya"
        header = {
            "format": "pt",
            **self.about_base,
            "modelspec.title": title,
            "ss_output_name": title,
            "ss_network_module": module,
            "ss_network_dim": str(unet["r"]),
            "ss_network_alpha": f"{unet['lora_alpha']:g}",
        }
        if module == "lycoris.kohya":
            header["ss_network_args"] = json.dumps({"algo": "lora" if self.kind == "lora" else self.kind})
        if self.kind == "lora":
            config = {f"{name}.{key}": value for name, config in self.configs.items() for key, value in config.items()}
            header[METADATA] = json.dumps(config, indent=2, sort_keys=True)
        if not Path(self.base, "model_index.json").expanduser().is_file():
            # A local folder is not named: weights are published, home folders not.
            header["base_model"] = header["ss_sd_model_name"] = self.base
        return header

    def save(
        self,
        folder: str | Path,
        output_kohya_format: bool = False,
        mark: str = "",
        kohya_dtype: str = "fp32",  # precision of the file for kohya's programs
        about: dict[str, str] | None = None,  # of a finished run: `metadata.of_run`
        output_dir: str | None = None,  # where the result of the run will be
    ) -> None:
        """One file of fp32 weights for stock `load_lora_weights`, and one for A1111, ComfyUI and kohya if asked.

        LoHa and LoKr, which stock diffusers does not read, are named as in LyCORIS in both."""
        finished = about is not None
        folder = Path(folder)
        title = re.sub(r"\.tmp-checkpoint-(\d+)-\w+", rf"{folder.parent.name}-step\1", folder.name)
        header = self.header(title) | (about or {})
        file = saved.marked(Path(folder, FILE), mark)
        files.save(self.weights(), file, header, hashed=finished and self.kind != "lora")
        if output_kohya_format:
            write_kohya(folder, kohya_dtype, self.sgm)
        if output_dir and self.configs["unet"]["use_dora"]:
            export = DORA_EXPORT.format(folder=shlex.quote(output_dir))
            print(f"for ComfyUI and A1111, which read a DoRA differently: {export}", flush=True)

    def load(self, folder: str | Path, mark: str = "") -> None:
        """The exact inverse of save, in place; a file of other adapters is refused."""
        file = saved.marked(Path(folder, FILE), mark)
        if self.kind != "lora":
            weights = self.named() | self._alphas()
            # Those of SDXL once had diffusers' names in files too.
            current = self.sgm and any(map(files.is_sgm_key, saved.header(file)))
            return learning.copy_from(file, {files.sgm_key(k): w for k, w in weights.items()} if current else weights)
        learning.copy_from(file, self.named())


def write_kohya(folder: str | Path, dtype: str = "fp32", sgm: bool | None = None) -> None:
    """KOHYA_FILE beside FILE, with the same weights; `sgm` as in `files.kohya`, None: as the file tells."""
    found, header = files.read(Path(folder, FILE), finite=False)
    # Alphas stand beside the weights there, and diffusers refuses a file that says them twice.
    header = {key: value for key, value in header.items() if key != METADATA}
    target = Path(folder, KOHYA_FILE)
    try:
        weights = files.kohya(found, files.has_sgm_names(found, header) if sgm is None else sgm)
        files.save(files.narrowed(weights, dtype), target, header, hashed=True)
    except OverflowError as problem:  # the other file holds all that was learned
        target.unlink(missing_ok=True)
        errors.warn(f"--kohya_dtype {dtype}: {target} was not written: {problem}")


def file_key(name: str, key: str) -> str:
    """peft's name of a weight => the one in files, which diffusers, old and new, and other programs read.

    unet:          x.to_k.lora_A.default.weight      => unet.x.to_k.lora.down.weight
    text_encoder:  y.k_proj.lora_B.default.weight    => text_encoder.text_model.y.k_proj.lora_linear_layer.up.weight
    unet:          x.to_k.lora_magnitude_vector.default.weight   => unet.x.to_k.lora_magnitude_vector
    text_encoder:  y.k_proj.lora_magnitude_vector.default.weight => text_encoder.….k_proj.lora_magnitude_vector.weight
    """
    text = name.startswith("text_encoder")
    layer = "lora_linear_layer" if text else "lora"
    # The usual name has no `.weight`; transformers 5 then silently leaves a text encoder's magnitudes untrained.
    magnitude = ".lora_magnitude_vector.weight" if text else ".lora_magnitude_vector"
    key = key.replace(f".lora_magnitude_vector.{ADAPTER}.weight", magnitude)
    key = key.replace(f".lora_A.{ADAPTER}.", f".{layer}.down.").replace(f".lora_B.{ADAPTER}.", f".{layer}.up.")
    # transformers 5 dropped this level inside CLIPTextModel; without it older readers do not know the weights.
    if text and not key.startswith(("text_model.", "text_projection.")):
        key = f"text_model.{key}"
    return f"{name}.{key}"


DOWNS = (".down.weight", ".lora_A.weight", "lora_down.weight", ".hada_w1_b", ".lokr_w2_b")


def read_metadata(file: str | Path) -> dict:
    """What a saved adapter says of itself: base_model (None for a local folder), rank, alpha, dora, modules.

    Reads only the header, of a file or of the standard file in a folder; files of other programs say less.
    """
    file = Path(file, FILE) if Path(file).is_dir() else Path(file)
    with safe_open(str(file), framework="pt") as stored:
        header, keys = stored.metadata() or {}, list(stored.keys())
        downs = [key for key in keys if key.endswith(DOWNS)]
        ranks = {stored.get_slice(key).get_shape()[0] for key in downs}
    config = json.loads(header.get(METADATA) or "{}")
    rank = config.get("unet.r") or (ranks.pop() if len(ranks) == 1 else None)
    alpha = float(header["ss_network_alpha"]) if "ss_network_alpha" in header else rank
    return {
        "base_model": header.get("base_model"),
        "rank": rank,
        "alpha": config.get("unet.lora_alpha", alpha),
        "dora": config.get("unet.use_dora", any("magnitude_vector" in key or "dora_scale" in key for key in keys)),
        "modules": sorted({files.network_of(key) for key in keys}),
    }
