"""What the row kernels' machine code predicts, per vocabulary entry of both models, without a card.

    python -m benchmarks.counts [--out FILE]     prints the table, and writes it

Triton's kernels are compiled here ahead of time; the CUDA kernels are read in their library, where nvcc has built it. A
sweep is a loop that loads logits; its instructions are counted along the shortest way through it, that of blocks within
a row without its peak and label, and divided by the entries that their loads bring. Sweeps after the first are there
twice, in CUDA three times: rows whose models agree about a peak (`close`) have formulas of their own. A multiprocessor
issues 128 lanes of instructions a cycle and 16 of MUFU.

Predicted time of N×V: the larger of issue, at a share of its rate, and memory at the copy rate, of three passes over
N·V and the sweeps that L2 does not hold. A card may say otherwise: nothing here waits, no latency is hidden or shown.
The shares are those of js in results/rows_triton.json and results/rows_cuda.json, by the instructions of these files'
commit (70 and 53), where nothing else takes its time; kl and tvd wait for memory and for their meetings, too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fdistill_kernels.options import written

#: Of the issue rate.
ISSUE, CUDA_ISSUE = 0.65, 0.57
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}


@dataclass(frozen=True)
class Card:
    """Multiprocessors, their clock in Hz, bytes of L2 and bytes a second of a copy, read and written."""

    processors: int
    clock: float
    l2: int
    copy: float


H100 = Card(132, 1.755e9, 50 << 20, 3.0e12)


@dataclass(frozen=True)
class Instruction:
    """An address, an opcode, and where it branches to."""

    address: int
    opcode: str
    target: int | None
    conditional: bool


@dataclass(frozen=True)
class Sweep:
    """Of a loop, per entry of both models: instructions, those of close rows, and MUFU; and loads by their width."""

    entries: int
    instructions: float
    close: float
    mufu: float
    loads: dict[str, int]


def instructions(sass: str) -> list[Instruction]:
    """Of one function, in order."""
    found = []
    for address, predicate, opcode, operands in INSTRUCTION.findall(sass):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        conditional = bool(predicate) or opcode == "BRA.DIV" or "UP" in operands or bool(re.search(r"!?P\d", operands))
        found.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None, conditional))
    return found


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Innermost loops: what lies between a branch and an earlier place it goes back to."""
    spans = [(x.target, x.address) for x in code if x.target is not None and x.target < x.address]
    for first, last in spans:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in spans):
            yield [x for x in code if first <= x.address <= last]


def shortest(body: list[Instruction]) -> list[Instruction]:
    """Of the ways from a loop's first instruction to its last those with most wide stores; of them the fewest
    instructions.
    """
    places = {x.address: i for i, x in enumerate(body)}
    length, after = [(0, 0)] * len(body), [len(body)] * len(body)
    for i in range(len(body) - 1, -1, -1):
        x, next_ones = body[i], []
        if i + 1 < len(body) and not (x.target is not None and not x.conditional):
            next_ones.append(i + 1)
        if x.target is not None and places.get(x.target, 0) > i:
            next_ones.append(places[x.target])
        if next_ones:
            after[i] = min(next_ones, key=length.__getitem__)
            length[i] = length[after[i]]
        stores = x.opcode.startswith("STG") and x.opcode.endswith("128")
        length[i] = (length[i][0] - stores, length[i][1] + 1)
    way, i = [], 0
    while i < len(body):
        way.append(body[i])
        i = after[i]
    return way


def sweeps(sass: str, models: int, itemsize: int) -> list[Sweep]:
    """The loops of a function that load logits, in order."""
    found = []
    for body in loops(instructions(sass)):
        way, loads = shortest(body), {}
        for x in way:
            if x.opcode.startswith("LDG"):
                width = next((part for part in x.opcode.split(".") if part in WIDTH), "32")
                loads[width] = loads.get(width, 0) + 1
        entries = sum(WIDTH.get(width, 4) * count for width, count in loads.items()) // (models * itemsize)
        if entries >= 4:
            mufu = sum(x.opcode.startswith("MUFU") for x in way)
            each = round(len(way) / entries, 1)
            found.append(Sweep(entries, each, each, round(mufu / entries, 2), loads))
    first, *later = found
    if models == 2:
        pairs = [sorted(pair, key=lambda s: s.instructions) for pair in zip(later[::2], later[1::2], strict=True)]
        later = [replace(far, close=close.instructions) for far, close in pairs]
    return [first, *later]


def cuda_sweeps(sass: str, models: int) -> list[Sweep]:
    """Of a CUDA kernel of 16-bit logits, whose loops read them by 8 from shared memory, in order: the tops, the sums of
    exponentials without and with what labels ask, and each sweep in three ways, or one without a teacher or by slopes.
    """
    found = []
    for body in loops(instructions(sass)):
        way = shortest(body)
        loads = sum(x.opcode == "LDS.128" for x in way)
        if loads > 1:  # not the loop that prepares a row's edges
            each = round(len(way) / (8 * loads) * models, 1)
            mufu = sum(x.opcode.startswith("MUFU") for x in way)
            found.append(Sweep(8 * loads // models, each, each, round(mufu / (8 * loads) * models, 2), {"128": loads}))
    tops, bare, _, *later = found
    if models == 2:
        by_slopes = len(later) % 3 == 1  # by the shortest loop after the totals; the others are of rows read again
        last = [min(later[3:], key=lambda s: s.instructions)] if by_slopes else []
        later = later[:3] if by_slopes else later
        threes = zip(later[::3], later[1::3], later[2::3], strict=True)
        later = [*(replace(far, close=close.instructions) for close, _, far in threes), *last]
    return [tops, bare, *later]


def predicted(found: list[Sweep], rows: int, vocabulary: int, card: Card, programs: int, models: int = 2,
              itemsize: int = 2, close: bool = False) -> dict[str, float]:  # fmt: skip
    """Milliseconds by issue and by memory, and their larger one over the floor of one read of each logit and one write.

    programs: rows that are swept at a time; what of them L2 cannot hold is read again by every later sweep.
    """
    entries = rows * vocabulary
    lanes = sum(max(s.close if close else s.instructions, 8 * ISSUE * s.mufu) for s in found)
    issue = entries * lanes / (card.processors * 128 * card.clock * ISSUE)
    floor = entries * itemsize * (models + 1) / card.copy
    resident = programs * vocabulary * itemsize * models
    missed = max(0.0, 1 - 0.6 * card.l2 / resident)
    memory = floor + entries * itemsize * models * missed * (len(found) - 1) / card.copy
    return {"issue_ms": 1e3 * issue, "memory_ms": 1e3 * memory, "over_floor": max(issue, memory) / floor}


#: Rows of the table: a name, and the arguments of tests.aot's variant.
VARIANTS = {
    "kl": dict(symbol="Kl"), "js": dict(symbol="Js"), "tvd": dict(symbol="Tvd"), "rkl": dict(symbol="Rkl"),
    "labels": dict(symbol=None, labels="plain"), "js with labels": dict(symbol="Js", labels="plain"),
    "js, V = 50257": dict(symbol="Js", vocabulary=50257),
    "js, V = 50257, views": dict(symbol="Js", vocabulary=50257, lines=False),
}  # fmt: skip
#: And of CUDA's, with the names of its kernels' divergences.
CUDA_VARIANTS = {"kl": "Kl", "js": "Js", "tvd": "Tvd", "rkl": "Rkl", "labels": "void"}
CUDA_LIBRARY = Path(__file__).parent.parent / "fdistill_kernels" / "libfdistill_cuda.so"


def measured_in_cuda() -> dict[str, Any]:
    """The table of the CUDA library: bfloat16; over the floor at any N and V that fill the card."""
    import triton

    tool, table = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump", {}
    for name, symbol in CUDA_VARIANTS.items():
        mangled = "v" if symbol == "void" else f"NS_{len(symbol)}{symbol}E"
        function = f"_ZN8fdistill10row_kernelI{mangled}NS_8BFloat16EEEvNS_7RowTaskENS_6LaunchE"
        usage, sass = (
            subprocess.check_output([tool, flag, "-fun", function, CUDA_LIBRARY], text=True, stderr=subprocess.DEVNULL)
            for flag in ("-res-usage", "-sass")
        )
        models = 1 if symbol == "void" else 2
        found = cuda_sweeps(sass, models)
        (registers,) = re.findall(rf"Function {function}:\s+REG:(\d+)", usage)
        entry: dict[str, Any] = {"registers": int(registers), "sweeps": [asdict(s) for s in found]}
        for way in ("instructions", "close"):
            lanes = round(sum(getattr(s, way) for s in found), 1)
            seconds = lanes / (H100.processors * 128 * H100.clock * CUDA_ISSUE)  # of an entry
            entry |= {way: lanes, f"{way} over_floor": round(max(1.0, seconds * H100.copy / (2 * models + 2)), 2)}
        table[name] = entry
    return table


def measured() -> dict[str, Any]:
    """The table of sm_90: bfloat16, N = 8192."""
    from tests import aot

    table = {}
    for name, arguments in VARIANTS.items():
        compiled, _ = aot.compiled(arguments, "sm_90")
        usage, sass = aot.disassembled(compiled)
        models = 1 if arguments["symbol"] is None else 2
        found = sweeps(sass, models, 2)
        entry: dict[str, Any] = {"registers": aot.registers(usage), "sweeps": [asdict(s) for s in found]}
        entry |= {way: round(sum(getattr(s, way) for s in found), 1) for way in ("instructions", "close", "mufu")}
        for vocabulary in (128256, 32000) if "V" not in name else (50257,):
            symbol = arguments["symbol"] or "labels"
            launch = aot.launch.heuristic(8192, vocabulary, 2, aot.TARGETS["sm_90"][1], symbol)
            for close in (False, True):
                said = predicted(found, 8192, vocabulary, H100, launch.programs, models, close=close)
                key = f"V = {vocabulary}{', close' if close else ''}"
                entry[key] = {k: round(v, 2) for k, v in said.items()}
        table[name] = entry
    return table


def main() -> None:
    """Prints the table and writes it."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=written, help="the result file; default: none")
    args = parser.parse_args()
    table = measured()
    for name, entry in table.items():
        each = " + ".join(f"{s['instructions']}..{s['close']}" for s in entry["sweeps"])
        ratios = "  ".join(f"{k}: {v['over_floor']}" for k, v in entry.items() if k.startswith("V"))
        print(f"{name:16s} {each} = {entry['instructions']}..{entry['close']}  MUFU {entry['mufu']}  "
              f"registers {entry['registers']}  ÷ floor {ratios}")  # fmt: skip
    cuda = measured_in_cuda() if CUDA_LIBRARY.exists() else {}
    for name, entry in cuda.items():
        each = " + ".join(f"{s['instructions']}..{s['close']}" for s in entry["sweeps"])
        print(f"{name + ', CUDA':16s} {each} = {entry['instructions']}..{entry['close']}  "
              f"registers {entry['registers']}  ÷ floor {entry['instructions over_floor']}, "
              f"close {entry['close over_floor']}")  # fmt: skip
    if args.out:
        found = {"triton": triton.__version__, "card": asdict(H100), "table": table, "cuda": cuda}
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
