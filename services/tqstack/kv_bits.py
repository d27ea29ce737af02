"""How people write bits per cached value. Text only: settings that load no mlx read it, too."""

from __future__ import annotations

import re

_WIDTH = r"[1-7](?:\.\d+)?|8(?:\.0+)?"
_PAIR = re.compile(rf"k({_WIDTH})v({_WIDTH})|({_WIDTH})", re.IGNORECASE)


def parse_widths(text: str) -> tuple[str, str]:
    """ "4", "3.5" or a pair such as "k4v3" -> (of keys, of values), each as short as can be.

    Raises:
        ValueError: it is none of these; the message says what is allowed.
    """
    match = _PAIR.fullmatch(text.strip())
    if match is None:
        raise ValueError("allowed: 1 to 8, a fraction such as 3.5, or a pair such as k4v3")
    key, value, both = match.groups()
    return f"{float(key or both):g}", f"{float(value or both):g}"
