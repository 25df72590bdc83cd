"""Helpers that scripts import from `auto_round.utils`: walking a model by name, finding its blocks, loading it.

Nothing in this package uses them. They keep the incumbent's names and what it returns.
"""

from auto_round.layer_config import parse_layer_config as parse_layer_config_arg
from auto_round.utils.loading import diffusion_load_model, llm_load_model, mllm_load_model
from auto_round.utils.modules import (
    find_matching_blocks,
    get_attr,
    get_block_names,
    get_lm_head_name,
    get_major_device,
    get_module,
    is_pure_text_model,
    set_attr,
    set_module,
)

__all__ = [
    "diffusion_load_model",
    "find_matching_blocks",
    "get_attr",
    "get_block_names",
    "get_lm_head_name",
    "get_major_device",
    "get_module",
    "is_pure_text_model",
    "llm_load_model",
    "mllm_load_model",
    "parse_layer_config_arg",
    "set_attr",
    "set_module",
]
