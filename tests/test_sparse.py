"""Teachers known at a few ids: every tail, divergence and backend against float64 formulas written here, and dense losses."""

import itertools
import math
import warnings

import pytest
import torch

import fdistill_kernels as fk
from fdistill_kernels import checks, lists, reference
from fdistill_kernels.backends import BACKENDS, sparse
from fdistill_kernels.sparse import TAILS

from .conftest import WHOLE

CPU = torch.device("cpu")
N, V = 7, 101
#: Of Triton's interpreter, which is slow; their own kernels are tested elsewhere.
INTERPRETED = ("kl", "js", "ab", "dkd")
ALL = list(fk.TABLE.values())
SUMS = [d for d in ALL if d.statistics is None]  # of what each entry contributes
names = [str(d) for d in ALL]


def backends_for(dtype):
    return [n for n, m in BACKENDS.items() if m.why_not(CPU, dtype, fk.TABLE["kl"]) is None]


def logits_of(seed, n=N, v=V, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, v, dtype=torch.float64, generator=generator) * scale


def listed(teacher, k):
    log_probs, ids = teacher.log_softmax(-1).topk(k, -1)
    order = torch.argsort(torch.rand(ids.shape, generator=torch.Generator().manual_seed(k)), -1)
    return ids.gather(-1, order), log_probs.gather(-1, order)


def whole_divergence(log_p, log_q, divergence, labels=None):
    return reference.of_log_probs(divergence, log_p, log_q, labels)


def expected(student, ids, log_probs, divergence, tail, temperature=1.0, labels=None, weights=None, exponent=1.0):
    """The losses of rows, of (N, V) float64 logits, by the definitions in `TopK`, one row at a time."""
    losses = []
    for n in range(len(student)):
        keep = ids[n] >= 0
        row_ids, lp = ids[n][keep], log_probs[n][keep]
        log_q = (student[n] / temperature).log_softmax(-1)
        on_list = log_q[row_ids]
        others = torch.ones(len(log_q), dtype=torch.bool)
        others[row_ids] = False
        label = None if labels is None else labels[n]
        mass = lp.exp().sum()
        if tail == "uniform":
            log_p = torch.full_like(log_q, -math.inf)
            log_p[others] = torch.log1p(-mass) - math.log(max(1, int(others.sum())))
            log_p = log_p.scatter(0, row_ids, lp)
            a, b = (log_p * exponent).log_softmax(-1), log_q
        elif tail == "renormalize":
            a = torch.full_like(log_q, -math.inf).scatter(0, row_ids, (lp * exponent).log_softmax(-1))
            b = log_q
        elif tail == "within":
            a, b = (lp * exponent).log_softmax(-1), on_list.log_softmax(-1)
            label = None if label is None else _place(row_ids, label)
            if label is not None and label == len(row_ids):  # nothing of either model is there
                a, b = (torch.cat((x, x.new_full((1,), -math.inf))) for x in (a, b))
        elif tail == "bucket":
            a = torch.cat((lp, torch.log1p(-mass)[None]))
            b = torch.cat((on_list, log_q[others].logsumexp(0)[None]))
            label = None if label is None else _place(row_ids, label)
        else:
            a, b = lp, on_list
            label = None if label is None else _place(row_ids, label)
        label = None if label is None else torch.as_tensor(label)
        if weights is not None:
            each = whole_divergence(a.unsqueeze(-1), b.unsqueeze(-1), divergence)
            losses.append((weights[n][keep] * each).sum())
        else:
            losses.append(whole_divergence(a[None], b[None], divergence, None if label is None else label[None])[0])
    return torch.stack(losses)


def _place(ids, label):
    found = (ids == label).nonzero()
    return int(found[0]) if len(found) else len(ids)


def finite_pairs(tail):
    """Divergences that are finite where the teacher is 0 off its list."""
    if tail != "renormalize":
        return ALL
    at_zero = [d for d in ALL if math.isfinite(_of_a_zero(d))]
    assert {d.name for d in at_zero} >= {"kl", "js", "tvd", "skew_kl", "skew_rkl", "hellinger", "pearson"}
    return at_zero


def _of_a_zero(divergence):
    log_p, log_q = torch.tensor([[0.0, -math.inf]]).double(), torch.tensor([[0.5, 0.5]]).double().log()
    return float(whole_divergence(log_p, log_q, divergence, torch.tensor([0])))


def check(found, gradient, wanted, wanted_gradient, tolerance=2e-5):
    assert torch.isfinite(wanted).all()
    scale = wanted.abs().clamp_min(1e-3)
    assert ((found.double() - wanted).abs() <= tolerance * scale).all()
    of_row = wanted_gradient.abs().amax(-1, keepdim=True).clamp_min(1e-6)
    assert ((gradient.double() - wanted_gradient).abs() <= tolerance * of_row).all()


@pytest.mark.filterwarnings("ignore:tail='ignore'")
@pytest.mark.parametrize("tail", [t for t in TAILS if t != "sampled"])
@pytest.mark.parametrize("backend", backends_for(torch.float32))
def test_every_divergence_against_float64(backend, tail):
    student, teacher = logits_of(0), logits_of(1)
    ids, log_probs = listed(teacher, 9)
    ids[2, 3:] = -1  # shorter lists; what is beside an id of -1 is not looked at
    log_probs[2, 3:] = math.nan
    labels = torch.cat((ids[:4, 1], torch.tensor([5, 6, 7])))
    asked = finite_pairs(tail)
    for divergence in asked if WHOLE or backend != "triton" else [d for d in asked if d.name in INTERPRETED]:
        needed = labels if divergence.needs_labels else None
        leaf = student.clone().requires_grad_()
        wanted = expected(leaf, ids, log_probs, divergence, tail, labels=needed)
        wanted.sum().backward()
        narrow = student.float().requires_grad_()
        loss = fk.f_divergence(narrow, fk.TopK(ids, log_probs.float(), tail), divergence, labels=needed,
                               reduction="none", backend=backend)  # fmt: skip
        loss.sum().backward()
        check(loss, narrow.grad, wanted, leaf.grad)


@pytest.mark.filterwarnings("ignore:tail='ignore'")
@pytest.mark.parametrize("tail", [t for t in TAILS if t != "sampled"])
@pytest.mark.parametrize("divergence", ALL, ids=names)
def test_a_list_of_the_whole_vocabulary_is_the_dense_loss(divergence, tail):
    student, teacher = logits_of(2, 5, 33), logits_of(3, 5, 33)
    ids, log_probs = listed(teacher, 33)
    labels = torch.arange(5) if divergence.needs_labels else None
    pair = [student.clone().requires_grad_() for _ in range(2)]
    dense = fk.f_divergence(pair[0], teacher, divergence, labels=labels, reduction="none")
    sparse = fk.f_divergence(pair[1], fk.TopK(ids, log_probs, tail), divergence, labels=labels, reduction="none")
    for loss in (dense, sparse):
        loss.sum().backward()
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pair[1].grad, pair[0].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "divergence", [d for d in SUMS if d.name not in ("engine", "ab", "todi", "cross_entropy")], ids=str
)
def test_a_bucket_is_a_divergence_below_the_whole_one(divergence):
    student, teacher = logits_of(4, 40, 61), logits_of(5, 40, 61)
    whole = fk.f_divergence(student, teacher, divergence, reduction="none")
    before = torch.zeros(40, dtype=torch.float64)
    for k in (1, 2, 5, 20, 40, 60, 61):
        log_probs, ids = teacher.log_softmax(-1).topk(k, -1)
        loss = fk.f_divergence(student, fk.TopK(ids, log_probs), divergence, reduction="none")
        assert (loss >= 0).all()
        assert (loss >= before - 1e-8 * (1 + before)).all()  # finer categories tell more
        before = loss
    torch.testing.assert_close(before, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", backends_for(torch.float32))
@pytest.mark.parametrize("tail", ["bucket", "uniform", "within"])
def test_all_terms_at_once(backend, tail):
    student, teacher = logits_of(6, 8), logits_of(7, 8)
    ids, log_probs = listed(teacher, 11)
    labels = torch.cat((ids[:3, 2], torch.tensor([4, -100, 6, 7, 8])))
    weight, rate = torch.rand(8).double() + 0.5, torch.rand(8).double() + 0.7
    cap = 6.0
    leaf = student.clone().requires_grad_()
    z = cap * (leaf / cap).tanh()
    divergence = torch.stack([
        expected(z[n : n + 1], ids[n : n + 1], log_probs[n : n + 1], fk.TABLE["js"], tail, temperature=rate[n])[0]
        for n in range(8)
    ])  # fmt: skip
    live = labels != -100
    cross_entropy = torch.nn.functional.cross_entropy(z, labels, reduction="none", label_smoothing=0.1)
    each = 0.7 * divergence + 0.3 * cross_entropy + 1e-2 * z.logsumexp(-1) ** 2
    wanted = (torch.where(live, weight * each, 0) / live.sum()).sum()
    wanted.backward()
    narrow = student.float()
    narrow[4] = math.nan  # masked
    narrow.requires_grad_()
    loss, parts = fk.f_divergence(
        narrow, fk.TopK(ids, log_probs.float(), tail), "js", divergence_weight=0.7, labels=labels, ce_weight=0.3,
        label_smoothing=0.1, z_loss=1e-2, token_weight=weight.float(), temperature=rate.float(),
        teacher_temperature=1.0, logit_softcap=cap, backend=backend, return_parts=True,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-5)
    assert (narrow.grad.double() - leaf.grad).abs().max() <= 2e-5 * leaf.grad.abs().max()
    assert not narrow.grad[4].any()
    assert isinstance(parts, fk.SparseParts) and parts.tokens == 7
    total = parts.divergence + 0.3 * parts.cross_entropy + parts.z_loss
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalize", "within", "ignore"])
@pytest.mark.filterwarnings("ignore:tail='ignore'")
def test_from_hidden_states(tail, dtype):
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(2, 19, 16, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, 16, dtype=torch.float64, generator=generator) * 0.5
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    ids, log_probs = listed(logits_of(9, 38), 6)
    teacher = fk.TopK(ids.view(2, 19, 6), log_probs.float().view(2, 19, 6), tail)
    labels = torch.randint(0, V, (2, 19), generator=generator)
    labels[0, :4] = -100
    keywords = dict(labels=labels, ce_weight=0.5, temperature=1.0)
    loss, parts = fk.linear_f_divergence(
        hidden, weight, teacher, divergence="js", chunk_bytes=3000, return_parts=True, **keywords
    )
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted, wanted_parts = fk.f_divergence(exact[0] @ exact[1].T, teacher, "js", return_parts=True, **keywords)
    wanted.backward()
    tolerance = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    for x, y in zip((hidden, weight), exact, strict=True):
        assert (x.grad.double() - y.grad).abs().max() <= tolerance * y.grad.abs().max()
    for name in ("teacher_mass", "student_mass"):
        assert float(getattr(parts, name)) == pytest.approx(
            float(getattr(wanted_parts, name)), rel=tolerance, abs=tolerance
        )
    minimal = fk.linear_f_divergence(hidden, weight, teacher, divergence="js", memory="minimal", **keywords)
    assert minimal.item() == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("backend", backends_for(torch.float32))
@pytest.mark.parametrize("tail", ["bucket", "within"])
def test_either_rest_may_be_almost_nothing(backend, tail):
    """The student's list 80 above its rest, or far below it; the teacher's rest below its rounding."""
    student = torch.randn(4, 5003, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.stack([torch.randperm(5003, generator=torch.Generator().manual_seed(n))[:6] for n in range(4)])
    student[0] = student[0].scatter_add(0, ids[0], torch.full((6,), 30.0).double())
    student[1] = student[1].scatter_add(0, ids[1], torch.full((6,), 200.0).double())
    student[2] = student[2].scatter_add(0, ids[2], torch.full((6,), -60.0).double())
    log_probs = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double().log_softmax(-1) + math.log1p(
        -1e-3
    )
    student = student.float().double()
    log_probs = log_probs.float().double()
    for name in ("kl", "rkl", "js", "tvd", "jeffreys"):
        leaf = student.clone().requires_grad_()
        wanted = expected(leaf, ids, log_probs, fk.TABLE[name], tail)
        wanted.sum().backward()
        narrow = student.float().requires_grad_()
        loss = fk.f_divergence(narrow, fk.TopK(ids, log_probs.float(), tail), name, reduction="none", backend=backend)
        loss.sum().backward()
        check(loss, narrow.grad, wanted, leaf.grad, 1e-4)  # 1 less a float32 mass has 1e-4 of 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mass_of_one_but_for_rounding(dtype):
    teacher = logits_of(10, 64, 50, scale=8.0)
    log_probs, ids = teacher.log_softmax(-1).topk(30, -1)
    student = logits_of(11, 64, 50).float().requires_grad_()
    rounded = log_probs.to(dtype)
    assert (rounded.double().exp().sum(-1) > 1).any()
    for name in fk.TABLE:
        labels = torch.arange(64) % 50 if fk.TABLE[name].needs_labels else None
        loss = fk.f_divergence(student, fk.TopK(ids, rounded), name, reduction="none", labels=labels)
        student.grad = None
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(student.grad).all()
        assert (loss >= 0).all() or name in ("engine", "cross_entropy", "ab")


def test_lists_that_are_empty_padded_or_longer_than_the_vocabulary():
    student = logits_of(12, 3, 6).requires_grad_()
    log_p = torch.tensor([0.5, 0.3, 0.1]).double().log()
    ids = torch.full((3, 9), -1)
    log_probs = torch.full((3, 9), math.nan).double()
    ids[0, [1, 4, 8]], log_probs[0, [1, 4, 8]] = torch.tensor([2, 0, 5]), log_p
    ids[2, :3], log_probs[2, :3] = torch.tensor([0, 2, 5]), log_p[[1, 0, 2]]
    for tail in ("bucket", "renormalize", "within", "uniform"):
        loss = fk.f_divergence(student, fk.TopK(ids, log_probs, tail), "js", reduction="none")
        assert torch.isfinite(loss).all()
        assert loss[1] == 0 or tail == "uniform"
    short = fk.f_divergence(student[0], fk.TopK(torch.tensor([2, 0, 5]), log_p), "js")
    assert fk.f_divergence(student[:1], fk.TopK(ids[:1], log_probs[:1]), "js").item() == pytest.approx(short.item())
    none = fk.TopK(ids[:, :0], log_probs[:, :0])
    loss, parts = fk.f_divergence(student, none, "js", return_parts=True)
    assert loss.item() == 0 and parts.overlap == 0 and parts.student_mass == 0
    empty = fk.f_divergence(student[:0], fk.TopK(ids[:0], log_probs[:0]), "kl")
    assert empty.item() == 0
    for shape in ((0, 9), (2, 0, 9), (9,)):
        of_none = torch.zeros(shape)
        for made in (fk.top_k_of(of_none, 3), fk.sample_of(of_none, 3)):
            assert made.ids.shape == (*shape[:-1], 3)
            assert torch.isfinite(fk.f_divergence(of_none, made, "js"))
    hidden, head = torch.randn(0, 4, requires_grad=True), torch.randn(6, 4)
    assert fk.linear_f_divergence(hidden, head, fk.TopK(ids[:0], log_probs[:0]), divergence="kl").item() == 0


@pytest.mark.parametrize("backend", backends_for(torch.float32))
def test_masks_of_the_student_and_zeros_of_the_teacher(backend):
    student, teacher = logits_of(13), logits_of(14)
    student[:, 50:] = -math.inf
    ids, log_probs = listed(teacher.masked_fill(torch.arange(V) >= 40, -math.inf), 45)
    assert (log_probs == -math.inf).any()
    for name in ("kl", "js", "tvd", "skew_kl"):
        leaf = student.clone().requires_grad_()
        whole = fk.f_divergence(leaf, teacher.masked_fill(torch.arange(V) >= 40, -math.inf), name, reduction="none")
        whole.sum().backward()
        narrow = student.float().requires_grad_()
        loss = fk.f_divergence(narrow, fk.TopK(ids, log_probs.float()), name, reduction="none", backend=backend)
        loss.sum().backward()
        check(loss, narrow.grad, whole, leaf.grad, 1e-4)


@pytest.mark.parametrize("tail", ["uniform", "renormalize", "within"])
def test_tempered_lists(tail):
    """A whole teacher can be had at another temperature, also when its log-probabilities were taken at one."""
    student, teacher = logits_of(15), logits_of(16)
    ids, at_two = listed(teacher / 2, 12)
    for asked in (1.0, 2.0, 3.5):
        wanted = expected(student, ids, at_two, fk.TABLE["kl"], tail, temperature=1.5, exponent=2 / asked)
        loss = fk.f_divergence(student, fk.TopK(ids, at_two, tail, temperature=2.0), "kl", temperature=1.5,
                               teacher_temperature=asked, reduction="none")  # fmt: skip
        torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tail", ["uniform", "renormalize", "within"])
@pytest.mark.parametrize("backend", backends_for(torch.float32))
def test_a_temperature_that_takes_log_probs_beyond_float32(backend, tail):
    """Those of a sure teacher at a low temperature, whose products with it are infinite, are of a distribution."""
    student = torch.zeros(1, 5, requires_grad=True)
    log_probs = torch.tensor([[-1e3, -1e3]])
    teacher = fk.TopK(torch.tensor([[3, 1]]), log_probs, tail, temperature=1e18)
    loss = fk.f_divergence(student, teacher, "kl", temperature=1.0, teacher_temperature=1e-18, backend=backend)
    loss.backward()
    p = [1 / 3, 0, 1 / 3, 0, 1 / 3] if tail == "uniform" else [0, 0.5, 0, 0.5, 0]
    q = torch.tensor([0, 0.5, 0, 0.5, 0]) if tail == "within" else torch.full((5,), 0.2)
    torch.testing.assert_close(student.grad[0], q - torch.tensor(p), rtol=1e-5, atol=1e-6)
    known = torch.tensor(p) > 0
    torch.testing.assert_close(loss, (torch.tensor(p) * (torch.tensor(p) / q).log())[known].sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends_for(torch.float32))
def test_what_weighs_nothing_in_a_sample_is_not_looked_at(backend):
    """An entry whose term is infinite, and whose weight is 0."""
    student = logits_of(60, 2, 9).float()
    log_probs = torch.tensor([0.5, 0.0, 0.2]).log().expand(2, 3)
    ids, weights = torch.tensor([[4, 2, 7]] * 2), torch.tensor([[1.0, 0.0, 2.0]] * 2)
    for divergence in SUMS:
        found = []
        for keep in (slice(None), slice(None, None, 2)):
            leaf = student.clone().requires_grad_()
            teacher = fk.TopK(ids[:, keep], log_probs[:, keep], "sampled", weights[:, keep])
            loss = fk.f_divergence(leaf, teacher, divergence, reduction="none", backend=backend)
            loss.sum().backward()
            assert torch.isfinite(loss).all() and torch.isfinite(leaf.grad).all(), divergence
            found += [loss.detach(), leaf.grad]
        torch.testing.assert_close(found[:2], found[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends_for(torch.float32))
@pytest.mark.filterwarnings("ignore:tail='ignore'")
def test_a_sum_over_no_ids_is_0(backend):
    for divergence in ALL:
        student = torch.zeros(2, 5, requires_grad=True)
        empty = fk.TopK(torch.full((2, 3), -1), torch.zeros(2, 3), "ignore")
        loss = fk.f_divergence(student, empty, divergence, labels=torch.tensor([1, 2]), backend=backend)
        loss.backward()
        assert loss == 0 and not student.grad.any(), divergence
    student = torch.full((2, 5), -math.inf, requires_grad=True)  # nor is the student looked at
    for ids, weights in ((empty.ids, torch.ones(2, 3)), (torch.tensor([[0, 1, 2]] * 2), torch.zeros(2, 3))):
        sample = fk.TopK(ids, torch.full((2, 3), -2.0), "sampled", weights)
        fk.f_divergence(student, sample, "js", backend=backend).backward()
        assert not student.grad.any()


@pytest.mark.parametrize("backend", backends_for(torch.float32))
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_hidden_rest_beside_a_student_whose_mask_is_capped(backend, tail):
    """Its masked logits are -cap, and no zeros: the teacher's rest is there as well."""
    student, ids = logits_of(61, 3, 12), torch.arange(6).expand(3, 6)
    student[:, 8:] = -math.inf
    log_probs = logits_of(62, 3, 6).log_softmax(-1).half()
    found = []
    for least in (-math.inf, -1e4):
        z = student.clamp_min(least).float().requires_grad_()
        teacher = fk.TopK(ids, log_probs, tail)
        for parts in (False, True):
            loss = fk.f_divergence(z, teacher, "rkl", logit_softcap=2.0, backend=backend, return_parts=parts)
            found.append((loss[0] if parts else loss).detach())
    torch.testing.assert_close(torch.stack(found), found[2].expand(4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends_for(torch.bfloat16))
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.filterwarnings("ignore:tail='ignore'")
def test_rows_that_overlap(backend, tail):
    """16-bit logits whose rows share memory, or are one: a copy in 32 bits is not laid out like others."""
    memory = logits_of(63, 1, 40).bfloat16().flatten()
    ids, log_probs = listed(logits_of(64, 5, 30), 4)
    teacher = fk.TopK(ids, log_probs.float(), tail, torch.ones(5, 4) if tail == "sampled" else None)
    for strides in ((1, 1), (0, 1), (2, 1)):
        rows = memory.as_strided((5, 30), strides)
        for parts in (False, True):
            found = [
                fk.f_divergence(z, teacher, "js", reduction="none", backend=backend, return_parts=parts)
                for z in (rows, rows.clone(memory_format=torch.contiguous_format))
            ]
            torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_temperatures_that_a_list_cannot_honour():
    student, (ids, log_probs) = logits_of(17), listed(logits_of(18), 4)
    for tail in ("bucket", "ignore"):
        with pytest.raises(ValueError, match="log_probs were taken at 1, and without the rest"):
            fk.f_divergence(student, fk.TopK(ids, log_probs, tail), temperature=2.0)
        for ones in (torch.ones(N), torch.ones(())):
            with pytest.raises(ValueError, match=r"teacher_temperature is a tensor, .*: give teacher_temperature=1,"):
                fk.f_divergence(student, fk.TopK(ids, log_probs, tail), temperature=ones)
    apart = fk.f_divergence(student, fk.TopK(ids, log_probs), temperature=2.0, teacher_temperature=1.0)
    same = fk.f_divergence(student / 2, fk.TopK(ids, log_probs))
    assert apart.item() == pytest.approx(same.item())
    assert fk.f_divergence(student, fk.TopK(ids, log_probs, temperature=2.0), temperature=2.0).item() == pytest.approx(
        same.item()
    )


@pytest.mark.parametrize("divergence", [*SUMS, fk.Renyi(1.0)], ids=str)
def test_sampled_lists_are_unbiased(divergence):
    """Over all 5² outcomes of two draws from π, the mean of the loss and of its gradient is the whole sum's."""
    v, draws = 5, 2
    student, log_p = logits_of(19, 1, v), logits_of(20, 1, v).log_softmax(-1)
    proposal = (0.8 * log_p).softmax(-1)[0]
    leaf = student.clone().requires_grad_()
    whole = whole_divergence(log_p, leaf.log_softmax(-1), divergence).sum()
    whole.backward()
    value, gradient = 0.0, torch.zeros(1, v).double()
    for outcome in itertools.product(range(v), repeat=draws):
        ids, counts = torch.tensor(outcome).unique(return_counts=True)
        ids, weights = ids[None], (counts / (draws * proposal[ids]))[None]
        sample = student.clone().requires_grad_()
        loss = fk.f_divergence(sample, fk.TopK(ids, log_p.gather(1, ids), "sampled", weights), divergence)
        loss.backward()
        chance = math.prod(float(proposal[i]) for i in outcome)
        value, gradient = value + chance * loss.item(), gradient + chance * sample.grad
    assert value == pytest.approx(whole.item(), rel=1e-9)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-8, atol=1e-10)


def test_random_sampling_distillation_is_the_paper_s():
    """kl with π = p: the gradient of the cross-entropy to the drawn ids' frequencies (arXiv 2503.16870)."""
    student, log_p = logits_of(21, 1, 9).requires_grad_(), logits_of(22, 1, 9).log_softmax(-1)
    ids, counts = torch.multinomial(log_p.exp(), 20, True, generator=torch.Generator().manual_seed(0))[0].unique(
        return_counts=True
    )
    frequencies = torch.zeros(9).double().scatter(0, ids, counts.double() / 20)
    ids = ids[None]
    weights = counts[None] / (20 * log_p.gather(1, ids).exp())
    fk.f_divergence(student, fk.TopK(ids, log_p.gather(1, ids), "sampled", weights), "kl").backward()
    torch.testing.assert_close(student.grad[0], student.detach().softmax(-1)[0] - frequencies)


def test_a_generator_of_one_s_own():
    own = fk.FDivergence(lambda t: (t.sqrt() - 1) ** 2 / 2)
    student, (ids, log_probs) = logits_of(23), listed(logits_of(24), 8)
    pair = [student.float().requires_grad_() for _ in range(2)]
    for tail in ("bucket", "uniform", "renormalize", "within"):
        losses = [
            fk.f_divergence(x, fk.TopK(ids, log_probs, tail), d, reduction="none")
            for x, d in zip(pair, (own, "hellinger"), strict=True)
        ]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        for x, loss in zip(pair, losses, strict=True):
            x.grad = None
            loss.sum().backward()
        torch.testing.assert_close(pair[0].grad, pair[1].grad, rtol=1e-3, atol=1e-6)
    weights = torch.rand(N, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for teacher in (fk.TopK(ids, log_probs, "ignore"), fk.TopK(ids, log_probs, "sampled", weights)):
            of_own, of_name = (fk.f_divergence(student, teacher, d) for d in (own, "hellinger"))
            assert of_own.item() == pytest.approx(of_name.item())


def test_the_truncated_sum_says_what_it_is():
    student, (ids, log_probs) = logits_of(25), listed(logits_of(26), 5)
    teacher = fk.TopK(ids, log_probs, "ignore")
    with pytest.warns(UserWarning, match="no divergence, it may be negative") as told:
        loss = fk.f_divergence(student, teacher, "kl", reduction="none")
        fk.linear_f_divergence(student.float(), torch.eye(V), teacher, divergence="kl")
    assert [w.filename for w in told] == [__file__] * 2
    wanted = (log_probs.exp() * (log_probs - student.log_softmax(-1).gather(1, ids))).sum(-1)
    torch.testing.assert_close(loss, wanted)
    assert (wanted < 0).any() or (wanted > 0).all()


@pytest.mark.parametrize("backend", backends_for(torch.float32))
@pytest.mark.parametrize("tail", ["bucket", "uniform", "within"])
def test_a_student_that_is_no_number(tail, backend):
    """Outside the list, too, is told by the loss; not by one that weighs nothing."""
    student, (ids, log_probs) = logits_of(29).float(), listed(logits_of(30), 5)
    outside = next(v for v in range(V) if v not in ids[1])
    student[1, outside] = math.nan
    student.requires_grad_()
    for weight in (torch.ones(len(student)), (torch.arange(len(student)) != 1).float()):
        loss = fk.f_divergence(student, fk.TopK(ids, log_probs.float(), tail), "js", divergence_weight=weight,
                               reduction="none", backend=backend)  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        right = [n != 1 or weight[1] == 0 for n in range(len(student))]
        assert loss.isfinite().tolist() == gradient.isfinite().all(1).tolist() == right
    assert (gradient[1] == 0).all()


@pytest.mark.filterwarnings("ignore:tail='ignore'")
@pytest.mark.parametrize("divergence", ALL, ids=names)
def test_a_student_that_is_no_number_beside_a_list_of_zeros(divergence):
    student, (ids, log_probs) = logits_of(29), listed(logits_of(30), 5)
    student[1, 7] = math.nan
    log_probs[1] = -math.inf
    student.requires_grad_()
    teacher, labels = fk.TopK(ids, log_probs, "ignore"), torch.zeros(len(student), dtype=torch.long)
    loss = fk.f_divergence(student, teacher, divergence, labels=labels, ce_weight=0.0, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isnan().nonzero().tolist() == [[1]] and gradient.isnan().any(1).nonzero().tolist() == [[1]]


@pytest.mark.filterwarnings("ignore:tail='ignore'")
def test_what_neither_model_has_is_nothing_however_it_weighs():
    student, (ids, log_probs) = logits_of(31).requires_grad_(), listed(logits_of(32), 5)
    ids[:, 2:] = -1
    for divergence in SUMS:
        loss = fk.f_divergence(student, fk.TopK(ids, log_probs, "ignore"), divergence, divergence_weight=100.0)
        assert torch.autograd.grad(loss, student)[0].isfinite().all(), divergence


def test_the_masses_and_the_overlap():
    student, teacher = logits_of(27, 6, 200), logits_of(28, 6, 200)
    ids, log_probs = listed(teacher, 10)
    ids[5, 4:] = -1
    for temperature, backend in ((1.0, "torch"), (1.0, "cpu"), (2.0, "cpu")):
        for tail in ("bucket", "uniform"):
            _, parts = fk.f_divergence(student.float(), fk.TopK(ids, log_probs, tail), "kl", temperature=temperature,
                                       teacher_temperature=1.0, reduction="none", return_parts=True, backend=backend)  # fmt: skip
            q = (student / temperature).softmax(-1)
            for n in range(6):
                row = ids[n][ids[n] >= 0]
                assert float(parts.teacher_mass[n]) == pytest.approx(
                    float(log_probs[n][: len(row)].exp().sum()), rel=1e-5
                )
                assert float(parts.student_mass[n]) == pytest.approx(float(q[n][row].sum()), rel=1e-4)
                own = set(student[n].topk(len(row)).indices.tolist())
                assert float(parts.overlap[n]) == pytest.approx(len(own & set(row.tolist())) / len(row))


def cases():
    ids, log_probs = listed(logits_of(29), 4)
    repeated, beyond, negative = (ids.clone() for _ in range(3))
    repeated[3, 1] = repeated[3, 0]
    beyond[1, 2] = V
    negative[1, 2] = -2
    return {
        "ids of a row twice": (fk.TopK(repeated, log_probs), ValueError, "ids must differ within a row: row 3"),
        "ids beyond V": (fk.TopK(beyond, log_probs), ValueError, rf"ids must be in \[0, {V}\), or -1 .*: row 1"),
        "ids below -1": (fk.TopK(negative, log_probs), ValueError, "ids must be in"),
        "mass": (fk.TopK(ids, log_probs + 2), ValueError, "mass of 1.05 at most: row"),
        "NaN": (fk.TopK(ids, log_probs.where(log_probs > log_probs.amin(), math.nan)), ValueError, "log_probs must not be NaN: row"),
        "logits for log_probs": (fk.TopK(ids, torch.ones(N, 4)), ValueError, "mass of 1.05 at most"),
        "ids' dtype": (fk.TopK(ids.float(), log_probs), TypeError, "ids must be integers, not torch.float32"),
        "log_probs' dtype": (fk.TopK(ids, ids), TypeError, "log_probs must be floating point"),
        "rows": (fk.TopK(ids[1:], log_probs[1:]), ValueError, r"ids must have shape \(7, 'K'\)"),
        "shapes": (fk.TopK(ids, log_probs[:, :3]), ValueError, "log_probs must have the shape of ids"),
        "tail": (fk.TopK(ids, log_probs, "buckets"), ValueError, "tail must be one of bucket, uniform"),
        "weights missing": (fk.TopK(ids, log_probs, "sampled"), ValueError, "weights are importance weights"),
        "weights beside": (fk.TopK(ids, log_probs, weights=log_probs.exp()), ValueError, "weights are importance"),
        "weights below 0": (fk.TopK(ids, log_probs, "sampled", log_probs), ValueError, "weights must be finite and not negative"),
        "temperature": (fk.TopK(ids, log_probs, temperature=0.0), ValueError, "temperature must be in"),
        "grad": (fk.TopK(ids, log_probs.clone().requires_grad_()), ValueError, "log_probs requires grad"),
        "a list of ids": (fk.TopK(ids.tolist(), log_probs), TypeError, "ids must be a tensor"),
    }  # fmt: skip


@pytest.mark.parametrize("case", cases())
def test_what_does_not_fit_is_refused_by_name(case):
    teacher, error, words = cases()[case]
    with pytest.raises(error, match=words):
        fk.f_divergence(logits_of(30), teacher)
    with pytest.raises(error, match=words):
        fk.linear_f_divergence(torch.randn(N, 8), torch.randn(V, 8), teacher)


@pytest.mark.parametrize("kind", checks.INTEGERS, ids=str)
def test_ids_of_any_integers(kind):
    student, (ids, log_probs) = logits_of(31).float(), listed(logits_of(32), 4)
    found = fk.f_divergence(student, fk.TopK(ids.to(kind), log_probs))
    assert found == fk.f_divergence(student, fk.TopK(ids, log_probs))


def test_more_refusals():
    student, (ids, log_probs) = logits_of(31), listed(logits_of(32), 4)
    teacher = fk.TopK(ids, log_probs)
    with pytest.raises(ValueError, match="teacher_logit_softcap beside teacher_logits, a TopK"):
        fk.f_divergence(student, teacher, teacher_logit_softcap=3.0)
    with pytest.raises(ValueError, match="teacher_weight beside teacher_hidden, a TopK"):
        fk.linear_f_divergence(torch.randn(N, 8), torch.randn(V, 8), teacher, torch.randn(V, 8))
    with pytest.raises(ValueError, match="needs labels"):
        fk.f_divergence(student, teacher, "dkd")
    with pytest.raises(ValueError, match="no sum of entries' own terms"):
        fk.f_divergence(student, fk.TopK(ids, log_probs, "sampled", log_probs.exp()), "renyi")
    shared = torch.randn(N, V, requires_grad=True)
    with pytest.raises(ValueError, match=r"overwrite teacher_logits.log_probs, which shares memory"):
        fk.f_divergence(shared, fk.TopK(ids, shared.detach()[:, :4]), inplace=True)


@pytest.mark.parametrize("backend", backends_for(torch.float32))
def test_a_student_of_nothing_on_the_list_has_no_distribution_within_it(backend):
    student, teacher = logits_of(33).float(), fk.top_k_of(logits_of(34).float(), 4, tail="within")
    student[2, teacher.ids[2]] = -math.inf
    student.requires_grad_()
    for name in ("kl", "js", "dkd", "ab"):
        labels = teacher.ids[:, 0] if name == "dkd" else None
        loss = fk.f_divergence(student, teacher, name, labels=labels, reduction="none", backend=backend)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all() and gradient.isfinite().all()
        assert loss.count_nonzero() == N - 1 and loss[2] == 0 and not gradient[2].any()
        found = fk.f_divergence(student, teacher, name, labels=teacher.ids[:, 0], ce_weight=1.0, backend=backend)
        assert found == math.inf  # the label's cross-entropy


def test_rows_that_do_not_count_are_not_looked_at():
    student, (ids, log_probs) = logits_of(33).float(), listed(logits_of(34), 4)
    labels = torch.zeros(N, dtype=torch.long)
    labels[2] = -100
    ids[2], log_probs[2] = 10**6, math.nan
    student[2] = math.nan
    for backend in backends_for(torch.float32):
        for tail in ("bucket", "uniform", "within"):
            leaf = student.clone().requires_grad_()
            loss = fk.f_divergence(leaf, fk.TopK(ids, log_probs, tail), labels=labels, backend=backend)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(leaf.grad).all() and not leaf.grad[2].any()


@pytest.mark.parametrize("backend", backends_for(torch.float32))
def test_strides_in_place_and_upstream_factors(backend):
    base = logits_of(35, 3 * 9, V).float().view(3, 9, V)
    ids, log_probs = (x.view(3, 8, 5) for x in listed(logits_of(36, 24), 5))
    apart = fk.TopK(ids.transpose(0, 1).contiguous().transpose(0, 1).int(), log_probs.float().expand(3, 8, 5))
    plain = base[:, :-1].clone().requires_grad_()
    wanted = fk.f_divergence(plain, fk.TopK(ids, log_probs.float()), "js", backend=backend)
    (3 * wanted).backward()
    leaf = base.clone().requires_grad_()
    loss = fk.f_divergence(leaf[:, :-1], apart, "js", backend=backend)
    (3 * loss).backward()
    assert loss.item() == wanted.item()
    assert torch.equal(leaf.grad[:, :-1], plain.grad) and not leaf.grad[:, -1].any()
    over = base[:, :-1].clone().requires_grad_()
    used = over * 1
    (3 * fk.f_divergence(used, apart, "js", backend=backend, inplace=True)).backward()
    torch.testing.assert_close(over.grad, plain.grad)
    half = base[:, :-1].half().requires_grad_()
    (1e-6 * fk.f_divergence(half, apart, "js", backend=backend)).backward()
    exact = base[:, :-1].half().float().requires_grad_()
    (1e-6 * fk.f_divergence(exact, apart, "js", backend=backend)).backward()
    assert (half.grad.float() - exact.grad).abs().max() <= 6e-8


@pytest.mark.parametrize("backend", backends_for(torch.float32))
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 32, 33, 2048, 2049, 5003])
def test_vocabularies_of_any_size(backend, vocabulary):
    student, teacher = logits_of(37, 3, vocabulary), logits_of(38, 3, vocabulary)
    for k in {1, min(3, vocabulary), max(1, vocabulary - 1), vocabulary}:
        if k > 300 and backend == "triton":
            continue
        ids, log_probs = listed(teacher, k)
        leaf = student.clone().requires_grad_()
        rest = torch.log1p(-log_probs.exp().sum(-1))
        wanted = fk.f_divergence(leaf, fk.TopK(ids, log_probs), "js", reduction="none")
        wanted.sum().backward()
        narrow = student.float().requires_grad_()
        loss = fk.f_divergence(narrow, fk.TopK(ids, log_probs.float()), "js", reduction="none", backend=backend)
        loss.sum().backward()
        least = 1e-4 if (rest < -7).any() else 2e-5  # 1 less the mass has lost digits
        assert (loss - wanted).abs().max() <= least * wanted.abs().max() + 1e-7
        assert (narrow.grad - leaf.grad).abs().max() <= least * leaf.grad.abs().max() + 1e-7


def test_inside_a_compiler():
    student, (ids, log_probs) = logits_of(39).float(), listed(logits_of(40), 5)
    teacher = fk.TopK(ids, log_probs.float())
    weight, hidden = torch.randn(V, 8, requires_grad=True), torch.randn(N, 8, requires_grad=True)

    def both(x, h, w, ids, log_probs):
        teacher = fk.TopK(ids, log_probs)
        return fk.f_divergence(x, teacher, "js") + fk.linear_f_divergence(h, w, teacher, divergence="kl")

    results = []
    for run in (both, torch.compile(both, fullgraph=True)):
        leaf = student.clone().requires_grad_()
        loss = run(leaf, hidden, weight, teacher.ids, teacher.log_probs)
        weight.grad = None
        loss.backward()
        results.append((loss.detach(), leaf.grad, weight.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def rows_of_kind(kind, n, v, ids, seed):
    """Logits (n, v) of a student, ordinary but for what the kind says."""
    z = logits_of(seed, n, v).float()
    generator = torch.Generator().manual_seed(seed)
    listed_too = torch.full_like(z, -math.inf).scatter(1, ids, z.gather(1, ids))
    return {
        "ordinary": z,
        "some are -inf": z.masked_fill(torch.rand(n, v, generator=generator) < 0.5, -math.inf),
        "the list is -inf": z.scatter(1, ids, -math.inf),
        "the rest is -inf": listed_too,
        "one-hot on the list": z.scatter_add(1, ids[:, :1], torch.full((n, 1), 60.0)),
        "one-hot off the list": z.index_add(1, torch.tensor([v - 1]), torch.full((n, 1), 60.0)),
        "far from 0": z + 1e4,
        "no number": z.index_fill(1, torch.tensor([v // 2]), math.nan),
        "+inf": z.index_fill(1, torch.tensor([v // 2]), math.inf),
        "all are -inf": torch.full_like(z, -math.inf),
    }[kind]


KINDS = ("ordinary", "some are -inf", "the list is -inf", "the rest is -inf", "one-hot on the list", "one-hot off the list",
         "far from 0", "no number", "+inf", "all are -inf")  # fmt: skip


@pytest.mark.skipif("cpu" not in backends_for(torch.float32), reason="the CPU library is not built")
@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalize", "within"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_visit_of_a_row_says_what_two_say(kind, tail, monkeypatch):
    """`cpu.list_rows` against the categories' own way: labels, caps, temperatures, weights, in place, each dtype."""
    ways = itertools.cycle(itertools.product((torch.float32, torch.bfloat16, torch.float16), (None, 30.0), (1.0, 2.0)))
    for n, (divergence, v, k) in enumerate(itertools.product(ALL, (64, 2049), (1, 17))):
        (dtype, cap, temperature), labels = next(ways), torch.tensor([0, -100, 5, v - 1])
        if not WHOLE and (n + KINDS.index(kind)) % 7 > 1:
            continue
        ids, log_p = listed(logits_of(n, 4, v), k)
        ids[0, 0] = -1
        teacher = fk.TopK(ids, log_p.float(), tail=tail)
        student = rows_of_kind(kind, 4, v, ids.clamp_min(0), n).to(dtype)
        more = [{}, {"labels": labels, "ce_weight": 0.5}, {"labels": labels, "ce_weight": 1.0, "label_smoothing": 0.1},
                {"labels": labels, "z_loss": 0.1}, {"token_weight": torch.tensor([1.0, 0, 2, 1])}][n % 5]  # fmt: skip
        if divergence.needs_labels:
            more["labels"] = labels
        more |= {"temperature": temperature, "logit_softcap": cap, "reduction": "none", "backend": "cpu"}
        if tail == "bucket":
            more["teacher_temperature"] = 1.0
        more["return_parts"], found = n % 2 == 0, []
        for at_once in (False, True):
            with monkeypatch.context() as patch:
                if not at_once:
                    patch.setattr(sparse, "_is_made_at_once", lambda *_: False)
                leaf = student.clone().requires_grad_()
                made = fk.f_divergence(leaf * 1, teacher, divergence, inplace=n % 3 == 1, **more)
                loss, parts = made if more["return_parts"] else (made, ())
                loss.sum().backward()
                found.append((loss.detach(), leaf.grad.float(), parts))
        largest = found[0][1].abs().nan_to_num(0, 0, 0).amax(1, keepdim=True)
        torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-5, atol=1e-6, equal_nan=True)
        far = (found[1][1] - found[0][1]).abs() > 2e-5 * largest + 2 * torch.finfo(dtype).eps * found[0][1].abs() + 1e-6
        assert not far.any(), (divergence, v, k, dtype, more)
        assert found[0][1].isnan().equal(found[1][1].isnan()), (divergence, v, k, dtype, more)
        numbers = ~found[0][0].isnan()
        for one, two in zip(found[1][2], found[0][2], strict=True):
            some = (numbers,) if two.shape == numbers.shape else ()
            torch.testing.assert_close(one[some], two[some], rtol=2e-5, atol=1e-6, equal_nan=True)


def test_modules_and_pieces_of_rows(monkeypatch):
    student, (ids, log_probs) = logits_of(41, 12), listed(logits_of(42, 12), 5)
    teacher = fk.TopK(ids.view(3, 4, 5), log_probs.view(3, 4, 5))
    module = fk.FDivergenceLoss("js", reduction="none")
    whole = module(student.view(3, 4, V), teacher)
    for most in (1, 2, 5, 8):  # rows of a piece
        monkeypatch.setattr(sparse, "LIST_PIECE", most * 6)
        torch.testing.assert_close(module(student.view(3, 4, V), teacher), whole)
    head = torch.randn(V, 8, dtype=torch.float64)
    hidden = torch.randn(3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(
        fk.LinearFDivergenceLoss("js")(hidden, head, teacher), fk.f_divergence(hidden @ head.T, teacher, "js")
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lists_made_of_models(dtype, monkeypatch):
    monkeypatch.setattr(lists, "PIECE", 3 * V)  # rows in pieces
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(*shape, 8, generator=generator).to(dtype) for shape in ((2, 4), (V,)))
    head = fk.Head(weight, torch.randn(V, generator=generator).to(dtype), 0.7, 5.0)
    logits = (states.double() @ weight.double().T * 0.7 + head.bias.double()).to(dtype).double()
    logits = 5 * (logits / 5).tanh()
    log_p, student = (logits / 1.5).log_softmax(-1), logits_of(50, 8).view(2, 4, V)
    of_states = fk.top_k_of(fk.Hidden(states, head), 6, temperature=1.5)
    largest = log_p.topk(6, -1)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(of_states.log_probs.double(), largest.values, rtol=0, atol=tolerance)
    assert of_states.temperature == 1.5 and of_states.ids.shape == (2, 4, 6)
    of_student = fk.top_k_of(log_p, 6, support="student", student=student)
    assert torch.equal(of_student.ids, student.topk(6, -1).indices)
    torch.testing.assert_close(of_student.log_probs, log_p.gather(-1, of_student.ids))
    both = fk.top_k_of(log_p, 6, support="union", student=student)
    for n in range(8):
        row = [i for i in both.ids.view(8, -1)[n].tolist() if i >= 0]
        assert (
            sorted(row)
            == sorted(set(row))
            == sorted(set(largest.indices.view(8, 6)[n].tolist()) | set(of_student.ids.view(8, 6)[n].tolist()))
        )
    whole = fk.top_k_of(log_p, 10**6)  # of which no more is kept than there is
    assert whole.ids.shape == log_p.shape
    torch.testing.assert_close(fk.f_divergence(student, whole, "js"), fk.f_divergence(student, log_p, "js"))
    for teacher in (of_student, both, whole):
        assert torch.isfinite(fk.f_divergence(student, teacher, "rkl"))
    sample = fk.sample_of(fk.Logits(log_p), 50, proposal_temperature=1.3, generator=generator)
    assert torch.isfinite(fk.f_divergence(student, sample, "js"))


def test_a_sample_is_what_its_weights_say():
    log_p = logits_of(51, 1, 6, scale=1.0).log_softmax(-1)
    generator, total = torch.Generator().manual_seed(3), torch.zeros(6).double()
    for _ in range(400):
        sample = fk.sample_of(log_p, 16, proposal_temperature=1.4, generator=generator)
        ids = sample.ids[0][sample.ids[0] >= 0]
        total[ids] += sample.weights[0][sample.ids[0] >= 0] / 400
    spread = ((1 / (log_p[0] / 1.4).softmax(-1) - 1) / (400 * 16)).sqrt()  # each entry is counted once, on average
    assert ((total - 1).abs() < 4 * spread).all()


def test_lists_that_cannot_be_made():
    for words, call in {
        "k must be at least 1": lambda x: fk.top_k_of(x, 0),
        "support must be one of": lambda x: fk.top_k_of(x, 2, support="both"),
        "student is for support": lambda x: fk.top_k_of(x, 2, support="union"),
        "student has logits of shape": lambda x: fk.top_k_of(x, 2, support="union", student=x[1:]),
        "draws must be at least 1": lambda x: fk.sample_of(x, 0),
        "teacher must have shape": lambda x: fk.top_k_of(x[0, 0], 2),
        "teacher has a row of logits that": lambda x: fk.sample_of(x * torch.nan, 2),
        "student has a row of logits that": lambda x: fk.top_k_of(x, 2, support="union", student=x * torch.nan),
        "teacher.softcap must be": lambda x: fk.top_k_of(fk.Logits(x, -1.0), 2),
        "teacher.head.softcap must be": lambda x: fk.sample_of(fk.Hidden(x, fk.Head(x, softcap=0.0)), 2),
    }.items():
        with pytest.raises(ValueError, match=words):
            call(logits_of(52))
    with pytest.raises(TypeError, match=r"teacher\.head must be a Head, not Tensor"):
        fk.top_k_of(fk.Hidden(logits_of(52), logits_of(52)), 2)


@pytest.mark.parametrize("backend", backends_for(torch.float32))
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5, 2.0, 4.0])
def test_labels_beside_a_list_far_above_its_rest(backend, temperature):
    """At another temperature than the labels' terms the rest of a block may be lost beside its list at one of the two."""
    for above in (4.0, 7.0, 29.0, 80.0):
        student = logits_of(60, 3, 2100, scale=1.0)
        ids, log_probs = listed(logits_of(61, 3, 2100), 5)
        student = student.scatter_add(1, ids, torch.full(ids.shape, above).double()).float().double()
        labels = torch.tensor([int(ids[0, 2]), 7, int(ids[2, 0])])
        leaf = student.clone().requires_grad_()
        wanted = 0.5 * torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
        wanted = wanted + expected(leaf, ids, log_probs, fk.TABLE["kl"], "within", temperature=temperature)
        wanted.sum().backward()
        narrow = student.float().requires_grad_()
        loss = fk.f_divergence(narrow, fk.TopK(ids, log_probs.float(), "within"), "kl", labels=labels, ce_weight=0.5,
                               temperature=temperature, teacher_temperature=1.0, reduction="none", backend=backend)  # fmt: skip
        loss.sum().backward()
        check(loss, narrow.grad, wanted, leaf.grad, 1e-4)
        assert narrow.grad.sum(1).abs().max() < 2e-5


@pytest.mark.parametrize("backend", backends_for(torch.float32))
@pytest.mark.parametrize("above, temperature", [(1e4, 1.0), (1e3, 0.1), (1e3, 0.01), (1e4, 1e-3), (1e4, 1e-6)])
def test_the_rest_s_gradient_keeps_its_digits(backend, above, temperature):
    student = logits_of(62, 3, 700, scale=1.0)
    ids, log_probs = listed(logits_of(63, 3, 700), 4)
    log_probs = log_probs.log_softmax(-1) + math.log(0.7)
    student = student.scatter_add(1, ids, torch.full(ids.shape, above).double()).float().double()
    leaf = student.clone().requires_grad_()
    expected(leaf, ids, log_probs, fk.TABLE["kl"], "bucket", temperature=temperature).sum().backward()
    narrow = student.float().requires_grad_()
    loss = fk.f_divergence(narrow, fk.TopK(ids, log_probs.float()), "kl", temperature=temperature,
                           teacher_temperature=1.0, reduction="sum", backend=backend)  # fmt: skip
    loss.backward()
    largest = leaf.grad.abs().amax(1, keepdim=True)
    assert ((narrow.grad.double() - leaf.grad).abs() <= 2e-5 * largest).all()


@pytest.mark.parametrize("backend", backends_for(torch.float32))
@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalize", "within"])
def test_a_student_that_is_0_off_the_list(backend, tail):
    """Constrained decoding: both models have all their mass on the list, and the loss is the dense one's."""
    student, teacher = logits_of(64, 10, 50), logits_of(65, 10, 50)
    student[:, 30:] = teacher[:, 30:] = -math.inf
    log_probs, ids = teacher.float().log_softmax(-1).topk(30, -1)
    for name in ("kl", "rkl", "jeffreys", "js"):
        dense = fk.f_divergence(student, teacher, name, reduction="none")
        loss = fk.f_divergence(student.float(), fk.TopK(ids, log_probs, tail), name, reduction="none", backend=backend)
        torch.testing.assert_close(loss.double(), dense, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", backends_for(torch.float32))
def test_lists_of_next_to_no_mass(backend):
    """The student's support where the teacher is e^-150: its conditional distribution is well defined."""
    student = logits_of(66, 3, 60)
    ids = torch.stack([torch.randperm(60)[:5] for _ in range(3)])
    log_probs = logits_of(67, 3, 5) - 150
    for tail in ("within", "renormalize"):
        for name in ("kl", "hellinger"):
            wanted = expected(student, ids, log_probs, fk.TABLE[name], tail)
            found = fk.f_divergence(
                student.float(), fk.TopK(ids, log_probs.float(), tail), name, reduction="none", backend=backend
            )
            torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-6)
    zeros = fk.TopK(ids, torch.full((3, 5), -math.inf), "within")
    leaf = student.float().requires_grad_()
    loss = fk.f_divergence(leaf, zeros, "kl", reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0 and not leaf.grad.any()


def test_the_student_s_mass_is_the_list_s_whatever_the_tail():
    student, (ids, log_probs) = logits_of(68), listed(logits_of(69), 5)
    found = [fk.f_divergence(student, fk.TopK(ids, log_probs, t), "kl", return_parts=True)[1].student_mass
             for t in ("bucket", "uniform", "renormalize", "within")]  # fmt: skip
    for mass in found:
        torch.testing.assert_close(mass, student.softmax(-1).gather(1, ids).sum(1).mean())


@pytest.mark.filterwarnings("ignore:tail='ignore'")
@pytest.mark.parametrize("divergence", [fk.DKD(), fk.TailAware(2)], ids=str)
def test_a_truncated_sum_with_nothing_outside_its_set_has_a_gradient(divergence):
    """Autograd would make the softmax of nothing."""
    student = torch.tensor([[0.1, 0.7, -0.2, -torch.inf]], requires_grad=True)
    teacher, labels = torch.tensor([[0.3, -0.5, 1.0, 0.2]]).log_softmax(1), torch.tensor([1])
    for ids in ([[1]], [[1, -1, -1]], [[-1, -1]], [[1, 0]], [[1, 3]], [[1, 2, 3]]):
        given = torch.tensor(ids)
        log_probs = torch.where(given == 3, -torch.inf, teacher.gather(1, given.clamp_min(0)))
        loss = fk.f_divergence(student, fk.TopK(given, log_probs, "ignore"), divergence, labels=labels)
        assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("tail", ["renormalize", "within"])
def test_a_list_of_zeros_beside_a_student_that_has_no_rest(tail):
    student = torch.tensor([[0.5, -torch.inf]], requires_grad=True)
    for ids in ([[0]], [[0, 1]]):
        loss = fk.f_divergence(
            student, fk.TopK(torch.tensor(ids), torch.full((1, len(ids[0])), -torch.inf), tail), "kl"
        )
        loss.backward()
        assert loss == 0 and (student.grad == 0).all()


@pytest.mark.filterwarnings("ignore:tail='ignore'")
def test_truncated_sums_under_every_mode():
    student, (ids, log_probs) = logits_of(70).float(), listed(logits_of(71), 5)
    log_probs[1, 2] = -math.inf  # listed, and the teacher's 0
    weights = torch.rand(N, 5)
    own = fk.Divergence("own", lambda p, q, a, b, _: (q - p, p - q), scale=2.0)
    for teacher in (fk.TopK(ids, log_probs, "ignore"), fk.TopK(ids, log_probs, "sampled", weights)):
        w = torch.ones(N, 5) if teacher.weights is None else weights
        p, q = log_probs.exp(), student.double().log_softmax(-1).gather(1, ids).exp()
        loss = fk.f_divergence(student, teacher, "tvd", reduction="none")
        torch.testing.assert_close(loss.double(), (w * 0.5 * (p - q).abs()).sum(1), rtol=1e-5, atol=1e-7)
        with torch.inference_mode():
            assert torch.equal(fk.f_divergence(student, teacher, "tvd", reduction="none"), loss)
        with torch.no_grad():
            assert torch.equal(fk.f_divergence(student.clone(), teacher, "tvd", reduction="none"), loss)
        assert fk.f_divergence(student, teacher, own).item() == pytest.approx(0, abs=1e-6)
        compiled = torch.compile(lambda x, t=teacher: fk.f_divergence(x, t, "tvd", reduction="none"), fullgraph=True)
        torch.testing.assert_close(compiled(student), loss)
    doubled = fk.Divergence("own", lambda p, q, a, b, _: (q, 0 * p), scale=2.0)
    mass = student.double().log_softmax(-1).gather(1, ids).exp().sum(1)
    found = fk.f_divergence(student, fk.TopK(ids, log_probs, "ignore"), doubled, reduction="none")
    torch.testing.assert_close(found.double(), 2 * mass, rtol=1e-5, atol=1e-7)


def test_smoothed_labels_make_no_temporaries_of_the_rows_size():
    n, v = 256, 16000
    student = torch.randn(n, v).bfloat16().requires_grad_()
    teacher = fk.top_k_of(torch.randn(n, v), 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        fk.f_divergence(
            student, teacher, "kl", labels=torch.zeros(n, dtype=torch.long), ce_weight=1.0, label_smoothing=0.1
        ).backward()
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest <= max(2 * n * v, 4 * sparse.ROW_PIECE) + 1e6


@pytest.mark.parametrize("rest", [1e-4, 1e-5, 1e-6])
def test_a_teacher_s_small_rest_has_the_digits_it_was_given(rest):
    student = logits_of(72, 4, 80)
    ids, log_probs = listed(logits_of(73, 4, 80), 6)
    log_probs = (log_probs.log_softmax(-1) + math.log1p(-rest)).float().double()
    leaf = student.clone().requires_grad_()
    expected(leaf, ids, log_probs, fk.TABLE["rkl"], "bucket").sum().backward()
    narrow = student.float().requires_grad_()
    fk.f_divergence(narrow, fk.TopK(ids, log_probs.float()), "rkl", reduction="sum").backward()
    assert (narrow.grad - leaf.grad).abs().max() <= 2e-5 * leaf.grad.abs().max()


def test_lists_of_hidden_states_under_autocast_and_in_a_graph():
    states, head = torch.randn(N, 6), fk.Head(torch.randn(V, 6), softcap=5.0)
    with torch.autocast("cpu", torch.bfloat16):
        of_states = fk.top_k_of(fk.Hidden(states, head), 4)
        assert fk.sample_of(fk.Hidden(states, head), 3).ids.shape == (N, 3)
    logits = states.bfloat16() @ head.weight.bfloat16().T
    assert torch.equal(of_states.ids, fk.top_k_of(fk.Logits(logits, 5.0), 4).ids)
    student, teacher = torch.randn(N, V), torch.randn(N, V)
    step = torch.compile(lambda s, t: fk.f_divergence(s, fk.top_k_of(t, 4), "kl"), backend="eager", fullgraph=True)
    assert torch.equal(step(student, teacher), fk.f_divergence(student, fk.top_k_of(teacher, 4), "kl"))


def test_lists_of_hidden_states_in_a_graph():
    head = fk.Head(torch.randn(V, 8), torch.randn(V), 1.5, 4.0)

    def step(student, states):
        return fk.f_divergence(student, fk.top_k_of(fk.Hidden(states, head), 4), "js")

    class Step(torch.nn.Module):
        def forward(self, *given):
            return step(*given)

    batch = torch.export.Dim("batch", min=2, max=64)
    first, other = ((torch.randn(n, V), torch.randn(n, 8)) for n in (N, N + 2))
    exported = torch.export.export(Step(), first, dynamic_shapes=(({0: batch}, {0: batch}),))
    for run in (torch.compile(step, backend="eager", fullgraph=True), exported.module()):
        torch.testing.assert_close(run(*other), step(*other))
