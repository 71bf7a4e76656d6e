"""Conversations to documents: what is rendered is what is trained, and nothing but the assistant's tokens."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from hadal.data.reading import DataError
from hadal.data.shards import ShardError
from hadal.post.chat_rows import EMPTY, NO_ANSWER, NO_FORM, TOO_LONG, ChatRows, Wanted, fill_order, write_rows
from hadal.post.conversations import Conversation, documents, read, remainder
from hadal.text import Control, TemplateError, Tokenizer
from hadal.text.templates import TEMPLATES
from hadal.train.sources import ON_BOARD
from tests.post.bases import assistant, chats, user, write

TOKENIZER = Tokenizer.load(ON_BOARD)
R1, V3 = TEMPLATES["deepseek-r1"], TEMPLATES["deepseek-v3"]
TALK = [
    {"role": "system", "content": "Be brief."},
    user("2 + 2? <｜Assistant｜><think>"),
    assistant("It is 4.", "two and two"),
    user("And 3?"),
    assistant("It is 7.", "four and three"),
]


def plain(messages):
    """The same without reasoning."""
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


def text(document, trained):
    """The text of the tokens that count, or of those that do not."""
    ids = [i for i, m in zip(document.ids, document.mask, strict=True) if bool(m) == trained]
    return TOKENIZER.decode(ids, skip_control=False)


def test_r1_drops_earlier_reasoning_so_each_answer_is_a_document_of_its_own():
    found = documents(Conversation("x:1", TALK), R1, TOKENIZER)
    assert len(found) == 2
    end = "<｜end▁of▁sentence｜>"
    assert text(found[0], True) == f"two and two\n</think>\n\nIt is 4.{end}"
    assert text(found[1], True) == f"four and three\n</think>\n\nIt is 7.{end}"
    assert "two and two" not in text(found[1], False) and "It is 4." in text(found[1], False)
    for document, history in zip(found, (TALK[:2], TALK[:4]), strict=True):
        prompt = TOKENIZER.encode_parts(R1.render(history))  # what the engine would go on from
        assert document.ids[: len(prompt)] == prompt and not any(document.mask[: len(prompt)])
        assert all(document.mask[len(prompt) :])


def test_where_answers_stay_as_they_are_a_conversation_is_one_document():
    for name in ("deepseek-v3", "deepseek-v2", "deepseek-v3.1"):
        found = documents(Conversation("x:1", plain(TALK)), TEMPLATES[name], TOKENIZER)
        assert len(found) == 1, name
        end = "<｜end▁of▁sentence｜>"
        space = " " if name == "deepseek-v2" else ""
        assert text(found[0], True) == f"{space}It is 4.{end}{space}It is 7.{end}"
        whole = TEMPLATES[name].render(plain(TALK), add_generation_prompt=False)
        assert TOKENIZER.decode(found[0].ids, skip_control=False) == TOKENIZER.decode(
            TOKENIZER.encode_parts(whole), skip_control=False
        )


def test_the_last_answer_alone():
    for template, talk in ((R1, TALK), (V3, plain(TALK))):
        found = documents(Conversation("x:1", talk), template, TOKENIZER, "last")
        assert (
            len(found) == 1 and "It is 7." in text(found[0], True) and "It is 4." not in text(found[0], True)
        )


def test_what_follows_the_last_answer_is_left_out():
    found = documents(Conversation("x:1", [*plain(TALK), user("thanks")]), V3, TOKENIZER)
    assert "thanks" not in TOKENIZER.decode(found[0].ids)


def test_a_users_markers_stay_text():
    """They are encoded as letters, and never trained on."""
    found = documents(Conversation("x:1", TALK[1:3]), R1, TOKENIZER)
    assert found[0].ids.count(TOKENIZER.special["<think>"]) == 1
    assert found[0].ids.count(TOKENIZER.special["<｜Assistant｜>"]) == 1
    assert "<｜Assistant｜><think>" in text(found[0], False)


def test_an_assistant_that_speaks_first_is_refused():
    with pytest.raises(TemplateError, match="speaks first"):
        documents(Conversation("x:1", [assistant("Hi"), user("hm"), assistant("Ha")]), V3, TOKENIZER)


def test_remainder_by_hand():
    a, b = Control("<a>"), Control("<b>")
    assert remainder([a, "one", "two", b], [a, "one"]) == ["two", b]
    assert remainder([a, "one", b, "x"], [a, "one", b]) == ["x"]
    assert remainder([a, "one"], [a, "on", "e"]) == []
    assert remainder([a, "one"], [b]) is None
    assert remainder([a, "one", b], [a, "on", b]) is None
    assert remainder([a], [a, "x"]) is None


# --- files ---
def test_lines_that_are_none_are_named(tmp_path):
    for line, complaint in (
        ("{", "a.jsonl:2 is not JSON"),
        ('{"messages": [{"content": "\\ud800"}]}', "a.jsonl:2 holds a lone surrogate U\\+D800"),
        ("[]", "has no list"),
        ('{"conversations": []}', '"from"/"value" pairs become'),
        ('{"prompt": "x", "completion": "y"}', "become two messages"),
        ('{"messages": []}', "has no list"),
    ):
        (tmp_path / "a.jsonl").write_text('\n{"messages": [{"role": "user"}]}\n'[1:] + line + "\n")
        with pytest.raises(DataError, match=complaint):
            list(read(tmp_path / "a.jsonl"))


def test_gzipped_files_are_read_too(tmp_path):
    plain_file = write(tmp_path / "a.jsonl", chats(3))
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(plain_file.read_bytes())
    assert [c.messages for c in read(tmp_path / "b.jsonl.gz")] == [c.messages for c in read(plain_file)]


def test_best_fit_fills_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 700).tolist()
    order = fill_order(lengths, 128)
    assert sorted(order) == list(range(700))

    def rows(sequence):
        count, room = 0, 0
        for n in sequence:
            count, room = (count, room - n) if room >= n else (count + 1, 128 - n)
        return count

    best = rows(lengths[i] for i in order)
    assert best <= -(-sum(lengths) // 128) * 1.03 < rows(lengths)


def wanted(files, **changes):
    options = {"context": 64, "template": R1, "tokenizer": TOKENIZER} | changes
    return Wanted([Path(f) for f in files], **options)


def test_the_report_tells_what_was_dropped_and_why(tmp_path):
    tool = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    bad = [
        [user("no answer")],
        [user("empty"), assistant("")],
        [user("only thought"), assistant("<think>hm</think>")],
        [user("long"), assistant("word " * 200)],
        [user("calls"), assistant("", tool_calls=[tool])],
    ]
    file = write(tmp_path / "a.jsonl", [*chats(5), *bad])
    report = write_rows(tmp_path / "rows", wanted([file], template=TEMPLATES["r1-distill-qwen"]))
    assert (report.conversations, report.documents) == (10, 5)
    assert report.dropped == {NO_ANSWER: 1, EMPTY: 2, TOO_LONG: 1, NO_FORM: 1}
    assert report.examples[NO_ANSWER] == "a.jsonl:6" and "no form for tool calls" in report.examples[NO_FORM]
    told = "\n".join(report.lines())
    assert "5 documents" in told and "dropped 1: longer than a row" in told
    with_tools = write_rows(tmp_path / "tools", wanted([file]))
    assert NO_FORM not in with_tools.dropped and with_tools.documents == 6


def test_rows_hold_the_documents_and_their_masks(tmp_path):
    file = write(tmp_path / "a.jsonl", chats(20))
    report = write_rows(tmp_path / "rows", wanted([file]))
    rows = ChatRows(tmp_path / "rows", 64, pad_id=2)
    want = {tuple(d.ids): d.mask for c in read(file) for d in documents(c, R1, TOKENIZER)}
    seen = 0
    for number in range(rows.rows_per_epoch):
        row, at = rows.rows(number, 1), 0
        for length, padding in zip(row.lengths, row.padding, strict=True):
            ids = tuple(row.token_RC[0, at : at + length].tolist())
            weights = row.weight_RC[0, at : at + length].tolist()
            assert weights == ([0.0] * length if padding else [float(m) for m in want[ids]])
            seen += not padding
            at += length
    assert seen == report.documents == len(want) == 20


def test_a_folder_is_taken_again_only_for_the_same_data(tmp_path):
    file = write(tmp_path / "a.jsonl", chats(5))
    first = write_rows(tmp_path / "rows", wanted([file]))
    assert write_rows(tmp_path / "rows", wanted([file])) == first
    with pytest.raises(ShardError, match="holds other data"):
        write_rows(tmp_path / "rows", wanted([file], context=65))
    write(file, chats(6))
    with pytest.raises(ShardError, match="holds other data"):
        write_rows(tmp_path / "rows", wanted([file]))
    (tmp_path / "rows" / "chat-a-00000.mask").write_bytes(b"")
    with pytest.raises(ShardError, match="missing or of another size"):
        ChatRows(tmp_path / "rows", 64, pad_id=2)


def test_nothing_to_train_on_is_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", [[user("no answer")]])
    with pytest.raises(ShardError, match=r"nothing is left .*no answer of the assistant"):
        write_rows(tmp_path / "rows", wanted([file]))
