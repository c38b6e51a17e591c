"""Trains the toybox's judge on the same drawings: what is it, where is it, and who is it?

    python -m toybox.train_judge --vae toybox/sd/vae --output toybox/judge

    python -m toybox.train_judge --vae toybox/sd/vae --output toybox/judge --drawn_by toybox/sd --steps 2700

take about 15 and 5 core-minutes on a CPU. Half of the pictures pass through the VAE, because the judge is
going to look at decoded pictures. The second command continues the first with dogs that the model drew:
their mixed colours and blurred parts occur in no drawing, and must not all look alike to the judge.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from toybox.draw import MARKS, NAMED, PATTERNS, SCENES, SUBJECT, THINGS, draw, random_individual
from toybox.judge import JudgeNetwork
from toybox.things import COLOURS
from toybox.training import BUILD, Run, average_into, cosine, pixels_of

NAMES = {"thing": list(THINGS), "colour": list(COLOURS), "pattern": list(PATTERNS), "scene": list(SCENES)}
TEMPERATURE = 0.1


def lookalike(individual, rng: random.Random):
    """Somebody else, who differs in one respect only."""
    change = rng.choice(["colour", "second", "ears", "tail", "marks", "collar"])
    if change == "marks":
        marks = set(individual.marks) ^ set(rng.sample(MARKS, 2))
        return replace(individual, pattern="plain", marks=tuple(mark for mark in MARKS if mark in marks))
    other = random_individual(rng, individual.thing)
    return replace(individual, **{change: getattr(other, change)})


def draw_batch(step: int, individuals: int):
    """=> pictures of each individual twice, in two scenes; labels (2 x individuals) of each head."""
    rng = random.Random(f"judge {step}")
    people = []
    while len(people) < individuals:
        thing = rng.choices(["dog", "cat", None], [4, 2, 6])[0]
        people.append(random_individual(rng, thing))
        if thing and rng.random() < 0.08:  # the subject's colours, which the model never saw, must be known here
            people[-1] = replace(people[-1], colour=SUBJECT.colour, second=SUBJECT.second)
        if thing and rng.random() < 0.5:
            people.append(lookalike(people[-1], rng))
    people = people[:individuals]
    scenes = [rng.sample(NAMES["scene"], 2) for _ in people]
    shown = [(one, pair[view]) for view in (0, 1) for one, pair in zip(people, scenes)]
    pictures = [draw(one, scene, rng.randrange(1 << 40)) for one, scene in shown]
    values = [{"thing": a.thing, "colour": a.colour, "pattern": a.pattern, "scene": s} for a, s in shown]
    labels = {head: torch.tensor([NAMES[head].index(value[head]) for value in values]) for head in NAMES}
    same = torch.tensor([[a == b for b in people] for a in people])
    return pixels_of(pictures), labels, same


def drawn_dogs(model: Path) -> dict:
    """Dogs as the model draws them, kept in toybox/.build: "named": (60, 4, 3, 64, 64), those that rare words
    name, each in four scenes; "others": (100, 3, 64, 64), all different."""
    file = BUILD / "drawn-dogs.pt"
    if not file.exists():
        from toybox.evaluate import draw_pictures, load_pipeline

        names = [word for word, named in NAMED.items() if named.thing == "dog"]
        scenes = list(SCENES.values())
        prompts = [
            f"a photo of {name} dog {scenes[(i + 3 * k) % 10]}" for i, name in enumerate(names) for k in range(4)
        ]
        pixels = pixels_of(draw_pictures(load_pipeline(model), prompts + ["a photo of a dog"] * 100, seed=77, steps=12))
        torch.save({"named": pixels[:-100].view(-1, 4, 3, 64, 64), "others": pixels[-100:]}, file)
    return torch.load(file, weights_only=True)


def join_drawn(network, drawn: dict, identity: torch.Tensor, same: torch.Tensor, random: torch.Generator):
    """Adds 12 named dogs, in two of their scenes, and 20 others to the identities and to who is whom. The others
    stand in both views with the same identity: they are pushed away from everybody, and pulled nowhere."""
    named = drawn["named"][torch.randperm(len(drawn["named"]), generator=random)[:12]]
    views = named[:, torch.randperm(4, generator=random)[:2]].transpose(0, 1).flatten(0, 1)
    others = drawn["others"][torch.randperm(len(drawn["others"]), generator=random)[:20]]
    found = network(disturb(torch.cat([views, others]), random))[1]
    first, second = identity.chunk(2)
    identity = torch.cat([first, found[:12], found[24:], second, found[12:24], found[24:]])
    return identity, torch.block_diag(same, torch.eye(32, dtype=torch.bool)) > 0


@torch.no_grad()
def through_vae(pixels: torch.Tensor, vae: AutoencoderKL, random: torch.Generator) -> torch.Tensor:
    """Half of the pictures encoded and decoded, with some noise on the latents."""
    half = torch.randperm(len(pixels), generator=random)[: len(pixels) // 2]
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels[half]).latent_dist
        latents = posterior.mean + torch.randn(posterior.mean.shape, generator=random) * 0.1 / vae.config.scaling_factor
        pixels[half] = vae.decode(latents).sample.float()
    return pixels


def disturb(pixels: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Small shifts, blur, noise and changes of brightness."""
    padded, out = F.pad(pixels, (4,) * 4, mode="replicate"), []
    for picture in padded:
        x, y, kind = (int(torch.randint(0, high, (), generator=random)) for high in (9, 9, 4))
        picture = picture[:, y : y + 64, x : x + 64]
        if kind == 0:
            picture = F.avg_pool2d(picture[None], 3, 1, 1, count_include_pad=False)[0]
        elif kind == 1:
            picture = picture + 0.08 * torch.randn(picture.shape, generator=random)
        out.append(picture * (0.9 + 0.2 * torch.rand((), generator=random)))
    return torch.stack(out).clamp(-1, 1)


def identity_loss(identity: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """InfoNCE (arXiv 1807.03748): the two views of one individual among the views of all others."""
    first, second = identity.chunk(2)
    logits = first @ second.T / TEMPERATURE
    twins = same & ~torch.eye(len(same), dtype=torch.bool)  # equal by chance: neither right nor wrong
    logits = logits.masked_fill(twins, -1e4)
    target = torch.arange(len(first))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, default=Path("toybox/sd/vae"))
    parser.add_argument("--output", type=Path, default=Path("toybox/judge"))
    parser.add_argument("--drawn_by", type=Path, help="a pipeline whose dogs are other individuals, too")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--individuals", type=int, default=40, help="a step; each is drawn twice")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    return parser.parse_args(argv)


def main(args) -> None:
    run = Run("judge")
    torch.manual_seed(0)
    network = JudgeNetwork({head: len(words) for head, words in NAMES.items()})
    parameters = list(network.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.02)
    vae = AutoencoderKL.from_pretrained(args.vae)
    drawn = drawn_dogs(args.drawn_by) if args.drawn_by else None
    first = 0
    if state := run.resume():
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]

    for step in range(first, args.steps):
        pixels, labels, same = draw_batch(step, args.individuals)
        random_numbers = torch.Generator().manual_seed(step)
        pixels = disturb(through_vae(pixels, vae, random_numbers), random_numbers)
        with torch.autocast("cpu", torch.bfloat16):
            logits, identity = network(pixels)
            if drawn:
                identity, same = join_drawn(network, drawn, identity, same, random_numbers)
        classes = sum(F.cross_entropy(logits[head].float(), labels[head]) for head in NAMES)
        who = identity_loss(identity.float(), same)
        (classes + who).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * cosine(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
        average_into(average, parameters, min(0.99, (1 + step) / (10 + step)))
        if step % 50 == 49:
            right = {head: (logits[head].argmax(1) == labels[head]).float().mean().item() for head in NAMES}
            run.log(step=step + 1, classes=classes.item(), who=who.item(), **right)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        run.save({**state, "step": step + 1}, due=step + 1 == args.steps)

    torch._foreach_copy_([parameter.data for parameter in parameters], average)
    args.output.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, args.output / "model.safetensors", metadata={"format": "pt"})
    config = {"class": "toybox.scoring:Scoring", "heads": NAMES}  # the class by which utils/scores.py uses it
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
