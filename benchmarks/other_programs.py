"""Files of this suite in the real readers of other programs: does each draw what we draw?

    python benchmarks/other_programs.py --environments FOLDER [--only NAME ...] [--output_dir DIR]

FOLDER holds virtual environments, e.g. made with

    python -m venv FOLDER/diffusers-0.27
    FOLDER/diffusers-0.27/bin/pip install torch diffusers==0.27.2 transformers==4.38.2 peft==0.9.0 accelerate==0.27.2
    python -m venv FOLDER/lycoris
    FOLDER/lycoris/bin/pip install torch diffusers transformers peft lycoris_lora

Each draws with tiny pipelines (tests/tiny.py) through its own loader; the pictures are compared with those that the
trained networks draw here. An environment that is missing or cannot start is reported as skipped. The table goes to
benchmarks/results/other-programs.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
READER = Path(__file__).with_name("reader.py")  # runs inside the other environments, without this suite
KINDS = {
    "LoRA": {"rank": 2, "alpha": 3, "text_encoder": True},
    "LoRA with convolutions, one rank": {"rank": 2, "alpha": 3, "lora_conv_rank": 2, "text_encoder": True},
    "LoRA with mixed ranks": {"rank": 2, "alpha": 3, "lora_conv_rank": 4, "text_encoder": True},
    "rsLoRA": {"rank": 4, "alpha": 3, "use_rslora": True, "text_encoder": True},
    "DoRA": {"rank": 2, "alpha": 3, "dora": True, "text_encoder": True},
    "LoHa": {"rank": 2, "alpha": 3, "adapter": "loha", "text_encoder": True},
    "LoKr": {"rank": 1, "alpha": 3, "adapter": "lokr", "text_encoder": True},
}
ALIKE, CHANGED = 2e-3, 1e-2  # largest difference of a pixel in 0..1: the same picture, surely another one


def trained(family, scale=0.2, **options):
    """Adapters as after some training: every weight moved."""
    import torch

    from utils import adapters

    learns = adapters.attach(family, **options)
    with torch.no_grad():
        for number, weight in enumerate(learns.parameters()):
            weight.add_(scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    for module in learns.modules.values():
        module.eval()
    return learns


def make(folder: Path) -> list[dict]:
    """Pipelines, files and expected pictures; => what each environment is to load."""
    import numpy as np
    import reader
    import tiny
    import torch

    from utils import models
    from utils.adapters import FILE, KOHYA_FILE, files
    from utils.adapters import __main__ as command

    jobs = []

    def loaded(base):
        family = models.family_of(str(base))
        family.load("cpu", torch.float32)
        return family

    for model, build in (("SD", lambda: tiny.stable_diffusion("epsilon")), ("SDXL", tiny.stable_diffusion_xl)):
        base = tiny.save(build(), folder / model)
        np.save(folder / f"{model}.npy", reader.draw(loaded(base).pipeline()))

        def add(kind, way, path, picture, model=model, base=base):
            job = {"model": model, "kind": kind, "way": way, "base": str(base), "file": str(path)}
            jobs.append(job | {"want": str(picture), "without": str(folder / f"{model}.npy")})

        add("base pipeline", "pipeline", base, folder / f"{model}.npy")
        for number, (kind, options) in enumerate(KINDS.items()):
            family, out = loaded(base), folder / f"{model}-{number}"
            learns = trained(family, **options)
            learns.save(out)
            picture = out / "want.npy"
            np.save(picture, reader.draw(family.pipeline()))
            add(kind, "diffusers", out / FILE, picture)
            if kind != "DoRA":
                found, header = files.read(out / FILE)
                kohya = out / KOHYA_FILE
                files.save(files.kohya(found, files.has_sgm_names(found, header)), kohya, {"format": "pt"})
                add(kind, "kohya", kohya, picture)
                add(kind, "lycoris", kohya, picture)
            if kind == "DoRA":
                differences = ["export", str(out), str(out / "diff.safetensors"), "--dora", "diff", "--base", str(base)]
                command.main(differences)
                add("DoRA, export --dora diff", "lycoris", out / "diff.safetensors", picture)
            if kind not in ("LoHa", "LoKr"):
                command.main(["export", str(out), str(out / "peft"), "--format", "peft"])
                add(kind, "peft", out / "peft", picture)
            if kind == "LoRA":
                command.main(["merge", str(base), str(out), "--output_dir", str(out / "merged")])
                add("merged pipeline", "pipeline", out / "merged", picture)
        family, out = loaded(base), folder / f"{model}-words"
        learns = trained(family, rank=2, train_text_encoder_ti=True, token_abstraction=["sks", "TOK"])
        learns.save(out, token_abstraction=["sks", "TOK"])
        np.save(out / "want.npy", reader.draw(family.pipeline(), f"a photo of {family.abstractions['TOK']}"))
        add("embedding of one word beside a LoRA", "words", out, out / "want.npy")
    return jobs


def read(python: Path, jobs: list[dict], folder: Path) -> dict:
    """The answers of one environment: versions and, for each job, the largest difference or why there is none."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [python, READER, folder / "jobs.json", folder / "answers.json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        return {"skipped": lines[-1][:200] if lines else f"ended with {done.returncode}"}
    return json.loads((folder / "answers.json").read_text())


def verdict(answer: dict) -> str:
    if "error" in answer:
        return f"error: {answer['error']}"
    if answer["difference"] < ALIKE:
        return "exact"
    return "NOTHING LOADED" if answer["change"] < ALIKE else f"OTHER ({answer['difference']:.2g})"


def table(found: dict[str, dict], jobs: list[dict]) -> str:
    names = list(found)
    lines = ["| model | file | loaded as | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for number, job in enumerate(jobs):
        cells = []
        for name in names:
            answer = found[name].get("answers", {}).get(str(number))
            text = verdict(answer) if answer else "skipped" if "skipped" in found[name] else "-"
            cells.append(text.replace("|", "/").replace("\n", " ")[:90])
        lines.append(f"| {job['model']} | {job['kind']} | {job['way']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def environments(folder: Path, only: list[str]) -> dict[str, Path]:
    return {
        path.name: path / "bin" / "python"
        for path in sorted(folder.iterdir() if folder.is_dir() else ())
        if (path / "bin" / "python").exists() and (not only or path.name in only)
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder of virtual environments")
    parser.add_argument("--only", nargs="*", default=[], help="names of some of them (default: all)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results", help="where the table goes")
    args = parser.parse_args(argv)
    pythons = environments(args.environments, args.only)
    if not pythons:
        print(f"skipped: {args.environments} holds no virtual environment" + f" named {args.only}" * bool(args.only))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        jobs = make(Path(folder))
        found = {}
        for name, python in pythons.items():
            found[name] = read(python, jobs, Path(folder))
            print(f"{name}: {found[name].get('skipped') or found[name]['versions']}", flush=True)
    told = [f"- {name}: {one.get('versions') or 'skipped: ' + one['skipped']}" for name, one in found.items()]
    text = "# Files of this suite in other readers\n\n" + "\n".join(told) + "\n\n"
    text += "exact: no pixel in 0..1 differs by more than 0.002 from what the trained networks draw. OTHER: the largest"
    text += " difference. Tiny random pipelines, 2 steps, CPU, `benchmarks/other_programs.py`.\n\n"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "other-programs.md").write_text(text + table(found, jobs) + "\n", encoding="utf-8")
    print(table(found, jobs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
