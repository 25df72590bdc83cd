"""Codecs of llama.cpp's block types (Q4_0 to Q6_K): pack, unpack, quantize and search."""
