"""Real vLLM serves exactly what was published: every architecture whose in-place update could go wrong silently."""

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

MODELS = ["qwen3", "qwen3-tied", "qwen3-tied-bfloat16", "moe", "moe-tied", "moe-tied-bfloat16", "llama", "qwen2-tied"]


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    """What `tests.e2e.engine_probe` found, by model and by fault."""
    command = [sys.executable, "-m", "tests.e2e.engine_probe"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {line.pop("name"): line for line in lines}


def tolerance(model: str) -> float:
    return 0.3 if model.endswith("bfloat16") else 1e-5


@pytest.mark.parametrize("model", MODELS)
def test_in_place_updates_match_the_published_model_and_a_fresh_engine(reports: dict[str, Any], model: str) -> None:
    report = reports[model]
    assert len(report["parity"]) == 4
    assert max(report["parity"]) < tolerance(model)
    assert report["identical"]
    before, after = report["spans"]
    assert before == [0, 4, 1]
    assert (after[0], after[2]) == (4, 2)


@pytest.mark.parametrize("model", MODELS)
def test_no_prefix_outlives_the_weights_it_was_computed_with(reports: dict[str, Any], model: str) -> None:
    cached = {what: tokens for what, tokens, _ in reports[model]["cache"]}
    assert cached["again"] >= 256  # the cache works while the weights stay
    assert [cached[what] for what in ("first", "updated", "damaged", "repaired")] == [0, 0, 0, 0]
    assert max(error for _, _, error in reports[model]["cache"]) < tolerance(model)


@pytest.mark.parametrize(("fault", "counts"), [("Corrupted", [2, 1, 1, 0]), ("Torn", [0, 0, 1, 1])])
def test_a_faulty_engine_is_replaced_by_one_that_serves_verified_weights(
    reports: dict[str, Any], fault: str, counts: list[int]
) -> None:
    report = reports[fault]
    assert report["counts"] == counts  # violations, reloads, rebuilds, lost in an update
    assert report["engine"] == "VllmEngine"
    assert len(report["parity"]) == 3
    assert max(report["parity"]) < 1e-5
