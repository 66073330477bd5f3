"""Images and labels for training and evaluation."""
