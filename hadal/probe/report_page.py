"""The page of a study's report: one HTML file that loads nothing, all text escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from hadal.probe.outcome import Entry, StudyOutcome
from hadal.probe.study_figures import Picture
from hadal.probe.verdicts import HYPOTHESES, Verdict, plain, summary

STYLE = """
:root { --line: #ddd; --good: #14702f; --weak: #8a5a00; --quiet: #555; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto;
  max-width: 1080px; padding: 24px 20px 80px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; } h2 { font-size: 21px; margin: 44px 0 8px; }
h3 { font-size: 16px; margin: 24px 0 4px; }
.lead { font-size: 18px; border-left: 4px solid #333; padding: 8px 14px; background: #f6f6f4; }
.maker { color: var(--quiet); font-size: 12.5px; margin: 2px 0; overflow-wrap: anywhere; }
.simulation { background: #b3261e; color: #fff; font-weight: 700; padding: 10px 14px; letter-spacing: .04em; }
table { border-collapse: collapse; font-size: 13.5px; margin: 8px 0; }
th, td { border-bottom: 1px solid var(--line); padding: 4px 10px 4px 0; text-align: left;
  vertical-align: top; }
th { font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
.evidence { color: var(--good); font-weight: 700; } .not { color: var(--weak); font-weight: 700; }
.no { color: var(--quiet); font-weight: 700; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 14px; }
figure { margin: 0; min-width: 0; } figure.broad { grid-column: 1 / -1; }
figure img { width: 100%; border: 1px solid var(--line); }
figcaption { font-size: 12.5px; color: var(--quiet); overflow-wrap: anywhere; }
iframe { width: 100%; height: 560px; border: 1px solid var(--line); }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
.small { font-size: 13.5px; color: var(--quiet); }
"""
CLASS = {"evidence": "evidence", "not the model's own": "not", "no evidence": "no", "not tested": "no"}
LIMITS = (
    "A finding says that vectors have a structure, not that the model uses it, nor that a theory is true. "
    "A test that found nothing may have been too weak: the simulation with a planted effect shows what size "
    "these tests find.",
    "Target words stand in sentences, and other words of a sentence tell its category: the counts of words "
    "beside the targets are a baseline here, and what does not exceed them is not told as evidence.",
    "Squares, pairs and molecules are bare words in {frames} neutral frames a language; a model that needs "
    "more context will show less of them.",
    "Pairs of synonyms and co-hyponyms have the shorter word first, as a mark of frequency. There is no list "
    "of frequencies from outside in the data set.",
    "t-SNE and PCA are pictures. No test was made on one.",
    "p values are corrected over all models and languages of this report, for each hypothesis (Holm); what "
    "else is compared is exploratory (Benjamini-Hochberg). Other reports are not in the count.",
)
NUMBERS = ("statistic", "if there is nothing", "p", "corrected p", "effect", "95% interval", "n")


def page(outcome: StudyOutcome, found: Sequence[Verdict], pictures: Sequence[Picture]) -> str:
    """The report as HTML. `pictures` are read from their files and put into it."""
    name = outcome.recipe.name
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-src 'self' about:\">",
        f"<title>{esc(name)}: what is represented</title><style>{STYLE}</style></head><body>",
        f"<h1>What is represented: {esc(name)}</h1>", _makers(outcome),
        f'<p class="lead">{esc(summary(list(found)))}</p>', _verdict_table(outcome, found),
        _hypotheses(outcome, found),
        "<h2>What else was compared (exploratory)</h2>",
        '<p class="small">Corrected together by Benjamini-Hochberg, within each family: of what is marked '
        "here, about one in twenty may be chance. Nothing above rests on it but the comparisons with "
        "baselines.</p>",
        _families(outcome, "exploratory"), "<h2>Baselines</h2>",
        '<p class="small">The same tests on networks with random weights, of the same shape and tokenizer. '
        "What is found here lies in words and tokens.</p>", _baselines(outcome),
        "<h2>Pictures</h2>", _pictures(pictures), "<h2>The data, and what its checks found</h2>",
        _checks(outcome),
        "<h2>Limits</h2>", _limits(outcome), "</body></html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _makers(outcome: StudyOutcome) -> str:
    lines = []
    if outcome.is_simulation:
        lines.append(
            '<p class="simulation">SIMULATION. These vectors are made up, with an effect of known size. '
            "They come from no model and say nothing about one.</p>"
        )
    lines += [
        f'<p class="maker">{esc(m.material.language)}: {esc(m.identity.label())}</p>'
        for m in outcome.made
        if m.maker.role == "studied"
    ]
    return "\n".join(lines)


def _verdict_table(outcome: StudyOutcome, found: Sequence[Verdict]) -> str:
    columns = list(dict.fromkeys((v.model, v.language) for v in found))
    head = "".join(f"<th>{esc(model)}, {esc(language)}</th>" for model, language in columns)
    rows = []
    for h in HYPOTHESES:
        cells = {(v.model, v.language): v for v in found if v.hypothesis == h.id}
        if cells:
            told = "".join(f"<td>{_cell(outcome, cells[c])}</td>" for c in columns)
            rows.append(f"<tr><th>{h.id}. {esc(h.title)}</th>{told}</tr>")
    return f'<div class="wide"><table><tr><th>hypothesis</th>{head}</tr>{"".join(rows)}</table></div>'


def _cell(outcome: StudyOutcome, verdict: Verdict) -> str:
    word = f'<span class="{CLASS[verdict.status]}">{esc(verdict.status)}</span>'
    result = outcome.found(verdict.model, verdict.language, verdict.lead) if verdict.lead else None
    if result is None or verdict.status == "not tested":
        return word
    spread = ""
    if result.interval is not None:
        spread = f" [{result.interval.low:.3f}, {result.interval.high:.3f}]"
    p = "" if result.p_corrected is None else f", p {result.p_corrected:.3f}"
    return f"{word}<br><small>{esc(plain(verdict.lead))} {result.statistic:.3f}{spread}{p}</small>"


def _hypotheses(outcome: StudyOutcome, found: Sequence[Verdict]) -> str:
    parts = ["<h2>The hypotheses, one by one</h2>"]
    for h in HYPOTHESES:
        mine = [v for v in found if v.hypothesis == h.id]
        if not mine:
            continue
        parts.append(f"<h3>{h.id}. {esc(h.title)}</h3>")
        parts.append(f"<p>{esc(h.tests)} {esc(h.shown_by)}</p>")
        parts += [
            f'<p><b>{esc(v.model)}, {esc(v.language)}.</b> <span class="{CLASS[v.status]}">'
            f"{esc(v.text.split(':', 1)[0])}</span>:{esc(v.text.split(':', 1)[1])}</p>"
            for v in mine
        ]
        parts.append(
            _table([e for e in outcome.entries if e.role == "studied" and e.result.family == h.family])
        )
    return "\n".join(parts)


def _families(outcome: StudyOutcome, kind: str) -> str:
    confirmatory = {h.family for h in HYPOTHESES}
    names = dict.fromkeys(e.result.family for e in outcome.entries if e.role == "studied")
    chosen = [n for n in names if (n in confirmatory) == (kind == "confirmatory")]
    return "\n".join(
        f"<h3>{esc(name)}</h3>" + _table([e for e in outcome.entries if e.result.family == name])
        for name in chosen
    )


def _baselines(outcome: StudyOutcome) -> str:
    rows = [e for e in outcome.entries if e.role == "baseline"]
    if not rows:
        return "<p>There is none: random weights are of models that run here.</p>"
    labels = dict.fromkeys(m.identity.label() for m in outcome.made if m.maker.role == "baseline")
    makers = "".join(f'<p class="maker">{esc(label)}</p>' for label in labels)
    return makers + _table(rows)


def _table(entries: Sequence[Entry]) -> str:
    """Results of one family, and below what it is corrected for and what was exchanged."""
    cells = "".join(f"<th>{name}</th>" for name in ("model", "language", "test"))
    cells += "".join(f'<th class="n">{name}</th>' for name in NUMBERS)
    rows = "".join(_result_row(e) for e in entries)
    corrected = dict.fromkeys(
        f"{r.correction} over {r.comparisons} comparisons" for e in entries if (r := e.result).correction
    )
    exchanged = dict.fromkeys(e.result.exchanged for e in entries)
    note = "; ".join([*corrected, "if there is nothing: " + ", ".join(exchanged)])
    told = f'<p class="small">{esc(note)}.</p>' if entries else ""
    return f'<div class="wide"><table><tr>{cells}</tr>{rows}</table></div>{told}'


def _result_row(entry: Entry) -> str:
    r = entry.result
    p = ("", "descriptive") if r.p is None or r.p_corrected is None else (_p(r.p), _p(r.p_corrected))
    mark = ' class="evidence"' if r.significant else ""
    spread = "" if r.interval is None else f"{r.interval.low:.3f} to {r.interval.high:.3f}"
    null = f"{r.null_mean:.3f} [{r.null_low:.3f}, {r.null_high:.3f}]"
    numbers = (f"{r.statistic:.3f}", null, p[0], p[1], f"{r.effect:+.2f}", spread, f"{r.n} {r.unit}")
    told = "".join(f'<td class="n">{esc(value)}</td>' for value in numbers)
    name = f'<span{mark} title="{esc(r.note)}">{esc(plain(entry.test))}</span>'
    return f"<tr><td>{esc(entry.model)}</td><td>{esc(entry.language)}</td><td>{name}</td>{told}</tr>"


def _p(value: float) -> str:
    return "< .0001" if value < 1e-4 else f"{value:.4f}"


def _pictures(pictures: Sequence[Picture]) -> str:
    """Under a heading for each model and language; curves side by side."""
    parts = []
    for of in dict.fromkeys(p.of for p in pictures):
        mine = [_figure(p) for p in pictures if p.of == of]
        parts.append(f'<h3>{esc(of)}</h3><div class="figures">{"".join(mine)}</div>')
    return "\n".join(parts)


def _figure(picture: Picture) -> str:
    caption = f"<figcaption>{esc(picture.caption)}<br>{esc(picture.maker)}</figcaption>"
    if picture.path.suffix == ".html":
        inside = esc(picture.path.read_text("utf-8"))
        frame = f'<iframe sandbox="allow-scripts" title="points in three dimensions" srcdoc="{inside}">'
        return f'<figure class="broad">{frame}</iframe>{caption}</figure>'
    data = base64.b64encode(picture.path.read_bytes()).decode()
    image = f'<img alt="{esc(picture.caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}{caption}</figure>"


def _checks(outcome: StudyOutcome) -> str:
    checks = outcome.gathered.checks
    languages = [m.language for m in outcome.gathered.materials]
    head = "".join(f"<th>{esc(name)}</th>" for name in languages)
    rows = "".join(
        f"<tr><th>{esc(kind)}</th>"
        + "".join(f'<td class="n">{by.get(lang, 0):,}</td>' for lang in languages)
        + "</tr>"
        for kind, by in checks.sizes.items()
    )
    parts = [f"<table><tr><th>in the files</th>{head}</tr>{rows}</table>",
             f'<p class="small">Digest of the data: {esc(outcome.gathered.digest[:16])}</p>']  # fmt: skip
    faults = checks.findings
    parts.append(f"<p>{len(faults) or 'No'} fault{'s' * (len(faults) != 1)} found by the checks"
                 f" (duplicates, homographs, accents, targets, leaks between isotopies)"
                 f"{'.' if not faults else ':'}</p>")  # fmt: skip
    parts += [
        f'<p class="small">{esc(check)}: {esc(where)}: {esc(message)}</p>'
        for check, where, message in faults[:20]
    ]
    if len(faults) > 20:
        parts.append(f'<p class="small">and {len(faults) - 20} more, in tables/checks.csv</p>')
    if checks.confounds:
        parts.append("<p>Concepts that stand most often in sentences of others, and pull them together: "
                     f"{esc('; '.join(checks.confounds))}.</p>")  # fmt: skip
    parts.append(_token_lines(outcome))
    return "\n".join(parts) + _vectors_table(outcome)


def _token_lines(outcome: StudyOutcome) -> str:
    lines = []
    for model, language in dict.fromkeys((r["model"], r["language"]) for r in outcome.tokens):
        mine = [r for r in outcome.tokens if (r["model"], r["language"]) == (model, language)]
        by: dict[str, list[float]] = {}
        for row in mine:
            by.setdefault(row["category"], []).append(row["tokens"])
        mean = sorted(((sum(v) / len(v), k) for k, v in by.items()), reverse=True)
        whole = sum(r["tokens"] for r in mine) / len(mine)
        lines.append(
            f"<p>{esc(model)}, {esc(language)}: a target has {whole:.2f} tokens on average; most in "
            f"{esc(mean[0][1])} ({mean[0][0]:.2f}), least in {esc(mean[-1][1])} ({mean[-1][0]:.2f}). "
            f"{outcome.clipped.get(model, 0)} targets share a token with a neighbour.</p>"
        )
    return "\n".join(lines)


def _vectors_table(outcome: StudyOutcome) -> str:
    rows = []
    for m in outcome.made:
        layer = f"{m.layers[m.primary]} of {max(m.layers)}"
        fitted = f"{'+'.join(m.fitted_steps)}, fitted on {m.fitted}"
        words = "".join(f"<td>{esc(v)}</td>" for v in (m.maker.title, m.material.language, layer, fitted))
        rows.append(f"<tr>{words}" + "".join(f'<td class="n">{v:.3f}</td>' for v in m.isotropy) + "</tr>")
    names = ("model", "language", "primary layer", "normaliser", "IsoScore before", "after")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        "<p>How the vectors were made. IsoScore: 1 if they spread over all dimensions alike, 0 if along "
        f'one.</p><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def _limits(outcome: StudyOutcome) -> str:
    frames = max((len(t.items) for m in outcome.gathered.materials for t in m.terms.values()), default=0)
    lines = [text.format(frames=frames) for text in LIMITS if frames or "{frames}" not in text]
    if any(m.fitted != "control words" for m in outcome.made):
        lines.append(
            "There are fewer than ten other words: the normaliser was fitted on the studied targets "
            "themselves. It knows no labels, but the vectors are not independent of one another."
        )
    if len(outcome.recipe.vectors.pooling) > 1 and not any(len(m.concepts) > 1 for m in outcome.made):
        lines.append("This backend has one pooling, its own; the others of the recipe could not be told.")
    parts = ["<ul>", *(f"<li>{esc(line)}</li>" for line in lines), "</ul>"]
    if outcome.refused:
        parts.append("<p>What could not be made, and why:</p><ul>")
        parts += [
            f"<li>{esc(m)}, {esc(lang)}, {esc(test)}: {esc(why)}</li>"
            for m, lang, test, why in outcome.refused
        ]
        parts.append("</ul>")
    return "\n".join(parts)


def esc(text: object) -> str:
    """Text for HTML, within quotes too."""
    return html.escape(str(text), quote=True)
