"""What is trained: one LightningModule an objective, and the small pure pieces they share."""

import os

# Idle OpenMP threads sleep instead of spinning, or a second busy process makes every step up to ten times slower.
# Read when torch is loaded, so it stands in both packages, before anything imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
