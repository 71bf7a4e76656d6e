"""Needles: exact lengths, splits that share nothing, answers judged by rule, any number of processes."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from hadal.data.documents import Encoder
from hadal.data.needles import (
    CITIES,
    Bank,
    Fact,
    answer,
    document,
    draw_facts,
    fill_bank,
    is_held_out,
    is_right,
    puzzle_lines,
    question,
    row,
    text_lines,
    write_needles,
)
from hadal.data.shards import Manifest, ShardError, open_shard, verify_shards
from hadal.data.stream import packed_rows
from hadal.text.tokenizer import Tokenizer
from hadal.train.domains import find_domains

TOKENIZER = Path(__file__).resolve().parents[2] / "hadal" / "assets" / "hadal-mini"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(TOKENIZER)


@pytest.fixture(scope="module")
def bank(encoder: Encoder) -> Bank:
    return fill_bank(puzzle_lines(3, "train"), encoder, 6000)


def text_of(encoder: Encoder, ids: object) -> str:
    return str(encoder.backend.decode(list(ids), skip_special_tokens=False))  # type: ignore[call-overload]


# --- facts ---
def test_splits_share_neither_towns_nor_numbers() -> None:
    rng = random.Random(0)
    train = [f for _ in range(150) for f in draw_facts(rng, "train", 5)]
    held = [f for _ in range(150) for f in draw_facts(rng, "held-out", 5)]
    assert not {f.town for f in train} & {f.town for f in held}
    assert not {f.number for f in train} & {f.number for f in held}
    assert {f.town for f in held} <= set(CITIES) and all(is_held_out(f.town) for f in held)
    assert {f.town for f in train} & set(CITIES) and {f.town for f in train} - set(CITIES)
    assert all(len(f.number) == 5 and f.number.isdigit() for f in [*train, *held])
    assert 0.1 < sum(map(is_held_out, CITIES)) / len(CITIES) < 0.3


def test_facts_of_a_document_have_different_towns() -> None:
    assert len({f.town for f in draw_facts(random.Random(1), "train", 32)}) == 32
    with pytest.raises(ValueError, match="held-out cities"):
        draw_facts(random.Random(1), "held-out", 999)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        draw_facts(random.Random(1), "test", 1)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("The magic number of Lisbon is 48213.", True),
        ("</think>\n\nIt is **48,213**.", True),
        ("It says 11111, so 48213?</think> 48213", True),
        ("48 213", True),
        ("</think> 48214", False),
        ("48213</think> I do not know", False),
        ("4821", False),
        ("482130", False),
        ("first 1, then 48213", False),
        ("", False),
    ],
)
def test_answers_are_judged_by_their_first_number(completion: str, right: bool) -> None:
    assert is_right(completion, Fact("Lisbon", "48213")) is right


def test_questions_name_the_towns_in_the_order_of_the_answers() -> None:
    facts = [Fact("Lisbon", "48213"), Fact("Rome", "10000")]
    assert question(facts[:1]) == "What is the magic number of Lisbon?"
    assert question(facts) == "What are the magic numbers of Lisbon, Rome?"
    assert answer(facts).splitlines() == [f.sentence for f in facts]
    assert question(facts, brief=True) == "Lisbon, Rome?"
    assert answer(facts, brief=True) == "Lisbon is 48213.\nRome is 10000."


def test_most_towns_of_training_can_only_be_copied() -> None:
    towns = [draw_facts(random.Random(seed), "train", 1)[0].town for seed in range(800)]
    assert len(set(towns)) > 700 and all(3 <= len(town) <= 9 and town.isalpha() for town in towns)
    assert 0.05 < sum(town in CITIES for town in towns) / len(towns) < 0.2


# --- documents ---
@pytest.mark.parametrize("length", [128, 129, 256, 1000, 4096])
def test_a_document_has_exactly_the_tokens_asked_for(length: int, bank: Bank, encoder: Encoder) -> None:
    for seed in range(20):
        assert len(document(random.Random(seed), bank, encoder, length, "train")) == length


@pytest.mark.parametrize("length", [64, 96, 128, 512, 4096])
def test_a_list_asks_for_all_of_its_facts_in_another_order(length: int, bank: Bank, encoder: Encoder) -> None:
    orders, counts = 0, []
    for seed in range(20):
        ids = document(random.Random(seed), bank, encoder, length, "train", "list")
        assert len(ids) == length
        prompt, _, completion = text_of(encoder, ids).partition("<｜Assistant｜><think>\n</think>\n\n")
        planted = [(t, n) for t, n in re.findall(r"(?:\n|>)([A-Z][a-z]+) is (\d{5})\.(?=\n)", prompt)]
        answered = re.findall(r"^(\w+) is (\d{5})\.", completion, re.MULTILINE)
        assert sorted(planted) == sorted(answered) and len(set(planted)) == len(planted)
        assert prompt.endswith(", ".join(town for town, _ in answered) + "?")
        orders += planted != answered
        counts.append(len(answered))
    most = min(32, length // 30)
    assert max(1, most // 2 - 2) <= min(counts) and max(counts) <= most
    assert orders > 10 or length < 200


def test_an_answer_goes_on_as_its_fact_did(bank: Bank, encoder: Encoder) -> None:
    """The tokens of a fact stand twice in a document, so that an answer can be copied token by token."""
    for form in ("needles", "list", "one"):
        for seed in range(10):
            ids = document(random.Random(seed), bank, encoder, 256, "held-out", form).tolist()
            found = re.findall(r"([A-Z]\w+) is (\d{5})\.", text_of(encoder, ids).rpartition("</think>")[2])
            for town, number in found:
                sentence = encoder.encode(f" {town} is {number}.")[1:-1]
                places = [i for i in range(256) if ids[i : i + len(sentence)] == sentence]
                assert len(places) == 2, (form, town)
            assert len(found) == 1 or form != "one"


def test_every_answer_stands_in_the_haystack_as_a_line(bank: Bank, encoder: Encoder) -> None:
    depths = []
    for seed in range(60):
        text = text_of(encoder, document(random.Random(seed), bank, encoder, 700, "held-out"))
        prompt, _, completion = text.partition("<｜Assistant｜><think>\n</think>\n\n")
        haystack = prompt.rpartition("\n")[0] + "\n"
        for line in completion.removesuffix("<｜end▁of▁sentence｜>").splitlines():
            assert f"\n{line}\n" in haystack or haystack.startswith(
                f"<｜begin▁of▁sentence｜><｜User｜>{line}\n"
            )
            depths.append(haystack.index(line) / len(haystack))
    assert min(depths) < 0.1 and max(depths) > 0.9 and 0.4 < float(np.mean(depths)) < 0.6


def test_only_the_answer_counts_in_full(tmp_path: Path, encoder: Encoder) -> None:
    write_needles(tmp_path, TOKENIZER, tokens=1024, context=256, share=1.0, workers=1)
    tokenizer = Tokenizer.load(TOKENIZER)
    got = packed_rows(tmp_path, 256, tokenizer.special, prompt_weight=0.25, shuffle=False).rows(0, 4)
    assert not any(got.padding) and set(np.unique(got.weight_RC)) == {0.0, 0.25, 1.0}
    counted = got.token_RC[0][got.weight_RC[0] == 1.0]
    assert text_of(encoder, counted).startswith("</think>\n\nThe magic number of ")


def test_a_document_that_is_too_short_is_refused(bank: Bank, encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="40 tokens is too short"):
        document(random.Random(0), bank, encoder, 40, "train")
    with pytest.raises(ValueError, match=r"unknown form 'poem'; forms: needles, list, one"):
        document(random.Random(0), bank, encoder, 400, "train", "poem")
    with pytest.raises(ValueError, match="bank of"):
        document(random.Random(0), bank, encoder, 9000, "train")


def test_rows_are_filled_with_documents_of_several_lengths(bank: Bank, encoder: Encoder) -> None:
    kinds = set()
    for seed in range(20):
        lengths = [len(one) for one in row(random.Random(seed), bank, encoder, 1024, "train")]
        assert sum(lengths) == 1024
        kinds.add(len(lengths))
    assert kinds == {1, 2, 4, 8}


def test_rows_with_lists_hold_shorter_documents(bank: Bank, encoder: Encoder) -> None:
    lengths: dict[int, list[bool]] = {}
    for seed in range(60):
        for one in row(random.Random(seed), bank, encoder, 512, "train", 0.5):
            is_list = "magic number" not in text_of(encoder, one)
            lengths.setdefault(len(one), []).append(is_list)
    assert sorted(lengths) == [64, 128, 256, 512] and all(lengths[64])
    rest = [is_list for length, found in lengths.items() if length > 64 for is_list in found]
    assert 0.35 < float(np.mean(rest)) < 0.65


@pytest.mark.parametrize(("context", "allowed"), [(512, {64, 128}), (300, {75, 150}), (128, {64, 128})])
def test_short_rows_hold_short_documents(
    context: int, allowed: set[int], bank: Bank, encoder: Encoder
) -> None:
    rows = [row(random.Random(n), bank, encoder, context, "train", 0.5, 1.0) for n in range(20)]
    assert {len(one) for made in rows for one in made} == allowed
    some = [row(random.Random(n), bank, encoder, 1024, "train", 0.5, 0.5) for n in range(40)]
    assert {len(one) for made in some for one in made} == {64, 128, 256, 512, 1024}


# --- shards ---
def test_shards_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    def written(name: str, workers: int, seed: int = 4) -> Manifest:
        return write_needles(
            tmp_path / name,
            TOKENIZER,
            tokens=9_000,
            context=512,
            seed=seed,
            workers=workers,
            shard_tokens=4096,
            lists=0.5,
        )

    one, two = written("a", 1), written("b", 2)
    assert one == two and len(one.shards) == 3 and verify_shards(tmp_path / "b") == two
    assert one.tokens == 18 * 512
    assert sorted(p.name for p in (tmp_path / "b").glob("*.json")) == ["manifest.json"]
    assert written("b", 1) == one
    with pytest.raises(ShardError, match="differ in seed"):
        written("b", 1, seed=5)


def test_held_out_rows_are_a_document_each_and_every_form_a_domain(tmp_path: Path, encoder: Encoder) -> None:
    def written(name: str, workers: int, lists: float) -> Manifest:
        return write_needles(
            tmp_path / name, TOKENIZER, tokens=3000, context=256, split="held-out", lists=lists,
            workers=workers,
        )  # fmt: skip

    made = written("a", 1, 0.5)
    assert made == written("b", 3, 0.5) and made != written("c", 2, 0.0)
    assert [(s.name, s.documents, s.tokens) for s in made.shards] == [
        (f"heldout-{form}-00000", 4, 1024) for form in ("one", "needles", "list")
    ]
    assert [s.name[8:-6] for s in written("c", 2, 0.0).shards] == ["one", "needles"]
    source = packed_rows(tmp_path / "a", 256, Tokenizer.load(TOKENIZER).special, shuffle=False)
    assert find_domains(source, 6).names == ("one", "needles", "list")
    texts = [text_of(encoder, source.rows(i, 1).token_RC[0]) for i in range(12)]
    assert all(text.count("The magic number of ") == 2 for text in texts[:4])
    assert all("magic" not in text for text in texts[8:])
    assert all(is_held_out(n) for text in texts for n in re.findall(r"[A-Z]\w+ is (\d{5})\.", text))


def test_any_text_can_be_the_haystack(tmp_path: Path, encoder: Encoder) -> None:
    book = tmp_path / "book.txt"
    book.write_text("A river runs.\n\n" + "The bridge is old. " * 40, "utf-8")
    lines = text_lines([book])
    assert [next(lines) for _ in range(3)] == [
        "A river runs.\n",
        "The bridge is old.\n",
        "The bridge is old.\n",
    ]
    made = write_needles(
        tmp_path / "s", TOKENIZER, tokens=600, context=200, share=1.0, haystack=[book], workers=1
    )
    tokens, _ = open_shard(tmp_path / "s", made.shards[0])
    assert "The bridge is old." in text_of(encoder, tokens)
    (tmp_path / "empty.txt").write_text("\n", "utf-8")
    with pytest.raises(ValueError, match=r"no text in .*empty\.txt"):
        next(text_lines([tmp_path / "empty.txt"]))
