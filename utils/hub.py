"""Writes the model card and uploads a result to the Hugging Face hub: only listed files, and with retries.

A failed upload can be repeated at any time without the training script:

    python -m utils.hub OUTPUT_DIR --hub_model_id NAME
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path

from utils import captions, errors, interrupts, models, saved, strict, writing
from utils.preflight import remote
from utils.report import curves, gallery

NOT_PUBLISHED = 6  # exit code: trained and saved, but not uploaded
LORA_FILES = ("pytorch_lora_weights*.safetensors", saved.EMBEDDINGS_FILE)
PARTS = ("unet", "text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2", "scheduler", "feature_extractor")
PART_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
LICENSES = {  # of the base models
    "stable-diffusion": "creativeml-openrail-m",
    "stable-diffusion-2": "openrail++",
    "stable-diffusion-xl": "openrail++",
}
LICENSES |= dict.fromkeys(models.EMBEDDED, "apache-2.0")
ROOT = Path(__file__).resolve().parent.parent  # from where `python -m utils.hub` is found
PATIENCE = 60.0  # seconds without a byte from the hub, after which it is taken to be gone
LONGEST = 600.0  # seconds after which no further attempt begins
NO_SECRETS = ("tokenizer", "token_abstraction", "num_new_tokens")  # options that are not left out for their names
WAITS = (2, 8, 30)  # seconds before the second, third and fourth attempt


def card(
    output_dir: str | Path,
    *,
    base_model: str,
    kind: str,  # "dreambooth", "pdmbooth" or "text-to-image"
    adapters: str | None = None,  # "lora", "dora", "loha" or "lokr"; None when whole networks learned
    family: str = "stable-diffusion",
    prompt: str | Sequence[str | None] | None = None,  # the instance prompt, or those of several subjects
    dataset: str | None = None,
    facts: dict | None = None,  # what was trained: steps, loss, seed, rank, photos, ...
    model_id: str | None = None,  # default: the folder's name
    diverged: str | None = None,  # how far, in words
    license: str | None = None,  # default: that of the family's base models
) -> Path:
    """Write README.md: what this is, what it draws, how it was made, how to load it. The result is saved already, so a
    card that cannot be written is a warning."""
    from huggingface_hub import ModelCardData

    output_dir = Path(output_dir)
    name = model_id or hub_name(output_dir)
    samples = _samples(output_dir)
    stock = adapters not in ("loha", "lokr")  # what stock diffusers loads
    kin = {"dora": ["lora", "dora"], "loha": ["lycoris", "loha"], "lokr": ["lycoris", "lokr"]}
    tags = ["text-to-image", *(["diffusers", "diffusers-training"] if stock else [])]
    tags += kin.get(adapters, [adapters] if adapters else [])
    tags += [*(["dreambooth"] if kind.endswith("booth") else []), family, *([f"{family}-diffusers"] if stock else [])]
    as_gallery = bool(adapters and stock and family == "stable-diffusion-xl")  # the hub's own page for such LoRAs
    tags += ["template:sd-lora"] if as_gallery else []
    prompts = [one for one in ([prompt] if isinstance(prompt, str) else prompt or ()) if one]
    prompt = prompts[0] if prompts else None
    more = {"instance_prompt": ", ".join(prompts)} if prompts else {}
    more |= {"diverged": True} if diverged else {}
    if samples:
        more["widget"] = [{"text": text or prompt or "", "output": {"url": url}} for url, text in samples]
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers" if stock else None,
        license=license or _license(base_model, family),
        pipeline_tag="text-to-image",
        tags=tags,
        datasets=[dataset] if dataset and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not is_local(dataset) else None,
        inference=True,
        **more,
    )
    kinds = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
    what = f"{kinds[adapters]} adapters for" if adapters else "A fine-tuned version of"
    several = f"{len(prompts)} subjects" if len(prompts) > 1 else "one subject"
    methods = {"dreambooth": "DreamBooth", "pdmbooth": "PDMBooth"}
    how = f"taught {several} with {methods[kind]}" if kind in methods else "trained on captioned images"
    parts = [f"# {escape(name)}", "<Gallery />" if as_gallery and samples else "", f"{what} {code(base_model)}, {how}."]
    if diverged:
        parts.append(f"**The training diverged**: {diverged}. These weights are of no use but to find out why.")
    if len(prompts) > 1:
        parts.append(f"Its subjects answer to the prompts {', '.join(map(code, prompts))}.")
    elif prompt:
        parts.append(f"Its subject answers to the prompt {code(prompt)}.")
    if samples:
        shown = [f"![sample {k + 1}]({url})" for k, (url, _) in enumerate(samples)]
        texts = list(dict.fromkeys(text for _, text in samples if text))
        parts += ["## Samples", " ".join(shown), "Drawn with " + ", ".join(map(code, texts)) + "." if texts else ""]
    given = [str(output_dir)] if (output_dir / saved.EMBEDDINGS_FILE).is_file() else []
    learned = saved.embeddings([], given, [])
    words = learned[0].words if learned else {}
    for word, tokens in words.items():
        parts.append(f"The word {code(word)} in these prompts stands for the new tokens {code(tokens)}.")
    asked = (samples[0][1] if samples else None) or prompt or "a photo"
    parts += ["## Use", _loading(name, base_model, adapters, captions.replaced(asked, words), learned)]
    rows = {**(facts or {}), "versions": _versions()}
    table = [f"| {cell(key)} | {cell(value)} |" for key, value in rows.items() if value is not None]
    parts += ["## Training", "\n".join(["| | |", "|---|---|", *table])]
    parts.append("Every option stands in `training_config.yaml`. The licence is that of the base model.")
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    with writing.unless_it_fails(output_dir / "README.md"):
        writing.write(output_dir / "README.md", text)
    return output_dir / "README.md"


def code(text: str) -> str:
    """Any text as a Markdown code span: nothing in it is markup, whatever it holds."""
    text = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if fence != "`" else f"`{text}`"


def cell(value) -> str:
    """A value in a Markdown table, with every character that means something there disarmed."""
    value = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(value, quote=False))


def publish(
    output_dir: str | Path,
    model_id: str | None = None,  # default: the folder's name, under the user's own
    private: bool = True,  # for a new repository; one that exists stays as it is
    token: str | None = None,  # or env:NAME; default: HF_TOKEN or the login
    waits: tuple = WAITS,
    patience: float = PATIENCE,
    give_up: Callable[[], bool] = lambda: False,  # asked between attempts: a job that was told to stop waits no longer
    allow_diverged: bool = False,
) -> bool:
    """Upload what `selected` names, in one commit. False when that failed, said on stderr with the way to repeat it."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if token and token.startswith("env:"):
        token = os.environ.get(token.removeprefix("env:"))
    token = token or get_token()
    model_id = model_id or hub_name(Path(output_dir))
    again = shlex.join(["python", "-m", "utils.hub", str(Path(output_dir).resolve()), "--hub_model_id", model_id])
    again = f"cd {shlex.quote(str(ROOT))} && {again}" + " --public" * (not private)
    if (how := diverged(Path(output_dir))) and not allow_diverged:
        errors.warn(f"not published: the run has diverged ({how}). To upload it all the same: {again} --allow_diverged")
        return False
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(token=token)
    remote.patient(patience)
    began = time.monotonic()
    for wait in (*waits, None):
        try:
            files = selected(Path(output_dir), token)
            check_whole(Path(output_dir), files)
            repo = api.create_repo(model_id, private=private, exist_ok=True).repo_id
            if "README.md" in files:
                files["README.md"] = _named(files["README.md"].decode(), repo).encode()
            operations = [CommitOperationAdd(path, data) for path, data in files.items()]
            done = api.create_commit(repo, operations, commit_message="Upload the result of a training run")
            print(f"published {len(operations)} files: {done.repo_url}", flush=True)
            return True
        except Exception as problem:  # whatever it is: the result is on disk, and the run must end well
            reason = _reason(problem, token)
            late = time.monotonic() - began > LONGEST
            if wait is None or late or not passing(problem) or give_up():
                break
            errors.warn(f"upload failed ({reason}); once more in {wait} s")
            until = time.monotonic() + wait
            while time.monotonic() < until and not give_up():
                time.sleep(min(0.2, wait))
            if give_up():
                break
    errors.warn(f"not published: {reason}. Everything is in {output_dir}. To try again: {again}")
    return False


def diverged(output_dir: Path) -> str | None:
    """How far the last session of a run in this folder had diverged at its end."""
    try:
        return json.loads((output_dir / "timings.json").read_text(encoding="utf-8"))["sessions"][-1].get("diverged")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def selected(output_dir: Path, token: str | None = None) -> dict[str, Path | bytes]:
    """What goes to the hub, path there -> file or bytes: weights, card, settings, the newest samples. Nothing else."""
    names = [*(file for files in LORA_FILES for file in output_dir.glob(files)), output_dir / "model_index.json"]
    names += filter(saved.word_of, output_dir.glob("*.safetensors"))
    for part in PARTS:
        names += [file for file in (output_dir / part).glob("*") if any(fnmatchcase(file.name, p) for p in PART_FILES)]
    names += [output_dir / url for url, _ in _samples(output_dir)]
    # No links: they could lead anywhere.
    files = {
        name.relative_to(output_dir).as_posix(): name
        for name in sorted(names)
        if name.is_file() and not name.is_symlink() and not name.parent.is_symlink()
    }
    if saved.interrupted(output_dir):
        raise ValueError(f"{output_dir}: {saved.INTERRUPTED}")
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{output_dir} holds no weights")
    for name in [name for name in files if name.endswith("config.json") or name == "model_index.json"]:
        told = _json(files[name])
        if (kept := saved.without_origins(told)) != told:
            files[name] = json.dumps(kept, indent=2).encode()
    settings, card = (_text(output_dir / name) for name in ("training_config.yaml", "README.md"))
    local = _folders_here(settings)
    for name, text in (
        ("README.md", _public_card(card, local) if card else ""),
        ("training_config.yaml", _public_settings(settings, local) if settings else ""),
    ):
        if text:
            files[name] = (text.replace(token, "hf_***") if token else text).encode()
    return files


def check_whole(output_dir: Path, files: dict[str, Path | bytes]) -> None:
    """ValueError for what nobody could load: weights cut short, a part that the index names and that is not there."""
    for name, file in files.items():
        if name.endswith(".safetensors"):
            saved.whole_header(file)
        elif name.endswith(".json") and isinstance(file, Path):  # bytes were read already
            _json(file)
    index = saved.read_json(output_dir / "model_index.json") if "model_index.json" in files else {}
    for part, named in index.items():
        if part in PARTS and isinstance(named, list) and named[0]:
            missing = _missing(part, {name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")})
            if missing:
                raise ValueError(f"'{output_dir}' is not a whole pipeline: {part}/ has no {missing}")
    for name, file in files.items():
        if name.endswith(".safetensors.index.json"):
            shards = set(json.loads(file.read_text(encoding="utf-8")).get("weight_map", {}).values())
            absent = sorted(shard for shard in shards if f"{Path(name).parent.as_posix()}/{shard}" not in files)
            if absent:
                raise ValueError(f"'{output_dir / name}' names {absent[0]}, which is not there")


def _missing(part: str, names: set[str]) -> str | None:
    """What a part of a pipeline cannot be loaded without."""
    if part == "scheduler":
        return None if "scheduler_config.json" in names else "scheduler_config.json"
    if part == "feature_extractor":
        return None if "preprocessor_config.json" in names else "preprocessor_config.json"
    if part.startswith("tokenizer"):
        return None if names & {"tokenizer.json", "vocab.json", "spiece.model"} else "vocabulary"
    if not any(name.endswith(".safetensors") for name in names):
        return "safetensors weights"
    return None if "config.json" in names else "config.json"


def _json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"'{file}' is damaged: {problem}") from None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def hub_name(output_dir: Path) -> str:
    return re.sub(r"[^\w.-]+|--+|\.\.+", "-", output_dir.resolve().name, flags=re.ASCII).strip("-.")[:96] or "model"


def is_local(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith(("~", ".")) or Path(name).exists()


def passing(problem: Exception) -> bool:
    """Worth another attempt: no answer, too many requests, or the hub's own trouble. A refusal is not."""
    response = getattr(problem, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    return isinstance(problem, OSError) or type(problem).__module__.split(".")[0].startswith(("httpx", "httpcore"))


def _license(base_model: str, family: str) -> str:
    """Of the base model. Stable Diffusion 2 is recognised by its width where its configuration is on this machine,
    else by its name."""
    from huggingface_hub import try_to_load_from_cache

    family = family.removesuffix("-inpainting")
    if family == "stable-diffusion" and base_model not in models.EMBEDDED:
        file = Path(base_model).expanduser() / "unet" / "config.json"
        if not file.is_file() and saved.HUB_NAME.fullmatch(base_model):
            file = try_to_load_from_cache(base_model, "unet/config.json")
        width = saved.read_json(Path(file)).get("cross_attention_dim") if isinstance(file, (str, Path)) else None
        if width == 1024 or (width is None and re.search(r"stable-diffusion-(v?2)", base_model)):
            family = "stable-diffusion-2"
    return LICENSES.get(base_model) or LICENSES.get(family, "other")


def _named(text: str, repo: str) -> str:
    """The card under the name that its repository really has: a run without --hub_model_id, or with a name alone, does
    not know whose account it goes to."""
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    if not title:
        return text
    text = text.replace(title[0], f"# {repo}", 1)
    calls = r"(from_pretrained\(|load_lora_weights\(|hf_hub_download\(|infer\.py --lora )"
    return re.sub(calls + re.escape(json.dumps(title[1])), lambda found: found[1] + json.dumps(repo), text)


def _folders_here(settings: str) -> set[str]:
    """The models and data sets that were folders when the run wrote its settings, by their names there.

    `owner/name` may be both, and the folder is seen only from where the run was started. A run that did not write it
    down (of an earlier version) used the hub only for what this machine still has of it.
    """
    told = strict.yaml(settings) or {} if settings else {}
    line = next((line for line in settings.splitlines() if line.startswith(saved.HERE)), None)
    given = {name: told[name] for name in saved.NAMED if isinstance(told.get(name), str) and told[name]}
    if line is not None:
        named = set(line.removeprefix(saved.HERE).split(", "))
        return {value for name, value in given.items() if name in named or is_local(value)}
    return {value for value in given.values() if is_local(value) or ("/" in value and not _fetched(value))}


def _fetched(name: str) -> bool:
    from huggingface_hub import constants

    folder = name.replace("/", "--")
    return any(Path(constants.HF_HUB_CACHE, f"{kind}--{folder}").is_dir() for kind in ("models", "datasets"))


def _public_card(text: str, local: set[str]) -> str:
    """The card without this machine's folders: a base model that only exists here has no place on the hub."""
    from huggingface_hub import ModelCard

    made = ModelCard(text)
    base = made.data.base_model
    if isinstance(base, str) and (base in local or is_local(base)):
        made.data.base_model = None
        made.text = made.text.replace(base, Path(base).name)
    return str(made)


def _public_settings(text: str, local: set[str]) -> str:
    """The settings with folders by their last name only, and without anything called a token.

    What is a folder is known by the option: a prompt may begin like a path.
    """
    import yaml

    def clean(name, value):
        if isinstance(value, list):
            return [clean(name, each) for each in value]
        if isinstance(value, dict):  # a subject of --concepts_list
            return {key: clean(key, each) for key, each in value.items()}
        folder = name in saved.PLACES or (name in saved.NAMED and (value in local or is_local(str(value))))
        return Path(value).name if folder and isinstance(value, str) else value

    settings = strict.yaml(text) or {}
    kept = {
        name: clean(name, value)
        for name, value in settings.items()
        if "token" not in name or name.startswith(NO_SECRETS)
    }
    return yaml.safe_dump(kept, allow_unicode=True, sort_keys=False)


def _samples(output_dir: Path) -> list[tuple[str, str | None]]:
    """The newest validation's pictures with their prompts.

    Not those past the last step: a run that went back to an older checkpoint has not drawn them.
    """
    from PIL import Image

    rows = curves.read_metrics(output_dir / "metrics.jsonl")
    last = rows[-1]["step"] if rows else None
    found = {step: files for step, files in gallery.sample_files(output_dir).items() if last is None or step <= last}
    chosen = []
    for _, path in sorted(found[max(found)].items()) if found else ():
        # One that is damaged is no sample. SyntaxError: Pillow, of a broken PNG.
        with contextlib.suppress(OSError, SyntaxError, ValueError), Image.open(path, formats=["PNG"]) as image:
            chosen.append((path.relative_to(output_dir).as_posix(), gallery.png_settings(image).get("prompt")))
    return chosen


def _loading(name: str, base_model: str, adapters: str | None, prompt: str, learned: list) -> str:
    def literal(value):  # a Python string that cannot close the code block
        return json.dumps(value).replace("`", "\\u0060")

    if adapters in ("loha", "lokr"):
        return (
            "Stock diffusers does not load adapters of this kind. ComfyUI and A1111 do, and so does the suite that they"
            f" come from:\n\n```bash\npython infer.py --lora {literal(name)} --prompt {literal(prompt)}\n```"
        )
    base = models.EMBEDDED.get(base_model, base_model)  # a folder of this suite
    lines = [
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({literal(base if adapters else name)},"
        ' torch_dtype=torch.float16).to("cuda")',
        *([f"pipeline.load_lora_weights({literal(name)})"] if adapters else []),
        *_loading_tokens(literal(name), learned),
        f"image = pipeline({literal(prompt)}, num_inference_steps=25).images[0]",
        "```",
    ]
    return "\n".join(lines)


def _loading_tokens(name: str, learned: list) -> list[str]:
    if not learned:
        return []
    ends = [end for key, end in zip(saved.EMBEDDINGS_KEYS, ("", "_2")) if key in saved.header(learned[0].file)]
    keys = dict(zip(ends, saved.EMBEDDINGS_KEYS))
    return [
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
        f'rows = load_file(hf_hub_download({name}, "{saved.EMBEDDINGS_FILE}"))',
        *(
            f'pipeline.load_textual_inversion(rows["{key}"], token={json.dumps(learned[0].names)},'
            f" tokenizer=pipeline.tokenizer{end}, text_encoder=pipeline.text_encoder{end})"
            for end, key in keys.items()
        ),
    ]


def _versions() -> str:
    found = []
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _reason(problem: Exception, token: str | None) -> str:
    """The first line of an error, without any token in it."""
    line = (str(problem).strip().splitlines() or [""])[0].strip().rstrip(".:") or type(problem).__name__
    if getattr(getattr(problem, "response", None), "status_code", None) in (401, 403):
        line = f"the token may not write there, make one with the role write ({line})"
    elif isinstance(problem, json.JSONDecodeError | TypeError | KeyError):
        line = f"the answer is not one of the hub, a proxy or a log-in page may be in between ({line})"
    line = line.replace(token, "hf_***") if token else line
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", line)


@interrupts.answered("stopped; run the command again to publish")
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.hub", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output_dir", type=Path, help="folder that a training script left")
    parser.add_argument("--hub_model_id", help="repository (default: name of the folder)")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--allow_diverged", action="store_true", help="upload the result of a run that has diverged")
    args = parser.parse_args(argv)
    if not args.output_dir.is_dir():
        errors.refuse(f"{args.output_dir} is no folder")
    done = publish(args.output_dir, args.hub_model_id, private=not args.public, allow_diverged=args.allow_diverged)
    return 0 if done else NOT_PUBLISHED


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    raise SystemExit(main())
