"""The calls of docs/papers.md are their papers' losses: value and all gradients, by plain torch in float64."""

import re

import pytest
import torch
import torch.nn.functional as F

import fdistill_kernels as fk

from .conftest import relative
from .pages import PAGES, blocks

N, V, D = 12, 61, 8
PAGE = PAGES["papers"]
IMPORTED = {}
exec("\n".join(blocks("papers")), IMPORTED)
LINES = re.findall(r"^\| (?!paper)([^|]*?)(?:, \[| \[|, as|, of|, this)[^|]*\|[^|]*\| `(.*)` \|$", PAGE, re.MULTILINE)


def given():
    """What the page names, in float32; the student's are trained."""
    torch.manual_seed(0)
    of = {name: 2 * torch.randn(N, V) for name in ("student", "student_own", "teacher", "teacher_own")}
    of |= {name: torch.randn(N, D) for name in ("hidden", "features", "teacher_hidden")}
    of |= {name: torch.randn(V, D) for name in ("head", "frozen_head", "teacher_head", "averaged_head")}
    of |= {name: -3 * torch.rand(N) for name in ("teacher_log_probs", "old")}
    of |= dict(with_context=2 * torch.randn(1, N + 7, V), advantage=torch.randn(N))
    of |= {name: torch.randint(V, (N,)) for name in ("labels", "beam")}
    for name in ("student", "student_own", "hidden", "head"):
        of[name].requires_grad_()
    return of, fk.sample_of(of["teacher"], 7)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def soft(z, temperature=1.0):
    return (z / temperature).log_softmax(-1)


def both(g, own=""):
    """log p and log q."""
    return soft(g["teacher" + own]), soft(g["student" + own])


def mixed(log_p, log_q, share):
    return (share * log_p.exp() + (1 - share) * log_q.exp()).log()


def skewed(log_p, log_q, share):
    return kl(log_p, mixed(log_p, log_q, share))


def tvd(log_p, log_q):
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def of_tokens(z, ids):
    return -soft(z).gather(-1, ids[:, None]).squeeze(-1)


def logits(g, whose=""):
    return g[whose + "hidden"] @ g[whose + "head"].T


def in_groups(log_p, log_q, inside):
    """KL of the entries inside and the rest as one, and KL inside the rest, by probabilities."""
    (p, rest_p), (q, rest_q) = ((x, (x * ~inside).sum(-1, keepdim=True)) for x in (log_p.exp(), log_q.exp()))
    coarse = (torch.where(inside, p * (p / q).log(), 0)).sum(-1) + (rest_p * (rest_p / rest_q).log()).squeeze(-1)
    a, b = p / rest_p, q / rest_q
    return coarse, torch.where(inside, 0, a * (a / b).log()).sum(-1)


def largest(log_p, k):
    return log_p >= log_p.topk(k).values[:, -1:]


def dkd(g):
    label = F.one_hot(g["labels"], V).bool()
    log_p, log_q = both(g)
    p, q = (torch.stack((x.exp()[label], 1 - x.exp()[label]), -1) for x in (log_p, log_q))
    return 1.0 * (p * (p / q).log()).sum(-1) + 8.0 * in_groups(log_p, log_q, label)[1]


def csd(g):
    q, u = soft(g["student"]).exp().detach(), g["student"] - g["teacher"]
    score = u - (q * u).sum(-1, keepdim=True)
    theirs = ((q * score).detach() * g["student"]).sum(-1)  # the authors' code: of the gradient alone
    return (0.5 * (q * score**2).sum(-1)).detach() + theirs - theirs.detach()


def ab(g, a=0.2, b=0.7):
    p, q = (x.exp() for x in both(g))
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def akl(g):
    log_p, log_q = both(g)
    order = log_p.argsort(-1, descending=True)
    p, gap = log_p.exp().gather(-1, order), (log_p.exp() - log_q.exp()).abs().detach().gather(-1, order)
    head = p.cumsum(-1) - p < 0.5  # the smallest set of mass ½
    w = (gap * head).sum(-1) / gap.sum(-1)
    return w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)


def todi(g):
    log_p, log_q = both(g)
    a = (log_p - log_q).sigmoid().detach()
    return (a * log_p.exp() * (log_p - log_q) + (1 - a) * log_q.exp() * (log_q - log_p)).sum(-1)


def entropy_gated(g):
    log_p, log_q = both(g)
    uncertain = -(log_p.exp() * log_p).sum(-1) > 0.8
    assert uncertain.any()
    return kl(log_q, log_p) + torch.where(uncertain, kl(log_p, log_q), 0)


def tail_aware(g):
    head = largest(both(g)[0], 5)
    coarse, inner = in_groups(*both(g), head)
    rest = (both(g)[0].exp() * ~head).sum(-1)
    return coarse + 2.0 * rest / rest.mean() * inner


def top_k(g):
    log_p, log_q = both(g)
    p = log_p.exp() * largest(log_p, 5)
    p = p / p.sum(-1, keepdim=True)
    return torch.special.xlogy(p, p).sum(-1) - (p * log_q).sum(-1)


def sampled(g):
    """Every draw once more: an id that was drawn c times stands c times."""
    counts = (g["sample"].weights * g["sample"].log_probs.exp() * 7).round()  # w = c/(n p)
    assert (counts.sum(-1) == 7).all()
    log_p, log_q = (x.gather(-1, g["sample"].ids.clamp_min(0)) for x in both(g))
    return (counts / 7 * (log_p - log_q)).sum(-1)


def mean_teacher(g):
    averaged = 0.999 * g["averaged_head"] + 0.001 * g["head"].detach()
    return kl(soft(g["hidden"].detach() @ averaged.T), soft(logits(g)))


def on_policy_of_a_token(g):
    log_q = -of_tokens(logits(g), g["labels"])
    return -(g["teacher_log_probs"] - log_q).detach() * log_q


def entropy_bonus(g):
    log_q = soft(logits(g))
    return g["advantage"] * of_tokens(logits(g), g["labels"]) + 0.01 * (log_q.exp() * log_q).sum(-1)


def ppo(g):
    ratio = (-of_tokens(logits(g), g["labels"]) - g["old"]).exp()
    return -torch.minimum(ratio * g["advantage"], ratio.clamp(0.8, 1.2) * g["advantage"])


def grpo(g):
    u = g["teacher_log_probs"] + of_tokens(logits(g), g["labels"])
    return u.exp() - u - 1


def eagle(g):
    log_p, log_q = soft(g["features"] @ g["frozen_head"].T), soft(g["hidden"] @ g["frozen_head"].T)
    return F.smooth_l1_loss(g["hidden"], g["features"]) - 0.1 * (log_p.exp() * log_q).sum(-1)


def standardised(g):
    """The authors' z-scores, through which the gradient flows whole."""
    of_z = ((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True) for z in (g["teacher"], g["student"]))
    return 2**2 * kl(*(soft(z, 2) for z in of_z))


#: A loss of each token (N), in float64.
FORMULAS = {
    "Knowledge distillation": lambda g: 0.9 * 16 * kl(soft(g["teacher"], 4), soft(g["student"], 4)) + 0.1 * of_tokens(g["student"], g["labels"]),
    "Word-level KD": lambda g: -(both(g)[0].exp() * both(g)[1]).sum(-1),
    "Sequence-level KD": lambda g: of_tokens(g["student"], g["beam"]),
    "Born-again networks": lambda g: of_tokens(g["student"], g["labels"]) - (both(g)[0].exp() * both(g)[1]).sum(-1),
    "Decoupled KD": dkd,
    "Standardised logits": standardised,
    "TAID": lambda g: kl(soft(0.6 * g["student"].detach() + 0.4 * g["teacher"]), soft(g["student"])),
    "Concrete score distillation": csd,
    "ENGINE": lambda g: -(both(g)[1].exp() * both(g)[0]).sum(-1),
    "MiniLLM": lambda g: kl(*both(g)[::-1]),
    "f-DISTILL JS": lambda g: (skewed(*both(g), 0.5) + skewed(*both(g, "_own")[::-1], 0.5)) / 2,
    "f-DISTILL TVD": lambda g: (tvd(*both(g)) + tvd(*both(g, "_own"))) / 2,
    "GKD": lambda g: 0.1 * kl(both(g)[0], mixed(*both(g), 0.1)) + 0.9 * kl(both(g)[1], mixed(*both(g), 0.1)),
    "DistiLLM SKL": lambda g: skewed(*both(g), 0.1),
    "DistiLLM SRKL": lambda g: skewed(*both(g)[::-1], 0.1),
    "DistiLLM-2": lambda g: (skewed(*both(g), 0.1) + skewed(*both(g, "_own")[::-1], 0.1)) / 2,
    "ABKD": ab,
    "AKL": akl,
    "ToDi": todi,
    "BitDistiller's CAKLD": lambda g: 0.7 * kl(*both(g)[::-1]) + 0.3 * kl(*both(g)),
    "Entropy-aware on-policy distillation": entropy_gated,
    "Tail-aware KD": tail_aware,
    "Top-K KD": top_k,
    "Random sampling KD": sampled,
    "A list and its rest": lambda g: in_groups(*both(g), largest(both(g)[0], 5))[0],
    "EAGLE": eagle,
    "HASS": lambda g: -(both(g)[0].exp() * both(g)[1] * largest(both(g)[0], 10)).sum(-1),
    "DistillSpec": lambda g: tvd(*both(g)),
    "LK losses": lambda g: -torch.minimum(*(x.exp() for x in both(g))).sum(-1).log(),
    "Mean teacher": mean_teacher,
    "Context distillation": lambda g: kl(soft(g["with_context"][0, 7:]), soft(g["student"])),
    "On-policy distillation": lambda g: kl(soft(logits(g)), soft(logits(g, "teacher_"))),
    "The same": on_policy_of_a_token,
    "Entropy bonus": entropy_bonus,
    "PPO": ppo,
    "GRPO's distance to a reference": grpo,
    "Label smoothing": lambda g: 0.9 * of_tokens(g["student"], g["labels"]) - 0.1 * both(g)[1].mean(-1),
    "z-loss, PaLM": lambda g: of_tokens(g["student"], g["labels"]) + 1e-4 * g["student"].exp().sum(-1).log() ** 2,
    "Soft caps, Gemma 2": lambda g: of_tokens(30 * (logits(g) / 30).tanh(), g["labels"]),
}  # fmt: skip


def test_every_line_has_its_formula():
    assert [name for name, _ in LINES] == list(FORMULAS) and PAGE.count("\n| ") == len(LINES) + 7  # headers


@pytest.mark.filterwarnings("ignore:tail='ignore'")
@pytest.mark.parametrize("name, call", LINES)
def test_a_papers_loss(name, call):
    names, sample = given()
    exact = {
        k: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for k, x in names.items()
    }
    got = eval(call, {**IMPORTED, **names, "sample": sample})
    want = FORMULAS[name]({**exact, "sample": sample}).mean()
    assert relative(got, want) < 1e-5
    trained = [k for k, x in names.items() if x.requires_grad]
    gradients = (
        torch.autograd.grad(loss, [of[k] for k in trained], allow_unused=True)
        for loss, of in ((got, names), (want, exact))
    )
    for k, ours, theirs in zip(trained, *gradients, strict=True):
        assert (ours is None) == (theirs is None), k
        assert ours is None or relative(ours, theirs) < 1e-4, k


def heads():
    """Hidden states and a head that are trained, in float32, and the same in float64."""
    given = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return given, tuple(x.detach().double().requires_grad_() for x in given)


def check(got, want, given, exact):
    assert relative(got, want) < 1e-4
    for ours, theirs in zip(torch.autograd.grad(got, given), torch.autograd.grad(want, exact), strict=True):
        assert relative(ours, theirs) < 1e-4


def test_taid_from_hidden_states():
    given, exact = heads()
    teacher = torch.randn(N, 2 * D), torch.randn(V, 2 * D)
    got, z = IMPORTED["taid"](*given, *teacher, 0.4), exact[0] @ exact[1].T
    check(
        got,
        kl(soft(0.6 * z.detach() + 0.4 * teacher[0].double() @ teacher[1].double().T), soft(z)).mean(),
        given,
        exact,
    )


def test_spans():
    """Two tokenizers cut one text into three spans."""
    given, exact = heads()
    labels, spans, theirs = torch.randint(V, (N,)), torch.tensor([0, 0, 1, 1, 1, *7 * [2]]), -torch.rand(3) * 40
    got = IMPORTED["span_likelihoods"](IMPORTED["span_log_probs"](*given, labels, spans, 3), theirs, 10.0)
    log_q = -of_tokens(exact[0] @ exact[1].T, labels)
    q, p = torch.stack([(log_q[spans == i].sum() / 10).exp() for i in range(3)]), (theirs.double() / 10).exp()
    check(got, (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(), given, exact)


@pytest.mark.parametrize("theirs", [0.0, -1e-4, -50.0])
@pytest.mark.parametrize("ours", [0.0, -1e-4, -50.0])
def test_spans_that_a_model_is_sure_of(ours, theirs):
    log_q = torch.tensor([ours], requires_grad=True)
    loss = IMPORTED["span_likelihoods"](log_q, torch.tensor([theirs]))
    assert loss.isfinite() and torch.autograd.grad(loss, log_q)[0].isfinite().all() and (loss > -1e-9)


def test_a_tail_that_the_teacher_is_sure_to_be_nothing():
    student = torch.randn(N, V, requires_grad=True)
    loss = IMPORTED["tail_aware"](student, torch.randn(N, V) + 60 * torch.eye(N, V), 5, 2.0)
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()


def logits_of_both(vocabulary):
    """The student's logits, in float32 and in float64, and the teacher's, of a vocabulary of its own."""
    student = 2 * torch.randn(N, V)
    return student.clone().requires_grad_(), student.double().requires_grad_(), 2 * torch.randn(N, vocabulary)


@pytest.mark.parametrize("vocabulary", [V - 7, V, V + 7])
def test_sorted_probabilities(vocabulary):
    student, exact, teacher = logits_of_both(vocabulary)
    q, p = (soft(z).exp().sort(-1, descending=True).values for z in (exact, teacher.double()))
    q, p = (F.pad(x, (0, max(V, vocabulary) - x.shape[-1])) for x in (q, p))
    got = IMPORTED["sorted_distance"](student, teacher)
    check(got, (p - q).abs().sum(-1).mean(), [student], [exact])


def test_differences_of_logits():
    """The paper's, written pair by pair: t-LD and s-LD, at temperature 3."""
    student, exact, teacher = logits_of_both(V)
    want = 0
    for z_t, z_s in zip(teacher.double(), exact, strict=True):
        for ids in (z_t.topk(8).indices, z_s.topk(8).indices):
            pairs = [(a, b) for i, a in enumerate(ids) for b in ids[i + 1 :]]
            log_p, log_q = (soft(torch.stack([z[a] - z[b] for a, b in pairs]), 3) for z in (z_t, z_s))
            want = want + kl(log_p, log_q) / N
    check(IMPORTED["logit_differences"](student, teacher), want, [student], [exact])
