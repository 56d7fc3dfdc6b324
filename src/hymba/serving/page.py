"""The chat page at `/`: files out of the package, under a policy that lets nothing in from elsewhere."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, HTTPException, Request, Response

# Not left to `mimetypes`, which asks the operating system and now and then calls a script plain text.
KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Scripts, styles and requests from this origin alone, none of them inline; no script may write HTML text.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)

HEADERS = {
    "Cache-Control": "no-cache",  # kept by the browser, asked after by its ETag: a new version shows at once
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """Serve the chat page."""
    return _respond(request, "index.html")


@router.api_route("/static/{name}", methods=["GET", "HEAD"])
async def static(request: Request, name: str) -> Response:
    """Serve one of the files that the page is made of; 404 for any other name."""
    return _respond(request, name)


@cache
def _contents() -> dict[str, tuple[bytes, str]]:
    """Name → content and ETag of every file of the page."""
    contents = {file.name: file.read_bytes() for file in (files("hymba.serving") / "static").iterdir()}
    return {name: (content, f'"{hashlib.sha256(content).hexdigest()[:32]}"') for name, content in contents.items()}


def _respond(request: Request, name: str) -> Response:
    if name not in _contents():
        raise HTTPException(404, f"the chat page has no file {name!r}")
    content, tag = _contents()[name]
    headers = HEADERS | {"ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=KINDS[PurePath(name).suffix])
