"""f-DISTILL on sequences: exactness by enumeration, rows without logits, sampling, its cache, students from layers."""

import contextlib
import copy
import itertools
import resource

import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fdistill_kernels.divergences import TABLE
from fdistill_kernels.reference import f_divergence_rows
from fdistill_kernels.sequence import METHODS, Sampling, TeacherSamples, copy_layers, method_by_name, mixture
from fdistill_kernels.sequence.forward import forward_to_head, rows_of
from fdistill_kernels.sequence.hashes import fingerprint
from fdistill_kernels.sequence.losses import step_loss
from fdistill_kernels.sequence.metrics import risk, translation_scores
from fdistill_kernels.sequence.predistill import PUBLISHED, chosen_layers, predistillation_loss
from fdistill_kernels.sequence.samples import generation_settings
from fdistill_kernels.sequence.sampling import draw
from fdistill_kernels.sequence.teacher_forcing import teacher_forced
from fdistill_kernels.teachers.files import write_whole

from .conftest import WHOLE

BOS, EOS, V, LENGTH = 1, 0, 4, 3
TOKENS = dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)


def gpt2(v=V, layers=2, seed=0, **more):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=v, n_positions=32, n_embd=16, n_layer=layers, n_head=2, attn_pdrop=0,
                                      resid_pdrop=0, embd_pdrop=0, initializer_range=0.3, **TOKENS, **more)).eval()  # fmt: skip


def gpt2_64(*args, **keywords):
    """In float64, for which transformers before 4.52 makes masks of padding in its eager attention alone."""
    return gpt2(*args, **keywords, attn_implementation="eager").double()


def llama(v=60, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=v, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=64, **TOKENS)).eval()  # fmt: skip


def bart(v=60, encoder=4, decoder=4, seed=0):
    torch.manual_seed(seed)
    return BartForConditionalGeneration(BartConfig(
        vocab_size=v, d_model=16, encoder_layers=encoder, decoder_layers=decoder, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0,
        init_std=0.3, decoder_start_token_id=EOS, forced_eos_token_id=None, **TOKENS)).eval()  # fmt: skip


def t5(v=60, seed=0):
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(T5Config(vocab_size=v, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2,
                                               dropout_rate=0.0, decoder_start_token_id=EOS, **TOKENS)).eval()  # fmt: skip


def flat(model):
    """All of a model's parameters, as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batch(v=60, n=5):
    torch.manual_seed(3)
    prompts = [torch.randint(2, v, (k,)) for k in range(2, 2 + n)]
    return prompts, [torch.cat((torch.randint(2, v, (k,)), torch.tensor([EOS]))) for k in range(n, 0, -1)]


# --- exactness: every sequence of at most LENGTH tokens, an end token closing it


def all_sequences():
    for n in range(1, LENGTH + 1):
        for body in itertools.product(range(1, V), repeat=n - 1):
            yield torch.tensor([*body, EOS])
    for body in itertools.product(range(1, V), repeat=LENGTH):
        yield torch.tensor(body)


class Toy:
    """A pair of models, every sequence, and both models' probabilities of it."""

    def __init__(self):
        self.teacher, self.student = gpt2_64(seed=1), gpt2_64(seed=2)
        self.sequences = list(all_sequences())
        self.prompts = [torch.tensor([BOS])] * len(self.sequences)

    def log_probability(self, model):
        inputs, labels = teacher_forced(model, self.prompts, self.sequences, EOS)
        log_p = model(**inputs).logits.log_softmax(-1)
        steps = log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        return (steps * (labels >= 0)).sum(1)

    def steps(self):
        """log p, log q of every step of every sequence, and which sequence it is of."""
        inputs, labels = teacher_forced(self.teacher, self.prompts, self.sequences, EOS)
        of = torch.arange(len(labels))[:, None].expand_as(labels)[labels >= 0]
        return *(m(**inputs).logits[labels >= 0].log_softmax(-1) for m in (self.teacher, self.student)), of

    def word_level(self, name, **keywords):
        """The method's loss with each sequence weighed by its probability: the expectation, exactly."""
        total = 0
        for half in method_by_name(name):
            sampler = self.teacher if half.source == "teacher" else self.student
            probability = self.log_probability(sampler).exp().detach()
            with torch.no_grad():
                teacher, _ = rows_of(self.teacher, self.prompts, self.sequences, EOS)
            student, _ = rows_of(self.student, self.prompts, self.sequences, EOS)
            weight = probability.repeat_interleave(torch.tensor([len(s) for s in self.sequences]))
            total = total + half.weight * step_loss(student, teacher, half.divergence, token_weight=weight, **keywords)
        return total


def test_word_level_sums_are_the_sequence_level_divergences():
    toy = Toy()
    log_p, log_q = toy.log_probability(toy.teacher).detach(), toy.log_probability(toy.student).detach()
    p, q = log_p.exp(), log_q.exp()
    torch.testing.assert_close(p.sum(), torch.ones((), dtype=p.dtype))
    torch.testing.assert_close(toy.word_level("kl"), (p * (log_p - log_q)).sum())
    torch.testing.assert_close(toy.word_level("rkl"), (q * (log_q - log_p)).sum())
    entropy = -(q * log_q).sum()
    torch.testing.assert_close(toy.word_level("engine"), (q * (log_q - log_p)).sum() + entropy)
    # js: of the mixture made step by step; of the mixture of whole sequences it is an upper bound
    lp, lq, of = toy.steps()
    log_m = torch.logaddexp(lp, lq) - torch.tensor(2.0).log()
    tokens = torch.cat(toy.sequences)
    log_m = torch.zeros_like(log_p).index_add(0, of, log_m.gather(1, tokens[:, None])[:, 0]).detach()
    torch.testing.assert_close(toy.word_level("js"), (0.5 * p * (log_p - log_m) + 0.5 * q * (log_q - log_m)).sum())
    m = (p + q) / 2
    assert (0.5 * p * (log_p - m.log()) + 0.5 * q * (log_q - m.log())).sum() < toy.word_level("js")
    assert 0.5 * (p - q).abs().sum() < toy.word_level("tvd")
    assert (p - q).abs().sum() > 0.2  # the pair is not a trivial one


def test_gradient_of_kl_is_the_sequence_level_one():
    toy = Toy()
    p = toy.log_probability(toy.teacher).exp().detach()
    want = torch.autograd.grad((p * (p.log() - toy.log_probability(toy.student))).sum(), toy.student.parameters())
    got = torch.autograd.grad(toy.word_level("kl"), toy.student.parameters())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", ["kl", "rkl", "js", "tvd"])
def test_monte_carlo_converges(name):
    toy = Toy()
    exact = toy.word_level(name)
    weights = list(toy.student.parameters())
    exact_gradient = torch.autograd.grad(exact, weights[0])[0]
    sampling, n = Sampling(max_new_tokens=LENGTH), 4000
    prompts = [torch.tensor([BOS])] * n
    total = 0
    for half in method_by_name(name):
        sequences = draw(toy.teacher if half.source == "teacher" else toy.student, prompts, sampling, seed=5)
        with torch.no_grad():
            teacher, _ = rows_of(toy.teacher, prompts, sequences, EOS)
        student, _ = rows_of(toy.student, prompts, sequences, EOS)
        total = total + half.weight * step_loss(student, teacher, half.divergence) / n
    assert abs(total - exact) < 0.05 * exact
    gradient = torch.autograd.grad(total, weights[0])[0]
    assert (gradient - exact_gradient).norm() < 0.15 * exact_gradient.norm()


def test_methods_and_mixtures():
    assert {h.source for h in method_by_name("js", 0.85)} == {"teacher", "student"}
    assert [h.weight for h in method_by_name("tvd", 0.85)] == pytest.approx([0.15, 0.85])
    assert len(method_by_name("tvd", 0.0)) == 1 and set(METHODS) >= {"seqkd", "kl", "engine", "rkl", "js", "tvd"}
    assert [h.weight for h in mixture("gjs", student=0.7, gold=0.3)] == [0.7, 0.3]
    with pytest.raises(ValueError, match="unknown method 'jss'"):
        method_by_name("jss")
    with pytest.raises(ValueError, match="unknown sources"):
        mixture("kl", teachers=1.0)


# --- models


@pytest.mark.parametrize("make", [gpt2, llama, bart, t5])
def test_rows_are_what_the_logits_come_from(make):
    model = make(60)
    prompts, continuations = batch()
    inputs, labels = teacher_forced(model, prompts, continuations, EOS)
    logits = model(**inputs).logits[labels >= 0]
    rows, _ = rows_of(model, prompts, continuations, EOS)
    head = rows.head
    made = head.scale * rows.hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    torch.testing.assert_close(made, logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(rows.tokens, torch.cat(continuations))
    torch.testing.assert_close(model(**inputs).logits[labels >= 0], logits)  # the head is back


@pytest.mark.parametrize("make", [gpt2, llama])
def test_packing_changes_nothing(make):
    model = make(60)
    prompts, continuations = batch()
    want, _ = rows_of(model, prompts, continuations, EOS)
    got, _ = rows_of(model, prompts, continuations, EOS, pack=True)
    torch.testing.assert_close(got.hidden, want.hidden, atol=1e-5, rtol=1e-4)
    assert torch.equal(got.tokens, want.tokens)


def test_softcap_and_scale_of_architectures():
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    small = dict(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2, **TOKENS)  # fmt: skip
    gemma = Gemma2ForCausalLM(Gemma2Config(head_dim=8, final_logit_softcapping=0.5, **small)).eval()
    cohere = CohereForCausalLM(CohereConfig(logit_scale=0.25, **small)).eval()
    prompts, continuations = batch()
    for model in (gemma, cohere):
        inputs, labels = teacher_forced(model, prompts, continuations, EOS)
        expected = torch.nn.functional.cross_entropy(model(**inputs).logits[labels >= 0], torch.cat(continuations))
        rows, _ = rows_of(model, prompts, continuations, EOS)
        torch.testing.assert_close(step_loss(rows, None, None, reduction="mean"), expected)


def test_teachers_with_longer_prompts_padding_and_other_heads():
    student, teacher = gpt2(60, 1), gpt2(64, 2, seed=4)
    prompts, continuations = batch()
    longer = [torch.cat((torch.tensor([7, 8]), p)) for p in prompts]
    rows, _ = rows_of(student, prompts, continuations, EOS)
    with torch.no_grad():
        theirs, _ = rows_of(teacher, longer, continuations, EOS)
        inputs, labels = teacher_forced(teacher, longer, continuations, EOS)
        teacher_logits = teacher(**inputs).logits[labels >= 0][:, :60]
    inputs, labels = teacher_forced(student, prompts, continuations, EOS)
    expected = f_divergence_rows(student(**inputs).logits[labels >= 0], teacher_logits, "js").sum()
    torch.testing.assert_close(step_loss(rows, theirs, TABLE["js"]), expected)

    class Quantised(torch.nn.Linear):  # a head that is not a plain matrix
        def forward(self, hidden):
            return super().forward(hidden)

    for model, size in ((teacher, 64), (student, 60)):
        head = Quantised(16, size, bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head
    with torch.no_grad():
        theirs, _ = rows_of(teacher, longer, continuations, EOS)
    torch.testing.assert_close(step_loss(rows, theirs, TABLE["js"]), expected)
    with pytest.raises(ValueError, match="LoRA or quantised"):
        step_loss(rows_of(student, prompts, continuations, EOS)[0], theirs, TABLE["js"])


@pytest.mark.parametrize("make", [gpt2, bart, t5])
def test_no_logits_are_made_and_the_model_is_what_it_was(make):
    model = make(60)
    prompts, continuations = batch()
    inputs, _ = teacher_forced(model, prompts, continuations, EOS)
    want, shapes = model(**inputs).logits, []
    rows_of(model, prompts, continuations, EOS)  # a model's first batch is not its only one: it is asked for its steps

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            shapes.extend([made.shape] if isinstance(made, torch.Tensor) else [])
            return made

    with Shapes():
        result, outputs = forward_to_head(model, prompts, continuations, EOS, lambda rows: rows.hidden.sum())
    assert shapes and not any(shape[-1:] == (60,) and shape.numel() > 60 for shape in shapes)
    assert not outputs.logits.numel() and result.requires_grad
    assert torch.equal(model(**inputs).logits, want)


def test_what_losses_leave_in_a_model_is_compiled_with_it():
    model, ids = llama().eval(), torch.tensor([[3, 4, 5, 6]])
    want = model(input_ids=ids, use_cache=False).logits
    rows_of(model, *batch(), EOS)
    compiled = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), want)


def test_logits_of_another_form_are_refused_by_name():
    class Squared(GPT2LMHeadModel):
        def forward(self, *args, **inputs):
            outputs = super().forward(*args, **inputs)
            outputs.logits = outputs.logits.square()
            return outputs

    prompts, continuations = batch()
    with pytest.raises(ValueError, match=r"Squared's logits are not .* go through square"):
        rows_of(Squared(gpt2(60).config), prompts, continuations, EOS)


def test_models_that_look_ahead_or_at_padding_are_refused():
    """Their losses would be of predictions that know the answer, or of other sequences than the given ones."""
    small = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                 initializer_range=0.4)  # fmt: skip
    attending = dict(vocab_size=60, emb_dim=16, n_layers=2, n_heads=2, embed_init_std=0.4, init_std=0.4)
    left_padded = dict(vocab_size=60, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=32,
                       num_hidden_layers=2, prompt_types=4, prompt_length=2, init_std=0.4)  # fmt: skip
    prompts, continuations = batch()

    def rows(kind, **fields):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).train()
        found = rows_of(model, prompts, continuations, EOS)
        assert model.training
        return found

    for kind, fields in (("bert", small), ("electra", small), ("xlm", attending), ("cpmant", left_padded)):
        with pytest.raises(ValueError, match="looks at later tokens or at padding"):
            rows(kind, **fields)
    for kind, fields in (("bert", small), ("electra", small), ("xlm", {**attending, "causal": True})):
        rows(kind, **{"is_decoder": True, **fields})


@pytest.mark.parametrize("make", [llama, bart])
def test_quantised_teachers(make):
    student, teacher = make(seed=1), make(seed=2)
    if make is bart:
        teacher.final_logits_bias.normal_()
    prompts, continuations = batch()
    with torch.no_grad():
        teacher = torch.ao.quantization.quantize_dynamic(teacher, {torch.nn.Linear})
        assert callable(teacher.get_output_embeddings().weight)  # not a tensor
        inputs, labels = teacher_forced(teacher, prompts, continuations, EOS)
        teacher_logits = teacher(**inputs).logits[labels >= 0]
        theirs, _ = rows_of(teacher, prompts, continuations, EOS)
    assert len(draw(teacher, prompts, Sampling(4), 0)) == len(prompts) and fingerprint(teacher) == fingerprint(teacher)
    rows, _ = rows_of(student, prompts, continuations, EOS)
    inputs, labels = teacher_forced(student, prompts, continuations, EOS)
    expected = f_divergence_rows(student(**inputs).logits[labels >= 0], teacher_logits, "js").sum()
    torch.testing.assert_close(step_loss(rows, theirs, TABLE["js"]), expected, rtol=1e-2, atol=0)


class Codes(torch.Tensor):
    """A weight of 8-bit codes, as torchao's tensors are: of a plain ``nn.Linear``, and no matrix to be multiplied by."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            hidden, weight, *bias = args
            return func(hidden, weight.as_subclass(torch.Tensor).to(hidden.dtype) / 256, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_heads_of_quantised_tensors():
    student, teacher = llama(seed=1), llama(seed=2)
    codes = (teacher.lm_head.weight.detach() * 256).round().clamp(-128, 127).to(torch.int8)
    teacher.lm_head.weight = torch.nn.Parameter(codes.as_subclass(Codes), requires_grad=False)
    prompts, continuations = batch()
    with torch.no_grad():
        theirs, _ = rows_of(teacher, prompts, continuations, EOS)
        inputs, labels = teacher_forced(teacher, prompts, continuations, EOS)
        of_teacher, of_student = (m(**inputs).logits[labels >= 0] for m in (teacher, student))
        rows, _ = rows_of(student, prompts, continuations, EOS)
        expected = f_divergence_rows(of_student, of_teacher, "js").sum()
        torch.testing.assert_close(step_loss(rows, theirs, TABLE["js"]), expected, rtol=1e-3, atol=0)
        with pytest.raises(ValueError, match="LoRA or quantised"):
            step_loss(rows_of(teacher, prompts, continuations, EOS)[0], theirs, TABLE["js"])
    assert len(draw(teacher, prompts, Sampling(3), 0)) == len(prompts)


# --- sampling


@pytest.mark.parametrize("make", [gpt2, bart])
def test_samples_follow_the_model_and_their_seed(make):
    model = make(60)
    prompts, _ = batch()
    sampling = Sampling(max_new_tokens=6, top_k=5, top_p=0.9, temperature=0.8)
    one, two, other = (draw(model, prompts, sampling, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 5.0, 1
    model.generation_config.min_length = 20  # what the model came with for its own outputs
    assert all(torch.equal(a, b) for a, b in zip(one, draw(model, prompts, sampling, 1), strict=True))
    assert model.generation_config.repetition_penalty == 5
    assert all(len(row) <= 6 and (row[:-1] != EOS).all() for row in one)
    assert len(draw(model, prompts, Sampling(max_new_tokens=4, beams=3))) == len(prompts)
    with pytest.raises(ValueError, match="the model's context"):
        draw(make(60), prompts, Sampling(max_new_tokens=70))
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0.0)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match="no eos_token_id"):
        draw(model, prompts, sampling)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("make", [gpt2, bart])
@pytest.mark.parametrize("own", [
    dict(num_return_sequences=2), dict(num_beams=5, num_return_sequences=2), dict(do_sample=True, num_return_sequences=3),
    dict(return_dict_in_generate=True, output_scores=True), dict(prompt_lookup_num_tokens=3), dict(max_time=0.0),
    dict(penalty_alpha=0.5, top_k=4), dict(dola_layers="low"), dict(num_beam_groups=2, diversity_penalty=0.5),
    dict(low_memory=True),
], ids=lambda own: next(iter(own)))  # fmt: skip
def test_outputs_come_one_a_prompt_whatever_form_a_model_was_configured_for(own, make, beams):
    model, (prompts, _), searching = make(60), batch(), Sampling(max_new_tokens=5, beams=beams)
    known, key = draw(model, prompts, searching), generation_settings(model, searching)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    made = draw(model, prompts, searching)
    assert [row.tolist() for row in made] == [row.tolist() for row in known]
    assert all(getattr(model.generation_config, name) == value for name, value in own.items())
    assert generation_settings(model, searching) == key


@pytest.mark.parametrize("beams", [1, 2])
def test_tokens_that_a_configuration_suppresses_stay_so_beside_those_beyond_the_vocabulary(beams):
    model, (prompts, _), searching = gpt2(60), batch(), Sampling(max_new_tokens=5, beams=beams)
    suppressed = {int(row[0]) for row in draw(model, prompts, searching)}
    model.generation_config.suppress_tokens = sorted(suppressed)
    for vocabulary in (None, 50):
        made = {int(i) for row in draw(model, prompts, searching, vocabulary=vocabulary) for i in row}
        assert not made & suppressed and max(made) < (vocabulary or 60)


@pytest.mark.parametrize("own", [dict(stop_strings=["a"]), dict(token_healing=True), dict(force_words_ids=[[3]])],
                         ids=lambda own: next(iter(own)))  # fmt: skip
def test_outputs_that_cannot_be_made_are_refused_by_name(own):
    model, (prompts, _) = gpt2(60), batch()
    setattr(model.generation_config, *next(iter(own.items())))
    with pytest.raises(ValueError, match=f"GPT2LMHeadModel has {next(iter(own))} in its generation config"):
        draw(model, prompts, Sampling(max_new_tokens=5, beams=2))
    assert len(draw(model, prompts, Sampling(max_new_tokens=5))) == len(prompts)  # samples are of p itself


def test_cache_goes_on_after_a_kill_and_refuses_another_key(tmp_path, monkeypatch):
    monkeypatch.setattr("fdistill_kernels.sequence.samples.SHARD", 4)
    model, prompts = gpt2(60), [[5, 6, k] for k in range(2, 13)]
    settings = Sampling(max_new_tokens=5)

    def samples(folder, seed=0, sampling=settings):
        return TeacherSamples(folder, prompts, sampling, fingerprint(model), seed)

    list(samples(tmp_path / "whole").fill(model, batch=2))
    whole = samples(tmp_path / "whole").load()
    filling = samples(tmp_path / "killed").fill(model, batch=2)
    for _ in range(3):  # killed in the middle of the second shard
        next(filling)
    filling.close()
    again = samples(tmp_path / "killed")
    assert again.missing() == [1, 2]
    with pytest.raises(ValueError, match="2 of 3 shards"):
        again.load()
    assert list(again.fill(model, batch=2))[-1] == len(prompts)
    assert again.load() == whole and len(whole) == len(prompts)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        samples(tmp_path / "whole", seed=1)
    with pytest.raises(ValueError, match="top_k was 0 and is 3"):
        samples(tmp_path / "whole", sampling=Sampling(max_new_tokens=5, top_k=3))
    shards = again.shards()
    others = parquet_of(index=[4, 5, 6, 7]), parquet_of(index=[4, 5, 6, 7], sample_ids=[[1], [2], [3], [4]])
    for content in (b"", shards[0].read_bytes()[:-9], shards[0].read_bytes(), *others):
        shards[1].write_bytes(content)  # of a disk that failed, of the first shard, of other programs
        with pytest.raises(ValueError, match=r"shard-00001\.parquet is not what was written \(.*: remove it, and its"):
            again.load()
    shards[1].unlink()
    assert list(again.fill(model, batch=2)) and again.load() == whole
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):  # which is no damage
            again.load()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    content = shards[1].read_bytes()
    for place in range(0, 8 * len(content), 1 if WHOLE else 53):  # one bit alone: other samples are never read
        byte = content[place // 8] ^ (1 << place % 8)
        shards[1].write_bytes(content[: place // 8] + bytes([byte]) + content[place // 8 + 1 :])
        with contextlib.suppress(ValueError):
            assert again.load() == whole
    for content in ("{", "[]", '"text"'):
        (tmp_path / "whole" / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="is damaged"):
            samples(tmp_path / "whole")
    for content in ("{", "[]", "{}"):
        (tmp_path / "whole" / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="holds no whole for these prompts"):
            TeacherSamples.kept(tmp_path / "whole", prompts, {})


def parquet_of(**columns):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def test_full_disk_leaves_whole_files(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="could not be written"):
        write_whole(tmp_path / "x.parquet", b"1")
    assert not list(tmp_path.iterdir())


# --- students from layers


def test_layers_are_copied():
    assert chosen_layers(12, 3) == [0, 6, 11] and chosen_layers(4, 1) == [0] and chosen_layers(20, 2) == [0, 19]
    assert chosen_layers(24, 4) == [0, 8, 16, 23] and chosen_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    for (of, count), picked in PUBLISHED.items():
        assert picked == sorted(set(picked)) and len(picked) == count and picked[0] == 0 and picked[-1] < of
    teacher = bart()
    student = copy_layers(teacher, 3, 1)
    assert len(student.model.encoder.layers) == 3 and len(student.model.decoder.layers) == 1
    for i, j in enumerate(chosen_layers(4, 3)):
        assert torch.equal(student.model.encoder.layers[i].fc1.weight, teacher.model.encoder.layers[j].fc1.weight)
    assert torch.equal(student.model.shared.weight, teacher.model.shared.weight)
    for model in (gpt2(60, 4), llama()):
        assert copy_layers(model, 1).num_parameters() < model.num_parameters()
    assert len(copy_layers(t5(), 2, 1).decoder.block) == 1
    with pytest.raises(ValueError, match="takes 2 counts"):
        copy_layers(teacher, 3)
    with pytest.raises(ValueError, match="1 to 4"):
        copy_layers(teacher, 5, 1)
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PeftModel has an adapter, whose layers are not copied: merge it first"):
        copy_layers(adapted, 1)


@pytest.mark.parametrize("make, layers", [(bart, (3, 1)), (lambda: gpt2(60, 4), (2,))])
def test_predistillation_falls(make, layers, monkeypatch):
    teacher = make()
    student = copy_layers(teacher, *layers)
    prompts, targets = batch()
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = predistillation_loss(student, teacher, prompts, targets, EOS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    same = predistillation_loss(teacher, teacher, prompts, targets, EOS, weights=(0.8, 0.0))
    assert same.abs() < 1e-5
    monkeypatch.setattr("fdistill_kernels.sequence.predistill._matched", lambda *_: torch.tensor(float("inf")))
    assert predistillation_loss(student, teacher, prompts, targets, EOS, hidden_weight=0.0).isfinite()


@pytest.mark.parametrize("make, options", [(t5, {}), (lambda: gpt2_64(60, 4), {}), (bart, dict(hidden_normalize=False)),
                                           (bart, dict(hidden_reduction="sum", hidden_weight=0.1))])  # fmt: skip
def test_predistillation_is_its_formula(make, options):
    """In float64, of sequences one at a time: also of tokens that do not count."""
    teacher = make().double()
    student = copy_layers(teacher, *((3, 1) if make is bart else (2, 1) if make is t5 else (2,))).double()
    prompts, targets = batch()
    counted = [torch.arange(len(t)) % 3 != 1 for t in targets]
    got = predistillation_loss(student, teacher, prompts, targets, EOS, counted=counted, **options)
    total, count = torch.zeros(4, dtype=torch.float64), [0, 0, 0, 0]
    for p, t, m in zip(prompts, targets, counted, strict=True):
        inputs, labels = teacher_forced(student, [p], [t], EOS, counted=[m])
        ours, theirs = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
        log_q, log_p = (o.logits[labels >= 0].log_softmax(-1) for o in (ours, theirs))
        total[0] += (log_p.exp() * (log_p - log_q)).sum()
        total[1] -= log_q.gather(1, t[m][:, None]).sum()
        own = {"decoder_hidden_states": m, "encoder_hidden_states": torch.ones_like(p, dtype=torch.bool)}
        if make not in (bart, t5):
            own = {"hidden_states": torch.cat((torch.ones_like(p, dtype=torch.bool), m))}
        for i, (name, mask) in enumerate(own.items()):
            states, of = getattr(ours, name), getattr(theirs, name)
            for layer in range(1, len(states)):
                x, y = states[layer][0][mask], of[round(layer * (len(of) - 1) / (len(states) - 1))][0][mask]
                if options.get("hidden_normalize", True):
                    x, y = ((z - z.mean(-1, True)) * (z.var(-1, False, keepdim=True) + 1e-5).rsqrt() for z in (x, y))
                share = 1 if options.get("hidden_reduction") == "sum" else 1 / (len(states) - 1)
                total[2 + i] += share * (x - y).square().mean(-1).sum()
            count[2 + i] += int(mask.sum())
        count[0] = count[1] = count[0] + int(m.sum())
    terms = total / torch.tensor(count).clamp_min(1)
    hidden = options.get("hidden_weight", 3.0) * terms[2:].sum()
    torch.testing.assert_close(got, 0.8 * terms[0] + 0.2 * terms[1] + hidden)
    if not options:
        assert hidden < 0.9 * got  # of states that are not normalised it is all but everything
    with pytest.raises(ValueError, match="hidden_reduction must be mean or sum, not 'max'"):
        predistillation_loss(student, teacher, prompts, targets, EOS, hidden_reduction="max")
    for wrong in (dict(weights=(0.0, 1.0)), dict(hidden_weight=-1.0)):
        with pytest.raises(ValueError, match=r"the weight of the KL must be positive, not .* at least 0, not"):
            predistillation_loss(student, teacher, prompts, targets, EOS, **wrong)


def test_hidden_states_that_are_not_one_vector_for_each_token_are_refused():
    from transformers import PegasusXConfig, PegasusXForConditionalGeneration

    model = PegasusXForConditionalGeneration(PegasusXConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_attention_heads=2, decoder_ffn_dim=32, num_global_tokens=2, block_size=8))  # fmt: skip
    prompts, targets = batch()
    with pytest.raises(ValueError, match="PegasusXForConditionalGeneration's hidden states are not"):
        predistillation_loss(model, model, prompts, targets, EOS)
    assert predistillation_loss(model, model, prompts, targets, EOS, hidden_weight=0).isfinite()


def test_layers_with_settings_or_shapes_of_their_own():
    from transformers import (
        GPTNeoXJapaneseConfig,
        GPTNeoXJapaneseForCausalLM,
        LEDConfig,
        LEDForConditionalGeneration,
        MambaConfig,
        MambaForCausalLM,
        ProphetNetConfig,
        ProphetNetForConditionalGeneration,
    )

    led = LEDForConditionalGeneration(LEDConfig(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_attention_heads=2, decoder_ffn_dim=32, attention_window=[4, 8], max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32))  # fmt: skip
    assert copy_layers(led, 1, 2).config.attention_window == [4] and len(copy_layers(led, 2, 1).led.decoder.layers) == 1
    small = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2)
    assert copy_layers(MambaForCausalLM(MambaConfig(**small, state_size=4)), 1).config.num_hidden_layers == 1
    japanese = GPTNeoXJapaneseForCausalLM(GPTNeoXJapaneseConfig(**small, num_attention_heads=2))
    with pytest.raises(ValueError, match="layers differ"):
        copy_layers(japanese, 1)
    prophet = ProphetNetForConditionalGeneration(ProphetNetConfig(
        vocab_size=60, hidden_size=16, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=2,
        num_decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32))  # fmt: skip
    student = copy_layers(prophet, 1, 2)
    assert len(student.prophetnet.encoder.layers) == 1 and len(student.prophetnet.decoder.layers) == 2
    prophet.config.is_encoder_decoder = False
    with pytest.raises(ValueError, match=r"ProphetNetConfig: This model does not support .* Copy its layers yourself"):
        copy_layers(prophet, 1)


def test_layers_that_depend_on_their_place_are_no_copies():
    """GPT-2's attention may be divided by a layer's number, and DiffLlama's λ begins by it."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    for dtype in (torch.float32, torch.bfloat16):
        copy_layers(gpt2(60, 4).to(dtype), 2)
        teacher = gpt2(60, 4, scale_attn_by_inverse_layer_idx=True, attn_implementation="eager").to(dtype)
        with pytest.raises(ValueError, match=r"GPT2LMHeadModel's layers depend .*: transformer\.h\.1 of the student"):
            copy_layers(teacher, 2)
        assert copy_layers(teacher, 4).config.n_layer == 4
    differential = DiffLlamaForCausalLM(DiffLlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.4))  # fmt: skip
    with pytest.raises(ValueError, match=r"DiffLlamaForCausalLM's layers depend .*: model\.layers\.1 of the student"):
        copy_layers(differential, 2)


def test_layers_that_a_configuration_counts_twice_are_refused_before_the_student_is_trained():
    """Its numbers belong together, so that a saved student's configuration could not be read again."""

    class Counted(LlamaConfig):
        def __init__(self, first=1, then=1, **more):
            super().__init__(**more)
            self.first, self.then = first, then
            if first + then != self.num_hidden_layers:
                raise TypeError("first and then must be all layers")

    small = dict(vocab_size=60, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    teacher = LlamaForCausalLM(Counted(num_hidden_layers=2, **small))
    with pytest.raises(ValueError, match=r"Counted does not go with fewer layers .first and then must"):
        copy_layers(teacher, 1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["LoraConfig", "PromptTuningConfig"])
def test_a_student_whose_adapter_is_off_is_its_teacher(kind, tmp_path):
    import peft

    from fdistill_kernels.sequence.teachers import Itself

    from .test_trainer import data, trainer

    base, (prompts, continuations) = llama(seed=1), batch()
    want, _ = rows_of(base, prompts, continuations, EOS)
    drawn = draw(base, prompts, Sampling(4, beams=1))
    more = dict(num_virtual_tokens=3)
    if kind == "LoraConfig":
        more = dict(target_modules=["q_proj"], modules_to_save=["lm_head"])
    student = peft.get_peft_model(copy.deepcopy(base), getattr(peft, kind)(task_type="CAUSAL_LM", **more)).train()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.requires_grad else None
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    teacher = Itself(adapter=False)
    teacher.bind(student)
    found = teacher.rows(prompts, continuations, torch.device("cpu")).value
    torch.testing.assert_close(found.states, want.hidden)
    assert torch.equal(found.head.weight, want.head.weight) and not found.head.weight.requires_grad
    assert [x.tolist() for x in teacher.draw(prompts, Sampling(4, beams=1), 60)] == [x.tolist() for x in drawn]
    assert student.training and trained == [name for name, p in student.named_parameters() if p.requires_grad]
    run = trainer(tmp_path, student, Itself(adapter=False), data(), divergence="kl", max_steps=6, learning_rate=3e-2)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert 0 < run.evaluate()["eval_loss"] < before  # it comes back to what it was made of
    with pytest.raises(ValueError, match="makes it, and the student is a LlamaForCausalLM"):
        Itself(adapter=False).bind(base)
    with pytest.raises(ValueError, match="not both"):
        Itself(decay=0.5, adapter=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [llama, t5])
def test_what_adalora_adds_to_a_loss(make):
    """As much as to the model's own loss; nothing where no gradients are asked for."""
    from peft import AdaLoraConfig, get_peft_model

    (p, *_), (c, *_) = batch()
    student = get_peft_model(make(), AdaLoraConfig(total_step=9, target_modules=["q_proj" if make is llama else "q"],
                                                   task_type="CAUSAL_LM" if make is llama else "SEQ_2_SEQ_LM"))  # fmt: skip
    own = dict(input_ids=torch.cat((p, c))[None]) if make is llama else dict(input_ids=p[None], labels=c[None])
    found = student(**{"labels": own["input_ids"], **own})
    labels = own["input_ids"][0, 1:] if make is llama else c
    added = found.loss - torch.nn.functional.cross_entropy(found.logits[0, : len(labels)], labels)
    _, outputs = forward_to_head(student, [p], [c], EOS, lambda rows: rows.hidden.sum())
    assert added > 0.1
    torch.testing.assert_close(outputs.loss, added, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert forward_to_head(student, [p], [c], EOS, lambda rows: rows.hidden.sum())[1].get("loss") is None


@pytest.mark.parametrize("kind", ["Mixtral", "SwitchTransformers"])
def test_auxiliary_losses_of_experts(kind):
    """The model's own, with its own coefficients: its loss without its cross-entropy."""
    import transformers

    small = dict(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **TOKENS,
                 num_key_value_heads=2, num_local_experts=4, num_experts=4, output_router_logits=True, d_model=16, d_ff=32,
                 router_aux_loss_coef=0.3, d_kv=8, num_layers=2, num_heads=2, num_sparse_encoder_layers=1, dropout_rate=0.0,
                 num_sparse_decoder_layers=1, decoder_start_token_id=EOS, initializer_range=0.4, router_z_loss_coef=0.1,
                 router_jitter_noise=0.0, num_decoder_layers=2)  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**small)
    form = "ForCausalLM" if kind == "Mixtral" else "ForConditionalGeneration"
    torch.manual_seed(0)
    model = getattr(transformers, kind + form)(config).eval()
    prompts, continuations = batch()
    loss, outputs = forward_to_head(model, prompts, continuations, EOS, lambda rows: step_loss(rows, None, None))
    inputs, labels = teacher_forced(model, prompts, continuations, EOS)
    own = model(**inputs, labels=labels, output_router_logits=True)
    logits = own.logits if kind != "Mixtral" else own.logits[:, :-1]
    entropy = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), (labels if kind != "Mixtral" else labels[:, 1:]).flatten())  # fmt: skip
    torch.testing.assert_close(outputs.loss, own.loss - entropy)
    warm = [predistillation_loss(model, copy.deepcopy(model), prompts, continuations, EOS)]
    model.config.output_router_logits = False
    warm.append(predistillation_loss(model, copy.deepcopy(model), prompts, continuations, EOS))
    model.config.output_router_logits = True
    torch.testing.assert_close(warm[0] - warm[1], outputs.loss)
    assert outputs.loss > 0.01
    routers = [p for name, p in model.named_parameters() if "router" in name or name.endswith("gate.weight")]
    gradients = (torch.autograd.grad(x, routers, retain_graph=True)
                 for x in (loss + outputs.loss, loss, own.loss - entropy))  # fmt: skip
    for both, one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(both, one + other)
    with torch.no_grad():
        assert forward_to_head(model, prompts, continuations, EOS, lambda rows: rows.hidden.sum())[1].loss is None
    assert len(draw(model, prompts, Sampling(3), 0)) == len(prompts) and model.config.output_router_logits


def test_measures():
    model = gpt2(60)
    prompts, continuations = batch()
    inputs, labels = teacher_forced(model, prompts, continuations, EOS)
    want = torch.nn.functional.cross_entropy(model(**inputs).logits[labels >= 0], torch.cat(continuations))
    assert risk(model, prompts, continuations) == pytest.approx(want.item(), rel=1e-5)
    scores = translation_scores(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert scores["bleu"] == pytest.approx(100) and scores["ter"] == 0
