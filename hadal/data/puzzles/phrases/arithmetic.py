"""How people ask for the four operations. See `wording` for the grammar."""
# ruff: noqa: E501 (one template a line)

from __future__ import annotations

Templates = tuple[str, ...]

ADD: dict[str, Templates] = {
    "en": (
        "[Add|Sum up|add|sum] {a} [and|to|with|plus] {b}[.|]",
        "{a} [plus|and|added to] {b}[?|]",
        "[What is|What's|Find|Calculate|Compute|Give me] the [sum|total] of {a} and {b}[?|]",
        "[What is|How much is|what's] {a} plus {b}[?|]",
        "Sum of {a} and {b}[?|]",
        "I have {a} {thing} and I [get|buy|find|receive] {b} more. How many [do I have|in total|{thing} do I have now]?",
        "There are {a} {thing} in one box and {b} in another. How many [together|in all|in total]?",
    ),
    "fr": (
        "[Additionne|Ajoute|Additionnez|Somme] {a} [et|à|avec] {b}[.|]",
        "{a} plus {b}[ ?|?|]",
        "[Quelle est|Calcule|Trouve|Donne-moi] la somme de {a} et {b}[ ?|?|]",
        "[Combien font|Combien fait|Que font] {a} plus {b}[ ?|?|]",
        "[Somme|La somme|Total] de {a} et {b}[ ?|?|]",
        "J'ai {a} {thing} et j'en [achète|trouve|reçois] {b} de plus. Combien [en ai-je|au total|j'en ai maintenant] ?",
        "Il y a {a} {thing} dans une boîte et {b} dans une autre. Combien [en tout|au total] ?",
    ),
    "pt": (
        "[Some|Soma|Adicione|Junte] {a} [e|com|mais] {b}[.|]",
        "{a} mais {b}[?|]",
        "[Qual é|Calcule|Ache|Me dê|Dá-me] a soma de {a} e {b}[?|]",
        "[Quanto é|Quanto dá|Quanto são] {a} mais {b}[?|]",
        "[Soma|A soma|Total] de {a} e {b}[?|]",
        "Tenho {a} {thing} e [ganho|compro|encontro] mais {b}. Quantos [tenho|no total|tenho agora]?",
        "Há {a} {thing} numa caixa e {b} noutra. Quantos [ao todo|no total]?",
    ),
}

SUBTRACT: dict[str, Templates] = {
    "en": (
        "[Subtract|Take|subtract|Take away] {b} from {a}[.|]",
        "{a} [minus|take away|less] {b}[?|]",
        "[What is|What's|Find|Calculate|Compute] the difference [between|of] {a} and {b}[?|]",
        "[What is|How much is|what's] {a} minus {b}[?|]",
        "How much is left if I take {b} [from|away from] {a}[?|]",
        "I had {a} {thing} and [gave away|lost|sold|ate] {b}. How many [are left|remain|do I have left]?",
        "[Remove|Deduct] {b} from {a}[.|]",
    ),
    "fr": (
        "[Soustrais|Retire|Enlève|Ôte] {b} [de|à] {a}[.|]",
        "{a} moins {b}[ ?|?|]",
        "[Quelle est|Calcule|Trouve|Donne] la différence entre {a} et {b}[ ?|?|]",
        "[Combien font|Combien fait|Que font] {a} moins {b}[ ?|?|]",
        "Combien reste-t-il si j'enlève {b} [à|de] {a}[ ?|?|]",
        "J'avais {a} {thing} et j'en ai [donné|perdu|vendu|mangé] {b}. Combien [en reste-t-il|m'en reste-t-il] ?",
        "Différence entre {a} et {b}[ ?|?|]",
    ),
    "pt": (
        "[Subtraia|Tire|Retire|Subtrai] {b} de {a}[.|]",
        "{a} menos {b}[?|]",
        "[Qual é|Calcule|Ache|Diga] a diferença entre {a} e {b}[?|]",
        "[Quanto é|Quanto dá|Quanto são] {a} menos {b}[?|]",
        "Quanto sobra se eu tirar {b} de {a}[?|]",
        "Eu tinha {a} {thing} e [dei|perdi|vendi|comi] {b}. Quantos [sobram|restam|tenho agora]?",
        "Diferença entre {a} e {b}[?|]",
    ),
}

MULTIPLY: dict[str, Templates] = {
    "en": (
        "[Multiply|multiply] {a} [by|and|with|times] {b}[.|]",
        "{a} [times|multiplied by] {b}[?|]",
        "[What is|What's|Find|Calculate|Compute] the product of {a} and {b}[?|]",
        "[What is|How much is|what's] {a} [times|multiplied by] {b}[?|]",
        "Product of {a} and {b}[?|]",
        "There are {a} boxes with {b} {thing} each. How many {thing} [in total|are there|altogether]?",
        "I buy {a} {thing} at {b} euros each. What [is the total|do I pay]?",
    ),
    "fr": (
        "[Multiplie|Multipliez] {a} par {b}[.|]",
        "{a} [fois|multiplié par] {b}[ ?|?|]",
        "[Quel est|Calcule|Trouve|Donne] le produit de {a} [et|par] {b}[ ?|?|]",
        "[Combien font|Combien fait|Que font] {a} fois {b}[ ?|?|]",
        "Produit de {a} et {b}[ ?|?|]",
        "Il y a {a} boîtes de {b} {thing}. Combien de {thing} [au total|en tout] ?",
        "J'achète {a} {thing} à {b} euros pièce. Combien [je paie|au total] ?",
    ),
    "pt": (
        "[Multiplique|Multiplica] {a} por {b}[.|]",
        "{a} [vezes|multiplicado por] {b}[?|]",
        "[Qual é|Calcule|Ache|Diga] o produto de {a} e {b}[?|]",
        "[Quanto é|Quanto dá|Quanto são] {a} vezes {b}[?|]",
        "Produto de {a} e {b}[?|]",
        "Há {a} caixas com {b} {thing} cada. Quantos {thing} [no total|ao todo]?",
        "Compro {a} {thing} a {b} reais cada. Quanto [pago|dá no total]?",
    ),
}

DIVIDE: dict[str, Templates] = {
    "en": (
        "[Divide|divide] {a} by {b}[.|]",
        "{a} [divided by|over] {b}[?|]",
        "[What is|How much is|what's] {a} divided by {b}[?|]",
        "[What is|Find|Give me] the quotient [and remainder |]of {a} [by|and|divided by] {b}[?|]",
        "{a} divided by {b}[,| with] quotient and remainder[?|]",
        "How many times does {b} go into {a}[?|]",
        "I share {a} {thing} among {b} friends. How many [does each get|each, and how many are left|for each]?",
        "[Compute|Do] the [integer|long|Euclidean] division of {a} by {b}[.|]",
    ),
    "fr": (
        "[Divise|Divisez] {a} par {b}[.|]",
        "{a} divisé par {b}[ ?|?|]",
        "[Combien font|Combien fait|Que fait] {a} divisé par {b}[ ?|?|]",
        "[Quel est|Donne-moi|Trouve] le quotient [et le reste |]de {a} par {b}[ ?|?|]",
        "{a} divisé par {b}, quotient et reste[ ?|?|]",
        "Combien de fois {b} [va dans|dans|entre dans] {a}[ ?|?|]",
        "Je partage {a} {thing} entre {b} amis. Combien [chacun|pour chacun|chacun, et combien en reste-t-il] ?",
        "[Fais|Effectue|Pose] la division [euclidienne |]de {a} par {b}[.|]",
    ),
    "pt": (
        "[Divida|Divide] {a} por {b}[.|]",
        "{a} dividido por {b}[?|]",
        "[Quanto é|Quanto dá] {a} dividido por {b}[?|]",
        "[Qual é|Me dê|Ache] o quociente [e o resto |]de {a} por {b}[?|]",
        "{a} dividido por {b}, quociente e resto[?|]",
        "Quantas vezes {b} cabe em {a}[?|]",
        "Divido {a} {thing} entre {b} amigos. Quantos [para cada um|cada um, e quantos sobram]?",
        "[Faça|Efetue] a divisão [inteira |]de {a} por {b}[.|]",
    ),
}

THINGS = {
    "en": (
        "apples",
        "books",
        "coins",
        "marbles",
        "stamps",
        "cards",
        "pencils",
        "eggs",
        "oranges",
        "sweets",
        "stickers",
    ),
    "fr": (
        "pommes",
        "livres",
        "billes",
        "timbres",
        "cartes",
        "crayons",
        "bonbons",
        "oranges",
        "jetons",
        "gâteaux",
    ),
    "pt": (
        "livros",
        "selos",
        "cartões",
        "lápis",
        "ovos",
        "doces",
        "bolos",
        "pães",
        "figos",
        "limões",
        "lenços",
    ),
}

# Numbers in words, from 0; only questions with two such small numbers use them.
NUMBER_WORDS = {
    "en": tuple(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
        " seventeen eighteen nineteen twenty".split()
    ),
    "fr": tuple(
        "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize"
        " dix-sept dix-huit dix-neuf vingt".split()
    ),
    "pt": tuple(
        "zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezesseis"
        " dezessete dezoito dezenove vinte".split()
    ),
}
SPOKEN: dict[str, Templates] = {
    "en": (
        "{a} {op} {b}[?|]",
        "[What is|What's|How much is|what is] {a} {op} {b}[?|]",
        "{a} {op} {b} [equals|is][?|]",
    ),
    "fr": (
        "{a} {op} {b}[ ?|?|]",
        "[Combien font|Combien fait|Ça fait combien] {a} {op} {b}[ ?|?|]",
        "Que font {a} {op} {b} ?",
    ),
    "pt": (
        "{a} {op} {b}[?|]",
        "[Quanto é|Quanto dá|Quanto são] {a} {op} {b}[?|]",
        "{a} {op} {b} [é quanto|dá quanto][?|]",
    ),
}
SPOKEN_SIGN = {
    "en": {"addition": "plus", "subtraction": "minus", "multiplication": "times", "division": "divided by"},
    "fr": {"addition": "plus", "subtraction": "moins", "multiplication": "fois", "division": "divisé par"},
    "pt": {"addition": "mais", "subtraction": "menos", "multiplication": "vezes", "division": "dividido por"},
}
