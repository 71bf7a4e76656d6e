"""How people ask: a tiny template grammar, the symbols they use, and the slips they make.

A template such as `[What is|What's] {e}[?|]` stands for all its readings; a reading is drawn by first
drawing a template, then one of its readings, so that long templates do not crowd out bare ones.
"""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from functools import cache

_CHOICE = re.compile(r"\[([^\]]*)\]")

Templates = tuple[str, ...]


@cache
def readings(template: str) -> tuple[str, ...]:
    """All readings of a template: `a[b|c]` → (`ab`, `ac`)."""
    parts = _CHOICE.split(template)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return tuple(dict.fromkeys("".join(choice) for choice in itertools.product(*options)))


def phrase(rng: random.Random, templates: Templates, **fields: object) -> str:
    """Draw a reading and fill it in."""
    options = readings(templates[int(rng.random() * len(templates))])
    return options[int(rng.random() * len(options))].format(**fields)


EXPRESSION: dict[str, Templates] = {
    "en": (
        "{e}",
        "{e}",
        "{e}",
        "{e}[=| =|=?| = ?|?| ?| =?]",
        "{e}[=| =|=?| = ?|?| ?| =?]",
        "[What is|What's|Whats|what is|what's] {e}[?|]",
        "[What is|What's|Whats|what is|what's] {e}[?|]",
        "[Calculate|Compute|Evaluate|Work out|Solve|Find|Do] {e}[.|]",
        "[Calculate|Compute|Evaluate|Work out|Solve|Find][: | this: ]{e}",
        "[Can|Could] you [please |][calculate|compute|work out|solve|do|tell me] {e}[?|]",
        "How much is {e}[?|]",
        "How much [does|do] {e} [make|give|come to][?|]",
        "[Tell me|Give me|I need|I want|I'd like] [the result of|the value of|the answer to] {e}[.|]",
        "What [does|would] {e} [equal|make|give|come to|amount to][?|]",
        "{e} [is|equals|makes|gives] [what|how much][?|]",
        "What is the [result|value|answer] of {e}[?|]",
        "[Help me with|I am stuck on|I'm stuck with|My homework:|Question:|Exercise:|Problem:] {e}[.|?|]",
        "[Quick one|Quick question|Math question|Maths|An easy one|Next][:|,] {e}[?|]",
        "[Show|Explain] [me |][how to compute|how to calculate|how to do] {e}[ step by step|][.|]",
        "Do you know [how much|what] {e} is[?|]",
        "I have to [calculate|compute|do] {e}[, can you help?|. Help!|.|]",
    ),
    "fr": (
        "{e}",
        "{e}",
        "{e}",
        "{e}[=| =|=?| = ?|?| ?| =?]",
        "{e}[=| =|=?| = ?|?| ?| =?]",
        "[Combien font|combien font|Combien fait|combien fait|Ça fait combien] {e}[ ?|?|]",
        "[Combien font|combien font|Combien fait|combien fait|Ça fait combien] {e}[ ?|?|]",
        "[Calcule|Calculez|Effectue|Résous|Trouve|Fais] {e}[.|]",
        "[Calcule|Calculez|Effectue|Résous|Trouve] [ceci |]: {e}",
        "[Peux-tu|Pouvez-vous|Tu peux|Pourrais-tu] [calculer|effectuer|me calculer|faire|résoudre] {e}[ ?|?|]",
        "[Combien vaut|Que vaut|Que font|Que fait|Quel est le total de] {e}[ ?|?|]",
        "[Quel est|C'est quoi|Donne-moi|Donnez-moi|Je voudrais|Je cherche] le résultat de {e}[ ?|?|]",
        "Quelle est la [valeur|réponse] de {e}[ ?|?|]",
        "{e}[, ça| ça|, cela] [fait|donne] combien[ ?|?|]",
        "{e} [égale|égal|est égal à] [combien|quoi][ ?|?|]",
        "[Aide-moi avec|Aidez-moi pour|Je bloque sur|Mon exercice :|Question :|Problème :] {e}[.|]",
        "[Petit calcul|Question rapide|Un facile|Calcul|Maths|Suivant] : {e}[ ?|?|]",
        "[Montre-moi|Explique-moi|Explique] comment [calculer|faire] {e}[ pas à pas|][.|]",
        "Sais-tu combien [font|fait] {e}[ ?|?|]",
        "Je dois calculer {e}[, tu peux m'aider ?|. Aide-moi !|.|]",
    ),
    "pt": (
        "{e}",
        "{e}",
        "{e}",
        "{e}[=| =|=?| = ?|?| ?| =?]",
        "{e}[=| =|=?| = ?|?| ?| =?]",
        "[Quanto é|quanto é|Quanto dá|quanto dá|Quanto são|Qto é|Quanto e] {e}[?|]",
        "[Quanto é|quanto é|Quanto dá|quanto dá|Quanto são|Qto é|Quanto e] {e}[?|]",
        "[Calcule|Calcula|Resolva|Resolve|Faça|Ache|Encontre] {e}[.|]",
        "[Calcule|Calcula|Resolva|Resolve|Faça][: | isto: | isso: ]{e}",
        "[Pode|Podes|Você pode|Poderia|Consegue] [calcular|resolver|fazer|me dizer] {e}[?|]",
        "[Quanto vale|Quanto faz|Quanto fica|Quanto resulta] {e}[?|]",
        "[Qual é|Qual|Diga-me|Me diga|Preciso de|Quero|Queria] o [resultado|valor] de {e}[?|]",
        "Qual é a resposta de {e}[?|]",
        "{e} [dá|é|são|faz|fica em] quanto[?|]",
        "{e} [é igual a|igual a] [quanto|quê][?|]",
        "[Ajude-me com|Me ajuda com|Ajuda-me com|Meu exercício:|Pergunta:|Problema:|Questão:] {e}[.|]",
        "[Conta rápida|Pergunta rápida|Uma fácil|Conta|Matemática|Próxima]: {e}[?|]",
        "[Mostre|Explique|Me explica|Mostra-me] como [calcular|fazer|resolver] {e}[ passo a passo|][.|]",
        "[Sabe|Sabes|Você sabe] quanto é {e}[?|]",
        "[Tenho que|Preciso|Tenho de] calcular {e}[, pode ajudar?|. Ajuda!|.|]",
    ),
}

_TIMES = ("×", "×", "×", "*", "*", "x", "x", "·")
_OVER = ("÷", "÷", "/", "/", ":")


def written(rng: random.Random, tokens: list[str]) -> str:
    """An expression as people type it: its symbols and its spacing. `tokens` use `+ - × ÷`."""
    draw = rng.random()
    if draw < 0.5:
        text = " ".join(tokens).replace("( ", "(").replace(" )", ")")
    elif draw < 0.93:
        text = "".join(tokens)
    else:
        text = "".join(token + (" " if rng.random() < 0.5 else "") for token in tokens).strip()
    if "×" in text:
        text = text.replace("×", _TIMES[int(rng.random() * len(_TIMES))])
    if "÷" in text:
        text = text.replace("÷", _OVER[int(rng.random() * len(_OVER))])
    if "-" in text and rng.random() < 0.15:
        text = text.replace("-", "−")
    return text


BEFORE: dict[str, Templates] = {
    "en": ("[Please|please], ", "[Hi|Hello|Hey|hi|hello|hey][,|!] ", "[OK|Ok|ok|So|Well|Now|And now], ", "[Please|please] "),
    "fr": ("[S'il te plaît|S'il vous plaît|SVP|stp], ", "[Bonjour|Salut|bonjour|salut|Coucou][,| !] ", "[OK|Alors|Bon|Maintenant|Et maintenant], "),
    "pt": ("[Por favor|por favor|Pfv], ", "[Olá|Oi|olá|oi|Bom dia|Boa tarde][,|!] ", "[OK|Então|Bem|Agora|E agora], "),
}
AFTER: dict[str, Templates] = {
    "en": (" [please|pls|thanks|thank you]", ", [please|thanks][!|]", " [Thanks!|Thank you.|Show your work.|Step by step.]"),
    "fr": (" [svp|stp|merci|s'il te plaît]", ", [merci|s'il vous plaît][ !|]", " [Merci !|Merci.|Montre les étapes.|Pas à pas.]"),
    "pt": (" [por favor|pf|obrigado|obrigada]", ", [por favor|obrigado][!|]", " [Obrigado!|Obrigada.|Mostre os passos.|Passo a passo.]"),
}


def slips(rng: random.Random, text: str, language: str) -> str:
    """The prompt with the habits of typing: politeness, lower case, lost accents, marks and letters."""
    if rng.random() < 0.35:
        return text
    if rng.random() < 0.13:
        before = phrase(rng, BEFORE[language])
        text = before + text[:1].lower() + text[1:]
    if rng.random() < 0.07:
        text += phrase(rng, AFTER[language])
    if rng.random() < 0.35:
        text = text.lower()
    if rng.random() < 0.15:
        text = text.rstrip("?.! ")
    if language != "en" and rng.random() < 0.12:
        text = without_accents(text)
    draw = rng.random()
    if draw < 0.05:
        text = _typo(rng, text)
    elif draw < 0.08:
        text = text.replace(" ", "  ", 1)
    elif draw < 0.09:
        text = " " + text
    elif draw < 0.11:
        text += " "
    elif draw < 0.12:
        text = text.upper()
    return text


def without_accents(text: str) -> str:
    """`Ça fait` → `Ca fait`. Symbols such as × and ÷ stay."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


def _typo(rng: random.Random, text: str) -> str:
    """One letter lost, doubled or exchanged with its neighbour, inside a word, never in a number."""
    places = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    draw = rng.random()
    if draw < 0.4:
        return text[:i] + text[i + 1 :]
    if draw < 0.6:
        return text[:i] + text[i] + text[i:]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def listed(rng: random.Random, items: list[str], language: str) -> str:
    """A list as people type it: `3, 1, 2`, `3 1 2`, `[3, 1, 2]`, `3, 1 and 2`."""
    draw = rng.random()
    if draw < 0.5:
        return ", ".join(items)
    if draw < 0.64:
        return " ".join(items)
    if draw < 0.72:
        return "[" + ", ".join(items) + "]"
    if draw < 0.77:
        return ",".join(items)
    if draw < 0.8:
        return "; ".join(items)
    last = {"en": " and ", "fr": " et ", "pt": " e "}[language]
    return ", ".join(items[:-1]) + last + items[-1]
