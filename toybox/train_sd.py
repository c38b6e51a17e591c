"""Trains the toybox's Stable Diffusion: a UNet of 2.4 M weights and its text encoder, on drawn pictures.

    torchrun --nproc_per_node 2 -m toybox.train_sd --output toybox/sd

takes about 95 core-minutes on a CPU (minutes on a GPU, alone: python -m toybox.train_sd --batch_size 256 ...)
and needs the VAE in the output folder (toybox/train_vae.py). The result is an ordinary diffusers folder.
"""

import argparse
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toybox.draw import NAMED, UNSEEN_WORDS
from toybox.latents import cached_latents
from toybox.make_tokenizer import save_tokenizer
from toybox.training import BUILD, Run, average_into, cosine
from utils.models import clip

WIDTH = 96  # of the text encoder


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def encode_captions(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """=> (captions, 77) token numbers, padded as pipelines pad them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def draw_batch(data: dict, tokens: torch.Tensor, step: int, run: Run, batch_size: int, seed: int):
    """What this process learns from in this step, as a pure function of the step."""
    count, position = len(tokens), (step * run.world + run.rank) * batch_size
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + position // count))
    rows = order[[(position + i) % count for i in range(batch_size)]]
    random = torch.Generator().manual_seed((seed << 40) + position)
    mean, std = data["mean"][rows].float(), data["std"][rows].float()
    latents = mean + std * torch.randn(mean.shape, generator=random)
    noise = torch.randn(mean.shape, generator=random)
    timesteps = torch.randint(0, 1000, (batch_size,), generator=random)
    return rows, latents, noise, timesteps, random


@torch.no_grad()
def give_rare_words_embeddings(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    """Words such as "sks", which training never shows, get embeddings like those of the words that name
    individuals: the same mean and the same spread in each direction. So an unknown word is as visible to
    the network as in Stable Diffusion; without this, "sks dog" and "dog" would be nearly one prompt."""
    weight = text_encoder.get_input_embeddings().weight
    number = dict(tokenizer.get_vocab())
    known = weight[[number[word + "</w>"] for word in NAMED]]
    random = torch.Generator().manual_seed(0)
    for word in UNSEEN_WORDS:
        mixture = torch.randn(len(known), generator=random).to(weight) / math.sqrt(len(known) - 1)
        weight[number[word + "</w>"]] = known.mean(0) + mixture @ (known - known.mean(0))


def save_text_encoder(text_encoder: CLIPTextModel, folder: Path) -> None:
    """In float16, with two courtesies: the `text_model.` prefix that transformers 4 and other programs expect
    (5 reads both), and "float32" in the configuration, which is what all loaders then turn the weights into."""
    text_encoder.float().save_pretrained(folder)  # writes the configuration
    file = folder / "model.safetensors"
    clip.with_prefix(file)
    save_file({key: value.half() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})


def save_pipeline(unet, text_encoder, tokenizer, vae_folder: Path, output: Path) -> None:
    give_rare_words_embeddings(text_encoder, tokenizer)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder).half(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    save_text_encoder(text_encoder, output / "text_encoder")
    save_tokenizer(output / "tokenizer")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("toybox/sd"))
    parser.add_argument("--vae", type=Path, help="folder of the VAE (default: vae in the output folder)")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch_size", type=int, default=16, help="a process and step")
    parser.add_argument("--learning_rate", type=float, default=1.2e-3)
    parser.add_argument("--parts", type=int, default=15, help="pictures to learn from, in units of 4000")
    parser.add_argument("--min_snr_gamma", type=float, default=5.0)
    parser.add_argument("--caption_drop", type=float, default=0.1, help="share of captions replaced by nothing")
    parser.add_argument("--export_only", action="store_true", help="write the pipeline of the saved state, and stop")
    return parser.parse_args(argv)


def main(args) -> None:
    run = Run("sd")
    torch.manual_seed(0)  # all processes start from the same weights
    save_tokenizer(BUILD / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(BUILD / "tokenizer")
    vae_folder = args.vae or args.output / "vae"
    models = torch.nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
    models.to(run.device, memory_format=torch.channels_last)
    parameters = list(models.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    first, smooth = 0, 1.0
    if state := run.resume():
        models.load_state_dict(state["models"])
        optimizer.load_state_dict(state["optimizer"])
        average, first, smooth = state["average"], state["step"], state.get("loss", 1.0)

    if not args.export_only:
        vae = AutoencoderKL.from_pretrained(vae_folder).to(run.device)
        data = cached_latents(run, vae, args.parts)
        tokens = encode_captions(tokenizer, data["captions"])
        empty = encode_captions(tokenizer, [""])
        signal = new_scheduler().alphas_cumprod  # "alpha bar" of DDPM

        for step in range(first, args.steps):
            rows, latents, noise, timesteps, random = draw_batch(data, tokens, step, run, args.batch_size, seed=1)
            dropped = torch.rand(args.batch_size, 1, generator=random) < args.caption_drop
            captions = torch.where(dropped, empty, tokens[rows])
            alpha = signal[timesteps].view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            snr = alpha / (1 - alpha)
            weight = (snr.clamp(max=args.min_snr_gamma) / snr).flatten()  # Min-SNR, arXiv 2303.09556

            noisy = noisy.to(run.device).contiguous(memory_format=torch.channels_last)
            condition = models["text_encoder"](captions.to(run.device)).last_hidden_state
            prediction = models["unet"](noisy, timesteps.to(run.device), condition).sample
            error = (prediction - noise.to(run.device)).pow(2).mean((1, 2, 3))
            loss = (error * weight.to(run.device)).mean()
            loss.backward()
            run.average_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * cosine(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
            average_into(average, parameters, min(0.999, (1 + step) / (10 + step)))

            smooth = 0.99 * smooth + 0.01 * loss.item()
            if step % 100 == 99:
                run.log(step=step + 1, loss=smooth)
            state = {"models": models.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
            run.save({**state, "step": step + 1, "loss": smooth}, due=step + 1 == args.steps)

    if run.rank == 0:
        torch._foreach_copy_([parameter.data for parameter in parameters], average)
        models.to("cpu", memory_format=torch.contiguous_format)
        save_pipeline(models["unet"], models["text_encoder"], tokenizer, vae_folder, args.output)


if __name__ == "__main__":
    main(parse_args())
