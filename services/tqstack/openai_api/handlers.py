"""Exceptions of a FastAPI application as OpenAI errors."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from tqstack.openai_api.errors import ApiError, error_body

log = logging.getLogger(__name__)
_KNOWN = {404: "there is no such path here", 405: "this path does not take that method"}


def add_error_handlers(app: FastAPI, other_paths: Iterable[str] = ()) -> None:
    """Answer every failure of `app` with the OpenAI envelope.

    Args:
        other_paths: paths that exist, though the framework does not know them.
    """
    others = frozenset(other_paths)

    async def http_error(request: Request, error: Any) -> Response:
        status, path = error.status_code, request.url.path
        if status == 404 and path in others:
            status = 405
        message = f"{request.method} {path}: {_KNOWN.get(status, error.detail)}"
        return JSONResponse(error_body(status, message), status, error.headers)

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, _bug)


async def _api_error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    log.exception("%s %s failed", request.method, request.url.path, exc_info=error)
    message = f"internal error ({type(error).__name__}); the service's log has the details"
    return JSONResponse(error_body(500, message), 500)
