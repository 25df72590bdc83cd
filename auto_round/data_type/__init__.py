"""Public face of the data types; a user's own data type is a file in this folder, imported here.

The built-in types are in `auto_round.codecs`, which registers them when it is imported.
"""

import auto_round.codecs  # noqa: F401  (registers the built-in types)
from auto_round.codecs.registry import QUANT_FUNC_WITH_DTYPE, get_quant_func, register_dtype

__all__ = ["QUANT_FUNC_WITH_DTYPE", "get_quant_func", "register_dtype"]
