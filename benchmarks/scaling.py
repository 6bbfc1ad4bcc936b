"""What the losses cost on 1 to 1024 GPUs: a model, whose counts are checked against runs on 1, 2 and 4 CPU processes.

    python -m benchmarks.scaling            counts, models, draws docs/scaling.png

Products, collectives and their bytes are those of a run, exactly; the peak of memory within MEMORY_WITHIN; operators
and bytes of a split row's arithmetic are counted, and carried to larger shapes in proportion. Times are a model alone:
no more than one GPU has run these losses. docs/scaling.md has the formulas.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fdistill_kernels as fk
from fdistill_kernels import backends, chunks, linear, products
from fdistill_kernels.backends.chunked import CHUNK_ELEMENTS
from fdistill_kernels.backends.sharded import HALVINGS
from fdistill_kernels.provenance import provenance

RESULT = Path(__file__).parent / "results" / "scaling.json"
PLOT = Path(__file__).parent.parent / "docs" / "scaling.png"
#: How far the modelled peak of memory may be from a run's.
MEMORY_WITHIN = 1.3
#: Sums that a divergence asks of its rows, before those of D.
STATISTICS = {"lk": 2, "renyi": 2, "akl": 2, "entropy_gated": 1, "csd": 1, "tail_aware": 5, "dkd": 5}
#: The arithmetic's and a sum's bytes.
WIDE, SUM = 4, 8
#: Temporaries of a piece's size that are alive at once where the vocabulary is split, and of the piece before.
TEMPORARIES, BEFORE = 18, 10
HEAD = 16  # tail_aware's K


def cut(rows: int, step: int) -> list[int]:
    """So many rows in steps: the rows of each."""
    return [min(step, rows - begin) for begin in range(0, rows, step)]


@dataclass(frozen=True)
class Loss:
    """A loss and its gradients on each of `ranks` ranks that split the vocabulary evenly.

    Attributes:
        tokens, vocabulary, width, teacher_width: N, V, D and D_t, of `linear_f_divergence`; width 0: of `f_divergence`,
            whose logits are given.
        listed: K where the teacher is a `TopK`, without hidden states.
        step: rows of a chunk that the budget holds; 0: a GPU's default.
        piece: entries of a chunk's rows that a rank takes at a time where the vocabulary is split.
        itemsize: bytes of an input's number.
        labels, smoothing, metrics: label terms, smoothed labels, and `return_parts="metrics"`.
    """

    tokens: int
    vocabulary: int
    width: int
    teacher_width: int
    ranks: int = 1
    divergence: str = "kl"
    listed: int = 0
    step: int = 0
    piece: int = CHUNK_ELEMENTS
    itemsize: int = 2
    labels: bool = False
    smoothing: bool = False
    metrics: bool = False

    @property
    def here(self) -> int:
        """Entries of the vocabulary on a rank."""
        return -(-self.vocabulary // self.ranks)

    @property
    def models(self) -> int:
        """Whose logits a chunk has."""
        return 1 if self.listed else 2

    def chunks(self) -> list[int]:
        """Rows of each chunk."""
        if not self.width:
            return [self.tokens]
        most, tile = self.step, 16
        if not most:
            tile = chunks.GPU_TILE
            most = max(tile, chunks.GPU_CHUNK_BYTES // (self.models * self.here * self.itemsize) // tile * tile)
        return cut(self.tokens, chunks.even_step(self.tokens, most, tile))

    def pieces(self) -> list[list[int]]:
        """Rows of each piece of each chunk, in which the split rows' arithmetic runs."""
        return [cut(n, max(1, self.piece // self.here)) for n in self.chunks()]

    def flops(self) -> dict[str, int]:
        """Of each of the four products, on a rank."""
        one = 2 * self.tokens * self.here
        theirs = 0 if self.listed or not self.width else one * self.teacher_width
        return {"student": one * self.width, "teacher": theirs, "hidden": one * self.width, "weight": one * self.width}

    def sent(self) -> list[tuple[str, int]]:
        """The collectives in order: which, and the bytes that a rank gives to it."""
        if self.ranks == 1:
            return []
        found = [("all_reduce", 8)] if self.width else []  # the rows of a chunk, agreed
        for n in self.chunks():
            of_rows = self._of_list() if self.listed else self._of_rows()
            found += [(what, n * size) for what, size in of_rows]
            found += [("all_reduce", n * self.width * WIDE)] if self.width else []
        return found

    def _of_rows(self) -> list[tuple[str, int]]:
        """Of each row; the teacher gets no gradient."""
        own = {"tail_aware": [("all_gather", HEAD * WIDE)], "renyi": [("all_reduce", WIDE)],
               "akl": [("all_reduce", SUM)] * HALVINGS + [("all_reduce", WIDE)]}.get(self.divergence, [])  # fmt: skip
        if self.divergence in STATISTICS:
            own = [*own, ("all_reduce", STATISTICS[self.divergence] * SUM)]
        smoothed = [("all_reduce", 2 * SUM)] * self.smoothing
        totals = [("all_reduce", (5 if self.metrics else 2) * SUM)]
        return [("all_gather", 8 * SUM), *own, *smoothed, *totals, *[("all_reduce", 2 * SUM)] * self.metrics]

    def _of_list(self) -> list[tuple[str, int]]:
        found = [("all_reduce", self.listed * WIDE), ("all_gather", 3 * WIDE)]
        found += [("all_reduce", WIDE)] * (self.labels + self.smoothing)
        return found + [("all_gather", self.listed * WIDE)] * self.metrics

    def memory(self) -> dict[str, int]:
        """Bytes alive at the peak, beside the inputs: the logits of a chunk (from logits: their gradient), the other
        gradients in float32, ∂hidden of chunks whose sum over ranks is awaited, and of split rows the temporaries of a
        piece and what the ranks have gathered.
        """
        step, split = max(self.chunks()), self.ranks > 1 and not self.listed
        pairs = (pair for rows in self.pieces() for pair in zip((0, *rows), rows, strict=False))
        temporaries = max(TEMPORARIES * rows + BEFORE * before for before, rows in pairs) * self.here
        return {
            "logits": (self.models if self.width else 1) * step * self.here * self.itemsize,
            "weight": self.here * self.width * WIDE,
            "hidden": self.tokens * self.width * WIDE * (2 if self.ranks > 1 else 1),
            "temporaries": temporaries * WIDE * split,
            "gathered": step * 8 * SUM * self.ranks * split,
        }  # fmt: skip


class Counts(TorchDispatchMode):
    """What a run does: collectives and the bytes given to them, operators that are not views and the bytes of their
    arguments and results, and the most bytes alive at once of tensors made inside.
    """

    #: By torch's own names: which it is, and which argument is given to it.
    COLLECTIVES: ClassVar = {"allreduce_": ("all_reduce", 0), "_allgather_base_": ("all_gather", 1),
                             "_reduce_scatter_base_": ("reduce_scatter", 1)}  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []
        self.operators = self.touched = self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(of) if isinstance(x, torch.Tensor)] for of in ((args, kwargs), out))
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            what, at = self.COLLECTIVES[name]
            self.sent.append((what, sum(x.nbytes for x in tree_leaves(args[at]))))
            return out
        if not func.is_view and not name.startswith(("empty", "new_empty", "_local_scalar")):
            self.operators += 1
            self.touched += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*given, *made))
        outside = {x.untyped_storage()._cdata for x in given}
        for storage in (x.untyped_storage() for x in made):
            if storage._cdata not in outside | self.known:
                self._born(storage)
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self.known.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def dead() -> None:
            self.known.discard(address)
            self.alive -= size

        weakref.finalize(storage, dead)


class Gathered(torch.autograd.Function):
    """A tensor's parts on all ranks, (ranks·n, ...); its gradient is summed over them, each rank's part to it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        out = gradient.new_empty(gradient.shape[0] // ctx.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(out, gradient.contiguous(), group=ctx.group)
        return out, None


def counted(loss: Loss, rank: int = 0, group: Any = None) -> dict[str, Any]:
    """One run of it on this rank: FLOPs as torch counts them, of its own products, and `Counts`."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to({2: torch.bfloat16, 4: torch.float32}[loss.itemsize])

    def here(x: torch.Tensor) -> torch.Tensor:
        return x[rank * loss.here : (rank + 1) * loss.here].clone()

    hidden, theirs = randn(loss.tokens, max(1, loss.width)), randn(loss.tokens, max(1, loss.teacher_width))
    weight, their_weight = randn(loss.vocabulary, hidden.shape[1]), randn(loss.vocabulary, theirs.shape[1])
    teacher: list[Any] = [theirs, here(their_weight)]
    if loss.listed:
        teacher = [fk.top_k_of(theirs.float() @ their_weight.T.float(), loss.listed)]
    keywords: dict[str, Any] = {"divergence": loss.divergence}
    if loss.ranks > 1:
        keywords["shard"] = fk.vocab_shard(group, len(here(weight)))
    if loss.labels or loss.divergence == "dkd":
        keywords |= {"labels": torch.arange(loss.tokens) % loss.vocabulary, "ce_weight": 0.3 * loss.labels}
    if loss.smoothing:
        keywords["label_smoothing"] = 0.1
    if loss.metrics:
        keywords["return_parts"] = "metrics"
    if loss.width:
        function, given = fk.linear_f_divergence, [hidden.requires_grad_(), here(weight).requires_grad_(), *teacher]
        keywords["chunk_bytes"] = loss.step * loss.models * loss.here * loss.itemsize
    else:
        whole = [x @ w.T for x, w in ((hidden, weight), (theirs, their_weight))]
        function, given = fk.f_divergence, [here(x.T).T.contiguous() for x in whole]
        given[0].requires_grad_()

    def run() -> None:
        found = function(*given, **keywords)
        (found[0] if loss.metrics else found).backward()

    return observed(run)


def observed(run: Callable[[], Any]) -> dict[str, Any]:
    """What a run does. The package's operators hide from modes what runs inside them, and so does its own tiling of the
    products on a CPU: both are passed by.
    """
    by_products = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}  # which torch does not count
    flops, counts = FlopCounterMode(display=False, custom_mapping=by_products), Counts()
    with (
        mock.patch.object(linear, "_rows", linear._run),
        mock.patch.object(backends, "divergence_rows", backends._run),
        mock.patch.object(products, "FOUND", None),
        flops,
        counts,
    ):
        run()
    return {
        "flops": flops.get_total_flops(),
        **{k: getattr(counts, k) for k in ("sent", "peak", "operators", "touched")},
    }


#: Where the ranks of an FSDP head meet: at the head, or at the tokens.
WAYS = ("gather", "tiles", "split")


def fsdp(way: str, tokens: int, vocabulary: int, width: int, teacher_width: int, ranks: int,
         itemsize: int = 2) -> list[tuple[str, int]]:  # fmt: skip
    """What is sent for heads that FSDP has sharded, rows V/ranks here, by ranks with `tokens` of their own each:

        gather    both heads, once; ∂weight is summed to its owners
        tiles     both heads twice, a tile at a time: for the rows' statistics, and for their gradient
        split     both models' hidden states (labels are not counted); each rank makes all tokens' logits of its rows
                  of the heads, as a `VocabShard` with sum_hidden=False does; ∂hidden is summed to its owners

    Source: of the first FSDP's own; of the last the vocabulary-parallel loss, Megatron-LM (1909.08053, §3).
    """
    here, every = -(-vocabulary // ranks), tokens * ranks
    heads = [("all_gather", here * width * itemsize), ("all_gather", here * teacher_width * itemsize)]
    if way != "split":
        return heads * (1 + (way == "tiles")) + [("reduce_scatter", vocabulary * width * itemsize)]
    states = [("all_gather", tokens * width * itemsize), ("all_gather", tokens * teacher_width * itemsize)]
    rows = Loss(every, vocabulary, 0, 0, ranks, itemsize=itemsize).sent()
    return [*states, ("all_reduce", 8), *rows, ("reduce_scatter", every * width * itemsize)]


def on_the_wire(sent: list[tuple[str, int]], ranks: int) -> float:
    """Bytes that a rank sends, at the least, for what it gives to collectives (nccl-tests, doc/PERFORMANCE.md)."""
    factor = {"all_gather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks, "all_reduce": 2 * (ranks - 1) / ranks}
    return sum(factor[what] * given for what, given in sent)


def cheaper(tokens: int, vocabulary: int, width: int, teacher_width: int, ranks: int, room: float,
            itemsize: int = 2) -> str:  # fmt: skip
    """The way that sends least, of `fsdp`'s; "gather" only where so many bytes of room hold both heads and ∂weight.

    FLOPs of "gather" and "split" are the same, of "tiles" both models' logits twice.
    """
    heads = vocabulary * (itemsize * (width + teacher_width) + WIDE * width)
    ways = [way for way in WAYS if way != "gather" or heads <= room]
    return min(
        ways, key=lambda way: on_the_wire(fsdp(way, tokens, vocabulary, width, teacher_width, ranks, itemsize), ranks)
    )


def counted_fsdp(way: str, tokens: int, vocabulary: int, width: int, teacher_width: int, rank: int, group: Any) -> Any:
    """One run of "gather" or "split" on this rank, in float32: the counts, and the gradients of what is here."""
    ranks, here = group.size(), vocabulary // group.size()
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens * ranks, width), (vocabulary, width), (tokens * ranks, teacher_width), (vocabulary, teacher_width)
    mine = [torch.randn(*shape, generator=generator).chunk(ranks)[rank].clone() for shape in shapes]
    hidden, weight = mine[0].requires_grad_(), mine[1].requires_grad_()
    shard = fk.vocab_shard(group, here, sum_hidden=False)

    def run() -> None:
        over = (1, 3) if way == "gather" else (0, 2)
        given = [Gathered.apply(x, group) if i in over else x for i, x in enumerate(mine)]
        keywords = {} if way == "gather" else {"shard": shard}
        fk.linear_f_divergence(*given, divergence="kl", reduction="sum", **keywords).backward()

    return observed(run), [hidden.grad, weight.grad]


#: A shape of three chunks, and what is checked of it: every divergence and term, from hidden states and from logits.
CHECKED = Loss(80, 8192, 32, 48, step=32, itemsize=4)
#: Tokens of each rank, V, D and D_t of a head that FSDP has sharded.
FSDP = 24, 512, 16, 32


def cases(ranks: int) -> list[Loss]:
    """Of so many ranks, whose shards may be unequal."""
    one = replace(CHECKED, ranks=ranks)
    others: list[dict[str, Any]] = [
        {"labels": True}, {"labels": True, "smoothing": True, "metrics": True}, {"listed": 5},
        {"listed": 5, "labels": True}, {"vocabulary": 8190},
        *({"divergence": name, "tokens": 300, "step": 128, "vocabulary": 16384} for name in ("kl", "js", "skew_rkl")),
        {"itemsize": 2}, {"width": 0}, {"width": 0, "divergence": "akl"},
    ]  # fmt: skip
    return [replace(one, divergence=name) for name in fk.TABLE] + [replace(one, **some) for some in others]


def _process(rank: int, ranks: int, folder: str, losses: list[Loss]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    try:
        found = [counted(loss, rank, group) for loss in losses]
        ways = [counted_fsdp(way, *FSDP, rank, group) for way in ("gather", "split")] if ranks > 1 else []
        for one, other in zip(*(gradients for _, gradients in ways), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps([found, [counts for counts, _ in ways]]))
    finally:
        dist.destroy_process_group()


def runs(losses: list[Loss]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The counts of the first of their ranks, and of both ways to a head that FSDP has sharded."""
    (ranks,) = {loss.ranks for loss in losses}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (ranks, folder, losses), nprocs=ranks)
        found, ways = json.loads(Path(folder, "found.json").read_text())
    for counts in (*found, *ways):
        counts["sent"] = [tuple(x) for x in counts["sent"]]
    return found, ways


def checked(losses: list[Loss]) -> list[dict[str, Any]]:
    """The counts beside the model's.

    Raises:
        AssertionError: collectives, bytes or FLOPs that are not the model's, or a peak of memory too far from it.
    """
    found, ways = runs(losses)
    rows = []
    for loss, counts in zip(losses, found, strict=True):
        peak, flops, sent = sum(loss.memory().values()), sum(loss.flops().values()), loss.sent()
        if loss.itemsize == 2 and loss.width:  # a CPU's products of 16 bits are of the gradient widened
            peak += max(loss.chunks()) * loss.here * WIDE
        assert counts["sent"] == sent, (loss, counts["sent"], sent)
        assert counts["flops"] == flops, (loss, counts["flops"], flops)
        assert max(counts["peak"] / peak, peak / counts["peak"]) < MEMORY_WITHIN, (loss, counts["peak"], loss.memory())
        rows.append({
            "case": name_of(loss), "ranks": loss.ranks,
            "collectives": len(counts["sent"]), "sent_bytes": sum(size for _, size in counts["sent"]),
            "flops": counts["flops"], "peak_bytes": counts["peak"], "peak_over_model": counts["peak"] / peak,
            "modelled": {"collectives": len(sent), "sent_bytes": sum(size for _, size in sent), "flops": flops,
                         "peak_bytes": peak},
        })  # fmt: skip
    for way, counts in zip(("gather", "split"), ways, strict=False):
        sent = fsdp(way, *FSDP, losses[0].ranks, itemsize=4)
        assert sorted(counts["sent"]) == sorted(sent), (way, counts["sent"], sent)
    return rows


def name_of(loss: Loss) -> str:
    """Of a case, by what is not CHECKED's."""
    of = [loss.divergence if not loss.listed else f"{loss.divergence} to a list of {loss.listed}"]
    of += [name for name in ("labels", "smoothing", "metrics") if getattr(loss, name)]
    of += ["bfloat16"] * (loss.itemsize == 2) + ["from logits"] * (not loss.width)
    of += [f"N = {loss.tokens}"] * (loss.tokens != CHECKED.tokens)
    return ", ".join(of + [f"V = {loss.vocabulary}"] * (loss.vocabulary != CHECKED.vocabulary))


@dataclass(frozen=True)
class Arithmetic:
    """Of split rows: operators a piece, and the bytes of their arguments and results an entry, in float32."""

    operators: float
    touched: float


def arithmetic(names: list[str]) -> dict[str, Arithmetic]:
    """Counted, by what two more pieces add."""
    rows, here = 32, CHUNK_ELEMENTS // 32
    few, many = (
        [Loss(count * rows, 2 * here, 0, 8, 2, name, itemsize=4) for name in names] for count in (2, 4)
    )  # fmt: skip
    found, _ = runs([*few, *many])
    pairs = zip(names, found[: len(names)], found[len(names) :], strict=True)
    return {
        name: Arithmetic((b["operators"] - a["operators"]) / 2, (b["touched"] - a["touched"]) / (2 * rows * here))
        for name, a, b in pairs
    }


@dataclass(frozen=True)
class Device:
    """A GPU and its wires, by its maker's figures; what is reached of them; and what is assumed.

    Attributes:
        matrix: FLOP a second, bfloat16, dense; memory: bytes a second; capacity: bytes.
        node: GPUs with `near`, bytes a second from each, one way; beyond them `far`.
        matrix_share, memory_share: reached on a card of the same die (benchmarks/results/linear_ours.json).
        row_over_floor: kl's kernel of whole rows, over three passes at the copy rate (rows_cuda.json).
        wire_share, near_latency, far_latency, launch: assumed; seconds of a small collective, and of the host for an
            operator.
    """

    name: str
    matrix: float
    memory: float
    capacity: float
    node: int
    near: float
    far: float
    matrix_share: float
    memory_share: float
    row_over_floor: float
    wire_share: float = 0.8
    near_latency: float = 15e-6
    far_latency: float = 40e-6
    launch: float = 5e-6

    def wire(self, sent: list[tuple[str, int]], ranks: int, stride: int = 1) -> float:
        """Seconds of collectives, one after another, among ranks that are so many GPUs apart."""
        near = ranks * stride <= self.node
        rate, latency = (self.near, self.near_latency) if near else (self.far, self.far_latency)
        return len(sent) * latency + on_the_wire(sent, ranks) / (rate * self.wire_share) if ranks > 1 else 0.0


def h100() -> Device:
    """H100 SXM: NVIDIA's data sheet (HBM3, dense bfloat16; NVLink 4, 900 GB/s both ways), and of the DGX H100 one
    ConnectX-7 of 400 Gb/s (NDR) a GPU. Shares: measured on an H200, its die with 4.8 TB/s.
    """
    ours, rows = (json.loads((RESULT.parent / name).read_text()) for name in ("linear_ours.json", "rows_cuda.json"))
    what = {"divergence": "kl", "shape": [8192, 128256], "alike": False}
    (kernel,) = (r["over_floor"] for r in rows["results"] if all(r[k] == v for k, v in what.items()))
    reached = ours["matrix_flop_per_second"] / 989.4e12, ours["copy_bytes_per_second"] / 4.8e12
    return Device("H100 SXM", 989.4e12, 3.35e12, 80e9, 8, 450e9, 50e9, *reached, kernel)


#: Entries of a piece of split rows: as it is; so many that operators take longer than their launch; and for a kernel,
#: which reads both models three times and writes once, all of them.
ROWS = {"as it is": CHUNK_ELEMENTS, "larger pieces": 1 << 22, "a kernel": 0}


def seconds(loss: Loss, device: Device, of_rows: Arithmetic, how: str = "as it is") -> dict[str, float]:
    """Modelled, of a rank: the products, the rows, their statistics on the wire, and what of ∂hidden's sum the next
    chunk's products do not hide.
    """
    rate, copy = device.matrix * device.matrix_share, device.memory * device.memory_share
    parts, entries = loss.chunks(), loss.tokens * loss.here
    weights = loss.here * ((2 * loss.width + loss.teacher_width) * loss.itemsize + 2 * loss.width * WIDE)
    made = max(sum(loss.flops().values()) / rate, len(parts) * weights / copy)
    passes = 3 * device.row_over_floor if loss.ranks == 1 else 7
    rows = passes * entries * loss.itemsize / copy
    if loss.ranks > 1 and how != "a kernel":
        pieces = replace(loss, piece=ROWS[how]).pieces()
        rows = max(sum(map(len, pieces)) * of_rows.operators * device.launch, entries * of_rows.touched / copy)
    of_hidden = [("all_reduce", n * loss.width * WIDE) for n in parts]
    statistics = [x for x in loss.sent() if x not in of_hidden]
    each = device.wire(of_hidden, loss.ranks) / len(parts)
    exposed = each + (len(parts) - 1) * max(0.0, each - (made + rows) / len(parts))
    return {"products": made, "rows": rows, "statistics": device.wire(statistics, loss.ranks), "hidden": exposed}


@dataclass(frozen=True)
class Model:
    """A decoder of Llama 3's (2407.21783, table 3; the smallest: its config.json)."""

    layers: int
    width: int
    inner: int
    keys: int
    vocabulary: int = 128256

    @property
    def body(self) -> int:
        """Parameters but for embeddings and head."""
        return self.layers * self.width * (2 * self.width + 2 * self.keys + 3 * self.inner)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.body + 2 * self.vocabulary * self.width


MODELS = {"1B": Model(16, 2048, 8192, 512), "8B": Model(32, 4096, 14336, 1024),
          "70B": Model(80, 8192, 28672, 1024), "405B": Model(126, 16384, 53248, 1024)}  # fmt: skip
PAIRS = ("1B", "8B"), ("8B", "70B"), ("70B", "405B")
TOKENS = 8192


def step_seconds(student: Model, teacher: Model, tensor: int, data: int, device: Device) -> tuple[float, float]:
    """Of a training step without its loss, modelled: compute, and data parallelism's wire.

    The student's forward and backward, the teacher's forward, of a causal sequence of TOKENS a replica; Megatron's
    sums, 4 and 2 a layer, are not hidden. FSDP gathers the student's weights twice and the teacher's once, and scatters
    gradients.
    """
    passes = {student: 3, teacher: 1}
    flops = sum(TOKENS * count * (2 * m.body + 2 * TOKENS * m.layers * m.width) for m, count in passes.items())
    sums = [("all_reduce", TOKENS * m.width * 2) for m, count in ((student, 4), (teacher, 2))
            for _ in range(count * m.layers)]  # fmt: skip
    compute = flops / tensor / (device.matrix * device.matrix_share) + device.wire(sums, tensor)
    size = {m: 2 * m.parameters // tensor for m in (student, teacher)}
    sent = [("all_gather", size[m] // data) for m in (student, student, teacher)] + [("reduce_scatter", size[student])]
    return compute, device.wire(sent, data, tensor)


def share(pair: tuple[str, str], tensor: int, data: int, device: Device, of_rows: Arithmetic, how: str) -> float | None:
    """The loss's share of a step, whose compute hides data parallelism's wire; None where the models do not fit.

    Weights, gradients and Adam's moments are 16 bytes a parameter, the teacher's weights 2; a third of a GPU is left
    for all else.
    """
    student, teacher = (MODELS[name] for name in pair)
    if (16 * student.parameters + 2 * teacher.parameters) / (tensor * data) > 2 / 3 * device.capacity:
        return None
    loss = Loss(TOKENS, student.vocabulary, student.width, teacher.width, tensor)
    own = sum(seconds(loss, device, of_rows, how).values())
    compute, wire = step_seconds(student, teacher, tensor, data, device)
    return own / max(compute + own, wire)


GPUS = tuple(2**i for i in range(11))
LINES = {(1, "as it is"): "TP 1", (8, "as it is"): "TP 8, as it is", (8, "larger pieces"): "TP 8, larger pieces",
         (8, "a kernel"): "TP 8, a kernel", (64, "a kernel"): "TP 64, a kernel"}  # fmt: skip


def modelled(device: Device, of_rows: Arithmetic) -> dict[str, list[dict[str, Any]]]:
    """Shares over GPUs; one loss over ranks that split it; and which way to FSDP's head is cheaper."""
    shares = [
        {"student": pair[0], "teacher": pair[1], "tensor": tensor, "rows": how, "gpus": gpus, "share": found}
        for pair in PAIRS for tensor, how in LINES for gpus in GPUS
        if gpus >= tensor and (found := share(pair, tensor, gpus // tensor, device, of_rows, how)) is not None
    ]  # fmt: skip
    student, teacher = (MODELS[name] for name in PAIRS[1])
    split = []
    for ranks in (1, 2, 4, 8, 16, 64):
        loss = Loss(TOKENS, student.vocabulary, student.width, teacher.width, ranks)
        times = {how: seconds(loss, device, of_rows, how) for how in ROWS}
        split.append({
            "ranks": ranks, "flops": sum(loss.flops().values()), "chunks": len(loss.chunks()),
            "collectives": len(loss.sent()), "wire_bytes": on_the_wire(loss.sent(), ranks),
            "peak_bytes": sum(loss.memory().values()),
            "operators": sum(map(len, loss.pieces())) * of_rows.operators if ranks > 1 else 0,
            **{name: 1e3 * value for name, value in times["a kernel"].items() if name != "rows"},
            **{how: 1e3 * times[how]["rows"] for how in ROWS},
        })  # fmt: skip
    heads = []
    for tokens in (TOKENS, TOKENS // 8):
        for ranks in (2, 8, 16, 64, 256, 1024):
            of = tokens, student.vocabulary, student.width, teacher.width, ranks
            sent = {way: on_the_wire(fsdp(way, *of), ranks) for way in WAYS}
            heads.append({"tokens": tokens, "ranks": ranks, **sent, "cheaper": cheaper(*of, room=20e9),
                          "without room": cheaper(*of, room=0)})  # fmt: skip
    return {"shares": shares, "split": split, "heads": heads}


def draw(shares: list[dict[str, Any]]) -> None:
    """A picture a pair of models, a line a split of the vocabulary."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PAIRS), figsize=(13, 3.8), sharey=True, layout="constrained")
    for ax, pair in zip(axes, PAIRS, strict=True):
        for i, ((tensor, how), label) in enumerate(LINES.items()):
            at = {"student": pair[0], "teacher": pair[1], "tensor": tensor, "rows": how}
            found = [(r["gpus"], 100 * r["share"]) for r in shares if all(r[k] == v for k, v in at.items())]
            ax.plot([x for x, _ in found], [y for _, y in found], marker=".", label=label, color=f"C{i}")
        ax.set(xscale="log", yscale="log", title=f"{pair[0]} from {pair[1]}", xlabel="GPUs")
        ax.set_xticks(GPUS, GPUS, rotation=45)
        ax.set_yticks(*[[0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]] * 2)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("loss, % of a training step (a model)")
    axes[0].legend(fontsize=8)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Counts, models, draws."""
    device, found = h100(), [row for ranks in (1, 2, 4) for row in checked(cases(ranks))]
    of_rows = arithmetic(list(fk.TABLE))
    of_models = modelled(device, of_rows["kl"])
    content = {
        "run": provenance("python -m benchmarks.scaling"), "device": asdict(device), "checked": asdict(CHECKED),
        "memory_within": MEMORY_WITHIN,
        "arithmetic": {name: asdict(x) for name, x in of_rows.items()}, "cases": found, **of_models,
    }  # fmt: skip
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    draw(of_models["shares"])


if __name__ == "__main__":
    main()
