"""The sidecar's API with the demo model: fields that are done, and those that are refused."""

from __future__ import annotations

import json

import pytest

from tqstack import demo_model
from tqstack.openai_api import schema
from tqstack.sidecar import defaults, refusals

PROMPT = "import os\n\n\ndef main():\n"
HELLO = [{"role": "user", "content": "hello"}]


def complete(client, prompt=PROMPT, **fields):
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def events_of(response):
    lines = [line for line in response.text.split("\n") if line.startswith("data: {")]
    return [json.loads(line[6:]) for line in lines]


def test_several_choices_have_seeds_of_their_own_and_come_again(client):
    options = {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    first, again = complete(client, **options), complete(client, **options)
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert texts(first) == texts(again) and len(set(texts(first))) > 1
    assert texts(first)[0] == texts(complete(client, **{**options, "n": 1}))[0]
    assert first["usage"]["completion_tokens"] == 24
    assert first["usage"]["prompt_tokens"] == complete(client)["usage"]["prompt_tokens"]


def test_each_of_several_prompts_is_answered_as_alone(client):
    prompts = [PROMPT, "class A:\n", "for i in "]
    alone = [texts(complete(client, prompt))[0] for prompt in prompts]
    assert texts(complete(client, prompts)) == alone
    both = complete(client, prompts, n=2)
    assert texts(both) == [text for text in alone for _ in range(2)]


def test_choices_are_streamed_under_their_index(client):
    body = {"prompt": PROMPT, "n": 2, "seed": 1, "max_tokens": 6, "stream": True}
    streamed = ["", ""]
    for event in events_of(client.post("/v1/completions", json=body)):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts(complete(client, n=2, seed=1, temperature=1.0, max_tokens=6))


def test_echo_is_the_prompt_and_then_the_answer(client):
    [answer] = texts(complete(client))
    assert texts(complete(client, echo=True)) == [PROMPT + answer]


def test_logprobs_are_told_of_each_token_that_is_shown(client):
    [choice] = complete(client, logprobs=2, echo=True, max_tokens=6)["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert told["token_logprobs"][0] is None and max(told["token_logprobs"][1:]) <= 0
    places = zip(told["text_offset"], told["tokens"], strict=True)
    assert all(choice["text"].startswith(token, at) for at, token in places)
    assert all(len(top) == 2 for top in told["top_logprobs"][1:])
    [cut] = complete(client, logprobs=0, stop=choice["text"][-3:], max_tokens=6)["choices"]
    assert "".join(cut["logprobs"]["tokens"]).startswith(cut["text"])
    assert len(cut["logprobs"]["tokens"]) < 6
    [prompt] = complete(client, logprobs=1, echo=True, max_tokens=0)["choices"]
    assert prompt["text"] == PROMPT and len(prompt["logprobs"]["tokens"]) == len(told["tokens"]) - 6
    [vllms] = complete(client, prompt_logprobs=1, max_tokens=1)["choices"]
    values = [max(one["logprob"] for one in top.values()) for top in vllms["prompt_logprobs"][1:]]
    best = [max(top.values()) for top in told["top_logprobs"][1 : len(values) + 1]]
    assert values == pytest.approx(best)


def test_a_chat_s_logprobs_come_whole_and_streamed(client):
    body = {"messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True}
    body["top_logprobs"] = 3
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    told = whole["logprobs"]["content"]
    assert "".join(one["token"] for one in told) == whole["message"]["content"]
    assert all(len(one["top_logprobs"]) == 3 for one in told)
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in told)
    streamed = []
    for event in events_of(client.post("/v1/chat/completions", json={**body, "stream": True})):
        for choice in event["choices"]:
            streamed += (choice["logprobs"] or {"content": []})["content"]
    assert [one["token"] for one in streamed] == [one["token"] for one in told]


def test_of_more_answers_than_are_wanted_the_likeliest_are_given(client):
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 8}
    every = complete(client, n=4, logprobs=0, **options)["choices"]
    means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) / 8 for c in every}
    answer = complete(client, n=2, best_of=4, **options)
    assert texts(answer) == sorted(means, key=means.__getitem__)[:-3:-1]
    assert answer["usage"]["completion_tokens"] == 32


def test_an_answer_is_as_long_as_it_must_be(client):
    end = {"2": 100}
    assert texts(complete(client, logit_bias=end)) == [""]
    longer = complete(client, logit_bias=end, min_tokens=5)
    assert longer["usage"]["completion_tokens"] == 6
    [choice] = complete(client, logit_bias=end, ignore_eos=True)["choices"]
    assert choice["finish_reason"] == "length"
    [whole] = texts(complete(client))
    stop = whole[2]
    assert len(texts(complete(client, stop=stop, min_tokens=6))[0]) > whole.index(stop)
    tokens = client.post("/tokenize", json={"prompt": whole}).json()["tokens"]
    [choice] = complete(client, stop_token_ids=[tokens[2]], include_stop_str_in_output=True)[
        "choices"
    ]
    assert choice["stop_reason"] == tokens[2] and whole.startswith(choice["text"])


def test_an_answer_keeps_its_first_spaces(client):
    """The seed of the flaw: indentation."""
    [text] = texts(complete(client, "def f(x):\n    if x:\n", max_tokens=4))
    assert text.startswith("    ")


def test_stop_tokens_end_an_answer_and_stop_strings_are_told(client):
    [whole] = texts(complete(client))
    stop = whole[5:8]
    [choice] = complete(client, stop=stop)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    [choice] = complete(client, stop=stop, include_stop_str_in_output=True)["choices"]
    assert choice["text"] == whole[: whole.index(stop) + 3]
    tokens = client.post("/tokenize", json={"prompt": whole}).json()["tokens"]
    [cut] = texts(complete(client, stop_token_ids=[tokens[2]]))
    assert cut == client.post("/detokenize", json={"tokens": tokens[:2]}).json()["prompt"]


def test_every_chunk_tells_the_usage_where_that_is_asked(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": HELLO, "max_tokens": 4, "stream": True, "stream_options": options}
    events = events_of(client.post("/v1/chat/completions", json=body))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 4
    assert len({event["usage"]["prompt_tokens"] for event in events}) == 1


def test_text_and_tokens_there_and_back(client):
    told = client.post("/tokenize", json={"prompt": PROMPT}).json()
    assert told["count"] == len(told["tokens"])
    back = client.post("/detokenize", json={"tokens": told["tokens"]}).json()
    assert back == {"prompt": PROMPT}
    assert client.post("/detokenize", json={"tokens": [10**9]}).status_code == 400
    chat = client.post("/tokenize", json={"messages": HELLO}).json()
    assert chat["count"] > told["count"] / 4


def test_embeddings_are_a_501_that_says_what_to_do(client):
    response = client.post("/v1/embeddings", json={"input": "hi"})
    assert response.status_code == 501
    assert "ollama" in response.json()["error"]["message"]


def test_capabilities_are_told(client):
    assert {"tools", "logprobs", "json_schema"} <= set(client.get("/health").json()["capabilities"])


@pytest.mark.parametrize("name", [*refusals.BOTH, *refusals.CHAT])
def test_what_a_chat_cannot_have_is_refused(client, name):
    value = True if name == "use_beam_search" else {"a": 1}
    response = client.post("/v1/chat/completions", json={"messages": HELLO, name: value})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == name
    assert len(error["message"].split()) > 5


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "x"},
        {"logprobs": 21},
        {"best_of": 2, "n": 3},
        {"best_of": 3, "stream": True},
        {"n": 16, "prompt": ["a"] * 9},
        {"logit_bias": {"999999": 1}},
        {"logit_bias": {"the": 1}},
        {"stop_token_ids": [999999]},
        {"min_tokens": 20, "max_tokens": 10},
        {"prompt_logprobs": 1, "stream": True},
        {"guided_regex": "("},
        {"guided_choice": []},
        {"guided_json": "{"},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"structural_tag": "{}"}},
        {"grammar": "root ::= ("},
        {"ignore_eos": True, "guided_regex": "a"},
        {"guided_regex": "a", "guided_choice": ["b"]},
    ],
)
def test_what_a_completion_cannot_have_is_refused(client, fields):
    response = client.post("/v1/completions", json={"prompt": "a", **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False, "logit_bias": {}, "min_tokens": 0, "modalities": ["text"]},
        {"top_k": -1, "n": 1, "verbosity": "medium", "response_format": {"type": "text"}},
    ],
)
def test_what_is_off_is_no_wish(client, fields):
    body = {"messages": HELLO, "max_tokens": 1, **fields}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_a_model_s_own_defaults_are_for_what_a_request_leaves_open(tmp_path, monkeypatch):
    told = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": "much", "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    wanted = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert defaults.sampling_defaults(str(tmp_path)) == wanted
    assert defaults.sampling_defaults(str(demo_model.PATH)) == {}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "generation_config.json").write_text("[1]")
    assert defaults.sampling_defaults(str(tmp_path / "broken")) == {}


def test_the_schema_allows_no_more_choices_than_the_sidecar_makes():
    assert schema.MOST_CHOICES <= 64
