"""The operators called by hand: what `RowCall` and `LinearCall` promise, against float64."""

from typing import Any

import torch
from torch import Tensor

import fdistill_kernels as fk
from fdistill_kernels.backends.rows import LinearCall, RowCall, Teacher, TokenTerms
from fdistill_kernels.carried import flat, names_of
from fdistill_kernels.divergences import Divergence
from fdistill_kernels.values import Head

from .arguments import DTYPES, JUMP, logits, per_token, spoil
from .checks import Failure, called, check_gradient, close, unchanged
from .exact import FAR, HUGE, Terms, capped, of_rounding, rows_of, tolerances
from .layouts import SIZES, Draw

#: The operators' names of what is named here as a user would.
LEAVES = {
    **{name: f"terms_{name}" for name in TokenTerms._fields}, "weight": "head_weight", "bias": "head_bias",
    "logit_scale": "head_scale", "teacher_logit_scale": "teacher_scale", "cut_path": "path_cut",
    "skip_tiles": "path_skip_tiles", "chunk_bytes": "path_chunk_bytes",
    **{f"want_{name}": f"wants_{name}" for name in ("hidden", "weight", "bias")},
}  # fmt: skip
#: The operators' arguments that are not drawn here, as a call has them by itself: no list, and all of the vocabulary.
_TERMS = TokenTerms(*[None] * len(TokenTerms._fields))
OTHERS = {
    False: dict(zip(names_of(RowCall), flat(RowCall(None, None, _TERMS)), strict=True)),
    True: dict(zip(names_of(LinearCall), flat(LinearCall(None, Head(None), Teacher(), _TERMS)), strict=True)),
}


def terms_of(draw: Draw, n: int, v: int) -> tuple[dict[str, Any], Divergence | None]:
    """The fields that both requests share, and the divergence."""
    chosen = draw.choice([None, *(d for n, d in fk.TABLE.items() if n not in JUMP), fk.Alpha(draw.uniform(-2, 3))])

    def row(low: float, high: float) -> Tensor:
        return draw.place(per_token(draw, (n,), low, high))

    labels = draw.place(torch.randint(v, (n,))) if chosen is None or draw.maybe(0.5) else None
    return {
        "row_scale": draw.place(torch.rand(n) * torch.randint(0, 2, (n,))), "student_inverse_temperature": row(0.3, 3),
        "teacher_inverse_temperature": row(0.3, 3), "divergence_scale": row(0, 2), "cross_entropy_scale": row(0, 2),
        "z_loss_scale": row(0, 0.1), "labels": labels,
        "class_weight": draw.place(torch.rand(v)) if draw.maybe(0.3) and labels is not None else None,
        "divergence": None if chosen is None else chosen.key,
        "label_smoothing": draw.choice([0.0, 0.1]) if labels is not None else 0.0, "metrics": draw.maybe(0.2),
    }, chosen  # fmt: skip


def row_arguments(draw: Draw) -> tuple[dict[str, Any], Divergence | None]:
    """Those of `divergence_rows`."""
    outer, inner = draw.choice([(1, 5), (2, 3), (3, 1), (0, 2), (1, 65)])
    v, dtype = draw.choice(SIZES[:-4]), draw.choice(DTYPES)
    terms, chosen = terms_of(draw, outer * inner, v)
    models = {k: logits(draw, (outer, inner, v), dtype) for k in ("student", "teacher")}
    return {
        "student": draw.place(models["student"]), "teacher": chosen and draw.place(models["teacher"]), **terms,
        "student_gradient": True, "teacher_gradient": chosen is not None and draw.maybe(0.5),
        "inplace": draw.maybe(0.3), "student_softcap": draw.choice([0.0, 0.0, 5.0]),
        "teacher_softcap": draw.choice([0.0, 0.0, 5.0]), "backend": draw.one_of("auto", "cpu", "torch"),
    }, chosen  # fmt: skip


def linear_arguments(draw: Draw) -> tuple[dict[str, Any], Divergence | None]:
    """Those of `linear_rows`, the teacher as logits or as hidden states."""
    n, v, d, dtype = draw.choice([0, 1, 5, 17]), draw.choice(SIZES[:-3]), draw.choice([1, 17, 64]), draw.choice(DTYPES)
    terms, chosen = terms_of(draw, n, v)
    if isinstance(chosen, Divergence) and chosen.name == "alpha":  # its powers make rounded logits felt
        chosen, terms = fk.TABLE["kl"], terms | {"divergence": fk.TABLE["kl"].key}

    def head(rows: int) -> Tensor:
        return draw.place((torch.randn(rows, d) / d**0.5).to(dtype))

    with_head = chosen is not None and draw.maybe(0.5)
    teacher = None if chosen is None else head(n) if with_head else draw.place(logits(draw, (n, v), dtype, tame=True))
    return {
        "hidden": head(n), "weight": head(v), "bias": draw.choice([None, draw.place(torch.randn(v).to(dtype))]),
        "teacher": teacher, "teacher_weight": head(v) if with_head else None, "teacher_bias": None, "logit_scale": 1.5,
        "teacher_itself": False,
        "teacher_logit_scale": 0.5, "student_softcap": draw.choice([0.0, 5.0]), "teacher_softcap": 0.0,
        "cut_path": False, "skip_tiles": True, "chunk_bytes": draw.choice([0, 1, 5000]), **terms, "want_hidden": True,
        "want_weight": draw.maybe(0.8), "want_bias": False, "backend": draw.one_of("auto", "cpu", "torch"),
    }, chosen  # fmt: skip


def operator_call(draw: Draw) -> str:
    """One of the operators; which."""
    linear = draw.maybe(0.3)
    a, chosen = (linear_arguments if linear else row_arguments)(draw)
    if draw.maybe(0.4):
        spoil(draw, a)
    a = {k: x.detach() if isinstance(x, Tensor) else x for k, x in a.items()}  # autograd is the dispatcher's own affair
    rates = (a["student_inverse_temperature"], a["teacher_inverse_temperature"])
    if any(isinstance(x, Tensor) and x.is_meta for x in a.values()) or not all(x.is_floating_point() for x in rates):
        return "an operator's fake, or temperatures of 1/0"
    draw.strange = True  # dense rows are the caller's affair there
    name = "linear_rows" if linear else "divergence_rows_" if a["inplace"] else "divergence_rows"
    draw.say(name, a)
    before, old, want, problem = [b.clone() for b in draw.buffers], a.get("student"), None, None
    old = None if old is None else old.clone()
    try:
        want = exact_rows(a, chosen)
    except Exception as error:  # whatever does not fit there either
        problem = error
    operator = getattr(torch.ops.fdistill_kernels, name)
    names = LEAVES | ({"teacher": "teacher_rows", "student_softcap": "head_softcap"} if linear else {})
    got = called(draw, lambda **k: operator(**OTHERS[linear] | {names.get(key, key): x for key, x in k.items()}), a, a)
    if got is not None and want is None:
        raise Failure(f"taken, though the reference cannot: {problem!r}")
    if got is not None:
        if name == "divergence_rows_":
            got = got[0], a["student"].clone(), got[1]
            a["student"].copy_(old)
        compare(a, got, *want)
    unchanged(draw, before)
    return name if got is not None else f"{name} refused"


def models_of(a: dict[str, Any]) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Leaves in float64, and both models' capped logits (N, V) of them."""
    names = ("student", "teacher") if "student" in a else ("hidden", "weight")
    leaves = [a[k].detach().double().requires_grad_() for k in names if a[k] is not None]
    if "student" in a:
        n, v = a["student"].shape[:2].numel(), a["student"].shape[2]
        student, *rest = (x.reshape(n, v) for x in leaves)
        teacher = rest[0] if rest else None
    else:
        assert a["weight"].dim() == 2
        student = a["logit_scale"] * (leaves[0] @ leaves[1].T)
        student = student if a["bias"] is None else student + a["bias"].double().expand(student.shape[1:])
        teacher = a["teacher"] if a["teacher"] is None else a["teacher"].detach().double()
        if a["teacher_weight"] is not None:
            teacher = a["teacher_logit_scale"] * (teacher @ a["teacher_weight"].detach().double().T)
    assert teacher is None or teacher.shape == student.shape
    teacher = None if teacher is None else capped(teacher, a["teacher_softcap"])
    return leaves, capped(student, a["student_softcap"]), teacher


def exact_rows(a: dict[str, Any], chosen: Divergence | None) -> tuple[list[Tensor], Any, tuple[Tensor, ...]]:
    """The operator's parts, gradients and tolerances."""
    leaves, student, teacher = models_of(a)
    n, v = student.shape
    shared = ("row_scale", "student_inverse_temperature", "teacher_inverse_temperature", "divergence_scale",
              "cross_entropy_scale", "z_loss_scale")  # fmt: skip
    scale, t_s, t_t, *factors = (a[k].detach().double() for k in shared)
    assert all(a[k].shape == (n,) for k in shared) and (a["class_weight"] is None or a["class_weight"].shape == (v,))
    targets = None
    if a["labels"] is not None:
        assert a["labels"].shape == (n,)
        safe = torch.where(scale != 0, a["labels"].long(), 0).unsqueeze(1)
        smoothing = a["label_smoothing"]
        targets = torch.zeros(n, v).double().scatter_(1, safe, 1 - smoothing) + smoothing / v
        targets = targets if a["class_weight"] is None else targets * a["class_weight"].detach().double()
    terms = Terms(scale, 1 / t_s, 1 / t_t, *factors, targets, chosen)
    losses, parts = rows_of(student, teacher, terms)
    *gradients, of_logits = torch.autograd.grad(losses.sum(), [*leaves, student], allow_unused=True)
    linear = "hidden" in a
    first = a["hidden" if linear else "student"].dtype
    wide = torch.float64 if first == torch.float64 else first if linear else torch.float32
    if linear and a["teacher_weight"] is not None:  # logits of a teacher are rounded to its own dtype
        wide = max(wide, a["teacher"].dtype, key=lambda dtype: torch.finfo(dtype).eps)
    slack, error, floor = tolerances(student.detach(), teacher, terms, parts, wide, linear)
    if linear and first == torch.float16:  # whose rows are held without their weights, and may be beyond it so
        held = of_logits.abs().amax(1) / (scale * factors[0]).abs().clamp(torch.finfo(torch.float32).tiny, 1)
        floor = torch.where(held < torch.finfo(first).max / 2, floor, torch.inf)
    tolerance = slack, error, floor + of_rounding(of_logits, error, first) if linear else floor
    ones = torch.ones(n).double()
    factors = (factors[0], ones, ones)
    parts = [
        torch.where((f == 0) & (x.abs() > FAR), torch.nan, x.detach()) for f, x in zip(factors, parts, strict=True)
    ]
    parts = [torch.where((scale != 0) & (x != 0), scale * f * x, 0) for f, x in zip(factors, parts, strict=True)]
    wanted = (a["want_hidden"], a["want_weight"]) if linear else (True, a["teacher_gradient"])
    return parts, [g if want else None for g, want in zip(gradients, wanted, strict=False)], tolerance


def compare(a: dict[str, Any], got: Any, parts: list[Tensor], gradients: Any, tolerance: Any) -> None:
    """The operator's results."""
    slack, error, floor = tolerance
    for i, part in enumerate(parts):
        said = ~part.isnan()  # 0 times an infinite divergence is not
        close(
            f"part {i}",
            got[0][i][said],
            part[said],
            (slack + error * (part.abs().nan_to_num(0, 0, 0) + 0.1) + 1e-5)[said],
        )
    known = (torch.stack(parts).abs().amax(0) < FAR) & (floor < HUGE) & slack.isfinite()
    public = ("student_logits", "teacher_logits") if "student" in a else ("student_hidden", "student_weight")
    name = "f_divergence" if "student" in a else "linear_f_divergence"
    for ours, k, g, e in zip(a, public, got[1:], gradients, strict=False):
        if e is not None and a[ours].is_floating_point():  # under the names of the function that the tolerances know
            x = {**a, public[0]: a[next(iter(a))], public[1]: a[list(a)[1]]}
            check_gradient(k, name, x, g.double().reshape(e.shape), e, error, floor, known)
        elif e is None and g.numel():
            raise Failure(f"a gradient by {ours} that nobody asked for")
