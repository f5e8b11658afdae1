"""Fine-tuning a few added weights instead of all: adapters of the peft library."""

from typing import TYPE_CHECKING, Literal

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
    """

    def __init__(
        self,
        kind: Literal["lora", "dora"] = "lora",
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: list[str] | Literal["all-linear"] | None = None,
    ):
        if rank < 1:
            raise ValueError(f"--model.adapter.rank is {rank}; it must be 1 or more")
        self.kind, self.rank, self.alpha, self.dropout = kind, rank, alpha, dropout
        self.target_modules = target_modules

    def added_to(self, network: PreTrainedModel, auto_class: type) -> "PeftModel":
        """The network with new weights whose product is zero, so that it is still the same function."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type=TASKS[auto_class.__name__],
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_dora=self.kind == "dora",
            target_modules=self.target_modules,
        )
        try:
            return get_peft_model(network, config)
        except ValueError as error:
            raise ValueError(
                f"--model.adapter does not fit {type(network).__name__}: {str(error).splitlines()[0]}; name its layers "
                "by --model.adapter.target_modules, or all-linear"
            ) from None
