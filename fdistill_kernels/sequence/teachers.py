"""What can be a teacher: a model, a store of what one said, a server, several of them, or the student itself.

Each gives the rows that a batch's steps are compared with; some also draw sequences:

    rows(prompts, continuations, device, pack, counted) -> TeacherRows
    draw(prompts, sampling, vocabulary) -> continuations
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from .. import products
from ..backends.rows import capped
from ..sparse import TopK, checked_tail
from ..teachers import Endpoint, TeacherStore
from ..teachers.connection import without_credentials
from ..values import Hidden, RowFunction
from .batches import prompts_of_teacher
from .forward import rows_of
from .generation import special_tokens
from .loading import load_model
from .losses import TeacherRows, of_model
from .models import evaluating, vocabulary_of
from .probes import check_forward
from .sampling import Sampling, draw
from .teacher_forcing import tokens_counted

#: Batches that a server may be asked for before they are used; accelerate's loaders are one batch ahead.
AHEAD = 4
#: Logits that are made at a time where no more are needed at once: 16 MiB in float32.
ENTRIES = 1 << 22


class Batch(NamedTuple):
    """What a teacher is asked about; counted: as in `teacher_forced`."""

    prompts: Sequence[Tensor]
    continuations: Sequence[Tensor]
    device: torch.device
    pack: bool
    counted: Sequence[Tensor] | None


class Teacher:
    """What the trainer needs of a teacher.

    Attributes:
        vocabulary: number of ids it knows.
        encoder_decoder: whether it is an encoder–decoder model; otherwise it is causal.
        anything: whether it has rows for sequences it has not been given before, such as the student's samples.
        whole: whether it knows the probability of every id, as a mixture needs.
    """

    vocabulary: int
    encoder_decoder: bool
    anything: bool
    whole: bool

    def rows(
        self, prompts: Sequence[Tensor], continuations: Sequence[Tensor], device: torch.device, pack: bool = False,
        counted: Sequence[Tensor] | None = None,
    ) -> TeacherRows:  # fmt: skip
        """The rows of a batch's continuations, one after the other; counted: as in `teacher_forced`."""
        return self._rows(Batch(prompts, continuations, device, pack, counted))

    def _rows(self, batch: Batch) -> TeacherRows:
        raise NotImplementedError

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """A continuation of each prompt."""
        raise NotImplementedError


def is_url(path: Any) -> bool:
    """Whether a teacher's path is a server's URL."""
    return str(path).lower().startswith(("http://", "https://"))


def is_store(path: str | Path) -> bool:
    """Whether a folder is that of a `TeacherStore`."""
    return (Path(path) / "manifest.json").exists() and (Path(path) / "shards").exists()


def teacher_of(given: Any) -> Teacher:
    """The teacher for a model, a path (a store's folder, or a model's folder or hub name), a store or an endpoint.

    Raises:
        TypeError: anything else. ValueError: a URL, which does not tell enough about its server.
    """
    if isinstance(given, (str, Path)):
        if is_url(given):
            raise ValueError(f"give fk.Endpoint({without_credentials(str(given))!r}, vocabulary=...) for a server")
        return teacher_of(TeacherStore(given) if is_store(given) else load_model(given))
    if isinstance(given, TeacherStore):
        return Stored(given)
    if isinstance(given, Endpoint):
        return Served(given)
    if isinstance(given, Teacher):
        return given
    if isinstance(given, torch.nn.Module) and hasattr(given, "config"):
        return InRoom(given)
    raise TypeError(
        "a teacher is a Hugging Face model, a path, a TeacherStore, an Endpoint, OfRows, Itself, or of several "
        f"Mixture([...]), not {type(given).__name__}"
    )


def parts_of(teacher: Teacher) -> list[Teacher]:
    """A teacher, or of a `Mixture` or `OfRows` those that it is of."""
    several = getattr(teacher, "teachers", None)
    if several is None:
        return [teacher]
    return [part for one in (several.values() if isinstance(several, dict) else several) for part in parts_of(one)]


class InRoom(Teacher):
    """A model at hand, of any dtype or device, quantised or not. It is never trained."""

    anything = whole = True

    def __init__(self, model: Any):
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary_of(model.config)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)

    def to(self, device: torch.device) -> None:
        """Moves the model to the student's device, unless it was placed explicitly."""
        if getattr(self.model, "hf_device_map", None) is None and not getattr(self.model, "is_quantized", False):
            at = next(self.model.parameters()).device
            if at.type == "cpu" and device.type != "cpu":
                self.model.to(device)

    def check(self, pack: bool) -> None:
        """Raises ValueError as `probes.check_forward`."""
        check_forward(self.model, self.model, _pad(self.model), pack)

    def _rows(self, batch: Batch) -> TeacherRows:
        return _rows_of(self.model, batch)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """As `Teacher.draw`."""
        return draw(self.model, prompts, sampling, None, vocabulary)


class Stored(Teacher):
    """A `TeacherStore`: works without the teacher's weights, but knows only the sequences in the store.

    Args:
        tail: for a store of top-k lists, as in `TopK`.
    """

    anything = False

    def __init__(self, store: TeacherStore, tail: str = "bucket"):
        self.store, self.tail, self.vocabulary = store, checked_tail(tail), store.vocabulary
        self.whole = store.kind == "hidden"
        if self.whole and tail != "bucket":
            raise ValueError(f"tail={tail!r} is of lists, and {store.folder} holds hidden states")
        self.encoder_decoder = bool(store.extra.get("encoder_decoder", False))

    def _rows(self, batch: Batch) -> TeacherRows:
        pairs = [(p.tolist(), c.tolist()) for p, c in zip(batch.prompts, batch.continuations, strict=True) if len(c)]
        if not pairs:
            return TeacherRows(lambda begin, end: torch.empty(0, self.vocabulary), self.vocabulary)
        found = self.store.targets([p for p, _ in pairs], [c for _, c in pairs], tail=self.tail)
        return TeacherRows(_moved(found, batch), self.vocabulary)

    def check(self, name: str, rows: Any, columns: Sequence[str]) -> None:
        """Checks that all sequences of a dataset's columns are in the store.

        Raises:
            ValueError: some are not; the message says which, and what the store was built from.
        """
        prompts = rows[prompts_of_teacher(rows.column_names)][:]
        for column in columns:
            pairs = list(zip(prompts, rows[column][:], strict=True))
            there = [i for i, (_, c) in enumerate(pairs) if len(c)]
            lacking = [there[i] for i in self.store.missing([pairs[i] for i in there])]
            if lacking:
                shown = ", ".join(map(str, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
                made = self.store.extra.get("job", {})
                of = ", ".join(f"{n} {made[n]}" for n in ("data", "limit", "max_new_tokens", "sequences") if n in made)
                damaged = f"; damaged: {', '.join(self.store.damaged)}" if self.store.damaged else ""
                raise ValueError(
                    f"{len(lacking)} of {len(pairs)} sequences of {name} ({column}: {shown}) are not in the store "
                    f"{self.store.folder}{', which was built of ' + of if of else ''}{damaged}"
                )

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """Refused: a store cannot draw."""
        raise ValueError(
            f"the teacher is the store {self.store.folder}, which draws nothing: give the data the column sample_ids, "
            "or take a teacher that is at hand"
        )


class Served(Teacher):
    """An `Endpoint`: a server scores any sequence by top-k lists or hidden states."""

    anything, encoder_decoder = True, False

    def __init__(self, endpoint: Endpoint, tail: str = "bucket"):
        self.endpoint, self.tail, self.vocabulary = endpoint, checked_tail(tail), endpoint.vocabulary
        self.whole = endpoint.kind == "vllm_hidden"
        self._ahead: dict[Any, Any] = {}  # what has been asked for and not been used

    def expect(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> None:
        """Starts the requests for a batch whose rows are needed soon."""
        while len(self._ahead) > AHEAD:  # of batches that nobody came for
            self._ahead.pop(next(iter(self._ahead)))
        self._ahead[_batch_key(prompts, continuations)] = self.endpoint.ask(prompts, continuations)

    def _rows(self, batch: Batch) -> TeacherRows:
        asked = [p.tolist() for p in batch.prompts], [c.tolist() for c in batch.continuations]
        begun = self._ahead.pop(_batch_key(*asked), None) or self.endpoint.ask(*asked)
        return TeacherRows(_moved(begun(self.tail), batch), self.vocabulary)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """As `Teacher.draw`; the seed of a batch is the next number of torch's generator."""
        seed = int(torch.randint(2**31, ()))
        return self.endpoint.draw([p.cpu() for p in prompts], sampling, seed, vocabulary)


class Mixture(Teacher):
    """Several teachers as one, with weights w: ``p = Σ w p_i``, or with geometric=True ``p ∝ Π p_i^w``.

    Args:
        teachers: anything that `teacher_of` takes. Vocabularies may be padded differently; the shared part counts.
        weights: one positive number for each, scaled to a sum of 1. Default: equal.
        geometric: as above. The mixture is of the distributions at temperature 1; the loss applies its temperature to
            it.

    Raises:
        ValueError: weights that do not fit, causal teachers together with encoder–decoder ones, or a teacher that knows
            only lists of ids, which cannot be mixed.
    """

    whole = True

    def __init__(self, teachers: Sequence[Any], weights: Sequence[float] | None = None, geometric: bool = False):
        self.teachers = [teacher_of(t) for t in teachers]
        weights = [1.0] * len(self.teachers) if weights is None else list(weights)
        if not self.teachers or len(weights) != len(self.teachers) or not all(0 < w < math.inf for w in weights):
            raise ValueError(f"a Mixture needs a positive weight for each of {len(self.teachers)} teachers: {weights}")
        self.weights, self.geometric = [w / sum(weights) for w in weights], geometric
        self.vocabulary, self.encoder_decoder = _alike(self.teachers)
        self.anything = all(t.anything for t in self.teachers)

    def _rows(self, batch: Batch) -> TeacherRows:
        of_each = [logits_function(t.rows(*batch), batch.device) for t in self.teachers]

        @torch.no_grad()
        def logits(begin: int, end: int) -> Tensor:
            logs = [f(begin, end)[:, : self.vocabulary].float().log_softmax(-1) for f in of_each]
            if self.geometric:
                return sum(w * x for w, x in zip(self.weights, logs, strict=True))  # type: ignore[return-value]
            return torch.stack([x + math.log(w) for w, x in zip(self.weights, logs, strict=True)]).logsumexp(0)

        return TeacherRows(logits, self.vocabulary)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """A continuation of each prompt by one teacher, chosen by weight: a sample of the mixture of sequences."""
        if self.geometric:
            raise ValueError("a geometric Mixture draws nothing: give the data the column sample_ids")
        chosen = torch.multinomial(torch.tensor(self.weights), len(prompts), replacement=True).tolist()
        return _by_teacher(self.teachers, chosen, prompts, sampling, vocabulary)


class OfRows(Teacher):
    """One teacher for each example, named in its column `teacher`: OfRows({"math": ..., "code": ...})."""

    whole = True

    def __init__(self, teachers: dict[str, Any]):
        if not teachers:
            raise ValueError("OfRows needs a teacher at least")
        self.teachers = {str(name): teacher_of(t) for name, t in teachers.items()}
        self.vocabulary, self.encoder_decoder = _alike(list(self.teachers.values()))
        self.anything = all(t.anything for t in self.teachers.values())
        self.names: list[str] = []  # of the batch's examples

    def choose(self, names: Sequence[str]) -> None:
        """Sets the teachers of the next batch's examples.

        Raises:
            ValueError: an unknown name.
        """
        unknown = [n for n in names if n not in self.teachers]
        if unknown:
            raise ValueError(f"an example names the teacher {unknown[0]!r}; known: {', '.join(self.teachers)}")
        self.names = list(names)

    def _rows(self, batch: Batch) -> TeacherRows:
        """The examples of each teacher are computed together, then put in the batch's order."""
        prompts, continuations, device, pack, counted = batch
        if len(self.names) != len(prompts):
            raise ValueError(f"{len(prompts)} examples, and the column teacher names {len(self.names)} teachers")
        lengths = torch.tensor(tokens_counted(continuations, counted))
        owner = torch.empty(int(lengths.sum()), dtype=torch.long)
        place, functions = torch.empty_like(owner), []
        starts = lengths.cumsum(0) - lengths
        for i, (name, teacher) in enumerate(self.teachers.items()):
            mine = [n for n, known in enumerate(self.names) if known == name]
            at = torch.cat([owner.new_empty(0), *(torch.arange(int(lengths[n])) + starts[n] for n in mine)])
            owner[at], place[at] = i, torch.arange(len(at))
            if mine:
                of_mine = None if counted is None else [counted[n] for n in mine]
                rows = teacher.rows([prompts[n] for n in mine], [continuations[n] for n in mine], device, pack, of_mine)
            functions.append(logits_function(rows, device) if mine else None)
        return TeacherRows(_interleaved(functions, owner, place, self.vocabulary), self.vocabulary)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """As `Teacher.draw`."""
        order, teachers = list(self.teachers), list(self.teachers.values())
        return _by_teacher(teachers, [order.index(n) for n in self.names], prompts, sampling, vocabulary)


def _interleaved(functions: list[Any], owner: Tensor, place: Tensor, vocabulary: int) -> RowFunction:
    """Rows of several functions: row n is the owner's row at place."""

    @torch.no_grad()
    def logits(begin: int, end: int) -> Tensor:
        out: Tensor | None = None
        for i, function in enumerate(functions):
            here = (owner[begin:end] == i).nonzero().squeeze(1)
            if not len(here):
                continue
            places = place[begin:end][here]  # one after the other, since examples keep their order
            made = function(int(places[0]), int(places[-1]) + 1)[:, :vocabulary].float()
            out = made.new_empty(end - begin, vocabulary) if out is None else out
            out[here.to(out.device)] = made
        assert out is not None
        return out

    return logits


class Itself(Teacher):
    """The student as its own teacher (self-distillation): seen with the example's teacher_prompt_ids, as the moving
    average of its weights, or with its PEFT adapter off.

    Args:
        decay: of the average after each update, ``a ← decay·a + (1 − decay)·weights``, kept in the checkpoints; None:
            the student as it is.
        adapter: False: the student's base model, which its adapter was put on and which stays as it is.

    Raises:
        ValueError: decay is outside (0, 1), or of a student whose adapter is off.
    """

    anything = whole = True

    def __init__(self, decay: float | None = None, adapter: bool = True):
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), not {decay!r}")
        if decay is not None and not adapter:
            raise ValueError("the base model below an adapter does not change: give decay or adapter=False, not both")
        self.decay, self.adapter = decay, adapter
        self.student: Any = None
        self.average: Any = None
        self._exact: dict[str, Tensor] = {}
        self.vocabulary, self.encoder_decoder = 0, False

    def bind(self, student: Any) -> None:
        """Sets the student.

        Raises:
            ValueError: adapter is False, and the student has no adapter.
        """
        if not self.adapter and not hasattr(student, "disable_adapter"):
            raise ValueError(f"Itself(adapter=False) needs a PEFT model, and the student is a {type(student).__name__}")
        self.student = student
        self.vocabulary = vocabulary_of(student.config)
        self.encoder_decoder = bool(student.config.is_encoder_decoder)
        if self.decay is not None:
            self.average, self._exact = copy.deepcopy(student).eval().requires_grad_(False), {}

    def to(self, device: torch.device) -> None:
        """Moves the average where the student is."""
        if self.average is not None:
            self.average.to(device)

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[Any]:
        """The model as the teacher: without dropout, and with the adapter off if so asked."""
        model = self.model
        with evaluating(model), contextlib.nullcontext() if self.adapter else model.disable_adapter():
            yield model

    @property
    def model(self) -> Any:
        """The model that acts as teacher."""
        return self.student if self.average is None else self.average

    def exact(self) -> dict[str, Tensor]:
        """The average's tensors, one that is tied once, by name; none narrower than float32, in which a small share of
        the student's move is not lost.
        """
        if not self._exact:
            self._exact = {name: x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
                           for name, x in _tensors(self.average).items()}  # fmt: skip
        return self._exact

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the student: moves the average."""
        if self.average is None:
            return
        assert self.decay is not None and self.student is not None
        theirs = _tensors(self.student)
        for name, mine in _tensors(self.average).items():
            exact = self.exact()[name]
            if exact.is_floating_point():
                exact.lerp_(theirs[name].to(exact), 1 - self.decay)
            else:
                exact.copy_(theirs[name])
            mine.copy_(exact)

    @torch.no_grad()
    def load(self, checkpoint: str | Path) -> None:
        """Continues from a checkpoint's average.

        Raises:
            FileNotFoundError: the checkpoint has none.
        """
        from safetensors.torch import load_file

        if self.average is None:
            return
        path = Path(checkpoint) / KeepAverage.FILE
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: the checkpoint is of a run without Itself(decay=...)")
        kept = load_file(path)
        for name, mine in _tensors(self.average).items():
            mine.copy_(self.exact()[name].copy_(kept[name]))

    def _rows(self, batch: Batch) -> TeacherRows:
        with self._speaking() as model:
            return _rows_of(model, batch)

    def draw(self, prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int) -> list[Tensor]:
        """As `Teacher.draw`."""
        with self._speaking() as model:
            return draw(model, prompts, sampling, None, vocabulary)


class KeepAverage(TrainerCallback):
    """Moves the average of `Itself` after each update, and saves it in checkpoints."""

    FILE = "average.safetensors"

    def __init__(self, teacher: Itself):
        self.teacher = teacher

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each update."""
        self.teacher.update()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beside the trainer's own files."""
        from safetensors.torch import save_file

        if state.is_world_process_zero and self.teacher.average is not None:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            save_file({name: x.contiguous() for name, x in self.teacher.exact().items()}, folder / self.FILE)


def _tensors(model: Any) -> dict[str, Tensor]:
    """A model's parameters and buffers by name, those that are tied once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _pad(model: Any) -> int:
    """An id for what attention masks out; of a model that cannot generate, any."""
    try:
        return special_tokens(model)[0]
    except ValueError:
        return 0


@torch.no_grad()
def _rows_of(model: Any, batch: Batch) -> TeacherRows:
    """A model's rows, without a graph."""
    at, (_, _, device, pack, counted) = next(model.parameters()).device, batch
    prompts, continuations = ([x.to(at) for x in rows] for rows in batch[:2])
    return of_model(rows_of(model, prompts, continuations, _pad(model), pack=pack, counted=counted)[0], device)


def _batch_key(prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Any:
    return tuple((tuple(p), tuple(c)) for p, c in zip(prompts, continuations, strict=True))


def logits_function(rows: TeacherRows, device: torch.device) -> RowFunction:
    """A teacher's rows as a function from a range to logits.

    Raises:
        TypeError: the rows are lists of ids, without logits for the other ids.
    """
    value = rows.value
    if isinstance(value, TopK):
        raise TypeError("a list of ids has no logits of the others")
    if isinstance(value, Hidden):
        states, head = value

        @torch.no_grad()
        def logits(begin: int, end: int) -> Tensor:
            out = states.new_empty(end - begin, head.weight.shape[0])
            products.logits_(states[begin:end], head, out)
            return capped(out.float(), head.softcap).to(device)

        return logits
    return value


def logits_in_pieces(
    rows: TeacherRows, device: torch.device, begin: int, end: int
) -> Iterator[tuple[int, int, Tensor]]:
    """The logits of a few rows at a time: the first row, the row after the last, and the logits (n, V) in float32."""
    logits, step = logits_function(rows, device), max(1, ENTRIES // rows.vocabulary)
    for n in range(begin, end, step):
        yield n, min(n + step, end), logits(n, min(n + step, end))[:, : rows.vocabulary].float()


def _by_teacher(
    teachers: Sequence[Teacher], chosen: Sequence[int], prompts: Sequence[Tensor], sampling: Sampling, vocabulary: int
) -> list[Tensor]:
    """Continuations of prompts, each by the teacher of its number."""
    made: list[Any] = [None] * len(prompts)
    for i in sorted(set(chosen)):
        mine = [n for n, owner in enumerate(chosen) if owner == i]
        for n, row in zip(mine, teachers[i].draw([prompts[n] for n in mine], sampling, vocabulary), strict=True):
            made[n] = row
    return made


def _alike(teachers: Sequence[Teacher]) -> tuple[int, bool]:
    """The vocabulary that they share, and which kind they are."""
    if any(isinstance(t, (Itself, OfRows)) for t in teachers):
        raise ValueError("Itself and OfRows are a run's teacher, and not one of several")
    if len({t.encoder_decoder for t in teachers}) > 1:
        raise ValueError("the teachers must all be causal, or all encoder–decoder")
    if not all(t.whole for t in teachers):
        raise ValueError("one of several teachers knows lists of ids alone: a mixture needs whole distributions, of "
                         "models or of stores of hidden states")  # fmt: skip
    return min(t.vocabulary for t in teachers), teachers[0].encoder_decoder


def _moved(value: Any, batch: Batch) -> Any:
    """A list or hidden states on the batch's device, without the rows that do not count."""
    here = slice(None) if batch.counted is None else torch.cat(list(batch.counted)).cpu()
    if isinstance(value, TopK):
        return value._replace(ids=value.ids[here].to(batch.device), log_probs=value.log_probs[here].to(batch.device))
    states, head = value
    return Hidden(states[here].to(batch.device), head.with_each(lambda x: x.to(batch.device)))
