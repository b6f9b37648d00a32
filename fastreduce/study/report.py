"""One static HTML page that holds a study together: text, tables and pictures, without a script, legible on paper."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Section", "Table", "in_markdown", "write_report"]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of words and numbers.

    Attributes:
        columns: their headings.
        rows: as many cells each as there are columns; None and NaN are shown as a dash.
        caption: a line above, or nothing.
        digits: decimals of floating point numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    digits: int = 2

    def markdown(self) -> str:
        """Return the table for a README, its caption above it. Cells are shown as they are, whatever is in them."""
        lines = [in_markdown(self.caption), ""] if self.caption else []
        lines += [f"| {' | '.join(map(in_markdown, self.columns))} |", "|" + "---|" * len(self.columns)]
        lines += [f"| {' | '.join(in_markdown(_shown(cell, self.digits)) for cell in row)} |" for row in self.rows]
        return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        paragraphs: plain text; nothing in it is read as HTML.
        tables: below the text.
        figures: below the tables, each with a caption.
    """

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[Figure, str]] = ()


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7em; margin-bottom: .2em }
h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc; break-after: avoid }
table { border-collapse: collapse; margin: 1.1em 0; font-size: .93em }
caption { text-align: left; font-weight: 600; padding-bottom: .3em; break-after: avoid }
thead { display: table-header-group }
th, td { padding: .2em .75em; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4 }
th { border-bottom: 1.5px solid #111; vertical-align: bottom }
.number { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: 1.3em 0; break-inside: avoid }
figure svg { max-width: 100%; height: auto }
figcaption, .facts { color: #555; font-size: .93em }
.facts td, .facts th { border: 0; padding: .05em 1em .05em 0; font-weight: 400; vertical-align: top }
nav { font-size: .93em }
@page { size: A4; margin: 16mm 15mm }
@media print {
  body { font-size: 9.5pt; line-height: 1.4; margin: 0; padding: 0; max-width: none }
  nav { display: none }
  tr, table.short { break-inside: avoid }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table class="facts">
{% for name, value in facts %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
<nav>{% for section in sections %}<a href="#part{{ loop.index }}">{{ section.title }}</a>{{ " · " if not loop.last }}\
{% endfor %}</nav>
{% for section in sections %}<section id="part{{ loop.index }}">
<h2>{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}<p>{{ paragraph }}</p>
{% endfor %}{% for table in section.tables %}<table{% if table.rows | length <= 24 %} class="short"{% endif %}>
{% if table.caption %}<caption>{{ table.caption }}</caption>
{% endif %}<thead><tr>{% for name in table.columns %}\
<th{% if table | is_number(loop.index0) %} class="number"{% endif %}>\
{{ name }}</th>{% endfor %}</tr></thead>
{% for row in table.rows %}<tr>{% for cell in row %}\
<td{% if table | is_number(loop.index0) %} class="number"{% endif %}>\
{{ cell | shown(table.digits) }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}{% for figure, caption in section.figures %}<figure>
{{ figure | svg }}
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}</section>
{% endfor %}</body>
</html>
"""


def in_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    text = re.sub(r"([\\|`*\[\]])", r"\\\1", " ".join(re.split(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+", text)))
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word it is no emphasis


def _is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _is_number(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows if not _is_missing(row[column])]
    return bool(cells) and all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in cells)


def _shown(cell: Any, digits: int) -> str:
    if _is_missing(cell):
        return "–"
    return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)


def _svg(figure: Figure) -> Any:
    """Return the picture as a part of the page; the same picture gives the same bytes."""
    import matplotlib
    from markupsafe import Markup

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastreduce"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    return Markup(drawn[drawn.index("<svg") :])


def write_report(
    path: str | os.PathLike[str], title: str, facts: Sequence[tuple[str, Any]], sections: Sequence[Section]
) -> None:
    """Write the page.

    Args:
        path: the HTML file; its folder is made if it is not there.
        title: of the page.
        facts: names and values that stand below the title (machine, versions, command).
        sections: in their order.

    Raises:
        ValueError: a table has a row with more or fewer cells than columns.
    """
    import jinja2

    for section in sections:
        for table in section.tables:
            for row in table.rows:
                if len(row) != len(table.columns):
                    raise ValueError(
                        f"a row of {table.caption or section.title!r} has {len(row)} cells for {len(table.columns)} "
                        f"columns: {list(row)!r}"
                    )
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    pages.filters.update(is_number=_is_number, shown=_shown, svg=_svg)
    page = pages.from_string(_PAGE).render(title=title, facts=facts, sections=sections)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
