"""The `fdistill` command."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends
from .backends import cuda
from .divergences import TABLE, Divergence
from .doctor import details, lines, remedy, shareable
from .options import OnceParser, count
from .own import resolve
from .provenance import as_json, install

STUDENTS = ("kl", "js", "tvd")  # the default divergences of demo and bench
SEQUENCES = 16  # that `teacher verify --teacher` computes again
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show(
    args: argparse.Namespace, found: Any, header: Sequence[str], rows: Sequence[Sequence[object]], *after: str
) -> None:
    """Prints `found` as JSON with --json, and otherwise a table followed by the lines in `after`."""
    if args.json:
        return print(as_json(found, 1))
    _table(header, rows)
    for line in after:
        print(line)


def _divergence(text: str) -> Divergence:
    """The divergence of a name, or of a name with parameters as in alpha=0.3 and ab=0.2,0.7."""
    try:
        return resolve(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _checked(text: str) -> Divergence | str:
    """A divergence to verify; or "labels", the peers' cross-entropy to labels."""
    return text if text == "labels" else _divergence(text)


def _shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"0*([1-9]\d*),\s*0*([1-9]\d*)", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"shape must be N,V, such as 1024,32000, not {text!r}")
    n, v = int(found[1]), int(found[2])
    if n * v >= 2**60:
        raise argparse.ArgumentTypeError(f"no tensor has {n}·{v} entries")
    return n, v


def _threads(text: str) -> int:
    if (asked := count(text)) > (cores := os.cpu_count() or 1):
        raise argparse.ArgumentTypeError(f"must be at most {cores}, the cores of this machine, not {text!r}")
    return asked


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, not {text!r}")
    return int(text)


def _device(text: str) -> str:
    try:
        if torch.zeros(1, device=text).is_meta:
            raise ValueError("its tensors have a shape and no data")
    except Exception as error:  # torch raises different types for a missing driver, a missing card and a wrong name
        reason = str(error).splitlines()[0].split(". ")[0]  # of a device that torch was not built for, a page
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {textwrap.shorten(reason, 200)}") from error
    return text


def _list(args: argparse.Namespace) -> int:
    def ready(divergence: Divergence) -> list[str]:
        cpu = torch.device("cpu")
        return [name for name, m in backends.BACKENDS.items() if m.why_not(cpu, torch.float32, divergence) is None]

    found: list[dict[str, Any]] = [
        {"name": d.name, "parameters": d.named, "backends": ready(d)} for d in TABLE.values()
    ]
    rows = [(r["name"], " ".join(f"{k}={v if isinstance(v, str) else f'{v:g}'}" for k, v in r["parameters"].items()),
             " ".join(r["backends"])) for r in found]  # fmt: skip
    _show(args, found, ("divergence", "parameters", "backends here"), rows)
    return 0


def _state(backend: str, device: torch.device) -> str:
    """Whether a backend can compute js of float32 logits on a device, and why `auto` would not choose it."""
    reason = backends.BACKENDS[backend].why_not(device, torch.float32, TABLE["js"])
    passed_over = backends.why_not_auto(backend, device)
    return reason or (f"ready, but only if named: {passed_over}" if passed_over else "ready")


def _doctor(args: argparse.Namespace) -> int:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    remedies = [line for library in ("cpu", "cuda") for line in remedy(library)]
    report: dict[str, Any] = {
        "fdistill_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "triton": importlib.util.find_spec("triton") is not None,
        "cuda_library": cuda.LIBRARY.version if cuda.LIBRARY else None,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "auto": {d: backends.choose("auto", torch.device(d), torch.float32, TABLE["js"]) for d in devices},
        "backends": {name: {d: _state(name, torch.device(d)) for d in devices} for name in backends.BACKENDS},
        "remedies": remedies,
    }
    more = shareable(details() if args.report else {})
    report = shareable(report) | more
    if args.json:
        print(as_json(report, 1))
        return 0
    for key in ("fdistill_kernels", "torch", "python", "threads", "instruction_set", "triton", "cuda_library", "cuda"):
        print(f"{key}: {report[key]}")
    for name, states in report["backends"].items():
        for device, state in states.items():
            print(f"backend {name} on {device}: {state}")
    for device, name in report["auto"].items():
        print(f"auto on {device} logits: {name}")
    for line in (*report["remedies"], *(lines(more) if more else ())):
        print(line)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .verify import verify

    if args.precision and args.peers:
        raise ValueError("--precision and --peers are different reports: give only one of them")
    if args.backend != "auto" and not args.precision:
        raise ValueError("--backend is used only with --precision: without it every backend that can run is compared")
    if args.dtype and args.precision:
        raise ValueError("--dtype is not used with --precision, which is about float32")
    if "labels" in (args.divergence or ()) and not args.peers:
        raise ValueError("--divergence labels, the cross-entropy to labels, is compared only with --peers")
    if args.precision or args.peers:
        return (_peers if args.peers else _precision)(args)
    args.shape = args.shape or (8, 5003)
    default = ["float32", "bfloat16", "float16"] + (["float64"] if args.device == "cpu" else [])
    dtypes = [DTYPES[name] for name in args.dtype or default]
    outcomes = list(verify(args.device, dtypes, args.shape, args.divergence or list(TABLE.values())))
    if not outcomes:
        raise ValueError(f"no backend can compute {' or '.join(map(str, args.dtype or default))} on {args.device}: "
                         "nothing was compared")  # fmt: skip
    rows = [(o.divergence, o.dtype, o.backend, f"{o.loss_error:.1e}", f"{o.student_gradient_error:.1e}",
             f"{o.teacher_gradient_error:.1e}", f"{o.loss_tolerance:.0e} / {o.gradient_tolerance:.0e}",
             "ok" if o.ok else "MISS") for o in outcomes]  # fmt: skip
    _show(args, [{**dataclasses.asdict(o), "ok": o.ok} for o in outcomes],
          ("divergence", "dtype", "backend", "loss", "d student", "d teacher", "tolerance", ""), rows,
          f"{sum(o.ok for o in outcomes)} of {len(outcomes)} within tolerance of the float64 reference")  # fmt: skip
    return 0 if all(o.ok for o in outcomes) else 1


def _errors(ours: Sequence[float], beside: Sequence[float]) -> list[str]:
    return [f"{one:.0e} ({other:.0e})" for one, other in zip(ours, beside, strict=True)]


def _peers(args: argparse.Namespace) -> int:
    from . import peers
    from .peers.measure import DIVERGENCES, compare

    asked = args.divergence or DIVERGENCES
    # torch.compile's loss is the eager one
    chosen = [peer for d in asked for peer in peers.found(None, d) if peer.name != "torch.compile"]
    if not chosen:
        raise ValueError(f"--divergence: no peer computes {', '.join(map(str, asked))}")
    shape = args.shape or (8, 5003)
    found = [{"dtype": dtype, **dataclasses.asdict(one), "ok": one.ok} for dtype in args.dtype or ["float32"]
             for peer in chosen for one in [compare(peer, args.device, DTYPES[dtype], shape)]]  # fmt: skip
    rows = [(r["what"], r["form"], r["divergence"], r["dtype"],
             *(_errors(r["error"] or (), r["ours"] or ()) or ("", "")),
             "MISS" if not r["ok"] else "not run" if r["reason"] else "ok", r["reason"] or r["call"])
            for r in found]  # fmt: skip
    missed, ran = [r for r in found if not r["ok"]], [r for r in found if r["ok"] and not r["reason"]]
    if not missed and not ran:
        reasons = dict.fromkeys(f"{r['what']}: {r['reason']}" for r in found)
        raise ValueError(f"no peer can run here, so that nothing was compared ({'; '.join(reasons)})")
    _show(args, found, ("peer", "form", "loss", "dtype", "loss (ours)", "gradients (ours)", "", "our call"), rows,
          f"{len(ran)} mean the same, {len(missed)} do not, {len(found) - len(ran) - len(missed)} cannot run "
          "here")  # fmt: skip
    return 1 if missed else 0


def _precision(args: argparse.Namespace) -> int:
    from .precision import ROWS, TOLERANCES, precision, tolerances

    rows_asked, vocabulary = args.shape or (ROWS, 5003)
    if rows_asked != ROWS:
        raise ValueError(f"--precision has {ROWS} rows of each kind: give --shape {ROWS},{vocabulary}")
    device, asked = torch.device(args.device), args.divergence or list(TABLE.values())
    found = []
    for divergence in asked:
        for name, module in backends.BACKENDS.items():
            if args.backend not in (name, "auto") or module.why_not(device, torch.float32, divergence) is not None:
                continue
            for one in precision(divergence, args.device, name, vocabulary):
                limits = tolerances(divergence, name, one.case)
                found.append({"backend": name, **dataclasses.asdict(one), "limits": limits, "ok": one.within(limits)})
    if not found:
        backends.choose(args.backend, device, torch.float32, asked[0])  # raises, with the reason
    rows = [(r["divergence"], r["backend"], r["case"], *_errors(r["ours"], r["eager"]),
             "" if r["limits"] == TOLERANCES else f"{max(r['limits'][1:]):g}", "ok" if r["ok"] else "MISS")
            for r in found]  # fmt: skip
    _show(args, found, ("divergence", "backend", "case", "loss (eager)", "d student (eager)", "d teacher (eager)",
                        "own limit", ""),
          rows, f"{sum(r['ok'] for r in found)} of {len(found)} within {TOLERANCES[0]:g} of the loss and "
                f"{TOLERANCES[1]:g} (or their own limit, as docs/precision.md says) of a gradient's largest "
                "entry")  # fmt: skip
    return 0 if all(r["ok"] for r in found) else 1


def _bench(args: argparse.Namespace) -> int:
    from .bench import measure

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tune and args.report:
        raise ValueError("--tune and --report are different runs: give only one of them")
    if args.tune and (args.compile or args.backend not in ("auto", "triton")):
        raise ValueError("--tune times the Triton backend alone: leave out --compile and --backend")
    if args.tune:
        return _tune(args)
    how = args.shape, DTYPES[args.dtype], args.device, args.backend, args.compile
    if args.report:
        from .report import of_whole_shape, write

        report = write(args.report, args.divergence, *how, say=lambda line: print(line, file=sys.stderr, flush=True))
        _show(args, report, ("divergence", "loss", "ms", "÷ floor", "÷ ours", "MB"), of_whole_shape(report, args.shape),
              f"wrote {args.report}")  # fmt: skip
        return 0
    results = [{"divergence": str(divergence), **dataclasses.asdict(timing)}
               for divergence in args.divergence for timing in measure(divergence, *how)]  # fmt: skip
    about = {"shape": args.shape, "dtype": args.dtype, "threads": torch.get_num_threads()}
    ours = {r["divergence"]: r["seconds"] for r in results if r["what"] == "fdistill"}
    rows = [(r["divergence"], r["what"], f"{1e3 * r['seconds']:.1f} ms", f"{r['seconds'] / r['floor']:.2f}",
             f"{r['seconds'] / ours[r['divergence']]:.2f}") for r in results]  # fmt: skip
    if not args.json:
        print("forward and backward, N, V = {shape}, {dtype}, {threads} threads".format(**about))
    _show(args, {**about, "torch": torch.__version__, "results": results},
          ("divergence", "what", "median", "÷ floor", "÷ ours"), rows)  # fmt: skip
    return 0


def _tune(args: argparse.Namespace) -> int:
    from .backends.triton.launch import cache_file
    from .bench import tune

    found = [{"divergence": str(divergence), "seconds": seconds, **dataclasses.asdict(launch)}
             for divergence in args.divergence
             for launch, seconds in tune(divergence, args.shape, DTYPES[args.dtype], args.device)]  # fmt: skip
    rows = [[f"{x:.3g}" if isinstance(x, float) else x for x in r.values()] for r in found]
    _show(args, found, list(found[0]), rows, f"the fastest launch of each divergence is saved in {cache_file()}")
    return 0


def _demo(args: argparse.Namespace) -> int:
    if missing := _missing("transformers", "tokenizers", "matplotlib", "rich"):
        raise ValueError(_install(missing, "demo"))
    from .demo import main

    return main(args)


#: The commands that `sequence` runs, and the packages they need.
SEQUENCE = {
    "train": "Distil a Hugging Face model: draw samples from the teacher, train the student, evaluate it and write a "
             "report.",
    "sample-teacher": "Draw the teacher's samples that train would draw first, and store them.",
    "evaluate": "Measure a student on held-out data: perplexity, likelihood and coverage risk, BLEU, chrF and TER.",
}  # fmt: skip
BUILD = "Run a teacher on every sequence of a data file, and save its outputs in a store."
NEEDED = ("transformers", "accelerate", "datasets", "sacrebleu", "yaml", "matplotlib", "rich")


def _teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of `fdistill teacher`, each with its arguments."""
    actions = parser.add_subparsers(required=True, metavar="action", dest="action")

    def action(name: str, help: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help, description=help)
        # without a default of its own, so that --json may also stand before the action
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of text")
        return sub

    action("build", BUILD)
    looked = action("inspect", "Show the size of a store, its settings, and how much probability its lists cover.")
    looked.add_argument("folder")
    looked.add_argument("--plot", metavar="FILE", help="also draw a picture: covered probability, or sequence lengths")
    held = action("verify", "Check all checksums of a store; exit with status 1 if it is damaged.")
    held.add_argument("folder")
    held.add_argument("--repair", action="store_true", help="move damaged shards into FOLDER/damaged; nothing may be "
                      "writing to the store; then the command that built it adds their sequences again")  # fmt: skip
    held.add_argument("--teacher", help="folder or hub name of the model")
    held.add_argument("--sequences", type=count, default=SEQUENCES, metavar="N",
                      help=f"how many sequences are computed again with --teacher; default: {SEQUENCES}")  # fmt: skip
    held.add_argument("--seed", type=int, default=0, help="which sequences these are; default: 0")
    served = action("serve", "Serve a model over HTTP, for `--teacher http://...` and for clients of vLLM's API.")
    served.add_argument("--teacher", required=True, help="folder or hub name of the model")
    served.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    served.add_argument("--port", type=_port, default=8000, help="port to listen on; default: 8000")


def _teacher(args: argparse.Namespace) -> int:
    from .sequence import build

    if args.action == "serve":
        from .sequence.serve import server as of_model

        server = of_model(args.teacher, args.host, args.port)
        url = f"http://{args.host}:{server.server_address[1]}"
        found = {"teacher": args.teacher, "url": url}
        print(as_json(found) if args.json else f"serving {args.teacher} at {url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        server.server_close()
        return 0
    if args.action == "inspect":
        found = build.inspect(args.folder, args.plot)
    elif not args.teacher and (args.seed or args.sequences != SEQUENCES):
        raise ValueError("--sequences and --seed choose what --teacher computes again: give --teacher, too")
    else:
        found = build.verify(args.folder, args.teacher, args.sequences, args.seed, args.repair)
    print(as_json(found, 1) if args.json else "\n".join(f"{k:20s} {v}" for k, v in found.items()))
    if args.action == "verify" and not (found["damaged"] or found["sequences"] or found.get("set_aside")):
        raise ValueError(f"{args.folder} holds no sequences: nothing was verified")
    if not found["damaged"] or args.action != "verify":
        return 0
    print("damaged shards can be moved aside with --repair; the command that built the store then adds what they had, "
          "and writes a damaged head anew", file=sys.stderr)  # fmt: skip
    return 1


def _missing(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _install(missing: Sequence[str], extra: str) -> str:
    return f"{', '.join(missing)} missing: {install(extra)}"


def _sequence(argv: Sequence[str]) -> int | None:
    """Runs a command of `sequence`, which parses its own options, and returns its exit status.

    Returns None for the other commands, whose options `parser` has.
    """
    name, *rest = argv or [""]
    if name not in (*SEQUENCE, "teacher"):
        return None
    if missing := _missing(*NEEDED):
        if {"-h", "--help"} & set(argv):
            return None
        print(f"fdistill: {_install(missing, 'sequence')}", file=sys.stderr)
        return 2
    if name == "teacher":
        action = next((i for i, word in enumerate(rest) if word != "--json"), 0)  # which may also stand before it
        if rest[action : action + 1] != ["build"]:
            return None
        del rest[action]
    from .sequence import build, run

    return run.main("teacher build", rest, build.build) if name == "teacher" else run.main(name, rest)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. The options of `SEQUENCE` and of `teacher build` are not in it."""
    top = OnceParser("fdistill", description="Fused f-divergence losses for language-model distillation.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name, run, help):  # type: ignore[no-untyped-def]
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return sub

    def divergences(
        sub: argparse.ArgumentParser, default: Sequence[str] = (), read: Callable[[str], Any] = _divergence
    ) -> None:
        help = f"names, with parameters as in alpha=0.3 (see `fdistill list`); default: {' '.join(default) or 'all'}"
        sub.add_argument("--divergence", nargs="+", type=read, metavar="NAME", help=help,
                         default=[TABLE[name] for name in default] or None)  # fmt: skip

    # fmt: off
    demo = command("demo", _demo, "Train a small GPT-2 teacher on real text, distil a student from it by each of "
                                  "several divergences, and compare them with a student that has no teacher.")
    divergences(demo, STUDENTS)
    demo.add_argument("--text", metavar="FILE", help="UTF-8 text to train on; default: Python's language reference")
    demo.add_argument("--out", default="demo-output", metavar="DIR", help="folder of the results; default: demo-output")
    for name, steps, of in (("teacher", 320, "the teacher"), ("start", 60, "the start that all students share"),
                            ("student", 150, "each student")):
        demo.add_argument(f"--{name}-steps", type=count, default=steps, metavar="N",
                          help=f"training steps of {of}; default: {steps}")
    demo.add_argument("--expect", type=Path, metavar="FILE",
                      help="exit with status 1 unless the results are close to those of this results.json")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights and batches; default: 0")
    demo.add_argument("--restart", action="store_true", help="ignore the checkpoint in the folder, if there is one")

    verify = command("verify", _verify, "Compare every backend with a float64 reference; exit with status 1 if an "
                                        "error is above its limit.")
    verify.add_argument("--dtype", nargs="+", choices=DTYPES, help="dtypes of the logits; default: all that can run")
    verify.add_argument("--shape", type=_shape, metavar="N,V",
                        help="rows and vocabulary; default: 8,5003, and with --precision, which has 4 rows, 4,5003")
    divergences(verify, read=_checked)
    verify.add_argument("--precision", action="store_true",
                        help="compare in numerically hard rows, beside the errors of eager PyTorch")
    verify.add_argument("--peers", action="store_true",
                        help="compare the losses of other installed libraries with ours and with the reference")

    bench = command("bench", _bench, "Time a loss, forward and backward, beside eager PyTorch and the memory floor.")
    bench.add_argument("--shape", type=_shape, default=(1024, 32000), metavar="N,V",
                       help="rows and vocabulary; default: 1024,32000")
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                       help="dtype of the logits; default: float32")
    bench.add_argument("--threads", type=_threads, metavar="N", help="threads of the CPU; default: as torch is set")
    bench.add_argument("--compile", action="store_true", help="also time torch.compile of the eager loss")
    divergences(bench, STUDENTS)
    bench.add_argument("--report", metavar="FILE", help="write an HTML page with charts of time, memory and errors, "
                                                        "beside other installed libraries")
    bench.add_argument("--tune", action="store_true",
                       help="time every launch of the Triton backend for this shape, and save the fastest")
    for sub, of in ((verify, "backend to show with --precision; default: all"), (bench, "backend; default: auto")):
        sub.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, ...; default: cpu")
        sub.add_argument("--backend", default="auto", choices=("auto", *backends.BACKENDS), help=of)
    # fmt: on

    missing = _missing(*NEEDED)
    needs = f" (needs {install('sequence')})" if missing else ""
    for name, help in SEQUENCE.items():
        command(name, None, help + needs)  # `_sequence` runs it
    help = "Build, inspect or verify a store of a teacher's outputs, or serve a model."
    sub = command("teacher", _teacher, help + needs)
    if not missing:
        _teacher_arguments(sub)
    doctor = command("doctor", _doctor, "Show which backends can run here, which are used, and why others cannot.")
    doctor.add_argument("--report", action="store_true", help="also show what a bug report needs")
    command("list", _list, "List the divergences and their parameters.")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    It is 0; 1 if a check failed; 2 for bad input, after one line; 130 after Ctrl-C; 141 if nobody reads the output.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? in place of ÷
    try:
        try:
            return _main(argv)
        finally:
            if sys.stdout is not None:  # as it is in `fdistill list >&-`
                sys.stdout.flush()
    except BrokenPipeError:  # as in `fdistill list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end
        return 141
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _main(argv: Sequence[str]) -> int:
    if (status := _sequence(argv)) is not None:
        return status
    args = parser().parse_args(argv)
    try:
        return int(args.run(args))
    except BrokenPipeError:
        raise
    except Exception as error:
        if (told := _told(error)) is None:
            raise
        print(f"fdistill {argv[0]}: {told}", file=sys.stderr)
        return 2


def _told(error: Exception) -> str | None:
    """What a user can make of an error, in one line; None for those that are faults of the program."""
    text = " ".join(str(error).split())
    if isinstance(error, (OSError, ValueError)):  # a missing file, a read-only folder, a call that is refused
        return text
    asked = re.search(r"can't allocate memory: you (tried to allocate \d+ bytes)|(Tried to allocate [\d.]+ \w+)", text)
    if asked or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"there is not enough memory ({(asked[1] or asked[2]).lower() if asked else text})"
    if "there is no such kernel" in text:
        return text  # which says how to build it again
    return None


if __name__ == "__main__":
    sys.exit(main())
