"""A training step on tensors that have shapes and no memory: what it keeps, and how many FLOPs it makes.

The module's own code runs on torch's fake tensors, as one rank of as many as are asked for; nothing is computed and
nothing is sent. What depends on numbers goes as if every test were passed.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lightning_modules.hardware import PLANNED_FOR
from lightning_modules.losses import IGNORED
from lightning_modules.shards import local
from lightning_modules.strategies import Sharded

if TYPE_CHECKING:
    from lightning_modules.scheduled_step import ScheduledStep

aten = torch.ops.aten


Batch = dict[str, Tensor]
OFFLOADED = ("weights", "gradients", "optimizer")
"""Parts that are kept in the memory of the CPU where a strategy offloads."""


class Footprint(NamedTuple):
    """Of one rank, in any step but the first. Sizes are in bytes, by part."""

    peak: dict[str, int]
    """Where they are most together."""
    kept: dict[str, int]
    """Between two steps."""
    flops: int
    """Of forward and backward of a micro-batch, counted operation by operation."""
    checkpoint: int
    """Of weights and optimizer, of all ranks together."""
    host: int = 0
    """At the most in the memory of the CPU, where a strategy offloads."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def with_part(self, part: str, size: int) -> "Footprint":
        """With what is there besides, all the time."""
        return self._replace(peak=self.peak | {part: size}, kept=self.kept | {part: size})


class LiveBytes(TorchDispatchMode):
    """Follows every block of memory from its making to its end, under the part that it is made for.

    Args:
        labelled: Of the positions of a batch, the share that has a label: what a mask leaves.
    """

    def __init__(self, labelled: float = 1.0):
        super().__init__()
        self.part = "activations"
        """To which belongs what is made now."""
        self.bytes: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.offloaded: tuple[str, ...] = ()
        """Parts that are in the memory of the CPU."""
        self.host_peak = 0
        self.flops = 0
        self._most = 0
        self._blocks: dict[int, tuple[str, int]] = {}
        self._labelled = labelled

    def start_peak(self) -> None:
        """From here on the most is looked for."""
        self.peak = self.of_device()
        self._most = sum(self.peak.values())

    def of_device(self) -> dict[str, int]:
        return {part: size for part, size in self.bytes.items() if part not in self.offloaded}

    def belongs(self, tensor: Tensor, part: str) -> None:
        """Says to which part a tensor belongs that is there already."""
        self._note(local(tensor).untyped_storage(), part)

    def resized(self, block: torch.UntypedStorage) -> None:
        self._note(block, "gathered weights")

    @contextmanager
    def of_part(self, part: str) -> Iterator[None]:
        outer, self.part = self.part, part
        try:
            yield
        finally:
            self.part = outer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            return NotImplemented  # it takes itself apart, and what is local comes here
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with _disable_current_modes():  # what was there before, such as the numbers of the ranks
                return func(*args, **(kwargs or {}))
        if func in (aten.allclose.default, aten.equal.default):
            return True
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is aten.nonzero.default:
            return args[0].new_empty((self._left_by(args[0]), args[0].ndim), dtype=torch.long)
        if func is aten.index.Tensor:
            args = (args[0], [self._places(index) for index in args[1]])
        out = func(*args, **(kwargs or {}))
        if func is aten.mkldnn_rnn_layer.default:
            out = (*out[:3], lstm_workspace(args[0], args[6].shape[-1]))
        if (formula := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        made = () if func.is_view else out if isinstance(out, tuple | list) else (out,)
        for tensor in made:
            if isinstance(tensor, Tensor) and (block := local(tensor).untyped_storage())._cdata not in self._blocks:
                self._note(block, self.part)
        return out

    def _note(self, block: torch.UntypedStorage, part: str) -> None:
        key = block._cdata
        if key in self._blocks:
            before, size = self._blocks[key]
            self.bytes[before] -= size
        else:
            weakref.finalize(block, self._ended, key)
        self._blocks[key] = part, block.nbytes()
        self.bytes[part] += block.nbytes()
        on_host = sum(self.bytes[part] for part in self.offloaded)
        self.host_peak = max(self.host_peak, on_host)
        if (now := self.bytes.total() - on_host) > self._most:
            self.peak, self._most = self.of_device(), now

    def _ended(self, key: int) -> None:
        part, size = self._blocks.pop(key)
        self.bytes[part] -= size

    def _places(self, index: Tensor | None) -> Tensor | None:
        if index is None or index.dtype != torch.bool:
            return index
        return index.new_empty(self._left_by(index), dtype=torch.long)

    def _left_by(self, mask: Tensor) -> int:
        return max(1, round(mask.numel() * self._labelled))


@contextmanager
def simulated(kind: str, labelled: float = 1.0) -> Iterator[LiveBytes]:
    """Within it tensors are fake, and a network has its shapes and no weights; `kind` (cpu, cuda) is what it is for."""
    before, resize, apply = PLANNED_FOR.set(kind), torch.UntypedStorage.resize_, nn.Module._apply
    with ExitStack() as stack:
        stack.callback(PLANNED_FOR.reset, before)
        stack.callback(setattr, torch.UntypedStorage, "resize_", resize)
        stack.callback(setattr, nn.Module, "_apply", apply)
        log = logging.getLogger("torch._subclasses.fake_tensor")  # tells what is raised, too
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(FakeCopyMode(fake))  # metrics copy their states
        live = stack.enter_context(LiveBytes(labelled))

        def followed(block: torch.UntypedStorage, size: int) -> None:
            # FSDP2 gathers weights into blocks that it empties and fills again.
            resize(block, size)
            live.resized(block)

        torch.UntypedStorage.resize_ = followed
        nn.Module._apply = converted
        yield live


def converted(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What module.to(…) calls; torch's own cannot change fake weights that something refers to."""
    for part in module.modules() if recurse else [module]:
        for parameter in part.parameters(recurse=False):
            parameter.data = function(parameter.data)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = function(buffer)
    return module


@contextmanager
def ranks(count: int) -> Iterator[None]:
    """This process as the first of many, which are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def stand_in(module: "ScheduledStep") -> Iterator[None]:
    """Within it the networks of a module that is about to train have fake weights in the place of their own."""
    networks = [
        module,
        *(teacher.network for teacher in getattr(module, "teachers", []) if teacher.network is not None),
    ]
    with ExitStack() as stack:
        for part in (part for network in networks for part in network.modules()):
            stack.callback(setattr, part, "_compiled_call_impl", part._compiled_call_impl)
            part._compiled_call_impl = None  # which would be compiled for fake tensors
        for network in networks:
            tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
            fakes = {name: like(tensor) for name, tensor in tensors.items()}
            stack.enter_context(_reparametrize_module(network, fakes, tie_weights=True))
        yield


def like(tensor: Tensor) -> Tensor:
    """A fake one of the same shape."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def widened(batch: Batch, rows: int, width: int | None = None, answer: int | None = None) -> Batch:
    """As many rows as are asked for, of a batch's kind; `width` and `answer` are the tokens of the longest ones."""
    T, U = batch["input_ids"].shape[1], batch["labels"].shape[-1]
    has_rows = batch["labels"].ndim == 2 and batch["labels"].dtype == torch.long
    sizes = ({U: answer or U} if has_rows else {}) | {T: width or T}
    shapes = {name: (rows, *(sizes.get(size, size) for size in value.shape[1:])) for name, value in batch.items()}
    return {name: value.new_zeros(shapes[name]) for name, value in batch.items()}


def labelled_share(batch: Batch) -> float:
    """Of a batch's positions, the part that has a label."""
    labels = batch["labels"]
    return float((labels != IGNORED).double().mean()) if labels.dtype == torch.long else 1.0


def footprint(module: "ScheduledStep", batch: Batch, live: LiveBytes, accumulated: int = 1) -> Footprint:
    """Of a step on a batch, by a module whose networks are fake; `accumulated` micro-batches make a step."""
    device = next(module.parameters()).device
    batch = {name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in batch.items()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    strategy = module.trainer.strategy
    live.offloaded = OFFLOADED if isinstance(strategy, Sharded) and strategy.offloads else ()
    for tensor in (*module.parameters(), *module.buffers()):
        live.belongs(tensor, "weights")
    for teacher in getattr(module, "teachers", []):
        if teacher.network is not None:
            for tensor in (*teacher.network.parameters(), *teacher.network.buffers()):
                live.belongs(tensor, "teacher")
    with live.of_part("optimizer"):
        optimizer = module.new_optimizer()
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # which makes its state
        optimizer.zero_grad()
    kept = tree_leaves([list(module.state_dict().values()), dict(optimizer.state), getattr(optimizer, "masters", [])])
    checkpoint = sum(tensor.numel() * tensor.element_size() for tensor in kept if isinstance(tensor, Tensor))
    with ExitStack() as stack:
        for parameter in trained:
            hook = parameter.register_post_accumulate_grad_hook(lambda p: live.belongs(p.grad, "gradients"))
            stack.callback(hook.remove)
        network = getattr(module, "plain_network", module.network)
        for hook in (
            network.register_forward_pre_hook(lambda *_: setattr(live, "part", "activations")),
            network.register_forward_hook(lambda *_: setattr(live, "part", "loss")),
        ):
            stack.callback(hook.remove)
        live.start_peak()
        flops_before = live.flops
        _backward(module, batch, live)
        flops = live.flops - flops_before
        for _ in range(min(1, accumulated - 1)):
            _backward(module, batch, live)
    live.part = "optimizer"
    optimizer.step()
    optimizer.zero_grad()
    return Footprint(positive(live.peak), positive(live.of_device()), flops, checkpoint, live.host_peak)


def _backward(module: "ScheduledStep", batch: Batch, live: LiveBytes) -> None:
    live.part = "activations"
    with module.trainer.precision_plugin.train_step_context():
        objective = module.training_loss(batch, 1.0)[0]
    live.part = "activations"
    objective.backward()


def positive(sizes: dict[str, int]) -> dict[str, int]:
    return {part: size for part, size in sizes.items() if size}


def _attention(query, key, value, *_, out_val=None, **__) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(d_out, query, key, value, *_, out_val=None, **__) -> int:
    return sdpa_backward_flop_count(d_out.shape, query.shape, key.shape, value.shape)


def _lstm(inputs_TBI, weights_GI, weights_GH, *_, out_val=None, **__) -> int:
    """Of one layer: G gates of all cells."""
    steps, rows, width = inputs_TBI.shape
    return 2 * steps * rows * weights_GI.shape[0] * (width + weights_GH.shape[1])


def _lstm_backward(*tensors, out_val=None, **__) -> int:
    return 2 * _lstm(*tensors)


def lstm_workspace(inputs_TBI: Tensor, cells: int) -> Tensor:
    """What oneDNN keeps of a layer for its backward pass, of which torch's fake kernel knows nothing; bytes of a cell
    and of a state as found by running some sizes."""
    steps, rows, width = inputs_TBI.shape
    of_cell, of_state = (37, 24) if inputs_TBI.dtype == torch.float32 else (22.5, 20)
    size = steps * rows * (of_cell * cells + of_state * max(width, cells))
    return torch.empty(round(size), dtype=torch.uint8, device=inputs_TBI.device)


ON_A_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _lstm,
    aten.mkldnn_rnn_layer_backward: _lstm_backward,
}
"""FLOPs that torch's counter does not know; it may be given them."""
for _formula in ON_A_CPU.values():
    _formula._get_raw = True  # takes tensors, not their shapes
FLOPS = flop_registry | ON_A_CPU
"""The counter itself keeps what it counts alive."""
