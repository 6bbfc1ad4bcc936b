"""Hugging Face models whose own loss is ours."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from fdistill_kernels.integrations import transformers as integration
from fdistill_kernels.integrations.transformers import causal_loss, patch_model, seq2seq_loss, undo_patch
from fdistill_kernels.sequence.forward import rows_of
from fdistill_kernels.sequence.losses import check_head

from .test_sequence import bart, gpt2, llama, t5

ARGUMENTS = dict(report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_steps=3, per_device_train_batch_size=2,
                 gradient_accumulation_steps=2, learning_rate=1e-2, seed=0)  # fmt: skip
IDS = torch.randint(2, 60, (3, 7), generator=torch.Generator().manual_seed(1))
LABELS = IDS.masked_fill(torch.arange(7) > torch.tensor([[6], [3], [6]]), -100)
BATCH = dict(input_ids=IDS, labels=LABELS)


def gradients(model, **inputs):
    """The loss of a batch and its gradients."""
    loss = model(**{**BATCH, **inputs})[0]
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return loss.detach(), [torch.zeros(()) if g is None else g for g in found]


@pytest.fixture
def is_own():
    """Whether a model's loss and gradients are what they were when its own were asked for."""

    def check(model, own, **inputs):
        torch.testing.assert_close(gradients(model, **inputs), own, atol=1e-5, rtol=1e-4)

    return check


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
    del model.forward
    assert type(undo_patch(patch_model(model))) is type(gpt2(60)) and set(vars(model)) == set(vars(gpt2(60)))
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks


# --- what the model says of its loss is heard


def test_outputs_are_the_models_own():
    model = llama().train()
    own = model(**BATCH)
    got = patch_model(model)(**BATCH)
    assert got[0] is got.loss and type(got) is type(own) and got.logits is None and "logits" not in got
    loss, logits, *_ = model(**BATCH, return_dict=False)
    torch.testing.assert_close(loss, own.loss)
    assert logits is None
    torch.testing.assert_close(model(IDS, None, None, None, None, LABELS)[0], own.loss)  # labels by position
    assert type(model).__name__ == type(model).__qualname__ == "LlamaForCausalLM"
    evaluated = model.eval()(**BATCH, return_dict=False)
    torch.testing.assert_close(evaluated[1], own.logits)


def test_keywords_of_the_loss(is_own):
    model = llama()
    aligned, masked = IDS.masked_fill(IDS < 20, -100), IDS.masked_fill(IDS < 20, 7)
    for inputs in (dict(shift_labels=aligned), dict(ignore_index=7, labels=masked), dict(num_items_in_batch=5)):
        own = gradients(undo_patch(model), **inputs)
        is_own(patch_model(model), own, **inputs)
    own = gradients(undo_patch(model), labels=masked.masked_fill(masked == 7, -100))
    is_own(patch_model(model, ignore_index=7), own, labels=masked)
    torch.testing.assert_close(causal_loss(model(input_ids=IDS), masked, ignore_index=7), own[0])
    shifted = torch.nn.functional.pad(masked[:, 1:], (0, 1), value=7)
    torch.testing.assert_close(causal_loss(model(input_ids=IDS), IDS, shift_labels=shifted, ignore_index=7), own[0])
    logits = model(input_ids=IDS).logits
    for loss, labels in ((causal_loss, masked), (seq2seq_loss, shifted)):  # any leading shape
        one = type("Outputs", (), {"logits": logits[0]})
        several = type("Outputs", (), {"logits": logits[None]})
        torch.testing.assert_close(loss(several, labels[None], ignore_index=7), own[0])
        assert loss(one, labels[0], ignore_index=7).shape == ()
    smooth = patch_model(model, label_smoothing=0.2)(**BATCH).loss
    target = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100).flatten()
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target, label_smoothing=0.2)
    torch.testing.assert_close(smooth, want)
    for unknown in ("labels_smoothing", "reduction", "logit_scale", "num_items"):
        with pytest.raises(TypeError, match=f"{unknown} is not among what patch_model takes: backend"):
            patch_model(model, **{unknown: 1.0})


@pytest.mark.parametrize("name, wrong", [
    ("label_smoothing", 1.5), ("z_loss", "x"), ("memory", "chunk"), ("chunk_bytes", 0), ("skip_tiles", 1), ("backend", "tpu"),
    ("ignore_index", 1.5), ("token_weight", 2.0), ("shard", 3), ("keep_logits", 1),
])  # fmt: skip
def test_keywords_are_checked_before_a_model_is_changed(name, wrong):
    """They were looked at in the first step."""
    model = llama()
    with pytest.raises((ValueError, TypeError), match=name):
        patch_model(model, **{name: wrong})
    assert type(model) is type(llama())


@pytest.mark.parametrize("loss", [causal_loss, seq2seq_loss])
def test_labels_of_a_trainer_s_loss_are_refused_by_name(loss):
    outputs = type("Outputs", (), {"logits": torch.randn(2, 6, 40)})
    for wrong in (None, [[1]], torch.ones(2, 6), torch.ones(3, 4).long(), torch.ones(6, 2).long()):
        with pytest.raises((ValueError, TypeError), match=r"^(labels|target) must "):
            loss(outputs, wrong)
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        loss(outputs, torch.ones(2, 6).long(), ignore_index=1.5)
    with pytest.raises(ValueError, match="outputs has no logits"):
        loss((outputs.logits,), torch.ones(2, 6).long())


def test_packed_sequences_are_the_models_own(is_own):
    model = llama()
    positions = torch.cat((torch.arange(3), torch.arange(4))).expand(3, 7)
    packed = dict(position_ids=positions, use_cache=False, labels=LABELS.masked_fill(positions == 0, -100))
    is_own(patch_model(model), gradients(model, **packed), **packed)


def test_outputs_without_logits_are_refused_by_name():
    outputs = patch_model(llama()).train()(**BATCH)
    for loss in (causal_loss, seq2seq_loss):
        with pytest.raises(ValueError, match="outputs has no logits: a patched model"):
            loss(outputs, LABELS)


# --- the model is copied, sent, wrapped, shared


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: (file := io.BytesIO(), torch.save(model, file), file.seek(0)) and torch.load(file, weights_only=False),
}  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [llama, bart])
def test_copies_are_models_of_their_own(make, how):
    model = patch_model(make(), label_smoothing=0.2).train()
    copied = COPIES[how](model)
    torch.testing.assert_close(copied(**BATCH).loss, model(**BATCH).loss)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    outputs = copied(**BATCH)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(torch.tensor(60.0).log().item()) and outputs.logits is None
    assert all(p.grad is None for p in model.parameters()) and not undo_patch(copied)(input_ids=IDS).logits.any()


def test_saved_and_loaded_by_name(tmp_path):
    from transformers import AutoModelForCausalLM

    patch_model(model := llama()).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"] and type(loaded) is type(llama())
    torch.testing.assert_close(loaded(**BATCH).loss, model(**BATCH).loss)


def test_threads_share_a_model():
    model = patch_model(llama()).eval()
    want, wrong = model(**BATCH), []

    def check(inputs, name):
        for _ in range(30):
            try:
                torch.testing.assert_close(model(**inputs)[name], want[name])
            except Exception as error:
                wrong.append(error)

    asked = 2 * [(BATCH, "loss"), (dict(input_ids=IDS), "logits")]
    threads = [threading.Thread(target=check, args=pair) for pair in asked]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("prepare_first", [False, True])
def test_accelerate(prepare_first):
    import accelerate
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of trainers before, in this process
    own = llama().eval()(**BATCH)

    def offloaded(model):
        accelerate.cpu_offload(model, execution_device="cpu")  # the weights are there only inside each forward
        return model

    first, second = (offloaded, patch_model) if prepare_first else (patch_model, offloaded)
    with torch.no_grad():
        got = second(first(llama().eval()))(**BATCH)
    torch.testing.assert_close((got.loss, got.logits), (own.loss, own.logits))
    wrapper = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    first, second = (wrapper.prepare, patch_model) if prepare_first else (patch_model, wrapper.prepare)
    model = second(first(llama().train()))
    narrow = model(**BATCH)
    assert narrow.logits is None and abs(narrow.loss - own.loss) < 0.05
    unwrapped = wrapper.unwrap_model(model, keep_fp32_wrapper=False)
    torch.testing.assert_close(unwrapped(**BATCH).loss, narrow.loss if prepare_first else own.loss)


def test_checkpointing_and_new_heads(is_own):
    model = llama().train()
    own = gradients(model)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))  # the default from transformers 5 on
    is_own(patch_model(model), own)
    model.resize_token_embeddings(64)  # another module in the head's place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = gradients(undo_patch(model))
        is_own(patch_model(model), own)
        model.set_output_embeddings(copy.deepcopy(model.lm_head))
        is_own(model, own)


@pytest.mark.parametrize("patched_first", [False, True])
def test_fully_sharded(patched_first, monkeypatch, is_own):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = llama().train()
    own = gradients(model)
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0").items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo")
    try:
        if patched_first:
            patch_model(model)
        for module in (*model.model.layers, model.lm_head, model):
            fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
        patch_model(model)(**BATCH).loss.backward()
        got = [p.grad.full_tensor() for p in model.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(got, own[1], atol=1e-5, rtol=1e-4)


# --- PEFT


def peft_model(config, model=None):
    from peft import get_peft_model

    made = get_peft_model(llama() if model is None else model, config).train()
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return made


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("base_first", [False, True])
def test_peft_models(base_first, is_own):
    from peft import LoraConfig, PromptTuningConfig

    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    for config in (lora, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")):
        base = llama()
        model = peft_model(config, patch_model(base) if base_first else base)
        own = gradients(undo_patch(model))
        if config is lora:
            with model.disable_adapter():
                reference = model(**BATCH).loss
        assert patch_model(model) is model
        is_own(model, own)
        assert model(**BATCH).logits is None
        if config is lora:
            with model.disable_adapter():
                torch.testing.assert_close(model(**BATCH).loss, reference)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "IA3Config"])
def test_adapters_on_the_head(kind, is_own, monkeypatch):
    import peft

    monkeypatch.setattr(integration, "_warned", set())
    more = dict(feedforward_modules=[]) if kind == "IA3Config" else {}
    model = peft_model(getattr(peft, kind)(target_modules=["q_proj", "lm_head"], **more), patch_model(llama()))
    own = gradients(undo_patch(model))
    with pytest.raises(TypeError, match=r"peft\.tuners\..*, is LoRA or quantised or has a forward of its own"):
        patch_model(model)
    patch_model(plain := llama())  # what was patched before the adapter came still has the right loss, and says so
    vars(model.get_base_model()).update(_fused_loss=plain._fused_loss)
    model.get_base_model().__class__ = type(plain)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM makes its logits whole.*peft\.tuners"):
        is_own(model, own)


def test_heads_with_a_forward_of_their_own():
    """Set on the module, as by who patches it: what it does beside the product was done to the loss, too."""
    model, plain = llama(), llama()
    head = model.lm_head
    head.forward = lambda x: 2 * torch.nn.functional.linear(x, head.weight, head.bias)
    with pytest.raises(TypeError, match="has a forward of its own"):
        patch_model(model)
    with pytest.raises(ValueError, match="has a forward of its own"):
        check_head(model)
    with torch.no_grad():
        rows, logits = ([torch.arange(3, 9)], [torch.arange(9, 14)]), model(torch.arange(3, 14)[None]).logits[0, 5:-1]
        found, _ = rows_of(model, *rows, 0)  # a teacher's
        torch.testing.assert_close(found.logits(found.hidden), logits)
    add_hook_to_module(plain.lm_head, AlignDevicesHook())
    check_head(patch_model(plain))
    remove_hook_from_module(plain.lm_head)
    check_head(plain)


# --- what the fused loss has no form for


class Squared(type(llama())):
    """Does to its logits what no fused loss knows."""

    def forward(self, input_ids=None, labels=None, **inputs):
        """Its own loss."""
        logits = super().forward(input_ids, **inputs).logits.square()
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


class CrossEntropy(torch.autograd.Function):
    """As those of other libraries' kernels, which take no deferred logits."""

    @staticmethod
    def forward(ctx, logits, labels):
        """As torch's."""
        ctx.save_for_backward(logits, labels)
        return torch.nn.functional.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx, gradient):
        """As torch's."""
        logits, labels = ctx.saved_tensors
        counts, hot = labels != -100, torch.nn.functional.one_hot(labels.clamp_min(0), logits.shape[-1])
        return gradient * (logits.softmax(-1) - hot) * counts[:, None] / counts.sum(), None


class OfFunction(type(llama())):
    """Has a loss that an autograd.Function makes, and adds to it what has a gradient of its own."""

    def forward(self, input_ids=None, labels=None, **inputs):
        """Its own loss."""
        logits = super().forward(input_ids, **inputs).logits
        loss = None if labels is None else CrossEntropy.apply(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(
            loss=None if loss is None else loss + self.model.norm.weight.square().sum(), logits=logits
        )


class Checkpointed(type(llama())):
    """Makes its loss in a checkpoint that is one of these Functions."""

    def forward(self, input_ids=None, labels=None, **inputs):
        """Its own loss."""
        logits = super().forward(input_ids, **inputs).logits
        loss = torch.utils.checkpoint.checkpoint(self.of, logits, labels, use_reentrant=True)
        return CausalLMOutput(loss=loss, logits=logits)

    def of(self, logits, labels):
        """The cross-entropy of logits."""
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("kind", [OfFunction, Checkpointed])
def test_losses_that_an_autograd_function_makes(kind, monkeypatch):
    """It takes deferred logits for no tensor, and gave them no gradient."""
    monkeypatch.setattr(integration, "_warned", set())
    model = kind(llama().config).train()
    (plain := copy.deepcopy(model))(**BATCH).loss.backward()
    with pytest.warns(UserWarning, match=r"whole while training.*\(an autograd.Function\)"):
        patch_model(model)(**BATCH)
    for patched in (model, copy.deepcopy(model)):
        patched(**BATCH).loss.backward()
        torch.testing.assert_close([p.grad for p in patched.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("keywords", [dict(z_loss=0.1), dict(label_smoothing=0.1), dict(ignore_index=7)])
def test_keywords_of_a_loss_that_is_not_fused_are_refused(keywords):
    for kind in (Squared, OfFunction):
        model = patch_model(kind(llama().config), memory="minimal", **keywords)
        for training in (True, False):
            with pytest.raises(
                ValueError, match=f"{next(iter(keywords))}=.* is not used: {kind.__name__} makes its logits"
            ):
                model.train(training)(**BATCH)


def test_unknown_operations_are_made_and_said(is_own, monkeypatch):
    monkeypatch.setattr(integration, "_warned", set())
    model = Squared(llama().config).train()
    own = gradients(model)
    with pytest.warns(UserWarning, match=r"Squared makes its logits whole while training.*\(square\)") as said:
        is_own(patch_model(model), own)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        is_own(model, own)  # said once


def test_models_without_a_head_or_labels():
    class Bare(type(llama())):
        def forward(self, input_ids):
            return super().forward(input_ids)

    with pytest.raises(TypeError, match="Bare's forward takes no labels"):
        patch_model(Bare(llama().config))
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        patch_model(llama().model)
    for other in (torch.nn.Linear(3, 3), torch.nn.Sequential(llama()), "gpt2"):
        for of in (patch_model, check_head):
            with pytest.raises(ValueError, match=f"{type(other).__name__} is no model of Hugging Face"):
                of(other)
    with pytest.raises(ValueError, match="LlamaForCausalLM is a class: give a model of it"):
        patch_model(type(llama()))
    model = gpt2(60)
    model.set_output_embeddings(torch.nn.Embedding(60, 16))
    with pytest.raises(TypeError, match="Embedding, is LoRA or quantised or has a forward of its own"):
        patch_model(model)


# --- torch.compile


@pytest.mark.parametrize("make", [llama, gpt2])
def test_compiled(make, is_own):
    model = make(60).train()
    own, graphs = gradients(model), []

    def keep(graph, _):
        graphs.append(graph.graph)
        return graph.forward

    torch.compiler.reset()
    # without a cache: its configuration is more than torch 2.8's compiler traces
    is_own(torch.compile(patch_model(model), backend=keep, fullgraph=make is llama), own, use_cache=False)
    found = [node.meta.get("example_value") for graph in graphs for node in graph.nodes if node.op != "placeholder"]
    shapes = {tuple(x.shape) for x in found if isinstance(x, torch.Tensor)}
    assert (21, 16) in shapes and not {(3, 7, 60), (21, 60)} & shapes  # fused there too
    if make is llama:
        model.compile(backend="aot_eager")
        is_own(model, own, use_cache=False)


def trained(model, folder, keywords=None, **arguments):
    ids = torch.randint(2, 60, (12, 6), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": x, "labels": x} for x in ids]
    arguments = TrainingArguments(str(folder), **ARGUMENTS, **arguments)
    Trainer(model, arguments, train_dataset=data, **(keywords or {})).train()
    return model.lm_head.weight.detach()


def test_trainer_with_and_without(tmp_path):
    want = trained(gpt2(60), tmp_path)
    torch.compiler.reset()
    compiled = dict(torch_compile=True, torch_compile_backend="aot_eager")
    for model, keywords, more in ((patch_model(gpt2(60)), None, {}), (gpt2(60), dict(compute_loss_func=causal_loss), {}),
                                  (patch_model(gpt2(60)), None, compiled)):  # fmt: skip
        torch.testing.assert_close(trained(model, tmp_path, keywords, **more), want, atol=2e-5, rtol=1e-3)
    narrow = patch_model(gpt2(60))
    trained(narrow, tmp_path, bf16=True)
    undo_patch(narrow)
    assert narrow(torch.zeros(1, 2, dtype=torch.long)).logits.dtype == torch.float32


def _scaled_rows(module, args):
    return (args[0].mul(2) * 1.5, *args[1:])


#: A user's hooks on the head: each has one turn, with what the model's own call gives.
HEAD_HOOKS = {
    "scale": lambda module, args, logits: logits / 2, "in place": lambda module, args, logits: logits.div_(2),
    "vector": lambda module, args, logits: logits + torch.linspace(0, 1, logits.shape[-1]),
    "mask": lambda module, args, logits: logits.masked_fill(torch.arange(logits.shape[-1]) < 3, -1e4),
    "gradient": lambda module, args, logits: (logits.register_hook(lambda g: 2 * g), None)[1], "hidden": _scaled_rows,
    "looks": lambda module, args, logits: None,
}  # fmt: skip


@pytest.mark.parametrize("name", HEAD_HOOKS)
@pytest.mark.parametrize("patched_first", [False, True])
def test_hooks_of_the_head_have_one_turn(name, patched_first):
    found = []
    for patched in (False, True):
        model, calls = llama(), []
        head, own = model.get_output_embeddings(), HEAD_HOOKS[name]

        def hook(*given, own=own, calls=calls):
            calls.append(1)
            return own(*given)

        def register(head=head, hook=hook, own=own):
            (head.register_forward_pre_hook if own is _scaled_rows else head.register_forward_hook)(hook)

        if not patched_first:
            register()
        if patched:
            patch_model(model)
        if patched_first:
            register()
        ids = torch.arange(18).view(2, 9) % model.config.vocab_size
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert len(calls) == 1
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


#: Hooks of a user's that wait for the gradient of logits, or are of all modules: logits are made for them.
WAITING_HOOKS = {
    "backward": lambda head, see: head.register_full_backward_hook(lambda m, i, o: see(m, i)),
    "before backward": lambda head, see: head.register_full_backward_pre_hook(lambda m, o: see(m, o)),
    "of all": lambda head, see: nn.modules.module.register_module_forward_hook(lambda m, a, o: see(m, o)),
    "of all backward": lambda head, see: nn.modules.module.register_module_full_backward_hook(
        lambda m, i, o: see(m, i)
    ),
}


@pytest.mark.filterwarnings("ignore:.*makes its logits whole", "ignore:Full backward hook")
@pytest.mark.parametrize("name", WAITING_HOOKS)
def test_hooks_that_wait_for_logits_get_them(name):
    found = []
    for patched in (False, True):
        model, shapes = llama(), []
        head = model.get_output_embeddings()

        def doubled(module, values, head=head, shapes=shapes):
            if module is not head:
                return None
            tensors = values if isinstance(values, tuple) else (values,)
            shapes.append([x.shape for x in tensors])
            return tuple(2 * x for x in tensors) if isinstance(values, tuple) else 2 * values

        handle = WAITING_HOOKS[name](head, doubled)
        try:
            if patched:
                patch_model(model)
            ids = torch.arange(18).view(2, 9) % model.config.vocab_size
            loss = model(input_ids=ids, labels=ids).loss
            loss += 0  # as a mixture of experts adds its own
            loss.backward()
        finally:
            handle.remove()
        found.append((loss.detach(), shapes, [p.grad for p in model.parameters()]))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(*((loss, grads) for loss, _, grads in found), rtol=1e-4, atol=1e-6)
