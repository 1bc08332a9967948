"""The learner on a real server with scripted actors: it trains, says what it waits for, and the ledger balances."""

import errno
import logging
import socket
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
import torch
from learner_runs import STEPS, changed, check_ledger, published, reached, records, wait_until
from learner_samples import VOCABULARY, ScriptedActor
from safetensors.torch import load_file

from buffer.store import WeightStore
from protocol.errors import CheckpointError, SettingsError, StarvedError, TaskError

pytest_plugins = ["learner_runs"]


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


def test_publications_are_spaced_in_time_and_lag_stays_bounded(tmp_path, buffer, settings, learn, actors):
    actors()
    learn(changed(settings, run={"steps": 9}, weights={"seconds_per_publish": 3600, "versions_kept": 10}))
    steps = records(tmp_path / "run")
    assert [r.version for r in steps] == list(range(9))
    assert max(r.lag_max for r in steps) <= 2
    assert sum(r.stale for r in steps) == 0
    assert [v for v in range(10) if buffer.clock.manifest(v)] == [0, 2, 4, 6, 8]
    check_ledger(buffer, 3 * 9)


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


class Dull(ScriptedActor):
    """Every second group has equal rewards, and the last completion of each is cut off."""

    def generate(self, ticket, version):
        group = super().generate(ticket, version)
        rewards = [0.5] * 4 if ticket.index % 2 else [1.0, 0.0, 0.0, 0.5]
        cut = ["stop", "stop", "stop", "length"]
        pairs = zip(group.completions, rewards, cut, strict=True)
        return replace(group, completions=tuple(replace(c, reward=r, finish_reason=f) for c, r, f in pairs))


@pytest.mark.parametrize("max_lag", [0, 2])
def test_groups_without_spread_are_replaced_to_the_last(tmp_path, buffer, settings, learn, actors, max_lag):
    actors(kind=Dull)
    learn(changed(settings, learner={"filter_zero_variance": True}, buffer={"max_lag": max_lag}))
    steps = records(tmp_path / "run")
    assert [(r.num_groups, r.zero_variance_share, r.lag_max <= max_lag) for r in steps] == [(3, 0.0, True)] * STEPS
    assert sum(r.filtered for r in steps) == pytest.approx(3 * STEPS, abs=1)
    ledger = check_ledger(buffer, 3 * STEPS)
    assert ledger.states["filtered"] >= sum(r.filtered for r in steps)


def test_shaped_rewards_decide_what_is_filtered_and_the_record_has_both(tmp_path, buffer, settings, learn, actors):
    actors(kind=Dull)
    shaping = {"overlong": "zero"}  # 0.5, 0.5, 0.5, 0: every group has a spread
    learn(changed(settings, learner={"filter_zero_variance": True}, objective=shaping))
    steps = records(tmp_path / "run")
    assert sum(r.filtered for r in steps) == 0
    assert all(r.shaped_reward_mean == pytest.approx(r.reward_mean - 0.125) for r in steps)
    assert all(r.truncated_share == 0.25 for r in steps)
    check_ledger(buffer, 3 * STEPS)


def broken(group):
    raise ValueError("cannot")


def test_a_shaping_function_that_fails_ends_the_learner_by_name(settings, learn, actors):
    actors()
    with pytest.raises(TaskError, match=r"failed on the group of ticket \d+ \(prompt \d+\): ValueError: cannot"):
        learn(changed(settings, objective={"reward_shaping": "test_learner_loop:broken"}))


def test_times_of_a_step_add_up(tmp_path, settings, learn, actors):
    actors()
    learn(settings)
    for r in records(tmp_path / "run"):
        parts = (r.wait_seconds, r.build_seconds, r.train_seconds, r.publish_seconds, r.checkpoint_seconds)
        assert min(parts) >= 0
        assert sum(parts) <= r.step_seconds + 1e-3
        assert 0 < r.optimizer_seconds < r.train_seconds
        assert r.tokens_per_second == pytest.approx(r.num_tokens / r.step_seconds)


def test_a_disk_that_refuses_checkpoints_ends_the_learner_and_commits_nothing(
    tmp_path, buffer, settings, learn, actors, monkeypatch
):
    actors()
    monkeypatch.setattr("learner.state.torch.save", _full)
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written to .*No space left"):
        learn(changed(settings, run={"steps": 1000}))
    assert check_ledger(buffer, 0)
    assert not list((tmp_path / "run" / "checkpoints").glob("session-*"))


def _full(state, file):
    raise OSError(errno.ENOSPC, "No space left on device")
