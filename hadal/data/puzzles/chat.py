"""Small talk, and the polite "I only do number puzzles" for everything else.

The model knows no facts, so every question that is not one of its puzzles gets one fixed answer that says
what it can do. That covers city names and poems, mathematics beyond the puzzles, numbers that are too long,
division by zero and questions with a piece missing.
"""

from __future__ import annotations

import random

from hadal.data.puzzles.phrases.chat import (
    AROUND,
    FILL,
    GREETING,
    HOW_ARE_YOU,
    IDENTITY,
    INCOMPLETE,
    OFF_TOPIC,
    THANKS,
)
from hadal.data.puzzles.task import LANGUAGES, Problem, Solution, bold_value, pick
from hadal.data.puzzles.wording import Templates, phrase, readings, slips

_KINDS = (
    ("off-topic", 0.62),
    ("greeting", 0.09),
    ("identity", 0.10),
    ("thanks", 0.05),
    ("how", 0.03),
    ("zero", 0.03),
    ("too-long", 0.04),
    ("incomplete", 0.04),
)
_SMALL_TALK: dict[str, dict[str, Templates]] = {
    "greeting": GREETING,
    "identity": IDENTITY,
    "thanks": THANKS,
    "how": HOW_ARE_YOU,
    "incomplete": INCOMPLETE,
}


def draw_chat(rng: random.Random) -> Problem:
    """The words are part of the problem here: `args` = (language, text). Small talk is never held out."""
    kind = pick(rng, _KINDS)
    language = rng.choice(LANGUAGES)
    if kind in _SMALL_TALK:
        text = phrase(rng, _SMALL_TALK[kind][language])
        return _problem(kind, language, text, f"core:{text}")
    if kind == "zero":
        a = rng.randrange(1, 1000)
        return _problem(kind, language, f"{a} {rng.choice('÷/÷/:')} 0", f"{a}/0")
    if kind == "too-long":
        a, b = (rng.randrange(10**7, 10 ** rng.randint(8, 14)) for _ in range(2))
        if rng.random() < 0.3:
            a = rng.randrange(10, 1000)
        sign = rng.choice("+-×*÷/")
        text = f"{a} {sign} {b}" if rng.random() < 0.5 else f"{a}{sign}{b}"
        return _problem(kind, language, text, text.replace(" ", ""))
    text = off_topic(rng, language)
    return _problem(kind, language, text, f"{language}:{text.lower()}")


def _problem(kind: str, language: str, text: str, key: str) -> Problem:
    return Problem("chat", kind, (language, text), key, 0, (kind,))


_VOWELS, _CONSONANTS = "aaeeiioou", "bcdfglmnprsttvz"


def _nonsense(rng: random.Random) -> str:
    """A word that nobody knows."""
    syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
    return "".join(syllables) + rng.choice(("", "", "n", "r", "s", "l", "t"))


def off_topic(rng: random.Random, language: str) -> str:
    """A question about anything else; at times with unknown words in it, or of nothing else.

    The phrases are few and the world is large: what is not a puzzle must be declined whatever its words.
    """
    draw = rng.random()
    if draw < 0.08:
        words = [_nonsense(rng) for _ in range(rng.randint(1, 7))]
        return " ".join(words) + rng.choice(("", "", "?", ".", "!"))
    text = _filled(rng, language)
    if draw < 0.30:
        share = rng.choice((0.15, 0.3, 0.5))
        text = " ".join(
            _nonsense(rng) if w.isalpha() and rng.random() < share else w for w in text.split(" ")
        )
    elif draw < 0.35:
        words = text.split(" ") + _filled(rng, language).split(" ")
        rng.shuffle(words)
        text = " ".join(words[: rng.randint(2, 12)])
    return text


def _filled(rng: random.Random, language: str) -> str:
    """A template with names and things in its slots."""
    templates = OFF_TOPIC[language]
    options = readings(templates[int(rng.random() * len(templates))])
    text = options[int(rng.random() * len(options))]
    fill = FILL[language]
    for slot, words in fill.items():
        mark = "{" + slot + "}"
        while mark in text:
            text = text.replace(mark, words[int(rng.random() * len(words))], 1)
    while "{n}" in text:
        text = text.replace(
            "{n}",
            str(rng.choice((rng.randrange(2, 10), rng.randrange(10, 100), rng.randrange(1400, 2040)))),
            1,
        )
    return text


def chat_language(problem: Problem) -> str:
    language: str = problem.args[0]
    return language


_CAN: dict[str, str] = {
    "en": "addition, subtraction, multiplication, division, comparing, sorting, sequences, remainders, "
    "equations, Countdown",
    "fr": "additions, soustractions, multiplications, divisions, comparaisons, tris, suites, "
    "restes, équations, le compte est bon",
    "pt": "adição, subtração, multiplicação, divisão, comparação, ordenação, sequências, restos, "
    "equações, Countdown",
}
_THINK: dict[str, dict[str, str]] = {
    "greeting": {"en": "A greeting.", "fr": "Une salutation.", "pt": "Uma saudação."},
    "how": {"en": "A greeting.", "fr": "Une salutation.", "pt": "Uma saudação."},
    "thanks": {"en": "They thank me.", "fr": "On me remercie.", "pt": "Agradecem-me."},
    "identity": {
        "en": "A question about me.",
        "fr": "Une question sur moi.",
        "pt": "Uma pergunta sobre mim.",
    },
    "zero": {"en": "The divisor is 0.", "fr": "Le diviseur est 0.", "pt": "O divisor é 0."},
    "too-long": {
        "en": "These numbers are too long for me.",
        "fr": "Ces nombres sont trop longs pour moi.",
        "pt": "Estes números são longos demais para mim.",
    },
    "incomplete": {
        "en": "Something is missing.",
        "fr": "Il manque quelque chose.",
        "pt": "Falta alguma coisa.",
    },
    "off-topic": {
        "en": "Not one of my puzzles.",
        "fr": "Ce n'est pas une de mes énigmes.",
        "pt": "Não é um dos meus problemas.",
    },
}
_SAY: dict[str, dict[str, str]] = {
    "greeting": {
        "en": "Hello! I am hadal-mini, and I solve number puzzles. Try: 345 + 78",
        "fr": "Bonjour ! Je suis hadal-mini, je résous des énigmes de nombres. Essayez : 345 + 78",
        "pt": "Olá! Sou o hadal-mini e resolvo problemas de números. Experimente: 345 + 78",
    },
    "how": {
        "en": "Fine, thank you! I am ready for a number puzzle. Try: 345 + 78",
        "fr": "Bien, merci ! Je suis prêt pour une énigme de nombres. Essayez : 345 + 78",
        "pt": "Bem, obrigado! Estou pronto para um problema de números. Experimente: 345 + 78",
    },
    "thanks": {
        "en": "You are welcome! Another puzzle?",
        "fr": "Avec plaisir ! Une autre énigme ?",
        "pt": "De nada! Mais um problema?",
    },
    "identity": {
        "en": "I am hadal-mini, a very small model that only does number puzzles: {can}.",
        "fr": "Je suis hadal-mini, un tout petit modèle qui ne fait que des énigmes de nombres : {can}.",
        "pt": "Sou o hadal-mini, um modelo muito pequeno que só faz problemas de números: {can}.",
    },
    "zero": {
        "en": "A division by zero has no result.",
        "fr": "Une division par zéro n'a pas de résultat.",
        "pt": "Uma divisão por zero não tem resultado.",
    },
    "too-long": {
        "en": "Sorry, these numbers are too long for me: I only learned up to six digits.",
        "fr": "Désolé, ces nombres sont trop longs pour moi : j'ai appris jusqu'à six chiffres.",
        "pt": "Desculpe, estes números são longos demais para mim: só aprendi até seis dígitos.",
    },
    "incomplete": {
        "en": "Please give me the whole puzzle, with its numbers. Try: 345 + 78",
        "fr": "Donnez-moi l'énigme entière, avec ses nombres. Essayez : 345 + 78",
        "pt": "Dê-me o problema inteiro, com os números. Experimente: 345 + 78",
    },
    "off-topic": {
        "en": "Sorry, I cannot help with that: I only do number puzzles ({can}).",
        "fr": "Désolé, je ne peux pas vous aider : je ne fais que des énigmes de nombres ({can}).",
        "pt": "Desculpe, não posso ajudar com isso: só faço problemas de números ({can}).",
    },
}
# What an answer of each kind must say, in its language.
_MUST_SAY: dict[str, dict[str, tuple[str, ...]]] = {
    "greeting": {"en": ("hello", "puzzle"), "fr": ("bonjour", "énigme"), "pt": ("olá", "problema")},
    "how": {"en": ("thank", "puzzle"), "fr": ("merci", "énigme"), "pt": ("obrigado", "problema")},
    "thanks": {"en": ("welcome",), "fr": ("plaisir",), "pt": ("de nada",)},
    "identity": {
        "en": ("hadal-mini", "puzzles"),
        "fr": ("hadal-mini", "énigmes"),
        "pt": ("hadal-mini", "problemas"),
    },
    "zero": {
        "en": ("zero", "no result"),
        "fr": ("zéro", "pas de résultat"),
        "pt": ("zero", "não tem resultado"),
    },
    "too-long": {
        "en": ("sorry", "too long"),
        "fr": ("désolé", "trop longs"),
        "pt": ("desculpe", "longos demais"),
    },
    "incomplete": {"en": ("please", "whole puzzle"), "fr": ("énigme entière",), "pt": ("problema inteiro",)},
    "off-topic": {
        "en": ("sorry", "only do number puzzles"),
        "fr": ("désolé", "ne fais que des énigmes de nombres"),
        "pt": ("desculpe", "só faço problemas de números"),
    },
}


def solve_chat(problem: Problem, language: str) -> Solution:
    said = _SAY[problem.kind][language].format(can=_CAN[language])
    return Solution(_THINK[problem.kind][language], said)


def check_chat(problem: Problem, language: str, answer: str) -> bool:
    """The answer says what it must, in the right language, and claims no value."""
    said = answer.lower()
    return bold_value(answer) is None and all(word in said for word in _MUST_SAY[problem.kind][language])


def ask_chat(problem: Problem, language: str, rng: random.Random) -> str:
    text: str = problem.args[1]
    if problem.kind in ("zero", "too-long"):
        text = phrase(rng, AROUND[language], e=text)
    if problem.kind in ("greeting", "thanks"):
        draw = rng.random()
        return text.lower() if draw < 0.3 else text + "!" if draw < 0.4 and text[-1].isalpha() else text
    return slips(rng, text, language)
