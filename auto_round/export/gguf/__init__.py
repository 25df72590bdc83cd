"""GGUF files: which tensors they hold, in which type, under which name, and what they say about the model."""
