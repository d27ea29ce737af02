"""Other APIs in terms of chat completions, for backends that do not speak them themselves."""

from __future__ import annotations

from typing import Any, Protocol

from tqstack.openai_api.errors import ApiError


class Stream(Protocol):
    """Turns a stream of chat completion chunks into another API's events.

    Attributes:
        final: the whole answer once it is there, of an API whose requests may refer to it.
    """

    final: dict[str, Any] | None

    def ping(self, text: str) -> bytes:
        """What keeps a client waiting; `text` says for what."""
        ...

    def feed(self, data: bytes) -> bytes:
        """Events for whole events of the chat stream."""
        ...

    def end(self) -> bytes:
        """The closing events, once the chat stream is known to be whole."""
        ...

    def fail(self, error: ApiError) -> bytes:
        """An error as the last event of a stream that has begun."""
        ...


class Dialect(Protocol):
    """An API that can be translated to chat completions and back."""

    def resolve(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request as every backend is to see it, also one that knows this API.

        Raises:
            ApiError: 400, if it refers to what is not here.
        """
        ...

    def to_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request as a chat request.

        Raises:
            ApiError: 400 for what is malformed, or has no counterpart.
        """
        ...

    def left_out(self, request: dict[str, Any]) -> list[str]:
        """What of the request has no counterpart and is left out of the chat: the client is told
        in a header."""
        ...

    def from_chat(self, answer: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
        """A chat completion as this API's answer to `request`."""
        ...

    def stream(self, request: dict[str, Any], prompt_tokens: int) -> Stream:
        """
        Args:
            prompt_tokens: an estimate.
        """
        ...

    def keep(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        """Takes note of a whole answer in this API's form, for requests that refer to it."""
        ...

    def error_body(self, error: ApiError) -> dict[str, Any]: ...
