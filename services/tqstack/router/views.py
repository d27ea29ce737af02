"""What the router answers by itself: models, health, metrics, and the status page."""

from __future__ import annotations

from pathlib import Path

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.guard import CLIENT
from tqstack.router.catalog import find_model, list_models
from tqstack.router.keys import OWNER
from tqstack.router.needs import FEATURES
from tqstack.router.offers import measure_of_length
from tqstack.router.policy import threshold_for
from tqstack.router.reload import reload as read_backends
from tqstack.router.services import Services
from tqstack.settings import SettingsError

_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
# Everything is in the one file; it may ask this router, and nobody else.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FRESH_SECONDS = 2.0  # how old a state may be while somebody looks


def _services(request: Request) -> Services:
    return request.app.state.services


async def page() -> Response:
    return HTMLResponse(_PAGE, headers={"content-security-policy": _PAGE_POLICY})


async def models(request: Request) -> Response:
    data = list_models(_services(request).backends)
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request, name: str) -> Response:
    return JSONResponse(find_model(_services(request).backends, name))


async def health(request: Request) -> Response:
    """200 while somebody can answer; what each backend's last probe showed."""
    summary = _summary(_services(request))
    return JSONResponse(summary, status_code=200 if summary["status"] == "ok" else 503)


async def status(request: Request) -> Response:
    """Everything that the status page and `tqstack top` show."""
    services = _services(request)
    for backend in services.backends.values():
        backend.probe.freshen(_FRESH_SECONDS)
    journal = services.journal
    return JSONResponse(
        {
            **_summary(services),
            "clients": services.clients.report(),
            "requests": [record.as_dict() for record in journal.running.values()],
            "recent": [record.as_dict() for record in reversed(journal.recent)],
        }
    )


async def reload(request: Request) -> Response:
    """Reads the file of backends again: for the owner, not for clients with keys of their own."""
    if request.scope[CLIENT] not in ("", OWNER):
        raise ApiError(403, "only TQSTACK_API_KEY may do this", code="forbidden")
    try:
        change = read_backends(_services(request))
    except SettingsError as error:
        raise ApiError(400, f"nothing has changed: {error}", code="bad_settings") from None
    return JSONResponse({"change": change})


async def metrics(request: Request) -> Response:
    body = _services(request).metrics.render()
    return Response(body, media_type="text/plain; version=1.0.0; charset=utf-8")


def _summary(services: Services) -> dict:
    backends = {backend.name: backend.report() for backend in services.backends.values()}
    alive = any(report["state"] in ("up", "sick") for report in backends.values())
    views = tuple(backend.view() for backend in services.backends.values())
    measure = measure_of_length(views)
    able = [view for view in views if view.state in ("up", "sick")]
    lacking = [view.lacks | view.ignores for view in able]
    return {
        "status": "ok" if alive else "error",
        "id": services.id,
        "capabilities": sorted(FEATURES - frozenset.intersection(FEATURES, *lacking)),
        "sidecar_available": any(
            report["kind"] == "sidecar" and report["state"] == "up" for report in backends.values()
        ),
        "threshold": threshold_for(services.settings.prompt_token_threshold, measure),
        "running": len(services.journal.running),
        "waiting": services.slots.waiting,
        "backends": backends,
    }
