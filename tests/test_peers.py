"""Adapters of other libraries' losses: what each computes, and what is said of those that cannot run."""

import functools
import importlib.util
import json
import re
import sys

import pytest
import torch

from benchmarks import numbers
from fdistill_kernels import cli
from fdistill_kernels.peers import FORMS, Peer, __main__, distillkit, every, found, ours, pytorch, trl
from fdistill_kernels.peers.measure import DIVERGENCES, SCALES, compare, errors_by_scale, inputs, losses, peak_bytes

CHOSEN = [peer for peer in every() if peer.divergence in DIVERGENCES]
COMPARE = functools.partial(compare, device="cpu", dtype=torch.float32, shape=(5, 300))


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    """What torch.compile makes of a peer takes seconds each, and means what the peer does."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("peer", CHOSEN, ids=lambda p: f"{p.name}-{p.form}-{p.divergence}")
def test_means_the_same_as_ours(peer):
    """Value and gradients are the float64 definition's, as ours are; or it is said why it does not run here."""
    beside = COMPARE(peer)
    if beside.error is None:
        assert (
            beside.ok
            and beside.reason
            and any(
                why in beside.reason for why in ("need a GPU", "No module named", "no attribute 'linear_cross_entropy'")
            )
        )
    else:
        assert max(*beside.error, *beside.ours) < 2e-6, beside


def test_most_run_here():
    """So that the test above is of something: every form and meaning, and Liger's kernels in the interpreter."""
    run = {(p.name, p.form, p.divergence) for p in CHOSEN if p.why_not("cpu") is None}
    assert {(form, name) for _, form, name in run} == {(p.form, p.divergence) for p in CHOSEN}
    assert any(name.startswith("DistillKit") for name, *_ in run) and any(name.startswith("trl") for name, *_ in run)
    if importlib.util.find_spec("liger_kernel"):
        assert {("liger-kernel", "rows", "js"), ("liger-kernel", "linear", "labels"), ("liger-kernel", "beside", "kl"),
                ("liger-kernel fused", "linear", "kl")} <= run  # fmt: skip


@pytest.mark.parametrize("form, divergence", [("rows", d) for d in DIVERGENCES] + [("linear", "js"), ("linear", "tvd")])
def test_errors_are_the_losses_own_at_every_scale(form, divergence):
    """Of models that hardly overlap the gradients are tiny: the exact ones have digits there, as ours do."""
    calls = {"ours": ours(form, divergence), "eager": pytorch.written(None, form, divergence)}
    found = {(e["what"], e["scale"]): e["gradient_error"]
             for e in errors_by_scale(form, divergence, calls, (8, 2000), torch.float32, "cpu")}  # fmt: skip
    most = 2e-6 if form == "rows" else 5e-5
    assert all(found["ours", scale] < most for scale in SCALES), found
    assert found["eager", 30.0] > 1 or divergence not in ("js", "tvd")


def changed(how):
    """Eager kl, but for `how`."""

    def make():
        loss = pytorch.written(None, "rows", "kl")
        return lambda student, teacher: how(loss, student, teacher)

    return Peer("changed", "rows", "kl", make)


@pytest.mark.parametrize(
    "how",
    [lambda loss, s, t: 2 * loss(s, t), lambda loss, s, t: loss(t, s), lambda loss, s, t: loss(s, t) * len(s),
     lambda loss, s, t: loss(s, t).detach() + 0 * s.sum(), lambda loss, s, t: loss(s, t) * torch.nan,
     lambda loss, s, t: loss(s, t[:, :-1])],
    ids=["scale", "direction", "sum", "no gradient", "nan", "raises"],
)  # fmt: skip
def test_another_meaning_is_found(how, monkeypatch):
    peer = changed(how)
    beside = COMPARE(peer)
    assert not beside.ok and (beside.reason is None or "size" in beside.reason)
    monkeypatch.setattr("fdistill_kernels.peers.measure.found", lambda *_: [peer])
    chosen, left_out = losses("rows", "kl", "cpu", torch.float32)
    assert list(chosen) == ["fdistill"] and [left["what"] for left in left_out] == ["changed"], "it is not timed"
    assert "another loss" in left_out[0]["why"] or "size" in left_out[0]["why"]


def test_a_fallback_is_compared_and_not_timed(monkeypatch):
    peer = Peer("of a card", "rows", "kl", lambda: pytorch.written(None, "rows", "kl"), timed="card")
    monkeypatch.setattr("fdistill_kernels.peers.measure.found", lambda *_: [peer])
    chosen, (left,) = losses("rows", "kl", "cpu", torch.float32)
    assert max(COMPARE(peer).error) < 2e-6 and list(chosen) == ["fdistill"] and "not timed" in left["why"]
    assert peer.why_not_timed("cuda") is None and peer.why_not("cpu") is None


def test_the_call_is_ours():
    """`call`, read as Python, is the loss."""
    import fdistill_kernels as fk

    for peer in CHOSEN:
        given = inputs(peer.form, peer.divergence, (5, 300), torch.float32, "cpu")
        names = dict(zip(FORMS[peer.form], given, strict=False), labels=given[-1])
        assert eval(peer.call, {**vars(fk), **names}) == ours(peer.form, peer.divergence)(*given), peer.call


def test_reasons():
    def nowhere():
        import nosuch  # noqa: F401

    assert Peer("nosuch", "rows", "kl", nowhere).why_not("cpu") == "ModuleNotFoundError: No module named 'nosuch'"
    quack = [peer for form in ("rows", "linear") for peer in found(form, "labels") if peer.name == "quack"]
    assert [peer.why_not("cpu") for peer in quack] == 2 * ["its kernels need a GPU"]


@pytest.mark.parametrize(
    "library, divergence", [*(("trl", n) for n in trl.BETAS), *(("DistillKit", n) for n in distillkit.FUNCTIONS)]
)
def test_formulas_in_place_of_libraries(library, divergence, monkeypatch):
    monkeypatch.setattr(distillkit, "INSTALLED", False)
    make = {"trl": trl.formula, "DistillKit": distillkit.mean}[library]
    assert max(COMPARE(Peer("formula", "rows", divergence, functools.partial(make, divergence))).error) < 2e-6


def test_peak_bytes():
    def step():
        first = torch.empty(100_000, dtype=torch.uint8)
        del first
        second, third = torch.empty(30_000, dtype=torch.uint8), torch.empty(90_000, dtype=torch.uint8)
        del second, third

    assert peak_bytes(step, "cpu") == 120_000


def test_the_benchmark_writes_a_file(tmp_path, monkeypatch):
    path = tmp_path / "peers.json"
    monkeypatch.setattr(sys, "argv", ["peers", "--out", str(path), "--shape", "4,200", "--seconds", "0.001", "--depth",
                                      "16", "--divergence", "labels", "--form", "rows"])  # fmt: skip
    __main__.main()
    content = json.loads(path.read_text())
    assert {"device", "commit", "dirty", "command", "versions", "torch"} <= set(content)
    assert {(r["what"], r["form"]) for r in content["results"]} >= {("fdistill", "rows"), ("eager", "rows")}
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 0 and len(r["errors"]) == 4 for r in content["results"])
    assert any(left["what"] == "quack" and "GPU" in left["why"] for left in content["left_out"])

    (tmp_path / numbers.RESULTS).mkdir(parents=True)  # and docs/performance.md has a table of it
    (tmp_path / numbers.RESULTS / numbers.PEERS).write_text(json.dumps(content | {"commit": "c0ffee", "dirty": False}))
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    ours, eager = (next(r for r in content["results"] if r["what"] == what) for what in ("fdistill", "eager"))
    shown = numbers.peers(numbers.Numbers())
    memory = {r["what"]: (r["peak_bytes"] - r["gradient_bytes"]) / 1e6 for r in (ours, eager)}
    assert f"| ours | {1e3 * ours['seconds']:.1f} ms / {memory['fdistill']:.0f} MB / " in shown
    assert f"| eager | {eager['seconds'] / ours['seconds']:.2g} / {memory['eager']:.0f} MB / " in shown


def test_verify_peers(capsys, monkeypatch):
    assert cli.main(["verify", "--peers", "--shape", "4,300", "--divergence", "tvd", "dkd"]) == 0
    out = capsys.readouterr().out
    same, other, not_run = map(int, re.findall(r"(\d+) (?:mean|do not|cannot)", out))
    assert same >= 3 and other == 0 and not_run >= 1 and "its kernels need a GPU" in out
    monkeypatch.setattr("fdistill_kernels.peers.found", lambda *_: [changed(lambda loss, s, t: 2 * loss(s, t))])
    assert cli.main(["verify", "--peers", "--shape", "4,300", "--divergence", "kl", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["error"][0] == pytest.approx(1) and max(row["ours"]) < 1e-6 and not row["ok"]


def test_verify_refuses(capsys):
    for more, message in (
        (["--precision"], "--precision and --peers"),
        (["--divergence", "alpha=0.3"], "no peer computes alpha(0.3)"),
    ):
        assert cli.main(["verify", "--peers", *more]) == 2 and message in capsys.readouterr().err
