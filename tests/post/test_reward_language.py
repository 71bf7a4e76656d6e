"""Language consistency: the mini's own reasoning, plain sentences, mixtures, Chinese, and what is no word."""

from __future__ import annotations

import pytest

from hadal.data.puzzles import TASKS, sample
from hadal.post.rewards import RewardError, Rewards, read
from hadal.post.rewards.language import count, detect
from tests.post.helpers import one, said

TEXTS = {
    "en": "First we add the two numbers, and then we check that the sum is equal to the target. Wait, let "
          "me try again: maybe there is another way to do this.",
    "fr": "D'abord nous additionnons les deux nombres, puis nous vérifions que la somme est égale à la "
          "cible. Attendons, il y a peut-être une autre manière de le faire.",
    "pt": "Primeiro somamos os dois números e depois verificamos que a soma é igual ao alvo. Espere, talvez "
          "haja uma outra maneira de fazer isso.",
    "zh": "首先我们把两个数相加，然后检查和是否等于目标。等一下，也许还有别的方法。",
}  # fmt: skip


@pytest.mark.parametrize("target", TEXTS)
@pytest.mark.parametrize("language", TEXTS)
def test_plain_sentences(language: str, target: str) -> None:
    found = count(TEXTS[language], target)
    share = found[target] / found.total()
    assert share == 1.0 if language == target else share == 0.0
    assert detect(TEXTS[language]) == language


def test_the_minis_own_reasoning_is_of_its_language() -> None:
    """All of it in its own language; in the others hardly any (a heading such as "Ratio" may be either's)."""
    foreign = []
    for name in TASKS:
        for language in ("en", "fr", "pt"):
            for index in range(15):
                think = sample(index, 5, name=name, language=language).think
                for target in ("en", "fr", "pt"):
                    found = count(think, target)
                    share = found[target] / found.total() if found.total() else 1.0
                    if target == language:
                        assert share == 1.0, think
                    else:
                        foreign.append(share)
    assert sum(foreign) / len(foreign) < 0.05


def test_a_mixture_is_worth_its_share() -> None:
    """Eight English words and eight Chinese characters."""
    text = "We add the two numbers to the sum. 然后检查是否等于</think>4"
    total = one({"kind": "language"}, said(text, opened=True, language="en"))
    assert total.value == 0.5 and total.parts["language"].verdict["words"] == {"en": 8, "zh": 8}
    assert one({"kind": "language"}, said(text, opened=True, language="zh")).value == 0.5


def test_what_is_no_word() -> None:
    text = (
        r"3x + 5 = 20, \frac{a}{b} \text{} $le la les des$ `pour dans les` <think> https://les.fr/des 7×8=56"
    )
    assert count(text, "en").total() == 0
    assert one({"kind": "language"}, said("3+4=7</think>7", opened=True, language="en")).value == 1.0
    table = {"kind": "language", "no_words": 0.25}
    assert one(table, said("3+4=7</think>7", opened=True, language="en")).value == 0.25


def test_languages_that_are_not_known_do_not_pass() -> None:
    for text in (
        "Сначала сложим два числа",
        "Zuerst addieren wir die beiden Zahlen",
        "まず二つの数を足します",
    ):
        found = count(text, "en")
        assert found["en"] == 0 and found.total() > 0, text


def test_the_part_and_the_target_of_the_recipe() -> None:
    completion = said(f"{TEXTS['fr']}</think>{TEXTS['en']}", opened=True, prompt=TEXTS["en"], language="fr")
    values = {
        (part, target): one({"kind": "language", "part": part, "target": target}, completion).value
        for part in ("reasoning", "answer")
        for target in ("record", "prompt", "fr")
    }
    assert values == {("reasoning", "record"): 1, ("reasoning", "prompt"): 0, ("reasoning", "fr"): 1,
                      ("answer", "record"): 0, ("answer", "prompt"): 1, ("answer", "fr"): 0}  # fmt: skip


def test_a_record_must_name_a_known_language() -> None:
    with Rewards(read([{"kind": "language"}])) as rewards:
        with pytest.raises(RewardError, match="lacks `language`"):
            rewards.check([{"prompt": "x"}])
        assert (
            rewards.score([said("x", language="de")])[0]
            .parts["language"]
            .failed.endswith("the record's language is 'de'; known: en, fr, pt, zh")
        )
