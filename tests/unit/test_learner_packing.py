"""Packed rows give every sequence the log-probs and gradients it has alone, or are refused."""

import pytest
import torch
from learner_samples import SHAPE, VOCABULARY, make_groups, write_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    masking_utils,
)

import learner.packing
from learner.batch import build_step_batch
from learner.logprobs import Policy
from learner.packing import NAME, PackedRow, UnpackableError, attend, attend_varlen, enable_packing

WINDOW = 5
MODELS = {
    "dense": Qwen3Config(**SHAPE, tie_word_embeddings=False),
    "tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "moe": Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "llama": LlamaConfig(**SHAPE),
    "window": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "mixed windows": Qwen3Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
}


def _build(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)
    return model.eval()


def _measure(model, batch, temperature):
    """Log-probs of each sequence by its number, and gradients of a weighted sum of all."""
    policy = Policy(model)
    policy.train()
    found, total = {}, 0.0
    for micro in batch.micro_batches + batch.quiet:
        logprobs, _ = policy(micro.tokens, micro.positions, micro.targets, temperature, packed=micro.packed)
        rows = logprobs.split(micro.mask.sum(1).tolist())
        for row, values in zip(micro.rows.tolist(), rows, strict=True):
            found[row] = values.detach()
            total = total + (1 + row % 3) * values.sum()
    total.backward()
    return found, {name: parameter.grad for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [40, 10**6])
def test_packed_equals_padded(name, budget, checkpointing):
    groups = make_groups(5, holes=True)
    layout = {"micro_batch_tokens": budget, "normalise_std": False}
    padded, packed = (build_step_batch(groups, **layout, packed=packed) for packed in (False, True))
    assert len(packed.micro_batches) > 1 or budget > 40
    assert all(len(micro.tokens) == 1 for micro in packed.micro_batches)

    def build():
        model = _build(MODELS[name])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    model = build()
    enable_packing(model)
    assert model.config._attn_implementation == NAME
    right, right_gradients = _measure(build(), padded, 0.7)
    found, gradients = _measure(model, packed, 0.7)
    assert found.keys() == right.keys()
    for row, values in right.items():
        assert torch.allclose(found[row], values, atol=1e-5), row
    largest = max(float(gradient.abs().max()) for gradient in right_gradients.values())
    for parameter, gradient in right_gradients.items():
        assert float((gradients[parameter] - gradient).abs().max()) < 1e-5 * largest, parameter


def test_padded_rows_go_through_the_same_attention():
    """The probe of a packing engine is laid out in padded rows."""
    plain, packing = _build(MODELS["mixed windows"]), _build(MODELS["mixed windows"])
    enable_packing(packing)
    tokens = torch.randint(0, VOCABULARY, (3, 11))
    with torch.no_grad():
        expected, found = (model(input_ids=tokens).logits for model in (plain, packing))
    assert torch.allclose(found, expected, atol=1e-5)


def test_nothing_of_the_size_of_a_row_squared_is_built(monkeypatch):
    model = _build(MODELS["dense"])
    enable_packing(model)
    sizes = []
    attention = nn.functional.scaled_dot_product_attention

    def spy(query, *arguments, attn_mask=None, **others):
        sizes.append((query.shape[0], query.shape[2]))
        assert attn_mask is None
        return attention(query, *arguments, attn_mask=attn_mask, **others)

    def mask(*_, **__):
        raise AssertionError("transformers built a mask")

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    for name in ("sdpa_mask", "eager_mask"):
        monkeypatch.setattr(masking_utils, name, mask)
    (micro,) = build_step_batch(
        make_groups(30, rewards=[1.0, 0.0, 0.0, 0.0]), micro_batch_tokens=10**6, normalise_std=False, packed=True
    ).micro_batches
    model(input_ids=micro.tokens, position_ids=micro.packed.position_ids, packed=micro.packed, use_cache=False)
    computed = sum(count * longest for count, longest in sizes) / SHAPE["num_hidden_layers"]
    assert micro.tokens.shape[1] <= computed < 1.25 * micro.tokens.shape[1]


@pytest.mark.parametrize("window", [None, 3, 100])
def test_a_kernel_for_variable_lengths_is_given_the_same_problem(window):
    packed = PackedRow.of([9, 9, 5, 2, 1])
    query, key, value = (torch.randn(1, heads, 26, 8) for heads in (4, 2, 2))
    expected, _ = attend(nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, packed=packed)
    options = (0.3, 0.0, window)
    assert torch.allclose(attend_varlen(_varlen, query, key, value, packed, *options), expected, atol=1e-6)


def _varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size
):
    """What `flash_attn_varlen_func` computes, one sequence at a time."""
    assert causal
    assert dropout_p == 0.0
    assert (cu_seqlens_q == cu_seqlens_k).all()
    lengths = cu_seqlens_q.diff()
    assert max_seqlen_q == max_seqlen_k == int(lengths.max())
    parts = []
    for first, last in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        queries = q[first:last].transpose(0, 1)
        keys, values = (x[first:last].transpose(0, 1).repeat_interleave(2, 0) for x in (k, v))
        behind = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        scores = (queries @ keys.transpose(1, 2) * softmax_scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts)


SMALL = {key: value for key, value in SHAPE.items() if key != "head_dim"}
UNPACKABLE = {
    "convolutions": (Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "layers of type conv"),
    "soft caps": (Gemma2Config(**SHAPE), "softcap"),
    "sinks": (GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2), "s_aux"),
}


@pytest.mark.parametrize("name", UNPACKABLE)
def test_what_cannot_be_packed_says_why_and_stays_as_it_was(name):
    config, reason = UNPACKABLE[name]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    before = model.config._attn_implementation
    with pytest.raises(UnpackableError, match=reason):
        enable_packing(model)
    assert model.config._attn_implementation == before


def test_a_model_that_leaks_between_sequences_is_found_out():
    model = _build(MODELS["dense"])
    layer = model.model.layers[1]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda hidden: forward(hidden + 1e-3 * hidden.roll(1, 1))
    with pytest.raises(UnpackableError, match="see another"):
        enable_packing(model)
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_gets_no_layout_is_found_out(monkeypatch):
    model = _build(MODELS["dense"])
    monkeypatch.setattr(learner.packing, "row_arguments", lambda tokens, _: {"input_ids": tokens, "use_cache": False})
    with pytest.raises(UnpackableError, match="see another"):
        enable_packing(model)


def test_packing_is_of_the_model_that_is_trained(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "m"))
    enable_packing(model)
    assert not any(parameter.grad is not None for parameter in model.parameters())
