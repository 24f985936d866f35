"""The shell of a report: one HTML file that loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib import resources
from typing import Any

from esdtool.report.html.colours import scale_css
from esdtool.report.html.markup import Content, Html, escaped, joined, tag

_SCRIPTS = ("report.js", "table.js", "figure.js", "curves.js")
_JSON_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def page(title: str, body: Content, data: Any, *, refresh: int | None = None) -> str:
    """Return a whole document.

    Args:
        title: of the window; any text.
        body: what stands in <main>.
        data: JSON-serialisable; the script finds it in the element #data. Without NaN and infinities.
            Pictures are admitted as `data:` addresses only: in the page itself.
        refresh: seconds after which a browser reads the file again; None: never.
    """
    style, script = _style(), _script()
    # The policy admits the two parts below by their hashes: markup that slips in through a name can run nothing.
    policy = (
        f"default-src 'none'; script-src '{_sha256(script)}'; style-src '{_sha256(style)}'; "
        "img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        Html('<meta charset="utf-8">'),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        *([] if refresh is None else [tag("meta", http_equiv="refresh", content=str(refresh))]),
        tag("title", title),
        tag("style", style),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            *head,
            "</head>",
            "<body>",
            tag("a", "Skip to the content", class_="skip", href="#content"),
            tag("main", joined(body), id="content", tabindex="-1"),
            tag("script", Html(embedded_json(data)), type="application/json", id="data"),
            tag("script", script),
            "</body>",
            "</html>\n",
        ]
    )


def embedded_json(data: Any) -> str:
    r"""Compact JSON that cannot end the script element it stands in.

    >>> embedded_json(["</script>"])
    '["\\u003c/script\\u003e"]'
    """
    return json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_JSON_ESCAPES)


def section(heading: str, content: Content, *, anchor: str) -> Html:
    """Return a part of the page under a heading that can be linked to."""
    return tag("section", [tag("h2", heading, id=anchor), joined(content)], aria_labelledby=anchor)


def details(summary: Content, content: Content) -> Html:
    """Return a part that is closed at first."""
    return tag("details", [tag("summary", joined(summary)), joined(content)])


def facts(pairs: list[tuple[str, Content]]) -> Html:
    """Terms and what they are."""
    return tag("dl", [tag("div", [tag("dt", term), tag("dd", joined(value))]) for term, value in pairs], class_="facts")


def noscript(words: str) -> Html:
    """Tell a reader without JavaScript what is missing."""
    return tag("noscript", tag("p", escaped(words), class_="note"))


def _sha256(part: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}"


@cache
def _style() -> Html:
    return Html(_read("report.css") + scale_css())


@cache
def _script() -> Html:
    body = "\n".join(_read(name) for name in _SCRIPTS)
    return Html(f'"use strict";\n(() => {{\n{body}\nstart();\n}})();\n')


def _read(name: str) -> str:
    # Line ends of another platform would change the hash that the browser computes.
    return (resources.files(__package__) / name).read_text(encoding="utf-8").replace("\r\n", "\n")
