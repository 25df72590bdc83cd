"""The judge beside, with weights dequantized while they are read and activations left as they are."""

from __future__ import annotations

import sys

from judge import main

if __name__ == "__main__":
    main(*sys.argv[1:], "dequantize")
