"""Small values in place of keywords: the same loss, one of both refused, and fields that travel by their own names."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import fdistill_kernels as fk
from fdistill_kernels.backends.rows import LinearCall, RowCall
from fdistill_kernels.carried import built, flat, in_place_of, leaf, schema

N, V, D, D_T = 7, 129, 16, 24


def problem():
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return hidden, weight, torch.randn(V, requires_grad=True), torch.randn(N, D_T), torch.randn(V, D_T)


def gradients(loss, *of):
    return torch.autograd.grad(loss, of, retain_graph=True)


def same(ours, theirs, *of):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for a, b in zip(gradients(ours, *of), gradients(theirs, *of), strict=True):
        assert torch.equal(a, b)


def test_heads_and_hidden_states():
    hidden, weight, bias, teacher, teacher_weight = problem()
    keywords = fk.linear_f_divergence(
        hidden, weight, teacher, teacher_weight, "js", student_bias=bias, logit_scale=0.5, teacher_logit_scale=2.0,
        logit_softcap=30.0, teacher_logit_softcap=20.0,
    )  # fmt: skip
    head, theirs = fk.Head(weight, bias, 0.5, 30.0), fk.Head(teacher_weight, None, 2.0, 20.0)
    same(fk.linear_f_divergence(hidden, head, fk.Hidden(teacher, theirs)), keywords, hidden, weight, bias)
    same(fk.linear_f_divergence(hidden, head, teacher, theirs), keywords, hidden, weight, bias)
    target = torch.randint(V, (N,))
    by_keywords = fk.linear_cross_entropy(hidden, weight, target, linear_bias=bias, logit_scale=0.5, logit_softcap=30.0)
    same(fk.linear_cross_entropy(hidden, head, target), by_keywords, hidden, weight, bias)


def test_logits_with_their_cap():
    student, teacher = torch.randn(N, V, requires_grad=True), 3 * torch.randn(N, V)
    keywords = fk.f_divergence(student, teacher, "kl", logit_softcap=5.0, teacher_logit_softcap=2.0)
    same(fk.f_divergence(fk.Logits(student, 5.0), fk.Logits(teacher, 2.0), "kl"), keywords, student)
    hidden, weight, *_ = problem()
    capped = fk.linear_f_divergence(hidden, weight, 2 * (teacher / 2).tanh(), divergence="kl")
    ours = fk.linear_f_divergence(hidden, weight, fk.Logits(teacher, 2.0), divergence="kl")
    torch.testing.assert_close(ours, capped)
    target = torch.randint(V, (N,))
    same(
        fk.cross_entropy(fk.Logits(student, 5.0), target), fk.cross_entropy(student, target, logit_softcap=5.0), student
    )
    ours, wanted = fk.log_sum_exp(fk.Logits(student, 5.0)), fk.log_sum_exp(student, logit_softcap=5.0)
    same(ours.sum(), wanted.sum(), student)


def test_terms(backend):
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    settings = dict(labels=torch.randint(V, (N,)), ce_weight=0.5, label_smoothing=0.1, z_loss=0.01,
                    token_weight=torch.rand(N), temperature=2.0, temperature_squared=True, reduction="sum")  # fmt: skip
    keywords = fk.f_divergence(student, teacher, "tvd", backend=backend, **settings)
    same(fk.f_divergence(student, teacher, fk.LossTerms("tvd", **settings), backend=backend), keywords, student)
    weighted = fk.LossTerms("tvd", **settings, class_weight=torch.ones(V))
    torch.testing.assert_close(fk.f_divergence(student, teacher, weighted, backend=backend), keywords)


def test_divergence_weight(backend):
    student, teacher = torch.randn(N, V, requires_grad=True), torch.randn(N, V)
    rows = fk.f_divergence(student, teacher, "js", reduction="none", backend=backend)
    weight = torch.rand(N)
    each = fk.f_divergence(student, teacher, "js", divergence_weight=weight, reduction="none", backend=backend)
    torch.testing.assert_close(each, weight * rows)
    labels = torch.randint(V, (N,))
    loss, parts = fk.f_divergence(student, teacher, "js", divergence_weight=0.25, labels=labels, ce_weight=2.0,
                                  return_parts=True, backend=backend)  # fmt: skip
    torch.testing.assert_close(parts.divergence, 0.25 * rows.mean())
    torch.testing.assert_close(loss, parts.divergence + 2 * parts.cross_entropy)
    for bad in ("1", float("nan"), torch.rand(N + 1), torch.rand(N, requires_grad=True)):
        with pytest.raises((TypeError, ValueError), match="divergence_weight"):
            fk.f_divergence(student, teacher, divergence_weight=bad)


def no_overlap():
    """Rows of which the first is masked differently in both models, the second has nothing in common."""
    models = torch.randn(2, 3, V)
    models[0, 0, :5] = models[1, 0, 5:9] = models[0, 1, :40] = models[1, 1, 40:] = -torch.inf
    return models[0], models[1], torch.tensor([10, 60, 7])


@pytest.mark.grid
@pytest.mark.parametrize("weight", [0.0, torch.tensor([0.0, 0.0, 1.0])], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["kl", "rkl", "js", "pearson", "ab", "lk", "renyi", "akl", "csd", "dkd", "tail_aware"])
def test_an_infinite_term_that_weighs_nothing_is_not_there(name, weight, backend):
    student, teacher, labels = no_overlap()
    for terms in (dict(ce_weight=0.5), dict()):
        expected = student.clone().requires_grad_()
        rest = terms.get("ce_weight", 0) * F.cross_entropy(expected, labels, reduction="none")[:2]
        for parts in (False, "metrics"):
            models = student.clone().requires_grad_(), teacher.clone().requires_grad_(not parts)
            loss = fk.f_divergence(*models, name, labels=labels, divergence_weight=weight, reduction="none",
                                   return_parts=parts, backend=backend, **terms)  # fmt: skip
            loss = loss[0] if parts else loss
            torch.testing.assert_close(loss[:2], rest)
            trained = [x for x in models if x.requires_grad]
            ours, *others = torch.autograd.grad(loss.sum(), trained)
            nothing = torch.zeros_like(student)
            wanted = torch.autograd.grad(rest.sum(), expected, retain_graph=True)[0] if terms else nothing
            torch.testing.assert_close(ours[:2], wanted[:2], rtol=1e-4, atol=1e-6)
            assert ours.isfinite().all() and all((x[:2] == 0).all() for x in others)


@pytest.mark.parametrize("name", ["kl", "rkl", "js", "jeffreys", "lk"])
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_a_cap_of_one_model_alone_beside_nothing(of, name, backend):
    """An infinite logit that one model's cap makes finite, in a row whose divergence weighs nothing."""
    student, teacher, labels = torch.randn(3, V), torch.randn(3, V), torch.tensor([10, 60, 7])
    student[0, :5] = student[1, 40:50] = teacher[1, 40:45] = -torch.inf
    caps = {"logit_softcap" if of == "student" else "teacher_logit_softcap": 5.0}
    expected = student.clone().requires_grad_()
    capped = 5 * (expected / 5).tanh() if of == "student" else expected
    rest = 0.5 * F.cross_entropy(capped, labels, reduction="none")
    for trained in (False, True):
        models = student.clone().requires_grad_(), teacher.clone().requires_grad_(trained)
        loss = fk.f_divergence(*models, name, labels=labels, ce_weight=0.5, divergence_weight=torch.tensor([0.0, 0, 1]),
                               reduction="none", backend=backend, **caps)  # fmt: skip
        torch.testing.assert_close(loss[:2], rest[:2])
        ours, *others = torch.autograd.grad(loss.sum(), [x for x in models if x.requires_grad])
        wanted = torch.autograd.grad(rest.sum(), expected, retain_graph=True)[0]
        torch.testing.assert_close(ours[:2], wanted[:2], rtol=1e-4, atol=1e-6)
        assert ours.isfinite().all() and all((x[:2] == 0).all() for x in others)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("of", ["logits", "hidden states", "list", "list, uniform", "list, ignore"])
@pytest.mark.filterwarnings("ignore:tail='ignore'")
def test_no_numbers_that_weigh_nothing_beside_metrics(of, dtype, backend):
    """A token's metrics are not numbers, where its logits are none; the gradients are, as if it were not there."""
    weight, live = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([True, False, True])
    given = (torch.randn(3, 8), torch.randn(V, 8)) if of == "hidden states" else (torch.randn(3, V),)
    theirs = (torch.randn(3, 8), torch.randn(V, 8)) if of == "hidden states" else (torch.randn(3, V),)
    loss_of = fk.linear_f_divergence if of == "hidden states" else fk.f_divergence

    def run(models, teacher, weight):
        leaves = [x.to(dtype).requires_grad_() for x in models]
        if of.startswith("list"):
            teacher = (fk.top_k_of(teacher[0], 5)._replace(tail=of[6:] or "bucket"),)
        loss, parts = loss_of(*leaves, *(x if isinstance(x, fk.TopK) else x.to(dtype) for x in teacher), "js", divergence_weight=weight,
                              reduction="sum", return_parts="metrics" if "list" not in of else True, backend=backend)  # fmt: skip
        return loss, parts, torch.autograd.grad(loss, leaves)

    broken = given[0].clone()
    broken[1, 3] = torch.nan
    loss, parts, ours = run((broken, *given[1:]), theirs, weight)
    teacher = (theirs[0][live], *theirs[1:])
    wanted_loss, _, wanted = run((given[0][live], *given[1:]), teacher, weight[live])
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(ours[0][live], wanted[0])
    assert (ours[0][1] == 0).all() and parts[-3].isnan() == ("list" not in of)
    torch.testing.assert_close(ours[1:], wanted[1:])


@pytest.mark.grid
@pytest.mark.parametrize("name", ["neyman", "pearson", fk.Alpha(5.0), fk.Alpha(-4.0), "js"], ids=str)
def test_two_caps_beside_nothing(name, backend):
    """The student beside itself, in a row whose divergence weighs nothing, has the student's cap, not the teacher's."""
    student = (torch.randn(2, V) * 1e3).requires_grad_()
    loss = fk.f_divergence(
        student, torch.randn(2, V), name, divergence_weight=torch.tensor([1.0, 0.0]), labels=torch.tensor([0, 1]),
        ce_weight=1.0, temperature=0.02, logit_softcap=30.0, teacher_logit_softcap=50.0, reduction="none",
        backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    rest = F.cross_entropy(30 * (student[1:] / 30).tanh(), torch.tensor([1]))
    torch.testing.assert_close(gradient[1], torch.autograd.grad(rest, student)[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [False, "metrics"], ids=str)
@pytest.mark.parametrize("of", ["logits", "hidden states", "dkd"])
def test_labels_that_weigh_nothing(of, parts, backend):
    """By their class, or beside a divergence that weighs nothing: whatever the student's logits are there."""
    labels, weight, live = torch.tensor([1, 2, 3]), torch.tensor([1.0, 1, 0, 1, 1]), torch.tensor([True, False, True])
    first, head = torch.randn(3, 5), torch.randn(5, 5)
    first[1, 3] = torch.nan

    def run(first, rows):
        leaves = first[rows].clone().requires_grad_(), head.clone().requires_grad_()
        keywords = dict(reduction="sum", return_parts=parts, backend=backend)
        if of == "dkd":
            loss = fk.f_divergence(leaves[0], head[:3][rows], "dkd", divergence_weight=live[rows].float(), labels=labels[rows], **keywords)  # fmt: skip
        elif of == "logits":
            loss = fk.cross_entropy(leaves[0], labels[rows], weight, **keywords)
        else:
            loss = fk.linear_cross_entropy(*leaves, labels[rows], weight=weight, **keywords)
        loss = loss[0] if parts else loss
        return loss, torch.autograd.grad(loss, leaves[: 1 + (of == "hidden states")])

    (loss, ours), (wanted_loss, wanted) = run(first, [0, 1, 2]), run(first, [0, 2])
    torch.testing.assert_close((loss, ours[0][live], *ours[1:]), (wanted_loss, *wanted))
    assert (ours[0][1] == 0).all()
    with pytest.raises(ValueError, match="target"):
        fk.cross_entropy(first, labels + 3, 0 * weight, backend=backend)


@pytest.mark.filterwarnings("ignore:tail='ignore'")
def test_terms_that_weigh_nothing_elsewhere():
    """Beside lists, of hidden states and inside compilers; and labels' terms."""
    student, teacher, labels = no_overlap()
    leaf, weight = student.clone().requires_grad_(), torch.tensor([0.0, 0.0, 1.0])
    own = torch.compile(lambda s: fk.f_divergence(s, teacher, lambda t: t * t.log(), divergence_weight=weight), backend="eager")  # fmt: skip
    lists = [fk.TopK(labels[:, None], torch.full((3, 1), -0.5), tail) for tail in ("ignore", "renormalize", "bucket")]
    hidden = torch.eye(3, requires_grad=True), student.clamp_min(-1e30).T.contiguous()
    for loss, of in ((own(leaf), leaf), (fk.linear_f_divergence(*hidden, teacher, None, "rkl", divergence_weight=weight), hidden[0]),
                     *[(fk.f_divergence(leaf, x, "rkl", divergence_weight=0.0), leaf) for x in lists]):  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, of)
        assert loss.isfinite() and gradient.isfinite().all() and (gradient[:2] == 0).all()
    wrong = torch.tensor([0, 60, 7])  # of probability 0
    loss, parts = fk.f_divergence(leaf, student, "kl", labels=wrong, ce_weight=0.0, z_loss=0.1, return_parts=True)
    torch.testing.assert_close(loss, parts.z_loss)
    assert parts.cross_entropy == torch.inf and torch.autograd.grad(loss, leaf)[0].isfinite().all()
    _, parts = fk.cross_entropy(torch.full((1, 9), 1e30), wrong[:1], return_parts=True)
    assert parts.z_loss == 0


HIDDEN, WEIGHT, _, TEACHER, TEACHER_WEIGHT = problem()
HEAD, THEIRS = fk.Head(WEIGHT), fk.Head(TEACHER_WEIGHT)
TWICE = {
    "bias beside a head": lambda: fk.linear_f_divergence(HIDDEN, HEAD, TEACHER, THEIRS, student_bias=torch.zeros(V)),
    "scale beside a head": lambda: fk.linear_f_divergence(HIDDEN, HEAD, TEACHER, THEIRS, logit_scale=1.0),
    "cap beside a head": lambda: fk.linear_cross_entropy(HIDDEN, HEAD, torch.zeros(N).long(), logit_softcap=3.0),
    "cap beside the teacher's head": lambda: fk.linear_f_divergence(
        HIDDEN, HEAD, TEACHER, THEIRS, teacher_logit_softcap=3.0
    ),
    "weight beside hidden states": lambda: fk.linear_f_divergence(
        HIDDEN, HEAD, fk.Hidden(TEACHER, THEIRS), TEACHER_WEIGHT
    ),
    "bias beside hidden states": lambda: fk.linear_f_divergence(
        HIDDEN, HEAD, fk.Hidden(TEACHER, THEIRS), teacher_bias=torch.zeros(V)
    ),
    "cap beside logits": lambda: fk.f_divergence(fk.Logits(torch.randn(N, V)), torch.randn(N, V), logit_softcap=3.0),
    "labels beside terms": lambda: fk.f_divergence(
        torch.randn(N, V), torch.randn(N, V), fk.LossTerms("kl"), labels=torch.zeros(N).long()
    ),
    "reduction beside terms": lambda: fk.f_divergence(
        torch.randn(N, V), torch.randn(N, V), fk.LossTerms("kl"), reduction="sum"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_what_is_given_twice_is_refused(name):
    with pytest.raises(ValueError, match="beside"):
        TWICE[name]()


BAD = {
    "head's scale": lambda: fk.linear_f_divergence(HIDDEN, fk.Head(WEIGHT, scale="1"), TEACHER, THEIRS),
    "head's cap": lambda: fk.linear_f_divergence(HIDDEN, fk.Head(WEIGHT, softcap=-1.0), TEACHER, THEIRS),
    "head's weight": lambda: fk.linear_f_divergence(HIDDEN, fk.Head(WEIGHT.T), TEACHER, THEIRS),
    "teacher's head": lambda: fk.linear_f_divergence(HIDDEN, HEAD, fk.Hidden(TEACHER, TEACHER_WEIGHT)),
    "logits' cap": lambda: fk.f_divergence(fk.Logits(torch.randn(N, V), 0.0), torch.randn(N, V)),
    "no divergence": lambda: fk.f_divergence(torch.randn(N, V), torch.randn(N, V), fk.LossTerms(None)),
    "class weights": lambda: fk.f_divergence(
        torch.randn(N, V), torch.randn(N, V), fk.LossTerms("kl", class_weight=torch.ones(3))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_values_are_checked(name):
    with pytest.raises((ValueError, TypeError)):
        BAD[name]()


@pytest.mark.parametrize("keyword, value", [("bias", torch.zeros(V)), ("logit_scale", 2.0), ("logit_softcap", 3.0)])
@pytest.mark.parametrize("teacher", [torch.randn(N, V), lambda begin, end: torch.randn(end - begin, V)])
def test_what_is_of_a_teacher_s_head_needs_one(keyword, value, teacher):
    with pytest.raises(ValueError, match=f"teacher_{keyword} needs teacher_weight"):
        fk.linear_f_divergence(HIDDEN, WEIGHT, teacher, **{f"teacher_{keyword}": value})


@pytest.mark.parametrize("inner", [fk.Logits(torch.randn(N, V)), fk.top_k_of(torch.randn(N, V), 2), None, fk.Logits])
def test_a_value_inside_another_is_refused(inner):
    with pytest.raises(TypeError, match=r"teacher_hidden\.values must be a tensor"):
        fk.linear_f_divergence(HIDDEN, WEIGHT, fk.Logits(inner))


@pytest.mark.parametrize("size, error", [(V + 1, ValueError), (0, ValueError), ("5", TypeError), (2.0, TypeError)])
def test_a_part_of_shards_is_one_of_their_vocabulary(size, error):
    shard, logits, (hidden, weight, *_) = fk.VocabShard(None, 0, V), torch.randn(N, V), problem()
    with pytest.raises(error, match="vocab_size must be"):
        fk.f_divergence(logits, logits, shard=shard, vocab_size=size)
    with pytest.raises(error, match="vocab_size must be"):
        fk.linear_f_divergence(hidden, weight, hidden, weight, shard=shard, vocab_size=size)


def test_values_are_loaded_as_weights(tmp_path):
    x, n = torch.randn(2, 3), torch.tensor(2)
    values = [
        fk.Head(x, x[0], 2.0), fk.Hidden(x, fk.Head(x)), fk.Logits(x, 30.0), fk.LossTerms(labels=n), fk.LossParts(x, x, x, n),
        fk.Metrics(*[x] * 10), fk.SparseParts(*[x] * 7), fk.TopK(n[None], x, "sampled", x, 2.0),
    ]  # fmt: skip
    assert {type(v) for v in values} == {
        k for k in vars(fk).values() if hasattr(k, "_fields") and k is not fk.VocabShard
    }
    torch.save(values, tmp_path / "values.pt")
    loaded = torch.load(tmp_path / "values.pt", weights_only=True)
    assert [type(v) for v in loaded] == [type(v) for v in values]
    for got, want in zip(tree_leaves(loaded), tree_leaves(values), strict=True):
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


def test_values_are_copied_and_compiled():
    hidden, weight, bias, teacher, teacher_weight = problem()
    head = copy.deepcopy(fk.Head(weight.detach(), bias.detach(), 2.0))
    assert torch.equal(pickle.loads(pickle.dumps(head)).weight, weight)

    def loss(h, head, teacher):
        return fk.linear_f_divergence(h, head, teacher, divergence=fk.LossTerms("js", temperature=2.0))

    values = fk.Head(weight, bias, 2.0), fk.Hidden(teacher, fk.Head(teacher_weight))
    eager, compiled = loss(hidden, *values), torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, *values)
    torch.testing.assert_close(eager, compiled)
    for a, b in zip(gradients(eager, hidden, weight, bias), gradients(compiled, hidden, weight, bias), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [RowCall, LinearCall])
def test_leaves_travel_by_name(kind):
    names = [argument.split()[-1] for argument in schema(kind).split(", ")]
    assert len(set(names)) == len(names)
    value = built(kind, names)
    assert list(flat(value)) == names and built(kind, flat(value)) == value
    for name in names:
        assert leaf(kind, name, names) == name and in_place_of(kind, **{name: 1}).index(1) == names.index(name)
    operator = {RowCall: "divergence_rows", LinearCall: "linear_rows"}[kind]
    arguments = getattr(torch.ops.fdistill_kernels, operator).default._schema.arguments
    assert [a.name for a in arguments] == [*names, "backend"]


def test_a_star_import_needs_no_extra(monkeypatch):
    monkeypatch.delattr(fk, "teachers", raising=False)
    monkeypatch.setitem(sys.modules, "fdistill_kernels.teachers", None)
    names = {}
    exec("from fdistill_kernels import *", names)
    assert names["f_divergence"] is fk.f_divergence
    with pytest.raises(ImportError, match="fdistill_kernels"):
        fk.TeacherStore  # noqa: B018


def test_an_import_brings_torch_alone(monkeypatch):
    """Not its compiler, which takes as long to import as all the rest, nor what extras and GPUs need."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = "import sys, torch; before = set(sys.modules); import fdistill_kernels; print(*set(sys.modules) - before)"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    others = {name.partition(".")[0] for name in new} - sys.stdlib_module_names - {"fdistill_kernels", "torch"}
    assert "fdistill_kernels" in new and not others and "torch._dynamo" not in new
