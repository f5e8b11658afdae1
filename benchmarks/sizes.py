"""What is trained in the benchmarks, and the order that a row's process is given.

Imports little: what a row imports counts in its peak memory.
"""

import json
from dataclasses import asdict, dataclass

import transformers


@dataclass(frozen=True)
class Size:
    name: str
    config: str
    """Class of transformers."""
    fields: dict[str, int]
    seq_len: int
    batch_size: int
    bpe_ids: int | None = None
    """Vocabulary: so many ids of a BPE on the standard library; None: 65 characters."""

    def architecture(self, vocab_size: int, **fields: float) -> transformers.PreTrainedConfig:
        return getattr(transformers, self.config)(vocab_size=vocab_size, **self.fields, **fields)

    def without_dropout(self) -> dict[str, float]:
        """Fields that turn off the dropout that the architecture has by default."""
        return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if self.config == "GPT2Config" else {}


def nanochat(width: int, layers: int, heads: int, seq_len: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": seq_len,
    }


SMALL = Size("4L/128", "NanoChatConfig", nanochat(128, 4, 4, 64), seq_len=64, batch_size=32)
MIDDLE = Size("6L/384", "NanoChatConfig", nanochat(384, 6, 6, 256), seq_len=256, batch_size=8)
GPT2 = Size("GPT-2 124M", "GPT2Config", {}, seq_len=1024, batch_size=1, bpe_ids=50257)

GPT2_GPU = Size("GPT-2 124M", "GPT2Config", {}, seq_len=1024, batch_size=16, bpe_ids=50257)
LLAMA_1B = Size(
    "Llama 1B",
    "LlamaConfig",
    {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    seq_len=2048,
    batch_size=4,
    bpe_ids=32000,
)


@dataclass(frozen=True)
class Job:
    """What a row is told. All rows of a size read the same tokens."""

    size: Size
    folder: str
    """Scratch, removed by the driver."""
    text_path: str | None
    vocab_size: int
    tokens_file: str
    tokens_dtype: str
    bf16: bool
    """Whether bf16 pays on this machine."""
    device: str = "cpu"
    compile: bool = False
    best_settings: bool = False
    """Of transformers' Trainer."""
    task: str = ""
    """Of fine-tuning: labels or spans; empty where a size is pretrained."""
    data_file: str = ""
    model: str = ""
    """Folder of the model to begin with."""
    steps: int = 0
    """Of a run to its end; 0: as many as turns are taken."""
    by_length: bool = False
    """Whether the Trainer puts examples of one length beside each other."""
    commands: int = -1
    """File descriptors of the turns."""
    answers: int = -1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Job":
        fields = json.loads(text)
        return Job(**(fields | {"size": Size(**fields["size"])}))
