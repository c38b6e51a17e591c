"""Checksums of tensors that lie on a disk for a long time: what was damaged there is noticed before it is learned."""

import hashlib
from collections.abc import Iterable

import torch

MOST = 65504.0  # the largest value of fp16: no weight, latent or embedding of these models comes near


class Sum:
    """sha256 over names and values, in the order in which they are added; by value, wherever a file holds them."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]] = ()):
        self._hash, self.plausible = hashlib.sha256(), True
        for name, value in tensors:
            self.add(name, value)

    def add(self, name: str, value: torch.Tensor) -> None:
        flat = value.detach().cpu().contiguous().reshape(-1)
        self._hash.update(name.encode())
        self._hash.update(flat.view(torch.uint8).numpy())
        # Files of older versions have no checksum: values that cannot be are noticed all the same. NaN fails too.
        if flat.is_floating_point() and flat.numel() and not bool(flat.abs().max() <= MOST):
            self.plausible = False

    def hex(self) -> str:
        return self._hash.hexdigest()

    def differs(self, recorded: str | None) -> bool:
        return not self.plausible or (recorded is not None and recorded != self.hex())
