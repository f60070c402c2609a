"""One HTML file that needs nothing else: its frame and style, sections and tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from fastcnn.system.text import printable

NUM_ROWS = 60  # a table of more scrolls in its box


def page(title: str, sections: Iterable[str], style: str = "") -> str:
    """Return a page of sections, for wide and narrow screens, light and dark; `style` is CSS of its own."""
    return _PAGE.format(title=text(title), style=_STYLE + style, body="\n".join(sections))


def headline(figures: Iterable[tuple[str, object]]) -> str:
    """Return cards of a figure each."""
    cards = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in figures)
    return f'<dl class="headline">{cards}</dl>'


def section(title: str, content: str, note: str = "") -> str:
    """Return a card with a heading."""
    return f"<section><h2>{text(title)}</h2>{f'<p>{text(note)}</p>' if note else ''}{content}</section>"


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], *, last: str = "", marks: Sequence[str] | None = None
) -> str:
    """Return a table in a box of its own. The first column is the rows' heading; `last` and `marks` are row classes."""
    rows = list(rows)
    marks = marks or [""] * (len(rows) - 1) + [last]
    head = "".join(f"<th>{text(name)}</th>" for name in heads) if any(heads) else ""
    lines = [
        f'<tr class="{mark}"><th>{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'
        for mark, (first, *cells) in zip(marks, rows, strict=True)
    ]
    kind = "box long" if len(rows) > NUM_ROWS else "box"
    top = f"<tr>{head}</tr>" if head else ""
    return f'<div class="{kind}"><table>{top}{"".join(lines)}</table></div>'


def text(value: object) -> str:
    """Return anything as text that is safe in HTML: names of classes and files are whatever their owner called them."""
    return html.escape(printable(str(value)))


_STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #fff; --text: #1f2328; --dim: #59636e; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #161b22; --text: #e6edf3; --dim: #9198a1; --line: #30363d; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
p { margin: .25rem 0 .5rem; color: var(--dim); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 0; }
.headline div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--dim); font-size: .85rem; }
dd { margin: 0; font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
.box { overflow: auto; margin: .5rem 0; }
.long { max-height: 40rem; }
.picture { background: #fff; border-radius: .4rem; }
.picture img { display: block; margin: 0 auto; max-width: 100%; min-width: 32rem; height: auto; }
.picture.predictions img { min-width: 44rem; }
.picture.filters img { min-width: 0; }
.narrow { display: none; font-size: .85rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child { text-align: left; font-weight: 400; min-width: 6rem; max-width: 24rem; overflow-wrap: anywhere; }
th { color: var(--dim); }
td { white-space: nowrap; }
tr > :nth-child(2):last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
.changed td, .sum th, .sum td { font-weight: 600; color: var(--text); }
.bar { display: flex; height: 1.5rem; border-radius: .3rem; overflow: hidden; margin: .5rem 0; }
table i { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem; margin-right: .5rem; }
pre { overflow-x: auto; background: var(--page); border-radius: .3rem; padding: .6rem; font-size: .85rem; }
@media (max-width: 34rem) {
  .narrow { display: block; }
  th:first-child { min-width: 5rem; max-width: 9rem; }
  table { font-size: .85rem; }
  th, td { padding-right: .5rem; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: fastcnn</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""
