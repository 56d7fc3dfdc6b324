"""A browser for the tests of each file, and for each test a page of its own on a server of its own."""

from collections.abc import Iterator

import pytest
from chat_page import Chat, launch
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright
from scripted_api import ScriptedApi, serving

from hymba.serving.page import router

expect.set_options(timeout=20_000)  # of a busy machine; a test that passes does not wait


@pytest.fixture(scope="module")  # while it lives, playwright's event loop counts as running: asyncio.run() is refused
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(color_scheme="light", reduced_motion="reduce")
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def chat(context: BrowserContext) -> Iterator[Chat]:
    """An opened page; whatever a test does, the console stays silent and nothing leaves the origin."""
    api = ScriptedApi()
    app = api.build()
    app.include_router(router)
    with serving(app) as address:
        chat = Chat(context.new_page(), api, address)
        chat.watch()
        chat.open()
        yield chat
        chat.check()
