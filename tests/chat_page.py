"""The chat page in a browser, for its tests: starting Chromium, and what must never happen there."""

import shutil
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Error, Locator, Page, Playwright, expect
from scripted_api import Answer, ScriptedApi

MISSING = (
    "the chat page is tested in a browser: run `.venv/bin/playwright install --with-deps chromium`, "
    "or install the chromium of your system"
)


def launch(playwright: Playwright) -> Browser:
    """Start playwright's Chromium, or the system's where playwright has none."""
    try:
        return playwright.chromium.launch()
    except Error as error:
        problem = error.message.splitlines()[0]
    system = shutil.which("chromium") or shutil.which("google-chrome")
    if system is None:
        pytest.fail(f"{MISSING}\n{problem}", pytrace=False)
    return playwright.chromium.launch(executable_path=system)


@dataclass
class Chat:
    """The page in a browser and the API behind it."""

    page: Page
    api: ScriptedApi
    address: str
    complaints: list[str] = field(default_factory=list)  # of the console and of scripts
    requested: list[str] = field(default_factory=list)  # every address that the page asked for

    def watch(self) -> None:
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self._note("error", str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))

    def _note(self, kind: str, text: str) -> None:
        # The browser itself reports every refused request, and tests ask for some.
        if kind in ("error", "warning") and "Failed to load resource" not in text:
            self.complaints.append(text)

    def open(self) -> None:
        self.page.goto(self.address)
        expect(self.page.locator("#model-line")).to_contain_text("hymba-test")

    def ask(self, text: str, *answers: Answer) -> None:
        self.api.script.extend(answers)
        self.page.locator("#box").fill(text)
        self.page.locator("#box").press("Enter")

    def finish(self) -> None:
        """Wait until nothing is being answered."""
        expect(self.page.locator("#stop")).to_be_hidden()

    def read(self, text: str) -> None:
        """Have the model say `text`, all of it."""
        self.ask("Go on.", Answer([text]))
        self.finish()

    @property
    def prose(self) -> Locator:
        """The text of the last answer."""
        return self.page.locator(".answer .prose").last

    def check(self) -> None:
        """Refuse complaints, and requests that left the origin."""
        assert [url for url in self.requested if not url.startswith(self.address)] == []
        assert self.complaints == []
