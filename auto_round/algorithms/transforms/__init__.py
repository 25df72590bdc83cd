"""Transforms: rewrites of weights before quantization. The guide's paths of those that are missing say what works."""

from auto_round.later import add_missing_modules

add_missing_modules(__name__, "awq", "awq.config", "hadamard", "hadamard.config", "spinquant")
