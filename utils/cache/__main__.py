"""Latents and text embeddings of a captioned data set, computed once for many runs.

    python -m utils.cache --pretrained_model_name_or_path MODEL --train_data_dir pictures --resolution 512 \\
        --center_crop --num_shards 4 --shard_index 0 --output_dir /shared/latents

Start it once for each shard, on as many machines as there are; what is already there is not computed again, so that a
shard that was killed is simply started again. Whoever trains gives --precomputed_dir /shared/latents.
"""

import hashlib
import os
import time
from pathlib import Path

from utils import arguments, errors, precomputed
from utils.preflight import model_folder


def parse_args(argv=None):
    parser = arguments.new_parser(__doc__)
    parser.prog = "python -m utils.cache"
    arguments.add_model(parser)
    arguments.add_precompute(parser)
    return arguments.parse(parser, argv)


def main(args) -> None:
    complaints = [] if args.shard_index < args.num_shards else ["--shard_index counts from 0 to --num_shards - 1"]
    model, problem = model_folder.find(args)
    complaints += [*([problem] if problem else []), *model_folder.elsewhere(args)]
    if args.train_data_dir and not Path(args.train_data_dir).is_dir():
        complaints.append(f"--train_data_dir '{args.train_data_dir}' is not a folder (looked in {Path.cwd()})")
    if complaints:
        errors.refuse(complaints)
    args.revision = model_folder.commit(model) or args.revision

    import torch
    from diffusers import UNet2DConditionModel

    from utils import cache, datasets, images, models

    call = arguments.caller(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    family = call(models.family_of, args.pretrained_model_name_or_path)
    family.load(
        device,
        kinds[args.mixed_precision],
        tokenizer=args.tokenizer_name,
        vae=args.pretrained_vae_model_name_or_path,
        parts=[*(family.encoders if args.texts else []), "vae"],
    )
    with torch.device("meta"):  # its configuration tells which sizes the model wants; its weights are not needed
        settings = UNet2DConditionModel.load_config(family.path, subfolder="unet", revision=family.revision)
        family.unet = UNet2DConditionModel.from_config(settings)

    share = Share(args.shard_index, args.num_shards, args.train_data_dir or args.dataset_name)
    how = {
        "size": args.resolution or family.resolution_default,
        "side_factor": family.side_factor,
        "interpolation": args.image_interpolation_mode,
    }
    try:
        pictures = call(datasets.captioned, seed=0, share=share)
        whole = call(datasets.DreamBooth, pictures, **how)
        cache.refuse_varying(family, whole, "python -m utils.cache")
        in_precision = str(kinds[args.mixed_precision]).removeprefix("torch.")
        used = {"precision": in_precision, "dtype": args.dtype}
        identity = precomputed.identity(precomputed.encoders(family), **cache.facts(whole), **used)
        work = Work(args.output_dir, identity, args.dry_run)
        for block in share.of(pictures):
            work.pictures(cache, family, call(datasets.DreamBooth, block, **how), device)
        for texts in share.captions() if args.texts else ():
            work.texts(family, texts)
    except images.BadImage as bad:
        errors.refuse(str(bad), errors.DATA)
    did = f"{work.missing} blocks would be written" if args.dry_run else f"{work.written} blocks written"
    shard = f"shard {args.shard_index} of {args.num_shards}"
    print(f"{shard}: {len(pictures)} pictures, {did}, {work.there} were there", flush=True)


class Work:
    """Blocks on their way into the folder; those that are there already are left."""

    def __init__(self, folder: str, identity: dict, dry_run: bool = False):
        self.folder, self.identity, self.dry_run = Path(folder), identity, dry_run
        self.written = self.there = self.missing = 0
        self.began = time.monotonic()
        if not dry_run:
            precomputed.write_manifest(self.folder, identity)

    def pictures(self, cache, family, dataset, device) -> None:
        import torch

        views = sorted(cache.views(dataset), key=lambda view: (view[2], view[0].key, view[1]))
        for shape in dict.fromkeys(shape for *_, shape in views):
            todo = [view for view in views if view[2] == shape]
            rows = [[example.key, flip, list(shape)] for example, flip, shape in todo]
            if self._missing("latents", rows):
                chunks = cache.batches([shape] * len(todo), 0, 1)
                _, means, stds = zip(*cache.encode(family, dataset, todo, chunks, device))
                self._write("latents", rows, {"mean": torch.cat(means), "std": torch.cat(stds)})

    def texts(self, family, texts: list[str], batch_size: int = 16) -> None:
        import torch

        if self._missing("texts", texts):
            with torch.no_grad():
                parts = [family.encode_prompts(texts[k : k + batch_size]) for k in range(0, len(texts), batch_size)]
            tensors = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
            self._write("texts", texts, tensors)

    def _missing(self, kind: str, rows: list) -> bool:
        there = precomputed.is_whole(self.folder / precomputed.block_name(kind, self.identity, rows))
        self.there += there
        self.missing += not there
        return not there and not self.dry_run

    def _write(self, kind: str, rows: list, tensors: dict) -> None:
        import torch

        dtype = getattr(torch, self.identity["dtype"])
        tensors = {name: value.to(dtype) for name, value in tensors.items()}
        precomputed.write_block(self.folder, kind, self.identity, rows, tensors)
        self.written += 1
        print(f"{kind}: {len(rows)} rows after {time.monotonic() - self.began:.0f} s", flush=True)


class Share:
    """Which pictures and captions belong to a shard. By their names, so that every machine cuts the set alike without
    opening a picture of another's; in blocks that a new picture hardly moves, whatever the number of shards."""

    def __init__(self, index: int, count: int, folder: str):
        self.index, self.count, self.folder = index, count, folder
        self.blocks, self.texts = 1, []  # in all; every caption of the set

    def __call__(self, names, texts) -> list[int]:
        self.blocks = self._enough(len(names))
        several = [[text] if isinstance(text, str) else text or () for text in texts]
        self.texts = sorted({"", *(one for some in several for one in some if isinstance(one, str))})
        return [place for place, name in enumerate(names) if self._block(name) % self.count == self.index]

    @staticmethod
    def _enough(count: int) -> int:
        """A power of two, so that blocks stay as they are while a set grows, until all are halved."""
        return 2 ** max(0, (-(-count // precomputed.BLOCK) - 1).bit_length())

    def _block(self, name: str) -> int:
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % self.blocks

    def of(self, pictures) -> list[list]:
        found: dict[int, list] = {}
        for one in pictures:
            named = isinstance(one.source, str)
            name = Path(os.path.relpath(one.source, self.folder)).as_posix() if named else f"row {one.source.index}"
            found.setdefault(self._block(name), []).append(one)
        return [found[number] for number in sorted(found)]

    def captions(self) -> list[list[str]]:
        blocks = self._enough(len(self.texts))
        found: dict[int, list] = {}
        for text in self.texts:
            number = int(precomputed.digest(text), 16) % blocks
            if number % self.count == self.index:
                found.setdefault(number, []).append(text)
        return [found[number] for number in sorted(found)]


if __name__ == "__main__":
    main(parse_args())
