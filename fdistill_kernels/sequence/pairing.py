"""Student, teacher and objective together: what is refused before any work because one does not fit another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..sparse import WHOLE
from .config import OF_PREDISTILLATION, FDistillConfig, is_changed, not_used
from .generation import beginning
from .loading import load_student
from .models import check_reads, ids_read, virtual_tokens, vocabulary_of
from .objectives import Half
from .ranks import row_group
from .teachers import InRoom, Mixture, OfRows, Stored, Teacher
from .teachers.several import parts_of
from .tokenizers import check_ids


def student_of(given: Any, teacher: Any) -> Any:
    """A student of a model or a path, which shares no weights with its teacher, as this is given."""
    model = load_student(given).float() if isinstance(given, (str, Path)) else given
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a Hugging Face model or a path of one, not {type(model).__name__}")
    packs = "support_avx512bf16_for_cpu"  # bitsandbytes: its 4-bit layers pack what they evaluate, for good, and no
    for module in model.modules():  # gradient passes packed ones
        if getattr(module, packs, False):
            setattr(module, packs, False)
            module.state_dict()  # unpacks
    _check_apart(model, teacher)
    return model


def models_of(teacher: Teacher) -> list[Any]:
    """The models at hand of a teacher, but the student itself."""
    return [part.model for part in parts_of(teacher) if isinstance(part, InRoom)]


def _check_apart(student: nn.Module, teacher: Any) -> None:
    """Raises ValueError where a teacher has weights of the student, which would not be trained then."""
    theirs = set(map(id, teacher.parameters())) if isinstance(teacher, nn.Module) else set()
    if any(id(p) in theirs for p in student.parameters()):
        raise ValueError("student and teacher share weights, and a teacher's are not trained: for a student that is "
                         "its own teacher, or its base model below an adapter, give Itself, else a copy")  # fmt: skip


def check_pair(student: Any, teacher: Teacher) -> None:
    """Raises ValueError for models that are of different kinds, read more than text, begin sequences otherwise, share
    weights, or are split over ranks otherwise.
    """
    at_hand = models_of(teacher)
    for model in at_hand:
        _check_apart(student, model)
    for model in (student, *at_hand):
        check_reads(model)
    if teacher.encoder_decoder != bool(student.config.is_encoder_decoder):
        made = any(isinstance(part, Stored) and not part.encoder_decoder for part in parts_of(teacher))
        raise ValueError("teacher and student must both be causal, or both encoder–decoder" + made * (
            ": a store of an encoder–decoder's is made with extra={'encoder_decoder': True}"))  # fmt: skip
    of_each = [beginning(m)[1] for m in (student, *at_hand) if m.config.is_encoder_decoder]
    if len(set(of_each) - {None}) > 1:
        raise ValueError(f"generation is forced to begin with other tokens by student and teacher, {of_each}: set "
                         "the same forced_bos_token_id in their generation configs")  # fmt: skip
    if isinstance(teacher, InRoom) and row_group(teacher.model) is not None and row_group(student) is None:
        raise ValueError("the teacher is split over ranks with the same rows, and the student is not, whose ranks "
                         "have each their own")  # fmt: skip


def check_tokenizers(student: Any, teacher: Teacher, tokenizers: Sequence[Any]) -> None:
    """Raises ValueError for a student's or teacher's tokenizer (None: not known) with more ids than its model."""
    own = {"student": vocabulary_of(student.config), "teacher": teacher.vocabulary}
    read = max(map(ids_read, (student, *models_of(teacher)))) if teacher.encoder_decoder else 0
    for (whose, most), tokenizer in zip(own.items(), tokenizers, strict=True):
        if hasattr(tokenizer, "get_vocab"):
            check_ids(tokenizer, whose, max(most, read))


def check_objective(args: FDistillConfig, student: Any, teacher: Teacher) -> None:
    """Raises ValueError for options that an objective makes nothing of or has not with such models, and for sequences
    or hidden states that the teacher cannot have.
    """
    halves = args.halves()
    if args.pack and student.config.is_encoder_decoder:
        raise ValueError("pack puts a causal model's batch in one row; the student is an encoder–decoder")
    adapter = getattr(student, "active_peft_config", None)
    if args.gradient_checkpointing and getattr(adapter, "peft_type", None) == "PREFIX_TUNING":
        raise ValueError("gradient_checkpointing runs layers again without the keys and values that prefix tuning puts "
                         "before theirs: leave it out")  # fmt: skip
    for name in OF_PREDISTILLATION if halves else ():
        if is_changed(args, name):
            raise not_used(args, name, "but by predistill")
    if is_changed(args, "beams") and halves and all(half.source != "beam" for half in halves):
        raise not_used(args, "beams", "but by an objective on beam sequences")
    if any(half.divergence is not None for half in halves):
        _check_comparison(args, halves, teacher)
    if halves:
        return
    if not isinstance(teacher, InRoom):
        raise ValueError("predistill matches hidden states with those of a model that is at hand: give that model")
    if virtual_tokens(student) or virtual_tokens(teacher.model):
        raise ValueError("predistill matches hidden states token by token, and PEFT's virtual tokens have none on "
                         "the other side: pre-distil the model before it gets them")  # fmt: skip


def _check_comparison(args: FDistillConfig, halves: Sequence[Half], teacher: Teacher) -> None:
    """Raises ValueError for options of the loss, or sequences, that it has not with such a teacher."""
    if args.memory == "minimal" and isinstance(teacher, (Mixture, OfRows)):
        raise ValueError(f"memory='minimal' needs the teacher's hidden states, and {type(teacher).__name__} "
                         "gives logits: take memory='chunks'")  # fmt: skip
    taken = teacher.temperature
    if taken not in (None, args.temperature):
        raise ValueError(f"temperature={args.temperature:g}, but the teacher's lists were taken at {taken:g}: give "
                         f"temperature={taken:g}, or the lists one of the tails {', '.join(WHOLE)}")  # fmt: skip
    if not teacher.anything and any(h.source == "student" and h.divergence is not None for h in halves):
        raise ValueError("the objective compares on the student's samples, which a store has never seen: take "
                         "method kl, or a divergence on shares of teacher and gold, or a teacher that is at hand, "
                         "or an Endpoint")  # fmt: skip


def prepare_embeddings(model: Any, args: FDistillConfig) -> None:
    """Freezes a student's embeddings if asked for; raises ValueError for noise on one that it does not read by."""
    if args.gradient_checkpointing:  # layers whose input wants no gradient would have none: transformers 5 sees to it
        model.enable_input_require_grads()
    if not (args.freeze_embeddings or args.neftune_noise_alpha):
        return
    halves = (model.get_encoder(), model.get_decoder()) if model.config.is_encoder_decoder else ()
    embeddings = [part.get_input_embeddings() if hasattr(part, "get_input_embeddings") else part.embed_tokens  # FSMT's
                  for part in (model, *halves)]  # fmt: skip
    for embedding in embeddings if args.freeze_embeddings else ():
        embedding.requires_grad_(False)
    if args.neftune_noise_alpha and len(set(embeddings[:2])) > 1:
        raise ValueError(f"neftune_noise_alpha={args.neftune_noise_alpha} is not used: {type(model).__name__} "
                         "reads by its encoder's embedding, and the noise is on another: leave it out")  # fmt: skip
