"""The live page in a real browser: Chromium or Chrome, driven by Playwright."""

import contextlib
import json
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.scheduling.cost_table import CostPoint, CostTable
from dspark.serving.context import Settings

playwright_api = pytest.importorskip(
    "playwright.sync_api",
    reason="the page's tests need Playwright: make browser, or pip install dspark[browser]",
)
# Those of the machine first, for Playwright's own is a download.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = (
    "the page's tests need a browser: make browser, or install Chromium or Chrome, or run "
    "python -m playwright install chromium"
)
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("by_the_table")]
SECONDS = 30_000  # Playwright's unit is the millisecond
PROMPT = "Hi, I want to book a table for two at an Italian restaurant in San Jose."
STRING = r'"(?:[^"\\]|\\.)*"'


@pytest.fixture(scope="module")
def measured(model):
    points = tuple(
        CostPoint(r + n, r, 10 + (r + n) / 4, 2.0, 0.5) for r in (1, 2, 4) for n in (0, r, 7 * r)
    )
    costs = CostTable(points, model.machine)
    return Model(model.target, model.drafter, calibration=model.calibration, costs=costs)


@pytest.fixture(scope="module")
def chromium():
    """Playwright's hold on browsers, and the one to start; first of all, for what it skips."""
    with playwright_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        path = found or playwright.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip(NO_BROWSER)
        yield playwright.chromium, path


@pytest.fixture(scope="module")
def server(chromium, measured, kit):
    with kit.serve(measured, drafters={"dspark": measured}, schedule="lagged") as started:
        yield started


@pytest.fixture
def slow_steps(monkeypatch):
    """A step takes 20 ms at least: a run lasts while the page is used, on any machine."""
    step = Engine.step

    def slowly(engine):
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slowly)


class Visit:
    """A visitor's page."""

    def __init__(self, page):
        self.page = page
        self.complaints = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)
        page.set_default_timeout(SECONDS)

    def _hear(self, message):
        # Chromium itself reports a connection that breaks, which some tests do on purpose.
        if message.type in ("error", "warning") and "net::" not in message.text:
            self.complaints.append(message.text)

    def open(self, server):
        self.page.goto(f"http://127.0.0.1:{server.port}/")
        return self

    def connected(self):
        self.page.wait_for_selector("#connection[data-state=connected]")
        return self

    def ask(self, prompt=PROMPT, tokens=16, *, past_end=False, **fields):
        self.page.fill("#prompt", prompt)
        self.page.set_checked("#past-end", past_end)
        self.page.fill("#max-tokens", str(tokens))
        for name, value in fields.items():
            if name in ("drafter", "verifier", "schedule"):
                self.page.select_option(f"#{name}", value)
            else:
                self.page.fill(f"#{name}", str(value))
        self.page.click("#go")
        return self

    def ended(self):
        self.page.wait_for_selector('#go:text-is("Run")')
        return self

    def text(self, selector):
        return self.page.locator(selector).evaluate("node => node.textContent")

    @property
    def overflow(self):
        return self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )


@pytest.fixture
def visit(chromium):
    """Opens pages in profiles of their own; what they complain of fails the test."""
    with contextlib.ExitStack() as stack:
        visits = []

        def new(width=1440, height=900, *, first=False, **options):
            browser, path = chromium
            profile = stack.enter_context(tempfile.TemporaryDirectory())
            context = browser.launch_persistent_context(
                profile,
                executable_path=path,
                args=ARGUMENTS,
                headless=True,
                viewport={"width": width, "height": height},
                **options,
            )
            stack.callback(context.close)
            if not first:
                context.add_init_script("localStorage.setItem('dspark-visited', '1')")
            visits.append(Visit(context.new_page()))
            return visits[-1]

        yield new
        assert [complaint for each in visits for complaint in each.complaints] == []


def answer_of(server, prompt, tokens):
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
    return server.post("/v1/chat/completions", body).json["choices"][0]["message"]["content"]


def test_a_run_from_prompt_to_end_shows_the_api_s_answer(server, visit):
    visitor = visit().open(server).connected().ask(tokens=24, schedule="fixed").ended()
    page = visitor.page
    assert page.locator("#speculative .drafted").count() > 0
    visitor.ask(tokens=24, schedule="lagged").ended()  # which may find that nothing pays
    expected = answer_of(server, PROMPT, 24)
    assert visitor.text("#speculative .text") == visitor.text("#plain .text") == expected
    assert "the same text, token by token" in visitor.text("#verdict")
    assert re.fullmatch(r"[\d,]+", visitor.text("#speculative .rate b"))
    assert re.fullmatch(r"[\d,]+", visitor.text("#plain .rate b"))
    assert visitor.text("#status").startswith("Done: 24 tokens")
    assert page.locator("#plain .drafted").count() == 0
    assert page.locator("#budget path.sent").count() == 1
    assert page.locator("#budget path.allowed").count() == 1
    assert page.locator("#cost path.curve").count() == 1
    assert page.locator("#cost circle.measured").count() == 9
    assert page.locator("#accepted path.curve").count() == 1
    rounds = page.locator("#accepted circle.earlier").count()
    label = page.get_attribute("#accepted", "aria-label")
    found = re.fullmatch(r"Accepted length: (\S+) tokens per round over (\d+) rounds?, .*", label)
    assert found
    assert int(found[2]) == rounds
    assert float(found[1]) * rounds == pytest.approx(24, abs=rounds * 0.005 + 1)


def test_a_link_reproduces_a_run(server, visit):
    """Another visitor who opens it gets the same draws; a run of their own has others."""
    first = visit().open(server).connected().ask(tokens=24, temperature=1, schedule="fixed").ended()
    page = first.page
    assert page.is_checked("#compare")
    link = page.get_attribute("#link", "href")
    text = first.text("#speculative .text")
    other = visit()
    other.page.goto(f"http://127.0.0.1:{server.port}/{link}")
    other.connected()
    assert other.text("#status") == "This link holds a run; press Run to repeat it."
    other.page.click("#go")
    other.ended()
    assert other.text("#speculative .text") == text
    assert other.page.get_attribute("#link", "href") == link
    other.ask(tokens=24, temperature=1, schedule="fixed").ended()
    assert other.page.get_attribute("#link", "href") != link
    damaged = visit()
    damaged.page.goto(f"http://127.0.0.1:{server.port}/#run=%7Bx")
    damaged.connected()
    assert damaged.text("#status").startswith("The link to a run is damaged")


def test_a_first_visit_begins_with_a_short_run(server, visit):
    """Once in a browser, and never in place of the run that a link holds."""
    visitor = visit(first=True).open(server).connected()
    page = visitor.page
    page.wait_for_selector("#notes li:has-text('Your first visit began with this example')")
    visitor.ended()
    assert re.match(r"Done: (\d\d?) tokens", visitor.text("#status"))
    assert visitor.text("#speculative .text") == visitor.text("#plain .text") != ""
    assert page.input_value("#max-tokens") == "128"
    link = page.get_attribute("#link", "href")
    page.reload()
    visitor.connected()
    page.wait_for_timeout(1500)  # three of the server's states
    assert visitor.text("#status") == "Type a prompt or pick an example, then run it."
    other = visit(first=True)
    other.page.goto(f"http://127.0.0.1:{server.port}/{link}")
    other.connected()
    other.page.wait_for_timeout(1500)
    assert other.text("#status") == "This link holds a run; press Run to repeat it."


def test_bars_are_as_high_as_the_confidences_that_the_server_sent(server, visit):
    visitor = visit()
    sent = []
    visitor.page.on("response", lambda reply: sent.append(reply) if "live" in reply.url else None)
    visitor.open(server).connected().ask(schedule="fixed").ended()
    page = visitor.page
    (stream,) = [reply for reply in sent if reply.request.method == "POST"]
    events = [part.split("\n") for part in stream.text().strip().split("\n\n")]
    rounds = [json.loads(data[6:]) for name, data in events if name == "event: round"]
    for number in reversed(range(len(rounds))):
        drafts = rounds[number]["drafts"]
        cells = page.locator("#block li:has(.track)")
        page.wait_for_selector(f"#cursor[aria-valuetext='Round {number + 1} of {len(rounds)}']")
        assert cells.count() == len(drafts)
        for k, draft in enumerate(drafts):
            track = cells.nth(k).locator(".track").bounding_box()
            fill = cells.nth(k).locator(".fill").bounding_box()
            assert fill["height"] / track["height"] == pytest.approx(draft["confidence"], abs=0.02)
            wanted = "kept" if draft["accepted"] else "refused" if draft["sent"] else "unsent"
            assert cells.nth(k).get_attribute("class") == wanted
        if number:
            page.click("#previous")
    assert page.locator("#previous").is_disabled()
    assert "the prompt was read" in visitor.text("#round-text")


def test_the_keyboard_alone_is_enough(server, visit):
    visitor = visit().open(server).connected()
    page = visitor.page
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        focused = page.evaluate("document.activeElement.id || document.activeElement.textContent")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        reached.append(focused)
        assert outline != "none", f"focus on {focused} cannot be seen"
        if focused == "Chat":
            page.keyboard.press("Enter")
        if focused == "max-tokens":
            page.keyboard.press("Control+a")
            page.keyboard.type("12")
        if focused == "compare":
            break
    order = ["prompt", "go", "drafter", "verifier", "schedule", "temperature", "load", "compare"]
    assert [each for each in reached if each in order] == order
    prompt = page.input_value("#prompt")
    assert "table for two" in prompt
    for _ in range(30):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "go":
            break
    page.keyboard.press("Enter")
    visitor.ended()
    assert page.evaluate("document.activeElement.id") == "go", "focus has moved"
    assert visitor.text("#speculative .text") == answer_of(server, prompt, 12)
    page.focus("#cursor")
    last = page.input_value("#cursor")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(f"#round-text:has-text('Round {last} of')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_scrolling_sideways(server, visit, scheme):
    visitor = visit(360, 740, color_scheme=scheme).open(server).connected()
    assert visitor.overflow == 0
    visitor.ask("supercalifragilistic" * 30, temperature=1.5, load=2).ended()
    assert visitor.overflow == 0
    visitor.page.click("summary")
    visitor.page.wait_for_selector("#rows tr")
    assert visitor.overflow == 0


# Contrast as in WCAG 2: of every text that can be seen, against the nearest background.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map(
      (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const poor = [];
  for (let node; (node = walker.nextNode()); ) {
    const owner = node.parentElement;
    if (!node.textContent.trim() || !owner.checkVisibility()) continue;
    if (owner.closest("script, noscript, .unseen, .skip, :disabled")) continue;
    const style = getComputedStyle(owner);
    const ink = parse(owner.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(owner))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${node.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_background(server, visit, scheme):
    visitor = visit(color_scheme=scheme).open(server).connected()
    paper = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)))
    assert (brightness < 200) == (scheme == "dark")
    assert visitor.page.evaluate(CONTRAST) == []
    visitor.ask(schedule="threshold", threshold=0.7).ended()
    last = int(visitor.page.input_value("#cursor"))
    for number in range(1, last + 1):
        visitor.page.fill("#cursor", str(number))
        visitor.page.wait_for_selector(f"#round-text:has-text('Round {number + 1} of')")
        assert visitor.page.evaluate(CONTRAST) == []
    visitor.page.fill("#prompt", " ")
    visitor.page.click("#go")
    assert "Type a prompt" in visitor.text("#form-error")
    assert visitor.page.evaluate(CONTRAST) == []


UNNAMED = """() => {
  const name = (node) => {
    const by = (node.getAttribute("aria-labelledby") ?? "").split(" ").filter(Boolean)
      .map((id) => document.getElementById(id));
    const text = (nodes) => nodes.map((each) => each?.textContent ?? "").join(" ").trim();
    return node.getAttribute("aria-label") || text(by) || text([...(node.labels ?? [])])
      || (node.matches("button, summary, a") ? text([node]) : "");
  };
  const wanted = "button, a, input, select, textarea, summary, " +
    "[role=region], [role=img], [role=group]";
  const unnamed = [...document.querySelectorAll(wanted)].filter((node) => !name(node));
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  const twice = ids.filter((id, i) => ids.indexOf(id) !== i);
  const lost = [...document.querySelectorAll("[aria-describedby], [aria-labelledby], [for]")]
    .flatMap((node) => ["aria-describedby", "aria-labelledby", "for"]
      .flatMap((name) => (node.getAttribute(name) ?? "").split(" ").filter(Boolean)))
    .filter((id) => !document.getElementById(id));
  const levels = [...document.querySelectorAll("h1, h2, h3")].map((h) => Number(h.tagName[1]));
  const jumps = levels.filter((level, i) => i && level > levels[i - 1] + 1);
  return [...unnamed.map((node) => node.outerHTML.slice(0, 80)), ...twice, ...lost, ...jumps];
}"""


def test_everything_has_a_name_and_the_live_region_does_not_flood(server, visit):
    visitor = visit().open(server).connected()
    page = visitor.page
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.querySelectorAll('main').length") == 1
    assert page.evaluate(UNNAMED) == []
    page.evaluate(
        """() => {
          window.said = [];
          const told = (changes) => window.said.push(changes.length);
          const live = document.querySelectorAll("[role=status], [role=alert], [aria-live]");
          for (const node of live) {
            new MutationObserver(told).observe(node, { childList: true, subtree: true });
          }
        }"""
    )
    visitor.ask(tokens=48, load=1, past_end=True).ended()
    assert page.evaluate("window.said.length") <= 10
    rounds = int(page.input_value("#cursor")) + 1
    assert rounds > 10
    assert page.evaluate(UNNAMED) == []
    label = page.get_attribute("#budget", "aria-label")
    assert re.search(r"over \d+ rounds of \d to 2 requests", label)
    visitor.ask(tokens=24, schedule="fixed").ended()
    page.fill("#cursor", "1")
    page.wait_for_selector("#round-text:has-text('Round 2 of')")
    items = page.locator("#block li .unseen").all_text_contents()
    assert any(re.fullmatch(r"(?s)Guess 1, .*: confidence \d+ %, (kept|refused|not sent)", item)
               for item in items)  # fmt: skip


def test_what_looks_like_markup_stays_text(server, visit):
    evil = "<script>window.evil = 1</script><img src=x onerror='window.evil = 2'>"
    visitor = visit()

    def poison(route):
        """Put markup wherever the server sends text of the model's."""
        reply = route.fetch()
        body = re.sub(f'"text":{STRING}', f'"text":{json.dumps(evil)}', reply.text())
        body = re.sub(rf"\[{STRING},(\d+),", lambda m: f"[{json.dumps(evil)},{m[1]},", body)
        route.fulfill(response=reply, body=body)

    visitor.page.route(
        "**/v1/dspark/live",
        lambda route: poison(route) if route.request.method == "POST" else route.continue_(),
    )
    visitor.open(server).connected().ask(evil).ended()
    page = visitor.page
    page.click("summary")
    assert evil in visitor.text("#speculative .text")
    assert evil.replace(" ", "·") in visitor.text("#block")
    assert evil.replace(" ", "·") in visitor.text("#rows")
    assert page.evaluate("window.evil") is None
    assert page.locator("main img, main script").count() == 0
    assert visitor.overflow == 0


@pytest.mark.usefixtures("slow_steps")
def test_a_server_that_stops_shows_as_disconnected_and_one_that_returns_as_connected(
    measured, kit, visit
):
    with kit.serve(measured, drafters={"dspark": measured}, schedule="fixed") as server:
        visitor = visit().open(server).connected()
        visitor.ask(tokens=200, load=2, past_end=True)
        visitor.page.wait_for_selector("#speculative .drafted")
        port = server.port
    page = visitor.page
    page.wait_for_selector("#connection[data-state=disconnected]")
    page.wait_for_selector("#status[data-state=error]")
    assert page.locator("#go").is_disabled()
    with kit.serve(measured, drafters={"dspark": measured}, port=port, schedule="fixed"):
        visitor.connected()
        visitor.ask(tokens=4).ended()
        assert "Done" in visitor.text("#status")


@pytest.mark.usefixtures("slow_steps")
def test_stop_ends_a_run(server, visit):
    visitor = visit().open(server).connected()
    visitor.ask(tokens=200, load=2, past_end=True)
    visitor.page.wait_for_selector("#speculative .drafted")
    visitor.page.click('#go:text-is("Stop")')
    visitor.ended()
    assert visitor.text("#status") == "Stopped."
    server.wait_until(lambda _: server.server.app.state.context.engines.in_line == 0)


@pytest.mark.usefixtures("slow_steps")
def test_the_load_slider_acts_while_a_run_goes_on(server, visit):
    visitor = visit().open(server).connected()
    visitor.ask(tokens=100, past_end=True)
    visitor.page.wait_for_selector("#speculative .drafted")
    visitor.page.fill("#load", "3")
    visitor.page.wait_for_selector("#round-text:has-text('shared by 4 requests')")
    visitor.ended()
    assert "The load was changed" in visitor.text("#verdict")
    assert "times" not in visitor.text("#verdict")


def test_a_key_is_asked_for_and_kept_nowhere(measured, kit, visit):
    settings = Settings("bundled", api_keys=("secret",))
    with kit.serve(measured, settings, {"dspark": measured}) as server:
        visitor = visit().open(server)
        page = visitor.page
        page.wait_for_selector("#key-form:visible")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-error:has-text('does not know')")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        visitor.connected().ask(tokens=4).ended()
        assert "Done" in visitor.text("#status")
        assert page.locator("#key-form").is_hidden()
        assert page.evaluate("({...localStorage})") == {"dspark-visited": "1"}
        assert page.evaluate("sessionStorage.length") == 0
        assert page.context.cookies() == []
        page.reload()
        page.wait_for_selector("#key-form:visible")
        visitor.complaints = [c for c in visitor.complaints if "401" not in c]


def test_without_drafts_the_page_says_so(server, visit):
    visitor = visit().open(server).connected().ask(drafter="none").ended()
    assert visitor.text("#round-text") == "No round yet."
    assert visitor.text("#speculative .text") == "No drafter was chosen."
    assert visitor.text("#plain .text") == answer_of(server, PROMPT, 16)
    assert visitor.page.locator("#schedule").is_disabled()


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("wish", ["setting", "select"])
def test_rounds_come_two_a_second_where_that_is_wanted(server, visit, wish):
    """By who has asked the system for less motion, or the page for slow rounds."""
    visitor = visit(reduced_motion="reduce" if wish == "setting" else None)
    page = visitor.open(server).connected().page
    if wish == "select":
        page.select_option("#pace", "slow")
    page.evaluate(
        """() => {
          window.drawn = [];
          new MutationObserver(() => window.drawn.push(performance.now()))
            .observe(document.getElementById("block"), { childList: true });
        }"""
    )
    visitor.ask(tokens=200, load=1, past_end=True).ended()  # for over a second
    times = page.evaluate("window.drawn")
    assert len(times) > 2
    # One frame may come late; half a second lies between any two that are on time.
    assert times[-1] - times[0] > 500 * (len(times) - 1) - 400
