"""What the sidecar refuses: an answer without it would look as if it had been done.

A field that is off, empty or at its default is no wish.
"""

from __future__ import annotations

from typing import Any

from tqstack.openai_api.errors import bad_request
from tqstack.openai_api.schema import ChatRequest, TextRequest

_OLLAMA = "prefix the model with ollama:"
_ONE_VALUE = "tokens are drawn one by one here"
# Field: what is said of it.
BOTH: dict[str, str] = {
    "logit_bias": f"the sidecar cannot change single tokens' chances; {_OLLAMA}",
    "min_tokens": "the sidecar cannot put off an answer's end; raise max_tokens and ask for length",
    "ignore_eos": "the sidecar ends an answer where the model does; leave it out",
    "logprobs": f"the sidecar gives no logprobs; {_OLLAMA}",
    "prompt_logprobs": f"the sidecar gives no logprobs; {_OLLAMA}",
    "guided_json": f"the sidecar cannot force a schema; {_OLLAMA} and use response_format",
    "guided_regex": "the sidecar cannot force a form; say it in the prompt",
    "guided_choice": "the sidecar cannot force a choice; say it in the prompt",
    "guided_grammar": "the sidecar cannot force a grammar; say it in the prompt",
    "structured_outputs": f"the sidecar cannot force a form; {_OLLAMA} and use response_format",
    "grammar": "the sidecar cannot force a grammar; say it in the prompt",
    "json_schema": f"the sidecar cannot force a schema; {_OLLAMA} and use response_format",
    "allowed_token_ids": "the sidecar cannot forbid tokens; leave it out",
    "bad_words": "the sidecar cannot forbid words; leave it out",
    "use_beam_search": f"{_ONE_VALUE}; leave it out",
    "typical_p": f"{_ONE_VALUE} by temperature, top_p, top_k and min_p; use those",
    "mirostat": f"{_ONE_VALUE} by temperature, top_p, top_k and min_p; use those",
    "truncate_prompt_tokens": "nothing is cut from a prompt here; send a shorter one",
}
CHAT: dict[str, str] = {
    "top_logprobs": f"the sidecar gives no logprobs; {_OLLAMA}",
    "audio": "the models here write text; leave audio out",
    "prediction": "predicted output is not used here; leave it out",
    "web_search_options": "nothing here searches the web; leave it out, or offer a tool that does",
    "moderation": "nothing is moderated here; leave it out",
}
TEXT: dict[str, str] = {
    "suffix": "the sidecar does not fill in between two texts; write the model's own markers for "
    "that into the prompt",
}


def refuse_unsupported(request: ChatRequest | TextRequest) -> None:
    """
    Raises:
        ApiError: 400, naming the first field that cannot be done.
    """
    chat = isinstance(request, ChatRequest)
    given = {name: getattr(request, name, None) for name in request.model_fields_set}
    for name, why in {**BOTH, **(CHAT if chat else TEXT)}.items():
        if given.get(name) or (name == "logprobs" and not chat and given.get(name) is not None):
            raise bad_request(f"{name}: {why}", name, "unsupported_value")
    if isinstance(request, TextRequest):
        _refuse_best_of(request)
    else:
        _refuse_in_chat(request, given)


def _refuse_best_of(request: TextRequest) -> None:
    if request.best_of not in (None, request.n or 1):
        raise bad_request(
            "best_of: the sidecar does not rank answers; ask for n, and choose yourself",
            "best_of",
            "unsupported_value",
        )


def _refuse_in_chat(request: ChatRequest, given: dict[str, Any]) -> None:
    kind = (request.response_format or {}).get("type", "text")
    if kind != "text":
        raise bad_request(
            f"response_format: the sidecar cannot force {kind}; {_OLLAMA}",
            "response_format",
            "unsupported_value",
        )
    if any(kind != "text" for kind in given.get("modalities") or ()):
        raise bad_request(
            "modalities: the models here write text; send ['text'], or leave it out",
            "modalities",
            "unsupported_value",
        )
    if given.get("verbosity") not in (None, "medium"):
        raise bad_request(
            "verbosity: models here have no such dial; say it in the prompt",
            "verbosity",
            "unsupported_value",
        )
