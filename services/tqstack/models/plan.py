"""What a context costs in memory, and whether it fits. Pure: numbers in, numbers out.

On Metal running out of memory aborts the process, so a request is refused before its prefill.
The sidecar and `tqstack plan` decide by the same `Plan`; the sidecar measures what the cache
holds, and `tqstack plan` computes it from the model's geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqstack.attention.blocks import BLOCK_TOKENS
from tqstack.attention.kernels.prefill import SPAN_BYTES
from tqstack.attention.tiled import KEY_TILE
from tqstack.models.geometry import Geometry

MIB = 1 << 20
SLACK = 4 * MIB  # of a prefill step: small arrays that have no formula


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    Attributes:
        budget: bytes that the sidecar may use.
        prefill_step: tokens of a prefill step.
        value_bytes: bytes of an activation's value, and of a weight that is not quantized.
    """

    budget: int
    prefill_step: int
    value_bytes: int

    @property
    def expands_weights(self) -> bool:
        """A CPU multiplies quantized matrices slowly, so weights become float32 there."""
        return self.value_bytes == 4


def mac(memory: int) -> Machine:
    """A Mac with so many bytes of memory, three quarters of which macOS lets its GPU hold."""
    return Machine(memory * 3 // 4, prefill_step=2048, value_bytes=2)


@dataclass(frozen=True)
class Plan:
    """Bytes.

    Attributes:
        budget: of all that the sidecar holds.
        weights: of the weights once loaded.
        per_token: of one stored token in all softmax layers.
        per_token_fp16: what that would be in 16 bits.
        recurrent: of what one sequence keeps whatever its length: recurrent states, convolutions'
            states, sliding windows.
        workspace: of a prefill step, beside weights and caches.
        tail: of a sequence's newest tokens that are not compressed, in all softmax layers.
        drafts: of a sequence's tokens that a step verifies, in recurrent layers.
        padded: sequences of a batch take the longest one's room: mlx-lm's own cache.
    """

    budget: int
    weights: int
    per_token: int
    per_token_fp16: int
    recurrent: int
    workspace: int
    tail: int = 0
    drafts: int = 0
    padded: bool = False

    def request_bytes(self, tokens: int) -> int:
        """One sequence of `tokens`: its keys and values, its recurrent state, and its drafts."""
        return tokens * self.per_token + self.tail + self.drafts + self.recurrent

    def total(self, tokens: int, held: int = 0) -> int:
        """All that is needed for a sequence of `tokens` beside `held` bytes of other sequences."""
        return self.weights + self.workspace + held + self.request_bytes(tokens)

    def fits(self, tokens: int, held: int = 0) -> bool:
        return self.total(tokens, held) <= self.budget

    def max_tokens(self, held: int = 0) -> int:
        """The longest sequence that fits beside `held` bytes."""
        free = self.budget - self.total(0, held)
        return max(0, free // max(1, self.per_token))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "max_tokens": self.max_tokens()}


def prefill_workspace(geometry: Geometry, tokens: int, value_bytes: int, drawn: int = 1) -> int:
    """Bytes that a prefill step of `tokens`, and then a step of one sequence that draws `drawn` of
    them, need beside weights and caches, at most.

    Attention in tiles holds some tiles of scores and the running outputs, all in float32, and as a
    kernel two spans of keys and values as halves, and sums of all query rows; so does the
    recurrence (how much is measured, and held by a test). The work of the recurrence and of
    attention may overlap.
    """
    g, on_cpu = geometry, value_bytes == 4  # float32 there, and no kernels
    rows = 4 * g.query_heads * tokens
    tiles = _tiles_on_a_cpu(g, tokens) if on_cpu else rows * (3 * KEY_TILE + 4 * g.head_dim)
    if not on_cpu:
        tiles = max(tiles, 2 * SPAN_BYTES + rows * 6 * g.head_dim)
    # MLX's own attention, which windows have: scores, their softmax, and a copy.
    window = max((layer.window for layer in g.layers if layer.kind == "window"), default=-tokens)
    attention = max(tiles, 3 * value_bytes * g.query_heads * tokens * (tokens + window))
    recurrence = 4 * (tokens * g.recurrence + g.recurrence_chunk)
    # An exponential on a CPU goes through three arrays of its own (`attention/exponential.py`).
    gated = 6 if on_cpu else 3
    feed_forward = value_bytes * tokens * (4 * g.hidden + gated * g.feed_forward)
    # The step's keys and values are exact until its last block is packed.
    exact = value_bytes * tokens * sum(layer.token_values for layer in g.softmax)
    drawing = logits_bytes(g.vocabulary, drawn)
    return attention + recurrence + feed_forward + exact + drawing + SLACK


def _tiles_on_a_cpu(geometry: Geometry, tokens: int) -> int:
    """Bytes of a prompt's attention in tiles on a CPU, at most.

    MLX sends some fifty operations off before they are run, and what they return exists from then
    on. Of a tile's scores that is the product, what the mask leaves of it, its distance from the
    maximum, and the five arrays of an exponential (`attention/exponential.py`), of all query
    tokens; and as many of four more blocks of queries in the tile that comes next. The tile's keys
    and values are there as codes' levels, scaled, and in the order of heads.
    """
    g = geometry
    rows, block = (4 * g.query_heads * n for n in (tokens, min(tokens, BLOCK_TOKENS)))
    decoded = 4 * KEY_TILE * max((layer.token_values for layer in g.softmax), default=0)
    return KEY_TILE * (8 * rows + 4 * block) + 3 * decoded + 4 * rows * g.head_dim


def logits_bytes(vocabulary: int, drawn: int, measured: int = 0) -> int:
    """Bytes of logits in float32, and of what is made of them, at most.

    Args:
        drawn: sequences of which a token is drawn. With all sampling parameters that takes 14
            arrays of one sequence and 5 of each where there are many (some of them are sent off
            before others are run); log-probabilities take 4 of each.
        measured: tokens of a prompt whose log-probabilities are told: logits in the model's type
            and in float32, log-probabilities, their negatives and the order of these.
    """
    drawing = 9 * drawn + 18 if drawn else 0
    return 4 * vocabulary * (drawing + 6 * measured)


def draft_bytes(geometry: Geometry, tokens: int) -> int:
    """Bytes of a step's tokens of a sequence, in recurrent layers, while it is open how many of
    them stay; a single one does."""
    return 4 * tokens * sum(layer.revocable for layer in geometry.layers) if tokens > 1 else 0


def geometric_plan(
    geometry: Geometry,
    token_bytes: Sequence[int],
    weights: int,
    machine: Machine,
    tail_tokens: int = 0,
    drafted_tokens: int = 1,
) -> Plan:
    """The plan of a model that has not been loaded.

    Args:
        token_bytes: bytes of a stored token's keys and values, of each softmax layer.
        weights: bytes of the weights once loaded.
        tail_tokens: newest tokens of a sequence that are not compressed; 0: nothing is.
        drafted_tokens: most tokens of a sequence in a step: more than one where it has drafts.
    """
    values = sum(layer.token_values for layer in geometry.softmax)
    return Plan(
        budget=machine.budget,
        weights=weights,
        per_token=sum(token_bytes),
        per_token_fp16=2 * values,
        recurrent=sum(layer.fixed_bytes(machine.value_bytes) for layer in geometry.layers),
        workspace=prefill_workspace(
            geometry, machine.prefill_step, machine.value_bytes, drafted_tokens
        ),
        tail=tail_tokens * values * machine.value_bytes,
        drafts=draft_bytes(geometry, drafted_tokens),
        padded=not tail_tokens,
    )
