"""Fine-tune a language model on examples of a task.

Run:
    python recipes/finetune.py fit
    python recipes/finetune.py fit --data.path reviews.csv --model.from runs/encoder
    python recipes/finetune.py fit --config recipes/finetune_sentiment.yaml --model.adapter.rank 16
    python recipes/finetune.py fit --config recipes/finetune_text_generation.yaml
    python recipes/finetune.py fit --config recipes/finetune_question_answering.yaml
    python recipes/finetune.py fit --config recipes/finetune_translation.yaml
    python recipes/finetune.py fit --config recipes/finetune_summarization.yaml
    python recipes/finetune.py verify
"""

from pathlib import Path

from datamodules.examples import Examples
from datamodules.instructions import Instructions
from datamodules.labelled import Labelled
from datamodules.pairs import Pairs
from datamodules.spans import Spans
from lightning_modules.classification import Classification
from lightning_modules.cli import main
from lightning_modules.finetune import FineTune
from lightning_modules.question_answering import QuestionAnswering
from lightning_modules.summarization import Summarization
from lightning_modules.text_generation import TextGeneration
from lightning_modules.translation import Translation

TASKS = (Classification, QuestionAnswering, Summarization, TextGeneration, Translation)
DATA = (Instructions, Labelled, Pairs, Spans)
"""What --model and --data know by its name alone, since it is imported here."""

if __name__ == "__main__":
    script = Path(__file__)
    main(FineTune, Classification, Examples, script, __doc__, script.with_name("finetune_sentiment.yaml"))
