"""The Stable Diffusion family: loading, cached prompts, the training forward, stock pipelines in and out."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from utils import adapters, learning, models
from utils.randomness import Draws


def loaded(folder, dtype=torch.float32, **options):
    family = models.family_of(str(folder))
    family.load("cpu", dtype, **options)
    return family


def batch_of(count=2, size=64):
    captions = ["a photo of sks dog", "a photo of a red cat"][:count]
    return {"pixels": torch.rand(count, 3, size, size) * 2 - 1, "captions": captions}


def predict_once(family, dtype=torch.float32):
    inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return family.predict(inputs, torch.tensor([10, 700]), family.condition(batch_of()))


def drawn(pipeline, steps=3, **options):
    options = options or {"prompt": ["a photo of sks dog", "a red cat"]}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipeline(**options, num_inference_steps=steps, generator=generators, output_type="np").images


# --- Which family ------------------------------------------------------------------------------------------------


def test_short_names_of_embedded_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert models.resolve("toybox") == str(models.ROOT / "toybox/sd")
    assert models.resolve("some/model") == "some/model"
    (tmp_path / "toybox").mkdir()  # a folder of another purpose does not hide the model
    assert models.resolve("toybox") == str(models.ROOT / "toybox/sd")
    (tmp_path / "toybox" / "model_index.json").write_text("{}")
    assert models.resolve("toybox") == "toybox"


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"_class_name": "IFPipeline"}, "IF comes with its family"),
        ({"_class_name": "AltDiffusionPipeline"}, "its text encoder is of another kind"),
        (None, "without model_index.json"),
        ("{", "not valid JSON"),
    ],
)
def test_models_it_cannot_train_are_refused(tmp_path, capsys, index, says):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(SystemExit) as stop:
        models.family_of(str(tmp_path))
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_in_painting_and_missing_weights_are_refused(sd1, tmp_path, capsys):
    for name, says in [("nine", "9 for in-painting"), ("bin", "safetensors")]:
        folder = shutil.copytree(sd1, tmp_path / name)
        if name == "nine":
            import tiny

            unet = tiny.unet()
            unet.register_to_config(in_channels=9)
            unet.conv_in = torch.nn.Conv2d(9, 8, 3, padding=1)
            unet.save_pretrained(folder / "unet")
        else:
            weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
            weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(SystemExit) as stop:
            loaded(folder)
        assert stop.value.code == 2
        assert says in capsys.readouterr().err


# --- Loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_frozen_in_the_wanted_precision(sd1, dtype):
    family = loaded(sd1, dtype)
    for name in family.names:
        module = getattr(family, name)
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert not any(p.requires_grad for p in module.parameters())
    assert family.trainable == {}
    assert (family.latent_channels, family.resolution_default, family.prompt_limit) == (4, 64, 77)


def test_text_encoder_weights_are_those_on_disk(sd1):
    from safetensors.torch import load_file

    stored = load_file(sd1 / "text_encoder" / "model.safetensors")
    here = loaded(sd1).text_encoder.state_dict()
    assert {key.removeprefix("text_model.") for key in stored} == {key.removeprefix("text_model.") for key in here}
    for key, weight in here.items():
        assert torch.equal(weight, stored[f"text_model.{key.removeprefix('text_model.')}"])


def test_scheduler_follows_the_model_and_can_be_overridden(sd1, sd2):
    assert loaded(sd1).scheduler.config.prediction_type == "epsilon"
    assert loaded(sd2).scheduler.config.prediction_type == "v_prediction"
    family = models.family_of(str(sd1), prediction_type="v_prediction")
    family.load("cpu", torch.float32)
    assert family.scheduler.config.prediction_type == "v_prediction"
    # What is sampled and saved must agree with what was trained.
    assert family.pipeline().scheduler.config.prediction_type == "v_prediction"
    assert type(family.pipeline().scheduler).__name__ == "PNDMScheduler"
    assert family.pipeline_from_disk(torch.float32).scheduler.config.prediction_type == "v_prediction"


def test_another_vae_from_its_own_folder_or_a_pipeline(sd1, sd2):
    want = loaded(sd2).vae.encoder.conv_in.weight
    for source in (sd2 / "vae", sd2):
        assert torch.equal(loaded(sd1, vae=str(source)).vae.encoder.conv_in.weight, want)
    assert not torch.equal(loaded(sd1).vae.encoder.conv_in.weight, want)


# --- Images ------------------------------------------------------------------------------------------------------


def test_latents_from_pixels_equal_latents_from_the_cached_posterior(sd1):
    family, batch = loaded(sd1), batch_of()
    mean, std = family.posterior(batch["pixels"])
    assert mean.shape == std.shape == (2, 4, 8, 8)
    direct = family.latents(batch, Draws(3, [0, 2]))
    cached = family.latents({"latent_mean": mean, "latent_std": std}, Draws(3, [0, 2]))
    assert torch.equal(direct, cached)
    # Really a sample of that distribution: mean and scale from the stock VAE, fresh noise for other ids.
    stock = family.vae.encode(batch["pixels"]).latent_dist
    noise = Draws(3, [0, 2]).normal("posterior", (4, 8, 8))
    assert torch.allclose(direct, (stock.mean + stock.std * noise) * 0.18215, atol=1e-6)
    assert not torch.equal(direct, family.latents(batch, Draws(3, [4, 6])))


def test_released_image_encoder_is_freed_and_the_decoder_still_draws(sd1):
    family = loaded(sd1)
    before = drawn(family.pipeline())
    gone = weakref.ref(family.vae.encoder)
    family.release_image_encoder()
    assert gone() is None
    assert (drawn(family.pipeline()) == before).all()
    with pytest.raises(RuntimeError, match="released"):
        family.posterior(batch_of()["pixels"])


# --- Prompts -----------------------------------------------------------------------------------------------------


def test_prompts_encode_as_in_the_stock_pipeline(sd1):
    family = loaded(sd1)
    texts = ["a photo of sks dog", "", "unicode: déjà vu 🐕"]
    ours = family.encode_prompts(texts)["text"]
    theirs, _ = family.pipeline_from_disk(torch.float32).encode_prompt(texts, "cpu", 1, False)
    assert ours.shape == (3, 77, 16)
    assert torch.equal(ours, theirs)


def test_frozen_encoder_runs_once_per_prompt_and_is_then_freed(sd1):
    family = loaded(sd1)
    want = family.encode_prompts(["a photo of sks dog", "a photo of a red cat"])["text"]
    seen = []
    family.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    prompts = ["a photo of sks dog", "a photo of a red cat", "a photo of sks dog"]
    family.cache_prompts(prompts * 3, release=False)
    assert sum(seen) == 3  # two prompts and the empty one
    family.cache_prompts(prompts)
    assert sum(seen) == 3
    got = family.condition(batch_of())["text"]
    assert torch.allclose(got, want.detach(), atol=1e-6)
    assert not got.requires_grad
    assert family.text_encoder is None


def test_released_text_encoder_leaves_no_reference(sd1):
    family = loaded(sd1)
    family.configure(gradient_checkpointing=True)
    weights = [weakref.ref(weight) for weight in family.text_encoder.parameters()]
    family.cache_prompts(["a photo of sks dog"])
    gc.collect()
    assert weights and all(ref() is None for ref in weights)
    # Only the rows themselves stay, not the batches they were computed in.
    assert all(
        row.untyped_storage().nbytes() == 77 * 16 * 4 for rows in family._prompts.values() for row in rows.values()
    )
    with pytest.raises(RuntimeError, match="released"):
        family.condition({"captions": ["never seen before"]})


def test_sampling_after_the_encoder_was_released_draws_the_same(sd1):
    family = loaded(sd1)
    prompts = ["a photo of sks dog", "a red cat"]
    before = drawn(family.pipeline(), prompt=prompts, negative_prompt=["blue"] * 2)
    family.cache_prompts([*prompts, "blue"])
    after = drawn(family.pipeline(), **family.sampling_prompts(prompts, "blue"))
    assert abs(before - after).max() < 1e-5
    assert abs(drawn(family.pipeline(), **family.sampling_prompts(prompts)) - after).max() > 1e-3


def test_prompts_beyond_the_limit_are_named_once(sd1, capsys):
    family = loaded(sd1)
    text = "dog " * 75 + "red cat"
    family.encode_prompts([text, text])
    family.encode_prompts([text])
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "red cat" in said and "dog" not in said
    family.encode_prompts(["🐕🚗" * 15])  # few letters, many tokens
    assert capsys.readouterr().err.count("warning") == 1
    assert family.cut_text("dog " * 75) == ""  # exactly full
    family.encode_prompts(["dog " * 75])
    assert capsys.readouterr().err == ""


# --- The training forward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_predict_is_the_unets_forward(model, request):
    family = loaded(request.getfixturevalue(model))
    got = predict_once(family)
    inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    text = family.encode_prompts(batch_of()["captions"])["text"]
    assert torch.equal(got, family.unet(inputs, torch.tensor([10, 700]), text).sample)


def test_half_precision_base_with_and_without_autocast(sd1):
    exact = predict_once(loaded(sd1))
    family = loaded(sd1, torch.bfloat16)
    plain = predict_once(family)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = predict_once(family)
    for got in (plain, under_autocast):
        assert got.dtype == torch.float32
        assert 0 < (got - exact).abs().max() < 0.1


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_gradient_checkpointing_changes_no_gradient(sd1, method, text_encoder):
    gradients, calls = [], []
    for checkpointing in (False, True):
        family = loaded(sd1)
        attach = learning.full if method == "full" else adapters.attach
        learns = attach(family, text_encoder=text_encoder)
        for number, weight in enumerate(learns.parameters()):  # LoRA's B starts at zero, which would hide gradients
            with torch.no_grad():
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        family.configure(gradient_checkpointing=checkpointing)
        layer = (family.text_encoder if text_encoder else family.unet).get_submodule(
            "encoder.layers.0" if text_encoder else "up_blocks.1.resnets.0.norm1"
        )
        count = []
        inner = layer.self_attn if text_encoder else layer
        inner.register_forward_hook(lambda *_, count=count: count.append(1))
        predict_once(family).square().mean().backward()
        calls.append(len(count))
        gradients.append([weight.grad for weight in learns.parameters()])
    assert calls == [1, 2]  # it really recomputes
    for plain, recomputed in zip(*gradients):
        assert plain is not None and plain.abs().sum() > 0
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_xformers_is_refused_where_it_cannot_work(sd1, capsys):
    family = loaded(sd1)
    with pytest.raises(SystemExit) as stop:
        family.configure(xformers=True)
    assert stop.value.code == 2
    assert "--enable_xformers_memory_efficient_attention" in capsys.readouterr().err


# --- Wrappers, saving --------------------------------------------------------------------------------------------


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_train_but_never_reach_files_or_pipelines(sd1, tmp_path, one_process_group):
    family = loaded(sd1)
    learns = learning.full(family, text_encoder=True)
    calls = []
    for name, module in learns.modules.items():
        wrapped = DistributedDataParallel(module)
        wrapped.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        family.use(name, wrapped)
    predict_once(family).mean().backward()
    assert calls == ["text_encoder", "unet"]
    with torch.no_grad():  # processes may draw different pictures: a DDP forward would wait for the others
        predict_once(family)
    family.sampling_prompts(["a red cat"])
    assert calls == ["text_encoder", "unet"]
    assert family.pipeline().unet is family.unet
    family.save_pipeline(tmp_path / "out")
    learns.save(tmp_path / "weights")
    files = [*(tmp_path / "out").rglob("*.safetensors"), *(tmp_path / "weights").rglob("*.safetensors")]
    assert len(files) == 5
    from safetensors import safe_open

    for file in files:
        with safe_open(str(file), "pt") as stored:
            assert not any(key.startswith(("module.", "_orig_mod.")) for key in stored.keys())  # noqa: SIM118


def test_compiled_wrapper(sd1):
    family = loaded(sd1)
    eager = predict_once(family)
    family.use("unet", torch.compile(family.unet, backend="eager"))  # the graph capture, without a compiler
    assert torch.allclose(predict_once(family), eager, atol=1e-5)
    assert type(family.pipeline().unet).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize("model", ["sd1", "sd2"])
@pytest.mark.parametrize("text_encoder", [False, True])
def test_saved_pipeline_is_stock_and_draws_the_same(model, text_encoder, request, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    from safetensors import safe_open

    family = loaded(request.getfixturevalue(model))
    learns = learning.full(family, text_encoder=text_encoder)
    before = drawn(family.pipeline())
    with torch.no_grad():
        for weight in learns.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    ours = drawn(family.pipeline())
    assert abs(ours - before).max() > 1e-3
    if not text_encoder:
        family.cache_prompts([])  # released: the folder must hold it all the same
    family.release_image_encoder()
    family.save_pipeline(tmp_path)
    for kind in (DiffusionPipeline, StableDiffusionPipeline):
        pipeline = kind.from_pretrained(tmp_path)
        pipeline.set_progress_bar_config(disable=True)
        assert abs(drawn(pipeline) - ours).max() < 1e-4  # rounding depends on where memory lies
    assert type(pipeline.scheduler).__name__ == "PNDMScheduler"
    with safe_open(str(tmp_path / "text_encoder" / "model.safetensors"), "pt") as stored:
        assert all(key.startswith("text_model.") for key in stored.keys())  # noqa: SIM118
    names = {file.name for file in (tmp_path / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= names
    assert not (tmp_path / "safety_checker").exists()


def test_frozen_parts_are_saved_in_full_precision_after_half_precision_training(sd1, tmp_path):
    family = loaded(sd1, torch.bfloat16)
    learning.full(family)
    family.save_pipeline(tmp_path)
    from safetensors.torch import load_file

    for part in ("vae/diffusion_pytorch_model", "text_encoder/model", "unet/diffusion_pytorch_model"):
        saved, base = (load_file(folder / f"{part}.safetensors") for folder in (tmp_path, sd1))
        assert saved.keys() == base.keys()
        assert all(torch.equal(saved[key], base[key]) for key in base)


def test_another_tokenizer_from_its_folder_or_a_pipeline_and_none_from_elsewhere(sd1, sd2, tmp_path, capsys):
    for source in (sd2 / "tokenizer", sd2):
        assert len(loaded(sd1, tokenizer=str(source)).tokenizer) == len(loaded(sd2).tokenizer)
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "none", "someone/words"):
        with pytest.raises(SystemExit) as stopped:
            loaded(sd1, tokenizer=str(source))
        assert stopped.value.code == 2 and f"--tokenizer_name {source}" in capsys.readouterr().err
