"""The chat page before the real server, its engine and the bundled model."""

import json
from collections.abc import Iterator

import pytest
from live import LiveServer, serving, wait_until
from playwright.sync_api import BrowserContext, Page, expect

from hymba.inference import Engine
from hymba.serving import Settings


@pytest.fixture
def page(context: BrowserContext, live: LiveServer) -> Iterator[Page]:
    """The page as the server shows it, asking for short answers that can be repeated."""
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(live.url)
    expect(page.locator("#model-line")).to_contain_text("tiny on this server. It only continues prose")
    page.get_by_label("Longest answer").fill("24")
    page.get_by_label("Seed").fill("7")
    yield page
    assert complaints == []


def ask(page: Page, text: str) -> str:
    """Ask, wait for the end, and return the answer as it was written."""
    page.locator("#box").fill(text)
    page.locator("#box").press("Enter")
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    return last_answer(page)


def last_answer(page: Page) -> str:
    return str(json.loads(page.evaluate("localStorage.getItem('hymba.turns')"))[-1]["content"])


def test_an_answer_is_the_one_that_the_api_gives(page: Page, live: LiveServer) -> None:
    answer = ask(page, "The sea was calm, and")
    sampling = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 24, "seed": 7}
    told = live.chat("The sea was calm, and", **sampling).json()
    assert answer == told["choices"][0]["message"]["content"] != ""
    figures = page.locator(".figures").last
    expect(figures).to_contain_text(f"{told['usage']['completion_tokens']}\u00a0tokens")
    expect(page.locator("#count")).to_have_text(f"{told['usage']['total_tokens']} of 600 tokens")


def test_the_same_question_again_is_read_from_the_cache(page: Page) -> None:
    first = ask(page, "She opened the letter, and")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    assert last_answer(page) == first
    cached, _, prompt, *_ = page.locator(".figures").last.inner_text().split("·")[-1].split()
    assert int(cached) > int(prompt) // 2


def test_an_example_begins_a_conversation(page: Page) -> None:
    page.get_by_role("button", name="It was a cold morning").click()
    expect(page.locator(".bubble")).to_contain_text("It was a cold morning")
    expect(page.locator("#stop")).to_be_hidden(timeout=60_000)
    expect(page.locator(".problem")).to_be_hidden()


def test_stopping_frees_the_row(page: Page, engine: Engine) -> None:
    before = engine.stats().finished.get("cancelled", 0)
    page.get_by_label("Longest answer").fill("550")
    page.locator("#box").fill("Once upon a time")
    page.locator("#box").press("Enter")
    expect(page.locator(".answer .prose")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator(".answer > .note")).to_have_text("Stopped.")
    wait_until(lambda: engine.stats().finished.get("cancelled", 0) == before + 1)


def test_a_refusal_is_shown_as_the_server_words_it(page: Page) -> None:
    ask(page, "word " * 800)
    expect(page.locator(".problem")).to_contain_text("600")


def test_the_page_needs_no_key_and_the_api_does(context: BrowserContext, engine: Engine) -> None:
    with serving(engine, Settings(model_name="tiny", api_key="open sesame")) as guarded:
        page = context.new_page()
        page.goto(guarded.url)
        key = page.get_by_label("This server asks for an API key")
        key.fill("open sesame")
        key.press("Enter")
        expect(page.locator("#model-line")).to_contain_text("tiny")
        expect(key).to_be_hidden()
