"""Tiny models, settings, groups and an actor for the learner's tests."""

import os
import threading
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from buffer.connection import connect
from buffer.run import Buffer
from learner.batch import build_step_batch
from learner.engine import UpdateResult
from learner.stats import StepContext, step_record
from protocol.records import ActorStatus, StepRecord
from protocol.settings import Settings
from protocol.trajectory import Completion, Group, Ticket, VersionSpan

VOCABULARY = 23
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def write_model(directory: Path, *, tied: bool = False, experts: int = 0, seed: int = 0) -> Path:
    """Write a random Qwen3 (or Qwen3-MoE) as a Hugging Face directory."""
    torch.manual_seed(seed)
    if experts:
        sizes = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        config = Qwen3MoeConfig(**SHAPE, **sizes, tie_word_embeddings=tied)
    else:
        config = Qwen3Config(**SHAPE, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.apply(_spread)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def _spread(module: torch.nn.Module) -> None:
    # The default initialisation is so small that every distribution is nearly uniform.
    if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.2)


def make_settings(directory: Path, **sections: dict[str, object]) -> Settings:
    """Settings for float32 on the CPU; `sections` are merged over that."""
    tables: dict[str, dict[str, object]] = {
        "model": {"path": str(directory), "dtype": "float32", "device": "cpu"},
        "learner": {"precision": "float32", "learning_rate": 1e-3, "groups_per_step": 4},
    }
    for name, values in sections.items():
        tables[name] = tables.get(name, {}) | values
    return Settings.model_validate(tables)


def make_group(
    index: int,
    rng: np.random.Generator,
    *,
    version: int = 0,
    size: int = 4,
    attempt: int = 0,
    rewards: list[float] | None = None,
    holes: bool = False,
) -> Group:
    """A group of random tokens with behaviour log-probs near those of a random model."""
    completions = []
    for i in range(size):
        length = int(rng.integers(1, 9))
        mask = np.ones(length, "u1")
        if holes:
            mask = (rng.random(length) < 0.7).astype("u1")
        completions.append(
            Completion(
                tokens=rng.integers(0, VOCABULARY, length).astype("i4"),
                logprobs=(-3 + 0.3 * rng.standard_normal(length)).clip(max=0).astype("f4") * mask,
                mask=mask,
                spans=(VersionSpan(0, length, version),),
                reward=float(rng.integers(0, 2)) if rewards is None else rewards[i],
                finish_reason="stop",
            )
        )
    prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, 7))).astype("i4")
    return Group(Ticket(index, attempt), index, prompt, tuple(completions), "test", 0.1)


def make_groups(count: int, *, seed: int = 0, **options: object) -> list[Group]:
    """`count` random groups."""
    rng = np.random.default_rng(seed)
    return [make_group(index, rng, **options) for index in range(count)]  # type: ignore[arg-type]


class ScriptedActor(threading.Thread):
    """Takes tickets and submits a random group for each, always the same for the same ticket, until it is stopped."""

    def __init__(self, url: str, run: str, *, name: str = "scripted", **options: object) -> None:
        super().__init__(name=name, daemon=True)
        self._client = connect(url, reconnect_seconds=5.0)
        self.buffer = Buffer(self._client, run)
        self._options = options
        self._stopping = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._cycle()
            self.buffer.actors.leave(self.name)
        except BaseException as error:
            self.error = error

    def _cycle(self) -> None:
        clock = self.buffer.clock.read()
        version = -1 if clock is None else clock.version
        status = ActorStatus(state="serving", pid=os.getpid(), host="test", served_version=version)
        self.buffer.actors.heartbeat(self.name, status)
        issued = self.buffer.tickets.issue(version, 8, 10.0)
        if not issued.tickets:
            self.buffer.tickets.wait(issued.cursor, 0.2)
        for ticket in issued.tickets:
            self.deliver(self.generate(ticket, version))

    def generate(self, ticket: Ticket, version: int) -> Group:
        """The group of a ticket."""
        rng = np.random.default_rng([7, ticket.index])
        return make_group(ticket.index, rng, attempt=ticket.attempt, version=version, **self._options)  # type: ignore[arg-type]

    def deliver(self, group: Group) -> None:
        """Submit it."""
        self.buffer.groups.submit(group, 10.0)

    def stop(self) -> None:
        """End it and raise what it failed with."""
        self._stopping.set()
        self.join(timeout=10.0)
        self._client.close()
        if self.error is not None:
            raise self.error


def make_context(**values: object) -> StepContext:
    """A context of a step with plausible numbers."""
    numbers: dict[str, object] = {
        "step": 1,
        "version": 0,
        "epoch": 1,
        "learning_rate": 1e-3,
        "wall_seconds": 10.0,
        "stale": 0,
        "filtered": 0,
        "buffered_groups": 2,
        "wait_seconds": 0.1,
        "build_seconds": 0.01,
        "step_seconds": 0.5,
        "train_seconds": 0.3,
        "publish_seconds": 0.05,
        "checkpoint_seconds": 0.02,
    }
    return StepContext(**(numbers | values))  # type: ignore[arg-type]


def make_record(step: int) -> StepRecord:
    """The record of an ordinary step."""
    batch = build_step_batch(make_groups(2), micro_batch_tokens=1000, normalise_std=False)
    ones = np.ones(len(batch.completions))
    return step_record(
        batch, UpdateResult(0.1, 1.0, False, 0 * ones, ones, 0 * ones, ones, ones, 0 * ones), make_context(step=step)
    )
