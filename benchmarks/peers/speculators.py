"""vLLM's speculators: the fused Triton losses that it trains draft models with, of logits (batch, sequence, V).

Each returns the loss of every token. `nla`, which is our `lk`, clamps the acceptance rate 1 − TVD at 1e-5.
"""

from __future__ import annotations

from functools import partial

from . import Loss, Peer

FUNCTIONS = {"kl": "kl_div", "rkl": "reverse_kl_div", "js": "js_div", "tvd": "tv", "lk": "nla"}


def mean(divergence: str) -> Loss:
    """The library's function of one sequence, as a mean over its tokens."""
    from speculators.losses import fused

    loss = getattr(fused, f"fused_{FUNCTIONS[divergence]}_loss")
    return lambda student, teacher: loss(student[None], teacher[None]).mean()


PEERS = [Peer("speculators", "rows", name, partial(mean, name), "triton") for name in FUNCTIONS]
