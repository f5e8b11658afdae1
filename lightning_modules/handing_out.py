"""A network that the first rank alone has: the others get their parts of it, one weight after the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_modules import hardware
from lightning_modules.shards import local, part_of

Answer = TypeVar("Answer")


@contextmanager
def without_weights(spared: bool) -> Iterator[None]:
    """Within it, where `spared`, a network is made of shapes alone, and nothing is read for it."""
    if not spared:
        yield
        return
    token = hardware.SPARED.set(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        hardware.SPARED.reset(token)


def as_the_first(find: Callable[[], Answer]) -> Answer:
    """What the first rank finds, on every rank."""
    with torch.device("cpu"):  # not the one that spared ranks make networks on
        found = [find() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
    return found[0]


@torch.no_grad()
def hand_out(network: nn.Module, cut: Callable[[], None], device: torch.device) -> None:
    """Shards a network by `cut`, in place. Only one weight at a time is whole on a rank other than the first."""
    taken = list(tensors_of(network))
    of_first = [tensor for _, _, tensor in taken] if dist.get_rank() == 0 else None
    replaced: dict[int, Tensor] = {}
    for module, name, tensor in taken:
        setattr(module, name, replaced.setdefault(id(tensor), empty(tensor, torch.device("meta"))))
    cut()
    filled: dict[int, Tensor] = {}
    for number, (module, name, tensor) in enumerate(list(tensors_of(network))):
        if id(tensor) in filled:
            setattr(module, name, filled[id(tensor)])
            continue
        own = filled[id(tensor)] = empty(tensor, device)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if of_first is not None:
            whole.copy_(of_first[number])
            of_first[number] = None
        dist.broadcast(whole, 0)
        local(own).copy_(part_of(whole, own))
        setattr(module, name, own)


def tensors_of(network: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Weights, buffers, and what else hangs on a module; of one that hangs on several, each place."""
    for module in network.modules():
        for kept in (module._parameters, module._buffers, vars(module)):
            yield from ((module, name, tensor) for name, tensor in kept.items() if isinstance(tensor, Tensor))


def empty(tensor: Tensor, device: torch.device) -> Tensor:
    """As large, cut alike, on another device."""
    made = torch.empty_like(tensor, device=device)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
