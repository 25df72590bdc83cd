"""The user guide's import path of `AWQConfig`: importing it says what works instead."""

from auto_round.later import missing_classes

__getattr__ = missing_classes(__name__)
