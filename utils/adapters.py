"""LoRA and DoRA adapters: attach them to a family's networks, list what learns, save and load exactly.

Low-rank adaptation, https://arxiv.org/abs/2106.09685: W x + (alpha / r) B A x. DoRA, https://arxiv.org/abs/2402.09353,
also learns the length of each row of W + (alpha / r) B A.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from utils import errors, learning, randomness

FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"  # the name peft keeps our adapter under inside each layer
METADATA = "lora_adapter_metadata"  # where diffusers looks for rank and alpha in the file's header


def attach(
    family,
    rank: int = 4,
    alpha: float | None = None,  # None: = rank, so that the scale alpha / rank is 1
    dropout: float = 0.0,
    dora: bool = False,
    targets: Sequence[str] | str | None = None,  # layer names or ends of names; None: the family's attention layers
    text_encoder: bool = False,
    seed: int = 0,
) -> "Adapters":
    """Freeze the base and put adapters beside its target layers. The weights that learn are fp32."""
    from peft import LoraConfig

    modules = {name: getattr(family, name) for name in ["unet", *(family.encoders if text_encoder else [])]}
    chosen = choose_targets(modules, targets, family.lora_targets)
    configs = {}
    for name, module in modules.items():
        module.requires_grad_(False)
        configs[name] = {
            "r": rank,
            "lora_alpha": rank if alpha is None else alpha,
            "lora_dropout": dropout,
            "target_modules": chosen[name],
            "use_dora": dora,
            "rank_pattern": {},  # empty, but older diffusers look both up in the file and fail without them
            "alpha_pattern": {},
        }
        module.add_adapter(LoraConfig(init_lora_weights="gaussian", **configs[name]), ADAPTER)
        module.train()  # for the dropout
        for weight in module.parameters():
            if weight.requires_grad:
                # peft makes adapters in the base's precision; half-precision weights would lose most small updates.
                weight.data = weight.data.float()
        measure_magnitudes(module)
    adapters = Adapters(modules, configs, base=family.name)
    adapters.initialise(seed)
    return adapters


@torch.no_grad()
def measure_magnitudes(module: torch.nn.Module) -> None:
    """The lengths that DoRA starts from, in fp32: peft rounds them like the base, and so starts beside it."""
    for layer in module.modules():
        if ADAPTER in getattr(layer, "lora_magnitude_vector", ()):
            base, dora = layer.base_layer.weight.float(), layer.lora_magnitude_vector[ADAPTER]
            dora.weight.copy_(dora.get_weight_norm(base, torch.zeros_like(base), 1.0))


def choose_targets(modules: dict, targets, defaults: dict[str, list[str]]) -> dict[str, list[str]]:
    """Which of the wanted layer names belong to which network; a name that fits nowhere is refused."""
    if not targets:
        return {name: list(defaults[name]) for name in modules}
    if isinstance(targets, str):
        targets = [target.strip() for target in targets.split(",") if target.strip()]

    def fits(module, target: str) -> bool:
        layers = (torch.nn.Linear, torch.nn.Conv2d)
        named = ((key, layer) for key, layer in module.named_modules() if isinstance(layer, layers))
        return any(key == target or key.endswith(f".{target}") for key, _ in named)

    chosen = {name: [t for t in targets if fits(module, t)] for name, module in modules.items()}
    unknown = [t for t in targets if not any(t in names for names in chosen.values())]
    if unknown:
        errors.refuse(
            f"--lora_target_modules {','.join(unknown)}: no linear or convolution layer of the model ends so; "
            f"the default is {','.join(defaults['unet'])}, others are e.g. proj_in, ff.net.2, conv1"
        )
    # Names given for one network leave the other at its default: it was asked to learn.
    return {name: names or list(defaults[name]) for name, names in chosen.items()}


class Adapters:
    """The adapters inside some networks; the twin of `learning.Full`."""

    def __init__(self, modules: dict[str, torch.nn.Module], configs: dict[str, dict], base: str):
        self.modules, self.configs, self.base = modules, configs, base

    def named(self) -> dict[str, torch.nn.Parameter]:
        """Name in the file -> weight, in an order that never changes."""
        return {
            file_key(name, key): parameter
            for name, module in self.modules.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.named().values())

    def groups(self, learning_rate, text_encoder_lr=None, weight_decay=0.01, text_encoder_weight_decay=None) -> list:
        named = self.named()
        return learning.groups(named, learning_rate, text_encoder_lr, weight_decay, text_encoder_weight_decay)

    def describe(self) -> dict:
        config = self.configs["unet"]
        targets = {name: sorted(config["target_modules"]) for name, config in self.configs.items()}
        rank, alpha = config["r"], config["lora_alpha"]
        return {"method": "dora" if config["use_dora"] else "lora", "rank": rank, "alpha": alpha, "targets": targets}

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """A from a normal distribution of std 1 / r, B zero: the first step starts from exactly the base model.

        Drawn weight by weight from the seed and the weight's name, so all ranks and any later layer order agree.
        """
        for key, weight in self.named().items():
            if key.endswith(".down.weight"):
                generator = torch.Generator().manual_seed(randomness.seed_of(seed, f"adapters/{key}"))
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[0])
            elif key.endswith(".up.weight"):
                weight.zero_()

    def save(self, folder: str | Path) -> None:
        """One file for stock `load_lora_weights`: fp32 weights, with rank, alpha, targets and base model beside."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {key: weight.detach().cpu().contiguous() for key, weight in self.named().items()}
        config = {f"{name}.{key}": value for name, config in self.configs.items() for key, value in config.items()}
        header = {"format": "pt", METADATA: json.dumps(config, indent=2, sort_keys=True)}
        if not Path(self.base, "model_index.json").expanduser().is_file():
            header["base_model"] = self.base  # a local folder is not named: weights are published, home folders not
        save_file(weights, Path(folder, FILE), metadata=header)

    def load(self, folder: str | Path) -> None:
        """The exact inverse of save, in place; a file of other adapters is refused."""
        learning.copy_from(Path(folder, FILE), self.named())


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


def read_metadata(file: str | Path) -> dict:
    """What a saved adapter says of itself: base_model (None for a local folder), rank, alpha, dora, modules.

    Reads only the header, of a file or of the standard file in a folder; files of other programs say less.
    """
    file = Path(file, FILE) if Path(file).is_dir() else Path(file)
    with safe_open(str(file), framework="pt") as stored:
        header, keys = stored.metadata() or {}, list(stored.keys())
        downs = [key for key in keys if key.endswith((".down.weight", ".lora_A.weight", "lora_down.weight"))]
        ranks = {stored.get_slice(key).get_shape()[0] for key in downs}
    config = json.loads(header.get(METADATA) or "{}")
    rank = config.get("unet.r") or (ranks.pop() if len(ranks) == 1 else None)
    return {
        "base_model": header.get("base_model"),
        "rank": rank,
        "alpha": config.get("unet.lora_alpha", rank),
        "dora": config.get("unet.use_dora", any("lora_magnitude_vector" in key for key in keys)),
        "modules": sorted({key.split(".")[0] for key in keys}),
    }
