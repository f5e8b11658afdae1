"""What is trained on: one LightningDataModule a kind of data, one batch contract (`base.py`)."""

import before_torch

before_torch.prepare()
