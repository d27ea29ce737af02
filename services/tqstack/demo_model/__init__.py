"""The embedded model: small, trained, hybrid; everything runs with no download.

20.5M parameters in the Qwen3.5 architecture (6 Gated DeltaNet and 2 softmax layers), converted
with `python -m mlx_lm convert --hf-path REFERENCE -q --q-bits 4 --q-group-size 64`. It writes
Python-like text and recalls facts from long prompts; it is no chatbot.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

PATH = Path(__file__).parent


def held_out_tokens() -> np.ndarray:
    """150,000 tokens, uint16, that the model was not trained on: Python code and English."""
    return np.load(PATH / "eval_tokens.npy")
