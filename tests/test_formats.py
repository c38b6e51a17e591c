"""Adapter files in other programs' naming: golden names, and the same picture through diffusers' own reader of them."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from utils import adapters, models
from utils.adapters import files


def loaded(folder):
    family = models.family_of(str(folder))
    family.load("cpu", torch.float32)
    return family


def trained(family, scale=0.2, **options):
    """Adapters as after some training: every weight moved."""
    learns = adapters.attach(family, **options)
    with torch.no_grad():
        for number, weight in enumerate(learns.parameters()):
            weight.add_(scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    for module in learns.modules.values():
        module.eval()
    return learns


def drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    return pipeline("a photo of sks dog", generator=generator, **options).images


def stock(folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder)


# --- Names -------------------------------------------------------------------------------------------------------

GOLDEN = {  # layer of a tiny SDXL -> its name, and the shapes of down, up and dora_scale at rank 2
    "mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0": (
        "lora_unet_mid_block_attentions_0_transformer_blocks_1_attn2_to_out_0",
        [(2, 16), (16, 2), (16, 1)],
    ),
    "down_blocks.1.resnets.0.conv1": (
        "lora_unet_down_blocks_1_resnets_0_conv1",
        [(2, 8, 3, 3), (16, 2, 1, 1), (16, 1, 1, 1)],
    ),
    "layers.0.self_attn.k_proj": ("lora_te{}_text_model_encoder_layers_0_self_attn_k_proj", [(2, 0), (0, 2), (0, 1)]),
}


def test_golden_names_and_shapes(sdxl, tmp_path):
    learns = trained(loaded(sdxl), rank=2, alpha=1, dora=True, text_encoder=True, targets=list(GOLDEN))
    learns.save(tmp_path, output_kohya_format=True)
    stored = load_file(tmp_path / adapters.KOHYA_FILE)
    want = {}
    for name, shapes in GOLDEN.values():
        for encoder, width in (("1", 16), ("2", 24)) if "{}" in name else (("", None),):
            own = [tuple(size or width for size in shape) for shape in shapes]
            parts = zip(("lora_down.weight", "lora_up.weight", "dora_scale", "alpha"), [*own, ()])
            want |= {f"{name.format(encoder)}.{part}": shape for part, shape in parts}
    assert {key: tuple(weight.shape) for key, weight in stored.items()} == want
    assert {weight.item() for key, weight in stored.items() if key.endswith(".alpha")} == {1.0}


def test_one_encoder_is_te_without_a_number(sd1, tmp_path):
    trained(loaded(sd1), text_encoder=True).save(tmp_path, output_kohya_format=True)
    keys = load_file(tmp_path / adapters.KOHYA_FILE)
    text = [key for key in keys if not key.startswith("lora_unet_")]
    assert text and all(key.startswith("lora_te_text_model_encoder_layers_") for key in text)


def test_every_layer_of_the_published_networks_has_a_name_that_leads_back():
    from diffusers import UNet2DConditionModel

    shapes = {
        "sd1": {"cross_attention_dim": 768},
        "sdxl": {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }
    for config in shapes.values():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        for name in adapters.adaptable(unet):
            assert files.dotted(files.kohya_name("unet", name).removeprefix("lora_unet_")) == name
    for name in ("encoder.layers.11.self_attn.out_proj", "encoder.layers.0.mlp.fc1"):
        assert files.dotted(files.kohya_name("text_encoder", name)[len("lora_te_") :]) == f"text_model.{name}"


def test_names_of_stabilitys_unet_are_those_diffusers_takes_them_for():
    from diffusers.loaders import lora_conversion_utils as theirs

    names = """
        input_blocks_1_0_in_layers_2 input_blocks_2_0_emb_layers_1 input_blocks_3_0_op input_blocks_4_0_skip_connection
        input_blocks_4_1_proj_in input_blocks_8_1_transformer_blocks_9_attn2_to_k middle_block_0_in_layers_2
        middle_block_1_transformer_blocks_0_ff_net_0_proj middle_block_2_out_layers_3 output_blocks_0_0_in_layers_2
        output_blocks_0_1_transformer_blocks_0_attn1_to_q output_blocks_2_2_conv output_blocks_5_1_proj_out
        output_blocks_8_0_skip_connection input_blocks_0_0 out_2 time_embed_0 label_emb_0_2
    """
    names = re.findall(r"\S+", names)
    state = {f"lora_unet_{name}.lora_down.weight": name for name in names}
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(state, type("Config", (), {"layers_per_block": 2}))
    for key, name in mapped.items():
        layer = theirs._convert_unet_lora_key(key).split(".lora.")[0].replace(".processor", "")
        layer = layer.replace("_lora.down.weight", "").removesuffix(".down.weight")
        assert files.dotted(files.from_sgm(name)) == layer, name


# --- Pictures ----------------------------------------------------------------------------------------------------

CASES = {
    "unet": {"rank": 2},
    "encoders": {"rank": 2, "alpha": 5, "text_encoder": True},
    "convolutions": {"rank": 2, "alpha": 3, "lora_conv_rank": 3},
    "use_rslora": {"rank": 4, "alpha": 3, "use_rslora": True, "text_encoder": True},
    "pissa": {"rank": 2, "alpha": 1, "init_lora_weights": "pissa", "lora_conv_rank": 1, "text_encoder": True},
    "olora": {"rank": 3, "init_lora_weights": "olora"},
}


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize("case", CASES)
def test_both_files_draw_the_same_in_stock_diffusers(model, case, request, tmp_path):
    folder = request.getfixturevalue(model)
    family = loaded(folder)
    base = drawn(family.pipeline())
    trained(family, **CASES[case]).save(tmp_path, output_kohya_format=True)
    ours = drawn(family.pipeline())
    assert abs(ours - base).max() > 0.01
    for name in (adapters.FILE, adapters.KOHYA_FILE):
        pipeline = stock(folder)
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        assert abs(drawn(pipeline) - ours).max() < 1e-4, name


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_dora_comes_back_from_kohyas_naming(model, request, tmp_path):
    """diffusers' own reader leaves out dora_scale, with a warning; what it knows of the names is tested above."""
    folder = request.getfixturevalue(model)
    family = loaded(folder)
    options = {"rank": 2, "alpha": 3, "dora": True, "text_encoder": True, "lora_conv_rank": 2}
    trained(family, **options).save(tmp_path, output_kohya_format=True)
    ours = drawn(family.pipeline())
    found, _ = files.read(tmp_path / adapters.KOHYA_FILE)
    pipeline = stock(folder)
    pipeline.load_lora_weights(files.stock(found))
    assert abs(drawn(pipeline) - ours).max() < 1e-4
    pipeline = stock(folder)
    pipeline.load_lora_weights(tmp_path, weight_name=adapters.KOHYA_FILE)
    assert abs(drawn(pipeline) - ours).max() > 1e-3


def test_diffusers_own_reader_of_kohyas_names_understands_dora(sdxl, tmp_path):
    """load_lora_weights drops dora_scale before its reader of kohya files sees it; given to the reader, it draws the
    same. peft keeps the lengths flat."""
    from diffusers.loaders import lora_conversion_utils as theirs

    family = loaded(sdxl)
    trained(family, rank=2, alpha=3, dora=True, text_encoder=True).save(tmp_path, output_kohya_format=True)
    ours = drawn(family.pipeline())
    state, alphas = theirs._convert_non_diffusers_lora_to_diffusers(load_file(tmp_path / adapters.KOHYA_FILE))
    state = {name: weight.flatten() if "magnitude" in name else weight for name, weight in state.items()}
    pipeline = stock(sdxl)
    base = drawn(pipeline)
    parts = {part: {name: w for name, w in state.items() if name.startswith(f"{part}.")} for part in family.names}
    pipeline.load_lora_into_unet(parts["unet"], network_alphas=alphas, unet=pipeline.unet)
    for part in family.encoders:
        network = getattr(pipeline, part)
        pipeline.load_lora_into_text_encoder(parts[part], network_alphas=alphas, text_encoder=network, prefix=part)
    assert abs(drawn(pipeline) - ours).max() < 1e-4 < 0.01 < abs(ours - base).max()


def test_headers_say_what_other_programs_look_up(sdxl, tmp_path):
    trained(loaded(sdxl), rank=2, alpha=6).save(tmp_path / "dog", output_kohya_format=True)
    for name in (adapters.FILE, adapters.KOHYA_FILE):
        with safe_open(str(tmp_path / "dog" / name), framework="pt") as stored:
            header = stored.metadata()
        if name == adapters.FILE:  # in the other one it stands beside the weights
            assert json.loads(header[files.METADATA])["unet.lora_alpha"] == 6
        assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert (header["modelspec.title"], header["modelspec.prediction_type"]) == ("dog", "epsilon")
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "6")
        assert (header["ss_network_module"], header["ss_base_model_version"]) == ("networks.lora", "sdxl_base_v1-0")
        assert str(sdxl) not in json.dumps(header)
        want = {"base_model": None, "rank": 2, "alpha": 6, "dora": False, "modules": ["unet"]}
        assert adapters.read_metadata(tmp_path / "dog" / name) == want


@pytest.mark.parametrize(
    ("label", "encoders", "width", "prediction", "want"),
    [
        ("stable-diffusion", 1, 768, "epsilon", ("stable-diffusion-v1/lora", "sd_v1", "False")),
        ("stable-diffusion-inpainting", 1, 1024, "epsilon", ("stable-diffusion-v2-512/lora", "sd_v2", "True")),
        ("stable-diffusion", 1, 1024, "v_prediction", ("stable-diffusion-v2-768-v/lora", "sd_v2_v", "True")),
        (
            "stable-diffusion-xl-inpainting",
            2,
            2048,
            "epsilon",
            ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False"),
        ),
    ],
)
def test_the_base_is_called_as_other_programs_call_it(label, encoders, width, prediction, want):
    from types import SimpleNamespace as Fake

    family = Fake(
        label=label,
        encoders=["text_encoder", "text_encoder_2"][:encoders],
        unet=Fake(config=Fake(cross_attention_dim=width)),
        own_scheduler=Fake(config=Fake(prediction_type=prediction)),
    )
    told = adapters.describe_base(family)
    assert (told["modelspec.architecture"], told["ss_base_model_version"], told["ss_v2"]) == want
    family.label = "deepfloyd-if"
    assert adapters.describe_base(family) == {}
