"""Random pipelines small enough that a whole training script runs on them in seconds, built without any network.

They have the real folder layout, the real classes and a VAE that shrinks by 8, so whatever works on them by name and
shape works on the real models. Their pictures are noise.
"""

import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

RESOLUTION = 64  # pixels a side: 8 x 8 latents
WORDS = ["photo", "sks", "dog", "cat", "beach", "the", "snow", "red", "blue", "drawing", "night"]


def bpe(words=WORDS):
    """A vocabulary in CLIP's format: every byte, so any text encodes, and merges that make `words` single tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in words:
        left = word[0]
        for position, letter in enumerate(word[1:], start=1):
            right = letter + "</w>" if position == len(word) - 1 else letter
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    pieces += list(dict.fromkeys(left + right for left, right in merges))
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def tokenizer(**options):
    from transformers import CLIPTokenizer

    vocab, merges = bpe()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, **options)


def save_tokenizer(folder, **options):
    """`save_pretrained` writes tokenizer.json alone; older readers want vocab.json and merges.txt too."""
    vocab, merges = bpe()
    tokenizer(**options).save_pretrained(folder)
    Path(folder, "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")


def text_encoder(width=16, act="quick_gelu", projection=None):
    """With `projection`, one that also makes pooled embeddings of that width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocab, _ = bpe()
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
        projection_dim=projection or width,
        initializer_factor=8.0,  # the usual start is so small that all prompts would encode alike
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
        **options,
    )


def unet(cross_attention_dim=16, linear_projection=False, **options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=[2, 4] if linear_projection else 4,
        norm_num_groups=4,
        use_linear_projection=linear_projection,
        **options,
    )


def stable_diffusion(prediction_type="epsilon", seed=0):
    """A pipeline like SD 1.x ("epsilon") or SD 2.x at 768 px ("v_prediction": linear projections, wider text)."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    like_two = prediction_type == "v_prediction"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = 24 if like_two else 16
        return StableDiffusionPipeline(
            vae=vae(),
            text_encoder=text_encoder(width, "gelu" if like_two else "quick_gelu"),
            tokenizer=tokenizer(),
            unet=unet(width, linear_projection=like_two),
            scheduler=PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                steps_offset=1,
                set_alpha_to_one=False,
                prediction_type=prediction_type,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def stable_diffusion_xl(seed=2):
    """A pipeline like SDXL: two encoders of different width, size conditioning, a VAE of its own scale."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=text_encoder(16),
            text_encoder_2=text_encoder(24, "gelu", projection=20),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(pad_token="!"),
            unet=unet(
                16 + 24,
                linear_projection=True,
                transformer_layers_per_block=(1, 2),
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 20,
            ),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            add_watermarker=False,
        )


def inpainting(pipeline, seed=3):
    """The in-painting sibling of a pipeline: its UNet also takes a mask and the latents of what is seen."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
        whole = diffusers.UNet2DConditionModel(**options | {"in_channels": 9})
    kind = getattr(diffusers, type(pipeline).__name__.replace("Pipeline", "InpaintPipeline"))
    parts = {name: part for name, part in pipeline.components.items() if name != "image_encoder"}
    more = {"add_watermarker": False} if "text_encoder_2" in parts else {"requires_safety_checker": False}
    return kind(**parts | {"unet": whole}, **more)


def save(pipeline, folder):
    """A stock diffusers folder, the text encoder keyed with `text_model.` as in every published one."""
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    pipeline.save_pretrained(folder)
    save_tokenizer(folder / "tokenizer")
    if (folder / "tokenizer_2").is_dir():
        save_tokenizer(folder / "tokenizer_2", pad_token="!")
    file = folder / "text_encoder" / "model.safetensors"
    weights = {key if key.startswith("text_model.") else f"text_model.{key}": w for key, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def photo(seed=0, size=(80, 96)):
    """A picture that a small network can tell from another: a blob and a stripe on a ground, all drawn by the seed."""
    rng = random.Random(seed)

    def colour():
        return tuple(rng.randrange(256) for _ in range(3))

    width, height = size
    image = Image.new("RGB", size, colour())
    pen = ImageDraw.Draw(image)
    left, top = rng.randrange(width // 2), rng.randrange(height // 2)
    pen.rectangle((0, top, width, top + height // 8), fill=colour())
    pen.ellipse((left, top, left + width // 2, top + height // 2), fill=colour())
    return image


def photos(folder, count=3, seed=0, size=(80, 96), captions=None):
    """A folder of `count` PNG photos; `captions` (a list) are written beside them as name.txt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        photo(1000 * seed + number, size).save(folder / f"photo-{number}.png")
        if captions:
            (folder / f"photo-{number}.txt").write_text(captions[number], encoding="utf-8")
    return folder
