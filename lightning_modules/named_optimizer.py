"""An optimizer's state by the names of its weights, where its own has their numbers.

Which number a weight has depends on the groups, and those on how weights are sharded; its name does not. torch has the
same in torch.distributed.checkpoint.state_dict, which takes a step to make what a new optimizer lacks and does not know
float32 masters.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

BY_NAME = "by_name"
APART = "a tensor that stands apart"
Named = dict[str, object]
"""{"by_name": True, "state": {weight: {key: value}}, "groups": [{"params": [weights], setting: value}]}"""


def names_of(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Of its weights, in the order of their numbers, of masters those of what they are the masters of; "" for one that
    is none of the module's."""
    found = {id(p): name for name, p in module.named_parameters()}
    all_of_groups = [p for group in optimizer.param_groups for p in group["params"]]
    return [found.get(id(p), "") for p in getattr(optimizer, "mastered", all_of_groups)]


def named(state_dict: dict[str, object], names: list[str]) -> Named:
    """From the state of an optimizer whose weights have these names."""
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in state_dict["param_groups"]]
    return {BY_NAME: True, "state": {names[i]: state for i, state in state_dict["state"].items()}, "groups": groups}


def numbered(found: Named, optimizer: Optimizer, names: list[str]) -> dict[str, object]:
    """The same for an optimizer, whatever its groups are. Raises ValueError where a weight is missing."""
    group_of = {name: group for group in found["groups"] for name in group["params"]}
    if missing := [name for name in names if name not in group_of]:
        raise ValueError(f"the checkpoint's optimizer does not know {missing[0]}; resume with the run's own settings")
    groups, first = [], 0
    for group in optimizer.param_groups:
        numbers = list(range(first, first + len(group["params"])))
        groups.append(group_of[names[first]] | {"params": numbers})
        first += len(numbers)
    states = {i: found["state"][name] for i, name in enumerate(names) if name in found["state"]}
    return {"state": states, "param_groups": groups}


def number_when_loaded(optimizer: Optimizer, module: nn.Module) -> None:
    """Lets an optimizer load what is by name, too."""

    def convert(optimizer: Optimizer, state_dict: dict[str, object]) -> dict[str, object] | None:
        if BY_NAME not in state_dict:
            return None
        names = names_of(optimizer, module)
        found = numbered(state_dict, optimizer, names)
        if not hasattr(optimizer, "mastered"):
            return found
        # Of a sharded run, whose weights are what masters are.
        return {"optimizer": found, "masters": [state_dict["weights"][name] for name in names]}

    optimizer.register_load_state_dict_pre_hook(convert)


def tensors_of(found: Named) -> dict[str, Tensor]:
    """Of the state, by weight and key."""
    return {
        f"{name}::{key}": value
        for name, state in found["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def filled(found: Named, tensors: dict[str, Tensor]) -> Named:
    """A state of which the tensors stood apart, APART in their places."""
    states = {
        name: {key: tensors[f"{name}::{key}"] if value == APART else value for key, value in state.items()}
        for name, state in found["state"].items()
    }
    return found | {"state": states}


def with_tensors(found: Named, map_tensor: Callable[[str, str, Tensor], Tensor]) -> Named:
    """The same with other tensors, made from weight, key and tensor."""
    states = {
        name: {key: map_tensor(name, key, v) if isinstance(v, Tensor) else v for key, v in state.items()}
        for name, state in found["state"].items()
    }
    return found | {"state": states}
