"""What the losses cost on 1 to 1024 GPUs: a model, whose counts are checked against runs on 1, 2 and 4 CPU processes.

    python -m benchmarks.scaling            counts, models

Products, collectives and their bytes are those of a run, exactly; the peak of memory within MEMORY_WITHIN; of split
rows operators and bytes are counted, and carried to larger shapes. Times are a model: docs/scaling.md has the formulas.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import weakref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fdistill_kernels as fk
from fdistill_kernels import backends, chunks, linear, products, scattered
from fdistill_kernels.backends.chunked import CHUNK_ELEMENTS
from fdistill_kernels.backends.sharded import CARD_ELEMENTS, HALVINGS
from fdistill_kernels.provenance import provenance

PLOT = Path(__file__).parent.parent / "docs" / "scaling.png"
RESULT = Path(__file__).parent / "results" / "scaling.json"
#: How far the modelled peak of memory may be from a run's.
MEMORY_WITHIN = 1.3
#: Sums that a divergence asks of its rows, before those of D.
STATISTICS = {"lk": 2, "renyi": 2, "akl": 2, "entropy_gated": 1, "csd": 1, "tail_aware": 5, "dkd": 5}
#: The arithmetic's and a sum's bytes; and of what a call is, which ranks compare before it, and before that of tokens.
WIDE, SUM, CALL, TOKENS_HERE = 4, 8, 12 * 8, 3 * 8
#: A row's numbers in the arithmetic: its weight, both temperatures, and three terms' weights.
OF_ROW = 6
#: Whose heads the ranks have: rows of one for the same tokens; FSDP's, for tokens of their own, by `scattered`'s ways.
SPLIT, GATHERED, IN_TURNS = "split", "gathered", "in turns"
KINDS = "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce"
#: Temporaries of a piece's size that are alive at once where the vocabulary is split, and of the piece before.
TEMPORARIES, BEFORE = 18, 10
HEAD = 16  # tail_aware's K


def cut(rows: int, step: int) -> list[int]:
    """So many rows in steps: the rows of each."""
    return [min(step, rows - begin) for begin in range(0, rows, step)]


@dataclass(frozen=True)
class Loss:
    """A loss and its gradients on each of `ranks` ranks that split the vocabulary evenly; of FSDP's heads tokens are a
    rank's own, as many on each.

    Attributes:
        tokens, vocabulary, width, teacher_width: N, V, D and D_t, of `linear_f_divergence`; width 0: of `f_divergence`,
            whose logits are given.
        listed: K where the teacher is a `TopK`, without hidden states.
        step: rows of a chunk that the budget holds; 0: a GPU's default.
        piece: entries of a chunk's rows that a rank takes at a time where the vocabulary is split; 0: a kernel's, all.
        heads: `SPLIT`, `GATHERED` or `IN_TURNS`; itemsize: bytes of an input's number.
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
    heads: str = SPLIT

    @property
    def shard(self) -> int:
        """Entries of the vocabulary that a rank keeps."""
        return -(-self.vocabulary // self.ranks)

    @property
    def here(self) -> int:
        """Entries of which a rank makes logits."""
        return self.vocabulary if self.heads == GATHERED else self.shard

    @property
    def split(self) -> bool:
        """Whether a row's entries are on several ranks."""
        return self.ranks > 1 and self.heads != GATHERED

    @property
    def turns(self) -> int:
        """How many ranks' tokens a rank makes logits of."""
        return self.ranks if self.heads == IN_TURNS else 1

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
        return [cut(n, max(1, (self.piece or n * self.here) // self.here)) for n in self.chunks()]

    def flops(self) -> int:
        """Of a rank's products: student's logits, ∂hidden, ∂weight; teacher's logits."""
        widths = 3 * self.width + (0 if self.listed or not self.width else self.teacher_width)
        return 2 * self.turns * self.tokens * self.here * widths

    def sent(self) -> list[tuple[str, int]]:
        """The collectives: which, and the bytes that a rank gives to it; in order, but for `IN_TURNS`."""
        if self.ranks == 1:
            return []
        n, size, first = self.tokens, self.itemsize, ("all_gather", TOKENS_HERE)
        if self.heads == GATHERED:
            heads = [("all_gather", self.shard * width * size) for width in (self.width, self.teacher_width)]
            return [first, *heads, ("reduce_scatter", self.ranks * self.shard * self.width * WIDE)]
        if self.heads == SPLIT:
            return self._of_turn(("all_reduce", self.width * WIDE))
        numbers = [self.width * size, self.teacher_width * size, OF_ROW * WIDE]
        turn = [*(("broadcast", n * of) for of in numbers), *self._of_turn(), ("reduce", n * self.width * WIDE)]
        return [first, ("all_gather", CALL), *turn * self.ranks, ("all_gather", WIDE)]

    def _of_turn(self, *behind: tuple[str, int]) -> list[tuple[str, int]]:
        """Of a call of which all ranks have all rows; behind: of a chunk's row from hidden states."""
        of_row = [*self._of_rows(), *(behind if self.width else ())]
        return [("all_gather", CALL), *((what, n * size) for n in self.chunks() for what, size in of_row)]

    def _of_rows(self) -> list[tuple[str, int]]:
        """Of each row; the teacher gets no gradient."""
        if self.listed:
            found = [("all_reduce", self.listed * WIDE), ("all_gather", 3 * WIDE)]
            found += [("all_reduce", WIDE)] * (self.labels + self.smoothing)
            return found + [("all_gather", self.listed * WIDE)] * self.metrics
        own = {"tail_aware": [("all_gather", HEAD * WIDE), ("all_reduce", 2 * WIDE)], "dkd": [("all_reduce", 2 * WIDE)],
               "lk": [("all_reduce", WIDE)], "renyi": [("all_reduce", WIDE)],
               "akl": [("all_reduce", SUM)] * HALVINGS + [("all_reduce", WIDE)]}.get(self.divergence, [])  # fmt: skip
        if self.divergence in STATISTICS:
            own = [*own, ("all_reduce", STATISTICS[self.divergence] * SUM)]
        smoothed = [("all_reduce", 2 * SUM)] * self.smoothing
        totals = [("all_reduce", (5 if self.metrics else 2) * SUM)]
        return [("all_gather", 8 * SUM), *own, *smoothed, *totals, *[("all_reduce", 2 * SUM)] * self.metrics]

    def memory(self) -> dict[str, int]:
        """Bytes alive at the peak, beside the inputs: the logits of a chunk (from logits: their gradient), the other
        gradients in float32 with two chunks' ∂hidden (one rank: a chunk's), of split rows the temporaries of a piece
        and what the ranks have gathered; and of FSDP's heads what has come, and of ∂weight its sum and their mean.
        """
        step, split = max(self.chunks()), self.split and not self.listed
        pairs = (pair for rows in self.pieces() for pair in zip((0, *rows), rows, strict=False))
        temporaries = max(TEMPORARIES * rows + BEFORE * before for before, rows in pairs) * self.here
        come = {SPLIT: 0, GATHERED: self.vocabulary, IN_TURNS: 2 * self.tokens}[self.heads]
        return {
            "logits": (self.models if self.width else 1) * step * self.here * self.itemsize,
            "weight": self.here * self.width * WIDE * (1 if self.heads == SPLIT else 2),
            "hidden": (self.turns * self.tokens + step * (2 if self.ranks > 1 else 1)) * self.width * WIDE,
            "temporaries": temporaries * WIDE * (split and self.piece > 0),
            "gathered": step * 8 * SUM * self.ranks * split,
            "come": come * (self.width + self.teacher_width) * self.itemsize,
        }  # fmt: skip


class Counts(TorchDispatchMode):
    """What a run does: collectives and the bytes given to them, operators that are not views and the bytes of their
    arguments and results, and the most bytes alive at once of tensors made inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []
        self.operators = self.touched = self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(of) if isinstance(x, torch.Tensor)] for of in ((args, kwargs), out))
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            what = next(kind for kind in KINDS if kind.replace("_", "") in name.replace("_", ""))
            self.sent.append((what, sum(x.nbytes for x in tree_leaves(args["_base_" in name]))))
        if not func.is_view and not name.startswith(("empty", "new_empty", "_local_scalar")):
            self.operators += 1
            self.touched += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*given, *made))
        outside = {x.untyped_storage()._cdata for x in given}
        for storage in (x.untyped_storage() for x in made):
            if storage._cdata not in outside | self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._dead, storage._cdata, storage.nbytes())
        return out

    def _dead(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.alive -= size


def counted(loss: Loss, rank: int = 0, group: Any = None) -> dict[str, Any]:
    """One run of it on this rank: FLOPs as torch counts them, of its own products, and `Counts`."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to({2: torch.bfloat16, 4: torch.float32}[loss.itemsize])

    def here(x: torch.Tensor) -> torch.Tensor:
        if loss.heads != SPLIT:
            return distribute_tensor(x, init_device_mesh("cpu", (loss.ranks,)), [Shard(0)])
        return x[rank * loss.shard : (rank + 1) * loss.shard].clone()

    hidden, theirs = randn(loss.tokens, max(1, loss.width)), randn(loss.tokens, max(1, loss.teacher_width))
    weight, their_weight = randn(loss.vocabulary, hidden.shape[1]), randn(loss.vocabulary, theirs.shape[1])
    teacher: list[Any] = [theirs, here(their_weight)]
    if loss.listed:
        teacher = [fk.top_k_of(theirs.float() @ their_weight.T.float(), loss.listed)]
    keywords: dict[str, Any] = {"divergence": loss.divergence}
    if loss.split and loss.heads == SPLIT:
        keywords["shard"] = fk.vocab_shard(group, len(here(weight)))
    keywords |= {"label_smoothing": 0.1 * loss.smoothing, "return_parts": "metrics" if loss.metrics else False}
    if loss.labels or loss.divergence == "dkd":
        keywords |= {"labels": torch.arange(loss.tokens) % loss.vocabulary, "ce_weight": 0.3 * loss.labels}
    if loss.width:
        function, given = fk.linear_f_divergence, [hidden.requires_grad_(), here(weight).requires_grad_(), *teacher]
        keywords["chunk_bytes"] = loss.step * loss.models * loss.here * loss.itemsize
    else:
        whole = [x @ w.T for x, w in ((hidden, weight), (theirs, their_weight))]
        function, given = fk.f_divergence, [here(x.T).T.contiguous() for x in whole]
        given[0].requires_grad_()

    by_products = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}  # which torch does not count
    flops, counts = FlopCounterMode(display=False, custom_mapping=by_products), Counts()
    with (
        mock.patch.object(scattered, "takes_turns", lambda *_: loss.heads == IN_TURNS),
        mock.patch.object(linear, "_rows", linear._run),  # operators hide from modes what runs inside them
        mock.patch.object(backends, "divergence_rows", backends._run),
        mock.patch.object(products, "FOUND", None),  # and so does the package's own tiling on a CPU
        flops,
        counts,
    ):
        found = function(*given, **keywords)
        (found[0] if loss.metrics else found).backward()
    return {"flops": flops.get_total_flops()} | {
        k: getattr(counts, k) for k in ("sent", "peak", "operators", "touched")
    }


def on_the_wire(sent: list[tuple[str, int]], ranks: int) -> float:
    """Bytes that a rank sends, at the least, for what it gives to collectives (nccl-tests, doc/PERFORMANCE.md)."""
    factor = {"all_gather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks, "all_reduce": 2 * (ranks - 1) / ranks,
              "broadcast": 1, "reduce": 1}  # fmt: skip
    return sum(factor[what] * given for what, given in sent)


#: A shape of three chunks, and what is checked of it: every divergence and term, from hidden states and from logits.
CHECKED = Loss(80, 8192, 32, 48, step=32, itemsize=4)


def cases(ranks: int) -> list[Loss]:
    """Of so many ranks, whose shards may be unequal."""
    one = replace(CHECKED, ranks=ranks)
    others: list[dict[str, Any]] = [
        {"labels": True}, {"labels": True, "smoothing": True, "metrics": True}, {"listed": 5},
        {"listed": 5, "labels": True}, {"vocabulary": 8190},
        *({"divergence": name, "tokens": 300, "step": 128, "vocabulary": 16384} for name in ("kl", "js", "skew_rkl")),
        {"itemsize": 2}, {"width": 0}, {"width": 0, "divergence": "akl"},
        *({"heads": way} | other for way in (GATHERED, IN_TURNS) if ranks > 1 for other in ({}, {"itemsize": 2})),
    ]  # fmt: skip
    return [replace(one, divergence=name) for name in fk.TABLE] + [replace(one, **some) for some in others]


def _process(rank: int, ranks: int, folder: str, losses: list[Loss]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    found = [counted(loss, rank, dist.group.WORLD) for loss in losses]
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.destroy_process_group()


def runs(losses: list[Loss]) -> list[dict[str, Any]]:
    """The counts of the first of their ranks."""
    ranks = losses[0].ranks
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (ranks, folder, losses), nprocs=ranks)
        return torch.load(f"{folder}/found")


def checked(losses: list[Loss]) -> list[dict[str, Any]]:
    """The counts, which are the model's.

    Raises:
        AssertionError: collectives, bytes or FLOPs that are not the model's, or a peak of memory too far from it.
    """
    rows = []
    for loss, counts in zip(losses, runs(losses), strict=True):
        peak, flops, sent = sum(loss.memory().values()), loss.flops(), loss.sent()
        if loss.itemsize == 2 and loss.width:  # a CPU's products of 16 bits are of the gradient widened
            peak += max(loss.chunks()) * loss.here * WIDE
        in_order = sorted if loss.heads == IN_TURNS else list  # of which the next is sent under this one's products
        assert in_order(counts["sent"]) == in_order(sent), (loss, counts["sent"], sent)
        assert counts["flops"] == flops, (loss, counts["flops"], flops)
        assert max(counts["peak"] / peak, peak / counts["peak"]) < MEMORY_WITHIN, (loss, counts["peak"], loss.memory())
        found = {"collectives": len(sent), "sent_bytes": sum(size for _, size in sent), "flops": flops}
        rows.append({"case": name_of(loss), "ranks": loss.ranks, **found, "peak_bytes": counts["peak"],
                     "modelled_peak": peak, "peak_over_model": counts["peak"] / peak})  # fmt: skip
    return rows


def name_of(loss: Loss) -> str:
    """Of a case, by what is not CHECKED's."""
    of = [loss.divergence if not loss.listed else f"{loss.divergence} to a list of {loss.listed}"]
    of += [name for name in ("labels", "smoothing", "metrics") if getattr(loss, name)]
    of += ["bfloat16"] * (loss.itemsize == 2) + ["from logits"] * (not loss.width)
    of += [f"FSDP's heads {loss.heads}"] * (loss.heads != SPLIT)
    of += [f"N = {loss.tokens}"] * (loss.tokens != CHECKED.tokens)
    return ", ".join(of + [f"V = {loss.vocabulary}"] * (loss.vocabulary != CHECKED.vocabulary))


def arithmetic(names: list[str]) -> dict[str, dict[str, float]]:
    """Of split rows: operators a piece, and the bytes of their arguments and results an entry, in float32; counted, by
    what two more pieces add.
    """
    rows, here = 32, CHUNK_ELEMENTS // 32
    of = {"operators": 2, "touched": 2 * rows * here}
    found = runs([Loss(n * rows, 2 * here, 0, 8, 2, name, itemsize=4) for n in (2, 4) for name in names])
    few, many = found[: len(names)], found[len(names) :]
    return {n: {k: (b[k] - a[k]) / of[k] for k in of} for n, a, b in zip(names, few, many, strict=True)}


@dataclass(frozen=True)
class Device:
    """An H100 SXM and its wires, by NVIDIA's data sheet (HBM3, dense bfloat16; NVLink 4, 900 GB/s both ways; of a DGX
    one ConnectX-7 of 400 Gb/s a GPU); what is reached of them; and what is assumed.

    Attributes:
        matrix: FLOP a second, bfloat16, dense; memory: bytes a second; capacity: bytes.
        node: GPUs with `near`, bytes a second from each, one way; beyond them `far`.
        matrix_share, memory_share: reached on a card of the same die (benchmarks/results/linear_ours.json).
        row_over_floor: kl's kernel of whole rows, over three passes at the copy rate (rows_cuda.json).
        wire_share, near_latency, far_latency, launch: assumed; seconds of a small collective, and of the host for an
            operator.
    """

    matrix_share: float
    memory_share: float
    row_over_floor: float
    matrix: float = 989.4e12
    memory: float = 3.35e12
    capacity: float = 80e9
    node: int = 8
    near: float = 450e9
    far: float = 50e9
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
    """Of what was measured on an H200, the same die with 4.8 TB/s."""
    ours, rows = (json.loads((RESULT.parent / name).read_text()) for name in ("linear_ours.json", "rows_cuda.json"))
    what = {"divergence": "kl", "shape": [8192, 128256], "alike": False}
    (kernel,) = (r["over_floor"] for r in rows["results"] if what.items() <= r.items())
    return Device(ours["matrix_flop_per_second"] / 989.4e12, ours["copy_bytes_per_second"] / 4.8e12, kernel)


#: How a GPU makes split rows: Triton's kernel, which reads both models three times and writes once; or torch, of
#: divergences with statistics, metrics and what is of every class.
ROWS = {"the kernel": 0, "torch": CARD_ELEMENTS}


def seconds(loss: Loss, device: Device, of_rows: dict[str, float]) -> dict[str, float]:
    """Modelled, of a rank: the products, the rows, their statistics on the wire, and what of ∂hidden's sum the next
    chunk's products do not hide.
    """
    rate, copy = device.matrix * device.matrix_share, device.memory * device.memory_share
    parts, entries = loss.chunks(), loss.turns * loss.tokens * loss.here
    weights = loss.here * ((2 * loss.width + loss.teacher_width) * loss.itemsize + 2 * loss.width * WIDE)
    made = max(loss.flops() / rate, len(parts) * weights / copy)
    rows = (7 if loss.split else 3 * device.row_over_floor) * entries * loss.itemsize / copy
    if loss.split and loss.piece:
        launches = loss.turns * sum(map(len, loss.pieces())) * of_rows["operators"]
        rows = max(launches * device.launch, entries * of_rows["touched"] / copy)
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


def share(
    pair: tuple[str, str], tensor: int, data: int, device: Device, of_rows: dict[str, float], how: str
) -> float | None:
    """The loss's share of a training step, modelled; None where the models do not fit: weights, gradients and Adam's
    moments are 16 bytes a parameter, the teacher's weights 2, and a third of a GPU is left for all else.

    A step is the student's forward and backward and the teacher's forward, of a causal sequence of TOKENS a replica,
    with Megatron's sums, 4 and 2 a layer, not hidden; beneath it FSDP gathers the student's weights twice and the
    teacher's once, and scatters gradients.
    """
    student, teacher = (MODELS[name] for name in pair)
    if (16 * student.parameters + 2 * teacher.parameters) / (tensor * data) > 2 / 3 * device.capacity:
        return None
    loss = Loss(TOKENS, student.vocabulary, student.width, teacher.width, tensor, piece=ROWS[how])
    own, passes, layers = (
        sum(seconds(loss, device, of_rows).values()),
        {student: 3, teacher: 1},
        {student: 4, teacher: 2},
    )
    flops = sum(TOKENS * count * (2 * m.body + 2 * TOKENS * m.layers * m.width) for m, count in passes.items())
    sums = [("all_reduce", TOKENS * m.width * 2) for m, count in layers.items() for _ in range(count * m.layers)]
    compute = flops / tensor / (device.matrix * device.matrix_share) + device.wire(sums, tensor)
    size = {m: 2 * m.parameters // tensor for m in passes}
    sent = [("all_gather", size[m] // data) for m in (student, student, teacher)] + [("reduce_scatter", size[student])]
    return own / max(compute + own, device.wire(sent, data, tensor))


GPUS = tuple(2**i for i in range(11))
LINES = (1, "the kernel"), (8, "the kernel"), (64, "the kernel"), (8, "torch"), (64, "torch")


def modelled(device: Device, of_rows: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
    """Shares over GPUs; one loss over ranks that split it; and which way to FSDP's head is cheaper."""
    shares = [
        {"student": pair[0], "teacher": pair[1], "tensor": tensor, "rows": how, "gpus": gpus, "share": found}
        for pair in PAIRS for tensor, how in LINES for gpus in GPUS
        if gpus >= tensor and (found := share(pair, tensor, gpus // tensor, device, of_rows, how)) is not None
    ]  # fmt: skip
    student, teacher = (MODELS[name] for name in PAIRS[1])
    split, heads = [], []
    for ranks in (1, 2, 4, 8, 16, 64):
        loss = Loss(TOKENS, student.vocabulary, student.width, teacher.width, ranks, piece=0)
        times, torchs = seconds(loss, device, of_rows), replace(loss, piece=CARD_ELEMENTS)
        split.append({
            "ranks": ranks, "flops": loss.flops(), "chunks": len(loss.chunks()),
            "collectives": len(loss.sent()), "wire_bytes": on_the_wire(loss.sent(), ranks),
            "peak_bytes": sum(loss.memory().values()),
            **{name: 1e3 * value for name, value in times.items()},
            "torch": 1e3 * seconds(torchs, device, of_rows)["rows"],
        })  # fmt: skip
    for tokens, ranks in itertools.product((TOKENS, TOKENS // 8, TOKENS // 128), (2, 8, 16, 64, 256, 1024)):
        one = Loss(tokens, student.vocabulary, student.width, teacher.width, ranks, piece=0)
        ways = {way: replace(one, heads=way) for way in (GATHERED, IN_TURNS)}
        turns = scattered.takes_turns(tokens * ranks, one.vocabulary, one.width, one.teacher_width, one.itemsize, True)
        heads.append({
            "tokens": tokens, "ranks": ranks, "taken": IN_TURNS if turns else GATHERED,
            **{way: on_the_wire(x.sent(), ranks) for way, x in ways.items()},
            **{f"{way}, wire": 1e3 * device.wire(x.sent(), ranks) for way, x in ways.items()},
            **{f"{way}, rows": 1e3 * seconds(x, device, of_rows)["rows"] for way, x in ways.items()},
            "products": 1e3 * seconds(ways[GATHERED], device, of_rows)["products"],
        })  # fmt: skip
    return {"shares": shares, "split": split, "heads": heads}


def draw(shares: list[dict[str, Any]]) -> None:
    """A picture a pair of models, a line a split of the vocabulary."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PAIRS), figsize=(13, 3.8), sharey=True, layout="constrained")
    for ax, pair in zip(axes, PAIRS, strict=True):
        for tensor, how in LINES:
            at = {"student": pair[0], "teacher": pair[1], "tensor": tensor, "rows": how}
            found = [(r["gpus"], 100 * r["share"]) for r in shares if all(r[k] == v for k, v in at.items())]
            if found:
                ax.plot(*zip(*found, strict=True), marker=".", label=f"TP {tensor}, {how}")
        ax.set(xscale="log", yscale="log", title=f"{pair[0]} from {pair[1]}", xlabel="GPUs")
        ax.set_xticks(GPUS, GPUS, rotation=45)
        ax.set_yticks(*[[0.2, 0.5, 1, 2, 5, 10, 20, 50]] * 2)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("loss, % of a training step (a model)")
    axes[0].legend(fontsize=8)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Counts, models, draws."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device, of_rows = h100(), arithmetic(list(fk.TABLE))
    run = provenance("python -m benchmarks.scaling", dtype="float32, or what a case says")
    content = {
        "run": run, "device": asdict(device), "checked": asdict(CHECKED),
        "memory_within": MEMORY_WITHIN, "arithmetic": of_rows,
        "cases": [row for ranks in (1, 2, 4) for row in checked(cases(ranks))], **modelled(device, of_rows["kl"]),
    }  # fmt: skip
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    draw(content["shares"])


if __name__ == "__main__":
    main()
