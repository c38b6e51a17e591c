"""Nested state (dicts, lists, tensors, numbers) as one safetensors file: exact to the bit, and nothing is unpickled.

The tensors are stored as they are, each storage once; the shape around them is JSON in the file's own header.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from utils import saved

KEY = "nested"


def save(state, path: Path) -> None:
    tensors, names = {}, {}
    skeleton = _take_apart(state, tensors, names)
    if not tensors:  # the format wants at least one
        tensors["nothing"] = torch.zeros(0)
    save_file(tensors, str(path), metadata={KEY: json.dumps(skeleton)})
    saved.shared(path)


def load(path: Path):
    with safe_open(str(path), framework="pt") as file:
        skeleton = json.loads((file.metadata() or {})[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return _put_together(skeleton, tensors)


def _take_apart(value, tensors: dict, names: dict):
    """What JSON does not have (tensors, tuples, number keys) is written as a one-entry object that says what it is."""
    if isinstance(value, torch.Tensor):
        # Quantised optimizers share one table between all parameters: it is stored once and shared again.
        same = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
        if same not in names:
            names[same] = str(len(tensors))
            value = value.detach().cpu().contiguous()
            alone = value.untyped_storage().nbytes() == value.nbytes
            tensors[names[same]] = value if alone else value.clone()  # a view would be taken for shared memory
        return {"tensor": names[same]}
    if isinstance(value, dict):
        return {"dict": [[key, _take_apart(item, tensors, names)] for key, item in value.items() if _is_key(key)]}
    if isinstance(value, tuple):
        return {"tuple": [_take_apart(item, tensors, names) for item in value]}
    if isinstance(value, list):
        return [_take_apart(item, tensors, names) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item"):  # a number of numpy
        return value.item()
    raise TypeError(f"cannot store {type(value).__name__} in a checkpoint")


def _is_key(key) -> bool:
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise TypeError(f"cannot store the key {key!r} in a checkpoint")
    return True


def _put_together(value, tensors: dict):
    if isinstance(value, list):
        return [_put_together(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_put_together(item, tensors) for item in content)
    return {key: _put_together(item, tensors) for key, item in content}
