"""The Triton backend: one row kernel for every divergence, on NVIDIA sm_80 and newer and on AMD gfx942."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...divergences import Divergence, by_key
from ...row_formulas import KERNELS
from ..collectives import Collectives
from ..rows import VECTORS, RowCall, TokenTerms, gpu_symbol
from . import compiled, launch
from .launch import LINE_BYTES, Launch

#: Asked once: compilers cannot trace the question.
INSTALLED = importlib.util.find_spec("triton") is not None


def _interpreter_trouble() -> str | None:
    """Before 3.7 the interpreter makes an int of an array of one entry, which numpy 2.4 does not let it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions = [tuple(map(int, importlib.metadata.version(name).split(".")[:2])) for name in ("triton", "numpy")]
        if versions[0] < (3, 7) and versions[1] >= (2, 4):
            return "Triton's interpreter before 3.7 does not work with numpy 2.4 or newer; install numpy<2.4"
    return None


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before the import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


#: The interpreter runs programs one after the other: none can wait for the rest of its team, and phases take its place.
TEAMS_RUN = not interpreting()
#: Asked once, too, and only where it matters.
INTERPRETER_TROUBLE = _interpreter_trouble() if interpreting() else None


def _mend_interpreter() -> None:
    """Of a number and what is none the minimum is the number on cards and in newer interpreters, in older ones none."""
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in (("create_minnumf", numpy.fmin), ("create_maxnumf", numpy.fmax)):
        mended = functools.partialmethod(InterpreterBuilder.binary_op, op=function)
        setattr(InterpreterBuilder, name, mended)


if interpreting() and INSTALLED:
    _mend_interpreter()


def capability(device: torch.device) -> tuple[int, int]:
    """Of a card; asked once, but by compilers, which know it for a constant."""
    return (torch.cuda.get_device_capability if torch.compiler.is_compiling() else _capability)(device)


_capability = functools.lru_cache(torch.cuda.get_device_capability)


def why_not(device: torch.device, dtype: torch.dtype, divergence: Divergence | None) -> str | None:
    """The reason this backend cannot take a call, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if device.type != "cuda" and not interpreting():
        return f"the logits are on {device}"
    if device.type != "cuda" and INTERPRETER_TROUBLE:
        return INTERPRETER_TROUBLE
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16 logits, not {dtype}"
    if divergence is not None and divergence.kernel is None and divergence.triton is None:
        return f"{divergence} is a user's own generator without a Triton pair (FDivergence(..., triton=))"
    if device.type == "cuda" and torch.version.hip is None and capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    return None


def kind_of(divergence: Divergence | None, teacher_gradient: bool) -> Any:
    """A divergence's terms, and with the models exchanged those for the teacher: the kernels' `entries.Kind`."""
    from .kernels import entries, row_terms, terms

    none = entries.NONE.value
    if divergence is None:
        return entries.Kind(None, None, None, True, True, none)
    if not divergence.kernel:
        return entries.Kind(divergence.triton, None, "own", False, False, none)
    exchanged, known = KERNELS[divergence.kernel].exchanged, {**terms.BY_SYMBOL, **row_terms.BY_SYMBOL}
    symbol = gpu_symbol(divergence)
    of_teacher = known[symbol if exchanged == divergence.kernel else exchanged] if teacher_gradient else None
    members = divergence.statistics.members if divergence.statistics else ""
    in_set = {"": none, "label": entries.LABEL.value}.get(members, entries.LARGEST.value)
    return entries.Kind(known[symbol], terms.FACTORS.get(symbol), of_teacher, divergence.centred,
                        KERNELS[exchanged].centred, in_set)  # fmt: skip


#: Kernels count in 32 bits the at most nine numbers that they have of each row.
MOST_ROWS = (2**31 - 1) // 9

#: The kernels' names of `Formula.constants`, and of those with the models exchanged.
CONSTANTS = ("parameter", "rest", "log_parameter", "log_rest", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
OTHERS = ("other_parameter", "other_rest", "other_log", "other_log_rest")


def constants(divergence: Divergence | None, names: tuple[str, ...] = CONSTANTS) -> dict[str, float]:
    """A divergence's constants, or with `OTHERS` those with the models exchanged, as the kernels' arguments; an own
    divergence has its parameter alone.
    """
    if divergence is None or not divergence.kernel:
        return {**dict.fromkeys(names, 0.0), names[0]: divergence.parameter if divergence else 0.0}
    return dict(zip(names, divergence.constants[names is OTHERS], strict=False))


def arguments(divergence: Divergence | None, teacher_gradient: bool) -> tuple[tuple[float, ...], Any]:
    """All that the row kernel takes of a divergence: numbers by place, and its `entries.Kind`."""
    if divergence is None or divergence.kernel is None:
        return _arguments(divergence, teacher_gradient)
    return _of_key(divergence.key, teacher_gradient)


def _arguments(divergence: Divergence | None, teacher_gradient: bool) -> tuple[tuple[float, ...], Any]:
    numbers = *constants(divergence).values(), *constants(divergence, OTHERS).values()
    return numbers, kind_of(divergence, teacher_gradient)


@functools.lru_cache(maxsize=256)
def _of_key(key: str, teacher_gradient: bool) -> tuple[tuple[float, ...], Any]:
    return _arguments(by_key(key), teacher_gradient)


def divergence_rows(call: RowCall) -> tuple[Tensor, Tensor, Tensor]:
    """See `RowCall`."""
    return run(call, _launch(call))


def _launch(call: RowCall, symbol: str = "") -> Launch:
    symbol = symbol or (gpu_symbol(call.divergence) if call.divergence else "labels")
    rows, vocabulary = call.terms.row_scale.shape[0], call.student.shape[2]
    if rows > MOST_ROWS:
        raise ValueError(f"{rows} rows of logits: the Triton kernels take {MOST_ROWS} at once")
    if call.shard.group:  # the same for all ranks, though their shards may differ
        vocabulary = -(-call.shard.size // Collectives(call.shard.group).ranks)
    size, device = call.student.element_size(), call.student.device
    return launch.choose(rows, vocabulary, size, device, symbol, call.teacher_gradient)


def takes_split(call: RowCall) -> bool:
    """Whether the kernels can make rows that are split over ranks: those of all but statistics, metrics and what is of
    every class.
    """
    terms = call.terms
    statistics = call.divergence is not None and call.divergence.statistics is not None
    return not (statistics or terms.metrics or terms.label_smoothing or terms.class_weight is not None)


class _Spans(NamedTuple):
    """How programs share rows, and where they meet.

    Attributes:
        size, splits: entries of a span, a multiple of the block, and spans of a row on this rank.
        met: of all ranks, as a power of two.
        partials: (PARTIALS, rows, met), what the spans leave for each other; None: each row is one program's.
        tickets: (1 + rows), of teams; None: spans meet between launches.
    """

    size: int
    splits: int
    met: int
    partials: Tensor | None
    tickets: Tensor | None


def _spans(call: RowCall, chosen: Launch, line: int, ranks: int) -> _Spans:
    """Of a row from the start of its first line; ranks: that split the vocabulary, 0: it is whole."""
    rows, device = len(call.terms.row_scale), call.student.device
    most = call.student.shape[2] + line - 1
    size = -(-most // (chosen.splits * chosen.block)) * chosen.block
    splits = -(-most // size)
    met = 1 << ((chosen.splits * ranks if ranks else splits) - 1).bit_length()
    partials = _empty_partials(rows, met, device) if met > 1 or ranks else None
    together = chosen.together and splits > 1 and not ranks and TEAMS_RUN
    tickets = torch.zeros(1 + rows, dtype=torch.int32, device=device) if together else None
    return _Spans(size, splits, met, partials, tickets)


def _terms_here(call: RowCall) -> TokenTerms:
    """The terms as the row kernel takes them: without metrics, with a divergence's factor and this rank's labels."""
    terms, divergence = call.terms, call.divergence
    if terms.metrics:
        terms = terms.without_metrics()
    if divergence and divergence.scale != 1:
        terms = terms._replace(divergence_scale=terms.divergence_scale * divergence.scale)
    if call.shard.group and terms.labels is not None:
        terms = terms._replace(labels=terms.labels - call.shard.begin)
    return terms


def _vectors(terms: TokenTerms) -> list[Tensor | None]:
    """The terms' vectors by place; the teacher's temperatures are none where they are the student's."""
    vectors: list[Any] = list(terms[: len(VECTORS)])
    if terms.teacher_inverse_temperature.data_ptr() == terms.student_inverse_temperature.data_ptr():
        vectors[VECTORS.index("teacher_inverse_temperature")] = None
    return vectors


def run(call: RowCall, chosen: Launch) -> tuple[Tensor, Tensor, Tensor]:
    """The call under a given launch. Ranks that split a vocabulary are like the spans of a row: what they leave in
    `partials` goes to all between the phases.
    """
    from .kernels import rows as kernels

    student, teacher, divergence, rows = call.student, call.teacher, call.divergence, len(call.terms.row_scale)
    parts = torch.empty(call.parts, rows, dtype=torch.float32, device=student.device)
    of_student, of_teacher = call.empty_gradients()
    student_gradient = student if call.inplace else of_student if call.student_gradient else None
    teacher_gradient = of_teacher if call.teacher_gradient else None
    if call.terms.metrics:
        write_metrics(call, parts)
    terms, line = _terms_here(call), _line(chosen.block, student, teacher, student_gradient, teacher_gradient)
    wire = Collectives(call.shard.group) if call.shard.group else None
    spans = _spans(call, chosen, line, wire.ranks if wire else 0)
    coefficients = _coefficients(call, terms) if divergence and divergence.statistics else None
    strides = *_strides_of(student), *_strides_of(teacher), *_strides_of(student_gradient)
    numbers, kind = arguments(divergence, call.teacher_gradient)
    given = (
        student, teacher, student_gradient, teacher_gradient, parts, spans.partials, spans.tickets, *_vectors(terms),
        coefficients, rows, *student.shape[1:], spans.size, *strides, call.student_softcap or None,
        call.teacher_softcap or None, *numbers, terms.label_smoothing,
        None if terms.class_weight is None else terms.class_weight.sum(),
    )  # fmt: skip
    smoothed = terms.labels is not None and terms.label_smoothing > 0

    def phase(number: int, grid: tuple[int, int]) -> None:
        constants_of = kind, smoothed, number, spans.met, chosen.block, line
        compiled.start(kernels.row_kernel, grid, given, constants_of, chosen.options)

    with launch.on(student.device):
        if spans.partials is None:
            phase(0, (chosen.programs, 1))
        elif spans.tickets is not None:
            phase(4, (chosen.programs, spans.splits))
        else:
            grid = (rows, spans.splits) if spans.splits > 1 else (chosen.programs, 1)
            for number in (1, 2, 3) if teacher is not None else (1, 3):
                phase(number, grid)
                if wire is not None and number < 3:
                    _meet(wire, spans.partials, chosen.splits, number)
    return with_left_out(parts, call.terms), of_student, of_teacher


def _meet(wire: Collectives, partials: Tensor, splits: int, phase: int) -> None:
    """What a phase has left of this rank's spans, to that of all ranks."""
    if phase == 1:  # (ranks, 9, rows, splits); the label's logit is on one rank, on the others NaN
        every = wire.gathered(partials[:9, :, :splits])
        partials[:9, :, : wire.ranks * splits] = every.permute(1, 2, 0, 3).flatten(2)
        of_label = every[:, 8, :, :1]
        partials[8] = torch.where(of_label.isnan(), -torch.inf, of_label).amax(0)
    else:
        total = wire.reduced(partials[9:12].sum(2))
        partials[9:12] = 0
        partials[9:12, :, 0] = total


def _line(block: int, student: Tensor, *others: Tensor | None) -> int:
    """Entries of the 16-byte lines that rows are read by, which each row must start at the same place of in all tensors
    of the call; 1 where it does not, or blocks are not of whole lines.
    """
    entries = LINE_BYTES // student.element_size()
    if block % entries:
        return 1
    for x in others:
        if x is None:
            continue
        if x.element_size() != student.element_size() or (x.data_ptr() - student.data_ptr()) % LINE_BYTES:
            return 1
        if x.stride() != student.stride() and any(
            (x.stride(d) - student.stride(d)) % entries for d in (0, 1) if x.shape[d] > 1
        ):
            return 1
    return entries


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """The kernels' arguments NAME_outer and NAME_inner."""
    return {f"{name}_{of}": stride for name, x in tensors.items()
            for of, stride in zip(("outer", "inner"), _strides_of(x), strict=True)}  # fmt: skip


def _strides_of(x: Tensor | None) -> tuple[int, ...]:
    """The outer and inner strides of (outer, inner, V); 0 of an absent tensor."""
    return (0, 0) if x is None else x.stride()[:2]


def _coefficients(call: RowCall, terms: TokenTerms) -> Tensor:
    """What the divergence asks of each row before the row kernel."""
    from .kernels import row_statistics, row_terms

    divergence = call.divergence
    assert divergence is not None and divergence.statistics is not None and divergence.kernel is not None
    of_divergence = terms.row_scale * terms.divergence_scale  # rows where it is 0 are not looked at
    coefficients = of_divergence.new_zeros(row_statistics.COEFFICIENTS.value + 1, len(of_divergence))
    sums, of_sums = row_terms.STATISTICS[divergence.kernel]
    by = row_statistics.MASS if divergence.statistics.members == "mass" else row_statistics.COUNT
    _look(row_statistics.row_statistics_kernel, call, terms._replace(row_scale=of_divergence),
          coefficients=coefficients, **constants(divergence), SUMS=sums, OF_SUMS=of_sums,
          LARGEST_OF=row_terms.LARGEST.get(divergence.kernel), BY=by.value,
          MEMBERS=kind_of(divergence, False).MEMBERS)  # fmt: skip
    return coefficients


def write_metrics(call: RowCall, parts: Tensor) -> None:
    """Each row's `values.Metrics`, behind its parts, before anything is written to its logits."""
    from .kernels.row_metrics import row_metrics_kernel

    _look(row_metrics_kernel, call, call.terms, parts=parts)


def with_left_out(parts: Tensor, terms: TokenTerms) -> Tensor:
    """With the cross-entropy, a metric, of rows that the row kernel leaves out since their terms weigh nothing; where
    classes have weights, it is 0 there.
    """
    if terms.metrics and terms.labels is not None and terms.class_weight is None:
        left_out = terms.without_metrics().row_scale == 0
        parts[1] = torch.where(left_out, 0 - parts[-1], parts[1])
    return parts


def _look(kernel: Any, call: RowCall, terms: TokenTerms, **more: Any) -> None:
    """Runs a kernel that looks at both models' rows before the row kernel."""
    chosen = _launch(call, "statistics")
    _over_rows(
        kernel, call.student, terms.row_scale, chosen, teacher=call.teacher, labels=terms.labels,
        student_inverse_temperature=terms.student_inverse_temperature,
        teacher_inverse_temperature=terms.teacher_inverse_temperature, **_strides(teacher=call.teacher),
        student_cap=call.student_softcap or None, teacher_cap=call.teacher_softcap or None,
        LINE=_line(chosen.block, call.student, call.teacher), **more,
    )  # fmt: skip


def _over_rows(kernel: Any, student: Tensor, row_scale: Tensor, chosen: Launch, **more: Any) -> None:
    """Runs a kernel whose programs take whole rows, one after the other."""
    rows = len(row_scale)
    with launch.on(student.device):
        kernel[(min(rows, chosen.programs * chosen.splits),)](
            student=student, row_scale=row_scale, rows=rows, inner=student.shape[1], vocabulary=student.shape[2],
            **_strides(student=student), **more, BLOCK=chosen.block, **chosen.options,
        )  # fmt: skip


def rest_statistics(
    student: Tensor, softcap: float | None, row_scale: Tensor, rate: Tensor, ids: Tensor, plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.rest_statistics`."""
    from .kernels.rest import rest_statistics_kernel

    vocabulary, found = student.shape[2], rate.new_empty(3, len(rate))
    marks = _marks(ids, vocabulary)
    _over_rows(rest_statistics_kernel, student, row_scale, _launch_beside(student, row_scale), marks=marks,
               statistics=found, rates=rate, words=marks.shape[1], cap=softcap or None, PLAIN=plain)  # fmt: skip
    top, log_rest, plain_rest = found
    return top, log_rest, plain_rest


def _marks(ids: Tensor, vocabulary: int) -> Tensor:
    """(N, ⌈V/32⌉) int32, a bit an entry: 1 where it is listed. Ids differ within a row, so that a sum is a union."""
    words = torch.zeros(len(ids), -(-vocabulary // 32), dtype=torch.int32, device=ids.device)
    at = ids.clamp_min(0)
    bits = torch.where(ids >= 0, torch.ones_like(ids) << (at & 31), 0).to(torch.int32)
    return words.scatter_add_(1, at >> 5, bits)


def rest_gradient_(
    out: Tensor, student: Tensor, softcap: float | None, row_scale: Tensor, rate: Tensor, rest: Any, ids: Tensor,
    values: Tensor,
) -> None:  # fmt: skip
    """As `chunked.rest_gradient_`."""
    from .kernels.rest import rest_gradient_kernel

    size = ids.shape[1]
    vectors = {name: None if x is None else x.contiguous() for name, x in rest._asdict().items()}
    _over_rows(
        rest_gradient_kernel, student, row_scale, _launch_beside(student, row_scale), gradient=out, rates=rate,
        **vectors, ids=ids.contiguous(), values=values.contiguous(), list_size=size, **_strides(gradient=out),
        cap=softcap or None, PLAIN=rest.of_plain is not None,
        LIST_BLOCK=max(16, min(1024, 1 << (size - 1).bit_length())),
    )  # fmt: skip


def _launch_beside(student: Tensor, row_scale: Tensor) -> Launch:
    """For the kernels of `rest`, whose blocks are of whole words of marks."""
    chosen = launch.choose(len(row_scale), student.shape[2], student.element_size(), student.device, "rest")
    return dataclasses.replace(chosen, block=max(32, chosen.block))


def _empty_partials(rows: int, splits: int, device: torch.device) -> Tensor:
    """Partials of spans that hold nothing: no sum, and a maximum below all."""
    from .kernels.rows import PARTIALS
    from .kernels.softmaxes import LOWEST

    partials = torch.zeros(PARTIALS, rows, splits, dtype=torch.float32, device=device)
    partials[0] = partials[4] = LOWEST.value
    partials[1] = partials[2] = partials[5] = -1  # sums less the 1 of their maximum
    partials[6:8] = -torch.inf
    return partials


def scale_(gradient: Tensor, factor: Tensor, row_scale: Tensor | None = None) -> None:
    """Multiplies (outer, inner, V) in place by a number, or by one a row, without asking the device whether it is 1; a
    row whose row_scale is 0 is left alone.
    """
    from .kernels.scale import scale_kernel

    outer, inner, vocabulary = gradient.shape
    rows = outer * inner
    chosen = launch.heuristic(rows, vocabulary, gradient.element_size(), launch.device_of(gradient.device), "scale")
    with launch.on(gradient.device):
        given = gradient, factor.float().contiguous(), row_scale, rows, inner, vocabulary, *gradient.stride()[:2]
        compiled.start(scale_kernel, (chosen.programs, 1), given, (factor.numel() > 1, chosen.block), chosen.options)
