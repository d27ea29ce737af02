"""Estimates against real tokenizers, over the kinds of text that people send."""

from __future__ import annotations

import asyncio
import configparser
import datetime
import difflib
import email.message
import http.client
import inspect
import json
import optparse
import random
import re
import tarfile
import textwrap
import typing
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import tqstack.demo_model
from router.stack import Stack
from tqstack.router.estimate import Estimator, Weights, measure
from tqstack.router.exact import ExactCounter

DEMO = Path(inspect.getfile(tqstack.demo_model)).parent
CHINESE = [
    "人工智能正在改变我们的生活方式，许多公司都在研究新的语言模型。",
    "今天天气很好，我们去公园散步吧。",
    "这个问题比较复杂，需要先了解背景，再考虑不同的解决办法。",
    "请把下面这段文字翻译成英文，并说明理由。",
    "数据中心的能源消耗越来越大，工程师希望通过压缩缓存来减少内存的使用。",
    "他昨天在图书馆借了三本书。",
    "如果你有时间，可以先阅读说明文档，然后按照步骤安装软件。",
    "孩子们在操场上踢足球，笑声传得很远。",
]
ENGLISH = [
    "The harbour was quiet when the first boats came in, and nobody on the quay said a word. ",
    "Memory bandwidth decides how quickly a language model can write, not arithmetic. ",
    "She had read the letter twice before she understood what her brother was asking of her. ",
    "Please summarise the following report, and list the three decisions that need a vote. ",
    "A good estimate is cheap, close to the truth, and honest about how wrong it may be. ",
    "In the spring the river rises by two metres, and the lower road is closed for weeks. ",
]
WORDS = ["search", "create", "delete", "update", "list", "fetch", "note", "chat", "memory", "file"]
KINDS = ("english", "python", "json", "chinese", "tools")


def sentences(source: list[str], size: int, rng: random.Random) -> str:
    text = ""
    while len(text) < size:
        text += rng.choice(source)
    return text


SEEN = (textwrap, json.decoder, json.encoder, typing, random)
UNSEEN = (configparser, datetime, difflib, email.message, http.client, optparse, tarfile, zipfile)


def python(size: int, rng: random.Random, modules: tuple = SEEN) -> str:
    source = inspect.getsource(rng.choice(modules))
    start = rng.randrange(max(1, len(source) - size))
    return source[start : start + size]


def compact_json(size: int, rng: random.Random) -> str:
    rows, length = [], 0
    while length < size:
        row = {
            "id": rng.randrange(10**6),
            "name": rng.choice(["alpha", "beta", "gamma"]),
            "score": round(rng.random(), 4),
            "tags": rng.sample(["red", "green", "blue", "new"], 2),
            "active": rng.random() < 0.5,
        }
        rows.append(json.dumps(row, separators=(",", ":")))
        length += len(rows[-1])
    return f"[{','.join(rows)}]"


def tools(count: int, rng: random.Random) -> list[dict]:
    return [
        {
            "type": "function",
            "function": {
                "name": "_".join(rng.sample(WORDS, 2)),
                "description": sentences(ENGLISH, 150, rng),
                "parameters": {
                    "type": "object",
                    "properties": {
                        name: {
                            "type": "string",
                            "description": f"the {name} to {rng.choice(WORDS)}",
                        }
                        for name in rng.sample(WORDS, 3)
                    },
                    "required": [],
                },
            },
        }
        for _ in range(count)
    ]


def request(kind: str, rng: random.Random) -> dict:
    size = rng.choice([2_000, 10_000, 60_000])
    text = {
        "english": lambda: sentences(ENGLISH, size, rng),
        "python": lambda: python(size, rng),
        "json": lambda: compact_json(size, rng),
        "chinese": lambda: sentences(CHINESE, size // 3, rng),
        "tools": lambda: rng.choice(ENGLISH),
    }[kind]()
    body: dict = {"messages": [{"role": "user", "content": text}]}
    if kind == "tools":
        body["tools"] = tools(rng.choice([5, 12, 36]), rng)
    return body


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def other_tokenizer() -> Tokenizer:
    """Byte-level BPE of 16,000 tokens with single digits, taught here, from other files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    tested = {inspect.getsourcefile(module) for module in SEEN + UNSEEN}
    files = sorted(Path(inspect.getfile(textwrap)).parent.glob("*.py"))
    corpus = [file.read_text() for file in files if str(file) not in tested]
    trainer = trainers.BpeTrainer(vocab_size=16_000, show_progress=False)
    tokenizer.train_from_iterator([*corpus, *CHINESE[:4] * 3], trainer)
    return tokenizer


def count(tokenizer: Tokenizer, body: dict) -> int:
    """Tokens of the prompt as a chat template would render it."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in body["messages"])
    if "tools" in body:
        text = "# Tools\n\n" + "\n".join(map(json.dumps, body["tools"])) + text
    return len(tokenizer.encode(text + "<|im_start|>assistant\n").ids)


def errors(weights: Weights, tokenizer: Tokenizer, bodies: list[dict]) -> np.ndarray:
    guess = np.array([weights.tokens(measure(body)) for body in bodies])
    return np.abs(guess / [count(tokenizer, body) for body in bodies] - 1)


@pytest.fixture(scope="module", params=[demo_tokenizer, other_tokenizer])
def tokenizer(request) -> Tokenizer:
    return request.param()


def taught(tokenizer: Tokenizer, rng: random.Random, wild: float = 0) -> Weights:
    """After 50 requests, of whose reports this part is nonsense."""
    weights = Weights()
    for i in range(50):
        body = request(KINDS[i % len(KINDS)], rng)
        true = count(tokenizer, body)
        nonsense = rng.random() < wild
        weights.learn(measure(body), round(true * rng.choice([0.45, 2, 5])) if nonsense else true)
    return weights


def test_after_50_requests_each_estimate_is_within_10_percent(tokenizer):
    """Of Python, whose names no count tells from rarer ones, nine of ten slices are."""
    rng = random.Random(1)
    weights = taught(tokenizer, rng)
    for kind in KINDS:
        found = errors(weights, tokenizer, [request(kind, rng) for _ in range(40)])
        assert np.median(found) < 0.03, kind
        assert (np.quantile(found, 0.9) if kind == "python" else found.max()) < 0.10, kind
    unseen = [python(rng.choice([2_000, 10_000, 60_000]), rng, UNSEEN) for _ in range(60)]
    bodies = [{"messages": [{"role": "user", "content": text}]} for text in unseen]
    found = errors(weights, tokenizer, bodies)
    assert np.median(found) < 0.05
    assert np.quantile(found, 0.9) < 0.10


@pytest.mark.parametrize("wild", [0.02, 0.1])
def test_wild_reports_do_not_spoil_the_estimates(tokenizer, wild):
    rng = random.Random(2)
    weights = taught(tokenizer, rng, wild)
    found = np.concatenate(
        [errors(weights, tokenizer, [request(kind, rng) for _ in range(12)]) for kind in KINDS]
    )
    assert np.median(found) < 0.03
    assert np.quantile(found, 0.95) < 0.10


@pytest.mark.parametrize("reported", [0.45, 2, 5])
def test_one_wild_report_moves_a_taught_estimate_by_a_percent_at_most(tokenizer, reported):
    rng = random.Random(3)
    weights = taught(tokenizer, rng)
    bodies = [request(kind, rng) for kind in KINDS]
    before = [weights.tokens(measure(body)) for body in bodies]
    weights.learn(measure(bodies[0]), round(count(tokenizer, bodies[0]) * reported))
    after = [weights.tokens(measure(body)) for body in bodies]
    assert after == pytest.approx(before, rel=0.01)


def test_near_the_threshold_the_sidecar_s_own_tokenizer_counts():
    rng = random.Random(5)
    body = {"messages": [{"role": "user", "content": python(30_000, rng)}], "tools": tools(5, rng)}
    true = count(demo_tokenizer(), body)
    exact = asyncio.run(ExactCounter("demo").count(body))
    assert exact == pytest.approx(true, rel=0.03)
    for threshold in (round(true * 0.97), round(true * 1.03)):
        with Stack(sidecar_model="demo", prompt_token_threshold=threshold) as stack:
            # First a lesson, so that the estimate comes near enough to be looked at twice.
            services = stack.app.state.services
            for _ in range(3):
                services.estimator.learn("demo", measure(body), true)
            response = stack.post(**body)
            expected = "sidecar" if true > threshold else "ollama"
            assert response.headers["x-tqstack-backend"] == expected


def test_without_a_tokenizer_on_disk_nothing_is_counted(tmp_path):
    assert asyncio.run(ExactCounter(str(tmp_path)).count({"prompt": "hello"})) is None
    (tmp_path / "tokenizer.json").write_text("no tokenizer")
    assert asyncio.run(ExactCounter(str(tmp_path)).count({"prompt": "hello"})) is None


def test_the_held_out_text_of_the_demo_model_is_close_from_the_start():
    tokens = np.load(DEMO / "eval_tokens.npy")[:20_000]
    text = demo_tokenizer().decode(tokens.tolist())
    body = {"messages": [{"role": "user", "content": text}]}
    assert Weights().tokens(measure(body)) == pytest.approx(20_000, rel=0.35)


def test_a_sampled_text_is_measured_like_the_whole():
    text = compact_json(2_000_000, random.Random(3))
    body = {"messages": [{"role": "user", "content": text}]}
    size = measure(body)
    assert size.letters == pytest.approx(sum(map(str.isalpha, text)), rel=0.05)
    assert size.digits == pytest.approx(sum(map(str.isdigit, text)), rel=0.05)
    assert size.words == pytest.approx(len(re.findall("[a-zA-Z]+", text)), rel=0.05)


def test_base64_of_an_image_counts_as_an_image():
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 500_000}}
    text = {"type": "text", "text": "what is this?"}
    body = {"messages": [{"role": "user", "content": [text, part]}]}
    size = measure(body)
    assert size.images == 1
    assert Weights().tokens(size) < 2_000


def test_a_prompt_given_as_tokens_has_as_many():
    for path in ("prompt", "input"):
        size = measure({path: list(range(10_000))})
        assert abs(Weights().tokens(size) / 10_000 - 1) < 0.05


def test_every_part_of_a_request_counts():
    base = {"messages": [{"role": "user", "content": "hello"}]}
    call = {"function": {"name": "f", "arguments": "word " * 80}}
    longer = [
        {**base, "tools": [{"type": "function", "function": {"name": "word " * 80}}]},
        {"messages": [{"role": "system", "content": "word " * 80}, *base["messages"]]},
        {"messages": [*base["messages"], {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "word " * 80}]}]},
        {"prompt": "word " * 80},
        {"prompt": [5] * 100},
        {"input": ["word " * 40] * 2},
        {**base, "system": "word " * 80},
        {"input": "hello", "instructions": "word " * 80},
    ]
    least = Weights().tokens(measure(base))
    for body in longer:
        assert Weights().tokens(measure(body)) > least + 50, body


@pytest.mark.parametrize("reported", [1, 50, 40_000])
def test_a_count_that_cannot_be_of_this_prompt_teaches_nothing(reported):
    body = {"messages": [{"role": "user", "content": "word " * 1000}]}
    weights = Weights()
    before = weights.tokens(measure(body))
    weights.learn(measure(body), reported)
    assert weights.tokens(measure(body)) == before


def test_each_model_has_its_own_correction():
    estimator, size = Estimator(), measure({"prompt": "word " * 1000})
    for _ in range(20):
        estimator.learn("thrifty", size, 800)
        estimator.learn("lavish", size, 2000)
    assert estimator.tokens("thrifty", size) == pytest.approx(800, rel=0.05)
    assert estimator.tokens("lavish", size) == pytest.approx(2000, rel=0.05)


@given(st.lists(st.tuples(st.text(min_size=1), st.integers(8, 10_000)), max_size=20), st.text())
def test_whatever_it_is_taught_an_estimate_is_a_positive_number(lessons, text):
    weights = Weights()
    for lesson, tokens in lessons:
        weights.learn(measure({"prompt": lesson}), tokens)
    assert weights.tokens(measure({"prompt": text})) >= 1
