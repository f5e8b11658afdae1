"""Fine-tuning a few added weights instead of all: adapters of the peft library."""

import importlib.util
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel

TASKS = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
}
"""What peft calls them: it decides which head stays trainable and is saved beside the adapter."""


class Adapter:
    """Matrices of low rank beside those of the model, https://arxiv.org/abs/2106.09685.

    Args:
        kind: lora, or dora, which learns the length of each row apart, https://arxiv.org/abs/2402.09353.
        rank: Of the added matrices.
        alpha: Their product is scaled by alpha / rank.
        dropout: Of what goes into them.
        target_modules: Names of the layers they stand beside, or all-linear. Left out: peft's choice for the
            architecture, mostly the queries and values of attention.
        bits: Loads the model's own weights in 4 or 8 bits, https://arxiv.org/abs/2305.14314. Needs a CUDA device and
            the package bitsandbytes.
    """

    def __init__(
        self,
        kind: Literal["lora", "dora"] = "lora",
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: list[str] | Literal["all-linear"] | None = None,
        bits: Literal[4, 8] | None = None,
    ):
        if rank < 1:
            raise ValueError(f"--model.adapter.rank is {rank}; it must be 1 or more")
        self.kind, self.rank, self.alpha, self.dropout = kind, rank, alpha, dropout
        self.target_modules = target_modules
        self.bits = bits
        if bits is not None and not (torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes")):
            raise ValueError(
                f"--model.adapter.bits {bits} needs a CUDA device and the package bitsandbytes (pip install "
                "'lightning-lm-recipes[qlora]'); leave it out to train beside whole weights"
            )

    def loading(self) -> dict[str, object]:
        """What from_pretrained is told besides."""
        if self.bits is None:
            return {}
        from transformers import BitsAndBytesConfig

        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16} | four
        return {"quantization_config": BitsAndBytesConfig(**(settings if self.bits == 4 else {"load_in_8bit": True}))}

    def added_to(self, network: PreTrainedModel, auto_class: type, new_parts: list[str]) -> "PeftModel":
        """The network with new weights whose product is zero, so that it is still the same function.

        `new_parts` names modules besides the head that the model to begin with lacks: they learn, and are saved, whole.
        """
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if getattr(network, "is_quantized", False):
            network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
        config = LoraConfig(
            task_type=TASKS[auto_class.__name__],
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_dora=self.kind == "dora",
            target_modules=self.target_modules,
            modules_to_save=new_parts or None,
        )
        try:
            return get_peft_model(network, config)
        except ValueError as error:
            raise ValueError(
                f"--model.adapter does not fit {type(network).__name__}: {str(error).splitlines()[0]}; name its layers "
                "by --model.adapter.target_modules, or all-linear"
            ) from None

    def merged(
        self, trained: "PeftModel", base: PreTrainedModel, auto_class: type, new_parts: list[str]
    ) -> PreTrainedModel:
        """The network that a trained one adds up to; onto `base`, whole weights of the same model, where its own are of
        few bits."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        whole = self.added_to(base, auto_class, new_parts)
        set_peft_model_state_dict(whole, get_peft_model_state_dict(trained))
        return whole.merge_and_unload()
