"""Adapter files in other programs' naming: golden names, and the same picture through diffusers' own reader of them."""

import hashlib
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_save

from utils import adapters, models, saved
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


def as_lycoris_keeps_dora(folder):
    """The DoRA of a folder in kohya's naming, its lengths as dora_scale, one for each row: read here, never written."""
    found, _ = files.read(folder / adapters.FILE)
    plain = {n: {layer: parts | {} for layer, parts in layers.items()} for n, layers in found.items()}
    lengths = {}
    for network, layers in plain.items():
        for layer, parts in layers.items():
            name = files.kohya_name(network, layer, "text_encoder_2" in found)
            lengths[f"{name}.dora_scale"] = parts.pop("magnitude").view(-1, *[1] * (parts["down"].dim() - 1))
    files.save(files.kohya(plain, sgm=False) | lengths, folder / adapters.KOHYA_FILE, {})


# --- Names -------------------------------------------------------------------------------------------------------

GOLDEN = {  # layer of a tiny SDXL -> its name, and the shapes of down and up at rank 2
    "mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0": (
        "lora_unet_mid_block_attentions_0_transformer_blocks_1_attn2_to_out_0",
        [(2, 16), (16, 2)],
    ),
    "down_blocks.1.resnets.0.conv1": (
        "lora_unet_down_blocks_1_resnets_0_conv1",
        [(2, 8, 3, 3), (16, 2, 1, 1)],
    ),
    "layers.0.self_attn.k_proj": ("lora_te{}_text_model_encoder_layers_0_self_attn_k_proj", [(2, 0), (0, 2)]),
}


def test_golden_names_and_shapes(sdxl, tmp_path):
    learns = trained(loaded(sdxl), rank=2, alpha=1, text_encoder=True, targets=list(GOLDEN))
    learns.save(tmp_path, output_kohya_format=True)
    stored = load_file(tmp_path / adapters.KOHYA_FILE)
    want = {}
    for name, shapes in GOLDEN.values():
        for encoder, width in (("1", 16), ("2", 24)) if "{}" in name else (("", None),):
            own = [tuple(size or width for size in shape) for shape in shapes]
            parts = zip(("lora_down.weight", "lora_up.weight", "alpha"), [*own, ()])
            want |= {f"{name.format(encoder)}.{part}": shape for part, shape in parts}
    assert {key: tuple(weight.shape) for key, weight in stored.items()} == want
    assert {weight.item() for key, weight in stored.items() if key.endswith(".alpha")} == {1.0}


def test_one_encoder_is_te_without_a_number(sd1, tmp_path):
    trained(loaded(sd1), text_encoder=True).save(tmp_path, output_kohya_format=True)
    keys = load_file(tmp_path / adapters.KOHYA_FILE)
    text = [key for key in keys if not key.startswith("lora_unet_")]
    assert text and all(key.startswith("lora_te_text_model_encoder_layers_") for key in text)


def expanded(pattern: str) -> list[str]:
    """a{b,c{0..1}} => ab, ac0, ac1"""
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, parts = 0, [""]
    for end in range(start, len(pattern)):
        sign = pattern[end]
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            break
        if sign == "," and depth == 1:
            parts.append("")
        elif end > start:
            parts[-1] += sign
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", parts[0]):
        parts = list(map(str, range(int(span[1]), int(span[2]) + 1)))
    rest = expanded(pattern[end + 1 :])
    return [f"{pattern[:start]}{one}{other}" for part in parts for one in expanded(part) for other in rest]


def golden_sdxl_names() -> dict[str, str]:
    """diffusers' name of each layer of SDXL's UNet => kohya's."""
    lines = Path(__file__).with_name("sdxl_layer_names.txt").read_text(encoding="utf-8").splitlines()
    rows = [[expanded(side) for side in line.split(" ")] for line in lines if not line.startswith("#")]
    return {ours: theirs for left, right in rows for ours, theirs in zip(left, right, strict=True)}


def test_every_layer_of_sdxl_has_kohyas_name_and_it_leads_back():
    from diffusers import UNet2DConditionModel

    golden = golden_sdxl_names()
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED["sdxl"])
    assert set(adapters.adaptable(unet)) == golden.keys() and len(golden) == 794
    for ours, theirs in golden.items():
        assert files.kohya_name("unet", ours, two_encoders=True, sgm=True) == f"lora_unet_{theirs}"
        assert files.dotted(files.from_sgm(theirs)) == ours
    found = {"unet": {name: {} for name in golden}}
    assert files.has_sgm_names(found, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert files.has_sgm_names(found, {})  # a file that says nothing of its base
    assert not files.has_sgm_names(found, {"ss_base_model_version": "sd_v1"})
    for name in ("down_blocks.0.attentions.0.proj_in", "down_blocks.3.resnets.0.conv1", "up_blocks.3.resnets.0.conv1"):
        assert not files.has_sgm_names({"unet": {name: {}}}, {"ss_base_model_version": "sdxl_base_v1-0"})


PUBLISHED = {
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


@pytest.fixture(scope="module")
def sdxl_places(tmp_path_factory):
    """A tiny SDXL whose layers have the names of the published one's."""
    import tiny

    pipeline = tiny.stable_diffusion_xl()
    torch.manual_seed(0)
    shape = {key: PUBLISHED["sdxl"][key] for key in ("down_block_types", "up_block_types")}
    shape |= {"block_out_channels": (8, 8, 16), "layers_per_block": 2, "transformer_layers_per_block": (1, 1, 2)}
    shape |= {"attention_head_dim": (2, 2, 4), "num_attention_heads": None}
    pipeline.unet = type(pipeline.unet)(**dict(pipeline.unet.config) | shape)
    return tiny.save(pipeline, tmp_path_factory.mktemp("models") / "sdxl_places")


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_sdxl_layers_are_named_as_stabilitys_code_names_them(kind, sdxl_places, tmp_path):
    learns = trained(loaded(sdxl_places), rank=2, lora_conv_rank=2, text_encoder=True, adapter=kind)
    learns.save(tmp_path, output_kohya_format=True)
    known = set(golden_sdxl_names().values())
    for name in [adapters.KOHYA_FILE, *([] if kind == "lora" else [adapters.FILE])]:
        layers = {key.split(".")[0] for key in load_file(tmp_path / name)}
        assert {layer.removeprefix("lora_unet_") for layer in layers if layer.startswith("lora_unet_")} <= known
        assert {layer[:8] for layer in layers} == {"lora_une", "lora_te1", "lora_te2"}
        found, _ = files.read(tmp_path / name)
        plain = {layer.replace(".base_layer", "") for layer, module in learns.modules["unet"].named_modules()}
        assert found["unet"].keys() <= plain and len(found["unet"]) > 50


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loha_and_lokr_of_sdxl_with_diffusers_names_still_load(kind, sdxl_places, tmp_path):
    learns = trained(loaded(sdxl_places), rank=2, text_encoder=True, adapter=kind)
    learns.save(tmp_path)
    stored = load_file(tmp_path / adapters.FILE)
    assert any(map(files.is_sgm_key, stored))
    files.save({files.own_key(key): weight for key, weight in stored.items()}, tmp_path / "old" / adapters.FILE, {})
    again = adapters.attach(loaded(sdxl_places), rank=2, text_encoder=True, adapter=kind, seed=9)
    for folder in (tmp_path, tmp_path / "old"):
        for weight in again.parameters():
            weight.data.zero_()
        again.load(folder)
        assert all(torch.equal(one, two) for one, two in zip(learns.parameters(), again.parameters(), strict=True))
    # Averages of snapshots have one naming, whichever the file has.
    averages = {key: weight.detach() + 1 for key, weight in learns.named().items()}
    for folder in (tmp_path, tmp_path / "old"):
        made = load_file(saved.with_averages(folder / adapters.FILE, averages, tmp_path / "averaged.safetensors"))
        assert all(torch.equal(made[key], w + 1) for key, w in load_file(folder / adapters.FILE).items() if w.dim())


def test_a_layer_under_two_names_is_refused(sdxl_places, tmp_path, capsys):
    """As a program leaves it that adds files up key by key: one name would win without a word."""
    trained(loaded(sdxl_places), rank=2).save(tmp_path, output_kohya_format=True)
    stored = load_file(tmp_path / adapters.KOHYA_FILE)
    files.save(
        stored | {files.own_key(key): weight.clone() for key, weight in stored.items() if files.is_sgm_key(key)},
        tmp_path / "mixed",
        {},
    )
    with pytest.raises(SystemExit):
        files.read(tmp_path / "mixed")
    assert "under two names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["lora_unet_middle_block_0_in_layers_0.w_norm"], "not understood"),
        (["lora_unet_middle_block_2_out_layers_0.b_norm"], "not understood"),
        (["lora_unet_x.lokr_w1", "lora_unet_x.lokr_w2", "lora_unet_x.dora_scale"], "DoRA of another kind"),
        (["lora_unet_x.hada_w1_a", "lora_unet_x.dora_scale", "lora_unet_x.alpha"], "DoRA of another kind"),
        (["lora_unet_x.lora_down.weight"], "only one of the two matrices"),
    ],
)
def test_kinds_that_are_not_supported_are_refused_in_one_sentence(keys, says, tmp_path, capsys):
    files.save({key: torch.ones(() if "alpha" in key else (2, 2)) for key in keys}, tmp_path / "strange", {})
    with pytest.raises(SystemExit):
        files.read(tmp_path / "strange")
    said = capsys.readouterr().err
    assert says in said and said.count("error:") == 1


def test_every_layer_of_the_published_networks_has_a_name_that_leads_back():
    from diffusers import UNet2DConditionModel

    for config in PUBLISHED.values():
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
}


@pytest.mark.parametrize("model", ["sd1", "sdxl", "sdxl_places"])
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
def test_a_file_of_a_pissa_run_of_an_earlier_version_is_an_ordinary_lora(model, request, tmp_path):
    """The second half of its ranks is the frozen start with the opposite sign; the header says twice rank and alpha."""
    import infer

    folder, rank, alpha = request.getfixturevalue(model), 2, 3
    pipeline, weights, learned = stock(folder), {}, {}
    for name, layer in pipeline.unet.named_modules():
        if name.rpartition("attn")[2][2:] not in ("to_q", "to_k", "to_v", "to_out.0"):
            continue
        generator = torch.Generator().manual_seed(len(weights))
        left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        root = (values[:rank] * rank / alpha).sqrt()
        up, down = left[:, :rank] * root, root[:, None] * right[:rank]
        moved_up, moved_down = (half + 0.2 * torch.randn(half.shape, generator=generator) for half in (up, down))
        weights[f"unet.{name}.lora.down.weight"] = torch.cat([moved_down, down])
        weights[f"unet.{name}.lora.up.weight"] = torch.cat([moved_up, -up], dim=1)
        learned[f"unet.{name}.lora.up.weight"] = up  # an average at the start: what it adds is zero with `down` so too
        learned[f"unet.{name}.lora.down.weight"] = down
        layer.weight.data += alpha / rank * (moved_up @ moved_down - up @ down)
    config = {"r": 2 * rank, "lora_alpha": 2 * alpha, "lora_dropout": 0.0, "use_dora": False, "rank_pattern": {}}
    config |= {"target_modules": ["to_k", "to_out.0", "to_q", "to_v"], "alpha_pattern": {}}
    header = {"format": "pt", "ss_network_dim": str(2 * rank), "ss_network_alpha": str(2 * alpha)}
    header[files.METADATA] = json.dumps({f"unet.{key}": value for key, value in config.items()})
    (tmp_path / adapters.FILE).write_bytes(safetensors_save(weights, header))

    wanted, base = drawn(pipeline), drawn(stock(folder))
    assert abs(wanted - base).max() > 0.01
    adapters.write_kohya(tmp_path)
    for name in (adapters.FILE, adapters.KOHYA_FILE):
        pipeline = stock(folder)
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        assert abs(drawn(pipeline) - wanted).max() < 1e-4, name
    family = loaded(folder)
    again = adapters.attach(family, rank=2 * rank, alpha=2 * alpha)
    again.load(tmp_path)
    assert abs(drawn(family.pipeline()) - wanted).max() < 1e-4
    words = f"--pretrained_model_name_or_path '{folder}' --lora '{tmp_path}' --prompt dog --num_images 1"
    words += f" --num_inference_steps 1 --height 64 --width 64 --device cpu --output_dir '{tmp_path / 'drawn'}'"
    assert infer.main(infer.parse_args(shlex.split(words)))[0].is_file()
    # Averages of such a run are of the half that learned.
    saved.with_averages(tmp_path / adapters.FILE, learned, tmp_path / "averaged.safetensors")
    pipeline = stock(folder)
    pipeline.load_lora_weights(tmp_path, weight_name="averaged.safetensors")
    assert abs(drawn(pipeline) - base).max() < 1e-4


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_dora_comes_back_from_kohyas_naming(model, request, tmp_path):
    """diffusers' own reader leaves out dora_scale, with a warning; what it knows of the names is tested above."""
    folder = request.getfixturevalue(model)
    family = loaded(folder)
    options = {"rank": 2, "alpha": 3, "dora": True, "text_encoder": True, "lora_conv_rank": 2}
    trained(family, **options).save(tmp_path)
    as_lycoris_keeps_dora(tmp_path)
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
    trained(family, rank=2, alpha=3, dora=True, text_encoder=True).save(tmp_path)
    as_lycoris_keeps_dora(tmp_path)
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


# --- What a run leaves for kohya's programs ----------------------------------------------------------------------


@pytest.fixture
def train(sd1, photos, tmp_path):
    def run(words="", name="dog", script="train_dreambooth_lora", model=sd1):
        module = importlib.import_module(script)
        options = (
            f"--pretrained_model_name_or_path '{model}' --output_dir '{tmp_path / name}' --report_to none --seed 3"
            f" --instance_data_dir '{photos}' --instance_prompt 'a photo of sks dog, outdoors' --rank 2 --lora_alpha 3"
            f" --train_batch_size 1 --learning_rate 1e-2 --checkpointing_steps 1 --scores none"
        )
        options += "" if "--max_train_steps" in words else " --max_train_steps 1"
        module.main(module.parse_args(shlex.split(f"{options} {words}")))
        return tmp_path / name

    return run


def header_of(file):
    with safe_open(str(file), framework="pt") as stored:
        return stored.metadata()


def test_a_run_leaves_a_file_for_kohyas_programs(train, sd1, photos, tmp_path):
    folder = train("--train_text_encoder --noise_offset 0.1 --snr_gamma 5")
    assert not (folder / "checkpoint-1" / adapters.KOHYA_FILE).exists()
    assert saved.lora_file(str(folder), []) == folder / adapters.FILE  # what infer.py draws with
    stored, header = load_file(folder / adapters.KOHYA_FILE), header_of(folder / adapters.KOHYA_FILE)
    assert {key.rsplit("_", 1)[0][:8] for key in stored} == {"lora_une", "lora_te_"}
    assert {weight.item() for key, weight in stored.items() if key.endswith(".alpha")} == {3.0}
    assert {weight.dtype for weight in stored.values()} == {torch.float32}
    pipelines = [stock(sd1), stock(sd1)]
    for pipeline, name in zip(pipelines, (adapters.FILE, adapters.KOHYA_FILE)):
        pipeline.load_lora_weights(folder, weight_name=name)
    one, two = map(drawn, pipelines)
    assert abs(one - two).max() < 1e-4 < 0.001 < abs(one - drawn(stock(sd1))).max()

    count = len(list(photos.iterdir()))
    want = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "dog",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "a photo of sks dog, outdoors",
        "ss_output_name": "dog",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "3",
        "ss_learning_rate": "0.01",
        "ss_optimizer": "adamw",
        "ss_lr_scheduler": "constant",
        "ss_seed": "3",
        "ss_steps": "1",
        "ss_max_train_steps": "1",
        "ss_epoch": "1",
        "ss_num_train_images": str(count),
        "ss_num_reg_images": "0",
        "ss_num_batches_per_epoch": str(count),
        "ss_batch_size_per_device": "1",
        "ss_total_batch_size": "1",
        "ss_resolution": "(64, 64)",
        "ss_mixed_precision": "no",
        "ss_noise_offset": "0.1",
        "ss_min_snr_gamma": "5.0",
        "ss_loss_type": "l2",
        "ss_random_crop": "True",
    }
    assert {key: header.get(key) for key in want} == want
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", header["modelspec.date"])
    assert 0 <= float(header["ss_training_finished_at"]) - float(header["ss_training_started_at"]) < 600
    name = "1_images"
    assert json.loads(header["ss_dataset_dirs"]) == {name: {"n_repeats": 1, "img_count": count}}
    assert json.loads(header["ss_tag_frequency"]) == {name: {"a photo of sks dog": count, "outdoors": count}}
    text = json.dumps(header)
    assert not any(str(path) in text for path in (sd1, photos, tmp_path)) and "/tmp" not in text
    assert adapters.METADATA not in header  # diffusers refuses alphas beside it
    both = header_of(folder / adapters.FILE)
    assert {key: both.get(key) for key in want} == want and not [key for key in both if key.startswith("sshs")]
    assert sorted(key for key in header if key.startswith("sshs")) == ["sshs_legacy_hash", "sshs_model_hash"]

    # Half precision, and a run that wants none: then an earlier one's does not stay.
    train("--overwrite_output_dir --kohya_dtype fp16")
    assert {weight.dtype for weight in load_file(folder / adapters.KOHYA_FILE).values()} == {torch.float16}
    train("--resume_from_checkpoint latest --max_train_steps 2 --output_kohya_format no")
    assert (folder / adapters.FILE).exists() and not (folder / adapters.KOHYA_FILE).exists()


def test_of_dora_no_file_is_left_that_others_misread(train, capsys):
    folder = train("--use_dora")
    said = capsys.readouterr().out
    assert not (folder / adapters.KOHYA_FILE).exists()
    assert f"python -m utils.adapters export {folder} dora.safetensors --dora diff (or --dora lora --rank 16)" in said
    with pytest.raises(SystemExit):
        train("--use_dora --output_kohya_format", "other")
    said = capsys.readouterr().err
    assert "--output_kohya_format with --use_dora" in said and "export" in said and "--dora diff" in said


def test_loha_is_in_kohyas_naming_as_it_is(train):
    folder = train("--adapter loha")
    assert not (folder / adapters.KOHYA_FILE).exists()
    header = header_of(folder / adapters.FILE)
    assert header["ss_network_module"] == "lycoris.kohya" and header["ss_steps"] == "1" and "sshs_model_hash" in header


def test_the_file_of_sdxl_and_of_a_pivotal_run(train, sdxl):
    words = "--train_text_encoder_ti --text_encoder_lr 1e-3 --token_abstraction sks --use_ema"
    folder = train(words, "xl", "train_dreambooth_lora_sdxl", sdxl)
    header = header_of(folder / adapters.KOHYA_FILE)
    assert header["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert header["ss_base_model_version"] == "sdxl_base_v1-0" and header["ss_steps"] == "1"
    one, two = (files.read(folder / name)[0]["unet"] for name in (adapters.FILE, adapters.KOHYA_FILE))
    assert (
        all(torch.allclose(parts["up"], two[layer]["up"]) for layer, parts in one.items()) and one.keys() == two.keys()
    )


def test_a_weight_too_large_for_half_precision_leaves_the_file_out_and_is_said(sd1, tmp_path, capsys):
    learns = trained(loaded(sd1), rank=2)
    learns.save(tmp_path, output_kohya_format=True)
    with torch.no_grad():
        learns.parameters()[0][0, 0] = 1e5
    learns.save(tmp_path, output_kohya_format=True, kohya_dtype="fp16")
    assert "--kohya_dtype fp16" in capsys.readouterr().err and not (tmp_path / adapters.KOHYA_FILE).exists()
    assert load_file(tmp_path / adapters.FILE)


def test_hashes_are_those_that_kohyas_scripts_compute(tmp_path):
    """sd-scripts serializes the weights with the ss_ entries alone, then hashes what follows the header, and the 64 KiB
    at one MiB."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"lora_unet_{n}.diff": torch.randn(500, 400, generator=generator) for n in range(3)}
    header = {"format": "pt", "ss_seed": "3", "modelspec.title": "x" * 5000, "ss_steps": "7"}
    files.save(weights, tmp_path / "a.safetensors", header, hashed=True)
    told = header_of(tmp_path / "a.safetensors")
    data = safetensors_save(weights, {"ss_seed": "3", "ss_steps": "7"})
    start = 8 + int.from_bytes(data[:8], "little")
    assert told["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    assert told["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert {key: told[key] for key in header} == header
    # A1111 computes the first one from the file itself, where it is not told.
    whole = (tmp_path / "a.safetensors").read_bytes()
    assert told["sshs_model_hash"] == hashlib.sha256(whole[8 + int.from_bytes(whole[:8], "little") :]).hexdigest()


def test_frequent_tags_of_large_sets_only():
    from types import SimpleNamespace as Fake

    rows = [Fake(caption=("a dog, Park", f"tag {n}"), repeats=2, concept=0) for n in range(3000)]
    told = adapters.metadata._of_images([*rows, Fake(caption="ink", repeats=1, concept=1)], repeats=3)
    tags = json.loads(told["ss_tag_frequency"])
    assert len(tags["6_images"]) == adapters.metadata.MOST_TAGS and tags["6_images"]["park"] == 3000
    assert json.loads(told["ss_dataset_dirs"])["3_images_2"] == {"n_repeats": 3, "img_count": 1}
    assert adapters.metadata._of_images([], 1) == {}


def test_clip_skip_is_told_as_kohya_counts_it_and_secrets_are_not_told():
    """There 1 means the last layer, here that one is left out."""
    from types import SimpleNamespace as Fake

    from utils.datasets import DreamBooth

    accelerator = Fake(mixed_precision="fp16")
    config = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "clip_skip": 1}
    config |= {"concepts_list": [{"instance_prompt": "a"}, {"instance_prompt": "my hf_abcdefghijklmnopqrstuvwx"}]}
    run = Fake(config=config, world=2, seed=1, step=5, total=9, accelerator=accelerator)
    run.session = {"began": "2026-01-02 03:04:05"}
    told = adapters.metadata.of_run(run, DreamBooth([], size=64))
    assert (told["ss_clip_skip"], told["modelspec.encoder_layer"], told["ss_total_batch_size"]) == ("2", "2", "12")
    assert told["modelspec.trigger_phrase"] == "a, my [secret]"
