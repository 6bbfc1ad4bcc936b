"""What a model reads and is asked about in the loss: the tokens that count, and what generation begins with."""

import pytest
import torch
import transformers
from datasets import Dataset

import fdistill_kernels as fk
from fdistill_kernels.divergences import TABLE
from fdistill_kernels.sequence import sampling
from fdistill_kernels.sequence.dataset_checks import _check_contexts
from fdistill_kernels.sequence.forward import forward_to_head, rows_of
from fdistill_kernels.sequence.generation import chosen
from fdistill_kernels.sequence.losses import step_loss
from fdistill_kernels.sequence.models import context
from fdistill_kernels.sequence.sampling import Sampling, _until_end, draw, drawn_by_forward
from fdistill_kernels.sequence.teacher_forcing import padded, teacher_forced, unpadded
from fdistill_kernels.sequence.teachers import InRoom, Itself, Mixture, OfRows, Stored, teacher_of
from fdistill_kernels.sequence.teachers.base import logits_function

from .test_sequence import EOS, bart, batch, gpt2, llama, t5

CPU = torch.device("cpu")
PROMPTS, TARGETS = batch()
#: Every other token, none of the second sequence, all of the last.
COUNTED = [torch.arange(len(t)) % 2 == 0 for t in TARGETS[:1]] + [torch.zeros(len(TARGETS[1]), dtype=torch.bool)] + [
    torch.arange(len(t)) % 2 == 1 for t in TARGETS[2:-1]] + [torch.ones(len(TARGETS[-1]), dtype=torch.bool)]  # fmt: skip
HERE = torch.cat(COUNTED)


@pytest.mark.parametrize("make, options", [(llama, {}), (llama, dict(pack=True)), (bart, {}),
                                           (t5, {})])  # fmt: skip
def test_tokens_that_do_not_count_are_read(make, options):
    model = make(60)
    every, _ = rows_of(model, PROMPTS, TARGETS, EOS, **options)
    found, _ = rows_of(model, PROMPTS, TARGETS, EOS, counted=COUNTED, **options)
    torch.testing.assert_close(found.hidden, every.hidden[HERE])
    assert torch.equal(found.tokens, torch.cat(TARGETS)[HERE])
    none = [torch.zeros_like(m) for m in COUNTED]
    loss, _ = forward_to_head(model, PROMPTS, TARGETS, EOS, lambda rows: step_loss(rows, None, None), counted=none)
    assert loss == 0 and loss.requires_grad
    for wrong in (COUNTED[:-1], [m[:1] for m in COUNTED], [m.long() for m in COUNTED]):
        with pytest.raises(ValueError, match="counted must have a bool for each token"):
            teacher_forced(model, PROMPTS, TARGETS, EOS, counted=wrong)


@pytest.mark.parametrize("kind", ["room", "itself", "hidden", "top_k", "mixture", "of rows"])
def test_teachers_leave_out_rows_that_do_not_count(kind, tmp_path):
    model, student = llama(seed=2), llama(seed=1)
    room = InRoom(model)
    teacher = {"room": lambda: room, "itself": Itself, "mixture": lambda: Mixture([model, gpt2(60)]),
               "of rows": lambda: OfRows({"a": model, "b": gpt2(60)})}.get(kind)  # fmt: skip
    if teacher is None:
        head = room.rows(PROMPTS, TARGETS, CPU).value.head
        store = fk.TeacherStore.create(tmp_path, kind=kind, vocabulary=60, key={},
                                       **({"head": head, "states": "float32"} if kind == "hidden" else {"k": 8}))  # fmt: skip
        with store.writer() as writer:
            for prompt, target in zip(PROMPTS, TARGETS, strict=True):
                rows = room.rows([prompt], [target], CPU)
                listed = fk.top_k_of(logits_function(rows, CPU)(0, len(target)), 8)
                writer.add(prompt.tolist(), target.tolist(), rows.value.states if kind == "hidden" else listed)
        teacher = Stored(fk.TeacherStore(tmp_path))
    else:
        teacher = teacher()
    if kind == "itself":
        teacher.bind(model)
    if kind == "of rows":
        teacher.choose(["b", "a", "a", "b", "a"])
    every, found = (teacher.rows(PROMPTS, TARGETS, CPU, counted=counted) for counted in (None, COUNTED))
    losses = []
    for rows, counted in ((every, None), (found, COUNTED)):
        ours, _ = rows_of(student, PROMPTS, TARGETS, EOS, counted=counted)
        losses.append(step_loss(ours, rows, TABLE["kl"], reduction="none"))
    torch.testing.assert_close(losses[1], losses[0][HERE])


# --- what generation begins with


LANGUAGE = 7
SMALL = dict(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, init_std=0.6,
             decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0,
             hidden_size=16, num_layers=1, num_heads=2, d_kv=8, d_ff=32, initializer_range=0.4, initializer_factor=2.0,
             bos_token_id=0, pad_token_id=1, eos_token_id=2, forced_eos_token_id=None)  # fmt: skip
#: What checkpoints of these families begin with: a start token, and maybe a language that is forced.
FAMILIES = {
    "MBart cc25": ("MBart", dict(decoder_start_token_id=LANGUAGE)),
    "MBart-50": ("MBart", dict(decoder_start_token_id=2, forced_bos_token_id=LANGUAGE)),
    "NLLB": ("M2M100", dict(decoder_start_token_id=2, forced_bos_token_id=LANGUAGE)),
    "PLBart": ("PLBart", dict(decoder_start_token_id=LANGUAGE)), "BART": ("Bart", dict(decoder_start_token_id=2)),
    "BART forced": ("Bart", dict(decoder_start_token_id=2, forced_bos_token_id=0)),
    "T5": ("T5", dict(decoder_start_token_id=1)), "Pegasus": ("Pegasus", dict(decoder_start_token_id=1)),
    "Marian": ("Marian", dict(decoder_start_token_id=1)), "no start token": ("Bart", dict(decoder_start_token_id=None)),
    "SeamlessM4T": ("SeamlessM4T", dict(decoder_start_token_id=LANGUAGE)),
}  # fmt: skip


def of_family(name, seed=0):
    kind, more = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    forward = {"Marian": "MTModel", "SeamlessM4T": "ForTextToText"}.get(kind, "ForConditionalGeneration")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}{forward}")(config).eval()
    for token, value in {"forced_bos_token_id": None, **more}.items():
        setattr(model.generation_config, token, value)  # as checkpoints' own files have it
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_teacher_forcing_begins_with_what_generation_begins_with(name):
    model = of_family(name)
    inputs, ends = padded(PROMPTS, 1), [2]
    said = model.generate(inputs, attention_mask=(inputs != 1).long(), do_sample=False, num_beams=1, max_new_tokens=5,
                          output_logits=True, return_dict_in_generate=True)  # fmt: skip
    drawn = draw(model, PROMPTS, Sampling(5, beams=1))
    assert [row.tolist() for row in drawn] == [_until_end(row[1:], ends).tolist() for row in said.sequences]
    free = chosen(model, drawn)
    forced = FAMILIES[name][1].get("forced_bos_token_id")
    kept = None if forced is None else [[i > 0 for i in range(len(d))] for d in drawn]
    assert (free and [m.tolist() for m in free]) == kept
    rows, _ = rows_of(model, PROMPTS, drawn, 1, counted=free)
    want = [torch.stack(said.logits)[forced is not None : len(d), i] for i, d in enumerate(drawn)]
    torch.testing.assert_close(rows.logits(rows.hidden), torch.cat(want), atol=1e-4, rtol=1e-4)
    if forced is not None:  # another first token is a choice; and what does not count stays so
        assert chosen(model, [torch.tensor([9, 3])])[0].all()
        assert not chosen(model, [torch.tensor([forced, 3])], [torch.tensor([True, False])])[0].any()


def test_several_start_tokens_are_refused():
    model = of_family("BART")
    model.generation_config.decoder_start_token_id = [2, 3]
    with pytest.raises(ValueError, match="BartForConditionalGeneration needs one decoder_start_token_id"):
        teacher_forced(model, PROMPTS, TARGETS, 1)


def test_models_whose_generate_says_otherwise_are_drawn_by_their_forward(monkeypatch):
    """RoBERTa's positions begin behind its padding id, and RWKV's state has seen the padding."""
    small = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                 bos_token_id=0, pad_token_id=1, eos_token_id=2, attention_hidden_size=16,
                 num_key_value_heads=2, initializer_range=0.6)  # fmt: skip
    torch.manual_seed(0)
    models = [transformers.RobertaForCausalLM(transformers.RobertaConfig(is_decoder=True, **small)),
              transformers.RwkvForCausalLM(transformers.RwkvConfig(**small)), llama()]  # fmt: skip
    by_forward = []
    monkeypatch.setattr(sampling, "drawn_by_forward", lambda *a: by_forward.append(a[0]) or drawn_by_forward(*a))
    for model in models:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.4 * torch.randn_like(p)) if p.dim() > 1 else None
        drawn = draw(model.eval(), PROMPTS, Sampling(5, beams=1))
        ends = [2, int(drawn[0][1])]  # one that its configuration does not know
        model.generation_config.eos_token_id = ends
        until = draw(model, PROMPTS, Sampling(5, beams=1))
        assert [u.tolist() for u in until] == [_until_end(row, ends).tolist() for row in drawn] and len(until[0]) <= 2
        for prompt, row in zip(PROMPTS, drawn, strict=True):
            for i, token in enumerate(row):
                assert model(input_ids=torch.cat((prompt, row[:i]))[None]).logits[0, -1].argmax() == token
    assert by_forward == [models[0]] * 2 + [models[1]] * 2
    with pytest.raises(ValueError, match="RobertaForCausalLM fails with one or says otherwise"):
        draw(models[0], PROMPTS, Sampling(5, beams=2))


@pytest.mark.parametrize("kind, usable", [("Roberta", 18), ("XLMRobertaXL", 18), ("Bert", 20)])
def test_a_context_is_the_positions_behind_those_that_padding_takes(kind, usable):
    small = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                 bos_token_id=0, pad_token_id=1, eos_token_id=2, max_position_embeddings=20, is_decoder=True)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**small)).eval()
    assert context(model) == context(model.config) == usable
    model(input_ids=torch.full((1, usable), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, usable + 1), 5))


def test_contexts_that_configurations_name_otherwise():
    special = dict(eos_token_id=2, pad_token_id=1, vocab_size=20)
    of_mpt = transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=8, **special)
    mpt = transformers.MptForCausalLM(of_mpt)
    with pytest.raises(ValueError, match="has 9 tokens, the model's context 8"):
        draw(mpt, [torch.full((5,), 3)], Sampling(4))
    small = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                 encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20, attention_window=4)  # fmt: skip
    led = transformers.LEDForConditionalGeneration(
        transformers.LEDConfig(max_encoder_position_embeddings=16, max_decoder_position_embeddings=8, **small)
    )
    prompt, target = torch.full((16,), 3), torch.full((8,), 3)
    teacher_forced(led, [prompt], [target], 1)
    for pair, words in (((torch.full((17,), 3), target), "17 tokens.* 16"), ((prompt, torch.full((9,), 3)), "9 .* 8")):
        with pytest.raises(ValueError, match=words):
            teacher_forced(led, *([x] for x in pair), 1)
    ids = dict(prompt_ids=[[3] * 16] * 2, labels=[[3] * 8, [3] * 9])
    with pytest.raises(ValueError, match="row 1's prompt_ids with its labels has 9 tokens, the student's context 8"):
        _check_contexts("data", Dataset.from_dict(ids), "prompt_ids", "labels", 4, "the student's", led)


def test_a_cache_that_is_named_is_used_or_refused_and_rounding_is_no_difference(monkeypatch):
    with pytest.raises(ValueError, match=r"Bart.* does not generate with cache_implementation='quantized'"):
        draw(of_family("BART"), PROMPTS, Sampling(5, cache="quantized"))
    for dtype, factor, goes_on in ((torch.float32, 1.05, False), (torch.bfloat16, 1.05, True),
                                   (torch.bfloat16, 1.5, False)):  # fmt: skip
        model, by_forward = llama().to(dtype), []
        generate = model.generate

        def other(generate=generate, factor=factor, **given):
            made = generate(**given)
            if given.get("output_logits"):
                made.logits = tuple(x * factor for x in made.logits)
            return made

        monkeypatch.setattr(model, "generate", other)
        noted = lambda *a, to=by_forward: to.append(a) or drawn_by_forward(*a)  # noqa: E731
        monkeypatch.setattr(sampling, "drawn_by_forward", noted)
        draw(model, PROMPTS, Sampling(5))
        assert bool(by_forward) != goes_on
        if not goes_on:
            with pytest.raises(ValueError, match=r"cache_implementation='static' is not used: Llama.* is drawn"):
                draw(model, PROMPTS, Sampling(5, cache="static"))


def test_rows_with_holes_are_refused():
    ids = torch.tensor([[-100, 3, 4], [5, 6, -100], [-100, -100, -100]])
    assert [row.tolist() for row in unpadded(ids)] == [[3, 4], [5, 6], []]
    with pytest.raises(ValueError, match="−100 between its tokens"):
        unpadded(torch.tensor([[3, 4, 5], [3, -100, 5]]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["LoraConfig", "PromptTuningConfig"])
def test_an_adapters_folder_is_a_teacher(kind, tmp_path):
    import peft

    more = dict(target_modules=["q_proj"]) if kind == "LoraConfig" else dict(num_virtual_tokens=3)

    llama(seed=2).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.requires_grad else None
    model.save_pretrained(tmp_path / "adapter")
    of_folders = (teacher_of(str(tmp_path / name)) for name in ("adapter", "base"))
    loaded, of_base = (teacher.rows(PROMPTS, TARGETS, CPU).value.states for teacher in of_folders)
    torch.testing.assert_close(loaded, InRoom(model).rows(PROMPTS, TARGETS, CPU).value.states)
    assert (loaded - of_base).abs().max() > 1e-2
