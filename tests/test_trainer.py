"""The trainer: every method trains, resumes, accumulates; PEFT, prompts of the teacher's own, and bad input."""

import itertools
import os

import pytest
import torch

from fdistill_kernels.integrations.transformers import patch_model
from fdistill_kernels.sequence.models import virtual_tokens
from fdistill_kernels.sequence.sampling import Sampling, TeacherSamples, draw, drawn_by_forward
from fdistill_kernels.sequence.trainer import FDistillConfig, FDistillTrainer, check_vocabularies

from .test_sequence import EOS, bart, batch, gpt2, llama

BASE = dict(report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_steps=2, per_device_train_batch_size=4,
            learning_rate=1e-2, max_new_tokens=5, top_k=30, seed=0)  # fmt: skip


def data(n=8, **extra):
    prompts, targets = batch(n=n)
    return [{"prompt_ids": p.tolist(), "labels": t.tolist(), **{k: v[i] for k, v in extra.items()}}
            for i, (p, t) in enumerate(zip(prompts, targets, strict=True))]  # fmt: skip


def trainer(folder, student, teacher, train=None, **settings):
    return FDistillTrainer(student, teacher, FDistillConfig(str(folder), **{**BASE, **settings}),
                           train_dataset=train or data(), eval_dataset=data(4))  # fmt: skip


@pytest.mark.parametrize("make", [lambda seed: gpt2(60, seed=seed), lambda seed: bart(seed=seed)], ids=["gpt2", "bart"])
@pytest.mark.parametrize("method", ["seqkd", "kl", "engine", "rkl", "js", "tvd", "mle", "predistill"])
def test_every_method_trains(method, make, tmp_path):
    student, teacher = make(1), make(2)
    before = [p.clone() for p in student.parameters()]
    theirs = [p.clone() for p in teacher.parameters()]
    run = trainer(tmp_path, student, teacher, method=method)
    run.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(theirs, teacher.parameters(), strict=True))
    assert run.evaluate()["eval_loss"] > 0


def test_kl_on_gold_falls(tmp_path):
    student, teacher = gpt2(60, seed=1), gpt2(60, seed=2)
    run = trainer(tmp_path, student, teacher, divergence="kl", shares={"gold": 1.0}, max_steps=30)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * before


def test_resume_gives_the_same_weights(tmp_path):
    stored = data(sample_ids=[[3, 4, EOS]] * 8)
    weights = []
    for stops in ([4], [2, 4]):
        student = gpt2(60, seed=1)
        for i, stop in enumerate(stops):
            run = trainer(tmp_path / str(len(stops)), student, gpt2(60, seed=2), stored, method="kl", max_steps=stop,
                          save_strategy="steps", save_steps=2, lr_scheduler_type="constant")  # fmt: skip
            run.train(resume_from_checkpoint=bool(i))
            student = run.model
        weights.append(student.lm_head.weight.detach().clone())
    torch.testing.assert_close(*weights)


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


def prompted(kind, make, seed=1):
    """A model with four tokens of PEFT's own before its input, and large weights for them."""
    import peft

    model, causal = make(60, seed=seed), make in (gpt2, llama)
    more = dict(encoder_hidden_size=8) if kind == "PromptEncoderConfig" else {}
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
        tokens.append((p.exp() * (p - q)).sum(-1).mean())
    assert run.evaluate()["eval_loss"] == pytest.approx(float(torch.stack(tokens).mean()), rel=1e-3)
    with pytest.raises(ValueError, match="pre-distil the model before"):
        trainer(tmp_path, student, teacher, method="predistill")
    if make is not bart:
        with pytest.raises(ValueError, match="virtual tokens: its sequences cannot be packed"):
            trainer(tmp_path, student, teacher, method="mle", pack=True).train()


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


def test_nan_stops_with_the_batch_or_is_skipped(tmp_path):
    broken = gpt2(60, seed=2)
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(float("nan"))
    stored = data(sample_ids=[[3, EOS]] * 8)
    with pytest.raises(FloatingPointError, match="its batch is in"):
        trainer(tmp_path, gpt2(60, seed=1), broken, stored, method="kl").train()
    assert set(torch.load(tmp_path / "nan_batch_step_0.pt")) == {"prompt_ids", "labels", "sample_ids"}
    student = gpt2(60, seed=1)
    before = student.lm_head.weight.clone()
    trainer(tmp_path, student, broken, stored, method="kl", on_nan="skip").train()
    assert torch.equal(student.lm_head.weight, before)


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
    with pytest.raises(ValueError, match="the model's context 32"):
        trainer(tmp_path, gpt2(60), gpt2(60), [{"prompt_ids": [2] * 40, "labels": [1]}] * 4, method="mle").train()
    with pytest.raises(ValueError, match="on_nan must be one of"):
        FDistillConfig(str(tmp_path), on_nan="ignore")

    class Tokenizer(dict):
        get_vocab = dict.copy

    check_vocabularies(Tokenizer(a=0, b=1), Tokenizer(a=0, b=1, c=2))
    with pytest.raises(ValueError, match="different tokenizers: 'b' is 1 in one and 2"):
        check_vocabularies(Tokenizer(a=0, b=1), Tokenizer(a=0, b=2))
    with pytest.raises(ValueError, match="'c' is 1 in one and 'b' has that id"):
        check_vocabularies(Tokenizer(a=0, c=1), Tokenizer(a=0, b=1))


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


def test_kept_samples_are_of_their_own_batch(tmp_path, monkeypatch):
    from fdistill_kernels.sequence import trainer as module

    drawn, asked = [], module.draw
    monkeypatch.setattr(module, "draw", lambda *a: drawn.append(a[1]) or asked(*a))
    seen = []
    run = trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), data(16), method="rkl", student_every=2, max_steps=4,
                  per_device_train_batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
    half = run._half
    run._half = lambda h, model, prompts, *rest: seen.append(prompts) or half(h, model, prompts, *rest)
    run.train()
    assert len(drawn) == 4
    assert all(p is q for p, q in zip(seen, [*drawn[:2] * 2, *drawn[2:] * 2], strict=True))
