"""A network that the first rank alone has: the others get their parts of it, one weight after the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_modules import hardware
from lightning_modules.shards import local, part_of

Answer = TypeVar("Answer")


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it a network is made of shapes alone, and nothing is read for it."""
    token = hardware.SPARED.set(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        hardware.SPARED.reset(token)


def made_by_the_first(make: Callable[[], Answer]) -> Answer:
    """What `make` makes; on other ranks than the first without weights. Where one cannot, all raise its ValueError."""
    made, fault = None, None
    try:
        with nullcontext() if dist.get_rank() == 0 else without_weights():
            made = make()
    except (OSError, ValueError) as error:
        fault = str(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    if told := [found for found in faults if found]:
        raise ValueError(told[0])
    return made


def as_the_first(find: Callable[[], Answer]) -> Answer:
    """What the first rank finds, on every rank; so is its ValueError."""
    found: list = [None, None]
    with torch.device("cpu"):  # not the one that spared ranks make networks on
        if dist.get_rank() == 0:
            try:
                found[0] = find()
            except (OSError, ValueError) as error:
                found[1] = str(error)
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]


@torch.no_grad()
def hand_out(network: nn.Module, cut: Callable[[], None], device: torch.device) -> None:
    """Shards a network by `cut`, in place. Only one weight at a time is whole on a rank other than the first."""
    taken = list(tensors_of(network))
    is_first = dist.get_rank() == 0
    of_first = {(id(module), name): tensor for module, name, tensor in taken} if is_first else {}
    replaced: dict[int, Tensor] = {}
    for module, name, tensor in taken:
        setattr(module, name, replaced.setdefault(id(tensor), empty(tensor, torch.device("meta"))))
    del taken, replaced  # what is handed out is not kept
    cut()
    filled: dict[int, Tensor] = {}
    for module, name, tensor in list(tensors_of(network)):
        source = of_first.pop((id(module), name), None)
        if id(tensor) not in filled:
            own = filled[id(tensor)] = empty(tensor, device)
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if is_first:
                whole.copy_(source)
            dist.broadcast(whole, 0)
            local(own).copy_(part_of(whole, own))
        setattr(module, name, filled[id(tensor)])


def tensors_of(network: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Weights, buffers, and what else hangs on a module; of one that hangs on several, each place."""
    for module in network.modules():
        for kept in (module._parameters, module._buffers, vars(module)):
            yield from ((module, name, tensor) for name, tensor in kept.items() if isinstance(tensor, Tensor))


def empty(tensor: Tensor, device: torch.device) -> Tensor:
    """As large, cut alike, on another device."""
    made = torch.empty_like(tensor, device=device)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
