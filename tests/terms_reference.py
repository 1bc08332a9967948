"""Loss and gradient of a step with KL to a reference and entropy bonus, the plain way in float64."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.objectives import compute_objective

TEMPERATURE = 0.8


def whole_step(directory, reference, groups, advantages, kl, entropy, aggregation=None):
    """Loss, gradients, and sums over the tokens of each sequence of entropy and of k3, computed the plain way."""
    policy, other = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float64) for d in (directory, reference))
    sequences = [(g.prompt_tokens, c) for g in groups for c in g.completions]
    width = max(len(c.tokens) for _, c in sequences)
    grids = []
    for prompt, c in sequences:
        tokens = torch.from_numpy(np.concatenate([prompt, c.tokens])).long()
        rows = slice(len(prompt) - 1, -1)
        own = (policy(input_ids=tokens[None]).logits[0, rows] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            far = (other(input_ids=tokens[None]).logits[0, rows] / TEMPERATURE).log_softmax(-1)
        chosen, aim = (x.gather(1, tokens[len(prompt) :, None])[:, 0] for x in (own, far))
        ratio = (aim - chosen).exp()
        mask, behaviour = (torch.from_numpy(x.copy()).double() for x in (c.mask, c.logprobs))
        columns = [chosen, behaviour, mask, -(own.exp() * own).sum(-1) * mask, (ratio - 1 - ratio.log()) * mask]
        grids.append(torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in columns]))
    chosen, behaviour, mask, entropies, k3 = torch.stack(grids, 1)
    result = compute_objective("vespo", chosen, behaviour, torch.from_numpy(advantages), mask, aggregation=aggregation)
    loss = result.loss + (kl * k3.sum() - entropy * entropies.sum()) / mask.sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    return loss, gradients, entropies.sum(1).detach().numpy(), k3.sum(1).detach().numpy()


def check_terms(engine, batch, expected, kl):
    """Update, and hold loss, sums and every gradient against `whole_step`."""
    loss, gradients, entropies, k3 = expected
    update = engine.update(batch)
    assert update.loss == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-5)
    assert np.allclose(update.entropy, entropies, atol=1e-4)
    assert np.allclose(update.reference_kl, k3 if kl else 0, atol=1e-5)
    norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
    assert update.grad_norm == pytest.approx(norm, rel=1e-5)
    assert engine.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (engine.gradients[name].double() - gradient).abs().max() < 1e-5 * max(norm, 1.0), name
