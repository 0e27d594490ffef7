"""The newest part of CHANGELOG.md, which is a release's notes: ``python -m release.changelog > notes.md``."""

from __future__ import annotations

import re
from pathlib import Path

PATH = Path(__file__).resolve().parent.parent / "CHANGELOG.md"


def top(text: str) -> tuple[str, str]:
    """Version (or "Unreleased") of the first heading, and what stands under it."""
    found = re.search(r"^## (\S+).*\n+((?:(?!## ).*\n?)*)", text, re.MULTILINE)
    return (found[1], found[2].strip()) if found else ("none", "")


if __name__ == "__main__":
    print(top(PATH.read_text())[1])
