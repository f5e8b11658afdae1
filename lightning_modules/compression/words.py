"""How layers are named to people."""

from lightning_modules.activations import LAYER


def named(names: list[str]) -> str:
    """How many, and which; those of layers by the part that they share."""
    kinds = dict.fromkeys(name[match.end(2) + 1 :] if (match := LAYER.search(name)) else name for name in names)
    return f"{len(names)} ({', '.join(kinds)})"
