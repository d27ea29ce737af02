"""Speculative decoding on the command line: answers, figures, and a head of one's own."""

from __future__ import annotations

import json

import pytest

from commands import called
from processes import tqstack
from tqstack import demo_model
from tqstack.models.load import load_model
from tqstack.models.mtp_load import load_head
from tqstack.models.spec import read_spec

CODE = "def first(values):\n    return values[0]\n\n\ndef first(values):\n"


GENERATE = ("generate", "demo", CODE, "--raw", "--max-tokens", "24")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same without drafts."""
    return tqstack(tmp_path_factory.mktemp("home"), *GENERATE)


@pytest.mark.parametrize("mode", ["auto", "mtp", "lookup"])
def test_generate_drafts_and_says_what_was_accepted(tmp_path, plain, mode):
    drafted = tqstack(tmp_path, *GENERATE, "--speculation", mode)
    assert drafted.returncode == 0, drafted.stderr
    answer, _, told = drafted.stdout.rstrip().rpartition("\n")
    assert "drafts accepted" in told or "drafts accepted" in drafted.stdout.replace("\n", " ")
    words = answer.partition("prompt at")[0].split()
    assert len(words) > 5 and plain.stdout.split()[: len(words)] == words


def test_a_cache_that_cannot_take_drafts_back_is_refused(tmp_path):
    given = ("--speculation", "auto", "--backend", "baseline")
    result = called(tmp_path, "generate", "demo", "hi", *given)
    assert result.exit_code == 2 and "cannot take drafts back" in result.stderr


def test_bench_speed_compares_each_drafter_with_none(tmp_path):
    out = tmp_path / "rows.json"
    given = ("--generation-tokens", "8", "--trials", "1", "--output", str(out))
    result = tqstack(tmp_path, "bench", "speed", "--speculation", *given)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["task"] for row in rows} == {"code", "rewrite", "nothing"}
    assert {row["mode"] for row in rows} == {"0", "lookup", "mtp"}
    assert all(row["same_tokens"] for row in rows)
    assert all(row["drafted"] == 0 for row in rows if row["mode"] == "0")


def test_a_head_is_trained_by_a_command_and_can_be_loaded(tmp_path):
    text = str(demo_model.PATH.parent / "engine")
    given = ("model", "train-head", str(tmp_path / "out"), "--minutes", "0.05", "--text", text)
    result = tqstack(tmp_path, *given)
    assert result.returncode == 0, result.stderr
    assert load_head(tmp_path / "out", read_spec("demo").config, load_model("demo").model)
