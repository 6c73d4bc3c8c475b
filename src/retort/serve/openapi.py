"""The OpenAPI document, made from the schemas that requests are checked against."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

import retort
from retort.serve.protocol import ChatRequest, CompletionRequest, LoadRequest, TokenizeRequest

_POSTS: dict[str, tuple[str, type]] = {
    "/v1/completions": ("Complete prompts", CompletionRequest),
    "/v1/chat/completions": ("Answer a conversation", ChatRequest),
    "/tokenize": ("Token ids of a text or a conversation", TokenizeRequest),
    "/load_model": ("Whether a model is served", LoadRequest),
}
_GETS = {
    "/v1/models": "Served models",
    "/health": "Whether requests are answered",
    "/version": "Version",
    "/metrics": "Prometheus metrics",
}
_ERRORS = (400, 401, 404, 408, 413, 429, 431, 500, 503)
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@cache
def document() -> dict[str, Any]:
    """The whole document."""
    kinds = [kind for _, kind in _POSTS.values()]
    bodies, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {path: {"get": _operation(text)} for path, text in _GETS.items()}
    for (path, (text, _)), body in zip(_POSTS.items(), bodies, strict=True):
        content = {"application/json": {"schema": body}}
        operation = _operation(text) | {"requestBody": {"required": True, "content": content}}
        paths[path] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Retort", "version": retort.__version__},
        "paths": paths,
        "components": {"schemas": {**components, "Error": _ERROR_SCHEMA}},
    }


def _operation(summary: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers: dict[str, Any] = {
        str(status): {"description": "Error", "content": error} for status in _ERRORS
    }
    return {"summary": summary, "responses": {"200": {"description": "Answer"}, **answers}}
