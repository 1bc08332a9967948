"""The tiled head equals log_softmax over whole logits in float64: values, entropy and gradients; and stays small."""

import math

import pytest
import torch
from learner_samples import SHAPE, VOCABULARY, write_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    NanoChatConfig,
)

import learner.logprobs
from learner.logprobs import LogitShape, LogprobHead, Policy, scatter_rows

PLAIN = LogitShape()


def make_head(bias=False, dtype=torch.float32, vocabulary=31, width=16):
    torch.manual_seed(1)
    linear = nn.Linear(width, vocabulary, bias=bias)
    nn.init.normal_(linear.weight)
    return linear.to(dtype)


def reference(linear, hidden, targets, shape):
    """Log-probs, entropy and the float64 leaves (hidden, weight, bias) they come from."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, *linear.parameters())]
    logits = nn.functional.linear(*leaves) * shape.scale
    if shape.cap is not None:
        logits = shape.cap * torch.tanh(logits / shape.cap)
    distribution = (logits / shape.temperature).log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    return distribution.gather(1, targets[:, None]).squeeze(1), entropy, leaves


def tile(monkeypatch, tokens, columns):
    monkeypatch.setattr(learner.logprobs, "TILE_TOKENS", tokens)
    monkeypatch.setattr(learner.logprobs, "TILE_LOGITS", {"cpu": tokens * columns})


SHAPES = [
    PLAIN,
    LogitShape(temperature=0.7),
    LogitShape(scale=0.0625, temperature=1.3),
    LogitShape(cap=3.0),
    LogitShape(scale=0.5, cap=2.0, temperature=0.6),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens_and_columns", [(1, 1), (3, 7), (4, 31), (1000, 2), (1000, 1000)])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_values_and_gradients_equal_log_softmax(monkeypatch, bias, shape, tokens_and_columns, with_entropy):
    tile(monkeypatch, *tokens_and_columns)
    linear = make_head(bias)
    hidden = torch.randn(10, 16, requires_grad=True)
    targets = torch.randint(0, 31, (10,))
    upstream, entropy_upstream = torch.randn(10), torch.randn(10) * with_entropy
    exact, exact_entropy, leaves = reference(linear, hidden, targets, shape)
    expected = torch.autograd.grad(exact @ upstream.double() + exact_entropy @ entropy_upstream.double(), leaves)

    logprobs, entropy = LogprobHead(linear)(hidden, targets, shape, with_entropy)
    assert torch.allclose(logprobs.double(), exact, atol=1e-5)
    assert torch.allclose(entropy.double(), exact_entropy, atol=1e-5)
    assert entropy.requires_grad == with_entropy
    loss = logprobs @ upstream + (entropy @ entropy_upstream if with_entropy else 0)
    for actual, right in zip(torch.autograd.grad(loss, [hidden, *linear.parameters()]), expected, strict=True):
        assert torch.allclose(actual.double(), right, atol=1e-5)


def test_the_entropy_alone_has_a_gradient():
    linear = make_head()
    hidden = torch.randn(10, 16, requires_grad=True)
    targets = torch.randint(0, 31, (10,))
    _, exact, leaves = reference(linear, hidden, targets, PLAIN)
    _, entropy = LogprobHead(linear)(hidden, targets, PLAIN, True)
    gradients = torch.autograd.grad(entropy.sum(), [hidden, linear.weight])
    for actual, right in zip(gradients, torch.autograd.grad(exact.sum(), leaves), strict=True):
        assert torch.allclose(actual.double(), right, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(monkeypatch, dtype):
    """What is rounded is the logits, as the model would, their gradient, and each result once: not what tiles add."""
    tile(monkeypatch, 2, 5)
    linear = make_head(dtype=dtype)
    hidden = torch.randn(400, 16).to(dtype).requires_grad_()
    targets = torch.randint(0, 31, (400,))
    exact = linear(hidden).detach().double().log_softmax(-1)
    logprobs, entropy = LogprobHead(linear)(hidden, targets, PLAIN)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert torch.allclose(logprobs.double(), exact.gather(1, targets[:, None]).squeeze(1), atol=1e-5)
    assert torch.allclose(entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5)

    logprobs.sum().backward()
    slope = nn.functional.one_hot(targets, 31).double() - exact.exp()
    slope = slope.float().to(dtype).double()
    weight_gradient = slope.T @ hidden.detach().double()
    hidden_gradient = slope @ linear.weight.detach().double()
    rounding = torch.finfo(dtype).eps
    for actual, right in ((linear.weight.grad, weight_gradient), (hidden.grad, hidden_gradient)):
        assert actual.dtype == dtype
        assert torch.allclose(actual.double(), right, rtol=rounding, atol=rounding * 1e-1)


def test_no_tokens_give_a_zero_gradient():
    linear = nn.Linear(4, 7)
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprobs, entropy = LogprobHead(linear)(hidden, torch.zeros(0, dtype=torch.long), PLAIN, True)
    (logprobs.sum() + entropy.sum()).backward()
    assert not linear.weight.grad.any()
    assert not linear.bias.grad.any()


def test_a_token_that_is_ruled_out_costs_the_others_nothing(monkeypatch):
    tile(monkeypatch, 2, 3)
    linear = make_head(bias=True)
    linear.bias.data[[0, 1, 2, 11]] = -math.inf
    hidden = torch.randn(6, 16, requires_grad=True)
    targets = torch.tensor([3, 4, 5, 6, 7, 30])
    kept = [i for i in range(31) if i not in (0, 1, 2, 11)]
    small = nn.Linear(16, len(kept))
    small.weight.data, small.bias.data = linear.weight.data[kept], linear.bias.data[kept]
    exact, exact_entropy, leaves = reference(small, hidden, torch.tensor([kept.index(t) for t in targets]), PLAIN)
    logprobs, entropy = LogprobHead(linear)(hidden, targets, PLAIN, True)
    assert torch.allclose(logprobs.double(), exact, atol=1e-5)
    assert torch.allclose(entropy.double(), exact_entropy, atol=1e-5)
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
    (right,) = torch.autograd.grad(exact.sum() + exact_entropy.sum(), leaves[0])
    assert torch.allclose(gradient.double(), right, atol=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_large_logits_neither_overflow_nor_lose_the_target(size):
    linear = nn.Linear(2, 3, bias=False)
    linear.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    hidden = torch.tensor([[size, 0.0]], requires_grad=True)
    logprobs, entropy = LogprobHead(linear)(hidden, torch.tensor([1]), PLAIN)
    assert logprobs.item() == -2 * size
    assert entropy.item() == 0.0
    assert torch.autograd.grad(logprobs.sum(), hidden)[0].tolist() == [[-2.0, 0.0]]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation read or made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


def largest_tensor(compute, *leaves):
    # The backward pass runs on a thread of its own where devices have them, on the caller's on a CPU.
    with LargestTensor() as watched:
        torch.autograd.grad(compute(), leaves)
    return watched.elements


@pytest.mark.parametrize("shape", [PLAIN, LogitShape(scale=2.0, cap=3.0, temperature=0.7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_grows_with_tokens_times_vocabulary(monkeypatch, shape, dtype):
    tile(monkeypatch, 64, 32)
    num_tokens, vocabulary, width = 500, 3000, 16
    linear = make_head(bias=True, dtype=dtype, vocabulary=vocabulary, width=width)
    hidden = torch.randn(num_tokens, width).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (num_tokens,))

    def tiled():
        logprobs, entropy = LogprobHead(linear)(hidden, targets, shape, True)
        return logprobs.sum() + entropy.sum()

    def plain():
        return linear(hidden).float().log_softmax(-1).gather(1, targets[:, None]).sum()

    leaves = (hidden, linear.weight)
    assert largest_tensor(plain, *leaves) == num_tokens * vocabulary
    assert largest_tensor(tiled, *leaves) == max(vocabulary * width, num_tokens * width)


@pytest.mark.parametrize(("tied", "experts"), [(False, 0), (True, 0), (False, 4)])
def test_policy_equals_the_model_it_wraps(tmp_path, tied, experts):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "m", tied=tied, experts=experts))
    names = list(model.state_dict())
    check_policy(model, 0.8)
    assert list(model.state_dict()) == names
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


FAMILIES = {
    "gemma2": Gemma2Config(**SHAPE, final_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SHAPE, final_logit_softcapping=2.0),
    "nanochat": NanoChatConfig(**SHAPE, final_logit_softcapping=1.5),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": GraniteConfig(**SHAPE, logits_scaling=4.0),
    "hyperclovax": HyperCLOVAXConfig(**SHAPE, logits_scaling=4.0),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_scale_or_cap_their_logits(family):
    torch.manual_seed(3)
    config = FAMILIES[family]
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    check_policy(model.eval(), 0.8)


def check_policy(model, temperature):
    """Values and gradients of all parameters against the model's own logits."""
    tokens = torch.randint(0, VOCABULARY, (3, 9))
    positions = torch.tensor([0, 5, 9 + 2, 18 + 7])
    targets = torch.tensor([1, 2, 3, 4])
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
    distribution = (model(input_ids=tokens).logits / temperature).log_softmax(-1)
    expected = distribution.flatten(0, 1)[positions, targets]
    right = torch.autograd.grad(expected @ upstream, list(model.parameters()), allow_unused=True)
    policy = Policy(model)
    logprobs, _ = policy(tokens, positions, targets, temperature)
    gradients = torch.autograd.grad(logprobs @ upstream, list(model.parameters()), allow_unused=True)
    assert torch.allclose(logprobs, expected, atol=1e-5)
    size = max(float(gradient.abs().max()) for gradient in right if gradient is not None)
    for actual, wanted in zip(gradients, right, strict=True):
        assert (actual is None) == (wanted is None)
        assert actual is None or torch.allclose(actual, wanted, atol=1e-5 * max(size, 1.0))


def test_scatter_rows_is_differentiable_and_zero_elsewhere():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    grid = scatter_rows(values, mask)
    assert grid.tolist() == [[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]
    (grid * torch.tensor([[5.0, 9.0, 6.0], [9.0, 9.0, 7.0]])).sum().backward()
    assert values.grad.tolist() == [5.0, 6.0, 7.0]
