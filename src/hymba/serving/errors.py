"""Everything that goes wrong leaves in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from hymba.errors import HymbaError
from hymba.inference import EngineDeadError, PromptTooLongError, QueueFullError

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# pydantic's kinds of mistake, and OpenAI's codes for them.
CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}


class ApiError(HTTPException):
    """A refusal or a failure, as the client is to read it.

    Args:
        status: of HTTP; it decides the error's type.
        param: the field that is at fault. code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON object that tells it."""
        kind = TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the response that tells it. ASCII, so that no text in a message can fail to be written."""
        return Response(json.dumps(self.body()), self.status_code, self.headers, "application/json")


def as_api_error(error: HymbaError) -> ApiError:
    """Return what an error of the engine or of a request's numbers is to a client."""
    if isinstance(error, QueueFullError):
        return ApiError(429, f"{error}", code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, EngineDeadError):
        return ApiError(503, f"{error}", code="engine_dead")
    if isinstance(error, PromptTooLongError):
        return ApiError(400, f"{error}", code="context_length_exceeded")
    return ApiError(400, f"{error}", code="invalid_value")


def client_gone() -> ApiError:
    """Return what nobody reads, but metrics count: nginx's 499, the client did not wait."""
    return ApiError(499, "the client closed the connection")


def install(app: FastAPI) -> None:
    """Let `app` answer every error in this shape, its own 404 and 405 too; what nobody foresaw is the gate's."""
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(HymbaError, _tell_hymba)


async def _tell_http(request: Request, error: Any) -> Response:
    if isinstance(error, ApiError):
        return error.response()
    message = {
        400: "the body is not JSON in UTF-8",
        404: f"there is nothing at {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _tell_invalid(request: Request, error: Any) -> Response:
    """Tell the mistake that lies deepest: of the alternatives that were tried, it is in the one that was meant."""
    found = [(field_path(each["loc"][1:], each["type"], error.body), each) for each in error.errors()]
    param, first = max(found, key=lambda pair: _depth(pair[0]))
    kind = first["type"]
    if kind == "json_invalid":
        param, message = None, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    elif kind == "extra_forbidden":
        message = f"unknown or unsupported field: {param}"
    else:
        told = dict.fromkeys(each["msg"].removeprefix("Value error, ") for path, each in found if path == param)
        message = f"{param or 'the body'}: {' or '.join(told)}"
    return ApiError(400, message, param, CODES.get(kind, "invalid_value")).response()


def _depth(path: str | None) -> list[int]:
    """Return what orders paths by depth, then by how far into a list they lead."""
    parts = path.split(".") if path else []
    return [len(parts), *(int(part) if part.isdecimal() else -1 for part in parts)]


async def _tell_hymba(request: Request, error: Any) -> Response:
    return as_api_error(error).response()


def field_path(location: tuple[str | int, ...], kind: str, body: Any) -> str | None:
    """Return where in `body` a mistake is, like "messages.0.content", without pydantic's names for alternatives."""
    path: list[str] = []
    for place, part in enumerate(location, start=1):
        inside: Any = body if isinstance(body, dict) else dict(enumerate(body)) if isinstance(body, list) else {}
        if part in inside:
            path.append(str(part))
            body = inside[part]
        elif place == len(location) and kind == "missing" and isinstance(body, dict):
            path.append(str(part))
    return ".".join(path) or None
