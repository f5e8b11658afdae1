"""How layers are named to people."""

from transformers import PreTrainedModel

from lightning_modules.activations import LAYER


def named(names: list[str]) -> str:
    """How many, and which; those of layers by the part that they share."""
    kinds = dict.fromkeys(name[match.end(2) + 1 :] if (match := LAYER.search(name)) else name for name in names)
    return f"{len(names)} ({', '.join(kinds)})"


def left_of(network: PreTrainedModel, done: dict[str, object]) -> str:
    """Matrices, and what has more axes such as experts, to which nothing was done: how many numbers of how many."""
    weights = dict(network.named_parameters())
    left = [name for name, p in weights.items() if p.ndim >= 2 and name.rpartition(".")[0] not in done]
    numbers = sum(weights[name].numel() for name in left)
    share = numbers / sum(p.numel() for p in weights.values())
    return f"{numbers:,} weights ({share:.1%}) as they are: {named(left)}" if left else ""
