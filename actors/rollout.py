"""An actor: takes tickets, keeps its engine full, scores what comes back, delivers whole groups, follows the clock.

The engine is driven from this one thread; everything that waits for Redis or the weight store happens elsewhere
(`actors.links`, `actors.weights.follower`) and arrives as a message. A version is served only after its parity probe
(`actors.weights.gate`): groups that finish between an update and the verdict are held back. An engine that fails an
update is replaced there; what it had in generation goes back to the buffer here.
"""

import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from actors.engine.base import Engine, Finished, Sample, Scored
from actors.links import LeasesLost, LinkFailed, Links, RunState, TicketsTaken
from actors.tasks import Task
from actors.weights.follower import StagedVersion
from actors.weights.gate import Verdict, VersionGate
from protocol.clock import prompt_of_ticket
from protocol.errors import EngineError, TaskError
from protocol.records import ActorStatus
from protocol.settings import Settings
from protocol.trajectory import Completion, Group, Ticket

IDLE_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Generating:
    ticket: Ticket
    prompt_index: int
    prompt_tokens: list[int]
    started: float


@dataclass(frozen=True, slots=True)
class _VersionFetched:
    """There is something in `Rollout._fetched`."""


class Rollout:
    """The loop of one actor around one engine at a time."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        links: Links,
        build_engine: Callable[[], Engine],
        task: Task,
        tokenizer: Any,
    ) -> None:
        """Build the first engine.

        Raises:
            EngineError: it cannot be built.
        """
        self._settings = settings
        self._name = name
        self._links = links
        drains = settings.weights.update == "drain"
        self._gate = VersionGate(build_engine, settings.parity_tolerance, drains=drains)
        self._task = task
        self._tokenizer = tokenizer
        self._fetched: deque[StagedVersion] = deque(maxlen=1)  # newest wins, also while an engine is being replaced
        self._active: dict[str, _Generating] = {}
        self._held_back: list[Group] = []
        self._run_state = "running"
        self._drain_deadline: float | None = None
        self._tokens_generated = 0
        self._busy_seconds = 0.0
        self._first_served: float | None = None

    def run(self, stop: threading.Event) -> None:
        """Work until the run ends or is drained, or `stop` is set, which drains this actor alone.

        Raises:
            ParityError, EngineError: a fresh engine fails as well, or the engine failed while it served.
            BufferUnavailableError: Redis stayed away.
        """
        while not self._done(stop):
            self._receive(block=not self._engine.num_running)
            if self._engine.num_running:
                self._step()
            while not self._gate.update(idle=not self._active):
                self._abandon()
            self._ask()

    def deliver(self, staged: StagedVersion) -> None:
        """Take a fetched version; any thread may call. One that has not been taken up yet is dropped for it."""
        self._fetched.append(staged)
        self._links.inbox.put(_VersionFetched())

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    @property
    def _engine(self) -> Engine:
        return self._gate.engine

    def status(self) -> ActorStatus:
        """What the registry shows of this actor; called from the keeper's thread."""
        return ActorStatus(
            state=self._state(),
            pid=os.getpid(),
            host=socket.gethostname(),
            served_version=self._gate.served_version,
            served_seconds=self._gate.served_seconds,
            parity=self._gate.parity,
            parity_max=self._gate.parity_max,
            tokens_generated=self._tokens_generated,
            groups_submitted=self._links.groups_submitted,
            tickets_failed=self._links.tickets_failed,
            versions_loaded=self._gate.versions_loaded,
            parity_violations=self._gate.violations,
            reloads=self._gate.reloads,
            engine_rebuilds=self._gate.rebuilds,
            update_seconds=self._gate.update_seconds,
            busy_seconds=self._busy_seconds,
            wall_seconds=0.0 if self._first_served is None else time.monotonic() - self._first_served,
            running_sequences=len(self._active) * self._settings.task.group_size,
            error=self._gate.error,
        )

    def _state(self) -> Literal["starting", "serving", "waiting", "updating", "quarantined", "draining"]:
        if self._drain_deadline is not None:
            return "draining"
        if self._gate.quarantined:
            return "quarantined"
        if self._gate.served_version < 0:
            return "starting"
        if self._gate.verifying or self._gate.draining:
            return "updating"
        return "serving" if self._active else "waiting"

    def _done(self, stop: threading.Event) -> bool:
        if self._run_state in ("finished", "failed"):
            return True
        if self._drain_deadline is None and (stop.is_set() or self._run_state == "draining"):
            log.info("draining: %d groups in generation", len(self._active))
            self._drain_deadline = time.monotonic() + self._settings.buffer.lease_seconds
        if self._drain_deadline is None:
            return False
        return not (self._active or self._held_back) or time.monotonic() > self._drain_deadline

    def _receive(self, block: bool) -> None:
        try:
            message = self._links.inbox.get(timeout=IDLE_SECONDS) if block else self._links.inbox.get_nowait()
            while True:
                self._handle(message)
                message = self._links.inbox.get_nowait()
        except queue.Empty:
            return

    def _handle(self, message: object) -> None:
        match message:
            case TicketsTaken(tickets):
                for ticket in tickets:
                    self._begin(ticket)
            case _VersionFetched():
                if self._fetched:
                    self._gate.offer(self._fetched.popleft())
            case LeasesLost(tickets):
                lost = set(tickets)
                self._drop([r for r, work in self._active.items() if work.ticket in lost])
                self._held_back = [group for group in self._held_back if group.ticket not in lost]
            case RunState(state):
                self._run_state = state
            case LinkFailed(error):
                raise error

    def _drop(self, request_ids: list[str]) -> None:
        self._engine.abort(request_ids)
        for request_id in request_ids:
            del self._active[request_id]

    @property
    def _accepting(self) -> bool:
        return self._drain_deadline is None and not self._gate.quarantined and not self._gate.draining

    def _ask(self) -> None:
        capacity = max(1, self._settings.actors.concurrency // self._settings.task.group_size)
        self._links.serve(capacity if self._accepting else 0, self._gate.served_version)

    def _begin(self, ticket: Ticket) -> None:
        if not self._accepting:
            self._links.give_back([ticket])
            return
        prompt_index = prompt_of_ticket(ticket.index, self._settings.run.seed, self._task.num_prompts)
        try:
            tokens = self._prompt_tokens(prompt_index)
        except Exception as error:  # whatever a user's task raises fails this ticket and nothing else
            self._links.fail(ticket, f"prompt {prompt_index}: {type(error).__name__}: {error}")
            return
        request_id = f"{ticket.index}:{ticket.attempt}"
        self._active[request_id] = _Generating(ticket, prompt_index, tokens, time.monotonic())
        self._engine.generate(request_id, tokens, self._settings.task.group_size)

    def _prompt_tokens(self, prompt_index: int) -> list[int]:
        prompt = self._task.prompt(prompt_index)
        if isinstance(prompt, str):
            tokens = list(self._tokenizer.encode(prompt))
        else:
            encoded = self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            tokens = list(encoded["input_ids"])
        limit = self._settings.task.max_prompt_tokens
        if not 0 < len(tokens) <= limit:
            raise TaskError(f"{len(tokens)} tokens; task.max_prompt_tokens allows 1 to {limit}")
        return tokens

    def _step(self) -> None:
        started = time.monotonic()
        try:
            results = self._engine.step()
        except EngineError as error:
            if not self._gate.verifying:
                raise
            self._gate.lose(error)  # a part of the update that had not shown until now
            self._abandon()
            return
        if self._active:
            self._busy_seconds += time.monotonic() - started
        for result in results:
            if isinstance(result, Scored):
                self._judge(result)
            elif (work := self._active.pop(result.request_id, None)) is not None:
                self._finish(work, result)

    def _finish(self, work: _Generating, result: Finished) -> None:
        self._tokens_generated += sum(len(sample.tokens) for sample in result.samples)
        try:
            completions = tuple(self._scored(work.prompt_index, sample) for sample in result.samples)
        except Exception as error:  # whatever a user's scorer raises fails this ticket: never a reward
            self._links.fail(work.ticket, f"scoring prompt {work.prompt_index}: {type(error).__name__}: {error}")
            return
        group = Group(
            work.ticket,
            work.prompt_index,
            np.asarray(work.prompt_tokens, np.int32),
            completions,
            self._name,
            time.monotonic() - work.started,
        )
        if self._gate.verifying:
            self._held_back.append(group)
        else:
            self._links.submit(group)

    def _scored(self, prompt_index: int, sample: Sample) -> Completion:
        text = self._tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=True)
        reward = float(self._task.score(prompt_index, text))
        mask = np.ones(len(sample.tokens), np.uint8)
        return Completion(sample.tokens, sample.logprobs, mask, sample.spans, reward, sample.finish_reason)

    def _judge(self, result: Scored) -> None:
        match self._gate.answer(result):
            case Verdict.VERIFIED:
                if self._first_served is None:
                    self._first_served = time.monotonic()
                    log.info("serving version %d", self._gate.served_version)
                for group in self._held_back:
                    self._links.submit(group)
                self._held_back.clear()
            case Verdict.VIOLATED:
                self._abandon()

    def _abandon(self) -> None:
        """Give back everything in generation: its weights cannot be trusted, or its engine is lost."""
        self._ask()  # first, so that nothing is taken while an engine is being replaced
        tickets = [work.ticket for work in self._active.values()] + [group.ticket for group in self._held_back]
        if not self._gate.engine_lost:
            self._engine.abort(list(self._active))
        self._active.clear()
        self._held_back.clear()
        self._links.give_back(tickets)
