"""Comparison of two numbers, the largest or smallest of several, sorting.

Numbers are padded to one length; then digits decide from the left. The largest of several is found by
striking out: best first digit, who has it, best second digit among those. Sorting takes the smallest
(or largest) again and again, and writes what remains.
"""

from __future__ import annotations

import random

from hadal.data.puzzles.columns import digits_until_different
from hadal.data.puzzles.task import Problem, Solution, pick, size
from hadal.data.puzzles.wording import Templates, listed, phrase, slips

Words = dict[str, str]

# ---- two numbers ------------------------------------------------------------------------------------


def draw_comparison(rng: random.Random) -> Problem:
    """Kinds: `larger`, `smaller`, and the question `is a larger than b`. Whole, negative or decimal."""
    kind = pick(rng, (("larger", 0.45), ("smaller", 0.25), ("is", 0.30)))
    form = pick(rng, (("whole", 0.65), ("decimal", 0.23), ("negative", 0.12)))
    a, b = _pair(rng, form)
    while a == b:
        a, b = _pair(rng, form)
    point = "," if form == "decimal" and rng.random() < 0.5 else "."
    bigger = _is_larger(a, b)
    if kind == "is":
        gold: tuple[str, ...] = ("yes", "oui", "sim") if bigger else ("no", "non", "não")
    else:
        gold = (a if bigger == (kind == "larger") else b,)
    key = f"{kind}:{a}?{b}" if kind == "is" else f"{kind}:{min(a, b)}?{max(a, b)}"
    level = 0 if form == "whole" and max(len(a), len(b)) <= 3 else 1
    return Problem("comparison", kind, (a, b, point), key, level, gold)


def _pair(rng: random.Random, form: str) -> tuple[str, str]:
    if form == "whole":
        digits = rng.randint(1, 6)
        a = size(rng, digits)
        b = size(rng, digits if rng.random() < 0.75 else rng.randint(1, 6))
        if digits > 1 and rng.random() < 0.3:  # nearly equal numbers
            b = max(0, a + rng.choice((-20, -9, -2, -1, 1, 2, 9, 20)))
        return str(a), str(b)
    if form == "negative":
        a, b = size(rng, rng.randint(1, 3)), size(rng, rng.randint(1, 3))
        return str(-a), str(-b if rng.random() < 0.5 else b)
    whole = size(rng, rng.randint(1, 2))
    other = whole if rng.random() < 0.7 else size(rng, rng.randint(1, 2))
    return f"{whole}.{_fraction(rng)}", f"{other}.{_fraction(rng)}"


def _fraction(rng: random.Random) -> str:
    digits = rng.randint(1, 3)
    return f"{rng.randrange(10**digits):0{digits}d}"[:-1] + str(rng.randint(1, 9))


def _padded(a: str, b: str) -> tuple[str, str]:
    """Same number of digits before and after the point, signs dropped: `3.9, 12.14` → `03.90, 12.14`."""
    (wa, _, fa), (wb, _, fb) = a.lstrip("-").partition("."), b.lstrip("-").partition(".")
    before, after = max(len(wa), len(wb)), max(len(fa), len(fb))
    x, y = wa.zfill(before), wb.zfill(before)
    return (f"{x}.{fa.ljust(after, '0')}", f"{y}.{fb.ljust(after, '0')}") if after else (x, y)


def _is_larger(a: str, b: str) -> bool:
    if a.startswith("-") != b.startswith("-"):
        return b.startswith("-")
    x, y = _padded(a, b)
    return (x > y) != a.startswith("-")


_DIGIT_BY_DIGIT: Words = {
    "en": "I compare digit by digit.",
    "fr": "Je compare chiffre par chiffre.",
    "pt": "Comparo dígito por dígito.",
}
_SIGNS: Words = {
    "en": "A negative number is smaller.",
    "fr": "Un nombre négatif est plus petit.",
    "pt": "Um número negativo é menor.",
}
_BOTH_NEGATIVE: Words = {
    "en": "Both negative: the order turns round.",
    "fr": "Deux négatifs : l'ordre s'inverse.",
    "pt": "Dois negativos: a ordem inverte-se.",
}
_ANSWER: dict[str, Words] = {
    "larger": {"en": "The larger is **{v}**", "fr": "Le plus grand est **{v}**", "pt": "O maior é **{v}**"},
    "smaller": {"en": "The smaller is **{v}**", "fr": "Le plus petit est **{v}**", "pt": "O menor é **{v}**"},
    "is": {
        "en": "Is {a} larger than {b}? **{v}**",
        "fr": "{a} est-il plus grand que {b} ? **{v}**",
        "pt": "{a} é maior que {b}? **{v}**",
    },
}


def solve_comparison(problem: Problem, language: str) -> Solution:
    a, b, point = problem.args
    relation = f"{a} > {b}" if _is_larger(a, b) else f"{a} < {b}"
    lines = []
    if a.startswith("-") != b.startswith("-"):
        lines.append(_SIGNS[language])
    else:
        x, y = _padded(a, b)
        lines += [_DIGIT_BY_DIGIT[language], f"{x} ? {y}: {digits_until_different(x, y)}"]
        if a.startswith("-"):
            lines.append(_BOTH_NEGATIVE[language])
    lines.append(relation)
    value = problem.gold[("en", "fr", "pt").index(language)] if problem.kind == "is" else problem.gold[0]
    answer = _ANSWER[problem.kind][language].format(a=a, b=b, v=value)
    text = "\n".join(lines)
    if point == ",":
        text, answer = _comma(text, a, b), _comma(answer, a, b)
    return Solution(text, answer)


def _comma(text: str, a: str, b: str) -> str:
    for number in {a, b, *_padded(a, b)}:
        text = text.replace(number, number.replace(".", ","))
    return text


LARGER: dict[str, Templates] = {
    "en": (
        "Which [is|number is] [larger|bigger|greater][,|:] {a} or {b}[?|]",
        "[Which is|What is|What's] the [larger|bigger|greater|largest] of {a} and {b}[?|]",
        "{a} or {b}[,|:] which is [larger|bigger|greater][?|]",
        "{a} or {b}, the [bigger|larger] one[?|]",
        "[Tell me|Say] which is [bigger|larger|greater]: {a} or {b}[.|]",
        "Compare {a} [and|with|to] {b}[.|]",
        "[Compare|compare][:|] {a}, {b}",
        "[Larger|Bigger|Greater] number: {a} or {b}[?|]",
        "Between {a} and {b}, which is [larger|bigger|the greater][?|]",
        "max({a}, {b})",
        "[Maximum|The maximum|Max] of {a} and {b}[?|]",
        "What is more, {a} or {b}[?|]",
        "Find the [greater|larger|bigger] of {a} and {b}[.|]",
    ),
    "fr": (
        "[Quel est|Lequel est] le plus grand[,| :] {a} ou {b}[ ?|?|]",
        "[Quel est|C'est quoi] le plus grand de {a} et {b}[ ?|?|]",
        "{a} ou {b}[,| :] lequel est le plus grand[ ?|?|]",
        "{a} ou {b}, le plus grand[ ?|?|]",
        "Dis-moi lequel est le plus grand : {a} ou {b}[.|]",
        "Compare {a} [et|avec|à] {b}[.|]",
        "[Compare|compare|Comparer] [: |]{a}, {b}",
        "[Le plus grand nombre|Plus grand nombre|Le plus grand] : {a} ou {b}[ ?|?|]",
        "Entre {a} et {b}, [lequel|quel nombre] est le plus grand[ ?|?|]",
        "max({a}, {b})",
        "[Maximum|Le maximum|Le max] de {a} et {b}[ ?|?|]",
        "Qu'est-ce qui est plus grand, {a} ou {b}[ ?|?|]",
        "Trouve le plus grand de {a} et {b}[.|]",
    ),
    "pt": (
        "[Qual é|Qual é o número|Qual] maior[,|:] {a} ou {b}[?|]",
        "[Qual é|Diga] o maior de {a} e {b}[?|]",
        "{a} ou {b}[,|:] qual é [o |]maior[?|]",
        "{a} ou {b}, o maior[?|]",
        "[Diga-me|Me diga] qual é [o |]maior: {a} ou {b}[.|]",
        "Compare {a} [e|com|a] {b}[.|]",
        "[Compare|compare|Comparar][:|] {a}, {b}",
        "[O maior número|Número maior|O maior]: {a} ou {b}[?|]",
        "Entre {a} e {b}, qual é [o |]maior[?|]",
        "max({a}, {b})",
        "[Máximo|O máximo|Máx] de {a} e {b}[?|]",
        "O que é maior, {a} ou {b}[?|]",
        "[Ache|Encontre] o maior de {a} e {b}[.|]",
    ),
}
SMALLER: dict[str, Templates] = {
    "en": (
        "Which [is|number is] [smaller|less|lower][,|:] {a} or {b}[?|]",
        "[Which is|What is|What's] the [smaller|lesser|smallest] of {a} and {b}[?|]",
        "{a} or {b}[,|:] which is [smaller|less][?|]",
        "{a} or {b}, the [smaller|lower] one[?|]",
        "[Tell me|Say] which is [smaller|less]: {a} or {b}[.|]",
        "[Smaller|Lower] number: {a} or {b}[?|]",
        "Between {a} and {b}, which is [smaller|the smaller|less][?|]",
        "min({a}, {b})",
        "[Minimum|The minimum|Min] of {a} and {b}[?|]",
        "What is less, {a} or {b}[?|]",
        "Find the [smaller|lesser] of {a} and {b}[.|]",
        "[Give me|I want] the smaller number, {a} or {b}[?|]",
    ),
    "fr": (
        "[Quel est|Lequel est] le plus petit[,| :] {a} ou {b}[ ?|?|]",
        "[Quel est|C'est quoi] le plus petit de {a} et {b}[ ?|?|]",
        "{a} ou {b}[,| :] lequel est le plus petit[ ?|?|]",
        "{a} ou {b}, le plus petit[ ?|?|]",
        "Dis-moi lequel est le plus petit : {a} ou {b}[.|]",
        "[Le plus petit nombre|Plus petit nombre|Le plus petit] : {a} ou {b}[ ?|?|]",
        "Entre {a} et {b}, [lequel|quel nombre] est le plus petit[ ?|?|]",
        "min({a}, {b})",
        "[Minimum|Le minimum|Le min] de {a} et {b}[ ?|?|]",
        "Qu'est-ce qui est plus petit, {a} ou {b}[ ?|?|]",
        "Trouve le plus petit de {a} et {b}[.|]",
        "[Donne-moi|Je veux] le plus petit, {a} ou {b}[ ?|]",
    ),
    "pt": (
        "[Qual é|Qual é o número|Qual] menor[,|:] {a} ou {b}[?|]",
        "[Qual é|Diga] o menor de {a} e {b}[?|]",
        "{a} ou {b}[,|:] qual é [o |]menor[?|]",
        "{a} ou {b}, o menor[?|]",
        "[Diga-me|Me diga] qual é [o |]menor: {a} ou {b}[.|]",
        "[O menor número|Número menor|O menor]: {a} ou {b}[?|]",
        "Entre {a} e {b}, qual é [o |]menor[?|]",
        "min({a}, {b})",
        "[Mínimo|O mínimo|Mín] de {a} e {b}[?|]",
        "O que é menor, {a} ou {b}[?|]",
        "[Ache|Encontre] o menor de {a} e {b}[.|]",
        "[Me dê|Quero] o menor, {a} ou {b}[?|]",
    ),
}
IS_LARGER: dict[str, Templates] = {
    "en": (
        "Is {a} [larger|bigger|greater|more] than {b}[?|]",
        "[is|Is it true that|True or false:] {a} > {b}[?|]",
        "{a} > {b}[?| ?]",
        "Is {a} > {b}[?|]",
        "[Tell me if|Check if|Do you think] {a} is [larger|bigger|greater] than {b}[.|]",
    ),
    "fr": (
        "[Est-ce que |]{a} est[-il|] plus grand que {b}[ ?|?|]",
        "[Est-ce que|Est-il vrai que|Vrai ou faux :] {a} > {b}[ ?|?|]",
        "{a} > {b}[ ?|?]",
        "[Dis-moi si|Vérifie si] {a} est plus grand que {b}[.|]",
        "{a} est-il supérieur à {b}[ ?|?|]",
    ),
    "pt": (
        "{a} é maior [que|do que] {b}[?|]",
        "[Será que|É verdade que|Verdadeiro ou falso:] {a} > {b}[?|]",
        "{a} > {b}[?| ?]",
        "[Diga-me se|Verifique se|Diga se] {a} é maior [que|do que] {b}[.|]",
        "O número {a} é maior [que|do que] {b}[?|]",
    ),
}


def ask_comparison(problem: Problem, language: str, rng: random.Random) -> str:
    a, b, point = problem.args
    if point == ",":
        a, b = a.replace(".", ","), b.replace(".", ",")
    table = {"larger": LARGER, "smaller": SMALLER, "is": IS_LARGER}[problem.kind]
    return slips(rng, phrase(rng, table[language], a=a, b=b), language)


# ---- several numbers --------------------------------------------------------------------------------


def _several(rng: random.Random, low: int, high: int) -> list[int]:
    count, digits = rng.randint(low, high), pick(rng, ((1, 0.15), (2, 0.5), (3, 0.35)))
    numbers = [size(rng, digits if rng.random() < 0.8 else rng.randint(1, digits)) for _ in range(count)]
    if digits > 1 and rng.random() < 0.3:  # share a first digit, so that the next ones decide
        i, j = rng.sample(range(count), 2)
        numbers[i] = int(str(numbers[j])[0] + str(numbers[i])[1:])
    return numbers


def draw_extreme(rng: random.Random) -> Problem:
    kind = rng.choice(("largest", "smallest"))
    numbers = _several(rng, 3, 6)
    gold = max(numbers) if kind == "largest" else min(numbers)
    key = f"{kind}:{sorted(numbers)}"
    return Problem("extreme", kind, tuple(numbers), key, 0 if len(numbers) < 5 else 1, (str(gold),))


def extreme_lines(numbers: list[int], largest: bool) -> list[str]:
    """Strike out by digits from the left: `352 021 311`, `3: 352 311`, `5: 352`."""
    width = max(len(str(n)) for n in numbers)
    left = [str(n).zfill(width) for n in numbers]
    lines = [" ".join(left)]
    for column in range(width):
        best = (max if largest else min)(text[column] for text in left)
        left = [text for text in left if text[column] == best]
        lines.append(f"{best}: {' '.join(left)}")
        if len(left) == 1:
            break
    return lines


_EXTREME: dict[str, Words] = {
    "largest": {
        "en": "I keep the largest digits, from the left.",
        "fr": "Je garde les plus grands chiffres, depuis la gauche.",
        "pt": "Fico com os maiores dígitos, a partir da esquerda.",
    },
    "smallest": {
        "en": "I keep the smallest digits, from the left.",
        "fr": "Je garde les plus petits chiffres, depuis la gauche.",
        "pt": "Fico com os menores dígitos, a partir da esquerda.",
    },
}
_EXTREME_ANSWER: dict[str, Words] = {
    "largest": {"en": "The largest is **{v}**", "fr": "Le plus grand est **{v}**", "pt": "O maior é **{v}**"},
    "smallest": {"en": "The smallest is **{v}**", "fr": "Le plus petit est **{v}**", "pt": "O menor é **{v}**"},
}


def solve_extreme(problem: Problem, language: str) -> Solution:
    lines = [_EXTREME[problem.kind][language], *extreme_lines(list(problem.args), problem.kind == "largest")]
    return Solution("\n".join(lines), _EXTREME_ANSWER[problem.kind][language].format(v=problem.gold[0]))


_SUPERLATIVE: dict[str, dict[str, tuple[str, ...]]] = {
    "largest": {"en": ("largest", "biggest", "greatest", "highest"), "fr": ("plus grand",), "pt": ("maior",)},
    "smallest": {"en": ("smallest", "lowest"), "fr": ("plus petit",), "pt": ("menor",)},
}
EXTREME: dict[str, Templates] = {
    "en": (
        "[Which|What] is the {s}[:|,| of| among] {n}[?|]",
        "[Find|Give me|Tell me|Show] the {s} [of|in|number of|number in|number:] {n}[.|]",
        "{s}[:| of] {n}",
        "[The|] {s} number[:| in| among| of] {n}[?|]",
        "{n}[:|,| -] [which|what] is the {s}[?|]",
        "{n}: {s}[?|]",
        "Which of [these|these numbers|the following] is the {s}[:|?] {n}",
        "Among {n}, which [one |]is the {s}[?|]",
        "[I need|I want] the {s} of {n}[.|]",
        "What's the {s} number [here|in this list|in the list][:|?] {n}",
        "[Pick|Choose|Select] the {s} [from|of|in] {n}[.|]",
        "In the list {n}, [find|what is] the {s}[.|?|]",
    ),
    "fr": (
        "Quel est le {s}[ :|,| de| parmi] {n}[ ?|?|]",
        "[Trouve|Donne-moi|Dis-moi|Montre] le {s} [de|dans|parmi|nombre de|nombre :] {n}[.|]",
        "[Le|le] {s}[ :| de] {n}",
        "Le {s} nombre [de|parmi|dans|:] {n}[ ?|?|]",
        "{n}[ :|,] [lequel|quel nombre] est le {s}[ ?|?|]",
        "{n} : le {s}[ ?|?|]",
        "Lequel de ces nombres est le {s}[ :| ?] {n}",
        "Parmi {n}, lequel est le {s}[ ?|?|]",
        "[Je veux|Je cherche|Il me faut] le {s} de {n}[.|]",
        "Quel est le {s} nombre [de la liste|de cette liste|ici][ :| ?] {n}",
        "[Choisis|Prends] le {s} [de|parmi] {n}[.|]",
        "Dans la liste {n}, [trouve|donne] le {s}[.|]",
    ),
    "pt": (
        "Qual é o {s}[:|,| de| entre] {n}[?|]",
        "[Ache|Encontre|Me dê|Diga-me|Mostre] o {s} [de|em|entre|número de|número:] {n}[.|]",
        "[O|o] {s}[:| de] {n}",
        "O {s} número [de|entre|em|:] {n}[?|]",
        "{n}[:|,] qual é o {s}[?|]",
        "{n}: o {s}[?|]",
        "Qual destes números é o {s}[:|?] {n}",
        "Entre {n}, qual é o {s}[?|]",
        "[Quero|Preciso do|Procuro] o {s} de {n}[.|]",
        "Qual é o {s} número [da lista|desta lista|aqui][:|?] {n}",
        "[Escolha|Pegue] o {s} [de|entre] {n}[.|]",
        "Na lista {n}, [ache|encontre|diga] o {s}[.|]",
    ),
}


def ask_extreme(problem: Problem, language: str, rng: random.Random) -> str:
    n = listed(rng, [str(n) for n in problem.args], language)
    return slips(rng, phrase(rng, EXTREME[language], s=rng.choice(_SUPERLATIVE[problem.kind][language]), n=n), language)


# ---- sorting ----------------------------------------------------------------------------------------


def draw_sorting(rng: random.Random) -> Problem:
    kind = "up" if rng.random() < 0.7 else "down"
    numbers = _several(rng, 3, 7)
    ordered = sorted(numbers, reverse=kind == "down")
    level = 0 if len(numbers) < 5 and max(numbers) < 100 else 1 if len(numbers) < 6 else 2
    gold = tuple(str(n) for n in ordered)
    return Problem("sorting", kind, tuple(numbers), f"{kind}:{sorted(numbers)}", level, gold)


_SORT: dict[str, Words] = {
    "up": {
        "en": "I take the smallest each time.",
        "fr": "Je prends le plus petit à chaque fois.",
        "pt": "Tiro o menor de cada vez.",
    },
    "down": {
        "en": "I take the largest each time.",
        "fr": "Je prends le plus grand à chaque fois.",
        "pt": "Tiro o maior de cada vez.",
    },
}


def solve_sorting(problem: Problem, language: str) -> Solution:
    """`034 087 005` / `005 | 034 087` / `034 | 087` / `087`: what is taken, then what remains."""
    width = max(len(str(n)) for n in problem.args)
    left = [str(n).zfill(width) for n in problem.args]
    lines = [_SORT[problem.kind][language], " ".join(left)]
    while left:
        taken = (min if problem.kind == "up" else max)(left)
        left.remove(taken)
        lines.append(f"{taken} | {' '.join(left)}" if left else taken)
    return Solution("\n".join(lines), f"**{', '.join(problem.gold)}**")


SORT_UP: dict[str, Templates] = {
    "en": (
        "[Sort|Order|Arrange|sort] [these numbers|the numbers|the list|this list|]: {n}",
        "[Sort|Order|Rank] {n}[.|]",
        "[Sort|Order|Arrange|Put] {n} [in ascending order|in increasing order|from smallest to largest|from low to high][.|]",
        "[Put|Place] [these|the numbers|these numbers] in [order|ascending order|increasing order]: {n}",
        "{n} [sorted|in order|in ascending order|from smallest to largest|ascending][?|]",
        "sort({n})",
        "[Can you|Could you|Please] [sort|order] {n}[?|]",
        "[What is|Give me|Show me] {n} [sorted|in order|in increasing order][?|]",
        "[Sort|Arrange] from [smallest|least|lowest] to [largest|greatest|highest]: {n}",
        "Ascending order[:| of] {n}",
        "[Write|List] {n} from the smallest to the largest[.|]",
        "[I need|I want] these in order: {n}",
    ),
    "fr": (
        "[Trie|Range|Ordonne|Classe|Triez] [ces nombres|les nombres|la liste|cette liste|ceci] : {n}",
        "[Trie|Range|Ordonne|Classe] {n}[.|]",
        "[Trie|Range|Classe|Mets] {n} [dans l'ordre croissant|par ordre croissant|du plus petit au plus grand][.|]",
        "[Mets|Place] [ces nombres|les nombres] [en ordre|dans l'ordre|dans l'ordre croissant] : {n}",
        "{n} [triés|dans l'ordre|par ordre croissant|du plus petit au plus grand][ ?|?|]",
        "trier({n})",
        "[Peux-tu|Pouvez-vous|Tu peux] [trier|ranger|classer] {n}[ ?|?|]",
        "[Donne-moi|Montre-moi] {n} [triés|dans l'ordre|en ordre croissant][.|]",
        "Du plus petit au plus grand : {n}",
        "Ordre croissant[ :| de] {n}",
        "[Écris|Liste] {n} du plus petit au plus grand[.|]",
        "[Je veux|Il me faut] ces nombres dans l'ordre : {n}",
    ),
    "pt": (
        "[Ordene|Organize|Ordena|Coloque em ordem] [estes números|os números|a lista|esta lista|isto]: {n}",
        "[Ordene|Organize|Ordena] {n}[.|]",
        "[Ordene|Organize|Coloque|Ponha] {n} [em ordem crescente|por ordem crescente|do menor para o maior|do menor ao maior][.|]",
        "[Coloque|Ponha] [estes números|os números] em [ordem|ordem crescente]: {n}",
        "{n} [ordenados|em ordem|em ordem crescente|do menor para o maior][?|]",
        "ordenar({n})",
        "[Pode|Você pode|Poderia] [ordenar|organizar] {n}[?|]",
        "[Me dê|Mostre-me|Dá-me] {n} [ordenados|em ordem|em ordem crescente][.|]",
        "Do menor para o maior: {n}",
        "Ordem crescente[:| de] {n}",
        "[Escreva|Liste] {n} do menor ao maior[.|]",
        "[Quero|Preciso de] estes números em ordem: {n}",
    ),
}
SORT_DOWN: dict[str, Templates] = {
    "en": (
        "[Sort|Order|Arrange] {n} [in descending order|in decreasing order|from largest to smallest|from high to low|descending][.|]",
        "[Put|Place] [these|these numbers] in [descending|decreasing|reverse] order: {n}",
        "{n} [in descending order|from largest to smallest|in decreasing order|descending][?|]",
        "[Sort|Arrange] from [largest|greatest|highest|biggest] to [smallest|least|lowest]: {n}",
        "[Sort|Order] [these numbers|the list|] [descending|in decreasing order]: {n}",
        "Descending order[:| of] {n}",
        "[Write|List] {n} from the largest to the smallest[.|]",
    ),
    "fr": (
        "[Trie|Range|Classe|Mets] {n} [dans l'ordre décroissant|par ordre décroissant|du plus grand au plus petit][.|]",
        "[Mets|Place] ces nombres dans l'ordre décroissant : {n}",
        "{n} [par ordre décroissant|du plus grand au plus petit|en ordre décroissant][ ?|?|]",
        "Du plus grand au plus petit : {n}",
        "[Trie|Classe] [la liste|ces nombres] en ordre décroissant : {n}",
        "Ordre décroissant[ :| de] {n}",
        "[Écris|Liste] {n} du plus grand au plus petit[.|]",
    ),
    "pt": (
        "[Ordene|Organize|Coloque|Ponha] {n} [em ordem decrescente|por ordem decrescente|do maior para o menor|do maior ao menor][.|]",
        "[Coloque|Ponha] estes números em ordem decrescente: {n}",
        "{n} [em ordem decrescente|do maior para o menor|decrescente][?|]",
        "Do maior para o menor: {n}",
        "[Ordene|Organize] [a lista|estes números] em ordem decrescente: {n}",
        "Ordem decrescente[:| de] {n}",
        "[Escreva|Liste] {n} do maior ao menor[.|]",
    ),
}


def ask_sorting(problem: Problem, language: str, rng: random.Random) -> str:
    table = SORT_UP if problem.kind == "up" else SORT_DOWN
    n = listed(rng, [str(n) for n in problem.args], language)
    return slips(rng, phrase(rng, table[language], n=n), language)
