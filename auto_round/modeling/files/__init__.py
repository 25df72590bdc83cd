"""Reading checkpoints: safetensors, pickles, quantized inputs, and the folder around them."""
