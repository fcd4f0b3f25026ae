"""The page of `sit report` in a real browser: it draws, it obeys the keyboard, it fits, it keeps to itself."""

import datetime
import itertools
import pathlib
import shutil
from typing import Any

import browser
import pytest
import reports

from sit_jax.analysis.summary import summarize
from sit_jax.report.evaluation import evaluate
from sit_jax.report.load_run import read_run
from sit_jax.report.page import RunView, render

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def page(digits_run: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A page about two runs that are the same, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a report") / "digits"
    shutil.copytree(digits_run, folder)
    summarize(folder)
    run = read_run(folder)
    evaluation = evaluate(run, examples=2)
    views = [RunView("run-1", run, evaluation), RunView("run-2", read_run(folder, "again"), evaluation)]
    path = folder / "report.html"
    path.write_text(render(views, datetime.datetime.now(datetime.UTC)))
    return path


def shown(seen: browser.Visit) -> list[str]:
    """The images of regions that are visible in the first run, by their alternative text."""
    script = """[...document.querySelectorAll('#run-1-maps img.regions')]
        .filter((image) => image.offsetParent !== null && image.naturalWidth > 0).map((image) => image.alt)"""
    return list(seen.evaluate(script))


def test_page_at_a_desk(chromium: Any, page: pathlib.Path) -> None:
    with browser.visit(chromium, page.as_uri()) as seen:
        for landmark in ("header", "nav[aria-label]", "main", "footer", "h1"):
            assert seen.page.locator(landmark).count() == 1, landmark
        for heading in ("Comparison", "digits", "again", "Result", "Where the tokens look", "Configuration"):
            assert seen.page.get_by_role("heading", name=heading, exact=True).first.is_visible()
        drawn = """[...document.querySelectorAll('#comparison .plot')]
            .map((plot) => plot.querySelectorAll('.scatterlayer .js-line').length)"""
        lines = seen.evaluate(drawn)
        assert len(lines) >= 9
        assert set(lines) == {2}  # Both runs in every chart.
        levels = seen.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5')].map((x) => Number(x.tagName[1]))")
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        seen.page.get_by_text("Curves of the teacher's training").first.click()
        seen.page.wait_for_selector("#run-1-teacher-loss .scatterlayer .js-line")
        assert seen.overflow() == 0
        assert seen.requests == [page.as_uri()]
        assert seen.errors == []


def test_slider_by_keyboard(chromium: Any, page: pathlib.Path) -> None:
    with browser.visit(chromium, page.as_uri()) as seen:
        slider = seen.page.get_by_role("slider", name="Stage of the model").first
        assert slider.get_attribute("aria-valuetext") == "Stage 2 of 2: 2 tokens after block 1"
        assert [text.partition(" as ")[2] for text in shown(seen)] == ["2 regions, one for each token"] * 2
        slider.focus()
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        seen.page.keyboard.press("ArrowLeft")
        assert slider.get_attribute("aria-valuetext") == "Stage 1 of 2: 4 tokens, one per patch"
        assert [text.partition(" as ")[2] for text in shown(seen)] == ["4 patches"] * 2
        assert seen.evaluate(outline) == "solid"
        seen.page.keyboard.press("End")
        assert slider.get_attribute("aria-valuetext") == "Stage 2 of 2: 2 tokens after block 1"
        # The other run's slider is its own.
        assert seen.page.get_by_role("slider").nth(1).get_attribute("value") == "1"
        assert seen.errors == []


def test_charts_by_keyboard(chromium: Any, page: pathlib.Path) -> None:
    span = "(() => { const [a, b] = document.getElementById('compared-loss').layout.xaxis.range; return b - a; })()"
    with browser.visit(chromium, page.as_uri()) as seen:
        whole = seen.evaluate(span)
        for name, factor in (("Zoom in", 0.5), ("Later", 0.5), ("Whole", 1.0)):
            seen.page.get_by_role("button", name=f"{name}: Training: loss", exact=True).press("Enter")
            assert seen.evaluate(span) == pytest.approx(factor * whole, rel=0.01), name
        seen.page.keyboard.press("Tab")
        assert seen.evaluate("document.activeElement.tagName") == "SUMMARY"
        seen.page.keyboard.press("Enter")
        table = seen.page.locator(".chart", has_text="Training: loss").first.get_by_role("table")
        assert table.is_visible()
        assert table.locator("tbody tr").count() == 5
        assert seen.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_on_a_phone(scheme: str, chromium: Any, page: pathlib.Path) -> None:
    with browser.visit(chromium, page.as_uri(), browser.PHONE, color_scheme=scheme, reduced_motion="reduce") as seen:
        assert seen.overflow() == 0
        assert seen.evaluate("innerWidth") == 360
        assert seen.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
        ground = seen.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
        assert lowest_contrast(seen) >= 4.5
        widths = seen.evaluate("[...document.querySelectorAll('.plot .main-svg')].map((x) => x.clientWidth)")
        assert widths
        assert max(widths) <= 360
        assert (seen.errors, seen.requests) == ([], [page.as_uri()])


def lowest_contrast(seen: browser.Visit) -> float:
    """WCAG's contrast of the worst text outside the charts, over the nearest ground that is not transparent."""
    script = """(() => {
      const light = (text) => {
        const part = text.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
          .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
        return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
      };
      const clear = (colour) => colour === "transparent" || colour.endsWith(", 0)");
      const ground = (element) => {
        for (let at = element; at; at = at.parentElement) {
          const colour = getComputedStyle(at).backgroundColor;
          if (!clear(colour)) return colour;
        }
        return "rgb(255, 255, 255)";
      };
      const texts = [...document.querySelectorAll("body *:not(script, style, noscript, .plot *)")]
        .filter((x) => [...x.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
      const ratios = texts.map((x) => {
        const [a, b] = [light(getComputedStyle(x).color), light(ground(x))].sort((p, q) => q - p);
        return (a + 0.05) / (b + 0.05);
      });
      return Math.min(...ratios);
    })()"""
    return float(seen.evaluate(script))


def test_page_on_paper(chromium: Any, page: pathlib.Path) -> None:
    with browser.visit(chromium, page.as_uri(), color_scheme="dark") as seen:
        seen.page.emulate_media(media="print")
        assert len(shown(seen)) == 4  # Every stage of both images.
        assert not seen.page.get_by_role("slider").first.is_visible()
        assert seen.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        seen.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert seen.page.locator("details.printed:not([open])").count() == 0
        assert seen.evaluate("document.querySelector('#compared-loss .main-svg').clientWidth") == 640
        seen.evaluate("dispatchEvent(new Event('afterprint'))")
        assert seen.page.locator("details.printed[open]").count() == 0
        assert seen.errors == []


def test_page_without_scripts(chromium: Any, page: pathlib.Path) -> None:
    with browser.visit(chromium, page.as_uri(), java_script_enabled=False) as seen:
        assert seen.page.locator("noscript p").is_visible()
        assert seen.page.locator("#run-1-maps .stage").nth(0).is_visible()
        assert seen.page.locator("#run-1-maps .stage").nth(1).is_visible()
        assert not seen.page.locator(".slider").first.is_visible()


def test_hostile_texts_are_shown_as_they_are(chromium: Any, page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(reports.hostile_page(page.parent))
    with browser.visit(chromium, path.as_uri()) as seen:
        seen.page.wait_for_selector("#run-1-classes .bars")
        assert seen.evaluate("window.hurt") is None
        assert seen.page.locator("h1").inner_text() == reports.HOSTILE
        assert seen.page.locator("#run-1-classes img").count() == 0
        ticks = seen.page.locator("#run-1-classes .xtick").all_text_contents()
        assert any("<script>" in text for text in ticks)
        assert (seen.errors, seen.requests) == ([], [path.as_uri()])
