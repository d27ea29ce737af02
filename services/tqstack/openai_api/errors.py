"""The OpenAI error envelope, which both services answer with, whatever went wrong."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError


class ApiError(Exception):
    """A failure that the client is told about.

    Args:
        status: HTTP status.
        message: what is wrong, and what to do about it.
        param: the request field at fault.
        code: the field's machine-readable name, such as `context_length_exceeded`.
        retry_after: seconds until it makes sense to ask again.
        retry: False after an expensive failure; the OpenAI SDK retries twice unless told not to.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        retry: bool = True,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.retry = retry

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.param, self.code)

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if not self.retry:
            headers["x-should-retry"] = "false"
        return headers


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}` for an HTTP status."""
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    kind = _TYPES.get(status, fallback)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


_BRANCHES = frozenset({"str", "constrained-str", "int", "constrained-int", "float", "bool", "dict"})


def from_validation(error: ValidationError) -> ApiError:
    """The first problem of a pydantic error as a 400, the field named as in the request."""
    problem = error.errors()[0]
    # Union branches append their own names; those are not fields of the request.
    path = [part for part in map(str, problem["loc"]) if "[" not in part and part not in _BRANCHES]
    param = ".".join(path) or None
    message = problem["msg"].removeprefix("Value error, ")
    return bad_request(f"{param}: {message}" if param else message, param)
