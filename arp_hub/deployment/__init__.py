"""Exports: files that are written, checked against PyTorch, and timed beside the dense model."""
