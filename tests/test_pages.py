"""The Python of the documents runs as it stands."""

import contextlib
import inspect
import pkgutil
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import fdistill_kernels as fk

from .openai_server import Server
from .pages import PAGES, blocks
from .test_sequence import llama

N, V, D = 5, 60, 8
#: Pages whose blocks a test of their own runs: from.md's one by one, each with its peer.
OF_THEIR_OWN = {"from": "test_from.py"}


@contextlib.contextmanager
def common(tmp_path):
    """Logits, hidden states and heads of both models, and labels; what is of a package, a page imports."""
    made = {whose + kind: torch.randn(*shape) for whose in ("student", "teacher")
            for kind, shape in (("", (N, V)), ("_logits", (N, V)), ("_hidden", (N, D)), ("_head", (V, D)))}  # fmt: skip
    names = dict(labels=torch.arange(N), hidden=torch.randn(N, D), head=torch.randn(V, D),
                 logits=torch.randn(N, V), **made)  # fmt: skip
    for name in ("student", "student_logits", "student_hidden", "hidden", "head", "logits"):
        names[name].requires_grad_()
    before = dict(fk.TABLE)
    yield names
    fk.TABLE.clear()
    fk.TABLE.update(before)


@contextlib.contextmanager
def teachers(tmp_path):
    log_probs, ids = torch.randn(N, V).log_softmax(-1).topk(4)
    with Server() as server, common(tmp_path) as names:
        yield names | dict(
            ids=ids, log_probs=log_probs, prompt=[1, 2], continuation=[3, 4, 5], states=torch.randn(3, D).bfloat16(),
            head_weight=torch.randn(V, D).bfloat16(), url=server.url, vocabulary=server.model.vocabulary,
            prompts=[[1, 2]], continuations=[[3, 4]],
        )  # fmt: skip


def check_teachers(names):
    assert names["of_both"].ids.shape[-1] <= 2 * 64 and names["rows"].states.shape == (3, D)
    assert names["targets"].ids.shape[0] == 2 and not names["endpoint"]._background._thread.is_alive()


@contextlib.contextmanager
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = llama()
        logits, hidden, head = (1, N, V), (1, N, model.config.hidden_size), (V, model.config.hidden_size)
        yield dict(
            world=1, head=torch.randn(head, requires_grad=True), hidden_here=torch.randn(hidden),
            group=torch.distributed.group.WORLD, model=model, input_ids=torch.arange(N)[None],
            labels=torch.arange(N)[None], student_logits_here=torch.randn(logits, requires_grad=True),
            teacher_logits_here=torch.randn(logits), hidden=torch.randn(hidden), teacher_hidden=torch.randn(hidden),
            head_here=torch.randn(head, requires_grad=True), teacher_head_here=torch.randn(head), teacher_head=torch.randn(head),
        )  # fmt: skip
    finally:
        torch.distributed.destroy_process_group()


class GKDTrainer:
    """The arguments of TRL's, which needs the tokenizer for its collator."""

    def __init__(self, model, teacher_model, args, train_dataset, processing_class=None):
        assert processing_class.pad_token_id is not None


@contextlib.contextmanager
def integrations(tmp_path):
    config = llama().config
    config.max_position_embeddings = 256
    student, teacher, other = (transformers.LlamaForCausalLM(config) for _ in range(3))
    ids = torch.randint(2, V, (2, N))
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    hidden = {f"{whose}_hidden": model.model(ids).last_hidden_state.detach().requires_grad_(whose == "student")
              for whose, model in (("student", student), ("teacher", teacher))}  # fmt: skip
    data = [dict(prompt_ids=[2, 3], labels=[4, 5, 1], input_ids=[2, 3, 4])] * 2
    words = WordLevel({"[UNK]": 0, "</s>": 1, **{str(i): i for i in range(2, V)}}, unk_token="[UNK]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="</s>", pad_token="</s>"
    )
    yield dict(
        x=ids, ids=ids, labels=ids, model=other, student=student, teacher=teacher, data=data,
        logits=torch.randn(2, N, V, requires_grad=True), hidden=hidden["student_hidden"], lm_head=student.lm_head,
        args=arguments, tokenizer=tokenizer, conversations=[], SFTTrainer=transformers.Trainer, **hidden,
    )  # fmt: skip


def check_integrations(names):
    batch = SimpleNamespace(inputs=dict(input_ids=names["ids"]), labels=names["labels"])
    loss = names["Distil"](names["student"], names["teacher"]).training_step(batch, 0)
    assert torch.isfinite(loss) and loss.requires_grad


#: What a page's blocks find there, and what is asked afterwards; `common` where neither is said.
OF_PAGES = {"teachers": (teachers, check_teachers), "sharded": (one_rank, None), "cluster": (one_rank, None),
            "integrations": (integrations, check_integrations)}  # fmt: skip


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p not in OF_THEIR_OWN])
def test_a_page_runs(page, tmp_path, monkeypatch):
    """Block after block; what a block defines the next ones know, but what is given is given anew."""
    monkeypatch.chdir(tmp_path)
    gkd = SimpleNamespace(GKDTrainer=GKDTrainer, GKDConfig=lambda folder, beta, lmbda: None)
    monkeypatch.setitem(sys.modules, "trl.experimental.gkd", gkd)
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(LightningModule=torch.nn.Module))
    make, check = OF_PAGES.get(page, (common, None))
    with make(tmp_path) as given:
        names = {"__name__": page}
        for at, block in enumerate(blocks(page)):
            file = tmp_path / f"{page}_{at}.py"  # Triton reads its functions' sources
            file.write_text(block)
            code, names = compile(block, str(file), "exec"), names | given | {"folder": tmp_path / str(at)}
            exec(code, names)
        if check:
            check(names)


def test_what_is_not_run_is_known():
    assert all(blocks(p) for p in OF_THEIR_OWN) and set(OF_PAGES) <= set(PAGES)


def test_every_tail_is_on_the_page():
    from fdistill_kernels.sparse import TAILS

    assert all(f'`"{tail}"`' in PAGES["teachers"] for tail in TAILS)


def test_the_apis_page_has_every_public_name():
    of_page = re.findall(r"^::: fdistill_kernels\.(\w+)$", PAGES["api"], re.MULTILINE)
    assert sorted(of_page) == sorted([*fk.__all__, "Endpoint", "TeacherStore"])  # the two that need an extra


def test_the_apis_page_has_what_trainers_inherit():
    """Of a class of ours that the page has not, its own classes' methods are there if it asks for them."""
    for name, options in re.findall(
        r"^::: (fdistill_kernels\.sequence\.[\w.]+)\n((?: +.*\n)*)", PAGES["api"], re.MULTILINE
    ):
        _, *bases = pkgutil.resolve_name(name).__mro__
        ours = [b for b in bases if b.__module__.startswith("fdistill_kernels.") and b.__name__ not in PAGES["api"]]
        assert not ours or "inherited_members: true" in options, name


@pytest.mark.parametrize("name", [name for name in ("cross_entropy", "linear_cross_entropy") if hasattr(F, name)])
def test_arguments_are_those_of_torch(name):
    """As README.md says; `options` are of torch's own chunks."""
    theirs, ours = (list(inspect.signature(getattr(of, name)).parameters.values()) for of in (F, fk))
    placed = [p.name for p in theirs if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in ours][: len(placed)] == placed
    assert {p.name for p in theirs} - {"options"} <= {p.name for p in ours}
