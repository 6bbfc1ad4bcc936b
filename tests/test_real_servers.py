"""Real servers, vLLM and SGLang, where their commands are on the path: what they say, draw, and take in training. The
stand-in of other tests is `openai_server.py`."""

import contextlib
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import httpx
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, TopKLogitsWarper, TopPLogitsWarper

import fdistill_kernels as fk
from fdistill_kernels.sequence.sampling import Sampling
from fdistill_kernels.sequence.student_server import StudentServer
from fdistill_kernels.teachers.connection import EndpointError

INSTALLED = {
    kind: pytest.mark.skipif(not shutil.which(kind), reason=f"{kind} is not installed") for kind in ("vllm", "sglang")
}
V, CONTEXT, DRAWS = 96, 64, 1000


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=CONTEXT, initializer_range=0.2, bos_token_id=1,
                                        eos_token_id=2, pad_token_id=0, **sizes)).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    model.save_pretrained(made)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.save(str(made / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}  # which older transformers know, too
    (made / "tokenizer_config.json").write_text(json.dumps(about))
    return made


def command(kind, folder, port):
    if kind == "vllm":
        return ["vllm", "serve", folder, "--port", port, "--dtype", "float32", "--enforce-eager", "--max-model-len", CONTEXT,
                "--gpu-memory-utilization", "0.2"]  # fmt: skip
    on_cpu = [] if torch.cuda.is_available() else ["--device", "cpu", "--attention-backend", "torch_native",
                                                   "--disable-overlap-schedule"]  # fmt: skip
    return ["sglang", "serve", "--model-path", folder, "--port", port, "--dtype", "float32", "--context-length", CONTEXT,
            "--mem-fraction-static", "0.1", "--max-total-tokens", "20000", *on_cpu]  # fmt: skip


@contextlib.contextmanager
def serving(kind, folder, *options, **environment):
    """The URL of a server, which has ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {} if torch.cuda.is_available() else {"SGLANG_USE_CPU_ENGINE": "1"}
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([*map(str, command(kind, folder, port)), *options], env=own | environment, stdout=log,
                                  stderr=log, start_new_session=True)  # fmt: skip
    try:
        for _ in range(300):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/v1/models").raise_for_status()
                break
            time.sleep(1)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=mark) for kind, mark in INSTALLED.items()])
def server(request, folder):
    """Kind and URL."""
    own = {"vllm": ("--max-logprobs", "32"), "sglang": ()}[request.param]
    with serving(request.param, folder, *own) as url:
        yield request.param, url


def sequences(count):
    made = torch.Generator().manual_seed(1)
    return [[torch.randint(3, V, (n % 7 + 1,), generator=made).tolist() for n in range(i, i + count)] for i in (0, 3)]


@torch.no_grad()
def next_log_probs(model, ids):
    return model(torch.as_tensor(ids)).logits.double().log_softmax(-1)


def test_lists(model, server):
    kind, url = server
    prompts, continuations = sequences(30)
    rows = [next_log_probs(model, [p + c])[0, len(p) - 1 : -1] for p, c in zip(prompts, continuations, strict=True)]
    whole = torch.cat(rows)
    for k in (1, 8, 32):
        with fk.Endpoint(url, vocabulary=V, k=k, kind=kind) as teacher:
            found = teacher.targets(prompts, continuations)
        torch.testing.assert_close(found.log_probs.double(), whole.topk(k).values, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.log_probs.double(), whole.gather(1, found.ids), atol=1e-3, rtol=0)


def test_what_it_refuses(server):
    kind, url = server
    how, spare = {"vocabulary": V, "retries": 2, "kind": kind}, {"vllm": 1, "sglang": 7}[kind]
    if kind == "vllm":
        with fk.Endpoint(url, k=33, **how) as teacher, pytest.raises(EndpointError, match="max allowed: 32"):
            teacher.check()
    with fk.Endpoint(url, model="nobody", **how) as teacher, pytest.raises(EndpointError, match="nobody"):
        teacher.check()
    with fk.Endpoint(url, k=4, **how) as teacher:
        longest = CONTEXT - spare
        assert len(teacher.targets([[5] * (longest - 1)], [[6]]).ids) == 1
        with pytest.raises(EndpointError, match=f"longer than the longest sequence: {CONTEXT + 1} for"):
            teacher.targets([[5] * longest], [[6]])
        with pytest.raises(EndpointError, match=r"the server's context is too short|total of \d+ tokens|maximum"):
            teacher.draw([[5] * (longest - 1)], Sampling(CONTEXT), 0)


def check_draws(model, rows, sampling, most):
    """χ² of the tokens at each place, given those before them; its distribution is near normal."""
    for place in range(3):
        drawn = torch.stack([row[: place + 1] for row in rows if len(row) > place])
        logits = next_log_probs(model, torch.cat([torch.tensor([[5, 6]]).expand(len(drawn), 2), drawn[:, :place]], 1))
        logits = logits[:, -1].index_fill(1, torch.arange(most, V), -torch.inf) / sampling.temperature
        logits = TopKLogitsWarper(sampling.top_k or V)(drawn, logits)
        p = TopPLogitsWarper(sampling.top_p)(drawn, logits).softmax(-1)
        expected, found = p.sum(0), torch.bincount(drawn[:, place], minlength=V)
        assert not found[expected == 0].any()
        big = expected > 5
        degrees = int(big.sum())
        chi = ((found - expected)[big] ** 2 / (expected - p.square().sum(0))[big].clamp_min(1)).sum()
        assert degrees > 3 and chi < degrees + 6 * (2 * degrees) ** 0.5, (place, chi, degrees)


@pytest.mark.parametrize("more", [{}, {"top_k": 12}, {"top_p": 0.8}])
def test_draws(model, server, more):
    (kind, url), sampling = server, Sampling(3, 1.5, **more)
    with fk.Endpoint(url, vocabulary=V, k=4, kind=kind) as teacher:
        for most in (V, 60):
            rows = teacher.draw([[5, 6]] * DRAWS, sampling, 7, most)
            check_draws(model, rows, sampling, most)
        assert all(row[-1] == 2 for row in rows if len(row) < 3)  # with the end token
        if kind == "vllm":  # SGLang heeds seeds with --enable-deterministic-inference alone
            again = teacher.draw([[5, 6]] * 4, sampling, 7, most)
            assert [r.tolist() for r in again] == [r.tolist() for r in rows[:4]]


def check_training(url, student, folder):
    """Samples are those of a student whose weights move."""
    server, sampling = StudentServer(url, folder, student, V), Sampling(3, 1.5)
    server.check()
    for step in range(3):
        check_draws(student, server.draw(student, [torch.tensor([5, 6])] * DRAWS, sampling, step), sampling, V)
        with torch.no_grad():
            for weight in (p for p in student.parameters() if p.requires_grad):
                weight.add_(torch.randn_like(weight), alpha=0.3 * float(weight.std()))
    assert [path.name for path in folder.iterdir()] == ["student-weights-2"]


@INSTALLED["vllm"]
def test_a_student_in_training(model, folder, tmp_path):
    with serving("vllm", folder, VLLM_SERVER_DEV_MODE="1") as url:
        check_training(url, copy.deepcopy(model), tmp_path / "weights")


@INSTALLED["vllm"]
def test_an_adapter_in_training(model, folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    student = get_peft_model(copy.deepcopy(model), lora).eval()
    with serving(
        "vllm", folder, "--enable-lora", "--max-lora-rank", "8", VLLM_ALLOW_RUNTIME_LORA_UPDATING="True"
    ) as url:
        check_training(url, student, tmp_path / "weights")
