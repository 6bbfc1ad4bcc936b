"""Rows beside a list of ids: the log-sum-exp of what is not listed, and the gradient; see backends/sparse.py.

Blocks are of LINE entries a line, one word of `marks` each: bit b of word w of a row says whether entry 32 w + b is
listed.
"""

import triton
import triton.language as tl

from .loads import cap_slope, load_logits, row_at
from .softmaxes import LOWEST, below, but_one, count_of, entries_of, no_sums, taken
from .terms import LOG2E, exp, log1p, times

BITS = tl.constexpr(32)


@triton.jit
def _entries(start, BLOCK: tl.constexpr):
    """Entries (BLOCK/32, 32) from a start that is a multiple of 32."""
    return start + tl.arange(0, BLOCK // BITS)[:, None] * BITS + tl.arange(0, BITS)[None, :]


@triton.jit
def _log_of(rest):
    """``log(1 + rest)``; −inf of nothing, whose rest is −1."""
    return tl.where(rest == -1, float("-inf"), log1p(rest))


@triton.jit(do_not_specialize=["rows", "inner"])
def rest_statistics_kernel(
    student,  # (outer, inner, vocabulary) logits, dense in the vocabulary
    marks,  # (rows, words) int32
    statistics,  # (3, rows): the rest's largest logit; relative to it its log-sum-exp at 1/rate, and at temperature 1
    row_scale, rates,  # (rows)
    rows, inner, vocabulary, words, student_outer, student_inner, cap, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0), + num_programs(0), ...; those whose row_scale is 0 are not looked at."""
    zeros = no_sums(student, BLOCK)
    LANES: tl.constexpr = zeros.shape[0]
    LINE: tl.constexpr = BLOCK // LANES
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        if tl.load(row_scale + n) == 0:
            for i in tl.static_range(3):
                tl.store(statistics + i * rows + n, 0.0)
        else:
            row, rate = row_at(student, n, inner, student_outer, student_inner), tl.load(rates + n)
            words_of_row = marks + tl.cast(n, tl.int64) * words
            top, total, plain_total = zeros + LOWEST, zeros, zeros
            for start in tl.range(0, vocabulary, BLOCK):
                v = _entries(start, BLOCK)
                at = start // BITS + tl.arange(0, BLOCK // BITS)
                word = tl.load(words_of_row + at, mask=at < words, other=0)[:, None]
                listed = word >> tl.arange(0, BITS)[None, :]
                x = load_logits(row, v, vocabulary, cap)
                x = tl.reshape(tl.where((listed & 1) != 0, float("-inf"), x), [BLOCK])
                top, total, plain_total = taken(x, top, total, plain_total, rate, PLAIN, LINE)
            highest, lane, _, rest, plain_rest = but_one(top, total, plain_total, rate, PLAIN)
            equal = 0
            for at in tl.range(0, tl.cdiv(vocabulary, BLOCK) * (BLOCK // LANES), LANES):
                v = entries_of(lane, at, 0, LANES, BLOCK, LINE)
                listed = tl.load(words_of_row + v // BITS, mask=v < vocabulary, other=0) >> v % BITS
                x = tl.where((listed & 1) != 0, float("-inf"), load_logits(row, v, vocabulary, cap))
                rest += below(x, highest, rate * LOG2E)
                if PLAIN:
                    plain_rest += below(x, highest, LOG2E)
                equal += count_of(x, highest)
            tl.store(statistics + n, tl.where(highest == LOWEST, float("-inf"), highest))
            tl.store(statistics + rows + n, _log_of(rest + (equal - 1)))
            if PLAIN:
                tl.store(statistics + 2 * rows + n, _log_of(plain_rest + (equal - 1)))


@triton.jit(do_not_specialize=["rows", "inner", "list_size"])
def rest_gradient_kernel(
    student, gradient,  # (outer, inner, vocabulary)
    row_scale, rates,  # (rows)
    rest_top, of_rest, log_rest, top, of_plain, log_all, constant,  # (rows): sparse.Rest
    ids, values,  # (rows, list_size); −1: none
    rows, inner, vocabulary, list_size, student_outer, student_inner, gradient_outer, gradient_inner, cap,
    PLAIN: tl.constexpr, BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0), + num_programs(0), ...; zeros for those whose row_scale is 0."""
    for n in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        row = row_at(student, n, inner, student_outer, student_inner)
        out = row_at(gradient, n, inner, gradient_outer, gradient_inner)
        live, rate = tl.load(row_scale + n) != 0, tl.load(rates + n)
        its_top, rest_scale, rest_log = tl.load(rest_top + n), tl.load(of_rest + n), tl.load(log_rest + n)
        last = (tl.cdiv(vocabulary, BLOCK) - 1) * BLOCK
        for offset in tl.range(0, vocabulary, BLOCK):
            start = last - offset  # what was read last is in L2 still
            v = start + tl.arange(0, BLOCK)
            x = load_logits(row, v, tl.where(live, vocabulary, 0), cap)
            value = times(rest_scale, exp((x - its_top) * rate - rest_log))
            if PLAIN:
                of_labels = times(tl.load(of_plain + n), exp(x - tl.load(top + n) - tl.load(log_all + n)))
                value += of_labels + tl.load(constant + n)
            value *= cap_slope(x, cap)
            tl.store(out + v, tl.where(live, value, 0.0), mask=v < vocabulary)
        tl.debug_barrier()  # the list's places have been written by other threads
        for start in tl.range(0, list_size, LIST_BLOCK):
            k = start + tl.arange(0, LIST_BLOCK)
            at = tl.cast(n, tl.int64) * list_size + k
            id = tl.load(ids + at, mask=k < tl.where(live, list_size, 0), other=-1)
            tl.store(out + id, tl.load(values + at, mask=id >= 0, other=0.0), mask=(id >= 0) & (id < vocabulary))
