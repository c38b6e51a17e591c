"""PDM: what one self-attention layer asks about a photo stays what the untouched model asks about it.

Before training each photo is inverted: deterministic DDIM, run backwards under the class prompt, finds for every
timestep the noisy latents from which the untouched model would draw it. The queries of one layer on that way are kept
in a bank on disk. In training each photo is shown once more, cropped at the centre and noised to a timestep of the
bank, and the queries of the network that learns are held against the bank's: https://github.com/Orimalca/PDMBooth.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from utils import errors, images, masks, noise, precomputed, randomness, targets, validation, writing
from utils.pdm.features import Tap, difference, invert, keep_activations, timesteps_of
from utils.pdm.files import Writer, is_damaged, name_of, read_identity

FORMAT = 1
FOLDER, MASKS = "pdm_features", "pdm_masks"  # in the output folder
AT_ONCE = 8 * 512**2  # pixels inverted at once


class Off:
    """Without the PDM loss: the plain forward pass, and nobody's difference."""

    def predict(self, family, noisy, condition, batch):
        return family.predict(noisy.inputs, noisy.timesteps, condition), noisy.weight.new_zeros(0)

    def describe(self) -> dict:
        return {}

    def close(self) -> None:
        pass


def prepare(
    run,
    family,
    dataset,  # knows size and crop
    photos: Sequence,  # its instance examples, with their masks
    concepts: Sequence,  # whose class prompts the photos are inverted under
    *,
    use_pdm_loss: bool = True,
    pdm_loss_weight: float = 0.1,
    pdm_layer: str | None = None,
    pdm_inversion_steps: int = 50,
    pdm_targets: str = "inversion",  # or "reconstruction": on the way there, or on the way back
    mask_pdm: bool = False,
    unmasked_weight: float = 0.0,
    save_pdm_masks: bool = False,
    features_data_dir: str | None = None,
    save_pdm_fs: bool = False,
    quantize_base: str | None = None,  # a base in 4 bits asks otherwise
    train_batch_size: int = 1,  # photos in a batch; what comes after them are class images
) -> "Bank | Off":
    """Fills the bank with what is missing. Before anything learned, was released or loaded from a checkpoint."""
    if not use_pdm_loss:
        return Off()
    if family.more_channels:
        errors.refuse("--use_pdm_loss: an in-painting model sees another part of each photo every time; leave it out")
    if noise.is_edm(family.scheduler):
        errors.refuse(
            "--use_pdm_loss: DDIM inversion is made for DDPM noise, and this model has EDM noise; leave it out"
        )
    layer, problem = targets.self_attention([name for name, _ in family.unet.named_modules()], pdm_layer)
    if problem:
        errors.refuse(problem)
    identity = {
        "format": FORMAT,
        **precomputed.networks(family),
        "quantized": quantize_base,
        "prediction_type": family.scheduler.config.prediction_type,
        "clip_skip": family.clip_skip,
        "zero_snr": family.rescale_betas_zero_snr,
        "layer": layer,
        "steps": pdm_inversion_steps,
        "targets": pdm_targets,
        "size": dataset.size,
        "interpolation": dataset.interpolation,
        "alpha_background": dataset.alpha_background,
        "precision": [str(dtype).removeprefix("torch.") for dtype in (run.dtype, family.unet.conv_in.weight.dtype)],
    }
    shown = {example.key: example for example in photos}  # the same photo twice has the same queries
    prompts = {example.key: concepts[example.concept].class_prompt for example in photos}
    folder = Path(features_data_dir) if features_data_dir else Path(run.output_dir) / FOLDER
    bank = Bank(family, folder, layer, identity, prompts, pdm_inversion_steps, train_batch_size, run.seed)
    bank.unmasked_weight, bank.temporary = unmasked_weight, not (features_data_dir or save_pdm_fs)
    bank.told, bank.weight = [unmasked_weight if mask_pdm else None], pdm_loss_weight
    bank.look(shown, dataset, family, run.device)
    if mask_pdm:
        bank.masks = {key: dataset.centred(example)["mask"] for key, example in shown.items()}
        black = [example for key, example in shown.items() if bank.masks[key].max() < masks.BLACK]
        if black:
            names = (images.name_of(example.mask.source) for example in black)
            remedy = "crop the photo around its subject, or leave --mask_pdm out"
            errors.refuse(
                [f"--mask_pdm: the mask '{name}' lies outside of the centre crop; {remedy}" for name in names],
                errors.DATA,
                once=True,
            )
        bank.told += [example.mask.key if example.mask else None for example in photos]
    if save_pdm_masks and mask_pdm and run.is_main:
        bank.save_masks(Path(run.output_dir) / MASKS, shown)
    missing = bank.missing(refuse_stale=bool(features_data_dir) and not save_pdm_fs)
    run.barrier()  # every process has looked before one of them writes
    if missing:
        with run.phase("inverting photos"):
            bank.fill(run, family, missing)
            run.barrier()
    bank.open(wait=run.interrupted)
    if run.compiles:
        keep_activations(family.unet, layer)
    return bank


class Bank:
    """The untouched model's queries, one file a photo, memory-mapped: a row is read when it is asked for."""

    def __init__(self, family, folder: Path, layer: str, identity: dict, prompts: dict, steps: int, count: int, seed):
        self.folder, self.identity, self.prompts, self.count, self.seed = folder, identity, prompts, count, seed
        self.timesteps = timesteps_of(steps, family.scheduler.config.num_train_timesteps)
        self.back = identity["targets"] == "reconstruction"
        self.alphas_cumprod = family.scheduler.alphas_cumprod
        self.tap = Tap(family.unet, f"{layer}.to_q")
        self.masks: dict[str, torch.Tensor] = {}
        self.records: dict[str, dict] = {}  # key => sizes, crop and posterior of the photo's centre
        self.files: dict = {}  # key => its open file
        self.unmasked_weight, self.temporary, self.told, self.weight = 0.0, False, [], 0.0

    def identity_of(self, key: str) -> dict:
        return self.identity | {"photo": key, "prompt": self.prompts[key]}

    def path(self, key: str) -> Path:
        return self.folder / name_of(self.identity_of(key))

    def describe(self) -> dict:
        """What a resume compares."""
        rows = [self.identity_of(key) for key in sorted(self.prompts)]
        return {"pdm": [self.identity["layer"], *self.told, precomputed.digest(rows)], "pdm_loss_weight": self.weight}

    def look(self, shown: dict, dataset, family, device) -> None:
        """The centres of the photos, through the VAE once."""
        for key, example in shown.items():
            record = dataset.centred(example)
            mean, std = (part[0].cpu() for part in family.posterior(record["pixels"][None].to(device)))
            self.records[key] = {name: record[name] for name in ("original_size", "crop_top_left")}
            self.records[key] |= {"latent_mean": mean, "latent_std": std}

    def save_masks(self, folder: Path, shown: dict) -> None:
        from PIL import Image

        with writing.unless_it_fails(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for key, mask in self.masks.items():
                stem = Path(str(shown[key].source)).stem.encode()[:200].decode(errors="ignore")  # names have 255 bytes
                with writing.aside(folder / f"{stem}-{key}.png") as staged:
                    Image.fromarray(mask[0].numpy()).save(staged)

    # Filling

    def missing(self, refuse_stale: bool) -> list[str]:
        """Photos whose file is not there. A folder with files of something else is refused."""
        if not self.folder.is_dir():
            return list(self.prompts)
        there = {}
        for path in sorted(self.folder.iterdir()):
            if not path.name.startswith("."):
                there[path] = read_identity(path)
                if there[path] is None or path.name != name_of(there[path]):
                    errors.refuse(
                        f"--features_data_dir: '{path}' is damaged, or no target of this script: remove it, or name"
                        " a folder of its own"
                    )
        missing = [key for key in self.prompts if self.path(key) not in there]
        damaged = [key for key in self.prompts if self.path(key) in there and is_damaged(self.path(key))]
        if damaged and refuse_stale:
            names = ", ".join(f"'{self.path(key)}'" for key in damaged[:3])
            errors.refuse(
                f"--features_data_dir: {len(damaged)} targets are damaged ({names}): add --save_pdm_fs to compute them"
                " again",
                errors.DATA,
            )
        for key in damaged:
            errors.warn(f"'{self.path(key)}' is damaged: computed again")
        missing += damaged
        if missing and there and refuse_stale:
            wanted = self.identity_of(missing[0])
            near = min(there.values(), key=lambda other: sum(other.get(name) != wanted[name] for name in wanted))
            rows = [
                f"{name} is {near.get(name)}, not {wanted[name]}" for name in wanted if near.get(name) != wanted[name]
            ]
            errors.refuse(
                f"--features_data_dir '{self.folder}' lacks {len(missing)} of {len(self.prompts)} photos' targets (the"
                f" nearest file's {'; '.join(rows)}): add --save_pdm_fs to compute and keep them there too"
            )
        return missing

    def fill(self, run, family, missing: Sequence[str]) -> None:
        """This process's share, all photos of a batch in one pass."""
        self.folder.mkdir(parents=True, exist_ok=True)
        share = missing[run.rank :: run.world]
        size = max(1, min(16, AT_ONCE // self.identity["size"] ** 2))
        steps = len(self.timesteps)
        evaluations = 2 * steps if self.back else steps + 1
        run.say(f"inverting {len(missing)} photos in {evaluations} evaluations for the PDM loss")
        for start in range(0, len(share), size):
            if not run.interrupted:
                self._fill(run, family, share[start : start + size])

    @torch.no_grad()
    def _fill(self, run, family, keys: Sequence[str]) -> None:
        with (
            validation.undisturbed(family.pipeline()),
            torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32),
        ):
            batch = self._batch(keys, run.device) | {"captions": [self.prompts[key] for key in keys]}
            condition, files = family.condition(batch), []

            def predict(latents, t):
                return family.predict(latents, torch.full((len(keys),), t, device=run.device), condition)

            way = invert(
                predict,
                family.latents(batch, None),
                self.alphas_cumprod,
                self.timesteps,
                self.identity["prediction_type"],
                back=self.back,
            )
            try:
                with self.tap:
                    for number, _ in way:
                        if run.interrupted:
                            return
                        if number is not None:
                            self._keep(number, self.tap.taken, keys, files)
                for file in files:
                    file.finish()
            except OSError as problem:
                reason = problem.strerror or problem
                errors.refuse(
                    f"'{self.folder}': PDM targets cannot be written ({reason}); free some space, lower"
                    " --pdm_inversion_steps, or name another --features_data_dir",
                    errors.FAILED,
                )
            finally:
                for file in files:
                    file.drop()

    def _keep(self, number: int, queries: torch.Tensor, keys: Sequence[str], files: list[Writer]) -> None:
        if not files:
            shape = (len(self.timesteps), *queries.shape[1:])
            self._check_room(len(keys), shape)
            for key in keys:  # one by one: those that are there are removed if there is no room for the next
                files.append(Writer(self.path(key), self.identity_of(key), shape))
        if not torch.isfinite(queries).all() or queries.abs().max() > torch.finfo(torch.float16).max:
            errors.refuse("the PDM targets are no numbers that fit into fp16", errors.FAILED)
        for file, row in zip(files, queries.to("cpu", torch.float16)):
            file.rows[number] = row.numpy()

    def _check_room(self, count: int, shape: tuple) -> None:
        needed, free = 2 * count * shape[0] * shape[1] * shape[2], shutil.disk_usage(self.folder).free
        if needed > free:
            errors.refuse(
                f"'{self.folder}': the PDM targets of {count} photos need {needed / 2**20:.0f} MiB and"
                f" {free / 2**20:.0f} are free; lower --pdm_inversion_steps, or name another --features_data_dir",
                errors.FAILED,
            )

    # Reading

    def open(self, wait: bool = False) -> None:
        from safetensors import safe_open

        for key in self.prompts:
            if self.path(key).is_file():
                self.files[key] = safe_open(str(self.path(key)), framework="pt").get_slice("queries")
            elif not wait:  # after a signal the bank stays incomplete, and the run ends before it is asked
                errors.refuse(f"'{self.path(key)}' is missing: all processes must see the same folder", errors.FAILED)

    def _batch(self, keys: Sequence[str], device) -> dict:
        records = [self.records[key] for key in keys]
        batch = {name: torch.stack([record[name] for record in records]) for name in ("latent_mean", "latent_std")}
        batch |= {
            name: torch.tensor([record[name] for record in records]) for name in ("original_size", "crop_top_left")
        }
        return {name: rows.to(device, non_blocking=True) for name, rows in batch.items()}

    def predict(self, family, noisy, condition: dict, batch: dict):
        """One forward pass for the batch and, after it, its photos once more => (prediction of the batch, difference
        of the photos' queries from those of the bank (photos,))."""
        device, keys = noisy.inputs.device, batch["keys"][: self.count]
        again, seed = self._batch(keys, device), randomness.seed_of(self.seed, "pdm")  # draws of its own
        chosen = randomness.Draws(seed, batch["ids"][: self.count]).integers("bank", len(self.timesteps)).tolist()
        draws = randomness.Draws(seed, batch["ids"][: self.count], device)
        timesteps = torch.tensor([self.timesteps[number] for number in chosen], device=device)
        inputs = self.noised(family.latents(again, draws), draws, timesteps)
        # The instance prompt is heard once; where a picture was cut is told only to networks that listen to it.
        more = {name: rows[: len(keys)] for name, rows in condition.items()}
        if "time_ids" in more:
            more["time_ids"] = family.time_ids(again)
        both = {name: torch.cat([rows, more[name]]) for name, rows in condition.items()}
        with self.tap:
            inputs = torch.cat([noisy.inputs, inputs.to(noisy.inputs.dtype)])
            prediction = family.predict(inputs, torch.cat([noisy.timesteps, timesteps]), both)
        count = len(noisy.inputs)
        queries = self.tap.taken[count:]  # (photos, tokens, c)
        wanted = torch.stack([self.files[key][number : number + 1][0] for key, number in zip(keys, chosen)])
        mask = torch.stack([self.masks[key] for key in keys]).to(device) if self.masks else None
        told = difference(queries, wanted.to(device, non_blocking=True), mask, self.unmasked_weight)
        self.tap.taken = None
        return prediction[:count], told

    def noised(self, latents: torch.Tensor, draws, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = √ᾱ_t x0 + √(1-ᾱ_t) ε, plain noise whatever the other losses have: (b, c, h, w)."""
        alphas = self.alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt() * latents + (1 - alphas).sqrt() * draws.normal("noise", latents.shape[1:])

    def close(self) -> None:
        """After the last step: targets that nobody asked to keep are removed, and nothing else."""
        self.files.clear()
        if self.temporary:
            for key in self.prompts:
                self.path(key).unlink(missing_ok=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
