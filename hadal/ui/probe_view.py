"""What the probe page makes of a server's answer: for each layer the products of the centred vectors, from
which projection, neighbours and all else follow; and their HTML. Pure; numpy alone.

With X the centred vectors of a layer [n, D], all that is drawn is a function of G = X·Xᵀ [n, n]: coordinates
of PCA are the eigenvectors of G times the roots of their eigenvalues, and cos_ij = G_ij / √(G_ii·G_jj).
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hadal.ui.plan_view import alarm, legend
from hadal.ui.svg import Point, heat, scatter

Json = Mapping[str, Any]
Array = NDArray[np.float64]
MOST_TEXTS, LEAST_TEXTS, MOST_HUES = 64, 3, 8
PER_REQUEST = 3_000_000  # numbers; a server of Hadal's answers at most four million at once
NEAREST = 3
SEPARATOR = "|"
EXAMPLES = {
    "Semantic primes (NSM), by category": {
        "substantives": "I you someone something people body",
        "mental": "think know want feel see hear",
        "evaluators": "good bad big small",
        "quantifiers": "one two many all some",
        "time": "now before after moment",
        "space": "here above below near far inside",
        "logic": "not maybe can because if",
    },
}
PUZZLES = ("sums | 12 + 35", "sums | 7 + 8", "sums | 340 + 61", "sums | 5 + 19", "sorting | sort 5 2 9",
           "sorting | sort 31 4 15", "sorting | sort 8 8 1", "words | the moon is bright",
           "words | a ship at sea", "words | rain on the roof")  # fmt: skip


class ProbeInputError(ValueError):
    """Texts that cannot be looked at, or an answer that is none; the message says why."""


@dataclass
class Seen:
    """Texts that were looked at. gram: one [n, n] a layer, FP64, in the order of `layers`. routing: by block,
    of text number `routed` alone: (experts, scores), one list a token."""

    texts: list[str]
    labels: list[str]
    identity: dict[str, Any]
    layers: list[int]
    gram: list[Array]
    experts: int = 0
    tokens: list[str] = field(default_factory=list)
    routing: dict[int, tuple[list[list[int]], list[list[float]]]] = field(default_factory=dict)
    routed: int = -1


def example(name: str) -> str:
    """The lines of an example set."""
    if name not in EXAMPLES:
        return "\n".join(PUZZLES)
    return "\n".join(
        f"{kind} {SEPARATOR} {word}" for kind, words in EXAMPLES[name].items() for word in words.split()
    )


def read_lines(text: str) -> tuple[list[str], list[str]]:
    """(texts, labels) of lines "text" or "label | text". Raises ProbeInputError."""
    texts, labels = [], []
    for line in (line.strip() for line in text.splitlines()):
        if not line:
            continue
        label, bar, rest = line.partition(SEPARATOR)
        if bar and not rest.strip():
            raise ProbeInputError(f"The line {line[:60]!r} has a label and no text.")
        texts.append(rest.strip() if bar else line)
        labels.append(label.strip() if bar else "")
    if not LEAST_TEXTS <= len(texts) <= MOST_TEXTS:
        raise ProbeInputError(
            f"There are {len(texts)} texts; write {LEAST_TEXTS} to {MOST_TEXTS}, one a line."
        )
    return texts, labels


def portions(count: int, layers: int, width: int) -> Iterator[slice]:
    """Texts of one request each, so that an answer stays within what a server sends."""
    size = max(1, PER_REQUEST // max(1, layers * width))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def states(answer: Json) -> list[NDArray[np.float32]]:
    """The vectors of each text [layers, width]. Raises ProbeInputError for an answer that holds none."""
    try:
        return [
            np.frombuffer(base64.b64decode(entry["states"], validate=True), "<f4").reshape(entry["shape"])
            for entry in answer["data"]
        ]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ProbeInputError(f"The server's answer holds no states: {type(error).__name__}.") from None


def seen(texts: list[str], labels: list[str], answers: Sequence[Json]) -> Seen:
    """What is kept of the answers: products, not vectors."""
    vectors_nlD = np.stack([v for answer in answers for v in states(answer)]).astype(np.float64)
    if not np.isfinite(vectors_nlD).all():
        raise ProbeInputError("The model's states are not finite.")
    centred = vectors_nlD - vectors_nlD.mean(0)
    gram = [centred[:, k] @ centred[:, k].T for k in range(centred.shape[1])]
    first = answers[0]
    return Seen(
        texts, labels, dict(first["identity"]), list(first["identity"]["layers"]), gram, int(first["experts"])
    )


# --- arithmetic ---------------------------------------------------------------------------------------------
def pca(gram: Array) -> tuple[Array, tuple[float, float]]:
    """Coordinates [n, 2] of the two greatest principal components, and their shares of the variance."""
    values, vectors = np.linalg.eigh(gram)
    top = np.clip(values[::-1][:2], 0.0, None)
    total = float(np.clip(values, 0.0, None).sum()) or 1.0
    found = vectors[:, ::-1][:, :2] * np.sqrt(top)
    # An eigenvector's sign is arbitrary: the largest coordinate is made positive, so that layers compare.
    found *= np.where(found[np.abs(found).argmax(0), [0, 1]] < 0, -1.0, 1.0)
    return found, (float(top[0]) / total, float(top[1]) / total)


def cosines(gram: Array) -> Array:
    """Cosine of every pair of centred vectors [n, n]; 0 for a vector that is the mean itself."""
    length = np.sqrt(np.clip(np.diag(gram), 0.0, None))
    least = 1e-9 * max(float(length.max()), 1e-300)
    safe = np.where(length > least, length, 1.0)
    live = (length > least).astype(np.float64)
    return np.clip(gram / np.outer(safe, safe) * np.outer(live, live), -1.0, 1.0)


def has_tsne() -> bool:
    """Whether scikit-learn is there."""
    return importlib.util.find_spec("sklearn") is not None


def tsne(gram: Array) -> Array:
    """Coordinates [n, 2] by t-SNE on cosine distances; always the same for the same vectors."""
    from sklearn.manifold import TSNE

    distance = np.clip(1.0 - cosines(gram), 0.0, None)
    np.fill_diagonal(distance, 0.0)
    perplexity = min(15.0, (len(gram) - 1) / 3)
    made = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=0)
    found: Array = made.fit_transform(distance).astype(np.float64)
    return found


def nearest(gram: Array, count: int = NEAREST) -> list[list[tuple[int, float]]]:
    """The nearest texts of each, by cosine, with it."""
    close = cosines(gram)
    np.fill_diagonal(close, -2.0)
    order = np.argsort(-close, axis=1, kind="stable")[:, :count]
    return [[(int(j), float(close[i, j])) for j in row] for i, row in enumerate(order)]


def agreement(labels: Sequence[str], near: Sequence[Sequence[tuple[int, float]]]) -> tuple[int, float]:
    """(texts whose nearest has their label, how many would by chance)."""
    hits = sum(labels[row[0][0]] == labels[i] for i, row in enumerate(near))
    sizes = [labels.count(label) for label in set(labels)]
    return hits, sum(s * (s - 1) for s in sizes) / max(1, len(labels) - 1)


# --- HTML ---------------------------------------------------------------------------------------------------
def identity(s: Seen, layer: int, what: str = "") -> str:
    """Who made the numbers: the line under every figure. what: instead of pooling and texts."""
    who, last = s.identity, s.layers[-1]
    place = (
        "the embedding"
        if layer == 0
        else "after the final norm"
        if layer == last
        else f"after block {layer - 1}"
    )
    control = ", control tokens included" if who.get("control_tokens") else ""
    revision = str(who.get("revision", "unknown"))
    revision = revision[:12] if not revision.startswith("unknown") else revision
    what = what or f"{who.get('pooling')} pooling{control} · {len(s.texts)} texts"
    line = (
        f"{who.get('model')} @ {revision} · {who.get('dtype')} · layer {layer} of {last} ({place}) · {what}"
    )
    return f'<p class="hadal-identity">{escape(line)}</p>'


def projection_html(s: Seen, layer: int, way: str = "PCA") -> str:
    """The texts as points of a plane."""
    gram = s.gram[s.layers.index(layer)]
    if float(np.trace(gram)) <= 0:
        return "<p>All texts have the same vector here.</p>" + identity(s, layer)
    if way == "t-SNE":
        places, names = tsne(gram), ("t-SNE 1 (distances between clusters mean nothing)", "t-SNE 2")
    else:
        places, share = pca(gram)
        names = (f"PC 1 ({share[0]:.0%} of the variance)", f"PC 2 ({share[1]:.0%})")
    kinds = list(dict.fromkeys(s.labels))
    hue = {kind: i % MOST_HUES for i, kind in enumerate(kinds)}
    points = [
        Point(float(x), float(y), text if len(text) <= 18 else text[:17] + "…", _tip(label, text), hue[label])
        for (x, y), text, label in zip(places, s.texts, s.labels, strict=True)
    ]
    colours = legend([kind or "no label" for kind in kinds]) if len(kinds) > 1 else ""
    return (
        colours
        + scatter(points, f"{way} of {len(points)} texts at layer {layer}", *names)
        + identity(s, layer)
    )


def _tip(label: str, text: str) -> str:
    return f"{label}: {text}" if label else text


def neighbours_html(s: Seen, layer: int) -> str:
    """The nearest of each text, and how often it has the same label."""
    near = nearest(s.gram[s.layers.index(layer)])
    head = "".join(f"<th>{h}</th>" for h in ("text", "nearest", "second", "third")[: NEAREST + 1])
    rows = []
    for i, row in enumerate(near):
        cells = "".join(f"<td>{_named(s, j)} <span class='hadal-cosine'>{c:+.2f}</span></td>" for j, c in row)
        rows.append(f"<tr><td>{_named(s, i)}</td>{cells}</tr>")
    said = "Cosines of vectors that are centred on the mean of these very texts: a look, not a test."
    if len(set(s.labels)) > 1:
        hits, chance = agreement(s.labels, near)
        said = (
            f"The nearest text has the same label {hits} of {len(near)} times; {chance:.1f} is chance. "
            + said
        )
    table = f'<table class="hadal-table"><tr>{head}</tr>{"".join(rows)}</table>'
    return f"<p>{escape(said)}</p>" + identity(s, layer) + table


def _named(s: Seen, i: int) -> str:
    text = s.texts[i] if len(s.texts[i]) <= 40 else s.texts[i][:39] + "…"
    hue = list(dict.fromkeys(s.labels)).index(s.labels[i]) % MOST_HUES
    dot = (
        f'<i class="hadal-dot" style="background:var(--hadal-{"abcdefgh"[hue]})"></i>' if s.labels[i] else ""
    )
    return f'<span title="{escape(_tip(s.labels[i], s.texts[i]))}">{dot}{escape(text)}</span>'


def router_html(s: Seen, layer: int) -> str:
    """Which experts each token of the routed text was sent to, in the block that makes this layer."""
    if not s.experts:
        return "<p>This model is dense: it has no routers.</p>"
    if s.routed < 0:
        return "<p>Choose a text.</p>"
    if layer == 0:
        return "<p>Layer 0 is the embedding; choose a layer from 1 on.</p>"
    if layer - 1 not in s.routing:
        return f"<p>Block {layer - 1} is dense: every token passes the same matrices.</p>"
    experts, scores = s.routing[layer - 1]
    values = [[0.0] * s.experts for _ in experts]
    tips = [[""] * s.experts for _ in experts]
    for t, (chosen, weight) in enumerate(zip(experts, scores, strict=True)):
        most = max(weight, default=0.0) or 1.0
        for place, (e, score) in enumerate(zip(chosen, weight, strict=True), 1):
            values[t][e] = score / most
            tips[t][e] = f"{s.tokens[t]!r} → expert {e}, choice {place} of {len(chosen)}, score {score:.3f}"
    rows = [f"{t} {_plain(token)[:14]!r}" for t, token in enumerate(s.tokens)]
    title = f"experts of each token in block {layer - 1}"
    used = len({e for chosen in experts for e in chosen})
    said = (
        f"Block {layer - 1} sends each token to {len(experts[0])} of {s.experts} experts; this text uses "
        f"{used}. Darker: a higher score beside the token's others (the router's own, before the bias that "
        "balances)."
    )
    who = identity(s, layer, f"choices of block {layer - 1}'s router · text {s.routed + 1}")
    return f"<p>{said}</p>" + heat(rows, s.experts, values, tips, title, "expert") + who


def _plain(token: str) -> str:
    """A control token's name in letters that every font has."""
    return token.replace("｜", "").replace("▁", " ")


__all__ = ["ProbeInputError", "Seen", "alarm", "neighbours_html", "projection_html", "router_html"]
