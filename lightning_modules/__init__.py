"""What is trained: one LightningModule an objective, and the small pure pieces they share."""

import before_torch

before_torch.prepare()
