"""Strategies by name: `fsdp2`, `tp` and `fsdp2_tp` are Lightning's ModelParallelStrategy, which shards what we say.

Weights are sharded by FSDP2 over the ranks that see different rows, and the matrices of each layer by tensor parallel
over those that see the same rows, after the plan that transformers has for the architecture. Embeddings, head and norms
are whole on each of the latter.
"""

import re
import shutil
import sys
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_modules import hardware, sharded_checkpoints
from lightning_modules.checkpoint_io import CheckpointFiles, bytes_of_tensors, remove, replace_folder, require_finite
from lightning_modules.handing_out import hand_out
from lightning_modules.named_optimizer import APART, Named, filled, named, names_of, tensors_of, with_tensors
from lightning_modules.precision import BF16Shards
from lightning_modules.shards import empty_like, local, part_of, sharded

STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
"""Of transformers' plans, torch's classes."""
SUMMED = "replicated_with_grad_allreduce"
"""Of transformers' plans: a weight that is whole, of which each rank has the gradient of its heads."""


NO_SPACE = re.compile(r"No space left|File too large|[Qq]uota exceeded|unexpected pos")
"""What a write that fails says; the last is torch's writer, on its way out of one."""


class Sharded(ModelParallelStrategy):
    """A subclass says how many ranks see the same rows.

    Args:
        group_size: Ranks that together have one copy of what is shared among those that see different rows; the groups
            add up their gradients. Left out: all of them.
        cpu_offload: Keeps weights, gradients and optimizer states in the memory of the CPU.
    """

    _failed = False
    """Whether the last checkpoint found no space."""

    def __init__(self, group_size: int | None = None, cpu_offload: bool = False, **settings: object):
        super().__init__(**settings)
        self._group_size, self.offloads = group_size, cpu_offload

    def parallelize(self, network: PreTrainedModel) -> None:
        """Shards a network, in place. Raises ValueError for an architecture that cannot be."""
        mesh, by_heads = self.device_mesh, []
        in_bf16 = isinstance(self.precision_plugin, BF16Shards)

        def cut() -> None:
            if mesh["tensor_parallel"].size() > 1:
                by_heads.extend(split_layers(network, mesh["tensor_parallel"]))
            if mesh["data_parallel"].size() > 1 or mesh["tensor_parallel"].size() == 1 or in_bf16:
                rows = mesh["data_parallel"] if self._group_size is None else mesh["groups", "group"]
                shard(network, rows, torch.bfloat16 if in_bf16 else None, self.offloads)

        self._hand_out(network, cut)
        self._partial = {id(parameter) for module in by_heads for parameter in module.parameters()}

    def _hand_out(self, network: nn.Module, cut: Callable[[], None]) -> None:
        """Of a plan there is nothing to hand out."""
        if hardware.is_planning():
            cut()
        else:
            hand_out(network, cut, torch.device("cpu") if self.offloads else self.root_device)

    def setup_environment(self) -> None:
        if self.offloads and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        super().setup_environment()
        if self._group_size is not None:
            self._device_mesh = self.lightning_module._device_mesh = self._grouped(self._group_size)
        self._all_ranks = init_device_mesh(self.root_device.type, (self.world_size,))

    def model_to_device(self) -> None:
        """But for weights that are offloaded, which FSDP2 looks for on the CPU."""
        if not self.offloads:
            super().model_to_device()
            return
        self.model._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(self.root_device))
        self.lightning_module._device = self.root_device  # as its own `to` says it

    def _grouped(self, size: int) -> DeviceMesh:
        """Ranks that see different rows, in groups with a copy each."""
        rows, of_layer = self._device_mesh["data_parallel"].size(), self._device_mesh["tensor_parallel"].size()
        if size < 1 or rows % size:
            raise ValueError(
                f"--trainer.strategy.group_size {size}: {rows} ranks that see different rows do not divide into such "
                "groups; pass a divisor"
            )
        shape, names = (rows // size, size, of_layer), ("groups", "group", "tensor_parallel")
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        mesh["groups", "group"]._flatten("data_parallel")
        return mesh

    def share_out(self, network: PreTrainedModel) -> None:
        """Has each rank keep a part of a network that is only asked, by all of them together."""
        self._hand_out(network, lambda: shard(network, self._all_ranks))

    def is_partial(self, parameter: nn.Parameter) -> bool:
        """Whether a weight is whole while each rank has the gradient of heads of its own."""
        return id(parameter) in self._partial

    @torch.no_grad()
    def complete(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Adds up, in place, what neither FSDP2 nor tensor parallel does: of partial gradients, and of weights that
        stand beside the network, whose mean over the rows is taken as FSDP2 takes it."""
        rows = self.device_mesh["data_parallel"]
        if self.is_partial(parameter):
            dist.all_reduce(local(gradient), group=self.device_mesh["tensor_parallel"].get_group())
        if rows.size() > 1 and not isinstance(parameter, DTensor):
            dist.all_reduce(gradient, group=rows.get_group())
            gradient /= rows.size()

    @property
    def ranks_of_a_copy(self) -> int:
        """How many ranks share one copy of the network."""
        return self.world_size if self._group_size is None else self.device_mesh["group", "tensor_parallel"].size()

    @property
    def is_first_of_its_rows(self) -> bool:
        """Whether what this rank sums is to count: others may see the same rows."""
        return self.device_mesh["tensor_parallel"].get_local_rank() == 0

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> Named:
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return named(optimizer.state_dict(), names_of(optimizer, self.lightning_module))

    def save_checkpoint(self, checkpoint: dict, filepath: str | Path, storage_options: object = None) -> None:
        """A folder, which is there whole or not at all. Where the disk is full training goes on, with one line that
        says so; until a checkpoint has been written again none is removed."""
        path = Path(self.broadcast(str(filepath)))
        temporary = path.with_name(f".{path.name}.partial")
        if faults := self._faults(partial(require_finite, checkpoint, path)):
            raise ValueError(faults[0])
        weights, optimizers = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states", [])
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        rest = dict(checkpoint)
        if optimizers:
            tensors |= {f"optimizer.{name}": tensor for name, tensor in tensors_of(optimizers[0]).items()}
            rest["optimizer"] = with_tensors(optimizers[0], lambda *_: APART)
        faults = self._faults(partial(make_anew, temporary), of_first=True)
        faults = faults or self._faults(partial(sharded_checkpoints.write, temporary, tensors))
        own: dict[str, str] = {}
        sums = [own] * self.world_size
        faults = faults or self._faults(lambda: own.update(sharded_checkpoints.sums_of(temporary, self.global_rank)))
        if not faults:
            dist.all_gather_object(sums, own)
            all_sums = dict(ChainMap(*sums))
            faults = self._faults(partial(sharded_checkpoints.seal, temporary, rest, all_sums), of_first=True)
        faults = faults or self._faults(partial(replace_folder, temporary, path), of_first=True)
        self._failed = bool(faults)
        if faults and not NO_SPACE.search(faults[0]):
            raise RuntimeError(faults[0])
        if faults and self.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(path.parent).free
            print(
                f"warning: {path} was not written: it needs about {bytes_of_tensors(tensors):,} bytes and {free:,} are "
                "free; training goes on, and what was saved before stays",
                file=sys.stderr,
            )

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero and not self._failed:
            remove(Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict:
        """A folder of any number of ranks, or a file of a run that was not sharded."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_file():
            return self._load_file(path)
        fault = self.broadcast(sharded_checkpoints.fault(path) if self.is_global_zero else None)
        if fault:
            raise ValueError(f"{path} is damaged: {fault}; go on from another checkpoint")
        rest, there = sharded_checkpoints.rest_of(path), sharded_checkpoints.contents(path)
        tensors = {f"model.{name}": tensor for name, tensor in self.lightning_module.state_dict().items()}
        self._require_weights(path, [name for name in tensors if name not in there])
        weights = dict(self.lightning_module.named_parameters())
        for name, (shape, dtype) in there.items():
            if self.optimizers and name.startswith("optimizer."):
                weight = name.removeprefix("optimizer.").partition("::")[0]
                self._require_weights(path, [] if weight in weights else [f"a place for {weight}"])
                tensors[name] = empty_like(weights[weight], shape, dtype)
        sharded_checkpoints.load_into(path, tensors)
        if self.optimizers:
            states = {name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()}
            self.optimizers[0].load_state_dict(filled(rest.pop("optimizer"), states))
        return rest

    def _load_file(self, path: Path) -> dict:
        checkpoint = CheckpointFiles().load_checkpoint(path)
        whole, weights = checkpoint.pop("state_dict"), dict(self.lightning_module.named_parameters())
        states, names = checkpoint.pop("optimizer_states", []), checkpoint.get("optimizer_names")
        if states and "masters" in states[0]:  # what the weights are in float32
            whole |= dict(zip(names, states[0]["masters"], strict=True))
            states = [states[0]["optimizer"]]
        here = self.lightning_module.state_dict()
        self._require_weights(path, [name for name in here if name not in whole])
        for name, tensor in here.items():
            local(tensor).copy_(part_of(whole[name], tensor))

        def cut(name: str, key: str, tensor: Tensor) -> Tensor:
            weight = weights[name]
            return sharded(part_of(tensor, weight).clone(), weight) if tensor.shape == weight.shape else tensor

        if states and self.optimizers:
            self.optimizers[0].load_state_dict(with_tensors(named(states[0], names), cut))
        return checkpoint

    @staticmethod
    def _require_weights(path: Path, missing: list[str]) -> None:
        if missing:
            raise ValueError(f"{path} lacks {missing[0].removeprefix('model.')}; resume with the run's own settings")

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        """`load_checkpoint` did it."""

    def _faults(self, function: Callable[[], None], of_first: bool = False) -> list[str]:
        """Calls a function, on the first rank alone if asked to; what it raised on any rank, known to all."""
        fault, faults = None, [None] * self.world_size
        try:
            if self.is_global_zero or not of_first:
                function()
        except (OSError, RuntimeError, ValueError, CheckpointException) as error:
            fault = f"{error} {error.__context__ or ''}"
        dist.all_gather_object(faults, fault)
        return [found for found in faults if found]


class FSDP2(Sharded):
    """Weights, gradients and optimizer states are shared among all ranks, each of which sees rows of its own."""

    def setup_environment(self) -> None:
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class TensorParallel(Sharded):
    """The matrices of each layer are shared among all ranks, which see the same rows."""

    def __init__(self, **settings: object):
        super().__init__(**settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = 1
        self._tensor_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class FSDP2TensorParallel(Sharded):
    """Tensor parallel within each machine, FSDP2 between them; on one machine, by two.

    Args:
        tensor_parallel_size: Ranks that share a layer's matrices.
        settings: As FSDP2 has them.
    """

    def __init__(self, tensor_parallel_size: int | None = None, **settings: object):
        super().__init__(**settings)
        self._asked_size = tensor_parallel_size

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        size = self._asked_size or (self.num_processes if self.num_nodes > 1 else 2)
        if ranks % size:
            raise ValueError(f"{ranks} ranks do not divide into groups of {size} of tensor parallel; pass another size")
        self._tensor_parallel_size, self._data_parallel_size = size, ranks // size
        super().setup_environment()


NAMES = {"fsdp2": FSDP2, "tp": TensorParallel, "fsdp2_tp": FSDP2TensorParallel}
for _name, _strategy in NAMES.items():
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, _strategy, description=_strategy.__doc__.splitlines()[0])


def make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def split_layers(network: PreTrainedModel, mesh: DeviceMesh) -> list[nn.Module]:
    """Tensor parallel by the architecture's own plan; returns the modules that are whole, with a part of their
    gradient on each rank."""
    kind = type(network.config).__name__
    plan = network.config.get_text_config().base_model_tp_plan
    if not plan:
        raise ValueError(f"transformers has no plan for tensor parallel of {kind}; take --trainer.strategy fsdp2")
    if unknown := sorted({style for style in plan.values() if style not in STYLES and style != SUMMED}):
        raise ValueError(f"the plan for tensor parallel of {kind} has {unknown[0]}; take --trainer.strategy fsdp2")
    heads = network.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(heads, name, None)
        if count is not None and count % mesh.size():
            raise ValueError(f"{kind} has {name}={count}, which {mesh.size()} ranks of tensor parallel do not divide")
    if name := overlooked(network.base_model, plan):
        raise ValueError(f"the plan for tensor parallel of {kind} leaves out {name}; take --trainer.strategy fsdp2")
    by_heads = []
    for pattern, style in plan.items():
        for module in matching(network.base_model, pattern):
            if style == SUMMED:
                by_heads.append(module)
            elif isinstance(module, nn.Linear):
                parallelize_module(module, mesh, STYLES[style]())
            else:  # an adapter: the matrix that has the sharded side goes with it
                side = "lora_B" if style == "colwise" else "lora_A"
                names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
                split = [name for name in names if name == "base_layer" or name.startswith(side)]
                parallelize_module(module, mesh, {name: STYLES[style]() for name in split})
    return by_heads


def overlooked(base: nn.Module, plan: dict[str, str]) -> str | None:
    """A weight beside a matrix cut by columns and one cut by rows of which the plan says nothing: if it stands between
    them, each rank would have a part of its gradient."""
    styles: dict[str, set[str]] = {}
    for pattern, style in plan.items():
        styles.setdefault(pattern.rpartition(".")[0], set()).add(style)
    planned = {id(p) for pattern in plan for module in matching(base, pattern) for p in module.parameters()}
    for pattern in (pattern for pattern, found in styles.items() if found >= STYLES.keys()):
        for name, parameter in (pair for module in matching(base, pattern) for pair in module.named_parameters()):
            if parameter.requires_grad and id(parameter) not in planned:
                return f"{pattern}.{name}"
    return None


def matching(base: nn.Module, pattern: str) -> Iterator[nn.Module]:
    """Modules by their names, in which * stands for a number."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return (module for name, module in base.named_modules() if expression.fullmatch(name))


def shard(network: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype | None = None, offloads: bool = False) -> None:
    """FSDP2: each layer by itself, then what is left; computed in `dtype`, added up in float32. Of a mesh of two
    dimensions the first has copies."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offloads else OffloadPolicy()
    layers, names = set(network._no_split_modules or ()), network.named_parameters(remove_duplicate=False)
    times = Counter(id(parameter) for _, parameter in names)
    for module in reversed([module for module in network.modules() if type(module).__name__ in layers]):
        if all(times[id(parameter)] == 1 for parameter in module.parameters()):  # embeddings that are the head, too
            fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(network, mesh=mesh, mp_policy=policy, offload_policy=offload)
