"""Every option the scripts share, in titled groups: one function a group, each adding to the parser it is given.

Options that two scripts share are defined once, so their names, meanings and checks cannot drift apart; what differs
between scripts (a learning rate, a folder name) is a keyword of the group. Nothing here imports more than the standard
library: --help and a typo answer at once.
"""

import argparse
import re

from utils import buckets
from utils.arguments.identity import REMOVED_STARTS, identity
from utils.arguments.settings import (
    Kind,
    caller,
    choice,
    colour,
    concepts_file,
    defaults,
    flag,
    folder,
    number,
    parse,
    prompt,
    public,
    save,
    text,
    whole,
)

__all__ = ["caller", "defaults", "identity", "new_parser", "parse", "public", "save"]  # and the groups below

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "sgd", "lion", "paged_adamw8bit")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact")
STARTS = ("gaussian", "kaiming", "orthogonal")
SCORES = ("clip", "dino", "lpips", "judge")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio")

PDM_STEPS = 50  # as docs/log.md has it
PDMBOOTH = {  # what PDMBooth's users type => our name
    "inst_data_dir": "instance_data_dir",
    "inst_prompt": "instance_prompt",
    "cls_data_dir": "class_data_dir",
    "cls_prompt": "class_prompt",
    "num_cls_imgs": "num_class_images",
    "use_prior_loss": "with_prior_preservation",
    "out_dir": "output_dir",
    "lr": "learning_rate",
    "adam_eps": "adam_epsilon",
    "ckpting_steps": "checkpointing_steps",
    "ckpts_total_limit": "checkpoints_total_limit",
    "resume_from_ckpt": "resume_from_checkpoint",
    "gradient_ckpting": "gradient_checkpointing",
    "dl_num_workers": "dataloader_num_workers",
    "log_dir": "logging_dir",
    "trackers_proj_name": "tracker_project_name",
    "val_prompt": "validation_prompt",
    "num_val_imgs": "num_validation_images",
    "val_steps": "validation_steps",
    "val_epochs": "validation_epochs",
    "val_imgs": "validation_images",
    "precompute_text_embeds": "pre_compute_text_embeddings",
    "text_encoder_use_attn_mask": "text_encoder_use_attention_mask",
    "cls_labels_conditioning": "class_labels_conditioning",
}

WORKERS = "processes that prepare pictures; 0: the training process itself"
ALLOW_PICKLE = "also read weights that are no safetensors (.bin), if they hold nothing but tensors"

_EPILOG = """\
Order of precedence: defaults, then --config, then the command line. A switch may carry a value, so that the command
line can take back what a file turned on: --random_flip no.
Exit codes: 0 done, 1 failed, 2 options, 3 photos or captions, 4 diverged, 6 saved but not uploaded, 75 saved but not
finished (time limit, SIGUSR1), 130 or 143 saved after SIGINT or SIGTERM. After 75, 130 and 143 the same command with
--resume_from_checkpoint latest goes on where it stopped."""


def new_parser(doc: str | None, other_names: dict[str, str] | None = None) -> argparse.ArgumentParser:
    """A parser that takes no abbreviations (they break when options are added) and never exits by itself.

    other_names: what users of another program call an option => our name for it.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=doc,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser._negative_number_matcher = re.compile(r"-\d*\.?\d+(e[+-]?\d+)?$", re.I)  # argparse's own knows no -1e-4
    parser.other_names = other_names or {}
    add = group(parser, "Settings")
    add("config", folder, None, "YAML file of options; every run leaves one, training_config.yaml", metavar="FILE.yaml")
    add("dry_run", flag, False, "check everything, print the plan (what learns, steps, memory, disk), then stop")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Model")
    add("pretrained_model_name_or_path", folder, None, "pipeline folder, hub name, or toybox", required=True)
    add("revision", text, None, "branch, tag or commit of the hub model", alias="--non_ema_revision")
    add("clip_skip", whole(0), None, "last layers of the text encoders that are left out; 1 is usual for drawn styles")
    add("vae_tiling", flag, False, "the VAE works in overlapping tiles: less memory for large pictures, slightly other")
    add("variant", text, None, "file variant of the weights, e.g. fp16")
    add("tokenizer_name", folder, None, "tokenizer folder or hub name, instead of the model's own")
    add("pretrained_vae_model_name_or_path", folder, None, "VAE folder or hub name, instead of the model's own")
    add("allow_pickle", flag, False, ALLOW_PICKLE)


def add_dreambooth_data(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Photos of the subject")
    add("instance_data_dir", folder, None, "folder of photos; name.txt or metadata.jsonl beside them hold captions")
    add(
        "instance_prompt",
        text,
        None,
        "prompt with a rare identifier, e.g. 'a photo of sks dog'; used where no caption is",
    )
    add("identifier", text, None, "the rare word that {identifier} stands for in prompts and captions, e.g. sks")
    add("class_noun", text, None, "what {class} stands for in them, e.g. dog")
    add("caption_dropout", number(0, below=1), 0.0, "share of visits with an empty caption, class images included")
    add("dataset_name", folder, None, "a Hugging Face dataset (hub name or folder) instead of --instance_data_dir")
    help = (
        "JSON list of several subjects, each with instance_prompt, class_prompt, instance_data_dir, class_data_dir and,"
    )
    help += " if you like, repeats and num_class_images; instead of these options"
    add("concepts_list", concepts_file, None, help)
    add("dataset_config_name", text, None, "configuration of that dataset")
    add("image_column", text, "image", "its column of pictures")
    add("caption_column", text, None, "its column of captions, or that of metadata.jsonl")
    add("cache_dir", folder, None, "where downloaded datasets are kept (models follow HF_HOME)")
    add("repeats", whole(1), 1, "how often each photo counts in an epoch")
    _add_images(add)
    add("dataloader_num_workers", whole(0), 0, WORKERS)


def add_captioned_data(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Captioned pictures")
    _add_captioned(add)
    help = "read rows of parquet or tar shards when training comes to them, in bounded memory; a folder or the hub"
    add("streaming", flag, False, help)
    add("shuffle_buffer", whole(1), 1000, "rows of a stream that are mixed, and kept in memory")
    add("max_train_samples", whole(1), None, "train on so many pictures, drawn by the seed", unset="all")
    help = "share of visits with an empty caption, which guidance compares with; 0.1 is usual"
    add("caption_dropout", number(0, below=1), 0.0, help, alias="--proportion_empty_prompts")
    add("validation_split", number(0, below=1), 0.0, "share of the pictures held out for a validation loss")
    add("repeats", whole(1), 1, "how often each picture counts in an epoch")
    add("precomputed_dir", folder, None, "latents and embeddings of these pictures, from python -m utils.cache")
    _add_images(add, on_bad_image="skip")
    add("dataloader_num_workers", whole(0), 0, WORKERS)


def add_precompute(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Captioned pictures")
    _add_captioned(add)
    _add_images(add, on_bad_image="skip")
    add = group(parser, "Work and result")
    add("output_dir", folder, None, "folder of the result, which many machines may share", required=True)
    add("num_shards", whole(1), 1, "how many processes share the work")
    add("shard_index", whole(0), 0, "which of them this is, from 0")
    add("texts", flag, True, "also encode the captions, each once")
    add("dtype", choice("float32", "float16", "bfloat16"), "float32", "precision in which they are stored")
    add("mixed_precision", choice("no", "fp16", "bf16"), "no", "precision in which they are computed")


def _add_captioned(add) -> None:
    add("train_data_dir", folder, None, "folder of pictures; metadata.jsonl, .csv, .parquet or name.txt hold captions")
    add("dataset_name", folder, None, "a Hugging Face dataset (hub name or folder) instead of --train_data_dir")
    add("dataset_config_name", text, None, "configuration of that dataset")
    add("dataset_split", text, "train", "split of that dataset")
    add("image_column", text, "image", "its column of pictures")
    unset = "text; in a folder's metadata text, caption or prompt"
    add("caption_column", text, None, "column of captions; a list of them is drawn from at each visit", unset=unset)
    add("cache_dir", folder, None, "where downloaded datasets are kept (models follow HF_HOME)")


def _add_images(add, on_bad_image: str = "error") -> None:
    help = "pixels of the shorter side after resizing, and of the square crop"
    add("resolution", whole(8), None, help, unset="the model's own: 512, 768 or 1024")
    kind = Kind("auto|WxH,...", "auto, off, or sizes such as 512x512,448x576, multiples of 8", buckets.spelled)
    help = "photos keep their shape: cropped to the nearest of these, width x height; without a value: about as many"
    help += " pixels as --resolution squared, no side above 4 times the other"
    add("resolution_buckets", kind, buckets.OFF, help, bare=buckets.AUTO)
    add("center_crop", flag, False, "crop the centre instead of a new random place each time")
    add("random_flip", flag, False, "mirror half of the photos, chosen anew each time")
    add("image_interpolation_mode", choice(*INTERPOLATIONS), "lanczos", "filter used for resizing")
    add("alpha_background", colour, "white", "what transparent parts of photos become: white, black, grey or #rrggbb")
    help = "on an unreadable picture at the start (streams: at any time): stop with an error, or skip it"
    add("on_bad_image", choice("error", "skip"), on_bad_image, help)


def add_masks(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Masks: learn only what is white in them")
    add("masked_loss", flag, False, "weigh the loss by masks, divided by their area; NAME.mask.png beside NAME.jpg")
    add("masks_dir", folder, None, "folder of masks with the photos' names, instead; turns --masked_loss on")
    add("alpha_mask", flag, False, "the photos' transparency is their mask, instead; turns --masked_loss on")
    help = "SAM folder, hub name (e.g. facebook/sam-vit-huge) or toybox-sam: makes the masks that photos lack; turns"
    add("sam_model_name_or_path", folder, None, f"{help} --masked_loss on")
    unset = "0.05 0.05 0.95 0.95, or --sam_point"
    help = "what it masks in every photo: left, top, right, bottom as shares of width and height"
    add("sam_box", number(0), None, help, many=True, unset=unset)
    add("sam_point", number(0), None, "the same by a point on it: x, y; also beside a box", many=True)
    add("unmasked_weight", number(0, below=1), 0.0, "weight of what is black in a mask")


def add_pdm(parser: argparse.ArgumentParser, pdm_loss_weight: float = 0.1) -> None:
    add = group(parser, "Losses of PDMBooth (https://github.com/Orimalca/PDMBooth), beside --use_prior_loss")
    add("use_inst_loss", flag, True, "learn from the photos as DreamBooth does; no: from --use_pdm_loss alone")
    add(
        "use_pdm_loss",
        flag,
        False,
        "keep one layer's queries about the photos; needs --class_prompt",
        alias="--use_pdm",
    )
    add("pdm_loss_weight", number(0), pdm_loss_weight, "weight of that loss")
    unset = "that of the published method, or the last one"
    add("pdm_layer", text, None, "which self-attention layer of the UNet", unset=unset)
    add("pdm_inversion_steps", whole(1), PDM_STEPS, "timesteps of the inversion, from which training draws")
    help = "where targets are taken: on the way to the noise or, as published, on the way back, at twice the cost"
    add("pdm_targets", choice("inversion", "reconstruction"), "inversion", help)
    add("features_data_dir", folder, None, "folder of targets computed before", unset="computed anew")
    help = "keep computed targets, in --features_data_dir or pdm_features/ of the output"
    add("save_pdm_fs", flag, False, help)
    add("mask_dm", flag, False, "the photos' loss is weighed by their masks, like --masked_loss elsewhere")
    add("mask_pdm", flag, False, "the loss of the queries is")
    add("mask_prior", flag, False, "the class images' loss is, by NAME.mask.png beside NAME.png or SAM")
    add("save_pdm_masks", flag, False, "write the masks, cropped as they are used, to pdm_masks/ of the output")
    add = group(parser, "Also of PDMBooth")
    add("test_prompts", prompt, None, "prompt to draw when training ends; repeat it for more", append=True)
    add("num_test_imgs_per_prompt", whole(0), 4, "images for each of --test_prompts; 0: none")
    add("del_cls_imgs_dir", flag, False, "at the end delete the class images that a script drew, never your own")
    add("wandb_exp", text, None, "the run's name in wandb", unset="chosen by wandb")
    add("wandb_dir", folder, None, "folder of wandb's files", unset="--logging_dir")
    add("save_model_weights", flag, False, "accepted; what was learned is always saved")


def add_prior_preservation(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Prior preservation: keep what the model knows about the class")
    add("with_prior_preservation", flag, False, "train on class images beside the photos")
    add("class_data_dir", folder, None, "folder of class images; the model itself draws those that are missing")
    add("class_prompt", text, None, "what they show, e.g. 'a photo of dog'")
    add("num_class_images", whole(1), 100, "how many class images there must be")
    add("prior_loss_weight", number(0), 1.0, "weight of the class images' loss")
    add("sample_batch_size", whole(1), 4, "class images drawn at once")
    help = "guidance with which they are drawn; 3 to 5 gives more varied ones, closer to what the model knows"
    add("class_guidance_scale", number(0), 7.5, help)
    add("prior_generation_precision", choice("no", "fp32", "fp16", "bf16"), None, "precision in which they are drawn")


def add_text_encoder(
    parser: argparse.ArgumentParser, text_encoder_lr: float | None = None, adam_weight_decay: float | None = None
) -> None:
    add = group(parser, "Text encoder")
    add("train_text_encoder", flag, False, "let the text encoder learn too")
    add("text_encoder_lr", number(above=0), text_encoder_lr, "its learning rate", unset="--learning_rate")
    name = "adam_weight_decay_text_encoder"
    add(name, number(0), adam_weight_decay, "its weight decay", unset="--adam_weight_decay")
    add("pre_compute_text_embeddings", flag, False, "accepted; a frozen text encoder always runs once a prompt")
    add("skip_save_text_encoder", flag, False, "leave the text encoder out of the saved pipeline")
    add("tokenizer_max_length", whole(1), None, "DeepFloyd IF only: tokens a prompt")
    add("text_encoder_use_attention_mask", flag, False, "DeepFloyd IF only")


def add_pivotal(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Pivotal tuning: new tokens learn beside the adapters (https://arxiv.org/abs/2208.01618)")
    help = "learn new tokens in the text encoders, at --text_encoder_lr; saved as learned_embeddings.safetensors"
    add("train_text_encoder_ti", flag, False, help)
    add("token_abstraction", text, ("TOK",), "the words in prompts and captions that stand for them", many=True)
    add("num_new_tokens_per_abstraction", whole(1), 2, "tokens each of these words stands for")
    above = "share of the optimizer steps after which"
    add("train_text_encoder_ti_frac", number(above=0), 0.5, f"{above} they stay as they are, at most 1")
    add("train_text_encoder_frac", number(above=0), 1.0, f"{above} adapters of the text encoders do, at most 1")


def add_lora(parser: argparse.ArgumentParser, rank: int = 4) -> None:
    add = group(parser, "Adapters")
    help = "lora; loha and lokr, which stock diffusers does not load (infer.py, ComfyUI, A1111 do)"
    add("adapter", choice("lora", "loha", "lokr"), "lora", help)
    add("rank", whole(1), rank, "inner size of the adapters' matrices")
    add("lora_alpha", number(above=0), None, "adapters act with strength alpha / rank", unset="--rank")
    add("lora_dropout", number(0, below=1), 0.0, "dropout before the adapters")
    add("use_dora", flag, False, "DoRA: learn magnitude and direction apart (https://arxiv.org/abs/2402.09353)")
    add("use_rslora", flag, False, "strength alpha / sqrt(rank), for large ranks (https://arxiv.org/abs/2312.03732)")
    add("lokr_factor", whole(2), None, "LoKr: size of the smaller factor", unset="near the square root")
    removed = tuple((name, "gaussian") for name in REMOVED_STARTS)
    add("init_lora_weights", choice(*STARTS, removed=removed), "gaussian", "initial values of LoRA's matrices")
    help = "LoRA+: how much faster B learns than A (https://arxiv.org/abs/2402.12354); 16 is usual"
    add("loraplus_lr_ratio", number(1), None, help)
    help = "layers that get adapters, by the end of their names"
    add("lora_target_modules", text, None, help, many=True, unset="the attention projections")
    add("lora_conv_rank", whole(1), None, "the UNet's convolutions get adapters too, of this rank")
    help = "only these parts of the UNet, e.g. up_blocks.0.attentions.1; content and style are B-LoRA's of SDXL"
    add("lora_unet_blocks", text, None, help, many=True, unset="all of it")
    help = "B-LoRA (https://arxiv.org/abs/2403.14572), for SDXL: the same as --lora_unet_blocks content style"
    add("use_blora", flag, False, help)
    help = "keep the UNet's frozen weights in 4 or 8 bits: less memory, slower (https://arxiv.org/abs/2305.14314)"
    add("quantize_base", choice("nf4", "int8", "fp8"), None, help)
    help = "also write pytorch_lora_weights_kohya.safetensors, for AUTOMATIC1111, ComfyUI and kohya's scripts"
    add("output_kohya_format", flag, None, help, unset="yes; no for DoRA, LoHa and LoKr")
    help = "precision of pytorch_lora_weights_kohya.safetensors; fp16 halves the file"
    add("kohya_dtype", choice("fp32", "fp16"), "fp32", help)


def add_length(
    parser: argparse.ArgumentParser,
    train_batch_size: int = 4,
    num_train_epochs: int | None = None,  # None: a table chooses the number of steps (arguments.length)
) -> None:
    add = group(parser, "Length of the run")
    chosen = None if num_train_epochs else "--max_train_steps counts"
    add("train_batch_size", whole(1), train_batch_size, "examples a process and micro-step")
    add(
        "num_train_epochs",
        whole(1),
        num_train_epochs,
        "passes over the data; --max_train_steps overrides it",
        unset=chosen,
    )
    help = "optimizer steps in all, those before a resume included"
    unset = "of --num_train_epochs" if num_train_epochs else "chosen from a table, see docs/train_dreambooth.md"
    add("max_train_steps", whole(1), None, help, unset=unset)
    add("gradient_accumulation_steps", whole(1), 1, "micro-steps an optimizer step")
    add("max_train_minutes", number(above=0), None, "save and stop after this many minutes (exit code 75)")
    add("seed", whole(0), None, "seed of every draw", unset="drawn, printed and saved")


def add_optimizer(
    parser: argparse.ArgumentParser, learning_rate: float, adam_weight_decay: float = 1e-2, optimizer: str = "adamw"
) -> None:
    add = group(parser, "Optimizer and learning rate")
    add("optimizer", choice(*OPTIMIZERS), optimizer, "which optimizer")
    add("use_8bit_adam", flag, False, "8-bit states, the same as --optimizer adamw8bit (needs bitsandbytes)")
    add(
        "learning_rate",
        number(above=0),
        learning_rate,
        "learning rate after warm-up; DreamBooth on the toybox: 1e-4, LoRA 1e-3",
    )
    add("scale_lr", flag, False, "multiply it by batch size, accumulation and processes")
    add("lr_scheduler", choice(*SCHEDULES), "constant", "how the learning rate goes on after warm-up")
    unset = "0 for constant, else 500 or a tenth of all steps"
    add("lr_warmup_steps", whole(0), None, "optimizer steps of warm-up, for constant too", unset=unset)
    add("lr_num_cycles", whole(1), 1, "hard restarts of cosine_with_restarts")
    add("lr_power", number(above=0), 1.0, "power of polynomial")
    add("max_grad_norm", number(0), 1.0, "gradients are clipped to this norm; 0: not at all")
    help = "step each weight within the backward pass and free its gradient at once; needs --max_grad_norm 0"
    add("fused_backward", flag, False, help)
    add("adam_beta1", number(0, below=1), 0.9, "decay of the gradient's average (also Prodigy, Lion)")
    add("adam_beta2", number(0, below=1), 0.999, "decay of its square's average (also Prodigy, Lion)")
    add("adam_weight_decay", number(0), adam_weight_decay, "weight decay")
    add("adam_epsilon", number(above=0), 1e-08, "added to the denominator")
    add("prodigy_beta3", number(0, below=1), None, "decay of Prodigy's step size", unset="square root of --adam_beta2")
    add("prodigy_decouple", flag, True, "weight decay as in AdamW")
    add("prodigy_use_bias_correction", flag, True, "Adam's bias correction")
    add("prodigy_safeguard_warmup", flag, True, "leave the warm-up out of Prodigy's estimate")


def add_dream(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "DREAM: train on what the network makes of its own errors (https://arxiv.org/abs/2312.00210)")
    add("dream_training", flag, False, "a second forward pass moves inputs and target; for epsilon prediction")
    add("dream_detail_preservation", number(0), 1.0, "power of its weight: more keeps more detail")


def add_loss(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Noise and loss")
    add("snr_gamma", number(above=0), None, "Min-SNR weighting (https://arxiv.org/abs/2303.09556); 5.0 is usual")
    add(
        "noise_offset", number(0), 0.0, "strength of noise that is constant over an image, for dark and bright pictures"
    )
    add("offset_noise", flag, False, "the same as --noise_offset 0.1")
    add("input_perturbation", number(0), 0.0, "extra noise on the input only (https://arxiv.org/abs/2301.11706)")
    help = "levels of noise in larger and larger patches, 6 to 10 are usual; 0: plain noise"
    add("multires_noise_iterations", whole(0), 0, help)
    add("multires_noise_discount", number(0, below=1), 0.3, "how much each of them counts of the one before")
    add("debiased_estimation", flag, False, "weights 1/sqrt(SNR) (https://arxiv.org/abs/2310.08442)")
    help = "distance of prediction and target; huber and smooth_l1 are pseudo-Huber (https://arxiv.org/abs/2403.16728)"
    add("loss_type", choice("l2", "l1", "huber", "smooth_l1"), "l2", help)
    add("huber_c", number(above=0), 0.1, "where they turn from square to straight, at most noise")
    add("huber_schedule", choice("snr", "exponential", "constant"), "snr", "how that falls from 1 to it with the noise")
    help = "draw some timesteps more often: the earlier (less noise), the later, or a range"
    add("timestep_bias_strategy", choice("none", "earlier", "later", "range"), None, help, unset="none")
    add("timestep_bias_multiplier", number(above=0), 1.0, "how many times as often")
    add("timestep_bias_begin", whole(0), 0, "first timestep of the range")
    add("timestep_bias_end", whole(1), 1000, "timestep after the last of the range")
    add("timestep_bias_portion", number(above=0, below=1), 0.25, "share of timesteps that earlier and later mean")
    help = "noise schedule that ends in pure noise (https://arxiv.org/abs/2305.08891); for velocity prediction"
    add("rescale_betas_zero_snr", flag, False, help, unset="the model's scheduler")
    unset = "what the model's scheduler says"
    add("prediction_type", choice("epsilon", "v_prediction", "sample"), None, "what the UNet predicts", unset=unset)
    add("class_labels_conditioning", choice("timesteps"), None, "DeepFloyd IF only")
    help = "weights of EDM (https://arxiv.org/abs/2206.00364); by itself for a model with an EDM scheduler"
    add("do_edm_style_training", flag, False, help)
    help = "EDM: noise levels evenly from the scheduler's, or log-normal as in the paper"
    add("edm_sigmas", choice("scheduler", "lognormal"), "scheduler", help)
    add("edm_p_mean", number(), -1.2, "mean of log-normal levels' logarithm")
    add("edm_p_std", number(above=0), 1.2, "its standard deviation")


def add_ema(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Averaged weights")
    add("use_ema", flag, False, "keep an exponential moving average; it is what is validated and saved")
    add("ema_decay", number(0, below=1), 0.9999, "its decay, reached gradually")
    help = "reach the decay as 1 - (1 + step) ** -power, 2/3 is usual for long runs"
    add("ema_power", number(above=0), None, help, unset="(1 + step) / (10 + step)")
    add("ema_interval", whole(1), 1, "optimizer steps between updates")
    add("offload_ema", flag, False, "keep the averages in main memory: slower, frees one copy on the GPU")
    add("foreach_ema", flag, False, "accepted; all averages are always updated in one call")
    help = "choose the length of the average after training: keep averages of several lengths and store snapshots of"
    add("posthoc_ema", flag, False, f"{help} them; python -m utils.ema (https://arxiv.org/abs/2312.02696)")
    help = "their lengths, as standard deviations relative to that of training; the first is validated and saved"
    add("ema_sigma_rel", number(0.001, below=0.288), (0.05, 0.1), help, many=True)
    add("ema_snapshot_steps", whole(1), None, "optimizer steps between snapshots", unset="a twentieth of the run")


def add_full_training(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Weights that learn")
    help = (
        "precision in which they are kept; bf16 halves them, and rounds each update by chance so that small ones count"
    )
    add("train_weights_in", choice("fp32", "bf16"), "fp32", help)


def add_memory(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Precision, memory and speed")
    add("mixed_precision", choice("no", "fp16", "bf16"), None, "precision of the forward pass", unset="accelerate's")
    add("allow_tf32", flag, False, "faster, rounded fp32 products on Ampere and later GPUs")
    add("gradient_checkpointing", flag, False, "compute activations twice instead of keeping them")
    add("enable_xformers_memory_efficient_attention", flag, False, "xformers instead of PyTorch's own attention")
    help = "encode each photo once and keep the posterior; auto: when crops allow it"
    add("cache_latents", choice("auto", "on", "off"), "auto", help, bare="on")
    add("compile", flag, False, "torch.compile the network: slow first step, then faster")
    add("deterministic", flag, False, "the same bits on every run on the same hardware; slower on a GPU")
    add("set_grads_to_none", flag, False, "accepted; gradients are always freed")
    add("local_rank", whole(-1), -1, "accepted for old launchers; the environment decides", alias="--local-rank")


def add_checkpoints(parser: argparse.ArgumentParser, output_dir: str) -> None:
    add = group(parser, "Output and checkpoints")
    add("output_dir", folder, output_dir, "where the result, checkpoints and report go")
    add("overwrite_output_dir", flag, False, "start afresh although the folder holds a run")
    add("checkpointing_steps", whole(0), 500, "optimizer steps between checkpoints; 0: only when stopped early")
    add("checkpoints_total_limit", whole(1), None, "how many checkpoints to keep", unset="all")
    add("resume_from_checkpoint", folder, None, "latest (nothing there: start afresh) or a checkpoint folder")
    add("allow_resume_mismatch", text, None, "fields that may differ from the checkpoint's run", many=True)
    add("verify_checkpoint", choice("full", "sizes"), "full", "on resume: every byte's checksum, or file sizes alone")
    add("on_nan", choice("stop", "skip"), "stop", "what a loss that is not a number does; skip: leave the step out")
    help = "what a smoothed loss far above its usual course does; stop: exit code 4"
    add("on_loss_spike", choice("warn", "stop", "off"), "warn", help)


def add_validation(
    parser: argparse.ArgumentParser,
    validation_steps: int | None = None,
    validation_epochs: int | None = None,
    num_validation_images: int = 4,
) -> None:
    add = group(parser, "Validation images")
    add("validation_prompt", prompt, None, "prompt to draw during training; repeat it for more", append=True)
    add("validation_prompts", prompt, None, "the same, several at once", many=True)
    help = "images for each --validation_prompt; 0: no validation images"
    add("num_validation_images", whole(0), num_validation_images, help)
    help = "draw every so many optimizer steps; 0: at the end only; instead of --validation_epochs"
    add("validation_steps", whole(0), validation_steps, help)
    help = "draw every so many epochs; 0: at the end only; instead of --validation_steps"
    add("validation_epochs", whole(0), validation_epochs, help)
    schedulers = choice("DPMSolverMultistepScheduler", "DDPMScheduler")
    add("validation_scheduler", schedulers, "DPMSolverMultistepScheduler", "sampler")
    add("validation_num_inference_steps", whole(1), 25, "its steps")
    add("validation_guidance_scale", number(0), 7.5, "classifier-free guidance")
    add("validation_images", folder, None, "DeepFloyd IF only: small images that stage II enlarges", many=True)


def add_scores(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "Scores of validation and test images, in metrics.jsonl, trackers and the report")
    help = (
        "clip, dino, lpips, judge (the toybox's own), several of them, none; auto: the judge on the toybox, elsewhere"
    )
    help += " clip and dino if their weights are on this machine already"
    add("scores", choice("auto", "none", *SCORES), ("auto",), help, many=True)
    help = "CLIP that tells likeness, agreement with the prompt, and variety: folder or hub name"
    add("clip_model_name_or_path", folder, "openai/clip-vit-base-patch32", help)
    help = "vision transformer that tells likeness and variety: folder or hub name"
    add("dino_model_name_or_path", folder, "facebook/dino-vits16", help)


def add_logging(parser: argparse.ArgumentParser, tracker_project_name: str = "dreambooth") -> None:
    add = group(parser, "Logging (metrics.jsonl and report.html are always written)")
    help = "tensorboard, wandb, comet_ml, trackio, several of them, all (that are installed) or none"
    add("report_to", choice(*TRACKERS, "all", "none"), ("tensorboard",), help, many=True)
    add("logging_dir", folder, "logs", "folder of the trackers' files, inside --output_dir unless absolute")
    add("tracker_project_name", text, tracker_project_name, "project under which trackers file the run")


def add_hub(parser: argparse.ArgumentParser, hub_private: bool = True) -> None:
    add = group(parser, "Hugging Face Hub")
    add("push_to_hub", flag, False, "upload the result, its card and samples; checkpoints stay here")
    help = "env:NAME, the variable that holds the token; a token itself is seen by every user of the machine"
    add("hub_token", text, None, help, unset="HF_TOKEN or the login")
    add("hub_model_id", text, None, "repository", unset="name of the output folder")
    add("hub_private", flag, hub_private, "make a new repository private")


def group(parser: argparse.ArgumentParser, title: str):
    """One option a line: name, kind of value, default, help. Returns the function that adds such a line."""
    titled = parser.add_argument_group(title)

    def add(name, kind: Kind, default, help, *, required=False, many=False, append=False, bare=None, **more) -> None:
        bare = "yes" if kind is flag else bare  # the value of an option given without one
        alias, unset = more.pop("alias", None), more.pop("unset", None)
        if default is not None and default is not False:
            shown = "yes" if default is True else " ".join(map(str, default)) if isinstance(default, tuple) else default
            unset = f"{shown}"
        if many or append:
            more |= {"action": "append" if append else "extend"} | ({"nargs": "+"} if many else {})
            default = list(default or ())
        elif bare is not None:
            more |= {"nargs": "?", "const": bare}
        names = [f"--{name}"] + ([alias] if alias else [])
        names += [f"--{other}" for other, ours in getattr(parser, "other_names", {}).items() if ours == name]
        help = f"{help} ({'required' if required else f'default: {unset}'})" if required or unset else help
        metavar = more.pop("metavar", kind.metavar)
        titled.add_argument(*names, type=kind, default=default, required=required, metavar=metavar, help=help, **more)

    return add
