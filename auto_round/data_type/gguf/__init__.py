"""The block types of ggml (GGUF files): what they store, how they are packed, and how weights become them."""
