"""What other programs show of an adapter file: how it was trained, in the words of kohya (ss_*) and modelspec.*.

Only what is listed here goes in. Paths do not: files are published, home folders not.
"""

import json
import math
import time
from collections import Counter

from utils.errors import without_secrets

OPTIONS = {  # kohya's word => our option
    "ss_learning_rate": "learning_rate",
    "ss_unet_lr": "learning_rate",
    "ss_text_encoder_lr": "text_encoder_lr",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_network_dropout": "lora_dropout",
    "ss_caption_dropout_rate": "caption_dropout",
    "ss_flip_aug": "random_flip",
    "ss_noise_offset": "noise_offset",
    "ss_multires_noise_iterations": "multires_noise_iterations",
    "ss_multires_noise_discount": "multires_noise_discount",
    "ss_ip_noise_gamma": "input_perturbation",
    "ss_zero_terminal_snr": "rescale_betas_zero_snr",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_debiased_estimation": "debiased_estimation",
    "ss_loss_type": "loss_type",
    "ss_huber_c": "huber_c",
    "ss_huber_schedule": "huber_schedule",
    "ss_prior_loss_weight": "prior_loss_weight",
}
MOST_TAGS = 1000  # of each folder: a header with every caption of a large data set would take seconds to read


def of_run(run, dataset) -> dict[str, str]:
    """A finished run and what it trained on => entries of a header. What was not set is left out."""
    config, now = run.config, time.time()
    images = dataset.instance if isinstance(dataset.instance, list) else []  # rows of a stream are not listed
    per_step = config["train_batch_size"] * config["gradient_accumulation_steps"] * run.world
    epoch = max(1, len(dataset))
    told = {word: config.get(option) for word, option in OPTIONS.items()}
    if not config.get("train_text_encoder"):
        told["ss_text_encoder_lr"] = None
    if config.get("clip_skip") is not None:  # kohya counts layers from the end: 1 is the last one
        told["ss_clip_skip"] = told["modelspec.encoder_layer"] = config["clip_skip"] + 1
    told |= {
        "ss_seed": run.seed,
        "ss_steps": run.step,
        "ss_max_train_steps": run.total,
        "ss_epoch": math.ceil(run.step * per_step / epoch),
        "ss_num_epochs": math.ceil((run.total or run.step) * per_step / epoch),
        "ss_num_batches_per_epoch": math.ceil(epoch / config["train_batch_size"] / run.world),
        "ss_num_train_images": sum(one.repeats for one in images) * dataset.repeats if images else len(dataset),
        "ss_num_reg_images": len(dataset.classes),
        "ss_total_batch_size": per_step,
        "ss_mixed_precision": run.accelerator.mixed_precision,
        "ss_resolution": (dataset.size, dataset.size),
        "ss_enable_bucket": dataset.bucketed,
        "ss_random_crop": not config.get("center_crop"),
        "ss_training_started_at": time.mktime(time.strptime(run.session["began"], "%Y-%m-%d %H:%M:%S")),
        "ss_training_finished_at": now,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)),
        "modelspec.resolution": f"{dataset.size}x{dataset.size}",
        **_of_images(images, dataset.repeats),
    }
    prompts = [row.get("instance_prompt") for row in config.get("concepts_list") or [config]]
    told["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(filter(None, prompts))) or None
    return {word: without_secrets(str(value)) for word, value in told.items() if value is not None}


def _of_images(images: list, repeats: int) -> dict[str, str]:
    """How many images each subject has, and how often each tag stands in their captions."""
    counts, tags = {}, {}
    for one in images:
        name = f"{one.repeats * repeats}_images" + f"_{one.concept + 1}" * bool(one.concept)  # as kohya's folders
        entry = counts.setdefault(name, {"n_repeats": one.repeats * repeats, "img_count": 0})
        entry["img_count"] += 1
        captions = [one.caption] if isinstance(one.caption, str) else one.caption
        words = (word.strip().lower() for caption in captions for word in caption.split(","))
        tags.setdefault(name, Counter()).update(filter(None, words))
    if not images:
        return {}
    frequent = {name: dict(counter.most_common(MOST_TAGS)) for name, counter in tags.items()}
    return {"ss_dataset_dirs": json.dumps(counts), "ss_tag_frequency": json.dumps(frequent, ensure_ascii=False)}
