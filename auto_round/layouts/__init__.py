"""Checkpoint layouts: pack quantization codes and scales into stored tensors, and unpack them again."""
