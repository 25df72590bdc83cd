"""The judge beside, on the file dequantized to float32 by llama.cpp itself."""

from __future__ import annotations

import sys

from judge import main

if __name__ == "__main__":
    main([*sys.argv[1:], "float32"])
