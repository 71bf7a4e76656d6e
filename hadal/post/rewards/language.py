"""Language consistency: the share of words that are of the target language (DeepSeek-R1, §2.3.2).

    consistency = words of the target language / all words that belong to a language

R1's report does not say how a word's language is told. Here, for en, fr, pt and zh:

- Mathematics, code, LaTeX commands, tags, addresses, numbers and single letters are no words.
- Each Chinese character is a word of zh. A word in another script than Latin is of no language known here.
- A sentence of Latin words takes the language whose known words it holds most of: the function words below,
  words of reasoning, and the wordings of this package's puzzles. All its words then count for that language.
  Where languages tie and the target is among them, the target has it.
- A sentence of UNKNOWN_WORDS words or more, of which fewer than KNOWN_SHARE are known to its language, is of
  no language known here; a shorter one without a known word is left out.

Limits: short mixtures inside a sentence of one script are not seen; Spanish or Galician may pass for
Portuguese; Japanese kanji pass for Chinese; a name is a word of its sentence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from hadal.data.puzzles.language import evidence
from hadal.data.puzzles.wording import without_accents
from hadal.data.strict import require
from hadal.post.rewards.protocol import Completion, RewardError, Score
from hadal.post.rewards.text import split

LANGUAGES = ("en", "fr", "pt", "zh")
OTHER = "other"
UNKNOWN_WORDS, KNOWN_SHARE = 4, 0.2

# Frequent words, without accents; those of several languages stand in each list.
_FREQUENT = {
    "en": """
        the of and to in is it that you he was for on are as with his they at be this have from or had by not
        but what some we can out other were all there when up use your how said an each she which do their if
        will way about many then them would like so these her see him has more could my than first been who
        its now find long down did get come made may part over new after only little work know take year me
        back give most very just our also because where why same here both let think since must should well
        yes no one two three four five six seven eight nine ten next last check answer number numbers sum
        product therefore thus hence wait maybe try equal equals means need right left divide multiply add
        subtract larger smaller difference differences ratio digit turn remainder brackets columns again is
        i am does done gives question missing something puzzle greeting negative result while every another
        before into any start step steps total half value hello wrong correct still instead such""",
    "fr": """
        le la les de des du un une et est en que qui dans pour pas sur au aux avec ce cette ces il elle on
        nous vous ils elles je tu ne se son sa ses leur leurs mon ma mes ton ta tes notre votre plus par ou
        mais donc or ni car si comme tout tous toute toutes etre avoir fait faire peut sont etait ont ai as a
        y bien aussi encore deja tres trop peu moins sans sous entre vers chez apres avant depuis pendant
        alors ainsi quand quel quelle quels quelles dont cela ca ici meme autre autres chaque deux trois
        quatre cinq six sept huit neuf dix puis ensuite enfin attendons verifions nombre nombres somme produit
        reste chiffre chiffres egal egale reponse question premier premiere dernier derniere difference
        differences raison alternance verification change changent salutation remercie manque quelque chose
        oui non plusieurs beaucoup jamais rien faut parce peux cherche essaie prends garde divise multiplie
        soustrais additionne compare defais colonnes droite gauche gagne negatif negatifs resultat enigme
        petit grand moi suis ordre bonjour merci un une d l s n c qu j m t
        me te lui""",
    "pt": """
        o a os as de do da dos das um uma uns umas e em no na nos nas que para por pelo pela com nao se ao
        aos mais mas como foi ser tem ele ela eles elas eu tu voce nos voces seu sua seus suas meu minha este
        esta estes estas esse essa isso isto aquele ou ja quando muito muita sem so ate sobre entre depois
        antes tambem agora ainda entao assim porque pois onde qual quais quem cada todo toda todos todas outro
        outra dois duas tres quatro cinco seis sete oito nove dez sao esta estao era ha fazer faz pode posso
        temos vamos numero numeros soma somo produto resto digito digitos igual resposta pergunta primeiro
        primeira ultimo ultima diferenca diferencas razao verificacao alternando parenteses colunas direita
        esquerda divido multiplico subtraio comparo desfaco procuro experimento pares fico algo falta saudacao
        agradecem resultado negativo menor maior ordem mim sou sim problema passo passos logo portanto
        primeiras vezes vez cresce crescem mudam partir conta contas aumentam me te lhe""",
}  # fmt: skip

_NO_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[a-zA-Z]+|<[^<>\n]{1,40}>"
    r"|https?://\S+",
    re.DOTALL,
)
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_LATIN = "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
_WORD = re.compile(rf"(?P<han>[{_HAN}])|(?P<latin>[{_LATIN}]+)|(?P<other>[^\W\d_{_HAN}{_LATIN}]+)")
_SENTENCE = re.compile(r"[.!?:;]\s|[\n。！？；]")


@cache
def known_words() -> dict[str, frozenset[str]]:
    """For each language of Latin script, its known words, lower case, without accents."""
    mine = {language: frozenset(words.split()) for language, words in _FREQUENT.items()}
    return {language: words | evidence()[language] for language, words in mine.items()}


def count(text: str, target: str) -> Counter[str]:
    """How many words of `text` belong to each language, OTHER among them."""
    found: Counter[str] = Counter()
    for sentence in _SENTENCE.split(_NO_WORDS.sub(" ", text)):
        latin: list[str] = []
        for match in _WORD.finditer(sentence):
            if match["han"]:
                found["zh"] += 1
            elif match["other"]:
                found[OTHER] += 1
            elif len(match["latin"]) > 1:
                latin.append(without_accents(match["latin"]).lower())
        language = _language(latin, target)
        if language:
            found[language] += len(latin)
    return found


def _language(words: list[str], target: str) -> str:
    """The language of a sentence of Latin words; empty if it is not to be counted."""
    votes = {language: sum(w in known for w in words) for language, known in known_words().items()}
    most = max(votes.values())
    if not words or (not most and len(words) < UNKNOWN_WORDS):
        return ""
    if most < KNOWN_SHARE * len(words) and len(words) >= UNKNOWN_WORDS:
        return OTHER
    if votes.get(target) == most:
        return target
    return max(votes, key=lambda language: votes[language])


def detect(text: str) -> str:
    """The language that most words of `text` are of; "en" where there is none."""
    found = count(text, "en")
    del found[OTHER]
    return max(found, key=lambda language: found[language]) if found.total() else "en"


@dataclass(frozen=True)
class Language:
    """The share of the target language's words. target: "record" (the record's `language`), "prompt" (that
    of the prompt's last message), or a language. part: "reasoning", as in R1, "answer" or "all". no_words:
    the value where nothing belongs to a language."""

    target: str = "record"
    part: str = "reasoning"
    no_words: float = 1.0

    kind: ClassVar[str] = "language"
    accuracy: ClassVar[bool] = False
    where: ClassVar[str] = "here"
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        known = ("record", "prompt", *LANGUAGES)
        require(self.target in known, "target", self.target, f"one of {', '.join(known)}")
        require(self.part in ("reasoning", "answer", "all"), "part", self.part, "reasoning, answer or all")
        require(0 <= self.no_words <= 1, "no_words", self.no_words, "in 0..1")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("language",) if self.target == "record" else ()

    def __call__(self, completion: Completion, others: Mapping[str, Score]) -> Score:
        target = self._target(completion.record)
        parts = split(completion)
        text = {"reasoning": parts.reasoning, "answer": parts.answer}.get(self.part, completion.text)
        found = count(text, target)
        share = found[target] / found.total() if found.total() else self.no_words
        return Score(share, {"target": target, "words": dict(found)})

    def _target(self, record: Mapping[str, object]) -> str:
        if self.target == "prompt":
            return detect(prompt_text(record))
        target = str(record["language"]) if self.target == "record" else self.target
        if target not in LANGUAGES:
            raise RewardError(f"the record's language is {target!r}; known: {', '.join(LANGUAGES)}")
        return target


def prompt_text(record: Mapping[str, object]) -> str:
    """The prompt of a record as text: `prompt`, or the content of the last message."""
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        return str(messages[-1].get("content", ""))
    return str(record.get("prompt", ""))
