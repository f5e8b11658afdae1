"""What models are judged by besides the loss: questions, minimal pairs, bias, their own texts, calibration."""
