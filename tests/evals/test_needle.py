"""The needle grid: a perfect, a blind and a near-sighted reader get what they deserve; lengths and depths are
those asked for; pictures and tables show them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hadal.data.needles import Fact, is_held_out
from hadal.evals.needle import (
    by_length,
    columns,
    draw,
    evaluate,
    gather,
    heat_lines,
    plant,
    powers,
    shares,
    short,
)
from hadal.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parents[2] / "hadal" / "assets" / "hadal-mini"
FACT = re.compile(r"The magic number of (\w+) is (\d{5})\.")
ASKED = re.compile(r"What is the magic number of (\w+)\?")


class Said:
    def __init__(self, text: str) -> None:
        self.text = text


class Reader:
    """An engine that answers by reading: the last `sight` characters of a prompt, from the right."""

    max_model_len = 2048

    def __init__(self, sight: int = 10**9, template: object = "chat") -> None:
        self.tokenizer, self.template, self.sight = Tokenizer.load(TOKENIZER), template, sight
        self.prompts: list[list[int]] = []
        self.params: Any = None

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.tokenizer.encode(f"User: {messages[0]['content']}\nAssistant:")

    def generate(self, prompts: Any, params: Any = None) -> Any:
        self.prompts += prompts
        self.params = params
        return [Said(self._answer(self.tokenizer.decode(ids))) for ids in prompts]

    def _answer(self, text: str) -> str:
        (town,) = ASKED.findall(text)
        seen = dict(FACT.findall(text[-self.sight :]))
        return f"thinking 1</think>\n\nIt is {seen.get(town, 'unknown')}."


def test_a_perfect_reader_and_its_prompts() -> None:
    engine = Reader()
    grid = evaluate(engine, lengths=[512, 256], depths=[0, 50, 100], samples=3, title="T", settings={"a": 1})
    assert grid["accuracy"] == 1.0 and not grid["failures"] and grid["beyond"] == []
    assert (grid["lengths"], grid["depths"], grid["title"]) == ([256, 512], [0, 50, 100], "T")
    assert [c["total"] for c in grid["cells"]] == [3] * 6 and len(engine.prompts) == 18
    for cell in grid["cells"]:
        assert cell["length"] - 32 - 40 < cell["tokens"] <= cell["length"] - 32  # but for a line of haystack
    assert (engine.params.temperature, engine.params.max_tokens) == (0.0, 32)
    settings = grid["settings"]
    assert (settings["prompt"], settings["a"], settings["haystack"]) == (
        "chat template",
        1,
        "puzzles (held-out)",
    )
    assert json.loads(json.dumps(grid)) == grid
    towns = {town for ids in engine.prompts for town, _ in FACT.findall(engine.tokenizer.decode(ids))}
    assert all(map(is_held_out, towns)) and 3 <= len(towns) <= 6


def test_the_needle_stands_where_it_is_asked_for() -> None:
    engine = Reader()
    evaluate(engine, lengths=[1024], depths=[0, 25, 50, 100], samples=5)
    texts = [engine.tokenizer.decode(ids) for ids in engine.prompts]
    lengths = [
        [len(engine.encode(text.partition(end)[0])) for end in ("The magic number", "What is the magic")]
        for text in texts
    ]
    found = [before / whole for before, whole in lengths]
    for got, wanted in zip(found, [0, 0.25, 0.5, 1] * 5, strict=True):
        assert got == pytest.approx(wanted, abs=0.08)
    without = {FACT.sub("", text).replace("\n", "") for text in texts[:4]}
    assert len(without) == 1, "a sample has one haystack for all depths"
    assert all(len(FACT.findall(text)) == 1 for text in texts)


def test_a_near_sighted_reader_finds_what_is_near() -> None:
    grid = evaluate(Reader(sight=700), lengths=[256, 2048], depths=[0, 100], samples=4)
    cells = {(c["length"], c["depth"]): c["correct"] for c in grid["cells"]}
    assert cells == {(256, 0): 4, (256, 100): 4, (2048, 0): 0, (2048, 100): 4}
    assert by_length(grid) == {256: 1.0, 2048: 0.5} and grid["accuracy"] == 0.75
    assert len(grid["failures"]) == 3 and grid["failures"][0]["completion"].endswith("unknown.")


def test_lengths_that_the_model_does_not_reach_are_told() -> None:
    grid = evaluate(Reader(), lengths=[256, 4096], depths=[0, 100], samples=1)
    assert (grid["lengths"], grid["beyond"], columns(grid)) == ([256], [4096], [256, 4096])
    assert shares(grid) == [[1.0, None], [1.0, None]]
    assert heat_lines(grid, colour=False) == [
        "depth    256    4K", "   0%    100     -", " 100%    100     -", "  all    100     -"]  # fmt: skip
    assert "\x1b[30;48;5;78m  100 \x1b[0m" in heat_lines(grid, colour=True)[1]


def test_a_base_model_completes_a_text() -> None:
    engine = Reader(template=None)
    grid = evaluate(engine, lengths=[256], depths=[50], samples=2)
    assert grid["settings"]["prompt"] == "completion" and grid["accuracy"] == 1.0
    assert re.search(r"\?\nThe magic number of \w+ is$", engine.tokenizer.decode(engine.prompts[0]))


def test_any_text_as_haystack(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("The river runs below the bridge.\nIt is cold.\n", "utf-8")
    engine = Reader()
    grid = evaluate(engine, lengths=[300], depths=[40], samples=1, haystack=[book])
    assert grid["settings"]["haystack"] == ["book.txt"] and grid["accuracy"] == 1.0
    assert engine.tokenizer.decode(engine.prompts[0]).count("It is cold.") > 5


def test_the_same_seed_asks_the_same() -> None:
    one, two, other = Reader(), Reader(), Reader()
    for engine, seed in ((one, 1), (two, 1), (other, 2)):
        evaluate(engine, lengths=[256], depths=[50], samples=2, seed=seed)
    assert one.prompts == two.prompts != other.prompts


def test_parts() -> None:
    assert powers(1024, 5000) == [1024, 2048, 4096, 5000] and powers(7, 7) == [7]
    assert [short(n) for n in (512, 1024, 16384, 1500)] == ["512", "1K", "16K", "1500"]
    pile = gather(iter(["ab\n", "c\n", "defg\n"]), len, 9)
    assert (pile.lines, pile.tokens) == (["ab\n", "c\n", "defg\n"], [3, 2, 5])
    assert pile.take(2, 11) == (["defg\n", "ab\n", "c\n"], [5, 3, 2])
    fact = Fact("Rome", "12345")
    assert plant(["a\n", "b\n"], [1, 1], fact, 50) == "a\nThe magic number of Rome is 12345.\nb\n"
    assert plant([], [], fact, 50) == fact.sentence + "\n"


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="length 64 is too short"):
        evaluate(Reader(), lengths=[64])
    with pytest.raises(ValueError, match="depths from 0 to 100"):
        evaluate(Reader(), lengths=[256], depths=[101])
    with pytest.raises(ValueError, match="0 samples"):
        evaluate(Reader(), lengths=[256], samples=0)
    with pytest.raises(ValueError, match="lengths from 5 to 4"):
        powers(5, 4)


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    grids = [evaluate(Reader(sight), lengths=[256, 4096], depths=[0, 100], samples=1) for sight in (10, 9999)]
    grids[0]["title"] = "before"
    assert draw(grids, tmp_path / "new" / "grid.png").read_bytes()[1:4] == b"PNG"
    svg = draw(grids, tmp_path / "grid.svg").read_text()
    assert "<svg" in svg and draw(grids[:1], tmp_path / "one.svg").read_text() != svg
    with pytest.raises(ValueError, match="no grid"):
        draw([], tmp_path / "none.png")


def test_an_engine_of_ours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The verb, on the model on board, which has never seen a needle."""
    from tests.cli.helpers import hadal

    shown = hadal(capsys, "needle", "hadal-mini", "--from", "128", "--to", "256", "--depths", "2",
                  "--samples", "1", "--json", "--device", "cpu")  # fmt: skip
    assert shown.status == 0, shown.err
    grid = json.loads(shown.out)
    assert grid["lengths"] == [128, 256] and [c["total"] for c in grid["cells"]] == [1] * 4
    assert all(c["tokens"] <= c["length"] - 32 for c in grid["cells"])
    (tmp_path / "empty.txt").touch()
    for flags, complaint in (
        (["--from", "64"], "length 64 is too short"),
        (["--from", "128", "--haystack", str(tmp_path / "empty.txt")], "give text as haystack"),
    ):
        refused = hadal(capsys, "needle", "hadal-mini", *flags, "--device", "cpu")
        assert refused.status == 2 and complaint in refused.err and "unexpected" not in refused.err
