"""How close a student is to its teacher: likelihood and coverage risk, TeacherDist, perplexity, and BLEU, chrF, TER."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .models import forward_to_head, step_loss
from .sampling import Sampling, draw, special_tokens

BATCH = 32


def _batches(rows: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    for begin in range(0, len(rows), BATCH):
        yield rows[begin : begin + BATCH]


def draw_all(
    model: Any, prompts: Sequence[Tensor], sampling: Sampling, seed: int, vocabulary: int | None = None
) -> list[Tensor]:
    """A continuation for every prompt, in batches, of ids below the vocabulary."""
    made = []
    for i, batch in enumerate(_batches(prompts)):
        made += draw(model, batch, sampling, seed + i, vocabulary)
    return made


@torch.no_grad()
def risk(model: Any, prompts: Sequence[Tensor], continuations: Sequence[Tensor]) -> float:
    """Mean −log probability, in nats a token, of continuations under a model.

    Of the student's samples under the teacher this is the likelihood risk R_llh (high: mode averaging), of the
    teacher's samples under the student the coverage risk R_cvg (high: mode collapse), of gold targets the
    log-perplexity.
    """
    training, total, tokens = model.training, 0.0, 0
    model.eval()
    device = next(model.parameters()).device
    for some, theirs in zip(_batches(prompts), _batches(continuations), strict=True):
        moved, continued = ([x.to(device) for x in rows] for rows in (some, theirs))
        pad = special_tokens(model)[0]
        loss, _ = forward_to_head(model, moved, continued, pad, lambda rows: step_loss(rows, None, None))
        total += float(loss)
        tokens += sum(map(len, theirs))
    model.train(training)
    return total / max(tokens, 1)


def teacher_dist(samples: Sequence[Sequence[Sequence[int]]]) -> float:
    """Share of distinct bigrams among several samples of an input, averaged over inputs: how multi-modal a task is."""
    shares = []
    for group in samples:
        bigrams = [(a, b) for row in group for a, b in itertools.pairwise(row)]
        if bigrams:
            shares.append(len(set(bigrams)) / len(bigrams))
    return sum(shares) / max(len(shares), 1)


def translation_scores(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """sacrebleu's BLEU, chrF and TER of a corpus."""
    import sacrebleu

    references_once = [list(references)]
    return {"bleu": sacrebleu.corpus_bleu(list(outputs), references_once).score,
            "chrf": sacrebleu.corpus_chrf(list(outputs), references_once).score,
            "ter": sacrebleu.corpus_ter(list(outputs), references_once).score}  # fmt: skip


def evaluate(
    student: Any, teacher: Any, prompts: Sequence[Tensor], teacher_prompts: Sequence[Tensor], gold: Sequence[Tensor],
    references: Sequence[str], tokenizer: Any, sampling: Sampling, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Every measure of a student on held-out data; outputs for BLEU, chrF and TER are by greedy search.

    teacher: a model; None: it is elsewhere, and the risks, which it draws and judges for, are left out.
    teacher_prompts: what the teacher sees in the prompts' place; most often the same. gold: ids of the targets.
    references: their whole text, which the ids may have been cut from.
    """
    greedy = _Greedy(sampling.max_new_tokens)
    sizes = [m.config.get_text_config().vocab_size for m in (student, teacher) if m is not None]
    shared = min(*sizes, len(tokenizer))  # what a padded head has beyond, the other does not know
    outputs = draw_all(student, prompts, greedy, seed, shared)
    text = tokenizer.batch_decode([x.tolist() for x in outputs], skip_special_tokens=True)
    of_teacher = {}
    if teacher is not None:
        of_teacher = {
            "likelihood_risk": risk(teacher, teacher_prompts, draw_all(student, prompts, sampling, seed, shared)),
            "coverage_risk": risk(student, prompts, draw_all(teacher, teacher_prompts, sampling, seed, shared)),
        }
    perplexity = float(torch.tensor(risk(student, prompts, gold)).exp())
    return {"perplexity": perplexity, **of_teacher, **translation_scores(text, references)}


class _Greedy(Sampling):
    def keywords(self) -> dict[str, Any]:
        return dict(do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens)


class Measures(TrainerCallback):
    """Adds `evaluate`'s measures to every evaluation's log, and so to the reports."""

    def __init__(self, teacher: Any, prompts: Sequence[Tensor], teacher_prompts: Sequence[Tensor],
                 gold: Sequence[Tensor], references: Sequence[str], tokenizer: Any, sampling: Sampling,
                 log: Any):  # fmt: skip
        self.arguments = (teacher, prompts, teacher_prompts, gold, references, tokenizer, sampling)
        self.log = log

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called by the trainer."""
        teacher, *rest = self.arguments
        measures = evaluate(model, teacher, *rest)
        self.log({f"eval_{k}": v for k, v in measures.items()})
