"""Pretrain a language model on text.

Run:
    python recipes/pretrain.py fit
    python recipes/pretrain.py fit --data.path my_texts/ --trainer.max_steps 2000
    python recipes/pretrain.py fit --config recipes/pretrain_bert.yaml
    python recipes/pretrain.py fit --trainer.default_root_dir runs/mine --ckpt_path last
    python recipes/pretrain.py verify
"""

from pathlib import Path

from datamodules.text import Text
from lightning_modules.cli import main
from lightning_modules.language_module import LanguageModule
from lightning_modules.pretrain import CausalLM

if __name__ == "__main__":
    main(LanguageModule, CausalLM, Text, Path(__file__), __doc__)
