"""How people ask for the next term. See `wording` for the grammar."""
# ruff: noqa: E501 (one template a line)

from __future__ import annotations

Templates = tuple[str, ...]

SEQUENCE: dict[str, Templates] = {
    "en": (
        "{t}[, ...|...|, ?| ?|, …|, _|, ]",
        "{t}, ...[ what comes next?| next?| what is next| next]",
        "[What comes next|What is next|What's next][:|?| in|] {t}[?|]",
        "[What is|What's|Find|Give me|Tell me] the next [term|number|one] [of|in|:|after] {t}[?|]",
        "[Continue|Complete|Extend] [the sequence|the series|this sequence|the pattern|]: {t}",
        "[Next|The next] [term|number][:| of| in] {t}[?|]",
        "[In|For] the sequence {t}, what is the next [term|number][?|]",
        "[Which|What] number [follows|comes after|continues] {t}[?|]",
        "Sequence: {t}. Next [term|number|one]?",
        "[Can you|Could you] [continue|complete] {t}[?|]",
        "[Find|Guess] the pattern: {t}",
        "{t}: [which number comes next|what comes next|next number][?|]",
        "[Fill in|Complete] the blank: {t}, [__|?|_]",
    ),
    "fr": (
        "{t}[, ...|...|, ?| ?|, …|, _|, ]",
        "{t}, ...[ et ensuite ?| la suite ?| suivant ?| quel est le suivant]",
        "[Quel nombre vient après|Qu'est-ce qui vient après|Quelle est la suite de|Et après] {t}[ ?|?|]",
        "[Quel est|Trouve|Donne-moi|Dis-moi] le [terme suivant|nombre suivant|prochain terme|prochain nombre][ :| de| après] {t}[ ?|?|]",
        "[Continue|Complète|Poursuis] [la suite|la série|cette suite] : {t}",
        "[Terme|Nombre|Le nombre] suivant[ :| de] {t}[ ?|?|]",
        "Dans la suite {t}, quel est le [terme suivant|nombre suivant][ ?|?|]",
        "Quel nombre [suit|vient après|continue] {t}[ ?|?|]",
        "Suite : {t}. [Terme suivant|Le suivant|Et après] ?",
        "[Peux-tu|Pouvez-vous] [continuer|compléter] {t}[ ?|?|]",
        "Trouve [la règle|le suivant] : {t}",
        "{t} : [quel est le suivant|nombre suivant|la suite][ ?|?|]",
        "Complète : {t}, [__|?|_]",
    ),
    "pt": (
        "{t}[, ...|...|, ?| ?|, …|, _|, ]",
        "{t}, ...[ e depois?| o próximo?| próximo| qual é o próximo]",
        "[O que vem depois de|Qual número vem depois de|O que vem a seguir:|E depois de] {t}[?|]",
        "[Qual é|Ache|Me dê|Diga-me] o [próximo termo|próximo número|termo seguinte|número seguinte][:| de| depois de] {t}[?|]",
        "[Continue|Complete|Continua] [a sequência|a série|esta sequência]: {t}",
        "[Próximo termo|Próximo número|O próximo][:| de] {t}[?|]",
        "Na sequência {t}, qual é o [próximo termo|próximo número][?|]",
        "Que número [segue|vem depois de|continua] {t}[?|]",
        "Sequência: {t}. [Próximo termo|O próximo|E depois]?",
        "[Pode|Você pode] [continuar|completar] {t}[?|]",
        "[Ache|Encontre] [o padrão|a regra]: {t}",
        "{t}: [qual é o próximo|próximo número|o que vem a seguir][?|]",
        "Complete: {t}, [__|?|_]",
    ),
}
