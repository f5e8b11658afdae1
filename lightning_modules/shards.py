"""What a rank has of a tensor that is sharded over several, and what it has of one that is whole."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is. Both share memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank of its mesh: all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what this rank has of `like`, which has the same shape; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(whole.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def sharded(local_part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which this rank has `local_part`, cut as `like` is."""
    if not isinstance(like, DTensor):
        return local_part
    cut = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(local_part, like.device_mesh, like.placements, **cut)


def copies(tensor: Tensor, ranks: int) -> int:
    """How many of `ranks` have the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return ranks
    places = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return ranks // math.prod(size for size, place in places if not place.is_replicate())


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def empty_like(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Cut as `tensor` is where it has its shape, else whole, on its device."""
    if shape != tensor.shape:
        return torch.empty(shape, dtype=dtype)
    return torch.empty_like(tensor, dtype=dtype)
