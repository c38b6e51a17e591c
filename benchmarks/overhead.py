"""What a script costs beside the arithmetic: its step over the bare step of the same modules in the same process.

    python benchmarks/overhead.py --profiles tiny mid --methods lora full

The bare step is forward, mean squared error, backward and fused AdamW on ready-made tensors: no data, no noise, no
clipping, no log. Blocks of script steps and of bare steps take turns inside the one training run, so both meet the
same machine; the result is the ratio of neighbouring blocks, of wall time and of the CPU time of this process: the
second stays the same when other programs want the cores too, and says nothing on a GPU.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import models as benchmark_models  # noqa: E402
import results  # noqa: E402

BLOCK = {"tiny": 10, "mid": 2}  # steps of one kind before the other's turn
BLOCKS = {"tiny": 12, "mid": 8}
LIMIT = 1.10  # what we promise on mid


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", nargs="+", choices=list(BLOCK), default=list(BLOCK))
    parser.add_argument("--methods", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--blocks", type=int, help="blocks of each kind (tiny 12, mid 8)")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--options", default="", help="more options for the script, in one string")
    return parser.parse_args(argv)


def main(args):
    found = []
    circumstances = results.circumstances()
    for profile in args.profiles:
        for method in args.methods:
            blocks = args.blocks or BLOCKS[profile]
            found.append(measure(profile, method, blocks, args.batch_size, shlex.split(args.options)))
            print(f"{profile} {method}: {results.show(found[-1]['ratio'])}", flush=True)
    rows = [
        [entry["profile"], entry["method"], f"{entry['learning_millions']:.3f}"]
        + [results.show(entry[name], 4) for name in ("script_s", "bare_s")]
        + [results.show(entry[name]) for name in ("ratio", "cpu_ratio")]
        for entry in found
    ]
    columns = ["profile", "method", "M learning", "script step s", "bare step s", "ratio", "ratio of CPU time"]
    text = f"min / median / max over alternating blocks of one run; batch {args.batch_size}"
    text += f", options {args.options}" if args.options else ""
    text += f". The median ratio on mid is to stay at or under {LIMIT:.2f}.\n\n" + results.table(columns, rows)
    data = {"circumstances": circumstances, "batch_size": args.batch_size, "options": args.options, "runs": found}
    name = "-".join(["overhead", *args.profiles])
    results.write(name, "A training step over the bare step", text, data)


def measure(profile: str, method: str, blocks: int, batch_size: int, more: list) -> dict:
    model = benchmark_models.build(profile, results.WORK)
    photos = benchmark_models.photos(results.WORK / "photos")
    out = results.WORK / "overhead-run"
    shutil.rmtree(out, ignore_errors=True)
    if method == "lora":
        import train_dreambooth_lora as script
    else:
        import train_dreambooth as script
    resolution = benchmark_models.RESOLUTIONS[profile]
    steps = (blocks + 1) * BLOCK[profile]  # the first block warms up
    options = f"""--pretrained_model_name_or_path {model} --instance_data_dir {photos} --output_dir {out}
        --resolution {resolution} --train_batch_size {batch_size} --max_train_steps {steps} --seed 0
        --learning_rate 1e-6 --lr_scheduler constant --lr_warmup_steps 0 --center_crop --checkpointing_steps 100000"""
    args = script.parse_args([*options.split(), "--instance_prompt", "a photo of sks dog", *more])
    turns = Turns(block=BLOCK[profile], batch_size=batch_size, resolution=resolution, precision=args.mixed_precision)
    with turns:
        script.main(args)
    shutil.rmtree(out, ignore_errors=True)  # a full result of mid takes over a gigabyte
    return {
        "profile": profile,
        "method": method,
        "learning_millions": turns.learning / 1e6,
        "block": BLOCK[profile],
        "script_s": results.spread([wall for wall, _ in turns.script]),
        "bare_s": results.spread([wall for wall, _ in turns.bare]),
        "ratio": results.spread([ours[0] / bare[0] for ours, bare in zip(turns.script, turns.bare)]),
        "cpu_ratio": results.spread([ours[1] / bare[1] for ours, bare in zip(turns.script, turns.bare)]),
    }


class Turns:
    """Lets a block of bare steps run after every block of the script's own, and times both.

    It stands between the script and `run.steps`: from one batch asked for to the next is one step of the script,
    data, noise, logging and all.
    """

    def __init__(self, block: int, batch_size: int, resolution: int, precision: str | None):
        self.block, self.batch_size, self.resolution, self.precision = block, batch_size, resolution, precision
        self.script, self.bare = [], []  # (wall s, CPU s) a step, one entry a block
        self.family = self.bare_step = None
        self.learning = 0

    def __enter__(self):
        from utils import models, runtime

        self.replaced = [(models, "family_of", models.family_of), (runtime.Run, "steps", runtime.Run.steps)]
        turns = self

        def family_of(*args, _original=models.family_of, **kwargs):
            turns.family = _original(*args, **kwargs)
            return turns.family

        def steps(run, *args, _original=runtime.Run.steps, **kwargs):
            return turns.alternate(_original(run, *args, **kwargs), run.device)

        models.family_of, runtime.Run.steps = family_of, steps
        return self

    def __exit__(self, *_):
        for place, name, original in self.replaced:
            setattr(place, name, original)

    def alternate(self, steps, device):
        clock, done = Clock(device), 0
        for item in steps:
            yield item
            done += 1
            if done % self.block:
                continue
            ours = clock.lap(self.block)
            self.bare_step = self.bare_step or self.prepare(device)
            clock.lap()
            for _ in range(self.block):
                self.bare_step()
            bare = clock.lap(self.block)
            if done > self.block:  # the first block of each warmed up
                self.script.append(ours)
                self.bare.append(bare)
            clock.lap()

    def prepare(self, device):
        import torch

        unet = self.family.unet
        learns = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.learning = sum(parameter.numel() for parameter in learns)
        # A learning rate of zero costs the same and leaves the script's training as it is.
        optimizer = torch.optim.AdamW(learns, lr=0.0, weight_decay=0.0, fused=True)
        low = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision)
        dtype = low or torch.float32
        side = self.resolution // 8
        config = unet.config
        latents = torch.randn(self.batch_size, config.in_channels, side, side, device=device, dtype=dtype)
        text = torch.randn(self.batch_size, 77, config.cross_attention_dim, device=device, dtype=dtype)
        target = torch.randn(self.batch_size, config.out_channels, side, side, device=device)
        timesteps = torch.full((self.batch_size,), 500, device=device)

        def step():
            with torch.autocast(torch.device(device).type, dtype=low or torch.bfloat16, enabled=low is not None):
                prediction = unet(latents, timesteps, text).sample
            torch.nn.functional.mse_loss(prediction.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


class Clock:
    def __init__(self, device):
        self.device = device
        self.lap()

    def lap(self, steps: int = 1) -> tuple[float, float]:
        """(wall, CPU) seconds a step since the last lap; what a GPU was asked to do is done by then."""
        import torch

        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.times = getattr(self, "times", (0.0, 0.0)), (time.perf_counter(), time.process_time())
        return tuple((after - then) / steps for after, then in zip(self.times, before))


if __name__ == "__main__":
    main(parse_args())
