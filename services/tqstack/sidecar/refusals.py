"""What the sidecar refuses: an answer without it would look as if it had been done.

A field that is off, empty or at its default is no wish.
"""

from __future__ import annotations

from typing import Any

from tqstack.openai_api.errors import bad_request
from tqstack.openai_api.schema import ChatRequest, TextRequest

_ONE_VALUE = "tokens are drawn one by one here"
# Field: what is said of it.
BOTH: dict[str, str] = {
    "allowed_token_ids": "the sidecar cannot forbid tokens; leave it out",
    "bad_words": "the sidecar cannot forbid words; leave it out",
    "use_beam_search": f"{_ONE_VALUE}; leave it out",
    "typical_p": f"{_ONE_VALUE} by temperature, top_p, top_k and min_p; use those",
    "mirostat": f"{_ONE_VALUE} by temperature, top_p, top_k and min_p; use those",
    "truncate_prompt_tokens": "nothing is cut from a prompt here; send a shorter one",
}
CHAT: dict[str, str] = {
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
        if given.get(name):
            raise bad_request(f"{name}: {why}", name, "unsupported_value")
    if chat:
        _refuse_in_chat(given)


def _refuse_in_chat(given: dict[str, Any]) -> None:
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
