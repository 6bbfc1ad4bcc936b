"""One vocabulary over 1 to 4 processes: loss and gradients are one process's, and what is sent is what is stated."""

import contextlib
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fdistill_kernels as fk
from fdistill_kernels import scattered
from fdistill_kernels.backends import sharded
from fdistill_kernels.parallel import VocabShard, vocab_shard

from . import processes
from .conftest import WHOLE
from .fuzz import ranks as fuzz_ranks

N, V, D = 6, 61, 8
#: Collectives of a row's loss without labels; those of the others are two.
CALLS = {"lk": 4, "renyi": 4, "entropy_gated": 3, "csd": 3, "dkd": 5, "tail_aware": 5, "akl": 4 + sharded.HALVINGS}
#: Numbers of a token that a rank sends for loss and both gradients; the others are 11.
NUMBERS = {
    "lk": 14,
    "renyi": 14,
    "entropy_gated": 12,
    "csd": 12,
    "dkd": 20,
    "tail_aware": 34,
    "akl": 14 + sharded.HALVINGS,
}


def run(tmp_path, world, work, *arguments):
    """work(rank, world, *arguments) in each of so many processes; their errors."""
    meeting = str(tmp_path / f"meeting{world}{work.__name__}")
    processes.start(_process, world, meeting, work, arguments, processes=world)


def _process(rank, world, meeting, work, arguments):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        work(rank, world, *arguments)
    except Exception:
        Path(f"{meeting}.{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def cuts(world):
    """Unequal shards."""
    return [0, *[5 + 17 * i for i in range(world - 1)], V]


def randn(*shape, seed, dtype=torch.float64, scale=2.0):
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def here(rank, world, size=None):
    places = cuts(world)
    shard = vocab_shard(dist.group.WORLD, places[rank + 1] - places[rank], size)
    return shard, slice(places[rank], places[rank + 1])


def same(found, wanted, tolerance=1e-9):
    assert found.shape == wanted.shape
    if not wanted.numel():
        return
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=tolerance, atol=tolerance * float(wanted.abs().max() + 1e-30)
    )


def every_divergence(rank, world):
    shard, part = here(rank, world)
    student, teacher = randn(N, V, seed=0), randn(N, V, seed=1)
    teacher[1] = student[1] + 1e-3 * teacher[1]  # models that nearly agree
    student[2, 7], student[2, 40] = 9.0, 9.0  # a tie of two ranks' largest
    teacher[3, :50] = -torch.inf
    labels = torch.tensor([0, 4, 60, 5, -100, 22])
    for divergence in fk.TABLE.values():
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
            if dtype == torch.float32 and divergence.name in (
                "rkl",
                "jeffreys",
                "engine",
                "todi",
                "ab",
                "alpha",
                "neyman",
            ):
                continue  # infinite beside a teacher that is 0
            keywords = dict(labels=labels, temperature=1.3, reduction="none")
            whole, mine = (
                [x.to(dtype).clone().requires_grad_() for x in pair]
                for pair in ((student, teacher), (student[:, part], teacher[:, part]))
            )
            wanted = fk.f_divergence(*whole, divergence, **keywords, backend="torch")
            factors = torch.where(torch.isfinite(wanted), torch.linspace(0.5, 2, N), 0).to(wanted)
            calls = []
            original = sharded._Rows.run
            sharded._Rows.run = lambda rows, calls=calls, original=original: (calls.append(rows.wire), original(rows))[
                1
            ]
            try:
                found = fk.f_divergence(*mine, divergence, **keywords, shard=shard)
            finally:
                sharded._Rows.run = original
            assert [w.calls for w in calls] == [CALLS.get(divergence.name, 2)], (divergence.name, calls[0].calls)
            assert calls[0].numbers == N * NUMBERS.get(divergence.name, 11), (divergence.name, calls[0].numbers)
            assert calls[0].bytes <= 8 * calls[0].numbers
            finite = torch.isfinite(wanted)
            assert torch.equal(torch.isfinite(found), finite)
            same(found[finite], wanted[finite], tolerance)
            (torch.where(finite, wanted, 0) * factors).sum().backward()
            (torch.where(finite, found, 0) * factors).sum().backward()
            for one, other in zip(whole, mine, strict=True):
                rows = finite & (labels != -100)
                same(other.grad[rows], one.grad[rows][:, part], 1e-8 if dtype == torch.float64 else 1e-4)


def every_term(rank, world):
    """Labels' terms, caps, weights, metrics, reductions, in place; cross-entropy with class weights; a user's own f."""
    shard, part = here(rank, world)
    student, teacher = randn(2, 3, V, seed=2), randn(2, 3, V, seed=3)
    labels = torch.tensor([[0, 60, -100], [5, 22, 4]])
    for reduction in ("mean", "sum", "batchmean"):
        keywords = dict(labels=labels, ce_weight=0.4, label_smoothing=0.1, z_loss=1e-2, token_weight=torch.rand(2, 3, generator=torch.Generator().manual_seed(0)),
                        temperature=0.7, teacher_temperature=1.1, temperature_squared=True, logit_softcap=4.0,
                        teacher_logit_softcap=5.0, reduction=reduction, return_parts="metrics")  # fmt: skip
        whole, mine = student.clone().requires_grad_(), student[..., part].clone().requires_grad_()
        wanted, parts = fk.f_divergence(whole, teacher, "js", **keywords)
        found, others = fk.f_divergence(mine, teacher[..., part], "js", **keywords, shard=shard)
        same(found, wanted)
        for one, other in zip(parts, others, strict=True):
            same(other, one)
        (3 * wanted).backward()
        (3 * found).backward()
        same(mine.grad, whole.grad[..., part])
    weight = torch.rand(V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, mine = student.view(6, V).clone().requires_grad_(), student.view(6, V)[:, part].clone().requires_grad_()
    keywords = dict(label_smoothing=0.2, z_loss=1e-3, return_parts="metrics")
    wanted, parts = fk.cross_entropy(whole, labels.view(-1), weight, **keywords)
    found, others = fk.cross_entropy(mine, labels.view(-1), weight, **keywords, shard=shard)
    same(found, wanted)
    for one, other in zip(parts, others, strict=True):
        same(other, one)
    wanted.backward()
    found.backward()
    same(mine.grad, whole.grad[:, part])
    own = fk.FDivergence(lambda t: (t.sqrt() - 1) ** 2 / 2)
    for divergence in (own, "hellinger"):
        found = fk.f_divergence(student[..., part], teacher[..., part], divergence, shard=shard)
        same(found, fk.f_divergence(student, teacher, "hellinger"), 1e-6)
    over = student[..., part].contiguous().requires_grad_()
    fk.f_divergence(over * 1, teacher[..., part], "kl", shard=shard, inplace=True).backward()
    whole = student.clone().requires_grad_()
    fk.f_divergence(whole, teacher, "kl").backward()
    same(over.grad, whole.grad[..., part])


def on_triton(rank, world):
    """The row kernel's phases over ranks, in whole rows and in spans; what it leaves to torch's operations, too."""
    from fdistill_kernels.backends import triton
    from fdistill_kernels.backends.triton import launch

    shard, part = here(rank, world)
    labels = torch.tensor([0, 4, 60, 5, -100, 22])
    split, runs = triton.run, []
    triton.run = lambda *arguments: (runs.append(arguments[0]), split(*arguments))[1]
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.bfloat16, 1e-2)):
        student, teacher = randn(N, V, seed=40, dtype=dtype), randn(N, V, seed=41, dtype=dtype)
        student[2, 7], student[2, 40] = 9.0, 9.0
        teacher[3, :50] = teacher[5, 10:] = student[5, :9] = -torch.inf
        for spans in (1, 2):
            names = ("kl", "js", "tvd", "skew_rkl", "hellinger", "lk") if spans == 1 else ("js", "gjs")
            for name in names if WHOLE else names[dtype is torch.bfloat16 :: 2]:
                keywords = dict(
                    labels=labels, ce_weight=0.4, z_loss=1e-2, temperature=1.3, logit_softcap=12.0, backend="triton",
                    divergence_weight=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 0.0]),
                )  # fmt: skip
                whole, mine = (
                    [x.clone().requires_grad_() for x in pair]
                    for pair in ((student, teacher), (student[:, part], teacher[:, part]))
                )
                wanted = fk.f_divergence(*(x.double() for x in whole), name, **{**keywords, "backend": "torch"})
                runs.clear()
                with launch.forced(launch.Launch(8, 1, 2, spans)):
                    found = fk.f_divergence(*mine, name, **keywords, shard=shard)
                assert len(runs) == (name != "lk")  # whose statistics the kernels do not split
                same(found, wanted, tolerance)
                (3 * wanted).backward()
                (3 * found).backward()
                for one, other in zip(whole, mine, strict=True):
                    same(other.grad, one.grad[:, part], tolerance)
            own, other = (x.clone().requires_grad_() for x in (student, student[:, part]))
            fk.cross_entropy(own, labels, z_loss=1e-2).backward()
            fk.cross_entropy(other, labels, z_loss=1e-2, shard=shard, backend="triton").backward()
            same(other.grad, own.grad[:, part], tolerance)
    hidden, weight, theirs = (randn(*s, seed=42, dtype=torch.float32) for s in ((N, D), (V, D), (V, D)))
    pairs = [x.clone().requires_grad_() for x in (hidden, weight, hidden, weight[part])]
    wanted = fk.linear_f_divergence(*pairs[:2], hidden, theirs, "kl", labels=labels, ce_weight=0.5, backend="torch")
    runs.clear()
    found = fk.linear_f_divergence(
        *pairs[2:],
        hidden,
        theirs[part],
        "kl",
        labels=labels,
        ce_weight=0.5,
        backend="triton",
        shard=shard,
        chunk_bytes=600,
    )
    assert runs
    same(found, wanted, 3e-5)
    wanted.backward()
    found.backward()
    same(pairs[2].grad, pairs[0].grad, 3e-5)
    same(pairs[3].grad, pairs[1].grad[part], 3e-5)
    triton.run = split


def lists(rank, world):
    shard, part = here(rank, world)
    student, teacher = randn(N, V, seed=4), randn(N, V, seed=5)
    listed = fk.top_k_of(teacher, 7)
    listed.ids[2, 5:] = -1
    labels = torch.tensor([0, int(listed.ids[1, 2]), 60, 5, -100, 22])
    for tail in ("bucket", "uniform", "renormalize", "within", "sampled"):
        weights = torch.rand(N, 7) if tail == "sampled" else None
        if weights is not None:
            dist.broadcast(weights, 0)
        for name in ("kl", "js", "tvd", "ab", "dkd"):
            if name == "dkd" and tail == "sampled":
                continue
            one = listed._replace(tail=tail, weights=weights)
            keywords = dict(labels=labels, ce_weight=0.3, label_smoothing=0.1, return_parts=True)
            whole, mine = student.clone().requires_grad_(), student[:, part].clone().requires_grad_()
            wanted, parts = fk.f_divergence(whole, one, name, **keywords, backend="torch")
            found, others = fk.f_divergence(mine, one, name, **keywords, shard=shard)
            same(found, wanted)
            for a, b in zip(parts, others, strict=True):
                same(b, a)
            wanted.backward()
            found.backward()
            same(mine.grad, whole.grad[:, part])


def hidden_states(rank, world):
    """Heads split over ranks, in chunks; the teacher split alike, whole, or a list; ∂hidden is the whole one."""
    shard, part = here(rank, world)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 5e-5), (torch.bfloat16, 3e-2)):
        hidden, weight, bias = (
            randn(9, D, seed=6, dtype=dtype),
            randn(V, D, seed=7, dtype=dtype, scale=0.5),
            randn(V, seed=8, dtype=dtype, scale=0.1),
        )
        theirs, their_weight = randn(9, 5, seed=9, dtype=dtype), randn(V, 5, seed=10, dtype=dtype, scale=0.5)
        labels = torch.tensor([0, 4, 60, 5, -100, 22, 1, 2, 3])
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        mine = [
            hidden.clone().requires_grad_(),
            weight[part].clone().requires_grad_(),
            bias[part].clone().requires_grad_(),
        ]
        keywords = dict(divergence="js", labels=labels, ce_weight=0.3, logit_softcap=6.0, chunk_bytes=700)
        wanted = fk.linear_f_divergence(whole[0], whole[1], theirs, their_weight, student_bias=whole[2], **keywords)
        wanted.backward()
        for teacher_weight in (their_weight[part], their_weight):
            for x in mine:
                x.grad = None
            found = fk.linear_f_divergence(
                mine[0], mine[1], theirs, teacher_weight, student_bias=mine[2], shard=shard, **keywords
            )
            found.backward()
            same(found, wanted, tolerance)
            for one, other, at in zip(whole, mine, (slice(None), part, part), strict=True):
                same(other.grad, one.grad[at], tolerance)
        logits = theirs.double() @ their_weight.double().T
        for teacher in (fk.top_k_of(logits, 5), logits[:, part].to(dtype), logits.to(dtype)):
            of_whole = teacher if isinstance(teacher, fk.TopK) else logits.to(dtype)
            one = fk.linear_f_divergence(hidden, weight, of_whole, **keywords)
            given = [
                teacher,
                *([lambda begin, end, x=teacher: x[begin:end]] if isinstance(teacher, torch.Tensor) else []),
            ]
            for of_part in given:  # as such, and from a function
                same(fk.linear_f_divergence(hidden, weight[part], of_part, shard=shard, **keywords), one, tolerance)
        ce = fk.linear_cross_entropy(mine[0], mine[1], labels, linear_bias=mine[2], shard=shard)
        same(ce, fk.linear_cross_entropy(*whole[:2], labels, linear_bias=whole[2]), tolerance)
    gathered = shard._replace(sum_hidden=False)  # as sequence parallelism's gather, which sums by itself
    states = randn(9, D, seed=6).requires_grad_()
    fk.linear_cross_entropy(states, randn(V, D, seed=7)[part], labels, shard=gathered).backward()
    dist.all_reduce(states.grad)
    whole = randn(9, D, seed=6).requires_grad_()
    fk.linear_cross_entropy(whole, randn(V, D, seed=7), labels).backward()
    same(states.grad, whole.grad)


def dtensors(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    student, teacher = randn(N, V, seed=11), randn(N, V, seed=12)
    whole = student.clone().requires_grad_()
    wanted = fk.f_divergence(whole, teacher, "js")
    wanted.backward()
    split = distribute_tensor(student, mesh, [Shard(1)]).requires_grad_()
    for of_teacher in (
        distribute_tensor(teacher, mesh, [Shard(1)]),
        distribute_tensor(teacher, mesh, [Replicate()]),
        teacher,
    ):
        split.grad = None
        found = fk.f_divergence(split, of_teacher, "js")
        found.backward()
        same(found, wanted)
        same(split.grad.full_tensor(), whole.grad)
    hidden, weight = randn(N, D, seed=13), randn(V, D, seed=14)
    pair = [x.clone().requires_grad_() for x in (hidden, weight)]
    wanted = fk.linear_f_divergence(*pair, teacher, divergence="kl")
    wanted.backward()
    head = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    states = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    plain = hidden.clone().requires_grad_()  # it may be FSDP's, whose rows are others: these happen to be the same
    found = fk.linear_f_divergence(plain, head, teacher, divergence="kl")
    found.backward()
    same(found, wanted)
    same(plain.grad, pair[0].grad)
    same(head.grad.full_tensor(), pair[1].grad)
    head.grad = None
    found = fk.linear_f_divergence(states, head, distribute_tensor(teacher, mesh, [Shard(1)]), divergence="kl")
    found.backward()
    same(found, wanted)
    same(states.grad.full_tensor(), pair[0].grad)
    same(head.grad.full_tensor(), pair[1].grad)
    shift = randn(V, seed=19)  # whole, beside a head that is not; the student's, and a teacher's
    for beside in (dict(student_bias=shift), dict(teacher_bias=shift)):
        found = fk.linear_f_divergence(states, head, hidden, head.detach(), divergence="kl", **beside)
        same(found, fk.linear_f_divergence(hidden, weight, hidden, weight, divergence="kl", **beside))
    rows = distribute_tensor(student, mesh, [Replicate()])
    # each rank would have the gradient of a part
    for trained in (teacher.clone(), distribute_tensor(teacher, mesh, [Replicate()])) if world > 1 else ():
        with pytest.raises(ValueError, match="teacher_logits requires grad, and is not split as the student is"):
            fk.f_divergence(split, trained.requires_grad_())
        with pytest.raises(ValueError, match="student_bias requires grad, and is not split as the student is"):
            fk.linear_f_divergence(states, head, teacher, student_bias=trained[0])
    same(fk.f_divergence(rows, teacher, "js"), fk.f_divergence(student, teacher, "js"))
    labels = torch.arange(N) % V
    same(fk.linear_cross_entropy(states, head, labels), fk.linear_cross_entropy(hidden, weight, labels))
    own = distribute_tensor(labels, mesh, [Shard(0)]), distribute_tensor(hidden, mesh, [Shard(0)])
    for name, refused in {
        "target": lambda: fk.cross_entropy(student, own[0]), "labels": lambda: fk.f_divergence(split, teacher, labels=own[0]),
        "token_weight": lambda: fk.cross_entropy(student, labels, token_weight=own[0]),
        "num_items": lambda: fk.f_divergence(student, teacher, num_items=own[0]),
        "weight": lambda: fk.cross_entropy(student, labels, distribute_tensor(shift, mesh, [Replicate()])),
        "input": lambda: fk.linear_cross_entropy(own[1], weight, labels),
        "teacher_logits.ids": lambda: fk.f_divergence(student, fk.TopK(own[0].unsqueeze(1), shift[:N, None])),
    }.items():  # fmt: skip
        with pytest.raises(TypeError, match=f"^{name} is a DTensor: give {name}.to_local"):
            refused()
    with pytest.raises(ValueError, match="shard is given beside student_logits, a DTensor"):
        fk.f_divergence(split, teacher, shard=VocabShard(dist.group.WORLD, 0, V))


def scattered_heads(rank, world):
    """FSDP's heads: each rank has rows of its own, and the head's gradient is the mean of the ranks'."""
    counts = [3 + 2 * r if r != 1 else 0 for r in range(world)]  # a rank without rows, too
    begin, rows = sum(counts[:rank]), sum(counts)
    mine = slice(begin, begin + counts[rank])
    hidden, weight, bias = randn(rows, D, seed=20), randn(V, D, seed=21), randn(V, seed=22, scale=0.1)
    theirs, their_weight = randn(rows, 5, seed=23), randn(V, 5, seed=24)
    labels = torch.arange(rows) * 7 % V
    labels[::4] = -100
    meshes = [(init_device_mesh("cpu", (world,)), [Shard(0)]), (init_device_mesh("cpu", (world,)), [Shard(1)])]
    if world == 4:  # hybrid: two copies, each over two ranks; and over both
        two = init_device_mesh("cpu", (2, 2))
        meshes += [(two, [Replicate(), Shard(0)]), (two, [Shard(0), Shard(0)])]
    decisions = scattered.takes_turns
    for mesh, layout in meshes:
        for turns in (True, False):
            scattered.takes_turns = lambda *_, turns=turns: turns
            for teacher in ("head", "scattered", "list", "logits", "labels"):
                for reduction, factor in (("mean", 3.0), ("sum", 1.0 + rank), ("none", None)):
                    head, shift = (
                        distribute_tensor(
                            x, mesh, layout if x.dim() > 1 or layout[-1].dim == 0 else [Replicate()]
                        ).requires_grad_()
                        for x in (weight, bias)
                    )
                    states = hidden[mine].clone().requires_grad_()
                    whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
                    keywords = dict(
                        ce_weight=0.3, teacher_temperature=1.0, temperature=1.2, chunk_bytes=2000, reduction=reduction
                    )
                    bias_of = dict(student_bias=shift) if layout[-1].dim == 0 else {}
                    of_whole = dict(student_bias=whole[2]) if bias_of else {}
                    logits = theirs @ their_weight.T
                    given = {"head": (theirs[mine], their_weight), "scattered": (theirs[mine], distribute_tensor(their_weight, mesh, layout)),
                             "list": (fk.top_k_of(logits[mine], 5), None), "logits": (logits[mine], None)}.get(teacher)  # fmt: skip
                    if given is None:
                        found = fk.linear_cross_entropy(
                            states, head, labels[mine], linear_bias=bias_of.get("student_bias"), reduction=reduction
                        )
                    else:
                        found = fk.linear_f_divergence(
                            states, head, *given, divergence="js", labels=labels[mine], **bias_of, **keywords
                        )
                    upstream = (
                        torch.full_like(found, factor)
                        if factor
                        else torch.linspace(1, 2, rows, dtype=found.dtype)[mine]
                    )
                    (found * upstream).sum().backward()
                    total = 0
                    for r in range(world):
                        of_rank = slice(sum(counts[:r]), sum(counts[: r + 1]))
                        if given is None:
                            one = fk.linear_cross_entropy(
                                whole[0][of_rank],
                                whole[1],
                                labels[of_rank],
                                linear_bias=of_whole.get("student_bias"),
                                reduction=reduction,
                            )
                        else:
                            of_teacher = (
                                (fk.top_k_of(logits[of_rank], 5), None)
                                if teacher == "list"
                                else (logits[of_rank], None)
                                if teacher == "logits"
                                else (theirs[of_rank], their_weight)
                            )
                            one = fk.linear_f_divergence(
                                whole[0][of_rank],
                                whole[1],
                                *of_teacher,
                                divergence="js",
                                labels=labels[of_rank],
                                **of_whole,
                                **keywords,
                            )
                        scale = (
                            3.0
                            if reduction == "mean"
                            else 1.0 + r
                            if reduction == "sum"
                            else torch.linspace(1, 2, rows, dtype=one.dtype)[of_rank]
                        )
                        total = total + (one * scale).sum()
                        if r == rank:
                            same(found, one)
                    total.backward()
                    same(states.grad, whole[0].grad[mine])
                    same(head.grad.full_tensor(), whole[1].grad / world)
                    if bias_of:
                        same(shift.grad.full_tensor(), whole[2].grad / world)
    mesh = init_device_mesh("cpu", (world,))
    wide = distribute_tensor(weight.float(), mesh, [Shard(0)]).requires_grad_()  # a master head beside narrow states
    theirs_split = distribute_tensor(their_weight.float(), mesh, [Shard(0)])
    narrow, narrow_theirs = hidden[mine].bfloat16(), theirs[mine].bfloat16()
    for turns in (True, False):
        scattered.takes_turns = lambda *_, turns=turns: turns
        wide.grad = None
        loss = fk.linear_f_divergence(narrow, wide, narrow_theirs, theirs_split, divergence="js", labels=labels[mine])
        loss.backward()
        one = fk.linear_f_divergence(
            narrow, weight.bfloat16(), narrow_theirs, their_weight.bfloat16(), divergence="js", labels=labels[mine]
        )
        same(loss, one, 1e-2)
        assert wide.grad.dtype == torch.float32
        with torch.inference_mode():
            same(
                fk.linear_cross_entropy(narrow, wide, labels[mine]),
                fk.linear_cross_entropy(narrow, weight.bfloat16(), labels[mine]),
                1e-2,
            )
        # a whole bias beside a scattered teacher's head; heads of other sizes, of which the first entries are compared
        shift = randn(V, seed=25)
        split = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        teacher_split = distribute_tensor(their_weight, mesh, [Shard(0)])
        found = fk.linear_f_divergence(
            hidden[mine], split, theirs[mine], teacher_split, "kl", teacher_bias=shift, labels=labels[mine]
        )
        same(
            found,
            fk.linear_f_divergence(
                hidden[mine], weight, theirs[mine], their_weight, "kl", teacher_bias=shift, labels=labels[mine]
            ),
        )
        longer = distribute_tensor(torch.cat((their_weight, their_weight[:9])), mesh, [Shard(0)])
        found = fk.linear_f_divergence(
            hidden[mine], split, theirs[mine], longer, "kl", vocab_size=V - 5, labels=labels[mine].clamp_max(V - 6)
        )
        same(
            found,
            fk.linear_f_divergence(
                hidden[mine],
                weight[: V - 5],
                theirs[mine],
                their_weight[: V - 5],
                "kl",
                labels=labels[mine].clamp_max(V - 6),
            ),
        )
        with pytest.raises(ValueError, match="vocab_size"):
            fk.linear_cross_entropy(hidden[mine], split, labels[mine], vocab_size=V + 3)
        with pytest.raises(ValueError, match="both must be DTensors"):
            fk.linear_cross_entropy(hidden[mine], split, labels[mine], linear_bias=shift)
        with pytest.raises(ValueError, match="other hidden_states") if world > 1 else contextlib.nullcontext():
            states = hidden[mine].float() if rank == 0 else hidden[mine].half()
            fk.linear_cross_entropy(states, distribute_tensor(weight.float(), mesh, [Shard(0)]), labels[mine])
    scattered.takes_turns = decisions
    assert decisions(1000, 32000, 64, 64, 2, True) and not decisions(64000, 32000, 64, 64, 2, True)


def statistics_alone(rank, world):
    """log_sum_exp of split logits, and log-probabilities and entropies of split heads."""
    shard, part = here(rank, world)
    logits, hidden, weight = randn(2, 3, V, seed=25), randn(N, D, seed=26), randn(V, D, seed=27)
    logits[0, 1, :50] = -torch.inf
    whole, mine = logits.clone().requires_grad_(), logits[..., part].clone().requires_grad_()
    factors = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)
    for cap in (None, 3.0):
        whole.grad = mine.grad = None
        wanted, found = fk.log_sum_exp(whole, logit_softcap=cap), fk.log_sum_exp(mine, logit_softcap=cap, shard=shard)
        same(found, wanted)
        (wanted * factors).sum().backward()
        (found * factors).sum().backward()
        same(mine.grad, whole.grad[..., part])
    ids = torch.tensor([0, 4, 60, 5, -100, 22])
    pairs = [x.clone().requires_grad_() for x in (hidden, weight, hidden, weight[part])]
    keywords = dict(entropy=True, temperature=0.7, chunk_bytes=900)
    wanted, found = fk.log_probs(*pairs[:2], ids, **keywords), fk.log_probs(*pairs[2:], ids, shard=shard, **keywords)
    for one, other in zip(wanted, found, strict=True):
        same(other, one)
    for lp, h in (wanted, found):
        (lp * factors.view(-1) + 0.3 * h).sum().backward()
    same(pairs[2].grad, pairs[0].grad)
    same(pairs[3].grad, pairs[1].grad[part])
    logits[0, 2, V - 1], rows = torch.inf, logits.flatten(0, 1)
    _, parts = fk.cross_entropy(rows[:, part], torch.zeros(6).long(), z_loss=0.5, reduction="none",
                                return_parts="metrics", shard=shard)  # fmt: skip
    lse = rows.logsumexp(1)
    torch.testing.assert_close((parts.log_sum_exp, parts.z_loss), (lse, 0.5 * lse**2))


def of_fully_shard(rank, world):
    """A head that fully_shard made a DTensor of: two steps are one process's."""
    from torch.distributed.fsdp import fully_shard

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Linear(D, V, bias=False))

    states, labels = randn(4 * world, D, seed=32, dtype=torch.float32), torch.arange(4 * world) * 5 % V
    sharded_model, whole = model(), model()
    fully_shard(sharded_model[0])
    fully_shard(sharded_model[1])
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (sharded_model, whole)]
    for _ in range(2):
        mine = slice(4 * rank, 4 * rank + 4)
        fk.linear_cross_entropy(sharded_model[0](states[mine]), sharded_model[1].weight, labels[mine]).backward()
        fk.linear_cross_entropy(whole[0](states), whole[1].weight, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(sharded_model.parameters(), whole.parameters(), strict=True):
        same(one.full_tensor().detach(), other.detach(), 1e-5)


def lost(rank, world, meeting, how):
    """A rank that does not come to a loss."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world,
                            timeout=timedelta(seconds=3))  # fmt: skip
    shard, part = here(rank, world)
    logits, hidden, weight = randn(N, V, seed=0)[:, part], randn(N, D, seed=1), randn(V, D, seed=2)[part]
    if rank == 1:
        fk.f_divergence(logits, logits, shard=shard)
        if how == "hangs":
            time.sleep(30)
        os._exit(3)
    begin = time.monotonic()
    try:
        fk.f_divergence(logits, logits, shard=shard)
        fk.linear_cross_entropy(hidden, weight, torch.zeros(N, dtype=torch.long), shard=shard)
    except RuntimeError as error:
        Path(f"{meeting}.{rank}").write_text(f"{time.monotonic() - begin} {error}")
    os._exit(0)


#: Two divergences each, which a rank may take for one.
OTHERS = [
    ("js", "kl"),
    (fk.Alpha(0.3), fk.Alpha(0.8)),
    (fk.GJS(0.1), fk.GJS(0.9)),
    ("skew_kl=0.1", "skew_kl=0.2"),
    (fk.FDivergence(lambda t: (t - 1) ** 2), fk.FDivergence(lambda t: t * t.log())),
]


def another_call(rank, world):
    """A rank that brings something else is named on all ranks."""
    if world == 1:
        return
    shard, part = here(rank, world)
    student, hidden, weight = randn(N, V, seed=28)[:, part], randn(N, D, seed=29), randn(V, D, seed=30)[part]
    split = distribute_tensor(randn(V, D, seed=30), init_device_mesh("cpu", (world,)), [Shard(0)])  # as FSDP has it
    last = rank == world - 1
    few = slice(0, N - 1) if last else slice(None)
    tokens = torch.zeros(N, dtype=torch.long)
    log_p = fk.top_k_of(randn(N, V, seed=31), 4)
    other, narrow = rf"rank {world - 1} .* other ", torch.float16 if last else torch.float32
    calls = {
        rf"{other}rows \({N - 1}, and rank 0 {N}\)": (
            lambda: fk.f_divergence(student[few], student[few], shard=shard),
            lambda: fk.linear_cross_entropy(hidden[few], weight, tokens[few], shard=shard),
            lambda: fk.log_sum_exp(student[few], shard=shard)),
        f"{other}divergence than": tuple(
            call for pair in OTHERS for call in (
                lambda pair=pair: fk.f_divergence(student, student, pair[last], shard=shard),
                lambda pair=pair: fk.linear_f_divergence(hidden, weight, hidden, weight, pair[last], shard=shard),
                lambda pair=pair: fk.linear_f_divergence(hidden, split, hidden, split, pair[last]))),
        f"{other}entries_of_lists": (
            lambda: fk.f_divergence(student, fk.top_k_of(randn(N, V, seed=31), 4 if last else 3), shard=shard),),
        f"{other}tail, temperature, weights or precision of lists": (
            lambda: fk.f_divergence(student, log_p._replace(tail="within" if last else "bucket"), shard=shard),
            lambda: fk.f_divergence(student, log_p._replace(log_probs=log_p.log_probs.to(narrow)), shard=shard)),
        f"{other}label_smoothing, class weights, soft-caps": (
            lambda: fk.f_divergence(student, student, logit_softcap=3.0 + last, shard=shard),
            lambda: fk.linear_cross_entropy(hidden, weight, tokens, label_smoothing=0.1 + 0.1 * last, shard=shard),
            lambda: fk.linear_cross_entropy(hidden, weight, tokens, shard=shard._replace(sum_hidden=last))),
    }  # fmt: skip
    for words, some in calls.items():
        for call in some:
            with pytest.raises(ValueError, match=words):
                call()


def padding_and_other_groups(rank, world):
    """A vocabulary that is padded, one that begins elsewhere, and a teacher of larger shards."""
    shard, part = here(rank, world, V - 3)
    student, teacher = randn(N, V, seed=15), randn(N, V, seed=16)
    whole, mine = student.clone().requires_grad_(), student[:, part].clone().requires_grad_()
    wanted = fk.f_divergence(whole, teacher, "js", vocab_size=V - 3)
    found = fk.f_divergence(mine, teacher[:, part], "js", shard=shard)
    same(found, wanted)
    wanted.backward()
    found.backward()
    same(mine.grad, whole.grad[:, part])
    if world == 4:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        places = cuts(4)
        halves = (0, places[2]) if rank < 2 else (places[2], V)
        # the teacher's halves: ranks 0 and 1 both have the first, of a group {0, 2} or {1, 3}
        own = VocabShard(pairs[rank // 2], halves[0], V)
        full, _ = here(rank, world)
        found = fk.f_divergence(student[:, part], teacher[:, slice(*halves)], "js", shard=full, teacher_shard=own)
        same(found, fk.f_divergence(student, teacher, "js"))
        with pytest.raises(ValueError, match="a teacher is split as the student is"):
            fk.f_divergence(
                student[:, part], teacher[:, :2], "js", shard=full, teacher_shard=own._replace(begin=0 if rank else 40)
            )
    hidden, weight = randn(N, 4, seed=17), randn(V, 4, seed=18)
    for words, call in (
        ("teacher_logits is split", lambda own: fk.f_divergence(student, teacher, "js", teacher_shard=own)),
        ("teacher_hidden is split", lambda own: fk.linear_f_divergence(hidden, weight, teacher, teacher_shard=own)),
        ("teacher_hidden is split",
         lambda own: fk.linear_f_divergence(hidden, weight, hidden, weight, teacher_shard=own)),
        ("teacher_shard is for tensors",
         lambda own: fk.linear_f_divergence(hidden, weight[part], lambda *rows: teacher[slice(*rows)], shard=shard,
                                            vocab_size=V - 3, teacher_shard=own)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call(shard)
    with pytest.raises(ValueError, match="does not fit shards"):
        vocab_shard(dist.group.WORLD, 3, 100)
    assert vocab_shard(None, 3).size == 3 * world
    with pytest.raises(ValueError, match="student_logits has 7 entries here, and its shard 9"):
        fk.f_divergence(student[:, :7], student[:, :7], "js", shard=vocab_shard(None, 9))
    if world > 1:
        with pytest.raises(ValueError, match=f"shard has {V} of {V} entries here"):
            fk.f_divergence(student, teacher, "js", shard=VocabShard(dist.group.WORLD, 0, V))
        with pytest.raises(ValueError, match="as many as the whole vocabulary and as the student's shard with padding"):
            fk.f_divergence(student, teacher, "js", shard=VocabShard(dist.group.WORLD, 9, V))


def refused_on_all_ranks(rank, world):
    """What one rank brings, all refuse, instead of waiting for it."""
    last, mesh = rank == world - 1, init_device_mesh("cpu", (world,))
    for error, says, wrong in (
        (ValueError, "does not fit shards", (0 if last else 3, None, True)),
        (ValueError, "does not fit shards", (3, 3 * world - 3, True)),  # the last has padding alone
        (ValueError, f"rank {world - 1} has vocab_size=4", (3, 4 if last else 5, True)),
        (ValueError, f"rank {world - 1} has vocab_size=None and sum_hidden=False", (3, None, not last)),
        (TypeError, f"local_size of rank {world - 1} must be an int, not 5.5", (5.5 if last else 5, None, True)),
        (TypeError, "vocab_size of rank 0 must be an int, not 5.5", (5, 5.5, True)),
        (TypeError, "sum_hidden of rank 0 must be True or False", (5, None, 1)),
    ):
        with pytest.raises(error, match=says):
            vocab_shard(dist.group.WORLD, *wrong)
    logits, weight = torch.randn(2, world + 1), torch.randn(world + 1, D)
    shard = vocab_shard(None, 4)
    with pytest.raises(ValueError, match="hold nothing of a vocabulary of 4"):
        fk.f_divergence(torch.randn(2, 4), torch.randn(2, 4), "js", shard=shard, vocab_size=4)
    with pytest.raises(ValueError, match=r"student_logits is a DTensor whose .* the last have none"):
        fk.f_divergence(distribute_tensor(logits, mesh, [Shard(1)]), logits, "js")
    states = distribute_tensor(torch.randn(2, D), mesh, [Replicate()])
    with pytest.raises(ValueError, match="the last have none"):
        fk.linear_f_divergence(states, distribute_tensor(weight, mesh, [Shard(0)]), logits, divergence="js")
    some = dist.new_group([0, 1])
    with pytest.raises(ValueError, match="group: this rank") if rank > 1 else contextlib.nullcontext():
        vocab_shard(some, 3)
    with pytest.raises(TypeError, match="group must be a process group, not 'tp'"):
        vocab_shard("tp", 3)


def class_weights_of_own_rows(rank, world):
    """In turns, too, a rank's mean is divided by the class weights of its own targets."""
    mesh, decisions = init_device_mesh("cpu", (world,)), scattered.takes_turns
    counts = [3 + 2 * r if r != 1 else 0 for r in range(world)]
    hidden, weight = [randn(n, D, seed=30 + r) for r, n in enumerate(counts)], randn(V, D, seed=40)
    labels = [torch.arange(n) * (5 + r) % V for r, n in enumerate(counts)]
    classes = randn(V, seed=41).abs()
    for turns in (True, False):
        scattered.takes_turns = lambda *_, turns=turns: turns
        for smoothing in (0.0, 0.1):
            keywords = dict(weight=classes, label_smoothing=smoothing)
            whole = [x.clone().requires_grad_() for x in (*hidden, weight)]
            each = [fk.linear_cross_entropy(h, whole[-1], y, **keywords) for h, y in zip(whole, labels, strict=False)]
            sum(each).backward()
            states, head = hidden[rank].clone(), distribute_tensor(weight, mesh, [Shard(0)])
            found = fk.linear_cross_entropy(states.requires_grad_(), head.requires_grad_(), labels[rank], **keywords)
            found.backward()
            same(found, each[rank])
            same(states.grad, whole[rank].grad)
            same(head.grad.full_tensor(), whole[-1].grad / world)
    scattered.takes_turns = decisions


def in_a_compiler(rank, world):
    shard, part = here(rank, world)
    student, teacher = randn(N, V, seed=17)[:, part], randn(N, V, seed=18)[:, part]
    leaf, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    compiled = torch.compile(lambda x, t: fk.f_divergence(x, t, "js", shard=shard), fullgraph=True, backend="aot_eager")
    loss = compiled(leaf, teacher)
    loss.backward()
    eager = fk.f_divergence(other, teacher, "js", shard=shard)
    eager.backward()
    same(loss, eager)
    same(leaf.grad, other.grad)
    mesh = init_device_mesh("cpu", (world,))
    logits, teacher = (distribute_tensor(randn(N, V, seed=s), mesh, [Shard(1)]) for s in (17, 18))
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    compiled = torch.compile(lambda x, t: fk.f_divergence(2 * x, t, "js"), fullgraph=True, backend="aot_eager")
    compiled(leaf, teacher).backward()
    fk.f_divergence(2 * other, teacher, "js").backward()
    same(leaf.grad.full_tensor(), other.grad.full_tensor())
    hidden, weight, decisions = randn(N, D, seed=19), randn(V, D, seed=21), scattered.takes_turns

    def loss(x, head, factor):
        return factor * fk.linear_f_divergence(x, head, hidden, weight, "js")

    compiled, scattered.takes_turns = torch.compile(loss, backend="aot_eager"), lambda *_: True
    for factor in torch.tensor([[2.0, 2.0], [1.0, 3.0]])[:, rank]:  # the same on all ranks, and not
        pairs = []
        for call in (loss, compiled):
            pair = 2 * hidden, distribute_tensor(weight, mesh, [Shard(0)])  # as FSDP has it
            call(*(x.requires_grad_() for x in pair), factor).backward()
            pairs.append((pair[0].grad, pair[1].grad.full_tensor()))
        for one, other in zip(*pairs, strict=True):
            same(other, one)
    scattered.takes_turns = decisions


def everything(rank, world):
    for work in (every_divergence, every_term, lists, hidden_states, dtensors, padding_and_other_groups,
                 statistics_alone, another_call, scattered_heads, class_weights_of_own_rows, of_fully_shard,
                 on_triton):  # fmt: skip
        work(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4] if WHOLE else [3])
def test_a_split_vocabulary_is_the_whole_one(tmp_path, world):
    run(tmp_path, world, everything)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_does_not_come_is_named_on_all_others_in_time(tmp_path, how):
    meeting = tmp_path / "meeting"
    ranks = processes.start(lost, 3, str(meeting), how, processes=3, join=False).processes
    for process in (ranks[0], ranks[2]):
        process.join(60)
        assert process.exitcode == 0
    ranks[1].kill()
    for rank in (0, 2):
        seconds, words = Path(f"{meeting}.{rank}").read_text().split(" ", 1)
        assert f"loss ended on rank {rank}: ranks [1] of its group were not heard from" in words
        assert float(seconds) < 2 * 3 + 4  # the group's limit twice: until the last has noticed, and for its name


def test_without_a_default_group_it_is_told():
    with pytest.raises(ValueError, match="init_process_group"):
        vocab_shard(None, 3)


def test_what_one_rank_brings_is_refused_on_all(tmp_path):
    run(tmp_path, 3, refused_on_all_ranks)


def test_inside_a_compiler(tmp_path):
    run(tmp_path, 2, in_a_compiler)


def test_random_calls_over_ranks(tmp_path):
    asked = fuzz_ranks.Arguments(seconds=5)
    processes.start(fuzz_ranks.work, asked, str(tmp_path), processes=asked.ranks)
