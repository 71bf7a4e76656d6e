"""Puzzles on the digits of a number: reverse it, add its digits, even or odd, divisible by k."""

from __future__ import annotations

import random

from hadal.data.puzzles.columns import divide
from hadal.data.puzzles.task import LANGUAGES, Problem, Solution, pick, size
from hadal.data.puzzles.wording import Templates, phrase, slips

Words = dict[str, str]


def draw_digits(rng: random.Random) -> Problem:
    kind = rng.choice(("reverse", "sum"))
    digits = rng.randint(2, 8) if kind == "reverse" else rng.randint(2, 7)
    n = size(rng, digits)
    if kind == "reverse" and n % 10 == 0:
        n += rng.randint(1, 9)
    gold = str(n)[::-1] if kind == "reverse" else str(sum(map(int, str(n))))
    return Problem("digits", kind, (n,), f"{kind}:{n}", 0 if digits < 5 else 1, (gold,))


_ONE_BY_ONE = {
    "reverse": {"en": "Digit by digit, from the end.", "fr": "Chiffre par chiffre, depuis la fin.", "pt": "Dígito por dígito, do fim."},
    "sum": {"en": "I add the digits one by one.", "fr": "J'additionne les chiffres un à un.", "pt": "Somo os dígitos um a um."},
}
_DIGITS_ANSWER = {
    "reverse": {"en": "{n} reversed is **{v}**", "fr": "{n} à l'envers : **{v}**", "pt": "{n} ao contrário: **{v}**"},
    "sum": {
        "en": "The digits of {n} sum to **{v}**",
        "fr": "La somme des chiffres de {n} est **{v}**",
        "pt": "A soma dos dígitos de {n} é **{v}**",
    },
}


def digit_sum_lines(n: int) -> list[str]:
    """`4 7 1 2`, `4+7=11`, `11+1=12`, `12+2=14`."""
    digits = [int(d) for d in str(n)]
    lines, total = [" ".join(map(str, digits))], digits[0]
    for digit in digits[1:]:
        lines.append(f"{total}+{digit}={total + digit}")
        total += digit
    return lines


def solve_digits(problem: Problem, language: str) -> Solution:
    n = problem.args[0]
    text = str(n)
    lines = [_ONE_BY_ONE[problem.kind][language]]
    lines += [f"{' '.join(text)} → {' '.join(text[::-1])}"] if problem.kind == "reverse" else digit_sum_lines(n)
    answer = _DIGITS_ANSWER[problem.kind][language].format(n=n, v=problem.gold[0])
    return Solution("\n".join(lines), answer)


REVERSE: dict[str, Templates] = {
    "en": (
        "[Reverse|reverse|Flip|Invert] {n}[.|]",
        "[Reverse|Flip] [the digits of|the number|the order of the digits of] {n}[.|]",
        "{n} [backwards|reversed|in reverse|written backwards][?|]",
        "[What is|What's|Give me|Write] {n} [backwards|reversed|in reverse|spelled backwards][?|]",
        "[Read|Write|Spell] {n} [backwards|from right to left|from the end][.|]",
        "reverse({n})",
        "[Turn|Put] {n} [around|backwards|the other way round][.|]",
        "[Can you|Could you|Please] reverse {n}[?|]",
        "Digits of {n} in reverse[ order|][?|]",
        "[Which|What] number do I get [if I reverse|by reversing|when I reverse] {n}[?|]",
        "[Mirror|The mirror of] {n}[.|]",
        "[Reversal|Reverse] of {n}[?|]",
    ),
    "fr": (
        "[Inverse|Renverse|Retourne] {n}[.|]",
        "[Inverse|Renverse|Retourne] [les chiffres de|le nombre|l'ordre des chiffres de] {n}[.|]",
        "{n} [à l'envers|inversé|renversé|écrit à l'envers][ ?|?|]",
        "[Que donne|Donne-moi|Écris|Quel est] {n} [à l'envers|inversé|écrit à l'envers][ ?|]",
        "[Lis|Écris] {n} [à l'envers|de droite à gauche|depuis la fin][.|]",
        "inverser({n})",
        "Mets {n} à l'envers[.|]",
        "[Peux-tu|Pouvez-vous] [inverser|renverser|retourner] {n}[ ?|?|]",
        "Chiffres de {n} [à l'envers|dans l'ordre inverse][ ?|]",
        "Quel nombre obtient-on [si on inverse|en inversant|en retournant] {n}[ ?|?|]",
        "[Le miroir|Miroir] de {n}[.|]",
        "[L'inverse des chiffres|Inversion] de {n}[ ?|]",
    ),
    "pt": (
        "[Inverta|Inverte|Vire] {n}[.|]",
        "[Inverta|Vire] [os dígitos de|o número|a ordem dos dígitos de] {n}[.|]",
        "{n} [ao contrário|invertido|de trás para frente|de trás para a frente][?|]",
        "[Quanto é|Me dê|Escreva|Qual é] {n} [ao contrário|invertido|de trás para frente][?|]",
        "[Leia|Escreva] {n} [ao contrário|da direita para a esquerda|do fim][.|]",
        "inverter({n})",
        "[Ponha|Coloque] {n} ao contrário[.|]",
        "[Pode|Você pode|Poderia] inverter {n}[?|]",
        "Dígitos de {n} [ao contrário|em ordem inversa][?|]",
        "Que número obtenho [se inverter|invertendo|ao inverter] {n}[?|]",
        "[O espelho|Espelho] de {n}[.|]",
        "[O inverso dos dígitos|Inversão] de {n}[?|]",
    ),
}
DIGIT_SUM: dict[str, Templates] = {
    "en": (
        "[Sum|Add|Add up] the digits of {n}[.|]",
        "[What is|What's|Find|Calculate|Compute] the [digit sum|sum of the digits|sum of digits] of {n}[?|]",
        "[Digit sum|Sum of digits|Sum of the digits] of {n}[?|]",
        "[What do|How much do] the digits of {n} [add up to|sum to|make][?|]",
        "digit_sum({n})",
        "Digits of {n}[,|:] [added|summed|their sum|sum][?|]",
        "[Can you|Could you|Please] add the digits of {n}[?|]",
        "{n}: [sum of digits|digit sum|sum its digits][?|]",
        "If I add [all the|the] digits of {n}, what do I get[?|]",
        "[Total|The total] of the digits of {n}[?|]",
        "Add together [all digits|each digit] of {n}[.|]",
        "[Tell me|I need|Give me] the digit sum of {n}[.|]",
    ),
    "fr": (
        "[Additionne|Ajoute] les chiffres de {n}[.|]",
        "[Quelle est|Trouve|Calcule|Donne] la somme des chiffres de {n}[ ?|?|]",
        "[Somme|La somme] des chiffres de {n}[ ?|]",
        "[Que font|Combien font|Que donnent] les chiffres de {n} [additionnés|ensemble|en tout][ ?|]",
        "somme_chiffres({n})",
        "Chiffres de {n}[,| :] [la somme|leur somme|total][ ?|]",
        "[Peux-tu|Pouvez-vous] additionner les chiffres de {n}[ ?|?|]",
        "{n} : [somme des chiffres|additionne ses chiffres][ ?|]",
        "Si j'additionne [tous les|les] chiffres de {n}, [combien|qu'est-ce que ça fait][ ?|?|]",
        "[Total|Le total] des chiffres de {n}[ ?|]",
        "Fais la somme [de tous les|des] chiffres de {n}[.|]",
        "[Dis-moi|Je veux|Il me faut] la somme des chiffres de {n}[.|]",
    ),
    "pt": (
        "[Some|Soma|Adicione] os dígitos de {n}[.|]",
        "[Qual é|Ache|Calcule|Dê] a soma dos [dígitos|algarismos] de {n}[?|]",
        "[Soma|A soma] dos [dígitos|algarismos] de {n}[?|]",
        "[Quanto dão|Quanto somam|Quanto são] os [dígitos|algarismos] de {n}[ somados| juntos|][?|]",
        "soma_digitos({n})",
        "Dígitos de {n}[,|:] [a soma|soma|total][?|]",
        "[Pode|Você pode|Poderia] somar os dígitos de {n}[?|]",
        "{n}: [soma dos dígitos|some os dígitos|soma dos algarismos][?|]",
        "Se eu somar [todos os|os] dígitos de {n}, quanto dá[?|]",
        "[Total|O total] dos dígitos de {n}[?|]",
        "Faça a soma [de todos os|dos] dígitos de {n}[.|]",
        "[Diga-me|Quero|Preciso de] a soma dos dígitos de {n}[.|]",
    ),
}


def ask_digits(problem: Problem, language: str, rng: random.Random) -> str:
    table = REVERSE if problem.kind == "reverse" else DIGIT_SUM
    return slips(rng, phrase(rng, table[language], n=problem.args[0]), language)


# ---- even or odd, divisible or not ------------------------------------------------------------------

EVEN, ODD = ("even", "pair", "par"), ("odd", "impair", "ímpar")
YES, NO = ("yes", "oui", "sim"), ("no", "non", "não")
_LAST_DIGIT = {"en": "Last digit", "fr": "Dernier chiffre", "pt": "Último dígito"}
_DIGIT_SUM = {"en": "Sum of the digits:", "fr": "Somme des chiffres :", "pt": "Soma dos dígitos:"}
_DIVIDE = {"en": "I look for a remainder.", "fr": "Je cherche un reste.", "pt": "Procuro um resto."}


def draw_divisibility(rng: random.Random) -> Problem:
    if rng.random() < 0.4:
        n = size(rng, rng.randint(1, 6))
        return Problem("divisibility", "parity", (n, 2), f"parity:{n}", 0, EVEN if n % 2 == 0 else ODD)
    k = pick(rng, ((2, 0.08), (3, 0.2), (4, 0.12), (5, 0.12), (6, 0.12), (7, 0.14), (8, 0.08), (9, 0.1), (10, 0.04)))
    n = size(rng, pick(rng, ((2, 0.5), (3, 0.4), (4, 0.1))))
    if rng.random() < 0.45:
        n -= n % k
    n = max(n, k)
    return Problem("divisibility", "by", (n, k), f"{n}|{k}", 0 if n < 100 else 1, YES if n % k == 0 else NO)


def solve_divisibility(problem: Problem, language: str) -> Solution:
    n, k = problem.args
    word = problem.gold[LANGUAGES.index(language)]
    if problem.kind == "parity" or k in (2, 5, 10):
        lines = [f"{_LAST_DIGIT[language]}: {n % 10}"]
    elif k in (3, 9):
        total = sum(map(int, str(n)))
        lines = [_DIGIT_SUM[language], *digit_sum_lines(n), f"{total} = {total // k}×{k}+{total % k}"]
    else:
        lines = [_DIVIDE[language], *divide(n, k)]
    shown = _PARITY_ANSWER if problem.kind == "parity" else _DIVISIBLE_ANSWER
    return Solution("\n".join(lines), shown[language].format(n=n, k=k, v=word))


_PARITY_ANSWER: Words = {"en": "{n} is **{v}**", "fr": "{n} est **{v}**", "pt": "{n} é **{v}**"}
_DIVISIBLE_ANSWER: Words = {
    "en": "Is {n} divisible by {k}? **{v}**",
    "fr": "{n} est-il divisible par {k} ? **{v}**",
    "pt": "{n} é divisível por {k}? **{v}**",
}
PARITY: dict[str, Templates] = {
    "en": (
        "Is {n} [even or odd|odd or even][?|]",
        "Is {n} [even|odd|an even number|an odd number][?|]",
        "{n}[:|,] [even or odd|odd or even][?|]",
        "{n} [even|odd][?| ?]",
        "[Tell me|Say|Check] [if|whether] {n} is [even|odd|even or odd][.|]",
        "[Is the number|Number] {n} [even|odd|even or odd][?|]",
        "[Parity|The parity|What is the parity] of {n}[?|]",
        "[Even or odd|Odd or even][:|,] {n}[?|]",
        "[Do you know|Can you tell me] if {n} is [even|odd|even or odd][?|]",
        "is_even({n})",
        "Would {n} be [even|odd|even or odd][?|]",
        "What about {n}, [even or odd|odd or even][?|]",
    ),
    "fr": (
        "{n} est[-il|] [pair ou impair|impair ou pair][ ?|?|]",
        "[Est-ce que |]{n} est [pair|impair|un nombre pair|un nombre impair][ ?|?|]",
        "{n}[ :|,] [pair ou impair|impair ou pair][ ?|?|]",
        "{n} [pair|impair][ ?|?]",
        "[Dis-moi|Dis|Vérifie] si {n} est [pair|impair|pair ou impair][.|]",
        "Le nombre {n} est[-il|] [pair|impair|pair ou impair][ ?|?|]",
        "[Parité|La parité|Quelle est la parité] de {n}[ ?|]",
        "[Pair ou impair|Impair ou pair][ :|,] {n}[ ?|?|]",
        "[Sais-tu|Peux-tu me dire] si {n} est [pair|impair|pair ou impair][ ?|?|]",
        "est_pair({n})",
        "Est-ce pair ou impair, {n}[ ?|?|]",
        "Et {n}, [pair ou impair|impair ou pair][ ?|?|]",
    ),
    "pt": (
        "{n} é [par ou ímpar|ímpar ou par][?|]",
        "{n} é [par|ímpar|um número par|um número ímpar][?|]",
        "{n}[:|,] [par ou ímpar|ímpar ou par][?|]",
        "{n} [par|ímpar][?| ?]",
        "[Diga-me|Diga|Verifique] se {n} é [par|ímpar|par ou ímpar][.|]",
        "O número {n} é [par|ímpar|par ou ímpar][?|]",
        "[Paridade|A paridade|Qual é a paridade] de {n}[?|]",
        "[Par ou ímpar|Ímpar ou par][:|,] {n}[?|]",
        "[Sabe|Pode me dizer|Sabes] se {n} é [par|ímpar|par ou ímpar][?|]",
        "e_par({n})",
        "Será que {n} é [par|ímpar][?|]",
        "E {n}, [par ou ímpar|ímpar ou par][?|]",
    ),
}
DIVISIBLE: dict[str, Templates] = {
    "en": (
        "Is {n} [divisible|evenly divisible] by {k}[?|]",
        "Is {n} a multiple of {k}[?|]",
        "[Can|Could] {n} be divided by {k}[ evenly| without remainder| exactly|][?|]",
        "[Does|Will] {k} divide {n}[ evenly| exactly|][?|]",
        "[Tell me|Check|Say] [if|whether] {n} is [divisible by|a multiple of] {k}[.|]",
        "{n} divisible by {k}[?| ?|]",
        "{n}[:|,] [divisible by|multiple of] {k}[?|]",
        "Is {k} a [divisor|factor] of {n}[?|]",
        "[Does|Would] {n} [÷|/] {k} [leave no remainder|come out even][?|]",
        "Is the number {n} [divisible by|a multiple of] {k}[?|]",
        "Divisibility of {n} by {k}[?|]",
        "[Do you know|Can you tell me] if {n} is divisible by {k}[?|]",
    ),
    "fr": (
        "[Est-ce que |]{n} est[-il|] divisible par {k}[ ?|?|]",
        "{n} est-il un multiple de {k}[ ?|?|]",
        "[Peut-on|On peut] diviser {n} par {k}[ sans reste| exactement|][ ?|?|]",
        "{k} divise[-t-il|] {n}[ exactement|][ ?|?|]",
        "[Dis-moi|Vérifie|Dis] si {n} est [divisible par|un multiple de] {k}[.|]",
        "{n} divisible par {k}[ ?|?|]",
        "{n}[ :|,] [divisible par|multiple de] {k}[ ?|?|]",
        "{k} est-il un diviseur de {n}[ ?|?|]",
        "{n} [÷|/] {k} tombe[-t-il|] juste[ ?|?|]",
        "Le nombre {n} est-il [divisible par|multiple de] {k}[ ?|?|]",
        "Divisibilité de {n} par {k}[ ?|]",
        "[Sais-tu|Peux-tu me dire] si {n} est divisible par {k}[ ?|?|]",
    ),
    "pt": (
        "{n} é divisível por {k}[?|]",
        "{n} é [um |]múltiplo de {k}[?|]",
        "[Pode-se|Dá para|Posso] dividir {n} por {k}[ sem resto| exatamente|][?|]",
        "{k} divide {n}[ exatamente|][?|]",
        "[Diga-me|Verifique|Diga] se {n} é [divisível por|múltiplo de] {k}[.|]",
        "{n} divisível por {k}[?| ?|]",
        "{n}[:|,] [divisível por|múltiplo de] {k}[?|]",
        "{k} é [um |]divisor de {n}[?|]",
        "{n} [÷|/] {k} dá [exato|resto zero][?|]",
        "O número {n} é [divisível por|múltiplo de] {k}[?|]",
        "Divisibilidade de {n} por {k}[?|]",
        "[Sabe|Pode me dizer|Sabes] se {n} é divisível por {k}[?|]",
    ),
}


def ask_divisibility(problem: Problem, language: str, rng: random.Random) -> str:
    n, k = problem.args
    table = PARITY if problem.kind == "parity" else DIVISIBLE
    return slips(rng, phrase(rng, table[language], n=n, k=k), language)
