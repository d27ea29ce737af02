"""Texts from files, as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def token_ids(text: Path, tokenizer: Any) -> np.ndarray:
    """The ids of a plain text, or those that a .npy file holds.

    Raises:
        ValueError: the file holds no ids of this tokenizer.
        OSError: it cannot be read.
    """
    if text.suffix != ".npy":
        return np.array(tokenizer.encode(text.read_text()))
    ids, last = np.load(text).reshape(-1), max(tokenizer.get_vocab().values())
    whole = np.issubdtype(ids.dtype, np.integer) and ids.size
    if not whole or ids.min() < 0 or ids.max() > last:
        raise ValueError(f"{text}: token ids must be whole numbers from 0 to {last:,}")
    return ids
