"""How people ask for the value of an expression, and what they say before and after. See `wording` for the grammar."""
# ruff: noqa: E501 (one template a line)

from __future__ import annotations

Templates = tuple[str, ...]

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

BEFORE: dict[str, Templates] = {
    "en": (
        "[Please|please], ",
        "[Hi|Hello|Hey|hi|hello|hey][,|!] ",
        "[OK|Ok|ok|So|Well|Now|And now], ",
        "[Please|please] ",
    ),
    "fr": (
        "[S'il te plaît|S'il vous plaît|SVP|stp], ",
        "[Bonjour|Salut|bonjour|salut|Coucou][,| !] ",
        "[OK|Alors|Bon|Maintenant|Et maintenant], ",
    ),
    "pt": (
        "[Por favor|por favor|Pfv], ",
        "[Olá|Oi|olá|oi|Bom dia|Boa tarde][,|!] ",
        "[OK|Então|Bem|Agora|E agora], ",
    ),
}

AFTER: dict[str, Templates] = {
    "en": (
        " [please|pls|thanks|thank you]",
        ", [please|thanks][!|]",
        " [Thanks!|Thank you.|Show your work.|Step by step.]",
    ),
    "fr": (
        " [svp|stp|merci|s'il te plaît]",
        ", [merci|s'il vous plaît][ !|]",
        " [Merci !|Merci.|Montre les étapes.|Pas à pas.]",
    ),
    "pt": (
        " [por favor|pf|obrigado|obrigada]",
        ", [por favor|obrigado][!|]",
        " [Obrigado!|Obrigada.|Mostre os passos.|Passo a passo.]",
    ),
}
