"""A whole actor around a scripted engine on a real server: what reaches the buffer, and what never does."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.engine.scripted import ScriptedEngine
from actors.links import LinkFailed, Links
from actors.rollout import Rollout
from actors.tasks.arithmetic import Arithmetic
from actors.weights.follower import WeightFollower
from buffer.groups import LeasedGroup
from buffer.run import Buffer
from buffer.store import RawTensor, WeightStore
from protocol.clock import lag
from protocol.errors import EngineError, ParityError, VespoError
from protocol.manifest import Probe
from protocol.settings import Settings

EOS = 99
PROBE = Probe(tokens=((1, 2, 3),), logprobs=((-1.0, -2.0),))
SETTINGS = {
    "model": {"path": "unused", "dtype": "float32"},
    "task": {"group_size": 2, "max_prompt_tokens": 8},
    "actors": {"concurrency": 8},
    "buffer": {"lease_seconds": 3.0, "max_attempts": 2},
}


class CharacterTokenizer:
    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(t) for t in tokens if t != EOS)


def right_answer(prompt: list[int], number: int) -> list[int]:
    """The first sample is right, the others are wrong."""
    left, right = "".join(map(chr, prompt))[:-1].split("+")
    return [ord(c) for c in str(int(left) + int(right) + number)] + [EOS]


class Actor:
    """Runs a rollout on a thread and keeps what ended it."""

    def __init__(self, buffer: Buffer, store: WeightStore, engine: ScriptedEngine, task: object) -> None:
        self.settings = Settings.model_validate(SETTINGS)
        self.stop = threading.Event()
        self.error: VespoError | None = None
        self.links = Links(buffer, "actor-x", self.settings.buffer.lease_seconds, lambda: self.rollout.status())
        self.rollout = Rollout(self.settings, "actor-x", self.links, engine, task, CharacterTokenizer())  # type: ignore[arg-type]
        self.follower = WeightFollower(
            buffer.clock, store, self.links.inbox.put, lambda error: self.links.inbox.put(LinkFailed(error))
        )
        self.thread = threading.Thread(target=self._run)

    def start(self) -> "Actor":
        self.links.start()
        self.follower.start()
        self.thread.start()
        return self

    def _run(self) -> None:
        try:
            self.rollout.run(self.stop)
        except VespoError as error:
            self.error = error
        finally:
            self.follower.stop()
            self.links.close(5.0)

    def join(self) -> None:
        self.stop.set()
        self.thread.join(15)
        assert not self.thread.is_alive()


class Learner:
    """Publishes and leases as a learner would, without learning."""

    def __init__(self, buffer: Buffer, store: WeightStore, max_lag: int = 2) -> None:
        self.buffer, self.store = buffer, store
        self.epoch = buffer.begin_epoch(
            run_id="r", groups_per_version=4, max_lag=max_lag, max_attempts=2, max_bytes=1 << 30
        )
        self.version = -1
        self.publish()

    def publish(self) -> None:
        self.version += 1
        tensors = [RawTensor("w", "F32", (1,), bytes(4))]
        self.buffer.clock.publish(self.store.write(self.version, self.epoch, self.version, tensors, PROBE))

    def take(self, count: int, timeout_seconds: float = 10.0) -> list[LeasedGroup]:
        deadline, leased = time.monotonic() + timeout_seconds, []
        while len(leased) < count and time.monotonic() < deadline:
            leased += self.buffer.groups.lease(self.epoch, count - len(leased), 1.0)
        return leased


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(str(tmp_path))


@pytest.fixture
def start(buffer: Buffer, store: WeightStore) -> Iterator[Callable[..., Actor]]:
    actors: list[Actor] = []

    def begin(engine: ScriptedEngine | None = None, task: object | None = None) -> Actor:
        actors.append(Actor(buffer, store, engine or ScriptedEngine(right_answer), task or Arithmetic()).start())
        return actors[-1]

    yield begin
    for actor in actors:
        actor.join()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.02)


def test_groups_arrive_whole_scored_and_within_the_lag(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor]
) -> None:
    learner = Learner(buffer, store)
    actor = start()
    seen: set[int] = set()
    for _ in range(6):
        leased = learner.take(4)
        assert len(leased) == 4
        for item in leased:
            assert [c.reward for c in item.group.completions] == [1.0, 0.0]
            assert all(0 <= lag(learner.version, c.spans) <= 2 for c in item.group.completions)
            seen.add(item.group.ticket.index)
        learner.publish()
        buffer.groups.commit(learner.epoch, [item.entry_id for item in leased], learner.version)
    assert len(seen) == 24
    wait_until(lambda: buffer.groups.depth().buffered == 3 * 4, "the actor is as far ahead as it may be")
    time.sleep(0.3)
    ledger = buffer.ledger()
    assert ledger.balanced
    assert ledger.states["issued"] == 24 + 3 * 4
    assert actor.rollout.status().served_version == learner.version


def test_synchronous_training_has_no_lag_at_all(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor]
) -> None:
    learner = Learner(buffer, store, max_lag=0)
    start()
    for _ in range(5):
        leased = learner.take(4)
        assert {lag(learner.version, c.spans) for item in leased for c in item.group.completions} == {0}
        assert learner.take(1, 0.2) == []
        learner.publish()


def test_draining_finishes_what_is_in_generation_and_returns_the_rest(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor]
) -> None:
    Learner(buffer, store)
    actor = start()
    wait_until(lambda: actor.rollout.status().state == "waiting", "the buffer is full")
    buffer.control.set_state("draining", "test")
    actor.thread.join(10)
    assert not actor.thread.is_alive()
    states = buffer.ledger().states
    assert states["generating"] == 0
    assert states["buffered"] == states["issued"] == 12


class Unscorable(Arithmetic):
    def score(self, index: int, completion: str) -> float:
        raise RuntimeError("scorer is down")


class TooLong(Arithmetic):
    def prompt(self, index: int) -> str:
        return "1+" * 20


@pytest.mark.parametrize(("task", "message"), [(Unscorable(), "scorer is down"), (TooLong(), "max_prompt_tokens")])
def test_a_failure_fails_its_ticket_and_is_never_a_reward(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor], task: object, message: str
) -> None:
    learner = Learner(buffer, store)
    start(task=task)
    wait_until(lambda: buffer.ledger().states["dead"] >= 4, "tickets die")
    assert learner.take(1, 0.2) == []
    assert message in buffer.tickets.dead(1)[0].error
    assert buffer.tickets.dead(1)[0].attempts == 2


def test_a_version_that_fails_its_probe_is_never_served(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor]
) -> None:
    learner = Learner(buffer, store)
    engine = ScriptedEngine(right_answer)
    actor = start(engine)
    assert len(learner.take(12)) == 12
    engine.probe_error = 0.3
    learner.publish()
    actor.thread.join(10)
    assert isinstance(actor.error, ParityError)
    states = buffer.ledger().states
    assert states["generating"] == 0
    assert learner.take(1, 0.2) == []
    assert actor.rollout.status().served_version == 0


def test_a_lost_engine_gives_its_tickets_back(buffer: Buffer, store: WeightStore, start: Callable[..., Actor]) -> None:
    learner = Learner(buffer, store)
    actor = start(ScriptedEngine(right_answer, fail_at_version=1))
    assert learner.take(4)
    learner.publish()
    actor.thread.join(10)
    assert isinstance(actor.error, EngineError)
    assert buffer.ledger().states["generating"] == 0
    assert buffer.ledger().balanced
    assert buffer.actors.list(60) == []


def test_long_generations_survive_updates_and_say_which_version_sampled_what(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor]
) -> None:
    learner = Learner(buffer, store, max_lag=1)
    # Waiting inside the script would block the engine; a long response takes many steps instead.
    start(ScriptedEngine(lambda prompt, number: [48] * 100_000))
    wait_until(lambda: buffer.ledger().states["generating"] > 0, "generation starts")
    learner.publish()
    groups = learner.take(1)
    spans = groups[0].group.completions[0].spans
    assert [s.version for s in spans] == sorted({s.version for s in spans})
    assert spans[0].start == 0
    assert spans[-1].end == 100_000
    assert groups[0].group.oldest_version == 0
    assert spans[-1].version == 1
