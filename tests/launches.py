"""What `compiled.start` launches is what Triton itself would, whatever it is given; and a card can be given all kernels.

Runs without a GPU, in a process of its own: not under TRITON_INTERPRET. With --all kernels that take longer, too.
"""

import functools
import itertools
import random
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fdistill_kernels as fk
from fdistill_kernels.backends import triton as triton_backend
from fdistill_kernels.backends.triton import compiled, launch

LAUNCHED, HANDLES, DEVICE = [], itertools.count(), [0]


class Driver:
    """Of no card: it loads nothing, and writes down what it would launch: grid, kernel and arguments."""

    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 1 << 17})
        load_binary = staticmethod(lambda *_: (0, next(HANDLES), 0, 0, 1024))

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: DEVICE[0])
    get_current_stream = staticmethod(lambda device: device)
    launcher_cls = staticmethod(lambda *_: lambda *given: LAUNCHED.append((given[:5], given[9:])))


@triton.jit(do_not_specialize=["rows"])
def kernel(x, y, rows, size, cap, factor, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    entries = tl.arange(0, BLOCK)
    mask = entries < tl.minimum(rows, size)
    z = tl.load(x + entries, mask=mask).to(tl.float32) * factor
    if y is not None:
        z += tl.load(y + entries, mask=mask)
    if cap is not None:
        z = tl.minimum(z, cap)
    tl.store(x + entries, z * z if SQUARED else z, mask=mask)


class OnDevice(torch.Tensor):
    """A tensor that says it is on the current device."""

    def get_device(self):
        return DEVICE[0]


@triton.jit
def pearson(p, q, log_p, log_q, parameter):
    ratio = p / tl.maximum(q, 1e-30)
    return q * (1 - ratio * ratio), 2 * p * (ratio - 1)


def step(loss, *leaves, **options):
    """A loss and its gradients, of numbers that no kernel has made."""
    with_gradient = [x.clone().requires_grad_() for x in leaves]
    made = loss(*with_gradient, backend="triton", **options)
    torch.autograd.grad(made[0] if isinstance(made, tuple) else made, with_gradient)


def losses(every: bool) -> None:
    """Raises where a loss asks for what Triton compiles for no card: the interpreter takes more."""
    triton_backend.why_not = lambda *_: None
    logits, hidden = torch.zeros(2, 4, 300, dtype=torch.bfloat16), torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    heads, labels, own = torch.zeros(2, 300, 64, dtype=torch.bfloat16), torch.zeros(4).long(), fk.FDivergence
    with_labels = dict(labels=labels, ce_weight=1.0, label_smoothing=0.1)
    before = len(LAUNCHED)
    with launch.forced(launch.Launch(64, 1, 2)):
        step(fk.f_divergence, *logits, divergence=own(lambda t: (t - 1) ** 2, triton=pearson))
        step(functools.partial(fk.cross_entropy, target=labels), logits[0], z_loss=0.1, logit_softcap=30.0,
             return_parts="metrics")  # fmt: skip
        step(fk.f_divergence, logits[0], teacher_logits=fk.top_k_of(logits[1].float(), 4), divergence="kl")
        if every:
            step(fk.f_divergence, *logits, divergence="dkd", labels=labels)
    if every:
        with launch.forced(launch.Launch(64, 1, 2, splits=2)):
            step(fk.f_divergence, *logits, divergence="js", return_parts="metrics", **with_labels)
        step(lambda x, w, **options: fk.linear_f_divergence(x, w, hidden[1], heads[1], **options), hidden[0], heads[0],
             divergence="js", memory="minimal", **with_labels)  # fmt: skip
    print(f"{len(LAUNCHED) - before} launches of losses")


def main() -> None:
    """Raises AssertionError where the two differ."""
    driver.set_active(Driver())
    draw, memory = random.Random(0), torch.zeros(64)
    first = [memory.bfloat16().as_subclass(OnDevice), memory[1:].as_subclass(OnDevice), memory.as_subclass(OnDevice)]
    for _ in range(CALLS):
        DEVICE[0] = draw.choice([0, 1])
        arguments = (draw.choice(first), draw.choice([None, first[1]]), draw.choice([7, 1 << 40]),
                     draw.choice([1, 7, 32, 1 << 33]), draw.choice([None, 2.0]), draw.random())  # fmt: skip
        constants = draw.random() < 0.95, 32
        options = {"num_warps": 1 if draw.random() < 0.95 else 2, "enable_fp_fusion": True}
        compiled.start(kernel, (3, 2), arguments, constants, options)
        kernel[3, 2](*arguments, *constants, **options)
        ours, theirs = LAUNCHED[-2:]
        assert ours == theirs, (arguments, constants, options, ours, theirs)
    print(f"{CALLS} launches of {next(HANDLES)} kernels, found as {len(compiled._COMPILED)}")
    assert len(LAUNCHED) == 2 * CALLS and len(compiled._COMPILED) < CALLS / 2
    losses("--all" in sys.argv)


CALLS = 600
if __name__ == "__main__":
    main()
