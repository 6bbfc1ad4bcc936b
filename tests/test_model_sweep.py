"""Every architecture that the installed transformers can make tiny: its loss, and the one from its logits, are ours.

A sample by default; all of them with FDISTILL_WHOLE=1.
"""

import copy
import inspect
import itertools
import os
import warnings
from unittest.mock import patch

import pytest
import torch
import transformers
from torch.nn.functional import kl_div
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fdistill_kernels.divergences import TABLE
from fdistill_kernels.integrations.transformers import patch_model
from fdistill_kernels.sequence import sampling
from fdistill_kernels.sequence.forward import forward_to_head, rows_of
from fdistill_kernels.sequence.generation import chosen
from fdistill_kernels.sequence.losses import step_loss
from fdistill_kernels.sequence.models import accepted
from fdistill_kernels.sequence.sampling import Sampling, draw
from fdistill_kernels.sequence.teacher_forcing import teacher_forced

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
    "falcon_h1": dict(mamba_d_ssm=32, mamba_n_groups=1, mamba_chunk_size=8, lm_head_multiplier=0.1),
    "minicpm3": dict(dim_model_base=8), "cohere": dict(logit_scale=0.25), "granite": dict(logits_scaling=4.0),
    "gemma2": dict(final_logit_softcapping=2.0), "diffllama": dict(num_key_value_heads=2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]), "zaya": dict(num_experts_per_tok=1),
    "prophetnet": dict(num_encoder_layers=2), "xlnet": dict(n_layer=2), "reformer": dict(axial_pos_embds=False),
    "xmod": dict(default_language="en_XX"), "nllb-moe": dict(output_router_logits=False),
    **{kind: dict(mrope=True) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "glm4v", "glm46v",
                                           "glm_ocr", "paddleocr_vl")},
    "cohere2_vision": dict(downsample_factor=1), "esmc": dict(num_key_value_heads=2),
    "glm4v_moe": dict(mrope=True, hidden_size=32, out_hidden_size=32),
    "neomme": dict(head_dim=16),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "zamba": dict(layers_block_type=["hybrid", "hybrid"]),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"]),
    "mamba2": dict(num_heads=4, n_groups=1, head_dim=8, expand=2),
    "encoder-decoder": dict(add_cross_attention=True), "speech-encoder-decoder": dict(add_cross_attention=True),
    "blip-2": dict(num_query_tokens=2, image_token_index=V - 1),
    "instructblip": dict(num_query_tokens=2, image_token_index=V - 1),
    "instructblipvideo": dict(num_query_tokens=2, video_token_index=V - 1),
    "chameleon": dict(vocabulary_map={"<image>": V - 1}), "emu3": dict(vocabulary_map={"<image>": V - 1}),
    "hunyuan_vl_text": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 1, 1])),
    "ernie4_5_vl_moe": dict(moe_intermediate_size=[16, 16], mrope=True),
    "hy_v4_vl": dict(mrope=True, qk_rope_head_dim=8),
    "granite4_vision": dict(deepstack_layer_map=[(0, 0)], spatial_target_layers=[0], downsample_rate="2/4"),
    "blt": dict(hidden_size_global=16),
    "inkling2_loop": dict(text_hidden_size=16), "molmo2": dict(vision_feature_layer=[1, 0]),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"]),
    "dbrx": dict(attn_config=dict(rope_theta=1e4, kv_n_heads=1, clip_qkv=8.0)),
    "fun_asr_nano": dict(adaptor_config=dict(hidden_size=16, intermediate_size=4)),
    "moonshine_streaming": dict(num_key_value_heads=2),
    "cohere_compass_text": dict(rope_parameters={"full_attention": dict(rope_type="default", rope_theta=1e4)}),
}  # fmt: skip
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
        there = there or name in MORE.get(kind.model_type, {})
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
            own = configuration(type(found), more | MORE.get(found.model_type, {}), left).to_dict()
            fields[name] = own | more.get(name, {})
    if getattr(plain, "is_encoder_decoder", False):
        fields.pop("is_decoder", None)
        fields |= dict(pad_token_id=2, decoder_start_token_id=1)
    return kind(**fields)


def in_proportion(kind, more, layers):
    """A configuration of a few layers whose every width is an eighth: what must fit together still does."""
    plain, fields = kind(), {}
    depth = field(plain, "num_hidden_layers")[1]
    for name, value in plain.to_dict().items():
        found = field(plain, name)[1]
        if isinstance(found, transformers.PreTrainedConfig):
            fields[name] = in_proportion(type(found), more | MORE.get(found.model_type, {}), layers).to_dict()
        elif name not in ("transformers_version", "model_type", "_name_or_path", "architectures", "dtype"):
            fields[name] = smaller(name, value, depth, layers)
    return kind(**{**fields, **{name: value for name, value in more.items() if field(plain, name)[0]}})


def smaller(name, value, depth, layers):
    """A field's value, of a configuration of `depth` layers, for one of `layers`."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not str(k).isdecimal() or int(k) < layers}  # layers' own values
        return {k: smaller(k, v, depth, layers) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        return [smaller("", v, None, layers) for v in (value[:layers] if len(value) == depth else value)]
    if isinstance(value, float):
        return 0.0 if "drop" in str(name) else value
    if type(value) is not int:
        return value
    if "vocab" in str(name):
        return V
    if "token" in str(name) and value >= V:
        return V - 1 - len(name) % 4  # none of those that are drawn
    if "layer" in str(name) or name == "depth":
        return min(value, layers)
    return value // 8 if value >= 64 and value % 8 == 0 else value


def configurations(kind, more):
    """Attempts at a small configuration, as functions."""
    yield lambda: configuration(kind, more)
    yield lambda: configuration(kind, more, left=("layer_types",))
    for layers in (2, 4, 6):
        yield lambda layers=layers: in_proportion(kind, more, layers)


def architectures():
    """Names of classes, with the type of their configuration and the mapping that they are in."""
    found = {}
    for mapping in MAPPINGS:
        for kind, names in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, (kind, mapping))
    return found


def attempts(name, kind, mapping):
    """Functions of a seed that make a model small, one after the other."""
    made, more = getattr(transformers, name), MORE.get(kind, {})
    more = more | (dict(is_decoder=False) if mapping == "MASKED_LM" else {})
    own = getattr(made, "config_class", None)
    of = own if isinstance(own, type) and issubclass(own, transformers.PreTrainedConfig) else CONFIG_MAPPING[kind]

    def build(config, seed=1):
        with torch.device("meta"):
            size = sum(p.numel() for p in made(copy.deepcopy(config)).parameters())
        assert size < 1.5e8, f"{size / 1e6:.0f} million parameters"
        torch.manual_seed(seed)
        model = made(copy.deepcopy(config)).eval()
        for special, value in dict(pad_token_id=2, decoder_start_token_id=1).items():
            if getattr(model.config, special, None) is None:
                setattr(model.config, special, value)
        return model

    for config in configurations(of, more):
        yield lambda seed=1, config=config: build(config(), seed)


class Encoded(BaseModelOutput):
    """What an encoder gives; some models look for its mask."""

    attention_mask = torch.ones(2, 10, dtype=torch.bool)


def hidden_sizes(config):
    """What an encoder's hidden states may be wide."""
    of = next((found for name in ("encoder", "encoder_config") if (found := field(config, name)[1])), config)
    widths = {field(of, name)[1] for name in ("hidden_size", "d_model", "encoder_hidden_size")}
    return widths - {None} | {SMALL["hidden_size"]}


def beside_text(config, ids):
    """Inputs by name that some models need beside their tokens."""
    size = field(field(config, "vision_config")[1], "image_size")[1] or field(config, "image_size")[1]
    size = size if isinstance(size, int) else 32
    images = torch.randn(2, 3, size, size)
    channels = field(field(config, "audio_config")[1], "num_mel_bins")[1] or 8
    return dict(
        bbox=torch.rand(2, 12, 4), pixel_values=images.unsqueeze(1) if field(config, "video_token_index")[0] else images,
        qformer_input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), image_embeds=torch.randn(2, 3, 16),
        image_embeds_position_mask=(torch.arange(12) < 3).expand(2, 12), input_features=torch.randn(2, channels, 96),
    )  # fmt: skip


def inputs_for(model):
    """Attempts at inputs: tokens, an encoder's hidden states, and what else the forward names."""
    torch.manual_seed(0)
    ids = torch.randint(3, V - 5, (2, 12))
    labels = ids.clone()
    labels[0, -3:] = -100
    config, known = model.config, inspect.signature(model.forward).parameters
    text = dict(input_ids=ids, labels=labels)
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        yield dict(input_features=torch.randn(2, config.num_mel_bins, 128), labels=labels)
    if "mrope_section" in (field(config.get_text_config(), "rope_parameters")[1] or {}):
        yield dict(**text, position_ids=torch.arange(12).view(1, 1, 12).expand(3, 2, 12))
    encoded = [dict(encoder_outputs=Encoded(torch.randn(2, 10, width)), labels=labels)
               for width in (hidden_sizes(config) if config.is_encoder_decoder else ())]  # fmt: skip
    yield from [text, *encoded] if model.main_input_name == "input_ids" else [*encoded, text]
    if field(config, "num_codebooks")[1]:
        yield {**text, "input_ids": ids.unsqueeze(2).expand(2, 12, config.num_codebooks + 1)}
    others = {name: value for name, value in beside_text(config, ids).items() if name in known}
    for names in (*((name,) for name in others), others):
        yield {**text, **{name: others[name] for name in names}}
    count = field(config, "num_query_tokens")[1]
    if count and "pixel_values" in others:  # with a picture's tokens
        yield {**text, **others, "input_ids": torch.cat((torch.full((2, count), V - 1), ids[:, count:]), 1)}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(3)  # of noise that models train with
    outputs = model(**copy.deepcopy(inputs))  # Moonshine's changes them
    loss = outputs["loss"] if "loss" in outputs else outputs[0]
    loss.backward()
    assert torch.isfinite(loss)
    return loss.detach(), [p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters()]


def differs(got, want, tolerance=1e-4):
    """Whether losses differ, relatively, or gradients, by the largest of all."""
    largest = max(float(g.abs().max()) for g in want[1] if g.numel())
    gradients = [float((a - b).abs().max()) / largest for a, b in zip(got[1], want[1], strict=True) if a.numel()]
    return max(abs(float(got[0] / want[0]) - 1), *gradients) > tolerance


def short(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def small(name, kind, mapping):
    """A model that its own forward trains, inputs, and losses with gradients without training and with; or a model or
    none, and the reasons why not."""  # fmt: skip
    reasons, last = [], None
    for make in attempts(name, kind, mapping):
        try:
            last = model = make()
        except Exception as error:
            reasons.append(short(error))
            continue
        for inputs, modes in itertools.product(inputs_for(model), [(False, True), (True,)]):
            try:
                return model, inputs, {mode: loss_and_gradients(model.train(mode), inputs) for mode in modes}
            except Exception as error:  # in training alone: Reformer's
                reasons.append(short(error))
    return last, None, reasons


def compare_patched(name, kind, mapping):
    """How the patched model compares with its own, or why it cannot be made or run small."""
    model, inputs, want = small(name, kind, mapping)
    try:
        if model is not None:
            patch_model(model)
    except (TypeError, ValueError) as refusal:
        return "refused", str(refusal)
    if inputs is None:
        return "cannot", " | ".join(dict.fromkeys(want))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = {mode: loss_and_gradients(model.train(mode), inputs) for mode in want}
    whole = [str(w.message) for w in caught if "makes its logits whole" in str(w.message)]
    if any(differs(got[mode], want[mode]) for mode in want):
        return "differs", *whole[:1]
    return "whole" if whole else "equal", *whole[:1]


PROMPTS = [torch.tensor(x) for x in ([5, 6, 7], [8, 9], [10, 11, 12, 13])]
TARGETS = [torch.tensor(x) for x in ([20, 21, 1], [22, 23, 24, 25, 1], [26, 1])]


def own_divergence(pair):
    """The KL of two models, from their logits."""
    log_p = []
    for model in pair:
        inputs, labels = teacher_forced(model, PROMPTS, TARGETS, 2)
        logits = model(**accepted(model, {**inputs, "use_cache": False})).logits
        log_p.append(logits[labels != -100].double().log_softmax(-1))
    return kl_div(*log_p, log_target=True, reduction="sum")


@torch.no_grad()
def compare_distilled(name, kind, mapping):
    """As `compare_patched`, of the KL that `FDistillTrainer` evaluates and the one of both models' logits."""
    reasons = []
    for make in attempts(name, kind, mapping):
        try:
            pair = [make(seed) for seed in (1, 2)]
            want = own_divergence(pair)
            break
        except Exception as error:
            reasons.append(short(error))
    else:
        return "cannot", " | ".join(dict.fromkeys(reasons))
    try:
        teacher, _ = rows_of(pair[1], PROMPTS, TARGETS, 2)
        got, _ = forward_to_head(pair[0], PROMPTS, TARGETS, 2, lambda rows: step_loss(rows, teacher, TABLE["kl"]))
    except (TypeError, ValueError) as refusal:
        return "refused", str(refusal)
    return ("differs" if abs(got / want - 1) > 1e-4 else "equal",)


#: What cannot be made small or run, and why: anything else that cannot is a failure.
LEFT = {
    "Gemma3nForConditionalGeneration": "needs timm", "FastVlmForConditionalGeneration": "needs timm",
    "PerceptionLMForConditionalGeneration": "needs timm",
    "InklingForConditionalGeneration": "needs scipy, or is of 200 million parameters",
    "VibeVoiceAsrForConditionalGeneration": "tokenizers of sound, hundreds of millions of parameters large",
    "VibeVoiceForConditionalGeneration": "as VibeVoiceAsr",
    "Gemma4AssistantForCausalLM": "its configuration's own defaults are refused; its forward takes no labels",
    "Nemotron3_5TranscribeForConditionalGeneration": "its parts' sizes and tokens are tied to each other",
    "NemotronH_Omni_Reasoning_V3": "its configuration's own defaults are refused",
    "Apertus1p5ForConditionalGeneration": "ranges of tokens of pictures and sound that a small vocabulary has no room for",
    "Llama4ForConditionalGeneration": "its forward asks its text model's output for image_outputs, which it has not",
}  # fmt: skip
#: What takes no text alone, which is all that `FDistillTrainer` gives.
NO_TEXT = {
    "Gemma4UnifiedAssistantForCausalLM": "goes on from another model's keys and values",
    "MusicgenForCausalLM": "reads four codes a step", "MusicgenMelodyForCausalLM": "reads four codes a step",
    "VoxtralRealtimeForConditionalGeneration": "needs sound",
}  # fmt: skip
#: Architectures that must be compared at least, sample and whole; and those that must be fused.
LEAST = {compare_patched: (27, 350), compare_distilled: (21, 205)}


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
    kinds = ("equal", "whole", "refused", "differs", "cannot")
    of = {kind: [name for name, result in results.items() if result[0] == kind] for kind in kinds}
    with capsys.disabled():
        if whole:
            print(f"\n{compare.__name__}: " + ", ".join(f"{len(names)} {kind}" for kind, names in of.items()))
            print(*(f"  {name}: {result[1]}" for name, result in results.items() if len(result) > 1), sep="\n")
    assert not of["differs"]
    unknown = {name: results[name][1] for name in of["cannot"] if name not in LEFT}
    assert not unknown.keys() - (NO_TEXT.keys() if compare is compare_distilled else {}), unknown
    assert len(of["equal"]) + len(of["whole"]) >= LEAST[compare][whole]
    assert len(of["whole"]) + len(of["refused"]) < 0.05 * len(results)


@torch.no_grad()
def packs(name, kind, mapping):
    """Whether a model's packed rows are those that it gives padded, or it is refused, whatever its attention; None if it
    cannot be made."""  # fmt: skip
    for make in attempts(name, kind, mapping):
        try:
            want, _ = rows_of(model := make(), PROMPTS, TARGETS, 2)
        except Exception:
            continue
        results = []
        for attention in (None, "eager"):
            try:
                if attention:
                    model.set_attn_implementation(attention)
                got, _ = rows_of(model, PROMPTS, TARGETS, 2, pack=True)
            except ValueError as refusal:
                refused = str(refusal).startswith(name) and "pack" in str(refusal)
                results.append(refused and "refused")
            else:
                results.append((got.hidden - want.hidden).abs().max() < 1e-4 * want.hidden.abs().max() and "equal")
        return False not in results and results[0]
    return None


@pytest.mark.usefixtures("quiet")
def test_packed_rows_are_equal_or_refused():
    more = ["MambaForCausalLM", "RwkvForCausalLM", "RobertaForCausalLM", "MptForCausalLM", "XGLMForCausalLM",
            "BioGptForCausalLM", "Qwen3_5ForCausalLM"]  # fmt: skip
    causal = {name: found for name, found in architectures().items() if found[1] == "CAUSAL_LM" and name not in LEFT}
    names = causal if os.environ.get("FDISTILL_WHOLE") else [name for name in SAMPLE + more if name in causal]
    results = {name: packs(name, *causal[name]) for name in names}
    assert False not in results.values(), results
    assert results["LlamaForCausalLM"] == "equal"
    assert all(results.get(name, "refused") == "refused" for name in more), results


@torch.no_grad()
def generates(name, kind, mapping):
    """How sequences were drawn in a batch, or why not; False if teacher forcing says otherwise of each one alone."""
    for make in attempts(name, kind, mapping):
        try:
            model = make()
            rows_of(model, PROMPTS, TARGETS, 2)
        except Exception:
            continue
        model.generation_config.eos_token_id = [97]
        with patch.object(sampling, "drawn_by_forward", wraps=sampling.drawn_by_forward) as by_forward:
            try:
                drawn = draw(model, PROMPTS, Sampling(4, beams=1))
            except IndexError as error:  # a small model whose logits have more tokens than its embedding
                return short(error)
            except ValueError as refusal:  # Blenderbot's generation config, which beams cannot follow
                return "refused" if f"{name} has" in str(refusal) else False
        for prompt, made in zip(PROMPTS, drawn, strict=True):
            rows, _ = rows_of(model, [prompt], [made], 2, counted=chosen(model, [made]))
            scores = rows.logits(rows.hidden)
            best, given = scores.amax(1), scores.gather(1, rows.tokens[:, None])[:, 0]
            if (best - given).max() > 1e-4 * scores.abs().max():  # what ties may be either
                return False
        return "by forward" if by_forward.called else "by generate"
    return None


@pytest.mark.usefixtures("quiet")
def test_what_is_drawn_is_what_teacher_forcing_says():
    found = {name: of for name, of in architectures().items() if of[1] in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")}
    found = {name: of for name, of in found.items() if name not in LEFT.keys() | NO_TEXT.keys()}
    names = found if os.environ.get("FDISTILL_WHOLE") else [n for n in SAMPLE if n in found]
    results = {name: generates(name, *found[name]) for name in names}
    assert not [name for name, result in results.items() if result is False]
    assert list(results.values()).count("by generate") > 0.8 * len(results)
