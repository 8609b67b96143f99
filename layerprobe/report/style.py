"""The look of a page: one column, light or dark by the reader's setting, for screens from 320 pixels and for paper."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#59636e",
    "line": "#d5dbe1",
    "pale": "#e9edf1",
    "mark": "#fdf1e7",
    "on": "#a84300",
    "on-ink": "#ffffff",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "pink": "#b3578a",
    "yellow": "#b97f00",
    "sky": "#2f8fc4",
    "grey": "#737c86",
    "wine": "#882255",
}
DARK = {
    "paper": "#14181d",
    "ink": "#e8ebee",
    "soft": "#a7b1bc",
    "line": "#39424c",
    "pale": "#2a323b",
    "mark": "#33261b",
    "on": "#ff9c54",
    "on-ink": "#14181d",
    "blue": "#5cb3e6",
    "orange": "#ff8a3d",
    "green": "#3cc79c",
    "pink": "#dd94bb",
    "yellow": "#e9b23c",
    "sky": "#8bcbf0",
    "grey": "#99a3ad",
    "wine": "#d877a4",
}
"""Both themes have the same names; text stands on `paper`, `pale` and `mark`, and `on-ink` on `on`."""


def _colours(theme: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in theme.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; {_colours(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_colours(DARK)} }} }}
@media print {{ :root {{ color-scheme: light; {_colours(LIGHT)} }} }}
"""
    + """
html { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { margin: 0; }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.15rem; font-weight: 600; color: var(--soft); margin: 0; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; }
.answer { font-size: 1.55rem; line-height: 1.3; font-weight: 650; margin: .3rem 0 .8rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; margin: 1rem 0 .2rem; }
.strip span { flex: 1 1 1.7rem; max-width: 3.4rem; text-align: center; padding: .3rem 0; border-radius: 4px; }
.strip span { background: var(--pale); color: var(--ink); }
.strip span.on { background: var(--on); color: var(--on-ink); font-weight: 600; }
.strip.small { display: inline-flex; flex-wrap: nowrap; gap: 1px; margin: 0; vertical-align: middle; width: 6rem; }
.strip.small span { flex: 1 1 0; max-width: .9rem; height: .8rem; padding: 0; font-size: 0; border-radius: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, td.t, th.t { text-align: left; }
tbody th { font-weight: 400; }
thead button { all: unset; cursor: pointer; }
thead button:hover { text-decoration: underline; }
thead button:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
[aria-sort=ascending] button::after { content: " ▲"; }
[aria-sort=descending] button::after { content: " ▼"; }
tr.mark th, tr.mark td { background: var(--mark); font-weight: 600; }
table.stack td { white-space: nowrap; }
.words td, .words thead th { text-align: left; }
.long td, .words td { white-space: normal !important; }
.wide { overflow-x: auto; }
.wide th, .wide td { white-space: nowrap; }
.long td { text-align: left; overflow-wrap: anywhere; min-width: 8rem; }
.bar { position: relative; display: inline-block; width: 5rem; height: .8rem; margin-left: .5rem; }
.bar { vertical-align: middle; background: linear-gradient(var(--line), var(--line)) center / 1px 100% no-repeat; }
.bar i { position: absolute; top: 0; bottom: 0; border-radius: 2px; }
.bar .up { background: var(--blue); }
.bar .down { background: var(--grey); }
figure { margin: 1.2rem 0; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure img { background: #fff; }
figure svg text { font-family: system-ui, sans-serif; fill: currentColor; }
figure svg * { stroke-linejoin: round; }
svg.narrow { display: none; }
pre { background: var(--pale); padding: .8rem 1rem; border-radius: 6px; font-size: .85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 34rem) {
  .answer { font-size: 1.25rem; }
  svg.broad { display: none; }
  svg.narrow { display: block; }
  table.stack thead { position: absolute; left: -99rem; }
  table.stack thead button { visibility: hidden; }
  table.stack, table.stack tbody { display: block; }
  table.stack tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  table.stack th, table.stack td { display: flex; justify-content: space-between; gap: 1rem; border: 0; }
  table.stack th, table.stack td { padding: .1rem .3rem; }
  table.stack tbody th { font-weight: 600; }
  table.stack td { text-align: right; white-space: normal; }
  .words table.stack td { text-align: left; }
  .wide:has(table.stack) { overflow-x: visible; }
  table.stack td::before { content: attr(data-label); color: var(--soft); text-align: left; }
}
@media print {
  main { max-width: none; padding: 0; }
  html { font-size: 11pt; }
  figure, tr, pre { break-inside: avoid; }
  h2 { break-after: avoid; }
  .strip span, .bar, .bar i, tr.mark th, tr.mark td { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)
