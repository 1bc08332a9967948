"""`vespo bench weights` with a real vLLM: the whole way of a version, down to the pause."""

import pytest

from deploy.bench.harness import run_bench

pytestmark = pytest.mark.e2e


def test_the_pause_is_measured_and_reads_nothing() -> None:
    report = run_bench("weights", quick=True)
    assert report["figures"]["pause_seconds"]["median"] > 0
    assert report["figures"]["own_load_seconds"]["median"] > 0
    assert report["targets"]["reads_during_pause"]["met"]
