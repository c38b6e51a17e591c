"""A packed base: how near it comes, that gradients pass through it, and that a script trains and resumes on it."""

import importlib
import shlex
import shutil

import pytest
import torch
from test_models import loaded, predict_once

from utils import adapters, quantize

NEAR = {"nf4": 0.12, "int8": 0.01, "fp8": 0.05}  # relative error of a weight
KINDS = pytest.mark.parametrize("kind", quantize.KINDS)


def layers():
    torch.manual_seed(0)
    return [
        (torch.nn.Linear(32, 24), torch.randn(3, 5, 32)),
        (torch.nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), torch.randn(2, 8, 9, 9)),
    ]


@KINDS
def test_a_layer_computes_with_nearly_its_weight_and_passes_its_gradient(kind):
    for layer, inputs in layers():
        network = torch.nn.ModuleDict({"down_blocks": layer})
        whole = layer.weight.detach().clone()
        assert quantize.freeze(network, kind) == 1
        weight = quantize.unpack(layer, torch.float32)
        assert 0 < (weight - whole).norm() / whole.norm() < NEAR[kind]
        assert layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
        assert layer.weight.nbytes == whole.numel() / (2 if kind == "nf4" else 1)
        one, two = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        if isinstance(layer, torch.nn.Linear):
            want = torch.nn.functional.linear(one, weight, layer.bias)
        else:
            want = torch.nn.functional.conv2d(one, weight, layer.bias, layer.stride, layer.padding)
        got = layer(two)
        assert torch.equal(got, want)
        want.square().sum().backward()
        got.square().sum().backward()
        assert torch.allclose(one.grad, two.grad, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(inputs).dtype == torch.bfloat16


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_beside_a_packed_base(sd1, kind, dtype):
    family = loaded(sd1, dtype)
    base, size = predict_once(family), sum(p.nbytes for p in family.unet.parameters())
    learns = adapters.attach(family, lora_conv_rank=2, quantize_base=kind)
    found = predict_once(family)
    assert 0 < (found - base).norm() / base.norm() < 0.3
    found.square().mean().backward()
    ups = [p for key, p in learns.named().items() if ".up." in key]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 and p.dtype == torch.float32 for p in ups)
    learned = {id(p) for p in learns.parameters()}
    assert sum(p.nbytes for p in family.unet.parameters() if id(p) not in learned) < 0.6 * size


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_script_trains_and_resumes_on_it(sdxl, photos, tmp_path, kind):
    from test_scripts import losses, same

    script = importlib.import_module("train_dreambooth_lora_sdxl")

    def train(name, more=""):
        options = (
            f"--pretrained_model_name_or_path '{sdxl}' --output_dir '{tmp_path / name}' --report_to none --seed 3"
            f" --instance_data_dir '{photos}' --instance_prompt 'a sks dog' --learning_rate 1e-2 --train_batch_size 1"
            f" --max_train_steps 2 --checkpointing_steps 1 --mixed_precision bf16 --gradient_checkpointing"
            f" --validation_prompt x --validation_num_inference_steps 1 --num_validation_images 1 {more}"
        )
        script.main(script.parse_args(shlex.split(options)))
        return tmp_path / name

    packed = train("packed", f"--quantize_base {kind}")
    (tmp_path / "resumed").mkdir()
    shutil.copytree(packed / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    assert same(packed, train("resumed", f"--quantize_base {kind} --resume_from_checkpoint latest"))
    assert len(losses(packed)) == 2


@pytest.mark.parametrize("words", ["--use_dora", "--adapter loha", "--compile"])
def test_what_needs_whole_weights_is_refused(words, capsys):
    from test_adapter_kinds import parsed

    with pytest.raises(SystemExit) as stop:
        parsed(f"--quantize_base int8 {words}")
    assert stop.value.code == 2 and "--quantize_base" in capsys.readouterr().err
