"""Public import path of the helpers for a data type of your own; see `auto_round.codecs.registry`."""

from auto_round.codecs.registry import (
    get_quant_func,
    reshape_pad_tensor_by_group_size,
    revert_tensor_by_pad,
    round_ste,
)

__all__ = ["get_quant_func", "reshape_pad_tensor_by_group_size", "revert_tensor_by_pad", "round_ste"]
