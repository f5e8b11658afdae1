"""A recipe as it is, but for its loss: `fused` or `plain`, which makes all logits.

Run:
    python benchmarks/precision_row.py plain recipes/pretrain.py fit --trainer.max_steps 20
"""

import runpy
import sys

from lightning_modules import token_loss


def main(loss: str, script: str) -> None:
    if loss == "plain":
        token_loss.find_head_loss = lambda *_: None
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    loss = sys.argv[1]
    del sys.argv[:2]
    main(loss, sys.argv[0])
