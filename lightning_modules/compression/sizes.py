"""How large a model is in each of its dimensions, and the config of a smaller one."""

import functools
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lightning_modules.activations import head_size
from lightning_modules.student import NARROWED, PartOfTeacher, heads_of

INNER = ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "hidden_dim", "encoder_ffn_dim")
"""How configs call the width inside a layer."""


@dataclass(frozen=True)
class Sizes:
    """Of a model; what is None stays."""

    layers: int | None = None
    width: int | None = None
    inner: int | None = None
    heads: int | None = None
    """Of queries; those of keys and values follow."""

    @property
    def only_layers(self) -> bool:
        return self.width is None and self.inner is None and self.heads is None


def inner_field(config: PreTrainedConfig) -> str | None:
    return next((name for name in INNER if name in config.to_dict()), None)


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """None for what a config does not say."""
    text = config.get_text_config()
    name = inner_field(text)
    inner = None if name is None else getattr(text, name) or 4 * text.hidden_size  # GPT-2's, left out
    return Sizes(text.num_hidden_layers, text.hidden_size, inner, getattr(text, "num_attention_heads", None))


def smaller_config(
    network: PreTrainedModel, sizes: Sizes, kept_layers: list[int]
) -> tuple[PreTrainedConfig, PartOfTeacher]:
    """Raises ValueError for sizes that are no part of the network's."""
    config, now = network.config, sizes_of(network.config)
    if not sizes.only_layers:
        require_parts(config)
    for name in ("layers", "width", "inner", "heads"):
        asked, there = getattr(sizes, name), getattr(now, name)
        if asked is not None and not 0 < asked <= there:
            raise ValueError(f"--{name} {asked}: the model has {there}; pass 1 to {there}")
    if sizes.only_layers:
        part = PartOfTeacher(kept_layers)
        return part.config(config), part
    queries, shared = heads_of(config)
    heads = sizes.heads or queries
    if heads % (queries // shared):
        raise ValueError(f"--heads {heads}: {queries // shared} heads share their keys and values; pass a multiple")
    say_sizes(config)
    width = sizes.width or now.width
    if heads * head_size(config) != width and not has_own_head_size(config):
        raise ValueError(
            f"--width {width} with {heads} heads of {head_size(config)}: a {config.model_type} has them side by side "
            f"in its width; pass --width {heads * head_size(config)}, or --heads {width // head_size(config)}"
        )
    if width % heads and width_must_divide(config):
        raise ValueError(
            f"--width {width} with {heads} heads: a {config.model_type} wants its width to divide by its heads; pass "
            f"--width {width // heads * heads}"
        )
    fields = {"hidden_size": width, inner_field(config): sizes.inner or now.inner, "num_attention_heads": heads}
    if "num_key_value_heads" in config.to_dict():
        fields["num_key_value_heads"] = heads * shared // queries
    for name in ("embedding_size", "word_embed_proj_dim"):
        if getattr(config, name, None) == now.width:
            fields[name] = width
    part = PartOfTeacher(kept_layers, {config.attribute_map.get(name, name): value for name, value in fields.items()})
    return part.config(config), part


def require_parts(config: PreTrainedConfig) -> None:
    """Raises ValueError for a family of which a part of a weight is not known."""
    if config.model_type not in NARROWED:
        raise ValueError(
            f"what a part of a {config.model_type} is, is not known, but of {', '.join(NARROWED)}; prune --layers alone"
        )


def config_of(folder: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(folder)


def say_sizes(config: PreTrainedConfig) -> None:
    """Puts into a config what follows from its width, so that it does not follow from another one."""
    setattr(config, inner_field(config), sizes_of(config).inner)
    if has_own_head_size(config):
        config.head_dim = head_size(config)


def has_own_head_size(config: PreTrainedConfig) -> bool:
    """Whether heads may be of another size than their share of the width."""
    return config.model_type in ("llama", "mistral", "nanochat", "qwen2", "qwen3", "smollm3", "t5")


def width_must_divide(config: PreTrainedConfig) -> bool:
    """Whether a config refuses a width that does not divide by its heads, whatever size these have."""
    return has_own_head_size(config) and _refuses_to_divide(type(config))


@functools.cache
def _refuses_to_divide(kind: type[PreTrainedConfig]) -> bool:
    sizes = {"hidden_size": 17, "num_attention_heads": 2, "head_dim": 8}
    try:
        kind.from_dict(kind(hidden_size=16, num_attention_heads=4).to_dict() | sizes)
    except StrictDataclassError:
        return True
    return False


def part_of_size(size: int, share: float) -> int:
    """Rounded to what later divides into groups of weights that share a scale, and what processors read at once."""
    step = 32 if share * size >= 128 else 8
    return size if share == 1 else min(size, max(step, round(share * size / step) * step))
