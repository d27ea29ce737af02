"""The demo model's tokenizer with the markers and the tool calls of a model family."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from transformers import AutoTokenizer

from tqstack import demo_model


def tokenizer_of(parser):
    tokenizer = AutoTokenizer.from_pretrained(demo_model.PATH)
    tokenizer.add_tokens(["<think>", "</think>"])
    return TokenizerWrapper(
        tokenizer,
        BPEStreamingDetokenizer,
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
        tool_parser=parser.parse_tool_call,
    )
