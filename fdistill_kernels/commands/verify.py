"""`fdistill verify`: every backend beside a float64 reference, eager PyTorch in hard rows, or other libraries."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from .. import backends
from ..divergences import TABLE, Divergence
from .common import DTYPES, Command, add_backend, add_divergences, as_divergence, as_shape, show


def add(command: Command) -> None:
    """The command's arguments."""
    # fmt: off
    parser = command("verify", run, "Compare every backend with a float64 reference; exit with status 1 if an error "
                                    "is above its limit.")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="dtypes of the logits; default: all that can run")
    parser.add_argument("--shape", type=as_shape, metavar="N,V",
                        help="rows and vocabulary; default: 8,5003, and with --precision, which has 4 rows, 4,5003")
    add_divergences(parser, read=_checked)
    parser.add_argument("--precision", action="store_true",
                        help="compare in numerically hard rows, beside the errors of eager PyTorch")
    parser.add_argument("--peers", action="store_true",
                        help="compare the losses of other installed libraries with ours and with the reference")
    add_backend(parser, "backend to show with --precision; default: all")
    # fmt: on


def _checked(text: str) -> Divergence | str:
    """A divergence to verify; or "labels", the peers' cross-entropy to labels."""
    return text if text == "labels" else as_divergence(text)


def run(args: argparse.Namespace) -> int:
    """Runs it; its exit status."""
    from ..verify import verify

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
    show(args, [{**dataclasses.asdict(o), "ok": o.ok} for o in outcomes],
          ("divergence", "dtype", "backend", "loss", "d student", "d teacher", "tolerance", ""), rows,
          f"{sum(o.ok for o in outcomes)} of {len(outcomes)} within tolerance of the float64 reference")  # fmt: skip
    return 0 if all(o.ok for o in outcomes) else 1


def _errors(ours: Sequence[float], beside: Sequence[float]) -> list[str]:
    return [f"{one:.0e} ({other:.0e})" for one, other in zip(ours, beside, strict=True)]


def _peers(args: argparse.Namespace) -> int:
    from .. import peers
    from ..peers.measure import DIVERGENCES, compare

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
    show(args, found, ("peer", "form", "loss", "dtype", "loss (ours)", "gradients (ours)", "", "our call"), rows,
          f"{len(ran)} mean the same, {len(missed)} do not, {len(found) - len(ran) - len(missed)} cannot run "
          "here")  # fmt: skip
    return 1 if missed else 0


def _precision(args: argparse.Namespace) -> int:
    from ..precision import ROWS, TOLERANCES, precision, tolerances

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
    show(args, found, ("divergence", "backend", "case", "loss (eager)", "d student (eager)", "d teacher (eager)",
                        "own limit", ""),
          rows, f"{sum(r['ok'] for r in found)} of {len(found)} within {TOLERANCES[0]:g} of the loss and "
                f"{TOLERANCES[1]:g} (or their own limit, as docs/precision.md says) of a gradient's largest "
                "entry")  # fmt: skip
    return 0 if all(r["ok"] for r in found) else 1
