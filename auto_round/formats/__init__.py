"""Output formats, the public import path: look up, register and list them. The classes are in `formats.base`."""

from auto_round.formats.base import (
    OutputFormat,
    available_formats,
    formats_for_scheme,
    get_format,
    parse_formats,
    register_format,
)

__all__ = ["OutputFormat", "available_formats", "formats_for_scheme", "get_format", "parse_formats", "register_format"]
