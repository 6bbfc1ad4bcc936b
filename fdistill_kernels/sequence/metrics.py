"""How close a student is to its teacher: likelihood and coverage risk, TeacherDist, perplexity, and BLEU, chrF, TER.

Everything is measured sentence by sentence (`measured`), so that two students can be compared on the same sentences.
`summary` turns this table into numbers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import torch
from torch import Tensor
from transformers import TrainerCallback

from ..checks import check_integer
from ..functional import cross_entropy, f_divergence
from ..own import resolve
from .forward import forward_to_head, rows_of
from .generation import check_search, chosen, special_tokens
from .losses import Rows, step_loss
from .models import at_model, evaluating, vocabulary_of
from .sampling import Sampling, draw
from .teacher_forcing import tokens_counted
from .tokenizers import ids_of_tokenizer

BATCH = 32
#: A greedy output loops if a smaller share of its bigrams is distinct.
LOOPS_BELOW = 0.7
#: What `Measures` adds, and whether larger is better.
MEASURES = {"bleu": True, "chrf": True, **dict.fromkeys((
    "ter", "perplexity", "likelihood_risk", "coverage_risk", "likelihood_risk_by_sentence", "coverage_risk_by_sentence",
    "kl", "rkl", "tvd", "without_end", "looping"), False)}  # fmt: skip
#: Rows whose logits are made at once if there is no head to fuse with.
CHUNK = 256


def _batches(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(rows), BATCH):
        yield rows[begin : begin + BATCH]


def _check_rows(**rows: Sequence[Any]) -> None:
    """Raises ValueError unless there are as many of each, and some; TypeError unless they are tensors, or text."""
    counts = list(map(len, rows.values()))
    if not min(counts) == max(counts) > 0:
        raise ValueError(f"{', '.join(rows)} must be as many, one of each at least, not {', '.join(map(str, counts))}")
    for name, found in rows.items():
        kind, what = (str, "text") if name == "references" else (Tensor, "tensors of token ids")
        for one in found:
            if not isinstance(one, kind):
                raise TypeError(f"{name} must be {what}, a row's each, not {type(one).__name__}")


def draw_all(
    model: Any, prompts: Sequence[Tensor], sampling: Sampling, seed: int, vocabulary: int | None = None
) -> list[Tensor]:
    """A continuation of every prompt, drawn in batches, with ids below `vocabulary`."""
    made = []
    for i, batch in enumerate(_batches(prompts)):
        made += draw(model, batch, sampling, seed + i, vocabulary)
    return made


def _steps(rows: Rows, teacher: Rows | None, names: Sequence[str]) -> Tensor:
    """For M steps: −log q of the token, and each divergence from the teacher's whole distribution, (M, 1 + names)."""
    divergences = [resolve(name) for name in names]
    if rows.head is not None and len(rows.tokens):
        found = [step_loss(rows, teacher, d, reduction="none") for d in (None, *divergences)]
        return torch.stack([x.double() for x in found], 1)
    parts = [torch.zeros(0, 1 + len(names), dtype=torch.float64, device=rows.hidden.device)]
    for begin in range(0, len(rows.tokens), CHUNK):  # a head that is LoRA's sum or quantised has logits alone
        part = slice(begin, begin + CHUNK)
        logits = rows.logits(rows.hidden[part])
        found = [cross_entropy(logits, rows.tokens[part], reduction="none")]
        if teacher is not None:
            theirs = teacher.logits(teacher.hidden[part]).to(logits.device)
            shared = min(rows.vocabulary, teacher.vocabulary)
            found += [f_divergence(logits[:, :shared], theirs[:, :shared], d, reduction="none") for d in divergences]
        parts.append(torch.stack([x.double() for x in found], 1))
    return torch.cat(parts)


@torch.no_grad()
def sentence_sums(
    model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor], teacher: Any = None,
    teacher_prompts: Sequence[Tensor] = (), divergences: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For each of n continuations y: sums over its steps of what a model q says of it, and the number of steps.

    Args:
        prompts, continuations: n rows of ids. The end token of a continuation is a step; a first token that q's
            generation forces is not.
        teacher: a model p with its own teacher_prompts; None: no divergences.
        divergences: names of divergences D(p, q), of the whole distributions of p and q at each step of y.

    Returns:
        (n, 1 + divergences) float64, in nats (tvd: in its own unit): Σ_t −log q(y_t), then Σ_t D_t; and the steps (n,)
            int64.
    """
    of_teacher_alone = {} if teacher is None else {"teacher_prompts": teacher_prompts}
    _check_rows(prompts=prompts, continuations=continuations, **of_teacher_alone)
    pad, sums, counts = special_tokens(model)[0], list[Tensor](), list[int]()
    with evaluating(*(m for m in (model, teacher) if m is not None)):
        whose = teacher_prompts if teacher is not None else prompts
        for some, of_teacher, said in zip(*map(_batches, (prompts, whose, continuations)), strict=True):
            continued, theirs = at_model(model, said), None
            counted = chosen(model, continued)
            if teacher is not None:
                asked = at_model(teacher, of_teacher), at_model(teacher, said)
                theirs, _ = rows_of(teacher, *asked, special_tokens(teacher)[0], counted=counted)
            call = functools.partial(_steps, teacher=theirs, names=divergences)
            steps, _ = forward_to_head(model, at_model(model, some), continued, pad, call, counted=counted)
            of_each = tokens_counted(continued, counted)
            sums += [x.sum(0) for x in steps.cpu().split(of_each)]  # steps come sentence by sentence
            counts += of_each
    return torch.stack(sums), torch.tensor(counts)


def risk(model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor]) -> float:
    """Mean of −log probability under a model, in nats per token, over continuations.

    For the student's samples under the teacher this is the likelihood risk R_llh (high: mode averaging); for the
    teacher's samples under the student it is the coverage risk R_cvg (high: mode collapse); for gold targets it is the
    log-perplexity. The paper's formula is a mean over sentences of the whole −log probability: `measured` has both.
    """
    sums, counts = sentence_sums(model, prompts, continuations)
    return float(sums[:, 0].sum() / counts.sum().clamp_min(1))


def distinct_bigrams(rows: Sequence[Sequence[int]], ends: Sequence[int] = ()) -> float | None:
    """Share of distinct bigrams among those of several sequences, without end tokens; None if there are no bigrams."""
    kept = [[i for i in row if i not in ends] for row in rows]
    bigrams = [pair for row in kept for pair in itertools.pairwise(row)]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def teacher_dist(samples: Sequence[Sequence[Sequence[int]]], ends: Sequence[int] = ()) -> float:
    """Share of distinct bigrams among several samples of an input, averaged over inputs: how multi-modal a task is."""
    return _mean_share([distinct_bigrams(group, ends) for group in samples])


def _mean_share(shares: Sequence[float | None]) -> float:
    known = [share for share in shares if share is not None]
    return sum(known) / max(len(known), 1)


def translation_scores(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU, chrF and TER of a corpus, by sacrebleu."""
    import sacrebleu

    given = list(outputs), [list(references)]
    return {name: getattr(sacrebleu, f"corpus_{name}")(*given).score for name in ("bleu", "chrf", "ter")}


def searched(
    model: Any, prompts: Sequence[Tensor], tokenizer: Any, max_new_tokens: int, beams: int = 1,
    vocabulary: int | None = None,
) -> dict[str, list[Any]]:  # fmt: skip
    """A model's outputs by greedy or beam search: columns output (text), output_tokens, output_ended (by an end token,
    not by the limit, even if an end token is forced there), and output_loops (less than LOOPS_BELOW of its bigrams are
    distinct).
    """
    ends, own = special_tokens(model)[1], getattr(model, "generation_config", None)
    longest = max_new_tokens - (getattr(own, "forced_eos_token_id", None) is not None)  # of those that end themselves
    rows = [x.tolist() for x in draw_all(model, prompts, Sampling(max_new_tokens, beams=beams), 0, vocabulary)]
    shares = [distinct_bigrams([row], ends) for row in rows]
    return {"output": tokenizer.batch_decode(rows, skip_special_tokens=True), "output_tokens": [len(r) for r in rows],
            "output_ended": [bool(r) and r[-1] in ends and len(r) <= longest for r in rows],
            "output_loops": [share is not None and share < LOOPS_BELOW for share in shares]}  # fmt: skip


def measured(
    student: Any, teacher: Any, prompts: Sequence[Tensor], teacher_prompts: Sequence[Tensor], gold: Sequence[Tensor],
    references: Sequence[str], tokenizer: Any, sampling: Sampling, seed: int = 0, teacher_draws: int = 5,
) -> tuple[pyarrow.Table, dict[str, float]]:  # fmt: skip
    """All measures of a student q on n held-out sentences: a table of n rows, and its summary.

    The table has reference, the greedy output (`searched`), gold_nats = −log q(gold) and gold_tokens. With a teacher p
    it also has, for a sample y′ of the student, likelihood_nats = −log p(y′), likelihood_tokens, likelihood_ended and
    rkl; for a sample y of the teacher, coverage_nats = −log q(y), coverage_tokens, kl and tvd, each summed over the
    steps of y or y′ and exact in each step (Wen et al., ACL 2023, section 4); and teacher_dist of `teacher_draws`
    samples. y and y′ are drawn by `sampling`; if that cuts the tail, they come from the cut distribution, but their
    probabilities are those of the whole one. All nats are float64 natural logarithms; token counts include the end
    token.

    Args:
        student: q. teacher: p, a model; None: it is elsewhere, and the columns that need it are left out.
        prompts, teacher_prompts: ids of what each model sees; usually the same.
        gold: ids of the targets. references: their whole text; the ids may have been cut.
        sampling, seed: of y and y′. The same seed gives every student the same y.
        teacher_draws: samples of the teacher for teacher_dist (5 in the paper), at least 1; with 1 it is left out.
    """
    check_integer("teacher_draws", teacher_draws, 1)
    _check_rows(prompts=prompts, teacher_prompts=teacher_prompts, gold=gold, references=references)
    sizes = [vocabulary_of(m.config) for m in (student, teacher) if m is not None]
    shared = min(*sizes, ids_of_tokenizer(tokenizer))  # what a padded head has beyond, the other does not know
    nats, tokens = sentence_sums(student, prompts, gold)
    outputs = searched(student, prompts, tokenizer, sampling.max_new_tokens, vocabulary=shared)
    columns = {"reference": list(references), **outputs,
               "gold_nats": nats[:, 0].tolist(), "gold_tokens": tokens.tolist()}  # fmt: skip
    if teacher is not None:
        ends, of_teacher = (special_tokens(m)[1] for m in (student, teacher))
        own = draw_all(student, prompts, sampling, seed, shared)
        theirs = [draw_all(teacher, teacher_prompts, sampling, seed + 1_000_003 * i, shared)
                  for i in range(teacher_draws)]  # fmt: skip
        judged = sentence_sums(teacher, teacher_prompts, own, student, prompts, ["kl"])  # from p's side KL(q‖p) is kl
        covered = sentence_sums(student, prompts, theirs[0], teacher, teacher_prompts, ["kl", "tvd"])
        for names, (nats, tokens) in ((("likelihood", "rkl"), judged), (("coverage", "kl", "tvd"), covered)):
            columns |= {f"{names[0]}_nats": nats[:, 0].tolist(), f"{names[0]}_tokens": tokens.tolist()}
            columns |= {name: nats[:, i].tolist() for i, name in enumerate(names[1:], 1)}
        columns["likelihood_ended"] = [bool(len(y)) and int(y[-1]) in ends for y in own]
        if teacher_draws > 1:
            columns["teacher_dist"] = [distinct_bigrams([y.tolist() for y in group], of_teacher)
                                       for group in zip(*theirs, strict=True)]  # fmt: skip
    table = pyarrow.table(columns)
    return table, summary(table)


def summary(table: pyarrow.Table) -> dict[str, float]:
    """The summary of `measured`'s table. likelihood_risk, coverage_risk, kl, rkl and tvd are means over all tokens;
    likelihood_risk_by_sentence and coverage_risk_by_sentence are means over sentences of the whole −log probability (as
    in the paper). Also perplexity of the gold targets; length_ratio: words of the outputs over words of the references;
    shares of outputs without an end token and of outputs that loop; teacher_dist; BLEU, chrF and TER of the outputs.
    """
    values = {name: table[name].to_pylist() for name in table.column_names}

    def of(name: str, by: str) -> float:
        return sum(values[name]) / max(sum(values[by]), 1)

    found = {"perplexity": float(torch.tensor(of("gold_nats", "gold_tokens")).exp())}
    if "kl" in values:
        for name in ("likelihood", "coverage"):
            found[f"{name}_risk"] = of(f"{name}_nats", f"{name}_tokens")
            found[f"{name}_risk_by_sentence"] = sum(values[f"{name}_nats"]) / max(len(table), 1)
        found |= {name: of(name, f"{whose}_tokens")
                  for name, whose in (("kl", "coverage"), ("tvd", "coverage"), ("rkl", "likelihood"))}  # fmt: skip
    if "teacher_dist" in values:
        found["teacher_dist"] = _mean_share(values["teacher_dist"])
    words, of_reference = (sum(len(x.split()) for x in values[name]) for name in ("output", "reference"))
    return {**found, "length_ratio": words / max(of_reference, 1),
            "without_end": 1 - sum(values["output_ended"]) / max(len(table), 1),
            "looping": sum(values["output_loops"]) / max(len(table), 1),
            **translation_scores(values["output"], values["reference"])}  # fmt: skip


class Measures(TrainerCallback):
    """Adds `measured`'s summary, without teacher_dist, to every evaluation and its log, for reports and the best model.

    log: the trainer's; the others as of `measured`.
    """

    def __init__(
        self, log: Any, teacher: Any, prompts: Sequence[Tensor], teacher_prompts: Sequence[Tensor],
        gold: Sequence[Tensor], references: Sequence[str], tokenizer: Any, sampling: Sampling,
    ):  # fmt: skip
        self.log, self.teacher, self.tokenizer, self.sampling = log, teacher, tokenizer, sampling
        self.rows: dict[str, Any] = dict(
            prompts=prompts, teacher_prompts=teacher_prompts, gold=gold, references=references
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the trainer; refuses, before any step, a student whose outputs cannot be made, and rows that do not
        belong together.
        """
        check_search(given["model"])
        _check_rows(**self.rows)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Called by the trainer."""
        _, found = measured(given["model"], self.teacher, **self.rows, tokenizer=self.tokenizer,
                            sampling=self.sampling, teacher_draws=1)  # fmt: skip
        measures = {f"eval_{name}": value for name, value in found.items()}
        given["metrics"].update(measures)
        self.log(measures)
