"""Every keyword of the public functions, the operators, and the message of every misuse."""

import copy
import enum
import inspect
import math
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fdistill_kernels as fk
from fdistill_kernels.backends import cpu
from fdistill_kernels.backends.rows import RowCall, TokenTerms
from fdistill_kernels.carried import flat

from .conftest import WHOLE, ready, reference, relative


def models(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_(), torch.randn(*shape).to(dtype)


def test_masks_weights_temperatures_and_parts(backend):
    student, teacher = models(2, 6, 129)
    labels = torch.randint(0, 129, (2, 6))
    labels[0, :3] = -100
    weight, temperature = torch.rand(2, 6), 0.5 + torch.rand(2, 6)
    loss, parts = fk.f_divergence(
        student, teacher, "js", labels=labels, ce_weight=0.3, label_smoothing=0.1, z_loss=1e-2, token_weight=weight,
        temperature=temperature, teacher_temperature=2.0, temperature_squared=True, backend=backend, return_parts=True,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)

    mask = (labels != -100).double()
    scale = mask * weight / mask.sum()
    teacher_t = torch.full_like(temperature, 2.0)
    divergence, of_divergence, _ = reference(
        student, teacher, "js", scale * temperature**2, temperature=temperature, teacher_temperature=teacher_t
    )
    logits = student.detach().double().requires_grad_()
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="none").view(2, 6)
    ce, z = (ce * scale).sum(), (logits.logsumexp(-1) ** 2 * scale).sum()
    (of_labels,) = torch.autograd.grad(0.3 * ce + 1e-2 * z, logits)
    assert relative(loss, divergence + 0.3 * ce + 1e-2 * z) < 1e-6
    assert relative(gradient, of_divergence + of_labels) < 1e-5
    for got, expected in zip(parts, (divergence, ce, 1e-2 * z, mask.sum()), strict=True):
        assert relative(got, expected) < 1e-6 and not got.requires_grad
    assert (gradient[0, :3] == 0).all()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_labels_at_temperature_one_share_the_kernel(divergence, z_loss, backend):
    student, teacher = models(5, 300)
    labels = torch.randint(0, 300, (5,))
    a = fk.f_divergence(student, teacher, divergence, labels=labels, ce_weight=0.7, z_loss=z_loss, backend=backend)
    b = fk.f_divergence(student, teacher, divergence) + 0.7 * F.cross_entropy(student, labels)
    b = b + z_loss * (student.logsumexp(-1) ** 2).mean()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (a, b)))


def test_reductions_and_denominators(backend):
    student, teacher = models(2, 3, 50)
    labels = torch.zeros(2, 3, dtype=torch.long)
    labels[1, 2] = 7
    rows = fk.f_divergence(student, teacher, "kl", labels=labels, ignore_index=7, reduction="none", backend=backend)
    assert rows.shape == (2, 3) and rows[1, 2] == 0
    for reduction, denominator in (("sum", 1), ("mean", 5), ("batchmean", 2)):
        loss = fk.f_divergence(
            student, teacher, "kl", labels=labels, ignore_index=7, reduction=reduction, backend=backend
        )
        torch.testing.assert_close(loss, rows.sum() / denominator)
    for items in (11, torch.tensor(11)):
        loss = fk.f_divergence(student, teacher, "kl", labels=labels, ignore_index=7, num_items=items, backend=backend)
        torch.testing.assert_close(loss, rows.sum() / 11)


def test_upstream_gradients(backend):
    student, teacher = models(4, 90)
    upstream = torch.randn(4)
    rows = fk.f_divergence(student, teacher, "js", reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(rows, student, upstream)
    assert relative(gradient, reference(student, teacher, "js", upstream)[1]) < 1e-5
    (scaled,) = torch.autograd.grad(3 * fk.f_divergence(student, teacher, "js", backend=backend), student)
    assert relative(scaled, reference(student, teacher, "js", torch.full((4,), 3 / 4))[1]) < 1e-5
    fk.f_divergence(student, teacher, "js", backend=backend).backward(retain_graph=True)


@pytest.mark.parametrize("name", ["kl", "js", "tvd", "renyi"])
def test_no_subnormal_gradients_on_cpus_with_vectors(name):
    """A product with a subnormal number takes a hundred times longer. torch's own threads keep theirs."""
    student, teacher = torch.full((64, 3000), -90.0), torch.full((64, 3000), -95.0)
    student[:, :9], teacher[:, :9] = torch.rand(64, 9), torch.rand(64, 9)
    own = torch.full((1 << 20,), 1e-40)
    torch.set_num_threads(2)
    (gradient,) = torch.autograd.grad(fk.f_divergence(student.requires_grad_(), teacher, name, backend="cpu"), student)
    subnormal = (gradient != 0) & (gradient.abs() < torch.finfo(torch.float32).tiny)
    assert bool(subnormal.any()) == (cpu.CAPABILITY not in (b"AVX2", b"AVX512")) and gradient.any()
    assert (own * 1).view(torch.int32).all()


def test_float16_gradients_survive_until_the_scaler(backend):
    student, teacher = (torch.randn(4, 20000).half().requires_grad_() for _ in range(2))
    (65536 * fk.f_divergence(student, teacher, "js", backend=backend)).backward()
    _, expected, of_teacher = reference(student, teacher, "js", weights=torch.full((4,), 65536 / 4))
    assert relative(student.grad, expected) < 1e-3 and relative(teacher.grad, of_teacher) < 1e-3
    assert ((student.grad - expected) / expected).abs().median() < 1e-2  # subnormals, but none lost


def test_backward_twice_through_a_retained_graph(backend):
    student, teacher = models(4, 90)
    loss = fk.f_divergence(student, teacher, backend=backend)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student, retain_graph=True)[0].clone() for _ in range(2)))


def test_all_masked(backend):
    student, teacher = models(3, 20)
    student.data[:] = math.nan  # a masked row is not even looked at
    labels = torch.full((3,), -100)
    for loss in (
        fk.f_divergence(student, teacher, labels=labels, ce_weight=1.0, backend=backend),
        fk.cross_entropy(student, labels, backend=backend),
        fk.cross_entropy(student, labels, torch.ones(20), backend=backend),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss == 0 and (gradient == 0).all()


def test_inplace(backend):
    student, teacher = models(2, 7, 130)
    (expected,) = torch.autograd.grad(fk.f_divergence(student, teacher, "js", backend=backend), student)
    logits = student.detach().clone().requires_grad_()
    view = logits * 1
    (gradient,) = torch.autograd.grad(fk.f_divergence(view, teacher, "js", inplace=True, backend=backend), view)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert gradient.data_ptr() == view.data_ptr()
    labels = torch.randint(0, 130, (2, 7))
    settings = dict(labels=labels, ce_weight=0.5, temperature=2.0, backend=backend)
    (expected,) = torch.autograd.grad(fk.f_divergence(student, teacher, "kl", **settings), student)
    view = logits * 1
    (gradient,) = torch.autograd.grad(fk.f_divergence(view, teacher, "kl", inplace=True, **settings), view)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_inplace_guards_other_uses_of_the_logits():
    student, teacher = models(2, 30)
    logits = student * 1
    other = logits.exp().sum() + (logits**2).sum()
    loss = fk.f_divergence(logits, teacher, inplace=True) + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strides_without_copies(backend):
    student, teacher = (torch.randn(3, 9, 64) for _ in range(2))
    shifted = student[:, :-1].requires_grad_()
    loss = fk.f_divergence(shifted, teacher[:, :-1], backend=backend)
    expected = fk.f_divergence(shifted.contiguous(), teacher[:, :-1].contiguous(), backend=backend)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    for view in (student.transpose(0, 1), student[..., ::2], student[:, :, None].expand(3, 9, 2, 64), student[0, 0]):
        same = fk.f_divergence(view, view.contiguous(), "kl", backend=backend)
        assert abs(same.item()) < 1e-6


def test_vocab_size_compares_the_shared_part(backend):
    student, teacher = torch.randn(4, 120, requires_grad=True), torch.randn(4, 128)
    loss = fk.f_divergence(student, teacher, vocab_size=100, backend=backend)
    torch.testing.assert_close(loss, fk.f_divergence(student[:, :100], teacher[:, :100]))
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[:, 100:] == 0).all()


@pytest.mark.parametrize("shape", [(13,), (6, 13), (2, 13, 5), (2, 13, 3, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted, smoothing", [(False, 0.0), (True, 0.0), (False, 0.2), (True, 0.2)])
def test_cross_entropy_is_a_drop_in(shape, reduction, weighted, smoothing, backend):
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(0, 13, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if target.dim():
        target.view(-1)[0] = 5
    weight = torch.rand(13) if weighted else None
    args = dict(weight=weight, ignore_index=5 if target.dim() else -100, reduction=reduction, label_smoothing=smoothing)
    ours, theirs = fk.cross_entropy(logits, target, backend=backend, **args), F.cross_entropy(logits, target, **args)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs)))


@pytest.mark.parametrize(("module", "function"), [
    (fk.FDivergenceLoss, fk.f_divergence), (fk.CrossEntropyLoss, fk.cross_entropy),
    (fk.LinearFDivergenceLoss, fk.linear_f_divergence), (fk.LinearCrossEntropyLoss, fk.linear_cross_entropy),
])  # fmt: skip
def test_modules_are_typed_as_their_functions(module, function):
    """A list, or a `Head`, may be given to a module, too."""
    *ours, _ = list(inspect.signature(module.forward).parameters.values())[1:]
    theirs = inspect.signature(function).parameters
    assert [p.annotation for p in ours] == [theirs[p.name].annotation for p in ours]


def test_modules(backend):
    student, teacher = models(4, 60)
    labels = torch.randint(0, 60, (4,))
    module = fk.FDivergenceLoss(fk.Alpha(0.3), temperature=2.0, backend=backend)
    torch.testing.assert_close(
        module(student, teacher), fk.f_divergence(student, teacher, fk.Alpha(0.3), temperature=2.0)
    )
    assert "alpha(0.3), temperature=2.0" in repr(module)
    weight = torch.rand(60)
    module = fk.CrossEntropyLoss(weight, label_smoothing=0.1, backend=backend)
    expected = F.cross_entropy(student, labels, weight, label_smoothing=0.1)
    torch.testing.assert_close(module(student, labels), expected)
    without = F.cross_entropy(student, labels, label_smoothing=0.1)
    torch.testing.assert_close(module(student, labels, weight=None), without)
    assert list(module.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    "kind, name",
    [(fk.FDivergenceLoss, "student_logits"), (fk.FDivergenceLoss, "labels"), (fk.CrossEntropyLoss, "target"),
     (fk.LinearFDivergenceLoss, "teacher_weight"), (fk.LinearCrossEntropyLoss, "linear_weight")],
)  # fmt: skip
def test_what_comes_with_each_batch_is_no_setting(kind, name):
    with pytest.raises(TypeError, match=f"{name} is given with each batch, not to {kind.__name__}"):
        kind(**{name: torch.randn(3, 5)})
    with pytest.raises(TypeError, match="has no argument 'reductio'; did you mean 'reduction'"):
        kind(reductio="sum")


Z, H, W = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 8), (2, 5), (8, 5)))
Y = torch.zeros(2, dtype=torch.long)
#: What a module is given with each batch.
BATCHES = {fk.FDivergenceLoss: (Z, -Z, Y), fk.CrossEntropyLoss: (Z, Y), fk.LinearFDivergenceLoss: (H, W, -H, W, Y),
           fk.LinearCrossEntropyLoss: (H, W, Y)}  # fmt: skip


def error_of(call, *args, **keywords):
    try:
        call(*args, **keywords)
    except (ValueError, TypeError) as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("kind", BATCHES)
def test_settings_are_checked_when_they_are_given(kind):
    """By what checks them in a call, in its words; at construction, and where they are changed."""
    with_labels = {"ce_weight": 1.0} if "ce_weight" in kind.arguments else {}
    for name in {*kind.arguments} - {*inspect.signature(kind.forward).parameters, "divergence", "weight"}:
        for odd in ("x", math.nan, -1.5, [1.0], 10**400, object(), np.ones(3)):
            refused = error_of(kind(**with_labels), *BATCHES[kind], **{name: odd})
            assert refused == error_of(kind, **{name: odd}) == error_of(setattr, kind(), name, odd), (name, odd)


@pytest.mark.parametrize("kind", [fk.CrossEntropyLoss, fk.LinearCrossEntropyLoss])
def test_class_weights_are_checked_when_they_are_given(kind):
    for wrong in ([1.0] * 8, torch.ones(8).long(), torch.ones(8, requires_grad=True), torch.eye(8).to_sparse()):
        refused = error_of(kind(), *BATCHES[kind], weight=wrong)
        assert refused and refused == error_of(kind, wrong)
    with torch.device("meta"):  # where models are made before they are loaded
        assert kind(torch.ones(8)).weight.is_meta


def test_settings_are_attributes():
    """As those of torch's own modules are; an attribute beside the setting changed nothing."""
    loss = fk.CrossEntropyLoss(ignore_index=3)
    assert (loss.ignore_index, loss.label_smoothing, loss.reduction) == (3, 0.0, "mean")
    loss.reduction, loss.label_smoothing = "none", 0.2
    want = F.cross_entropy(Z, Y, ignore_index=3, reduction="none", label_smoothing=0.2)
    for same in (loss, copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(same(Z, Y), want)
        copy.copy(same).reduction = "sum"
        assert same.reduction == "none"
    loss = fk.FDivergenceLoss("js")
    loss.divergence, loss.temperature = fk.TABLE["kl"], 2.0
    assert loss(Z, -Z) == fk.f_divergence(Z, -Z, "kl", temperature=2.0)
    assert repr(loss) == "FDivergenceLoss(kl, temperature=2.0)"


def test_copies_of_a_module_share_its_process_group():
    """As those of a model for its moving average do."""
    shard = fk.VocabShard(threading.Lock(), 0, 8)  # of which there is no copy, either
    for loss in (fk.FDivergenceLoss("kl", shard=shard), fk.CrossEntropyLoss(shard=shard)):
        assert copy.deepcopy(loss).shard is shard


def test_settings_are_pythons_own_numbers():
    """As loops over NumPy's ranges give them: compilers take NumPy's for arrays."""
    loss = fk.FDivergenceLoss("js", temperature=np.float64(2), ce_weight=np.float32(0.5), ignore_index=np.int64(3))
    loss.vocab_size = np.int32(7)
    want = fk.FDivergenceLoss("js", temperature=2.0, ce_weight=0.5, ignore_index=3, vocab_size=7)
    assert repr(loss) == repr(want)
    assert torch.compile(loss, backend="eager", fullgraph=True)(Z, -Z, Y) == want(Z, -Z, Y)
    size = enum.IntEnum("Size", {"SMALL": 7}).SMALL  # an int already
    assert fk.FDivergenceLoss("js", vocab_size=size).vocab_size is size


def test_tensors_among_the_settings_move_with_the_module():
    """As buffers do; what is trained is a part of another module."""
    head = torch.nn.Linear(5, 8)
    loss = fk.LinearFDivergenceLoss(temperature=torch.tensor(2.0), student_bias=head.bias, token_weight=torch.ones(2))
    before = copy.copy(loss)
    moved = torch.nn.ModuleList([loss]).to("meta", torch.float64)[0]
    assert moved is loss and loss.temperature.is_meta and loss.token_weight.dtype == torch.float64
    assert loss.student_bias is head.bias and not before.temperature.is_meta


def test_no_gradient_is_made_under_no_grad(backend):
    student, teacher = models(4, 60)
    with torch.no_grad():
        assert not fk.f_divergence(student, teacher, backend=backend).requires_grad


def test_deterministic(backend):
    student, teacher = models(9, 3000)
    runs = [torch.autograd.grad(fk.f_divergence(student, teacher, backend=backend), student)[0] for _ in range(2)]
    assert torch.equal(*runs)


def test_compile_without_graph_breaks(backend):
    student, teacher = models(2, 5, 301)
    labels = torch.randint(0, 301, (2, 5))

    def step(s, t, y):
        return 2 * fk.f_divergence(
            s[:, :-1], t[:, :-1], "js", labels=y[:, 1:], ce_weight=0.5, temperature=2.0, backend=backend
        )

    compiler = "inductor" if WHOLE or backend == "cpu" else "aot_eager"  # the operators are one, whatever runs them
    eager = step(student, teacher, labels)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)(student, teacher, labels)
    torch.testing.assert_close(eager, compiled)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (eager, compiled)))


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton", "cuda"])  # of which the operators know the name alone
def test_opcheck(backend, monkeypatch):
    ready(backend, monkeypatch)
    student, teacher, ones = torch.randn(2, 5, 33), torch.randn(2, 5, 33), torch.ones(10)
    labels = torch.randint(0, 33, (10,))
    terms = TokenTerms(ones, ones, ones, ones, 0.5 * ones, 0.01 * ones, labels, None, fk.GJS(0.3).key, 0.1)
    call = RowCall(student, teacher, terms, student_gradient=True, teacher_gradient=True)
    operators = torch.ops.fdistill_kernels
    torch.library.opcheck(operators.divergence_rows.default, (*flat(call), backend))
    torch.library.opcheck(operators.divergence_rows_.default, (*flat(call._replace(inplace=True)), backend))


def test_checkpointing_and_autocast():
    from torch.utils.checkpoint import checkpoint

    layer, teacher, x = torch.nn.Linear(8, 40), torch.randn(4, 40), torch.randn(4, 8)
    plain = torch.autograd.grad(fk.f_divergence(layer(x), teacher), layer.weight)[0]
    again = torch.autograd.grad(
        checkpoint(lambda x: fk.f_divergence(layer(x), teacher), x, use_reentrant=False), layer.weight
    )[0]
    torch.testing.assert_close(plain, again)
    with torch.autocast("cpu", torch.bfloat16):
        assert fk.f_divergence(layer(x), teacher.bfloat16()).dtype == torch.float32


LOSSES = {
    "logits": lambda h, w, y: fk.cross_entropy(h @ w.T, y),
    "hidden states": lambda h, w, y: fk.linear_cross_entropy(h, w, y),
    "each token": lambda h, w, y: fk.linear_f_divergence(h, w, h.detach() + 1, w.detach(), reduction="none").sum(),
    "in place": lambda h, w, y: fk.cross_entropy(h @ w.T, y, inplace=True),
}


@pytest.mark.parametrize("way", ["checkpoint", "reentrant", "selective", "save_on_cpu"])
@pytest.mark.parametrize("of", LOSSES)
def test_what_a_graph_keeps_may_be_made_again_or_put_elsewhere(of, way):
    from torch.utils import checkpoint

    hidden, weight, labels = torch.randn(6, 4), torch.randn(40, 4), torch.arange(6)

    def kept(op):
        policies = checkpoint.CheckpointPolicy
        return policies.MUST_SAVE if "fdistill_kernels" in str(op) else policies.PREFER_RECOMPUTE

    def contexts():
        return checkpoint.create_selective_checkpoint_contexts(lambda _, op, *args, **keywords: kept(op))

    def gradients(how):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = lambda *x: LOSSES[of](*x, labels)  # noqa: E731
        if how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                made = loss(*leaves)
        elif how:
            more = {"context_fn": contexts} if how == "selective" else {}
            made = checkpoint.checkpoint(loss, *leaves, use_reentrant=how == "reentrant", **more)
        else:
            made = loss(*leaves)
        (made * 3).backward()
        return [x.grad for x in leaves]

    if (of, way) == ("in place", "selective"):  # its gradient is in what is made again, and it is not
        with pytest.raises(RuntimeError, match="inplace=True in a checkpoint"):
            gradients(way)
    else:
        torch.testing.assert_close(gradients(way), gradients(""))


def test_double_backward_is_refused(backend):
    student, teacher = models(2, 9)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fk.f_divergence(student, teacher, backend=backend), student, create_graph=True)


MEMORY = """
import resource, torch, fdistill_kernels as fk
torch.set_num_threads(2)
n, v = 1024, 32000
warm = torch.randn(4, v, requires_grad=True); fk.f_divergence(warm, warm.detach(), "js").backward()
student, teacher = torch.randn(n, v, requires_grad=True), torch.randn(n, v)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak(); fk.f_divergence(student, teacher, "js").backward(); print(peak() - before - n * v * 4 / 2**20)
"""


def test_peak_memory_is_the_gradient_and_under_8_mib():
    extra = float(subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout)
    assert extra < 8, f"{extra:.1f} MiB beyond inputs and gradient"


S, T = torch.zeros(2, 8), torch.zeros(2, 8)
MISUSES = {
    "vocabularies": (lambda: fk.f_divergence(torch.zeros(2, 151936), torch.zeros(2, 152064)), "151936 and 152064.*vocab_size"),
    "shapes": (lambda: fk.f_divergence(S, T[:1]), r"one shape, not \(2, 8\) and \(1, 8\)"),
    "dtypes": (lambda: fk.f_divergence(S.clone().requires_grad_(), T.bfloat16(), inplace=True), "one dtype, not torch.float32 and torch.bfloat16"),
    "devices": (lambda: fk.f_divergence(S, T.to("meta")), "teacher_logits is on the meta device"),
    "integers": (lambda: fk.f_divergence(S.long(), T), "student_logits must be floating point.*not torch.int64"),
    "integer teacher": (lambda: fk.f_divergence(S, T.long()), "teacher_logits must be floating point"),
    "not a tensor": (lambda: fk.f_divergence([1.0], T), "student_logits must be a tensor, not list"),
    "scalar": (lambda: fk.f_divergence(S.sum(), T), "is a scalar"),
    "empty vocabulary": (lambda: fk.f_divergence(S[:, :0], T[:, :0]), r"student_logits has no vocabulary: shape \(2, 0\)"),
    "label too large": (lambda: fk.f_divergence(S, T, labels=Y + 8, ce_weight=1.0), r"labels must be in \[0, 8\).*hold 8"),
    "label negative": (lambda: fk.cross_entropy(S, Y - 1), r"target must be in \[0, 8\).*hold -1"),
    "labels' shape": (lambda: fk.f_divergence(S, T, labels=Y[:1]), r"leading shape \(2,\), not \(1,\)"),
    "labels' dtype": (lambda: fk.f_divergence(S, T, labels=Y.float()), "integer class indices, not torch.float32"),
    "no labels": (lambda: fk.f_divergence(S, T, ce_weight=0.5), "need labels"),
    "divergence": (lambda: fk.f_divergence(S, T, "helinger"), "unknown divergence 'helinger'; did you mean 'hellinger'"),
    "divergence's type": (lambda: fk.f_divergence(S, T, 3), "not int"),
    "reduction": (lambda: fk.f_divergence(S, T, reduction="men"), "unknown reduction 'men'; did you mean 'mean'"),
    "num_items": (lambda: fk.f_divergence(S, T, reduction="sum", num_items=3), "num_items overrides"),
    "num_items zero": (lambda: fk.f_divergence(S, T, num_items=0), "num_items must be positive"),
    "temperature": (lambda: fk.f_divergence(S, T, temperature=0.0), "temperature must be in .*, not 0.0"),
    "temperatures": (lambda: fk.f_divergence(S, T, temperature=torch.tensor([1.0, -1.0])), "temperature must be in .* in every token"),
    "temperatures' shape": (lambda: fk.f_divergence(S, T, temperature=torch.ones(3)), "temperature must have"),
    "weight's grad": (lambda: fk.f_divergence(S, T, token_weight=torch.ones(2, requires_grad=True)), "token_weight requires grad"),
    "backend": (lambda: fk.f_divergence(S, T, backend="tpu"), "unknown backend 'tpu'; known: auto"),
    "backend cannot": (lambda: fk.f_divergence(S, T, lambda t: (t - 1) ** 2, backend="cpu"), "user's own generator"),
    "vocab_size": (lambda: fk.f_divergence(S, T, vocab_size=9), r"vocab_size must be in \[1, 8\]"),
    "inplace of one tensor": (lambda: (lambda x: fk.f_divergence(x, x.detach(), inplace=True))(S.clone().requires_grad_()), "would overwrite teacher_logits"),
    "teacher's grad inplace": (
        lambda: (lambda x: fk.f_divergence(x[:, 1], x[:, 0], inplace=True))(torch.zeros(2, 2, 8, requires_grad=True) * 1), "teacher_logits"),
    "inplace strides": (lambda: fk.f_divergence((torch.zeros(8, 2, requires_grad=True) * 1).t(), T, inplace=True), "dense rows"),
    "classes behind": (lambda: fk.cross_entropy(S[None], Y[None]), r"classes in dimension 1, .* target \(1, 2\) give input.movedim"),
    "negative probabilities": (lambda: fk.cross_entropy(S, T - 1), "target holds negative class probabilities"),
    "probabilities' shape": (lambda: fk.cross_entropy(S, T[:1]), r"target of class probabilities must have the logits' shape \(2, 8\)"),
    "class weight": (lambda: fk.cross_entropy(S, Y, torch.ones(9)), r"weight must have shape \(8,\)"),
    "size_average": (lambda: fk.cross_entropy(S, Y, None, True), "size_average and reduce are deprecated"),
    "smoothing": (lambda: fk.cross_entropy(S, Y, label_smoothing=1.1), "label_smoothing must be in"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_a_clear_error(name):
    call, message = MISUSES[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_compiled_of_an_empty_batch_of_any_strides():
    logits = torch.zeros(2, 0, 300).as_strided((2, 0, 300), (1, 1, 0)).requires_grad_()  # which a compiler leaves so
    for loss in (lambda z: fk.log_sum_exp(z).sum(), lambda z: fk.f_divergence(z, z.detach(), "js")):
        found = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits)
        (gradient,) = torch.autograd.grad(found, logits)
        assert found == 0 and gradient.shape == logits.shape
