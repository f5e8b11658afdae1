"""Making a trained model smaller, and saying what that costs."""
