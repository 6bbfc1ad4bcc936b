"""`fdistill teacher`: a store of a teacher's outputs, and a server of a model."""

from __future__ import annotations

import argparse
import contextlib
import sys

from ..options import count, seed
from ..provenance import as_json
from .common import Command

BUILD = "Run a teacher on every sequence of a data file, and save its outputs in a store."
#: How many `verify --teacher` computes again.
SEQUENCES = 16


def add(command: Command, needs: str) -> None:
    """Its actions, each with its arguments but those of `build`, which `sequence` has; needs: what they lack here."""
    teacher = command(
        "teacher", run, f"Build, inspect or verify a store of a teacher's outputs, or serve a model.{needs}"
    )
    if needs:
        return
    actions = teacher.add_subparsers(required=True, metavar="action", dest="action")

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
    held.add_argument("--seed", type=seed, default=0, help="which sequences these are; default: 0")
    served = action("serve", "Serve a model over HTTP, for `--teacher http://...` and for clients of vLLM's API.")
    served.add_argument("--teacher", required=True, help="folder or hub name of the model")
    served.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    served.add_argument("--port", type=_port, default=8000, help="port to listen on; default: 8000")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, not {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Runs it; its exit status."""
    from ..sequence import build

    if args.action == "serve":
        from ..sequence.serve import server as of_model

        server = of_model(args.teacher, args.host, args.port)
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{server.server_address[1]}"
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
