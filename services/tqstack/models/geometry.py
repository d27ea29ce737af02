"""A model's geometry: what a token and a context cost. `families/` reads it from config.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["softmax", "window", "recurrent", "other"]


class UnknownGeometryError(ValueError):
    """The config does not tell what the layers keep; the message says what to do instead."""


@dataclass(frozen=True)
class Layer:
    """What one entry of a model's cache keeps of the past. Sizes in values, not bytes.

    Attributes:
        kind: "softmax" keeps every token's keys and values, "window" those of the last `window`
            tokens, "recurrent" a state of fixed size.
        state: float32 values of a recurrent state.
        convolution: values of its convolution's state, in the model's type.
        revocable: values of a token that may still be taken back.
    """

    kind: Kind
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    state: int = 0
    convolution: int = 0
    revocable: int = 0

    @property
    def token_values(self) -> int:
        """Values of a token's keys and values."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    def fixed_bytes(self, value_bytes: int) -> int:
        """Bytes of what does not grow with the context, at most."""
        window = self.window * self.token_values if self.kind == "window" else 0
        return 4 * self.state + value_bytes * (self.convolution + window)


@dataclass(frozen=True)
class Geometry:
    """Sizes in values, not bytes.

    Attributes:
        layers: of each entry of the model's cache what it keeps.
        head_dim: of a query head, the largest.
        feed_forward: intermediate values of a token in a feed-forward layer: experts that run,
            and the shared one.
        vocabulary: logits of a token.
        recurrence: float32 values of the work on a token in a recurrent layer.
        recurrence_chunk: float32 values of that work however many tokens there are.
    """

    layers: tuple[Layer, ...]
    context_length: int
    hidden: int
    query_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int = 0
    recurrence: int = 0
    recurrence_chunk: int = 0

    @property
    def with_head(self) -> Geometry:
        """With a head of multi-token prediction: keys and values of one more layer, and a hidden
        state."""
        head = self.softmax[-1], Layer("other", convolution=self.hidden)
        return replace(self, layers=(*self.layers, *head))

    @property
    def softmax(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind == "softmax"]
