"""What is trained on: one LightningDataModule a kind of data, one batch contract (`base.py`)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see lightning_modules/__init__.py
