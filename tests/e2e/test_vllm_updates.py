"""Real vLLM serves exactly what was published: every architecture whose in-place update could go wrong silently."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.3}


@pytest.mark.parametrize(
    ("embeddings", "experts", "dtype"),
    [("untied", 0, "float32"), ("tied", 0, "float32"), ("untied", 4, "float32"), ("tied", 4, "bfloat16")],
)
def test_in_place_updates_match_the_published_model(embeddings: str, experts: int, dtype: str) -> None:
    command = [sys.executable, "-m", "tests.e2e.engine_probe", embeddings, str(experts), dtype]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert max(report["parity"]) < TOLERANCE[dtype]
    before, after = report["spans"]
    assert before == [0, 4, 1]
    assert (after[0], after[2]) == (4, 2)
