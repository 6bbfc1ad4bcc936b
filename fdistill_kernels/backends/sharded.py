"""Rows whose vocabulary is split over the ranks of a process group: local logits in, the whole row's loss out.

What a rank does for itself is O(N·V/ranks), what it sends O(N) numbers, never logits:

    1  gathered: each rank's maximum and total of both models, and each model's logit at the other's maximum
    2  summed:   the statistics of the row, of divergences that ask for them
    3  summed:   D, Σ q g (both measured from the peak's, as everywhere), metrics

Most divergences need the first and the last, those with statistics all three; beside them renyi's powers have a largest
one of their own, dkd asks which entries the largest are, smoothed labels are summed, tail_aware gathers each rank's K
largest, and akl finds its threshold by halving. Every rank has the same loss, to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..divergences import Divergence
from ..formulas import NOTHING, Entry, Formula, RowStatistics, times
from .chunked import CHUNK_ELEMENTS, entry_of, largest_in, log_ratio, terms_at, widest
from .collectives import Collectives
from .rows import LinearCall, RowCall, cap_slope, capped, log_sum_exp

#: Entries of rows made at once on a GPU, where a piece is some two hundred launches: 16 MB of each of its tensors.
CARD_ELEMENTS = 1 << 22
#: Halvings that find akl's threshold among float32 logarithms of probabilities, from −104 to 0.
HALVINGS = 40
#: Where a user's own divergences are compared: log p and log q.
POINTS = ((-0.7, -2.9), (-1.3, -1.9), (-2.3, -2.1), (-3.1, -0.9), (-6.7, -1.1))
#: What `_settings` has, by the name that an error gives it; it is one number on its way.
SETTINGS = "label_smoothing, class weights, soft-caps, scales of heads or sum_hidden"


class Model(NamedTuple):
    """What is known of a model's whole rows, (N, 1) each: its largest logit, log Σ exp(rate·(z − top)), its rate,
    whether this rank holds the largest logit (the first that does), and there the entry's place.
    """

    top: Tensor
    log_total: Tensor
    rate: Tensor
    mine: Tensor
    peak: Tensor

    def of_rows(self, n: slice) -> Model:
        """Some of the rows."""
        return Model(*(x[n] for x in self))


class Local(NamedTuple):
    """A model's logits here (n, V_local), capped, and what comes of them with the whole row's statistics."""

    logits: Tensor
    shifted: Tensor
    log_probability: Tensor
    probability: Tensor


def agree(call: RowCall | LinearCall, number: int | None = None, **more: Any) -> list[int]:
    """Every rank's number, once all have been found to make the same call; see `Collectives.agree`.

    more: what else must be the same.
    """
    terms = call.terms
    teacher, targets = (call.teacher, call.targets) if isinstance(call, RowCall) else (None, call.teacher.targets)
    wants = (call.student_gradient, call.teacher_gradient) if isinstance(call, RowCall) else call.wants
    of_list = f"{targets.tail} {targets.temperature!r} {targets.weights is not None} {targets.rounding!r}"
    return Collectives(call.shard.group).agree(
        terms.row_scale.device, number, dtype=str(terms.row_scale.dtype), vocabulary=call.vocabulary,
        divergence=described(call.divergence),
        teacher=teacher is not None, entries_of_lists=0 if targets.ids is None else targets.ids.shape[1],
        labels=terms.labels is not None, metrics=terms.metrics, gradients=str(tuple(wants)),
        **{"tail, temperature, weights or precision of lists": of_list, SETTINGS: _settings(call)}, **more,
    )  # fmt: skip


def _settings(call: RowCall | LinearCall) -> str:
    """The settings of a call that are neither a token's nor a divergence's."""
    terms = call.terms
    if isinstance(call, LinearCall):
        heads = call.head.scale, call.head.softcap, call.teacher.scale, call.teacher.softcap
        of_models = f"{heads} {call.shard.sum_hidden}"
    else:
        of_models = f"{call.student_softcap} {call.teacher_softcap}"
    return f"{terms.label_smoothing!r} {terms.class_weight is not None} {of_models}"


def described(divergence: Divergence | None) -> str:
    """A divergence as text that is the same in every process: its kernel and numbers, or its terms at a few points."""
    if divergence is None:
        return ""
    if divergence.kernel is not None or isinstance(divergence.terms, Formula):
        return divergence.key
    log_p, log_q = torch.tensor(POINTS, dtype=torch.float64, device="cpu").unbind(1)  # no card waits for it
    terms = divergence.terms(log_p.exp(), log_q.exp(), log_p, log_q, divergence.parameter)
    seen = " ".join(f"{x:.6g}" for x in torch.stack(terms).detach().flatten().tolist())  # six digits: libraries differ
    return f"{divergence.name} {divergence.scale!r} {seen}"


def rows_at_once(logits: Tensor, entries: int) -> int:
    """Rows of so many entries whose temporaries, of torch's operations, stay small."""
    return max(1, (CARD_ELEMENTS if logits.is_cuda else CHUNK_ELEMENTS) // max(1, entries))


def largest_of_all(wire: Collectives, mine: Tensor, count: int) -> Tensor:
    """The largest (n, count) of what all ranks have, of each one's own largest, which may be fewer."""
    padded = torch.nn.functional.pad(mine, (0, count - mine.shape[1]), value=-torch.inf)
    return wire.gathered(padded).movedim(0, 1).flatten(1).topk(count, 1).values


def divergence_rows(call: RowCall) -> tuple[Tensor, Tensor, Tensor]:
    """See `RowCall`; the rows' numbers and all they are made of must be the same on every rank."""
    return _Rows(call).run()


class _Rows:
    """A call's rows, sweep by sweep, each in chunks whose number is the same on every rank."""

    def __init__(self, call: RowCall):
        self.call, self.terms, self.shard = call, call.terms, call.shard
        self.wire = Collectives(call.shard.group)
        self.rows, self.dtype = len(call.terms.row_scale), call.terms.row_scale.dtype
        self.step = rows_at_once(call.student, -(-call.shard.size // self.wire.ranks))
        self.live = (call.terms.row_scale != 0).unsqueeze(1)
        rates = call.terms.student_inverse_temperature, call.terms.teacher_inverse_temperature
        self.rates = [x.unsqueeze(1) for x in rates]
        self.coefficients: tuple[Tensor, ...] | None = None  # what `ask` finds
        self.threshold: Tensor | None = None
        self.most: tuple[Tensor, ...] = ()
        self.labels = None if call.terms.labels is None else torch.where(self.live[:, 0], call.terms.labels, 0)

    def chunks(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Numbers of rows, and the logits of both models there (n, V_local), capped; 0 in rows that do not count."""
        call = self.call
        for begin in range(0, self.rows, self.step):
            n = slice(begin, min(begin + self.step, self.rows))
            models = (call.student, call.student_softcap), (call.teacher, call.teacher_softcap)
            given = [(x.flatten(0, 1)[n].to(self.dtype), cap) for x, cap in models if x is not None]
            yield n, [capped(torch.where(self.live[n], x, 0), cap) for x, cap in given]

    @property
    def divergence(self) -> Divergence:
        """Of a call that has one."""
        assert self.call.divergence is not None
        return self.call.divergence

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Parts and gradients."""
        call = self.call
        self.statistics()
        if call.divergence is not None and (statistics := call.divergence.statistics) is not None:
            self.ask(statistics)
        of_student, of_teacher = call.empty_gradients()
        outs = call.student if call.inplace else of_student, of_teacher
        parts = self.totals()
        for n, logits in self.chunks():
            for out, gradient in zip(outs, self.gradients(n, logits), strict=True):
                if out.numel():
                    out.flatten(0, 1)[n] = torch.where(self.live[n], gradient, 0).to(out.dtype)
        return parts, of_student, of_teacher

    def statistics(self) -> None:
        """The first sweep, and what the ranks gather."""
        found, places = [], []
        for n, logits in self.chunks():
            columns, peaks = [], []
            tops = [x.max(1, keepdim=True) for x in logits]
            for i, (x, top) in enumerate(zip(logits, tops, strict=True)):
                other = logits[1 - i] if len(logits) > 1 else x
                columns += [top.values, _total(x, top.values, self.rates[i][n]), other.gather(1, top.indices)]
                peaks.append(top.indices)
            columns += [_total(logits[0], tops[0].values, 1.0), self.at_labels(logits[0], n)]
            found.append(torch.cat([c.to(widest(logits[0])) for c in columns], 1))
            places.append(torch.cat(peaks, 1))
        self.combine(self.wire.gathered(torch.cat(found)), torch.cat(places))

    def combine(self, gathered: Tensor, places: Tensor) -> None:
        """What every rank has sent, (ranks, N, columns), to what is known of the whole rows."""
        self.models: list[Model] = []
        self.there: list[Tensor] = []
        for i in range(places.shape[1]):
            tops, totals, others = gathered[:, :, 3 * i : 3 * i + 3].split(1, 2)
            top, rate = tops.amax(0), self.rates[i]
            owner = (tops == top).byte().argmax(0)
            weight = torch.where(tops == -torch.inf, 0, ((tops - top) * rate).exp())
            log_total = times(weight, totals).sum(0).log()  # of models that nearly agree every digit counts
            mine = owner == self.wire.rank
            self.models.append(Model(top.to(self.dtype), log_total, rate, mine, places[:, i : i + 1]))
            self.there.append(others.gather(0, owner.unsqueeze(0))[0].to(self.dtype))
        tops, plain = gathered[:, :, :1], gathered[:, :, -2:-1]
        weight = torch.where(tops == -torch.inf, 0, (tops - tops.amax(0)).exp())
        self.log_plain = times(weight, plain).sum(0).log().to(self.dtype)
        self.label_logit = gathered[:, :, -1:].amax(0).to(self.dtype)
        if len(self.models) == 2:
            student, teacher = self.models
            self.u_at_peaks = [log_ratio(z_t, z_s, teacher, student) for z_s, z_t in map(self.at_tops, (0, 1))]

    def at_labels(self, logits: Tensor, n: slice) -> Tensor:
        """The label's logit (n, 1) where it is here; −inf elsewhere."""
        if self.labels is None:
            return torch.full_like(logits[:, :1], -torch.inf)
        at = self.labels[n].unsqueeze(1) - self.shard.begin
        here = (at >= 0) & (at < logits.shape[1])
        return torch.where(here, logits.gather(1, at.clamp(0, logits.shape[1] - 1)), -torch.inf)

    def at_tops(self, i: int) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's logit where the student's (0) or the teacher's (1) is largest."""
        top = self.models[i].top
        return (top, self.there[0]) if i == 0 else (self.there[1], top)

    def entry(self, n: slice, logits: list[Tensor]) -> tuple[Entry, list[Local], list[Model]]:
        """The entries here, with what is known of the whole rows."""
        models = [m.of_rows(n) for m in self.models]
        local = [_local(x, m) for x, m in zip(logits, models, strict=True)]
        (s, t), (student, teacher) = local, models
        u = log_ratio(t.logits, s.logits, teacher, student)
        entry = entry_of(t, s, u, *(x[n] for x in self.u_at_peaks))
        return self.with_row(entry, n, t.logits, 0), local, models

    def with_row(self, entry: Entry, n: slice, teacher_logits: Tensor, at: int | Tensor) -> Entry:
        """With the set's members among entries at places from `at`, and what is known of the row."""
        members = self.divergence.statistics.members if self.divergence.statistics else ""
        inside = NOTHING
        if members == "label":
            assert self.labels is not None
            places = torch.arange(teacher_logits.shape[1], device=teacher_logits.device) + self.shard.begin
            inside = (places if isinstance(at, int) else at) == self.labels[n].unsqueeze(1)
        elif members:
            assert self.threshold is not None
            inside = teacher_logits >= self.threshold[n]
        of_row = () if self.coefficients is None else tuple(c[n] for c in self.coefficients)
        return entry._replace(inside=inside, of_row=of_row, largest=tuple(x[n] for x in self.most))

    def ask(self, statistics: RowStatistics) -> None:
        """What the divergence asks of its rows."""
        numbers = self.divergence.numbers
        if statistics.members in ("count", "mass"):
            find = self.largest if statistics.members == "count" else self.heaviest
            self.threshold = find(numbers[0])
        if statistics.largest is not None:
            mine = [torch.cat(largest_in(self.entry(n, x)[0], statistics, numbers), 1) for n, x in self.chunks()]
            self.most = self.wire.reduced(torch.cat(mine), dist.ReduceOp.MAX).split(1, 1)
        sums = [_sums(statistics.sums(self.entry(n, logits)[0], *numbers)) for n, logits in self.chunks()]
        whole = self.wire.reduced(torch.cat(sums)).to(self.dtype).split(1, 1)
        nothing, (of_student, of_teacher) = torch.zeros_like(self.u_at_peaks[0]), self.u_at_peaks
        of_row = Entry(nothing, nothing, nothing, nothing, nothing, nothing, nothing, of_student, of_teacher,
                       largest=self.most)  # fmt: skip
        self.coefficients = statistics.coefficients(of_row, tuple(whole), *numbers)

    def largest(self, count: float) -> Tensor:
        """The teacher's count-th largest logit of each row: of each rank's own largest."""
        most = min(int(count), self.shard.size)
        mine = [x[1].topk(min(most, x[1].shape[1]), 1).values for _, x in self.chunks()]
        return largest_of_all(self.wire, torch.cat(mine), most)[:, -1:]

    def heaviest(self, mass: float) -> Tensor:
        """The smallest of the fewest largest logits of the teacher that hold a mass."""
        teacher = self.models[1]

        def above(log_p: Tensor) -> Iterator[tuple[Tensor, Local]]:
            for n, logits in self.chunks():
                found = _local(logits[1], teacher.of_rows(n))
                yield found.log_probability >= log_p[n], found

        low, high = (torch.full_like(teacher.top, x) for x in (-104.0, 1e-6))  # of log p: too much, and too little
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            held = [_sums([torch.where(inside, x.probability, 0)]) for inside, x in above(middle)]
            enough = self.wire.reduced(torch.cat(held)) >= mass
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        smallest = [torch.where(inside, x.logits, torch.inf).amin(1, keepdim=True) for inside, x in above(low)]
        return self.wire.reduced(torch.cat(smallest), dist.ReduceOp.MIN)

    def terms_at(self, n: slice, logits: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Local]]:
        """The value at each entry here, and both models' terms, measured from their peak's, which is then 0."""
        divergence = self.divergence
        entry, local, models = self.entry(n, logits)
        value, *found = terms_at(divergence, entry, self.call.teacher_gradient)
        for i, term in enumerate(found):
            if i == 0 and divergence.centred:
                continue
            peak, p = self.at_peak(n, i), local[i].probability
            measured = term - times(p, peak / (-models[i].log_total).exp().to(p.dtype))
            mine = models[i].mine & (torch.arange(p.shape[1], device=p.device) == models[i].peak)
            found[i] = torch.where(mine, 0, measured)
        return value, found, local

    def at_peak(self, n: slice, i: int) -> Tensor:
        """A model's term at its own largest entry, which every rank can make."""
        divergence = self.divergence
        s, t = (_local(z[n], m.of_rows(n)) for z, m in zip(self.at_tops(i), self.models, strict=True))
        peaks = [x[n] for x in self.u_at_peaks]
        at = self.peak_ids[i][n] if divergence.needs_labels else 0
        entry = self.with_row(entry_of(t, s, peaks[i], *peaks), n, t.logits, at)
        return terms_at(divergence, entry, of_teacher=i == 1)[1 + i]

    @functools.cached_property
    def peak_ids(self) -> tuple[Tensor, ...]:
        """The whole vocabulary's ids of each model's largest entries."""
        mine = [torch.where(m.mine, m.peak + self.shard.begin, 0) for m in self.models]
        return self.wire.reduced(torch.cat(mine, 1)).split(1, 1)

    def totals(self) -> Tensor:
        """The parts of each row, and `sums`, the terms' own, of which the gradients are made."""
        terms, divergence = self.terms, self.call.divergence
        nothing = torch.zeros_like(self.label_logit)
        parts, self.sums = [nothing, nothing, nothing], []
        if self.labels is not None:
            parts[1:] = self.of_labels()
        local = []
        if divergence is not None:
            for n, logits in self.chunks():
                value, found, both = self.terms_at(n, logits)
                local.append(_sums([value, *found, *(self.metrics_at(both) if terms.metrics else ())]))
            whole = self.wire.reduced(torch.cat(local)).to(self.dtype).split(1, 1)
            parts[0] = times(terms.divergence_scale.unsqueeze(1) * divergence.scale, whole[0])
            count = 2 if self.call.teacher_gradient else 1
            self.sums = list(whole[1 : 1 + count])
            if divergence.centred:
                self.sums[0] = torch.zeros_like(whole[0])
            if terms.metrics:
                parts += self.metrics(whole[1 + count :])
        elif terms.metrics:
            alone = (_local(logits[0], self.models[0].of_rows(n)) for n, logits in self.chunks())
            entropy = self.wire.reduced(torch.cat([_sums(self.metrics_at([student])) for student in alone]))
            parts += self.metrics([entropy.to(self.dtype), nothing, nothing])
        scale = terms.row_scale.unsqueeze(1)
        return torch.cat([torch.where(self.live, scale * x, 0) for x in parts], 1).T.contiguous()

    def metrics_at(self, models: list[Local]) -> list[Tensor]:
        """What is summed: each model's entropy and, of two, their overlap."""
        of_each = [-times(m.probability, m.log_probability) for m in models]
        return of_each if len(models) == 1 else [*of_each, torch.minimum(*(m.probability for m in models))]

    def metrics(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """`values.Metrics` behind the losses; without a teacher 0 for what there is none of."""
        student_entropy, teacher_entropy, overlap = sums
        agreement, label = torch.zeros_like(overlap), torch.zeros_like(overlap)
        if len(self.models) == 2:
            agreement = (self.peak_ids[0] == self.peak_ids[1]).to(overlap)
        top = self.models[0].top
        if self.labels is not None:
            label = self.label_logit - top - self.log_plain
        return [student_entropy, teacher_entropy, agreement, overlap, log_sum_exp(top, self.log_plain), label]

    def of_labels(self) -> list[Tensor]:
        """Cross-entropy and squared log-sum-exp of each row."""
        top, smoothing = self.models[0].top, self.terms.label_smoothing
        cross_entropy = times((1 - smoothing) * self.weight_of_label(), self.log_plain - (self.label_logit - top))
        if smoothing:
            distances = [self.weighted(n, x[0]) for n, x in self.chunks()]
            sums = self.wire.reduced(torch.cat(distances)).to(self.dtype)
            self.weight_sum = sums[:, 1:]
            spread = smoothing / self.shard.size
            cross_entropy = cross_entropy + spread * (self.weight_sum * self.log_plain + sums[:, :1])
        lse = log_sum_exp(top, self.log_plain)
        return [cross_entropy, lse * lse]

    def weighted(self, n: slice, logits: Tensor) -> Tensor:
        """Σ w (top − z) and Σ w of the entries here."""
        w = torch.ones_like(logits) if self.terms.class_weight is None else self.class_weight.expand_as(logits)
        return _sums([times(w, self.models[0].top[n] - logits), w])

    @property
    def class_weight(self) -> Tensor:
        """Of the classes here."""
        weight = self.terms.class_weight
        assert weight is not None
        return weight[self.shard.begin : self.shard.begin + self.call.student.shape[2]]

    def weight_of_label(self) -> Tensor:
        assert self.labels is not None
        weight = self.terms.class_weight
        return torch.ones_like(self.label_logit) if weight is None else weight[self.labels].unsqueeze(1)

    def gradients(self, n: slice, logits: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Both models' gradients of a chunk, (n, V_local) in the arithmetic's dtype."""
        call, terms, divergence = self.call, self.terms, self.call.divergence
        scale = terms.row_scale[n].unsqueeze(1)
        found: list[Tensor] = [torch.zeros((), dtype=self.dtype, device=scale.device)] * 2
        if divergence is not None and (call.student_gradient or call.teacher_gradient):
            weight = terms.divergence_scale[n].unsqueeze(1) * divergence.scale
            _, every, local = self.terms_at(n, logits)
            for i, term in enumerate(every):
                of_model = term - times(local[i].probability, self.sums[i][n])
                found[i] = times(weight * self.rates[i][n], of_model)
        if self.labels is not None and call.student_gradient:
            found[0] = found[0] + self.label_gradient(n, logits[0])
        slopes = cap_slope(logits[0], call.student_softcap), cap_slope(logits[-1], call.teacher_softcap)
        student, teacher = (times(scale * x, slope) for x, slope in zip(found, slopes, strict=True))
        return student, teacher

    def label_gradient(self, n: slice, logits: Tensor) -> Tensor:
        """Of cross-entropy and z-loss, but for the row's scale."""
        terms, top, smoothing = self.terms, self.models[0].top[n], self.terms.label_smoothing
        assert self.labels is not None
        ce_scale, z_scale = (x[n].unsqueeze(1) for x in (terms.cross_entropy_scale, terms.z_loss_scale))
        of_label = ce_scale * (1 - smoothing) * self.weight_of_label()[n]
        of_q = of_label + 2 * z_scale * (top + self.log_plain[n])
        spread = smoothing / self.shard.size
        if smoothing:
            of_q = of_q + ce_scale * spread * self.weight_sum[n]
        gradient = of_q * (logits - top - self.log_plain[n]).exp()
        if smoothing:
            gradient = gradient - ce_scale * spread * (1.0 if terms.class_weight is None else self.class_weight)
        places = torch.arange(logits.shape[1], device=logits.device) + self.shard.begin
        return gradient - torch.where(places == self.labels[n].unsqueeze(1), of_label, 0)


def _sums(columns: Iterable[Tensor]) -> Tensor:
    """Of each (n, V_local), side by side."""
    return torch.cat([x.sum(1, keepdim=True, dtype=widest(x)) for x in columns], 1)


def _total(x: Tensor, top: Tensor, rate: Any) -> Tensor:
    finite = torch.where(top == -torch.inf, 0, top)
    return ((x - finite) * rate).exp().sum(1, keepdim=True, dtype=widest(x))


def _local(logits: Tensor, model: Model) -> Local:
    shifted = (logits - model.top) * model.rate
    log_probability = shifted - model.log_total.to(shifted.dtype)
    return Local(logits, shifted, log_probability, log_probability.exp())
