"""GGUF files: tensor names, types, metadata and tokenizer that llama.cpp expects for each model family."""
