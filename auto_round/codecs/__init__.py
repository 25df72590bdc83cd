"""Codecs: how tensors become codes and back, for every data type. Importing the package registers the types."""

import auto_round.codecs.block_float
import auto_round.codecs.ggml.functions
import auto_round.codecs.int  # noqa: F401  (each import registers its data types)
