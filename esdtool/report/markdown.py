"""Reports as Markdown, to be pasted into an issue on GitHub: the conclusion first, then tables.

Names come from checkpoints that anyone may have made: nothing in them is read as Markdown or HTML, and none mentions
a person or links to a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

from esdtool.analysis.document import Analysis, Settings
from esdtool.analysis.verdict import closing_words
from esdtool.comparison.checkpoints import CheckpointComparison, is_significant
from esdtool.comparison.leading import leading_words
from esdtool.comparison.runs import ComparisonTable
from esdtool.comparison.trajectory import Trajectory
from esdtool.report.tables import comparison as comparison_rows
from esdtool.report.tables.analysis import (
    ROLE_COLUMNS,
    Column,
    format_number,
    module_columns,
    module_rows,
    skipped_rows,
)
from esdtool.report.tables.experts import Experts
from esdtool.report.tables.findings import findings_of, findings_title, headline, lines
from esdtool.report.tables.heads import HEADS_TITLE, block_columns, block_rows, nulls_words, unscored_words
from esdtool.report.tables.means import (
    MEAN_COLUMNS,
    MEANS_TITLE,
    ROLE_MEANS_TITLE,
    mean_rows,
    role_mean_columns,
    role_mean_rows,
)
from esdtool.report.tables.runs import PAIRED_HEADINGS, paired_rows, policy_table
from esdtool.report.tables.settings import left_to_files, settings_in_words
from esdtool.report.tables.vectors import (
    LOCALISED_COLUMNS,
    ROLES_TITLE,
    VECTOR_ROLE_COLUMNS,
    localised_rows,
    localised_title,
    role_rows,
    without_vectors,
)
from esdtool.report.terminal.runs import AVERAGED_TITLE, PAIRED_TITLE, SETTINGS_TITLE
from esdtool.support.words import visible

_FOLDED = 20
"""Longer tables wait behind a click."""

_ZERO_WIDTH = "&#8203;"

_NAMES: Final = frozenset({"attention", "module", "role", "checkpoint", "name"})
"""Headings of columns that hold names."""

_LONE_UNDERSCORE = r"(?<![^\W_])_|_(?![^\W_])"
"""One that is not between letters or digits; only such are read as emphasis."""

_SEEN_BY_GITHUB = r"(?P<seen>[@#](?=\w)|:(?=//)|(?<=www)\.)"
"""What makes a mention, a reference or an address even if it is an entity; not so before what nobody sees."""

_MARKUP = re.compile(rf"{_SEEN_BY_GITHUB}|[\\`*\[\]<>&|~!]|^[-+#](?=\s)|^-(?=-)|{_LONE_UNDERSCORE}", re.IGNORECASE)
_NOT_PLAIN = re.compile(rf"[^\w .-]|{_LONE_UNDERSCORE}")

_Row = TypeVar("_Row")


def analysis_markdown(
    analysis: Analysis, *, sort: str = "order", top: int | None = None, experts: Experts = "mean"
) -> str:
    """An analysis, without a final newline. Arguments as of `esdtool.report.terminal.analysis.print_analysis`."""
    found = module_rows(analysis, sort=sort, top=top, experts=experts)
    parts = _findings(analysis)
    parts.append(text(closing_words(analysis)))
    if analysis.findings == ():
        parts.append(text(f"{findings_title(())}."))
    if analysis.summary.by_role:
        parts.append(_titled("alpha by role", ROLE_COLUMNS, analysis.summary.by_role))
    if means := mean_rows(analysis):
        parts.append(_titled(MEANS_TITLE, MEAN_COLUMNS, means))
    if by_role := role_mean_rows(analysis):
        parts.append(_titled(ROLE_MEANS_TITLE, role_mean_columns(), by_role))
    parts.append(_titled(found.title, module_columns(analysis, narrow=False), found.rows))
    parts += _vectors(analysis)
    if analysis.heads:
        parts.append(_titled(HEADS_TITLE, block_columns(analysis), block_rows(analysis)))
        parts += [text(words) for words in (nulls_words(analysis), unscored_words(analysis)) if words is not None]
    if analysis.skipped:
        rows = skipped_rows(analysis.skipped)
        parts.append(_titled(f"skipped: {len(analysis.skipped)} tensors", _counted("tensors"), rows))
    parts.append(_settings(analysis.created_by, analysis.settings))
    return "\n\n".join(parts)


def _findings(analysis: Analysis) -> list[str]:
    """Return the title of the findings and their list; nothing where there are none."""
    found = findings_of(analysis)
    if not found:
        return []
    entries = []
    for position, finding in enumerate(found, start=1):
        head = f"{position}. **{finding.severity.value}** {code(finding.rule)}: {text(headline(finding))}"
        rest = [f"   - {line.label}: {code(line.text) if line.is_code else text(line.text)}" for line in lines(finding)]
        entries.append("\n".join([head, *rest]))
    return [f"**{text(findings_title(found))}**", "\n".join(entries)]


def _vectors(analysis: Analysis) -> list[str]:
    """Return the tables on singular vectors; nothing where nobody asked for them."""
    if not analysis.settings.vectors:
        return []
    roles, localised = role_rows(analysis), localised_rows(analysis)
    parts = [_titled(ROLES_TITLE, VECTOR_ROLE_COLUMNS, roles)] if roles else []
    title = localised_title(analysis, localised)
    if localised:
        parts.append(_titled(title, LOCALISED_COLUMNS, localised))
    elif roles:
        parts.append(text(f"{title.capitalize()}."))
    missing = without_vectors(analysis)
    return [*parts, text(missing)] if missing is not None else parts


def trajectory_markdown(trajectory: Trajectory) -> str:
    """Return alpha by role over the steps, without a final newline."""
    words = (
        f"- {code(analysis.source.checkpoint)}: {text(closing_words(analysis))}" for analysis in trajectory.analyses
    )
    rows = [
        (
            code(step.checkpoint),
            format_number(step.mean_alpha, ".3f"),
            *(format_number(step.alpha_by_role.get(role), ".3f") for role in trajectory.roles),
        )
        for step in trajectory.steps
    ]
    headings = [("checkpoint", True), ("mean", False), *((code(role), False) for role in trajectory.roles)]
    table = _folded("alpha by role over the checkpoints", markdown_table(headings, rows), len(rows))
    elsewhere = left_to_files(trajectory.analyses[-1].settings)
    return "\n\n".join(
        (
            *_findings(trajectory.analyses[-1]),
            "\n".join(words),
            table,
            *([] if elsewhere is None else [elsewhere]),
            _settings(trajectory.created_by, trajectory.analyses[0].settings),
        )
    )


def comparison_markdown(
    comparison: CheckpointComparison, *, sort: str = "order", top: int | None = None, experts: Experts = "mean"
) -> str:
    """A comparison, without a final newline. Arguments as of `esdtool.report.terminal.comparison.print_comparison`."""
    positions = range(len(comparison.checkpoints))
    parts = [text(comparison_rows.comparison_words(comparison))]
    parts += [f"Note: {text(remark)}." for remark in comparison.notes]
    parts.append(_titled("checkpoints", comparison_rows.checkpoint_columns(comparison), positions))
    if comparison.summary.by_role:
        by_role = comparison.summary.by_role
        parts.append(_titled("mean alpha by role", comparison_rows.role_columns(comparison), by_role))
    if comparison.summary.moved_most:
        moved = comparison_rows.moved_most(comparison)
        parts.append(_titled("moved most", comparison_rows.moved_columns(comparison), moved))
    if comparison.modules:
        found = comparison_rows.comparison_rows(comparison, sort=sort, top=top, experts=experts)
        parts.append(_titled(found.title, comparison_rows.compared_columns(comparison, narrow=False), found.rows))
    if any(is_significant(side) for module in comparison.modules for side in module.sides):
        parts.append(text(comparison_rows.LEGEND))
    if comparison.unmatched:
        rows = skipped_rows(comparison.unmatched)
        title = f"without a counterpart: {len(comparison.unmatched)} modules"
        parts.append(_titled(title, _counted("modules"), rows))
    parts.append(_settings(comparison.created_by, comparison.checkpoints[0].settings))
    return "\n\n".join(parts)


def text(words: str) -> str:
    """Words as Markdown that shows just them, in a paragraph, a table's cell or an HTML element.

    >>> text("a|b, *c*, <d>, up_proj")
    'a&#124;b, &#42;c&#42;, &#60;d&#62;, up_proj'
    """
    return _MARKUP.sub(lambda found: found[0] + _ZERO_WIDTH if found["seen"] else _entity(found), visible(words))


def code(name: str) -> str:
    r"""Return a name as code, in which GitHub sees no mention, reference or address.

    >>> code("model.layers.0"), code("a|b")
    ('`model.layers.0`', '<code>a&#124;b</code>')
    """
    shown = visible(name)
    if shown and shown == shown.strip() and not re.search(r"[`|\\]", shown):
        return f"`{shown}`"
    # Within backticks a pipe would end the cell of a table.
    return f"<code>{_NOT_PLAIN.sub(_entity, shown)}</code>"


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"


def _titled(title: str, columns: Sequence[Column[_Row]], rows: Iterable[_Row]) -> str:
    headings = [(text(column.heading), column.is_text) for column in columns]
    cells = [
        [code(column.cell(row)) if column.heading in _NAMES else text(column.cell(row)) for column in columns]
        for row in rows
    ]
    return _folded(title, markdown_table(headings, cells), len(cells))


def _folded(title: str, table: str, length: int) -> str:
    if length > _FOLDED:
        return f"<details>\n<summary>{text(title)}</summary>\n\n{table}\n\n</details>"
    return f"**{text(title)}**\n\n{table}"


def markdown_table(headings: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of finished cells, which `text` or `code` made; `headings` say whether a column holds words."""
    lines = [[heading for heading, _ in headings], [":---" if is_text else "---:" for _, is_text in headings], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _counted(what: str) -> list[Column[tuple[int, str, str]]]:
    return [
        Column(heading=what, cell=lambda row: str(row[0])),
        Column(heading="name", cell=lambda row: row[1], is_text=True),
        Column(heading="reason", cell=lambda row: row[2], is_text=True),
    ]


def _settings(created_by: str, settings: Settings) -> str:
    """Describe in one line what the numbers depend on."""
    said = ", ".join(setting.text for setting in settings_in_words(settings) if not setting.is_usual)
    return text(f"{created_by}; {said}")


def runs_markdown(table: ComparisonTable) -> str:
    """Return the tables of `print_settings` as Markdown, without a final newline."""

    arranged = policy_table(table.settings)
    headings = [(name, name == "policy") for name in arranged.headings]
    rows = [(text(label), *cells) for label, *cells in arranged.shown(bold=lambda cell: f"**{cell}**")]
    parts = [f"{SETTINGS_TITLE}:", markdown_table(headings, rows)]
    if len(table.settings) > 1:
        leading = leading_words(table)
        parts.append(text(f"{leading[:1].upper()}{leading[1:]}."))
    for title, averaged in ((PAIRED_TITLE, False), (AVERAGED_TITLE, True)):
        if found := paired_rows(table.settings, averaged=averaged):
            headings = [(name, name in PAIRED_HEADINGS[:2]) for name in PAIRED_HEADINGS]
            parts += [f"{title}:", markdown_table(headings, [tuple(map(text, cells)) for cells in found])]
    parts += [f"Note: {text(remark)}." for remark in table.notes]
    return "\n\n".join(parts)
