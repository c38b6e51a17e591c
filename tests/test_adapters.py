"""LoRA and DoRA: start at the base, learn in fp32, save and load exactly, mean the same in stock diffusers."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models import batch_of, drawn, loaded, predict_once

from utils import adapters


def trained(family, scale=0.2, **options):
    """Adapters as after some training: every weight moved."""
    learns = adapters.attach(family, **options)
    with torch.no_grad():
        for number, weight in enumerate(learns.parameters()):
            weight.add_(scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    family.unet.eval()
    family.text_encoder.eval()
    return learns


def stock(folder, model):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(folder))
    return pipeline


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_untrained_adapters_change_nothing(sd1, dora, text_encoder):
    family = loaded(sd1)
    base = predict_once(family)
    learns = adapters.attach(family, dora=dora, text_encoder=text_encoder)
    assert torch.allclose(predict_once(family), base, atol=0 if not dora else 1e-5)
    assert set(family.trainable) == set(learns.modules) == {"unet", *(["text_encoder"] if text_encoder else [])}


def test_only_adapters_learn_and_every_one_gets_a_gradient(sd1):
    family = loaded(sd1)
    learns = adapters.attach(family, rank=3, dora=True, text_encoder=True)
    frozen = {n: p.clone() for n, p in family.unet.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(learns.parameters(), lr=0.1)
    for _ in range(2):  # B starts at zero, so A gets its first gradient in the second step
        optimizer.zero_grad()
        predict_once(family).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learns.parameters())
    ours = {id(p) for p in learns.parameters()}
    assert all((id(p) in ours) == p.requires_grad for m in learns.modules.values() for p in m.parameters())
    assert all(torch.equal(p, frozen[n]) for n, p in family.unet.named_parameters() if n in frozen)
    assert all(p.grad is None for n, p in family.unet.named_parameters() if n in frozen)


@pytest.mark.parametrize("dora", [False, True])
def test_half_precision_base_with_adapters_in_full_precision(sd1, dora):
    family = loaded(sd1, torch.bfloat16)
    learns = adapters.attach(family, dora=dora, text_encoder=True)
    assert {p.dtype for p in learns.parameters()} == {torch.float32}
    assert family.unet.conv_in.weight.dtype == torch.bfloat16
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            predict_once(family).square().mean().backward()
    up = [p for key, p in learns.named().items() if key.endswith(".up.weight")]
    assert up and all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in up)
    # An update far below the base's resolution is kept.
    weight = up[0]
    with torch.no_grad():
        weight.fill_(1.0).add_(1e-5)
    assert weight.unique().item() > 1.0
    assert drawn(family.pipeline()).shape == (2, 64, 64, 3)  # and such a mixture samples


def test_dora_on_a_half_precision_base_starts_at_the_exact_lengths(sd1):
    family = loaded(sd1, torch.bfloat16)
    adapters.attach(family, dora=True, targets=["to_q", "conv1"])
    layers = [layer for layer in family.unet.modules() if getattr(layer, "lora_magnitude_vector", None)]
    assert {type(layer.base_layer) for layer in layers} == {torch.nn.Linear, torch.nn.Conv2d}
    for layer in layers:
        exact = layer.base_layer.weight.float().flatten(1).norm(dim=1)
        found = layer.lora_magnitude_vector[adapters.ADAPTER].weight
        assert torch.allclose(found.flatten(), exact, rtol=1e-6, atol=0)


def test_start_depends_on_the_seed_and_the_name_only(sd1):
    first, again, other = (adapters.attach(loaded(sd1), seed=seed).named() for seed in (1, 1, 2))
    torch.manual_seed(99)
    assert all(torch.equal(first[key], again[key]) for key in first)
    downs = [key for key in first if key.endswith(".down.weight")]
    assert not any(torch.equal(first[key], other[key]) for key in downs)
    assert len({first[key].flatten()[0].item() for key in downs}) == len(downs)  # no two layers start alike
    few = adapters.attach(loaded(sd1), seed=1, targets="to_v").named()
    assert few and all(torch.equal(first[key], few[key]) for key in few)
    everything = torch.cat([first[key].flatten() for key in downs])
    assert abs(everything.std().item() * 4 - 1) < 0.05  # std 1 / rank


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_saved_file_loads_bit_for_bit(sd1, tmp_path, dora, text_encoder):
    options = {"rank": 3, "alpha": 6, "dora": dora, "text_encoder": text_encoder}
    learns = trained(loaded(sd1), **options)
    learns.save(tmp_path)
    fresh = adapters.attach(loaded(sd1), seed=5, **options)
    places = [p.data_ptr() for p in fresh.parameters()]
    fresh.load(tmp_path)
    assert places == [p.data_ptr() for p in fresh.parameters()]  # in place: an optimizer keeps hold of them
    assert list(learns.named()) == list(fresh.named())
    assert all(torch.equal(a, b) for a, b in zip(learns.parameters(), fresh.parameters()))
    assert {w.dtype for w in load_file(tmp_path / adapters.FILE).values()} == {torch.float32}


@pytest.mark.parametrize("model", ["sd1", "sd2"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_stock_diffusers_draws_the_same_with_the_file(model, dora, text_encoder, request, tmp_path):
    folder = request.getfixturevalue(model)
    family = loaded(folder)
    base = drawn(family.pipeline())
    # alpha differs from rank: a reader that ignored it would draw something else.
    trained(family, rank=2, alpha=6, dora=dora, text_encoder=text_encoder).save(tmp_path)
    ours = drawn(family.pipeline())
    assert abs(ours - base).max() > 0.01
    assert abs(drawn(stock(tmp_path, folder)) - ours).max() < 1e-5


def test_the_file_says_what_older_readers_look_up(sd1, tmp_path):
    """diffusers 0.38 takes these from the header without a default; its `load_lora_weights` fails on a file without."""
    trained(loaded(sd1), rank=2, text_encoder=True).save(tmp_path)
    with adapters.safe_open(str(tmp_path / adapters.FILE), framework="pt") as stored:
        config = json.loads(stored.metadata()[adapters.METADATA])
    for name in ("unet", "text_encoder"):
        assert config[f"{name}.rank_pattern"] == config[f"{name}.alpha_pattern"] == {}
        assert {config[f"{name}.r"], config[f"{name}.lora_alpha"]} == {2}


def test_unet_alone_takes_the_file(sd1, tmp_path):
    family = loaded(sd1)
    trained(family, rank=2, alpha=6).save(tmp_path)
    ours = predict_once(family)
    other = loaded(sd1)
    other.unet.load_lora_adapter(str(tmp_path), prefix="unet", weight_name=adapters.FILE)
    assert torch.allclose(predict_once(other), ours, atol=1e-6)


def test_file_equals_weights_merged_by_hand(sd1, tmp_path):
    family = loaded(sd1)
    trained(family, rank=2, alpha=6).save(tmp_path)
    ours = predict_once(family)
    weights = load_file(tmp_path / adapters.FILE)
    plain = loaded(sd1)
    state = plain.unet.state_dict()
    for key in weights:
        if key.endswith(".lora.down.weight"):
            layer = key.removeprefix("unet.").removesuffix(".lora.down.weight")
            up = weights[key.replace(".down.", ".up.")]
            state[f"{layer}.weight"] += 6 / 2 * (up @ weights[key])
    plain.unet.load_state_dict(state)
    assert torch.allclose(predict_once(plain), ours, atol=1e-5)


def test_other_layers_can_be_chosen_also_convolutions(sd1, tmp_path):
    targets = ["attn2.to_k", "ff.net.2", "proj_in", "conv1"]
    family = loaded(sd1)
    learns = trained(family, rank=2, targets=targets)
    layers = {key.split(".lora.")[0] for key in learns.named()}
    assert layers and all(layer.endswith(tuple(targets)) for layer in layers)
    assert all(any(layer.endswith(target) for layer in layers) for target in targets)
    learns.save(tmp_path)
    assert abs(drawn(stock(tmp_path, sd1)) - drawn(family.pipeline())).max() < 1e-5


def test_layers_that_do_not_exist_are_refused(sd1, capsys):
    with pytest.raises(SystemExit) as stop:
        adapters.attach(loaded(sd1), targets="to_k,to_kk")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--lora_target_modules to_kk" in said


def test_names_for_one_network_leave_the_other_at_its_default(sd1):
    learns = adapters.attach(loaded(sd1), targets="to_v", text_encoder=True)
    assert learns.describe() == {
        "method": "lora",
        "rank": 4,
        "alpha": 4,
        "targets": {"unet": ["to_v"], "text_encoder": ["k_proj", "out_proj", "q_proj", "v_proj"]},
    }


def test_file_says_what_it_is(sd1, tmp_path):
    learns = trained(loaded(sd1), rank=2, alpha=6, dora=True, text_encoder=True)
    learns.save(tmp_path / "local")
    learns.base = "someone/some-model"
    learns.save(tmp_path / "hub")
    with safe_open(str(tmp_path / "local" / adapters.FILE), "pt") as stored:
        keys, header = list(stored.keys()), stored.metadata()
    assert all(key.startswith(("unet.", "text_encoder.text_model.encoder.layers.")) for key in keys)
    assert any(key.endswith(".to_out.0.lora.up.weight") for key in keys)
    assert any(key.endswith(".q_proj.lora_linear_layer.down.weight") for key in keys)
    assert str(sd1) not in json.dumps(header)  # a folder of this machine is nobody else's business
    want = {"base_model": None, "rank": 2, "alpha": 6, "dora": True, "modules": ["text_encoder", "unet"]}
    assert adapters.read_metadata(tmp_path / "local") == want
    assert adapters.read_metadata(tmp_path / "hub" / adapters.FILE) == want | {"base_model": "someone/some-model"}
    save_file({"unet.x.lora.down.weight": torch.zeros(5, 7)}, tmp_path / "bare.safetensors")
    assert adapters.read_metadata(tmp_path / "bare.safetensors")["rank"] == 5


@pytest.mark.parametrize("change", ["rank", "targets", "dora", "missing"])
def test_file_of_other_adapters_is_refused(sd1, tmp_path, capsys, change):
    options = {"rank": {"rank": 8}, "targets": {"targets": "to_k"}, "dora": {"dora": True}}.get(change, {})
    adapters.attach(loaded(sd1), **options).save(tmp_path)
    if change == "missing":
        weights = load_file(tmp_path / adapters.FILE)
        gone = next(iter(weights))
        save_file({k: w for k, w in weights.items() if k != gone}, tmp_path / adapters.FILE)
    learns = adapters.attach(loaded(sd1))
    before = [p.clone() for p in learns.parameters()]
    with pytest.raises(SystemExit) as stop:
        learns.load(tmp_path)
    assert stop.value.code == 2
    assert "does not fit" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(before, learns.parameters()))  # nothing half-loaded


def test_dropout_acts_in_training_only(sd1):
    family = loaded(sd1)
    trained(family, dropout=0.5)
    assert torch.equal(predict_once(family), predict_once(family))
    family.unet.train()
    assert not torch.equal(predict_once(family), predict_once(family))


def test_trained_text_encoder_is_run_anew_and_gets_gradients(sd1):
    family = loaded(sd1)
    learns = adapters.attach(family, text_encoder=True)
    with pytest.raises(ValueError, match="learns"):
        family.cache_prompts(["a photo of sks dog"])
    text = family.condition(batch_of())["text"]
    assert text.requires_grad
    with torch.no_grad():
        for weight in learns.parameters():
            weight.add_(0.1)
    assert not torch.allclose(family.condition(batch_of())["text"], text)
    assert not family.sampling_prompts(["a red cat"])["prompt_embeds"].requires_grad


def test_the_file_in_a_checkpoint_is_titled_by_the_run_and_not_by_its_staging_folder(sd1, tmp_path):

    folder = tmp_path / "dog" / ".tmp-checkpoint-20-0123abcd"
    trained(loaded(sd1)).save(folder)
    with safe_open(str(folder / "pytorch_lora_weights.safetensors"), framework="pt") as stored:
        assert stored.metadata()["modelspec.title"] == "dog-step20"
