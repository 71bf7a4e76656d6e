"""How people ask for remainders. See `wording` for the grammar."""

from __future__ import annotations

Templates = tuple[str, ...]

MODULAR: dict[str, Templates] = {
    "en": (
        "{e} [mod|modulo|MOD] {m}[?|]",
        "{e} [mod|modulo] {m} [=|= ?|=?]",
        "[What is|What's|Calculate|Compute|Find|Evaluate] {e} [mod|modulo] {m}[?|]",
        "{e} % {m}[?|]",
        "{e}%{m}",
        "[What is|Find|Give me] the remainder [when {e} is divided by|of {e} divided by|of {e} by] {m}[?|]",
        "[Remainder|The remainder] of {e} [divided by|by|over] {m}[?|]",
        "[What's left|What remains] when {e} is divided by {m}[?|]",
        "Reduce {e} modulo {m}[.|]",
        "In arithmetic modulo {m}, what is {e}[?|]",
        "[How much is|Tell me|I need] {e} [mod|modulo] {m}[?|]",
        "[Compute|Work out] the residue of {e} mod {m}[.|]",
        "If I divide {e} by {m}, what is the remainder[?|]",
    ),
    "fr": (
        "{e} [mod|modulo] {m}[ ?|?|]",
        "{e} [mod|modulo] {m} [=|= ?]",
        "[Combien vaut|Combien fait|Calcule|Que vaut|Trouve] {e} [mod|modulo] {m}[ ?|?|]",
        "{e} % {m}[ ?|?|]",
        "{e}%{m}",
        "[Quel est|Trouve|Donne-moi|Calcule] le reste [de la division de|de] {e} par {m}[ ?|?|]",
        "[Reste|Le reste] de {e} [divisé par|par] {m}[ ?|?|]",
        "[Que reste-t-il|Combien reste-t-il] quand on divise {e} par {m}[ ?|?|]",
        "Réduis {e} modulo {m}[.|]",
        "Modulo {m}, combien fait {e}[ ?|?|]",
        "[Dis-moi|Je voudrais|J'ai besoin de] {e} [mod|modulo] {m}[ ?|]",
        "Si je divise {e} par {m}, quel est le reste[ ?|?|]",
    ),
    "pt": (
        "{e} [mod|módulo] {m}[?|]",
        "{e} [mod|módulo] {m} [=|= ?]",
        "[Quanto é|Quanto vale|Calcule|Ache|Quanto dá] {e} [mod|módulo] {m}[?|]",
        "{e} % {m}[?|]",
        "{e}%{m}",
        "[Qual é|Ache|Me dê|Calcule] o resto [da divisão de|de] {e} por {m}[?|]",
        "[Resto|O resto] de {e} [dividido por|por] {m}[?|]",
        "[O que sobra|Quanto sobra] quando {e} é dividido por {m}[?|]",
        "Reduza {e} módulo {m}[.|]",
        "Módulo {m}, quanto é {e}[?|]",
        "[Diga-me|Quero|Preciso de] {e} [mod|módulo] {m}[?|]",
        "Se eu dividir {e} por {m}, qual é o resto[?|]",
    ),
}
