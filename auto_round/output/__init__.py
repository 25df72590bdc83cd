"""Write output folders: safetensors and GGUF files, staging and publishing, digests for verification."""
