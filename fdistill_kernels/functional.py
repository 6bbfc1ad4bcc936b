"""The public functions: they check their arguments, make values of them, and return a differentiable loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks
from .backends.rows import LISTS, NO_LIST, Teacher
from .carried import replaced
from .divergences import ENGINE, Divergence
from .heads import (
    Entries,
    check_alone,
    check_no_divergence,
    checked_scale,
    cut_shard,
    head_here,
    head_of,
    logits_of,
    many_heads,
    path_of,
    teacher_of,
)
from .linear import log_probs_of_hidden, loss_of_hidden
from .logits import log_sum_exp_of, loss_of_logits
from .own import resolve
from .parallel import VocabShard, carried_shard, check_shard, check_untrained, local_part, teacher_part, valid
from .sparse import TopK, targets_of
from .targets import as_cross_entropy, soft_targets
from .tokens import TEMPERATURES, checked_terms
from .values import Head, Hidden, Logits, LossTerms, RowFunction, Temperature


def f_divergence(
    student_logits: Tensor | Logits,
    teacher_logits: Tensor | Logits | TopK,
    divergence: str | Divergence | Callable[[Tensor], Tensor] | LossTerms = "js",
    *,
    divergence_weight: float | Tensor = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    temperature_squared: bool = False,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_parts: bool | str = False,
    shard: VocabShard | None = None,
    teacher_shard: VocabShard | None = None,
) -> Any:
    """``Σ_v q_v f(p_v/q_v)`` of each token, for a student q = softmax(z_s/T) and a teacher p = softmax(z_t/T_t).

    Args:
        student_logits, teacher_logits: z_s and z_t, (..., V), any strides; float32, bfloat16, float16 or float64. The
            arithmetic is float32 (float64 for float64). Both may require grad. If their dtypes differ, both are copied
            to float32 or float64, and each gradient has the dtype of its logits. Or `Logits`, with their soft-cap. The
            teacher may also be a `TopK`, a list of ids and their log-probabilities, which gets no gradient.
        divergence: a name (`fdistill list`), a `Divergence` such as ``Alpha(0.3)``, or a convex f(t) with f(1) = 0. Or
            `LossTerms`: they replace this argument and those up to num_items, except the soft-caps.
        divergence_weight: factor on the divergence: a number or a tensor, () or (...).
        labels: (...) integers in [0, V). A token with the label `ignore_index` is left out of every term.
        ce_weight: weight of the cross-entropy to `labels`, at temperature 1, which is added to the divergence.
        label_smoothing: of that cross-entropy, in [0, 1], as in `torch.nn.functional.cross_entropy`.
        z_loss: weight ≥ 0 of log_sum_exp(z_s)², at temperature 1 (PaLM, Chowdhery et al. 2022); needs `labels`.
        token_weight: (...) factor on each token's loss. The denominator of the mean does not contain it.
        temperature, teacher_temperature: T and T_t, in [1e-18, 1e18]: numbers or tensors, () or (...). The default of
            T_t is T.
        temperature_squared: multiply the divergence by T² (Hinton et al. 2015).
        logit_softcap, teacher_logit_softcap: c > 0 replaces each logit z by c·tanh(z/c) first (Gemma 2, Gemma Team
            2024, §2). For logits that do not have their cap yet; each model has its own.
        reduction: "mean" over unmasked tokens, "sum", "none" (...), or "batchmean": the sum divided by the size of the
            first dimension (by 1 for logits (V)).
        num_items: replaces the denominator of "mean" and "batchmean" (gradient accumulation): a number or a tensor with
            one element, on any device. 0 is allowed if no token counts.
        vocab_size: compare only the first vocab_size entries, if the models' vocabularies are padded differently.
        inplace: the gradient overwrites `student_logits`, which must not be used again. Refused if the models' dtypes
            differ, or if rows share memory with each other or another argument. Without a gradient nothing is
            overwritten. float16 then has to hold both models' gradients but for the token's weight.
        backend: "auto", or the name of a backend (`fdistill doctor`).
        return_parts: True also returns `LossParts`, "metrics" `Metrics`, which read each row once more. With a `TopK`
            both give `SparseParts`, which need a top-k of the student's rows.
        shard: the logits are those of a `VocabShard`, and the other ranks of its group hold the rest. All must make the
            same call for the same rows, with labels and ids of the whole vocabulary. Each rank gets the whole loss and
            the gradient of its entries. DTensors that are split on the last dimension need no shard.
        teacher_shard: the teacher's, if it is split differently. None: split like the student, or whole, by its size.

    Returns:
        The loss, () or (...), float32 (float64 for float64 logits); with return_parts a pair of loss and parts. If no
        token counts, it is 0 with zero gradients. An infinite divergence is inf; a NaN logit makes its token's loss
        NaN. 16-bit gradients are rounded once, after the upstream factor: float16 ones are made only in the backward
        pass; bfloat16 ones on a CPU are made again there if the factor is not a power of two. The graph keeps the
        logits for this. With `inplace`, and for bfloat16 on a GPU or inside torch.compile, such a factor rounds a
        second time.

    Raises:
        ValueError, TypeError: a shape, dtype, device, range or name does not fit; before any kernel starts.
        RuntimeError: in the backward pass with create_graph=True: there is no second derivative.
        NotImplementedError: a torch.func transform (vmap, grad, jvp) or forward-mode differentiation.

    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023, eq. (4)-(11).
    """
    terms = _terms(
        divergence, divergence_weight=divergence_weight, labels=labels, ce_weight=ce_weight,
        label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, token_weight=token_weight,
        temperature=temperature, teacher_temperature=teacher_temperature, temperature_squared=temperature_squared,
        reduction=reduction, num_items=num_items,
    )  # fmt: skip
    check_shard("shard", shard)
    check_shard("teacher_shard", teacher_shard)
    checks.check_flag("inplace", inplace)
    checks.check_parts(return_parts)
    student, softcap = logits_of("student_logits", student_logits, "logit_softcap", logit_softcap)
    student, shard, padded = _logits_here("student_logits", student, vocab_size, shard)
    vocabulary = _vocabulary(student.shape[-1], shard)
    if isinstance(teacher_logits, TopK):
        check_alone("teacher_logits", teacher_logits, teacher_logit_softcap=teacher_logit_softcap,
                    teacher_shard=teacher_shard)  # fmt: skip
        terms = checked_terms(terms, student, vocabulary)
        teacher, targets = None, targets_of(teacher_logits, student, terms, "teacher_logits")
        others = {f"teacher_logits.{n}": getattr(teacher_logits, n) for n in LISTS}
    else:
        given = logits_of("teacher_logits", teacher_logits, "teacher_logit_softcap", teacher_logit_softcap)
        entries = Entries(student.shape[-1], padded, vocab_size, shard)
        values = _teacher_here("teacher_logits", given.values, entries, teacher_shard)
        checks.check_pair(student, values)
        if student.dtype != values.dtype:
            if inplace:
                raise ValueError(f"inplace=True needs logits of one dtype, not {student.dtype} and {values.dtype}")
            wide = torch.float64 if torch.float64 in (student.dtype, values.dtype) else torch.float32
            student, values = student.to(wide), values.to(wide)
        terms = checked_terms(terms, student, vocabulary)
        teacher, targets, others = Logits(values, given.softcap), NO_LIST, {"teacher_logits": values}
    inplace = inplace and _overwritten("student_logits", student, terms=terms, **others)
    return loss_of_logits(Logits(student, softcap), teacher, terms, backend, return_parts, inplace, targets,
                          carried_shard(shard))  # fmt: skip


def _logits_here(
    name: str, logits: Any, vocab_size: int | None, shard: VocabShard | None
) -> tuple[Tensor, VocabShard | None, int]:
    """This rank's logits without padding, their shard, and their number with padding (0 without a shard)."""
    logits, shard = local_part(name, logits, -1, shard)
    if shard is None:
        return checks.shared_vocabulary(name, logits, vocab_size), None, 0
    checks.check_logits(name, logits)
    shard = cut_shard(shard, vocab_size)
    return valid(name, logits, shard, -1), shard, logits.shape[-1]


def _teacher_here(name: str, logits: Any, of_student: Entries, own: VocabShard | None) -> Tensor:
    """The teacher's logits at the student's entries."""
    logits, own = local_part(name, logits, -1, own)
    if of_student.shard is None:
        of_student.check_whole(name, own)
        return checks.shared_vocabulary(name, logits, of_student.vocab_size)
    checks.check_logits(name, logits)
    if logits.shape[-1] not in (of_student.size, of_student.padded):
        check_untrained(name, logits)
    return teacher_part(name, logits, -1, of_student.size, of_student.padded, of_student.shard, own)


def _vocabulary(local: int, shard: VocabShard | None) -> int:
    return local if shard is None else shard.size


def cross_entropy(
    input: Tensor | Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    logit_softcap: float | None = None,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_parts: bool | str = False,
    shard: VocabShard | None = None,
) -> Any:
    """`torch.nn.functional.cross_entropy` in fused kernels, with z-loss.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...).
        target: class indices (), (N) or (N, d1, ...), in [0, C) or `ignore_index`; or class probabilities of the
            input's shape, which must not be negative and must not require grad. For probabilities, input and target are
            copied to the wider of their dtypes, at least float32.
        weight: (C) factor on each class. For class indices, "mean" divides the cross-entropy by the sum of the targets'
            weights, and the z-loss by the number of targets. If all these weights are 0 they count as 1 (torch: NaN).
        size_average, reduce: deprecated in torch and refused here; use `reduction`.
        z_loss: weight of log_sum_exp(input)², which is added to each token's loss.
        token_weight: factor on each token's loss, in the shape of class indices; not in the denominator.
        logit_softcap, reduction, num_items, inplace, backend, return_parts, shard: as in `f_divergence`. With a shard
            the class weights are those of the whole vocabulary. inplace and shard are for class indices only.

    Returns:
        The loss, () or the shape of class indices, float32 (float64 for float64 logits). If all targets are ignored, or
        there are none, it is 0 (torch: NaN).

    Raises:
        ValueError, TypeError: as in `f_divergence`.
    """
    checks.check_deprecated(size_average)
    checks.check_deprecated(reduce)
    checks.check_flag("inplace", inplace)
    checks.check_parts(return_parts)
    check_shard("shard", shard)
    given, softcap = logits_of("input", input, "logit_softcap", logit_softcap)
    checks.check_made("input", given)
    values = given
    if isinstance(values, Tensor) and values.dim() > 2 and not values.is_nested:  # which is refused by name below
        values = values.movedim(1, -1)
    logits, shard, _ = _logits_here("input", values, None, shard)
    checks.check_tensor("target", target, floating=False)
    terms = LossTerms(
        None, labels=target, ce_weight=1.0, label_smoothing=label_smoothing, z_loss=z_loss, class_weight=weight,
        ignore_index=ignore_index, token_weight=token_weight, reduction=reduction, num_items=num_items,
    )  # fmt: skip
    if target.is_floating_point():
        if inplace or shard is not None:
            raise ValueError(f"{'shard' if shard else 'inplace=True'} is for class indices as target")
        teacher, terms = soft_targets(target.movedim(1, -1) if target.dim() > 2 else target, logits, terms)
        logits = logits.to(teacher.dtype)
        terms = checked_terms(terms, logits, logits.shape[-1])
        loss = loss_of_logits(Logits(logits, softcap), Logits(teacher), terms, backend, return_parts)
        return as_cross_entropy(loss, return_parts)
    if target.shape != logits.shape[:-1] and target.shape == given.shape[:-1]:
        raise ValueError(f"input {tuple(given.shape)} has its classes in dimension 1, as in torch: for a target "
                         f"{tuple(target.shape)} give input.movedim(-1, 1), or flatten both")  # fmt: skip
    terms = checked_terms(terms, logits, _vocabulary(logits.shape[-1], shard), "target")
    inplace = inplace and _overwritten("input", logits, target=target, weight=weight, token_weight=token_weight)
    return loss_of_logits(Logits(logits, softcap), None, terms, backend, return_parts, inplace, NO_LIST,
                          carried_shard(shard))  # fmt: skip


def log_sum_exp(
    logits: Tensor | Logits, *, logit_softcap: float | None = None, backend: str = "auto",
    shard: VocabShard | None = None,
) -> Tensor:  # fmt: skip
    """``log Σ_v exp z_v`` of logits (..., V), differentiable, as (...) float32 (float64 for float64 logits).

    Args:
        logits, logit_softcap, backend, shard: as in `f_divergence`.
    """
    check_shard("shard", shard)
    values, softcap = logits_of("logits", logits, "logit_softcap", logit_softcap)
    values, shard, _ = _logits_here("logits", values, None, shard)
    checked_terms(LossTerms(None), values, values.shape[-1])
    return log_sum_exp_of(values, softcap, backend, carried_shard(shard))


def linear_f_divergence(
    student_hidden: Tensor,
    student_weight: Tensor | Head,
    teacher_hidden: Tensor | Hidden | Logits | TopK | RowFunction,
    teacher_weight: Tensor | Head | None = None,
    divergence: str | Divergence | Callable[[Tensor], Tensor] | LossTerms = "js",
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float | None = None,
    teacher_logit_scale: float | None = None,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    divergence_weight: float | Tensor = 1.0,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    temperature_squared: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    memory: str = "chunks",
    skip_tiles: bool = True,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    return_parts: bool | str = False,
    shard: VocabShard | None = None,
    teacher_shard: VocabShard | None = None,
) -> Any:
    """`f_divergence` of both models' logits ``logit_scale·hidden weightᵀ + bias``, which never exist all at once.

    Args:
        student_hidden: (..., D_s), float32, bfloat16 or float16 (float64 on the torch backend).
        student_weight, student_bias: the student's head, (V, D_s) and (V), in the dtype of the hidden states; or a
            `Head`. A head that does not require grad costs no product for its gradient.
        teacher_hidden: (..., D_t) with `teacher_weight`, or `Hidden`. Or without `teacher_weight`: logits (..., V), as
            a tensor or `Logits`; a `TopK`; or a function ``(begin, end) -> logits (end − begin, V)`` of a range of the
            flattened rows, beside a split student whole or of this rank's part. The teacher gets no gradient: this
            argument must not require grad.
        teacher_weight, teacher_bias: the teacher's head, (V, D_t) and (V), in the dtype of its hidden states; or a
            `Head`. It may be the student's.
        logit_scale, teacher_logit_scale: factor on hidden weightᵀ (Cohere, Granite). The student's default is 1, the
            teacher's is the student's scale. The teacher's needs `teacher_weight`.
        logit_softcap, teacher_logit_softcap: c > 0 replaces each logit z, after scale and bias, by c·tanh(z/c) (Gemma
            2, Gemma Team 2024, §2). Each model has its own; default: none. The teacher's needs `teacher_weight`.
        vocab_size: use only the first vocab_size rows of both heads, if they are padded differently.
        memory: "chunks", or "minimal": Triton keeps both models' logits on chip and makes them again in the backward
            sweeps. That takes O(N) + 16 MB beyond the gradients, and 2.5 times the products if it skips no tiles
            (`backends.triton.cut`); with more `chunk_bytes` it takes less time. Chunks of 8 MB elsewhere, and with a
            `TopK`, a shard, metrics, or a divergence with `statistics`.
        skip_tiles: with memory="minimal", leave tiles out of the gradient in which all probabilities of both models are
            below ε/V, where ε is the dtype's resolution. The gradient of a row's logits loses less than 2ε times the
            row's weight in L1 norm. Only for the divergences that have this bound (kl, cross_entropy, js, gjs, skew_kl,
            tvd) or none, and without label smoothing.
        chunk_bytes: memory for a chunk's logits of both models. Default: 55 MB on a CPU; on a GPU 1.1 GB, or a quarter
            of the memory that is still available (with torch's unused cache) if that is less; but 1024 rows if they fit
            in half of it. The last bits of the gradients depend on it. With memory="minimal" on Triton it is all that
            is taken beyond the gradients, by default 14 MB: 32 MB make longer launches; from 4·N·D + 32 MB on, which
            hold ∂hidden in float32, there are twice the products instead of 2.5 times.
        shard, teacher_shard: the heads are the rows of a `VocabShard`; the hidden states and their gradients are whole
            on every rank. Or hidden states and head are DTensors, whole and split on dimension 0. A DTensor head with
            plain hidden states is FSDP's: each rank has its own rows and its own loss, and the gradient of the head is
            the mean over the mesh (`scattered`).
        The rest: as in `f_divergence`.

    Returns:
        As `f_divergence`. Gradients are summed in float32, then multiplied by the upstream factor and rounded once to
        the dtype of the inputs, in the backward pass; memory="minimal" on Triton rounds before the factor, too. float16
        has to hold the gradient of a token's logits but for its weight, which pearson's or neyman's may exceed.
        ``reduction="none"`` computes the chunks again in the backward pass, because each row's upstream gradient is not
        known earlier. Inside torch.compile a teacher that is a function, or a user's own divergence, breaks the graph;
        torch.export, make_fx and torch.jit.trace refuse both.

    Raises:
        ValueError, TypeError: as `f_divergence`; also for heads that are not plain tensors (LoRA, quantised, ZeRO-3).

    Source: Wen et al., ACL 2023, eq. (4)-(11), for the loss.
    """
    check_shard("shard", shard)
    check_shard("teacher_shard", teacher_shard)
    check_no_divergence(teacher_weight)
    terms = _terms(
        divergence, divergence_weight=divergence_weight, labels=labels, ce_weight=ce_weight,
        label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, token_weight=token_weight,
        temperature=temperature, teacher_temperature=teacher_temperature, temperature_squared=temperature_squared,
        reduction=reduction, num_items=num_items,
    )  # fmt: skip
    head = head_of("student_weight", student_weight, student_bias=student_bias, logit_scale=logit_scale,
                   logit_softcap=logit_softcap)  # fmt: skip
    names = "student_hidden", "student_weight", "student_bias"
    hidden, head, shard, padded = head_here(student_hidden, head, names, vocab_size, shard, teacher_hidden,
                                            teacher_weight)  # fmt: skip
    vocabulary = _vocabulary(head.weight.shape[0], shard)
    keywords = dict(teacher_bias=teacher_bias, teacher_logit_scale=teacher_logit_scale,
                    teacher_logit_softcap=teacher_logit_softcap)  # fmt: skip
    if isinstance(teacher_hidden, TopK):
        check_alone("teacher_hidden", teacher_hidden, teacher_weight=teacher_weight, teacher_shard=teacher_shard,
                    **keywords)  # fmt: skip
        terms = checked_terms(terms, hidden, vocabulary)
        teacher = Teacher(targets=targets_of(teacher_hidden, hidden, terms, "teacher_hidden"))
    else:
        entries = Entries(head.weight.shape[0], padded, vocab_size, shard)
        teacher = teacher_of(teacher_hidden, teacher_weight, hidden, head.scale, entries, teacher_shard, **keywords)
    path = path_of(memory, skip_tiles, chunk_bytes, teacher, shard)
    terms = checked_terms(terms, hidden, vocabulary)
    checks.check_parts(return_parts)
    return loss_of_hidden(hidden, head, teacher, terms, path, backend, return_parts, carried_shard(shard))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor | Head,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    vocab_size: int | None = None,
    memory: str = "chunks",
    skip_tiles: bool = True,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    return_parts: bool | str = False,
    shard: VocabShard | None = None,
) -> Any:
    """`cross_entropy` of logits ``logit_scale·input linear_weightᵀ + linear_bias``, which never exist all at once.

    Args:
        input: hidden states (..., D).
        linear_weight, linear_bias: the head, (V, D) and (V); or a `Head`. Or several heads, as in
            `torch.nn.functional.linear_cross_entropy`: (V, d1, ..., D) and (V, d1, ...), for input (N, D) and targets
            (N, d1, ...), or (N, V, d1, ...) of probabilities; without return_parts, shard and reduction="batchmean".
        target: class indices (...), in [0, V) or `ignore_index`; or class probabilities (..., V), as in
            `cross_entropy`.
        ignore_index: as in `cross_entropy`; None, which is torch's own default, is −100.
        weight: (V) factor on each class, as in `cross_entropy`.
        token_weight: (...) factor on each token's loss; not in the denominator.
        The rest: as in `linear_f_divergence` and `cross_entropy`.

    Returns:
        As `cross_entropy`, with gradients as in `linear_f_divergence`.

    Raises:
        ValueError, TypeError: as `linear_f_divergence`.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    check_shard("shard", shard)
    checks.check_tensor("target", target, floating=False)
    checks.check_made("linear_weight", linear_weight)
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        if shard is not None:
            raise ValueError("shard splits one head; linear_weight has several: call each with its shard")
        return many_heads(
            linear_cross_entropy, input, linear_weight, target, linear_bias=linear_bias, logit_scale=logit_scale,
            logit_softcap=logit_softcap, weight=weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, token_weight=token_weight, num_items=num_items,
            vocab_size=vocab_size, memory=memory, skip_tiles=skip_tiles, chunk_bytes=chunk_bytes, backend=backend,
            return_parts=return_parts,
        )  # fmt: skip
    terms = LossTerms(
        None, labels=target, ce_weight=1.0, label_smoothing=label_smoothing, z_loss=z_loss, class_weight=weight,
        ignore_index=ignore_index, token_weight=token_weight, reduction=reduction, num_items=num_items,
    )  # fmt: skip
    head = head_of("linear_weight", linear_weight, linear_bias=linear_bias, logit_scale=logit_scale,
                   logit_softcap=logit_softcap)  # fmt: skip
    names = "input", "linear_weight", "linear_bias"
    soft = target.is_floating_point()
    path = path_of(memory, skip_tiles, chunk_bytes, Teacher(), shard)
    hidden, head, shard, _ = head_here(input, head, names, vocab_size, shard, target if soft else None)
    vocabulary, teacher = _vocabulary(head.weight.shape[0], shard), Teacher()
    if soft:
        if path.cut or shard is not None:
            what = "memory='minimal'" if shard is None else "shard"
            raise ValueError(f"{what} is for class indices as target")
        like = hidden[..., :1].expand(*hidden.shape[:-1], vocabulary)
        probabilities, terms = soft_targets(target, like, terms)
        teacher = Teacher(probabilities.reshape(-1, vocabulary))
    terms = checked_terms(terms, hidden, vocabulary, "labels" if soft else "target")
    checks.check_parts(return_parts)
    loss = loss_of_hidden(hidden, head, teacher, terms, path, backend, return_parts, carried_shard(shard))
    return as_cross_entropy(loss, return_parts) if soft else loss


def log_probs(
    hidden: Tensor,
    head: Tensor | Head,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    shard: VocabShard | None = None,
) -> Any:
    """``log q(ids)`` of q = softmax(logits/T), and q's entropy, differentiable; the logits never exist all at once.

    Args:
        hidden, head, bias, logit_scale, logit_softcap, vocab_size, chunk_bytes, backend, shard: as the student's in
            `linear_f_divergence`. With a shard, ids are of the whole vocabulary.
        ids: (...) integers in [0, V), or `ignore_index`, where both results are 0.
        entropy: also return the entropy ``−Σ q log q`` in nats, from the same logits.
        temperature: T, a number in [1e-18, 1e18]: usually the temperature at which the ids were sampled. Below 1,
            float16 hidden states and head are copied to float32.

    Returns:
        Log-probabilities (...), float32 (float64 for float64 hidden states); with `entropy` a pair of them and the
        entropies. The backward pass computes the chunks again, with the upstream factors of each row.

    Raises:
        ValueError, TypeError: as `linear_f_divergence`.
    """
    names = "hidden", "head", "bias"
    checks.check_flag("entropy", entropy)
    temperature = checks.check_number("temperature", temperature, *TEMPERATURES)
    checks.check_tensor("ids", ids, floating=False)
    given = head_of("head", head, bias=bias, logit_scale=logit_scale, logit_softcap=logit_softcap)
    check_shard("shard", shard)
    states, checked, shard, _ = head_here(hidden, given, names, vocab_size, shard)
    checked_scale("logit_scale / temperature", checked.scale / temperature)
    if temperature != 1:  # cap·tanh(z/cap)/T is a cap of z/T
        if states.dtype == torch.float16 and temperature < 1:  # it may not hold the logits over it
            states = states.float()
        bias, cap = checked.bias, checked.softcap
        checked = Head(checked.weight, None if bias is None else bias.to(states.dtype) / temperature,
                       checked.scale / temperature, None if cap is None else cap / temperature)  # fmt: skip
    terms = LossTerms(
        ENGINE if entropy else None, labels=ids, ce_weight=1.0, ignore_index=ignore_index, reduction="none"
    )
    path = path_of("chunks", True, chunk_bytes, Teacher(), shard)
    terms = checked_terms(terms, states, _vocabulary(checked.weight.shape[0], shard), "ids")
    found, entropies = log_probs_of_hidden(states, checked, terms, entropy, path, backend, carried_shard(shard))
    return found if entropies is None else (found, entropies)


def _terms(divergence: Any, **given: Any) -> LossTerms:
    """The terms: from the divergence and the keyword arguments, or a `LossTerms` given as divergence.

    Raises:
        ValueError: a `LossTerms` together with one of its fields.
    """
    if not isinstance(divergence, LossTerms):
        return LossTerms(resolve(divergence), **given)
    beside = [n for n, x in given.items() if not _same(x, LossTerms._field_defaults[n])]
    if beside:
        raise ValueError(f"{', '.join(beside)} beside divergence, a LossTerms, which has its own")
    return replaced(divergence, divergence=resolve(divergence.divergence))  # type: ignore[arg-type]


def _same(x: Any, default: Any) -> bool:
    return x is default or (isinstance(x, (str, int, float)) and x == default)


def _overwritten(name: str, logits: Tensor, terms: LossTerms | None = None, **others: Any) -> bool:
    """Whether logits given with inplace=True will be overwritten: only if they get a gradient.

    Raises:
        ValueError: their rows share memory with each other or with another argument.
    """
    trained = logits.requires_grad and torch.is_grad_enabled()
    if trained and not checks.imagined(logits):
        others |= {} if terms is None else terms._asdict()
        checks.check_overwritten(name, logits, {n: x for n, x in others.items() if isinstance(x, Tensor)})
    return trained
