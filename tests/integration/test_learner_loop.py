"""The learner on a real server with a scripted actor: trains, drains, crashes, resumes, and the ledger balances."""

import json
import logging
import socket
import threading
import time
import urllib.request
from itertools import count

import pytest
import torch
from learner_samples import VOCABULARY, ScriptedActor, make_settings, write_model
from safetensors.torch import load_file

from buffer.store import WeightStore
from learner.checkpoint import Checkpoints
from learner.loop import run_learner
from protocol.errors import FencedError, RunMismatchError, SettingsError, StarvedError
from protocol.records import StepRecord
from protocol.settings import Settings

PROBE_TOKENS = [[1, 2, 3, 4], [5, 6]]
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def settings(model):
    return make_settings(
        model, run={"steps": STEPS}, learner={"groups_per_step": 3, "checkpoint_every_steps": 2}, buffer={"max_lag": 2}
    )


def changed(settings, **sections):
    """The settings with some values replaced."""
    tables = settings.model_dump()
    for name, values in sections.items():
        tables[name] |= values
    return Settings.model_validate(tables)


@pytest.fixture
def learn(tmp_path, model, buffer, monkeypatch):
    """Runs the learner in the calling thread."""
    monkeypatch.setattr("learner.feed.LEASE_SECONDS", 0.1)  # how long closing takes

    def run(settings, directory="run"):
        run_learner(
            settings,
            run_dir=tmp_path / directory,
            model_dir=model,
            buffer=buffer,
            store=WeightStore(str(tmp_path / directory / "weights")),
            probe_tokens=PROBE_TOKENS,
        )

    return run


@pytest.fixture
def actors(redis_url, run_name):
    """Starts scripted actors, and stops them at the end."""
    started = []

    def start(kind=ScriptedActor):
        started.append(kind(redis_url, run_name, name=f"actor-{len(started)}"))
        started[-1].start()
        return started[-1]

    yield start
    for actor in started:
        actor.stop()


def wait_until(condition, seconds=60.0):
    """Block until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def reached(buffer, step):
    """Whether the learner has done that many steps."""
    progress = buffer.control.progress()
    return progress is not None and progress.step >= step


def published(buffer):
    """Whether actors have a version to serve."""
    clock = buffer.clock.read()
    return clock is not None and clock.version >= 0


def records(run_dir):
    return [StepRecord.model_validate_json(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def check_ledger(buffer, trained):
    ledger = buffer.ledger()
    assert ledger.balanced, ledger.discrepancies
    assert ledger.states["trained"] == trained
    return ledger


def test_a_whole_run(tmp_path, model, buffer, settings, learn, actors):
    actors()
    learn(settings)
    run_dir = tmp_path / "run"
    steps = records(run_dir)
    assert [r.step for r in steps] == list(range(1, STEPS + 1))
    assert [r.version for r in steps] == list(range(STEPS))
    assert all(0 <= r.lag_max <= 2 for r in steps)
    assert all(r.num_groups == 3 and r.num_sequences == 12 for r in steps)
    assert all(r.grad_norm > 0 and not r.skipped for r in steps)
    assert buffer.control.progress() == steps[-1]
    assert buffer.control.state() == "finished"
    assert buffer.clock.read().version == STEPS
    check_ledger(buffer, 3 * STEPS)
    final = load_file(run_dir / "model" / "model.safetensors")
    initial = load_file(model / "model.safetensors")
    assert any(not torch.equal(final[name], initial[name]) for name in initial)
    store = WeightStore(str(run_dir / "weights"))
    for raw in store.read(buffer.clock.latest_manifest()):
        assert raw.data == final[raw.name].numpy().tobytes()
    store.read_skeleton(tmp_path / "skeleton")
    assert (tmp_path / "skeleton" / "config.json").read_text() == (model / "config.json").read_text()


def test_synchronous_training_has_no_lag(tmp_path, buffer, settings, learn, actors):
    actors()
    learn(changed(settings, buffer={"max_lag": 0}))
    assert all(r.lag_counts == {0: 12} for r in records(tmp_path / "run"))
    check_ledger(buffer, 3 * STEPS)


def test_several_updates_make_a_version(tmp_path, buffer, settings, learn, actors):
    actors()
    learn(changed(settings, weights={"updates_per_publish": 3}))
    assert [r.version for r in records(tmp_path / "run")] == [0, 0, 0, 1, 1, 1]
    assert buffer.clock.read().version == 2


def test_draining_checkpoints_and_the_next_start_goes_on(tmp_path, buffer, settings, learn, actors):
    actors()
    endless = changed(settings, run={"steps": 100_000}, learner={"checkpoint_every_steps": 1000})

    def drain():
        wait_until(lambda: reached(buffer, 3))
        buffer.control.set_state("draining", "the test says so")

    thread = threading.Thread(target=drain)
    thread.start()
    learn(endless)
    thread.join()
    done = len(records(tmp_path / "run"))
    assert done >= 3
    assert buffer.control.state() == "draining"
    assert not (tmp_path / "run" / "model").exists()
    check_ledger(buffer, 3 * done)

    version = buffer.clock.read().version
    learn(changed(settings, run={"steps": done + 2}))
    steps = records(tmp_path / "run")
    assert [r.step for r in steps] == list(range(1, done + 3))
    assert [r.epoch for r in steps] == [1] * done + [2] * 2
    assert steps[done].version == version + 1
    assert steps[done].wall_seconds > steps[done - 1].wall_seconds
    check_ledger(buffer, 3 * (done + 2))


def test_a_run_that_is_complete_is_not_trained_further(tmp_path, buffer, settings, learn, actors):
    actors()
    learn(settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    learn(settings)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    assert buffer.control.state() == "finished"
    check_ledger(buffer, 3 * STEPS)


class Crash(BaseException):
    """Ends the learner where it stands."""


def crash_at(monkeypatch, moment, number):
    """Crash around the `number`-th write of a checkpoint: before it, or between it and the commit."""
    write, calls = Checkpoints.write, count(1)

    def crashing(self, checkpoint, save_state):
        due = next(calls) == number
        if due and moment == "before":
            raise Crash
        write(self, checkpoint, save_state)
        if due:
            raise Crash

    monkeypatch.setattr(Checkpoints, "write", crashing)


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("moment", ["before", "between"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_crash_costs_nothing_and_counts_nothing_twice(
    tmp_path, buffer, settings, learn, actors, monkeypatch, moment, number, zero_stage
):
    # Versions never go back, so after a crash old groups lag more: the gate is opened to compare bit for bit.
    settings = changed(settings, buffer={"hard_max_lag": 1000}, learner={"zero_stage": zero_stage})
    actors()
    with monkeypatch.context() as patch:
        crash_at(patch, moment, number)
        with pytest.raises(Crash):
            learn(settings, "crashed")
    before = buffer.ledger()
    assert before.balanced
    assert before.states["trained"] == 6 * (number - 1)
    learn(settings, "crashed")
    check_ledger(buffer, 3 * STEPS)

    buffer.purge()
    learn(settings, "whole")
    crashed, whole = (records(tmp_path / name) for name in ("crashed", "whole"))
    assert [r.step for r in crashed] == [r.step for r in whole]
    for a, b in zip(crashed, whole, strict=True):
        assert (a.loss, a.grad_norm, a.reward_mean, a.num_tokens) == (b.loss, b.grad_norm, b.reward_mean, b.num_tokens)
    models = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("crashed", "whole")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_damaged_newest_checkpoint_costs_its_steps_only(tmp_path, buffer, settings, learn, actors, caplog):
    actors()
    learn(changed(settings, run={"steps": 4}))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    (newest / "checkpoint.json").write_text("")
    learn(settings)
    assert "is passed over" in caplog.text
    assert [r.step for r in records(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert check_ledger(buffer, 3 * STEPS + 6)  # steps 3 and 4 were trained in both lineages


def test_checkpoints_of_another_model_are_refused(tmp_path, buffer, settings, learn, actors):
    actors()
    learn(changed(settings, run={"steps": 2}))
    with pytest.raises(Exception, match=r"ZeRO stage 1, 1 ranks; the recipe asks for .*ZeRO stage 2, 1 ranks"):
        learn(changed(settings, learner={"zero_stage": 2}))


def test_a_buffer_that_lost_everything_goes_on_with_new_tickets(tmp_path, buffer, settings, learn, actors):
    actor = actors()
    learn(changed(settings, run={"steps": 2}))
    actor.stop()
    checkpoint = json.loads(max((tmp_path / "run" / "checkpoints").iterdir()).joinpath("checkpoint.json").read_text())
    buffer.purge()
    actors()
    learn(settings)
    ledger = check_ledger(buffer, 3 * (STEPS - 2))
    resumed = json.loads(max((tmp_path / "run" / "checkpoints").iterdir()).joinpath("checkpoint.json").read_text())
    assert resumed["first_ticket"] == checkpoint["next_ticket"] >= 6
    assert resumed["next_ticket"] <= resumed["first_ticket"] + ledger.states["issued"]
    assert [r.step for r in records(tmp_path / "run")] == list(range(1, STEPS + 1))


class SlowOnce(ScriptedActor):
    """Keeps the first group of ticket 1 until four steps are done without it."""

    held = None
    released = False

    def deliver(self, group):
        if group.ticket.index == 1 and not self.released:
            self.held = group
            return
        super().deliver(group)
        progress = self.buffer.control.progress()
        if self.held is not None and progress is not None and progress.step >= 4:
            self.released = True
            super().deliver(self.held)
            self.held = None


def test_groups_that_are_too_old_are_generated_again(tmp_path, buffer, settings, learn, actors):
    actor = actors(kind=SlowOnce)
    learn(changed(settings, run={"steps": 12}, buffer={"max_lag": 1}))
    assert actor.released
    steps = records(tmp_path / "run")
    assert max(r.lag_max for r in steps) <= 1
    assert sum(r.stale for r in steps) == 1
    assert check_ledger(buffer, 36).events["stale"] == 1


class Foreign(ScriptedActor):
    """Its group of ticket 1 has a token that the learner's model does not know."""

    def generate(self, ticket, version):
        group = super().generate(ticket, version)
        if ticket.index == 1:
            group.completions[0].tokens[0] = VOCABULARY
        return group


def test_tokens_outside_the_vocabulary_do_not_reach_the_model(buffer, settings, learn, actors, caplog):
    actors(kind=Foreign)
    learn(settings)
    assert "outside the vocabulary" in caplog.text
    assert check_ledger(buffer, 3 * STEPS).states["filtered"] == 1


def test_starvation_is_an_error_that_names_the_facts(buffer, settings, learn):
    started = time.monotonic()
    with pytest.raises(StarvedError, match=r"no actor is alive: 0 of 3 groups.*actors: none"):
        learn(changed(settings, learner={"starvation_seconds": 1.0}))
    assert time.monotonic() - started < 20


def test_waiting_is_said_every_so_often(buffer, settings, learn, monkeypatch, caplog):
    monkeypatch.setattr("learner.waiting.WARN_SECONDS", 0.5)
    with caplog.at_level(logging.WARNING), pytest.raises(StarvedError):
        learn(changed(settings, learner={"starvation_seconds": 2.5}))
    assert "waiting for groups for 1 s: 0 of 3 groups of this step; tickets: 0 generating" in caplog.text


def test_overdue_leases_end_while_the_learner_waits(buffer, settings, learn, actors):
    learner = threading.Thread(target=learn, args=(settings,))
    learner.start()
    wait_until(lambda: published(buffer))
    assert buffer.tickets.issue(0, 2, 0.5).tickets  # an actor that dies at once
    wait_until(lambda: buffer.ledger().events["expired"] >= 2)
    actors()
    learner.join(timeout=60)
    assert not learner.is_alive()
    check_ledger(buffer, 3 * STEPS)


def test_a_second_learner_fences_the_first(tmp_path, buffer, settings, learn, actors):
    actors()
    failure = []

    def first():
        try:
            learn(changed(settings, run={"steps": 100_000}))
        except FencedError as error:
            failure.append(error)

    zombie = threading.Thread(target=first)
    zombie.start()
    wait_until(lambda: reached(buffer, 3))
    learn(changed(settings, run={"steps": 100}))
    zombie.join(timeout=30)
    assert failure
    assert records(tmp_path / "run")[-1].step == 100
    assert buffer.ledger().balanced


def test_another_run_directory_is_refused(buffer, settings, learn, actors):
    actors()
    learn(changed(settings, run={"steps": 1}))
    with pytest.raises(RunMismatchError):
        learn(settings, "elsewhere")


def test_trained_groups_never_fill_the_server(tmp_path, buffer, settings, learn, actors):
    actors()
    learn(changed(settings, buffer={"max_bytes": 4000}, learner={"checkpoint_every_steps": 1000}))
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) == 2
    assert kept[0] != f"session-000001-step-{STEPS:09d}"
    check_ledger(buffer, 3 * STEPS)


def test_the_prometheus_endpoint_answers_while_training(buffer, settings, learn, actors):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    actors()
    learner = threading.Thread(
        target=learn, args=(changed(settings, run={"steps": 100_000}, metrics={"learner_port": port}),)
    )
    learner.start()
    wait_until(lambda: reached(buffer, 2))
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    buffer.control.set_state("draining", "enough")
    learner.join(timeout=30)
    assert f'vespo_learner_step{{run="{settings.run.name}"}}' in text
    assert f'vespo_learner_lag_versions_bucket{{le="0.0",run="{settings.run.name}"}}' in text


def test_a_port_that_is_taken_is_a_wrong_setting(buffer, settings, learn):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match="learner_port"):
            learn(changed(settings, metrics={"learner_port": taken.getsockname()[1]}))
