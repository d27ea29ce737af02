"""Multi-token prediction: a layer behind the model that says the token after the next one.

Qwen 3.5, 3.6 and Qwen3-Next are trained with one (`mtp.*` in checkpoints, which mlx-lm drops).
It reads the model's last hidden state and the embedding of the token that was drawn from it, mixes
both, and goes through one layer of softmax attention over all pairs before; the model's own output
head reads what comes out. Fed with that in place of a hidden state, it goes on by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from tqstack.models.layers.drafts import MOST_TOKENS, Revocable

ENTRIES = 2  # of a cache that are the head's


class Head(nn.Module):
    """
    Args:
        args: of the model's text part: mlx-lm's `TextModelArgs` of Qwen 3.5, or Qwen3-Next's.
    """

    def __init__(self, args: Any):
        super().__init__()
        width, eps = args.hidden_size, args.rms_norm_eps
        self.pre_fc_norm_embedding = nn.RMSNorm(width, eps=eps)
        self.pre_fc_norm_hidden = nn.RMSNorm(width, eps=eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = [_layer_class(args)(args, args.full_attention_interval - 1)]
        self.norm = nn.RMSNorm(width, eps=eps)

    def __call__(self, hidden: mx.array, embedded: mx.array, cache: Any = None) -> mx.array:
        """(B, L, width) hidden states, the model's (behind its last norm) or the head's own, and
        the embeddings of the tokens drawn from them -> (B, L, width) for the output head."""
        x = self.mixed(hidden, embedded)
        return self.norm(self.layers[0](x, create_attention_mask(x, cache), cache))

    def mixed(self, hidden: mx.array, embedded: mx.array) -> mx.array:
        """What its layer reads."""
        parts = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        return self.fc(mx.concatenate(parts, axis=-1))


class Predicting(nn.Module):
    """A model with its head. Its cache has two entries more: the head's keys and values, as many as
    the model's, and the hidden state behind the last token.

    The pair of a token is stored when the token is fed, or, of tokens that are fed one by one, with
    some others at once: `settle` stores what waits. What the head says of it is not computed unless
    somebody asks for drafts.
    """

    def __init__(self, body: nn.Module, head: Head):
        super().__init__()
        self.body, self.head = body, head
        self._mix, self._say = mx.compile(self._mixed), mx.compile(self._said)

    def _mixed(self, hidden: mx.array, tokens: mx.array) -> mx.array:
        return self.head.mixed(hidden, text_model(self.body).model.embed_tokens(tokens))

    def _said(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """(B, 1, width) of the head's layer -> the hidden state and (B,) likeliest tokens."""
        hidden = self.head.norm(x)
        return hidden, output(text_model(self.body), hidden)[:, -1].argmax(-1)

    @property
    def layers(self) -> list[nn.Module]:
        return self.body.layers  # pyright: ignore

    def make_cache(self) -> list[Any]:
        return [*make_prompt_cache(self.body), KVCache(), ArraysCache(1)]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """(B, L) tokens -> (B, L, vocabulary) logits."""
        if cache is None:
            return self.body(inputs)
        *own, _, last = cache
        text = text_model(self.body)
        hidden, entry = text.model(inputs, own), last.entry if type(last) is Revocable else last
        before = mx.zeros_like(hidden[:, :1]) if entry[0] is None else entry[0]
        waiting = _waiting(entry)
        if inputs.shape[1] > 1 or len(waiting) == MOST_TOKENS:
            self.settle(cache)
        waiting.append((mx.concatenate([before, hidden[:, :-1]], axis=1), inputs))
        if inputs.shape[1] > 1:
            self.settle(cache)
        if type(last) is Revocable:
            last.behind = partial(_behind, hidden)
        else:
            entry[0] = hidden[:, -1:]
        return output(text, hidden)

    def settle(self, cache: list[Any]) -> None:
        """Store the pairs that wait, before anything else is done with the cache."""
        *_, pairs, last = cache
        entry, layer = last.entry if type(last) is Revocable else last, self.head.layers[0]
        waiting: Any = _waiting(entry)
        if not waiting:
            return
        hidden, tokens = (mx.concatenate(list(own), axis=1) for own in zip(*waiting, strict=True))
        waiting.clear()
        if tokens.shape[1] <= MOST_TOKENS and hasattr(layer, "store"):
            layer.store(self._mix(hidden, tokens), pairs)
        else:  # of what its layer makes of them nothing is computed
            self.head(hidden, text_model(self.body).model.embed_tokens(tokens), pairs)

    def aside(self, cache: list[Any]) -> list[mx.array]:
        """What a step leaves for the head. No logits need it, so it must be asked for, or its graph
        would grow from token to token."""
        pairs, last = cache[-ENTRIES:]
        return [*pairs.tails.held(), *(x for x in last.cache if x is not None)]

    def draft(
        self, tokens: mx.array, cache: list[Any], count: int, rooms: Sequence[int]
    ) -> mx.array:
        """(B, count) likeliest tokens behind the (B,) that are fed next; the cache stays as it is.

        Args:
            rooms: tokens that sequence i may have behind its token; of what is beyond no more is
                stored, so that no block is taken that nobody promised.
        """
        self.settle(cache)
        pairs, last = cache[-ENTRIES:]
        layer, hidden, lengths, found = self.head.layers[0], last[0], list(pairs.lengths), []
        stored = [min(count, room) for room in rooms]
        pairs.prepare(lengths=stored, right_padding=[count - n for n in stored])
        for _ in range(count):
            hidden, tokens = self._say(layer(self._mix(hidden, tokens[:, None]), None, pairs))
            found.append(tokens)
        pairs.finalize()
        pairs.keep(lengths)
        return mx.stack(found, axis=1)


def _waiting(entry: Any) -> list[tuple[mx.array, mx.array]]:
    """Hidden states and tokens of pairs that are not stored yet, held by a cache's last entry."""
    if not hasattr(entry, "waiting"):
        entry.waiting = []
    return entry.waiting


def _behind(hidden: mx.array, counts: mx.array) -> list[mx.array]:
    """The hidden state (B, 1, width) behind the counts[i] tokens that stay."""
    return [mx.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)]


def _layer_class(args: Any) -> Any:
    if isinstance(args, qwen3_next.ModelArgs):
        return qwen3_next.Qwen3NextDecoderLayer
    return qwen3_5.DecoderLayer


def text_model(model: Any) -> Any:
    """The part of a model that has `model`, `args` and the output head."""
    return getattr(model, "language_model", model)


def output(text: Any, hidden: mx.array) -> mx.array:
    """(B, L, width) behind the last norm -> (B, L, vocabulary)"""
    if text.args.tie_word_embeddings:
        return text.model.embed_tokens.as_linear(hidden)
    return text.lm_head(hidden)
