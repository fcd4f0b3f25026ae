"""A real headless Chromium for the tests of pages: the machine's own, never a downloaded one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Many machines that run tests are busy with other things.
_PATIENCE_MS = 180_000
PHONE = (360, 740)
DESKTOP = (1280, 900)


def find_chromium() -> str | None:
    """The machine's Chromium or Chrome; `SIT_CHROMIUM` names one that lies elsewhere."""
    given = os.environ.get("SIT_CHROMIUM")
    return given or next((path for path in map(shutil.which, _NAMES) if path), None)


def missing(reason: str) -> None:
    """Skips a test that needs a browser, or fails where there must be one: `.ci/run` sets `SIT_BROWSER=required`."""
    if os.environ.get("SIT_BROWSER") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def start_chromium() -> Iterator[Any]:
    """A headless Chromium as Playwright's `Browser`; skips the test where there is none."""
    program = find_chromium()
    if program is None:
        missing("no Chromium on this machine: install it (Debian: apt-get install chromium), or set SIT_CHROMIUM")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright is not installed: make .venv/export")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """An open page, and what went on in it.

    Attributes:
        page: Playwright's `Page`.
        errors: What the console called an error, exceptions that nothing caught, and requests that failed.
        requests: Addresses that the page asked for, in order, its own first; without `data:` and `blob:`.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("request", lambda request: self._asked(request.url))
        page.on("requestfailed", lambda request: self._note(f"{request.url}: {request.failure}"))

    def _note(self, text: str) -> None:
        self.errors.append(text)

    def _asked(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.requests.append(url)

    def overflow(self) -> int:
        """Pixels that the page is wider than its window: above 0, it scrolls to the side."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.page.evaluate(script)


@contextlib.contextmanager
def visit(browser: Any, url: str, size: tuple[int, int] = DESKTOP, **context: Any) -> Iterator[Visit]:
    """Opens a page in a window of its own, and waits until it has loaded.

    Args:
        browser: From `start_chromium`, or the fixture `chromium`.
        url: The page; `file://` or `http://127.0.0.1`.
        size: Width and height of the window in pixels; a narrow one is a phone's, with touch.
        **context: Further options of Playwright's `new_context`, such as `color_scheme="dark"`.
    """
    phone = size[0] < 600
    options = {"viewport": {"width": size[0], "height": size[1]}, "is_mobile": phone, "has_touch": phone, **context}
    opened = browser.new_context(**options)
    opened.set_default_timeout(_PATIENCE_MS)
    try:
        seen = Visit(opened.new_page())
        seen.page.goto(url, wait_until="load")
        yield seen
    finally:
        opened.close()
