"""Talking through the chat page: answers, stopping, errors, and what is kept."""

import re

import pytest
from chat_page import Chat
from playwright.sync_api import BrowserContext, expect
from scripted_api import Answer, Gate

FIGURES = re.compile(r"^[\d.,]+\stokens/s · 20\stokens · first\safter\s[\d.]+\ss · 32\sof\s40\sprompt")

# Answers


def test_an_answer_streams_and_says_how_fast(chat: Chat) -> None:
    gate = Gate()
    chat.ask("Who are you?", Answer(["I am", " **Hymba**", "."], gate=gate))
    expect(chat.page.locator(".bubble")).to_have_text("Who are you?")
    expect(chat.page.locator(".waiting")).to_be_visible()
    gate.let_through(1)
    expect(chat.prose).to_have_text("I am")
    expect(chat.page.locator("#stop")).to_be_visible()
    gate.let_through(2)
    expect(chat.prose).to_have_text("I am Hymba.")
    expect(chat.prose.locator("strong")).to_have_text("Hymba")
    chat.finish()
    figures = chat.page.locator(".figures")
    expect(figures).to_have_text(FIGURES)
    request = chat.api.requests[0]
    assert request["messages"] == [{"role": "user", "content": "Who are you?"}]
    assert (request["model"], request["stream"], request["stream_options"]) == (
        "hymba-test",
        True,
        {"include_usage": True},
    )


def test_the_conversation_is_sent_whole_and_its_memory_shown(chat: Chat) -> None:
    chat.ask("One?", Answer(["Two."]))
    chat.finish()
    chat.ask("Three?", Answer(["Four."], usage=(900, 100, 60)))
    chat.finish()
    said = [(message["role"], message["content"]) for message in chat.api.requests[1]["messages"]]
    assert said == [("user", "One?"), ("assistant", "Two."), ("user", "Three?")]
    expect(chat.page.locator("#count")).to_have_text("1,000 of 8,192 tokens")
    expect(chat.page.locator("#hymba-bytes")).to_have_text("30 MB")
    expect(chat.page.locator("#llama-bytes")).to_have_text("110 MB")
    expect(chat.page.locator("#memory-note")).to_have_text("At 8,192 tokens: 102 MB against 901 MB.")
    bars = [chat.page.locator(f"#{name}-bar").bounding_box() for name in ("hymba", "llama")]
    assert bars[0] is not None
    assert bars[1] is not None
    assert bars[0]["width"] / bars[1]["width"] == pytest.approx(30 / 110, rel=0.02)


def test_a_short_conversation_is_not_made_to_look_small(chat: Chat) -> None:
    chat.ask("One?", Answer(["Two."]))
    chat.finish()
    expect(chat.page.locator("#hymba-bytes")).to_have_text("20.6 MB")
    expect(chat.page.locator("#llama-bytes")).to_have_text("6.6 MB")
    expect(chat.page.locator("#memory-note")).to_contain_text("the smaller from 200 tokens on")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_an_answer_can_be_stopped(chat: Chat, how: str) -> None:
    gate = Gate()
    chat.ask("Count to a thousand.", Answer(["One, "] * 1000, gate=gate))
    gate.let_through(2)
    expect(chat.prose).to_have_text("One, One,")
    if how == "button":
        chat.page.get_by_role("button", name="Stop").click()
    else:
        chat.page.keyboard.press("Escape")
    chat.finish()
    expect(chat.page.locator(".answer > .note")).to_have_text("Stopped.")
    assert chat.api.left.wait(5)
    chat.ask("Go on.", Answer(["Three."]))
    expect(chat.prose).to_have_text("Three.")


def test_an_answer_cut_at_its_limit_says_so(chat: Chat) -> None:
    chat.ask("Tell me all.", Answer(["It began"], finish="length"))
    expect(chat.page.locator(".answer > .note")).to_contain_text("Cut off")


def test_the_last_answer_can_be_asked_for_again(chat: Chat) -> None:
    chat.ask("A number?", Answer(["Seven."]), Answer(["Eight."]))
    chat.finish()
    chat.page.get_by_role("button", name="Answer again").click()
    expect(chat.prose).to_have_text("Eight.")
    expect(chat.page.locator(".turn")).to_have_count(2)
    assert chat.api.requests[0]["messages"] == chat.api.requests[1]["messages"]


def test_the_last_message_can_be_edited_and_sent_again(chat: Chat) -> None:
    chat.ask("A numbr?", Answer(["What?"]))
    chat.finish()
    chat.ask("A colr?", Answer(["What?"]))
    chat.finish()
    chat.page.get_by_role("button", name="Edit and send again").click()
    box = chat.page.get_by_label("Edit your message")
    box.press("Escape")
    expect(chat.page.locator(".bubble").last).to_have_text("A colr?")
    chat.page.get_by_role("button", name="Edit and send again").press("Enter")
    box.fill("A colour?")
    chat.api.script.append(Answer(["Blue."]))
    box.press("Enter")
    expect(chat.prose).to_have_text("Blue.")
    assert [message["content"] for message in chat.api.requests[-1]["messages"]] == ["A numbr?", "What?", "A colour?"]


def test_an_answer_is_copied_as_the_model_wrote_it(chat: Chat, context: BrowserContext) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.ask("Bold?", Answer(["**Yes**\n\n```py\nx = 1\n```"]))
    chat.finish()
    chat.page.get_by_role("button", name="Copy the answer").click()
    expect(chat.page.locator("#announcer")).to_have_text("Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "**Yes**\n\n```py\nx = 1\n```"
    chat.page.get_by_role("button", name="Copy the code").click()
    chat.page.wait_for_function("navigator.clipboard.readText().then((text) => text === 'x = 1')")


# Errors


@pytest.mark.parametrize(
    ("answer", "text", "message"),
    [
        (Answer(status=400, error="the prompt has 9000 tokens: 8192 fit"), "", "the prompt has 9000 tokens: 8192 fit"),
        (Answer(["Half an"], error="the engine died"), "Half an", "the engine died"),
        (Answer(["Half an"], breaks_off=True), "Half an", "broke off"),
    ],
)
def test_an_error_is_shown_and_can_be_tried_again(chat: Chat, answer: Answer, text: str, message: str) -> None:
    chat.ask("Hello?", answer, Answer(["Here I am."]))
    expect(chat.page.locator(".problem")).to_contain_text(message)
    expect(chat.prose).to_have_text(text)
    expect(chat.page.locator("#announcer")).to_contain_text(message)
    chat.page.get_by_role("button", name="Answer again").click()
    expect(chat.prose).to_have_text("Here I am.")
    expect(chat.page.locator(".problem")).to_be_hidden()


def test_a_server_that_is_gone_is_told_of(chat: Chat) -> None:
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.ask("Hello?")
    expect(chat.page.locator(".problem")).to_contain_text("is the server running?")


def test_a_key_is_asked_for_and_kept_in_the_tab(chat: Chat) -> None:
    chat.api.key = "open sesame"
    chat.ask("Hello?", Answer(["Come in."]))
    key = chat.page.get_by_label("This server asks for an API key")
    key.fill("open barley")
    key.press("Enter")
    expect(chat.page.locator(".problem")).to_be_visible()
    key.fill("open sesame")
    key.press("Enter")
    expect(chat.prose).to_have_text("Come in.")
    expect(key).to_be_hidden()
    assert "sesame" not in chat.page.evaluate("JSON.stringify(localStorage)")
    chat.open()
    expect(key).to_be_hidden()


# What is kept


def test_the_conversation_outlives_a_reload(chat: Chat) -> None:
    chat.ask("One?", Answer(["Two."]))
    chat.finish()
    chat.ask("More?", Answer(["On and", " on"], gate=(gate := Gate())))
    gate.let_through(1)
    expect(chat.prose).to_have_text("On and")
    chat.open()
    expect(chat.page.locator(".bubble")).to_have_text(["One?", "More?"])
    expect(chat.page.locator(".answer .prose")).to_have_text(["Two.", "On and"])
    expect(chat.page.locator(".answer > .note").last).to_have_text("Stopped.")


def test_a_new_conversation_and_the_last_one_back(chat: Chat) -> None:
    chat.ask("One?", Answer(["Two."]))
    chat.finish()
    chat.page.get_by_role("button", name="New conversation").click()
    expect(chat.page.locator("#empty")).to_be_visible()
    chat.page.get_by_role("button", name="Bring back").click()
    expect(chat.prose).to_have_text("Two.")


@pytest.mark.parametrize(
    "storage",
    [
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }",
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })",
        "localStorage.setItem('hymba.turns', '[{\"role\": 7}]'); localStorage.setItem('hymba.settings', 'null')",
        'localStorage.setItem(\'hymba.turns\', \'[{"role": "assistant", "content": "", "stats": null}]\')',
        "localStorage.setItem('hymba.turns', '{broken'); localStorage.setItem('hymba.theme', '{broken')",
    ],
)
def test_storage_that_fails_does_no_harm(chat: Chat, storage: str) -> None:
    chat.page.add_init_script(f"try {{ {storage} }} catch {{}}")
    chat.open()
    chat.ask("One?", Answer(["Two."]))
    expect(chat.prose).to_have_text("Two.")
    chat.finish()


def test_settings_are_sent_kept_and_reset(chat: Chat) -> None:
    page = chat.page
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.2")
    page.get_by_label("Top-k").fill("40")
    page.get_by_label("Seed").fill("7")
    chat.open()
    chat.ask("One?")
    chat.finish()
    asked = chat.api.requests[0]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["temperature"], asked["top_k"], asked["seed"]) == (0.2, 40, 7)
    page.get_by_role("button", name="Back to the defaults").click()
    chat.ask("Two?")
    chat.finish()
    asked = chat.api.requests[1]
    assert {name: value for name, value in asked.items() if name not in ("messages", "model", "stream")} == {
        "temperature": 0.8,
        "top_p": 0.95,
        "min_p": 0,
        "repetition_penalty": 1,
        "max_tokens": 512,
        "stream_options": {"include_usage": True},
    }
    assert asked["messages"][0]["content"] == "Be brief."


def test_a_setting_out_of_range_is_pointed_out(chat: Chat) -> None:
    chat.page.get_by_label("Longest answer").fill("0")
    chat.ask("One?")
    expect(chat.page.get_by_label("Longest answer")).to_be_focused()
    expect(chat.page.locator("#box")).to_have_value("One?")
    assert chat.api.requests == []
