"""Every architecture that the installed transformers can make tiny: its loss, and the one from its logits, are ours.

A sample by default; all of them with FDISTILL_WHOLE=1.
"""

import os
import warnings

import pytest
import torch
import transformers
from torch.nn.functional import kl_div
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fdistill_kernels.divergences import TABLE
from fdistill_kernels.integrations.transformers import patch_model
from fdistill_kernels.sequence.models import accepted, forward_to_head, rows_of, step_loss, teacher_forced

V = 99
#: Fields of configurations, where they have them. Rates of dropout are set to 0 besides.
SMALL = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=32, max_position_embeddings=64, n_positions=64, n_embd=16, n_layer=2, n_head=2, n_layers=2,
    n_heads=2, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, ffn_dim=32,
    num_decoder_layers=2, bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=1,
    word_embed_proj_dim=16, num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, q_lora_rank=8, kv_lora_rank=8,
    qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, rotary_dim=4, n_inner=32, max_seq_len=64, state_size=4,
    conv_kernel=4, mamba_d_state=4, mamba_n_heads=4, mamba_d_head=8, mamba_expand=2, lru_width=16, n_ctx=64,
    embedding_size=16, first_k_dense_replace=1, n_group=1, topk_group=1, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=V, sliding_window=8, max_source_positions=64, max_target_positions=64,
    attention_window=8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, is_decoder=True,
    chunk_size=4, forced_eos_token_id=None, layer_types=None, initializer_range=0.4, init_std=0.4,
    output_router_logits=True, router_aux_loss_coef=0.3, use_cache=False, depth=1, embed_dim=16, out_hidden_size=16,
    entity_vocab_size=9,
)  # fmt: skip
MAPPINGS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT")
#: What single architectures ask of their configurations.
MORE = {
    "bamba": dict(mamba_chunk_size=8, mamba_n_groups=1, attn_layer_indices=[1], z_loss_coefficient=0.1),
    "mamba2": dict(num_heads=4),
    "falcon_h1": dict(mamba_d_ssm=32, mamba_n_groups=1, mamba_chunk_size=8, lm_head_multiplier=0.1),
    "minicpm3": dict(dim_model_base=8), "cohere": dict(logit_scale=0.25), "granite": dict(logits_scaling=4.0),
    "gemma2": dict(final_logit_softcapping=2.0), "diffllama": dict(num_key_value_heads=2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]), "zaya": dict(num_experts_per_tok=1),
    "prophetnet": dict(num_encoder_layers=2), "xlnet": dict(n_layer=2), "reformer": dict(axial_pos_embds=False),
    "xmod": dict(default_language="en_XX"), "nllb-moe": dict(output_router_logits=False),
    **{kind: dict(mrope=True) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "glm4v", "glm46v",
                                           "glm_ocr", "paddleocr_vl")},
    "cohere2_vision": dict(downsample_factor=1), "esmc": dict(num_key_value_heads=2),
}  # fmt: skip
#: Their vocabularies or parts of their own stay large.
BIG = {"VibeVoiceAsrForConditionalGeneration", "VibeVoiceForConditionalGeneration", "PerceiverForMaskedLM"}
SAMPLE = [
    "GPT2LMHeadModel", "LlamaForCausalLM", "FalconH1ForCausalLM", "MiniCPM3ForCausalLM", "MixtralForCausalLM",
    "BertForMaskedLM", "WhisperForConditionalGeneration", "CohereForCausalLM", "GraniteForCausalLM",
    "Gemma2ForCausalLM", "Qwen3MoeForCausalLM", "BartForConditionalGeneration", "T5ForConditionalGeneration",
    "M2M100ForConditionalGeneration", "GptOssForCausalLM", "MBartForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "BambaForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "GPTNeoXForCausalLM",
    "RobertaForMaskedLM", "PhiForCausalLM", "ElectraForMaskedLM", "MarianMTModel", "CodeGenForCausalLM",
    "BigBirdPegasusForConditionalGeneration",
]  # fmt: skip


def field(config, name):
    try:
        return True, getattr(config, name)
    except Exception:  # some raise more than AttributeError
        return False, None


def configuration(kind, more, left=()):
    """A configuration's fields made small, wherever they are and of the same type; some left as they are."""
    plain = kind()
    fields = {}
    for name, value in {**SMALL, **more}.items():
        there, found = field(plain, name)
        fits = found is None or value is None or isinstance(found, (int, float)) or name in more
        own = getattr(kind, "attribute_map", {}).get(name, name)
        if there and fits and name not in left and not isinstance(getattr(kind, own, None), property):
            fields[name] = value
    fields |= {k: 0.0 for k, v in plain.to_dict().items() if "drop" in k and isinstance(v, float)}
    if "qk_rope_head_dim" in fields:
        fields |= dict(head_dim=fields["qk_rope_head_dim"], num_key_value_heads=2)
    rope = field(plain, "rope_parameters")[1]
    if isinstance(rope, dict) and ("mrope_section" in rope or "mrope" in more):
        fields["rope_parameters"] = {**rope, "mrope_section": [1, 1, 2]}
    for name in getattr(kind, "sub_configs", {}):
        found = field(plain, name)[1]
        if found is not None:
            fields[name] = configuration(type(found), more, left).to_dict()
    if getattr(plain, "is_encoder_decoder", False):
        fields.pop("is_decoder", None)
        fields |= dict(pad_token_id=2, decoder_start_token_id=1)
    return kind(**fields)


def architectures():
    """Names of classes, with the type of their configuration and the mapping that they are in."""
    found = {}
    for mapping in MAPPINGS:
        for kind, names in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, (kind, mapping))
    return {k: v for k, v in found.items() if k not in BIG}


def build(name, kind, mapping, seed=1):
    made, more = getattr(transformers, name), MORE.get(kind, {})
    more = more | (dict(is_decoder=False) if mapping == "MASKED_LM" else {})
    own = getattr(made, "config_class", None)
    of = own if isinstance(own, type) and issubclass(own, transformers.PreTrainedConfig) else CONFIG_MAPPING[kind]
    try:
        config = configuration(of, more)
    except Exception:
        config = configuration(of, more, left=("layer_types",))
    torch.manual_seed(seed)
    return made(config).eval()


def inputs_for(model):
    torch.manual_seed(0)
    ids = torch.randint(3, V - 5, (2, 12))
    labels = ids.clone()
    labels[0, -3:] = -100
    config = model.config
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        return dict(input_features=torch.randn(2, config.num_mel_bins, 128), labels=labels)
    if config.is_encoder_decoder and model.main_input_name != "input_ids":
        return dict(encoder_outputs=BaseModelOutput(torch.randn(2, 10, 16)), labels=labels)
    if config.model_type == "qwen2_vl":
        return dict(input_ids=ids, labels=labels, position_ids=torch.arange(12).view(1, 1, 12).expand(3, 2, 12))
    return dict(input_ids=ids, labels=labels)


def loss_and_gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(3)  # of noise that models train with
    outputs = model(**inputs)
    loss = outputs["loss"] if "loss" in outputs else outputs[0]
    loss.backward()
    assert torch.isfinite(loss)
    return loss.detach(), [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]


def differs(got, want, tolerance=1e-4):
    """Whether losses differ, relatively, or gradients, by the largest of all."""
    largest = max(float(g.abs().max()) for g in want[1] if g.numel())
    gradients = [float((a - b).abs().max()) / largest for a, b in zip(got[1], want[1], strict=True) if a.numel()]
    return max(abs(float(got[0] / want[0]) - 1), *gradients) > tolerance


def compare_patched(name, kind, mapping):
    """None if it cannot be made or run tiny; else how the patched model compares with its own."""
    try:
        model = build(name, kind, mapping)
        inputs = inputs_for(model)
        want = [loss_and_gradients(model.train(training), inputs) for training in (False, True)]
    except Exception:
        return None
    try:
        patch_model(model)
    except (TypeError, ValueError) as refusal:
        return "refused", str(refusal)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [loss_and_gradients(model.train(training), inputs) for training in (False, True)]
    whole = [str(w.message) for w in caught if "makes its logits whole" in str(w.message)]
    return "differs" if any(map(differs, got, want)) else "whole" if whole else "equal", *whole[:1]


PROMPTS = [torch.tensor(x) for x in ([5, 6, 7], [8, 9], [10, 11, 12, 13])]
TARGETS = [torch.tensor(x) for x in ([20, 21, 1], [22, 23, 24, 25, 1], [26, 1])]


@torch.no_grad()
def compare_distilled(name, kind, mapping):
    """As `compare_patched`, of the KL that `FDistillTrainer` evaluates and the one of both models' logits."""
    try:
        pair = [build(name, kind, mapping, seed) for seed in (1, 2)]
        log_p = []
        for model in pair:
            inputs, labels = teacher_forced(model, PROMPTS, TARGETS, 2)
            logits = model(**accepted(model, {**inputs, "use_cache": False}, False)).logits
            log_p.append(logits[labels != -100].double().log_softmax(-1))
        want = kl_div(*log_p, log_target=True, reduction="sum")
    except Exception:
        return None
    try:
        teacher, _ = rows_of(pair[1], PROMPTS, TARGETS, 2)
        got, _ = forward_to_head(pair[0], PROMPTS, TARGETS, 2, lambda rows: step_loss(rows, teacher, TABLE["kl"]))
    except (TypeError, ValueError) as refusal:
        return "refused", str(refusal)
    return ("differs" if abs(got / want - 1) > 1e-4 else "equal",)


#: Architectures that must be compared at least, sample and whole; and those that must be fused.
LEAST = {compare_patched: (27, 300), compare_distilled: (21, 190)}


@pytest.fixture
def quiet():
    """Without transformers' remarks; put back, for trainers choose their progress bar by it."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("compare", [compare_patched, compare_distilled])
def test_architectures(compare, capsys):
    found, whole = architectures(), bool(os.environ.get("FDISTILL_WHOLE"))
    results = {name: compare(name, *found[name]) for name in (found if whole else SAMPLE)
               if compare is compare_patched or found[name][1] in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")}  # fmt: skip
    results = {name: result for name, result in results.items() if result}
    of = {kind: [n for n, r in results.items() if r[0] == kind] for kind in ("equal", "whole", "refused", "differs")}
    with capsys.disabled():
        if whole:
            print(f"\n{compare.__name__}: " + ", ".join(f"{len(names)} {kind}" for kind, names in of.items()))
            print(*(f"  {name}: {result[1]}" for name, result in results.items() if len(result) > 1), sep="\n")
    assert not of["differs"]
    assert len(of["equal"]) + len(of["whole"]) >= LEAST[compare][whole]
    assert len(of["whole"]) + len(of["refused"]) < 0.05 * len(results)
