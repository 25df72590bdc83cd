"""Faster ways to multiply with packed integer weights than dequantizing them for each call."""
