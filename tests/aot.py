"""Ahead-of-time compilation of the Triton kernels: registers, spills, shared memory, wide loads, for every target.

    python -m tests.aot            prints the table of the installed Triton and writes tests/aot/VERSION.json
    python -m tests.aot --json     prints it as JSON; with --part a few of each target
Runs without a GPU, in a process of its own: not under TRITON_INTERPRET. `make aot` writes the tables of three versions.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import counts
from fdistill_kernels.backends.triton import CONSTANTS, OTHERS, cut, kind_of, launch
from fdistill_kernels.backends.triton.kernels import (
    head_statistics,
    rest,
    row_metrics,
    row_statistics,
    row_terms,
    rows,
    terms,
    tile_products,
    tiles,
)
from fdistill_kernels.divergences import by_key

RESULTS = Path(__file__).with_suffix("")
TARGETS = {
    "sm_80": (
        GPUTarget("cuda", 80, 32),
        launch.Device("A100", 108, 40 << 20, without_wide_products=True, registers=launch.REGISTERS),
    ),
    "sm_90": (
        GPUTarget("cuda", 90, 32),
        launch.Device("H100", 132, 50 << 20, generation=9, registers=launch.REGISTERS),
    ),
    "sm_100": (
        GPUTarget("cuda", 100, 32),
        launch.Device("B200", 148, 126 << 20, generation=10, registers=launch.REGISTERS),
    ),
    "sm_120": (
        GPUTarget("cuda", 120, 32),
        launch.Device("RTX 5090", 170, 96 << 20, without_wide_products=True, registers=launch.REGISTERS),
    ),
    "gfx942": (GPUTarget("hip", "gfx942", 64), launch.Device("MI300X", 304, 4 << 20, lanes=64)),
}


def divergence_of(symbol):
    """That which has these terms on a GPU."""
    if symbol == "Js":
        return by_key("Gjs 0.5 1.0 0.5")
    return by_key(f"{symbol} {0.25 if symbol == 'Gjs' else 0.5} 1.0 0.5")


def row_variant(symbol, dtype="bf16", vocabulary=128256, gradients="student", labels=None, phase="WHOLE", capped=False,
                lines=True, temperatures=1, card=None):  # fmt: skip
    """A name, and what `ASTSource` takes, for a call as the heuristic would launch it."""
    itemsize = 4 if dtype == "fp32" else 2
    chosen = launch.heuristic(8192, vocabulary, itemsize, card, symbol or "labels", "teacher" in gradients)
    logits, f32 = f"*{dtype}", "*fp32"
    labelled, weighted = labels is not None or symbol == "Dkd", labels == "smoothed"
    types = {
        "student": logits, "teacher": logits if symbol else None,
        "student_gradient": logits if "student" in gradients else None,
        "teacher_gradient": logits if "teacher" in gradients else None, "parts": f32,
        "partials": f32 if phase != "WHOLE" else None, "tickets": "*i32" if phase == "TOGETHER" else None, "row_scale": f32, "student_inverse_temperature": f32,
        "teacher_inverse_temperature": f32 if temperatures == 2 else None,
        "divergence_scale": f32, "cross_entropy_scale": f32, "z_loss_scale": f32,
        "labels": "*i64" if labelled else None, "class_weight": f32 if weighted else None,
        "class_weight_sum": f32 if weighted else None,
        "coefficients": f32 if symbol in row_terms.BY_SYMBOL else None,
        **dict.fromkeys(("student_cap", "teacher_cap"), "fp32" if capped else None),
        **dict.fromkeys(("rows", "inner", "vocabulary", "span", "student_outer", "student_inner", "teacher_outer",
                         "teacher_inner", "gradient_outer", "gradient_inner"), "i32"),
        **dict.fromkeys((*CONSTANTS, *OTHERS, "smoothing"), "fp32"),
    }  # fmt: skip
    constants = {
        "KIND": kind_of(divergence_of(symbol) if symbol else None, "teacher" in gradients), "SMOOTHED": weighted, "PHASE": getattr(rows, phase).value,
        "SPLITS": 1 if phase == "WHOLE" else 16, "BLOCK": chosen.block,
        "LINE": 16 // itemsize if lines else 1,
    }  # fmt: skip
    parts = (symbol or "labels alone", dtype, gradients or "no gradient", labels, phase.lower(),
             "capped" if capped else None, None if lines else "views",
             "two temperatures" if temperatures == 2 else None,
             None if vocabulary == 128256 else f"V = {vocabulary}")  # fmt: skip
    name = "/".join(filter(None, parts))
    return name, rows.row_kernel, types, constants, chosen.options


def statistics_variant(symbol, statistics, dtype="bf16", vocabulary=128256, card=None):
    """The same for what a divergence asks of its rows."""
    chosen = launch.heuristic(8192, vocabulary, 2, card, "statistics")
    sums, coefficients = row_terms.STATISTICS[symbol]
    divergence = divergence_of(symbol)
    types = {
        "student": f"*{dtype}", "teacher": f"*{dtype}",
        **dict.fromkeys(("coefficients", "row_scale", "student_inverse_temperature", "teacher_inverse_temperature"),
                        "*fp32"),
        "labels": "*i64" if symbol == "Dkd" else None, **dict.fromkeys(("student_cap", "teacher_cap")),
        **dict.fromkeys(CONSTANTS, "fp32"),
        **dict.fromkeys(("rows", "inner", "vocabulary", "student_outer", "student_inner", "teacher_outer",
                         "teacher_inner"), "i32"),
    }  # fmt: skip
    constants = {
        "SUMS": sums, "OF_SUMS": coefficients, "LARGEST_OF": row_terms.LARGEST.get(symbol), "MEMBERS": kind_of(divergence, False).MEMBERS,
        "BY": int(divergence.statistics.members == "mass"), "BLOCK": chosen.block, "LINE": 8,
    }  # fmt: skip
    return f"statistics/{symbol}/{dtype}", row_statistics.row_statistics_kernel, types, constants, chosen.options


def metrics_variant(teacher, vocabulary=128256, card=None):
    """The same for the metrics of rows."""
    chosen = launch.heuristic(8192, vocabulary, 2, card, "statistics")
    vectors = ("parts", "row_scale", "student_inverse_temperature", "teacher_inverse_temperature")
    types = {
        "student": "*bf16", "teacher": "*bf16" if teacher else None, **dict.fromkeys(vectors, "*fp32"), "labels": "*i64",
        **dict.fromkeys(("student_cap", "teacher_cap")),
        **dict.fromkeys(("rows", "inner", "vocabulary", "student_outer", "student_inner", "teacher_outer",
                         "teacher_inner"), "i32"),
    }  # fmt: skip
    name = f"metrics/bf16/{'two models' if teacher else 'student'}"
    return name, row_metrics.row_metrics_kernel, types, {"BLOCK": chosen.block, "LINE": 8}, chosen.options


def rest_variant(rest_kernel, dtype="bf16", labels=False, capped=False, vocabulary=128256, card=None):
    """The same for rows beside a list."""
    chosen = launch.heuristic(8192, vocabulary, 4 if dtype == "fp32" else 2, card, "rest")
    function, i32, f32 = getattr(rest, rest_kernel), "i32", "*fp32"
    types = {
        **dict.fromkeys(("student", "gradient"), f"*{dtype}"), "marks": "*i32", "ids": "*i64",
        **dict.fromkeys(("statistics", "row_scale", "rates", "rest_top", "of_rest", "log_rest", "values"), f32),
        **dict.fromkeys(("top", "of_plain", "log_all", "constant"), f32 if labels else None), "cap": "fp32" if capped else None,
    }  # fmt: skip
    constants = {"PLAIN": labels, "BLOCK": chosen.block, "LIST_BLOCK": 64}
    constants = {k: v for k, v in constants.items() if k in function.arg_names}
    types = {n: types.get(n, i32) for n in function.arg_names if n not in constants}
    shown = rest_kernel.removesuffix("_kernel").replace("_", "/")
    name = "/".join(filter(None, (shown, dtype, "labels" if labels else None, "capped" if capped else None)))
    return name, function, types, constants, chosen.options


def tile_variant(kernel, symbol=None, dtype="bf16", phase="GRADIENT", labels=None, live=True, share=False,
                 card=None):  # fmt: skip
    """The same for a kernel of the cut path: heads without a bias, widths of whole blocks."""
    matrix, f32, i32 = f"*{dtype}", "*fp32", "i32"
    teacher = symbol is not None
    gradient = None if phase == "TOTALS" else matrix
    types = {
        **dict.fromkeys(("hidden", "weight", "student", "student_weight", "other"), matrix), "gradient": gradient,
        **dict.fromkeys(("teacher", "teacher_weight"), matrix if teacher else None),
        **dict.fromkeys(("row_scale", "rates", "partials", "facts", "out"), f32),
        **dict.fromkeys(("bias", "student_bias", "teacher_bias", "cap", "student_cap", "teacher_cap"), None),
        "labels": "*i64" if labels else None, "class_weight": f32 if labels == "smoothed" else None,
        "live": "*i8" if live else None, "share": (f32 if dtype == "fp16" else matrix) if share else None, "out_bias": None,
        **dict.fromkeys(("scale", "student_scale", "teacher_scale", "log_threshold", *CONSTANTS), "fp32"),
    }  # fmt: skip
    if kernel == "tile_kernel" and phase == "GRADIENT":
        types["partials"] = None
    constants = {
        "TERMS": getattr(terms, symbol) if symbol else None, "FACTORS": terms.FACTORS.get(symbol), "EXCHANGED": None, "SMOOTHED": labels == "smoothed", "PLAIN": bool(labels),
        "PHASE": getattr(tiles, phase).value, "EVEN": True, "STUDENT_EVEN": True, "TEACHER_EVEN": True,
        **dict.fromkeys(("PRECISION", "STUDENT_PRECISION", "TEACHER_PRECISION"), "ieee" if dtype == "fp32" else "tf32"),
        "BLOCK": tiles.BLOCK, "BLOCKS": 16, "SHARED": share and dtype == "fp16", "STAGES": cut.stages(card),
        "BLOCK_V": cut.tile_width(
            getattr(tiles, phase) if kernel == "tile_kernel" else None, symbol, bool(labels), labels == "smoothed",
            4 if dtype == "fp32" else 2, card),
        **dict.fromkeys(("BLOCK_D", "STUDENT_D", "TEACHER_D", "BLOCK_K"), 32 if dtype == "fp32" else 64),
    }  # fmt: skip
    function = {"statistics_kernel": head_statistics, "tile_kernel": tiles, "product_kernel": tile_products}[kernel]
    function = getattr(function, kernel)
    names = function.arg_names
    # strides of 1, of the buffer's transpose where rows have shares
    constants.update(dict.fromkeys(("i_stride", "i_live"), 1) if share else dict.fromkeys(("k_stride", "k_live"), 1))
    types = {n: types.get(n, i32) for n in names if n not in constants}
    parts = (kernel, symbol, dtype, labels, phase.lower() if kernel == "tile_kernel" else None, None if live else "all",
             "shares" if share else None)  # fmt: skip
    constants = {k: v for k, v in constants.items() if k in names}
    return (
        "/".join(filter(None, parts)),
        function,
        types,
        constants,
        {"num_warps": 8 * 32 // card.lanes, **launch.ALWAYS},
    )


VARIANTS = [
    *[dict(kernel="statistics_kernel", dtype=d, labels="plain", live=False) for d in ("bf16", "fp16", "fp32")],
    *[dict(kernel="tile_kernel", symbol=s, phase=p) for s in ("Js", "Kl", "Alpha") for p in ("TOTALS", "GRADIENT")],
    *[dict(kernel="tile_kernel", symbol=s, phase=p, labels="smoothed", live=False) for s in ("Js", None)
      for p in ("TOTALS", "GRADIENT")],
    *[dict(kernel="tile_kernel", symbol=s, phase="GRADIENT", labels="plain") for s in ("Js", None)],
    *[dict(kernel="tile_kernel", symbol="Js", dtype="fp32", phase=p) for p in ("TOTALS", "GRADIENT")],
    *[dict(kernel="product_kernel", dtype=d, live=x) for d, x in (("bf16", True), ("bf16", False), ("fp32", True))],
    *[dict(kernel="product_kernel", dtype=d, share=True) for d in ("bf16", "fp16", "fp32")],
    *[dict(symbol=symbol) for symbol in terms.BY_SYMBOL],
    *[dict(symbol=s, **more) for s in ("Kl", "Js", "Rkl") for more in (
        dict(dtype="fp32"), dict(dtype="fp16"), dict(gradients=""), dict(gradients="student teacher"),
        dict(labels="plain"), dict(labels="smoothed"))],
    dict(symbol="Js", vocabulary=50257), dict(symbol="Kl", vocabulary=50257, dtype="fp32"),
    dict(symbol="Js", lines=False), *[dict(symbol=s, temperatures=2) for s in ("Js", "Tvd")],
    dict(symbol="Js", capped=True), dict(symbol=None, labels="plain", capped=True),
    *[dict(symbol=symbol) for symbol in row_terms.STATISTICS],
    dict(symbol="Dkd", gradients="student teacher"), dict(symbol="TailAware", phase="TOTALS"),
    dict(teacher=True), dict(teacher=False), *[dict(statistics=True, symbol=symbol) for symbol in row_terms.STATISTICS],
    *[dict(symbol="Js", phase=p) for p in ("STATISTICS", "TOTALS", "GRADIENT")],
    *[dict(symbol=None, labels=x, dtype=d) for x in ("plain", "smoothed") for d in ("bf16", "fp32")],
    *[dict(rest_kernel=k, **more) for k in ("rest_statistics_kernel", "rest_gradient_kernel") for more in (
        dict(), dict(dtype="fp32"), dict(labels=True), dict(capped=True))],
    *[dict(symbol=s, phase="TOGETHER") for s in ("Kl", "Js")],
]  # fmt: skip


STRIDES = ("student_outer", "student_inner", "teacher_outer", "teacher_inner", "gradient_outer", "gradient_inner")
KINDS = {"rest_kernel": rest_variant, "kernel": tile_variant, "statistics": statistics_variant, "symbol": row_variant}


def compiled(arguments, target_name):
    """One variant for one target, and its name."""
    target, card = TARGETS[target_name]
    kind = next((known for asked, known in KINDS.items() if asked in arguments), metrics_variant)
    name, function, types, constants, options = kind(**arguments, card=card)
    names = function.arg_names
    signature = {n: types[n] if types.get(n) else "constexpr" for n in names}
    constants.update({n: None for n in names if n in types and types[n] is None})
    divisible = [i for i, n in enumerate(names) if signature[n].startswith("*") or signature[n] == "i32"]
    odd = {"rows", "inner", "list_size", "words"}
    if arguments.get("vocabulary", 0) % 16:  # rows start anywhere
        odd |= {"vocabulary", *STRIDES}
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible if names[i] not in odd}
    source = ASTSource(function, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    stages = cut.stages(card) if "kernel" in arguments else 2 if target.backend == "hip" else 3
    return triton.compile(source, target=target, options={"num_stages": stages, **options}), name


def compile_one(job):
    """Resources of one variant on one target."""
    arguments, target_name = job
    made, name = compiled(arguments, target_name)
    found = resources_amd(made) if TARGETS[target_name][0].backend == "hip" else resources_nvidia(made)
    return f"{name} @ {target_name}", {**found, "shared": made.metadata.shared}


def disassembled(compiled):
    """What cuobjdump says of a cubin's resources, and its SASS."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return tuple(
            subprocess.check_output([tools / "cuobjdump", flag, file.name], text=True, stderr=subprocess.DEVNULL)
            for flag in ("-res-usage", "-sass")
        )


def registers(usage):
    """Of a thread."""
    return int(re.search(r"REG:(\d+)", usage)[1])


def resources_nvidia(compiled):
    """From the cubin; double precision would betray a constant that Triton took for float64."""
    usage, code = disassembled(compiled)
    return {
        "registers": registers(usage),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "aside": put_aside(code),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.\S*128", code)),
        "wide_stores": len(re.findall(r"\bSTG\.\S*128", code)),
        "double": len(re.findall(r"\bD(?:ADD|MUL|FMA|SETP)\b", code)),
        "matrix": len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", code)),
    }


def put_aside(code):
    """The largest share of a loop's instructions that move what registers do not hold, along its shortest way."""
    ways = [counts.shortest(body) for body in counts.loops(counts.instructions(code))]
    return max((round(sum(x.opcode.startswith(("LDL", "STL")) for x in way) / len(way), 2) for way in ways), default=0)


@contextlib.contextmanager
def without_a_linker():
    """Triton before 3.7 links AMD's code by a program that its wheel does not bring; what is read here is not linked."""
    with tempfile.TemporaryDirectory() as folder:
        if not os.environ.get("TRITON_HIP_LLD_PATH"):
            linker = Path(folder) / "ld.lld"
            linker.write_text('#!/bin/sh\nfor last; do :; done\ncp "$5" "$last" 2>/dev/null || : > "$last"\n')
            linker.chmod(0o755)
            os.environ["TRITON_HIP_LLD_PATH"] = str(linker)
        yield


def put_aside_amd(code):
    """The same of AMD's assembly, of all lines of an innermost loop."""
    lines = [line.split(";")[0].strip() for line in code.splitlines()]
    lines = [line for line in lines if line and not line.startswith((".p2align", ".loc", ".set"))]
    places = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    jumps = [
        (places.get(line.split()[-1], i), i)
        for i, line in enumerate(lines)
        if line.startswith(("s_cbranch", "s_branch"))
    ]
    spans = [(first, last) for first, last in jumps if first < last]
    inner = [s for s in spans if not any(s != other and s[0] <= other[0] and other[1] <= s[1] for other in spans)]
    loops = [lines[first : last + 1] for first, last in inner]
    return max((round(sum(x.startswith("scratch_") for x in loop) / len(loop), 2) for loop in loops), default=0)


def resources_amd(compiled):
    """From the assembly's own notes."""
    code = compiled.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        # in memory; what goes aside into accumulators' registers stays on chip
        "spill_bytes": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1]),
        "aside": put_aside_amd(code),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", code)),
        "double": len(re.findall(r"\bv_(?:add|mul|fma)_f64", code)),
        "matrix": len(re.findall(r"\bv_mfma_", code)),
    }


def part_for(target):
    if target == "sm_90":
        return [arguments for arguments in VARIANTS if arguments in counts.VARIANTS.values()]
    first = 10 * [name for name in TARGETS if name != "sm_90"].index(target)
    return [arguments for i, arguments in enumerate(VARIANTS) if i % 40 == first + i // 40 % 10]


def measure(workers=2, part=False):
    """Every variant on every target. A part of them: Hopper's of `benchmarks.counts`, which Triton then has in its cache,
    and of each other target one in forty, by turns.
    """
    jobs = [(arguments, target) for target in TARGETS for arguments in (part_for(target) if part else VARIANTS)]
    with without_a_linker(), ProcessPoolExecutor(workers) as pool:
        return dict(pool.map(compile_one, jobs))


def main():
    """Prints the table; with --json prints it as JSON and leaves the committed one alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print it as JSON, and leave the committed table alone")
    parser.add_argument("--part", action="store_true", help="a part of the variants, with --json")
    args = parser.parse_args()
    if args.part and not args.json:
        parser.error("--part is of --json: a table has every variant")
    table = measure(part=args.part)
    if args.json:
        print(json.dumps({"triton": triton.__version__, "kernels": table}))
        return
    lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{triton.__version__}.json").write_text(f"{{\n{lines}\n}}\n")
    for name, found in table.items():
        print(f"{name:55s}", *(f"{k} {v:4}" for k, v in found.items()))


if __name__ == "__main__":
    main()
