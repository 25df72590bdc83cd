"""Integer codes to the int32 words of each checkpoint layout, and back. Pure functions of tensors."""
