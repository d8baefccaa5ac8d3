"""Reports opened in a real browser."""

import shutil

import pytest

from dd.report.command import report
from dd.report.page import write_report
from tests.run_folders import STEPS, results_of, write_run

playwright = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ALL = ("gd", "gd_holdout", "adamw_holdout", "lbfgs_holdout", "gd_kfold", "dd", "dd_auto")
HOSTILE = "<img src=http://127.0.0.1/x onerror=alert(1)></script>"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
DESKTOP = {"width": 1200, "height": 900}
# Of every trace: its group, its kind, whether it is a band, whether it is seen, how many points.
TRACES = """plot => plot._fullData.map((trace, number) => [
    ...plot.data[number].meta,
    trace.fill === "toself",
    trace.visible === true,
    plot.calcdata[number].filter(point => Number.isFinite(point.y)).length,
])"""
# Where the last point of the first line is on the screen, and its value.
LAST_POINT = """plot => {
    plot.scrollIntoView({block: "center"});
    const {xaxis, yaxis, _size} = plot._fullLayout;
    const box = plot.getBoundingClientRect();
    const line = plot.data.find(trace => trace.name);
    const [x, y] = [line.x.at(-1), line.y.at(-1)];
    return [box.x + _size.l + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y), y];
}"""


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium to open reports in")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--disable-gpu"])
        yield chromium
        chromium.close()


class Opened:
    """A report in a browser, what it complained of, and what it asked the network for."""

    def __init__(self, context, path):
        self.complaints, self.requests = [], []
        context.set_default_timeout(60_000)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function(
            "[...document.querySelectorAll('.plot')].every(plot => plot.calcdata)"
        )

    @property
    def plots(self):
        return self.page.locator(".plot")

    def traces(self, number=0):
        return self.plots.nth(number).evaluate(TRACES)

    def outside(self):
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]

    def too_wide(self):
        """How much wider the page is than the screen; a phone's window would grow with it."""
        width = self.page.evaluate("document.documentElement.scrollWidth")
        return width - self.page.viewport_size["width"]

    def fill(self, selector):
        return self.page.locator(selector).first.evaluate("node => getComputedStyle(node).fill")

    def background(self):
        return self.page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report with all kinds of curves, seven optimizers, three trials and words that are long."""
    results = results_of(ALL, trials=3)
    results.note([f"note {HOSTILE}", "word" * 100])
    folder = tmp_path_factory.mktemp("run") / ("folder" * 20)
    return write_report(write_run(folder, results, name=HOSTILE, theory=("dd",), extra="x" * 300))


@pytest.fixture(scope="module")
def desk(browser, full):
    return Opened(browser.new_context(viewport=DESKTOP), full)


@pytest.fixture(scope="module")
def phone(browser, full):
    return Opened(browser.new_context(**PHONE), full)


def luminance(colour):
    red, green, blue = (int(part) / 255 for part in colour[4:-1].split(","))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_curves_are_drawn_and_the_boxes_show_and_hide_them(desk):
    traces = desk.traces()
    drawn = [(group, kind) for group, kind, band, visible, _ in traces if visible and not band]
    # Test and train of seven, validation of four, theory of one, each in two panels.
    assert len(drawn) == 2 * (2 * 7 + 4 + 1)
    assert sum(band for *_, band, visible, _ in traces if visible) == 2 * 2 * 7
    points = {count for *_, band, visible, count in traces if visible and not band}
    assert points == {len(STEPS)}
    assert "uncorrected" not in {kind for _, kind in drawn}
    desk.page.locator('[data-kind="uncorrected"]').check()
    desk.page.locator('[data-group="0"]').uncheck()
    shown = {(group, kind) for group, kind, _, visible, _ in desk.traces() if visible}
    desk.page.locator('[data-group="0"]').check()
    assert (ALL.index("dd"), "uncorrected") in shown
    assert 0 not in {group for group, _ in shown}
    assert desk.complaints == []
    assert desk.outside() == []


def test_a_line_that_is_pointed_at_tells_its_values(desk):
    x, y, value = desk.plots.evaluate(LAST_POINT)
    desk.page.mouse.move(x - 1, y - 1)
    desk.page.mouse.move(x, y)
    label = desk.plots.locator(".hoverlayer .hovertext").first
    label.wait_for()
    assert "Gradient descent, test" in label.text_content()
    assert f"step {STEPS[-1]}: {value:.4f}" in label.text_content()


def test_paper_is_white(desk):
    desk.page.emulate_media(media="print", color_scheme="dark")
    assert luminance(desk.background()) == pytest.approx(1)
    assert luminance(desk.fill(".plot .xtick text")) == 0


def test_a_phone_shows_it_in_light_and_dark_without_scrolling_sideways(phone):
    assert phone.too_wide() <= 0
    phone.page.locator("summary").click()
    assert phone.too_wide() <= 0
    assert phone.plots.bounding_box()["width"] <= PHONE["viewport"]["width"]
    for scheme in ("light", "dark"):
        phone.page.emulate_media(color_scheme=scheme)
        is_dark = luminance(phone.background()) < 0.2
        assert is_dark == (scheme == "dark")
        for part in (".xtick text", ".ytick text", ".infolayer .ytitle"):
            assert (luminance(phone.fill(f".plot {part}")) > 0.7) == is_dark
    assert phone.complaints == []
    assert phone.outside() == []


def test_a_comparison_is_drawn_on_a_phone(browser, tmp_path):
    folders = [
        write_run(tmp_path / f"run{number}", results_of(("gd", "dd")), seed=number)
        for number in range(10)
    ]
    seen = Opened(browser.new_context(**PHONE), report(folders))
    assert seen.plots.count() == 2
    for number in range(2):
        traces = seen.traces(number)
        assert len(traces) == 10 * 2 * 2
        assert {count for *_, count in traces} == {len(STEPS)}
    assert seen.too_wide() <= 0
    assert seen.complaints == []
    assert seen.outside() == []


def test_what_is_looked_for_would_be_found(phone):
    with phone.page.expect_console_message() as said:
        phone.page.evaluate("new Image().src = 'http://127.0.0.1:9/x.png'")
    # The page's own policy stops it before it reaches the network.
    assert "Content Security Policy" in said.value.text
    assert phone.complaints
    phone.page.locator("main").evaluate("main => { main.style.width = '500px' }")
    assert phone.too_wide() > 0
