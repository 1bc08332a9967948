"""The numbers of a step, against ones worked out by hand."""

import math

import numpy as np
import pytest
from learner_samples import make_context, make_groups
from prometheus_client import CollectorRegistry

from learner.batch import build_step_batch
from learner.engine import UpdateResult
from learner.stats import step_record
from protocol.metrics import LearnerMetrics
from protocol.records import QUANTILES, StepRecord


def _update(num, *, log_w=0.0, weights=1.0, silenced=(), skipped=False):
    array = np.zeros(num)
    array[list(silenced)] = 1
    return UpdateResult(
        loss=0.5,
        grad_norm=0.25,
        skipped=skipped,
        log_w=np.broadcast_to(np.float64(log_w), num).copy(),
        weights=np.broadcast_to(np.float64(weights), num).copy(),
        silenced=array,
        entropy=np.full(num, 3.0),
        behaviour_kl=np.full(num, 0.5),
        reference_kl=np.full(num, 0.25),
    )


def _batch(*reward_lists, version=0):
    groups = [
        g for rewards in reward_lists for g in make_groups(1, rewards=rewards, size=len(rewards), version=version)
    ]
    return build_step_batch(groups, micro_batch_tokens=10**6, normalise_std=False)


def test_rewards_and_counts():
    batch = _batch([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    record = step_record(batch, _update(8), make_context(step=3, version=2))
    assert (record.step, record.version, record.num_groups, record.num_sequences) == (3, 2, 2, 8)
    assert record.reward_mean == 0.625
    assert record.reward_std == pytest.approx(np.std([1, 0, 0, 0, 1, 1, 1, 1]))
    assert record.zero_variance_share == 0.5
    assert record.num_tokens == batch.num_tokens
    assert record.response_tokens_mean == np.mean([len(c.tokens) for c in batch.completions])
    assert record.response_tokens_max == max(len(c.tokens) for c in batch.completions)
    assert record.tokens_per_second == batch.num_tokens / 0.5
    assert record.truncated_share == 0.0
    assert record.entropy == pytest.approx(8 * 3.0 / batch.num_tokens)
    assert record.behaviour_kl == pytest.approx(8 * 0.5 / batch.num_tokens)
    assert record.reference_kl == pytest.approx(8 * 0.25 / batch.num_tokens)
    assert (record.loss, record.grad_norm, record.skipped) == (0.5, 0.25, False)


def test_lag_counts_from_the_learners_version():
    old = make_groups(1, version=3, size=2)
    new = make_groups(1, version=7, size=4)
    batch = build_step_batch(old + new, micro_batch_tokens=10**6, normalise_std=False)
    record = step_record(batch, _update(6), make_context(version=8))
    assert record.lag_counts == {1: 4, 5: 2}
    assert (record.lag_mean, record.lag_max) == (pytest.approx(14 / 6), 5)


def test_weights_by_sign_and_kernel_mass():
    batch = _batch([1.0, 0.0, 0.0, 0.0])  # advantages 0.75, -0.25, -0.25, -0.25
    log_w = np.log([1.0, 2.0, 4.0, 1.0])
    record = step_record(batch, _update(4, log_w=log_w, weights=[0.05, 0.5, 1.0, 1.2]), make_context())
    assert record.phi_mean_pos == pytest.approx(0.05)
    assert record.phi_mean_neg == pytest.approx(0.9)
    assert record.kernel_mass == pytest.approx((0.05 * 0.75 + 2.7 * 0.25) / 1.5)
    assert record.starved_positive_share == 1.0
    assert record.ess_w == pytest.approx(8.0**2 / (4 * 22.0))
    assert record.ess_phi == pytest.approx(2.75**2 / (4 * (0.05**2 + 0.5**2 + 1 + 1.2**2)))
    assert record.log_w_quantiles_pos == [0.0] * 5
    assert record.log_w_quantiles_neg == pytest.approx(np.quantile(log_w[1:], QUANTILES))
    assert record.phi_quantiles_pos == pytest.approx([0.05] * 5)
    assert record.phi_quantiles_neg == pytest.approx(np.quantile([0.5, 1.0, 1.2], QUANTILES))
    assert record.log_w_max == pytest.approx(math.log(4))
    assert record.log_w_min == 0.0
    assert record.log_w_quantiles[2] == pytest.approx(np.median(log_w))
    assert len(record.phi_quantiles) == 5


def test_silenced_sequences_are_counted_and_left_out():
    batch = _batch([1.0, 0.0, 0.0, 0.0])
    record = step_record(
        batch, _update(4, log_w=[9.0, 0.0, 0.0, 0.0], weights=[0, 1, 1, 1], silenced=[0]), make_context()
    )
    assert record.silenced == 1
    assert (record.log_w_max, record.ess_w, record.phi_mean_pos) == (0.0, 1.0, 0.0)
    assert record.kernel_mass == pytest.approx(0.5)


def test_extreme_weights_give_finite_numbers():
    batch = _batch([1.0, 0.0, 0.0, 0.0])
    record = step_record(batch, _update(4, log_w=[-1e6, 1e6, 0, 0], weights=0.0), make_context())
    assert record.ess_w == pytest.approx(0.25)
    assert StepRecord.model_validate_json(record.model_dump_json()) == record
    silent = step_record(batch, _update(4, silenced=range(4)), make_context())
    assert StepRecord.model_validate_json(silent.model_dump_json()) == silent


def test_rewards_of_the_task_are_told_apart_from_shaped_ones():
    record = step_record(_batch([0.5, 0.0, 0.0, 0.5]), _update(4), make_context(), [1.0, 0.0, -1.0, 0.5])
    assert (record.reward_mean, record.reward_min, record.reward_max) == (0.125, -1.0, 1.0)
    assert record.shaped_reward_mean == 0.25


def test_a_line_of_an_older_learner_still_parses():
    record = step_record(_batch([1.0, 0.0]), _update(2), make_context())
    late = [name for name, field in StepRecord.model_fields.items() if not field.is_required()]
    assert "filtered" in late
    assert StepRecord.model_validate(record.model_dump(exclude=set(late))).step == record.step


def test_no_advantages_withhold_nothing():
    assert step_record(_batch([1.0] * 4), _update(4), make_context()).kernel_mass == 1.0


def test_metrics_export_what_the_record_says():
    registry = CollectorRegistry()
    metrics = LearnerMetrics(registry, "my-run")
    batch = _batch([1.0, 0.0, 0.0, 0.0], version=1)
    for step in (1, 2):
        metrics.observe(step_record(batch, _update(4), make_context(step=step, version=3, wait_seconds=1.5)))
    run = {"run": "my-run"}
    assert registry.get_sample_value("vespo_learner_step", run) == 2
    assert registry.get_sample_value("vespo_learner_reward", run) == 0.25
    assert registry.get_sample_value("vespo_learner_wait_seconds_total", run) == 3.0
    assert registry.get_sample_value("vespo_learner_sequences_total", run) == 8
    assert registry.get_sample_value("vespo_learner_lag_versions_count", run) == 8
    assert registry.get_sample_value("vespo_learner_lag_versions_sum", run) == 16


def test_lines_of_before_the_reference_was_recorded_are_read():
    record = step_record(_batch([1.0, 0.0]), _update(2), make_context())
    line = record.model_dump(exclude={"reference_kl"})
    assert StepRecord.model_validate(line).reference_kl == 0.0
