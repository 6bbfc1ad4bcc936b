"""What others have kept, written here from what their formats are, and read back."""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

from fdistill_kernels.sparse import TopK
from fdistill_kernels.teachers import readers
from fdistill_kernels.teachers.readers import Misfit
from fdistill_kernels.teachers.store import TeacherStore

from .openai_server import Model, Server

V, K = 40, 8
SEQUENCES = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 39], [39, 0]]


def truth(ids, begin):
    return Model().log_probs(ids)[begin - 1 : -1]


def check(scored, sequences, begins, atol=1e-6):
    scored = list(scored)
    assert len(scored) == len(sequences)
    for (prompt, continuation, rows), ids, begin in zip(scored, sequences, begins, strict=True):
        assert prompt.tolist() == ids[:begin] and continuation.tolist() == ids[begin:]
        whole = truth(ids, begin)
        torch.testing.assert_close(rows.log_probs, whole.topk(K).values, atol=atol, rtol=0)
        torch.testing.assert_close(rows.log_probs, whole.gather(1, rows.ids), atol=atol, rtol=0)


def lines(path, objects):
    path.write_text("\n".join(json.dumps(o) for o in objects) + "\n\n")
    return path


def vllm_lines():
    server = Server()
    server.http.server_close()
    return [
        server.vllm({"prompt_logprobs": K, "return_token_ids": True, "max_tokens": 1}, ids, None) for ids in SEQUENCES
    ]


def sglang_lines(fault=None):
    server = Server()
    server.http.server_close()
    body = {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": K,
        "sampling_params": {"max_new_tokens": 0},
    }
    return [server.sglang(body, ids, fault) for ids in SEQUENCES]


HOW = {"k": K, "vocabulary": V}


def test_vllm_replies(tmp_path):
    whole = vllm_lines()
    path = lines(
        tmp_path / "a.jsonl",
        [{**whole[0], "n": 2}, {**whole[1], "n": 1}, {**whole[2]["choices"][0], "n": 4}, {**whole[3], "n": 1}],
    )
    check(readers.vllm_replies(path, prompt_length="n", **HOW), SEQUENCES, [2, 1, 4, 1])
    check(readers.vllm_replies(lines(tmp_path / "b.jsonl", whole), **HOW), SEQUENCES, [1] * 4)
    plain = [{"prompt_token_ids": c["prompt_token_ids"], "prompt_logprobs": [None, *({i: e["logprob"] for i, e in row.items()}
              for row in c["prompt_logprobs"][1:])]} for (c,) in (w["choices"] for w in whole)]  # fmt: skip
    check(readers.vllm_replies(lines(tmp_path / "c.jsonl", plain), **HOW), SEQUENCES, [1] * 4)
    several = [{"choices": [c for w in some for c in w["choices"]]} for some in (whole[:3], whole[3:])]  # of 3 prompts
    check(readers.vllm_replies(lines(tmp_path / "d.jsonl", several), **HOW), SEQUENCES, [1] * 4)


def test_replies_to_chats_and_batches(tmp_path):
    """As vLLM 0.32 has them: a chat's rows stand beside its choices, and `vllm run-batch` wraps each reply."""
    chats = [{"choices": [{"index": 0, "message": {"content": "x"}, "token_ids": [3]}],
              **{n: w["choices"][0][n] for n in ("prompt_logprobs", "prompt_token_ids")}} for w in vllm_lines()]  # fmt: skip
    check(readers.vllm_replies(lines(tmp_path / "a.jsonl", chats), **HOW), SEQUENCES, [1] * 4)
    batch = [{"id": "x", "custom_id": f"r{i}", "response": {"status_code": 200, "body": body}, "error": None}
             for i, body in enumerate([*chats[:2], *vllm_lines()[2:]])]  # fmt: skip
    lengths = {"r0": 2, "r1": 1, "r2": 4, "r3": 1}
    how = {**HOW, "prompt_length": lambda line: lengths[line["custom_id"]]}
    own = [{**w, "custom_id": f"r{i}"} for i, w in enumerate(vllm_lines())]  # a field of one's own, without a batch
    check(readers.vllm_replies(lines(tmp_path / "e.jsonl", own), **how), SEQUENCES, [2, 1, 4, 1])
    check(readers.vllm_replies(lines(tmp_path / "b.jsonl", batch), **how), SEQUENCES, [2, 1, 4, 1])
    for response in ({"status_code": 400, "body": None}, None):
        batch[1] |= {"response": response, "error": {"error": {"message": "the prompt is too long"}}}
        with pytest.raises(readers.Misfit, match=r"c.jsonl:2: the request 'r1' failed: .*the prompt is too long"):
            list(readers.vllm_replies(lines(tmp_path / "c.jsonl", batch), **how))
    with pytest.raises(readers.Misfit, match=r"d.jsonl:1: .*prompt_token_ids"):  # asked without return_token_ids
        list(readers.vllm_replies(lines(tmp_path / "d.jsonl", [{**chats[0], "prompt_token_ids": None}]), **HOW))


def test_sglang_replies(tmp_path):
    found = sglang_lines()
    check(readers.sglang_replies(lines(tmp_path / "a.jsonl", found[:2]), **HOW), SEQUENCES[:2], [1] * 2)
    assert found[2]["meta_info"]["input_token_logprobs"][-1][1] == 0  # the last id of the vocabulary, as SGLang has it
    for name in ("input_ids", "prompt_token_ids"):
        named = [{**reply, name: ids} for reply, ids in zip(found, SEQUENCES, strict=True)]
        check(readers.sglang_replies(lines(tmp_path / "b.jsonl", named), **HOW), SEQUENCES, [1] * 4)


def test_replies_to_several_prompts_and_failures(tmp_path):
    """SGLang answers a request of several prompts with a list; where it failed, a server says why."""
    for read, found in ((readers.vllm_replies, vllm_lines()), (readers.sglang_replies, sglang_lines())):
        several = [
            [{**one, "input_ids": ids, "n": 1} for one, ids in zip(found, SEQUENCES, strict=True)][i::2] for i in (0, 1)
        ]
        some = [*SEQUENCES[::2], *SEQUENCES[1::2]]
        check(read(lines(tmp_path / "a.jsonl", several), prompt_length="n", **HOW), some, [1] * 4)
        for told in ({"error": {"message": "it is too long"}}, {"object": "error", "message": "it is too long"}):
            with pytest.raises(Misfit, match=r"b\.jsonl:2: the request failed: .*it is too long"):
                list(read(lines(tmp_path / "b.jsonl", [several[0], told]), **HOW))


def first(choice):
    return next(e for e in choice["prompt_logprobs"][2].values() if e["rank"] == 2)


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda c: c["prompt_logprobs"].pop(), "6 positions for 7 tokens"),
    (lambda c: c["prompt_logprobs"][3].pop("8"), "next token 8"),
    (lambda c: c.pop("prompt_token_ids"), "prompt_token_ids"),
    (lambda c: c.pop("prompt_logprobs"), "another form"),
    (lambda c: c["prompt_logprobs"].__setitem__(2, None), "another form"),
    (lambda c: c["prompt_logprobs"].__setitem__(2, {"5": {"logprob": -0.1, "rank": 1}}), "1 ids of the 8"),
    (lambda c: c["prompt_logprobs"][2].update({"40": {"logprob": -20.0}}), r"outside \[0, 40\)"),
    (lambda c: c["prompt_logprobs"][2].update({"-1": {"logprob": -20.0}}), r"outside \[0, 40\)"),
    (lambda c: first(c).update(logprob=10**400), "another form"),
    (lambda c: c.update(prompt_token_ids=[5.5, *c["prompt_token_ids"][1:]]), "of torch.float32"),
    (lambda c: first(c).update(logprob=float("nan")), "NaN"), (lambda c: first(c).update(logprob="-1"), "another form"),
    (lambda c: first(c).update(logprob=-0.0001), "mass above 1"),
])  # fmt: skip
def test_a_line_that_does_not_fit_is_named(tmp_path, spoil, says):
    found = vllm_lines()
    spoil(found[2]["choices"][0])
    read = readers.vllm_replies(lines(tmp_path / "a.jsonl", found), **HOW)
    assert [len(next(read)[1]) for _ in range(2)] == [4, 2]
    with pytest.raises(Misfit, match=says) as error:
        next(read)
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}:3: ")


def test_ids_of_a_padded_head(tmp_path):
    found = vllm_lines()
    row = found[2]["choices"][0]["prompt_logprobs"][2]
    listed = next(i for i, e in row.items() if e["rank"] == 2 and i != str(SEQUENCES[2][2]))
    row["40"] = row.pop(listed)  # the first id beyond the vocabulary, in place of one of the k
    path = lines(tmp_path / "a.jsonl", found)
    with pytest.raises(Misfit, match=r"a\.jsonl:3: .*outside \[0, 40\).*padded=True"):
        list(readers.vllm_replies(path, **HOW))
    made = [rows for *_, rows in readers.vllm_replies(path, padded=True, **HOW)]
    assert [(r.ids < 0).sum() for r in made] == [0, 0, 1, 0] and int(listed) not in made[2].ids[1]
    assert made[2].ids[1, -1] == -1 and made[2].log_probs[1, -1] == -torch.inf


def test_other_lines_that_do_not_fit(tmp_path):
    (path := tmp_path / "a.jsonl").write_text(json.dumps(vllm_lines()[0]) + '\n{"choices": [')
    with pytest.raises(Misfit, match=r"a\.jsonl:2: JSONDecodeError"):
        list(readers.vllm_replies(path, **HOW))
    with pytest.raises(Misfit, match=r"a\.jsonl:1: a prompt of 5 tokens in a sequence of 5"):
        list(readers.vllm_replies(lines(path, vllm_lines()), prompt_length=5, **HOW))
    path.write_bytes(json.dumps(vllm_lines()[0]).encode() + b'\n{"choices": "' + b"x" * 9999 + b'\xff"}')
    with pytest.raises(Misfit, match=r"a\.jsonl:2: UnicodeDecodeError.{,200}$"):
        list(readers.vllm_replies(path, **HOW))
    with pytest.raises(Misfit, match=r"a\.jsonl:1: it has no choices"):
        list(readers.vllm_replies(lines(path, [{"choices": []}]), **HOW))
    for wrong in ("2", 2.0, None):
        with pytest.raises(Misfit, match=r"a\.jsonl:1: TypeError: prompt_length must be an int, not"):
            list(readers.vllm_replies(lines(path, [{**vllm_lines()[0], "n": wrong}]), prompt_length="n", **HOW))
    with pytest.raises(TypeError, match="padding"):
        readers.vllm_replies(path, padding=True, **HOW)  # at once, not with the first line
    for fault, says in (
        ("twice", "twice"),
        ("no_token", "other token ids"),
        ("length", "positions"),
        ("nan", "NaN"),
        ("short", "7 ids"),
    ):
        found = sglang_lines(fault)
        for reply, ids in zip(found, SEQUENCES, strict=True):
            reply["input_ids"] = ids
        with pytest.raises(Misfit, match=rf"a\.jsonl:1: .*{says}"):
            list(readers.sglang_replies(lines(path, found), **HOW))
    row = next(readers.vllm_replies(lines(path, vllm_lines()), k=30, vocabulary=V, short_rows=True))[2]
    assert row.ids.shape == (4, 30) and ((row.ids >= 0).sum(1) >= K).all() and (row.ids[:, -1] == -1).all()


@pytest.mark.parametrize("read", [readers.vllm_replies, readers.sglang_replies])
def test_settings_of_lists_are_named_before_a_file_is_read(read):
    for name, wrong in (("k", 2.0), ("vocabulary", "40"), ("short_rows", "false"), ("padded", 1)):
        with pytest.raises(TypeError, match=f"{name} must be"):
            list(read("nowhere", **{"k": 2, "vocabulary": 40, name: wrong}))


def shifted(meta):
    tops = meta["input_top_logprobs"]
    tops[1:] = [*tops[2:], tops[1]]


def of_another_list(meta, entry):
    """A token that is listed, or not: its own log-probability is another position's."""
    listed = {i: p for p, i, _ in meta["input_top_logprobs"][entry]}
    own = meta["input_token_logprobs"][entry]
    own[0] = listed[own[1]] - 0.5 if own[1] in listed else max(listed.values()) - 0.01


@pytest.mark.parametrize(("spoil", "says"), [
    (shifted, "contradicts itself: its token"), *((lambda meta, n=n: of_another_list(meta, n), "contradicts itself")
                                                  for n in range(1, 7)),
])  # fmt: skip
def test_sglang_lists_of_other_positions_are_refused(tmp_path, spoil, says):
    found = sglang_lines()
    spoil(found[2]["meta_info"])
    with pytest.raises(Misfit, match=rf"a\.jsonl:3: position \d of the continuation {says}"):
        list(readers.sglang_replies(lines(tmp_path / "a.jsonl", found), **HOW))


def test_sglang_values_may_be_rounded(tmp_path):
    found = sglang_lines()
    for reply in found:
        for entry in reply["meta_info"]["input_token_logprobs"][1:]:
            entry[0] = float(torch.tensor(entry[0]).bfloat16())
    assert len(list(readers.sglang_replies(lines(tmp_path / "a.jsonl", found), **HOW))) == 4


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": -1}, {"vocabulary": 0}, {"k": "8"}])
def test_lists_of_nothing_are_refused(tmp_path, wrong):
    path = lines(tmp_path / "lines", vllm_lines())
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(wrong))} must be "):
        next(readers.vllm_replies(path, **{"k": K, "vocabulary": V, **wrong}))


def test_minus_nine_thousand_is_minus_infinity(tmp_path):
    found = vllm_lines()[:1]
    row = found[0]["choices"][0]["prompt_logprobs"][1]
    least = min(row, key=lambda i: (i == "1", row[i]["logprob"]))
    row[least]["logprob"] = -9999.0
    rows = next(readers.vllm_replies(lines(tmp_path / "a.jsonl", found), **HOW))[2]
    assert (
        rows.log_probs[0, -1] == -torch.inf
        and rows.ids[0, -1] == int(least)
        and rows.log_probs.isfinite().sum() == 4 * K - 1
    )


def test_columns():
    data = []
    for ids in SEQUENCES:
        top = truth(ids, 1).topk(K)
        data.append({"p": ids[:1], "c": ids[1:], "i": top.indices.tolist(), "l": top.values.tolist()})
    names = {"prompt": "p", "continuation": "c", "ids": "i", "log_probs": "l", "vocabulary": V}
    check(readers.columns(data, **names), SEQUENCES, [1] * 4)
    ragged = {
        **data[0],
        "i": [r[: 3 + n] for n, r in enumerate(data[0]["i"])],
        "l": [r[: 3 + n] for n, r in enumerate(data[0]["l"])],
    }
    _, _, rows = next(readers.columns([ragged], **names))
    assert (rows.ids >= 0).sum(1).tolist() == [3, 4, 5, 6] and rows.ids[:, :3].tolist() == [r[:3] for r in data[0]["i"]]
    for spoil, says in (({"i": data[1]["i"]}, r"\(2, 8\)"), ({"l": ragged["l"]}, "position 0 .* 8 ids and 3 log"),
                        ({"i": ragged["i"], "l": ragged["l"][::-1]}, "position 0 .* 3 ids and 6 log"), ({"c": data[0]["c"][:-1]}, r"\(3, K\)"),
                        ({"i": [[1] * K] * 4}, "twice"), ({"p": []}, "prompt of 0"), ({"p": [-100]}, "has -100 in the place of"),
                        ({"i": [[True] * K] * 4}, "ids are torch.bool"), ({"l": [[0.5] * K] * 4}, "positive")):  # fmt: skip
        with pytest.raises(Misfit, match=f"train 1: .*{says}"):
            list(readers.columns([data[0], {**data[0], **spoil}], name="train", **names))
    with pytest.raises(Misfit, match="row 0: KeyError"):
        list(readers.columns(data, vocabulary=V))
    for wrong in (None, "40", 40.0):
        with pytest.raises(Misfit, match="row 0: TypeError: vocabulary must be an int, not"):
            list(readers.columns(data, **{**names, "vocabulary": wrong}))
    of_arrays = {**data[0], "i": np.array(data[0]["i"], np.uint16), "l": np.array(data[0]["l"], np.float16)}
    _, _, rows = next(readers.columns([of_arrays], **names))
    assert rows.ids.tolist() == data[0]["i"] and rows.log_probs.dtype == torch.float16
    assert rows.log_probs.numpy().tobytes() == of_arrays["l"].tobytes()
    for make in (
        torch.tensor,
        np.array,
    ):  # of each step, as one keeps them while a model is at work; also of some lengths
        for some in (data[0], ragged):
            apart = {"i": [make(r) for r in some["i"]], "l": [make(r).astype("float16") if make is np.array else make(r).half()
                     for r in some["l"]], "p": np.array(some["p"], np.uint64)}  # fmt: skip
            _, _, rows = next(readers.columns([{**some, **apart}], **names))
            lengths = list(map(len, some["i"]))
            assert [r[:n] for r, n in zip(rows.ids.tolist(), lengths, strict=True)] == some["i"]
            assert (rows.ids >= 0).sum(1).tolist() == lengths and rows.log_probs.dtype == torch.float16


# DistillKit: an encoder of its own


def bits_of(numbers, wide):
    """Most significant bit first, filled to whole bytes with zeros."""
    text = "".join(format(n, f"0{wide}b") for n in numbers)
    return [int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8)]


def raw(values, dtype):
    return torch.tensor(values, dtype=getattr(torch, dtype)).view(torch.uint8).tolist()


def rounded(values, dtype):
    return torch.tensor(values, dtype=getattr(torch, dtype)).double().numpy()


def encode(log_probs, config):
    """Bytes of one position's log-probabilities, the largest first, and what they stand for."""
    values = np.asarray(log_probs, dtype=np.float64)
    if config["delta_encoding"]:
        values = np.diff(values, prepend=0.0)
    exact, rest = values[: config["exact_k"]], values[config["exact_k"] :]
    made, stands_for = raw(exact, config["exact_dtype"]), list(rounded(exact, config["exact_dtype"]))
    fit = np.zeros(len(rest))
    if config["polynomial_terms"]:
        t = np.linspace(0, 1, len(rest)) if config["normalize_t"] else np.arange(len(rest), dtype=float)
        terms = np.stack(
            [np.sqrt(t) if n == "sqrt" else np.exp(t) if n == "exp" else t**n for n in config["polynomial_terms"]], 1
        )
        coefficients = np.linalg.lstsq(terms, rest, rcond=None)[0]
        made += raw(coefficients, config["term_dtype"])
        fit = terms @ rounded(coefficients, config["term_dtype"])
    begin = 0
    for part in config["residual_bins"]:
        wide, some = part["element_bits"], slice(begin, begin + part["num_elements"])
        residual = (rest - fit)[some]
        half = 1 if wide == 1 else 2 ** (wide - 1)
        (scale,) = rounded([np.abs(residual).max() / half or 1.0], part["scale_dtype"])
        if wide == 1:  # the sign
            numbers = (residual > 0).astype(int)
            fit[some] += (2 * numbers - 1) * scale
        else:
            numbers = np.clip(np.round(residual / scale), -half, half - 1).astype(int) + half
            fit[some] += (numbers - half) * scale
        made += raw([scale], part["scale_dtype"]) + bits_of(numbers.tolist(), wide)
        begin += part["num_elements"]
    stands_for = np.array([*stands_for, *fit])
    return made, np.cumsum(stands_for) if config["delta_encoding"] else stands_for


def residual_bin(scale, wide, count):
    return {"scale_dtype": scale, "element_bits": wide, "num_elements": count}


BASE = {"d": V, "k": 16, "exact_k": 4, "exact_dtype": "float32", "polynomial_terms": [0, 1, 2, "sqrt"], "term_dtype": "float32",
        "residual_bins": [], "delta_encoding": False, "error_diffusion": False, "normalize_t": False}  # fmt: skip
CONFIGS = {
    "polynomial": BASE,
    "bins": {
        **BASE,
        "residual_bins": [residual_bin("float16", 3, 5), residual_bin("float32", 1, 4)],
        "delta_encoding": True,
    },
    "fine": {
        **BASE,
        "polynomial_terms": [0, 1, "exp"],
        "normalize_t": True,
        "residual_bins": [residual_bin("float32", 13, 12)],
    },
    "half": {
        **BASE,
        "exact_dtype": "bfloat16",
        "polynomial_terms": None,
        "residual_bins": [residual_bin("float32", 8, 12)],
    },
    "exact": {**BASE, "exact_k": 16, "polynomial_terms": None, "delta_encoding": True},
}


def write_distillkit(folder, config, rows, files=12):
    """One row a file: data_10 comes after data_9."""
    folder.mkdir()
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    stands_for = []
    for number, ids in enumerate(rows):
        top = truth(ids, 1).topk(config["k"])
        packed = [bits_of(row, 6) for row in top.indices.tolist()]
        coded = [encode(row, config) for row in top.values.tolist()]
        stands_for.append((top, torch.tensor(np.array([s for _, s in coded]))))
        schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.uint64())), *((n, pyarrow.list_(pyarrow.list_(pyarrow.uint8())))
                                 for n in ("compressed_logprobs", "bytepacked_indices"))])  # fmt: skip
        table = pyarrow.table(
            {"input_ids": [ids], "compressed_logprobs": [[b for b, _ in coded]], "bytepacked_indices": [packed]}, schema
        )
        pyarrow.parquet.write_table(table, folder / f"data_{number}.parquet")
    return stands_for


@pytest.mark.parametrize("name", CONFIGS)
def test_distillkit(tmp_path, name):
    config, rows = CONFIGS[name], SEQUENCES * 3
    stands_for = write_distillkit(tmp_path / "a", config, rows)
    for begin in (1, 2):
        chosen = [(ids, s) for ids, s in zip(rows, stands_for, strict=True) if len(ids) > begin]
        if len(chosen) != len(rows):
            with pytest.raises(Misfit, match="prompt of 2"):
                list(readers.distillkit(tmp_path / "a", prompt_length=begin))
            continue
        for (prompt, continuation, made), (ids, (top, values)) in zip(
            readers.distillkit(tmp_path / "a"), chosen, strict=True
        ):
            assert [*prompt.tolist(), *continuation.tolist()] == ids and len(prompt) == 1
            assert torch.equal(made.ids, top.indices)
            rounded = name != "exact"
            assert made.log_probs.dtype == (torch.float16 if rounded else torch.float32)
            found, rounding = made.log_probs.float(), 2.0**-11 if rounded else 1e-5
            values = values - values.logsumexp(1, keepdim=True).clamp_min(0) if rounded else values
            torch.testing.assert_close(found, values.float(), atol=2e-5, rtol=rounding)
            if name in ("fine", "exact"):
                torch.testing.assert_close(found, top.values, atol=2e-3, rtol=rounding)


def test_a_fit_that_overshoots_has_a_mass_of_1(tmp_path, monkeypatch):
    """With one exact value, as DistillKit's README has it for little space, a steep row's fit is above its mass."""
    config = {**BASE, "exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"]}
    steep = torch.cat((torch.tensor([0.5, 0.3, 0.19]).log(), torch.linspace(-9, -14, V - 3))).log_softmax(0)
    monkeypatch.setitem(globals(), "truth", lambda ids, begin: steep.expand(len(ids) - begin, V))
    ((top, values), *_) = write_distillkit(tmp_path / "a", config, SEQUENCES[:1])
    assert values.exp().sum(1).min() > 1.05
    _, _, rows = next(readers.distillkit(tmp_path / "a"))
    torch.testing.assert_close(
        rows.log_probs.double(), values - values.logsumexp(1, keepdim=True), atol=1e-3, rtol=1e-3
    )
    assert torch.equal(rows.ids, top.indices)
    monkeypatch.setitem(globals(), "truth", lambda ids, begin: 9 + steep.expand(len(ids) - begin, V))  # logits
    write_distillkit(tmp_path / "b", config, SEQUENCES[:1])
    with pytest.raises(Misfit, match=r"data_0\.parquet row 0: .*positive log-probability"):
        list(readers.distillkit(tmp_path / "b"))


def test_distillkit_rows_that_do_not_fit(tmp_path):
    write_distillkit(tmp_path / "a", BASE, SEQUENCES)
    for change, says in (({"k": 17}, "numbers of 6 bits"), ({"exact_k": 3}, "bytes at each position"), ({"d": 300}, "9 bits"),
                         ({"exact_dtype": "float64"}, "configuration has more")):  # fmt: skip
        (tmp_path / "a" / "compression_config.yaml").write_text(yaml.safe_dump({**BASE, **change}))
        with pytest.raises(Misfit, match=rf"data_0\.parquet row 0: .*{says}"):
            list(readers.distillkit(tmp_path / "a"))
    (tmp_path / "a" / "compression_config.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.raises(Misfit, match=r"data_\d\.parquet row 0: .*outside \[0, 20\)"):
        list(readers.distillkit(tmp_path / "a", vocabulary=20))
    legacy = pyarrow.table(
        {"input_ids": [[1, 2]], "packed_indices": [[[1]]], "exact_values": [[[1.0]]], "coeffs": [[[1.0]]]}
    )
    pyarrow.parquet.write_table(legacy, tmp_path / "a" / "data_0.parquet")
    with pytest.raises(Misfit, match="older format keeps logits"):
        list(readers.distillkit(tmp_path / "a"))
    (tmp_path / "a" / "data_0.parquet").write_bytes(b"PAR1")
    with pytest.raises(Misfit, match=r"data_0\.parquet: "):
        list(readers.distillkit(tmp_path / "a"))
    (tmp_path / "a" / "compression_config.yaml").write_text("")
    with pytest.raises(Misfit, match=r"compression_config\.yaml: "):
        list(readers.distillkit(tmp_path / "a"))
    (tmp_path / "a" / "compression_config.yaml").write_text(yaml.safe_dump(BASE))
    for path in (tmp_path / "a").glob("*.parquet"):
        path.rename(path.with_suffix(".old"))
    with pytest.raises(FileNotFoundError, match=r"no data_\*\.parquet"):
        list(readers.distillkit(tmp_path / "a"))


# Megatron-LM

WIDE, LENGTH, MICRO, RANKS, STEPS = 70_000, 6, 2, 2, 3


def megatron_rows(iterations=4):
    """Samples in the data's order: tokens (L + 1,), log-probs and ids (L, K), some cut off with the sentinels."""
    made = []
    for _ in range(iterations * MICRO * RANKS * STEPS):
        ids = torch.stack([torch.randperm(WIDE)[:K] for _ in range(LENGTH)])
        values = torch.randn(LENGTH, K + 3).log_softmax(1)[:, :K].half()
        cut = torch.arange(K) >= torch.randint(1, K + 1, (LENGTH, 1))
        made.append(
            (torch.randint(WIDE, (LENGTH + 1,)).tolist(), values.masked_fill(cut, -1e4), ids.masked_fill(cut, -1))
        )
    return made


def write_megatron(folder, rows, version, iterations=4, prefix=""):
    """Two iterations a shard; a micro-step takes MICRO samples for each rank in turn."""
    folder.mkdir(exist_ok=True)
    batch = MICRO * RANKS * STEPS
    for rank in range(RANKS):
        for first in range(0, iterations, 2):
            meta = {
                "hash": "x",
                "saver": {"k": K, **({"mbs_save": MICRO, "format_version": 2} if version == 2 else {})},
            }
            members = [("_meta.json", json.dumps(meta).encode())]
            for iteration in (first, first + 1):
                micro = []
                for step in range(STEPS):
                    at = iteration * batch + (step * RANKS + rank) * MICRO
                    micro.append([torch.stack([r[n] for r in rows[at : at + MICRO]], 1) for n in (1, 2)])
                kept = {"values": [v for v, _ in micro], "indices_low": [(i & 0xFFFF).to(torch.uint16) for _, i in micro],
                        "bit_17": [(i >> 16).bool() for _, i in micro]}  # fmt: skip
                if version == 2:
                    kept = {
                        **{
                            n: torch.cat([t.int() if n == "indices_low" else t for t in ts], 1)
                            for n, ts in kept.items()
                        },
                        "format_version": 2,
                    }
                    kept["indices_low"] = kept["indices_low"].to(torch.uint16)
                torch.save(kept, buffer := io.BytesIO())
                members.append((f"{iteration}.pt.zst", pyarrow.Codec("zstd").compress(buffer.getvalue(), asbytes=True)))
            with tarfile.open(folder / f"{prefix}dp{rank}__{first + 1}.tar", "w") as tar:
                for name, content in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(("version", "prefix"), [(1, "cp0_"), (2, "")])
def test_megatron(tmp_path, version, prefix):
    rows = megatron_rows()
    write_megatron(tmp_path, rows, version, prefix=prefix)
    tokens = [t for t, _, _ in rows]
    for begin in (1, 3):
        found = list(readers.megatron(tmp_path, tokens, vocabulary=WIDE, prompt_length=begin))
        assert len(found) == len(rows)
        for (prompt, continuation, made), (ids, values, listed) in zip(found, rows, strict=True):
            assert prompt.tolist() == ids[:begin] and continuation.tolist() == ids[begin:]
            assert torch.equal(made.ids, listed[begin - 1 :])
            assert torch.equal(made.log_probs, values.masked_fill(listed < 0, -torch.inf)[begin - 1 :])
    assert made.log_probs.dtype == torch.float16  # so that a loss knows what their rounding hides of the rest


def test_megatron_shards_that_do_not_fit(tmp_path):
    rows = megatron_rows()
    write_megatron(tmp_path / "a", rows, 2)
    tokens = [t for t, _, _ in rows]
    with pytest.raises(Misfit, match=r"dp0__1\.tar 0\.pt\.zst: sample 5 has 6 tokens for 6 rows"):
        list(readers.megatron(tmp_path / "a", [*tokens[:5], tokens[5][:-1]], vocabulary=WIDE))
    with pytest.raises(Misfit, match=r"dp0__3\.tar 2\.pt\.zst: IndexError"):
        list(readers.megatron(tmp_path / "a", tokens[:24], vocabulary=WIDE))
    with pytest.raises(Misfit, match=r"outside \[0, 60000\)"):
        list(readers.megatron(tmp_path / "a", tokens, vocabulary=60_000))
    whole = {path: path.read_bytes() for path in (tmp_path / "a").glob("dp?__3.tar")}
    second = whole[tmp_path / "a" / "dp0__3.tar"].index(b"3.pt.zst")
    for size in (0, 700, 1024, second, second + 100, second + 600):
        for path, content in whole.items():
            path.write_bytes(content[:size])
        with pytest.raises(Misfit, match=r"dp0__3\.tar: "):
            list(readers.megatron(tmp_path / "a", tokens, vocabulary=WIDE))
    (tmp_path / "a" / "dp0__3.tar").write_bytes(whole[tmp_path / "a" / "dp0__3.tar"])
    (tmp_path / "a" / "dp1__3.tar").unlink()
    with pytest.raises(Misfit, match=r"dp0__3\.tar 2\.pt\.zst: the ranks do not have the same"):
        list(readers.megatron(tmp_path / "a", tokens, vocabulary=WIDE))
    (tmp_path / "a" / "dp1__1.tar").rename(tmp_path / "a" / "dp2__1.tar")
    with pytest.raises(ValueError, match=r"ranks \[0, 2\]"):
        list(readers.megatron(tmp_path / "a", tokens, vocabulary=WIDE))
    (tmp_path / "a" / "cp1_dp0__1.tar").touch()
    with pytest.raises(ValueError, match="context-parallel"):
        list(readers.megatron(tmp_path / "a", tokens, vocabulary=WIDE))


def test_pour(tmp_path):
    store = TeacherStore.create(tmp_path / "store", kind="top_k", vocabulary=V, key={"teacher": "x"}, k=K)
    path = lines(tmp_path / "a.jsonl", vllm_lines() * 2)
    assert readers.pour(readers.vllm_replies(path, **HOW), store) == len(SEQUENCES)
    assert readers.pour(readers.vllm_replies(path, **HOW), store) == 0
    found = TeacherStore(tmp_path / "store").targets([s[:1] for s in SEQUENCES], [s[1:] for s in SEQUENCES])
    whole = torch.cat([truth(s, 1) for s in SEQUENCES])
    assert isinstance(found, TopK) and found.ids.shape == (len(whole), K)
    torch.testing.assert_close(found.log_probs.float(), whole.gather(1, found.ids), atol=0.01, rtol=0)
    torch.testing.assert_close(found.log_probs.float(), whole.topk(K).values, atol=0.01, rtol=0)
    bad = lines(tmp_path / "b.jsonl", [vllm_lines()[0], {}])
    other = TeacherStore.create(tmp_path / "other", kind="top_k", vocabulary=V, key={"teacher": "x"}, k=K)
    with pytest.raises(Misfit, match=r"b\.jsonl:2"):
        readers.pour(readers.vllm_replies(bad, **HOW), other)
    assert len(TeacherStore(tmp_path / "other")) == 1  # what came before it
