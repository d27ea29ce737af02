from __future__ import annotations

import pytest

from commands import called
from processes import tqstack

QUESTION = "The secret code of alpha is 12345. What is the secret code of alpha?"


@pytest.mark.parametrize("backend", ["baseline", "mlx_quant", "turboquant"])
def test_generate_answers_with_every_cache_and_tells_its_bytes(tmp_path, backend):
    arguments = ("generate", "demo", QUESTION, "--backend", backend, "--max-tokens", "10")
    result = tqstack(tmp_path, *arguments)
    assert result.stdout.splitlines()[0] == "12345"
    assert "keys and values" in result.stdout


def test_compare_shows_both_and_where_they_differ(tmp_path):
    result = tqstack(tmp_path, "compare", "demo", "-", "--max-tokens", "8", text=QUESTION)
    assert "The same 6 tokens." in result.stdout
    assert result.stdout.count("12345") >= 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("generate", "/no/model", "hi"), "is no folder"),
        (("generate", "demo", "  "), "the prompt is empty"),
        (("generate", "demo", "hi", "--bits", "9"), "TQ_KV_BITS is '9'"),
        (("generate", "demo", "hi", "--max-tokens", "2", "--min-tokens", "3"), "--min-tokens 3"),
        (("bench", "quality", "demo", "--codecs", "tq99"), "bits is 99"),
        (("bench", "quality", "demo", "--window-tokens", "999999"), "give a longer text"),
        (("bench", "speed", "--shape", "huge"), "qwen3.5-35b-a3b"),
    ],
)
def test_bad_arguments_are_told_in_a_line_and_not_in_a_traceback(tmp_path, arguments, said):
    result = called(tmp_path, *arguments)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())


def test_an_answer_is_as_long_as_it_must_be(tmp_path):
    arguments = ("generate", "demo", QUESTION, "--max-tokens", "9")
    shortest = tqstack(tmp_path, *arguments, "--min-tokens", "9")
    assert shortest.stdout.startswith("12345") and "answer 9 at" in shortest.stdout
