"""torch's own samples of its losses: every OpInfo sample and error input, called on us.

They are written by a process of their own: torch's test code changes the one that imports it.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fdistill_kernels as fk

from .grid import BACKENDS, WHOLE, agree, asks, points

PEER = "torch OpInfo"
NAMES = ("nn.functional.cross_entropy", "nn.functional.linear_cross_entropy", "nn.functional.kl_div")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def write_samples(path):
    """[(operator, variant, dtype, tensors, keywords)], and the inputs that it refuses with their messages."""
    import types
    import unittest

    try:
        import expecttest  # noqa: F401
    except ImportError:  # of which torch's test code wants a base class alone
        sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
    from torch.testing._internal.common_methods_invocations import op_db

    def plain(sample):
        keywords = {k: getattr(v, "batch_chunk_size", v) for k, v in sample.kwargs.items()}
        return [x.detach() for x in (sample.input, *sample.args)], keywords

    samples, errors = [], []
    for op in (op for op in op_db if op.name in NAMES):
        for dtype in DTYPES:
            torch.manual_seed(0)
            for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
                samples.append((op.name, op.variant_test_name, dtype, *plain(sample)))
        if op.error_inputs_func is not None:
            errors += [(op.name, *plain(error.sample_input), error.error_regex) for error in op.error_inputs("cpu")]
    torch.save((samples, errors), path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("opinfo") / "samples.pt"
    program = f"from tests.peers.test_torch_opinfo import write_samples; write_samples({str(path)!r})"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    return torch.load(path)


def chosen(written, name, dtype, whole=WHOLE):
    """Tensors and keywords of an operator's samples; some in the short form."""
    found = [(tensors, keywords) for op, _, kind, tensors, keywords in written[0] if (op, kind) == (name, dtype)]
    assert found, f"torch {torch.__version__} has no samples of {name}"
    return found if whole else found[:: max(1, len(found) // 8)]


def compare(tensors, keywords, ours, truth, wrt, linear=False, backends=BACKENDS):
    """One sample, whole: class probabilities and class weights are constants to us."""
    given = dict(zip(("x", "second", "third"), tensors, strict=False))
    given |= {k: v for k, v in keywords.items() if isinstance(v, torch.Tensor)}
    fixed = {k: v for k, v in keywords.items() if not isinstance(v, torch.Tensor)}
    agree(1, 1, lambda rows: given, lambda **kw: ours(**kw, **fixed), lambda **kw: truth(**kw, **fixed), wrt=wrt,
          factor="random", linear=linear, backends=backends)  # fmt: skip


def counted(record_property, cases, check):
    """A case is a sample; Triton gets four of those in float32."""
    for i, (tensors, keywords) in enumerate(cases):
        narrow = ("torch", "cpu") if tensors[0].dtype != torch.float64 else ("torch",)
        few = tensors[0].dtype == torch.float32 and not i % max(1, len(cases) // 4)
        check(tensors, keywords, BACKENDS if few else narrow)
    record_property("cases", len(cases))


def check_cross_entropy(tensors, keywords, backends):
    compare(tensors, keywords, lambda x, second, **kw: fk.cross_entropy(x, second, **kw),
            lambda x, second, **kw: F.cross_entropy(x, second, **kw), ("x",), backends=backends)  # fmt: skip


def of_weights(written, dtype, negative):
    """Samples of cross_entropy with class probabilities and a class weight below 0, or the others."""
    every = chosen(written, "nn.functional.cross_entropy", dtype, whole=True)
    below = [t[1].is_floating_point() and "weight" in k and bool((k["weight"] < 0).any()) for t, k in every]
    found = [sample for sample, is_below in zip(every, below, strict=True) if is_below == negative]
    return found if WHOLE else found[::3]


@asks("cross_entropy: class indices and probabilities, dimensions, class weights, reductions, ignore_index")
@points(dtype=DTYPES)
def test_cross_entropy(written, record_property, dtype):
    counted(record_property, of_weights(written, dtype, False), check_cross_entropy)


@asks(
    "cross_entropy: class probabilities with negative class weights",
    differs="refused: weighted probabilities must be a teacher's",
)
@points(dtype=DTYPES)
def test_negative_class_weights(written, record_property, dtype):
    cases = of_weights(written, dtype, True)
    record_property("cases", len(cases))
    for (x, target), keywords in cases:
        with pytest.raises(ValueError, match="weight must not be negative"):
            fk.cross_entropy(x, target, **keywords)


@asks("linear_cross_entropy: biases, heads of several dimensions, probabilities, weights, chunks")
@points(dtype=DTYPES)
def test_linear_cross_entropy(written, record_property, dtype):
    def ours(x, second, third, options=None, **keywords):
        if options:
            keywords["chunk_bytes"] = options * second.shape[0] * x.itemsize
        return fk.linear_cross_entropy(x, second, third, **keywords)

    def truth(x, second, third, options=None, **keywords):
        return F.linear_cross_entropy(x, second, third, **keywords)

    def check(tensors, keywords, backends):
        wrt = ("x", "second", *(["linear_bias"] if "linear_bias" in keywords else []))
        compare(tensors, keywords, ours, truth, wrt, linear=True, backends=backends)

    counted(record_property, chosen(written, "nn.functional.linear_cross_entropy", dtype), check)


ENTRIES = "a loss is a token's: our mean is theirs times V, our none their sum over the vocabulary"


def check_kl(reduction):
    def ours(x, second, backend, log_target):
        second = second if log_target else second.to(torch.promote_types(second.dtype, torch.float32)).log()
        loss = fk.f_divergence(x, second, "kl", backend=backend,
                               reduction="sum" if reduction == "batchmean" and x.dim() == 1 else reduction)  # fmt: skip
        # of one vector torch takes the classes for the batch
        return loss / x.shape[-1] if reduction == "mean" or (reduction == "batchmean" and x.dim() == 1) else loss

    def truth(x, second, log_target):
        log_q = x.log_softmax(-1)
        p = second.log_softmax(-1) if log_target else second / second.sum(-1, keepdim=True)
        loss = F.kl_div(log_q, p, reduction=reduction, log_target=log_target)
        return loss.sum(-1) if reduction == "none" else loss

    def check(tensors, keywords, backends):
        compare(tensors, dict(log_target=keywords["log_target"]), ours, truth, ("x",), backends=backends)

    return check


def of_reduction(written, dtype, name):
    return [case for case in chosen(written, "nn.functional.kl_div", dtype) if case[1]["reduction"] == name]


@asks("kl_div: log_target or not, batchmean and sum")
@points(dtype=DTYPES, reduction=["sum", "batchmean"])
def test_kl_div(written, record_property, dtype, reduction):
    counted(record_property, of_reduction(written, dtype, reduction), check_kl(reduction))


@asks("kl_div: mean and none over entries", differs=ENTRIES)
@points(dtype=DTYPES, reduction=["mean", "none"])
def test_kl_div_over_entries(written, record_property, dtype, reduction):
    counted(record_property, of_reduction(written, dtype, reduction), check_kl(reduction))


@asks("the batchmean of one vector", differs="its batch is 1; torch divides by the number of classes")
@pytest.mark.parametrize("backend", BACKENDS)
def test_batchmean_of_one_vector(backend):
    x, teacher = torch.randn(2, 5).log_softmax(-1)
    ours = fk.f_divergence(x, teacher, "kl", reduction="batchmean", backend=backend)
    torch.testing.assert_close(ours / 5, F.kl_div(x, teacher, reduction="batchmean", log_target=True))


@asks("the gradient to class probabilities", differs="not made: a target that asks for it is a ValueError")
@points(function=["cross_entropy", "linear_cross_entropy"])
def test_no_gradient_to_probabilities(written, function):
    every = chosen(written, f"nn.functional.{function}", torch.float32, whole=True)
    tensors = next(tensors for tensors, _ in every if tensors[-1].is_floating_point())
    with pytest.raises(ValueError, match="target requires grad"):
        getattr(fk, function)(*tensors[:-1], tensors[-1].clone().requires_grad_())


@asks("the mean where every target is ignored", differs="0 with zero gradient; torch's is NaN")
@points(backend=BACKENDS, weighted=[False, True])
def test_mean_of_no_target(backend, weighted):
    x, target = torch.randn(4, 7, requires_grad=True), torch.full((4,), -100)
    weight = torch.rand(7) if weighted else None
    loss = fk.cross_entropy(x, target, weight, backend=backend)
    loss.backward()
    assert loss == 0 and not x.grad.any() and F.cross_entropy(x, target, weight).isnan()


#: What each of torch's refusals of a linear loss is about, in our words, in its order.
ARGUMENTS = ["target", "linear_weight", "linear_weight", "ignore_index", "linear_weight", "linear_bias"]


@asks("linear_cross_entropy: its error inputs raise, and name the argument")
@points(backend=BACKENDS)
def test_error_inputs(written, record_property, backend):
    errors = [error for error in written[1] if error[0] == "nn.functional.linear_cross_entropy"]
    assert errors and not len(errors) % len(ARGUMENTS)  # the same for each variant of the operator
    for (_, tensors, keywords, _), argument in zip(errors, ARGUMENTS * (len(errors) // len(ARGUMENTS)), strict=True):
        with pytest.raises(RuntimeError):
            F.linear_cross_entropy(*tensors, **keywords)
        with pytest.raises((ValueError, TypeError), match=argument):
            fk.linear_cross_entropy(*tensors, backend=backend, **keywords)
    record_property("cases", len(errors))


#: OpInfo has no error inputs of these two; what they refuse, by the argument that is wrong.
REFUSED = {
    "target's rows": ("target", (torch.randn(4, 7), torch.zeros(3).long()), {}),
    "target's class": ("target", (torch.randn(4, 7), torch.full((4,), 7)), {}),
    "target's sign": ("target", (torch.randn(4, 7), torch.full((4,), -1)), {}),
    "target's shape": ("target", (torch.randn(4, 7), torch.rand(4, 6)), {}),
    "target's dtype": ("target", (torch.randn(4, 7), torch.zeros(4, dtype=torch.bool)), {}),
    "weight's size": ("weight", (torch.randn(4, 7), torch.zeros(4).long()), dict(weight=torch.rand(6))),
    "reduction": ("reduction", (torch.randn(4, 7), torch.zeros(4).long()), dict(reduction="average")),
    "smoothing": ("label_smoothing", (torch.randn(4, 7), torch.zeros(4).long()), dict(label_smoothing=1.5)),
    "integer logits": ("input", (torch.ones(4, 7).long(), torch.zeros(4).long()), {}),
    "scalar logits": ("input", (torch.tensor(1.0), torch.tensor(0)), {}),
}


@asks("cross_entropy: what it refuses, we refuse by the argument's name")
@points(name=REFUSED, backend=["torch", "cpu"])
def test_refused(name, backend):
    argument, tensors, keywords = REFUSED[name]
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        F.cross_entropy(*tensors, **keywords)
    with pytest.raises((ValueError, TypeError), match=argument):
        fk.cross_entropy(*tensors, **keywords, backend=backend)


@asks("kl_div: shapes that only broadcast", differs="a ValueError that names both; torch broadcasts")
@points(shape=[(1, 7), (7,), (4, 1)], backend=BACKENDS)
def test_no_broadcasting(shape, backend):
    assert F.kl_div(torch.randn(4, 7), torch.rand(shape), reduction="sum").isfinite()
    with pytest.raises(ValueError, match="student"):
        fk.f_divergence(torch.randn(4, 7), torch.randn(shape), "kl", backend=backend)
