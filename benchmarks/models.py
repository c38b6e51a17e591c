"""Models and photos to measure on, built on the spot with random weights: speed does not depend on what was learned.

tiny: a whole script in seconds; what is measured is everything around the arithmetic.
mid:  a UNet of about 110 M parameters between the VAE and the text encoder of Stable Diffusion 1.x at their real
      sizes, so that the shares of the step are like those of a real model, at 256 pixels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

RESOLUTIONS = {"tiny": 64, "mid": 256}


def build(profile: str, folder: Path) -> Path:
    """The pipeline folder of a profile; built once, and again only if it was left unfinished."""
    done = folder / profile / "model_index.json"  # diffusers writes it first: moved into place when all is there
    if done.is_file():
        return done.parent
    import tiny  # tests/tiny.py

    started = folder / f".{profile}"
    made = {"tiny": tiny.stable_diffusion, "tiny-sdxl": tiny.stable_diffusion_xl, "mid": mid}
    tiny.save(made[profile](), started)
    started.replace(folder / profile)
    return done.parent


def mid():
    import tiny
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(112, 224, 448, 448),  # Stable Diffusion 1.x: 320, 640, 1280, 1280
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def photos(folder: Path, count: int = 5) -> Path:
    """Photos a little larger than any profile trains on, none square."""
    import tiny

    if not folder.is_dir():
        tiny.photos(folder, count, size=(400, 320))
    return folder


if __name__ == "__main__":  # in a process of its own: the one that measures stays small
    build(sys.argv[1], Path(sys.argv[2]))
    photos(Path(sys.argv[2]) / "photos")
