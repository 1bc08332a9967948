"""The chunked head equals log_softmax over whole logits: values, entropy and gradients."""

import pytest
import torch
from learner_samples import VOCABULARY, write_model
from torch import nn
from transformers import AutoModelForCausalLM

import learner.logprobs
from learner.logprobs import LogprobHead, Policy, scatter_rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1 / 0.7, 2.0])
@pytest.mark.parametrize("tokens_in_chunk", [1, 3, 1000])
def test_values_and_gradients_equal_log_softmax(monkeypatch, bias, scale, tokens_in_chunk):
    monkeypatch.setattr(learner.logprobs, "CHUNK_LOGITS", tokens_in_chunk * 31)
    torch.manual_seed(1)
    linear = nn.Linear(16, 31, bias=bias)
    hidden = torch.randn(10, 16, requires_grad=True)
    targets = torch.randint(0, 31, (10,))
    upstream = torch.randn(10)

    expected = (linear(hidden) * scale).log_softmax(-1)
    chosen = expected.gather(1, targets[:, None]).squeeze(1)
    leaves = [hidden, *linear.parameters()]
    expected_gradients = torch.autograd.grad(chosen @ upstream, leaves)

    logprobs, entropy = LogprobHead(linear)(hidden, targets, scale)
    gradients = torch.autograd.grad(logprobs @ upstream, leaves)
    assert torch.allclose(logprobs, chosen, atol=1e-6)
    assert torch.allclose(entropy, -(expected.exp() * expected).sum(-1), atol=1e-5)
    assert not entropy.requires_grad
    for actual, right in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(actual, right, atol=1e-5)


def test_bfloat16_hidden_states_give_float32_logprobs():
    torch.manual_seed(2)
    linear = nn.Linear(16, 31, bias=False).bfloat16()
    hidden = torch.randn(5, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 31, (5,))
    logprobs, entropy = LogprobHead(linear)(hidden, targets, 1.0)
    logprobs.sum().backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert hidden.grad.dtype == linear.weight.grad.dtype == torch.bfloat16
    exact = linear(hidden).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert torch.allclose(logprobs, exact, atol=1e-6)


def test_no_tokens_give_a_zero_gradient():
    linear = nn.Linear(4, 7, bias=False)
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprobs, _ = LogprobHead(linear)(hidden, torch.zeros(0, dtype=torch.long), 1.0)
    logprobs.sum().backward()
    assert not linear.weight.grad.any()


@pytest.mark.parametrize(("tied", "experts"), [(False, 0), (True, 0), (False, 4)])
def test_policy_equals_the_model_it_wraps(tmp_path, tied, experts):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "m", tied=tied, experts=experts))
    tokens = torch.randint(0, VOCABULARY, (3, 9))
    positions = torch.tensor([0, 5, 9 + 2, 18 + 7])
    targets = torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.float()
        names = list(model.state_dict())
        logprobs, _ = Policy(model)(tokens, positions, targets, 0.8)
    expected = (logits / 0.8).log_softmax(-1).flatten(0, 1)[positions, targets]
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert list(model.state_dict()) == names
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "m"))
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        Policy(model)


def test_logit_scaling_of_the_model_is_honoured(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "m"))
    model.config.logit_scale, model.config.logits_scaling = 0.5, 4.0
    assert Policy(model).logit_scale == 0.125


def test_scatter_rows_is_differentiable_and_zero_elsewhere():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    grid = scatter_rows(values, mask)
    assert grid.tolist() == [[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]
    (grid * torch.tensor([[5.0, 9.0, 6.0], [9.0, 9.0, 7.0]])).sum().backward()
    assert values.grad.tolist() == [5.0, 6.0, 7.0]
