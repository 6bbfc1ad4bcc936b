"""The losses in float64 and plain torch, keyword by keyword, and how far from them float32 arithmetic may be."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fdistill_kernels as fk
from fdistill_kernels.divergences import TABLE, Divergence
from fdistill_kernels.own import FDivergence, resolve
from fdistill_kernels.reference import f_divergence_rows, of_log_probs

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
    logits may be, relative to its largest entry and beside that; its factor, the student's logits (N, V), and of a list
    what `SparseParts` says of it.
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
    measures: list[Tensor] | None


@dataclass
class List:
    """A `TopK` of N rows, (N, K) as the arithmetic's dtype holds it: -1, -inf and 0 where there is no id; and what
    rounding may hide of a mass.
    """

    ids: Tensor
    log_probs: Tensor
    weights: Tensor
    hides: Tensor
    tail: str
    temperature: float


@dataclass
class Terms:
    """Of each row: its factor, temperatures, the factors of divergence, cross-entropy and z-loss; targets (N, V), and
    labels.
    """

    scale: Tensor
    student_t: Tensor
    teacher_t: Tensor
    of_divergence: Tensor
    of_labels: Tensor
    of_z: Tensor
    targets: Tensor | None
    divergence: Any
    labels: Tensor | None = None


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
    leaves = {k: a[k].detach().double().clone().requires_grad_() for k in TRAINED[name] if isinstance(a.get(k), Tensor)}
    student, teacher = logits_of(name, leaves, a)
    lead, vocabulary = student.shape[:-1], student.shape[-1]
    terms, tokens = terms_of(name, a, lead, vocabulary)
    student = student.reshape(-1, vocabulary)
    dtypes = [a[k].dtype for k in leaves]
    wide = dtypes[0] if "linear" in name else torch.float64 if torch.float64 in dtypes else torch.float32
    measures = None
    if isinstance(teacher, fk.TopK):
        teacher = list_of(teacher, lead, vocabulary, terms, torch.promote_types(wide, torch.float32))
        measures = measures_of(student.detach(), teacher, terms)
    teacher = teacher.reshape(-1, vocabulary) if isinstance(teacher, Tensor) else teacher
    rows, parts = rows_of(student, teacher, terms)
    loss = rows.reshape(lead) if a.get("reduction", "mean") == "none" or name == "log_sum_exp" else rows.sum()
    slack, error, floor = tolerances(student.detach(), teacher, terms, parts, wide, "linear" in name)
    return Exact(loss, leaves, rows.detach(), slack, error, floor, tokens, terms.scale.abs(), student, measures)


def logits_of(name: str, leaves: dict[str, Tensor], a: dict[str, Any]) -> tuple[Tensor, Any]:
    """Both models' capped logits (..., V), or the teacher's list."""
    keep = slice(None, a.get("vocab_size"))

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        z = scale * (hidden @ weight[keep].flatten(0, -2).T)  # (N, D) and a head for each place: (N, V, d1, ...)
        z = z if weight.dim() == 2 else z.unflatten(-1, weight[keep].shape[:-1]).movedim(hidden.dim() - 1, -1)
        return z if bias is None else z + bias[keep]

    first = leaves[TRAINED[name][0]]
    if name == "f_divergence" and isinstance(a["teacher_logits"], fk.TopK):
        return capped(first[..., keep], a.get("logit_softcap")), a["teacher_logits"]
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
    if isinstance(given, fk.TopK):
        return student, given
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
                 vector(a.get("z_loss", 0.0), count), targets, divergence, hard), tokens  # fmt: skip


def list_of(teacher: fk.TopK, lead: torch.Size, vocabulary: int, terms: Terms, dtype: torch.dtype) -> List:
    """A list as rows, those that do not count without ids; a list that says nothing takes the divergence's factor."""
    ids, log_probs = teacher.ids, teacher.log_probs.detach()
    weights = torch.ones(ids.shape) if teacher.weights is None else teacher.weights.detach()
    assert ids.shape == log_probs.shape == weights.shape == (*lead, ids.shape[-1]), "a list of another shape"
    size = lead.numel(), ids.shape[-1]
    ids, log_probs, weights = (  # a column more, that there be one
        torch.nn.functional.pad(x.reshape(size), (0, 1), value=-1) for x in (ids, log_probs, weights)
    )
    ids = torch.where((terms.scale != 0).unsqueeze(1), ids.long(), -1)
    order, listed = ids.sort(1).values, ids >= 0
    assert bool((ids >= -1).all()) and bool((ids < vocabulary).all()), "ids outside the vocabulary"
    assert not bool(((order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)).any()), "an id twice"
    log_probs = torch.where(listed, log_probs.to(dtype).double(), -torch.inf)
    weights = torch.where(listed, weights.to(dtype).double(), 0)
    p = log_probs.exp()
    assert not bool((p.sum(1) > 1.05).any()), "a mass that no rounding explains"
    assert bool(((weights >= 0) & weights.isfinite()).all()), "weights that are none"
    whole = teacher.tail in ("uniform", "renormalize", "within")
    assert whole or bool((terms.teacher_t == teacher.temperature).all()), "the list of another temperature"
    if teacher.tail not in ("bucket", "uniform"):
        says = log_probs > -torch.inf if teacher.tail in ("within", "renormalize") else weights != 0
        terms.of_divergence = torch.where(says.any(1), terms.of_divergence, 0)
    rounding = max(torch.finfo(x).eps for x in (teacher.log_probs.dtype, dtype)) / 2
    hides = 4 * rounding * torch.where(p > 0, -p * log_probs, 0).abs().sum(1) + torch.finfo(dtype).eps
    return List(ids, log_probs, weights, hides, teacher.tail, teacher.temperature)


def log_sum_of(log: Tensor) -> Tensor:
    """logsumexp of rows, -inf of nothing, without a gradient there."""
    nothing = (log == -torch.inf).all(1, keepdim=True)
    return torch.where(nothing, -torch.inf, log.masked_fill(nothing, 0).logsumexp(1, keepdim=True))


def categories(student: Tensor, teacher: List, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Both models' log-probabilities (N, C) of what a tail compares, as `TopK` defines it; and their entries' ids, V of
    the rest and of no id.
    """
    (n, v), listed, live = student.shape, teacher.ids >= 0, terms.scale != 0
    places = torch.where(listed, teacher.ids, v)
    inside = torch.zeros(n, v + 1).bool().scatter_(1, places, True)[:, :v]
    exponent = torch.where(live, teacher.temperature / terms.teacher_t, 1).unsqueeze(1)
    log_q = (student / torch.where(live, terms.student_t, 1).unsqueeze(1)).log_softmax(1)
    mass = teacher.log_probs.exp().sum(1, keepdim=True)
    log_p, hides = teacher.log_probs - mass.clamp_min(1).log(), teacher.hides.unsqueeze(1)
    rest, hidden = torch.maximum(1 - mass, hides), 1 - mass <= hides
    if teacher.tail in ("uniform", "renormalize"):
        rest = rest / (~inside).sum(1, keepdim=True) if teacher.tail == "uniform" else rest * 0
        off = torch.where(hidden & (student == -torch.inf), -torch.inf, rest.log())
        off = torch.cat((off.expand(n, v), rest.log()), 1)
        log_p = off.scatter(1, places, log_p)[:, :v]
        return (log_p * exponent).log_softmax(1), log_q, torch.arange(v).expand(n, v)
    on_list = torch.where(listed, log_q.gather(1, teacher.ids.clamp_min(0)), -torch.inf)
    if teacher.tail == "within":  # from their largest: log(13) is lost beside finfo.min
        on_list = on_list - on_list.amax(1, keepdim=True).detach().nan_to_num(0, 0, 0)
        return (log_p * exponent).log_softmax(1), on_list - log_sum_of(on_list), places
    if teacher.tail == "bucket":
        of_rest = log_sum_of(log_q.masked_fill(inside, -torch.inf))
        nothing = inside.all(1, keepdim=True) | (hidden & (of_rest == -torch.inf))
        log_p = torch.cat((log_p, torch.where(nothing, 0, rest).log()), 1).log_softmax(1)
        return log_p, torch.cat((on_list, of_rest), 1), torch.cat((places, torch.full_like(places[:, :1], v)), 1)
    return log_p, on_list, places


def list_divergence(student: Tensor, teacher: List, terms: Terms, chosen: Divergence) -> Tensor:
    """Each row's divergence beside a list."""
    log_p, log_q, places = categories(student, teacher, terms)
    if teacher.tail == "within":  # a student of nothing there has no distribution, given the list
        on_list = torch.where(teacher.ids >= 0, student.gather(1, teacher.ids.clamp_min(0)), -torch.inf)
        says = (on_list != -torch.inf).any(1)
        terms.of_divergence = torch.where(says, terms.of_divergence, 0)
        log_q = torch.where(says.unsqueeze(1), log_q, 0)
    summed = teacher.tail in ("ignore", "sampled")  # each term is its formula's, of a NaN of the teacher's too
    of_nothing = (log_q.isnan() | (log_p.isnan() & (not summed))).any(1)  # or of a NaN, which not each formula is of
    return torch.where(of_nothing, torch.nan, of_categories(log_p, log_q, places, teacher, terms, chosen))


def of_categories(
    log_p: Tensor, log_q: Tensor, places: Tensor, teacher: List, terms: Terms, chosen: Divergence
) -> Tensor:
    """A divergence's formula of a list's categories."""
    if teacher.tail == "sampled":
        each = of_log_probs(chosen, log_p.unsqueeze(2), log_q.unsqueeze(2))
        return torch.where(teacher.weights == 0, 0, teacher.weights * each).sum(1)
    if not chosen.needs_labels:
        return of_log_probs(chosen, log_p, log_q)
    here = places == terms.labels.unsqueeze(1)
    rest = log_p.shape[1] - (teacher.tail == "bucket")
    return of_log_probs(chosen, log_p, log_q, torch.where(here.any(1), here.byte().argmax(1), rest))


def measures_of(student: Tensor, teacher: List, terms: Terms) -> list[Tensor]:
    """`SparseParts` behind the losses, of each row, weighed."""
    listed, scale = teacher.ids >= 0, terms.scale
    q = (student / terms.student_t.unsqueeze(1)).softmax(1)
    student_mass = torch.where(listed, q.gather(1, teacher.ids.clamp_min(0)), 0).sum(1) / q.sum(1)  # NaN of a NaN
    count = listed.double().sum(1)
    last = student.sort(1, descending=True).values.gather(1, (count - 1).clamp_min(0).long().unsqueeze(1))
    shared = (listed & (student.gather(1, teacher.ids.clamp_min(0)) >= last)).sum(1)
    return [torch.where(scale == 0, 0, scale * x)
            for x in (teacher.log_probs.exp().sum(1), student_mass, shared / count.clamp_min(1))]  # fmt: skip


def rows_of(student: Tensor, teacher: Any, terms: Terms) -> tuple[Tensor, list[Tensor]]:
    """Each row's loss (N,), and what it is made of: divergence, cross-entropy and squared log-sum-exp, unscaled."""
    live = (terms.scale != 0).unsqueeze(1)
    student = torch.where(live, student, 0)
    student = student.masked_fill((student == -torch.inf).all(1, keepdim=True), torch.nan)  # the softmax of nothing
    teacher = torch.where(live, teacher, 0) if isinstance(teacher, Tensor) else teacher
    nothing = torch.zeros(student.shape[0]).double()
    divergence, cross_entropy, squared = nothing, nothing, nothing
    if terms.divergence == "log_sum_exp":
        divergence = student.logsumexp(1)
    elif teacher is not None:
        one = torch.ones(()).double()
        t_s, t_t = (torch.where(live.squeeze(1), t, one) for t in (terms.student_t, terms.teacher_t))
        own = terms.divergence is square or isinstance(terms.divergence, FDivergence)
        chosen = TABLE["pearson"] if own else resolve(terms.divergence)
        if isinstance(teacher, List):
            divergence = list_divergence(student, teacher, terms, chosen)
        else:
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
    student: Tensor, teacher: Any, terms: Terms, parts: list[Tensor], dtype: torch.dtype, linear: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: slack of the loss, error of its gradient by logits relative to the largest entry, and absolute."""
    digits = 1e-15 if dtype == torch.float64 else 2e-7
    divergence, cross_entropy, squared = (x.detach().nan_to_num(0, HUGE, -HUGE) for x in parts)
    beside, heaviest = isinstance(teacher, List), 1
    if beside:
        log_p, log_q, _ = categories(student, teacher, terms)
        heaviest = teacher.weights.amax(1).clamp_min(1)
    else:
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
    slack = of_divergence * (divergence.abs() + 0.1 * heaviest) + of_labels * (cross_entropy.abs() + 0.1)
    slack = torch.where(weight == 0, 0, error * weight * (slack + terms.of_z * lse * (1 + lse + height)))
    peak = torch.maximum(p, q).amax(1)
    least = LOST[dtype == torch.float64]  # of it there may be all of an enormous divergence
    lost = (((log_p < least) & log_p.isfinite()) | ((log_q < least) & log_q.isfinite())).any(1)
    zero = log_p == -torch.inf if beside else torch.zeros_like(log_p).bool()  # a list's are what they are
    masked = (((log_p < -HUGE) & (q > 0) & ~zero) | ((log_q < -HUGE) & (p > 0))).any(1)  # by finfo.min, or by -inf
    enormous = (divergence.abs() > FAR) | (chosen == "dkd")  # whose set may have as little
    apart = (lost & enormous) | masked
    slack = torch.where(apart & (weight * of_divergence != 0), torch.inf, slack)
    floor = 0.05 * error * (of_divergence * rate * heaviest * peak + of_labels + 2 * terms.of_z * lse)
    floor = floor + 4 * digits * of_divergence * rate * divergence.abs()  # q (g - S) where g and S nearly cancel
    if chosen == "dkd":  # its rest renormalised, of one entry perhaps, has the roundings of 1
        floor = floor + 50 * digits * of_divergence * rate
    if chosen == "tvd" or chosen == TABLE["tvd"]:  # at equal probabilities its gradient jumps
        tied = (p - q).abs() <= (error.unsqueeze(1) + 1e-5) * torch.maximum(p, q)
        floor = floor + of_divergence * rate * torch.where(tied, p + q, 0).sum(1)
    return slack, error, weight * floor


def of_rounding(of_logits: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """What a linear loss's rows (N,) lose where logits and their gradient are rounded to 16 bits, of `floor`'s kind: the
    products with a head whose rows are alike cancel, and the roundings do not.
    """
    return error * of_logits.abs().sum(1) / 80 if torch.finfo(dtype).bits < 32 else torch.zeros_like(error)
