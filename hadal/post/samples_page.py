"""Samples of a run as one HTML file that asks nobody for anything: to open, to keep, to send.

Completions are hostile text. They travel as JSON in which no `<`, `>` or `&` is left, the script writes them
with `textContent` alone, and the page's own policy (Content-Security-Policy) lets nothing run or load but
this one script, named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence

from hadal.post.samples import SampledGroup

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #16803c; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --good: #5fd38d; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 16px; }
h1 { font-size: 20px; margin: 0 0 8px; }
form { display: flex; flex-wrap: wrap; gap: 8px 16px; padding: 10px 0; position: sticky; top: 0;
  background: Canvas; border-bottom: 1px solid var(--line); }
label { display: flex; gap: 6px; align-items: center; white-space: nowrap; }
input[type=number] { width: 5.5em; } input[type=search] { width: 14em; }
input, select, button { font: inherit; padding: 2px 6px; }
section { border: 1px solid var(--line); border-radius: 8px; margin: 16px 0; overflow: hidden; }
header { background: var(--soft); padding: 10px 14px; }
header p, pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 0; }
article { border-top: 1px solid var(--line); padding: 8px 14px; }
pre { font: 13px/1.45 ui-monospace, monospace; max-height: 28em; overflow-y: auto; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
.quiet { opacity: .7; }
mark { padding: 0; }
"""

SCRIPT = r"""
'use strict';
const groups = JSON.parse(document.getElementById('data').textContent);
const field = (id) => document.getElementById(id);
const AT_ONCE = 40;
let shown = AT_ONCE;

function put(parent, tag, text, style) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (style) made.className = style;
  parent.append(made);
  return made;
}

// Text with what is searched for marked; never as HTML.
function putText(parent, tag, text, wanted) {
  const made = put(parent, tag);
  const low = text.toLowerCase();
  let from = 0;
  for (let at = wanted ? low.indexOf(wanted) : -1; at >= 0 && low.length === text.length;
       at = low.indexOf(wanted, from)) {
    made.append(text.slice(from, at));
    put(made, 'mark', text.slice(at, at + wanted.length));
    from = at + wanted.length;
  }
  made.append(text.slice(from));
  return made;
}

const right = (one) => one.accuracy === null ? null : one.accuracy >= 1;
const number = (x, digits) => x === null ? '–' : x.toFixed(digits);
const bound = (id, other) => field(id).value === '' ? other : Number(field(id).value);

function wanted() {
  const search = field('search').value.toLowerCase(), verdict = field('verdict').value;
  const [first, last] = [bound('first', -Infinity), bound('last', Infinity)];
  const [low, high] = [bound('low', -Infinity), bound('high', Infinity)];
  const found = [];
  for (const group of groups) {
    if (group.step < first || group.step > last) continue;
    if (field('task').value && group.task !== field('task').value) continue;
    const asked = search && group.prompt.toLowerCase().includes(search);
    const kept = group.completions.filter((one) =>
      one.reward >= low && one.reward <= high
      && (!verdict || right(one) === (verdict === 'right'))
      && (!field('cut').checked || one.finish_reason === 'length')
      && (!search || asked || one.text.toLowerCase().includes(search)));
    if (kept.length) found.push([group, kept]);
  }
  return [found, search];
}

function verdictOf(name, part) {
  const rest = Object.entries(part).filter(([key]) => key !== 'value')
    .map(([key, value]) => `${key} ${JSON.stringify(value)}`);
  return [`${name} ${number(part.value ?? null, 2)}`, ...rest].join(' · ');
}

function show(group, kept, search) {
  const box = put(field('found'), 'section'), head = put(box, 'header');
  const rewards = group.completions.map((one) => one.reward);
  const mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
  const facts = put(head, 'div', undefined, 'facts');
  put(facts, 'b', `step ${group.step}`);
  put(facts, 'span', `prompt ${group.number}`);
  if (group.task) put(facts, 'span', group.task);
  put(facts, 'span', `mean reward ${mean.toFixed(3)}`);
  put(facts, 'span', `${kept.length} of ${group.completions.length} completions`, 'quiet');
  putText(head, 'p', group.prompt, search);
  for (const one of kept) {
    const item = put(box, 'article'), line = put(item, 'div', undefined, 'facts');
    const verdict = right(one);
    if (verdict !== null) put(line, 'span', verdict ? 'right' : 'wrong', verdict ? 'right' : 'wrong');
    put(line, 'span', `reward ${number(one.reward, 3)}`);
    put(line, 'span', `advantage ${number(one.advantage, 3)}`);
    put(line, 'span', `${one.tokens} tokens`);
    put(line, 'span', one.finish_reason === 'length' ? 'cut off' : one.finish_reason, 'quiet');
    for (const [name, part] of Object.entries(one.parts)) put(line, 'span', verdictOf(name, part), 'quiet');
    putText(item, 'pre', one.text, search);
  }
}

function renew() {
  const [found, search] = wanted();
  field('found').replaceChildren();
  for (const [group, kept] of found.slice(0, shown)) show(group, kept, search);
  const count = found.reduce((sum, [, kept]) => sum + kept.length, 0);
  field('count').textContent = `${found.length} prompts, ${count} completions`;
  field('more').hidden = found.length <= shown;
}

for (const task of [...new Set(groups.map((group) => group.task))].sort()) {
  const option = put(field('task'), 'option', task || '(none)');
  option.value = task;
}
field('filters').addEventListener('input', () => { shown = AT_ONCE; renew(); });
field('filters').addEventListener('submit', (event) => event.preventDefault());
field('more').addEventListener('click', () => { shown += AT_ONCE; renew(); });
renew();
"""

BODY = """
<h1>{title}</h1>
<form id="filters">
<label>steps <input type="number" id="first" aria-label="first step"> to
<input type="number" id="last" aria-label="last step"></label>
<label>task <select id="task"><option value="">all</option></select></label>
<label>reward <input type="number" step="any" id="low" aria-label="lowest reward"> to
<input type="number" step="any" id="high" aria-label="highest reward"></label>
<label>answers <select id="verdict"><option value="">all</option><option>right</option>
<option>wrong</option></select></label>
<label><input type="checkbox" id="cut"> cut off</label>
<label>search <input type="search" id="search"></label>
<output id="count"></output>
</form>
<noscript>These samples are shown by a script in this file.</noscript>
<main id="found"></main>
<button id="more" hidden>Show more</button>
"""


def page(groups: Sequence[SampledGroup], title: str) -> str:
    """The whole file: all groups given, with filters by step, task, reward, verdict, truncation, text."""
    head = (
        f"default-src 'none'; script-src 'sha256-{_digest(SCRIPT)}'; style-src 'sha256-{_digest(STYLE)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{head}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>{BODY.replace('{title}', name)}"
        f'<script type="application/json" id="data">{_data(groups)}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _data(groups: Sequence[SampledGroup]) -> str:
    """JSON, in ASCII, in which nothing can end the element that it lies in."""
    plain = json.dumps([group.as_json() for group in groups], allow_nan=False)
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
