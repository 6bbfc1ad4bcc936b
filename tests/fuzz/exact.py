"""The losses in float64 and plain torch, keyword by keyword, and how far from them float32 arithmetic may be."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdistill_kernels.divergences import TABLE, Divergence
from fdistill_kernels.own import FDivergence, resolve
from fdistill_kernels.reference import f_divergence_rows

#: What each function differentiates, logits or hidden states first.
TRAINED = {
    "f_divergence": ("student_logits", "teacher_logits"),
    "cross_entropy": ("input",),
    "log_sum_exp": ("logits",),
    "linear_f_divergence": ("student_hidden", "student_weight", "student_bias"),
    "linear_cross_entropy": ("input", "linear_weight", "linear_bias"),
}
#: Error of a loss, and of a gradient relative to its largest entry: float32 arithmetic on logits, and where a linear
#: loss rounds them to its dtype. To the first comes what a logarithm of a probability costs, in proportion to its size.
ROW_ERROR = 2e-5
LINEAR_ERROR = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
#: Beyond the first a loss may be infinite: finfo.min, the mask of many models, is taken for -inf. Beyond the second float32
#: may have overflowed on the way; a probability below the third has no digits left, and one whose logarithm is below
#: the last, of float32 and float64, is 0.
FAR, HUGE, TINY, LOST = 1e6, 1e30, 1e-30, (-87.0, -700.0)


@dataclass
class Exact:
    """A loss with its graph to `leaves`, and for each row: the loss, what it may be off by, and what its gradient by
    logits may be, relative to its largest entry and beside that; its factor, and the student's logits (N, V).
    """

    loss: Tensor
    leaves: dict[str, Tensor]
    rows: Tensor
    slack: Tensor
    error: Tensor
    floor: Tensor
    tokens: int
    weight: Tensor
    logits: Tensor


@dataclass
class Terms:
    """Of each row: its factor, temperatures, the factors of divergence, cross-entropy and z-loss; targets (N, V)."""

    scale: Tensor
    student_t: Tensor
    teacher_t: Tensor
    of_divergence: Tensor
    of_labels: Tensor
    of_z: Tensor
    targets: Tensor | None
    divergence: Any


def square(t: Tensor) -> Tensor:
    """A user's own generator, the only one here: pearson."""
    return (t - 1) ** 2


def vector(value: Any, count: int) -> Tensor:
    """A number, a tensor of one, or one a row."""
    value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    return value.double().reshape(-1).expand(count)


def capped(z: Tensor, cap: float | None) -> Tensor:
    """Logits after a soft-cap."""
    return cap * (z / cap).tanh() if cap else z


def exact(name: str, a: dict[str, Any]) -> Exact:
    """The loss of a public function called with the arguments `a`; an error of any kind where they do not fit."""
    leaves = {k: a[k].detach().double().clone().requires_grad_() for k in TRAINED[name] if a.get(k) is not None}
    student, teacher = logits_of(name, leaves, a)
    lead, vocabulary = student.shape[:-1], student.shape[-1]
    terms, tokens = terms_of(name, a, lead, vocabulary)
    student = student.reshape(-1, vocabulary)
    teacher = None if teacher is None else teacher.reshape(-1, vocabulary)
    rows, parts = rows_of(student, teacher, terms)
    loss = rows.reshape(lead) if a.get("reduction", "mean") == "none" or name == "log_sum_exp" else rows.sum()
    dtypes = [a[k].dtype for k in leaves]
    wide = dtypes[0] if "linear" in name else torch.float64 if torch.float64 in dtypes else torch.float32
    slack, error, floor = tolerances(student.detach(), teacher, terms, parts, wide, "linear" in name)
    return Exact(loss, leaves, rows.detach(), slack, error, floor, tokens, terms.scale.abs(), student)


def logits_of(name: str, leaves: dict[str, Tensor], a: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Both models' capped logits (..., V)."""
    keep = slice(None, a.get("vocab_size"))

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        z = scale * (hidden @ weight[keep].flatten(0, -2).T)  # (N, D) and a head for each place: (N, V, d1, ...)
        z = z if weight.dim() == 2 else z.unflatten(-1, weight[keep].shape[:-1]).movedim(hidden.dim() - 1, -1)
        return z if bias is None else z + bias[keep]

    first = leaves[TRAINED[name][0]]
    if name == "f_divergence":
        teacher = leaves["teacher_logits"][..., keep]
        assert first[..., keep].shape == teacher.shape
        return capped(first[..., keep], a.get("logit_softcap")), capped(teacher, a.get("teacher_logit_softcap"))
    if not name.startswith("linear"):
        return capped(
            first.movedim(1, -1) if first.dim() > 2 and "target" in a else first, a.get("logit_softcap")
        ), None
    weight, bias = (leaves.get(k) for k in TRAINED[name][1:])
    student = capped(head(first, weight, bias, a.get("logit_scale", 1.0)), a.get("logit_softcap"))
    if name == "linear_cross_entropy":
        return student, None
    given, weight, bias = (a.get(k) for k in ("teacher_hidden", "teacher_weight", "teacher_bias"))
    if weight is None:
        logits = given if isinstance(given, Tensor) else given.logits
        logits = logits.detach().double()[..., keep]
        if not isinstance(given, Tensor):  # who is asked for no more rows than there are
            logits = logits.reshape(-1, student.shape[-1])[: student.shape[:-1].numel()]
        return student, logits.reshape(student.shape)
    scale = a["teacher_logit_scale"] if a.get("teacher_logit_scale") is not None else a.get("logit_scale", 1.0)
    bias = None if bias is None else bias.detach().double()
    teacher = head(given.detach().double(), weight.detach().double(), bias, scale)
    return student, capped(teacher, a.get("teacher_logit_softcap"))


def terms_of(name: str, a: dict[str, Any], lead: torch.Size, vocabulary: int) -> tuple[Terms, int]:
    """What the arguments ask of each token, and how many tokens count."""
    count, labels = lead.numel(), a.get("labels", a.get("target"))
    soft = labels is not None and "target" in a and labels.is_floating_point()
    if soft and labels.dim() > 2 and (name == "cross_entropy" or a["linear_weight"].dim() > 2):
        labels = labels.movedim(1, -1)
    for value, shape in ((labels, (*lead, vocabulary) if soft else lead), (a.get("token_weight"), lead)):
        assert value is None or value.shape == shape, f"{tuple(value.shape)} where tokens are {tuple(shape)}"
    hard = None if labels is None or soft else labels.detach().reshape(-1).long()
    mask = torch.ones(count, dtype=torch.bool) if hard is None else hard != a.get("ignore_index", -100)
    tokens, items, reduction = (
        int(mask.sum()),
        a.get("num_items"),
        a.get("reduction", "none" if name == "log_sum_exp" else "mean"),
    )
    denominator = {"mean": max(tokens, 1), "batchmean": max(1, lead[0]) if lead else 1}.get(reduction, 1)
    denominator = denominator if items is None else float(items) or 1.0
    scale = torch.where(mask, vector(a.get("token_weight", 1.0), count) / denominator, 0)
    of_labels, targets = a.get("ce_weight", 1.0 if labels is not None and "target" in a else 0.0), None
    wide = torch.ones(vocabulary).double() if a.get("weight") is None else a["weight"].detach().double()
    if labels is not None:
        smoothing = a.get("label_smoothing", 0.0)
        if hard is None:
            p = labels.detach().double().reshape(-1, vocabulary)
        else:
            safe = torch.where(scale != 0, hard, 0)
            assert bool(((safe >= 0) & (safe < vocabulary)).all()), "labels outside the vocabulary"
            p = torch.zeros(count, vocabulary).double().scatter_(1, safe.unsqueeze(1), 1.0)
        p = p * (1 - smoothing) + smoothing / vocabulary
        targets = torch.where(p == 0, 0, p * wide)  # nothing of a class that no target has, however it weighs
        if hard is not None and a.get("weight") is not None and reduction == "mean" and items is None:
            of_targets = torch.where(mask, wide[torch.where(mask, hard, 0)], 0)
            of_labels = of_labels * tokens / (of_targets.sum() if bool((of_targets != 0).any()) else 1.0)
    student_t = vector(a.get("temperature", 1.0), count)
    teacher_t = student_t if a.get("teacher_temperature") is None else vector(a["teacher_temperature"], count)
    of_divergence = student_t**2 if a.get("temperature_squared") else torch.ones(count).double()
    divergence = a.get("divergence", "js") if name.endswith("f_divergence") else None
    if name == "log_sum_exp":
        divergence = name
    return Terms(scale, student_t, teacher_t, of_divergence, vector(of_labels, count),
                 vector(a.get("z_loss", 0.0), count), targets, divergence), tokens  # fmt: skip


def rows_of(student: Tensor, teacher: Tensor | None, terms: Terms) -> tuple[Tensor, list[Tensor]]:
    """Each row's loss (N,), and what it is made of: divergence, cross-entropy and squared log-sum-exp, unscaled."""
    live = (terms.scale != 0).unsqueeze(1)
    student = torch.where(live, student, 0)
    student = student.masked_fill((student == -torch.inf).all(1, keepdim=True), torch.nan)  # the softmax of nothing
    teacher = None if teacher is None else torch.where(live, teacher, 0)
    nothing = torch.zeros(student.shape[0]).double()
    divergence, cross_entropy, squared = nothing, nothing, nothing
    if terms.divergence == "log_sum_exp":
        divergence = student.logsumexp(1)
    elif teacher is not None:
        one = torch.ones(()).double()
        t_s, t_t = (torch.where(live.squeeze(1), t, one) for t in (terms.student_t, terms.teacher_t))
        own = terms.divergence is square or isinstance(terms.divergence, FDivergence)
        chosen = "pearson" if own else resolve(terms.divergence)
        divergence = f_divergence_rows(student, teacher, chosen, t_s, t_t)
    if terms.targets is not None:
        log_q = student.log_softmax(1)
        cross_entropy = -torch.where(terms.targets == 0, 0, terms.targets * log_q).sum(1)
        squared = student.logsumexp(1) ** 2
    parts = [divergence, cross_entropy, squared]
    factors = terms.of_divergence, terms.of_labels, terms.of_z
    total = sum(torch.where((f == 0) | ~live.squeeze(1), 0, f * x) for f, x in zip(factors, parts, strict=True))
    scale = torch.where(terms.scale.isfinite(), terms.scale, torch.nan)  # what an infinite weight gives is not said
    return torch.where(live.squeeze(1), scale * total, 0), parts


def tolerances(
    student: Tensor, teacher: Tensor | None, terms: Terms, parts: list[Tensor], dtype: torch.dtype, linear: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: slack of the loss, error of its gradient by logits relative to the largest entry, and absolute."""
    digits = 1e-15 if dtype == torch.float64 else 2e-7
    divergence, cross_entropy, squared = (x.detach().nan_to_num(0, HUGE, -HUGE) for x in parts)
    log_q = (student / terms.student_t.unsqueeze(1)).log_softmax(1)
    log_p = log_q if teacher is None else (teacher.detach() / terms.teacher_t.unsqueeze(1)).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    alive = ((p > TINY) | (q > TINY)) & log_p.isfinite() & log_q.isfinite()
    spread = torch.where(alive, torch.maximum(-log_p, -log_q), 0).amax(1).clamp_max(1e6)
    chosen = terms.divergence
    power = 1 + abs(chosen.parameter) if isinstance(chosen, Divergence) else 3.0
    base = 1e-9 if dtype == torch.float64 else LINEAR_ERROR[dtype] if linear else ROW_ERROR
    error = base + digits * power * spread
    rate = 1 / torch.minimum(terms.student_t, terms.teacher_t)
    height = torch.where(student.isfinite() & (student.abs() < HUGE), student.abs(), 0).amax(1)
    if linear:  # an error of the logits is one of the loss's exponents
        error = error * power * (1 + height) * rate.clamp_min(1)
    weight, lse = terms.scale.abs(), squared.sqrt()
    mass = 1 if terms.targets is None else terms.targets.abs().sum(1).nan_to_num(0, HUGE).clamp_min(1)
    of_labels, of_divergence = terms.of_labels.abs() * mass, terms.of_divergence
    slack = of_divergence * (divergence.abs() + 0.1) + of_labels * (cross_entropy.abs() + 0.1)
    slack = torch.where(weight == 0, 0, error * weight * (slack + terms.of_z * lse * (1 + lse + height)))
    peak = torch.maximum(p, q).amax(1)
    least = LOST[dtype == torch.float64]  # of it there may be all of an enormous divergence
    lost = (((log_p < least) & log_p.isfinite()) | ((log_q < least) & log_q.isfinite())).any(1)
    masked = (((log_p < -HUGE) & (q > 0)) | ((log_q < -HUGE) & (p > 0))).any(1)  # by finfo.min, or by -inf
    apart = (lost & (divergence.abs() > FAR)) | masked
    slack = torch.where(apart & (weight * of_divergence != 0), torch.inf, slack)
    floor = 0.05 * error * (of_divergence * rate * peak + of_labels + 2 * terms.of_z * lse)
    floor = floor + 4 * digits * of_divergence * rate * divergence.abs()  # q (g - S) where g and S nearly cancel
    if chosen == "tvd" or chosen == TABLE["tvd"]:  # at equal probabilities its gradient jumps
        tied = (p - q).abs() <= (error.unsqueeze(1) + 1e-5) * torch.maximum(p, q)
        floor = floor + of_divergence * rate * torch.where(tied, p + q, 0).sum(1)
    return slack, error, weight * floor


def of_rounding(of_logits: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """What a linear loss's rows (N,) lose where logits and their gradient are rounded to 16 bits, of `floor`'s kind: the
    products with a head whose rows are alike cancel, and the roundings do not.
    """
    return error * of_logits.abs().sum(1) / 80 if torch.finfo(dtype).bits < 32 else torch.zeros_like(error)
