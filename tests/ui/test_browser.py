"""The page in a real browser: headless Chromium against the fake server.

Every test also holds: no request leaves 127.0.0.1, no error on the console.
$HADAL_SCREENSHOTS names a folder for pictures.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ui.conftest import Live
from tests.ui.visits import ANSWERS, BOX, CHATS, FIGURES, Visit, expect, wait_until

# Real seconds pass in a browser, on a busy machine too many: a test may try again, and the summary says so.
pytestmark = [pytest.mark.chromium, pytest.mark.flaky(reruns=2)]


Visitor = Callable[..., Visit]


@pytest.fixture(scope="module")
def usual(browser: Any, live: Live) -> Iterator[Visit]:
    """The visit that most tests share, since loading a page costs seconds on a busy machine."""
    yield Visit(browser.new_context(viewport={"width": 1280, "height": 800}), live.url)


@pytest.fixture
def visit(usual: Visit) -> Iterator[Visit]:
    """A page as good as new. Afterwards: nothing went elsewhere, nothing complained."""
    yield usual
    foreign, complaints = usual.foreign[:], usual.complaints[:]
    usual.renew()
    assert foreign == []
    assert complaints == []


@pytest.fixture
def visitor(browser: Any, live: Live) -> Iterator[Visitor]:
    """Makes visits of other kinds (a phone, a dark one, to another server), checked in the same way."""
    visits: list[Visit] = []

    def make(at: Live = live, *, ready: bool = True, **options: Any) -> Visit:
        options.setdefault("viewport", {"width": 1280, "height": 800})
        visits.append(Visit(browser.new_context(**options), at.url, ready=ready))
        return visits[-1]

    yield make
    for visit in visits:
        visit.context.close()
        assert visit.foreign == []
        assert visit.complaints == []


def test_ask_and_see_reasoning_then_answer(visit: Visit) -> None:
    page = visit.page
    visit.picture("welcome-light")
    expect(page.locator("#hadal-note")).to_contain_text("number puzzles only")
    visit.ask("What is 3333 + 4444? slowly", answered=False)
    thought = page.locator("#hadal-chat .thought-group")
    expect(thought).to_contain_text("Thinking…")
    expect(thought.locator(".content")).to_contain_text("Counting")  # open while it thinks
    page.locator("#hadal-box .stop-button").click()
    visit.idle()
    visit.ask("What is 3333 + 4444?")
    last = page.locator(ANSWERS).last
    expect(last.locator(".title")).to_contain_text(re.compile(r"Thought for [\d.]+ m?s"))
    expect(last.locator(".content")).to_have_count(0)  # folded when done
    expect(last).to_contain_text("The sum is 7777")
    expect(last.locator(".hadal-figures")).to_contain_text(
        re.compile(r"\d+ tokens/s · first token after [\d.]+ m?s · \d+ tokens, \d+ of them thought · 24 read")
    )
    last.locator(".title").click()
    expect(last.locator(".content")).to_contain_text("3333 + 4444 = 7777")


def test_stop_ends_the_request(visit: Visit, live: Live) -> None:
    closed = live.fake.closed_early
    visit.ask("slow", answered=False)
    expect(visit.page.locator("#hadal-chat .content")).to_contain_text("Counting")
    visit.page.locator("#hadal-box .stop-button").click()
    expect(visit.page.locator(FIGURES)).to_contain_text("Stopped")
    visit.idle()
    wait_until(visit, lambda: live.fake.closed_early == closed + 1)
    turn = visit.stored()["slow"]["turns"][0]
    assert turn["status"] == "stopped" and turn["reasoning"].startswith("Counting slowly.")


def test_closing_the_tab_ends_the_request(visit: Visit, live: Live) -> None:
    closed = live.fake.closed_early
    visit.ask("slow", answered=False)
    expect(visit.page.locator("#hadal-chat .content")).to_contain_text("Counting")
    visit.page.close()
    visit.page = visit.open()
    wait_until(visit, lambda: live.fake.closed_early == closed + 1)


def test_retry_asks_again_in_place(visit: Visit) -> None:
    visit.ask("1 + 1")
    first = visit.page.locator(ANSWERS).last.inner_text()
    visit.page.get_by_label("Retry").click()
    expect(visit.page.locator(ANSWERS)).not_to_contain_text(re.search(r"asked \d+", first).group())  # type: ignore[union-attr]
    expect(visit.page.locator(ANSWERS)).to_contain_text("The sum is 2")
    visit.idle()
    assert len(visit.stored()["1 + 1"]["turns"]) == 1


def test_edit_replaces_what_followed(visit: Visit, live: Live) -> None:
    visit.ask("1 + 1")
    visit.ask("2 + 2")
    first = visit.page.locator("#hadal-chat .user-row").first
    first.hover()
    visit.page.get_by_label("Edit").first.click()
    area = visit.page.locator("#hadal-chat textarea")
    expect(area).to_have_value("1 + 1")
    area.fill("5 + 5")
    visit.page.get_by_label("Submit").click()
    expect(visit.page.locator(ANSWERS)).to_have_count(1)
    expect(visit.page.locator(ANSWERS)).to_contain_text("The sum is 10")
    visit.idle()
    assert [m["content"] for m in live.fake.requests[-1]["messages"]] == ["5 + 5"]
    assert [t["question"] for t in visit.stored()["5 + 5"]["turns"]] == ["5 + 5"]


def test_undo_and_clear(visit: Visit) -> None:
    visit.ask("1 + 1")
    visit.ask("2 + 2")
    visit.page.get_by_label("Undo").first.click()
    expect(visit.page.locator(BOX)).to_have_value("2 + 2")
    expect(visit.page.locator(ANSWERS)).to_have_count(1)
    visit.page.get_by_label("Clear").click()
    expect(visit.page.locator(ANSWERS)).to_have_count(0)
    expect(visit.page.locator(".hadal-welcome")).to_be_visible()
    wait_until(visit, lambda: visit.stored() == {})


def test_example_questions_can_be_clicked(visit: Visit) -> None:
    visit.page.get_by_text("What is 347 + 586?").click()
    expect(visit.page.locator(ANSWERS)).to_contain_text("The sum is 933")
    visit.idle()


def test_follow_up_carries_the_history(visit: Visit, live: Live) -> None:
    visit.ask("1 + 1")
    visit.ask("2 + 2")
    sent = live.fake.requests[-1]["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"].startswith("The sum is **2**")


def test_reload_keeps_everything(visit: Visit) -> None:
    visit.ask("1 + 1")
    visit.page.reload()
    visit.ready(visit.page)
    expect(visit.page.locator(ANSWERS)).to_contain_text("The sum is 2")
    expect(visit.page.locator(ANSWERS).locator(".title")).to_contain_text("Thought for")
    expect(visit.page.locator(CHATS)).to_have_count(1)
    visit.ask("2 + 2")
    expect(visit.page.locator(ANSWERS)).to_have_count(2)


def test_several_conversations(visit: Visit) -> None:
    page = visit.page
    visit.ask("1 + 1")
    page.click("#hadal-new")
    expect(page.locator(ANSWERS)).to_have_count(0)
    visit.ask("2 + 2")
    expect(page.locator(CHATS)).to_have_text(["2 + 2", "1 + 1"])
    page.locator(CHATS, has_text="1 + 1").click()
    expect(page.locator(ANSWERS)).to_contain_text("The sum is 2 ")
    expect(page.locator(CHATS + ".selected")).to_have_text("1 + 1")

    page.click("#hadal-rename")
    title = page.locator("#hadal-title input, #hadal-title textarea")
    expect(title).to_have_value("1 + 1")
    title.fill("Easy one")
    title.press("Enter")
    expect(page.locator(CHATS, has_text="Easy one")).to_have_count(1)
    expect(title).to_have_count(0)

    with page.expect_download() as download:
        page.click("#hadal-export")
    assert download.value.suggested_filename == "Easy-one.json"
    exported = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert [m["role"] for m in exported["messages"]] == ["user", "assistant"]
    assert exported["messages"][1]["reasoning_content"].startswith("I add the numbers")

    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#hadal-delete")
    expect(page.locator(CHATS)).to_have_text(["2 + 2"])
    expect(page.locator(ANSWERS)).to_contain_text("The sum is 4")
    assert set(visit.stored()) == {"2 + 2"}


def test_switching_while_it_thinks_stops_and_keeps_the_answer(visit: Visit) -> None:
    visit.ask("slow", answered=False)
    expect(visit.page.locator("#hadal-chat .content")).to_contain_text("Counting")
    visit.page.click("#hadal-new")
    expect(visit.page.locator(".hadal-welcome")).to_be_visible()
    visit.idle()
    visit.ask("1 + 1")
    visit.page.locator(CHATS, has_text="slow").click()
    expect(visit.page.locator(FIGURES, has_text="Stopped")).to_have_count(1)
    visit.page.reload()  # on a busy machine Gradio may leave the old conversation's nodes beside the new ones
    visit.ready(visit.page)
    expect(visit.page.locator(FIGURES)).to_have_count(1)
    expect(visit.page.locator(ANSWERS)).to_have_count(1)


def test_a_question_asked_while_a_slow_server_switches_is_not_lost(visit: Visit) -> None:
    visit.ask("1 + 1")
    page = visit.page
    slow = 0.4  # seconds that each of the page's calls takes on its way
    page.route("**/gradio_api/queue/join*", lambda route: (time.sleep(slow), route.continue_()))
    page.click("#hadal-new")
    page.fill(BOX, "2 + 2")
    page.press(BOX, "Enter")
    expect(page.locator(FIGURES)).to_have_count(1)
    visit.idle()
    page.unroute_all()
    visit.settled()
    page.wait_for_timeout(300)
    expect(page.locator(ANSWERS)).to_contain_text("The sum is 4")
    assert set(visit.stored()) == {"1 + 1", "2 + 2"}


def test_two_tabs_do_not_overwrite_each_other(visit: Visit) -> None:
    first, second = visit.page, visit.open()
    visit.ask("1 + 1")
    visit.page = second
    visit.page.click("#hadal-new")
    visit.ask("2 + 2")
    visit.page = first
    visit.ask("3 + 3")
    stored = visit.stored()
    assert {title: len(chat["turns"]) for title, chat in stored.items()} == {"1 + 1": 2, "2 + 2": 1}
    first.reload()
    visit.ready(first)
    expect(first.locator(CHATS)).to_have_count(2)
    expect(first.locator(ANSWERS)).to_have_count(2)


def test_model_output_is_inert(visit: Visit) -> None:
    page = visit.page
    visit.ask("show me html")
    page.locator(ANSWERS).locator(".title").click()
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    answer = page.locator(ANSWERS)
    expect(answer).to_contain_text("<script>window.hacked = 1</script>")  # shown as what it is
    expect(answer).to_contain_text("![remote]")
    assert (
        answer.locator(".message-content").locator("script, img, iframe, form, input, [onerror]").count() == 0
    )
    assert answer.locator("code").inner_text() == "<b>code stays</b>"
    links = answer.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href') || '')")
    assert all(not link.startswith("javascript") for link in links)


def test_what_a_visitor_pastes_is_inert_too(visit: Visit) -> None:
    hostile = (
        '<img src=x onerror="window.hacked=1"><img src="http://images.example/p.png"> '
        "<details open ontoggle=window.hacked=2>x</details> ![i](http://images.example/q.png)"
    )
    visit.ask(hostile + " 1")
    visit.page.reload()
    visit.ready(visit.page)
    visit.page.wait_for_timeout(300)
    assert visit.page.evaluate("window.hacked") is None
    # Gradio's sanitiser meets the handler before it drops it; the policy reports that it was blocked.
    visit.complaints = [c for c in visit.complaints if "Content Security Policy" not in c]


def test_markdown_code_and_latex(visit: Visit) -> None:
    visit.ask("math please")
    answer = visit.page.locator(ANSWERS)
    expect(answer.locator(".katex")).to_have_count(3)
    expect(answer.locator(".katex-error")).to_have_count(0)
    expect(answer.locator("table")).to_be_visible()
    expect(answer.locator("pre code.language-python span").first).to_be_visible()  # highlighted
    expect(answer.locator("strong")).to_have_text("Euclid")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("busy", "its queue is full"),
        ("long", "longer than the model can read"),
        ("cut 1 2", "ended the answer early"),
    ],
)
def test_errors_in_plain_words(visit: Visit, question: str, message: str) -> None:
    visit.ask(question)
    expect(visit.page.locator(".hadal-error")).to_contain_text(message)
    visit.ask("1 + 1")  # the page still works
    expect(visit.page.locator(ANSWERS).last).to_contain_text("The sum is 2")


def test_settings_reach_the_request_and_survive_a_reload(visit: Visit, live: Live) -> None:
    page = visit.page
    page.click("#hadal-right .toggle-button")
    page.fill("#hadal-system textarea", "Answer in French.")
    page.uncheck("#hadal-thinking input")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Most tokens").fill("99")
    page.get_by_label("Most tokens").blur()
    visit.ask("1 + 1")
    body = live.fake.requests[-1]
    assert body["messages"][0] == {"role": "system", "content": "Answer in French."}
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.25, 7, 99)
    assert body["thinking"] == {"type": "disabled"} and "top_k" not in body
    expect(page.locator("#hadal-chat .thought-group")).to_have_count(0)
    page.reload()
    visit.ready(page)
    page.click("#hadal-right .toggle-button")
    expect(page.locator("#hadal-system textarea")).to_have_value("Answer in French.")
    expect(page.locator("#hadal-thinking input")).not_to_be_checked()
    page.get_by_role("button", name="Back to defaults").click()
    expect(page.locator("#hadal-system textarea")).to_have_value("")
    visit.ask("2 + 2")
    assert live.fake.requests[-1]["thinking"] == {"type": "enabled"}
    assert "seed" not in live.fake.requests[-1]


def test_a_model_without_the_choice_shows_no_switch_for_thinking(visit: Visit, live: Live) -> None:
    page = visit.page
    page.click("#hadal-right .toggle-button")
    page.uncheck("#hadal-thinking input")
    page.click("#hadal-model input")
    page.get_by_role("option", name="other").click()
    expect(page.locator("#hadal-thinking input")).to_have_count(0)
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "The model's own: 0.25")
    visit.ask("1 + 1")
    body = live.fake.requests[-1]
    assert body["model"] == "other"
    assert not {"thinking", "temperature", "top_p"} & body.keys()


def test_a_bad_setting_is_named(visit: Visit) -> None:
    visit.page.click("#hadal-right .toggle-button")
    visit.page.get_by_label("Seed").fill("many")
    visit.ask("1 + 1", answered=False)
    expect(
        visit.page.get_by_text("Seed is 'many': it must be empty or a whole number from 0")
    ).to_be_visible()
    visit.page.locator(".toast-close").click()
    visit.complaints = [c for c in visit.complaints if "Seed is 'many'" not in c]


def test_model_picker(visit: Visit, live: Live) -> None:
    visit.page.click("#hadal-model input")
    visit.page.get_by_role("option", name="other").click()
    expect(visit.page.locator("#hadal-note")).to_contain_text("It can be wrong")
    visit.ask("1 + 1")
    assert live.fake.requests[-1]["model"] == "other"


def test_keyboard(visit: Visit, live: Live) -> None:
    visit.page.focus(BOX)
    visit.page.keyboard.type("1 +")
    visit.page.keyboard.press("Shift+Enter")
    visit.page.keyboard.type("1")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator(ANSWERS)).to_contain_text("The sum is 2")
    visit.idle()
    assert live.fake.requests[-1]["messages"][-1]["content"] == "1 +\n1"


def test_copy_takes_the_answer_alone(visitor: Visitor) -> None:
    visit = visitor(permissions=["clipboard-read", "clipboard-write"])
    visit.ask("1 + 1")
    visit.page.locator("#hadal-chat .message-buttons-left").get_by_label("Copy message").click()
    copied = re.compile(r"The sum is \*\*2\*\* \(asked \d+\)\.")
    wait_until(visit, lambda: bool(copied.fullmatch(visit.page.evaluate("navigator.clipboard.readText()"))))


def test_a_key_is_asked_for_and_kept_in_the_browser(visitor: Visitor, live_with_key: Live) -> None:
    visit = visitor(live_with_key, ready=False)
    page = visit.page
    expect(page.locator("#hadal-note .hadal-alarm")).to_contain_text("asks for an API key")
    page.click("#hadal-right .toggle-button")
    page.fill("#hadal-key input", "correct-horse")
    page.press("#hadal-key input", "Enter")
    expect(page.locator("#hadal-model input")).to_have_value("hadal-mini")
    visit.ask("1 + 1")
    expect(page.locator(ANSWERS)).to_contain_text("The sum is 2")
    page.reload()
    visit.ready(page)
    visit.ask("2 + 2")
    expect(page.locator(ANSWERS).last).to_contain_text("The sum is 4")


def test_the_key_that_opened_the_page_is_used(visitor: Visitor, live_with_key: Live) -> None:
    visit = visitor(live_with_key, extra_http_headers={"Authorization": "Bearer correct-horse"})
    visit.ask("1 + 1")
    expect(visit.page.locator(ANSWERS)).to_contain_text("The sum is 2")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks(visitor: Visitor, scheme: str) -> None:
    visit = visitor(color_scheme=scheme)
    visit.ask("What is 347 + 586?")
    visit.page.locator(ANSWERS).locator(".title").click()
    visit.ask("math please")
    visit.page.wait_for_timeout(400)
    visit.picture(f"chat-{scheme}")

    def light() -> bool:
        background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", background)[:3])) > 380

    wait_until(visit, lambda: light() == (scheme == "light"))


def test_phone(visitor: Visitor) -> None:
    visit = visitor(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = visit.page
    page.wait_for_timeout(500)
    left = page.locator("#hadal-left")
    expect(left).not_to_have_class(re.compile(r"\bopen\b"))
    visit.picture("welcome-phone")
    visit.ask("math please")
    visit.picture("chat-phone")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    box, send = page.locator("#hadal-box").bounding_box(), page.locator(".submit-button").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
    assert send["width"] >= 32 and send["height"] >= 32
    page.locator("#hadal-left .toggle-button").tap()
    expect(page.locator(CHATS)).to_be_in_viewport()
    page.wait_for_timeout(400)  # the panel slides in
    visit.picture("list-phone")
    page.locator("#hadal-new").tap()
    expect(left).not_to_have_class(re.compile(r"\bopen\b"))
    expect(page.locator(".hadal-welcome")).to_be_visible()
