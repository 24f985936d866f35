"""Let pages link to files of the repository outside `docs/`: the site contains a copy of each file.

In the repository `[script](../examples/gallery.py)` works as it stands. In the site it becomes a link to
`source/examples/gallery.py.txt`, which any browser shows as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)((?:#[^)\s]*)?\))")


def _outside(page: str, target: str) -> str | None:
    """Return the target of a page's link relative to the repository, or None if it is inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def _copy(path: str) -> str:
    return f"source/{path}.txt"


def on_files(files: Files, *, config: Any) -> Files:
    """Add a copy of each file to which a page links."""
    root = Path(config["docs_dir"]).parent
    for page in files.documentation_pages():
        for match in LINK.finditer(page.content_string):
            path = _outside(page.src_uri, match[2])
            if path is not None and (root / path).is_file() and files.get_file_from_path(_copy(path)) is None:
                text = (root / path).read_text(encoding="utf-8")
                files.append(File.generated(config, _copy(path), content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Point the links to the copies. A link without a target stays, and mkdocs reports it."""
    here = posixpath.dirname(page.file.src_uri)

    def changed(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[2])
        if path is None or files.get_file_from_path(_copy(path)) is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(_copy(path), here or '.')})"

    return LINK.sub(changed, markdown)
