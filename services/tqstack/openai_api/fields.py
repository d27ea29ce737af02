"""Every field of the four APIs, and what becomes of it. `docs/api.md` is made from this.

What is refused, with its words, is where it is refused: `sidecar/refusals.py` and the dialects'
`REFUSED`. Fields of the Responses and the Messages API that chat has too go on as chat's.
"""

from __future__ import annotations

from typing import NamedTuple


class Field(NamedTuple):
    """
    Attributes:
        sidecar: what it does with it.
        ollama: what Ollama's `/v1` does: 0.33 was asked (`tests/router/test_real_ollama.py`).
    """

    sidecar: str
    ollama: str = "done"


DONE = Field("done")
LABEL = Field("a label, without effect on an answer", "not read")
UNREAD = "not read; the header `x-tqstack-left-out` says so"
ONLY_SIDECAR = Field("done", UNREAD)
NOTHING = Field("nothing to do: there is one of it here", "not read")

_SAMPLING = {
    "temperature": Field("done; else the model's `generation_config.json`, else 1"),
    "top_p": Field("done; else the model's `generation_config.json`, else 1"),
    "top_k": Field("done, 0 and -1: all; else the model's `generation_config.json`", UNREAD),
    "min_p": ONLY_SIDECAR,
    "presence_penalty": DONE,
    "frequency_penalty": DONE,
    "repetition_penalty": ONLY_SIDECAR,
    "seed": Field("done; each of several choices has its own"),
    "n": Field("1 to 16", UNREAD),
    "stop": Field("done; the one that was found is the choice's `stop_reason`"),
    "stop_token_ids": ONLY_SIDECAR,
    "include_stop_str_in_output": ONLY_SIDECAR,
    "min_tokens": ONLY_SIDECAR,
    "ignore_eos": ONLY_SIDECAR,
    "logit_bias": Field("done, by token ids of the sidecar's model", UNREAD),
    "prompt_logprobs": Field("done, in whole answers", UNREAD),
}
_SCHEMA = "a JSON schema, forced; what cannot be forced is a 400 that says what"
_FORMS = {
    "response_format": Field(
        "text, json_object, json_schema; forced from the reasoning's end on",
        "done; json_object is sent as a schema; a model that can think and has a template of "
        "Ollama's own is not forced when it does not think",
    ),
    "guided_json": Field(_SCHEMA, UNREAD),
    "json_schema": Field(f"{_SCHEMA} (llama.cpp's name)", UNREAD),
    "guided_regex": Field("forced", UNREAD),
    "guided_choice": Field("forced", UNREAD),
    "guided_grammar": Field("forced: GBNF or Lark", UNREAD),
    "grammar": Field("forced: GBNF or Lark (llama.cpp's name)", UNREAD),
    "structured_outputs": Field("one of json, json_object, regex, choice, grammar", UNREAD),
}
_COMMON = {
    "model": DONE,
    "stream": DONE,
    "stream_options": Field("`include_usage`, `continuous_usage_stats`", "`include_usage`"),
    "max_tokens": DONE,
    "user": LABEL,
    "cache_prompt": Field("false: nothing is kept, nothing kept is used", "not read"),
    **_SAMPLING,
    **_FORMS,
}
CHAT: dict[str, Field] = {
    "messages": Field(
        "done; leading system messages are one, `developer` is `system`; a last assistant message "
        "is gone on with",
        "done; `developer` becomes `system`",
    ),
    **_COMMON,
    "max_completion_tokens": Field("done", "done: sent as `max_tokens`"),
    "tools": Field(
        "done; arguments of `strict` tools keep to their schemas, where it is known how the model "
        "calls tools, or get a 400 that says what cannot be forced; those of others that must be "
        "called, as far as they can be forced"
    ),
    "tool_choice": Field(
        "auto, none, required, one tool; calls are forced in the model's own form, where that is "
        "known, else their beginning",
        UNREAD,
    ),
    "parallel_tool_calls": Field("false: an answer ends with its first call", UNREAD),
    "functions": Field("done, as tools; the call is `function_call`", UNREAD),
    "function_call": Field("done", UNREAD),
    "logprobs": Field("done, of the content: the model's own, before sampling parameters"),
    "top_logprobs": Field("0 to 20"),
    "reasoning_effort": Field(
        "where the template has a switch; none closes the block",
        "done; a 400 for a model that cannot think",
    ),
    "chat_template_kwargs": Field("names that the template knows", UNREAD),
    "add_generation_prompt": ONLY_SIDECAR,
    "continue_final_message": Field("done", "a last assistant message is always gone on with"),
    "modalities": Field("text", "not read"),
    "verbosity": Field("medium", UNREAD),
    "metadata": LABEL,
    "store": Field("a label: completions are not stored", "not read"),
    "service_tier": NOTHING,
    "safety_identifier": LABEL,
    "prompt_cache_key": LABEL,
    "prompt_cache_options": Field("a label: prompts are kept by their tokens", "not read"),
    "prompt_cache_retention": Field("a label: prompts are kept while there is room", "not read"),
}
COMPLETIONS: dict[str, Field] = {
    "prompt": Field("a text, tokens, or a list of either", "one text; a 400 for the others"),
    **_COMMON,
    "max_tokens": Field("done; 0 with `echo`: the prompt alone"),
    "response_format": Field("as chat's", UNREAD),
    "echo": ONLY_SIDECAR,
    "best_of": Field("done: the likeliest `n` by mean logprob; not streamed", UNREAD),
    "logprobs": Field("0 to 20; with `echo` the prompt's too", UNREAD),
}
RESPONSES: dict[str, Field] = {
    "input": Field(
        "done; items without a counterpart are left out, and `x-tqstack-left-out` names them"
    ),
    "instructions": DONE,
    "model": DONE,
    "stream": DONE,
    "stream_options": Field("nothing to do: nothing is padded", "not read"),
    "temperature": DONE,
    "top_p": DONE,
    "max_output_tokens": DONE,
    "max_tool_calls": Field("nothing to do: it limits tools that run at OpenAI", "not read"),
    "parallel_tool_calls": Field("as chat's", UNREAD),
    "tools": Field("function, custom, namespace, local_shell; others are left out"),
    "tool_choice": Field("as chat's; `allowed_tools`: only those are sent", UNREAD),
    "text": Field("`format` as chat's `response_format`; `verbosity` medium"),
    "reasoning": Field("`effort` as chat's; a summary is the reasoning itself"),
    "include": Field(
        "`reasoning.encrypted_content`, `message.output_text.logprobs`; the rest is of tools that "
        "run at OpenAI"
    ),
    "top_logprobs": DONE,
    "previous_response_id": Field("done, of answers kept in memory", "done, by the router"),
    "store": Field("false: not kept", "done, by the router"),
    "truncation": Field("disabled"),
    "metadata": LABEL,
    "user": LABEL,
    "safety_identifier": LABEL,
    "service_tier": NOTHING,
    "prompt_cache_key": LABEL,
    "prompt_cache_options": Field("a label: prompts are kept by their tokens", "not read"),
    "prompt_cache_retention": Field("a label: prompts are kept while there is room", "not read"),
    "access_programs": LABEL,
    "background_options": Field("nothing to do without `background`", "not read"),
    "image": Field("nothing to do: it is of a tool that runs at OpenAI", "not read"),
    "client_metadata": LABEL,
}
MESSAGES: dict[str, Field] = {
    "messages": Field("done; mid-conversation system messages, thinking, documents of text"),
    "system": Field("done, without Claude Code's attribution line"),
    "model": DONE,
    "stream": DONE,
    "max_tokens": DONE,
    "temperature": DONE,
    "top_p": DONE,
    "top_k": Field("done", UNREAD),
    "stop_sequences": DONE,
    "tools": Field("those with an `input_schema`; others are left out"),
    "tool_choice": Field("as chat's, with `disable_parallel_tool_use`", UNREAD),
    "thinking": Field("disabled: no reasoning; a budget is an effort"),
    "output_config": Field("`format` as chat's `response_format`; `effort` as `reasoning_effort`"),
    "cache_control": Field("nothing to do: every prompt is kept"),
    "context_management": Field("nothing to do: templates drop earlier thinking", "not read"),
    "metadata": LABEL,
    "service_tier": NOTHING,
    "speed": NOTHING,
    "inference_geo": NOTHING,
    "diagnostics": LABEL,
    "user_profile_id": LABEL,
    "workspace_id": LABEL,
    "billing_policy": LABEL,
    "fallback_credit_token": LABEL,
}
# Fields that a real Ollama does not read though they change an answer.
OLLAMA_IGNORES = {
    "/v1/chat/completions": {name for name, field in CHAT.items() if field.ollama == UNREAD},
    "/v1/completions": {name for name, field in COMPLETIONS.items() if field.ollama == UNREAD},
}
