"""`fdistill verify`: every backend beside a float64 reference, eager PyTorch in hard rows, or other libraries."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
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
    add_backend(parser, "backend to show with --precision; default: all", several=True)
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
    asked = args.divergence or list(TABLE.values())
    outcomes = [(device, outcome) for device in args.device
                for outcome in verify(device, _dtypes(args, device), args.shape, asked)]  # fmt: skip
    if not outcomes:
        names = (str(dtype).removeprefix("torch.") for dtype in _dtypes(args, args.device[0]))
        raise ValueError(f"no backend can compute {' or '.join(names)} on {' or '.join(args.device)}: nothing was "
                         "compared")  # fmt: skip
    rows = [(o.divergence, o.dtype, device, o.backend, f"{o.loss_error:.1e}", f"{o.student_gradient_error:.1e}",
             f"{o.teacher_gradient_error:.1e}", f"{o.loss_tolerance:.0e} / {o.gradient_tolerance:.0e}",
             "ok" if o.ok else "MISS") for device, o in outcomes]  # fmt: skip
    good = sum(o.ok for _, o in outcomes)
    show(args, [{"device": device, **dataclasses.asdict(o), "ok": o.ok} for device, o in outcomes],
          ("divergence", "dtype", "device", "backend", "loss", "d student", "d teacher", "tolerance", ""), rows,
          f"{good} of {len(outcomes)} within tolerance of the float64 reference")  # fmt: skip
    return 0 if good == len(outcomes) else 1


def _dtypes(args: argparse.Namespace, device: str) -> list[torch.dtype]:
    """Those asked for, or all that can run."""
    default = ["float32", "bfloat16", "float16"] + (["float64"] if torch.device(device).type == "cpu" else [])
    return [DTYPES[name] for name in args.dtype or default]


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
    found = [{"device": device, "dtype": dtype, **dataclasses.asdict(one), "ok": one.ok}
             for device in args.device for dtype in args.dtype or ["float32"] for peer in chosen
             for one in [compare(peer, device, DTYPES[dtype], shape)]]  # fmt: skip
    rows = [(r["what"], r["form"], r["divergence"], r["dtype"], r["device"],
             *(_errors(r["error"] or (), r["ours"] or ()) or ("", "")),
             "MISS" if not r["ok"] else "not run" if r["reason"] else "ok", r["reason"] or r["call"])
            for r in found]  # fmt: skip
    missed, ran = [r for r in found if not r["ok"]], [r for r in found if r["ok"] and not r["reason"]]
    if not missed and not ran:
        reasons = dict.fromkeys(f"{r['what']}: {r['reason']}" for r in found)
        raise ValueError(f"no peer can run here, so that nothing was compared ({'; '.join(reasons)})")
    show(args, found,
          ("peer", "form", "loss", "dtype", "device", "loss (ours)", "gradients (ours)", "", "our call"), rows,
          f"{len(ran)} mean the same, {len(missed)} do not, {len(found) - len(ran) - len(missed)} cannot run "
          "here")  # fmt: skip
    return 1 if missed else 0


def _precision(args: argparse.Namespace) -> int:
    from ..precision import ROWS, TOLERANCES, precision, tolerances

    rows_asked, vocabulary = args.shape or (ROWS, 5003)
    if rows_asked != ROWS:
        raise ValueError(f"--precision has {ROWS} rows of each kind: give --shape {ROWS},{vocabulary}")
    asked, found = args.divergence or list(TABLE.values()), []
    chosen = backends.BACKENDS if args.backend == "auto" else {args.backend: backends.BACKENDS[args.backend]}
    for device, divergence, (name, module) in itertools.product(args.device, asked, chosen.items()):
        if module.why_not(torch.device(device), torch.float32, divergence) is None:
            for one in precision(divergence, device, name, vocabulary):
                limits = tolerances(divergence, name, one.case)
                found.append({"device": device, "backend": name, **dataclasses.asdict(one), "limits": limits,
                              "ok": one.within(limits)})  # fmt: skip
    if not found:
        backends.choose(args.backend, torch.device(args.device[-1]), torch.float32, asked[0])  # raises, with the reason
    rows = [(r["divergence"], r["device"], r["backend"], r["case"], *_errors(r["ours"], r["eager"]),
             "" if r["limits"] == TOLERANCES else f"{max(r['limits'][1:]):g}", "ok" if r["ok"] else "MISS")
            for r in found]  # fmt: skip
    show(args, found, ("divergence", "device", "backend", "case", "loss (eager)", "d student (eager)",
                        "d teacher (eager)", "own limit", ""),
          rows, f"{sum(r['ok'] for r in found)} of {len(found)} within {TOLERANCES[0]:g} of the loss and "
                f"{TOLERANCES[1]:g} (or their own limit, as docs/precision.md says) of a gradient's largest "
                "entry")  # fmt: skip
    return 0 if all(r["ok"] for r in found) else 1
