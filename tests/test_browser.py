"""That the tests of pages would notice: errors, requests, pages that are too wide, and machines without a browser."""

import pathlib
from typing import Any

import browser
import pytest

PAGE = """<!doctype html><meta name="viewport" content="width=device-width"><title>Page</title>
<div style="width: 500px">wide</div>"""


@pytest.mark.slow
@pytest.mark.browser
def test_what_a_visit_notices(chromium: Any, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGE)
    with browser.visit(chromium, page.as_uri()) as seen:
        assert (seen.errors, seen.requests, seen.overflow()) == ([], [page.as_uri()], 0)
    with browser.visit(chromium, page.as_uri(), browser.PHONE) as seen:
        assert seen.overflow() > 100
    page.write_text(PAGE + '<img src="none.png"><script>console.error("bad"); undefined.field</script>')
    with browser.visit(chromium, page.as_uri()) as seen:
        assert seen.requests == [page.as_uri(), (tmp_path / "none.png").as_uri()]
        text = "\n".join(seen.errors)
        assert all(word in text for word in ("none.png", "bad", "Cannot read properties of undefined"))
