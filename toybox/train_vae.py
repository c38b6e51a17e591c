"""Trains the picture autoencoder of the toybox: 64 x 64 x 3 pixels <=> 16 x 16 x 4 latents.

    torchrun --nproc_per_node 2 -m toybox.train_vae --output toybox/sd/vae

    python -m toybox.train_vae --output toybox/sd/vae --refine_decoder --steps 2500 --learning_rate 1.5e-3

take about 45 and 8 core-minutes on a CPU. The latents' mean and spread are folded into the weights, so
that the scaling factor of Stable Diffusion, 0.18215, makes them exactly unit-variance here too. The second
command leaves the latents as they are, so that it may run while toybox/train_sd.py learns from them.
"""

import argparse
import copy
import random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from toybox.draw import example
from toybox.training import Run, average_into, cosine, pixels_of

SCALING_FACTOR = 0.18215


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
        mid_block_add_attention=False,
    )


def crops(pixels: torch.Tensor, rng: random.Random, size: int = 32) -> torch.Tensor:
    """Four crops of each picture: they see the inside of drawings more often than their margins."""
    corners = [(rng.randrange(65 - size), rng.randrange(65 - size)) for _ in range(4 * len(pixels))]
    return torch.stack([pixels[i // 4, :, y : y + size, x : x + size] for i, (y, x) in enumerate(corners)])


def edges(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pixels[..., 1:] - pixels[..., :-1], pixels[..., 1:, :] - pixels[..., :-1, :]


def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """=> means and log-variances (batch, 8, height / 4, width / 4)"""
    with torch.set_grad_enabled(vae.quant_conv.weight.requires_grad):
        return vae.quant_conv(vae.encoder(pixels))


def loss_of(vae: AutoencoderKL, pixels: torch.Tensor, kl_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(pixels.device.type, torch.bfloat16):  # twice as fast where the CPU has AMX
        moments = encode(vae, pixels).float()
        posterior = DiagonalGaussianDistribution(moments)
        decoded = vae.decode(posterior.sample()).sample.float()
    error = F.l1_loss(decoded, pixels)
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pixels)))
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error + 0.5 * edge + kl_weight * kl, kl


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Makes 0.18215 x latents zero-mean and unit-variance, by changing the 1 x 1 convolutions around them."""
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
    mean, spread = means.mean((0, 2, 3)), means.std((0, 2, 3)) * SCALING_FACTOR
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= spread.view(4, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - mean) / spread
    quant.bias[4:] -= 2 * spread.log()  # log-variance
    quant.weight.data, quant.bias.data = quant.weight.contiguous(), quant.bias.contiguous()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= spread.view(1, 4, 1, 1)


@torch.no_grad()
def signal_to_noise(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """PSNR in dB on pictures that training did not see."""
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(64)])
    return -10 * torch.log10(((decoded.clamp(-1, 1) - pixels) / 2).pow(2).mean()).item()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="toybox/sd/vae", help="folder for the finished VAE")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--whole_from", type=float, default=0.35, help="share of steps with crops only")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures, or fours of crops, a process and step")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--refine_decoder", action="store_true", help="train only the decoder of the VAE in --output")
    parser.add_argument("--kl_weight", type=float, default=1e-3)
    return parser.parse_args(argv)


def main(args) -> None:
    run = Run("vae-decoder" if args.refine_decoder else "vae")
    torch.manual_seed(run.rank)
    vae = AutoencoderKL.from_pretrained(args.output) if args.refine_decoder else new_vae()
    vae.to(run.device)
    if args.refine_decoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    average = copy.deepcopy(vae).requires_grad_(False)
    averaged = [a for a, b in zip(average.parameters(), vae.parameters()) if b.requires_grad]
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    first = 0
    if state := run.resume():
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    elif run.world > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)
    average.load_state_dict(state["average"] if state else vae.state_dict())
    unseen = pixels_of([example(10**9 + i).picture for i in range(128)]).to(run.device)

    for step in range(first, args.steps):
        whole = args.refine_decoder or step >= args.whole_from * args.steps
        start = (step * run.world + run.rank) * args.batch_size
        pixels = pixels_of([example(start + i).picture for i in range(args.batch_size)])
        if not whole:
            pixels = crops(pixels, random.Random(start))
        pixels = pixels.to(run.device)

        loss, kl = loss_of(vae, pixels, args.kl_weight)
        loss.backward()
        run.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * cosine(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
        average_into(averaged, parameters, min(0.998, (1 + step) / (10 + step)))

        if step % 250 == 249:
            run.log(step=step + 1, loss=loss.item(), kl=kl.item(), psnr=signal_to_noise(average, unseen))
        state = {"vae": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        run.save({**state, "step": step + 1}, due=step + 1 == args.steps)

    if run.rank == 0:
        if not args.refine_decoder:
            fold_statistics(average, pixels_of([example(i).picture for i in range(2000)]).to(run.device))
        average.half().save_pretrained(args.output)
        print(f"{args.output}: {signal_to_noise(average.float(), unseen):.2f} dB")


if __name__ == "__main__":
    main(parse_args())
