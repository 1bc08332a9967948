"""The gradient and statistics of a step, computed the plain way, and an engine that shows what it computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.batch import StepBatch, build_step_batch
from learner.engine import Engine
from learner.objectives import ObjectiveResult, compute_objective
from protocol.settings import Settings
from protocol.trajectory import Group

Reference = tuple[ObjectiveResult, dict[str, torch.Tensor], np.ndarray, np.ndarray]


class Spy(Engine):
    """Keeps the gradient, as DeepSpeed has reduced it, before the optimizer takes it."""

    gradients: dict[str, torch.Tensor]

    def _step(self) -> float:
        from deepspeed.utils import safe_get_full_grad

        self.gradients = {
            name.removeprefix("model."): (
                parameter.grad if self._stage == 0 and self._clips_itself else safe_get_full_grad(parameter)
            )
            .detach()
            .float()
            .clone()
            for name, parameter in self._policy.named_parameters()
        }
        return super()._step()


def plain_reference(model_dir: Path, settings: Settings, groups: list[Group]) -> Reference:
    """Loss, gradients and per-sequence statistics from whole logits of one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    batch = build_step_batch(groups, micro_batch_tokens=10**6, normalise_std=settings.objective.normalise_std)
    sequences = [(group.prompt_tokens, c) for group in groups for c in group.completions]
    width = max(len(c.tokens) for _, c in sequences)
    logprobs, behaviour, mask = [], torch.zeros(len(sequences), width), torch.zeros(len(sequences), width)
    entropy = []
    for i, (prompt, c) in enumerate(sequences):
        tokens = torch.from_numpy(np.concatenate([prompt, c.tokens])).long()
        distribution = (model(input_ids=tokens[None]).logits[0] / settings.task.temperature).log_softmax(-1)
        rows = distribution[len(prompt) - 1 : -1]
        chosen = rows.gather(1, tokens[len(prompt) :, None]).squeeze(1)
        logprobs.append(torch.nn.functional.pad(chosen, (0, width - len(chosen))))
        behaviour[i, : len(chosen)] = torch.from_numpy(c.logprobs.copy())
        mask[i, : len(chosen)] = torch.from_numpy(c.mask.copy())
        entropy.append(float((-(rows.exp() * rows).sum(-1) * mask[i, : len(chosen)]).sum().detach()))
    logprobs = torch.stack(logprobs)
    objective = settings.objective
    result = compute_objective(
        objective.name,
        logprobs,
        behaviour,
        torch.from_numpy(batch.advantages).float(),
        mask,
        aggregation=objective.aggregation,
        **objective.hyperparameters(),
    )
    result.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    behaviour_kl = ((behaviour - logprobs) * mask).sum(1).detach().numpy()
    return result, gradients, np.array(entropy), behaviour_kl


def check_update(engine: Spy, batch: StepBatch, reference: Reference, limit: float = 1e-5) -> None:
    """Update, and hold loss, statistics, norm and every gradient against the reference."""
    result, gradients, entropy, behaviour_kl = reference
    update = engine.update(batch)
    assert update.loss == pytest.approx(float(result.loss.detach()), rel=limit, abs=limit)
    assert np.allclose(update.log_w, result.sequence_log_ratio.numpy(), atol=2e-5)
    assert np.allclose(update.weights, result.weights.numpy(), atol=2e-5)
    assert np.allclose(update.entropy, entropy, atol=1e-4)
    assert np.allclose(update.behaviour_kl, behaviour_kl, atol=2e-5)
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert update.grad_norm == pytest.approx(float(norm), rel=limit)
    assert engine.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (engine.gradients[name] - gradient).abs().max() < limit * float(norm), name
