"""Which options a resume compares, because they change what is learned and nothing else tells of them.

What networks, data and optimizer say of themselves is compared beside these: see `identity=` in the scripts. Learning
rate, schedule, clipping and length may change from one session to the next. A test sorts every option of every script
into one of these kinds, so that a new one cannot be forgotten.
"""

import argparse

# option => the value with which checkpoints were made that do not know the option
COMPARED = {
    "variant": None,
    "tokenizer_name": None,
    "pretrained_vae_model_name_or_path": None,
    "center_crop": False,
    "random_flip": False,
    "image_interpolation_mode": "lanczos",
    "alpha_background": "white",
    "train_weights_in": "fp32",
    "caption_dropout": 0.0,
    "unmasked_weight": 0.0,
    "lora_dropout": 0.0,
    "train_text_encoder_frac": 1.0,
    "train_text_encoder_ti_frac": 0.5,
    "input_perturbation": 0.0,
    "debiased_estimation": False,
    "multires_noise_iterations": 0,
    "multires_noise_discount": 0.3,
    "timestep_bias_strategy": None,
    "timestep_bias_multiplier": 1.0,
    "timestep_bias_begin": 0,
    "timestep_bias_end": 1000,
    "timestep_bias_portion": 0.25,
    "loss_type": "l2",
    "huber_c": 0.1,
    "huber_schedule": "snr",
    "do_edm_style_training": False,
    "edm_sigmas": "scheduler",
    "edm_p_mean": -1.2,
    "edm_p_std": 1.2,
    "rescale_betas_zero_snr": False,
    "clip_skip": None,
    "vae_tiling": False,
    "dream_detail_preservation": 1.0,
    "ema_decay": 0.9999,
    "ema_power": None,
    "ema_interval": 1,
    "posthoc_ema": False,
    "ema_sigma_rel": [0.05, 0.1],
    "prodigy_beta3": None,
    "prodigy_decouple": True,
    "prodigy_use_bias_correction": True,
    "prodigy_safeguard_warmup": True,
    "allow_tf32": False,
    "use_inst_loss": True,
}


def identity(args: argparse.Namespace) -> dict:
    """Only what is not as it always was, so that an option added later leaves older checkpoints resumable."""
    named = {name: getattr(args, name) for name in COMPARED if hasattr(args, name)}
    return {name: value for name, value in named.items() if value != COMPARED[name]}
