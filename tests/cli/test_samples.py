"""`hadal samples`, in the terminal and as a page: what is asked for is shown, and hostile text stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hadal.post.samples import SamplesError, harmless, range_of, read
from tests.cli.helpers import hadal

Capture = pytest.CaptureFixture[str]
HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\u202ecipher </script><script>document.title='owned'</script>&amp;<img src=x>"
)


def write_samples(folder: Path) -> Path:
    """Two steps of two prompts, two completions each: right and wrong; a cut one; a hostile one."""
    folder.mkdir()
    lines = []
    for step in (1, 2):
        for number, task in enumerate(("sums", "count")):
            completions = [
                {"text": text, "tokens": 5 * step, "finish_reason": "length" if step == 2 else "stop",
                 "advantage": value - 0.5, "reward": value, "accuracy": value,
                 "parts": {"puzzle": {"value": value, "answer": text[:3]}}}
                for text, value in ((f"four of {step}{number}\nsecond line", 1.0), (HOSTILE, 0.0))
            ]  # fmt: skip
            record = {"prompt": f"Prompt {step}/{number} <b>{task}</b>", "task": task}
            lines.append(
                {"step": step, "number": 2 * step + number, "record": record, "completions": completions}
            )
    text = "".join(json.dumps(line) + "\n" for line in reversed(lines))
    (folder / "samples.jsonl").write_text(text + '{"step": 3}\n[]\n{"step": 3, "rec')
    return folder


def test_the_last_step_is_shown(tmp_path: Path, capsys: Capture) -> None:
    shown = hadal(capsys, "samples", str(write_samples(tmp_path / "run")))
    assert shown.status == 0 and "step 1" not in shown.out
    assert "step 2 · sums · prompt 4 · mean reward 0.500, 1 of 2 right" in shown.out
    assert "  Prompt 2/0 <b>sums</b>" in shown.out and "    four of 20\n    second line\n" in shown.out
    assert "right, reward 1.000, advantage +0.500, 10 tokens, cut off" in shown.out
    assert "\x1b" not in shown.out and "\x07" not in shown.out and "\u202e" not in shown.out
    assert "␛]0;owned␇␛[2J⟨202E⟩cipher" in shown.out


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--step", "1"], [(1, 2, 2), (1, 3, 2)]),
        (["--step", "1-2", "--task", "count"], [(1, 3, 2), (2, 5, 2)]),
        (["--verdict", "right"], [(1, 2, 1), (1, 3, 1), (2, 4, 1), (2, 5, 1)]),
        (["--reward", ":0.5", "--step", "2"], [(2, 4, 1), (2, 5, 1)]),
        (["--cut", "--limit", "1"], [(2, 5, 2)]),
        (["--search", "FOUR OF 21"], [(2, 5, 1)]),
        (["--search", "prompt 1/0"], [(1, 2, 2)]),
        (["--search", "nowhere"], []),
    ],
)
def test_filters(
    arguments: list[str], found: list[tuple[int, int, int]], tmp_path: Path, capsys: Capture
) -> None:
    """(step, prompt, completions left), as JSON."""
    shown = hadal(capsys, "samples", str(write_samples(tmp_path / "run")), "--json", *arguments)
    table = json.loads(shown.out)
    assert [(g["step"], g["number"], len(g["completions"])) for g in table] == found


def test_what_is_not_there_is_told(tmp_path: Path, capsys: Capture) -> None:
    run = str(write_samples(tmp_path / "run"))
    for arguments, status, words in (
        ([str(tmp_path)], 1, "holds no samples"),
        ([run, "--step", "4-2"], 2, "10-20, last, all"),
        ([run, "--reward", "high"], 2, "0.5:, :0, 0:1"),
        ([run, "--task", "poems"], 0, "steps 1 to 2, and the tasks count, sums"),
    ):
        shown = hadal(capsys, "samples", *arguments)
        assert shown.status == status and words in shown.err and not shown.out
    (tmp_path / "none.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SamplesError, match="holds no sample"):
        read(tmp_path / "none.jsonl")


def test_ranges_and_characters() -> None:
    assert range_of(":") == (float("-inf"), float("inf")) and range_of("-1.5:2e-1") == (-1.5, 0.2)
    assert range_of("1") == (1.0, 1.0)
    assert harmless("a\tb\nc\x00\x9b\u200b\ud800é漢") == "a\tb\nc␀⟨9B⟩⟨200B⟩⟨D800⟩é漢"


def test_the_file_holds_no_markup_of_a_model(tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "pages" / "s.html"
    run = write_samples(tmp_path / "a <run>")
    assert hadal(capsys, "samples", str(run), "--html", str(target)).status == 0
    text = target.read_text(encoding="utf-8")
    assert (
        text.count("<script") == 2 == text.count("</script>") and "<img" not in text and "<run>" not in text
    )
    assert "http" not in text.replace("http-equiv", "") and "a &lt;run&gt;" in text


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    from tests.conftest import find_chromium

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        yield browser
        browser.close()


@pytest.mark.chromium
def test_the_page_in_a_browser(chromium: Any, tmp_path: Path, capsys: Capture) -> None:
    """Filters work, hostile text is seen as written, nothing is asked of anybody."""
    target = tmp_path / "s.html"
    hadal(capsys, "samples", str(write_samples(tmp_path / "run")), "--html", str(target))
    page = chromium.new_page()
    page.set_default_timeout(60_000)
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(target.as_uri())
    page.wait_for_selector("article")
    assert page.title() == "Samples of run" and page.locator("article").count() == 8
    assert page.locator("article pre").nth(1).evaluate("node => node.textContent") == HOSTILE
    assert page.locator("main img, main script, main b b").count() == 0

    def shown(**filters: str) -> str:
        for name, value in filters.items():
            page.evaluate(
                "([id, value]) => { const f = document.getElementById(id); "
                "if (f.type === 'checkbox') f.checked = value === 'on'; else f.value = value; "
                "f.dispatchEvent(new Event('input', {bubbles: true})); }",
                [name, value],
            )
        return page.locator("#count").inner_text()

    assert shown(first="2") == "2 prompts, 4 completions"
    assert shown(verdict="wrong") == "2 prompts, 2 completions"
    assert shown(task="sums") == "1 prompts, 1 completions"
    assert shown(high="-1") == "0 prompts, 0 completions"
    assert shown(high="", verdict="", task="", first="", cut="on") == "2 prompts, 4 completions"
    assert shown(cut="", search="FOUR OF 1") == "2 prompts, 2 completions"
    assert page.locator("mark").count() == 2 and page.locator("mark").first.inner_text() == "four of 1"
    assert asked == [target.as_uri()] and faults == []
    page.close()
