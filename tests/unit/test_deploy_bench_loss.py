"""The loss bench: every path in its process, the same results, what stands in where TRL cannot be had."""

import sys
from pathlib import Path

import pytest

from deploy.bench import loss
from deploy.bench.loss_paths import Cost, Size
from deploy.bench.trl import REQUIREMENTS, VERSION, trl_libraries
from protocol.errors import VespoError

FAKE_HEAD = """
class ChunkedLogProbFunction:
    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        assert chunk_size > 0 and (bias, softcap, scale) == (None, None, 1.0)
        distribution = (hidden @ weight.T / temperature).log_softmax(-1)
        return distribution.gather(1, targets[:, None]).squeeze(1), None, None, None, None
"""
FAKE_TRAINER = """
import torch

class GRPOTrainer:
    @staticmethod
    @torch.no_grad()
    def get_gamma_weights(
        advantages, log_ratio_per_token, mask, importance_sampling_ratio, k_pos, lambda_pos, k_neg, lambda_neg
    ):
        w = (log_ratio_per_token * mask).sum(-1, keepdim=True).exp()
        k, rate = torch.where(advantages >= 0, k_pos, k_neg), torch.where(advantages >= 0, lambda_pos, lambda_neg)
        return FACTOR * w**k * (rate * (1 - w)).exp()
"""


def fake_trl(directory: Path, factor: float = 1.0) -> Path:
    """A package with the two names that the bench takes from TRL, by the textbook."""
    (directory / "trl" / "trainer").mkdir(parents=True)
    for package in ("trl", "trl/trainer"):
        (directory / package / "__init__.py").write_text("")
    (directory / "trl" / "kernels.py").write_text(FAKE_HEAD)
    (directory / "trl" / "trainer" / "grpo_trainer.py").write_text(FAKE_TRAINER.replace("FACTOR", str(factor)))
    return directory


def quick_rounds(monkeypatch: pytest.MonkeyPatch, libraries: Path | None) -> list[loss.Round]:
    monkeypatch.setattr(loss, "trl_libraries", lambda *, install: libraries)
    return list(loss.rounds(quick=True))


def test_each_path_is_measured_and_compared(tmp_path, monkeypatch):
    (figures,) = quick_rounds(monkeypatch, fake_trl(tmp_path))
    assert figures["theirs_is_trl"].value == 1
    for path in ("ours", "plain", "trl"):
        assert figures[f"{path}_seconds_tiny"].value > 0
        assert figures[f"{path}_memory_tiny"].value > 0
    ratio = figures["ours_seconds_tiny"].value / figures["trl_seconds_tiny"].value
    assert figures["seconds_over_theirs_tiny"].value == pytest.approx(ratio)


def test_without_trl_the_plain_formula_stands_in(monkeypatch, capfd):
    (figures,) = quick_rounds(monkeypatch, None)
    assert figures["theirs_is_trl"].value == 0
    assert not any(name.startswith("trl_") for name in figures)
    assert figures["seconds_over_theirs_tiny"] == figures["seconds_over_plain_tiny"]
    assert "TRL is not installed" in capfd.readouterr().err


def test_paths_that_compute_something_else_are_not_compared(tmp_path, monkeypatch):
    with pytest.raises(VespoError, match="by trl"):
        quick_rounds(monkeypatch, fake_trl(tmp_path, factor=1.01))


def test_the_peak_counts_what_was_held_for_a_moment(monkeypatch):
    """Whole logits are three times 40 MB at the peak of the plain formula; tiles are 8 MiB, a few of them."""
    size = Size("memory", 10_000, 10, 100, 16)
    monkeypatch.setattr(loss, "QUICK_SIZES", (size,))
    (figures,) = quick_rounds(monkeypatch, None)
    assert 100 < figures["plain_memory_memory"].value < 200
    assert figures["ours_memory_memory"].value < 60


def test_targets_are_of_sizes_that_are_measured():
    costs = {path: Cost(1.0, 100, (1.0, 2.0, 3.0)) for path in ("ours", "plain", "trl")}
    measured = {figure for size in loss.SIZES for figure in loss._figures(size, costs)}
    assert {target.figure for target in loss.TARGETS} <= measured


def test_trl_is_kept_once_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert trl_libraries(install=False) is None
    kept = tmp_path / "bench" / f"trl-{VERSION}"
    kept.mkdir(parents=True)
    assert trl_libraries(install=False) == trl_libraries(install=True) == kept


def test_an_index_that_does_not_have_it_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert trl_libraries(install=True) is None
    assert not any(path for path in (tmp_path / "bench").glob("*"))


def test_what_is_installed_is_pinned():
    assert all("==" in requirement for requirement in REQUIREMENTS)
