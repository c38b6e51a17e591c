"""PDMBooth: the bank of queries, the loss against it, and the two scripts as their users call them."""

import contextlib
import itertools
import json
import os
import shlex
import signal
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_exactness import Killed, stop  # noqa: F401 - a fixture
from test_scripts import losses, parts, rows, same, train, weights  # noqa: F401 - train is a fixture

from utils import arguments, datasets, models, noise, pdm, randomness, targets
from utils.pdm import features, files
from utils.preflight import plan

BOTH = pytest.mark.parametrize("script", ["train_pdmbooth", "train_pdmbooth_lora"])
PDM = "--use_inst_loss --use_pdm_loss --cls_prompt 'a photo of dog' --pdm_inversion_steps 8 --lr 1e-3 --resolution 64"
LAST = "up_blocks.1.attentions.1.transformer_blocks.0.attn1"


def scheduler():
    return tiny.stable_diffusion().scheduler


def alphas():
    return scheduler().alphas_cumprod.double()


# Rooms


def test_a_tap_costs_nothing_when_off():
    unet = tiny.unet()
    tap, arguments = features.Tap(unet, f"{LAST}.to_q"), (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]))
    before = unet(*arguments, torch.ones(2, 5, 16))[0]
    with tap:
        during = unet(*arguments, torch.ones(2, 5, 16))[0]
    assert tap.taken.shape == (2, 64, 8) and torch.equal(before, during)
    with contextlib.suppress(RuntimeError), tap:
        raise RuntimeError
    assert tap.taken is None and not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_inversion_of_a_network_that_always_sees_the_same_noise(steps, kind):
    """Then x_t = √ᾱ x0 + √(1-ᾱ) ε exactly, however few the steps, on the way there and back; every timestep is asked
    once, the first one twice, and on the way back all but the last once more."""
    clean, noise_, table = torch.randn(2, 4, 4, 4).double(), torch.randn(2, 4, 4, 4).double(), alphas()
    timesteps, asked = pdm.timesteps_of(steps, 1000), []

    def predict(at, t):
        asked.append(t)
        signal, sigma = table[t].sqrt(), (1 - table[t]).sqrt()
        return {"epsilon": noise_, "v_prediction": signal * noise_ - sigma * clean, "sample": clean}[kind]

    there = list(pdm.invert(predict, clean, table, timesteps, kind))
    assert asked == [timesteps[0], *timesteps] and [number for number, _ in there] == list(range(steps))
    asked.clear()
    out, back = [], []
    for number, at in pdm.invert(predict, clean, table, timesteps, kind, back=True):
        (out if number is None else back).append((number, at))
    assert len(out) == steps - 1
    assert asked == [timesteps[0], *timesteps, *timesteps[-2::-1]]
    assert [number for number, _ in back] == list(range(steps))[::-1]
    if kind == "epsilon":
        for number, at in there + back:
            t = timesteps[number]
            assert torch.allclose(at, table[t].sqrt() * clean + (1 - table[t]).sqrt() * noise_, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 9, 50])
def test_the_way_there_and_back_of_a_linear_network(steps):
    """Equation 14 of DDIM: x/√ᾱ moves by the change of √(1-ᾱ)/√ᾱ times the noise seen where it stands."""
    table, timesteps = alphas(), pdm.timesteps_of(steps, 1000)
    clean, factor = torch.randn(1, 4, 2, 2).double(), {t: 0.2 + 0.7 * t / 1000 for t in timesteps}
    root, level = table.sqrt().tolist(), ((1 - table) / table).sqrt().tolist()
    scaled = [1 + level[timesteps[0]] * factor[timesteps[0]]]  # x_t / √ᾱ_t as a multiple of the photo
    for t, u in [*itertools.pairwise(timesteps), *itertools.pairwise(timesteps[::-1])]:
        scaled.append(scaled[-1] + (level[u] - level[t]) * factor[t] * root[t] * scaled[-1])

    def found(back):
        return dict(pdm.invert(lambda at, t: factor[t] * at, clean, table, timesteps, back=back))  # and None

    for number, t in enumerate(timesteps):
        assert torch.allclose(found(False)[number], scaled[number] * root[t] * clean)
        assert torch.allclose(found(True)[number], scaled[2 * steps - 2 - number] * root[t] * clean)


def test_inversion_follows_the_flow_of_a_gaussian():
    """Of data N(0, s²) the noise is known in closed form, and so is the way: x_t = x0 √(ᾱ s² + 1 - ᾱ) / s."""
    clean, table, spread = torch.randn(1, 4, 4, 4).double(), alphas(), 0.7

    def error(steps, kind="epsilon", back=False):
        timesteps = pdm.timesteps_of(steps, 1000)

        def predict(at, t):
            found = (1 - table[t]).sqrt() * at / (table[t] * spread**2 + 1 - table[t])
            if kind == "v_prediction":
                return (found - (1 - table[t]).sqrt() * at) / table[t].sqrt()
            return found

        *_, (number, last) = pdm.invert(predict, clean, table, timesteps, kind, back)
        end = table[timesteps[number]]
        return (last - clean * (end * spread**2 + 1 - end).sqrt() / spread).abs().max().item()

    assert error(1000) < error(100) < error(10) and error(1000) < 0.01
    assert error(100, "v_prediction") == pytest.approx(error(100), rel=0.2)
    assert error(1000, back=True) < error(100, back=True) < error(10, back=True) and error(1000, back=True) < 0.02


def test_timesteps_stand_for_all_of_them():
    assert pdm.timesteps_of(5, 1000) == [100, 300, 500, 700, 900]
    assert pdm.timesteps_of(1000, 1000) == list(range(1000))


def test_the_difference_looks_where_the_mask_is_white():
    queries, wanted = torch.zeros(2, 16, 3), torch.zeros(2, 16, 3)
    wanted[:, :8] = 1.0  # the upper half of 4 x 4
    lower = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    lower[:, :, 16:] = 255
    assert features.difference(queries, wanted.half()).tolist() == [0.5, 0.5]
    assert features.difference(queries, wanted, lower).tolist() == [0, 0]
    assert features.difference(queries, wanted, 255 - lower).tolist() == [1, 1]  # divided by its area


def test_the_layer_is_the_published_one_or_the_last():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        real = UNet2DConditionModel(cross_attention_dim=768)  # the shape of Stable Diffusion 1.x
    assert targets.self_attention([n for n, _ in real.named_modules()]) == (targets.PDM_LAYER, None)
    names = [name for name, _ in tiny.unet().named_modules()]
    assert targets.self_attention(names) == (LAST, None)
    assert targets.self_attention(names, f"unet.{LAST}.to_q") == (LAST, None)
    said = targets.self_attention(names, "up_blocks.3.attn1")[1]
    assert "choose one of down_blocks.0.attentions.0" in said and said.endswith(LAST)


# The bank


def test_targets_are_the_stock_networks_in_any_batch(sd1, photos, train, tmp_path, monkeypatch):  # noqa: F811
    options = f"{PDM} --max_train_steps 1 --save_pdm_fs"
    together = train("train_pdmbooth", f"{options} --features_data_dir {tmp_path}/bank-a", "a")
    monkeypatch.setattr(pdm, "AT_ONCE", 1)
    alone = train("train_pdmbooth_lora", f"{options} --features_data_dir {tmp_path}/bank-b --train_batch_size 2", "b")
    names = sorted(path.name for path in (tmp_path / "bank-a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "bank-b").iterdir()) and len(names) == 3
    stored = [load_file(tmp_path / "bank-a" / name)["queries"] for name in names]
    for name, one in zip(names, stored):
        other = load_file(tmp_path / "bank-b" / name)["queries"]
        assert one.dtype == torch.float16 and one.shape == (8, 64, 8)
        assert torch.allclose(one.float(), other.float(), atol=2e-3 * one.float().abs().max())
        assert not torch.allclose(one[0].float(), one[7].float(), atol=0.1)
    assert not (together / "pdm_features").exists() and not (alone / "pdm_features").exists()

    # The first row by hand, with stock classes alone.
    from diffusers import StableDiffusionPipeline

    from utils import images

    pipe = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None, requires_safety_checker=False)
    picture = images.resize_to_cover(Image.open(photos / "photo-0.png").convert("RGB"), 64)
    left, top = (picture.width - 64) // 2, (picture.height - 64) // 2
    pixels = images.to_tensor(picture.crop((left, top, left + 64, top + 64)))[None]
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        words = pipe.encode_prompt("a photo of dog", "cpu", 1, False)[0]
        t = 1000 // 16
        guess = pipe.unet(clean, t, words)[0]
        at = alphas()[t].sqrt().float() * clean + (1 - alphas()[t]).sqrt().float() * guess
        with features.Tap(pipe.unet, f"{LAST}.to_q") as tap:
            pipe.unet(at, t, words)
    near = min(float((rows[0].float() - tap.taken[0]).abs().max()) for rows in stored)
    assert near < 5e-3 * float(tap.taken.abs().max())


@pytest.mark.parametrize("model, way_of", [("sd1", "inversion"), ("sd1", "reconstruction"), ("sdxl", "inversion")])
def test_each_photo_is_held_against_its_own_row(model, way_of, request, photos, tmp_path, monkeypatch):
    """At the latents on the way and under its prompt, the untouched network asks what the bank holds."""
    family = models.family_of(str(request.getfixturevalue(model)))
    family.load("cpu", torch.float32)
    examples = datasets.folder(photos, "a photo of dog")
    data = datasets.DreamBooth(examples, size=64)
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, rank=0, world=1, is_main=True, seed=5)
    run.output_dir, run.interrupted, run.say, run.barrier = tmp_path, False, print, lambda: None
    run.compiles = False
    run.phase = lambda name: contextlib.nullcontext()
    way, real = {}, family.predict

    def predict(latents, timesteps, condition):
        way[int(timesteps[0])] = latents  # the last one of a timestep is the one on the way
        return real(latents, timesteps, condition)

    monkeypatch.setattr(family, "predict", predict)
    concept = SimpleNamespace(class_prompt="a photo of dog")
    settings = {"pdm_inversion_steps": 40, "pdm_targets": way_of, "train_batch_size": 3}
    bank = pdm.prepare(run, family, data, examples, [concept], **settings)
    heard = {}
    monkeypatch.setattr(family, "predict", lambda *more: heard.update(more[2]) or real(*more))
    batch = datasets.collate([data[position] for position in (3, 4, 5)])
    keys = [example.key for example in examples]

    def on_the_way(images, draws, timesteps):
        return torch.stack([way[int(t)][keys.index(key)] for t, key in zip(timesteps, batch["keys"])])

    noisy = noise.corruption_for(family.scheduler)(torch.randn(3, 4, 8, 8), randomness.Draws(0, [0, 1, 2]))
    condition = family.condition(batch)
    _, other = bank.predict(family, noisy, condition, batch)
    monkeypatch.setattr(bank, "noised", on_the_way)
    prediction, found = bank.predict(family, noisy, condition, batch)
    assert found.shape == (3,) and 100 * found.max() < other.max()
    _, told = bank.predict(family, noisy, family.condition(batch | {"captions": ["snow", "night", "red"]}), batch)
    if model == "sdxl":  # of 80 x 96 pixels the middle 64 x 64 of 64 x 76
        assert heard["time_ids"][3:].tolist() == [[96, 80, 6, 0, 64, 64]] * 3
    assert (told > 10 * found).all()  # it hears the batch's prompts, not those of the inversion
    assert torch.allclose(prediction, real(noisy.inputs, noisy.timesteps, condition), atol=1e-5)


@pytest.mark.parametrize("layer", ["", "--pdm_layer down_blocks.0.attentions.0.transformer_blocks.0.attn1"])
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_the_plan_tells_what_targets_take(train, capsys, request, model, layer):  # noqa: F811
    model = str(request.getfixturevalue(model))
    train(
        "train_pdmbooth_lora", f"{PDM} {layer} --dry_run --mask_pdm --sam_model_name_or_path toybox-sam", "run", model
    )
    said = capsys.readouterr().out
    assert "checkpoint-N/, pdm_features/, sam_masks/" in said
    run = train("train_pdmbooth_lora", f"{PDM} {layer} --max_train_steps 1 --save_pdm_fs", "run", model)
    kept = sum(load_file(path)["queries"].nbytes for path in (run / "pdm_features").iterdir())
    assert f"PDM targets of {plan.size(kept)}\n" in said


def test_a_stale_or_foreign_bank_is_refused(train, photos, tmp_path, capsys):  # noqa: F811
    bank = tmp_path / "bank"
    options = f"{PDM} --max_train_steps 1 --train_batch_size 1 --features_data_dir {bank}"
    train("train_pdmbooth_lora", options, "first")  # an empty folder is filled and kept
    made = sorted(bank.iterdir())
    times = [path.stat().st_mtime_ns for path in made]
    train("train_pdmbooth_lora", options, "again")
    assert [path.stat().st_mtime_ns for path in sorted(bank.iterdir())] == times

    def refused(more, name):
        with pytest.raises(SystemExit):
            train("train_pdmbooth_lora", options.replace("--pdm_inversion_steps 8", "") + more, name)
        return capsys.readouterr().err

    assert "steps is 8, not 4" in refused(" --pdm_inversion_steps 4", "steps")
    back = " --pdm_inversion_steps 8 --pdm_targets reconstruction"
    assert "targets is inversion, not reconstruction" in refused(back, "back")
    said = refused(" --pdm_inversion_steps 8 --class_prompt 'a photo of cat'", "prompt")
    assert "prompt is a photo of dog, not a photo of cat" in said and "--save_pdm_fs" in said
    tiny.photo(99).save(photos / "photo-1.png")
    assert "photo is" in refused(" --pdm_inversion_steps 8", "photo")
    train("train_pdmbooth_lora", f"{options} --save_pdm_fs", "added")
    assert len(list(bank.iterdir())) == 4
    whole = made[0].read_bytes()
    for number, broken in enumerate([whole[:-1], whole[:50], b"", whole.replace(b"photo of dog", b"photo of hog")]):
        made[0].write_bytes(broken)
        assert "is damaged, or no target of this script" in refused(" --pdm_inversion_steps 8", f"broken{number}")
    made[0].write_bytes(whole)
    (bank / "features_0.pt").write_bytes(b"pickle")
    assert "features_0.pt" in refused(" --pdm_inversion_steps 8", "foreign")


def test_targets_of_the_way_back(train, photos, tmp_path, capsys):  # noqa: F811
    """They turn where those of the way there end, and on a model that has learned they are near them for a while."""
    options = f"{PDM.replace('steps 8', 'steps 20')} --max_train_steps 1 --save_pdm_fs --train_batch_size 1"
    way = {}
    for name in ("inversion", "reconstruction"):
        folder = train("train_pdmbooth_lora", f"{options} --pdm_targets {name}", name, "toybox")
        way[name] = {files.read_identity(path)["photo"]: path for path in (folder / "pdm_features").iterdir()}
    said = capsys.readouterr().out
    assert "in 21 evaluations" in said and "in 40 evaluations" in said
    assert way["inversion"].keys() == way["reconstruction"].keys() and len(way["inversion"]) == 3
    for photo, path in way["inversion"].items():
        assert files.read_identity(path)["targets"] == "inversion"
        there, back = (load_file(one)["queries"].float() for one in (path, way["reconstruction"][photo]))
        assert torch.equal(there[19], back[19])  # the turning point
        assert all(not torch.equal(there[k], back[k]) for k in range(19))
        error = (there - back).square().mean((1, 2)) / there.square().mean((1, 2))
        assert error[10:].max() < 0.01 < error[0]  # it builds up on the way


@pytest.mark.parametrize("way", ["inversion", "reconstruction"])
def test_a_stop_ends_an_inversion_under_way(train, photos, tmp_path, monkeypatch, way):  # noqa: F811
    """A thousand evaluations on a CPU are long: what was begun is left, and no half a file stays."""
    from utils.models.latent_diffusion import LatentDiffusion

    asked, real = [], LatentDiffusion.predict

    def predict(*given):
        asked.append(1)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(LatentDiffusion, "predict", predict)
    with pytest.raises(SystemExit) as stopped:
        train("train_pdmbooth_lora", f"{PDM} --pdm_targets {way}")
    assert stopped.value.code == 143 and len(asked) == 3
    assert not list((tmp_path / "run").glob("pdm_features/*"))


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / files.name_of({"steps": 2})
    writer = files.Writer(path, {"steps": 2}, (2, 4, 3))
    writer.rows[1] = 1.5
    assert not path.exists()
    writer.finish()
    writer.drop()
    assert files.read_identity(path) == {"steps": 2}
    assert load_file(path)["queries"].sum() == 18 and load_file(path)["queries"].shape == (2, 4, 3)
    files.Writer(path, {"steps": 2}, (2, 4, 3)).drop()
    assert list(tmp_path.iterdir()) == [path] and load_file(path)["queries"].sum() == 18


def test_a_file_knows_its_values_and_one_without_checksum_is_looked_at(tmp_path):
    path = tmp_path / files.name_of({"steps": 2})
    writer = files.Writer(path, {"steps": 2}, (2, 4, 3))
    writer.rows[:] = 1.5
    writer.finish()
    assert not files.is_damaged(path)
    data = path.read_bytes()
    for place, value in ((-1, b"\x00"), (-24, bytes(24))):  # one byte, a whole row
        path.write_bytes(data[:place] + value + (data[place + len(value) :] if place + len(value) else b""))
        assert files.is_damaged(path)
    queries = torch.full((2, 4, 3), 1.5, dtype=torch.float16)
    for change, damaged in ((1.5, False), (float("nan"), True), (0.0, True)):
        queries[1] = change
        save_file({"queries": queries}, path, metadata={"identity": json.dumps({"steps": 2})})  # an older version's
        assert files.is_damaged(path) == damaged and files.read_identity(path) == {"steps": 2}


def test_a_full_disk_is_noticed_before_the_file_is_mapped(tmp_path, monkeypatch):
    """Writing to a mapped page that the disk has no room for kills the process without a word."""
    small = files.Writer(tmp_path / "a", {"steps": 2}, (2, 64, 320))
    assert small.temporary.stat().st_blocks * 512 >= 2 * 64 * 320 * 2, "the disk has given the room"
    small.drop()

    def full(handle, begin, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        files.Writer(tmp_path / "a", {"steps": 2}, (2, 64, 320))
    assert not list(tmp_path.iterdir())


def test_damaged_targets_are_computed_again_or_refused(train, photos, tmp_path, capsys, monkeypatch):  # noqa: F811
    shared = tmp_path / "shared"
    keep = f"{PDM} --save_pdm_fs --features_data_dir '{shared}'"
    train("train_pdmbooth_lora", keep, "a")
    before = {path.name: path.read_bytes() for path in shared.iterdir()}
    path = sorted(shared.iterdir())[0]
    data = before[path.name]
    path.write_bytes(data[: -len(data) // 2] + bytes(-(-len(data) // 2)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        train("train_pdmbooth_lora", f"{PDM} --features_data_dir '{shared}'", "b")
    said = capsys.readouterr().err
    assert left.value.code == 3 and f"1 targets are damaged ('{path}'): add --save_pdm_fs" in said
    train("train_pdmbooth_lora", keep, "c")
    said = capsys.readouterr()
    assert f"'{path}' is damaged: computed again" in said.err and "inverting 1 photos" in said.out
    changed = [other for other in shared.iterdir() if other.read_bytes() != before[other.name]]
    assert not files.is_damaged(path) and changed in ([], [path]), "alone it may be rounded otherwise than in a batch"
    path.unlink()

    def full(handle, begin, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit) as left:
        train("train_pdmbooth_lora", keep, "d")
    assert left.value.code == 1 and "PDM targets cannot be written (No space left" in capsys.readouterr().err


# Training


def test_without_its_loss_it_is_dreambooth(train):  # noqa: F811
    options = "--max_train_steps 2 --train_batch_size 2 --learning_rate 1e-3"
    plain = train("train_pdmbooth", options, "a")
    assert losses(plain) == losses(train("train_dreambooth", options, "b"))
    assert not parts(plain), "one part alone is the loss"
    assert losses(train("train_pdmbooth_lora", options, "c")) == losses(train("train_dreambooth_lora", options, "d"))


def test_the_gradient_reaches_the_layer_and_nothing_after_it(train, sd1):  # noqa: F811
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    options = f"{PDM} --max_train_steps 1 --train_batch_size 2 --pdm_layer {layer} --adam_weight_decay 0"
    folder = train("train_pdmbooth", options.replace("--use_inst_loss", "--use_inst_loss no"))
    (row,) = rows(folder)
    assert row["loss"] == pytest.approx(0.1 * row["loss_pdm"], rel=1e-6) and row["loss_instance"] > 0  # only watched
    before, after = (load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in (sd1, folder))
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert f"{layer}.to_q.weight" in moved and "conv_in.weight" in moved
    assert f"{layer}.to_k.weight" not in moved and not any(
        name.startswith(("up_", "mid_", "conv_out")) for name in moved
    )
    lora = weights(train("train_pdmbooth_lora", options.replace("--use_inst_loss", "--use_inst_loss no"), "lora"))
    learned = {name.split("unet.")[1].rsplit(".lora.", 1)[0] for name, w in lora.items() if ".up." in name and w.any()}
    assert learned == {f"{layer}.to_q"}  # it is the first attention layer


@pytest.mark.parametrize(
    "more, on_it",
    [("--use_dora", True), ("--lora_target_modules to_k,to_v", False), ("--lora_unet_blocks down_blocks.0", False)],
)
def test_adapters_on_the_layer_and_elsewhere(train, more, on_it):  # noqa: F811
    """The queries are those of the layer with its adapter, and follow every adapter before it."""
    options = f"{PDM.replace('--use_inst_loss', '--use_inst_loss no')} --max_train_steps 2 --train_batch_size 2 {more}"
    still = losses(train("train_pdmbooth_lora", f"{options} --lr 1e-30", "still"))
    learned = train("train_pdmbooth_lora", f"{options} --lr 1e-2 --adam_weight_decay 0", "learned")
    assert losses(learned)[0] == still[0] and losses(learned)[1] < still[1]
    moved = {name.split("unet.")[1].rsplit(".lora", 1)[0]: w.any() for name, w in weights(learned).items()}
    assert moved.pop(f"{LAST}.to_q", False) == on_it
    assert any(moved.values())


@pytest.mark.parametrize("batch, layer, shape", [(1, "mid_block", (25, 16)), (4, "down_blocks.0", (100, 8))])
def test_a_size_that_does_not_halve_to_the_end(train, batch, layer, shape):  # noqa: F811
    options = f"{PDM} --resolution 80 --train_batch_size {batch} --max_train_steps 2 --save_pdm_fs"
    folder = train("train_pdmbooth", f"{options} --pdm_layer {layer}.attentions.0.transformer_blocks.0.attn1")
    assert {load_file(path)["queries"].shape for path in (folder / "pdm_features").iterdir()} == {(8, *shape)}
    assert len(losses(folder)) == 2


def test_split_batches_and_saved_activations_change_nothing(train, class_photos):  # noqa: F811
    options = f"{PDM} --max_train_steps 2 --pdm_loss_weight 5 --use_prior_loss --cls_data_dir {class_photos}"
    options += " --num_cls_imgs 4"
    whole = train("train_pdmbooth_lora", f"{options} --train_batch_size 4", "whole")
    split = train("train_pdmbooth_lora", f"{options} --train_batch_size 2 --gradient_accumulation_steps 2", "split")
    twice = train("train_pdmbooth_lora", f"{options} --train_batch_size 4 --gradient_ckpting", "twice")
    assert losses(whole) == pytest.approx(losses(split), rel=1e-4) and parts(whole) == pytest.approx(
        parts(split), rel=1e-4
    )
    assert losses(whole) == pytest.approx(losses(twice), rel=1e-5)
    sums = [row["loss_instance"] + row["loss_prior"] + 5 * row["loss_pdm"] for row in rows(whole)]
    assert losses(whole) == pytest.approx(sums, rel=1e-6)
    less = train("train_pdmbooth_lora", f"{options} --train_batch_size 4".replace("weight 5", "weight 0"), "less")
    assert losses(less)[0] < losses(whole)[0]
    one, other = weights(whole), weights(split)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_compiled_it_learns_the_same(train, monkeypatch):  # noqa: F811
    """A hook is traced with what it keeps, and inside a checkpoint that would be lost. Of the compiler only graphs and
    their backward: what inductor makes of them is too slow to wait for."""
    options = f"{PDM} --max_train_steps 2 --train_batch_size 2 --pdm_loss_weight 5"
    eager = train("train_pdmbooth_lora", options, "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train("train_pdmbooth_lora", f"{options} --gradient_ckpting", "compiled")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    one, other = weights(eager), weights(compiled)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1 and not torch._dynamo.utils.counters["graph_break"]  # nothing fell back


@BOTH
def test_resumed_equals_uninterrupted(train, stop, script, photos, capsys):  # noqa: F811
    tiny_mask = Image.new("L", (80, 96), 0)
    tiny_mask.paste(255, (20, 20, 60, 60))
    tiny_mask.save(photos / "photo-1.mask.png")
    options = f"{PDM} --mask_pdm --train_batch_size 2 --ckpting_steps 2 --max_train_steps 5 --train_text_encoder"
    whole = train(script, options, "whole")
    stop("kill", 3)
    with pytest.raises(Killed):
        train(script, options, "cut")
    assert len(list((whole.parent / "cut" / "pdm_features").iterdir())) == 3
    for changed in ("--mask_pdm", "--pdm_loss_weight 0.3"):
        with pytest.raises(SystemExit):
            more = options.replace(changed, "") if changed in options else f"{options} {changed}"
            train(script, f"{more} --resume_from_ckpt latest", "cut")
        assert "belongs to another run" in (said := capsys.readouterr().err) and "pdm" in said
    cut = train(script, f"{options} --resume_from_ckpt latest", "cut")
    assert same(whole, cut) and losses(whole) == losses(cut) and len(losses(cut)) == 5
    assert parts(whole) == parts(cut) and len(parts(cut)) == 5 * 2
    assert not (cut / "pdm_features").exists()


# Scripts as their users call them

PLAIN = (
    "--inst_data_dir={photos} --out_dir={out} --inst_prompt='a photo of sks dog' --cls_prompt='a photo of dog'"
    " --lr=1e-4 --max_train_steps=2 --lr_warmup_steps=0 --seed=0 --report_to=none --val_steps=0"
)
PRIOR = " --cls_data_dir={classes} --use_prior_loss --gradient_accumulation_steps=1 --num_cls_imgs=3"
FULL = PRIOR + " --use_inst_loss --use_pdm_loss --mask_pdm --mask_dm --test_prompts='a dog' --test_prompts='a cat'"
FULL += (
    " --num_test_imgs_per_prompt=1 --save_pdm_masks --features_data_dir={bank} --save_pdm_fs --pdm_inversion_steps=4"
)
FULL += (
    " --del_cls_imgs_dir --trackers_proj_name=p --wandb_exp=e --wandb_dir={out} --save_model_weights --adam_eps=1e-8"
)
FULL += " --ckpting_steps=2 --ckpts_total_limit=1 --dl_num_workers=0 --log_dir=logs --validation_num_inference_steps=2"
FULL += " --sample_batch_size=3 --val_prompt='a dog' --num_val_imgs=1"


@BOTH
@pytest.mark.parametrize(
    "model, more, batch, size",
    [
        ("sd1", "", 1, 64),
        ("sd2", PRIOR + " --precompute_text_embeds", 2, 64),
        ("sd1", FULL, 1, 128),
        ("sd2", FULL + " --train_text_encoder --gradient_ckpting", 2, 64),
        ("sdxl", FULL + " --mixed_precision=bf16", 2, 64),
    ],
    ids=["plain", "prior", "full", "text", "xl"],
)
def test_commands(script, model, more, batch, size, request, photos, tmp_path):
    import importlib

    for name in ("photo-0", "photo-2"):
        Image.new("L", (80, 96), 255).save(photos / f"{name}.mask.png")
    classes, out = tiny.photos(tmp_path / "classes", 1, seed=5), tmp_path / "out"
    words = PLAIN + more + f" --train_batch_size={batch} --resolution={size} --pretrained_model_name_or_path={{model}}"
    places = {"photos": photos, "out": out, "classes": classes, "bank": tmp_path / "bank"}
    module, kept = importlib.import_module(script), sorted(path.name for path in photos.iterdir())
    module.main(module.parse_args(shlex.split(words.format(model=request.getfixturevalue(model), **places))))
    assert (out / ("pytorch_lora_weights.safetensors" if "lora" in script else "model_index.json")).is_file()
    assert len(losses(out)) == 2 and sorted(path.name for path in photos.iterdir()) == kept
    if more.startswith(FULL):
        assert len(list(out.glob("test_samples/step-000002/*.png"))) == 2
        shapes = {Image.open(path).size for path in (out / "pdm_masks").iterdir()}
        assert len(list((tmp_path / "bank").iterdir())) == 3 and shapes == {(size, size)}
        assert [path.name for path in classes.iterdir()] == ["photo-0.png"]  # what was drawn is gone


@pytest.mark.parametrize(
    "words, on",
    [
        ("", True),
        ("--use_prior_loss --cls_data_dir=d --cls_prompt=c", True),
        ("--use_pdm --cls_prompt=c", True),
        ("--use_pdm --use_prior_loss --cls_data_dir=d --cls_prompt=c", True),
        ("--use_pdm --use_inst_loss --cls_prompt=c", True),
        ("--use_pdm --use_inst_loss no --cls_prompt=c", False),
        ("--use_pdm --use_inst_loss no --use_prior_loss --cls_data_dir=d --cls_prompt=c", False),
    ],
)
def test_the_loss_of_the_photos_is_off_only_where_that_is_asked_for(words, on, capsys):
    import train_pdmbooth_lora as script

    base = "--pretrained_model_name_or_path=m --inst_data_dir=d --inst_prompt=p"
    args = script.parse_args(shlex.split(f"{base} {words}"))
    assert args.use_inst_loss is on and not capsys.readouterr().err
    assert arguments.identity(args).get("use_inst_loss", True) is on


def test_a_checkpoint_without_the_loss_of_the_photos_resumes_only_without_it(train, capsys):  # noqa: F811
    options = f"{PDM.replace('--use_inst_loss', '')} --max_train_steps 2 --checkpointing_steps 1 --train_batch_size 2"
    whole = train("train_pdmbooth_lora", f"{options} --use_inst_loss no", "whole")
    resume = f"--resume_from_checkpoint '{whole / 'checkpoint-1'}'"
    with pytest.raises(SystemExit) as stopped:
        train("train_pdmbooth_lora", f"{options} {resume}", "other")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "give --use_inst_loss no to resume it" in said
    assert "use_inst_loss  checkpoint: False  now: True" in said
    again = train("train_pdmbooth_lora", f"{options} --use_inst_loss no {resume}", "again")
    assert losses(again) == losses(whole)[1:]


@BOTH
def test_masks_of_class_images(train, script, class_photos, capsys):  # noqa: F811
    options = f"--use_inst_loss --use_prior_loss --mask_prior --cls_data_dir '{class_photos}' --cls_prompt 'a dog'"
    options += " --num_cls_imgs 4 --max_train_steps 1 --train_batch_size 4 --center_crop"
    missing = options.replace(f"'{class_photos}'", f"'{class_photos}-new'")
    for given, said in ((options, "have none"), (missing, "are drawn first, and have none")):
        with pytest.raises(SystemExit) as stopped:
            train(script, f"{given} --dry_run", "none")
        assert stopped.value.code == 3 and f"--mask_prior: class images {said}" in capsys.readouterr().err
    half = Image.new("L", (80, 96), 0)
    half.paste(255, (0, 0, 80, 48))
    half.save(class_photos / "photo-1.mask.png")
    masked = losses(train(script, options, "masked"))
    plain = losses(train(script, options.replace("--mask_prior", ""), "plain"))
    assert masked != plain
    Image.new("L", (8, 8), 255).save(class_photos / "photo-1.mask.png")
    with pytest.raises(SystemExit):
        train(script, options, "small")
    assert "both must have the same size" in capsys.readouterr().err


def test_what_cannot_be_honoured_is_refused(photos, sd1, tmp_path, capsys):
    import train_pdmbooth as script

    base = f"--pretrained_model_name_or_path={sd1} --inst_data_dir={photos} --inst_prompt=p --out_dir={tmp_path}/o"

    def refused(words, check=False):
        with pytest.raises(SystemExit):
            args = script.parse_args(shlex.split(f"{base} {words}"))
            script.main(args)
        return capsys.readouterr().err

    assert "--use_pdm needs --class_prompt" in refused("--use_pdm")
    assert "--resolution_buckets" in refused("--use_pdm --cls_prompt=c --resolution_buckets")
    assert "--mask_prior needs --use_prior_loss" in refused("--mask_prior")
    said = refused("--use_pdm --cls_prompt=c --pdm_layer=mid.attn1 --pdm_inversion_steps=1001 --resolution=64")
    assert "choose one of down_blocks.0" in said and "the model has 1000 timesteps" in said
    said = refused("--mask_pdm --use_pdm --cls_prompt=c --resolution=64")
    assert "--mask_pdm: no photo has a mask" in said and "(--sam_model_name_or_path facebook/sam-vit-huge " in said
    assert "--use_prior_loss needs --class_data_dir" in refused("--use_prior_loss --cls_prompt=c")
    assert "in-painting" in refused_inpainting(sd1, tmp_path, refused)
    assert "nothing is learned of the subject" in refused("--use_inst_loss=no")
    args = script.parse_args(shlex.split(base))
    assert args.use_inst_loss and not args.use_pdm_loss and args.tracker_project_name == "PDMBooth"
    assert script.parse_args(shlex.split(f"{base} --masked_loss")).mask_dm
    only = script.parse_args(shlex.split(f"{base} --masks_dir={photos} --mask_pdm --use_pdm --cls_prompt=c"))
    assert only.masked_loss and not only.mask_dm
    asked = f"{base} --sam_model_name_or_path=s"
    assert script.parse_args(shlex.split(asked)).mask_dm
    prior = script.parse_args(shlex.split(f"{asked} --mask_prior --use_prior_loss --cls_prompt=c --cls_data_dir=d"))
    assert prior.mask_prior and not prior.mask_dm and not prior.masked_loss


def refused_inpainting(sd1, tmp_path, refused):
    nine = tiny.save(tiny.inpainting(tiny.stable_diffusion()), tmp_path / "nine")
    return refused(f"--use_pdm --cls_prompt=c --resolution=64 --pretrained_model_name_or_path={nine} --report_to=none")


def test_pdmbooths_names_are_names_in_its_scripts_only(capsys):
    import train_dreambooth
    import train_pdmbooth_lora

    needed = ["--pretrained_model_name_or_path=m", "--inst_data_dir=d", "--inst_prompt=p"]
    args = train_pdmbooth_lora.parse_args([*needed, "--lr=0.1", "--out_dir=o", "--val_epochs=3"])
    assert (args.learning_rate, args.output_dir, args.validation_epochs) == (0.1, "o", 3)
    assert (args.pdm_loss_weight, args.instance_data_dir) == (0.05, "d")
    with pytest.raises(SystemExit):
        train_dreambooth.parse_args(needed)
    assert "--inst_data_dir is not an option" in capsys.readouterr().err


def test_masks_that_nobody_brought_are_made_by_sam(train, tmp_path, capsys):  # noqa: F811
    """As in the published script, whose users type --mask_pdm --mask_dm and nothing else."""
    options = f"{PDM} --mask_pdm --mask_dm --max_train_steps 1 --train_batch_size 2 --test_prompts 'a dog'"
    folder = train("train_pdmbooth_lora", options, "run", "toybox")
    assert "no masks beside the pictures: toybox-sam makes them" in capsys.readouterr().out
    assert len(list((folder / "sam_masks").iterdir())) == 3
    assert "sam_model_name_or_path: toybox-sam" in (folder / "training_config.yaml").read_text()


def test_masks_of_queries_outside_of_the_centre_are_refused(train, photos, capsys):  # noqa: F811
    for photo in photos.glob("*.png"):
        with Image.open(photo) as picture:
            mask = Image.new("L", picture.size)
        mask.paste(255, (0, mask.height - 4, mask.width, mask.height))
        mask.save(photo.with_suffix(".mask.png"))
    with pytest.raises(SystemExit) as left:
        train("train_pdmbooth_lora", f"{PDM} --mask_pdm --max_train_steps 1")
    said = capsys.readouterr().err
    assert left.value.code == 3 and said.count("lies outside of the centre crop") == 3


def test_photos_without_a_mask_count_as_a_whole_only_if_sam_makes_none(train, photos, class_photos, capsys):  # noqa: F811
    Image.new("L", (80, 96), 255).save(photos / "photo-1.mask.png")
    options = f"{PDM} --mask_pdm --dry_run --use_prior_loss --cls_data_dir '{class_photos}' --num_cls_imgs 4"
    train("train_pdmbooth_lora", options, "run", "toybox")
    assert "2 of 3 photos have no mask and count as a whole" in capsys.readouterr().err
    train("train_pdmbooth_lora", f"{options} --mask_prior", "run", "toybox")
    said = capsys.readouterr()
    assert "toybox-sam makes them" in said.out and "count as a whole" not in said.err
