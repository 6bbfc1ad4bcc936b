"""Hugging Face models whose own loss is ours."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from fdistill_kernels.integrations.transformers import causal_loss, patch_model, undo_patch

from .test_sequence import bart, gpt2, llama, t5

ARGUMENTS = dict(report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_steps=3, per_device_train_batch_size=2,
                 gradient_accumulation_steps=2, learning_rate=1e-2, seed=0)  # fmt: skip


@pytest.mark.parametrize("make", [gpt2, llama, bart, t5])
def test_patched_loss_and_gradients(make):
    model = make(60)
    ids, labels = torch.randint(2, 60, (3, 7)), torch.randint(2, 60, (3, 7))
    labels[0, 4:] = -100
    want = model(input_ids=ids, labels=labels)
    gradients = torch.autograd.grad(want.loss, list(model.parameters()), allow_unused=True)
    assert patch_model(model) is model
    for training in (False, True):
        got = model.train(training)(input_ids=ids, labels=labels)
        torch.testing.assert_close(got.loss, want.loss)
        assert (got.logits is None) == training
    torch.testing.assert_close(model.eval()(input_ids=ids, labels=labels).logits, want.logits, atol=1e-5, rtol=1e-4)
    for g, w in zip(torch.autograd.grad(got.loss, list(model.parameters()), allow_unused=True), gradients, strict=True):
        assert (g is None and w is None) or torch.allclose(g, w, atol=1e-6)
    assert torch.equal(undo_patch(model)(input_ids=ids, labels=labels).logits, want.logits)
    kept = patch_model(model, keep_logits=True).train()(input_ids=ids, labels=labels)
    torch.testing.assert_close(kept.logits, want.logits, atol=1e-5, rtol=1e-4)
    assert not kept.logits.requires_grad and kept.loss.requires_grad


def test_undoing_leaves_what_was_there_before():
    model = gpt2(60)
    model.forward = hooked = model.forward  # as accelerate's hooks set it
    assert undo_patch(patch_model(model)).forward is hooked


def test_packed_sequences_do_not_predict_each_other():
    model = llama()
    one, two = torch.randint(2, 60, (1, 5)), torch.randint(2, 60, (1, 4))
    apart = [patch_model(model)(input_ids=x, labels=x).loss for x in (one, two)]
    packed = torch.cat((one, two), 1)
    positions = torch.cat((torch.arange(5), torch.arange(4)))[None]
    loss = model(input_ids=packed, labels=packed, position_ids=positions, use_cache=False).loss
    torch.testing.assert_close(loss, (4 * apart[0] + 3 * apart[1]) / 7)


def trained(model, folder, bf16=False, **keywords):
    data = [
        {"input_ids": x, "labels": x} for x in torch.randint(2, 60, (12, 6), generator=torch.Generator().manual_seed(1))
    ]
    trainer = Trainer(model, TrainingArguments(str(folder), **ARGUMENTS, bf16=bf16), train_dataset=data, **keywords)
    trainer.train()
    return model.lm_head.weight.detach()


def test_trainer_with_and_without(tmp_path):
    want = trained(gpt2(60), tmp_path)
    torch.testing.assert_close(trained(patch_model(gpt2(60)), tmp_path), want, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(trained(gpt2(60), tmp_path, compute_loss_func=causal_loss), want, atol=2e-5, rtol=1e-3)
    narrow = patch_model(gpt2(60))
    trained(narrow, tmp_path, bf16=True)
    undo_patch(narrow)
    assert narrow(torch.zeros(1, 2, dtype=torch.long)).logits.dtype == torch.float32


def test_lora_heads_are_refused():
    model = gpt2(60)

    class Lora(torch.nn.Linear):
        lora_A = None

    model.set_output_embeddings(Lora(16, 60))
    with pytest.raises(TypeError, match="LoRA or quantised"):
        patch_model(model)
