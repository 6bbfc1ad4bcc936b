"""Student samples of a server that takes the weights: as the student's own, after every update, or not at all."""

import contextlib
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from .openai_server import Server, _head, _send
from .test_sequence import bart, flat, gpt2
from .test_trainer import trainer

SETTINGS = dict(method="js", top_k=1, max_steps=3, learning_rate=1e-3)


class Student:
    """What a served model says; its `cached` rows stay, as a prefix cache's keys do, until somebody drops them."""

    def __init__(self, folder):
        self.base, self.adapter = str(folder), None
        self.load(folder)

    def load(self, folder, adapter=None):
        made = AutoModelForCausalLM.from_pretrained(folder)
        if adapter is not None:
            from peft import PeftModel

            made = PeftModel.from_pretrained(made, adapter)
        self.model, self.vocabulary = made.eval(), made.config.vocab_size

    @torch.no_grad()
    def log_probs(self, ids):
        return self.model(torch.as_tensor(ids)[None]).logits[0].log_softmax(-1)


class StudentServer(Server):
    """vLLM's ways to take weights, where `ways` has them; and its sampling parameters. Ignoring: weights are not taken."""

    def __init__(self, folder, ways=("dev",), ignoring=False, short=False):
        super().__init__(Student(folder))
        self.short = short
        self.reply_models.append({"id": "an adapter of a run before", "parent": "tiny"})
        self.ways, self.ignoring, self.cache = ways, ignoring, {}
        self.told, self.names, self.forward = [], {}, threading.Lock()

    def reply(self, handler, body):
        path = handler.path
        if path == "/v1/completions":
            if body["model"] not in {"", *self.names}:
                return _send(handler, {"error": "no such model"}, 404)
            return _send(handler, self.listed(body)) if "logprobs" in body else super().reply(handler, body)
        self.told.append((path, body))
        if ("dev" if "v1" not in path else "lora") not in self.ways:
            return _send(handler, {"detail": "Not Found"}, 404)
        with self.forward:
            try:
                return self.control(handler, path, body or {})
            except Exception as error:
                return _send(handler, {"error": {"message": str(error).splitlines()[0]}}, 500)

    def control(self, handler, path, body):
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            made = Student(body["kwargs"]["weights_path"])
            if made.vocabulary != self.model.vocabulary:
                raise ValueError("the size of tensor lm_head.weight does not match")
            self.model = self.model if self.ignoring else made
        elif path == "/reset_prefix_cache":
            self.cache = {}
        elif path == "/v1/load_lora_adapter":
            assert body["lora_name"] not in self.names
            self.names[body["lora_name"]] = body["lora_path"]
            self.reply_models.append({"id": body["lora_name"]})
            if not self.ignoring:
                self.model.load(self.model.base, body["lora_path"])
        else:
            del self.names[body["lora_name"]]
        whole = b"Success"  # which is no JSON
        _head(handler, 200, len(whole))
        handler.wfile.write(whole)

    def listed(self, body):
        """The largest log-probabilities after each prompt, and by chance a further token's."""
        assert body["return_tokens_as_token_ids"] and body["max_tokens"] == 1
        choices = []
        for i, ids in enumerate(body["prompt"]):
            with self.forward:
                found = self.model.log_probs(ids)[-1].topk(body["logprobs"] + i % 2)
            named = {f"token_id:{j}": p for j, p in zip(found.indices.tolist(), found.values.tolist(), strict=True)}
            choices.append({"index": i, "logprobs": {"top_logprobs": [named]}})
        return {"choices": choices[-1 - self.short :: -1]}

    def sample(self, ids, new, seed, how):
        assert how["ignore_eos"] and how["repetition_penalty"] == 1
        generator, made = torch.Generator().manual_seed(seed), list(ids)
        while len(made) < len(ids) + new and made[-1] not in how["stop_token_ids"]:
            with self.forward:
                key = how["cache_salt"], tuple(made)
                if key not in self.cache:
                    self.cache[key] = self.model.log_probs(made)[-1]
                scores = self.cache[key] / how["temperature"]
            for i, bias in how.get("logit_bias", {}).items():
                scores[int(i)] += bias
            if how["top_k"] > 0:
                scores[scores < scores.topk(how["top_k"]).values[-1]] = -torch.inf
            made.append(int(torch.multinomial(scores.softmax(-1), 1, generator=generator)))
        return made[len(ids) :]


@contextlib.contextmanager
def served(tmp_path, student, **how):
    """Settings of a trainer whose student a server has, and the server."""
    student.save_pretrained(tmp_path / "base")
    with StudentServer(tmp_path / "base", **how) as server:
        yield dict(student_server=server.url, student_server_path=str(tmp_path / "weights")), server


def with_lora(student):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(student, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))


def trained(folder, student, settings, stops=(3,), **more):
    for i, stop in enumerate(stops):
        run = trainer(folder, student(), gpt2(60, seed=2), **{**SETTINGS, **settings, **more, "max_steps": stop})
        run.train(resume_from_checkpoint=bool(i))
    return flat(run.model), run


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_samples_are_those_of_the_student_as_it_is(lora, tmp_path):
    """Greedily, over updates that change what is likeliest; the teacher's vocabulary is smaller."""

    def student():
        return with_lora(gpt2(64, seed=1)) if lora else gpt2(64, seed=1)

    settings = dict(learning_rate=0.05 if lora else 0.01, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    own, _ = trained(tmp_path / "own", student, settings)
    with served(tmp_path, gpt2(64, seed=1), ways=("lora",) if lora else ("dev",)) as (where, server):
        (tmp_path / "weights" / "student-weights-1").mkdir(parents=True)  # of a run that was killed while it wrote them
        (tmp_path / "weights" / "student-weights-1" / "model.safetensors").write_bytes(b"half")
        theirs, run = trained(tmp_path / "theirs", student, {**settings, **where})
        asked = server.bodies
    assert torch.equal(own, theirs)
    assert len(asked) == 3 * 4 and len({body["cache_salt"] for body in asked}) == 3
    assert all(0 < share < 1 for line in run.state.log_history if (share := line.get("sampling_share")))
    assert [p.name for p in Path(where["student_server_path"]).iterdir()] == ["student-weights-2"]
    assert len(server.told) == (3 + 2 if lora else 2 * 3) and len(server.names) == lora


def test_a_run_that_goes_on_draws_the_same(tmp_path):
    weights = []
    with served(tmp_path, gpt2(64, seed=1)) as (where, _):
        for stops in ([4], [2, 4]):
            weights.append(trained(tmp_path / str(len(stops)), lambda: gpt2(64, seed=1), where, stops, top_k=0,
                                   save_strategy="steps", save_steps=2, lr_scheduler_type="constant")[0])  # fmt: skip
    assert torch.equal(*weights)


@pytest.mark.parametrize("rate, words", [(0.05, "nats on average"), (2e-4, "none of the server's")])
@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_a_server_that_keeps_its_weights_is_refused(rate, words, lora, tmp_path):
    student, rate = (with_lora, 20 * rate) if lora else ((lambda s: s), rate)
    with (
        served(tmp_path, gpt2(64, seed=1), ways=("lora",) if lora else ("dev",), ignoring=True) as (where, server),
        pytest.raises(ConnectionError, match=f"at step 1: .* weights of step 1: .*{words}"),
    ):
        trained(tmp_path, lambda: student(gpt2(64, seed=1)), where, learning_rate=rate)
    assert len(server.bodies) == 4  # of the first update alone


@pytest.mark.parametrize("how, words", [
    (dict(seed=3), "does not speak with the weights of step 0: .* off by"),
    (dict(vocabulary=62), "refuses /collective_rpc with status 500: the size of tensor"),
    (dict(ways=("lora",)), "refuses /collective_rpc with status 404: Not Found .*VLLM_SERVER_DEV_MODE=1"),
    (dict(short=True), r"gives no log-probabilities by token ids .KeyError.7"),
])  # fmt: skip
def test_refused_servers(how, words, tmp_path):
    of = gpt2(how.get("vocabulary", 64), seed=how.get("seed", 1))
    ways = how.get("ways", ("dev",))
    with (
        served(tmp_path, of, ways=ways, ignoring="seed" in how, short="short" in how) as (where, _),
        pytest.raises(ConnectionError, match=words),
    ):
        trained(tmp_path, lambda: gpt2(64, seed=1), where)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_the_first_rank_fails_on_each(rank, tmp_path, monkeypatch):
    """The first of two ranks has the error itself; the other one gets its words in place of samples."""
    from fdistill_kernels.sequence import student_server as module
    from fdistill_kernels.sequence.sampling import Sampling

    def take(*_):
        assert rank == 0
        raise OSError("the disk is full")

    def broadcast(made):
        told.append(made[1] or told[-1])
        assert made[0] is None and bool(made[1]) == (rank == 0)
        made[1] = told[-1]

    told = ["no samples of the student at step 3: the disk is full"]  # what the first rank sends
    state = SimpleNamespace(process_index=rank, is_main_process=rank == 0)
    monkeypatch.setattr(module, "PartialState", lambda: state)
    monkeypatch.setattr(module, "gather_object", lambda own: own * 2)
    monkeypatch.setattr(module, "broadcast_object_list", broadcast)
    student = gpt2(64, seed=1)
    server = module.StudentServer("http://127.0.0.1:9", tmp_path, student, 60)
    monkeypatch.setattr(server, "take", take)
    with pytest.raises(ConnectionError, match="no samples of the student at step 3: the disk is full"):
        server.draw(student, [torch.tensor([1])], Sampling(2), step=3)
    with pytest.raises(ConnectionError, match="does not answer to /v1/models" if rank == 0 else "the disk is full"):
        server.check()


def test_a_server_that_is_not_there_is_told_before_any_step(tmp_path):
    where = dict(student_server="http://127.0.0.1:9", student_server_path=str(tmp_path / "weights"))
    run = trainer(tmp_path, gpt2(60, seed=1), gpt2(60, seed=2), **{**SETTINGS, **where})
    with pytest.raises(ConnectionError, match=r"the student's server at http://.* does not answer to /v1/models"):
        run.train()
    assert not (tmp_path / "weights").exists()


def test_refused_students(tmp_path):
    from peft import PrefixTuningConfig, get_peft_model

    where = dict(student_server="http://127.0.0.1:9", student_server_path=str(tmp_path))
    prefix = get_peft_model(gpt2(64, seed=1), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    for student, teacher, settings, words in (
        (bart(seed=1), bart(seed=2), where, "not from an encoder–decoder"),
        (prefix, gpt2(60, seed=2), where, "vLLM takes one LoRA adapter, and the student's are ['PREFIX_TUNING']"),
        (gpt2(60), gpt2(60), {**where, "method": "kl"}, "is not used without an objective on the student's samples"),
        (gpt2(60), gpt2(60), {**where, "student_server_path": None}, "go together"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            trainer(tmp_path, student, teacher, **{**SETTINGS, **settings})
