"""Reading and handling the chat page: Markdown, keyboard, themes, phones, screen readers."""

import re
from typing import Any

import pytest
from chat_page import Chat
from playwright.sync_api import BrowserContext, expect
from scripted_api import Answer, Gate

LONG = "\n\n".join(f"Paragraph {number} of a long answer." for number in range(40))

TEXT = """# A title

Some **bold**, *italic*, ***both***, `code` and snake_case_words, 2 * 3 * 4.
A second line with [a link](https://example.org/a_(b)) and https://example.org/c.

- one
- two
  1. deep
  2. deeper
- three

3. starts at three

```python
def f(x):
    return "**x**"
```

---
The end of **it"""


# Text


def test_markdown_becomes_elements(chat: Chat) -> None:
    chat.read(TEXT)
    prose = chat.prose
    expect(prose.locator("h3")).to_have_text("A title")
    expect(prose.locator("strong")).to_have_text(["bold", "both"])
    expect(prose.locator("em")).to_have_text(["italic", "both"])
    expect(prose.locator("p > code")).to_have_text("code")
    expect(prose.locator("p").first).to_contain_text("snake_case_words, 2 * 3 * 4.")
    expect(prose.locator("> ul > li")).to_have_count(3)
    expect(prose.locator("ul ol li")).to_have_text(["deep", "deeper"])
    expect(prose.locator("> ol")).to_have_attribute("start", "3")
    expect(prose.locator("pre code")).to_have_text('def f(x):\n    return "**x**"')
    expect(prose.locator(".language")).to_have_text("python")
    expect(prose.locator("hr")).to_have_count(1)
    expect(prose.locator("p").last).to_have_text("The end of **it")
    links = prose.locator("a")
    assert links.evaluate_all("links => links.map((link) => link.getAttribute('href'))") == [
        "https://example.org/a_(b)",
        "https://example.org/c",
    ]
    assert set(links.evaluate_all("links => links.map((link) => link.rel)")) == {"noopener noreferrer"}


HOSTILE = [
    "<img src=x onerror=alert(1)><script>alert(1)</script>",
    "**<b>bold</b>** &lt;i&gt;",
    "`<style>*{display:none}</style>`",
    "```html\n<iframe src='https://example.org'></iframe>\n```",
    "[click](javascript:alert(1)) [here](data:text/html,x) [there](/v1/models)",
    '[a](https://example.org/"onclick="alert(1)) <https://example.org>',
]


def test_html_stays_text(chat: Chat) -> None:
    chat.page.on("dialog", lambda dialog: chat.complaints.append(dialog.message))
    for text in HOSTILE:
        chat.read(text)
        tags = set(chat.prose.evaluate("prose => [...prose.querySelectorAll('*')].map((node) => node.localName)"))
        assert tags <= {"p", "strong", "code", "pre", "div", "span", "button", "svg", "use", "a"}
        links = chat.prose.locator("a").evaluate_all("links => links.map((link) => link.protocol)")
        assert set(links) <= {"https:"}
        shown = chat.prose.evaluate("prose => prose.textContent")
        assert [word for word in re.findall(r"<[a-z]+[ >]|javascript|data:", text) if word not in shown] == []


def test_what_one_types_stays_text_too(chat: Chat) -> None:
    chat.ask("<b>bold</b> **bold**")
    expect(chat.page.locator(".bubble")).to_have_text("<b>bold</b> **bold**")


GROWN = """async (text) => {
  const { MarkdownView } = await import("/static/markdown.js");
  const view = (steps) => {
    const root = document.createElement("div");
    const markdown = new MarkdownView(root);
    for (const step of steps) markdown.update(text.slice(0, step), step < text.length);
    return root.innerHTML;
  };
  const lengths = [...text].map((_, index) => index + 1);
  return [view(lengths), view([text.length])];
}"""


def test_a_text_that_grew_letter_by_letter_is_drawn_as_if_it_came_at_once(chat: Chat) -> None:
    grown, at_once = chat.page.evaluate(GROWN, TEXT)
    assert grown == at_once


def test_marks_that_are_still_open_do_not_flicker(chat: Chat) -> None:
    seen = chat.page.evaluate(
        """async (text) => {
          const { MarkdownView } = await import("/static/markdown.js");
          const root = document.createElement("div");
          const markdown = new MarkdownView(root);
          return [...text].map((_, index) => {
            markdown.update(text.slice(0, index + 1), true);
            return root.textContent;
          });
        }""",
        "Is **bold** and `code` here:\n- [x](https://example.org) _soft_ words",
    )
    assert [text for text in seen if re.search(r"[*`_(]|- ", text)] == []


def test_blocks_that_did_not_change_keep_their_elements(chat: Chat) -> None:
    gate = Gate()
    chat.ask("Code?", Answer(["```py\nx = 1\n```\n\nIt", " says"], gate=gate))
    gate.let_through(1)
    button = chat.page.get_by_role("button", name="Copy the code")
    button.focus()
    gate.let_through(1)
    expect(chat.prose).to_contain_text("It says")
    expect(button).to_be_focused()


MARKS = ["*a ", "**a", "[a](", "`a``", "_a *b ", "[", "# " + " " * 50, "- x\n  ", "- x\n\n", "https://a"]


def test_reading_takes_time_in_proportion_to_the_text(chat: Chat) -> None:
    milliseconds = chat.page.evaluate(
        """async (marks) => {
          const { MarkdownView } = await import("/static/markdown.js");
          return marks.map((mark) => {
            const started = performance.now();
            new MarkdownView(document.createElement("div")).update(mark.repeat(10000), true);
            return [mark, performance.now() - started];
          });
        }""",
        MARKS,
    )
    assert [each for each in milliseconds if each[1] > 2000] == []


# Keyboard, screen readers


def test_everything_by_keyboard(chat: Chat) -> None:
    page, keys = chat.page, chat.page.keyboard
    expect(page.locator("#box")).to_be_focused()
    chat.api.script.append(Answer(["First."]))
    keys.type("One line")
    keys.press("Shift+Enter")
    keys.type("and another")
    keys.press("Enter")
    expect(chat.prose).to_have_text("First.")
    assert chat.api.requests[0]["messages"][0]["content"] == "One line\nand another"
    expect(page.locator("#box")).to_be_focused()
    reached = []
    for _ in range(60):
        keys.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.title"))
        if page.evaluate("document.activeElement.className") == "skip":
            expect(page.get_by_role("link", name="Skip to the message box")).to_be_in_viewport()
            reached.append("skip")
    for name in ("new-conversation", "theme", "panel-toggle", "box", "send", "temperature", "seed", "defaults"):
        assert name in reached
    for title in ("skip", "Edit and send again", "Copy the answer", "Answer again"):
        assert title in reached


def test_a_focused_control_is_visibly_so(chat: Chat) -> None:
    chat.page.keyboard.press("Tab")
    outline = chat.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_a_finished_answer_is_announced_once_and_whole(chat: Chat) -> None:
    chat.page.evaluate(
        """window.heard = [];
        new MutationObserver(() => {
          const text = document.getElementById("announcer").textContent;
          if (text) window.heard.push(text);
        }).observe(document.getElementById("announcer"), { childList: true, characterData: true, subtree: true })"""
    )
    chat.ask("Speak.", Answer(["One, ", "**two**", ", three."]))
    expect(chat.page.locator("#announcer")).to_have_text("One, two, three.")
    assert chat.page.evaluate("window.heard") == ["One, two, three."]


UNNAMED = """() => [...document.querySelectorAll("button, input, textarea, select, a, dialog, [role=region]")]
  .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length))
  .map((node) => node.outerHTML)"""


def test_every_control_has_a_name(chat: Chat) -> None:
    chat.read(TEXT)
    assert chat.page.evaluate(UNNAMED) == []


# Scrolling


def test_the_end_stays_in_sight_only_for_a_reader_who_is_there(chat: Chat) -> None:
    gate, page = Gate(), chat.page
    chat.ask("Go on.", Answer([LONG, "\n\nMore.", "\n\nAnd more.", "\n\nThe end."], gate=gate))
    from_end = "node => node.scrollHeight - node.scrollTop - node.clientHeight"
    gate.let_through(2)
    expect(chat.prose.locator("p").last).to_have_text("More.")
    assert page.locator("#scroller").evaluate(from_end) < 2
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -600)
    expect(page.locator("#to-end")).to_be_visible()
    top = page.locator("#scroller").evaluate("node => node.scrollTop")
    gate.let_through(1)
    expect(chat.prose.locator("p").last).to_have_text("And more.")
    assert page.locator("#scroller").evaluate("node => node.scrollTop") == top
    page.locator("#to-end").click()
    gate.let_through(1)
    expect(chat.prose.locator("p").last).to_be_in_viewport()
    expect(page.locator("#to-end")).to_be_hidden()


# Themes


def test_the_theme_follows_the_system_until_it_is_chosen(chat: Chat) -> None:
    page, toggle = chat.page, chat.page.get_by_role("button", name="Dark theme")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    expect(toggle).to_have_attribute("aria-pressed", "true")
    dark = page.evaluate(paper)
    assert light != dark
    toggle.click()
    assert page.evaluate(paper) == light
    chat.open()
    assert page.evaluate(paper) == light
    toggle.click()
    chat.open()
    page.emulate_media(color_scheme="light")
    assert page.evaluate(paper) == dark


# Every text's colour against what lies behind it, by WCAG's formula, where it is below 4.5 to 1.
FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [];
  let seen = 0;
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].filter((child) => child.nodeType === 3 && child.textContent.trim());
    const isBox = node.matches("textarea, input");
    if (!(text.length || isBox) || !node.checkVisibility()) continue;
    seen += 1;
    const [one, two] = [light(rgba(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
    if ((one + 0.05) / (two + 0.05) < 4.5) faint.push([node.className || node.id, (one + 0.05) / (two + 0.05)]);
  }
  return { faint, seen };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(chat: Chat, scheme: Any) -> None:
    chat.page.emulate_media(color_scheme=scheme)
    empty = chat.page.evaluate(FAINT)
    chat.read(TEXT)
    chat.ask("And?", Answer(["Half"], error="the engine died"))
    chat.finish()
    full = chat.page.evaluate(FAINT)
    assert (empty["faint"], full["faint"]) == ([], [])
    assert full["seen"] > empty["seen"] > 20


# Phones


def test_nothing_is_wider_than_a_small_phone(chat: Chat) -> None:
    page = chat.page
    page.set_viewport_size({"width": 360, "height": 640})
    wide = "document.documentElement.scrollWidth, document.getElementById('scroller').scrollWidth"
    assert page.evaluate(f"Math.max({wide})") <= 360
    chat.ask("W" * 300, Answer([f"{'w' * 300} `{'x' * 300}`\n\n```\n{'y' * 300}\n```\n\n- {'z' * 300}\n\n{TEXT}"]))
    chat.finish()
    assert page.evaluate(f"Math.max({wide})") <= 360
    page.get_by_role("button", name="Settings").click()
    assert page.locator("#sheet").evaluate("sheet => sheet.scrollWidth") <= 360


def test_settings_are_a_sheet_on_a_phone(chat: Chat) -> None:
    page = chat.page
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator("#temperature")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#temperature")).to_be_hidden()
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_the_box_stays_above_the_keyboard_of_a_phone(chat: Chat) -> None:
    chat.read(LONG)
    chat.page.set_viewport_size({"width": 390, "height": 844})
    chat.page.set_viewport_size({"width": 390, "height": 420})  # what a keyboard leaves
    expect(chat.page.locator("#box")).to_be_in_viewport(ratio=1)
    expect(chat.prose.locator("p").last).to_be_in_viewport()


def test_on_a_touch_screen_enter_begins_a_line(chat: Chat, context: BrowserContext) -> None:
    phone = context.browser.new_context(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844})
    page = phone.new_page()
    page.goto(chat.address)
    page.locator("#box").fill("One")
    page.locator("#box").press("Enter")
    expect(page.locator("#box")).to_have_value("One\n")
    page.get_by_role("button", name="Send").tap()
    expect(page.locator(".answer .prose")).to_have_text("Hello there.")
    phone.close()
