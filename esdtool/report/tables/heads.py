"""Rows and columns of what `--per-head` found, the same in every report: alpha over the heads of each block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from esdtool.analysis.document import Analysis
from esdtool.analysis.head_result import HeadResult
from esdtool.report.tables.analysis import Column
from esdtool.support.words import counted

HEADS_TITLE = "alpha over the attention heads: smallest, median, largest"
NARROW_HEADS_TITLE = "alpha over the attention heads: median"

_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "qk", "vo")


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """The heads of one attention block."""

    attention: str
    heads: tuple[HeadResult, ...]

    @property
    def number(self) -> str:
        """The number of heads, with that of keys and values where it is another."""
        queries, shared = (
            len({head.head for head in self.heads if kind(head) in kinds})
            for kinds in (("q_proj", "o_proj", "qk", "vo"), ("k_proj", "v_proj"))
        )
        return f"{queries}/{shared}" if queries and shared and queries != shared else str(queries or shared)

    def alphas(self, name: str) -> list[float]:
        """Return the alphas of the heads' parts of a projection, or of their products."""
        return [head.alpha for head in self.heads if kind(head) == name and head.alpha is not None]


def kind(head: HeadResult) -> str:
    """Name the projection or the product, whatever the attention attends to."""
    return head.role.removeprefix("cross_")


def block_rows(analysis: Analysis) -> list[BlockRow]:
    """Gather the heads by their attention blocks, in the model's order."""
    blocks: dict[str, list[HeadResult]] = {}
    for head in analysis.heads:
        blocks.setdefault(head.attention, []).append(head)
    return [BlockRow(attention=name, heads=tuple(heads)) for name, heads in blocks.items()]


def nulls_words(analysis: Analysis) -> str | None:
    """Say the alphas of untrained heads, the same for all heads of a shape; None where they are not known."""
    said = []
    for name in _KINDS:
        nulls = [head.mp_alpha for head in analysis.heads if kind(head) == name and head.mp_alpha is not None]
        if nulls:
            low, high = f"{min(nulls):.2f}", f"{max(nulls):.2f}"
            said.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    return f"Untrained: {', '.join(said)}." if said else None


def block_columns(analysis: Analysis, *, narrow: bool = False) -> list[Column[BlockRow]]:
    """Return the columns of the table: those of the parts and products that there are; `narrow` keeps the medians."""
    there = {kind(head) for head in analysis.heads}
    return [
        Column(heading="attention", cell=lambda row: row.attention, is_text=True),
        Column(heading="heads", cell=lambda row: row.number),
        *(Column(heading=name, cell=_median(name) if narrow else _three(name)) for name in _KINDS if name in there),
    ]


def unscored_words(analysis: Analysis) -> str | None:
    """Say how many heads have no alpha, and why the first has none; None if all have one."""
    left = [head for head in analysis.heads if not head.ok]
    if not left:
        return None
    return f"{counted(len(left), 'part')} of heads not scored, the first {left[0].name}: {left[0].status}."


def _three(name: str) -> Callable[[BlockRow], str]:
    def cell(row: BlockRow) -> str:
        alphas = row.alphas(name)
        return " ".join(f"{value:.2f}" for value in (min(alphas), median(alphas), max(alphas))) if alphas else "-"

    return cell


def _median(name: str) -> Callable[[BlockRow], str]:
    def cell(row: BlockRow) -> str:
        alphas = row.alphas(name)
        return f"{median(alphas):.2f}" if alphas else "-"

    return cell
