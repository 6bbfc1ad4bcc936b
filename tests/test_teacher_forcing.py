"""What a model reads and is asked about in the loss: the tokens that count, and what generation begins with."""

import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.sequence.models import forward_to_head, rows_of, step_loss, teacher_forced, unpadded
from fdistill_kernels.sequence.teachers import InRoom, Itself, Mixture, OfRows, Stored, logits_function

from .test_sequence import EOS, bart, batch, gpt2, llama, t5

CPU = torch.device("cpu")
PROMPTS, TARGETS = batch()
#: Every other token, none of the second sequence, all of the last.
COUNTED = [torch.arange(len(t)) % 2 == 0 for t in TARGETS[:1]] + [torch.zeros(len(TARGETS[1]), dtype=torch.bool)] + [
    torch.arange(len(t)) % 2 == 1 for t in TARGETS[2:-1]] + [torch.ones(len(TARGETS[-1]), dtype=torch.bool)]  # fmt: skip
HERE = torch.cat(COUNTED)


@pytest.mark.parametrize("make, options", [(llama, {}), (llama, dict(pack=True)), (gpt2, dict(side="left")), (bart, {}),
                                           (t5, {})])  # fmt: skip
def test_tokens_that_do_not_count_are_read(make, options):
    model = make(60)
    every, _ = rows_of(model, PROMPTS, TARGETS, EOS, **options)
    found, _ = rows_of(model, PROMPTS, TARGETS, EOS, counted=COUNTED, **options)
    torch.testing.assert_close(found.hidden, every.hidden[HERE])
    assert torch.equal(found.tokens, torch.cat(TARGETS)[HERE])
    none = [torch.zeros_like(m) for m in COUNTED]
    loss, _ = forward_to_head(model, PROMPTS, TARGETS, EOS, lambda rows: step_loss(rows, None, None), counted=none)
    assert loss == 0 and loss.requires_grad
    for wrong in (COUNTED[:-1], [m[:1] for m in COUNTED], [m.long() for m in COUNTED]):
        with pytest.raises(ValueError, match="counted must have a bool for each token"):
            teacher_forced(model, PROMPTS, TARGETS, EOS, counted=wrong)


@pytest.mark.parametrize("kind", ["room", "itself", "hidden", "top_k", "mixture", "of rows"])
def test_teachers_leave_out_rows_that_do_not_count(kind, tmp_path):
    model, student = llama(seed=2), llama(seed=1)
    room = InRoom(model)
    teacher = {"room": lambda: room, "itself": Itself, "mixture": lambda: Mixture([model, gpt2(60)]),
               "of rows": lambda: OfRows({"a": model, "b": gpt2(60)})}.get(kind)  # fmt: skip
    if teacher is None:
        head = room.rows(PROMPTS, TARGETS, CPU).value.head
        store = fk.TeacherStore.create(tmp_path, kind=kind, vocabulary=60, key={},
                                       **({"head": head, "states": "float32"} if kind == "hidden" else {"k": 8}))  # fmt: skip
        with store.writer() as writer:
            for prompt, target in zip(PROMPTS, TARGETS, strict=True):
                rows = room.rows([prompt], [target], CPU)
                logits = logits_function(rows, CPU)(0, len(target))
                writer.add(
                    prompt.tolist(), target.tolist(), rows.value.states if kind == "hidden" else fk.top_k_of(logits, 8)
                )
        teacher = Stored(fk.TeacherStore(tmp_path))
    else:
        teacher = teacher()
    if kind == "itself":
        teacher.bind(model)
    if kind == "of rows":
        teacher.choose(["b", "a", "a", "b", "a"])
    every, found = (teacher.rows(PROMPTS, TARGETS, CPU, counted=counted) for counted in (None, COUNTED))
    losses = []
    for rows, counted in ((every, None), (found, COUNTED)):
        ours, _ = rows_of(student, PROMPTS, TARGETS, EOS, counted=counted)
        losses.append(step_loss(ours, rows, TABLE["kl"], reduction="none"))
    torch.testing.assert_close(losses[1], losses[0][HERE])


def test_rows_with_holes_are_refused():
    ids = torch.tensor([[-100, 3, 4], [5, 6, -100], [-100, -100, -100]])
    assert [row.tolist() for row in unpadded(ids)] == [[3, 4], [5, 6], []]
    with pytest.raises(ValueError, match="−100 between its tokens"):
        unpadded(torch.tensor([[3, 4, 5], [3, -100, 5]]))
