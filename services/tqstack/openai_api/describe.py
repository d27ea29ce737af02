"""`/openapi.json`: what the services take, by what their requests are held to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from tqstack.openai_api.fields import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Field
from tqstack.openai_api.schema import Passing

# What the body of a POST may be: one of these models, or this JSON schema.
Bodies = Mapping[str, list[type[Passing]] | dict[str, Any]]
_REF = "#/components/schemas/{model}"
_TEXT, _TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
_TOLD = {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": [*_TOLD], "properties": _TOLD}},
}
_FAILED = {
    "description": "refused or failed",
    "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
}
_OF_MODELS: dict[str, Mapping[str, Field]] = {"ChatRequest": CHAT, "TextRequest": COMPLETIONS}
_OF_PATHS: dict[str, Mapping[str, Field]] = {
    "/v1/responses": RESPONSES,
    "/v1/responses/input_tokens": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
}


def describe(app: FastAPI, bodies: Bodies) -> None:
    """Has `app` describe itself, with the requests that it takes."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app, bodies)
        return app.openapi_schema

    app.openapi = openapi


def _described(app: FastAPI, bodies: Bodies) -> dict[str, Any]:
    page = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = {model for kinds in bodies.values() if not isinstance(kinds, dict) for model in kinds}
    refs, shared = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template=_REF,
    )
    schemas = page.setdefault("components", {}).setdefault("schemas", {})
    schemas |= {**shared.get("$defs", {}), "Error": _ERROR}
    for name, table in _OF_MODELS.items():
        if name in schemas:
            schemas[name] = _explained(schemas[name], table)
    for path, kinds in bodies.items():
        if isinstance(kinds, dict):
            schema = _explained(kinds, _OF_PATHS[path])
        else:
            choices = [refs[model, "validation"] for model in kinds]
            schema = choices[0] if len(choices) == 1 else {"anyOf": choices}
        operation = page["paths"].setdefault(path, {}).setdefault("post", {})
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
        operation.setdefault("responses", {"200": {"description": "the answer"}})
    for operation in (one for methods in page["paths"].values() for one in methods.values()):
        operation["responses"] |= {"4XX": _FAILED, "5XX": _FAILED}
    return page


def _explained(schema: dict[str, Any], table: Mapping[str, Field]) -> dict[str, Any]:
    """The schema, with what becomes of each field, also of those whose values are nobody's."""
    properties = schema.get("properties", {})
    told = {
        name: {**properties.get(name, {}), "description": field.sidecar}
        for name, field in table.items()
    }
    return {**schema, "properties": {**properties, **told}}
