"""A frozen base in a half or a quarter of its memory: weights kept in 8 or 4 bits, made whole where they are used.

QLoRA, https://arxiv.org/abs/2305.14314: only the storage is small. Each layer computes in the precision of its input,
with a weight that exists while it is multiplied and, again, while its gradient passes; what learns beside it is fp32.
"""

import torch
from torch import nn
from torch.nn import functional

from utils import errors

KINDS = ("nf4", "int8", "fp8")
LARGEST_FP8 = 448.0  # of float8_e4m3fn


def freeze(network: nn.Module, kind: str) -> int:
    """Replace the weights of all linear and convolution layers inside the network's blocks; returns how many."""
    if kind == "nf4":
        bitsandbytes()
    layers = [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and "_block" in name  # first and last layers are small and fine
    ]
    for layer in layers:
        layer.packed = pack(layer.weight.detach(), kind)
        # A parameter, so that it moves with the layer; bytes, so that nobody takes it for the precision to compute in.
        layer.weight = nn.Parameter(layer.packed.pop("bytes"), requires_grad=False)
        layer.scale = nn.Parameter(layer.packed.pop("scale").float(), requires_grad=False)
        # Not a class of its own: PEFT makes the adapters of a convolution of their layer's class.
        layer.forward = lambda inputs, layer=layer: Apply.apply(inputs, layer)
    return len(layers)


def bitsandbytes():
    try:
        from bitsandbytes import functional as library
    except ImportError:
        errors.refuse("--quantize_base nf4 needs bitsandbytes: pip install bitsandbytes; or use int8 or fp8")
    return library


def pack(weight: torch.Tensor, kind: str) -> dict:
    """(out, ...) => bytes, scales, and what else `unpack` needs."""
    rest = {"kind": kind, "shape": tuple(weight.shape)}
    if kind == "nf4":  # blocks of 64 values share a scale; QLoRA, section 3
        data, state = bitsandbytes().quantize_4bit(weight.float().contiguous(), blocksize=64, quant_type="nf4")
        data = data.view(-1, *[1] * (weight.dim() - 1))  # as many dimensions: adapters look at them
        return rest | {"bytes": data, "scale": state.absmax, "code": state.code}
    rows = weight.float().flatten(1)
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    if kind == "int8":
        scale = largest / 127
        data = (rows / scale).round().to(torch.int8)
    else:
        scale = largest / LARGEST_FP8
        data = (rows / scale).to(torch.float8_e4m3fn)
    return rest | {"bytes": data.view(torch.uint8).view(weight.shape), "scale": scale}


def unpack(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    kind, shape = layer.packed["kind"], layer.packed["shape"]
    if kind == "nf4":
        library = bitsandbytes()
        code = layer.packed["code"] = layer.packed["code"].to(layer.weight.device)
        state = library.QuantState(
            absmax=layer.scale.float(), shape=shape, code=code, blocksize=64, quant_type="nf4", dtype=torch.float32
        )
        return library.dequantize_4bit(layer.weight.view(-1, 1), state).to(dtype)
    stored = layer.weight.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    return (stored.flatten(1).float() * layer.scale.float()).view(shape).to(dtype)


class Apply(torch.autograd.Function):
    """A layer's product with a weight that is unpacked anew for the gradient: kept, it would take the memory saved."""

    @staticmethod
    def forward(context, inputs, layer):
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        context.layer, context.shape, context.dtype = layer, inputs.shape, inputs.dtype
        weight, bias = unpack(layer, dtype), None if layer.bias is None else layer.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            if isinstance(layer, nn.Linear):
                return functional.linear(inputs.to(dtype), weight, bias)
            return functional.conv2d(
                inputs.to(dtype), weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
            )

    @staticmethod
    def backward(context, gradient):
        layer = context.layer
        weight = unpack(layer, gradient.dtype)
        if isinstance(layer, nn.Linear):
            passed = gradient @ weight
        else:
            passed = nn.grad.conv2d_input(
                context.shape, weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups
            )
        return passed.to(context.dtype), None
