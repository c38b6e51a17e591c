"""Tensors of which each process keeps a part (DTensors, under FSDP): made whole for a file, and taken from one."""

import torch


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All processes call this. In main memory, and only on the main process, which alone writes; others get nothing."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if torch.distributed.get_rank() == 0 else full.new_empty(0)


def part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process keeps of a whole tensor that all have read, if `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
