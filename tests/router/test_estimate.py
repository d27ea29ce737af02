"""Estimates against real tokenizers, over the kinds of text that people send."""

from __future__ import annotations

import argparse
import ast
import asyncio
import collections
import dataclasses
import inspect
import json
import logging
import pathlib
import random
import textwrap
import typing
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


def python(size: int, rng: random.Random) -> str:
    sources = [inspect.getsource(m) for m in (textwrap, json.decoder, json.encoder, typing, random)]
    source = rng.choice(sources)
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
    """Byte-level BPE of 4,000 tokens with single digits, taught here: as unlike as can be."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    taught = (argparse, asyncio.tasks, ast, collections, dataclasses, inspect, logging, pathlib)
    corpus = [inspect.getsource(module) for module in taught] + CHINESE[:4] * 3
    trainer = trainers.BpeTrainer(vocab_size=4000, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def count(tokenizer: Tokenizer, body: dict) -> int:
    """Tokens of the prompt as a chat template would render it."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in body["messages"])
    if "tools" in body:
        text = "# Tools\n\n" + "\n".join(map(json.dumps, body["tools"])) + text
    return len(tokenizer.encode(text + "<|im_start|>assistant\n").ids)


@pytest.mark.parametrize("make", [demo_tokenizer, other_tokenizer])
def test_after_50_requests_estimates_are_within_10_percent(make):
    tokenizer, weights, rng = make(), Weights(), random.Random(1)
    for i in range(50):
        body = request(KINDS[i % len(KINDS)], rng)
        weights.learn(measure(body), count(tokenizer, body))
    for kind in KINDS:
        bodies = [request(kind, rng) for _ in range(9)]
        true = np.array([count(tokenizer, body) for body in bodies])
        guess = np.array([weights.tokens(measure(body)) for body in bodies])
        assert np.median(np.abs(guess / true - 1)) < 0.10, kind
        assert guess.sum() == pytest.approx(true.sum(), rel=0.10), kind


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
    whole = [
        sum(map(str.isalpha, text)),
        sum(map(str.isdigit, text)),
        sum(map(str.isspace, text)),
    ]
    size = measure(body)
    assert size[:2] == pytest.approx(whole[:2], rel=0.05)
    assert sum(size[:5]) == pytest.approx(len(text), rel=0.001)


def test_base64_of_an_image_counts_as_an_image():
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 500_000}}
    text = {"type": "text", "text": "what is this?"}
    body = {"messages": [{"role": "user", "content": [text, part]}]}
    size = measure(body)
    assert size.images == 1
    assert Weights().tokens(size) < 2_000


def test_every_part_of_a_request_counts():
    base = {"messages": [{"role": "user", "content": "hello"}]}
    call = {"function": {"name": "f", "arguments": "x" * 400}}
    longer = [
        {**base, "tools": [{"type": "function", "function": {"name": "f" * 400}}]},
        {"messages": [{"role": "system", "content": "x" * 400}, *base["messages"]]},
        {"messages": [*base["messages"], {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 400}]}]},
        {"prompt": "x" * 400},
        {"prompt": [5] * 100},
        {"input": ["x" * 200] * 2},
        {**base, "system": "x" * 400},
        {"input": "hello", "instructions": "x" * 400},
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
