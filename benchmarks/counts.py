"""What the row kernels' machine code predicts, per vocabulary entry of both models, without a card.

    python -m benchmarks.counts [--out FILE]     prints the table, and writes it

Triton's kernels are compiled here ahead of time. A sweep is a loop that loads logits; its instructions are counted
along the shortest and the longest way through it, since rows whose models agree about a peak (`close`) take other
formulas, and divided by the entries that its loads bring. A multiprocessor issues 128 lanes of instructions a cycle and
16 of MUFU.

Predicted time of N×V: the larger of issue, at ISSUE of its rate, and memory at the copy rate, of three passes over N·V
and the sweeps that L2 does not hold. What a card says may differ: nothing here waits, no latency is hidden or shown.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Of the issue rate, assumed: warps wait for L2 and each other.
ISSUE = 0.5
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
    """Of a loop, per entry of both models: instructions and MUFU along the shortest and the longest way."""

    entries: int
    shortest: float
    longest: float
    mufu: float
    loads: dict[str, int]


def instructions(sass: str) -> list[Instruction]:
    """Of one function, in order."""
    found = []
    for address, predicate, opcode, operands in INSTRUCTION.findall(sass):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        conditional = bool(predicate) or "UP" in operands or bool(re.search(r"!?P\d", operands))
        found.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None, conditional))
    return found


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Innermost loops: what lies between a branch and an earlier place it goes back to."""
    spans = [(x.target, x.address) for x in code if x.target is not None and x.target < x.address]
    for first, last in spans:
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in spans):
            yield [x for x in code if first <= x.address <= last]


def ways(body: list[Instruction], opcodes: str = "") -> tuple[int, int]:
    """The fewest and the most instructions, of opcodes that begin so, from a loop's first to its last."""
    places = {x.address: i for i, x in enumerate(body)}
    least, most = [0] * len(body), [0] * len(body)
    for i in range(len(body) - 1, -1, -1):
        x, after = body[i], []
        if i + 1 < len(body) and not (x.target is not None and not x.conditional):
            after.append(i + 1)
        if x.target is not None and x.target in places and places[x.target] > i:
            after.append(places[x.target])
        own = x.opcode.startswith(opcodes)
        least[i] = own + min((least[j] for j in after), default=0)
        most[i] = own + max((most[j] for j in after), default=0)
    return least[0], most[0]


def sweeps(sass: str, models: int, itemsize: int) -> list[Sweep]:
    """The loops of a function that load logits, in order."""
    found = []
    for body in loops(instructions(sass)):
        loads: dict[str, int] = {}
        for x in body:
            if x.opcode.startswith("LDG"):
                width = next((part for part in x.opcode.split(".") if part in WIDTH), "32")
                loads[width] = loads.get(width, 0) + 1
        entries = sum(WIDTH.get(width, 4) * count for width, count in loads.items()) // (models * itemsize)
        if entries < 4:
            continue
        (shortest, longest), (mufu, _) = ways(body), ways(body, "MUFU")
        each = round(shortest / entries, 1), round(longest / entries, 1), round(mufu / entries, 2)
        found.append(Sweep(entries, *each, loads))
    return found


def predicted(found: list[Sweep], rows: int, vocabulary: int, card: Card, programs: int, models: int = 2,
              itemsize: int = 2, close: bool = False) -> dict[str, float]:  # fmt: skip
    """Milliseconds by issue and by memory, and their larger one over the floor of one read of each logit and one write.

    programs: rows that are swept at a time; what of them L2 cannot hold is read again by every later sweep.
    """
    entries = rows * vocabulary
    lanes = sum(max(s.longest if close else s.shortest, 8 * ISSUE * s.mufu) for s in found)
    issue = entries * lanes / (card.processors * 128 * card.clock * ISSUE)
    floor = entries * itemsize * (models + 1) / card.copy
    resident = programs * vocabulary * itemsize * models
    missed = max(0.0, 1 - 0.6 * card.l2 / resident)
    memory = floor + entries * itemsize * models * missed * (len(found) - 1) / card.copy
    return {"issue_ms": 1e3 * issue, "memory_ms": 1e3 * memory, "over_floor": max(issue, memory) / floor}


#: Rows of the table: a name, and the arguments of tests.aot's variant.
VARIANTS = {
    "kl": dict(symbol="Kl"), "js": dict(symbol="Gjs"), "tvd": dict(symbol="Tvd"), "rkl": dict(symbol="Rkl"),
    "labels": dict(symbol=None, labels="plain"), "js with labels": dict(symbol="Gjs", labels="plain"),
    "js, V = 50257": dict(symbol="Gjs", vocabulary=50257),
    "js, V = 50257, views": dict(symbol="Gjs", vocabulary=50257, lines=False),
}  # fmt: skip


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
        entry |= {way: round(sum(getattr(s, way) for s in found), 1) for way in ("shortest", "longest", "mufu")}
        for vocabulary in (128256, 32000) if "V" not in name else (50257,):
            launch = aot.launch.heuristic(8192, vocabulary, 2, aot.TARGETS["sm_90"][1])
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
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table = measured()
    for name, entry in table.items():
        each = " + ".join(f"{s['shortest']}..{s['longest']}" for s in entry["sweeps"])
        ratios = "  ".join(f"{k}: {v['over_floor']}" for k, v in entry.items() if k.startswith("V"))
        print(f"{name:16s} {each} = {entry['shortest']}..{entry['longest']}  MUFU {entry['mufu']}  "
              f"registers {entry['registers']}  ÷ floor {ratios}")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({"triton": triton.__version__, "card": asdict(H100), "table": table}, indent=1))


if __name__ == "__main__":
    main()
