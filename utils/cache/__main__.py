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

from utils import arguments, captions, errors, images, interrupts, precomputed, preflight
from utils.preflight import model_folder, photos


def parse_args(argv=None):
    parser = arguments.new_parser(__doc__)
    parser.prog = "python -m utils.cache"
    arguments.add_model(parser)
    arguments.add_precompute(parser)
    return arguments.parse(parser, argv)


@interrupts.answered("stopped; the same command resumes and keeps the blocks that are written")
def main(args) -> None:
    check(args)

    import torch

    from utils.runtime import startup

    startup.quiet()
    from diffusers import UNet2DConditionModel

    from utils import cache, datasets, models

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
        left_out = tell_left_out(share, pictures)
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
    lost = f", {left_out} pictures left out" if left_out else ""
    print(f"{shard}: {len(pictures)} pictures, {did}, {work.there} were there{lost}", flush=True)


def check(args) -> None:
    """As before a training: what can be told within moments is told before anything is loaded, all at once."""
    problems = preflight.Problems()
    if args.shard_index >= args.num_shards:
        problems.options.append("--shard_index counts from 0 to --num_shards - 1")
    model, problem = model_folder.find(args)
    problems.options += [*([problem] if problem else []), *model_folder.elsewhere(args)]
    problems.options += _taken(args)
    if args.train_data_dir and not Path(args.train_data_dir).is_dir():
        problems.options.append(f"--train_data_dir '{args.train_data_dir}' is not a folder (looked in {Path.cwd()})")
    elif args.train_data_dir:
        pictures = images.list_images(args.train_data_dir)
        if not pictures:
            problems.options.append(f"--train_data_dir '{args.train_data_dir}' holds no pictures; put them there")
        problems.data += captions.read(args.train_data_dir, pictures, column=args.caption_column)[1]
    problems.refuse_if_any()
    args.revision = model_folder.commit(model) or args.revision
    if not args.dry_run:
        preflight.create(args.output_dir)


def _taken(args) -> list[str]:
    """Why --output_dir is not for latents: pictures, a run, a model, or other latents are there."""
    folder, data = Path(args.output_dir), Path(args.train_data_dir or os.devnull).resolve()
    output, named = folder.resolve(), f"--output_dir {args.output_dir}"
    if output.is_relative_to(data) or data.is_relative_to(output):
        how = "is" if output == data else "lies inside" if output.is_relative_to(data) else "lies around"
        return [f"{named} {how} --train_data_dir {args.train_data_dir}; name a folder beside it"]
    runs = (*preflight.STARTED, *preflight.FINISHED)
    left = [name for name in runs if (folder / name).is_file()] if not (folder / precomputed.MANIFEST).exists() else []
    if left:
        return [f"{named} holds a run or a model ({', '.join(left)}); name a folder of its own for the latents"]
    wanted = {"resolution": args.resolution, "interpolation": args.image_interpolation_mode, "dtype": args.dtype}
    wanted |= {"mirrored": args.random_flip, "alpha_background": args.alpha_background}
    return precomputed.strangers(folder, {name: value for name, value in wanted.items() if value is not None})


def tell_left_out(share: "Share", pictures) -> int:
    """How many of this shard's pictures cannot be read; named as a training names them."""
    used = {share.name(one) for one in pictures}
    lost = [name for name in share.names if name not in used]
    said = []
    for name in lost[: photos.SHOWN]:
        path = Path(share.folder, name)  # a row of a table is no file
        (report,) = images.inspect([path]) if path.is_file() else [images.Report(name, problem="cannot be read")]
        said.append(f"'{report.path}' {report.problem}")
    if len(lost) > images.MOST_BAD * len(share.names):
        many = f"{len(lost)} of {len(share.names)} pictures cannot be used: too many to leave out"
        errors.refuse([*said, many], errors.DATA)
    for one in said:
        errors.warn(f"left out: {one}")
    if len(lost) > len(said):
        errors.warn(f"... and {len(lost) - len(said)} more pictures left out")
    return len(lost)


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
        self.names: list[str] = []  # of this shard's pictures

    def __call__(self, names, texts) -> list[int]:
        self.blocks = self._enough(len(names))
        several = [[text] if isinstance(text, str) else text or () for text in texts]
        self.texts = sorted({"", *(one for some in several for one in some if isinstance(one, str))})
        places = [place for place, name in enumerate(names) if self._block(name) % self.count == self.index]
        self.names = [names[place] for place in places]
        return places

    @staticmethod
    def _enough(count: int) -> int:
        """A power of two, so that blocks stay as they are while a set grows, until all are halved."""
        return 2 ** max(0, (-(-count // precomputed.BLOCK) - 1).bit_length())

    def _block(self, name: str) -> int:
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % self.blocks

    def name(self, one) -> str:
        named = isinstance(one.source, str)
        return Path(os.path.relpath(one.source, self.folder)).as_posix() if named else f"row {one.source.index}"

    def of(self, pictures) -> list[list]:
        found: dict[int, list] = {}
        for one in pictures:
            found.setdefault(self._block(self.name(one)), []).append(one)
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
