"""Loads files as another program's user does, inside that program's environment: no import of this suite.

python reader.py jobs.json answers.json
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1")
PROMPT = "a photo of sks dog"


def draw(pipeline, prompt=PROMPT):
    """One picture of a fixed seed."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    return pipeline(prompt, generator=torch.Generator().manual_seed(1), **options).images


def load(job):
    """=> (pipeline, prompt) with the file in it."""
    from diffusers import DiffusionPipeline

    file, way = Path(job["file"]), job["way"]
    if way == "pipeline":
        return DiffusionPipeline.from_pretrained(file), PROMPT
    pipeline = DiffusionPipeline.from_pretrained(job["base"])
    encoders = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    if way in ("diffusers", "kohya"):
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    elif way == "peft":
        from peft import PeftModel

        for name in ["unet", *encoders]:
            model = PeftModel.from_pretrained(getattr(pipeline, name), file / name)
            setattr(pipeline, name, model.merge_and_unload())
    elif way == "words":  # the LoRA, and a word's file as a textual inversion
        from safetensors.torch import load_file

        pipeline.load_lora_weights(file, weight_name="pytorch_lora_weights.safetensors")
        rows = load_file(file / "TOK.safetensors")
        names = [f"<new{k}>" for k in range(len(next(iter(rows.values()))))]
        for key, end in (("emb_params", ""), ("clip_l", ""), ("clip_g", "_2")):
            if key in rows:
                parts = {part: getattr(pipeline, part + end) for part in ("tokenizer", "text_encoder")}
                pipeline.load_textual_inversion(rows[key], token=names, **parts)
        return pipeline, "a photo of " + "".join(names)
    else:
        from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

        # Else it first builds a network over every layer, and fails where a name is found in two ways.
        targets = [f"{part}_target_{kind}" for part in ("unet", "text_encoder") for kind in ("module", "name")]
        LycorisNetworkKohya.apply_preset({target: [] for target in targets})
        texts = [getattr(pipeline, name) for name in encoders]
        texts = texts if len(texts) > 1 else texts[0]
        network, weights = create_network_from_weights(1.0, str(file), None, texts, pipeline.unet, for_inference=True)
        network.apply_to(texts, pipeline.unet, True, True)
        made = {layer.lora_name for layer in [*network.unet_loras, *network.text_encoder_loras]}
        if strangers := {key.split(".")[0] for key in weights} - made:
            raise ValueError(f"{len(strangers)} layers of the file fit nothing")
        pipeline.kept = network
    return pipeline, PROMPT


def main(jobs_file, answers_file):
    warnings.simplefilter("ignore")
    import importlib.metadata

    import numpy as np
    import torch

    torch.set_num_threads(1)
    names = ("diffusers", "transformers", "peft", "lycoris_lora")
    versions, has = [], {}
    for name in names:
        try:
            has[name] = importlib.metadata.version(name)
            versions.append(f"{name} {has[name]}")
        except importlib.metadata.PackageNotFoundError:
            continue
    answers = {}
    for number, job in enumerate(json.loads(Path(jobs_file).read_text())):
        if (job["way"] == "lycoris") != ("lycoris_lora" in has):
            continue
        try:
            pipeline, prompt = load(job)
            picture = draw(pipeline, prompt)
            difference, change = (float(abs(picture - np.load(job[key])).max()) for key in ("want", "without"))
            answers[number] = {"difference": difference, "change": change}
        except Exception as problem:
            lines = str(problem).strip().splitlines() or [""]
            answers[number] = {"error": f"{type(problem).__name__}: {lines[0][:60]}"}
    Path(answers_file).write_text(json.dumps({"versions": ", ".join(versions), "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
