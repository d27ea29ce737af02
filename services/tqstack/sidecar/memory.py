"""What a context costs in memory, and whether it fits. Pure: numbers in, numbers out.

On Metal running out of memory aborts the process, so a request is refused before its prefill.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. `per_token` and `per_token_fp16` are for one token in all softmax layers."""

    budget: int
    weights: int
    per_token: int
    per_token_fp16: int
    recurrent: int
    workspace: int

    def request_bytes(self, tokens: int) -> int:
        """One sequence of `tokens`: its keys and values, and its recurrent state."""
        return tokens * self.per_token + self.recurrent

    def fits(self, tokens: int, held: int = 0) -> bool:
        """Whether a sequence of `tokens` fits beside `held` bytes of other sequences."""
        return self.weights + self.workspace + held + self.request_bytes(tokens) <= self.budget

    def max_tokens(self, held: int = 0) -> int:
        """The longest sequence that fits beside `held` bytes."""
        free = self.budget - self.weights - self.workspace - held - self.recurrent
        return max(0, free // max(1, self.per_token))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "max_tokens": self.max_tokens()}
