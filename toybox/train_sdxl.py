"""Trains the toybox's SDXL: two text encoders and a UNet that also hears the size and the crop of a picture.

    python -m toybox.train_sdxl --output toybox/sdxl

takes about 45 core-minutes on a CPU. It shares the VAE of toybox/sd and is smaller than it (0.7 M weights
in the UNet), so that both fit into the repository: it is there to exercise the SDXL script, and draws less
well. Its training pictures were stored at 16 to 64 pixels and cut off-centre, as their time ids tell.
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from toybox.draw import draw, example
from toybox.make_tokenizer import save_tokenizer
from toybox.train_sd import draw_batch, encode_captions, give_rare_words_embeddings, new_scheduler, save_text_encoder
from toybox.training import BUILD, Run, average_into, cosine, pixels_of

WIDTHS, PROJECTION, TIME_ID = (32, 48), 48, 32  # of the two text encoders, of the pooled text, of one time id


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 48),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=(2, 4),  # the number of heads, as in SDXL
        cross_attention_dim=sum(WIDTHS),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID,
        projection_class_embeddings_input_dim=6 * TIME_ID + PROJECTION,
    )


def new_text_encoders(tokenizer: CLIPTokenizer) -> list:
    def settings(width):
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=PROJECTION,
            num_hidden_layers=3,  # SDXL listens to the last layer but one
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    return [CLIPTextModel(settings(WIDTHS[0])), CLIPTextModelWithProjection(settings(WIDTHS[1]))]


def stored_and_cropped(number: int):
    """A training picture as a data set might hold it => picture, caption, time ids
    (original height and width, top and left of the crop, target height and width)."""
    rng = random.Random(f"stored {number}")
    one = example(number)
    picture, original, top, left = one.picture, 64, 0, 0
    kind = rng.random()
    if kind < 0.3:  # it was small: enlarging blurs it
        original = rng.choice([16, 24, 32, 48])
        picture = picture.resize((original,) * 2, Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)
    elif kind < 0.6:  # it was larger and has been cut
        original, top, left = 88, rng.randrange(0, 25), rng.randrange(0, 25)
        larger = draw(one.individual, one.scene, number, size=original)
        picture = larger.crop((left, top, left + 64, top + 64))
    return picture, one.caption, (original, original, top, left, 64, 64)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, count: int) -> dict:
    """=> {"mean", "std": (count, 4, 16, 16), "captions", "time_ids": (count, 6)}; kept in toybox/.build."""
    file = BUILD / f"latents-sdxl-{count}.pt"
    if file.exists():
        return torch.load(file, weights_only=True)
    means, stds, captions, time_ids = [], [], [], []
    for start in range(0, count, 100):
        pictures, texts, ids = zip(*(stored_and_cropped(start + i) for i in range(100)))
        with torch.autocast(vae.device.type, torch.bfloat16):
            posterior = vae.encode(pixels_of(pictures).to(vae.device)).latent_dist
        means.append((posterior.mean.float() * vae.config.scaling_factor).half().cpu())
        stds.append((posterior.std.float() * vae.config.scaling_factor).half().cpu())
        captions, time_ids = [*captions, *texts], [*time_ids, *ids]
    data = {"mean": torch.cat(means), "std": torch.cat(stds), "captions": captions, "time_ids": torch.tensor(time_ids)}
    torch.save(data, file)
    return data


def hear(encoders, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (batch, 77) => hidden states of both encoders (batch, 77, 80), pooled text (batch, 48)."""
    first, second = (encoder(tokens, output_hidden_states=True) for encoder in encoders)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def save_pipeline(models, tokenizer, vae_folder: Path, output: Path) -> None:
    encoders = list(models["encoders"])
    for encoder in encoders:
        give_rare_words_embeddings(encoder, tokenizer)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder).half(),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=models["unet"].half(),
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(output)
    for encoder, name in zip(encoders, ("text_encoder", "text_encoder_2")):
        save_text_encoder(encoder, output / name)
    for name in ("tokenizer", "tokenizer_2"):
        save_tokenizer(output / name)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("toybox/sdxl"))
    parser.add_argument("--vae", type=Path, default=Path("toybox/sd/vae"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--min_snr_gamma", type=float, default=5.0)
    parser.add_argument("--caption_drop", type=float, default=0.1, help="share of captions replaced by nothing")
    parser.add_argument("--export_only", action="store_true", help="write the pipeline of the saved state, and stop")
    return parser.parse_args(argv)


def main(args) -> None:
    run = Run("sdxl")
    torch.manual_seed(0)
    save_tokenizer(BUILD / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(BUILD / "tokenizer")
    models = torch.nn.ModuleDict({"unet": new_unet(), "encoders": torch.nn.ModuleList(new_text_encoders(tokenizer))})
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
        data = encode_pictures(AutoencoderKL.from_pretrained(args.vae).to(run.device), args.pictures)
        tokens = encode_captions(tokenizer, data["captions"])
        empty = encode_captions(tokenizer, [""])
        signal = new_scheduler().alphas_cumprod

        for step in range(first, args.steps):
            rows, latents, noise, timesteps, generator = draw_batch(data, tokens, step, run, args.batch_size, seed=2)
            dropped = torch.rand(args.batch_size, 1, generator=generator) < args.caption_drop
            captions = torch.where(dropped, empty, tokens[rows]).to(run.device)
            alpha = signal[timesteps].view(-1, 1, 1, 1)
            noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(run.device)
            snr = alpha / (1 - alpha)
            weight = (snr.clamp(max=args.min_snr_gamma) / snr).flatten().to(run.device)

            words, pooled = hear(models["encoders"], captions)
            added = {"text_embeds": pooled, "time_ids": data["time_ids"][rows].to(run.device)}
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            prediction = models["unet"](noisy, timesteps.to(run.device), words, added_cond_kwargs=added).sample
            error = (prediction - noise.to(run.device)).pow(2).mean((1, 2, 3))
            loss = (error * weight).mean()
            loss.backward()
            run.average_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * cosine(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
            average_into(average, parameters, min(0.998, (1 + step) / (10 + step)))

            smooth = 0.99 * smooth + 0.01 * loss.item()
            if step % 100 == 99:
                run.log(step=step + 1, loss=smooth)
            state = {"models": models.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
            run.save({**state, "step": step + 1, "loss": smooth}, due=step + 1 == args.steps)

    torch._foreach_copy_([parameter.data for parameter in parameters], average)
    models.to("cpu", memory_format=torch.contiguous_format)
    save_pipeline(models, tokenizer, args.vae, args.output)


if __name__ == "__main__":
    main(parse_args())
