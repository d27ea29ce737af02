"""Text for prompts, cut from the held-out text: as long as asked, each with its own beginning."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tqstack import demo_model


class HeldOutText:
    """Cuts texts from what the embedded model was not trained on.

    Args:
        folder: of the model whose tokens are counted; None: the embedded model's.
        run: part of every beginning, so that a server that has answered an earlier run has nothing
            in its caches for this one.
    """

    def __init__(self, folder: Path | None, run: str):
        own = Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json"))
        ids = demo_model.held_out_tokens()
        file = (folder or demo_model.PATH) / "tokenizer.json"
        self._tokenizer = own
        if folder not in (None, demo_model.PATH) and file.exists():
            self._tokenizer = Tokenizer.from_file(str(file))
            text = own.decode(ids.tolist(), skip_special_tokens=True)
            ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids)
        self._ids = ids
        self._run = run

    def prompt(self, name: str, tokens: int) -> str:
        """A text of `tokens` tokens that no other name's shares a beginning with."""
        digest = self._digest(name)
        head = f"{digest}\n"
        used = len(self._tokenizer.encode(head, add_special_tokens=False).ids)
        return head + self._cut(int(digest, 16), tokens - used)

    def text(self, name: str, tokens: int) -> str:
        """A text of `tokens` tokens; the same for the same name."""
        return self._cut(int(self._digest(name), 16), tokens)

    def _digest(self, name: str) -> str:
        return hashlib.sha256(f"{self._run}/{name}".encode()).hexdigest()[:8]

    def _cut(self, place: int, tokens: int) -> str:
        tokens = max(1, tokens)
        ids = np.tile(self._ids, 1 + tokens // len(self._ids))
        start = place % (len(ids) - tokens)
        piece = ids[start : start + tokens].tolist()
        return self._tokenizer.decode(piece, skip_special_tokens=True)
