"""The Python of docs/teachers.md runs as it stands."""

import re
from pathlib import Path

import torch

from .openai_server import Server

PAGE = (Path(__file__).parent.parent / "docs" / "teachers.md").read_text(encoding="utf-8")


def test_the_page_runs(tmp_path):
    n, v, d, k = 5, 60, 8, 4
    torch.manual_seed(0)
    student_hidden, teacher_logits = torch.randn(n, d, requires_grad=True), torch.randn(n, v)
    log_probs, ids = teacher_logits.log_softmax(-1).topk(k)
    with Server() as server:
        names = dict(
            ids=ids, log_probs=log_probs, student_logits=torch.randn(n, v, requires_grad=True), head=torch.randn(v, d),
            student_hidden=student_hidden, teacher_logits=teacher_logits, folder=tmp_path / "store", prompt=[1, 2],
            head_weight=torch.randn(v, d).bfloat16(), continuation=[3, 4, 5], states=torch.randn(3, d).bfloat16(),
            url=server.url, vocabulary=server.model.vocabulary, prompts=[[1, 2]], continuations=[[3, 4]],
        )  # fmt: skip
        blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        assert len(blocks) == 4
        for block in blocks:
            names["folder"] = tmp_path / str(len(names))
            exec(block, names)
    assert names["of_both"].ids.shape[-1] <= 2 * 64 and names["rows"].states.shape == (3, d)
    assert names["targets"].ids.shape[0] == 2 and torch.isfinite(names["loss"])
    assert not names["endpoint"]._thread.is_alive()


def test_every_tail_is_on_the_page():
    from fdistill_kernels.sparse import TAILS

    assert all(f'`"{tail}"`' in PAGE for tail in TAILS)
