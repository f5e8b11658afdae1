"""What is trained on: one LightningDataModule a kind of data, one batch contract (`base.py`)."""

import gc
import os

# The same as in lightning_modules, which says why: whichever is imported first.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
gc.set_threshold(50_000, 20, 100)
