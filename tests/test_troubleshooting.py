"""Every message that docs/troubleshooting.md quotes is one of the package's."""

import ast
import re
import warnings

import pytest
import torch
import transformers

import fdistill_kernels as fk
from fdistill_kernels.integrations.transformers import patch_model
from fdistill_kernels.sequence.trainer import FDistillConfig

from .pages import PAGES, ROOT
from .test_contract import Quantised
from .test_sequence import llama

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


def z(*shape, **options):
    return torch.randn(*shape, requires_grad=True, **options)


def rows(**keywords):
    return fk.f_divergence(z(2, 5), torch.randn(2, 5), **{"divergence": "kl", **keywords})


def to_list(ids, log_probs, **keywords):
    return fk.f_divergence(z(len(ids), 50), fk.TopK(torch.tensor(ids), torch.tensor(log_probs)), "kl", **keywords)


def from_hidden(hidden=None, head=None, teacher=None, teacher_head=None, *divergence, **keywords):
    """Of 2 tokens, V = 32 and D = 8."""
    hidden, head = z(2, 8) if hidden is None else hidden, z(32, 8) if head is None else head
    return fk.linear_f_divergence(hidden, head, teacher, teacher_head, *divergence, **keywords)


def partitioned():
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 3  # as DeepSpeed marks it
    return weight


def twice():
    logits = z(2, 5)
    loss = fk.f_divergence(logits, torch.randn(2, 5), "kl")
    torch.autograd.grad(loss, logits, create_graph=True)[0].sum().backward()


HIDDEN, HEAD = torch.randn(2, 8), torch.randn(32, 8)
CALLS = [
    lambda: fk.f_divergence(z(1, 151936), torch.empty(1, 152064), "kl"),
    lambda: from_hidden(z(1, 2), z(32000, 2), torch.randn(1, 4096), divergence="kl"),
    lambda: from_hidden(None, None, torch.randn(2, 32), "kl"),
    lambda: fk.f_divergence(z(2, 7, 61), torch.randn(2, 8, 61), "kl"),
    lambda: fk.f_divergence(z(2, 7, 61), torch.randn(2, 7, 61), "kl", labels=torch.ones(2, 8, dtype=torch.long)),
    lambda: fk.f_divergence(z(1, 32000), torch.randn(1, 32000), "kl", labels=torch.tensor([32003])),
    lambda: rows(ce_weight=1.0),
    lambda: rows(divergence="dkd"),
    lambda: rows(labels=torch.ones(2, dtype=torch.long), label_smoothing=0.1),
    lambda: rows(divergence="jsd"),
    lambda: rows(num_items=2, reduction="sum"),
    lambda: rows(token_weight=z(2)),
    lambda: fk.f_divergence(z(2, 5), torch.randn(2, 5, device="meta"), "kl"),
    lambda: from_hidden(None, None, z(2, 8), HEAD),
    lambda: from_hidden(z(2, 8, dtype=torch.bfloat16), None, HIDDEN, HEAD),
    lambda: from_hidden(None, torch.nn.Linear(8, 32), HIDDEN, HEAD),
    lambda: from_hidden(None, Quantised(HEAD, torch.ones(32, 1)), HIDDEN, HEAD, lambda t: (t - 1) ** 2),
    lambda: from_hidden(None, partitioned(), HIDDEN, HEAD),
    lambda: fk.f_divergence(z(1, 5).expand(3, 5), torch.randn(3, 5), "kl", inplace=True),
    lambda: from_hidden(None, None, torch.randn(2, 32), divergence="kl", memory="minimal"),
    lambda: fk.f_divergence(z(2, 5).double(), torch.randn(2, 5).double(), "kl", backend="cpu"),
    twice,
    lambda: torch.func.grad(lambda x: fk.f_divergence(x, torch.randn(2, 5), "kl"))(torch.randn(2, 5)),
    lambda: rows(divergence=lambda t: torch.where(t < 2, (t - 1) ** 2, 3 - t)),
    lambda: to_list([[1, 2]], [[-1.0, -2.0]], teacher_temperature=2.0),
    lambda: to_list([[1, 2, 3]], [[0.9, 0.08, 0.02]]),
    lambda: to_list([[1, 2, 3]] * 3 + [[5, 9, 5]], [[-2.0, -2.0, -2.0]] * 4),
    lambda: fk.f_divergence(z(2, 50), fk.top_k_of(torch.randn(2, 50), 3, tail="ignore"), "kl"),
    lambda: fk.f_divergence(z(2, 50), fk.sample_of(torch.randn(2, 50), 3), "tail_aware"),
    lambda: patch_model(transformers.LlamaModel(llama().config)),
    lambda: patch_model(torch.nn.Linear(3, 3)),
]


def said(call):
    """The text of what the call raises, or warns of."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return str(error)
    return str(warned[0].message)


def test_the_losses_say_what_the_page_quotes():
    of_losses = re.search(r"## What the losses take\n.*?\n## Several processes", PAGES["troubleshooting"], re.DOTALL)[0]
    messages = {said(call) for call in CALLS}
    assert messages <= set(QUOTED)
    others = [m for m in QUOTED if f"`{m}`" in of_losses and m not in messages]
    assert [m.partition(" ")[0] for m in others] == ["labels,", "position"]  # a GPU's, a server's


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
