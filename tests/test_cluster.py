"""The trainer on several ranks: every way to share out a model or a batch gives one process's curve and weights."""

import contextlib
import io
import json
import math
import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.distributed import DistributedConfig

import fdistill_kernels as fk
import fdistill_kernels.sequence.trainer
from benchmarks import cluster_demo
from fdistill_kernels import cli
from fdistill_kernels.sequence import build, run, samples, stages, watch
from fdistill_kernels.sequence.options import BY_LENGTH
from fdistill_kernels.sequence.samples import TeacherSamples
from fdistill_kernels.sequence.teachers import Itself, Mixture
from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer

from . import processes
from .test_distributed import rows
from .test_run import changed_call
from .test_sequence import llama
from .test_trainer import trainer

CONFIGURATIONS = Path(__file__).parent.parent / "examples" / "cluster"
METHODS = {"kl": dict(gradient_accumulation_steps=2), "tvd": {}, "js": dict(beta=0.3)}


def start(world, work, *arguments, join=True):
    """work(rank, world, *arguments) in each of so many processes."""
    return processes.start(_process, world, get_free_port(), work, arguments, processes=world, join=join)


def _process(rank, world, port, work, arguments):
    of_ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in of_ranks.items()} | {"OMP_NUM_THREADS": "1"}
    work(rank, world, *arguments)
    if dist.is_initialized():
        dist.destroy_process_group()


# --- the trainer, in float64


def model(path, **sizes):
    more = dict(distributed_config=DistributedConfig(**sizes)) if sizes else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **more)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def trained(folder, method, ranks, sampled_by=1, split=(), **sizes):
    """The steps' losses and numbers of tokens, an evaluation's loss, and the weights of a student, of ranks that have
    each their own rows.

    split: of "teacher", whether it is split as the student is.
    """
    accumulated = METHODS[method].get("gradient_accumulation_steps", 1)
    student = model(folder / "student", **sizes)
    teacher = model(folder / "teacher", **(sizes if "teacher" in split else {}))
    run = trainer(folder / "run", student, teacher, rows(), method=method, optim="sgd", max_steps=2, learning_rate=0.1,
                  top_k=sampled_by, logging_steps=1, per_device_train_batch_size=4 // ranks // accumulated,
                  per_device_eval_batch_size=2, **METHODS[method])  # fmt: skip
    clock = SimpleNamespace(perf_counter=lambda: float(run.state.global_step))  # a step takes a second
    with patch.object(watch, "time", clock):
        run.train()
    logged = [line[name] for line in run.state.log_history if "loss" in line for name in ("loss", "tokens_per_second")]
    # of 5 rows, so that a rank lacks some of the last batch
    return [*logged, run.evaluate(rows()[:5])["eval_loss"]], [whole(p) for p in student.parameters()]


#: Ways to train: ranks with rows of their own, and how `trained` shares out the model. Where all have the same rows they
#: draw one process's samples; else top_k=1 makes them the same.
WAYS = {
    2: {"ddp": dict(ranks=2), "fsdp2": dict(ranks=2, fsdp_size=2), "tp": dict(ranks=1, tp_size=2, sampled_by=0),
        "tp of both": dict(ranks=1, tp_size=2, split=["teacher"])},
    4: {"tp and fsdp2": dict(ranks=2, tp_size=2, fsdp_size=2)},
}  # fmt: skip


def train_every_way(rank, world, folder):
    ways = {f"one, {k}": dict(ranks=1, sampled_by=k) for k in (0, 1)} if world == 1 else WAYS[world]
    for way, settings in ways.items():
        for method in METHODS if world < 4 else ["js"]:
            torch.save(trained(folder, method, **settings), folder / f"{way}, {method}, {rank}.pt")
        if world < 4 and "split" not in settings:
            sizes = {name: size for name, size in settings.items() if name != "sampled_by"}
            torch.save(left_out(folder, **sizes), folder / f"{way}, left out, {rank}.pt")
            torch.save(other_teachers(folder, **sizes), folder / f"{way}, other teachers, {rank}.pt")


def check_every_way(folder, world):
    for way, settings in WAYS[world].items():
        more = ["left out", "other teachers"] if "split" not in settings else []
        for method in [*METHODS, *more] if world < 4 else ["js"]:
            wanted, weights = torch.load(folder / f"one, {settings.get('sampled_by', 1)}, {method}, 0.pt")
            for rank in range(world):
                found, of_rank = torch.load(folder / f"{way}, {method}, {rank}.pt")
                assert found == pytest.approx(wanted, rel=1e-6), (way, method)  # logged in float32
                for a, b in zip(of_rank, weights, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=f"{way} {method}")


def left_out(folder, ranks, **sizes):
    """As `trained`, where one batch of an epoch has no finite loss and is skipped; and where nothing is to be learned."""
    student, found = model(folder / "student", **sizes), []
    for masked in (False, True):
        data = [row | {"labels_mask": [False] * len(row["labels"])} if masked else row for row in rows()]
        run = trainer(folder / "run", student, model(folder / "teacher"), data, divergence="js", optim="sgd",
                      learning_rate=0.1, logging_steps=1, per_device_train_batch_size=2, on_nan="skip", per_device_eval_batch_size=2,
                      gradient_accumulation_steps=2 // ranks)  # fmt: skip
        half = run._half

        def broken(of, wrapped, update, half=half):
            here = any(int(p[0]) == 9 for p in update.sequences["gold"].prompts)
            return half(of, wrapped, update) * (torch.nan if here else 1)

        run._half = broken if not masked else half
        run.train()
        found += [line.get(name, 0) for line in run.state.log_history if "loss" in line
                  for name in ("loss", "loss_on_gold", "skipped_batches")]  # fmt: skip
        for count in (4, 5, 1):  # of which a rank lacks none of the last batch, some of it, and all of it
            stream = Dataset.from_list(rows()[:count]).to_iterable_dataset()
            found.append(run.evaluate(stream)["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and sum(found[2:6:3]) == 1 and found[9:-3] == [0] * 6
    return found, [whole(p) for p in student.parameters()]


def gone_on_with(rank, world, folder):
    """A run that stops in the middle of its second epoch, and of the use of its samples, ends as one that does not."""
    data = Dataset.from_list([row | {"length": i % 5} for i, row in enumerate(rows() * 2)])
    orders = {"random": {}, "by length": BY_LENGTH}
    if hasattr(FDistillConfig, "train_sampling_strategy"):
        orders["balanced"] = dict(train_sampling_strategy="batch_rebalance")
    for name, order in orders.items():
        ended = []
        for stops in ([7], [5, 7]):
            student = model(folder / "student")
            for i, stop in enumerate(stops):
                run = trainer(folder / f"{name} {len(stops)}", student, model(folder / "teacher"), data, method="rkl",
                              max_steps=stop, student_every=3, per_device_train_batch_size=2, save_strategy="steps",
                              save_steps=1, lr_scheduler_type="constant", **order)  # fmt: skip
                run.train(resume_from_checkpoint=bool(i))
            ended.append([p.detach().clone() for p in student.parameters()])
        for one, other in zip(*ended, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def gone_on_with_elsewhere(rank, world, folder):
    """A run of one process ends on several as on one, if an update has as many rows."""

    def ended(name, steps, size, **more):
        student = model(folder / "student")
        run = trainer(folder / name, student, model(folder / "teacher"), rows() * 2, method="mle", max_steps=steps,
                      per_device_train_batch_size=size, save_strategy="steps", save_steps=1,
                      lr_scheduler_type="constant")  # fmt: skip
        run.train(**more)
        return [whole(p) for p in student.parameters()]

    if world == 1:
        torch.save(ended("not stopped", 7, 4), folder / "not stopped.pt")
        ended("begun", 5, 4)
        return
    begun = dict(resume_from_checkpoint=str(folder / "begun" / "checkpoint-5"))
    with pytest.raises(ValueError, match=f"rows of an update was 4 and is {4 * world}$"):
        ended(f"begun {world}", 7, 4, **begun)
    for one, other in zip(
        ended(f"begun {world}", 7, 4 // world, **begun), torch.load(folder / "not stopped.pt"), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def other_teachers(folder, ranks, **sizes):
    """As `trained`: a mixture, and the student itself; a batch of an evaluation has nothing to learn."""
    found, weights = [], []
    for teacher in (Mixture([model(folder / "teacher"), model(folder / "student")]), Itself()):
        student = model(folder / "student", **sizes)
        data = [row | {"labels_mask": [i > 2] * len(row["labels"]), "teacher_prompt_ids": [9, *row["prompt_ids"]]}
                for i, row in enumerate(rows())]  # fmt: skip
        run = trainer(folder / "run", student, teacher, data, divergence="js", optim="sgd", learning_rate=0.1,
                      per_device_train_batch_size=4 // ranks, per_device_eval_batch_size=1, logging_steps=1)  # fmt: skip
        run.train()
        found += [line["loss"] for line in run.state.log_history if "loss" in line]
        found.append(run.evaluate(data)["eval_loss"])
        weights += [whole(p) for p in student.parameters()]
    return found, weights


def own_samples(rank, world, folder):
    """Two ranks with one prompt draw each its own samples, and have one generator before and after."""
    data, made = [rows()[0]] * 8, []
    run = trainer(folder / "run", model(folder / "student"), model(folder / "teacher"), data, method="rkl", top_k=0)
    draw = run._draw
    run._draw = lambda *given: made.append(draw(*given)) or made[-1]
    run.train()
    mine = [[y.tolist() for y in found.continuations] for found in made], torch.get_rng_state().tolist()
    dist.all_gather_object(every := [None] * world, mine)
    assert every[0][0] != every[1][0] and every[0][1] == every[1][1]


def refused(rank, world, folder):
    """Ranks that have each a part of a sequence, of which the loss has no whole rows; an average of parts of weights."""
    with pytest.raises(ValueError, match="takes a student that is whole on each rank"):
        trainer(folder / "run", model(folder / "student", fsdp_size=2), Itself(decay=0.5))
    for sizes in (dict(fsdp_size=2), dict(tp_size=2)):
        with pytest.raises(ValueError, match="load_best_model_at_end loads no weights"):
            trainer(folder / "run", model(folder / "student", **sizes), model(folder / "teacher"), rows(),
                    load_best_model_at_end=True, save_strategy="steps", eval_strategy="steps", save_steps=1,
                    eval_steps=1, save_only_model=True)  # fmt: skip
    with pytest.raises(ValueError, match="cp_size=2 cuts a batch's sequences"):
        trainer(folder / "run", model(folder / "student"), model(folder / "teacher"), rows(),
                parallelism_config={"cp_size": 2})  # fmt: skip
    AcceleratorState._reset_state()  # which keeps it


# --- plain losses


def parts(seed=0):
    """Hidden states, labels of 9 and of 3 tokens, both heads and the teacher's states, in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden, theirs, head, their_head = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((16, 6), (16, 6), (20, 6), (20, 6))
    )
    labels = torch.randint(20, (16,), generator=generator)
    labels[[2, 8, 9, 10, 12]] = -100
    return hidden, theirs, head, their_head, labels


def losses(hidden, theirs, head, their_head, labels, **keywords):
    """Each of the losses that has a mean over tokens."""
    logits, teacher = hidden @ head.T, theirs @ their_head.T
    yield fk.f_divergence(logits, teacher, "js", labels=labels, ce_weight=0.5, **keywords)
    yield fk.linear_f_divergence(hidden, head, theirs, their_head, "tvd", labels=labels, **keywords)
    yield fk.cross_entropy(logits, labels, **keywords)
    yield fk.linear_cross_entropy(hidden, head, labels, **keywords)


def means_over_ranks(rank, world, folder):
    """Rows of other ranks, of a batch or of a sequence: the mean is over all ranks' tokens."""
    hidden, theirs, head, their_head, labels = parts()
    for i, wanted in enumerate(losses(hidden, theirs, whole_head := head.clone().requires_grad_(), their_head, labels)):
        (gradient,) = torch.autograd.grad(wanted, whole_head, retain_graph=True)
        mine = slice(8 * rank, 8 * rank + 8)
        count = (labels[mine] != -100).sum()
        dist.all_reduce(count)
        layer = torch.nn.Linear(6, 20, bias=False).double()  # its weight is the head
        layer.weight.data.copy_(head)

        class Loss(torch.nn.Module):
            def __init__(self, layer=layer):
                super().__init__()
                self.layer = layer

            def forward(self, number=i, count=count, mine=mine):
                given = hidden[mine], theirs[mine], self.layer.weight, their_head, labels[mine]
                return list(losses(*given, num_items=count))[number]

        ddp = torch.nn.parallel.DistributedDataParallel(Loss())  # which averages gradients, as long as it is there
        ours = ddp()
        (world * ours).backward()
        torch.testing.assert_close(layer.weight.grad, gradient, rtol=1e-12, atol=1e-14)
        total = ours.detach()
        dist.all_reduce(total)
        torch.testing.assert_close(total, wanted.detach(), rtol=1e-12, atol=0.0)


def sequence_parallel(rank, world, folder):
    """Hidden states split over the sequence, a head over the vocabulary: gathered, and each rank's gradient its own."""
    from torch.distributed._functional_collectives import all_gather_tensor_autograd
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    hidden, theirs, head, their_head, labels = parts()
    inputs = [x.clone().requires_grad_() for x in (hidden, head)]
    wanted = fk.linear_f_divergence(inputs[0], inputs[1], theirs, their_head, "js", labels=labels)
    wanted.backward()
    rows, part = slice(8 * rank, 8 * rank + 8), slice(10 * rank, 10 * rank + 10)
    mine = hidden[rows].clone().requires_grad_(), head[part].clone().requires_grad_()
    # a gather whose backward sums over ranks and scatters: Megatron's
    shard = fk.vocab_shard(dist.group.WORLD, 10, sum_hidden=False)
    states = all_gather_tensor_autograd(mine[0], 0, dist.group.WORLD)
    found = fk.linear_f_divergence(states, mine[1], theirs, their_head, "js", labels=labels, shard=shard)
    found.backward()
    # DTensors: their gather's backward takes each rank's rows of a gradient that is whole
    mesh = init_device_mesh("cpu", (world,))
    split = [distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (hidden, head)]
    states = split[0].redistribute(placements=[Replicate()])
    again = fk.linear_f_divergence(states, split[1], theirs, their_head, "js", labels=labels)
    again.backward()
    for loss, gradients in ((found, [x.grad for x in mine]), (again, [x.grad.to_local() for x in split])):
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0.0)
        for gradient, of_all, at in zip(gradients, inputs, (rows, part), strict=True):
            torch.testing.assert_close(gradient, of_all.grad[at], rtol=1e-10, atol=1e-14)


# --- `fdistill train`


def make_files(folder):
    """Four pairs to train on, so that every step has all of them in whatever order; and a held-out one."""
    words = [chr(97 + i) for i in range(26)]
    pairs = [
        (f"{a} {b} c", f"{b} {a} {c}" if i % 2 else b)
        for i, (a, b, c) in enumerate(zip(words[:5], words[5:10], words[9:14], strict=True))
    ]
    (folder / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs))
    tokens = Tokenizer(
        models.WordLevel({"</s>": 0, "<s>": 1} | {w: i + 2 for i, w in enumerate(words)}, unk_token="</s>")
    )
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", pad_token="</s>", bos_token="<s>")
    for seed, name in enumerate(("student", "teacher"), 1):
        llama(len(tokenizer), seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def arguments(folder, out, ranks, *more):
    call = ["train", "--teacher", f"{folder}/teacher", "--student", f"{folder}/student", "--data", f"{folder}/pairs.tsv",
            "--output_dir", f"{folder}/{out}", "--method", "tvd", "--max_steps", "2", "--max-new-tokens", "4", "--top-k", "1",
            "--warmup-steps", "1", "--eval-pairs", "1", "--learning-rate", "0.01", "--per_device_train_batch_size", str(4 // ranks)]  # fmt: skip
    return changed_call(call, *more)


def environment(configuration):
    """What `accelerate launch` sets for the processes of a configuration file."""
    parser = launch_command_parser()
    path = CONFIGURATIONS / f"{configuration}.yaml"
    args, defaults, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(path), "--main_process_port", "0", "x"])
    )
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    made = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_"))}


@contextlib.contextmanager
def launched(configuration):
    before = dict(os.environ)
    os.environ |= environment(configuration)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def made_by_the_first(rank, world, folder):
    """A base model that the first rank makes before the others ask whether it is to be made: all get the adapter."""
    begin = run.begin

    def late(asked, *more):
        begin(asked, *more)
        while rank and not (asked.folder / "predistilled").exists():
            time.sleep(0.05)

    with patch.object(run, "begin", late):
        more = "--student_layers", "1", "--use_peft", "--lora_target_modules", "q_proj"
        assert cli.main(changed_call(arguments(folder, "made", 2, *more), "--student", "")) == 0


def filled_together(rank, world, folder):
    """A store whose first rank is ready before the other begins, and tells of all that is there."""
    fill, words = build.fill, io.StringIO()

    def late(*args):
        while rank and not list((folder / "store" / "shards").glob("*.json")):
            time.sleep(0.05)
        return fill(*args)

    with patch.object(build, "fill", late), contextlib.redirect_stdout(words):
        assert cli.main(["teacher", "build", "--teacher", f"{folder}/teacher", "--data", f"{folder}/pairs.tsv", "--kind",
                         "top_k", "--sequences", "gold", "--max-new-tokens", "4", "--output_dir", f"{folder}/store",
                         "--json"]) == 0  # fmt: skip
    assert rank or json.loads(words.getvalue())["sequences"] == 5


def command(rank, world, folder):
    """One process; or each configuration of so many."""
    if world == 1:
        assert cli.main(arguments(folder, "one", 1)) == 0
        return
    with launched("ddp"):
        assert cli.main(arguments(folder, "ddp", 2)) == 0
        made_by_the_first(rank, world, folder)
        filled_together(rank, world, folder)
    with launched("fsdp2"):
        assert cli.main(arguments(folder, "refused", 2)) == 2  # on a CPU, whose models would be left whole
        with processes_of_cards():
            assert cli.main(arguments(folder, "fsdp2", 2)) == 0
    assert cli.main(arguments(folder, "tp", 1, "--tensor_parallel", "2")) == 0
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        for more in (("--optim", "adafactor"), ("--use_peft", "--lora_target_modules", "o_proj")):
            assert cli.main(arguments(folder, "not", 1, "--tensor_parallel", "2", *more)) == 2
    assert "optim=adafactor keeps whole rows" in told.getvalue() and "splits the inputs of o_proj" in told.getvalue()


@contextlib.contextmanager
def processes_of_cards():
    """Has accelerate take gloo's processes for those of cards, on which alone it shards by FSDP."""
    original = PartialState.__init__

    def of_cards(state, *args, **keywords):
        original(state, *args, **keywords)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = of_cards
    try:
        yield
    finally:
        PartialState.__init__ = original


def check_commands(folder, names):
    def of(name):
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return [x["loss"] for x in lines if "loss" in x], load_file(folder / name / "student" / "model.safetensors")

    wanted, weights = of("one")
    assert len(wanted) == 2
    for name in names:
        found, of_run = of(name)
        assert found == pytest.approx(wanted, rel=1e-5), name
        assert of_run.keys() == weights.keys()
        for key in weights:
            torch.testing.assert_close(of_run[key], weights[key], rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


def everything(rank, world, folder):
    train_every_way(rank, world, folder / "float64")
    gone_on_with_elsewhere(rank, world, folder / "float64")
    if world > 1:
        gone_on_with(rank, world, folder / "float64")
        own_samples(rank, world, folder / "float64")
        refused(rank, world, folder / "float64")
        means_over_ranks(rank, world, folder)
        sequence_parallel(rank, world, folder)
    command(rank, world, folder / "command")


def zero(rank, world, folder):
    for name in ("zero2", "zero3") if world > 1 else ():
        with launched(name):
            assert cli.main(arguments(folder, name, 2)) == 0
    if world == 1:
        return command(rank, world, folder)
    with launched("zero3"):  # both halves: the student draws, too, and its ranks do not end at one step
        assert (
            cli.main(arguments(folder, "zero3 js", 2, "--method", "js", "--top-k", "0", "--predistill_steps", "1")) == 0
        )
        args = FDistillConfig(output_dir=folder / "run", use_cpu=True, method="rkl", max_steps=2, max_new_tokens=4,
                              per_device_train_batch_size=2, report_to=[])  # fmt: skip
        with pytest.raises(ValueError, match="the teacher is partitioned by ZeRO-3"):
            FDistillTrainer(str(folder / "student"), AutoModelForCausalLM.from_pretrained(folder / "teacher"), args)
        student = AutoModelForCausalLM.from_pretrained(folder / "student")  # a part of it, as transformers has it
        run = FDistillTrainer(student, str(folder / "teacher"), args, train_dataset=Dataset.from_list(rows()))
        assert math.isfinite(run.train().training_loss)


@pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")
def test_deepspeed(tmp_path):
    make_files(tmp_path)
    start(1, zero, tmp_path)
    start(2, zero, tmp_path)
    check_commands(tmp_path, ["zero2", "zero3"])


def make_models(folder):
    for seed, name in enumerate(("student", "teacher"), 1):
        llama(seed=seed).save_pretrained(folder / name)


def test_two_processes(tmp_path):
    for name in ("float64", "command"):
        (tmp_path / name).mkdir()
    make_models(tmp_path / "float64")
    make_files(tmp_path / "command")
    start(1, everything, tmp_path)
    start(2, everything, tmp_path)
    check_every_way(tmp_path / "float64", 2)
    check_commands(tmp_path / "command", ["ddp", "fsdp2", "tp"])


# --- a rank that is lost


def lost(rank, world, folder, how):
    """Rank 1 dies, or sleeps, as its second step begins."""
    original = fk.sequence.trainer.FDistillTrainer.compute_loss

    began = []

    def compute_loss(run, *args, **keywords):
        began.append(time.monotonic())
        if rank == 1 and run.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL) if how == "dies" else time.sleep(600)
        return original(run, *args, **keywords)

    fk.sequence.trainer.FDistillTrainer.compute_loss = compute_loss
    with Path(folder, f"{how} {rank}.txt").open("w") as words, contextlib.redirect_stderr(words):
        status = cli.main(arguments(folder, how, 2, "--ddp_timeout", "4"))
    Path(folder, f"{how}.txt").write_text(str(time.monotonic() - began[-1]))
    sys.exit(status)


def fails(rank, world, folder, how):
    """A rank fails where the others wait for it, or for what it makes."""

    def of_this_rank(*_, **__):
        raise OSError("of this rank")

    place = {
        "begins": (1, run, "student_for"),
        "draws": (1, TeacherSamples, "fill"),
        "makes": (0, stages, "save_whole"),
    }
    failing, *where = place[how]
    more = {"draws": ("--method", "kl"), "makes": ("--student_layers", "1", "--use_peft", "--student", "")}.get(how, ())
    with (
        Path(folder, f"{how} {rank}.txt").open("w") as words, contextlib.redirect_stderr(words),
        patch.object(samples, "SHARD", 1),
        patch.object(*where, of_this_rank) if rank == failing else contextlib.nullcontext(),
    ):  # fmt: skip
        sys.exit(cli.main(arguments(folder, how, 2, *more)))


def four(rank, world, folder):
    train_every_way(rank, world, folder)
    cluster_demo.train(rank, world, folder / "demo", 3)


def test_four_processes_and_the_demo(tmp_path):
    (tmp_path / "demo").mkdir()
    make_models(tmp_path)
    tokens = torch.randint(1, 61, (500,), generator=torch.Generator().manual_seed(0))
    teacher = cluster_demo.llama(61, 0, cluster_demo.SIZES["teacher"])
    cluster_demo.prepare(tmp_path / "demo", tokens, 61, 3, teacher)
    start(1, four, tmp_path)
    start(4, four, tmp_path)
    check_every_way(tmp_path, 4)
    found = cluster_demo.compared(tmp_path / "demo", 4)
    assert len(found["losses"]) == 3 and found["losses"][-1] < found["losses"][0]
    for name, most in cluster_demo.HELD.items():
        assert found["largest_difference"][name] <= most


def test_a_lost_rank_ends_the_others(tmp_path):
    make_files(tmp_path)
    for how, of_rank in (("dies", -signal.SIGKILL), ("sleeps", None)):
        first, second = start(2, lost, tmp_path, how, join=False).processes
        first.join(120)
        if how == "sleeps":
            second.kill()
        assert first.exitcode == 2 and of_rank in (None, second.exitcode)
        assert "fdistill: rank 0 of 2 lost another after step 1: it died" in (tmp_path / f"{how} 0.txt").read_text()
        waited = float((tmp_path / f"{how}.txt").read_text())
        assert waited < 12, f"{how}: {waited} s"


def test_a_rank_that_fails_ends_those_that_wait_for_it(tmp_path):
    make_files(tmp_path)
    for how, failing, words in (
        ("begins", 1, "rank 0 of 2 lost another: it died, or did not come in --ddp_timeout"),
        ("draws", 1, "rank 1 has ended before its part was made: read its own output first"),
        ("makes", 0, "rank 0 has ended before its part was made: read its own output first"),
    ):
        ranks = start(2, fails, tmp_path, how, join=False).processes
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [2, 2], how
        assert "fdistill: of this rank" in (tmp_path / f"{how} {failing}.txt").read_text()
        assert f"fdistill: {words}" in (tmp_path / f"{how} {1 - failing}.txt").read_text()
