"""What is trained: one LightningModule an objective, and the small pure pieces they share."""

import gc
import os

# Read when torch is loaded: idle OpenMP threads spin for some microseconds and then sleep. Spinning for ever, their
# default, makes a step ten times slower beside another busy process; sleeping at once halves the speed of small models.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Importing Lightning and transformers makes a million objects; fewer collections save half a second of start-up.
# `lightning_modules.cli.main` puts Python's own thresholds back.
gc.set_threshold(50_000, 20, 100)
