"""Draining, crashing, resuming: no group is trained twice in the surviving lineage, and none is lost."""

import json
import threading
from itertools import count

import pytest
import torch
from learner_runs import STEPS, changed, check_ledger, reached, records, wait_until
from safetensors.torch import load_file

from learner.checkpoint import Checkpoints
from protocol.errors import FencedError, RunMismatchError

pytest_plugins = ["learner_runs"]


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
    complete, calls = Checkpoints.complete, count(1)

    def crashing(self, checkpoint, write):
        due = next(calls) == number
        if due and moment == "before":
            raise Crash
        complete(self, checkpoint, write)
        if due:
            raise Crash

    monkeypatch.setattr(Checkpoints, "complete", crashing)


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
