"""Adapters into weights and back, and the commands of `python -m utils.adapters`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_formats import as_lycoris_keeps_dora, drawn, loaded, stock, trained

from utils import adapters, saved
from utils.adapters import __main__ as command
from utils.adapters import files

KINDS = {
    "lora": {"rank": 2, "alpha": 3, "lora_conv_rank": 1},
    "dora": {"rank": 2, "alpha": 3, "lora_conv_rank": 1, "dora": True},
    "loha": {"rank": 2, "alpha": 3, "lora_conv_rank": 3, "adapter": "loha"},
    "lokr": {"rank": 1, "alpha": 3, "lora_conv_rank": 3, "adapter": "lokr"},
}


def run(*words) -> None:
    assert command.main([*map(str, words)]) == 0


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main([*map(str, words)])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_pipeline_draws_what_base_and_adapters_draw(model, kind, request, tmp_path):
    folder = request.getfixturevalue(model)
    family = loaded(folder)
    base = drawn(family.pipeline())
    trained(family, text_encoder=True, **KINDS[kind]).save(tmp_path / "dog")
    ours = drawn(family.pipeline())
    run("merge", folder, tmp_path / "dog", "--output_dir", tmp_path / "merged")
    assert abs(ours - base).max() > 0.05
    assert abs(drawn(stock(tmp_path / "merged")) - ours).max() < 1e-3


def test_several_are_merged_at_their_scales_as_diffusers_adds_them(sd1, tmp_path):
    trained(loaded(sd1), rank=2).save(tmp_path / "one")
    trained(loaded(sd1), rank=3, dora=True, targets="to_q,conv1").save(tmp_path / "two")
    run("merge", sd1, f"{tmp_path / 'one'}:0.5", f"{tmp_path / 'two'}:0.7", "--output_dir", tmp_path / "merged")
    pipeline = stock(sd1)
    for name in ("one", "two"):
        pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    pipeline.set_adapters(["one", "two"], [0.5, 0.7])
    assert abs(drawn(stock(tmp_path / "merged")) - drawn(pipeline)).max() < 1e-3


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_what_was_merged_is_extracted_again(model, request, tmp_path, capsys):
    folder = request.getfixturevalue(model)
    family = loaded(folder)
    trained(family, rank=2, lora_conv_rank=2, text_encoder=True).save(tmp_path / "dog")
    ours = drawn(family.pipeline())
    run("merge", folder, tmp_path / "dog", "--output_dir", tmp_path / "merged")
    run("extract", folder, tmp_path / "merged", tmp_path / "again", "--rank", "2")
    assert "unet: " in capsys.readouterr().out
    pipeline = stock(folder)
    pipeline.load_lora_weights(tmp_path / "again")
    assert abs(drawn(pipeline) - ours).max() < 1e-3
    assert load_file(tmp_path / "dog" / adapters.FILE).keys() == load_file(tmp_path / "again" / adapters.FILE).keys()
    run("extract", folder, tmp_path / "merged", tmp_path / "less", "--rank", "1")
    assert 20 < float(capsys.readouterr().out.split("layers, ")[1].split(" %")[0]) < 99


def test_there_and_back_again(sdxl, tmp_path):
    trained(loaded(sdxl), rank=2, alpha=3, text_encoder=True).save(tmp_path / "dog")
    run("export", tmp_path / "dog", tmp_path / "kohya.safetensors")
    run("import", tmp_path / "kohya.safetensors", tmp_path / "back")
    first, again = (files.read(tmp_path / name / adapters.FILE)[0] for name in ("dog", "back"))
    for network, layers in first.items():
        assert layers.keys() == again[network].keys()
        for layer, parts in layers.items():
            assert parts["alpha"] == again[network][layer]["alpha"]
            assert all(torch.equal(parts[part], again[network][layer][part]) for part in ("down", "up"))
    run("export", tmp_path / "dog", tmp_path / "half.safetensors", "--dtype", "fp16")
    assert {weight.dtype for weight in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize("dora", [False, True])
def test_peft_reads_its_folders(sd1, dora, tmp_path):
    from peft import PeftModel

    family = loaded(sd1)
    trained(family, rank=2, alpha=3, lora_conv_rank=3, text_encoder=True, dora=dora).save(tmp_path / "dog")
    ours = drawn(family.pipeline())
    run("export", tmp_path / "dog", tmp_path / "peft", "--format", "peft")
    pipeline = stock(sd1)
    for name in ("unet", "text_encoder"):
        setattr(
            pipeline,
            name,
            PeftModel.from_pretrained(getattr(pipeline, name), tmp_path / "peft" / name).merge_and_unload(),
        )
    assert abs(drawn(pipeline) - ours).max() < 1e-3


def test_peft_folders_fit_text_encoders_of_transformers_4_too(sd1, tmp_path):
    """There CLIPTextModel keeps its layers in `text_model`, which transformers 5 left out."""
    from peft import PeftModel

    family = loaded(sd1)
    trained(family, rank=2, alpha=3, text_encoder=True).save(tmp_path / "dog")
    run("export", tmp_path / "dog", tmp_path / "peft", "--format", "peft")
    merged = []
    for level in (False, True):
        encoder = stock(sd1).text_encoder
        assert not hasattr(encoder, "text_model"), "transformers has this level again"
        if level:
            wrapped = torch.nn.Module()
            wrapped.text_model = encoder
        model = PeftModel.from_pretrained(wrapped if level else encoder, tmp_path / "peft" / "text_encoder")
        model = model.merge_and_unload()
        merged.append((model.text_model if level else model).state_dict())
    base = stock(sd1).text_encoder.state_dict()
    assert max(abs(merged[0][name] - base[name]).max() for name in base) > 0.01
    assert all(torch.equal(merged[1][name], merged[0][name]) for name in base)


def test_what_cannot_be_is_refused(sd1, sd2, sdxl, tmp_path, capsys):
    trained(loaded(sd1), rank=2, text_encoder=True).save(tmp_path / "dog")
    trained(loaded(sd1), adapter="loha", rank=2).save(tmp_path / "loha")
    assert "does not exist" in refused(capsys, "export", tmp_path / "none", tmp_path / "x.safetensors")
    assert ".safetensors" in refused(capsys, "export", tmp_path / "dog", tmp_path / "x.bin")
    assert "LoHa, LoKr and" in refused(capsys, "import", tmp_path / "loha", tmp_path / "x")
    assert "exists" in refused(capsys, "merge", sd1, tmp_path / "dog", "--output_dir", tmp_path / "dog")
    for model in (sd2, sdxl):
        said = refused(capsys, "merge", model, tmp_path / "dog", "--output_dir", tmp_path / "out")
        assert "another" in said and not (tmp_path / "out").exists()
    assert "nothing to extract" in refused(capsys, "extract", sd1, sd1, tmp_path / "out")
    assert "no difference" in refused(capsys, "extract", sd1, sdxl, tmp_path / "out")


def test_lengths_measured_by_input_are_refused(sd1, tmp_path, capsys):
    """Older LyCORIS files: read as if measured by output they would draw something else without a word."""
    trained(loaded(sd1), rank=2, dora=True).save(tmp_path)
    as_lycoris_keeps_dora(tmp_path)
    weights = load_file(tmp_path / adapters.KOHYA_FILE)
    turned = {key: w.T if key.endswith("dora_scale") else w for key, w in weights.items()}
    files.save(turned, tmp_path / "old.safetensors", {})
    with pytest.raises(SystemExit):
        files.read(tmp_path / "old.safetensors")
    assert "by input" in capsys.readouterr().err


def test_a_file_that_says_nothing_of_alpha_counts_as_it_stands(sd1, tmp_path):
    trained(loaded(sd1), rank=2, alpha=3).save(tmp_path)
    weights = load_file(tmp_path / adapters.FILE)
    files.save(weights, tmp_path / "bare.safetensors", {})
    found, _ = files.read(tmp_path / "bare.safetensors")
    assert {files.strength(parts) for parts in found["unet"].values()} == {1.0}
    config = {"unet.lora_alpha": 3, "unet.use_rslora": True, "unet.alpha_pattern": {"to_q": 5}}
    files.save(weights, tmp_path / "rs.safetensors", {files.METADATA: json.dumps(config)})
    found, _ = files.read(tmp_path / "rs.safetensors")
    got = {layer.split(".")[-1]: files.strength(parts) for layer, parts in found["unet"].items()}
    assert got["to_q"] == pytest.approx(5 / 2**0.5) and got["to_k"] == pytest.approx(3 / 2**0.5)


# --- DoRA for kohya's programs -----------------------------------------------------------------------------------

DORA = {"rank": 2, "alpha": 3, "lora_conv_rank": 1, "dora": True, "text_encoder": True}


def applied(weight: torch.Tensor, stored: dict, name: str) -> torch.Tensor:
    """As A1111 and ComfyUI add a layer of a file up: alpha / rank * up @ down, or the difference as it stands."""
    if f"{name}.diff" in stored:
        return weight + stored[f"{name}.diff"]
    down, up = stored[f"{name}.lora_down.weight"], stored[f"{name}.lora_up.weight"]
    change = (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return weight + stored[f"{name}.alpha"] / len(down) * change


def drawn_elsewhere(folder, file):
    """A picture of the base with every layer changed as another program changes it."""
    pipeline, stored, used = stock(folder), load_file(file), set()
    two = hasattr(pipeline, "text_encoder_2")
    for network in ("unet", "text_encoder", "text_encoder_2")[: 3 if two else 2]:
        for layer, module in getattr(pipeline, network).named_modules():
            name = files.kohya_name(network, layer, two)
            keys = {key for key in stored if key.split(".")[0] == name}
            if keys:
                used |= keys
                module.weight.data = applied(module.weight.data, stored, name)
    assert used == stored.keys()
    return drawn(pipeline)


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_a_dora_is_exported_as_differences_that_others_add_up_exactly(model, request, tmp_path, capsys):
    folder = request.getfixturevalue(model)
    family = loaded(folder)
    base = drawn(family.pipeline())
    trained(family, **DORA).save(tmp_path / "dora")
    ours = drawn(family.pipeline())
    assert abs(ours - base).max() > 0.02
    run("export", tmp_path / "dora", tmp_path / "diff.safetensors", "--dora", "diff", "--base", folder)
    assert abs(drawn_elsewhere(folder, tmp_path / "diff.safetensors") - ours).max() < 1e-3
    keys = load_file(tmp_path / "diff.safetensors")
    assert {key.split(".")[1] for key in keys} == {"diff"} and any(key.startswith("lora_te") for key in keys)
    # And here: merged, and as infer.py takes it.
    run("merge", folder, tmp_path / "diff.safetensors", "--output_dir", tmp_path / "merged")
    assert abs(drawn(stock(tmp_path / "merged")) - ours).max() < 1e-3
    assert files.is_lycoris(tmp_path / "diff.safetensors") and saved.looks_like_lora(tmp_path / "diff.safetensors")
    # The nearest LoRA: more rank keeps more, and as much as the widths allow is all of it.
    capsys.readouterr()
    shares = []
    for rank in (1, 3, 99):
        file = tmp_path / f"rank{rank}.safetensors"
        run("export", tmp_path / "dora", file, "--dora", "lora", "--rank", rank, "--base", folder)
        said = capsys.readouterr().out
        shares.append(float(said.split("keeps ")[1].split(" %")[0]))
    assert 20 < shares[0] < shares[1] < shares[2] == 100
    assert abs(drawn_elsewhere(folder, file) - ours).max() < 1e-3
    pipeline = stock(folder)
    pipeline.load_lora_weights(file)
    assert abs(drawn(pipeline) - ours).max() < 1e-3


def test_the_share_of_a_dora_that_a_lora_keeps_is_that_of_its_change(sd1, tmp_path, capsys):
    family = loaded(sd1)
    before = {name: weight.clone() for name, weight in family.unet.state_dict().items()}
    trained(family, rank=2, dora=True).save(tmp_path / "dora")
    run("export", tmp_path / "dora", tmp_path / "two.safetensors", "--dora", "lora", "--rank", "2", "--base", sd1)
    told = float(capsys.readouterr().out.split("keeps ")[1].split(" %")[0])
    run("merge", sd1, tmp_path / "dora", "--output_dir", tmp_path / "whole")
    run("merge", sd1, tmp_path / "two.safetensors", "--output_dir", tmp_path / "part")
    whole, part = (stock(tmp_path / name).unet.state_dict() for name in ("whole", "part"))
    of_change = sum(float((whole[name] - weight).square().sum()) for name, weight in before.items())
    lost = sum(float((whole[name] - part[name]).square().sum()) for name in before)
    assert told == pytest.approx(100 * (1 - lost / of_change), abs=0.1) and told < 99


def test_a_dora_is_not_written_in_a_form_that_no_program_reads(sd1, sdxl, tmp_path, capsys):
    learns = trained(loaded(sd1), rank=2, dora=True)
    learns.save(tmp_path / "dora")
    trained(loaded(sd1), rank=2).save(tmp_path / "lora")
    out = tmp_path / "x.safetensors"
    said = refused(capsys, "export", tmp_path / "dora", out)
    for ending in ("--dora diff", "--dora lora --rank 16"):
        assert f"python -m utils.adapters export {tmp_path / 'dora'} {out} {ending}" in said
    with pytest.raises(ValueError, match="without_dora"):
        files.kohya(files.read(tmp_path / "dora" / adapters.FILE)[0], sgm=False)
    assert "add --base" in refused(capsys, "export", tmp_path / "dora", out, "--dora", "diff")
    assert "has another size" in refused(capsys, "export", tmp_path / "dora", out, "--dora", "diff", "--base", sdxl)
    assert "no rank" in refused(capsys, "export", tmp_path / "dora", out, "--dora", "diff", "--rank", "2")
    assert "is not a DoRA" in refused(capsys, "export", tmp_path / "lora", out, "--dora", "diff")
    assert "keeps a DoRA" in refused(capsys, "export", tmp_path / "dora", out, "--format", "peft", "--dora", "diff")
    assert not out.exists()
    (tmp_path / "dora" / "training_config.yaml").write_text(f"pretrained_model_name_or_path: {sd1}")
    run("export", tmp_path / "dora", out, "--dora", "diff")  # the recorded base
    assert "whole differences" in refused(capsys, "import", out, tmp_path / "back")


def test_weights_that_half_precision_cannot_hold_are_refused(sd1, tmp_path, capsys):
    learns = trained(loaded(sd1), rank=2)
    with torch.no_grad():
        learns.parameters()[0][0, 0] = 1e5
    learns.save(tmp_path / "dog")
    said = refused(capsys, "export", tmp_path / "dog", tmp_path / "x.safetensors", "--dtype", "fp16")
    assert "holds 1e+05" in said and not (tmp_path / "x.safetensors").exists()
    run("export", tmp_path / "dog", tmp_path / "x.safetensors", "--dtype", "bf16")
