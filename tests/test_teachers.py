"""Teachers that are not in the room: the trainer and the command with a store, a server, several teachers, or itself."""

import itertools
import json
import math
import shutil
import threading
from unittest.mock import Mock

import httpx
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations import deepspeed

import fdistill_kernels as fk
from fdistill_kernels import cli
from fdistill_kernels.sequence import build, serve
from fdistill_kernels.sequence.arguments import ask
from fdistill_kernels.sequence.asked_models import load_asked, teacher_for
from fdistill_kernels.sequence.forward import rows_of
from fdistill_kernels.sequence.losses import TeacherRows, step_loss
from fdistill_kernels.sequence.ranks import is_partitioned
from fdistill_kernels.sequence.sampling import Sampling
from fdistill_kernels.sequence.teachers import InRoom, Itself, Mixture, OfRows, Served, Stored, teacher_of
from fdistill_kernels.sequence.teachers.base import logits_function
from fdistill_kernels.sequence.teachers.itself import KeepAverage
from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer

from .conftest import WHOLE
from .openai_server import Model, Server
from .test_run import changed_call, make_files
from .test_sequence import EOS, bart, batch, flat, gpt2, llama
from .test_trainer import BASE, data, trainer

CPU = torch.device("cpu")


def stored(folder, teacher, rows, **settings):
    """A store of every sequence of some examples."""
    room = InRoom(teacher)
    made = dict(kind="hidden", vocabulary=room.vocabulary, key={"teacher": "t"},
                extra={"encoder_decoder": room.encoder_decoder}) | settings  # fmt: skip
    if made["kind"] == "hidden":
        head = room.rows([torch.tensor([3])], [torch.tensor([4])], CPU).value.head
        made = {"states": "float32", "head": head, **made}
    store = fk.TeacherStore.create(folder, **made)
    with store.writer() as writer:
        for row in rows:
            for name in {"labels", "sample_ids"} & row.keys():
                prompt, continuation = row.get("teacher_prompt_ids", row["prompt_ids"]), row[name]
                found = room.rows([torch.tensor(prompt)], [torch.tensor(continuation)], CPU)
                if made["kind"] == "hidden":
                    writer.add(prompt, continuation, found.value.states)
                else:
                    logits = logits_function(found, CPU)(0, len(continuation))
                    writer.add(prompt, continuation, fk.top_k_of(logits, made["k"]))
    return fk.TeacherStore(folder)


def weights_after(run):
    run.train()
    return flat(run.model), run.evaluate()["eval_loss"]


@pytest.mark.parametrize("make", [llama, bart], ids=["causal", "seq2seq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["kl", "js", "rkl"] if WHOLE else ["js"])
def test_a_store_of_exact_states_is_the_teacher_in_the_room(divergence, dtype, make, tmp_path):
    """Bit for bit, also of a loss that nobody thought of when the store was made; batches of one, as it was built."""
    teacher = make(seed=2).to(dtype)
    rows = data(sample_ids=[[3, 4, 5, EOS], [3, EOS], [EOS], [5, EOS]] * 2)
    store = stored(tmp_path / "store", teacher, [*rows, *data(4)], states=str(dtype).removeprefix("torch."))
    settings = dict(divergence=divergence, shares={"teacher": 0.5, "gold": 0.5}, max_steps=4, temperature=1.3,
                    per_device_train_batch_size=1, per_device_eval_batch_size=1)  # fmt: skip
    results = [weights_after(trainer(tmp_path / "run", make(seed=1), t, rows, **settings))
               for t in (teacher, store, str(tmp_path / "store"))]  # fmt: skip
    for weights, loss in results[1:]:
        assert torch.equal(weights, results[0][0]) and loss == results[0][1]


@pytest.mark.parametrize("settings", [dict(states="bfloat16"), dict(states="int8"), dict(rank=12, states="float32"),
                                      dict(kind="top_k", k=60), dict(kind="top_k", k=40, log_probs="uint8")], ids=str)  # fmt: skip
def test_what_a_store_keeps_in_fewer_bits_is_near(settings, tmp_path):
    teacher, rows = llama(seed=2), data()
    room = stored(tmp_path / "store", teacher, [*rows, *data(4)], **settings)
    run = dict(divergence="js", shares={"gold": 1.0}, max_steps=4, optim="sgd")
    start = flat(llama(seed=1))
    one, loss = weights_after(trainer(tmp_path, llama(seed=1), teacher, rows, **run))
    other, near = weights_after(trainer(tmp_path, llama(seed=1), room, rows, **run))
    least = 0.5 if "rank" in settings or settings.get("k") == 40 else 0.05  # that keeps a part of the teacher alone
    assert float((one - other).norm() / (one - start).norm()) < least
    assert near == pytest.approx(loss, rel=least)


def test_what_a_store_cannot_do_is_said_before_any_work(tmp_path):
    teacher, rows = llama(seed=2), data()
    store = stored(tmp_path / "store", teacher, rows)
    for words, method in (("student's samples, which a store has never seen", "rkl"),
                          ("predistill matches hidden states", "predistill")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path, llama(seed=1), store, rows, method=method)
    told = "must both be causal, or both encoder–decoder: a store of an encoder–decoder's is made with extra="
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, bart(), store, rows, method="mle")
    texts = [{"input_ids": row["prompt_ids"] + row["labels"], "labels": [-100] * len(row["prompt_ids"]) + row["labels"]}
             for row in rows[:5]]  # fmt: skip
    trainer(tmp_path, llama(seed=1), store, texts, divergence="kl").train()  # whose prompts are before the labels
    texts[4]["input_ids"][0] += 1
    with pytest.raises(ValueError, match=r"1 of 5 sequences of train_dataset \(labels: 4\) are not"):
        trainer(tmp_path, llama(seed=1), store, texts, divergence="kl")
    padded = [{"prompt_ids": [0] * (9 - len(row["prompt_ids"])) + row["prompt_ids"],
               "attention_mask": [0] * (9 - len(row["prompt_ids"])) + [1] * len(row["prompt_ids"]),
               "labels": row["labels"] + [-100] * (9 - len(row["labels"]))} for row in rows]  # fmt: skip
    runs = [trainer(tmp_path, llama(seed=1), store, train, divergence="kl") for train in (rows, padded)]
    for run in runs:
        run.train()
    assert torch.equal(*(flat(run.model) for run in runs))
    with pytest.raises(ValueError, match=r"1 of 8 sequences of train_dataset \(labels: 3\) are not"):
        trainer(
            tmp_path, llama(seed=1), store, [*rows[:3], {**rows[3], "prompt_ids": None}, *rows[4:]], divergence="kl"
        )
    unknown = data(8, sample_ids=[[7, 7, EOS]] * 8)
    with pytest.raises(ValueError, match=r"8 of 8 sequences of train_dataset \(sample_ids: 0, 1, 2, 3, 4, ...\) are"):
        trainer(tmp_path, llama(seed=1), store, unknown, method="kl")
    with pytest.raises(ValueError, match="tail must be one of"):
        Stored(store, "junk")
    with pytest.raises(ValueError, match="holds hidden states"):
        Stored(store, "within")
    with pytest.raises(ValueError, match=r"fk\.Endpoint"):
        teacher_of("http://127.0.0.1:1")
    with pytest.raises(ValueError, match="there is no folder"):
        teacher_of(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="give the data the column teacher_prompt_ids"):
        trainer(tmp_path, llama(seed=1), Itself(), rows, divergence="kl")
    with pytest.raises(ValueError, match="draws nothing"):
        Stored(store).draw([torch.tensor([3])], Sampling(4), 60)
    with pytest.raises(TypeError, match="a teacher is a Hugging Face model, a path"):
        teacher_of(3)


def test_what_a_teacher_cannot_be_made_of_is_refused_by_name(tmp_path):
    for make, given, told in (
        (Stored, str(tmp_path), "Stored takes a TeacherStore, not a str"),
        (Served, "http://127.0.0.1:1", "Served takes an Endpoint, not a str"),
        (Mixture, llama(), "a Mixture takes a list of teachers, not a LlamaForCausalLM"),
        (OfRows, [llama()], "OfRows takes a dict of teachers by their names, not a list"),
        (Itself, "0.9", "decay must be a number, not '0.9'"), (Itself, False, "decay must be a number, not False"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=told):
            make(given)


def test_a_stream_is_not_read_before_it_is_trained_on(tmp_path):
    teacher, rows = llama(seed=2), data()
    endless = IterableDataset.from_generator(lambda: itertools.cycle(rows), features=Dataset.from_list(rows).features)
    trainer(tmp_path, llama(seed=1), stored(tmp_path / "store", teacher, rows), endless, divergence="kl").train()


@pytest.mark.parametrize("kind", ["top_k", "hidden", "served"])
def test_a_batch_without_tokens_beside_a_teacher_elsewhere(kind, tmp_path):
    teacher, rows = llama(seed=2), data(8)
    of_lists = dict(kind="top_k", k=8) if kind == "top_k" else {}
    with Server(Model(60)) as server, fk.Endpoint(server.url, vocabulary=60, k=8) as endpoint:
        given = endpoint if kind == "served" else stored(tmp_path / "store", teacher, rows, **of_lists)
        few = [{**row, "labels": []} if n < 6 else row for n, row in enumerate(rows)]  # of four batches two have none
        run = trainer(tmp_path, llama(seed=1), given, few, divergence="kl", max_steps=4, per_device_train_batch_size=2)
        run.train()
    assert math.isfinite(run.state.log_history[-1]["train_loss"])


def dense(teacher, prompts, targets):
    return logits_function(teacher.rows(prompts, targets, CPU), CPU)(0, sum(map(len, targets)))


def test_mixtures(tmp_path):
    one, other = llama(seed=2), gpt2(60, seed=3)
    prompts, targets = batch()
    p, q = (dense(InRoom(m), prompts, targets).log_softmax(-1).double() for m in (one, other))
    mixed = dense(Mixture([one, other], [3, 1]), prompts, targets).double().softmax(-1)
    torch.testing.assert_close(mixed, 0.75 * p.exp() + 0.25 * q.exp(), rtol=1e-4, atol=1e-6)
    geometric = dense(Mixture([one, other], [3, 1], geometric=True), prompts, targets).double().softmax(-1)
    torch.testing.assert_close(geometric, (0.75 * p + 0.25 * q).softmax(-1), rtol=1e-4, atol=1e-6)
    store = stored(tmp_path / "store", other, [*data(), *data(4)])
    both, want = (dense(Mixture([one, t], [3, 1]), *batch(n=8)).softmax(-1) for t in (store, other))
    torch.testing.assert_close(both, want, rtol=1e-4, atol=1e-6)
    assert trainer(tmp_path, llama(seed=1), Mixture([one, store]), divergence="js").train()
    alone = [weights_after(trainer(tmp_path, llama(seed=1), t, divergence="js"))[0] for t in (one, Mixture([one]))]
    torch.testing.assert_close(*alone, rtol=1e-3, atol=1e-4)
    trainer(tmp_path, llama(seed=1), Mixture([one, other]), method="tvd").train()  # it draws, too
    lists, unknown = stored(tmp_path / "k", one, data(), kind="top_k", k=3), data(8, sample_ids=[[7, 7, EOS]] * 8)
    for words, make in {
        "a positive weight for each of 2": lambda: Mixture([one, other], [1]),
        "must all be causal": lambda: Mixture([one, bart()]),
        "knows lists of ids alone": lambda: Mixture([one, lists]),
        "draws nothing": lambda: Mixture([one, other], geometric=True).draw([], Sampling(2), 60),
        "not one of several": lambda: Mixture([one, Itself(decay=0.5)]),
        "a run's teacher": lambda: Mixture([one, OfRows({"a": other})]),
        "sequences of train_dataset .* are not in the store":
            lambda: trainer(tmp_path, llama(seed=1), Mixture([one, store]), unknown, method="kl"),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make()


def test_a_teacher_for_each_example(tmp_path):
    teachers = {"a": llama(seed=2), "b": gpt2(60, seed=3)}
    names = ["a", "b", "b", "a", "b", "a", "a", "b"]
    prompts, targets = batch(n=8)
    both = OfRows(teachers)
    both.choose(names)
    found = dense(both, prompts, targets)
    for name, logits, prompt, target in zip(
        names, found.split([len(t) for t in targets]), prompts, targets, strict=True
    ):
        torch.testing.assert_close(logits, dense(InRoom(teachers[name]), [prompt], [target]), rtol=1e-4, atol=1e-5)
    rows = [{**row, "teacher": name} for row, name in zip(data(), names, strict=True)]
    trainer(tmp_path, llama(seed=1), OfRows(teachers), rows, divergence="js").train()
    trainer(tmp_path, llama(seed=1), OfRows(teachers), rows, method="tvd").train()
    of_one = [{**row, "teacher": "a"} for row in data()]
    runs = [trainer(tmp_path, llama(seed=1), t, r, divergence="js")
            for t, r in ((OfRows(teachers), of_one), (teachers["a"], data()))]  # fmt: skip
    for each in runs:
        each.train()
    torch.testing.assert_close(*(flat(each.model) for each in runs), rtol=1e-3, atol=1e-4)
    stores = {name: stored(tmp_path / name, teacher, data()[:4]) for name, teacher in teachers.items()}
    with pytest.raises(ValueError, match=r"2 of 4 sequences of train_dataset \(labels: 5, 6\) are not in .*/a"):
        trainer(tmp_path, llama(seed=1), OfRows(stores), rows, divergence="js")
    with pytest.raises(ValueError, match="names the teacher 'c'; known: a, b"):
        trainer(tmp_path, llama(seed=1), OfRows(teachers), [{**r, "teacher": "c"} for r in data()], divergence="js")


@pytest.mark.parametrize("several", [lambda *t: t[0], lambda *t: Mixture(t), lambda *t: OfRows(dict(enumerate(t)))],
                         ids=["one", "mixture", "of rows"])  # fmt: skip
def test_each_of_several_teachers_is_looked_at_and_moved_before_any_work(several, tmp_path, monkeypatch):
    moved, tried = [], []
    monkeypatch.setattr(InRoom, "to", lambda self, device: moved.append(self.model))
    monkeypatch.setattr(InRoom, "check", lambda self, pack: tried.append(self.model))
    models = [llama(seed=2), gpt2(60, seed=3)]
    teacher = several(*models)
    rows = [{**row, "teacher": "0"} if isinstance(teacher, OfRows) else row for row in data()]
    of = models[: 1 if isinstance(teacher, torch.nn.Module) else 2]
    trainer(tmp_path, llama(seed=1), teacher, rows, divergence="js")
    assert moved == of and tried == of
    for settings, looks in (dict(method="mle"), []), (dict(method="mle", eval_strategy="epoch"), of):
        tried.clear()
        args = FDistillConfig(str(tmp_path), **{**BASE, **settings})
        FDistillTrainer(llama(seed=1), teacher, args, train_dataset=rows, eval_dataset=rows)
        assert tried == looks


def test_the_student_as_its_own_teacher(tmp_path, monkeypatch):
    """With a longer prompt, whose knowledge it takes over; and as its own average, which a checkpoint keeps."""
    longer = [[7, 8, 9, *row["prompt_ids"]] for row in data()]
    rows = data(teacher_prompt_ids=longer)
    student = llama(seed=1)
    run = trainer(tmp_path, student, Itself(), rows, divergence="kl", max_steps=20)
    apart = []
    for _ in range(2):
        with torch.no_grad():
            model = run.model.eval()
            prompts, targets = batch(n=8)
            theirs, _ = rows_of(model, [torch.tensor(p) for p in longer], targets, EOS)
            ours, _ = rows_of(model, prompts, targets, EOS)
            apart.append(float(step_loss(ours, theirs, fk.TABLE["kl"])))
        if len(apart) == 1:
            run.train()
    assert apart[1] < 0.7 * apart[0]
    results = []
    for stops in ([4], [2, 4]):
        student = llama(seed=1)
        for i, stop in enumerate(stops):
            own = Itself(decay=0.5)
            run = trainer(tmp_path / str(len(stops)), student, own, rows, divergence="kl", max_steps=stop,
                          save_strategy="steps", save_steps=2, lr_scheduler_type="constant")  # fmt: skip
            run.train(resume_from_checkpoint=bool(i))
            student = run.model
        results.append([flat(student), flat(own.average)])
        assert not torch.equal(*results[-1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    moved = shutil.copytree(tmp_path / "2" / "checkpoint-2", tmp_path / "moved")  # another run's folder
    own = Itself(decay=0.5)
    run = trainer(tmp_path / "on", llama(seed=1), own, rows, divergence="kl", max_steps=4, lr_scheduler_type="constant")
    run.train(resume_from_checkpoint=str(moved))
    torch.testing.assert_close(flat(own.average), results[0][1])
    (moved / "average.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"a run without Itself\(decay"):
        run.train(resume_from_checkpoint=str(moved))
    with pytest.raises(ValueError, match="decay must be in"):
        Itself(1.5)
    monkeypatch.setattr("fdistill_kernels.sequence.trainer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"Itself\(decay=...\) takes a student that is whole on each rank"):
        trainer(tmp_path, llama(seed=1), Itself(decay=0.5), rows, divergence="kl")


def test_a_teacher_is_whole_under_zero_3(tmp_path):
    """Whose engine gathers a student's weights alone; transformers partitions what it loads once it is configured."""
    model = llama(seed=1)
    model.save_pretrained(tmp_path)
    configured = Mock(is_zero3=lambda: True)
    deepspeed.set_hf_deepspeed_config(configured)
    try:
        whole = teacher_of(str(tmp_path)).model  # without the package, which partitions
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    torch.testing.assert_close(flat(whole), flat(model))
    assert not is_partitioned(model)
    model.lm_head.weight.ds_id = 3  # as DeepSpeed marks what it has partitioned
    assert is_partitioned(model)
    with pytest.raises(ValueError, match="the teacher is partitioned by ZeRO-3"):
        teacher_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_average_moves_by_its_share_of_what_the_student_moves(dtype, tmp_path):
    """Once a step where weights are tied, and also by shares that the student's dtype would round away."""
    student, own = gpt2(60, seed=1).to(dtype), Itself(decay=0.999)
    own.bind(student)
    before = [p.float().clone() for p in own.average.parameters()]
    for step in range(100):
        if step == 50:
            save_file(own.exact(), tmp_path / KeepAverage.FILE)
            own = Itself(decay=0.999)
            own.bind(student)
            own.load(tmp_path)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.5 * (step == 0))
        own.update()
    moved = 1 - 0.999**100
    for p, was, theirs in zip(own.average.parameters(), before, student.parameters(), strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p.float(), torch.lerp(was, theirs.float(), moved), rtol=1e-2, atol=1e-3)


class Sealed(torch.Tensor):
    """A weight that nobody writes to, as quantised ones are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.lerp_, torch.Tensor.copy_):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo):
        return self


def test_an_average_is_of_what_is_trained(tmp_path):
    """Of an adapter's student the base model is as it was, quantised or not, and in no checkpoint; and of weights that
    were trained for a time the average goes on.
    """
    student, own = llama(seed=1).requires_grad_(False), Itself(decay=0.5)
    sealed, first, second = (student.model.layers[0].mlp.down_proj, student.lm_head, student.model.norm)
    sealed.weight = torch.nn.Parameter(sealed.weight.detach().as_subclass(Sealed), requires_grad=False)
    own.bind(student)
    before = student.lm_head.weight.detach().clone()
    for of, other in ((first, second), (second, first)):
        of.requires_grad_(True)
        other.requires_grad_(False)
        with torch.no_grad():
            of.weight.add_(1)
        own.update()
    assert {"lm_head.weight", "model.norm.weight"} == {name for name in own.exact() if name.endswith("weight")}
    torch.testing.assert_close(own.average.lm_head.weight, before + 0.75)
    save_file(own.exact(), tmp_path / KeepAverage.FILE)
    again = Itself(decay=0.5)
    again.bind(student)
    again.load(tmp_path)
    for one in (own, again):
        one.update()
    assert torch.equal(again.average.lm_head.weight, own.average.lm_head.weight)


def test_a_server_is_asked_for_the_next_batch_while_this_one_is_learnt_from(tmp_path):
    with Server(Model(60), delay=0.05) as server, fk.Endpoint(server.url, vocabulary=60, k=8) as endpoint:
        run = trainer(tmp_path, llama(seed=1), endpoint, divergence="kl", max_steps=2)
        waits, original = [], run.teacher.rows

        def rows(*arguments, **more):
            key = tuple(map(len, arguments[1]))
            waits.append((key, len(run.teacher._ahead)))
            return original(*arguments, **more)

        run.teacher.rows = rows
        run.train()
        assert [ahead for _, ahead in waits] == [2, 1]  # this one's and the next one's were asked for
        asked = sum(server.asked.values())
    assert asked <= 8 + 4  # each sequence once, and what is tried at first


def test_a_server_is_asked_once_for_equal_batches_that_wait():
    with Server(Model(60)) as server, fk.Endpoint(server.url, vocabulary=60, k=8) as endpoint:
        endpoint.check()
        server.asked.clear()
        teacher, batch = Served(endpoint), ([[1, 2], [3]], [[4], [5, 6]])
        for _ in range(2):
            teacher.expect(*batch, most=4)
        of_tensors = [[torch.tensor(x) for x in side] for side in batch]
        found = [teacher.rows(*of_tensors, torch.device("cpu")).value for _ in range(2)]
        assert torch.equal(found[0].log_probs, found[1].log_probs) and not teacher._ahead
        assert sum(server.asked.values()) == 2


def test_a_server_is_asked_once_for_each_batch_of_an_update(tmp_path):
    rows = data(16, sample_ids=[[i + 2, EOS] for i in range(16)])
    with Server(Model(60)) as server, fk.Endpoint(server.url, vocabulary=60, k=8) as endpoint:
        options = {"shares": {"gold": 0.5, "teacher": 0.5}, "gradient_accumulation_steps": 8}
        trainer(
            tmp_path, llama(seed=1), endpoint, rows, divergence="kl", per_device_train_batch_size=1, **options
        ).train()
        asked = [
            server.asked[tuple(row["prompt_ids"] + row[name])] for row in rows for name in ("labels", "sample_ids")
        ]
    assert asked == [1] * 32


def test_an_evaluation_asks_a_server_about_gold_targets_alone(tmp_path):
    rows = data(8, sample_ids=[[59, i + 2, EOS] for i in range(8)])
    with Server(Model(60)) as server, fk.Endpoint(server.url, vocabulary=60, k=8) as endpoint:
        run = trainer(tmp_path, llama(seed=1), endpoint, rows, divergence="kl", shares={"teacher": 1.0})
        run.evaluate(rows)
        asked = [
            [server.asked[tuple(row["prompt_ids"] + row[name])] for row in rows] for name in ("labels", "sample_ids")
        ]
    assert asked == [[1] * 8, [0] * 8]


def test_lists_and_rows_are_compared_alike():
    student, teacher = llama(seed=1), llama(seed=2)
    prompts, targets = batch()
    with torch.no_grad():
        theirs = InRoom(teacher).rows(prompts, targets, CPU)
    whole = fk.top_k_of(theirs.value, 60)

    ours, _ = rows_of(student, prompts, targets, EOS)
    for name in ("js", "rkl", "dkd", "akl"):
        wanted, listed, called = (step_loss(ours, of, fk.TABLE[name]).item() for of in (
            theirs, TeacherRows(whole, 60), TeacherRows(logits_function(theirs, CPU), 60)))  # fmt: skip
        assert listed == pytest.approx(wanted, rel=1e-4) and called == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def causal_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tokenizer: PreTrainedTokenizerFast = make_files(folder)
    for name, seed in (("causal", 2), ("student", 1)):
        model = llama(len(tokenizer), seed=seed)
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def command(*arguments, expect=0):
    assert cli.main([str(a) for a in arguments]) == expect


COMMON = ("--max-new-tokens", "8", "--eval-pairs", "5", "--limit", "20")


def build_store(files, out, *more, teacher="causal"):
    states = () if "top_k" in more else ("--states", "float32")
    command("teacher", "build", "--teacher", files / teacher, "--data", files / "pairs.tsv", "--output-dir", out, *states,
            *changed_call(COMMON, *more))  # fmt: skip


def test_the_command_from_build_to_a_student(causal_files, tmp_path, capsys):
    store, run = tmp_path / "store", tmp_path / "run"
    build_store(causal_files, store, "--json")
    made = json.loads(capsys.readouterr().out)
    assert made["sequences"] >= 20 and made["kind"] == "hidden" and made["damaged"] == {}
    assert made["bytes_per_token"] < 4 * 16 + 60  # the states of 16 floats, and the ids
    assert teacher_of(store).ends() == [AutoTokenizer.from_pretrained(causal_files / "causal").eos_token_id]
    asked = []
    original = InRoom.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InRoom, "rows", lambda self, *a, **k: (asked.append(len(a[0])), original(self, *a, **k))[1])
        build_store(causal_files, store, "--json")
    assert sum(asked) <= 1  # all but the head's probe is there
    capsys.readouterr()
    command("teacher", "inspect", store, "--plot", tmp_path / "lengths.png")
    assert "bytes_per_token" in capsys.readouterr().out and (tmp_path / "lengths.png").stat().st_size > 1000
    command("teacher", "verify", store, "--teacher", causal_files / "causal", "--json")
    held = json.loads(capsys.readouterr().out)
    assert held["compared"] == 16 and held["kl_largest"] < 1e-5 and held["damaged"] == {}
    command("teacher", "verify", store, "--teacher", causal_files / "student", expect=2)
    assert "has the fingerprint" in capsys.readouterr().err
    build_store(causal_files, tmp_path / "half", "--kind", "top_k", "--teacher-dtype", "bfloat16")
    capsys.readouterr()
    command("teacher", "verify", tmp_path / "half", "--teacher", causal_files / "causal", "--json")
    assert json.loads(capsys.readouterr().out)["kl_largest"] < 1e-5
    settings = ("--student", causal_files / "student", "--data", causal_files / "pairs.tsv", *COMMON, "--max-steps", "3",
                "--warmup-steps", "1", "--method", "kl", "--json")  # fmt: skip
    results = []
    hidden = shutil.move(causal_files / "causal", tmp_path / "moved")  # the teacher's weights are not there
    command("train", "--teacher", store, "--output-dir", run, *settings)
    results.append(json.loads(capsys.readouterr().out))
    shutil.move(hidden, causal_files / "causal")
    room = tmp_path / "room"
    command("train", "--teacher", causal_files / "causal", "--output-dir", room, "--samples", room, *settings)
    results.append(json.loads(capsys.readouterr().out))
    assert results[0]["perplexity"] == pytest.approx(results[1]["perplexity"], rel=1e-3)
    assert "likelihood_risk" in results[1] and "likelihood_risk" not in results[0]
    students = [AutoModelForCausalLM.from_pretrained(folder / "student") for folder in (run, room)]
    for one, other in zip(*(s.parameters() for s in students), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    command("train", "--teacher", store, "--student-layers", "1", "--data", causal_files / "pairs.tsv", "--output-dir",
            tmp_path / "none", *COMMON, "--method", "kl", expect=2)  # fmt: skip
    assert "need the teacher's own weights" in capsys.readouterr().err
    shard = next((store / "shards").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    command("teacher", "verify", store, expect=1)
    assert shard.name in capsys.readouterr().out
    (store / "head.safetensors").write_bytes(b"other")
    command("teacher", "verify", store, "--teacher", causal_files / "causal", "--json", expect=1)
    assert json.loads(capsys.readouterr().out)["damaged"].keys() == {"head.safetensors", shard.stem}


def test_the_command_with_lists_and_an_encoder_decoder_teacher(causal_files, tmp_path, capsys):
    store = tmp_path / "store"
    build_store(causal_files, store, "--kind", "top_k", "--k", "300", "--json", teacher="teacher")
    assert json.loads(capsys.readouterr().out)["mass"]["256"] > 0.9
    command("teacher", "--json", "inspect", store, "--plot", tmp_path / "mass.png")
    assert (tmp_path / "mass.png").exists() and json.loads(capsys.readouterr().out)["k"] == 300
    bart(300, 2, 1, seed=5).save_pretrained(tmp_path / "student")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(causal_files / "teacher" / name, tmp_path / "student" / name)
    capsys.readouterr()
    command("train", "--teacher", store, "--student", tmp_path / "student", "--data", causal_files / "pairs.tsv", "--output-dir",
            tmp_path / "run", *COMMON, "--max-steps", "2", "--method", "kl", "--tail", "within", "--json")  # fmt: skip
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1
    command("teacher", "build", "--teacher", causal_files / "teacher", "--data", causal_files / "pairs.tsv", "--output-dir",
            store, *COMMON, "--kind", "top_k", "--k", "5", expect=2)  # fmt: skip
    assert "k" in capsys.readouterr().err


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_begin_one_after_the_other_leave_nothing_out(first, tmp_path):
    teacher = InRoom(llama(seed=2))
    pairs = [([3, 4 + i], [5, 6 + i]) for i in range(7)]
    made = dict(kind="top_k", vocabulary=teacher.vocabulary, key={}, k=4)
    for rank in (first, 1 - first):  # the second opens the store when the first has written all of its share
        list(build.fill(fk.TeacherStore.create(tmp_path, **made), teacher, pairs, 2, rank, 2))
    assert fk.TeacherStore(tmp_path).missing(pairs) == []


def test_what_a_server_is_asked_for_is_done_or_refused(causal_files, monkeypatch):
    room, tokenizer = InRoom(llama(seed=2)), AutoTokenizer.from_pretrained(causal_files / "causal")
    body = {"prompt": [[3, 4], [5, 6]], "max_tokens": 1, "prompt_logprobs": 2}
    for more in ({"echo": True}, {"logprobs": 3}, {"n": 2}, {"stream": True}, {"stop": ["a"]}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match=f"and no {next(iter(more))}$"):
            serve.completions(room, tokenizer, body | more, 9)
    for more in (
        {"max_tokens": -1},
        {"max_tokens": 2.5},
        {"prompt_logprobs": True},
        {"top_k": "3"},
        {"prompt_logprobs": 10},
        {"temperature": "hot"},
        {"top_p": [1]},
        *({"prompt": wrong} for wrong in (5, "text", {"a": 1}, [], [[]], [[3], 4], [True], [99])),
    ):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(more))} must be"):
            serve.completions(room, tokenizer, body | more, 9)
    for bias in (5, [1], {"a": -100}, {"3": -100}, {"59": 1}):
        with pytest.raises(ValueError, match="logit_bias may have −100"):
            serve.completions(room, tokenizer, body | {"logit_bias": bias}, 9)
    off = dict(echo=False, logprobs=None, n=1, stream=False, stop=None, min_p=0.0, temperature=None)
    assert len(serve.completions(room, tokenizer, body | off, 9)["choices"]) == 2
    assert serve.completions(room, tokenizer, {"prompt": [3], "max_tokens": 0}, 9)["choices"][0]["token_ids"] == []
    with monkeypatch.context() as patch:
        for drawn, why in (([5, EOS], "stop"), ([5, 6], "length")):  # also where the end token is the last allowed
            patch.setattr(serve, "draw", lambda *_, drawn=drawn: [torch.tensor(drawn)])
            (choice,) = serve.completions(room, tokenizer, {"prompt": [3], "max_tokens": 2}, 9)["choices"]
            assert (choice["token_ids"], choice["finish_reason"]) == (drawn, why)
    logits = torch.zeros(1, room.vocabulary)
    logits[:, 4:] = -torch.inf
    monkeypatch.setattr("fdistill_kernels.sequence.teachers.base.logits_function", lambda *_: lambda begin, end: logits)
    found = serve.completions(room, tokenizer, {**body, "prompt": [3, 9]}, 9)
    assert json.loads(json.dumps(found, allow_nan=False))["choices"][0]["prompt_logprobs"][1]["9"]["logprob"] == -9999


def test_the_logits_of_a_few_tokens_at_a_time_are_made(causal_files, tmp_path, monkeypatch):
    room, tokenizer = InRoom(llama(seed=2)), AutoTokenizer.from_pretrained(causal_files / "causal")
    prompt, spans = [3, 9, 4, 1, 5, 9, 2, 6], []

    def noted(rows, device):
        logits = logits_function(rows, device)
        return lambda begin, end: spans.append((begin, end)) or logits(begin, end)

    monkeypatch.setattr("fdistill_kernels.sequence.teachers.base.logits_function", noted)
    store = fk.TeacherStore.create(tmp_path, kind="top_k", vocabulary=room.vocabulary, key={}, k=3)
    whole = serve.prompt_log_probs(room, tokenizer, prompt, 3)
    (listed,) = build._targets(room, [(prompt[:1], prompt[1:])], store)
    monkeypatch.setattr("fdistill_kernels.sequence.teachers.base.ENTRIES", 2 * room.vocabulary + 1)
    pieces = serve.prompt_log_probs(room, tokenizer, prompt, 3)
    (in_pieces,) = build._targets(room, [(prompt[:1], prompt[1:])], store)
    assert spans == [(0, 7)] * 2 + [(0, 2), (2, 4), (4, 6), (6, 7)] * 2 and len(whole) == len(pieces) == 8
    assert torch.equal(listed.ids, in_pieces.ids)
    torch.testing.assert_close(listed.log_probs, in_pieces.log_probs)
    for one, other in zip(whole[1:], pieces[1:], strict=True):
        assert list(one) == list(other)
        assert [e["logprob"] for e in one.values()] == pytest.approx([e["logprob"] for e in other.values()], abs=1e-5)


def test_a_server_of_an_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path):
    bart(seed=2).config.save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(ValueError, match="is an encoder–decoder model, and completions go on from their prompt"):
        serve.server(str(tmp_path))


def test_a_served_teacher_scores_the_student_s_samples(causal_files, tmp_path, capsys, monkeypatch):
    """rkl, on sequences that no store has seen; the second run asks the server for nothing that the first did."""
    with monkeypatch.context() as patch:
        patch.chdir(causal_files / "causal")
        server = serve.server(".", port=0)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="in use"):
        patch.setattr(serve, "load_model", lambda *_: pytest.fail("a model was loaded"))
        serve.server(str(causal_files / "causal"), port=server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        model = InRoom(AutoModelForCausalLM.from_pretrained(causal_files / "causal"))
        prompts, targets = [torch.tensor([5, 6, 7])], [torch.tensor([8, 9, 10])]
        with fk.Endpoint(url, vocabulary=model.vocabulary, k=model.vocabulary) as endpoint:
            found = endpoint.targets(prompts, targets)
            assert endpoint.model == "causal"
            log_p = dense(model, prompts, targets).log_softmax(-1)
            torch.testing.assert_close(found.log_probs.float(), log_p.gather(1, found.ids), rtol=0, atol=2e-3)
            drawn = endpoint.draw(prompts, Sampling(6), 3)
            assert len(drawn) == 1 and 1 <= len(drawn[0]) <= 6
        for named, status in (("causal", 200), (None, 200), ("other", 404)):  # null is as if it were not there
            body = {"model": named, "prompt": [5, 6], "max_tokens": 1}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == status
        for rows in (model.vocabulary, model.vocabulary - 5):  # of a student whose head has fewer
            with fk.Endpoint(url, vocabulary=rows, k=8, padded=True) as endpoint:
                drawn = endpoint.draw(prompts * 8, Sampling(6), 3, vocabulary=20)
                assert all(row.max() < 20 for row in drawn)
        of_run = (
            "--student",
            causal_files / "student",
            "--data",
            causal_files / "pairs.tsv",
            *COMMON,
            "--max-steps",
            "2",
        )
        asked = ("train", *of_run, "--output-dir", tmp_path / "run", "--method", "rkl", "--k", "50", "--json")
        beams = ("--method", "seqkd", "--output-dir", tmp_path / "beams")
        command("train", *of_run, *beams, "--teacher", url, expect=2)
        assert "train_dataset has no beam_ids, and a server is asked for samples" in capsys.readouterr().err
        assert not (tmp_path / "beams" / "config.yaml").exists()
        command(*asked, "--teacher", url.replace("://", "://me:sesame@"))
        told = capsys.readouterr()
        assert json.loads(told.out)["perplexity"] > 1
        command(*asked, "--teacher", url.replace("://", "://me:simsim@"))  # the same server
        command(*asked, "--teacher", url.replace("127.0.0.1", "me:sesame@localhost"), expect=2)
        told = told.out + told.err + "".join(capsys.readouterr())
        written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
        assert "holds another run: teacher was" in told and "sesame" not in told and b"sesame" not in written
        command("teacher", "verify", tmp_path / "run" / "endpoint", "--teacher", causal_files / "causal", "--json")
        found = json.loads(capsys.readouterr().out)
        assert found["sequences"] > 5 and found["compared"] and found["tvd_largest"] < 0.01
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("said", "what"), [("fingerprint", "model"), ("tokenizer", "tokenizer")])
def test_samples_are_not_drawn_from_another_model_s_server(causal_files, tmp_path, capsys, said, what):
    teacher = str(causal_files / "causal")
    with Server(Model(60), **{said: "another"}) as server:
        server.reply_models[0]["id"] = teacher
        command("train", "--teacher", teacher, "--vllm_url", server.url, "--student", causal_files / "student", "--data",
                causal_files / "pairs.tsv", *COMMON, "--method", "kl", "--output-dir", tmp_path, expect=2)  # fmt: skip
        assert not server.bodies and f"another {what} than" in capsys.readouterr().err


@pytest.mark.parametrize("swapped", [False, True])
def test_a_server_that_only_tokenizes_is_compared_by_a_text(causal_files, tmp_path, capsys, swapped):
    tokenizer = AutoTokenizer.from_pretrained(causal_files / "causal")
    with Server(Model(tokenizer.vocab_size)) as server:
        server.tokenize = lambda text: tokenizer(text + "?" * swapped, add_special_tokens=False)["input_ids"]
        command("train", "--teacher", server.url, "--student", causal_files / "student", "--data", causal_files / "pairs.tsv",
                *COMMON, "--max-steps", "1", "--method", "mle", "--output-dir", tmp_path, expect=2 * swapped)  # fmt: skip
    assert ("has another tokenizer than" in capsys.readouterr().err) == swapped


def test_a_server_of_several_models_and_of_either_kind(causal_files, tmp_path, capsys):
    def trained(*more, expect=0):
        command("train", "--teacher", server.url, "--student", causal_files / "student", "--data", causal_files / "pairs.tsv", *COMMON,
                "--max-steps", "1", "--method", "rkl", "--output-dir", tmp_path / "-".join(more), *more, expect=expect)  # fmt: skip

    with Server(Model(AutoTokenizer.from_pretrained(causal_files / "causal").vocab_size)) as server:
        server.reply_models = [{"id": "base"}, {"id": "tuned"}]
        trained(expect=2)
        assert "--served_model_name: the server has ['base', 'tuned']" in capsys.readouterr().err
        trained("--served_model_name", "tuned")
        assert {body["model"] for body in server.bodies} == {"tuned"}
        server.bodies.clear()
        trained("--served_model_name", "tuned", "--server_kind", "sglang")
        assert all(body["return_logprob"] for body in server.bodies) and server.bodies


def kl_run(files, store):
    return ("train", "--teacher", store, "--student", files / "student", *COMMON, "--max-steps", "2", "--method", "kl")


def test_a_damaged_store_is_built_again_and_one_that_lacks_sequences_says_so_at_once(causal_files, tmp_path, capsys):
    store, data = tmp_path / "store", causal_files / "pairs.tsv"
    (store / "shards").mkdir(parents=True)
    (store / "manifest.json.0.partial").write_text("{")  # of a build that was killed at its first file
    build_store(causal_files, store)
    for shard in (store / "shards").glob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    command("teacher", "verify", store, expect=1)
    build_store(causal_files, store)
    command("teacher", "verify", store, "--teacher", causal_files / "causal", expect=1)  # they are named still
    told = capsys.readouterr()
    assert "kl_largest" in told.out and "--repair" in told.err
    command("teacher", "verify", store, "--repair", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["set_aside"] and not found["damaged"]
    command("teacher", "verify", store)
    changed = tmp_path / "changed.tsv"
    changed.write_text(data.read_text().replace("numărul 19 și 20", "numărul 19 și 21"))
    train = kl_run(causal_files, store)
    command(*train, "--data", changed, "--output-dir", tmp_path / "run", expect=2)
    told = capsys.readouterr().err
    assert "of eval_dataset (labels: 1) are not in the store" in told and "which was built of data" in told
    command(*changed_call(train, "--limit", "30"), "--data", data, "--output-dir", tmp_path / "run2", expect=2)
    assert "no teacher samples for these prompts; it was built of data" in capsys.readouterr().err
    command(*train[:-1], "seqkd", "--data", data, "--output-dir", tmp_path / "run2", expect=2)
    told = capsys.readouterr().err
    assert "no teacher beams for these prompts" in told and "sequences gold,teacher" in told
    build_store(causal_files, store, "--limit", "30")  # a store grows
    command(*changed_call(train, "--limit", "30"), "--data", data, "--output-dir", tmp_path / "run3", "--seed", "4")
    capsys.readouterr()


def test_what_a_command_refuses_and_why(causal_files, tmp_path, capsys):
    store, data = tmp_path / "store", causal_files / "pairs.tsv"
    build_store(causal_files, store)
    teacher = ("--teacher", causal_files / "causal", "--data", data)
    build = ("teacher", "build", *teacher, *COMMON, "--output-dir")
    train = (*kl_run(causal_files, store), "--data", data)
    (tmp_path / "bad.yaml").write_text("k: many\n")
    (tmp_path / "worse.yaml").write_text("k: [\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "target": null}\n{"prompt": "b", "target": "c"}\n')
    (tmp_path / "cut.jsonl").write_text('{"prompt": "a", "target"\n')
    for words, call in {
        "is not empty and no store": (*build, causal_files / "student"),
        "--states: not of --kind top_k": (*build, tmp_path / "x", "--kind", "top_k", "--states", "int8"),
        "--k, --log_probs: not of --kind hidden": (*build, tmp_path / "x", "--k", "7", "--log-probs", "uint8"),
        "invalid choice: 'topk'": (*build, tmp_path / "x", "--kind", "topk"),
        "a store is built from a model": ("teacher", "build", "--teacher", store, "--data", data, "--output-dir", tmp_path / "x"),
        "per_device_eval_batch_size must be at least 1": (*build, tmp_path / "x", "--per-device-eval-batch-size", "-1"),
        "--eval_pairs must be at least 1": ("teacher", "build", *teacher, "--eval-pairs", "0", "--output-dir", tmp_path / "x"),
        "argument --k: invalid int value: 'many'": (*build, tmp_path / "x", "--config", tmp_path / "bad.yaml"),
        "while parsing": (*build, tmp_path / "x", "--config", tmp_path / "worse.yaml"),
        "is a store: give a run another --output_dir": (*train, "--output-dir", store),
        "holds hidden states": (*train, "--output-dir", tmp_path / "y", "--tail", "within"),
        "tail must be one of": (*train, "--output-dir", tmp_path / "y", "--tail", "nonsense"),
        "--beams, --k: not used, as a store draws nothing":
            changed_call(train, "--output-dir", tmp_path / "y", "--k", "7", "--method", "seqkd", "--beams", "2"),
        "--cache_implementation: not used, as nothing is drawn":
            (*build, tmp_path / "x", "--sequences", "gold", "--cache_implementation", "static"),
        "--k: not used, as the teacher's own weights": ("train", *teacher, "--student", causal_files / "student", "--output-dir", tmp_path / "y", "--k", "7"),
        "manifest.json is missing": ("teacher", "inspect", tmp_path / "nosuch"),
        "row 0: target must be text": ("teacher", "build", "--teacher", causal_files / "causal", "--data", tmp_path / "rows.jsonl", "--max-new-tokens", "8", "--output-dir", tmp_path / "x"),
        "cut.jsonl, line 1:": ("teacher", "build", "--teacher", causal_files / "causal", "--data", tmp_path / "cut.jsonl", "--output-dir", tmp_path / "x"),
        "completions go on from their prompt": ("teacher", "serve", "--teacher", causal_files / "teacher", "--port", "0"),
    }.items():  # fmt: skip
        command(*call, expect=2)
        assert words in capsys.readouterr().err, words


def test_a_read_only_store_and_one_that_was_poured(causal_files, tmp_path, capsys):
    store = tmp_path / "store"
    build_store(causal_files, store)
    (store / "tokenizer").rename(tmp_path / "kept")
    (store / "config.json").unlink()
    for path in [*store.rglob("*"), store]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        command("train", "--teacher", store, "--student", causal_files / "student", "--data", causal_files / "pairs.tsv",
                *COMMON, "--max-steps", "2", "--method", "kl", "--output-dir", tmp_path / "run")  # fmt: skip
    finally:
        for path in [store, *(p for p in store.rglob("*") if p.is_dir())]:
            path.chmod(0o755)
    assert not list(store.rglob("arrow"))
    capsys.readouterr()
    adapter = tmp_path / "adapter"  # whose configuration is its base model's
    base = AutoModelForCausalLM.from_pretrained(causal_files / "student")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(adapter)
    asked = ask("train", settings={"teacher": store, "student": adapter, "tokenizer": causal_files / "student", "data": "x",
                                   "tensor_parallel": 2})  # fmt: skip
    assert teacher_for(asked)[2].vocab_size == base.config.vocab_size
    with pytest.raises(ValueError, match="--tensor_parallel splits whole weights"):
        load_asked(asked, adapter)


def test_padded_heads_of_either_model(tmp_path):
    """Ids that one of them has alone are no one's targets."""
    rows = data()
    wide, narrow = llama(64, seed=2), llama(seed=1)
    for teacher, student in ((wide, narrow), (llama(seed=2), llama(64, seed=1))):
        for settings in (dict(), dict(kind="top_k", k=teacher.config.vocab_size)):
            store = stored(tmp_path / f"{teacher.config.vocab_size}{len(settings)}", teacher, rows, **settings)
            assert trainer(tmp_path, student, store, rows, divergence="js").train().training_loss > 0


def test_a_model_s_fingerprint_is_what_it_says_not_where_it_lies(causal_files, tmp_path):
    from fdistill_kernels.sequence.hashes import fingerprint

    shutil.copytree(causal_files / "causal", tmp_path / "moved")
    one, other = (AutoModelForCausalLM.from_pretrained(p) for p in (causal_files / "causal", tmp_path / "moved"))
    other.config.use_cache = False
    assert fingerprint(one) == fingerprint(other)
    other.config.rms_norm_eps = 0.5
    assert fingerprint(one) != fingerprint(other)


def test_an_adapter_s_folder_is_a_teacher(causal_files, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(causal_files / "causal")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    prompts, targets = batch()
    found = dense(teacher_of(str(tmp_path / "lora")), prompts, targets)
    torch.testing.assert_close(found, dense(InRoom(model), prompts, targets), rtol=1e-4, atol=1e-5)
