"""Do two versions of the suite do the same? For changes of form that must not change a number.

    git worktree add ../old COMMIT
    python tests/same.py ../old . [--only NAME ...] [--keep]

Runs the commands of JOBS in both trees, on the same tiny models and photos and into the same paths, and compares exit
codes, file trees, metrics, every tensor and picture, the identity in manifests and training_config.yaml. A slow tool,
not part of `make test`: about 40 commands, each in both trees. Exit code 1 if anything differs.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()
SUBJECT = "--instance_data_dir {photos} --instance_prompt 'a photo of sks dog'"
PRIOR = "--with_prior_preservation --class_prompt 'a dog' --class_data_dir {classes} --num_class_images 4"
CAPTIONED = "--train_data_dir {captioned} --resolution 64"
LORA, FULL = "train_dreambooth_lora.py sd1 " + SUBJECT, "train_dreambooth.py sd1 " + SUBJECT
XL, T2I, T2IL = (
    "train_dreambooth_lora_sdxl.py sdxl " + SUBJECT,
    "train_text_to_image.py sd1 ",
    "train_text_to_image_lora.py sd1 ",
)
PDM = "sd1 --inst_data_dir {photos} --inst_prompt 'a photo of sks dog' --cls_prompt 'a dog' --resolution 64"
PDM += " --use_pdm_loss --pdm_inversion_steps 8"
TEXT = " --train_text_encoder --text_encoder_lr 1e-3"
IMAGES = (
    " --validation_prompt 'sks dog' --validation_steps 2 --num_validation_images 1 --validation_num_inference_steps 2"
)

# Name -> its commands, one after the other, all with --output_dir {out}: a program, a model, options.
JOBS = {
    "lora": [LORA + IMAGES],
    "lora-prior": [f"{LORA} {PRIOR} --snr_gamma 5 --noise_offset 0.1"],
    "lora-text": [LORA + TEXT + " --gradient_accumulation_steps 2 --gradient_checkpointing"],
    "lora-resume": [LORA + " --max_train_steps 2 --checkpointing_steps 1", LORA + " --resume_from_checkpoint latest"],
    "lora-ema": [LORA + " --use_ema --checkpointing_steps 2" + IMAGES],
    "lora-posthoc": [LORA + " --use_ema --posthoc_ema --ema_snapshot_steps 1"],
    "lora-rslora": [LORA + " --use_rslora --lora_alpha 2 --loraplus_lr_ratio 4 --lora_conv_rank 2"],
    "lora-tokens": [LORA + " --train_text_encoder_ti --token_abstraction sks --text_encoder_lr 0.01"],
    "lora-int8": [LORA + " --quantize_base int8"],
    "lora-crops": [LORA + " --random_flip --caption_dropout 0.5 --cache_latents off --resolution 64 --repeats 2"],
    "lora-buckets": [LORA + " --resolution_buckets --resolution 64 --train_batch_size 2"],
    "lora-concepts": ["train_dreambooth_lora.py sd1 --concepts_list {concepts}"],
    "lora-huber": [LORA + " --loss_type huber --huber_schedule exponential --multires_noise_iterations 3"],
    "lora-optimizers": [LORA + " --optimizer adafactor --lr_scheduler cosine --lr_warmup_steps 1"],
    "lora-bf16": [LORA + " --mixed_precision bf16"],
    "lora-inpaint": [f"train_dreambooth_lora.py inpaint {SUBJECT} --resolution 64"],
    "lora-v": [f"train_dreambooth_lora.py sd2 {SUBJECT} --rescale_betas_zero_snr --debiased_estimation" + IMAGES],
    "dora": [LORA + " --use_dora --adam_weight_decay 0.1"],
    "loha": [LORA + " --adapter loha" + TEXT],
    "lokr": [LORA + " --adapter lokr --lokr_factor 4"],
    "mask": [LORA + " --masks_dir {masks} --unmasked_weight 0.1 --center_crop"],
    "full": [FULL + IMAGES],
    "full-text": [f"{FULL} {PRIOR}{TEXT} --use_ema --checkpointing_steps 2"],
    "full-fused": [FULL + " --fused_backward --max_grad_norm 0 --train_weights_in bf16"],
    "full-resume": [FULL + " --max_train_steps 2 --checkpointing_steps 2", FULL + " --resume_from_checkpoint latest"],
    "xl": [XL + IMAGES],
    "xl-prior-text": [f"{XL} {PRIOR}{TEXT} --random_flip"],
    "xl-edm": [XL + " --do_edm_style_training --loss_type l1"],
    "xl-blora": [XL + " --lora_unet_blocks mid_block.attentions.0 --output_kohya_format"],
    "style": [T2I + CAPTIONED + " --use_ema --ema_power 0.7 --validation_split 0.3" + IMAGES],
    "style-dream": [T2I + CAPTIONED + " --dream_training --input_perturbation 0.1"],
    "style-lora": [T2IL + CAPTIONED + " --timestep_bias_strategy later --timestep_bias_multiplier 2"],
    "style-cache": [
        "python -m utils.cache sd1 --train_data_dir {captioned} --resolution 64 --center_crop",
        T2IL + CAPTIONED + " --center_crop --precomputed_dir {run}/style-cache --output_dir {run}/style-cached",
    ],
    "pdm": [f"train_pdmbooth.py {PDM} --use_inst_loss"],
    "pdm-lora": [f"train_pdmbooth_lora.py {PDM} --use_prior_loss --cls_data_dir {{classes}} --num_cls_imgs 4"],
    "pdm-masks": [f"train_pdmbooth_lora.py {PDM} --mask_pdm --mask_dm --masks_dir {{masks}} --test_prompts sks"],
    "two": ["two:" + LORA + TEXT + " --gradient_accumulation_steps 2"],
    "two-full": ["two:" + FULL + " --use_ema --checkpointing_steps 2"],
    "infer": ["infer.py - --lora {run}/lora --prompt 'sks dog' --num_images 2 --num_inference_steps 2 --seed 1"],
    "infer-full": [
        "infer.py - --pretrained_model_name_or_path {run}/full --prompt dog --num_inference_steps 2 --seed 1"
    ],
    "infer-checkpoint": [
        "infer.py - --checkpoint {run}/full-text/checkpoint-2 --prompt x --num_inference_steps 2 --seed 1"
    ],
    "merge": ["python -m utils.adapters - merge {models}/sd1 {run}/lora-text:0.5"],
    "average": ["python -m utils.ema - {run}/lora-posthoc --sigma_rel 0.08"],
    "refused": [LORA + " --rank 0", LORA + " --snr_gama 5", "train_dreambooth_lora.py sd1 --instance_prompt x"],
    "plan": [LORA + " --dry_run"],
}
TRAINING = " --max_train_steps 3 --seed 3 --train_batch_size 1 --learning_rate 1e-3 --report_to none"
PER_RUN = re.compile(r"(^|/)(\.run\.lock|timings\.json|report\.html|README\.md)$")  # hold times; only their names count
DATED = re.compile(r"modelspec\.date|sshs_|ss_session|ss_training_(started|finished)")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", nargs="+", default=list(JOBS), choices=list(JOBS), metavar="NAME")
    parser.add_argument("--keep", action="store_true", help="keep what the runs left, and say where")
    args = parser.parse_args(argv)
    work = Path(tempfile.mkdtemp(prefix="same-"))
    prepare(work)
    for side in ("old", "new"):
        tree = getattr(args, side).resolve()
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, HERE, "--worker", work, *args.only], cwd=tree, env=environment, check=True)
        (work / "run").rename(work / side)
    differences = {name: list(differing(work, name)) for name in ["exit codes", *sorted(ran(work))]}
    for name, found in differences.items():
        print(f"{'same' if not found else 'DIFFERS':8} {name}")
        for line in found[:10]:
            print(f"         {line}")
    if args.keep:
        print(f"kept: {work}")
    else:
        shutil.rmtree(work)
    return int(any(differences.values()))


# --- Running -----------------------------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Models and photos, made once by this tree."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    import tiny

    for name, pipeline in (
        ("sd1", tiny.stable_diffusion()),
        ("sd2", tiny.stable_diffusion("v_prediction", seed=1)),
        ("sdxl", tiny.stable_diffusion_xl()),
        ("inpaint", tiny.inpainting(tiny.stable_diffusion())),
    ):
        tiny.save(pipeline, work / "models" / name)
    for name, seed in (("photos", 0), ("captioned", 5), ("classes", 7)):
        tiny.photos(work / name, 4, seed=seed)
    for photo in (work / "captioned").glob("*.png"):
        photo.with_suffix(".txt").write_text(f"a photo of {photo.stem}")
    (work / "masks").mkdir()
    from PIL import Image

    for photo in (work / "photos").glob("*.png"):
        mask = Image.new("L", Image.open(photo).size)
        mask.paste(255, (20, 20, 60, 60))
        mask.save(work / "masks" / photo.name)
    concept = {"instance_prompt": "a photo of sks dog", "instance_data_dir": str(work / "photos")}
    other = {"instance_prompt": "a photo of zwx cat", "instance_data_dir": str(work / "captioned")}
    (work / "concepts.json").write_text(json.dumps([concept, other]))


def worker(work: Path, names: list[str]) -> None:
    """All jobs in one process, in the tree that is the current folder: most of a tiny run would be imports."""
    import runpy
    import traceback

    sys.path.insert(0, os.getcwd())
    run = work / "run"
    run.mkdir()
    codes = {}
    for name in names:
        for number, line in enumerate(JOBS[name]):
            two = line.startswith("two:")
            program, words = command(line.removeprefix("two:"), work, run / name)
            print(f"{name}: {program}", flush=True)
            log = open(run / f"{name}-{number}.log", "w")  # noqa: SIM115 - handed to a process
            if two:
                launcher = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc_per_node=2",
                    program,
                ]
                environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
                code = subprocess.run([*launcher, *words], env=environment, stdout=log, stderr=log).returncode
            else:
                code, sys.argv, kept = 0, [program, *words], (sys.stdout, sys.stderr)
                sys.stdout = sys.stderr = log
                try:
                    if program.endswith(".py"):
                        runpy.run_path(program, run_name="__main__")
                    else:
                        runpy.run_module(program, run_name="__main__", alter_sys=True)
                except SystemExit as left:
                    code = left.code or 0
                except BaseException:
                    traceback.print_exc()
                    code = "traceback"
                finally:
                    sys.stdout, sys.stderr = kept
            log.close()
            codes[f"{name}-{number}"] = code
    (run / "codes.json").write_text(json.dumps(codes))


def command(line: str, work: Path, out: Path) -> tuple[str, list[str]]:
    places = {name: work / name for name in ("photos", "captioned", "classes", "masks", "models", "run")}
    program, model, *words = shlex.split(
        line.removeprefix("python -m ").format(**places, concepts=work / "concepts.json")
    )
    if program.startswith("train_"):
        given = " ".join(words)
        defaults = shlex.split(TRAINING)
        words += [
            word for k in range(0, len(defaults), 2) if f"{defaults[k]} " not in given for word in defaults[k : k + 2]
        ]
    if model != "-":
        words = ["--pretrained_model_name_or_path", str(work / "models" / model), *words]
    return program, [*words, *([] if "--output_dir" in words else ["--output_dir", str(out)])]


# --- Comparing ---------------------------------------------------------------------------------------------------


def ran(work: Path) -> set[str]:
    return {path.name for side in ("old", "new") for path in (work / side).iterdir() if path.is_dir()}


def differing(work: Path, name: str):
    if name == "exit codes":
        old, new = (json.loads((work / side / "codes.json").read_text()) for side in ("old", "new"))
        yield from (f"{job}: {old.get(job)} and {new.get(job)}" for job in old if old[job] != new.get(job))
        return
    old, new = work / "old" / name, work / "new" / name
    trees = [{path.relative_to(side).as_posix() for path in side.rglob("*") if path.is_file()} for side in (old, new)]
    yield from (f"only in old: {file}" for file in sorted(trees[0] - trees[1]))
    yield from (f"only in new: {file}" for file in sorted(trees[1] - trees[0]))
    for file in sorted(trees[0] & trees[1]):
        if not PER_RUN.search(file):
            yield from (f"{file}: {what}" for what in unlike(old / file, new / file))


def unlike(old: Path, new: Path):
    """What is different in two files, by their kind; nothing if they are the same."""
    if old.read_bytes() == new.read_bytes():
        return
    reader = READERS.get(old.name) or READERS.get(old.suffix)
    if not reader:
        yield "other bytes"
        return
    one, other = reader(old), reader(new)
    for key in sorted({*one, *other}):
        if one.get(key) != other.get(key):
            yield f"{key}: {str(one.get(key))[:80]} and {str(other.get(key))[:80]}"


def metrics(file: Path) -> dict:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {f"{k}.{key}": value for k, row in enumerate(rows) for key, value in row.items() if key != "seconds"}


def tensors(file: Path) -> dict:
    import hashlib

    import torch
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as stored:
        header = {key: value for key, value in (stored.metadata() or {}).items() if not DATED.match(key)}
        for key in stored.keys():  # noqa: SIM118 - not a dict
            value = stored.get_tensor(key).contiguous()
            content = value.flatten().view(torch.uint8).numpy().tobytes()
            header[f"tensor {key}"] = (str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()[:12])
    return header


def pixels(file: Path) -> dict:
    from PIL import Image

    with Image.open(file) as image:
        return {"size": image.size, "pixels": hash(image.convert("RGB").tobytes())}


def identity(file: Path) -> dict:
    manifest = json.loads(file.read_text())
    return manifest["identity"] | {"step": manifest["step"], "files": sorted(manifest["files"])}


def settings(file: Path) -> dict:
    import yaml

    return yaml.safe_load(file.read_text()) or {}


READERS = {"metrics.jsonl": metrics, "manifest.json": identity, "training_config.yaml": settings}
READERS |= {".safetensors": tensors, ".png": pixels, ".jpg": pixels, ".json": lambda file: json.loads(file.read_text())}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), sys.argv[3:])
    else:
        raise SystemExit(main())
