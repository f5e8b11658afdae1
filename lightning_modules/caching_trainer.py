"""The verb `cache` of distillation: what the teacher makes of a text, written down once."""

import os
import sys
import time
from pathlib import Path
from typing import ClassVar, Literal

from lightning.pytorch import LightningDataModule, Trainer

from lightning_modules.architectures import bytes_of
from lightning_modules.distillation import Distilled


class CachingTrainer(Trainer):
    """Lightning's, which can write a teacher's cache, too."""

    verbs: ClassVar[dict[str, set[str]]] = {"cache": {"model", "datamodule"}}
    """Of the command line, with the arguments that it does not show."""

    def cache(
        self,
        model: Distilled,
        datamodule: LightningDataModule,
        folder: str,
        scheme: Literal["top_k", "sampled", "hybrid"] = "hybrid",
        exact: int = 4,
        drawn: int = 27,
        temperature: float = 1.0,
        rows: int | None = None,
    ) -> None:
        """Writes the teacher's words for each token of the text; the same command goes on where it was interrupted.

        Args:
            model: Whose teacher is asked.
            datamodule: Whose rows are read.
            folder: Where to.
            scheme: top_k: the `exact` likeliest words, all others as one; sampled: `drawn` words by their probability;
                hybrid: the `exact` likeliest, and `drawn` ones of the others.
            exact: Words of a token that are kept with their probability.
            drawn: Words of a token that are drawn.
            temperature: Divides the teacher's logits; that of the training that reads the cache.
            rows: Of the order of training. Left out: all rows of an epoch.
        """
        exact, drawn = exact if scheme != "sampled" else 0, drawn if scheme != "top_k" else 0
        if exact < 0 or drawn < 0 or exact + drawn < 1 or temperature <= 0:
            raise ValueError(
                f"--exact {exact}, --drawn {drawn}, --temperature {temperature}: pass 1 or more words, T > 0"
            )
        if rows is not None and rows < 1:
            raise ValueError(f"--rows is {rows}; pass 1 or more, or leave it out for all")
        if len(model.teachers) > 1:
            raise ValueError("a cache is of one teacher; write one for each")
        self.datamodule = datamodule
        datamodule.trainer, self.strategy._lightning_module, model.trainer = self, model, self
        datamodule.prepare_data()
        datamodule.setup("fit")
        if exact + drawn > datamodule.vocab_size:
            raise ValueError(f"--exact {exact} and --drawn {drawn} are more than the {datamodule.vocab_size} words")
        teacher = model.teachers[0]
        teacher.require_fit(datamodule)
        model.load_teachers()
        about = datamodule.about_cache(
            scheme=scheme,
            exact=exact,
            drawn=drawn,
            temperature=temperature,
            rows=rows or datamodule.rows_per_epoch,
        )
        print(f"teacher  {teacher.describe()}")
        tokens = about.rows * about.labels_of_a_row
        size = bytes_of(tokens * about.bytes_of_a_token)
        print(f"cache    {folder}: {tokens:,} tokens × {about.bytes_of_a_token:.1f} bytes = {size}", flush=True)
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        start, done = time.perf_counter(), 0
        for count in datamodule.write_cache(Path(folder), about, model.kept_words, rank, ranks):
            done += count
            rate = done * about.labels_of_a_row / (time.perf_counter() - start)
            print(f"{done:,} of {about.rows:,} rows, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
        print(f"next     python recipes/distill.py fit --model.teacher {teacher.folder} --data.teacher_cache {folder}")
