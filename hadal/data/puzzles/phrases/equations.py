"""How people ask for a solution. See `wording` for the grammar."""

from __future__ import annotations

Templates = tuple[str, ...]

EQUATION: dict[str, Templates] = {
    "en": (
        "{q}",
        "{q}",
        "{q}[, {x} = ?|, {x}?|. {x}?| {x}=?|, what is {x}?|. What is {x}?|; find {x}]",
        "[Solve|solve|Solve for {x}:|Solve the equation|Solve this equation:|Solve this:] {q}[.|]",
        "[Find|What is|Determine|Calculate|Give me] {x} [if|when|such that|so that|in|where] {q}[?|.|]",
        "If {q}, [what is {x}|find {x}|then what is {x}|what's {x}|how much is {x}][?|]",
        "[Can you|Could you|Please] solve {q}[ for {x}|][?|]",
        "[What is the value of|What value of|Value of] {x} [in|satisfies|for] {q}[?|]",
        "[Help me|I need to|How do I|How to] solve {q}[?|.|]",
        "[The equation|Equation:] {q}. [Find {x}.|What is {x}?|Solve.]",
        "[Which number|What number] {x} [gives|makes true|satisfies] {q}[?|]",
        "[Solution of|Solution to|Root of] {q}[?|]",
        "{q}, solve[ it| for {x}|][.|]",
    ),
    "fr": (
        "{q}",
        "{q}",
        "{q}[, {x} = ?|, {x} ?|. {x} ?| {x}=?|, que vaut {x} ?|. Que vaut {x} ?|; trouve {x}]",
        "[Résous|résous|Résoudre|Résolvez|Résous l'équation|Résous cette équation :|Résous ceci :] {q}[.|]",
        "[Trouve|Que vaut|Détermine|Calcule|Donne-moi] {x} [si|quand|tel que|sachant que|dans] {q}[ ?|.|]",
        "Si {q}, [que vaut {x}|trouve {x}|alors que vaut {x}|combien vaut {x}][ ?|?|]",
        "[Peux-tu|Pouvez-vous|Tu peux] résoudre {q}[ ?|?|]",
        "[Quelle est la valeur de|Valeur de|Quelle valeur de] {x} [dans|vérifie|pour] {q}[ ?|?|]",
        "[Aide-moi à|Je dois|Comment] résoudre {q}[ ?|.|]",
        "[L'équation|Équation :] {q}. [Trouve {x}.|Que vaut {x} ?|Résous.]",
        "Quel nombre {x} [donne|vérifie|satisfait] {q}[ ?|?|]",
        "[Solution de|La solution de|Racine de] {q}[ ?|]",
        "{q}, résous[ | pour {x}|][.|]",
    ),
    "pt": (
        "{q}",
        "{q}",
        "{q}[, {x} = ?|, {x}?|. {x}?| {x}=?|, quanto é {x}?|. Quanto vale {x}?|; ache {x}]",
        "[Resolva|resolva|Resolver|Resolve|Resolva a equação|Resolva esta equação:|Resolva isto:] {q}[.|]",
        "[Ache|Quanto vale|Determine|Calcule|Encontre] {x} [se|quando|tal que|sabendo que|em] {q}[?|.|]",
        "Se {q}, [quanto é {x}|ache {x}|então quanto vale {x}|qual é {x}][?|]",
        "[Pode|Você pode|Poderia] resolver {q}[?|]",
        "[Qual é o valor de|Valor de|Que valor de] {x} [em|satisfaz|para] {q}[?|]",
        "[Ajude-me a|Preciso|Como] resolver {q}[?|.|]",
        "[A equação|Equação:] {q}. [Ache {x}.|Quanto vale {x}?|Resolva.]",
        "Que número {x} [dá|satisfaz|verifica] {q}[?|]",
        "[Solução de|A solução de|Raiz de] {q}[?|]",
        "{q}, resolva[ para {x}|][.|]",
    ),
}
