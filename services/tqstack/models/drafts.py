"""What a model can have drafted on this machine, known when it is loaded. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 4  # drafts of a step


@dataclass(frozen=True)
class Drafts:
    """
    Attributes:
        mode: as SIDECAR_SPECULATION asks.
        drafters: those that there are; none: tokens are made one by one.
        why_not: why there are none.
        step_seconds: what a step of 1, 2, ... tokens of one sequence took at warm-up.
        draft_seconds: what the model's head took for a draft.
    """

    mode: str = "0"
    drafters: tuple[str, ...] = ()
    why_not: str | None = "SIDECAR_SPECULATION is 0"
    step_seconds: tuple[float, ...] = ()
    draft_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Most tokens of a sequence in a step."""
        return 1 + MOST if self.drafters else 1


NONE = Drafts()
