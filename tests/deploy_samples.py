"""Made-up runs for the tests of deploy."""

import math
from pathlib import Path

from deploy.rundir import RunDirectory
from protocol.records import LagSummary, StepRecord, Summary
from protocol.settings import Settings


def make_settings(**sections: dict[str, object]) -> Settings:
    """Settings with a toy model, changed by section."""
    return Settings.model_validate({"model": {"toy": {}, "dtype": "float32"}, **sections})


def make_record(step: int, **changes: object) -> StepRecord:
    """A plausible step; every field can be changed."""
    fields: dict[str, object] = {
        "step": step,
        "version": step - 1,
        "epoch": 1,
        "time": 1000.0 + step,
        "wall_seconds": float(step),
        "reward_mean": 1 - 0.7 * math.exp(-step / 40),
        "reward_std": 0.4,
        "zero_variance_share": 0.1,
        "loss": 0.01,
        "grad_norm": 0.5,
        "skipped": False,
        "learning_rate": 5e-4,
        "num_groups": 32,
        "num_sequences": 256,
        "num_tokens": 600,
        "response_tokens_mean": 2.5,
        "truncated_share": 0.01,
        "lag_mean": 1.5,
        "lag_max": 2,
        "lag_counts": {1: 128, 2: 128},
        "log_w_mean": -0.02,
        "log_w_std": 0.2,
        "log_w_min": -2.0,
        "log_w_max": 1.0,
        "phi_mean_pos": 0.9,
        "phi_mean_neg": 0.95,
        "phi_quantiles": [0.2, 0.7, 0.95, 1.0, 1.2],
        "log_w_quantiles": [-0.5, -0.1, 0.0, 0.1, 0.4],
        "ess_w": 0.9,
        "kernel_mass": 0.95,
        "starved_positive_share": 0.01,
        "behaviour_kl": 0.01,
        "entropy": 0.5,
        "padding_share": 0.1,
        "silenced": 0,
        "stale": 0,
        "buffered_groups": 30,
        "wait_seconds": 0.2,
        "step_seconds": 1.0,
        "train_seconds": 0.7,
        "publish_seconds": 0.1,
    }
    return StepRecord.model_validate(fields | changes)


def make_summary(**changes: object) -> Summary:
    """A plausible summary of a complete run."""
    fields: dict[str, object] = {
        "run": "arithmetic",
        "seed": 0,
        "complete": True,
        "steps": 30,
        "versions": 30,
        "reward_first": 0.31,
        "reward_last": 0.95,
        "wall_seconds": 40.0,
        "training_seconds": 30.0,
        "tokens_generated": 12345,
        "groups_trained": 960,
        "lag": LagSummary(mean=1.5, p50=1, p95=2, max=2),
        "parity_max": 1e-6,
        "ledger": {"issued": 960, "trained": 960},
        "ledger_balanced": True,
        "learner_wait_fraction": 0.2,
        "actor_busy_fraction": 0.8,
        "restarts": {},
        "sessions": 1,
    }
    return Summary.model_validate(fields | changes)


def make_run(path: Path, num_steps: int, name: str = "arithmetic") -> RunDirectory:
    """A run directory with metrics."""
    directory = RunDirectory(path)
    directory.create(name)
    lines = [make_record(step).model_dump_json() + "\n" for step in range(1, num_steps + 1)]
    directory.metrics.write_text("".join(lines))
    return directory
