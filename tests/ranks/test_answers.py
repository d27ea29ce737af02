"""Two ranks of a divided model answer as one process does, and each holds half of the cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from processes import wait_until
from ranks.group_of_two import two_ranks
from sidecar.clients import demo_client
from tqstack import demo_model

TEXT = demo_model.held_out_tokens()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pair(home):
    with two_ranks(home, SIDECAR_PREFIX_DISK_GB="1") as pair:
        yield pair


@pytest.fixture(scope="module")
def whole():
    with demo_client(sidecar_speculation="lookup") as client:  # ranks have no head of their own
        yield client


def completion(first: int, count: int, **fields):
    prompt = [int(token) for token in TEXT[first : first + count]]
    fields = {"max_tokens": 24, "temperature": 0, **fields}
    return "/v1/completions", {"model": "demo", "prompt": prompt, **fields}


def chat(text: str, **fields):
    messages = [{"role": "user", "content": text}]
    return "/v1/chat/completions", {"model": "demo", "messages": messages, **fields}


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
REQUESTS = [
    completion(0, 40),
    completion(100, 900),
    completion(2000, 30, temperature=0.9, seed=7, top_p=0.95),
    completion(3000, 300, temperature=0.8, seed=3, n=2, frequency_penalty=0.4),
    completion(4000, 60, logprobs=2, max_tokens=6),
    completion(5000, 50, echo=True, logprobs=1, max_tokens=3),
    completion(6000, 200, ignore_eos=True, max_tokens=150),  # repeats itself: drafts come true
    chat(
        "How old?",
        max_tokens=20,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    ),
]


def told(client, request):
    """What an answer says, its log-probabilities rounded."""
    path, body = request
    response = client.post(path, json=body)
    assert response.is_success, response.text
    found = response.json()
    for choice in found["choices"]:
        if logprobs := choice.get("logprobs"):
            values = logprobs.get("token_logprobs") or []
            logprobs["token_logprobs"] = [v if v is None else round(v, 2) for v in values]
            logprobs.pop("top_logprobs", None)
    return found["choices"], found["usage"]["prompt_tokens"]


def cached(response):
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def expected(whole):
    return [told(whole, request) for request in REQUESTS]


@pytest.mark.parametrize("i", range(len(REQUESTS)))
def test_an_answer_is_that_of_one_process(pair, expected, i):
    with pair.client() as client:
        assert told(client, REQUESTS[i]) == expected[i]


def test_answers_side_by_side_are_those_of_one_process(pair, expected):
    with pair.client() as client, ThreadPoolExecutor(len(REQUESTS)) as threads:
        found = list(threads.map(lambda request: told(client, request), REQUESTS * 2))
    assert found == expected * 2


def test_a_client_that_leaves_leaves_nothing_behind_and_others_go_on(pair, expected):
    with pair.client() as client, ThreadPoolExecutor(2) as threads:
        going_on = threads.submit(told, client, REQUESTS[1])
        for request in (completion(9000, 3000), completion(9000, 20, ignore_eos=True)):
            body = {**request[1], "stream": True, "max_tokens": 3000}
            with client.stream("POST", request[0], json=body) as stream:
                next(stream.iter_bytes())
        assert going_on.result() == expected[1]
        wait_until(lambda: pair.health()["requests"]["running"] == 0, "all are gone")
        assert told(client, REQUESTS[0]) == expected[0]


def test_without_a_seed_ranks_draw_the_same_tokens(pair):
    with pair.client() as client:
        for _ in range(3):
            assert told(client, completion(0, 20, temperature=1.2))
    each = pair.health()["ranks"]["each"]
    assert len({one["pid"] for one in each}) == 2


def test_each_rank_holds_half_of_the_cache_and_health_tells_of_both(pair, whole):
    ours, theirs = pair.health(), whole.get("/health").json()
    assert ours["cache"]["bytes_per_token"] * 2 == theirs["cache"]["bytes_per_token"]
    assert ours["memory_plan"]["weights"] < 0.7 * theirs["memory_plan"]["weights"]
    ranks = ours["ranks"]
    assert (ranks["count"], ranks["backend"], ranks["experimental"]) == (2, "ring", True)
    wait_until(lambda: len({one["step"] for one in pair.health()["ranks"]["each"]}) == 1, "at rest")
    assert all(one["bytes"] > 0 and one["silent_seconds"] < 6 for one in ranks["each"])


def test_a_prefix_is_read_once_and_again_from_disk_after_a_restart(home, whole):
    path, body = completion(20_000, 1200)
    second = {**body, "prompt": body["prompt"] + [int(token) for token in TEXT[100:160]]}
    expected = [told(whole, (path, one)) for one in (body, second)]
    with two_ranks(home, SIDECAR_PREFIX_DISK_GB="1") as pair, pair.client() as client:
        assert told(client, (path, body)) == expected[0]
        again = client.post(path, json=second)
        assert cached(again) > 1000 and again.json()["choices"] == expected[1][0]
        wait_until(lambda: pair.health()["prefixes"]["disk"]["written"] > 0, "it is on disk")
    with two_ranks(home, SIDECAR_PREFIX_DISK_GB="1") as pair, pair.client() as client:
        again = client.post(path, json=second)
        assert cached(again) > 1000 and again.json()["choices"] == expected[1][0]
        assert pair.health()["prefixes"]["disk"]["read"] > 0
    folders = sorted(home.rglob("rank-*"))
    assert [path.name for path in folders] == ["rank-0-of-2", "rank-1-of-2"]
    for file in folders[1].iterdir():
        file.unlink()
    with two_ranks(home, SIDECAR_PREFIX_DISK_GB="1") as pair, pair.client() as client:
        again = client.post(path, json=second)  # rank 1 has nothing, so all read it anew
        assert cached(again) == 0 and again.json()["choices"] == expected[1][0]
