"""From tokens to parts, with mlx-lm's own markers and parsers of two model families."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools, qwen3_coder
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from sidecar.tokenizers import tokenizer_of
from tqstack.sidecar.detokenizer import ByteText, text_stream
from tqstack.sidecar.text import AnswerReader, Content, Reasoning, StopStrings, ToolCall

WEATHER = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}},
        },
    }
]
JSON_CALL = '<tool_call>\n{"name": "weather", "arguments": {"days": 3}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)


JSON_TOOLS, XML_TOOLS = tokenizer_of(json_tools), tokenizer_of(qwen3_coder)


def read(text, tokenizer=JSON_TOOLS, tools=WEATHER, **options):
    """All parts of an answer, neighbours of one kind joined."""
    reader = AnswerReader(tokenizer, tools=tools, **options)
    parts = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        parts += reader.feed(token)
    joined = []
    for part in parts + reader.finish():
        if joined and type(joined[-1]) is type(part) and not isinstance(part, ToolCall):
            joined[-1].text += part.text
        else:
            joined.append(part)
    return joined


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_plain_text_comes_back_unchanged(text):
    # The tokenizer normalises: some characters are another way to write others.
    wanted = unicodedata.normalize("NFC", text)
    assert "".join(part.text for part in read(text, plain=True)) == wanted


@settings(deadline=None)
@given(st.lists(st.integers(0, 8191), max_size=40))
def test_any_tokens_give_the_text_that_their_bytes_are(tokens):
    reader = AnswerReader(JSON_TOOLS, plain=True)
    parts = [part for token in tokens for part in reader.feed(token)] + reader.finish()
    pieces = [ByteText(JSON_TOOLS, sentencepiece=False).bytes_of(token) for token in tokens]
    wanted = b"".join(pieces).decode("utf-8", "replace")
    assert "".join(part.text for part in parts) == wanted
    assert wanted == JSON_TOOLS.decode(tokens, clean_up_tokenization_spaces=False)


def test_spaces_at_the_beginning_are_kept():
    assert read("    return 1", plain=True) == [Content("    return 1")]
    assert read(" x") == [Content(" x")]


def test_pieces_of_sentencepiece_are_bytes_too():
    words = {"<unk>": 0, "▁": 1, "▁de": 2, "f": 3, "<0xC3>": 4, "<0xA9>": 5, "▁▁▁▁": 6}
    plain = Tokenizer(BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
    plain.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    text = text_stream(TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=plain)))
    assert "".join(map(text.feed, [6, 2, 3, 1, 4, 5])) + text.finish() == "     def é"


@pytest.mark.parametrize("tokenizer, call", [(JSON_TOOLS, JSON_CALL), (XML_TOOLS, XML_CALL)])
def test_tool_calls_are_parsed_by_the_models_own_parser(tokenizer, call):
    parts = read(f"Let me look.\n{call}\n{call}", tokenizer)
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert parts[0] == Content("Let me look.\n")
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [("weather", {"days": 3})] * 2
    assert len({c.id for c in calls}) == 2


def test_reasoning_is_told_apart_from_content():
    assert read("<think>hm, well</think>Yes.") == [Reasoning("hm, well"), Content("Yes.")]
    assert read("hm</think>Yes.", reasoning=True) == [Reasoning("hm"), Content("Yes.")]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{not json}\n</tool_call>",  # does not parse
        '<tool_call>\n{"arguments": {}}\n</tool_call>',  # has no name
        '<tool_call>\n{"name": "weath',  # cut short
        "a < b and <tool",  # looks like the beginning of a marker
    ],
)
def test_what_is_no_call_is_returned_as_content_and_never_dropped(text):
    assert read(text) == [Content(text)]


def test_without_tools_a_call_is_text():
    assert read(JSON_CALL, tools=None) == [Content(JSON_CALL)]


def test_a_stop_string_ends_the_content_but_does_not_count_in_reasoning():
    parts = read("<think>one STOP two</think>three STOP four", stops=["STOP"])
    assert parts == [Reasoning("one STOP two"), Content("three ")]


def test_a_stop_string_can_be_shown_and_is_told():
    reader = AnswerReader(JSON_TOOLS, ["STOP"], show_stop=True)
    parts = [p for t in JSON_TOOLS.encode("one STOP two") for p in reader.feed(t)]
    assert "".join(part.text for part in parts) == "one STOP"
    assert reader.stopped and reader.stop_string == "STOP"


def test_an_answer_of_one_call_ends_with_it():
    parts = read(f"{JSON_CALL}\n{JSON_CALL}\nand more", one_call=True)
    assert [type(part) for part in parts] == [ToolCall]


@given(st.lists(st.text(alphabet="abc", max_size=4)), st.lists(st.text(alphabet="abc", max_size=3)))
def test_stop_strings_cut_at_the_first_match_whatever_the_pieces(pieces, stops):
    stopper, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += stopper.feed(piece)
        assert not any(stop and stop in shown for stop in stops)
    shown += stopper.flush()
    text = "".join(pieces)
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    if not found:
        assert shown == text
    else:
        # Pieces decide which of two overlapping stops completes first; none is ever shown.
        assert stopper.hit and text.startswith(shown) and len(shown) >= min(found)
