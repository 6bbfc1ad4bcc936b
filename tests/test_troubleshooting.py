"""Every message that docs/troubleshooting.md quotes is one of the package's."""

import ast
import re

import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels.sequence.trainer import FDistillConfig

from .pages import PAGES, ROOT

QUOTED = re.findall(r"^- `(.+)`$", PAGES["troubleshooting"], re.MULTILINE)
#: What is filled into a message is a name or a number; three words in a row are a message of their own.
PROSE = re.compile(r"[A-Za-z]+( [a-z]+){2}")


def texts():
    """Each string of the sources as a pattern, with a group for each value that is filled in."""
    for path in [*ROOT.glob("fdistill_kernels/**/*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                said = [p.value if isinstance(p, ast.Constant) else None for p in node.values]
                if sum(len(text or "") for text in said) >= 10:  # else almost anything would match it
                    yield "".join("(.*)" if text is None else re.escape(text) for text in said)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.escape(node.value)


PATTERNS = [re.compile(text) for text in set(texts())]


def is_said(message):
    """Whether the message is a string of the sources, or two with a colon, and so is all prose that is filled in."""
    matches = [pattern.fullmatch(message) for pattern in PATTERNS]
    parts = [m.groups() for m in matches if m]
    head, _, rest = message.partition(": ")
    if rest and any(pattern.fullmatch(head) for pattern in PATTERNS):
        parts.append((rest,))
    return any(all(not PROSE.search(x) or is_said(x) or is_said(x.lstrip("; ")) for x in filled) for filled in parts)


def test_every_message_is_of_the_sources():
    assert len(QUOTED) > 40
    assert [message for message in QUOTED if not is_said(message)] == []


@pytest.mark.parametrize(
    "message",
    [
        "labels must be in [0, V), but hold 32003",
        "the cpu library is not built: nobody has built it yet",
        "backend 'cpu' cannot take this call: it has another opinion",
    ],
)
def test_a_message_that_is_not_is_found(message):
    assert not is_said(message)


def test_the_page_names_the_divergences_that_are_infinite():
    text = re.search(r"\*\*The loss is `inf`.*?The usual", PAGES["troubleshooting"], re.DOTALL)[0]
    named = [set(re.findall(r"\w+", group)) for group in re.findall(r"\(([^)]*)\)", text)]
    finite = torch.zeros(1, 20)
    impossible = torch.where(torch.arange(20) == 3, -torch.inf, finite)
    labels = torch.zeros(1, dtype=torch.long)
    for names, (student, teacher) in zip(named, ((finite, impossible), (impossible, finite)), strict=True):
        assert names == {d for d in fk.TABLE if fk.f_divergence(student, teacher, d, labels=labels).isinf()}


def test_every_setting_that_is_quoted_exists():
    names = re.findall(r"(\w+) was \S+ and is ", "\n".join(QUOTED))
    assert names and set(names) <= set(FDistillConfig.__dataclass_fields__)
