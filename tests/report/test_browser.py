"""The page in a real browser: Chromium without a window, driven by selenium. Skipped where there is none."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.board import HOSTILE, Drawn, drawn_board
from twin_bench.report.answer import answer
from twin_bench.report.page import page

WIDTHS, SCHEMES = (390, 800, 1400), ("light", "dark")
ESCAPE, RIGHT = "\ue00c", "\ue014"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return a driver of a browser that serves all tests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its driver is installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return drawn_board(tmp_path_factory.mktemp("drawn"), methods=6, tasks=6, rows=60)


@pytest.fixture(scope="module")
def written(board: Drawn, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _address(board, tmp_path_factory.mktemp("page"))


@pytest.fixture
def opened(browser: Any, written: str) -> Any:
    """Return the browser on the page as it is at first, at 1,400 pixels."""
    _show(browser, 1400, "light")
    browser.get(written)
    return browser


def _address(board: Drawn, folder: Path) -> str:
    (folder / "index.html").write_text(page(board), encoding="utf-8")
    return (folder / "index.html").as_uri()


def _show(browser: Any, width: int, scheme: str, media: str = "") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def _all(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def _one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def _rows(browser: Any) -> list[list[str]]:
    """Return the table as it is shown, row by row."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#scores tr')].filter(row => row.checkVisibility()).map(row =>"
        "[...row.cells].filter(cell => cell.checkVisibility()).map(cell => cell.textContent.trim()))"
    )


def _methods(browser: Any) -> list[str]:
    return [row[0] for row in _rows(browser)[1:]]


def _choose(browser: Any, name: str, value: str) -> None:
    option = _one(browser, f"#{name} option[value='{value}']") if not value else None
    option = option or next(one for one in _all(browser, f"#{name} option") if one.text == value)
    option.click()


def test_it_opens_without_a_request_or_an_error(browser: Any, written: str, board: Drawn) -> None:
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(written)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked == [written]
    assert browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)") == []
    assert browser.get_log("browser") == []
    assert _one(browser, ".answer").text == answer(board, "standard")[0]


def test_a_heading_sorts_both_ways_and_says_so(opened: Any, board: Drawn) -> None:
    summary, cells = (
        frame[frame["protocol"] == "standard"].set_index("method") for frame in (board.summary, board.cells)
    )
    _choose(opened, "by-task", "cola")
    for column, values in (("normalized", summary["normalized"]), ("cola", cells[cells["task"] == "cola"]["score"])):
        head = next(one for one in _all(opened, "#scores thead th") if one.text == column)
        for order in ("descending", "ascending"):
            _one(head, "button").click()
            assert head.get_attribute("aria-sort") == order
            shown = [values[method] for method in _methods(opened)]
            assert shown == sorted(shown, reverse=order == "descending")
    assert len([one for one in _all(opened, "#scores th") if one.get_attribute("aria-sort") != "none"]) == 1 + len(
        _all(opened, "#scores tbody th")
    )
    next(one for one in _all(opened, "#scores thead button") if one.text == "rank").click()
    assert _methods(opened)[0] in ("twin", "twin_last_layer", "twin_true_task")
    assert set(_methods(opened)[-3:]) == {"pretrained", "experts", "constant"}  # have no rank


def test_filters_and_columns_leave_what_was_asked_for(opened: Any, board: Drawn) -> None:
    labels = list(dict.fromkeys(board.summary["method"]))
    assert sorted(_methods(opened)) == sorted(labels)  # of the protocol that is chosen
    _choose(opened, "by-protocol", "")
    assert len(_methods(opened)) == 2 * len(labels)
    _choose(opened, "by-track", "per-input")
    assert sorted(_methods(opened)) == ["twin"] * 2 + ["twin_last_layer"] * 2
    _one(opened, "#by-method").send_keys("LAST")
    assert _methods(opened) == ["twin_last_layer"] * 2
    assert _one(opened, "#status").text == f"2 of {2 * len(labels)} rows are shown."
    tasks = list(dict.fromkeys(board.tasks["task"]))
    assert set(tasks) <= set(_rows(opened)[0])
    _choose(opened, "by-task", "mnli")
    assert [name for name in _rows(opened)[0] if name in tasks] == ["mnli"]
    assert "gain" in _rows(opened)[0]
    _one(opened, ".filters summary").click()
    next(one for one in _all(opened, "#columns label") if one.text == "gain").click()
    assert "gain" not in _rows(opened)[0]
    assert len({len(row) for row in _rows(opened)}) == 1


def test_a_cell_opens_its_rows_and_escape_gives_the_focus_back(opened: Any, board: Drawn) -> None:
    button = next(one for one in _all(opened, "#scores tbody tr:nth-child(3) button") if one.is_displayed())
    button.click()
    dialog = _one(opened, "dialog")
    assert dialog.get_attribute("open") is not None
    method = _methods(opened)[2]
    assert _one(dialog, "h2").text == f"{method} on cola, protocol standard"
    cell = board.cells.set_index(["protocol", "method", "task"]).loc[("standard", method, "cola")]
    said = _one(dialog, "#cell-body").text
    assert cell["key"] in said
    assert f"{cell['score']:.1f} ({cell['ci_low']:.1f} to {cell['ci_high']:.1f})" in said
    assert "task_arithmetic" in said  # its settings
    frame = board.rows("standard", method, "cola")
    wrong = frame[frame["score"] == 0]
    lines = [[one.text for one in _all(line, "th, td")] for line in _all(dialog, "tbody tr")]
    assert [line[0] for line in lines] == list(wrong["identity"])
    assert [line[3] for line in lines] == [str(one) for one in wrong["prediction"]]
    assert lines[0][1].startswith("Row ")
    opened.switch_to.active_element.send_keys(ESCAPE)
    assert dialog.get_attribute("open") is None
    assert opened.switch_to.active_element == button


def test_the_protocol_switches_by_keyboard(opened: Any) -> None:
    parts = (
        "return [...document.querySelectorAll('main [data-protocol]')].filter(one => one.checkVisibility())"
        ".map(one => one.dataset.protocol)"
    )
    assert set(opened.execute_script(parts)) == {"standard"}
    opened.execute_script("document.querySelector('#switch input').focus()")
    opened.switch_to.active_element.send_keys(RIGHT)
    assert set(opened.execute_script(parts)) == {"paper"}
    assert _one(opened, "#by-protocol").get_attribute("value") == "paper"


def test_what_is_shown_is_copied(opened: Any) -> None:
    opened.execute_script(
        "Object.defineProperty(navigator, 'clipboard', {configurable: true,"
        " value: {writeText: async (text) => { window.copied = text; }}})"
    )
    _choose(opened, "by-track", "data-free")
    expected = [[" ".join(text.split()) for text in row] for row in _rows(opened)]
    copied = {}
    for form in ("csv", "markdown", "latex"):
        _one(opened, f"[data-copy='{form}']").click()
        copied[form] = opened.execute_script("return window.copied")
    assert list(csv.reader(io.StringIO(copied["csv"]))) == expected
    lines = copied["markdown"].splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]] == expected
    assert copied["latex"].splitlines()[4].startswith(expected[1][0].replace("_", r"\_") + " & ")
    opened.execute_script(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async () => { throw new Error(); }}})"
    )
    _one(opened, "[data-copy='csv']").click()
    assert _one(opened, "#copied-text").get_attribute("value") == copied["csv"]
    assert _one(opened, "#copied-text").is_displayed()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_fits_every_width_and_reads_well(opened: Any, scheme: str) -> None:
    for width in WIDTHS:
        _show(opened, width, scheme)
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        narrow = opened.execute_script("return document.querySelector('.narrow').checkVisibility()")
        assert narrow == (width == 390)
        assert width == 800 or _violations(opened) == []


def _violations(browser: Any) -> list[str]:
    """Return what axe-core finds to be hard to read or to use, if it is there."""
    found = importlib.util.find_spec("axe_core_python")
    if found is None or found.origin is None:
        return []
    browser.execute_script((Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
    result = browser.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
    return [f"{one['id']}: {node['html'][:200]}" for one in result["violations"] for node in one["nodes"][:3]]


def test_a_stranger_s_markup_does_nothing(browser: Any, tmp_path: Path) -> None:
    _show(browser, 1400, "light")
    browser.get(_address(drawn_board(tmp_path, methods=4, tasks=2, rows=30, hostile=HOSTILE), tmp_path))
    browser.get_log("browser")
    for button in _all(browser, "#scores tbody tr:nth-child(-n+4) td button"):
        button.click()
        assert HOSTILE in _one(browser, "#cell-body").text or "0 rows are wrong" in _one(browser, "#cell-body").text
        browser.switch_to.active_element.send_keys(ESCAPE)
    assert _all(browser, "img") == []
    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []
    for width in WIDTHS:
        _show(browser, width, "light")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_everything_is_there_without_a_script_and_on_paper(opened: Any, written: str) -> None:
    shown = (
        "return [...document.querySelectorAll('main [data-protocol]')].every(one => one.checkVisibility())"
        " && !document.querySelector('.filters').checkVisibility()"
    )
    _choose(opened, "by-track", "per-input")
    assert not opened.execute_script(shown)
    for width, tables in ((1040, "#scores"), (700, "table:not(#scores)")):  # A4, across and upright
        _show(opened, width, "light", media="print")
        assert opened.execute_script(shown)
        widths = f"return [...document.querySelectorAll('main {tables}')].map(one => one.scrollWidth)"
        assert max(opened.execute_script(widths)) <= width
    _show(opened, 1400, "light")
    opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened.get(written)
        assert opened.execute_script(shown)
    finally:
        opened.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
