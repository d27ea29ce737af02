"""Texts, medians and rates: what needs no server."""

from __future__ import annotations

import numpy as np
import pytest

from tqstack.bench import servers
from tqstack.bench.fairness import longest_gap, rate
from tqstack.bench.prompt_tokens import History, common_prefix
from tqstack.bench.prompts import HeldOutText
from tqstack.bench.serving import Samples, quantile
from tqstack.bench.streams import Reply
from tqstack.demo_model import PATH


def test_every_prompt_has_its_own_beginning_and_its_length():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    text = HeldOutText(None, "run")
    prompts = [text.prompt(str(i), 400) for i in range(50)]
    assert len({prompt[:8] for prompt in prompts}) == 50
    for prompt in prompts:
        assert 380 <= len(tokenizer.encode(prompt).ids) <= 410
    assert text.prompt("0", 400) == HeldOutText(PATH, "run").prompt("0", 400)
    assert text.prompt("0", 400)[:8] != HeldOutText(None, "later").prompt("0", 400)[:8]
    assert len(tokenizer.encode(text.text("long", 200_000)).ids) > 190_000


def test_quantiles_are_values_that_were_seen():
    values = [float(n) for n in range(100, 0, -1)]
    assert (quantile(values, 0.95), quantile(values, 0.99), quantile([], 0.5)) == (95, 99, None)
    assert quantile([3.0], 0.95) == 3


def test_a_row_keeps_failures_apart():
    good = Reply(sent=1.0, arrivals=[1.5, 1.6, 1.8], usage={"prompt_tokens": 7})
    samples = Samples()
    samples.add([good, Reply(error="503: full")], seconds=2.0)
    row = samples.row("s", 2)
    assert (row.requests, row.errors, row.error) == (2, 1, "503: full")
    assert row.output_tps == 1.5 and row.prompt_tokens == 7 and row.first_token_s == 0.5
    assert row.decode_tps == pytest.approx(2 / 0.3)
    assert row.gap_ms_max == pytest.approx(200)
    empty = Samples()
    empty.add([Reply(error="gone")], seconds=2.0)
    assert empty.row("s", 1).output_tps is None


def test_speed_and_silence_of_a_stretch():
    arrivals = [0.0, 1.0, 2.0, 5.0, 6.0]
    assert rate(arrivals, 0.0, 2.0) == 1 and rate(arrivals, 2.0, 4.0) == 0
    assert rate(arrivals, 2.0, 2.0) is None
    assert longest_gap(arrivals, 1.5, 5.5) == 3 and longest_gap([], 1.0, 4.0) == 3


def test_what_could_be_used_again_is_the_longest_common_beginning():
    history = History()
    prompt = np.arange(10)
    assert history.reusable(prompt) == 0
    history.add(np.array([0, 1, 2, 9]))
    history.add(np.array([5, 1, 2, 3, 4]))
    assert history.reusable(prompt) == 3
    history.add(np.arange(20))
    assert history.reusable(prompt) == 9  # the last token has to be read
    assert common_prefix(np.arange(0), prompt) == 0


def test_two_models_of_one_server_have_two_names(monkeypatch):
    monkeypatch.setattr(servers, "_models", lambda server: ["a", "b"])
    found = servers.find_all(["http://h:1,a", "http://h:1/v1,b", "http://g:2/x/v1/,a"])
    assert [server.name for server in found] == ["h:1 a", "h:1 b", "g:2/x"]
    assert {server.url for server in found} == {"http://h:1", "http://g:2/x"}
    with pytest.raises(servers.ServerError, match="lists a, b: name one"):
        servers.find("http://h:1")
    with pytest.raises(servers.ServerError, match="give an address such as"):
        servers.find("h:1")
