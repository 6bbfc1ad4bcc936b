"""Two processes on one machine: gradients are those of one process with the whole batch, FSDP2, and `fdistill train`."""

import os

import pytest
import torch
from datasets import Dataset
from torch.distributed.elastic.utils.distributed import get_free_port

from fdistill_kernels import cli
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.sequence.forward import forward_to_head, rows_of
from fdistill_kernels.sequence.losses import step_loss
from fdistill_kernels.sequence.sampling import Sampling, draw

from . import processes
from .test_run import arguments, lines_of, make_files
from .test_sequence import EOS, bart, batch, flat, gpt2
from .test_student_server import served, trained
from .test_trainer import trainer

#: Student samples by top_k=1 are the same in one process as in two.
SETTINGS = dict(optim="sgd", max_steps=2, learning_rate=0.1, top_k=1, logging_steps=2, per_device_eval_batch_size=2)
CASES = {"kl": {}, "js": dict(normalize="sequence"), "tvd": dict(gradient_accumulation_steps=2),
         "predistill": dict(logging_steps=9), "mle": dict(gradient_accumulation_steps=2),
         "rkl": dict(stream=True, eval_strategy="epoch")}  # fmt: skip
MODELS = {"gpt2": lambda seed: gpt2(60, seed=seed), "bart": lambda seed: bart(seed=seed)}


def rows():
    """Targets and samples of different lengths; of the prompts' and of predistill's states no padding."""
    targets = [[5, EOS], [6, 7, 8, 9, EOS]]
    return [dict(prompt_ids=[i, 2, 3, 4], labels=targets[i % 2], sample_ids=targets[i // 2 % 2]) for i in range(2, 10)]


def weights_after(method, make, folder, ranks):
    case = dict(CASES[method])
    accumulated, student, train = case.get("gradient_accumulation_steps", 1), make(1), rows()
    held_out = rows()[:5]
    if streams := case.pop("stream", False):
        train = Dataset.from_list(train).to_iterable_dataset(num_shards=3)  # of 3 rows, 3 and 2
        held_out = Dataset.from_list(held_out).to_iterable_dataset(num_shards=2)  # of 3 rows and 2
    run = trainer(folder, student, make(2), train, method=method, **{**SETTINGS, **case},
                  per_device_train_batch_size=4 // ranks // accumulated)  # fmt: skip
    if method == "kl":  # which leaves a model that accelerate takes for prepared
        run.evaluate()
    trained = run.train()
    run.args.dataloader_num_workers = int(streams)
    measured = run.state.log_history[0] | run.evaluate(held_out)  # whose last batch is filled up for some ranks
    shown = {n: x for n, x in measured.items() if "_on_" in n or n in ("loss", "eval_loss")}
    return flat(student), shown | {"train_loss": trained.training_loss}


def sharded(rank):
    """A student's gradients by FSDP2, its head sharded with the rest; and samples whose number of steps differs."""
    from torch.distributed.fsdp import fully_shard

    student, teacher = gpt2(60, seed=1), gpt2(60, seed=2)
    for block in student.transformer.h:
        fully_shard(block)
    fully_shard(student)
    prompts, continuations = batch(n=6)
    mine = slice(3 * rank, 3 * rank + 3)
    loss = kl(student, teacher, prompts[mine], continuations[mine])
    loss.backward()
    gradients = [p.grad.full_tensor() for p in student.parameters()]
    drawn = draw(student, prompts[mine], Sampling(max_new_tokens=2 + 3 * rank))
    assert max(map(len, drawn)) <= 2 + 3 * rank
    return gradients


def kl(student, teacher, prompts, continuations):
    with torch.no_grad():
        theirs, _ = rows_of(teacher, prompts, continuations, EOS)
    return forward_to_head(student, prompts, continuations, EOS,
                           lambda ours: step_loss(ours, theirs, TABLE["kl"]))[0]  # fmt: skip


def drawn_by_a_server(folder, where):
    """A student's weights after training on what a server draws, here for all ranks; and what a lost server is told by."""
    student, sgd = (lambda: gpt2(64, seed=1)), dict(optim="sgd", learning_rate=0.1, per_device_train_batch_size=2)
    with pytest.raises(ConnectionError) as error:  # on both ranks, and none of them waits
        trained(folder / "lost", student, {**where, "student_server": "http://127.0.0.1:9"}, **sgd)
    return trained(folder / "served", student, where, **sgd)[0], str(error.value)


def worker(rank, folder, port, where):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate gives each rank all cores
    found = {(name, method): weights_after(method, MODELS[name], folder, 2) for name in MODELS for method in CASES}
    found["fsdp"], found["served"] = sharded(rank), drawn_by_a_server(folder, where)
    assert cli.main(arguments(folder, "--method", "tvd", "--eval-steps", "2", "--eval-measures")) == 0
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path):  # one test, so that they are started once
    make_files(tmp_path)
    port = str(get_free_port())
    with served(tmp_path, gpt2(64, seed=1)) as (where, server):
        processes.start(worker, tmp_path, port, where, processes=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, make in MODELS.items():
        for method in CASES:
            want, shown = weights_after(method, make, tmp_path / "one", 1)
            for got, also_shown in (of_rank[name, method] for of_rank in found):
                torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4, msg=f"{name} {method}")
                assert also_shown == pytest.approx(shown, rel=1e-4), f"{name} {method}"

    student, teacher = gpt2(60, seed=1), gpt2(60, seed=2)
    prompts, continuations = batch(n=6)
    (sum(kl(student, teacher, prompts[i : i + 3], continuations[i : i + 3]) for i in (0, 3)) / 2).backward()
    for got, parameter in zip(found[0]["fsdp"], student.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=1e-4)

    want, _ = trained(tmp_path / "own", lambda: gpt2(64, seed=1), dict(optim="sgd", learning_rate=0.1))
    for got, words in (of_rank["served"] for of_rank in found):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
        assert "does not answer to /v1/models" in words
    assert len(server.told) == 2 * 3  # by one process alone

    run = tmp_path / "run"
    lines = lines_of(run)
    keys = [(line["stage"], line["step"], *sorted(line)) for line in lines]
    assert len(set(keys)) == len(keys) and {line["stage"] for line in lines} == {"predistill", "tvd"}
    assert all((run / name).exists() for name in ("student", "report.html", "results.json"))
