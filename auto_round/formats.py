"""The output formats, under the shorter of their two import paths; see `auto_round.export.formats`."""

from auto_round.export.formats import (
    OutputFormat,
    available_formats,
    format_table,
    formats_for_scheme,
    get_format,
    parse_formats,
    register_format,
)

__all__ = [
    "OutputFormat",
    "available_formats",
    "format_table",
    "formats_for_scheme",
    "get_format",
    "parse_formats",
    "register_format",
]
