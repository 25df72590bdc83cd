"""Transformations of weights that run before quantization. This version has none."""
