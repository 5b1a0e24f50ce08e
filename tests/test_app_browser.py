"""The app in a real browser: what is clicked, typed, steered and shared."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from saebench.browse.serve import served
from saebench.index import open_feature_index

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, BrowserContext, Page, expect  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
SAE = "topk-k4"
HERE = f"run=tiny&sae={SAE}"  # an address that lacks one of these is drawn again with it, over what was typed meanwhile


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """A server on the run."""
    with served(run) as where:
        yield where


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def context(browser: Browser) -> BrowserContext:
    """One person's browser, which loads the app's scripts once for all pages."""
    return browser.new_context(viewport={"width": 1400, "height": 1000})


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page that fails the test when anything but the server is asked for something, or a script raises."""
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    opened.on(
        "request",
        lambda request: (
            wrong.append(request.url) if "//localhost" not in request.url and request.url.startswith("http") else None
        ),
    )
    yield opened
    assert opened.locator("[data-testid=stException]").all_inner_texts() == []
    assert not wrong
    assert opened.title() != "broken"
    opened.close()


def settled(page: Page) -> None:
    """The script has run."""
    page.wait_for_timeout(150)
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()
    page.wait_for_timeout(150)


def test_each_page_opens_from_the_menu(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.get_by_role("heading", name="tiny")).to_be_visible()
    expect(page.locator("table[aria-label=SAEs] tbody tr")).to_have_count(3)
    for name, heading in (
        ("Features", "topk-k"),
        ("Prompt", "Prompt"),
        ("Steering", "Steering"),
        ("Compare", "Compare"),
    ):
        page.get_by_role("link", name=name).click()
        expect(page.get_by_role("heading", name=re.compile(heading)).first).to_be_visible()
        settled(page)
        assert page.locator("[data-testid=stException]").count() == 0


def test_sort_filter_open_and_follow_a_neighbour(page: Page, address: str) -> None:
    page.goto(f"{address}/features?{HERE}")
    rows = page.locator("table[aria-label=latents] tbody tr")
    expect(rows).to_have_count(48)
    name = rows.first.locator("td.wide > span").first  # cut where it is long, and whole on hover
    assert (name.get_attribute("title") or "").startswith(f"{name.text_content()}\n")
    assert (
        name.evaluate("(one) => getComputedStyle(one).whiteSpace") == "pre"
    )  # names differ by how many spaces a token has
    page.locator("button[data-pick='sort:max']").click()
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("max")
    settled(page)
    column = page.locator("table[aria-label=latents] tbody td:nth-child(5)").all_inner_texts()
    figures = [float(text.replace(",", "")) for text in column]
    assert figures == sorted(figures, reverse=True)
    page.get_by_role("textbox", name="Search").fill("7")
    page.get_by_role("textbox", name="Search").press("Enter")
    settled(page)
    expect(rows).not_to_have_count(48)
    assert "q=7" in page.url
    assert "sort=max.desc" in page.url
    first = rows.first.locator("a").inner_text()
    rows.first.locator("td").nth(2).click()
    expect(page.get_by_role("heading", name=f"Latent {first}")).to_be_visible()
    settled(page)
    assert f"latent={first}" in page.url
    link = page.locator("table[aria-label=latents] tbody a").first
    other = link.inner_text()
    link.click()
    expect(page.get_by_role("heading", name=re.compile(f"^Latent {other}"))).to_be_visible()
    page.keyboard.press("j")
    settled(page)
    expect(page.get_by_role("heading", name=re.compile(f"^Latent {other}$"))).to_have_count(0)


def test_the_address_names_the_sae_wherever_one_goes(page: Page, browser: Browser, address: str) -> None:
    page.goto(address)
    page.locator("tr[data-pick='open:topk-k2'] a").click()
    expect(page.get_by_role("heading", name="topk-k2")).to_be_visible()
    settled(page)
    assert "sae=topk-k2" in page.url
    page.locator("tr[data-pick='latent:4'] a").click()
    expect(page.get_by_role("heading", name="Latent 4")).to_be_visible()
    settled(page)
    assert "sae=topk-k2" in page.url
    page.get_by_role("button", name="Steer with it").click()
    expect(page.get_by_role("heading", name="Steering")).to_be_visible()
    settled(page)
    assert "sae=topk-k2" in page.url
    other = browser.new_context().new_page()
    other.goto(page.url)
    expect(other.get_by_text("Latent 4", exact=True)).to_be_visible()
    assert "sae=topk-k2" in other.url
    other.close()


def test_back_and_the_sidebar_find_pages_as_they_were_left(page: Page, address: str) -> None:
    page.goto(f"{address}/steering?{HERE}&turns=3:add:2n&prompt=the+cat&seed=5")
    expect(page.get_by_role("spinbutton", name="Seed")).to_have_value("5")
    page.get_by_role("link", name="Prompt").click()
    page.get_by_role("textbox", name="Text").fill("the red cat")
    page.get_by_role("button", name="See what fires").click()
    first = page.locator("a[data-pick^='latent:']").first
    latent = first.inner_text()
    first.click()
    expect(page.get_by_role("heading", name=f"Latent {latent}")).to_be_visible()
    settled(page)
    assert f"sae={SAE}" in page.url
    page.go_back()  # to the text, in one step
    expect(page.get_by_role("textbox", name="Text")).to_have_value("the red cat")
    expect(first).to_be_visible()
    page.get_by_role("link", name="Steering").click()
    expect(page.get_by_role("spinbutton", name="Seed")).to_have_value("5")
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("the cat")
    expect(page.get_by_text("Latent 3", exact=True)).to_be_visible()
    page.go_back()
    expect(page.get_by_role("textbox", name="Text")).to_have_value("the red cat")
    page.get_by_role("link", name="Features").click()
    expect(page.get_by_role("heading", name=f"Latent {latent}")).to_be_visible()
    page.get_by_role("link", name="Features").click()  # a second click: the page anew
    expect(page.locator("table[aria-label=latents] tbody tr").nth(40)).to_be_attached()


def test_the_list_is_in_a_latents_address(page: Page, browser: Browser, address: str) -> None:
    page.goto(f"{address}/features?{HERE}&sort=max.desc&q=house")
    rows = page.locator("table[aria-label=latents] tbody tr")
    expect(rows).not_to_have_count(48)
    second = rows.nth(1).locator("a").inner_text()
    rows.first.locator("a").click()
    expect(page.get_by_role("heading", name=re.compile("^Latent"))).to_be_visible()
    settled(page)
    assert "q=house" in page.url
    assert "sort=max.desc" in page.url
    other = browser.new_context().new_page()
    other.goto(page.url)
    expect(other.get_by_role("heading", name=re.compile("^Latent"))).to_be_visible()
    other.get_by_role("button", name="Next").click()
    expect(other.get_by_role("heading", name=re.compile(f"^Latent {second}"))).to_be_visible()
    other.close()


def test_one_click_is_one_step_back(page: Page, address: str) -> None:
    page.goto(f"{address}/features")  # says neither run nor SAE: that it is named is no step of its own
    rows = page.locator("table[aria-label=latents] tbody tr")
    expect(rows).to_have_count(48)
    page.wait_for_url(lambda url: "run=tiny" in url and "sae=topk" in url)
    settled(page)
    entries = page.evaluate("history.length")
    heading = page.get_by_role("heading", name=re.compile("^Latent"))
    for step, click in enumerate(
        (
            lambda: page.locator("button[data-pick='sort:max']").click(),
            lambda: rows.nth(3).locator("td").nth(2).click(),
            lambda: page.get_by_role("button", name="Steer with it").click(),
        )
    ):
        click()
        page.wait_for_url(("**sort=max.desc*", "**latent=*", "**/steering?*")[step])
        settled(page)
        assert page.evaluate("history.length") == entries + step + 1
    page.go_back()
    expect(heading).to_be_visible()
    page.go_back()
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("max")
    with page.context.expect_page() as opened:
        rows.nth(3).locator("a").click(button="middle")
    expect(opened.value.get_by_role("heading", name=re.compile("^Latent"))).to_be_visible()
    assert "sort=max.desc" in opened.value.url
    assert "latent=" not in page.url
    opened.value.close()
    page.go_back()
    expect(page.locator("th[aria-sort=ascending]")).to_contain_text("latent")


def test_links_lead_to_the_right_place_in_another_tab(page: Page, address: str) -> None:
    page.goto(f"{address}/compare?{HERE}&kind=Related")
    page.locator("table[aria-label=pairs] a").first.wait_for()
    links = page.locator("table[aria-label=pairs] tbody tr:first-child a")
    here, there = (links.nth(place).get_attribute("href") or "" for place in (0, 1))
    assert f"sae={SAE}" in here
    assert "sae=topk-k2" in there
    page.goto(f"{address}/{there}")
    expect(page.get_by_role("heading", name=f"Latent {there.rpartition('=')[2]}")).to_be_visible()
    page.goto(f"{address}/prompt?{HERE}&text=the+red+cat")
    steer = page.locator("a[data-pick^='steer:']").first
    page.goto(f"{address}/{steer.get_attribute('href')}")
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("the red cat")


def test_the_keyboard_keeps_its_place(page: Page, address: str) -> None:
    page.goto(f"{address}/prompt?{HERE}&text=the+red+cat")
    row = page.locator("tr[tabindex='0']").nth(2)
    row.focus()
    picked = row.get_attribute("data-pick")
    page.keyboard.press("Enter")
    expect(page.locator("tr.chosen")).to_have_attribute("data-pick", picked or "")
    settled(page)
    assert page.evaluate(_FOCUSED) == picked
    page.goto(f"{address}/features?{HERE}")
    page.locator("button[data-pick='sort:max']").focus()
    page.keyboard.press("Enter")
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("max")
    assert page.evaluate(_FOCUSED) == "sort:max"


def test_a_character_of_several_tokens_is_drawn_once(page: Page, address: str) -> None:
    page.goto(f"{address}/prompt?{HERE}&text=\U0001f600+\u0634\u0643\u0631\u0627+\u2713+cat")
    tokens = page.locator(".sb-text [data-pick^='at:']")
    expect(tokens.first).to_be_visible()
    text = "".join(tokens.all_inner_texts())
    for letter in ("\U0001f600", "\u0634", "\u0643", "\u2713"):
        assert text.count(letter) == 1
    assert "\\x" not in text


def test_the_address_names_what_is_shown_and_another_sae_begins_anew(page: Page, address: str) -> None:
    page.goto(f"{address}/features")
    page.locator("table[aria-label=latents] a").first.click()
    expect(page.get_by_role("heading", name=re.compile("^Latent"))).to_be_visible()
    settled(page)
    assert "run=tiny" in page.url
    assert "sae=topk-k" in page.url
    page.goto(f"{address}/features?{HERE}&latent=3")
    expect(page.get_by_role("heading", name="Latent 3")).to_be_visible()
    settled(page)
    page.get_by_role("combobox", name="SAE", exact=True).click()
    page.get_by_role("option", name="topk-k2").click()
    expect(page.get_by_role("heading", name="topk-k2")).to_be_visible()
    settled(page)
    assert "sae=topk-k2" in page.url
    assert "latent" not in page.url
    page.goto(f"{address}/steering?{HERE}&turns=3:add:1n&prompt=the+cat")
    expect(page.get_by_text("Latent 3", exact=True)).to_be_visible()
    settled(page)
    page.get_by_role("combobox", name="SAE", exact=True).click()
    page.get_by_role("option", name="topk-k2").click()
    expect(page.get_by_text("Latent 3", exact=True)).to_have_count(0)
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("the cat")
    settled(page)
    assert "turns" not in page.url


def test_contexts_switch_and_hostile_text_shows_as_text(page: Page, address: str) -> None:
    page.goto(f"{address}/features?{HERE}&latent=3")
    expect(page.locator(".example").first).to_be_visible()
    few = len(page.locator(".example .sb-text").first.inner_text())
    page.get_by_role("radio", name="full").click()
    settled(page)
    assert "around=full" in page.url
    whole = page.locator(".example .sb-text")
    assert len(whole.first.inner_text()) >= few
    seen, hostile = "", ("<scr", "javascript:", "**", "\u2400")  # contexts are 16 tokens long
    page.goto(f"{address}/features?{HERE}&latent=0&around=full&group=Random")
    for latent in range(48):
        expect(page.locator("h1")).to_contain_text(f"Latent {latent}")
        settled(page)
        seen += whole.evaluate_all(_WITHOUT_BADGES)
        if all(text in seen for text in hostile):
            break
        page.get_by_role("button", name="Next").click()
    assert [text for text in hostile if text not in seen] == []
    assert page.locator(".example script, .example img, .example b").count() == 0
    focusable = page.locator(".example .sb-on").first
    if focusable.count():
        focusable.focus()
        assert focusable.get_attribute("data-v")


def test_own_lines_show_where_the_latent_fires(page: Page, address: str) -> None:
    page.goto(f"{address}/features?{HERE}&latent=3")
    page.get_by_text("Try your own text").click()
    page.get_by_role("textbox", name="Lines, each by itself").fill("the red cat\n<b>blue</b> dog")
    page.get_by_role("button", name="See where it fires").click()
    expect(page.get_by_text("of 2 lines")).to_be_visible()
    settled(page)
    assert "try=" in page.url
    page.reload()
    expect(page.get_by_text("of 2 lines")).to_be_visible()
    page.get_by_text("What its ablation changes").click()
    page.get_by_role("button", name="Measure").click()
    expect(page.get_by_text("nats over the context")).to_be_visible()


def test_why_here_is_drawn_under_the_example_and_kept_in_the_address(page: Page, address: str, run: Path) -> None:
    with open_feature_index(run / "index" / f"{SAE}.h5") as index:
        latent = int(index.columns["density"].argmax())  # fires in any text
    page.goto(f"{address}/features?{HERE}&latent={latent}&units=3&try=the+red+cat+sees+a+dog")
    own = page.locator(f"a[data-pick^='why:{latent}:0:']")
    expect(own).to_have_text("why here?")
    settled(page)
    examples = page.locator(f"a[data-pick^='why:{latent}:']:not([data-pick^='why:{latent}:0:'])")
    examples.nth(2).click()
    drawn = page.locator(".sb-sets .sb-set")
    expect(drawn.first).to_be_visible()
    settled(page)
    assert f"why={latent}" in page.url
    expect(examples.nth(2)).to_have_text("close")
    assert page.locator(".sb-sets .text.last").count() == 1
    page.get_by_role("slider", name="Sets shown").focus()
    page.keyboard.press("Home")
    expect(drawn).to_have_count(1)
    settled(page)
    assert "sets=1" in page.url
    own.click()  # one is open at a time
    expect(own).to_have_text("close")
    expect(page.locator(".sb-sets")).to_have_count(1)
    settled(page)
    own.click()
    expect(page.locator(".sb-sets")).to_have_count(0)
    assert "why=" not in page.url


def test_a_prompts_tokens_and_latents_lead_on(page: Page, address: str) -> None:
    page.goto(f"{address}/prompt?{HERE}")
    page.get_by_role("textbox", name="Text").fill("the cat sees a <i>dog</i>")
    page.get_by_role("button", name="See what fires").click()
    tokens = page.locator(".sb-text [data-pick^='at:']")
    expect(tokens.nth(3)).to_be_visible()
    tokens.nth(3).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("Only token 3")).to_be_visible()
    assert "at=3" in page.url
    settled(page)
    steer = page.locator("a[data-pick^='steer:']").first
    latent = (steer.get_attribute("data-pick") or "").split(":")[1]
    steer.click()
    expect(page.get_by_role("heading", name="Steering")).to_be_visible()
    settled(page)
    assert f"turns={latent}%3Aadd" in page.url or f"turns={latent}:add" in page.url
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("the cat sees a <i>dog</i>")


def test_steer_stop_and_reload_from_the_copied_url(page: Page, browser: Browser, address: str) -> None:
    page.goto(f"{address}/steering?{HERE}&turns=3:add:4n&prompt=the+cat&max_new_tokens=20")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("the first token that differs")).to_be_visible()
    expect(page.locator(".sb-arm")).to_have_count(4)
    assert page.locator(".sb-apart").count() >= 1
    raw = page.get_by_role("spinbutton", name="Raw").input_value()
    page.get_by_role("spinbutton", name="Of the norm").fill("2")
    page.get_by_role("spinbutton", name="Of the norm").press("Enter")
    settled(page)
    assert float(page.get_by_role("spinbutton", name="Raw").input_value()) == pytest.approx(float(raw) / 2, rel=1e-3)
    page.get_by_role("spinbutton", name="Seed").fill("5")
    page.get_by_role("spinbutton", name="Seed").press("Enter")
    settled(page)
    copied = page.url
    other = browser.new_context().new_page()
    other.goto(copied)
    expect(other.get_by_role("spinbutton", name="Of the norm")).to_have_value("2")
    expect(other.get_by_role("spinbutton", name="Seed")).to_have_value("5")
    expect(other.get_by_role("textbox", name="Prompt")).to_have_value("the cat")
    other.close()


def test_stopping_keeps_what_there_is(page: Page, address: str) -> None:
    page.goto(f"{address}/steering?{HERE}&turns=3:add:1n&prompt=a&max_new_tokens=60&n=8")
    page.get_by_role("button", name="Generate").click()
    stop = page.get_by_role("button", name="Stop")
    if stop.is_enabled():
        stop.click()
    expect(page.get_by_text("the first token that differs")).to_be_visible()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_two_sessions_at_once_do_not_mix(browser: Browser, address: str) -> None:
    def texts(strengths: list[str]) -> list[list[str]]:
        pages = []
        for strength in strengths:
            one = browser.new_context().new_page()
            one.goto(
                f"{address}/steering?sae={SAE}&turns=3:add:{strength}&prompt=the+cat&max_new_tokens=24&temperature=0.0"
            )
            one.get_by_role("button", name="Generate").wait_for()
            settled(one)
            pages.append(one)
        for one in pages:
            one.get_by_role("button", name="Generate").click()
        found = []
        for one in pages:
            expect(one.get_by_text("the first token that differs")).to_be_visible(timeout=60_000)
            found.append(one.locator(".sb-arm").all_inner_texts())
            one.close()
        return found

    together = texts(["6n", "1n"])
    assert together == [*texts(["6n"]), *texts(["1n"])]
    assert together[0][0] == together[1][0]  # unsteered
    assert together[0][1] != together[1][1]


def test_an_index_is_begun_from_the_app_and_can_be_browsed_when_it_is_done(
    page: Page, run: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    with served(copied) as where:
        page.goto(f"{where}/features?sae=relu-l0-4")
        page.get_by_role("button", name="Index", exact=True).click()
        expect(page.get_by_text("saebench index --sae").first).to_be_visible()
        expect(page.locator("table[aria-label=latents] tbody tr")).to_have_count(48, timeout=120_000)
        expect(page.get_by_role("button", name="Dismiss")).to_be_visible()
        settled(page)
        weights = [copied / "saes" / name / "sae_weights.safetensors" for name in ("topk-k2", "relu-l0-4")]
        shutil.copy(*weights)  # while the page is open: what is drawn again is not of the SAE before
        page.locator("button[data-pick='sort:max']").click()
        expect(page.get_by_text("was made from another sae")).to_be_visible()


def test_a_bar_of_the_densities_opens_its_latents(page: Page, address: str) -> None:
    page.goto(f"{address}/?{HERE}")
    bars = page.locator(".barlayer .point path")
    bars.first.wait_for(state="attached", timeout=30_000)
    page.wait_for_timeout(1000)
    tallest = max(bars.all(), key=lambda bar: bar.evaluate("bar => bar.getBBox().height"))
    tallest.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    box = tallest.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.get_by_text("Only densities of")).to_be_visible(timeout=30_000)
    assert "between=" in page.url


def test_two_saes_are_compared(page: Page, address: str) -> None:
    page.goto(f"{address}/compare?{HERE}")
    expect(page.locator("table[aria-label='kinds of latents'] tbody tr")).to_have_count(5)
    for name, kind, column in (("Related", "related", 1), ("New", "alone", 1), ("Missing", "alone", 2)):
        page.get_by_role("radio", name=name).click()
        settled(page)
        assert f"kind={name}" in page.url
        row = page.locator("table[aria-label='kinds of latents'] tbody tr", has_text=kind)
        count = int(row.locator("td").nth(column).inner_text())
        of = SAE if column == 1 else "topk-k2"
        if count:
            expect(page.get_by_text(re.compile(f"^{count} latents, the first"))).to_be_visible()
            expect(page.locator("table[aria-label=pairs] thead th").first).to_have_text(of)
            for cell in page.locator("table[aria-label=pairs] tbody td:last-child").all_inner_texts():
                assert re.fullmatch(r"\d+, [01]\.\d\d|none", cell)  # a Jaccard index is shown with the latent it is of
        else:
            expect(page.get_by_text(f"No latent of {of} is {kind}.")).to_be_visible()


def test_a_latent_is_searched_for_and_steered_with(page: Page, address: str) -> None:
    page.goto(f"{address}/steering?{HERE}&prompt=the")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    page.get_by_role("textbox", name="Add a latent").fill("17")
    found = page.locator("table[aria-label=found] tbody tr")
    expect(found.first.locator("a")).to_have_text("17")
    found.first.locator("a").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("Latent 17", exact=True)).to_be_visible()
    settled(page)
    assert "17%3Aadd%3A0.5n" in page.url or "17:add:0.5n" in page.url
    expect(page.get_by_role("textbox", name="Add a latent")).to_have_value("")
    page.get_by_role("textbox", name="Add a latent").fill("house")
    expect(found).not_to_have_count(0)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_dark_and_narrow_pages_are_whole(page: Page, address: str) -> None:
    seen = set()
    for view in (
        "",
        f"features?{HERE}",
        f"features?{HERE}&latent=3",
        "prompt?text=the+cat",
        "steering?turns=3:add:1n",
        "compare",
    ):
        page.goto(f"{address}/{view}")
        page.locator("h1").first.wait_for()
        for scheme, width in (("dark", 1400), ("dark", 800), ("light", 800)):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            settled(page)
            assert page.locator("[data-testid=stException]").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (view, width)
            contrast = page.evaluate(_CONTRAST)
            assert contrast["worst"] >= 4.5, (view, scheme, contrast)
            seen.add((scheme, page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")))
    assert len({colour for _, colour in seen}) == len(seen) == 2  # each scheme has its own


_FOCUSED = """() => { let one = document.activeElement; while (one && one.shadowRoot) one = one.shadowRoot.activeElement;
  return one && one.dataset.pick; }"""
_WITHOUT_BADGES = """(lines) => lines.map((line) => { const copy = line.cloneNode(true);
  copy.querySelectorAll('.sb-badge').forEach((badge) => badge.remove()); return copy.textContent; }).join('')"""

# Of all text in the panels, buttons, captions and charts' axes: the smallest contrast between its colour and the first opaque background behind it.
_CONTRAST = """() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); const unit = c.startsWith('color(') ? 255 : 1;
    return { rgb: m.slice(0, 3).map((v) => v * unit), a: m.length > 3 ? m[3] : 1 }; };
  const mix = (top, under) => ({ rgb: top.rgb.map((v, i) => v * top.a + under.rgb[i] * (1 - top.a)), a: 1 });
  const light = (rgb) => { const [r, g, b] = rgb.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { const layers = []; for (let n = e; n; n = n.parentElement || (n.getRootNode() && n.getRootNode().host)) {
      const c = parse(getComputedStyle(n).backgroundColor); layers.push(c); if (c.a === 1) break; }
    let colour = { rgb: [255, 255, 255], a: 1 }; for (const layer of layers.reverse()) colour = mix(layer, colour); return colour; };
  let worst = 99, where = '';
  const visit = (root) => root.querySelectorAll('*').forEach((e) => {
    if (e.shadowRoot) visit(e.shadowRoot);
    if (!e.closest('.sb-app, .xtick, .ytick, [data-testid=stCaptionContainer], [data-testid=stCode], .annotation-text, button[data-testid^=stBaseButton]:enabled') || e.matches('title, [data-testid=stIconMaterial]') || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) return;
    const style = getComputedStyle(e);
    const back = behind(e), front = mix(parse(e instanceof SVGElement ? style.fill : style.color), back);
    const [a, b] = [light(front.rgb), light(back.rgb)]; const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst) { worst = ratio; where = e.className + ': ' + e.textContent.slice(0, 20); }
  });
  visit(document);
  return { worst, where };
}"""
