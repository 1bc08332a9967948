"""Supervised training of the toy model up to a chosen share of right answers, so that there is reward to learn from.

Labels are half right and half uniform over all answers: the model learns the task without becoming certain, which
leaves reinforcement learning something to explore. The accuracy is no estimate: answers are so short that the exact
probability of the right one comes out of the training step itself.
"""

import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors.tasks import Task
from protocol.errors import SettingsError

LEARNING_RATE = 1.5e-3
RAMP_STEPS = 10
MAX_STEPS = 3000
PROMPTS_PER_STEP = 128
RIGHT_SHARE = 0.5
RIGHT_SHARE_MARGIN = 0.15  # labels must be right more often than the model is asked to be
MAX_GRAD_NORM = 1.0
IGNORED = -100  # label of cross_entropy's ignore_index


@runtime_checkable
class AnsweredTask(Task, Protocol):
    """A task of plain-text prompts that knows the right answer of each."""

    def answer(self, index: int) -> str:
        """Text for which `score` gives the full reward."""


@dataclass(frozen=True, slots=True)
class WarmStart:
    """How the supervised training ended."""

    steps: int
    accuracy: float
    seconds: float


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: AnsweredTask,
    *,
    accuracy: float,
    temperature: float,
    seed: int,
) -> WarmStart:
    """Train `model` in place until answers sampled at `temperature` are right with probability `accuracy`.

    Raises:
        SettingsError: the accuracy was not reached in `MAX_STEPS` steps.
    """
    started = time.monotonic()
    examples = _Examples(tokenizer, task, torch.Generator().manual_seed(seed))
    right_share = min(1.0, max(RIGHT_SHARE, accuracy + RIGHT_SHARE_MARGIN))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / RAMP_STEPS))
    model.train()
    for step in range(MAX_STEPS):
        tokens, labels, num_right = examples.batch()
        losses = _token_losses(model, tokens, labels, temperature)  # [B, T]
        reached = torch.exp(-losses[:num_right].detach().sum(1)).mean().item()
        if reached >= accuracy:
            return WarmStart(step, reached, time.monotonic() - started)
        right, other = losses[:num_right].sum(), losses[num_right:].sum()
        loss = 2 * (right_share * right + (1 - right_share) * other) / (labels != IGNORED).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        ramp.step()
    raise SettingsError(
        f"model.toy.warm_start_accuracy = {accuracy} was not reached: {reached:.2f} after {MAX_STEPS} steps; ask for "
        "less, make the model larger or the task smaller"
    )


class _Examples:
    """Batches in which every prompt stands twice: first with its right answer, then with one drawn at random."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, task: AnsweredTask, generator: torch.Generator) -> None:
        self._tokenizer = tokenizer
        self._task = task
        self._generator = generator
        step = max(1, task.num_prompts // 4096)  # enough of a large task to know its answers
        self._answers = sorted({task.answer(index) for index in range(0, task.num_prompts, step)})

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Tokens `[B, T]`, labels `[B, T]` of the following token, and how many of the first rows are right."""
        count = min(self._task.num_prompts, PROMPTS_PER_STEP)
        if count == self._task.num_prompts:
            chosen = list(range(count))
        else:
            chosen = torch.randint(self._task.num_prompts, (count,), generator=self._generator).tolist()
        drawn = torch.randint(len(self._answers), (count,), generator=self._generator).tolist()
        pairs = [(index, self._task.answer(index)) for index in chosen]
        pairs += [(index, self._answers[number]) for index, number in zip(chosen, drawn, strict=True)]
        rows = [self._row(index, answer) for index, answer in pairs]
        length = max(len(tokens) for tokens, _ in rows)
        pad = self._tokenizer.pad_token_id
        tokens = torch.tensor([t + [pad] * (length - len(t)) for t, _ in rows])
        labels = torch.tensor([[IGNORED] * n + t[n:] + [IGNORED] * (length - len(t)) for t, n in rows])
        return tokens[:, :-1], labels[:, 1:], count

    def _row(self, index: int, answer: str) -> tuple[list[int], int]:
        prompt = self._task.prompt(index)
        if not isinstance(prompt, str):
            raise SettingsError("[model.toy] has no chat template; the task's prompts must be plain text")
        tokens = self._tokenizer.encode(prompt)
        return [*tokens, *self._tokenizer.encode(answer), self._tokenizer.eos_token_id], len(tokens)


def _token_losses(
    model: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits / temperature  # [B, T, V]; padding is on the right
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
