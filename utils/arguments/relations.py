"""What options mean to each other: contradictions are refused, effects that cannot come are pointed out."""

import argparse
import importlib.util
import os
import shlex
import sys
from dataclasses import dataclass, field

from utils import buckets, captions, concepts
from utils.arguments import bounds, length

MULTIPLE = 8  # pixels: the autoencoder's downscaling
DEFAULT_OFFSET = 0.1  # what --offset_noise stands for
IF_ONLY = ("tokenizer_max_length", "text_encoder_use_attention_mask", "class_labels_conditioning", "validation_images")

# What --adapter loha and lokr have no use for, and the value that means it is not asked for.
LORA_ONLY = {"use_dora": False, "use_rslora": False, "lora_dropout": 0, "init_lora_weights": "gaussian"}
LORA_ONLY |= {"loraplus_lr_ratio": None}

# How a DoRA is written for other programs once it is trained.
DORA_EXPORT = "python -m utils.adapters export {folder} dora.safetensors --dora diff (or --dora lora --rank 16)"

PROMPTS = ("instance_prompt", "class_prompt", "validation_prompt", "test_prompts")

# accelerate's names for them are variables that its launcher sets.
ENGINES = {"DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP"}

# What a stream cannot have, and the value that asks for nothing.
STREAMED_WITHOUT = {"validation_split": 0, "max_train_samples": None, "repeats": 1, "resolution_buckets": "off"}
STREAMED_WITHOUT |= {"masked_loss": False}

# An option that does nothing without another one, which must be true or, where a value is named, have that value.
NEEDS = {
    "class_data_dir": "with_prior_preservation",
    "class_prompt": "with_prior_preservation",
    "num_class_images": "with_prior_preservation",
    "text_encoder_lr": "train_text_encoder or train_text_encoder_ti",
    "adam_weight_decay_text_encoder": "train_text_encoder or train_text_encoder_ti",
    "train_text_encoder_frac": "train_text_encoder",
    "train_text_encoder_ti_frac": "train_text_encoder_ti",
    "token_abstraction": "train_text_encoder_ti",
    "num_new_tokens_per_abstraction": "train_text_encoder_ti",
    "lokr_factor": "adapter lokr",
    "kohya_dtype": "output_kohya_format",
    "dataset_config_name": "dataset_name",
    "shuffle_buffer": "streaming",
    "ema_decay": "use_ema",
    "unmasked_weight": "masked_loss",
    "sam_box": "sam_model_name_or_path",
    "sam_point": "sam_model_name_or_path",
    "ema_power": "use_ema",
    "ema_interval": "use_ema",
    "offload_ema": "use_ema",
    "ema_sigma_rel": "posthoc_ema",
    "ema_snapshot_steps": "posthoc_ema",
    "dream_detail_preservation": "dream_training",
    "multires_noise_discount": "multires_noise_iterations",
    "timestep_bias_multiplier": "timestep_bias_strategy",
    "timestep_bias_begin": "timestep_bias_strategy range",
    "timestep_bias_end": "timestep_bias_strategy range",
    "timestep_bias_portion": "timestep_bias_strategy",
    "edm_p_mean": "edm_sigmas lognormal",
    "edm_p_std": "edm_sigmas lognormal",
    "hub_model_id": "push_to_hub",
    "pdm_loss_weight": "use_pdm_loss",
    "pdm_layer": "use_pdm_loss",
    "pdm_inversion_steps": "use_pdm_loss",
    "pdm_targets": "use_pdm_loss",
    "features_data_dir": "use_pdm_loss",
    "save_pdm_fs": "use_pdm_loss",
    "save_pdm_masks": "mask_pdm",
    "num_test_imgs_per_prompt": "test_prompts",
    "del_cls_imgs_dir": "with_prior_preservation",
    "prodigy_beta3": "optimizer prodigy",
    "prodigy_decouple": "optimizer prodigy",
    "prodigy_use_bias_correction": "optimizer prodigy",
    "prodigy_safeguard_warmup": "optimizer prodigy",
}


# Prompts that images are drawn from, and the option that counts the images of each.
DRAWN = (("validation_prompt", "num_validation_images"), ("test_prompts", "num_test_imgs_per_prompt"))


@dataclass
class Findings:
    complaints: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check(args: argparse.Namespace, given: dict, defaults: dict, misread: set[str]) -> Findings:
    """Compare the options with each other and settle those that depend on others (in place)."""
    found = Findings()
    has = vars(args).get  # a script need not have every group
    _data(args, has, misread, found)
    _pdm(args, has, given, misread, found)
    _masks(args, has, found)
    _streaming(args, has, given, found)
    _text_encoder(has, found)
    _pivotal(args, has, given, found)
    _adapters(args, has, found)
    _optimizer(args, has, given, defaults, found)
    _weightwise(has, found)
    _averages(has, given, defaults, found)
    _engine(has, found)
    _noise(args, has, given, found)
    _validation(args, has, given, found)
    _words(args, has, found)
    _start(has, found)
    _scores(args, has, given, found)
    _reporting(args, has, given, found)
    large = list(bounds.check(has))
    for number, row in enumerate(has("concepts_list") or (), start=1):
        large += bounds.check(row.get, f"--concepts_list, concept {number}: {{}}")
    for refused, message in large:
        (found.complaints if refused else found.warnings).append(message)
    for name in IF_ONLY:
        if has(name) not in (None, False, []):
            found.complaints.append(
                f"--{name}: IF comes with its family; other models do not listen to it: leave it out"
            )
    for name, needed in NEEDS.items():
        if name == "class_prompt" and (
            has("use_pdm_loss") or (has("scores") and (has("validation_prompt") or has("test_prompts")))
        ):
            continue
        ways = [way for way in needed.split(" or ") if way.partition(" ")[0] in args]
        pairs = [way.partition(" ")[::2] for way in ways]
        met = any(has(option) == value if value else has(option) for option, value in pairs)
        if name in given and given[name] != defaults[name] and not met:
            found.warnings.append(f"--{name} has no effect without --{' or --'.join(ways)}")
    return found


def drawn(args: argparse.Namespace) -> list[str]:
    """Which of the prompts in DRAWN images are drawn from."""
    return [prompts for prompts, count in DRAWN if getattr(args, prompts, None) and getattr(args, count)]


def _concepts(args, has, misread: set[str], found: Findings) -> None:
    """The file's content takes the place of its name: what a run saves is what it trained on."""
    args.concepts_list, complaints = concepts.read(args.concepts_list)
    found.complaints += complaints
    for name in ("instance_data_dir", "dataset_name", "instance_prompt", "class_data_dir", "class_prompt", "masks_dir"):
        if has(name):
            remedy = (
                "; put NAME.mask.png beside NAME.jpg" if name == "masks_dir" else ": the file names them; leave one out"
            )
            found.complaints.append(f"--concepts_list with --{name}{remedy}")
    prior = has("with_prior_preservation")
    needed = ["instance_data_dir"] + ["instance_prompt"] * (not has("caption_column"))
    needed += ["class_data_dir", "class_prompt"] if prior else []
    for concept in concepts.settle(args.concepts_list, {}) if args.concepts_list else ():
        missing = [name for name in needed if not getattr(concept, name)]
        found.complaints += [f"{concept.named(name)} is missing" for name in missing]
    if not prior and any("class_prompt" in row for row in args.concepts_list):
        found.warnings.append("--concepts_list: class_prompt has no effect without --with_prior_preservation")


def _data(args, has, misread: set[str], found: Findings) -> None:
    if has("concepts_list"):
        _concepts(args, has, misread, found)
    elif "instance_data_dir" in args:
        if bool(has("instance_data_dir")) == bool(has("dataset_name")) and "instance_data_dir" not in misread:
            which = "not both" if has("dataset_name") else "one of them"
            found.complaints.append(f"--instance_data_dir or --dataset_name: {which} must be given")
        captioned = has("caption_column")
        if has("instance_prompt") is None and not captioned and "instance_prompt" not in misread:
            found.complaints.append("--instance_prompt is required (only with --caption_column it may be left out)")
    if "train_data_dir" in args and bool(has("train_data_dir")) == bool(has("dataset_name")):
        which = "not both" if has("dataset_name") else "one of them"
        found.complaints.append(f"--train_data_dir or --dataset_name: {which} must be given")
    if has("precomputed_dir") and has("cache_latents") == "off":
        found.complaints.append("--precomputed_dir with --cache_latents off: latents that are there; leave one out")
    if has("dream_training") and has("prediction_type") not in (None, "epsilon"):
        found.complaints.append("--dream_training is made for epsilon prediction; leave it or --prediction_type out")
    if has("with_prior_preservation") and not has("concepts_list"):
        for name, what in (("class_data_dir", "a folder for class images"), ("class_prompt", "what they show")):
            if not has(name) and name not in misread:
                found.complaints.append(f"--with_prior_preservation needs --{name}, {what}")
    resolution = has("resolution")
    if resolution and resolution % MULTIPLE:
        below = resolution - resolution % MULTIPLE
        nearest = f"{below} or {below + MULTIPLE}"
        found.complaints.append(
            f"--resolution is {resolution}: it must be a multiple of {MULTIPLE}; {nearest} are next"
        )


def _pdm(args, has, given: dict, misread: set[str], found: Findings) -> None:
    if "use_pdm_loss" not in args:
        return
    if not (args.use_inst_loss or args.use_pdm_loss):
        found.complaints.append("--use_inst_loss no without --use_pdm_loss: nothing is learned of the subject")
    if args.use_pdm_loss:
        rows = args.concepts_list if isinstance(args.concepts_list, list) else ()
        lacks = [f"concept {k} has no class_prompt" for k, row in enumerate(rows, 1) if not row.get("class_prompt")]
        if lacks or not (args.concepts_list or args.class_prompt or "class_prompt" in misread):
            why = f" ({'; '.join(lacks)})" if lacks else ""
            found.complaints.append(f"--use_pdm_loss needs --class_prompt, under which photos are inverted{why}")
        if has("resolution_buckets") != buckets.OFF:
            found.complaints.append(
                "--use_pdm_loss with --resolution_buckets: its targets are of square crops; leave one of them out"
            )
    if args.mask_pdm and not args.use_pdm_loss:
        found.complaints.append("--mask_pdm needs --use_pdm_loss; the masks of the photos' own loss are --mask_dm")
    if args.mask_prior and not args.with_prior_preservation:
        found.complaints.append("--mask_prior needs --use_prior_loss: there are no class images")
    # Masks are read for whichever loss wants them; asked for without saying which, they are the photos'.
    sam = has("sam_model_name_or_path") and not args.mask_prior
    if (args.masked_loss or has("masks_dir") or has("alpha_mask") or sam) and not args.mask_pdm:
        args.mask_dm = True
    args.masked_loss = args.mask_dm or (args.mask_pdm and args.use_pdm_loss)


def _masks(args, has, found: Findings) -> None:
    if has("masks_dir") and has("alpha_mask"):
        found.complaints.append("--masks_dir with --alpha_mask: a photo has one mask; leave one of them out")
    sources = [name for name in ("masks_dir", "alpha_mask", "sam_model_name_or_path") if has(name)]
    if sources and "mask_dm" not in args:  # else `_pdm` has settled which losses want them
        args.masked_loss = True
    if has("masked_loss") and has("dataset_name") and not has("alpha_mask") and not has("sam_model_name_or_path"):
        found.complaints.append(
            "--masked_loss with --dataset_name: no mask files there; --alpha_mask takes the pictures' transparency,"
            " --sam_model_name_or_path makes masks"
        )
    box, point = has("sam_box") or (), has("sam_point") or ()
    if box and not (len(box) == 4 and box[0] < box[2] <= 1 and box[1] < box[3] <= 1):
        found.complaints.append(
            f"--sam_box {' '.join(map(str, box))}: left, top, right and bottom are needed, as shares of width and"
            " height from 0 to 1, left before right and top above bottom, e.g. 0.1 0.2 0.9 1"
        )
    if point and not (len(point) == 2 and max(point) <= 1):
        found.complaints.append(
            f"--sam_point {' '.join(map(str, point))}: x and y are needed, as shares of width and height from 0 to 1,"
            " e.g. 0.5 0.6"
        )


def _streaming(args, has, given: dict, found: Findings) -> None:
    """What would have to look at every row first."""
    if not has("streaming"):
        return
    if not has("max_train_steps"):
        found.complaints.append(
            "--streaming needs --max_train_steps: a stream is not gone through by the clock of epochs"
        )
    for name, default in STREAMED_WITHOUT.items():
        if has(name) != default:
            found.complaints.append(
                f"--{name} with --streaming: it needs the whole set, which is not listed; leave one out"
            )
    if given.get("cache_latents") == "on" or has("precomputed_dir"):
        option = "precomputed_dir" if has("precomputed_dir") else "cache_latents on"
        found.complaints.append(f"--{option} with --streaming: rows are encoded when they come; leave one out")
    args.cache_latents = "off"


def _text_encoder(has, found: Findings) -> None:
    if has("train_text_encoder") and has("pre_compute_text_embeddings"):
        found.complaints.append(
            "--train_text_encoder with --pre_compute_text_embeddings: embeddings computed once cannot follow a text"
            " encoder that learns; leave one of them out"
        )
    if has("train_text_encoder") and has("skip_save_text_encoder"):
        found.complaints.append(
            "--skip_save_text_encoder would throw away what --train_text_encoder learns; leave one out"
        )


def _pivotal(args, has, given: dict, found: Findings) -> None:
    for name in ("train_text_encoder_frac", "train_text_encoder_ti_frac"):
        if (has(name) or 0) > 1:
            found.complaints.append(f"--{name} is {has(name):g}: a share of the steps is at most 1")
    if not has("train_text_encoder_ti"):
        return
    engine = engine_asked_for()
    against = {
        "train_text_encoder": (has("train_text_encoder"), "new tokens learn in encoders that are frozen otherwise"),
        "pre_compute_text_embeddings": (has("pre_compute_text_embeddings"), "they cannot follow tokens that learn"),
        "precomputed_dir": (has("precomputed_dir"), "embeddings made before cannot follow tokens that learn"),
    }
    for name, (given_too, why) in against.items():
        if given_too:
            found.complaints.append(f"--train_text_encoder_ti with --{name}: {why}; leave one of them out")
    if engine:
        found.complaints.append(
            f"--train_text_encoder_ti with {engine}, for which accelerate is configured: not tried; leave it out"
        )
    args.token_abstraction = list(dict.fromkeys(args.token_abstraction))
    classes = [has("class_prompt"), *(row.get("class_prompt") for row in has("concepts_list") or ())]
    for word in args.token_abstraction:
        if word.split() != [word]:
            found.complaints.append(f"--token_abstraction '{word}' must be one word")
        elif any(captions.replaced(text, {word: ""}) != text for text in classes if text):
            found.complaints.append(
                f"--class_prompt names {word}, which the model does not know yet; say what the class is, e.g. a dog"
            )
    if "text_encoder_lr" not in given and has("text_encoder_lr") and has("text_encoder_lr") < 1e-4:
        found.warnings.append(
            f"--train_text_encoder_ti learns little at the --text_encoder_lr of {args.text_encoder_lr:g} that is meant"
            " for whole encoders; give a larger one"
        )


def _adapters(args, has, found: Findings) -> None:
    kind, start = has("adapter"), has("init_lora_weights")
    if kind in ("loha", "lokr"):
        for name, unset in LORA_ONLY.items():
            if has(name) not in (unset, None, False):
                found.complaints.append(f"--{name} with --adapter {kind}: it is made for LoRA; leave one of them out")
    if has("quantize_base"):
        for name, given in (("use_dora", has("use_dora")), ("adapter", kind != "lora"), ("compile", has("compile"))):
            if given:
                found.complaints.append(
                    f"--quantize_base {args.quantize_base} with --{name}: only plain LoRA layers go beside packed"
                    " weights; leave one of them out"
                )
    if start == "orthogonal" and any(rank and rank % 2 for rank in (has("rank"), has("lora_conv_rank"))):
        found.complaints.append("--init_lora_weights orthogonal needs even ranks: A and B take half each")
    if has("loraplus_lr_ratio") and has("optimizer") == "prodigy":
        found.complaints.append("--loraplus_lr_ratio with --optimizer prodigy, which has one step size for all weights")
    if has("output_kohya_format") and has("use_dora"):
        export = DORA_EXPORT.format(folder=shlex.quote(args.output_dir))
        found.complaints.append(
            "--output_kohya_format with --use_dora: ComfyUI, AUTOMATIC1111 and kohya's scripts read a DoRA differently,"
            f" and none as it was trained. Remove --output_kohya_format. After training, run {export}"
        )
    elif "adapter" in args and args.output_kohya_format is None:  # LoHa and LoKr have kohya's naming anyway
        args.output_kohya_format = kind == "lora" and not has("use_dora")
    if has("use_blora"):
        if has("lora_unet_blocks"):
            found.complaints.append("--use_blora means --lora_unet_blocks content style; leave one of them out")
        args.lora_unet_blocks = ["content", "style"]
    vars(args).pop("use_blora", None)


def _optimizer(args, has, given: dict, defaults: dict, found: Findings) -> None:
    if has("use_8bit_adam") and has("optimizer") not in ("adamw", "adamw8bit", "paged_adamw8bit", "lion"):
        found.complaints.append(
            f"--use_8bit_adam with --optimizer {has('optimizer')}: 8-bit states are AdamW's and Lion's; leave one out"
        )
    elif "optimizer" in args:  # one spelling, so that two ways to say the same are the same run
        args.use_8bit_adam = has("use_8bit_adam") or has("optimizer") in ("adamw8bit", "paged_adamw8bit")
        if args.use_8bit_adam and args.optimizer == "adamw":
            args.optimizer = "adamw8bit"
    if has("optimizer") == "prodigy" and has("learning_rate") <= 0.1:
        found.warnings.append(
            f"--optimizer prodigy finds its own step size; with --learning_rate {args.learning_rate:g}"
            " it learns little, 1.0 is usual"
        )
    if "lr_warmup_steps" not in args:
        return
    args.learning_rate = length.rate(args, given) or args.learning_rate
    if warning := length.far_off(args, defaults["learning_rate"]):
        found.warnings.append(warning)
    steps = has("max_train_steps")
    if args.lr_warmup_steps is None:
        # Without a number of steps it is settled once the data are counted.
        args.lr_warmup_steps = 0 if args.lr_scheduler == "constant" else min(500, steps // 10) if steps else None
    elif steps and args.lr_warmup_steps >= steps:
        found.complaints.append(
            f"--lr_warmup_steps {args.lr_warmup_steps} leaves nothing of --max_train_steps {steps};"
            f" {steps // 10} would be a tenth"
        )
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        args.lr_scheduler = "constant_with_warmup"


def _weightwise(has, found: Findings) -> None:
    """Steps within the backward pass know one gradient at a time."""
    if has("train_weights_in") == "bf16":
        if not has("fused_backward"):
            found.complaints.append(
                "--train_weights_in bf16 needs --fused_backward, which raises one weight at a time for its step"
            )
        if has("use_ema"):
            found.complaints.append("--train_weights_in bf16 with --use_ema: too coarse for averages; leave one out")
    if not has("fused_backward"):
        return
    precision = has("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION")
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    against = {
        "--gradient_accumulation_steps": has("gradient_accumulation_steps") > 1
        and "a gradient is used when it is there",
        "--max_grad_norm": has("max_grad_norm") and "their norm is known after the step; give --max_grad_norm 0",
        "--mixed_precision fp16": precision == "fp16" and "its scaler looks at all gradients before a step; use bf16",
        "--on_nan skip": has("on_nan") == "skip" and "a step that was taken cannot be left out",
        "--optimizer prodigy": has("optimizer") == "prodigy" and "it estimates one step size from all weights",
        "--num_processes": several and "gradients are exchanged before a step; one process only",
        (engine_asked_for() or ""): engine_asked_for() and "it steps by itself",
    }
    for option, why in against.items():
        if why:
            found.complaints.append(f"--fused_backward with {option}: {why}")


def _averages(has, given: dict, defaults: dict, found: Findings) -> None:
    if not has("posthoc_ema"):
        return
    if not has("use_ema"):
        found.complaints.append("--posthoc_ema needs --use_ema: nothing would be averaged")
    for name in ("ema_decay", "ema_power"):
        if given.get(name, defaults[name]) != defaults[name]:
            found.complaints.append(f"--{name} with --posthoc_ema, whose averages have --ema_sigma_rel; leave one out")
    lengths = [f"{length:g}" for length in has("ema_sigma_rel")]  # as in the names of files
    if len(set(lengths)) < max(2, len(lengths)):
        told = " ".join(lengths)
        found.complaints.append(f"--ema_sigma_rel {told}: others are made from two or more different lengths")
    every, interval = has("ema_snapshot_steps"), has("ema_interval")
    if every and every % interval:
        found.complaints.append(
            f"--ema_snapshot_steps {every} is no multiple of --ema_interval {interval}, after which averages change"
        )


def engine_asked_for() -> str | None:
    """What `accelerate launch` or its configuration wants the weights or their states to be kept by."""
    for name, variable in ENGINES.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            return name
    return None


def _engine(has, found: Findings) -> None:
    name = engine_asked_for()
    if name and has("optimizer") not in ("adamw", "sgd", None):
        option = "use_8bit_adam" if has("use_8bit_adam") else f"optimizer {has('optimizer')}"
        found.complaints.append(
            f"--{option} with {name}, for which accelerate is configured: such an optimizer needs each weight whole, "
            f"and {name} does not leave them so; use --optimizer adamw or sgd"
        )
    unshared = {
        "compile": "not tried",
        "offload_ema": "the averages are shared out like the weights",
        "quantize_base": "packed weights cannot be shared out",
    }
    for option, why in unshared.items():
        if name == "FSDP" and has(option):
            found.complaints.append(f"--{option} with FSDP, for which accelerate is configured: {why}; leave it out")


def _noise(args, has, given: dict, found: Findings) -> None:
    if has("timestep_bias_strategy") == "none":
        args.timestep_bias_strategy = None
    if has("do_edm_style_training"):
        found.complaints += [f"{words}: leave one out" for words in against_edm(has)]
    if has("snr_gamma") is not None and has("debiased_estimation"):
        found.complaints.append("--snr_gamma and --debiased_estimation both weigh timesteps; leave one out")
    if has("timestep_bias_strategy") == "range" and args.timestep_bias_begin >= args.timestep_bias_end:
        found.complaints.append(
            f"--timestep_bias_begin {args.timestep_bias_begin} is not before --timestep_bias_end"
            f" {args.timestep_bias_end}"
        )
    if has("loss_type") not in ("huber", "smooth_l1"):
        for name in ("huber_c", "huber_schedule"):
            if name in given:
                found.warnings.append(f"--{name} has no effect without --loss_type huber or smooth_l1")
    if has("rescale_betas_zero_snr") and has("prediction_type") == "epsilon":
        found.complaints.append(
            "--rescale_betas_zero_snr with --prediction_type epsilon: noise cannot be told from pure noise;"
            " train velocity: --prediction_type v_prediction"
        )
    if has("offset_noise"):
        if given.get("noise_offset", DEFAULT_OFFSET) != DEFAULT_OFFSET:
            found.complaints.append(
                f"--offset_noise means --noise_offset {DEFAULT_OFFSET}, and --noise_offset"
                f" {args.noise_offset:g} is given; leave one out"
            )
        args.noise_offset = DEFAULT_OFFSET
    vars(args).pop("offset_noise", None)


def against_edm(has) -> list[str]:
    """Options that do not go with EDM-style training, whether --do_edm_style_training or the model asks for that."""
    huber = has("loss_type") in ("huber", "smooth_l1") and has("huber_schedule") == "exponential"
    clashes = {
        "snr_gamma": (has("snr_gamma") is not None, "EDM has weights of its own"),
        "debiased_estimation": (has("debiased_estimation"), "EDM has weights of its own"),
        "timestep_bias_strategy": (has("timestep_bias_strategy"), "EDM draws noise levels in its own way"),
        "huber_schedule exponential": (huber, "it counts timesteps, which EDM has not; snr fits"),
        "dream_training": (has("dream_training"), "it is made for epsilon prediction on DDPM's timesteps"),
    }
    return [f"--{name} with EDM-style training: {why}" for name, (given, why) in clashes.items() if given]


def _validation(args, has, given: dict, found: Findings) -> None:
    if "validation_steps" in given and "validation_epochs" in given:
        found.complaints.append("--validation_steps and --validation_epochs are both given; leave one out")
    elif "validation_steps" in given and "validation_epochs" in args:
        args.validation_epochs = None
    elif "validation_epochs" in given and "validation_steps" in args:
        args.validation_steps = None
    if "validation_prompt" in args:
        args.validation_prompt = list(dict.fromkeys([*args.validation_prompt, *args.validation_prompts]))
        del args.validation_prompts


def _words(args, has, found: Findings) -> None:
    """{identifier} and {class} in prompts become words, so that everything after this sees finished prompts."""
    words = {option: has(option) for option in captions.PLACEHOLDERS.values()}
    given = {name: has(name) for name in PROMPTS if has(name)}
    found.complaints += captions.unfilled(((f"--{name}", text) for name, text in given.items()), **words)
    for name, text in given.items():
        filled = captions.fill(text, **words)
        setattr(args, name, filled if isinstance(filled, str) else list(filled))
    for number, row in enumerate(has("concepts_list") or (), start=1):
        texts = {name: row[name] for name in concepts.TEXTS if name in row}
        named = ((f"--concepts_list, concept {number}: {name}", text) for name, text in texts.items())
        found.complaints += captions.unfilled(named, **words)
        row |= {name: captions.fill(text, **words) for name, text in texts.items()}
    if "instance_data_dir" in args or "train_data_dir" in args:
        args.concepts = concepts.settle(has("concepts_list"), vars(args))


def _start(has, found: Findings) -> None:
    if has("resume_from_checkpoint") and has("overwrite_output_dir"):
        found.complaints.append(
            "--resume_from_checkpoint goes on with a run, --overwrite_output_dir removes it; leave one out"
        )
    if has("deterministic") and has("allow_tf32"):
        found.complaints.append("--deterministic turns TF32 off, --allow_tf32 turns it on; leave one out")


def _scores(args, has, given: dict, found: Findings) -> None:
    if "scores" not in args:
        return
    named = list(dict.fromkeys(args.scores))
    alone = [name for name in ("auto", "none") if name in named and len(named) > 1]
    if alone:
        found.complaints.append(f"--scores {' '.join(named)}: {alone[0]} together with others; leave one out")
    args.scores = [name for name in named if name != "none"]
    if args.scores and "scores" in given and not drawn(args):
        zero = [f"--{count}" for _, count in DRAWN if has(count) == 0]
        why = f"with {' and '.join(zero)} 0" if zero else "without --validation_prompt"
        found.warnings.append(f"--scores has no effect {why}: no images are drawn")


def _reporting(args, has, given: dict, found: Findings) -> None:
    if "report_to" in args:
        wanted = list(dict.fromkeys(args.report_to))
        if "none" in wanted and len(wanted) > 1:
            found.complaints.append(f"--report_to {' '.join(wanted)}: none together with others")
        if "all" in wanted:
            wanted = [
                name for name in ("tensorboard", "wandb", "comet_ml", "trackio") if importlib.util.find_spec(name)
            ]
        args.report_to = [name for name in wanted if name != "none"]
    if has("hub_token"):
        _token(args, has, found)


def _token(args, has, found: Findings) -> None:
    """Keep the token in the environment of this process only: afterwards no option holds it, so nothing can save it."""
    scheme, _, name = args.hub_token.partition(":")
    if scheme == "env" and name:
        if os.environ.get(name):
            os.environ["HF_TOKEN"] = os.environ[name]
        else:
            found.complaints.append(f"--hub_token env:{name}: the environment has no {name}; export it first")
    else:
        sys.argv = [word.replace(args.hub_token, "env:HF_TOKEN") for word in sys.argv]  # trackers record sys.argv
        os.environ["HF_TOKEN"] = args.hub_token
        if {"wandb", "comet_ml"} & set(has("report_to") or ()):
            found.complaints.append(
                "--hub_token with --report_to wandb or comet_ml: they record command lines;"
                " export HF_TOKEN and give --hub_token env:HF_TOKEN, or log in with: hf auth login"
            )
        found.warnings.append(
            "--hub_token: other users of this machine can read a command line;"
            " export HF_TOKEN instead, or log in once with: hf auth login"
        )
    args.hub_token = "env:HF_TOKEN"
