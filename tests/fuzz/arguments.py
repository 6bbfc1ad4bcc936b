"""Arguments of each public function and of the operator, drawn at random: the names of the functions are theirs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fdistill_kernels as fk
from fdistill_kernels.own import resolve
from fdistill_kernels.sparse import TAILS, WHOLE

from .exact import TRAINED, square
from .layouts import Draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def logits(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, tame: bool = False) -> Tensor:
    """Values of logits, of one kind."""
    kinds = ["normal"] * 6 + ["huge", "masked", "lowest", "ties", "one-hot", "offset"]
    kind = "normal" if tame else draw.choice(kinds)
    z = torch.randn(shape) * draw.choice([0.01, 1, 1, 3, *([] if tame else [10, 30])])
    if kind == "huge":
        z = torch.randn(shape).sign() * 1e4
    elif kind in ("masked", "lowest"):
        z[..., draw.randrange(shape[-1]) :: draw.randint(1, 3)] = (
            -torch.inf if kind == "masked" else max(torch.finfo(dtype).min, torch.finfo(z.dtype).min)
        )
    elif kind == "ties":
        z = z.round()
    elif kind == "one-hot":
        z = torch.zeros(shape)
        z[..., draw.randrange(shape[-1])] = draw.choice([20.0, 200.0, 2e4])
    elif kind == "offset":
        z = z + 1e4
    draw.wild |= kind != "normal" or float(z.abs().amax() if z.numel() else 0) > 8
    return z.to(dtype)


def per_token(draw: Draw, lead: tuple[int, ...], low: float, high: float) -> Tensor:
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    return (low + (high - low) * torch.rand(lead)).to(dtype)


def label_values(draw: Draw, lead: tuple[int, ...], v: int, a: dict[str, Any]) -> Tensor:
    """Class indices, some of them ignored."""
    dtype = draw.choice(LABEL_DTYPES)
    y = torch.randint(min(v, torch.iinfo(dtype).max), lead).to(dtype)
    ignored = draw.choice([-100, -100, 0, 5, -1]) if dtype != torch.uint8 else draw.choice([0, 5, 255])
    if ignored != -100:
        a["ignore_index"] = ignored
    y[torch.rand(lead) < draw.choice([0, 0.3, 0.3, 1])] = ignored
    if draw.maybe(0.05):
        draw.strange = True
        y[torch.rand(lead) < 0.3] = draw.choice([v, v + 1, -1, torch.iinfo(dtype).max]) if v < 100 else -1
    return y


def token_arguments(draw: Draw, lead: tuple[int, ...], v: int, target: bool, linear: bool) -> dict[str, Any]:
    """The keywords that every loss has, labels as `target` where it must be given."""
    a: dict[str, Any] = {}
    if target or draw.maybe(0.6):
        a["target" if target else "labels"] = draw.place(label_values(draw, lead, v, a))
        a |= {"ce_weight": draw.choice([0.0, 0.5, 2])} if not target else {}
        a |= {"z_loss": draw.choice([1e-4, 0.1])} if draw.maybe(0.3) else {}
        if draw.maybe(0.3) and a.get("ce_weight", 1):
            a["label_smoothing"] = draw.choice([0.0, 0.1, 1])
    if draw.maybe(0.3):
        weight = per_token(draw, lead, 0, 2) if draw.maybe(0.8) else torch.randint(0, 2, lead)
        a["token_weight"] = draw.place(weight)
    if not target:
        low, high = (0.7, 3.0) if linear else (0.2, 8.0)
        for key in ("temperature", "teacher_temperature"):
            if draw.maybe(0.3):
                a[key] = draw.choice([1, draw.uniform(low, high), draw.place(per_token(draw, (), low, high)),
                                      draw.place(per_token(draw, lead, low, high))])  # fmt: skip
        a |= {"temperature_squared": True} if draw.maybe(0.2) else {}
    a["reduction"] = draw.choice(["mean", "sum", "none", "batchmean"])
    if a["reduction"] in ("mean", "batchmean") and draw.maybe(0.2):
        items = draw.place(torch.tensor([float(draw.randint(1, 99))]).to(draw.choice([torch.int32, torch.float32])))
        a["num_items"] = draw.choice([draw.randint(1, 99), items, items.view(())])
    a |= {"logit_softcap": draw.choice([0.5, 5.0, 30.0])} if draw.maybe(0.15) else {}
    return a | ({"return_parts": True} if draw.maybe(0.1) else {})


def top_k(draw: Draw, lead: tuple[int, ...], v: int, a: dict[str, Any]) -> fk.TopK:
    """A list of any length, order, mass and precision for each token; `a` gets what it asks of the call."""
    k = draw.choice([0, 1, 1, 2, 5, 16, 63, 64, min(v, 300), min(v, 300) + 3, v])
    tail, taken_at = draw.choice(TAILS), draw.choice([1.0, 1.0, 1.0, 2.0, 0.5])
    log_p = logits(draw, (*lead, v), torch.float32).double().log_softmax(-1)
    ids = (log_p if draw.maybe(0.5) else torch.rand(log_p.shape)).topk(min(k, v)).indices
    ids = torch.nn.functional.pad(ids, (0, max(0, k - v)), value=-1)
    ids[torch.rand(ids.shape) < draw.choice([0, 0, 0.3, 1])] = -1
    ids[torch.rand(lead) < draw.choice([0, 0.2])] = -1
    ids = ids.gather(-1, torch.rand(ids.shape).argsort(-1)) if draw.maybe(0.8) else ids
    log_probs = log_p.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    mass = log_probs.logsumexp(-1, keepdim=True).clamp_min(-1e30)
    kind = draw.choice(["as it is"] * 4 + ["one", "above", "below", "nothing", "zeros"])
    log_probs += {"one": -mass, "above": draw.uniform(0, 0.03) - mass, "below": -draw.uniform(0, 30)}.get(kind, 0)
    log_probs[torch.rand(ids.shape) < {"nothing": 1, "zeros": 0.3}.get(kind, 0)] = -torch.inf
    log_probs[ids < 0] = draw.choice([-torch.inf, torch.nan, 5.0])
    fields = {"ids": ids.to(draw.choice([torch.int64, torch.int64, torch.int32, torch.int16])),
              "log_probs": log_probs.to(draw.choice(DTYPES))}  # fmt: skip
    if tail == "sampled":
        fields["weights"] = per_token(draw, ids.shape, 0, draw.choice([1, 1, 20])) * (torch.rand(ids.shape) < 0.9)
    fits = tail in WHOLE or draw.maybe(0.95)
    if tail not in WHOLE and fits:
        a["teacher_temperature"] = taken_at
    teacher = fk.TopK(**{name: draw.place(x) for name, x in fields.items()}, tail=tail, temperature=taken_at)
    draw.strange |= not (fits and is_proper(teacher, v))
    return teacher


def is_proper(teacher: fk.TopK, v: int) -> bool:
    """Whether a list may be given, after the layouts that mix its rows."""
    listed, order = teacher.ids >= 0, teacher.ids.sort(-1).values
    twice = (order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)
    mass = teacher.log_probs.double().exp().masked_fill(~listed, 0).sum(-1)
    known = ~(listed & teacher.log_probs.isnan()).any()
    return bool(known) and not twice.any() and not (mass > 1.05).any()


#: Their set, gate or side of a tie may be another one in float64.
JUMP = ("lk", "akl", "entropy_gated", "tail_aware", "dkd")


def divergence(draw: Draw, linear: bool) -> Any:
    low, high = (0.0, 2.0) if linear else (-8.0, 8.0)
    own = [] if draw.wild else [square]
    return draw.choice([*(n for n in fk.TABLE if n not in JUMP), *own, fk.Alpha(draw.uniform(low, high)), fk.GJS(draw.uniform(0.01, 0.99)),
                        fk.SkewKL(draw.uniform(0, 0.99)), fk.SkewRKL(draw.uniform(0, 0.99))])  # fmt: skip


def beside_a_list(draw: Draw, tail: str, a: dict[str, Any], linear: bool) -> Any:
    """A divergence that the tail can have."""
    if "labels" in a and tail != "sampled" and draw.maybe(0.1):
        return "dkd"
    found = divergence(draw, linear)
    while tail == "sampled" and found is not square and resolve(found).statistics is not None:
        found = divergence(draw, linear)
    return found


def nan_in_masked_rows(draw: Draw, a: dict[str, Any], *models: Tensor) -> None:
    """Rows that no label or weight counts are not looked at; sometimes NaN is in one that counts."""
    labels, weight = a.get("labels", a.get("target")), a.get("token_weight")
    if draw.maybe(0.6) or (labels is not None and labels.is_floating_point()):
        return
    dead = torch.zeros(models[0].shape[:-1], dtype=torch.bool)
    dead |= (labels == a.get("ignore_index", -100)) if labels is not None else dead
    dead |= (weight == 0) if weight is not None else dead
    dead |= torch.rand(dead.shape) < 0.1 if draw.maybe(0.2) else dead
    for z in models:
        z[dead] = torch.nan


def f_divergence(draw: Draw) -> dict[str, Any]:
    lead, v = draw.sizes()
    dtype = draw.choice(DTYPES)
    if draw.maybe(0.35):
        return of_a_list(draw, lead, v, dtype)
    other = dtype if draw.maybe(0.8) else draw.choice(DTYPES)
    student, teacher = logits(draw, (*lead, v), dtype), logits(draw, (*lead, v), other)
    a = token_arguments(draw, lead, v, False, False)
    a["divergence"] = divergence(draw, False)
    nan_in_masked_rows(draw, a, student, teacher)
    a |= {"teacher_logit_softcap": 3.0} if draw.maybe(0.1) else {}
    padded = draw.maybe(0.15)
    if padded:
        teacher = torch.cat([teacher, teacher[..., :1].expand(*lead, 3)], -1)
        a["vocab_size"] = draw.randint(1, v) if "labels" not in a else v
    student, teacher = draw.place(student), draw.place(teacher)
    if draw.maybe(0.1) and other == dtype and not padded:  # memory in common
        teacher = draw.choice([student, torch.from_dlpack(student), student.transpose(0, -1).reshape(student.shape)])
        draw.strange = True
    if draw.maybe(0.1) and v > 1:
        a[draw.choice(["token_weight", "temperature"])] = student[..., draw.randrange(v)]
        draw.strange = True
    inplace = {"inplace": True} if draw.maybe(0.2) else {}
    return {"student_logits": student, "teacher_logits": teacher, **a, **inplace}


def of_a_list(draw: Draw, lead: tuple[int, ...], v: int, dtype: torch.dtype) -> dict[str, Any]:
    """`f_divergence` with a list for a teacher."""
    student = logits(draw, (*lead, v), dtype)
    a = token_arguments(draw, lead, v, False, False)
    if draw.maybe(0.15) and "labels" not in a:
        a["vocab_size"] = draw.randint(1, v)
    teacher = top_k(draw, lead, a.get("vocab_size", v), a)
    a["divergence"] = beside_a_list(draw, teacher.tail, a, False)
    nan_in_masked_rows(draw, a, student)
    inplace = {"inplace": True} if draw.maybe(0.25) else {}
    return {"student_logits": draw.place(student), "teacher_logits": teacher, **a, **inplace}


def cross_entropy(draw: Draw) -> dict[str, Any]:
    lead, v = draw.sizes()
    dtype = draw.choice(DTYPES)
    a = token_arguments(draw, lead, v, True, False)
    z = logits(draw, (*lead, v), dtype)
    if draw.maybe(0.15) and v <= 2049:
        a["target"] = draw.place(torch.rand(*lead, v).softmax(-1).to(draw.choice(DTYPES)))
        a.pop("ignore_index", None)
    nan_in_masked_rows(draw, a, z)
    a["input"] = draw.place(z)
    if len(lead) > 1:
        a["input"] = a["input"].movedim(-1, 1)
        a["target"] = a["target"].movedim(-1, 1) if a["target"].is_floating_point() else a["target"]
    if draw.maybe(0.3):
        a["weight"] = draw.place(per_token(draw, (v,), 0, 2))
    if draw.maybe(0.1) and len(lead) == 1:
        a["token_weight"] = a["input"][:, 0]
        draw.strange = True
    return a | ({"inplace": True} if draw.maybe(0.2) else {})


def log_sum_exp(draw: Draw) -> dict[str, Any]:
    lead, v = draw.sizes()
    a = {"logits": draw.place(logits(draw, (*lead, v), draw.choice(DTYPES)))}
    return a | ({"logit_softcap": 5.0} if draw.maybe(0.2) else {})


def head(draw: Draw, lead: tuple[int, ...], v: int, dtype: torch.dtype, names: tuple[str, str, str]) -> dict[str, Any]:
    d = draw.choice([1, 2, 17, 64, 65])
    a = {names[0]: logits(draw, (*lead, d), dtype, tame=True), names[1]: (torch.randn(v, d) / d**0.5).to(dtype)}
    a |= {names[2]: torch.randn(v).to(dtype)} if draw.maybe(0.3) else {}
    return a


def linear_rest(draw: Draw) -> dict[str, Any]:
    a: dict[str, Any] = {"chunk_bytes": draw.choice([1, 5000, 100000])} if draw.maybe(0.5) else {}
    a |= {"logit_scale": draw.choice([0.5, 2])} if draw.maybe(0.2) else {}
    return a | ({"memory": "minimal"} if draw.maybe(0.1) else {})


class Given:
    """A teacher as a function of a range of rows."""

    def __init__(self, rows: Tensor):
        self.logits = rows

    def __call__(self, begin: int, end: int) -> Tensor:
        return self.logits[begin:end]


def linear_f_divergence(draw: Draw) -> dict[str, Any]:
    lead, v = draw.sizes()
    dtype = draw.choice(DTYPES)
    a = token_arguments(draw, lead, v, False, True) | linear_rest(draw)
    student = head(draw, lead, v, dtype, TRAINED["linear_f_divergence"])
    if draw.maybe(0.35):
        teacher = top_k(draw, lead, v, a)
        a["divergence"] = beside_a_list(draw, teacher.tail, a, True)
        nan_in_masked_rows(draw, a, student["student_hidden"])
        return {k: draw.place(x) for k, x in student.items()} | {"teacher_hidden": teacher} | a
    a["divergence"] = divergence(draw, True)
    kind = draw.choice(["hidden", "hidden", "logits", "function", "tied"])
    if kind in ("logits", "function"):
        z = logits(draw, (*lead, v), dtype, tame=True)
        teacher = {"teacher_hidden": z}
        a |= {"memory": "chunks"}
    else:
        teacher = head(draw, lead, v, dtype, ("teacher_hidden", "teacher_weight", "teacher_bias"))
    nan_in_masked_rows(draw, a, student["student_hidden"], teacher["teacher_hidden"])
    a |= {k: draw.place(x) for k, x in (student | teacher).items()}
    if kind == "tied" and a["teacher_hidden"].shape == a["student_hidden"].shape:
        a["teacher_weight"] = a["student_weight"]
    if kind == "function":
        a["teacher_hidden"] = Given(a["teacher_hidden"].reshape(-1, v))
    return a


def linear_cross_entropy(draw: Draw) -> dict[str, Any]:
    lead, v = draw.sizes()
    dtype = draw.choice(DTYPES)
    places = draw.choice([(2,), (3, 1)]) if len(lead) == 1 and v <= 300 and draw.maybe(0.2) else ()  # a head for each
    a = token_arguments(draw, (*lead, *places), v, True, True) | linear_rest(draw)
    student = head(draw, lead, v, dtype, TRAINED["linear_cross_entropy"])
    weighted = draw.maybe(0.3)
    if draw.maybe(0.15):
        shape = (*lead, v, *places) if places else (*lead, v)
        a["target"] = draw.place(torch.rand(shape).to(draw.choice(DTYPES)))
        for key in ("ignore_index", "memory"):
            a.pop(key, None)
    if places:
        student["linear_weight"] = torch.stack([student["linear_weight"]] * math.prod(places), 1).unflatten(1, places)
        student["linear_weight"] += torch.randn(student["linear_weight"].shape).to(dtype) / 4
        student.pop("linear_bias", None)
        a = {k: x for k, x in a.items() if k not in ("return_parts", "z_loss")}
        a["reduction"] = "mean" if a["reduction"] == "batchmean" else a["reduction"]
    else:
        nan_in_masked_rows(draw, a, student["input"])
    a |= {k: draw.place(x) for k, x in student.items()}
    return a | ({"weight": draw.place(per_token(draw, (v,), 0, 2))} if weighted else {})


def spoil(draw: Draw, a: dict[str, Any]) -> None:
    """One tensor that does not fit."""
    lists = {k: x for k, x in a.items() if isinstance(x, fk.TopK)}
    tensors = {(k, None): x for k, x in a.items() if isinstance(x, Tensor)}
    tensors |= {(k, n): x for k, list_ in lists.items() for n, x in list_._asdict().items() if isinstance(x, Tensor)}
    key, name = draw.choice(list(tensors))
    x, draw.strange = tensors[key, name].detach(), True
    at = draw.randrange(max(1, x.dim()))
    changes: list[Callable[[], Tensor]] = [
        lambda: x.unsqueeze(at), lambda: x.reshape(-1), lambda: x.long(), lambda: x.to(torch.complex64), lambda: x.bool(),
        lambda: x.to("meta"), lambda: x.to_sparse(), lambda: x.double().requires_grad_(), lambda: x.to(torch.float8_e4m3fn),
    ]  # fmt: skip
    if x.dim():
        n = x.shape[at]
        changes += [lambda: x.narrow(at, 0, n // 2), lambda: torch.cat([x, x], at), lambda: x.select(at, 0) if n else x,
                    lambda: x.movedim(at, 0), lambda: x.narrow(at, 0, 0), lambda: x.narrow(at, 0, min(n, 1))]  # fmt: skip
    changed = draw.choice(changes)()
    a[key] = changed if name is None else lists[key]._replace(**{name: changed})
