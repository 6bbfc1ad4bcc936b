"""Every message that docs/troubleshooting.md quotes is one of the package's."""

import ast
import re

from .pages import PAGES, ROOT

QUOTED = re.findall(r"^- `(.+)`$", PAGES["troubleshooting"], re.MULTILINE)


def texts():
    """Each string of the sources as a pattern, in which what is filled in may be anything."""
    for path in ROOT.glob("fdistill_kernels/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                said = [p.value if isinstance(p, ast.Constant) else None for p in node.values]
                if sum(len(text or "") for text in said) >= 10:  # else almost anything would be it
                    yield "".join(".*" if text is None else re.escape(text) for text in said)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.escape(node.value)


def test_every_message_is_of_the_sources():
    patterns = [re.compile(text) for text in set(texts())]
    assert len(QUOTED) > 40
    assert [m for m in QUOTED if not any(p.fullmatch(m) for p in patterns)] == []


def test_a_message_that_is_not_is_found():
    patterns = [re.compile(text) for text in set(texts())]
    assert not any(p.fullmatch("labels must be in [0, V), but hold 32003") for p in patterns)
