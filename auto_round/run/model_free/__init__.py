"""Model-free mode: quantize a checkpoint tensor by tensor, without its model class."""
