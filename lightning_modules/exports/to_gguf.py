"""GGUF: one file with weights, settings and tokenizer, for llama.cpp and what is built on it."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lightning_modules.exports.gguf_tokenizer import add_tokenizer
from lightning_modules.model_folder import LoadedModel

FAMILIES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "GPT2LMHeadModel": gguf.MODEL_ARCH.GPT2,
}
"""Those that both llama.cpp and transformers' reader know, so that what is written can be asked."""

ACTIVATIONS = {"LlamaForCausalLM": "silu", "Qwen2ForCausalLM": "silu", "Qwen3ForCausalLM": "silu"}
TYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}


def require_family(model: PreTrainedModel) -> None:
    """Raises ValueError for what llama.cpp would compute otherwise, or not at all."""
    name, config = type(model).__name__, model.config
    if name not in FAMILIES:
        raise ValueError(
            f"--format gguf is for Llama, Qwen2, Qwen3 and GPT-2, not for {name}; onnx, pt2 and pte take it"
        )
    activation = config.activation_function if name == "GPT2LMHeadModel" else config.hidden_act
    if activation != ACTIVATIONS.get(name, "gelu_new"):
        raise ValueError(f"--format gguf: llama.cpp knows {name} with another activation than {activation}; see onnx")
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default"}  # GPT-2 has none
    if rope["rope_type"] != "default" or getattr(config, "use_sliding_window", False):
        raise ValueError(
            "--format gguf writes plain rotary positions and full attention; this model has others; see onnx"
        )


def write(loaded: LoadedModel, file: Path, gguf_type: str) -> None:
    model, config = loaded.model, loaded.model.config
    architecture = FAMILIES[type(model).__name__]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(Path(loaded.folder).name)
    writer.add_file_type(TYPES[gguf_type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)
    add_tokenizer(writer, loaded.tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in tensors_of(model).items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"{name} has no name in GGUF"
        data = tensor.numpy()
        kind = type_of(found, data, gguf_type)
        writer.add_tensor(found, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * width)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_size(config))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))


def head_size(config: PreTrainedConfig) -> int:
    # Qwen2's config has no head_dim.
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights as llama.cpp has them: (out, in), a tied head left out, the heads of Llama in its own order."""
    config, transposed = model.config, {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied matrix comes once, as the embedding
        tensor = parameter.detach().float()
        if name in transposed:
            tensor = tensor.T
        if config.model_type == "llama" and ".q_proj." in name:
            tensor = interleaved(tensor, config.num_attention_heads)
        elif config.model_type == "llama" and ".k_proj." in name:
            tensor = interleaved(tensor, config.num_key_value_heads)
        tensors[name] = tensor.contiguous()
    return tensors


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp turns pairs of neighbours in a head, transformers the first half with the second."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def type_of(name: str, data: np.ndarray, gguf_type: str) -> gguf.GGMLQuantizationType:
    """How a tensor is stored: vectors and positions as they are, tables of tokens with 8 bits at least, and with 16
    what does not divide into blocks."""
    wanted, half = TYPES[gguf_type][0], gguf.GGMLQuantizationType.F16
    if data.ndim == 1 or name.startswith("position_embd") or gguf_type == "F32":
        return gguf.GGMLQuantizationType.F32
    if gguf_type == "Q4_0" and name.startswith(("token_embd", "output")):
        wanted = gguf.GGMLQuantizationType.Q8_0
    return wanted if data.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else half


def open_file(loaded: LoadedModel, file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer as transformers reads them, which makes float32 of all weights.

    With the config of the source: the reader leaves out what the file says of Qwen3's head size and GPT-2's positions.
    """
    model = type(loaded.model).from_pretrained(
        file.parent, gguf_file=file.name, config=loaded.model.config, dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
