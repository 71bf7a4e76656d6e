"""How people ask for a Countdown. See `wording` for the grammar."""
# ruff: noqa: E501 (one template a line)

from __future__ import annotations

Templates = tuple[str, ...]

COUNTDOWN: dict[str, Templates] = {
    "en": (
        "[Make|Reach|Get|Hit|Obtain|Build] {t} [with|from|using|out of] {n}[.|]",
        "[Make|Reach|Get] {t} using [the numbers |]{n}[, each at most once|, each once|][.|]",
        "[Using|With|Use] [the numbers |]{n}[, make|, reach|, get| to make| to reach| to get] {t}[.|]",
        "[Countdown|Countdown game|Numbers game|Numbers round]: {n}[,| ->| →|;] [target|goal|make] {t}[.|]",
        "[Countdown|countdown] {n} [->|→|=>|=|target] {t}",
        "[How can I|How do I|How to|How can you] [make|get|reach] {t} [with|from|using] {n}[?|]",
        "[Numbers|numbers]: {n}[.|,|;] [Target|target|Goal][:|] {t}[.|]",
        "[Target|Goal|target] {t}[,|:|;] [numbers|with|using] {n}[.|]",
        "[Find|Write|Give me] an expression [with|using|from] {n} [equal to|that equals|that makes|for] {t}[.|]",
        "Combine {n} to [get|make|reach] {t}[.|]",
        "[Can you|Could you] [make|reach|get] {t} [with|from|using] {n}[?|]",
        "Using the numbers {n}, create an equation that equals {t}[.|]",
        "[Use|Take] {n} and + - [×|*] [/|÷] to [make|get|reach] {t}[.|]",
    ),
    "fr": (
        "[Fais|Atteins|Obtiens|Trouve|Forme] {t} avec {n}[.|]",
        "[Fais|Atteins|Obtiens] {t} avec [les nombres |]{n}[, chacun une fois au plus|, chacun une fois|][.|]",
        "[Avec|En utilisant|Utilise] [les nombres |]{n}[, fais|, atteins|, obtiens| pour faire| pour atteindre| pour obtenir] {t}[.|]",
        "[Le compte est bon|Compte est bon|Jeu des nombres] : {n}[,| ->| →|;] [cible|objectif|fais] {t}[.|]",
        "[Le compte est bon|le compte est bon] {n} [->|→|=>|=|cible] {t}",
        "[Comment|Comment peut-on] [faire|obtenir|atteindre] {t} avec {n}[ ?|?|]",
        "[Nombres|nombres] : {n}[.|,|;] [Cible|cible|Objectif][ :|] {t}[.|]",
        "[Cible|Objectif|cible] {t}[,| :|;] [nombres|avec] {n}[.|]",
        "[Trouve|Écris|Donne] une expression avec {n} [égale à|qui vaut|qui donne] {t}[.|]",
        "Combine {n} pour [obtenir|faire|atteindre] {t}[.|]",
        "[Peux-tu|Pouvez-vous] [faire|atteindre|obtenir] {t} avec {n}[ ?|?|]",
        "Avec les nombres {n}, écris une égalité qui donne {t}[.|]",
        "[Utilise|Prends] {n} et + - [×|*] [/|÷] pour [faire|obtenir] {t}[.|]",
    ),
    "pt": (
        "[Faça|Alcance|Obtenha|Chegue a|Forme] {t} [com|usando|a partir de] {n}[.|]",
        "[Faça|Alcance|Obtenha] {t} usando [os números |]{n}[, cada um no máximo uma vez|, cada um uma vez|][.|]",
        "[Com|Usando|Use] [os números |]{n}[, faça|, obtenha|, chegue a| para fazer| para obter| para chegar a] {t}[.|]",
        "[Countdown|Jogo dos números|Jogo de números]: {n}[,| ->| →|;] [alvo|objetivo|faça] {t}[.|]",
        "[Countdown|countdown] {n} [->|→|=>|=|alvo] {t}",
        "[Como posso|Como|Como se pode] [fazer|obter|chegar a] {t} [com|usando] {n}[?|]",
        "[Números|números]: {n}[.|,|;] [Alvo|alvo|Objetivo][:|] {t}[.|]",
        "[Alvo|Objetivo|alvo] {t}[,|:|;] [números|com|usando] {n}[.|]",
        "[Ache|Escreva|Dê] uma expressão com {n} [igual a|que vale|que dá] {t}[.|]",
        "Combine {n} para [obter|fazer|chegar a] {t}[.|]",
        "[Pode|Consegue|Você consegue] [fazer|obter|chegar a] {t} com {n}[?|]",
        "Com os números {n}, escreva uma igualdade que dê {t}[.|]",
        "[Use|Pegue] {n} e + - [×|*] [/|÷] para [fazer|obter] {t}[.|]",
    ),
}
