"""Fine-tune a language model on examples of a task.

Run:
    python recipes/finetune.py fit
    python recipes/finetune.py fit --data.path reviews.csv --model.from runs/mine
    python recipes/finetune.py fit --config recipes/finetune_sentiment.yaml --model.adapter.rank 16
    python recipes/finetune.py fit --config recipes/finetune_text_generation.yaml
    python recipes/finetune.py fit --config recipes/finetune_question_answering.yaml
    python recipes/finetune.py fit --config recipes/finetune_translation.yaml
    python recipes/finetune.py fit --config recipes/finetune_summarization.yaml
    python recipes/finetune.py verify
"""

from pathlib import Path

from datamodules.examples import Examples
from datamodules.instructions import Instructions  # noqa: F401
from datamodules.labelled import Labelled  # noqa: F401 - so that --data Labelled needs no package
from datamodules.pairs import Pairs  # noqa: F401
from datamodules.spans import Spans  # noqa: F401
from lightning_modules.classification import Classification
from lightning_modules.cli import main
from lightning_modules.finetune import FineTune
from lightning_modules.question_answering import QuestionAnswering  # noqa: F401
from lightning_modules.summarization import Summarization  # noqa: F401
from lightning_modules.text_generation import TextGeneration  # noqa: F401
from lightning_modules.translation import Translation  # noqa: F401

if __name__ == "__main__":
    script = Path(__file__)
    main(FineTune, Classification, Examples, script, __doc__, script.with_name("finetune_sentiment.yaml"))
