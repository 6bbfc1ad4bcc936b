"""The trainer: every method trains, resumes, accumulates; PEFT, prompts of the teacher's own, and bad input."""

import contextlib
import copy
import itertools
import json
import math
import os
import re
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    HfArgumentParser,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.utils import is_liger_kernel_available

import fdistill_kernels as fk
from fdistill_kernels.divergences import AB, TABLE, Alpha, SkewKL, SkewRKL, TailAware
from fdistill_kernels.integrations.transformers import patch_model
from fdistill_kernels.own import FDivergence, resolve
from fdistill_kernels.sequence import sampling, watch
from fdistill_kernels.sequence.beginning_checks import check_accelerator
from fdistill_kernels.sequence.config import MAY_BE_JSON
from fdistill_kernels.sequence.models import evaluating, virtual_tokens
from fdistill_kernels.sequence.objectives import Half
from fdistill_kernels.sequence.options import BY_LENGTH
from fdistill_kernels.sequence.report import name_of
from fdistill_kernels.sequence.samples import TeacherSamples
from fdistill_kernels.sequence.sampling import Sampling, draw, drawn_by_forward
from fdistill_kernels.sequence.teachers import InRoom, Mixture, OfRows, Stored
from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer, check_vocabularies, collate

from .test_sequence import EOS, bart, batch, flat, gpt2, gpt2_64, llama

BASE = dict(report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_steps=2, per_device_train_batch_size=4,
            learning_rate=1e-2, max_new_tokens=5, top_k=30, seed=0)  # fmt: skip


def data(n=8, **extra):
    prompts, targets = batch(n=n)
    return [{"prompt_ids": p.tolist(), "labels": t.tolist(), **{k: v[i] for k, v in extra.items()}}
            for i, (p, t) in enumerate(zip(prompts, targets, strict=True))]  # fmt: skip


def trainer(folder, student, teacher, train=None, **settings):
    return FDistillTrainer(student, teacher, FDistillConfig(str(folder), **{**BASE, **settings}),
                           train_dataset=train or data(), eval_dataset=data(4))  # fmt: skip


def test_options_are_pythons_own_numbers(tmp_path):
    """Loops over NumPy's ranges give its own, which no file of options holds."""
    given = dict(max_new_tokens=np.int64(4), student_every=np.int32(2), learning_rate=np.float32(0.5), seed=np.uint8(3),
                 eval_strategy="steps", eval_steps=np.int64(5), weight_decay=np.float64(0.25), beams=np.int64(2),
                 accelerator_config={"gradient_accumulation_kwargs": {"num_steps": np.int64(1)}})  # fmt: skip
    config = FDistillConfig(str(tmp_path), method="rkl", **given)
    plain = {**{name: x.item() if hasattr(x, "item") else x for name, x in given.items()},
             "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 1}}}  # fmt: skip
    assert config.to_json_string() == FDistillConfig(str(tmp_path), method="rkl", **plain).to_json_string()
    assert json.dumps(Sampling(np.int64(3), np.float32(0.5), np.int64(2)).decided())


@pytest.mark.parametrize("form", ["arrow", "pandas"])
def test_a_stream_of_tables_is_refused(form, tmp_path):
    """A row's columns were taken for its ids; that of a dataset is looked at before."""
    stream = Dataset.from_list(data()).to_iterable_dataset().with_format(form)
    run = trainer(tmp_path, gpt2(60), gpt2(60), stream, method="kl", max_steps=1)
    with pytest.raises(TypeError, match=r"an example must be a row by column, .* take data\.with_format\(None\)"):
        run.train()


@pytest.mark.parametrize("make", [lambda seed: gpt2(60, seed=seed), lambda seed: bart(seed=seed)], ids=["gpt2", "bart"])
@pytest.mark.parametrize("method", ["seqkd", "kl", "engine", "rkl", "js", "tvd", "mle", "predistill"])
def test_every_method_trains(method, make, tmp_path):
    student, teacher = make(1), make(2)
    before, theirs = flat(student), flat(teacher)
    run = trainer(tmp_path, student, teacher, method=method)
    run.train()
    assert not torch.equal(before, flat(student)) and torch.equal(theirs, flat(teacher))
    assert run.evaluate()["eval_loss"] > 0


def test_kl_on_gold_falls(tmp_path):
    student, teacher = gpt2(60, seed=1), gpt2(60, seed=2)
    run = trainer(tmp_path, student, teacher, divergence="kl", shares={"gold": 1.0}, max_steps=30)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * before


@pytest.mark.parametrize("order", [{}, BY_LENGTH], ids=["random", "by length"])
def test_resume_gives_the_same_weights(tmp_path, order):
    stored = data(sample_ids=[[3, 4 + i, EOS] for i in range(8)])
    stored = Dataset.from_list([{**row, "length": 5 + i % 3} for i, row in enumerate(stored)])
    weights = []
    for stops in ([4], [3, 4]):  # in the middle of the second epoch
        student = gpt2(60, seed=1)
        for i, stop in enumerate(stops):
            run = trainer(tmp_path / str(len(stops)), student, gpt2(60, seed=2), stored, method="kl", max_steps=stop,
                          save_strategy="steps", save_steps=1, lr_scheduler_type="constant", **order)  # fmt: skip
            run.train(resume_from_checkpoint=bool(i))
            student = gpt2(60, seed=1)
        weights.append(run.model.lm_head.weight.detach().clone())
    torch.testing.assert_close(*weights)


def check_gone_on_with_and_best(folder, student, teacher, train):
    """A run that goes on with its second of three checkpoints ends as one that was never stopped, and a run whose first
    is its best ends with that one's weights; `student()` is new each time. Returns the run that went on.
    """
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model, **_):
            kept[state.global_step] = copy.deepcopy(model.state_dict())

    def run(**more):
        run = trainer(folder, student(), teacher, train, method="kl", max_steps=3, save_strategy="steps", save_steps=1,
                      lr_scheduler_type="constant", **more)  # fmt: skip
        run.add_callback(Keep())
        return run

    run().train()
    last, again = kept[3], run()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    torch.testing.assert_close(again.model.state_dict(), last, rtol=0, atol=0)
    worse = run(learning_rate=0.5, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    with patch.object(worse, "_gold_kl", lambda *_: torch.tensor([[1.0 + worse.state.global_step, 1.0]])):
        worse.train()
    assert worse.state.best_model_checkpoint.endswith("checkpoint-1")
    torch.testing.assert_close(worse.model.state_dict(), kept[1], rtol=0, atol=0)
    return again


def test_weights_that_files_have_by_other_names_are_gone_on_with_and_are_the_best_models(tmp_path):
    """A mixture's files have each expert apart, and the model has them in one tensor."""
    small = dict(vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, num_local_experts=4, eos_token_id=EOS, pad_token_id=EOS)  # fmt: skip
    stored = data(sample_ids=[[3, 4 + i, EOS] for i in range(8)])

    def mixture(seed):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **small))

    check_gone_on_with_and_best(tmp_path, lambda: mixture(1), mixture(2), stored)
    deeper = trainer(tmp_path, gpt2(60, 2), gpt2(60), stored, method="kl", max_steps=3)
    # transformers 4.50 refuses it before, in words of its own
    with pytest.raises(ValueError, match=r"checkpoint-2 has no weights for transformer|is corrupted"):
        deeper.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def adapted(names, active, own, monkeypatch):
    """A GPT-2 with LoRA adapters, some of which are active; own: by transformers' add_adapter, else by PEFT."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.14", raising=False)  # what is there
    torch.manual_seed(3)
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False,
                      modules_to_save=["ln_f"] if len(active) == 1 else None)  # fmt: skip
    made = gpt2(60) if own else get_peft_model(gpt2(60), lora, adapter_name=names[0])
    for name in names if own else names[1:]:
        made.add_adapter(*((lora, name) if own else (name, lora)))
    (made if own else made.base_model).set_adapter(active if len(active) > 1 else active[0])
    return made


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("names, active, own", [
    (["mine"], ["mine"], False), (["default", "mine"], ["default", "mine"], False), (["default"], ["default"], True),
    (["default", "mine"], ["mine"], True),
], ids=["one", "two", "transformers'", "one of transformers'"])  # fmt: skip
def test_adapters_of_any_name_are_gone_on_with_and_are_the_best_models(names, active, own, tmp_path, monkeypatch):
    """PEFT keeps one that is not called default in a folder of its own; transformers keeps one, and goes on with none."""
    again = check_gone_on_with_and_best(
        tmp_path, lambda: adapted(names, active, own, monkeypatch), gpt2(60, seed=2), None
    )
    found = again.model.active_adapters
    assert (found() if own else found) == active


def test_adapters_that_no_checkpoint_has_are_refused(tmp_path, monkeypatch):
    several = adapted(["a", "b"], ["a", "b"], True, monkeypatch)
    with pytest.raises(ValueError, match="the active adapters a, b by add_adapter"):
        trainer(tmp_path, several, gpt2(60, seed=2), save_strategy="steps")
    trainer(tmp_path, several, gpt2(60, seed=2))
    one = adapted(["mine"], ["mine"], True, monkeypatch)
    trainer(tmp_path, one, gpt2(60, seed=2), method="kl", max_steps=1, save_strategy="steps", save_steps=1).train()
    other = gpt2(60)
    other.add_adapter(type(one.peft_config["mine"])(target_modules=["c_fc"], fan_in_fan_out=True), "mine")
    with pytest.raises(ValueError, match="the student's adapter mine has not"):
        trainer(tmp_path, other, gpt2(60, seed=2), max_steps=2).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_rows_that_a_transform_makes_are_as_rows_that_are_there(tmp_path):
    rows, weights = data(sample_ids=[[3, 4 + i, EOS] for i in range(8)]), []

    def made(batch):
        some = [rows[int(i)] for i in batch["text"]]
        return {name: [row[name] for row in some] for name in some[0]}

    lazy = Dataset.from_list([{"text": str(i)} for i in range(8)]).with_transform(made)
    for train in (Dataset.from_list(rows), lazy):
        run = trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), train, method="kl")
        run.train()
        weights.append(flat(run.model))
    assert torch.equal(*weights)


def test_weights_alone_are_no_run_to_go_on_with(tmp_path):
    for steps, again in ((1, False), (2, True)):
        run = trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), method="mle", max_steps=steps, save_strategy="steps",
                      save_steps=1, save_only_model=True)  # fmt: skip
        if not again:
            run.train()
    with pytest.raises(
        ValueError, match="checkpoint-1 has no optimizer and no schedule, as save_only_model leaves them"
    ):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step < 2  # none since; older versions read the state later


def test_updates_or_data_of_another_size_do_not_go_on(tmp_path):
    """Rows would come twice and others never; batches of another size are no others where an update has the same rows."""

    def run(steps, batch, accumulated, rows, **more):
        return trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), data(rows), method="mle", max_steps=steps, save_strategy="steps",
                       save_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, **more)  # fmt: skip

    run(1, 2, 2, 8).train()
    for sizes, words in ((2, 1, 8), "rows of an update was 4 and is 2"), ((4, 1, 9), "rows was 8 and is 9"):
        with pytest.raises(ValueError, match=rf"checkpoint-1 has lost its place .*: {words}$"):
            run(2, *sizes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for sizes, more in ((4, 1, 8), {}), ((2, 1, 9), {"ignore_data_skip": True}):
        again = run(2, *sizes, **more)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert again.state.global_step == 2


def test_an_epoch_s_last_update_has_what_is_left_and_older_transformers_lose_its_place(tmp_path, monkeypatch):
    def run(folder, steps, **more):
        return trainer(tmp_path / folder, gpt2(60, seed=1), gpt2(60, seed=2), data(9), method="mle", max_steps=steps,
                       save_strategy="steps", save_steps=1, per_device_train_batch_size=2,
                       gradient_accumulation_steps=2, **more)  # fmt: skip

    first = run("one", 3)
    batches = iter(first.get_train_dataloader())  # 5, and before 4.52 the last update was asked for 9 % 2
    assert [len(first.get_batch_samples(batches, n, first.args.device)[0]) for n in (2, 1, 1)] == [2, 2, 1]
    first.train()
    for version, step in ("4.51.3", 1), ("4.51.3", 3), ("4.56.2", 2):
        monkeypatch.setattr("fdistill_kernels.sequence.updates.transformers", SimpleNamespace(__version__=version))
        checkpoint = str(tmp_path / "one" / f"checkpoint-{step}")
        with pytest.raises(ValueError, match="loses a run's place in epochs of 5 batches, which updates of 2 do not"):
            run("two", 4).train(resume_from_checkpoint=checkpoint)
        again = run("three", 4, ignore_data_skip=True)
        again.train(resume_from_checkpoint=checkpoint)
        assert again.state.global_step == 4
    at_epoch = str(tmp_path / "one" / "checkpoint-3")  # of which 4.56 loses nothing
    run("four", 4).train(resume_from_checkpoint=at_epoch)


def test_the_order_by_length_is_of_the_data_s_seed(tmp_path):
    rows = Dataset.from_list([{**row, "length": 5} for row in data()])
    orders = [list(trainer(tmp_path, gpt2(60), gpt2(60), rows, data_seed=seed, **BY_LENGTH)._get_train_sampler())
              for seed in (7, 7, 8)]  # fmt: skip
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(8))
    if not hasattr(transformers.trainer_pt_utils, "BatchRebalanceSampler"):
        return
    balanced = [[*trainer(tmp_path, gpt2(60), gpt2(60), rows, data_seed=seed,
                          train_sampling_strategy="batch_rebalance")._get_train_sampler()] for seed in (7, 7, 8)]  # fmt: skip
    assert balanced[0] == balanced[1] != balanced[2] and sorted(itertools.chain(*balanced[2])) == list(range(8))


@pytest.mark.parametrize("split", [True, False], ids=["split", "own"])
def test_the_order_by_length_is_the_same_on_any_number_of_ranks(split, tmp_path):
    rows = Dataset.from_list([{**row, "length": i % 7} for i, row in enumerate(data() * 6)])

    def order(ranks):
        run = trainer(tmp_path, gpt2(60), gpt2(60), rows, per_device_train_batch_size=8 // (1 if split else ranks),
                      accelerator_config={"split_batches": split}, **BY_LENGTH)  # fmt: skip
        with patch.object(FDistillConfig, "world_size", ranks):
            return list(run._get_train_sampler())

    assert order(1) == order(2) == order(4)


def test_accumulation_packing_and_sequence_normalisation_agree(tmp_path):
    stored, results = data(sample_ids=[[3, 4, 5, EOS], [3, EOS], [EOS], [5, EOS]] * 2), {}
    for name, settings in {
        "whole": {}, "accumulated": dict(per_device_train_batch_size=1, gradient_accumulation_steps=4),
        "packed": dict(pack=True), "minimal": dict(memory="minimal"),
    }.items():  # fmt: skip
        student = gpt2(60, seed=1)
        trainer(tmp_path, student, gpt2(60, seed=2), stored, method="kl", optim="sgd", **settings).train()
        results[name] = student.lm_head.weight.detach()
    for name, weight in results.items():
        torch.testing.assert_close(weight, results["whole"], msg=name)


def test_lora_student_longer_prompts_frozen_embeddings_and_bf16(tmp_path):
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(gpt2(60, seed=1), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    longer = data(teacher_prompt_ids=[[7, 8, *row["prompt_ids"]] for row in data()])
    trainer(tmp_path, student, gpt2(60, seed=2).bfloat16(), longer, method="tvd", bf16=True).train()
    assert any(p.abs().sum() > 0 for n, p in student.named_parameters() if "lora_B" in n)
    assert student.get_base_model().generation_config.eos_token_id == EOS  # as before it was drawn from
    frozen = gpt2(60, seed=1)
    before = frozen.lm_head.weight.clone()
    trainer(tmp_path, frozen, gpt2(60, seed=2), method="rkl", freeze_embeddings=True, student_every=2).train()
    assert torch.equal(frozen.lm_head.weight, before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("settings", [dict(freeze_embeddings=True), {}], ids=["frozen", "lora"])
def test_layers_whose_input_is_not_trained_are_checkpointed(settings, reentrant, tmp_path):
    from peft import LoraConfig, get_peft_model

    trained = []
    for more in ({}, dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})):
        student = llama(60, seed=1)
        if not settings:
            student = get_peft_model(student, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        torch.manual_seed(0)
        for p in student.parameters():
            p.data.normal_(0, 0.2)
        trainer(
            tmp_path, student, llama(60, seed=2), method="mle", optim="sgd", learning_rate=1.0, **settings, **more
        ).train()
        trained.append(flat(student))
    torch.testing.assert_close(*trained)


@pytest.mark.skipif(
    not hasattr(FDistillConfig, "activation_checkpointing_kwargs"), reason="transformers has no such option"
)
def test_some_layers_alone_are_checkpointed(tmp_path):
    weights = []
    for kept in (None, {"every_n_layers": 2}):
        run = trainer(tmp_path, gpt2(60, 3, seed=1), gpt2(60, seed=2), method="mle", activation_checkpointing=bool(kept),
                      activation_checkpointing_kwargs=kept)  # fmt: skip
        run.train()
        weights.append(flat(run.model))
    assert [layer.gradient_checkpointing for layer in run.model.transformer.h] == [True, False, True]
    torch.testing.assert_close(*weights)


class Packing(torch.nn.Linear):
    """As bitsandbytes' 4-bit layers on a CPU: packed by the first evaluation, through which no gradient passes."""

    support_avx512bf16_for_cpu, packed = True, False

    def forward(self, x):
        self.packed |= self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad
        return super().forward(x).detach() if self.packed else super().forward(x)

    def _save_to_state_dict(self, *args):
        self.packed = False
        super()._save_to_state_dict(*args)


def test_weights_that_evaluation_packs_are_trained_through(tmp_path):
    trained = []
    for kind in (torch.nn.Linear, Packing):
        student = llama(60, seed=1)
        for name, module in student.named_modules():
            if name.endswith("_proj"):
                module.__class__ = kind
        if kind is Packing:
            with torch.no_grad():
                student(torch.ones(1, 2, dtype=torch.long))
            assert student.model.layers[0].self_attn.q_proj.packed
        trainer(tmp_path, student, llama(60, seed=2), method="kl", optim="sgd", learning_rate=1.0).train()
        trained.append(flat(student))
    assert torch.equal(*trained)


def small_model(kind, **more):
    torch.manual_seed(1)
    auto = AutoModelForCausalLM if kind == "rwkv" else AutoModelForSeq2SeqLM
    return auto.from_config(AutoConfig.for_model(kind, vocab_size=60, eos_token_id=EOS, pad_token_id=EOS, **more))


def test_evaluations_leave_no_traces_in_a_model(tmp_path):
    """As the number of tokens in NLLB-MoE's routers, RWKV's scale, and BigBird's full attention after a short batch."""
    small = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                 encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=EOS)  # fmt: skip
    evaluated = dict(method="tvd", eval_strategy="steps", eval_steps=1)
    experts = small | dict(num_experts=2, encoder_sparse_step=1, decoder_sparse_step=1, expert_capacity=99)
    student, teacher = (small_model("nllb-moe", **experts) for _ in range(2))
    trainer(tmp_path, student, teacher, **evaluated).train()
    assert {m.expert_capacity for m in student.modules() if hasattr(m, "expert_capacity")} == {99}
    big, ids = small_model("bigbird_pegasus", block_size=4, num_random_blocks=1, **small), torch.arange(3, 9)[None]
    with evaluating(big):
        big(input_ids=ids, decoder_input_ids=ids)
    with contextlib.suppress(ValueError):  # transformers before 4.54 looks at padding there
        InRoom(big).rows(list(ids), list(ids), big.device)
    assert {m.attention_type for m in big.modules() if hasattr(m, "attention_type")} == {"block_sparse"}
    student, teacher = (small_model("rwkv", hidden_size=16, num_hidden_layers=3, rescale_every=1) for _ in range(2))
    run = trainer(tmp_path, student, teacher, **evaluated)
    run.train()
    run.save_model(str(tmp_path))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(saved.eval()(ids).logits, student.eval()(ids).logits)


def test_a_teacher_has_no_dropout_whoever_puts_it_into_training_mode(tmp_path):
    teacher = gpt2(60, seed=2)
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    run = trainer(tmp_path, gpt2(60, seed=1), teacher)
    before = run.evaluate()["eval_loss"]
    teacher.train()
    assert run.evaluate()["eval_loss"] == before


def prompted(kind, make, seed=1, **more):
    """A model with four tokens of PEFT's own before its input, and large weights for them."""
    import peft

    model, causal = make(60, seed=seed), make in (gpt2, llama)
    more |= dict(encoder_hidden_size=8) if kind == "PromptEncoderConfig" else {}
    task = "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(model, getattr(peft, kind)(num_virtual_tokens=4, task_type=task, **more))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


PROMPTED = [("PromptTuningConfig", gpt2), ("PrefixTuningConfig", llama), ("PromptEncoderConfig", bart)]
if os.environ.get("FDISTILL_WHOLE"):
    PROMPTED = list(itertools.product([kind for kind, _ in PROMPTED], [make for _, make in PROMPTED]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind, make", PROMPTED)
def test_students_with_virtual_tokens(kind, make, tmp_path):
    student, teacher = prompted(kind, make), make(60, seed=2)
    assert virtual_tokens(student) == 4
    for method in ("tvd", "seqkd"):
        trainer(tmp_path, student, teacher, method=method).train()
    run = trainer(tmp_path, student, teacher, divergence="kl", per_device_eval_batch_size=1)
    tokens = []
    for row in data(4):
        both = [torch.tensor([row[name]]) for name in ("prompt_ids", "labels")]
        if make is bart:
            given = dict(input_ids=both[0], decoder_input_ids=student.prepare_decoder_input_ids_from_labels(both[1]))
        else:
            given = dict(input_ids=torch.cat(both, 1)[:, :-1])
        with torch.no_grad():  # each alone, without padding: its last logits predict the targets
            q, p = (m.eval()(**given).logits[0, -both[1].shape[1] :].log_softmax(-1) for m in (student, teacher))
        tokens.append((p.exp() * (p - q)).sum(-1))
    assert run.evaluate()["eval_loss"] == pytest.approx(float(torch.cat(tokens).mean()), rel=1e-3)
    with pytest.raises(ValueError, match="pre-distil the model before"):
        trainer(tmp_path, student, teacher, method="predistill")
    if make is not bart:
        with pytest.raises(ValueError, match="virtual tokens: its sequences cannot be packed"):
            trainer(tmp_path, student, teacher, method="mle", pack=True).train()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_weights_that_peft_keeps_in_no_checkpoint_are_not_gone_on_with(tmp_path):
    """Of what makes virtual tokens it keeps the tokens alone, and of the base model what its configuration names."""
    from peft import LoraConfig, get_peft_model

    saves = dict(method="kl", save_strategy="steps", save_steps=1)
    freed = get_peft_model(gpt2(60), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    freed.get_submodule("base_model.model.transformer.ln_f").requires_grad_(True)
    beside = prompted(
        "CPTConfig", gpt2, cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 1, 2, 2]
    )
    for name, student in (("tokens", prompted("PromptEncoderConfig", gpt2)), ("beside", beside), ("freed", freed)):
        run = trainer(tmp_path / name, student, gpt2(60, seed=2), **saves)
        run.train()
        with pytest.raises(ValueError, match="of the student are trained, and PEFT keeps no such"):
            run.train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="of the student are trained, and PEFT keeps no such"):
            trainer(tmp_path, student, gpt2(60, seed=2), load_best_model_at_end=True, eval_strategy="steps",
                    eval_steps=1, **saves)  # fmt: skip
    with pytest.raises(ValueError, match="gradient_checkpointing runs layers again without the keys and values"):
        trainer(tmp_path, prompted("PrefixTuningConfig", llama), llama(60, seed=2), gradient_checkpointing=True)


@pytest.mark.parametrize("patched", [False, True])
def test_models_that_shift_labels_in_their_forward_alone(patched, tmp_path):
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    def make(seed):
        config, _ = bart().config, torch.manual_seed(seed)
        fields = M2M100Config(vocab_size=60, **{name: getattr(config, name) for name in (
            "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads",
            "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings", "dropout", "init_std",
            "decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")})  # fmt: skip
        return M2M100ForConditionalGeneration(fields).eval()

    student, teacher = make(1), make(2)
    run = trainer(tmp_path, patch_model(student) if patched else student, teacher, method="tvd")
    run.train()
    log_q, log_p = (
        torch.cat([m(input_ids=torch.tensor([row["prompt_ids"]]), labels=torch.tensor([row["labels"]])).logits[0]
                   for row in data(4)]).log_softmax(-1)
        for m in (student.eval(), teacher)
    )  # fmt: skip
    want = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert run.evaluate()["eval_loss"] == pytest.approx(want.item(), rel=1e-3)


def test_configurations_without_a_padding_token(tmp_path):
    from transformers import CodeGenConfig, CodeGenForCausalLM

    def make(seed):
        torch.manual_seed(seed)
        return CodeGenForCausalLM(CodeGenConfig(vocab_size=60, n_positions=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4,
                                                bos_token_id=EOS, eos_token_id=EOS))  # fmt: skip

    trainer(tmp_path, make(1), make(2), method="tvd").train()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", [gpt2, bart])
def test_drawn_by_forward(make, tmp_path):
    prompts, _ = batch()
    greedy = Sampling(5, top_k=1)
    plain = [x.tolist() for x in draw(make(60), prompts, greedy)]
    with patch.object(sampling, "drawn_by_forward") as by_forward:
        for kind in ("static", "dynamic"):
            kept = Sampling(5, top_k=1, cache=kind)
            assert kept == greedy and kept.decided() == greedy.decided()  # stored samples stay who they were
            assert [x.tolist() for x in draw(make(60), prompts, kept)] == plain
    assert not by_forward.called
    assert [x.tolist() for x in drawn_by_forward(make(60), prompts, greedy, 60)] == plain
    model = prompted("PrefixTuningConfig", make)
    drawn, *_ = drawn_by_forward(model, prompts, greedy, 50)
    assert drawn.max() < 50
    for i, token in enumerate(drawn):
        so_far = drawn[None, :i]
        given = dict(input_ids=prompts[0][None], decoder_input_ids=torch.nn.functional.pad(so_far, (1, 0), value=EOS))
        given = given if make is bart else dict(input_ids=torch.cat((prompts[0][None], so_far), 1))
        with torch.no_grad():
            assert model.eval()(**given).logits[0, -1, :50].argmax() == token
    store = TeacherSamples(tmp_path, [p.tolist() for p in prompts], greedy, "prompted", 0)
    list(store.fill(model, vocabulary=50))
    assert store.load()[0] == drawn.tolist()
    with pytest.raises(ValueError, match="beams need a cache"):
        drawn_by_forward(model, prompts, Sampling(5, beams=2), 60)
    model.generation_config.repetition_penalty = 1.0
    draw(model, prompts, Sampling(5, beams=1))
    model.generation_config.repetition_penalty = 1.5
    with pytest.raises(ValueError, match="has repetition_penalty in its generation config, which greedy outputs"):
        draw(model, prompts, Sampling(5, beams=1))


def test_nan_stops_with_the_batch_or_is_skipped(tmp_path):
    broken = gpt2(60, seed=2)
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(float("nan"))
    stored = data(sample_ids=[[3, EOS]] * 8)
    with pytest.raises(FloatingPointError, match="its batch is in"):
        trainer(tmp_path, gpt2(60, seed=1), broken, stored, method="kl").train()
    assert set(torch.load(tmp_path / "nan_batch_step_0.pt")) == {"prompt_ids", "labels", "sample_ids", "sequences"}
    student = gpt2(60, seed=1)
    before = student.lm_head.weight.clone()
    trainer(tmp_path, student, broken, stored, method="kl", on_nan="skip").train()
    assert torch.equal(student.lm_head.weight, before)


@pytest.mark.parametrize("logging_steps", [1, 2, 9])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_skipped_is_in_no_mean(parts, logging_steps, tmp_path):
    """Of steps, and of the batches of one: the losses that are logged, and that of the whole training."""
    ragged = logging_steps == 1 and parts == 2  # of a step with both, what counts is a mean over fewer tokens
    stored = data(sample_ids=[[3] * (1 + i % 5 * ragged) + [EOS] for i in range(8)])
    for skipped in ((), (0,), (parts,), (0, 2 * parts - 1), range(2 * parts)):
        run = trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), stored, method="kl", on_nan="skip", learning_rate=0.0,
                      logging_steps=logging_steps, gradient_accumulation_steps=parts,
                      per_device_train_batch_size=4 // parts)  # fmt: skip
        losses, step_loss = [], run.step_loss

        def broken(*a, skipped=skipped, losses=losses, step_loss=step_loss, **k):
            made, *more = step_loss(*a, **k)
            losses.append(math.nan if len(losses) in skipped else made.item())
            return made * losses[-1] / made.detach(), *more

        run.step_loss = broken
        trained = run.train()

        def mean(found):
            return torch.tensor(found).nanmean().item()

        lines = [line for line in run.state.log_history if "loss" in line]
        of_line = parts * logging_steps
        for i, line in enumerate(lines):
            here = losses[i * of_line : (i + 1) * of_line]
            assert ragged or line["loss"] == pytest.approx(mean(here), rel=1e-3, nan_ok=True), skipped
            assert line.get("loss_on_teacher", math.nan) == pytest.approx(line["loss"], rel=1e-3, nan_ok=True)
        assert len(lines) == 2 // logging_steps and len(losses) == 2 * parts
        for found in (trained.training_loss, trained.metrics["train_loss"], run.state.log_history[-1]["train_loss"]):
            assert ragged or found == pytest.approx(mean(losses), rel=1e-3, nan_ok=True), skipped


def test_means_are_of_all_ranks(tmp_path):
    of_ranks = dict(average_tokens_across_devices=False)
    FDistillConfig(str(tmp_path), **BASE, **of_ranks)  # one rank's are all
    with (
        patch.object(FDistillConfig, "world_size", 2),
        patch.object(FDistillConfig, "average_tokens_across_devices", True),  # the default, of older transformers not
        pytest.raises(ValueError, match="average_tokens_across_devices=False is not used here: a loss is a mean over"),
    ):
        FDistillConfig(str(tmp_path), **BASE, **of_ranks)


def test_ways_to_make_batches_that_leave_ranks_apart_are_refused(tmp_path):
    accumulated = dict(ddp_static_graph=True, gradient_accumulation_steps=2)
    reentrant = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    known = hasattr(FDistillConfig, "ddp_static_graph")  # not by older transformers
    for options, more, words in (
        ({"dispatch_batches": True}, {}, "dispatch_batches"), ({"even_batches": False}, {}, "even_batches"),
        ({"even_batches": False}, {"dataloader_drop_last": True}, None), ({"split_batches": True}, {}, None),
        ({"split_batches": True}, {"per_device_train_batch_size": 3}, "per_device_train_batch_size=3: split_batches cuts"),
        ({"split_batches": True}, {"per_device_eval_batch_size": 3}, None),
        ({}, reentrant, "DDP takes use_reentrant with one half of an objective alone"),
        ({}, {**reentrant, "method": "kl"}, None),
        ({}, {**reentrant, "method": "kl", "ddp_find_unused_parameters": True}, "DDP takes use_reentrant with one half"),
        ({}, {**reentrant, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, None),
        *[({}, accumulated, "ddp_static_graph takes no"), ({}, {**reentrant, "ddp_static_graph": True}, None),
          ({"gradient_accumulation_kwargs": {"sync_each_batch": True}}, accumulated, None)][: 3 * known],
    ):  # fmt: skip
        run = FDistillTrainer(gpt2(60), gpt2(60), FDistillConfig(str(tmp_path), **{**BASE, **more}, accelerator_config=options),
                              train_dataset=data(), data_collator=None)  # fmt: skip
        check_accelerator(run, run.model)  # one rank
        told = pytest.raises(ValueError, match=words) if words else contextlib.nullcontext()
        with patch.object(FDistillConfig, "world_size", 2), told:
            check_accelerator(run, run.model)


def test_a_way_over_ranks_that_is_refused_refuses_no_other_run(tmp_path):
    told = r"in distributed training|FSDP is for GPUs|no available devices|FullySharded"  # by versions
    with pytest.raises((ValueError, RuntimeError, TypeError), match=told):
        trainer(tmp_path, gpt2(60), gpt2(60), method="kl", fsdp="full_shard")
    trainer(tmp_path, gpt2(60), gpt2(60), method="kl")


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        FDistillTrainer(gpt2(60), gpt2(60), FDistillConfig(str(tmp_path), **BASE), train_dataset=[])
    with pytest.raises(ValueError, match="both be causal"):
        trainer(tmp_path, gpt2(60), bart())
    with pytest.raises(ValueError, match="needs the column prompt_ids"):
        trainer(tmp_path, gpt2(60), gpt2(60), [{"labels": [1]}] * 4).train()
    with pytest.raises(ValueError, match="a prompt is empty"):
        trainer(tmp_path, gpt2(60), gpt2(60), [{"prompt_ids": [], "labels": [1]}] * 4).train()
    with pytest.raises(ValueError, match="needs the column labels"):
        trainer(tmp_path, gpt2(60), gpt2(60), [{"prompt_ids": [2]}] * 4, method="predistill").train()
    with pytest.raises(ValueError, match="41 tokens, the student's context 32"):
        trainer(tmp_path, gpt2(60), gpt2(60), [{"prompt_ids": [2] * 40, "labels": [1]}] * 4, method="mle").train()
    padded = [{"prompt_ids": [2], "labels": [1] + [-100] * 40}, {"prompt_ids": [0] * 39 + [2], "labels": [1],
               "attention_mask": [0] * 39 + [1]}] * 2  # fmt: skip
    trainer(tmp_path, gpt2(60), gpt2(60), padded, method="mle").train()  # which no context has to hold
    with pytest.raises(ValueError, match="on_nan must be one of"):
        FDistillConfig(str(tmp_path), on_nan="ignore")

    class Tokenizer(dict):
        get_vocab = dict.copy

    check_vocabularies(Tokenizer(a=0, b=1), Tokenizer(a=0, b=1, c=2))
    with pytest.raises(ValueError, match="different tokenizers: 'b' is 1 in one and 2"):
        check_vocabularies(Tokenizer(a=0, b=1), Tokenizer(a=0, b=2))
    with pytest.raises(ValueError, match="'c' is 1 in one and 'b' has that id"):
        check_vocabularies(Tokenizer(a=0, c=1), Tokenizer(a=0, b=1))
    with pytest.raises(ValueError, match="'a' is 0 in one and missing in the other"):
        check_vocabularies(Tokenizer(a=0), Tokenizer(b=1))


@pytest.mark.parametrize("sizes", [(60, 64), (64, 60)])
def test_vocabularies_padded_differently(sizes, tmp_path):
    student, teacher = (gpt2(v, seed=i) for i, v in enumerate(sizes))
    for model in (student, teacher):  # what only one model has would be drawn
        model.lm_head.weight.data[60:] *= 50
    run = trainer(tmp_path, student, teacher, method="tvd", top_k=0)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="labels has the id 61, but student and teacher share 60"):
        trainer(tmp_path, student, teacher, [{"prompt_ids": [2], "labels": [61]}] * 4).train()


def test_ids_that_the_tokenizer_lacks_are_not_drawn(tmp_path):
    """Both heads are padded: a server refuses such ids, and they stand for no text."""
    student, teacher = (gpt2(64, seed=i) for i in (1, 2))
    for model in (student, teacher):
        model.lm_head.weight.data[60:] *= 50
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    for known, most in ((PreTrainedTokenizerFast(tokenizer_object=words), 60), (None, 64)):
        args = FDistillConfig(str(tmp_path), **{**BASE, "method": "js", "top_k": 0})
        run = FDistillTrainer(student, teacher, args, train_dataset=data(), processing_class=known)
        batch = run.data_collator([{"prompt_ids": [2, 3 + i], "labels": [4]} for i in range(16)])
        for source in ("student", "teacher"):
            drawn = torch.cat(run._draw(source, student, batch, 0).continuations)
            assert (drawn.max() < 60) == (most == 60), (source, drawn)


@pytest.mark.parametrize("read, write", [(90, 60), (60, 90)])
def test_models_that_read_other_ids_than_they_write(read, write, tmp_path):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(MarianMTModel(MarianConfig(
            vocab_size=read, decoder_vocab_size=write, share_encoder_decoder_embeddings=False, d_model=16,
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0, init_std=0.3, decoder_start_token_id=1,
            pad_token_id=1, bos_token_id=EOS, eos_token_id=EOS, forced_eos_token_id=None)).eval())  # fmt: skip
        models[-1].resize_decoder_token_embeddings(write)  # before transformers 5 it has the encoder's number at first
    rows = [{"prompt_ids": [read - 1, 5 + i], "labels": [write - 1, 7, EOS]} for i in range(4)]
    run = trainer(tmp_path, *models, rows, method="js")
    found = []
    for row in rows:
        given = dict(input_ids=torch.tensor([row["prompt_ids"]]), decoder_input_ids=torch.tensor([[1, write - 1, 7]]))
        with torch.no_grad():
            found.append(table(*(m(**given).logits[0].double().log_softmax(-1) for m in models))["kl"])
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-4)
    run.train()
    embedding = models[0].get_decoder().get_input_embeddings().weight
    before = embedding.clone()
    trainer(tmp_path, *models, rows, method="mle", freeze_embeddings=True).train()
    assert torch.equal(embedding, before)
    for name, most in (("prompt_ids", read), ("labels", write)):
        with pytest.raises(ValueError, match=f"{name} has the id {most}, but student and teacher share {most} ids"):
            run.data_collator([{**rows[0], name: [most]}])


# --- an update: what is drawn for it, and what its losses are divided by


def of_prompts(drawn=None):
    """In `draw`'s place: a sequence of each prompt, of another length than the next one's."""

    def draw(model, prompts, *_):
        if drawn is not None:
            drawn.append(prompts)
        return [torch.arange(2, 3 + (7 * int(p.sum())) % 6) for p in prompts]

    return draw


@pytest.mark.parametrize("method, settings", [
    ("rkl", {}), ("js", {}), ("tvd", {}), ("js", dict(normalize="sequence", beta=0.85)), ("kl", {}),
    ("rkl", dict(ce_weight=0.5)), ("predistill", {}),
])  # fmt: skip
def test_accumulated_batches_are_one_large_batch(method, settings, tmp_path, monkeypatch):
    drawn, weights = [], []
    monkeypatch.setattr("fdistill_kernels.sequence.updates.draw", of_prompts(drawn))
    monkeypatch.setattr("fdistill_kernels.sequence.teachers.in_room.draw", of_prompts(drawn))
    for size in (12, 3):
        student, teacher = gpt2_64(60, seed=1), gpt2_64(60, seed=2)
        run = trainer(tmp_path, student, teacher, data(12), method=method, max_steps=1, optim="sgd", learning_rate=1.0,
                      per_device_train_batch_size=size, gradient_accumulation_steps=12 // size, max_grad_norm=0.0,
                      **settings)  # fmt: skip
        step, before = run._half, []
        run._half = lambda *a, step=step, before=before: before.append(len(drawn)) or step(*a)
        drawn.clear()
        run.train()
        assert set(before) <= {len(drawn)}  # all is drawn before the first loss
        weights.append(flat(student))
    change = (weights[0] - flat(gpt2_64(60, seed=1))).abs().max()
    assert (weights[0] - weights[1]).abs().max() < 1e-12 * change


@pytest.mark.parametrize("older", [False, True])
def test_a_shorter_update_is_a_mean_over_its_own_batches(older, tmp_path, monkeypatch):
    def step(self, model, inputs, items=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    if older:  # as transformers before 4.55, which knows only what was asked for
        monkeypatch.setattr(Trainer, "training_step", step)
        monkeypatch.setattr(FDistillTrainer, "current_gradient_accumulation_steps", property(None, lambda *_: None),
                            raising=False)  # fmt: skip
    rows, weights = data(6, sample_ids=[[3, 4, 5, EOS], [3, EOS], [EOS], [5, EOS], [7, 8, 9], [4, EOS]]), []
    for size in (4, 1):
        student = gpt2_64(60, seed=1)
        trainer(tmp_path, student, gpt2_64(60, seed=2), rows, method="kl", optim="sgd", learning_rate=0.1,
                max_grad_norm=0.0, per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size).train()  # fmt: skip
        weights.append(flat(student))
    assert (weights[0] - weights[1]).abs().max() < 1e-12


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_goes_on_uses_its_kept_samples(stop, tmp_path):
    weights = []
    for stops in ([4], [stop, 4]):
        for i, last in enumerate(stops):
            run = trainer(tmp_path / str(len(stops)), gpt2(60, seed=1), gpt2(60, seed=2), data(16), method="js",
                          student_every=3, max_steps=last, save_strategy="steps", save_steps=1, logging_steps=1,
                          per_device_train_batch_size=2, gradient_accumulation_steps=2,
                          lr_scheduler_type="constant")  # fmt: skip
            run.train(resume_from_checkpoint=bool(i))
        weights.append(flat(run.model))
    assert torch.equal(*weights)


def test_kept_samples_are_of_their_own_batch(tmp_path, monkeypatch):
    from fdistill_kernels.sequence.teachers import OfRows

    drawn, seen = [], []
    monkeypatch.setattr("fdistill_kernels.sequence.updates.draw", of_prompts(drawn))
    teachers = OfRows({"a": gpt2(60, seed=2), "b": gpt2(60, seed=3)})
    named = data(16, teacher=["a", "b", "b", "a"] * 4)
    run = trainer(tmp_path, gpt2(60, seed=1), teachers, named, method="rkl", student_every=2, max_steps=4,
                  per_device_train_batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
    rows = teachers.rows
    teachers.rows = lambda prompts, *a, **k: seen.append((prompts, teachers.names)) or rows(prompts, *a, **k)
    run.train()
    assert len(drawn) == 4
    assert all(p is q for (p, _), q in zip(seen, [*drawn[:2] * 2, *drawn[2:] * 2], strict=True))
    known = {tuple(row["prompt_ids"]): row["teacher"] for row in named}
    assert all([known[tuple(p.tolist())] for p in prompts] == names for prompts, names in seen)


# --- losses and measures, against log-probabilities of one sequence at a time


def log_probs(model, prompt, continuation):
    """(L, V) in float64, of the steps that make the continuation."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *continuation]])
        return model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def table(log_q, log_p, beta=0.5):
    """Losses of steps, (L,) each."""
    q, p = log_q.exp(), log_p.exp()
    log_m = (beta * q + (1 - beta) * p).log()
    kl, to_m, from_m = (a.exp() * (a - b) for a, b in ((log_p, log_q), (log_p, log_m), (log_q, log_m)))
    return {"kl": kl.sum(-1), "rkl": (q * (log_q - log_p)).sum(-1), "p to m": to_m.sum(-1), "q to m": from_m.sum(-1),
            "student_entropy": -(q * log_q).sum(-1), "teacher_entropy": -(p * log_p).sum(-1),
            "agreement": (q.argmax(-1) == p.argmax(-1)).double(), "overlap": torch.minimum(p, q).sum(-1)}  # fmt: skip


def steps_of(student, teacher, rows, column, beta=0.5):
    """The table of all steps of a column's sequences, and −log q of their tokens."""
    found = []
    for row in rows:
        log_q, log_p = (log_probs(m, row["prompt_ids"], row[column]) for m in (student, teacher))
        tokens = -log_q.gather(1, torch.tensor(row[column])[:, None])[:, 0]
        found.append({**table(log_q, log_p, beta), "ce": tokens})
    return {name: torch.cat([of[name] for of in found]) for name in found[0]}


def training_loss(run, rows):
    run.model.train()
    return run.compute_loss(run.model, run._prepare_inputs(run.data_collator(rows))).item()


def test_objectives(tmp_path, monkeypatch):
    monkeypatch.setattr("fdistill_kernels.sequence.updates.draw", of_prompts())
    student, teacher = gpt2_64(60, seed=1), gpt2_64(60, seed=2)
    rows = data(6, sample_ids=[[3, 4, 5, EOS], [3, EOS], [EOS], [5, EOS], [7, 8, 9], [4, EOS]])
    student_ids = of_prompts()(None, [torch.tensor(row["prompt_ids"]) for row in rows])
    rows = [{**row, "student_ids": ids.tolist()} for row, ids in zip(rows, student_ids, strict=True)]
    on = {name: steps_of(student, teacher, rows, column, beta=0.85)
          for name, column in (("y", "sample_ids"), ("x", "student_ids"), ("gold", "labels"))}  # fmt: skip
    mean = {name: {k: v.mean().item() for k, v in of.items()} for name, of in on.items()}
    smoothed = [-log_probs(student, row["prompt_ids"], row["labels"]).mean(-1) for row in rows]
    gold_ce = 0.9 * mean["gold"]["ce"] + 0.1 * torch.cat(smoothed).mean().item()
    cases = [
        (dict(method="js", beta=0.85), 0.15 * mean["y"]["p to m"] + 0.85 * mean["x"]["q to m"]),
        (dict(method="rkl", normalize="sequence"), on["x"]["rkl"].sum().item() / 6),
        (dict(method="kl", ce_weight=0.3), mean["y"]["kl"] + 0.3 * mean["gold"]["ce"]),
        (dict(divergence="kl", shares="gold=0.5", ce_weight=0.3), 0.5 * mean["gold"]["kl"] + 0.3 * mean["gold"]["ce"]),
        (dict(divergence={"teacher": "kl", "student": "rkl"}), (mean["y"]["kl"] + mean["x"]["rkl"]) / 2),
        (dict(divergence='{"teacher": "skew_kl(0)", "student": "alpha=0"}', shares='{"teacher": 2, "student": 1}'),
         2 * mean["y"]["kl"] + mean["x"]["rkl"]),
        (dict(method="mle", label_smoothing_factor=0.1), gold_ce),
        (dict(method="rkl", ce_weight=2, label_smoothing_factor=0.1), mean["x"]["rkl"] + 2 * gold_ce),
    ]  # fmt: skip
    for settings, want in cases:
        got = training_loss(trainer(tmp_path, student, teacher, rows, **settings), rows)
        assert got == pytest.approx(want), settings
    hot = dict(divergence="kl", temperature=2.0)
    once, squared = (training_loss(trainer(tmp_path, student, teacher, rows, **hot, temperature_squared=t), rows)
                     for t in (False, True))  # fmt: skip
    assert squared == pytest.approx(4 * once)


@pytest.mark.parametrize("settings, name", [(dict(divergence="rkl"), "rkl"), (dict(method="mle"), "ce"),
                                            (dict(divergence="rkl", pack=True), "rkl")], ids=["rkl", "ce", "packed"])  # fmt: skip
def test_tokens_that_do_not_count(settings, name, tmp_path):
    student, teacher = gpt2_64(60, seed=1), gpt2_64(60, seed=2)
    texts = [([5, 6], [7, 8, 9, EOS], [True, False, True, True]), ([4], [3, EOS], [True, True]),
             ([3, 9], [4, 6, 8], [False, False, True])]  # fmt: skip
    rows = [{"prompt_ids": p, "labels": t, "labels_mask": m} for p, t, m in texts]
    one = [{"input_ids": [*p, *t], "labels": [*[-100] * len(p), *(i if m else -100 for i, m in zip(t, mask, strict=True))]}
           for p, t, mask in texts]  # fmt: skip
    padded = [{"input_ids": [1, *r["input_ids"], 1], "labels": [-100, *r["labels"], -100],
               "attention_mask": [0, *[1] * len(r["labels"]), 0]} for r in one]  # fmt: skip
    masked = [{"input_ids": [1, *p, *t], "labels": [1, *p, *t], "labels_mask": [True, *[False] * len(p), *mask],
               "attention_mask": [0, *[1] * len(p + t)]} for p, t, mask in texts]  # fmt: skip
    behind = [{**row, "prompt_ids": [1, *p], "attention_mask": [0, *[1] * len(p)]}
              for row, (p, *_) in zip(rows, texts, strict=True)]  # fmt: skip
    tensors = [{name: torch.tensor(ids) for name, ids in row.items()} for row in rows]
    counts = torch.tensor([m for _, _, mask in texts for m in mask])
    steps = steps_of(student, teacher, rows, "labels")
    for given in (rows, one, padded, masked, behind, tensors):
        run = trainer(tmp_path, student, teacher, given, **settings)
        assert training_loss(run, given) == pytest.approx(steps[name][counts].mean().item())
        run.eval_dataset, run.args.per_device_eval_batch_size = given, 2
        assert run.evaluate()["eval_loss"] == pytest.approx(steps["kl"][counts].mean().item())


def test_rows_that_do_not_fit(tmp_path):
    run = trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2))
    for wrong, words in (
        ({"prompt_ids": [2], "labels": [3, -100, 4]}, "labels has −100 between"),
        ({"prompt_ids": [2], "labels": [3], "labels_mask": [True, True]}, "a bool for each"),
        ({"prompt_ids": [2, 3], "labels": [4], "attention_mask": [1, 1, 1]}, "as long as prompt_ids, 2, not 3"),
        ({"input_ids": [2, 3, 4], "labels": [-100, 4, 5]}, "nothing is shifted"),
        ({"input_ids": [2, 3], "labels": [-100, 4, 5]}, "must be of one length, not 2 and 3"),
        ({"prompt_ids": [2, -7], "labels": [3]}, "prompt_ids has the id -7"),
        *(
            ({"prompt_ids": [2], "labels": ids}, "labels must be an example's token ids, one list of integers, not")
            for ids in ("hello", [3.5], [[3]], [3, None], [True], 3)
        ),
        ({"prompt_ids": [2], "labels": [3], "teacher_prompt_ids": [60]}, "the id 60, but the teacher has 60"),
    ):
        with pytest.raises(ValueError, match=words):
            run.data_collator([wrong])
    one = {"prompt_ids": [2], "labels": [3]}
    for more in ({"sample_ids": [3]}, {"teacher": "a"}):
        for both in ([{**one, **more}, one], [one, {**one, **more}]):
            with pytest.raises(ValueError, match=f"have the column {next(iter(more))}, and others have none"):
                run.data_collator(both)
    assert run.data_collator([{"prompt_ids": [-100, 2], "labels": [3, -100]}])["labels"].tolist() == [[3]]


def test_a_collator_may_pad_on_either_side(tmp_path):
    """Its mask with its labels: what stands where no label does is of no token."""
    student, teacher = gpt2_64(60, seed=1), gpt2_64(60, seed=2)
    rows = [{**row, "labels_mask": [i % 2 == 0 for i in range(len(row["labels"]))]} for row in data(4)]

    def on_the_left(examples):
        made = {}
        for name, fill in (("prompt_ids", -100), ("labels", -100), ("labels_mask", False)):
            width = max(len(row[name]) for row in examples)
            made[name] = torch.tensor([[fill] * (width - len(row[name])) + [*row[name]] for row in examples])
        return made

    found = []
    for collator in (None, on_the_left):
        run = FDistillTrainer(student, teacher, FDistillConfig(str(tmp_path), divergence="js", **BASE), train_dataset=rows,
                              data_collator=collator)  # fmt: skip
        found.append(training_loss(run, rows))
    assert len({len(row["labels"]) for row in rows}) > 1 and found[0] == pytest.approx(found[1], rel=1e-6)


def test_evaluation_is_a_mean_over_all_tokens(tmp_path):
    student, teacher, rows = gpt2_64(60, seed=1), gpt2_64(60, seed=2), data(7)
    want = steps_of(student, teacher, rows, "labels")["kl"].mean().item()
    for size, temperature in ((1, 1.0), (3, 1.0), (8, 2.0)):  # whatever the objective
        run = trainer(tmp_path, student, teacher, rows, method="kl", per_device_eval_batch_size=size,
                      temperature=temperature)  # fmt: skip
        assert run.evaluate(rows)["eval_loss"] == pytest.approx(want, rel=1e-12)
    found = run.evaluate({"one": rows[:3], "two": rows})
    assert found["eval_two_loss"] == pytest.approx(want, rel=1e-12) != pytest.approx(found["eval_one_loss"])
    predicted = run.predict(rows)
    assert predicted.metrics["test_loss"] == pytest.approx(want, rel=1e-12) and predicted.predictions is None
    run.model.eval()
    with torch.no_grad():  # as those do who call it themselves
        loss, outputs = run.compute_loss(run.model, run.data_collator(rows), return_outputs=True)
    assert loss.item() == pytest.approx(want, rel=1e-6) and outputs == {}


def test_evaluations_leave_training_its_random_numbers(tmp_path):
    """Whatever is drawn in them: a run that evaluates draws the samples, and trains the student, of one that does not."""

    class Draws(TrainerCallback):
        def on_evaluate(self, *_, **__):
            torch.rand(3)

    students = []
    for evaluated in ({}, dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)):
        students.append(gpt2(60, seed=1))
        run = trainer(tmp_path, students[-1], gpt2(60, seed=2), method="js", **evaluated)
        run.add_callback(Draws())
        run.train()
    assert torch.equal(*map(flat, students))


def test_loaders_leave_training_its_random_numbers(tmp_path):
    """They take one for their workers' seeds in each epoch, persistent workers in the first that they see: those of a run
    that goes on are new.
    """
    loader = trainer(tmp_path, gpt2(60), gpt2(60, seed=2)).get_train_dataloader()
    before = torch.get_rng_state()
    assert [len([*loader]) for _ in range(2)] == [2, 2] and torch.equal(torch.get_rng_state(), before)


def test_a_subclass_may_copy_its_batches(tmp_path):
    class Copies(FDistillTrainer):
        def training_step(self, model, inputs, *more, **keywords):
            return super().training_step(model, dict(inputs), *more, **keywords)

    students = []
    for kind in (FDistillTrainer, Copies):
        students.append(gpt2(60, seed=1))
        args = FDistillConfig(str(tmp_path), **{**BASE, "max_steps": 1}, method="rkl", gradient_accumulation_steps=2)
        kind(students[-1], gpt2(60, seed=2), args, train_dataset=data()).train()
    assert torch.equal(*map(flat, students))


def test_what_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr("fdistill_kernels.sequence.updates.draw", of_prompts())
    student, teacher, rows = gpt2_64(60, seed=1), gpt2_64(60, seed=2), data(8)
    student_ids = of_prompts()(None, [torch.tensor(row["prompt_ids"]) for row in rows])
    for row, ids in zip(rows, student_ids, strict=True):
        row["student_ids"] = ids.tolist()
    names = {"gold": "labels", "student": "student_ids"}
    steps = {name: steps_of(student, teacher, rows, column) for name, column in names.items()}
    for normalize in ("token", "sequence"):
        settings = dict(divergence="rkl", shares={"student": 0.5, "gold": 0.5}, normalize=normalize, learning_rate=0.0,
                        per_device_train_batch_size=2)  # fmt: skip
        run = trainer(tmp_path, student, teacher, rows, gradient_accumulation_steps=3, logging_steps=2, **settings)
        run.train()  # whose second update is an epoch's rest
        (line,) = [line for line in run.state.log_history if "loss" in line]
        assert sum(line[f"loss_on_{source}"] for source in steps) == pytest.approx(
            line["loss"], abs=1e-4
        )  # rounded by older versions
        run = trainer(tmp_path, student, teacher, rows, gradient_accumulation_steps=4, logging_steps=1, max_steps=1,
                      **settings)  # fmt: skip
        run.train()
        (line,) = [line for line in run.state.log_history if "loss" in line]
        for source, of in steps.items():
            for name in ("student_entropy", "teacher_entropy", "agreement", "overlap"):
                assert line[f"{name}_on_{source}"] == pytest.approx(of[name].mean().item()), name
            want = of["rkl"].mean() if normalize == "token" else of["rkl"].sum() / len(rows)
            assert line[f"loss_on_{source}"] == pytest.approx(0.5 * want.item())
        assert line["tokens_per_second"] > 0
        assert 0 < line["sampling_share"] < 1 and 0 < line["teacher_share"] < 1
    lists = trainer(tmp_path, student, teacher, rows, method="mle", logging_steps=1)
    lists.train()
    assert {k for k in lists.state.log_history[0] if "_on_" in k} == {"loss_on_gold"}


def test_time_outside_of_training_is_not_its(tmp_path, monkeypatch):
    clock, dataset = [0.0], data(8)
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Takes(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock[0] += 1

        def on_evaluate(self, *_, **__):
            clock[0] += 100

    run = FDistillTrainer(gpt2(60, seed=1), gpt2(60, seed=2), FDistillConfig(str(tmp_path), **{
        **BASE, "method": "mle", "max_steps": 3, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1,
    }), train_dataset=dataset, eval_dataset={"one": dataset, "two": dataset[:3]}, callbacks=[Takes()])  # fmt: skip
    for _ in range(2):  # the second run has nothing of the first one's last step
        clock[0] += 100
        run.train()
        (line,) = [line for line in run.state.log_history if "loss" in line]
        assert line["tokens_per_second"] == sum(len(row["labels"]) for row in dataset) / 2
        assert "teacher_share" not in line  # which evaluation alone has asked


# --- what is given is used, or refused before any work


def square(t):
    return (t - 1) ** 2


@pytest.mark.parametrize("divergence", [
    lambda t: (t - 1) ** 2, FDivergence(lambda t: (t - 1) ** 2), square, SkewKL(0.1), "alpha=0.3",
    {"gold": Alpha(0.3), "student": FDivergence(square)},
])  # fmt: skip
def test_divergences_of_ones_own_in_configurations(divergence, tmp_path):
    run = trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), divergence=divergence, save_strategy="steps", save_steps=1,
                  max_steps=1)  # fmt: skip
    run.train()
    json.loads(run.args.to_json_string())
    assert copy.deepcopy(run.args).halves() == run.halves
    kept = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert type(kept) is FDistillConfig and kept.temperature == 1.0


def test_names_with_parameters():
    for divergence in (*TABLE.values(), Alpha(1 / 3), SkewKL(0.1234567891), AB(0.3, 0.9), TailAware(8, 0.25)):
        assert resolve(str(divergence)) == divergence
    assert resolve("ab=0.3,0.9") == resolve("ab(0.3, 0.9)") == AB(0.3, 0.9)
    for text, words in (("kl=1", "kl takes no parameter"), ("alpha=1,2", "alpha takes alpha, not 1,2"),
                        ("alpha=0.3x", "alpha takes alpha as numbers"), ("alpah=1", "did you mean"),
                        ("skew_kl=2", "lam must be")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            resolve(text)


def test_an_objective_s_name_has_its_sources(tmp_path):
    for settings, name in ((dict(divergence="js"), "js on gold"), (dict(divergence="js", shares="student=1"), 'js on {"student": 1.0}'),
                           (dict(divergence={"teacher": "kl", "student": "rkl"}), "{'teacher': 'kl', 'student': 'rkl'} on teacher, student"),
                           (dict(divergence="js", ce_weight=1.0), "js on gold")):  # fmt: skip
        assert name_of(FDistillConfig(str(tmp_path), use_cpu=True, **settings)) == name


@pytest.mark.parametrize("settings, words", [
    (dict(reduction="foo"), "unknown reduction 'foo'"), (dict(temperature=-1), "temperature must be in"),
    (dict(backend="x"), "unknown backend 'x'; known: auto, cpu"),
])  # fmt: skip
def test_settings_of_a_module_are_checked_when_it_is_made(settings, words):
    with pytest.raises(ValueError, match=words):
        fk.FDivergenceLoss("js", **settings)
    fk.FDivergenceLoss("js", temperature=torch.tensor(2.0))


def test_configuration_of_a_command_line(tmp_path):
    def parsed(*arguments):
        return HfArgumentParser((FDistillConfig,)).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--use_cpu", *arguments])[0]  # fmt: skip

    by_source = parsed("--divergence", '{"teacher": "skew_kl=0.1", "student": "skew_rkl=0.1"}', "--ce_weight", "0.5")
    assert by_source.halves() == (Half("teacher", SkewKL(0.1), 0.5), Half("student", SkewRKL(0.1), 0.5),
                                  Half("gold", None, 0.5))  # fmt: skip
    for shares in ('{"student": 0.7, "gold": 0.3}', "student=0.7,gold=0.3"):
        halves = parsed("--divergence", "js", "--shares", shares).halves()
        assert [(h.source, h.weight) for h in halves] == [("student", 0.7), ("gold", 0.3)]
    assert parsed("--beams", "2").sampling(beams=True) == Sampling(64, beams=2)
    warm = parsed("--method", "js", "--beta", "0.3", "--temperature", "2", "--student_every", "4")
    warm = warm.for_predistillation(max_steps=3)
    assert (warm.halves(), warm.max_steps, warm.temperature, warm.student_every) == ((), 3, 1.0, 1)


@pytest.mark.parametrize("settings, words", [
    (dict(shares={"gold": 1.0}), "shares={'gold': 1.0} is not used without a divergence"),
    (dict(divergence="js", method="kl"), "method='kl' is not used beside a divergence"),
    (dict(divergence="js", beta=0.3), "beta=0.3 is not used beside a divergence"),
    (dict(method="kl", beta=0.3), "kl has none"),
    (dict(method="js", beta=0.0), "js is 0 at beta=0"),
    (dict(method="kl", student_every=2), "student_every=2 is not used without"),
    (dict(label_smoothing_factor=0.1), "label_smoothing_factor=0.1 is not used without"),
    (dict(cache_implementation="nosuch"), "nosuch"),
    (dict(method="rkl", cache_implementation="static", student_server="http://x", student_server_path="x"), "by a server"),
    (dict(method="mle", temperature=2.0), "temperature=2.0 is not used without a divergence"),
    (dict(method="mle", temperature_squared=True), "temperature_squared=True is not used without a divergence"),
    (dict(include_num_input_tokens_seen=True), "tokens_per_second is logged"),
    (dict(fp16=True), "fp16=True is not used on a CPU"),
    (dict(ddp_backend="gloo"), "ddp_backend='gloo' is not used by one process"),
    (dict(hub_strategy="end"), "hub_strategy='end' is not used without push_to_hub"),
    (dict(hub_always_push=True), "hub_always_push=True is not used without push_to_hub"),
    (dict(label_names=["labels"]), "is not used here: no logits are made"),
    (dict(include_for_metrics=["inputs"]), "is not used here: no logits are made"),
    (dict(batch_eval_metrics=True), "is not used here: no logits are made"),
    (dict(eval_accumulation_steps=2), "eval_accumulation_steps=2 is not used here"),
    (dict(eval_use_gather_object=True), "eval_use_gather_object=True is not used here"),
    (dict(eval_do_concat_batches=False), "eval_do_concat_batches=False is not used here"),
    (dict(gradient_checkpointing_kwargs={"use_reentrant": False}), "is not used without gradient_checkpointing"),
    (dict(method="predistill", temperature=2.0), "temperature=2.0 is not used by predistill"),
    (dict(method="mle", ce_weight=1.0), "which the objective has already"),
    (dict(divergence={"gold": "kl"}, shares={"student": 1.0}), "divergences of gold, and shares of student"),
    (dict(divergence={"silver": "kl"}), "unknown sources"),
    (dict(divergence="{no"), "divergence is no JSON"),
    *((dict([(name, "{no")]), f"{name} is no JSON") for name in MAY_BE_JSON if hasattr(FDistillConfig, name)),
    (dict(divergence='{"gold": 3}'), "divergence must name each source's"),
    (dict(divergence="kl", shares="gold:1"), "shares must be as in"),
    (dict(divergence="kl", shares="divergence=1"), "shares have unknown sources ['divergence']"),
    (dict(divergence="kl", shares="gold=0.3,gold=0.7"), "shares must be as in"),
    (dict(divergence="skew_kl=1"), "lam must be"),
    (dict(temperature=0.0), "temperature must be in [1e-18, 1e+18], not 0.0"),
    (dict(temperature=1e30), "temperature must be in [1e-18, 1e+18], not 1e+30"),
    (dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"bad": 1}), "gradient_checkpointing_kwargs={'bad': 1}: "),
    (dict(accelerator_config='{"bad": 1}'), "accelerator_config={'bad': 1}: "),
    (dict(accelerator_config={"gradient_accumulation_kwargs": {"bad": 1}}), "gradient_accumulation_kwargs={'bad': 1}: "),
    (dict(accelerator_config={"use_seedable_sampler": False}), "use_seedable_sampler=False is not used here: the seed"),
    (dict(accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 0}}), "num_steps must be at least 1, not 0"),
    (dict(dataloader_persistent_workers=True), "dataloader_persistent_workers=True is not used without dataloader_num_workers"),
    *((dict([(name, value)]), f"{name}={value!r} is not used without dataloader_num_workers")
      for name, value in (("dataloader_multiprocessing_context", "fork"), ("dataloader_in_order", False))
      if hasattr(FDistillConfig, name)),
    (dict(length_column_name="size"), "length_column_name='size' is not used without batches by length"),
    (dict(logging_nan_inf_filter=False), "logging_nan_inf_filter=False is not used here: on_nan says"),
    (dict(log_level="loud"), "log_level must be one of detail, debug, "),
    (dict(torch_compile_backend="bogus"), "torch_compile_backend must be one of eager, "),
    *((settings, words) for settings, words in (
        (dict(train_sampling_strategy="by_length"), "train_sampling_strategy must be one of random, sequential, "),
        (dict(train_sampling_strategy="batch_rebalance", auto_find_batch_size=True), "is not used by train_sampling_strategy"),
        (dict(activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 0}), "every_n_layers must be"),
        (dict(activation_checkpointing=True, activation_checkpointing_kwargs={"offload": True}), "offload moves an accel"),
    ) if all(hasattr(FDistillConfig, name) for name in settings) and hasattr(FDistillConfig, "activation_checkpointing")),
    *[(dict([(name, {"rope": True})]), f"{name}={{'rope': True}} is not used without use_liger_kernel")
      for name in ("liger_kernel_config",) if hasattr(FDistillConfig, name)],
    *((dict(method=method, **{name: value}), f"{name} must be in [0, inf), not {value}")
      for name, method in (("ce_weight", "kl"), ("neftune_noise_alpha", "kl"), ("hidden_weight", "predistill"))
      for value in (-5.0, math.nan, math.inf)),
    *((dict(divergence="js", shares={"gold": value, "student": 1.0}), "shares must be finite and at least 0")
      for value in (-5.0, math.nan, math.inf)),
    *((dict(method="mle", label_smoothing_factor=value), f"label_smoothing_factor must be in [0, 1], not {value}")
      for value in (1.5, math.nan)),
    (dict(method="foo"), "unknown method 'foo'; known: seqkd, kl, engine, rkl, js, tvd, mle, predistill"),
    (dict(memory="little"), "memory must be one of"),
    (dict(top_p=0.0), "top_p must be in (0, 1]"),
    (dict(per_device_train_batch_size=0), "per_device_train_batch_size must be at least 1"),
    (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps must be at least 1"),
    (dict(eval_strategy="steps", eval_steps=0), "eval_steps must be in (0, inf), not 0"),
    (dict(eval_strategy="epoch", eval_steps=5), "eval_steps=5 is not used by eval_strategy=epoch"),
    (dict(eval_steps=5), "eval_steps=5 is not used by eval_strategy=no"),
    (dict(save_strategy="no", save_only_model=True), "save_only_model=True is not used by save_strategy=no"),
    (dict(lr_scheduler_type="constant", warmup_steps=9), "warmup_steps=9 is not used by lr_scheduler_type=constant"),
    (dict(lr_scheduler_type="constant_with_warmup", lr_scheduler_kwargs={"a": 1}), "is not used by lr_scheduler_type=constant_with"),
    (dict(max_steps=0), "max_steps must be at least 1, or -1"), (dict(max_steps=-2), "max_steps must be at least -1"),
])  # fmt: skip
def test_refused_configurations(settings, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        FDistillConfig(str(tmp_path), **{**BASE, **settings})


@pytest.mark.parametrize("settings, words", [
    (dict(temperature="2"), "temperature must be a number, not '2'"),
    (dict(max_new_tokens=2.5), "max_new_tokens must be an int, not 2.5"),
    *((dict.fromkeys([name]), f"{name} must be an? (number|int), not NoneType")
      for name in ("beta", "beams", "top_k", "top_p", "max_new_tokens", "hidden_weight", "ce_weight")),
])  # fmt: skip
def test_settings_of_another_type_are_named(settings, words, tmp_path):
    with pytest.raises(TypeError, match=words):
        FDistillConfig(str(tmp_path), **{**BASE, **settings})


def test_optim_args_that_are_read(tmp_path):
    student, teacher = gpt2(60, seed=1), gpt2(60, seed=2)
    trainer(tmp_path, student, teacher, optim="sgd", optim_args="momentum=0, nesterov=False", learning_rate=1.0)


def test_options_beside_ones_own_optimizer_and_schedule(tmp_path):
    student, teacher = gpt2(60, seed=1), gpt2(60, seed=2)
    plain = torch.optim.SGD(student.parameters(), 0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(plain, lambda _: 1.0)
    of_class = dict(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))

    def made(more, **settings):
        FDistillTrainer(student, teacher, FDistillConfig(str(tmp_path), **{**BASE, "learning_rate": 0.1, **settings}),
                        train_dataset=data(), **more)  # fmt: skip

    for more, settings, words in (
        (dict(optimizers=(plain, None)), dict(optim="adafactor"), "optim='adafactor' is not used beside optimizers"),
        (dict(optimizers=(plain, None)), dict(learning_rate=0.2), "learning_rate=0.2 is not used beside optimizers"),
        (dict(optimizers=(plain, None)), dict(weight_decay=0.2), "weight_decay=0.2 is not used beside optimizers"),
        (dict(optimizers=(plain, None)), dict(lr_scheduler_kwargs={"foo": 1}), "lr_scheduler_kwargs={'foo': 1}: "),
        (of_class, dict(adam_beta1=0.8), "adam_beta1=0.8 is not used beside optimizer_cls_and_kwargs"),
        (dict(optimizers=(plain, constant)), dict(warmup_steps=2), "warmup_steps=2 is not used beside a schedule in"),
        (dict(optimizers=(torch.optim.SGD(gpt2(60).parameters(), 0.1), None)), {}, "optimizers: the optimizer has no weight of"),
        ({}, dict(lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": "x"}), "lr_scheduler_kwargs={'num_cycles"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(words)):
            made(more, **settings)
    made(dict(optimizers=(plain, None)), lr_scheduler_type="cosine", warmup_steps=2)
    made(dict(optimizers=(plain, constant)))
    made(of_class, weight_decay=0.2)


def test_what_a_model_is_made_of_is_refused_before_any_work(tmp_path, monkeypatch):
    student, teacher = gpt2(60, seed=1), gpt2(60, seed=2)
    if not is_liger_kernel_available():
        with pytest.raises(ImportError, match="liger-kernel"):
            trainer(tmp_path, student, teacher, use_liger_kernel=True)
    with pytest.raises(ValueError, match="torch_compile_mode='bogus': Unrecognized mode=bogus"):
        trainer(tmp_path, student, teacher, torch_compile=True, torch_compile_mode="bogus")
    student.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="GPT2LMHeadModel checkpoints no layers: leave out gradient_checkpointing"):
        trainer(tmp_path, student, teacher, gradient_checkpointing=True)
    merged = adapted(["default"], ["default"], False, monkeypatch)  # which trains ln_f beside
    merged.merge_adapter()
    with pytest.raises(ValueError, match="adapter is merged into the weights below it, and is not trained so"):
        trainer(tmp_path, merged, teacher)
    merged.unmerge_adapter()
    for p in merged.parameters():
        p.requires_grad_(False)  # as PeftModel.from_pretrained
    with pytest.raises(ValueError, match=r"nothing to train; PeftModel.* takes is_trainable=True"):
        trainer(tmp_path, merged, teacher)


def test_refused_by_the_trainer(tmp_path):
    from peft import LoraConfig, get_peft_model

    student, teacher = gpt2(60, seed=1), gpt2(60, seed=2)
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "model_init"):
        with pytest.raises(ValueError, match=f"{name} is not used by FDistillTrainer: "):
            FDistillTrainer(student, teacher, FDistillConfig(str(tmp_path), **BASE), **{name: print})
    with pytest.raises(NotImplementedError, match="make a trainer for each trial"):
        trainer(tmp_path, student, teacher).hyperparameter_search(n_trials=2)
    with pytest.raises(TypeError, match="args must be a FDistillConfig, not TrainingArguments"):
        FDistillTrainer(student, teacher, TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="model must be a Hugging Face model or a path of one, not NoneType"):
        trainer(tmp_path, None, teacher)
    with pytest.raises(ValueError, match="student and teacher share weights"):
        trainer(tmp_path, student, student)
    with pytest.raises(ValueError, match=r"hidden_weight=0\.1 is not used but by predistill"):
        trainer(tmp_path, student, teacher, hidden_weight=0.1)
    with pytest.raises(ValueError, match=r"beams=2 is not used but by an objective on beam sequences"):
        trainer(tmp_path, student, teacher, method="kl", beams=2)
    small = dict(per_device_train_batch_size=4, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="drops all of train_dataset, which has 3 rows, fewer than the 4 of a batch"):
        trainer(tmp_path, student, teacher, data(3), **small)
    trainer(tmp_path, student, teacher, data(4), **small)
    with patch.object(FDistillConfig, "world_size", 2), pytest.raises(ValueError, match="than the 8 of 2 batches"):
        trainer(tmp_path, student, teacher, data(4), **small)
    with pytest.raises(ValueError, match="drops all of eval_dataset, which has 4 rows, fewer than the 8 of a batch"):
        trainer(tmp_path, student, teacher, eval_strategy="epoch", **small)
    with pytest.raises(ValueError, match="dataloader_drop_last is not used by train_dataset, a stream"):
        trainer(tmp_path, student, teacher, Dataset.from_list(data()).to_iterable_dataset(), **small)
    with pytest.raises(TypeError, match="train_dataset must be one dataset, not several: give one of 'train', 'test'"):
        trainer(
            tmp_path, student, teacher, DatasetDict({name: Dataset.from_list(data()) for name in ("train", "test")})
        )
    with pytest.raises(ValueError, match="the teacher's first weights are on the meta device"):
        trainer(tmp_path, student, copy.deepcopy(teacher).to("meta"))
    rows = Dataset.from_list(data())
    for train, found in (("x", "str"), ([1, 2], "list of int"), (iter(data(4)), "list_iterator"),
                         (rows.with_format("arrow"), "Dataset of Table"),
                         (rows.with_format("pandas"), "Dataset of DataFrame")):  # fmt: skip
        with pytest.raises(TypeError, match=f"train_dataset must be a dataset, .* not a {found}"):
            trainer(tmp_path, student, teacher, train)
    with pytest.raises(ValueError, match=r"neftune_noise_alpha=5\.0 is not used: BartForConditionalGeneration reads"):
        trainer(tmp_path, bart(60), bart(60), neftune_noise_alpha=5.0)
    for several in (Mixture([teacher]), OfRows({"a": teacher})):
        with pytest.raises(ValueError, match=f"memory='minimal' needs .* {type(several).__name__} gives logits"):
            trainer(tmp_path, student, several, memory="minimal")
    lists = fk.TeacherStore.create(tmp_path / "lists", kind="top_k", vocabulary=60, key={}, k=4)
    with pytest.raises(ValueError, match=r"temperature=2, but the teacher's lists were taken at 1: give temperature=1"):
        trainer(tmp_path, student, lists, divergence="kl", temperature=2.0)
    with pytest.raises(ValueError, match="are not in the store"):  # the next thing that is checked
        trainer(tmp_path, student, Stored(lists, tail="uniform"), divergence="kl", temperature=2.0)
    for settings, words in ((dict(optim="sgd", optim_args="momentum=0.9,beta=1"), "sgd makes nothing of .*optim_args beta=1"),
                            (dict(optim_args="beta1=0"), "makes nothing of optim_args beta1=0"),
                            (dict(optim="sgd", adam_beta2=0.95), "sgd makes nothing of adam_beta2"),
                            (dict(optim_target_modules="all-linear"), "makes nothing of optim_target_modules"),
                            (dict(optim="sgd", optim_args="momentum"), "optim=sgd, optim_args='momentum': ")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path, student, teacher, **settings)
    stopping = gpt2(60)
    stopping.generation_config.stop_strings = ["a"]
    with pytest.raises(ValueError, match="GPT2LMHeadModel has stop_strings in its generation config"):
        trainer(tmp_path, student, stopping, method="seqkd")
    trainer(tmp_path, student, stopping, method="tvd")
    forced = bart(60, seed=1), bart(60, seed=2)
    for model, token in zip(forced, (5, 6), strict=True):
        model.generation_config.forced_bos_token_id = token
    with pytest.raises(ValueError, match=r"forced to begin with other tokens by student and teacher, \[5, 6\]"):
        trainer(tmp_path, *forced)
    with pytest.raises(ValueError, match="pack puts a causal model's batch in one row"):
        trainer(tmp_path, bart(60), bart(60), pack=True)
    with pytest.raises(ValueError, match="unexpected keyword argument 'foo'"):
        trainer(tmp_path, student, teacher, lr_scheduler_type="cosine", lr_scheduler_kwargs={"foo": 1})
    with pytest.raises(ValueError, match=r"batches by length need a datasets\.Dataset as train_dataset"):
        trainer(tmp_path, student, teacher, **BY_LENGTH)
    of_lengths = Dataset.from_list([{**row, "length": 9} for row in data()])
    with pytest.raises(ValueError, match=r"batches by length need a datasets\.Dataset as eval_dataset"):
        trainer(tmp_path, student, teacher, of_lengths, eval_strategy="epoch", **BY_LENGTH)
    stream = Dataset.from_list([{**row, "length": 9} for row in data()]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"batches by length need a datasets\.Dataset as train_dataset"):
        trainer(tmp_path, student, teacher, stream, **BY_LENGTH)  # whose order is its own
    for collator, told in (
        (lambda rows: {"input_ids": torch.ones(4, 3).long()}, "a batch needs prompt_ids, as collate makes it, and has input"),
        (lambda rows: {"prompt_ids": [row["prompt_ids"] for row in rows]}, "a batch needs prompt_ids as integers"),
        (lambda rows: {"prompt_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 3)}, "a batch needs labels as integers"),
        (lambda rows: {**collate(rows), "labels_mask": torch.ones(1, 1)}, "labels_mask must be a tensor of its labels' shape"),
        (lambda rows: {**collate(rows), "labels_mask": np.ones(collate(rows)["labels"].shape)}, "labels_mask must be a tensor"),
        (lambda rows: rows[0]["text"], r"data_collator fails on the data's first row \(KeyError\('text'\)\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            FDistillTrainer(student, teacher, FDistillConfig(str(tmp_path), **BASE), train_dataset=data(),
                            data_collator=collator)  # fmt: skip
    ahead = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "bert", vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.4, eos_token_id=EOS, pad_token_id=EOS))  # fmt: skip
    for pair, method in (((ahead, teacher), "kl"), ((ahead, teacher), "predistill"), ((student, ahead), "kl")):
        with pytest.raises(ValueError, match="BertLMHeadModel looks at later tokens or at padding"):
            trainer(tmp_path, *pair, method=method)  # before any step
    hears = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=8, bos_token_id=EOS,
        decoder_start_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS))  # fmt: skip
    for pair in ((hears, bart()), (bart(), hears)):
        with pytest.raises(ValueError, match="WhisperForConditionalGeneration reads input_features, and rows here are"):
            trainer(tmp_path, *pair, method="kl")
    with pytest.raises(ValueError, match="there is nothing to train"):
        trainer(tmp_path, gpt2(60, seed=1).requires_grad_(False), teacher, method="kl")
    on_head = get_peft_model(llama(60, seed=1), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="output embedding is LoRA or quantised"):
        trainer(tmp_path, on_head, llama(60), method="kl")
    base = gpt2(60, seed=1)
    adapted = get_peft_model(base, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="student and teacher share weights"):
        trainer(tmp_path, adapted, base)
    assert any(p.requires_grad for p in adapted.parameters())
    for train, settings, words in (
        ([{"prompt_ids": [2], "sample_ids": [3]}] * 4, dict(method="mle"), "train_dataset needs the column labels"),
        (data(sample_ids=[[3] * 40] * 8), dict(method="kl"), "prompt_ids with its sample_ids has"),
        (data(), dict(method="rkl", max_new_tokens=40), "with 40 new tokens has"),
        ([{"input_ids": [3] * 6, "labels": [3] * 6, "position_ids": [0, 1, 2] * 2}] * 4, dict(method="mle"),
         "train_dataset has the column position_ids, an input of the student's forward"),  # of packed rows
        ([{"input_ids": [3] * 6, "labels": [3] * 6, "assistant_masks": [0, 1] * 3}] * 4, dict(method="mle"),
         "train_dataset has the column assistant_masks, which is not read: name it labels_mask"),
        (data(teacher_prompt_ids=[[3] * 31] * 8), dict(method="rkl"), "row 0's teacher_prompt_ids with 5 new tokens has 36"),
        (data(sample_ids=[[3]] * 8), dict(divergence={"beam": "kl", "teacher": "kl"}), "give both sample_ids and beam_ids"),
        (Dataset.from_list(data(4)).add_column("text", ["a"] * 4).map(lambda r: {"labels": [3] * 40}),
         dict(method="mle"), "train_dataset: row 3's prompt_ids with its labels has 45 tokens, the student's context 32"),
        ([{"input_ids": [3] * 33, "labels": [3] * 33}] * 4, dict(method="mle"), "has 33 tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path, student, teacher, train, **settings)
    with pytest.raises(ValueError, match=r"eval_dataset\['two'\] needs the column labels"):
        FDistillTrainer(student, teacher, FDistillConfig(str(tmp_path), **{**BASE, "eval_strategy": "epoch"}),
                        train_dataset=data(), eval_dataset={"one": data(), "two": [{"prompt_ids": [2]}]})  # fmt: skip

    class Tokenizer(dict):
        get_vocab = dict.copy

    large = Tokenizer({"a": 0, "b": 60})  # which leaves ids out
    for given in (large, SimpleNamespace(tokenizer=large)):  # a processor's
        with pytest.raises(ValueError, match="the student's tokenizer has 61 ids, the student 60"):
            FDistillTrainer(student, teacher, FDistillConfig(str(tmp_path), **BASE), train_dataset=data(),
                            processing_class=given, teacher_processing_class=given)  # fmt: skip


def test_paths_in_place_of_models(tmp_path):
    from peft import LoraConfig, get_peft_model

    gpt2(60, seed=1).bfloat16().save_pretrained(tmp_path / "student")
    gpt2(60, seed=2).save_pretrained(tmp_path / "teacher")
    run = trainer(tmp_path / "run", str(tmp_path / "student"), tmp_path / "teacher", method="kl")
    run.train()
    assert run.model.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    get_peft_model(base, LoraConfig(target_modules=["c_attn"])).save_pretrained(tmp_path / "adapter")
    run = trainer(tmp_path / "run", tmp_path / "adapter", tmp_path / "teacher", method="kl")
    run.train()
    assert any(p.abs().sum() > 0 for n, p in run.model.named_parameters() if "lora_B" in n)


def test_experts_own_loss_and_a_base_model_as_teacher(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    from fdistill_kernels.sequence.teachers import Itself

    def make(seed, **settings):
        torch.manual_seed(seed)
        return MixtralForCausalLM(MixtralConfig(
            vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS,
            max_position_embeddings=64, **settings)).eval()  # fmt: skip

    rows = data(6, sample_ids=[[3, 4, 5, EOS]] * 6)
    plain = training_loss(trainer(tmp_path, make(1), make(2), rows, divergence={"gold": "kl", "teacher": "rkl"}), rows)
    student, aux = make(1, output_router_logits=True, router_aux_loss_coef=0.5), []
    for column in ("labels", "sample_ids"):
        texts = [[*row["prompt_ids"], *row[column]] for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(t) for t in texts])[:, None]
        aux.append(student(ids, attention_mask=mask.long()).aux_loss.item())
    run = trainer(tmp_path, student, make(2), rows, divergence={"gold": "kl", "teacher": "rkl"})
    assert training_loss(run, rows) == pytest.approx(plain + 0.5 * sum(aux) / 2, rel=1e-5)

    adapted = get_peft_model(llama(seed=1), LoraConfig(target_modules=["q_proj"]))
    run = trainer(tmp_path, adapted, Itself(adapter=False), rows, divergence="kl", ce_weight=1.0, logging_steps=1,
                  learning_rate=0.3)  # fmt: skip
    run.train()
    first, last = [line["overlap_on_gold"] for line in run.state.log_history if "loss" in line]
    assert first == pytest.approx(1) and last < 0.9999  # the adapter is 0 at first


def test_a_forced_first_token_does_not_count(tmp_path):
    student, teacher, rows = bart(seed=1), bart(seed=2), data(6)
    student.generation_config.forced_bos_token_id = 7
    rows = [{**row, "labels": [7, *row["labels"]]} for row in rows]
    steps = []
    for row in rows:
        begun = torch.tensor([[EOS, *row["labels"][:-1]]])
        given = dict(input_ids=torch.tensor([row["prompt_ids"]]), decoder_input_ids=begun)
        with torch.no_grad():
            log_q, log_p = (m.eval()(**given).logits[0, 1:].double().log_softmax(-1) for m in (student, teacher))
        steps.append(table(log_q, log_p)["kl"])
    want = pytest.approx(torch.cat(steps).mean().item(), rel=1e-4)
    run = trainer(tmp_path, student, teacher, rows, divergence="kl", learning_rate=0.0, logging_steps=1, max_steps=1,
                  per_device_train_batch_size=3, gradient_accumulation_steps=2)  # fmt: skip
    assert run.evaluate(rows)["eval_loss"] == want
    run.train()
    (line,) = [line for line in run.state.log_history if "loss" in line]
    assert line["loss"] == want and line["loss_on_gold"] == want


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "student_samples_0_of_1.pt"]
)
def test_a_checkpoint_s_file_that_is_damaged_is_named(name, tmp_path):
    settings = dict(method="rkl", student_every=3, save_strategy="steps", save_steps=1)
    trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), **settings).train()
    path = tmp_path / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))} is damaged \(.*: remove .*checkpoint-2 to go on from an"
    ):
        trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), **settings, max_steps=4).train(
            resume_from_checkpoint=True
        )


def ending(make, seed, ends):
    model = make(12, seed=seed)
    model.generation_config.eos_token_id = ends
    return model


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("make", [gpt2, bart])
def test_a_student_gets_the_end_tokens_that_it_lacks(make, adapted, tmp_path):
    """As a base model does under a teacher that was tuned on chats."""
    from peft import LoraConfig, get_peft_model

    student, rows = ending(make, 1, EOS), [{"prompt_ids": [5], "labels": [6, 4]}] * 8
    if adapted:
        student = get_peft_model(student, LoraConfig(target_modules=["c_attn", "q_proj"]))
    with pytest.warns(UserWarning, match=r"also end at \[4\]: .* eos_token_id=\[0, 4\]"):
        run = trainer(tmp_path, student, ending(make, 2, [EOS, 4, 70]), rows, method="js", max_new_tokens=12, top_k=0)
    made = run._draw("student", student, {"prompt_ids": torch.tensor([[5]] * 40)}, 0).continuations
    assert any(4 in row.tolist() for row in made) and not any(4 in row.tolist()[:-1] for row in made)
    run.train()
    student = student.merge_and_unload() if adapted else student
    student.save_pretrained(tmp_path / "student")
    assert json.loads((tmp_path / "student" / "generation_config.json").read_text())["eos_token_id"] == [EOS, 4]


def test_a_student_gets_the_end_tokens_of_a_stored_teacher(tmp_path):
    extra = {"end_tokens": [EOS, 4]}
    store = fk.TeacherStore.create(tmp_path / "store", kind="top_k", vocabulary=12, key={}, k=3, extra=extra)
    with store.writer() as writer:
        writer.add([5], [6, 4], fk.top_k_of(torch.randn(2, 12), 3))
    args = FDistillConfig(str(tmp_path), **{**BASE, "method": "kl"})
    rows = [{"prompt_ids": [5], "labels": [6, 4], "sample_ids": [6, 4]}]
    with pytest.warns(UserWarning, match=r"also end at \[4\]: .* eos_token_id=\[0, 4\]"):
        FDistillTrainer(ending(gpt2, 1, EOS), store, args, train_dataset=rows)


def test_end_tokens_that_a_teacher_lacks_or_that_are_none(tmp_path, recwarn):
    trainer(tmp_path, ending(gpt2, 1, [EOS, 4]), ending(gpt2, 2, [4, EOS]), [{"prompt_ids": [5], "labels": [6]}])
    assert not any("end" in str(warning.message).split() for warning in recwarn)
    with pytest.warns(UserWarning, match=r"a teacher's samples go on after \[4\]"):
        trainer(tmp_path, ending(gpt2, 1, [EOS, 4]), ending(gpt2, 2, EOS), [{"prompt_ids": [5], "labels": [6]}])
    for ends in "</s>", ["</s>"]:
        with pytest.raises(ValueError, match="eos_token_id in a generation config must be an id or a list of ids, not"):
            trainer(tmp_path, gpt2(12, seed=1), ending(gpt2, 2, ends), [{"prompt_ids": [5], "labels": [6]}])


@pytest.mark.parametrize("make", [gpt2, bart])
def test_padding_ids_that_are_no_ids_of_the_model(make, tmp_path):
    """Some configurations have −1, and tokenizers' own may lie beyond the embedding; any id will do, as it is masked."""
    losses = []
    for pad in (EOS, -1, 60):
        student, teacher = make(60, seed=1), make(60, seed=2)
        for config in (student.config, student.generation_config, teacher.config, teacher.generation_config):
            config.pad_token_id = pad
        run = trainer(tmp_path, student, teacher, method="js")
        run.train()
        losses.append(run.evaluate()["eval_loss"])
    assert losses == losses[:1] * 3


@pytest.mark.parametrize("make", [gpt2, bart])
def test_batches_without_a_token(make, tmp_path):
    rows = [{"prompt_ids": [5], "labels": []}] * 8
    student = make(60, seed=1)
    before = flat(student)
    for settings in (dict(divergence="kl"), dict(method="mle")):
        run = trainer(tmp_path, student, make(60, seed=2), rows, **settings)
        run.train()
        assert run.evaluate(rows)["eval_loss"] == 0
    assert torch.equal(before, flat(student))


def test_a_password_is_refused_where_it_would_be_written_to_files(tmp_path):
    with pytest.raises(ValueError, match="student_server='http://there' was given with a user") as error:
        FDistillConfig(str(tmp_path), method="rkl", student_server="http://me:sesame@there", student_server_path="x")
    assert "sesame" not in str(error.value)


def test_a_metric_that_no_evaluation_has_is_told_before_any_step(tmp_path):
    class Mine(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **_):
            metrics["eval_mine"] = 1.0

    def run(metric, evaluated=None, add=()):
        made = trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), method="mle", eval_strategy="steps", eval_steps=1,
                       metric_for_best_model=metric, max_steps=1, save_strategy="best")  # fmt: skip
        made.eval_dataset = evaluated or made.eval_dataset
        for callback in add:
            made.add_callback(callback)
        made.train()
        return made.state

    for metric, evaluated in (("bleu", None), ("eval_los", None), ("loss", {"one": data(4)})):
        with pytest.raises(ValueError, match=f"metric_for_best_model='{metric}': an evaluation has "):
            run(metric, evaluated)
    assert run("loss").best_metric > 0 and run("eval_one_loss", {"one": data(4)}).best_metric > 0
    assert run("mine", add=[Mine()]).best_metric == 1
    for unused in (dict(metric_for_best_model="loss"), *[dict(greater_is_better=given) for given in (True, False)]):
        with pytest.raises(ValueError, match=f"{next(iter(unused))}=.* is not used without"):
            trainer(tmp_path, gpt2(60), gpt2(60), **unused)


def test_an_update_goes_on_where_a_stream_begins_again(tmp_path):
    """7 rows in batches of 3, 3 and 1, two an update: what is trained on is the same as of a list of these batches."""
    rows = data(7)
    weights = []
    for train in (Dataset.from_list(rows).to_iterable_dataset(), [rows[:3], rows[3:6], rows[6:], rows[:3]]):
        student = gpt2(60, seed=1)
        settings = dict(
            method="mle", optim="sgd", lr_scheduler_type="constant", max_steps=2, gradient_accumulation_steps=2
        )
        if isinstance(train, list):
            made = trainer(tmp_path, student, gpt2(60, seed=2), rows, **settings | dict(per_device_train_batch_size=1))
            made.data_collator, made.train_dataset = (lambda given, known=made.data_collator: known(given[0])), train
            made._get_train_sampler = lambda *_, given=train: torch.utils.data.SequentialSampler(given)
        else:
            made = trainer(tmp_path, student, gpt2(60, seed=2), train, **settings | dict(per_device_train_batch_size=3))
        made.train()
        weights.append(flat(student))
    torch.testing.assert_close(*weights)
    weights = []
    # in the first pass, which transformers 4 ends as one without a row, and when the stream has begun again
    ways = ([4], *([] if transformers.__version__.startswith("4.") else [[1, 4]]), [3, 4])
    for stops in ways:
        for i, stop in enumerate(stops):
            student, again = gpt2(60, seed=1), dict(ignore_data_skip=stops == [3, 4])
            run = trainer(tmp_path / str(stops), student, gpt2(60, seed=2), Dataset.from_list(rows).to_iterable_dataset(),
                          **settings | dict(max_steps=stop, per_device_train_batch_size=3, save_strategy="steps", save_steps=1,
                                            **again))  # fmt: skip
            if i and again["ignore_data_skip"]:
                run.args.ignore_data_skip = False
                with pytest.raises(
                    ValueError, match="train_dataset ends within the batches of the 3 steps that the run"
                ):
                    run.train(resume_from_checkpoint=True)
                run.args.ignore_data_skip = True
            run.train(resume_from_checkpoint=bool(i))
        weights.append(flat(student))
    torch.testing.assert_close(weights[1:], weights[:1] * len(weights[1:]), rtol=0, atol=0)
    short = trainer(tmp_path, gpt2(60), gpt2(60), Dataset.from_list(rows).to_iterable_dataset(), **settings | dict(
        per_device_train_batch_size=9))  # fmt: skip
    with pytest.raises(ValueError, match="train_dataset ends after 1 batches of the first update's 2"):
        short.train()
