"""The files of the chat page, as they are served."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from scripted_api import ScriptedApi

from hymba.serving.page import KINDS, router

STATIC = Path(__file__).parents[3] / "src/hymba/serving/static"


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = ScriptedApi().build()
    app.include_router(router)
    return TestClient(app)


def test_every_file_is_served_as_what_it_is(client: TestClient) -> None:
    names = sorted(file.name for file in STATIC.iterdir())
    assert {"index.html", "chat.css", "chat.js", "icon.svg"} <= set(names)
    for name in names:
        response = client.get(f"/static/{name}")
        assert response.content == (STATIC / name).read_bytes()
        assert response.headers["content-type"] == KINDS[Path(name).suffix]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert len(response.text.splitlines()) <= 400
    assert client.get("/").content == (STATIC / "index.html").read_bytes()
    assert client.head("/").headers["content-type"] == KINDS[".html"]


def test_the_policy_allows_nothing_inline_and_nobody_else(client: TestClient) -> None:
    policy = dict(part.split(" ", 1) for part in client.get("/").headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"


def test_a_file_that_did_not_change_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/static/chat.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/static/chat.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/static/chat.css", headers={"If-None-Match": first.headers["etag"]}).status_code == 200


@pytest.mark.parametrize("name", ["none.js", "%2e%2e", "%2e%2e%2fpage.py", "page.py"])
def test_other_names_are_not_found(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404
