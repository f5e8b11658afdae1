"""What is trained: one LightningModule an objective, and the small pure pieces they share."""

import gc
import os

# Read when torch is loaded: idle OpenMP threads sleep instead of spinning, or a second busy process makes every step up
# to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Importing Lightning and transformers makes a million objects; fewer collections save half a second of start-up.
# `lightning_modules.cli.main` puts Python's own thresholds back.
gc.set_threshold(50_000, 20, 100)
