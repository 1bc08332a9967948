"""A whole actor around a scripted engine on a real server: what reaches the buffer, and what never does."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.engine.base import Finished, Scored
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

    def __init__(
        self, buffer: Buffer, store: WeightStore, engines: list[ScriptedEngine], task: object, update: str
    ) -> None:
        self.settings = Settings.model_validate(SETTINGS | {"weights": {"update": update}})
        self.stop = threading.Event()
        self.error: VespoError | None = None
        self.links = Links(buffer, "actor-x", self.settings.buffer.lease_seconds, lambda: self.rollout.status())
        self.rollout = Rollout(self.settings, "actor-x", self.links, lambda: engines.pop(0), task, CharacterTokenizer())  # type: ignore[arg-type]
        self.follower = WeightFollower(
            buffer.clock, store, self.rollout.deliver, lambda error: self.links.inbox.put(LinkFailed(error))
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
            self.rollout.close()
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

    def begin(*engines: ScriptedEngine, task: object | None = None, update: str = "in_flight") -> Actor:
        every = list(engines) or [ScriptedEngine(right_answer)]
        actors.append(Actor(buffer, store, every, task or Arithmetic(), update).start())
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
    wait_until(lambda: buffer.groups.depth().buffered == 12, "the buffer is full")
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


ALWAYS = dict.fromkeys(range(9), 0.3)


def test_a_version_that_fails_its_probe_is_never_served(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor]
) -> None:
    learner = Learner(buffer, store)
    actor = start(ScriptedEngine(right_answer, ALWAYS | {0: 0.0}), ScriptedEngine(right_answer, ALWAYS))
    assert len(learner.take(12)) == 12
    learner.publish()
    actor.thread.join(10)
    assert isinstance(actor.error, ParityError)
    assert "in a fresh engine too" in str(actor.error)
    states = buffer.ledger().states
    assert states["generating"] == 0
    assert learner.take(1, 0.2) == []
    status = actor.rollout.status()
    assert status.served_version == 0
    assert status.state == "quarantined"
    assert "version 1 differs from the learner by 0.3" in status.error
    assert (status.parity_violations, status.reloads, status.engine_rebuilds) == (3, 1, 1)


HALF_LOADED = EngineError("layers on meta")


@pytest.mark.parametrize(
    ("faults", "counts"),
    [({1: 0.3}, (1, 1, 0)), ({1: 0.3, 2: 0.3}, (2, 1, 1)), ({1: HALF_LOADED}, (0, 0, 1))],
    ids=["parity wrong once", "parity wrong twice", "a load raises"],
)
@pytest.mark.parametrize("update", ["in_flight", "drain"])
def test_an_update_that_fails_is_made_good(
    buffer: Buffer,
    store: WeightStore,
    start: Callable[..., Actor],
    faults: dict[int, float | EngineError],
    counts: tuple[int, int, int],
    update: str,
) -> None:
    learner = Learner(buffer, store)
    script, num_tickets = (slow_answer, 4) if update == "in_flight" else (right_answer, 12)
    actor = start(ScriptedEngine(script, faults), ScriptedEngine(right_answer), update=update)
    wait_until(lambda: actor.rollout.status().served_version == 0, "the first version is served")
    wait_until(lambda: buffer.ledger().states["issued"] == num_tickets, "tickets are taken")
    learner.publish()
    wait_until(lambda: actor.rollout.status().served_version == 1, "the update is made good")
    status = actor.rollout.status()
    assert (status.parity_violations, status.reloads, status.engine_rebuilds) == counts
    assert status.error == ""
    assert status.state != "quarantined"
    ledger = buffer.ledger()
    assert ledger.balanced
    if update == "in_flight":
        assert ledger.events["returned"] == 4  # what was in generation
    if update == "drain" or actor.rollout.status().engine_rebuilds:
        assert len(learner.take(16)) == 16


def slow_answer(prompt: list[int], number: int) -> list[int]:
    """In generation until the engine is replaced."""
    return [48] * 1_000_000


class BreaksAfterLoading(ScriptedEngine):
    """Its second load seems to work, and the first step after it raises."""

    def step(self) -> list[Finished | Scored]:
        if self.version == 1:
            raise EngineError("layers on meta")
        return super().step()


def test_an_error_while_the_probe_is_scored_is_one_of_the_update(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor]
) -> None:
    learner = Learner(buffer, store)
    actor = start(BreaksAfterLoading(right_answer), ScriptedEngine(right_answer))
    assert learner.take(12)
    learner.publish()
    wait_until(lambda: actor.rollout.status().served_version == 1, "a fresh engine serves")
    assert actor.rollout.status().engine_rebuilds == 1
    assert len(learner.take(4)) == 4


def test_an_engine_lost_twice_gives_its_tickets_back(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor]
) -> None:
    learner = Learner(buffer, store)
    actor = start(ScriptedEngine(slow_answer, {1: HALF_LOADED}), ScriptedEngine(right_answer, {0: HALF_LOADED}))
    wait_until(lambda: buffer.ledger().states["generating"] > 0, "generation starts")
    learner.publish()
    actor.thread.join(10)
    assert isinstance(actor.error, EngineError)
    assert buffer.ledger().states["generating"] == 0
    assert buffer.ledger().balanced
    assert buffer.actors.list(60) == []


def test_a_version_that_cannot_be_fetched_leaves_the_old_one_served(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor], tmp_path: Path
) -> None:
    learner = Learner(buffer, store)
    actor = start(update="drain")
    wait_until(lambda: actor.rollout.status().served_version == 0, "the first version is served")
    learner.version += 1
    manifest = store.write(1, learner.epoch, 1, [RawTensor("w", "F32", (1,), bytes(4))], PROBE)
    payload = tmp_path / manifest.payload
    payload.write_bytes(payload.read_bytes()[:-1] + b"\1")
    buffer.clock.publish(manifest)
    wait_until(lambda: actor.follower.fetch_failures > 0, "the fetch fails")
    assert len(learner.take(12)) == 12
    status = actor.rollout.status()
    assert (status.served_version, status.versions_loaded, status.error) == (0, 1, "")
    learner.publish()
    wait_until(lambda: actor.rollout.status().served_version == 2, "the next version is served")
    assert len(learner.take(4)) == 4


def long_answer(prompt: list[int], number: int) -> list[int]:
    """A thousand steps."""
    return [48] * 1000


@pytest.mark.parametrize("update", ["in_flight", "drain"])
def test_draining_lets_one_version_sample_each_completion(
    buffer: Buffer, store: WeightStore, start: Callable[..., Actor], update: str
) -> None:
    learner = Learner(buffer, store)
    start(ScriptedEngine(long_answer), update=update)
    found: list[int] = []
    for _ in range(40):
        leased = learner.take(4)
        assert len(leased) == 4
        found += [len(c.spans) for item in leased for c in item.group.completions]
        learner.publish()
        buffer.groups.commit(learner.epoch, [item.entry_id for item in leased], learner.version)
        if max(found) >= 2:
            break
    assert (max(found) == 1) == (update == "drain")
    assert buffer.ledger().balanced


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
