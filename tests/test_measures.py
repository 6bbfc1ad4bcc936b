"""Measures of a student, sentence by sentence, against a plain float64 computation."""

import copy
import math

import pyarrow.parquet
import pytest
import sacrebleu
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fdistill_kernels.sequence import Sampling, metrics
from fdistill_kernels.sequence.metrics import distinct_bigrams, measured, risk, sentence_sums, teacher_dist
from fdistill_kernels.sequence.samples import write_table
from fdistill_kernels.sequence.sampling import draw

from .test_sequence import EOS, bart, llama

V, NEW = 60, 7


def words():
    made = Tokenizer(models.WordLevel({"</s>": 0, **{f"w{i}": i for i in range(1, V)}}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")


def prompts(n):
    return [torch.randint(2, V, (2 + i % 4,)) for i in range(n)]


def log_probs(model, prompt, y):
    """(L, V) by the model's own forward of one sentence."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = torch.tensor([model.config.decoder_start_token_id])
            logits = model(input_ids=prompt[None], decoder_input_ids=torch.cat((start, y[:-1]))[None]).logits[0]
        else:
            logits = model(input_ids=torch.cat((prompt, y))[None]).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(1)


def nats(model, prompt, y):
    return float(-log_probs(model, prompt, y).gather(1, y[:, None]).sum())


@pytest.mark.parametrize("make", [bart, llama])
def test_every_sentence_is_what_float64_says(make, tmp_path):
    student, teacher = make(V, seed=1).double(), make(V, seed=2).double()
    n, sampling, tokenizer = 35, Sampling(NEW, top_p=0.9), words()  # a whole batch and a part
    asked, gold = prompts(n), [torch.cat((p[:3], torch.tensor([EOS]))) for p in prompts(n)]
    longer = [torch.cat((torch.tensor([5]), p)) for p in asked]  # what the teacher sees
    references = ["w3 w4 w5 w6 w7"] * n
    table, summary = measured(student, teacher, asked, longer, gold, references, tokenizer, sampling, 3, 2)
    rows = table.to_pylist()
    own = metrics.draw_all(student, asked, sampling, 3)
    theirs = [metrics.draw_all(teacher, longer, sampling, 3 + 1_000_003 * i) for i in range(2)]
    for i, row in enumerate(rows):
        y, drawn = theirs[0][i], own[i]
        assert row["gold_nats"] == pytest.approx(nats(student, asked[i], gold[i]), rel=1e-10)
        assert row["likelihood_nats"] == pytest.approx(nats(teacher, longer[i], drawn), rel=1e-10)
        assert row["coverage_nats"] == pytest.approx(nats(student, asked[i], y), rel=1e-10)
        for name, of in (("gold", gold[i]), ("likelihood", drawn), ("coverage", y)):
            assert row[f"{name}_tokens"] == len(of)
        log_q, log_p = log_probs(student, asked[i], y), log_probs(teacher, longer[i], y)
        assert row["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-9)
        assert row["tvd"] == pytest.approx(float((log_p.exp() - log_q.exp()).abs().sum() / 2), rel=1e-9)
        log_q, log_p = log_probs(student, asked[i], drawn), log_probs(teacher, longer[i], drawn)
        assert row["rkl"] == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum()), rel=1e-9)
        assert row["likelihood_ended"] == (int(drawn[-1]) == EOS)
        output = student.generate(asked[i][None], do_sample=False, max_new_tokens=NEW)[0]
        output = output[1 if student.config.is_encoder_decoder else len(asked[i]) :].tolist()
        assert row["output"] == tokenizer.decode(output, skip_special_tokens=True)
        assert (row["output_tokens"], row["output_ended"]) == (len(output), output[-1] == EOS)
        bigrams = list(zip(*([x for x in output if x != EOS][j:] for j in (0, 1)), strict=False))
        assert row["output_loops"] == (bool(bigrams) and len(set(bigrams)) / len(bigrams) < 0.7)

    def total(name):
        return math.fsum(row[name] for row in rows)

    for name in ("likelihood", "coverage"):
        assert summary[f"{name}_risk"] == pytest.approx(total(f"{name}_nats") / total(f"{name}_tokens"), rel=1e-12)
        assert summary[f"{name}_risk_by_sentence"] == pytest.approx(total(f"{name}_nats") / n, rel=1e-12)
    assert summary["perplexity"] == pytest.approx(math.exp(total("gold_nats") / total("gold_tokens")), rel=1e-6)
    assert summary["rkl"] == pytest.approx(total("rkl") / total("likelihood_tokens"), rel=1e-12)
    assert summary["without_end"] == pytest.approx(1 - total("output_ended") / n)
    assert summary["looping"] == total("output_loops") / n
    assert summary["length_ratio"] == sum(len(row["output"].split()) for row in rows) / (5 * n)
    outputs = [row["output"] for row in rows]
    assert summary["bleu"] == sacrebleu.corpus_bleu(outputs, [references]).score
    groups = [[y.tolist() for y in group] for group in zip(*theirs, strict=True)]
    assert summary["teacher_dist"] == pytest.approx(teacher_dist(groups, [EOS]))
    write_table(table, tmp_path / "sentences.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "sentences.parquet").equals(table)


def test_without_a_teacher_and_as_before():
    student, asked = llama(V), prompts(3)
    gold = [torch.tensor([7, EOS])] * 3
    arguments = (asked, asked, gold, ["w3"] * 3, words(), Sampling(NEW))
    table, summary = measured(student, None, *arguments)
    assert "coverage_nats" not in table.column_names and "kl" not in summary and summary["perplexity"] > 1
    _, found = measured(student, student, *arguments, teacher_draws=1)
    assert all(isinstance(x, float) for x in found.values()) and "teacher_dist" not in found
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["likelihood_risk"] == found["coverage_risk"]
    assert student.training is False


def test_an_end_that_is_forced_at_the_limit_is_none():
    model, asked = bart(V), prompts(4)
    ended = metrics.searched(model, asked, words(), NEW)["output_ended"]
    model.generation_config.forced_eos_token_id = EOS
    assert metrics.searched(model, asked, words(), NEW)["output_ended"] == ended != [True] * 4
    with pytest.raises(ValueError, match="teacher_draws must be at least 1, not 0"):
        measured(model, model, asked, asked, asked, [""] * 4, words(), Sampling(NEW), teacher_draws=0)


def test_rows_that_are_not_as_many_are_refused_by_name():
    model, some = bart(V), prompts(2)
    for rows, counts in (((some, some, some[:1], ["", ""]), "2, 2, 1, 2"), (([], [], [], []), "0, 0, 0, 0")):
        words_of = f"prompts, teacher_prompts, gold, references must be as many, one of each at least, not {counts}"
        with pytest.raises(ValueError, match=words_of):
            measured(model, None, *rows, words(), Sampling(NEW))
        with pytest.raises(ValueError, match=words_of):  # before any step
            metrics.Measures(None, None, *rows, words(), Sampling(NEW)).on_train_begin(None, None, None, model=model)
    with pytest.raises(ValueError, match="prompts, continuations must be as many, one of each at least, not 2, 1"):
        risk(model, some, some[:1])


def test_rows_of_another_kind_are_refused_by_name():
    model, some, text = bart(V), prompts(2), ["", ""]
    lists = [row.tolist() for row in some]
    for rows, told in (((some, lists, some, text), "teacher_prompts must be tensors of token ids, a row's each, not list"),
                       ((some, some, some, some), "references must be text, a row's each, not Tensor")):  # fmt: skip
        with pytest.raises(TypeError, match=told):
            metrics.Measures(None, None, *rows, words(), Sampling(NEW)).on_train_begin(None, None, None, model=model)
    with pytest.raises(TypeError, match="prompts must be tensors"):
        risk(model, lists, some)
    with pytest.raises(TypeError, match="'references', 'tokenizer', and 'sampling'"):
        metrics.Measures(None, None, some, some, some)


def test_a_head_that_is_no_matrix():
    """LoRA's sum has logits alone; they are judged as a whole matrix of the same weights is."""
    peft = pytest.importorskip("peft")
    plain = llama(V)
    asked, continued = prompts(5), [draw(plain, [p], Sampling(4), 0)[0] for p in prompts(5)]
    adapted = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(target_modules=["lm_head"], r=2))
    torch.nn.init.normal_(adapted.base_model.model.lm_head.lora_B["default"].weight, std=0.3)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert risk(adapted, asked, continued) == pytest.approx(risk(merged, asked, continued), rel=1e-5)
    assert risk(adapted, asked, continued) != pytest.approx(risk(plain, asked, continued), rel=1e-3)
    for student, teacher in ((adapted, plain), (plain, adapted)):
        whole = [merged if m is adapted else m for m in (student, teacher)]
        got, _ = sentence_sums(student, asked, continued, teacher, asked, ["kl", "tvd"])
        want, _ = sentence_sums(whole[0], asked, continued, whole[1], asked, ["kl", "tvd"])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_bigrams():
    assert distinct_bigrams([[1, 2, 3, 0], [1, 2, 3]], [0]) == 0.5 and distinct_bigrams([[1], [0]]) is None
    assert teacher_dist([[[1, 2, 3], [1, 2, 3]], [[1, 2], [3, 4]]]) == pytest.approx((0.5 + 1) / 2)
    assert teacher_dist([[[1, 2, 0], [1, 3, 0]]], [0]) == 1 and teacher_dist([[[1, 2, 0], [1, 2, 0]]]) == 0.5


def test_a_forced_first_token_is_no_step():
    model, asked = bart(V).double(), prompts(4)
    model.generation_config.forced_bos_token_id = 9
    drawn = metrics.draw_all(model, asked, Sampling(NEW), 0)
    assert all(int(y[0]) == 9 and len(y) > 1 for y in drawn)
    sums, counts = sentence_sums(model, asked, drawn, model, asked, ["kl"])
    for y, p, (found, _), count in zip(drawn, asked, sums.tolist(), counts.tolist(), strict=True):
        assert count == len(y) - 1
        assert found == pytest.approx(nats(model, p, y) + float(log_probs(model, p, y)[0, 9]), rel=1e-9)
