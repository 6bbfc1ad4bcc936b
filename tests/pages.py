"""The Python of the documents, as blocks of text."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}


def blocks(page: str) -> list[str]:
    """The page's fenced blocks of Python, in their order."""
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
