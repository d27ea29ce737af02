"""How a backend failed a request, and what the client is told if nobody else can answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import orjson

from tqstack.openai_api.errors import ApiError

# The request itself is at fault: another backend would say the same.
_CLIENTS_FAULT = frozenset({400, 405, 406, 409, 411, 413, 415, 422})
_TOO_LONG = "exceed_context_size_error"  # in llama-server's words
# What a backend in good health refuses, also once its stream has begun; the status of each.
_REFUSALS = {
    "context_length_exceeded": 400,
    "insufficient_memory": 503,
    "model_not_ready": 503,
    "no_model": 503,
    "queue_full": 429,
}

# What Ollama says, as llama-server's words or its own, where a model cannot do what is asked: what
# it means and what to do, and the field.
_UNABLE = (
    (
        ("image input is not supported", "does not support multimodal", "required for image input"),
        "the model reads no images; name one that does (`ollama show MODEL` lists `vision`)",
        "messages",
    ),
    (
        ("does not support embeddings",),
        "the model makes no embeddings; name one that does, such as nomic-embed-text (`ollama "
        "pull nomic-embed-text`)",
        "model",
    ),
    (
        ("invalid input type",),
        "it embeds texts and no tokens; send texts (in LangChain: "
        "check_embedding_ctx_length=False)",
        "input",
    ),
)


class Failure(Exception):
    """A backend failed a request.

    Attributes:
        kind: a word for the header, the metrics and the log: `refused`, `cut`, `timeout`,
            `stalled`, `hung`, `garbled`, `unfinished`, `error-event`, `context`, or `status-NNN`.
        error: what to tell the client.
        elsewhere: another backend may do better.
        sick: it counts against the backend's health.
    """

    def __init__(self, kind: str, error: ApiError, *, elsewhere: bool = True, sick: bool = True):
        super().__init__(error.message)
        self.kind = kind
        self.error = error
        self.elsewhere = elsewhere
        self.sick = sick


def broken(kind: str, message: str, status: int = 502) -> Failure:
    """A failure of the connection or of the answer's form."""
    retry_after = 2 if kind in ("refused", "hung") else None
    error = ApiError(status, message, code=f"backend_{kind}", retry_after=retry_after)
    return Failure(kind, error)


def too_long(backend: str, model: str, context: int) -> Failure:
    """A prompt that the backend would not hold."""
    message = (
        f"{backend} holds {context} tokens of {model} here, and this prompt is longer; raise "
        "OLLAMA_CONTEXT_LENGTH, or send a shorter prompt"
    )
    error = ApiError(400, message, param="messages", code="context_length_exceeded")
    return Failure("context", error, sick=False)


def loop_detected(via: Sequence[str]) -> ApiError:
    """A request that comes back to a router, or has passed too many."""
    return ApiError(
        508,
        f"the request has passed {len(via)} routers, and only routers where it has been are left; "
        "see the `backends.toml` of each",
        code="loop_detected",
    )


def refusal(backend: str, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """A failure from an answer with an error status."""
    error, retry_after = _envelope(backend, status, body), headers.get("retry-after")
    said = error.message.lower()
    for words, means, param in _UNABLE:
        if any(word in said for word in words):
            error = ApiError(400, f"{backend}: {means}", param=param, code="unsupported_value")
            return Failure(f"status-{status}", error, sick=False)
    error.retry = headers.get("x-should-retry") != "false"
    if retry_after and retry_after.isdigit():
        error.retry_after = int(retry_after)
    too_long = error.code == "context_length_exceeded"
    ours = status not in _CLIENTS_FAULT
    # Not ill is one that is loading, full or rate limited, has no such thing, or sees a circle.
    sick = status >= 500 and status not in (501, 508) and not (status == 503 and error.code)
    return Failure(f"status-{status}", error, elsewhere=ours or too_long, sick=sick)


def from_error_event(backend: str, value: Any) -> Failure:
    """A failure from an error in place of an answer, or in the middle of one."""
    code = value.get("code") if isinstance(value, dict) else None
    status = _REFUSALS.get(code) if isinstance(code, str) else None
    error = _from_value(backend, status or 502, value)
    error.retry = code != "insufficient_memory"
    return Failure("error-event", error, sick=status is None)


def _envelope(backend: str, status: int, body: bytes) -> ApiError:
    """The error in OpenAI's envelope, whatever form the backend gave it."""
    try:
        value = _innermost(orjson.loads(body))
    except orjson.JSONDecodeError:
        value = body[:500].decode(errors="replace").strip()
    return _from_value(backend, status, value)


def _innermost(value: Any) -> Any:
    """What an answer says of its error. Ollama's message may be llama-server's own answer."""
    if not isinstance(value, dict):
        return value
    value = value.get("error") or value.get("detail") or value
    if not isinstance(value, dict) or not isinstance(text := value.get("message"), str):
        return value
    with suppress(orjson.JSONDecodeError):
        inner = orjson.loads(text) if text.startswith("{") else None
        if isinstance(inner, dict):
            return _innermost(inner)
    return value


def _from_value(backend: str, status: int, value: Any) -> ApiError:
    # A backend's own credentials and paths are none of the client's: a 401 here is our setting.
    client_status = 502 if status in (401, 403, 407) or status < 400 else status
    if status == 401:
        value = f"{backend} asks for a key, or for `ollama signin` where its model is in the cloud"
        return ApiError(client_status, value, code="backend_unauthorized")
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        code, param = value.get("code"), value.get("param")
        if value.get("type") == _TOO_LONG:
            code, param = "context_length_exceeded", "messages"
        return ApiError(
            client_status,
            value["message"],
            code=str(code) if code is not None else None,
            param=param if isinstance(param, str) else None,
        )
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return ApiError(client_status, f"{backend} answered {status}: {text or 'no reason given'}")
