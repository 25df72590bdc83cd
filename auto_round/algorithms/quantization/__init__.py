"""Quantizers of blocks. The guide's path of `AWQConfig`, which is missing, says what works instead."""

from auto_round.later import add_missing_modules

add_missing_modules(__name__, "awq", "awq.config")
