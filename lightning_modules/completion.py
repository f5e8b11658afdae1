"""What the tasks share whose answers are written: a decoder or an encoder-decoder that learns to, and validation that
lets it write.

Shape suffixes: B examples, T tokens of the longest input, P of the longest prompt, U of the longest answer.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from lightning_modules.finetune import FineTune
from lightning_modules.losses import IGNORED
from lightning_modules.metrics import LanguageModelLoss
from lightning_modules.model_folder import max_positions
from lightning_modules.prompt_tokens import as_peft, first_ids, prompted, put_before
from lightning_modules.token_loss import TokenLoss, shifted_right

Scores = dict[str, float]


class Completion(FineTune):
    """A subclass says how what was written is judged.

    Args:
        num_beams: Of beam search; 1 always takes the likeliest token.
        max_new_tokens: Most tokens of what is written in validation and prediction. Left out: as many as the longest
            answer in the data.
        label_smoothing: Weight of the uniform distribution in the target.
        prompt_tokens: Trains this many vectors in front of every input instead of the model, which begin as words drawn
            from the vocabulary, or those of a text. A run then leaves the folder of a prompt of the peft library.
    """

    objective = "completions"
    has_new_head = False
    needs = "does not write; take a decoder such as transformers.LlamaConfig, or an encoder-decoder such as T5Config"
    units = (
        "`val_loss` is in nats per token of the held-out answers, their ends among them; `val_bits_per_byte` divides "
        "the same sum by their UTF-8 bytes; `val_stopped` is the part of what was written that came to its end by "
        "itself. "
    )

    def __init__(
        self,
        *,
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        label_smoothing: float = 0.0,
        prompt_tokens: int | str | None = None,
        **settings: object,
    ):
        super().__init__(**settings)
        for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"--model.{name} is {value}; it must be 1 or more")
        self.num_beams, self.max_new_tokens = num_beams, max_new_tokens
        self.label_smoothing = label_smoothing
        if prompt_tokens is not None:
            if not prompt_tokens or (isinstance(prompt_tokens, int) and prompt_tokens < 0):
                raise ValueError(f"--model.prompt_tokens is {prompt_tokens!r}; pass 1 or more, or a text")
            if self.origin is None or self.adapter is not None:
                other = "new weights" if self.origin is None else "--model.adapter"
                raise ValueError(f"--model.prompt_tokens teaches a pretrained model as it is: not with {other}")
        self.prompt_tokens = prompt_tokens
        self.validation = LanguageModelLoss()

    # The task

    @abstractmethod
    def score_names(self) -> list[str]:
        """What `scores` finds."""

    @abstractmethod
    def scores(self, written: list[str], references: list[list[str]]) -> Scores:
        """Of all that was written against one or several right answers each."""

    @abstractmethod
    def row_score(self, written: str, references: Sequence[str]) -> float:
        """Of one answer, 0 to 1."""

    # The network

    @staticmethod
    def auto_class_of(config: PreTrainedConfig) -> type | None:
        if config.is_encoder_decoder:
            return AutoModelForSeq2SeqLM if type(config) in AutoModelForSeq2SeqLM._model_mapping else None
        if type(config) not in AutoModelForCausalLM._model_mapping:
            return None
        # Encoders have a class that writes, too, which nobody trained.
        is_encoder = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
        return None if is_encoder else AutoModelForCausalLM

    @property
    def encodes_apart(self) -> bool:
        return self.base_config.is_encoder_decoder

    def head_fields(self) -> dict[str, object]:
        return {}

    def measured(self) -> list[str]:
        return ["loss", "perplexity", "bits_per_byte", *self.score_names(), "stopped"]

    def prepare(self, network: PreTrainedModel) -> None:
        self.positions, self.shift = max_positions(network), 0
        if self.prompt_tokens is not None and self.is_sharded:
            raise ValueError("--model.prompt_tokens trains next to nothing; take --trainer.strategy ddp for it")
        if self.prompt_tokens is not None:
            self._put_prompt_before(network)
        self.token_loss = TokenLoss(network, self.label_smoothing, keep_only_labels=True, agreed=self.as_the_first)
        # generate() fills what a config leaves open from the network's own, so that says no more than which tokens
        # begin and end: penalties and lengths that belong to another task would be scored here and not exported.
        own = network.generation_config
        start = network.config.decoder_start_token_id if self.encodes_apart else None
        network.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            decoder_start_token_id=own.decoder_start_token_id or start,
            forced_bos_token_id=own.forced_bos_token_id,
        )

    def _put_prompt_before(self, network: PreTrainedModel) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            prompt_P = first_ids(self.prompt_tokens, self.trainer.datamodule.tokenizer)
        if self.positions is not None:
            self.positions -= len(prompt_P)
            self._require_positions(self.positions)
        put_before(network, prompt_P)
        self.shift = 0 if self.encodes_apart else len(prompt_P)

    def inputs(self, batch: dict[str, Tensor], config: PreTrainedConfig | None = None) -> dict[str, Tensor | bool]:
        """What a network reads of a batch, but for a prompt; of another config than the own, if one is given."""
        if not self.encodes_apart:
            # Padding stands behind all that counts, where a decoder never looks: no mask, and the fast attention.
            return {"input_ids": batch["input_ids"], "use_cache": False}
        config = config or self.plain_network.config
        shifted_BU = shifted_right(batch["labels"], config.decoder_start_token_id, config.pad_token_id)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return inputs | {"decoder_input_ids": shifted_BU, "use_cache": False}

    def loss(self, batch: dict[str, Tensor], divisor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        inputs, labels_BU = self.prompted(self.inputs(batch)), F.pad(batch["labels"], (self.shift, 0), value=IGNORED)
        return self.token_loss(partial(self.plain_network, **inputs), labels_BU, divisor)

    def logits(self, batch: dict[str, Tensor], network: PreTrainedModel | None = None) -> Tensor:
        """(B, T, V), of an encoder-decoder (B, U, V); of another network than the module's own, if one is given."""
        if network is None:
            found = self.plain_network(**self.prompted(self.inputs(batch)))
        else:
            found = network(**self.inputs(batch, network.config))
        return found.logits[:, self.shift :].float()

    def prompted(self, inputs: dict[str, Tensor | bool]) -> dict[str, Tensor | bool]:
        return inputs if self.prompt_tokens is None else prompted(self.plain_network, inputs)

    def counted_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        read = super().counted_tokens(batch)
        return read + (batch["labels"] >= 0).sum() if self.encodes_apart else read

    # Writing

    @torch.no_grad()
    def write(self, batch: dict[str, Tensor]) -> list[tuple[str, bool]]:
        """For each example what the model answers, and whether it came to an end by itself."""
        data = self.trainer.datamodule
        wanted = self.max_new_tokens or data.longest_answer
        lengths_B = torch.ones_like(batch["prompt_lengths"]) if self.encodes_apart else batch["prompt_lengths"]
        # The last new token is never read, so it needs no position. What one row has no room for the others still have.
        room_B = (self.positions or 2**31) - lengths_B + 1
        new_B = room_B.clamp(min=1, max=wanted)
        written: list[tuple[str, bool]] = [("", False)] * len(new_B)
        for new in self.of_all_ranks(new_B.unique().tolist()):
            rows = (new_B == new).nonzero()[:, 0]
            some = rows if len(rows) else rows.new_zeros(1)  # only that the ranks write together
            found = self._written({name: value[some] for name, value in batch.items()}, new)
            for row, text in zip(rows.tolist(), found if len(rows) else [], strict=True):
                written[row] = text
        return written

    def _written(self, batch: dict[str, Tensor], new: int) -> list[tuple[str, bool]]:
        tokenizer = self.trainer.datamodule.tokenizer
        if self.encodes_apart:
            prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        else:
            ids_BP, mask_BP = left_padded(batch["input_ids"], batch["prompt_lengths"], self.trainer.datamodule.pad_id)
            prompts = {"input_ids": ids_BP, "attention_mask": mask_BP}
        prompts = self.prompted(prompts)
        before = 1 if self.encodes_apart else prompts["input_ids"].shape[1]  # a decoder's first token is given
        settings = self.generation(new)
        together = {"generation_config": settings, "synced_gpus": self.is_sharded}
        tokens = self.plain_network.generate(**prompts, **together)[:, before:].tolist()
        ends = set(settings.eos_token_id)
        return [
            (tokenizer.decode(ids, skip_special_tokens=True).strip(), any(token in ends for token in ids))
            for ids in tokens
        ]

    def generation(self, new: int) -> GenerationConfig:
        """How an answer of at most so many tokens is written: the likeliest, with the key-value cache."""
        data, own = self.trainer.datamodule, self.plain_network.generation_config
        ends = [own.eos_token_id] if isinstance(own.eos_token_id, int) else own.eos_token_id or []
        return GenerationConfig(
            max_new_tokens=new,
            num_beams=self.num_beams,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted({*ends, data.tokenizer.eos_token_id}),
            pad_token_id=data.pad_id,
            bos_token_id=own.bos_token_id,
            decoder_start_token_id=own.decoder_start_token_id,
            forced_bos_token_id=own.forced_bos_token_id,
        )

    # Validation

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _, nats, count = self.loss(batch)
        self.validation.update(nats, count, batch["label_bytes"].sum())
        self.predict_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        here_B = batch["rows"] >= 0
        if not here_B.any():
            for new in self.of_all_ranks([]):
                self._written({name: value[:1] for name, value in batch.items()}, new)
            return
        data = self.trainer.datamodule
        here = {name: value[here_B] for name, value in batch.items()}
        for row, (text, stopped) in zip(here["rows"].tolist(), self.write(here), strict=True):
            self.predictions[row] = {"prediction": text, "stopped": stopped}
            if data.has_answers:
                score = self.row_score(text, data.asked[row]["references"])
                self.predictions[row]["score"] = round(score, 6)

    def found(self) -> dict[str, float | Tensor]:
        values = self.validation.compute()
        self.validation.reset()
        self.gather_predictions()
        rows = sorted(self.predictions)
        asked = self.trainer.datamodule.asked
        written = [self.predictions[row]["prediction"] for row in rows]
        values |= self.scores(written, [asked[row]["references"] for row in rows])
        values["stopped"] = sum(self.predictions[row]["stopped"] for row in rows) / max(1, len(rows))
        return values

    # What came of a run

    @property
    def beside(self) -> str | None:
        return super().beside if self.prompt_tokens is None else f"a prompt begun as {self.prompt_tokens!r}"

    def exported(self) -> PreTrainedModel:
        network = super().exported() if self.prompt_tokens is None else as_peft(self.network, self.auto_class)
        network.generation_config = self.generation(self.max_new_tokens or self.trainer.datamodule.longest_answer)
        return network

    def opened(self, folder: Path) -> nn.Module:
        if self.prompt_tokens is None:
            return super().opened(folder)
        from peft import PeftModel

        return PeftModel.from_pretrained(self.auto_class.from_pretrained(self.origin), folder)

    def next_command(self, model: str, data: LightningDataModule) -> str:
        """For the terminal; `model` is quoted."""
        if self.prompt_tokens is not None:
            return super().next_command(model, data)
        if self.encodes_apart:
            return f"python recipes/generate.py --model {model} --num_beams 4 --prompt …"
        asked = "[{'role': 'user', 'content': '…'}]"
        code = f"from transformers import pipeline; print(pipeline('text-generation', {model!r})({asked}))"
        return f'python -c "{code}"'


def left_padded(ids_BT: Tensor, lengths_B: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """(B, P) the first tokens of each row, shifted to the right end, and a mask of them."""
    width = int(lengths_B.max())
    places_BP = torch.arange(width, device=ids_BT.device) - (width - lengths_B)[:, None]
    mask_BP = places_BP >= 0
    return ids_BT.gather(1, places_BP.clamp(min=0)).masked_fill(~mask_BP, pad), mask_BP.long()
