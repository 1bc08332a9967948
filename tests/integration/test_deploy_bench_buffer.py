"""The buffer bench, run for real but briefly: everything is measured, nothing is left behind. No timing is asserted."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from buffer.connection import connect
from buffer.run import Buffer
from deploy.bench import buffer as bench
from deploy.bench.pair import Pair, Side, Start
from deploy.bench.ray_queues import KINDS
from deploy.bench.servers import serving
from deploy.bench.streams import RUN, Job, begin_run, deliver_groups, make_group, train_groups
from protocol.codec import encode_group

ROOT = Path(__file__).parents[2]


def test_a_quick_bench_measures_everything() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "bench", "buffer", "--json", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    figures = report["figures"]
    for size in bench.SIZES:
        for path in ("vespo_tcp", "vespo_unix", "raw_tcp", "raw_unix", *KINDS):
            assert figures[f"{path}_{size}_groups"]["unit"] == "groups/s"
            assert figures[f"{path}_{size}_bytes"]["unit"] == "MB/s"
        for transport in bench.TRANSPORTS:
            assert f"vespo_{transport}_{size}_of_raw" in figures
    assert all(math.isfinite(figure["min"]) and figure["min"] > 0 for figure in figures.values())
    assert set(report["targets"]) == {target.figure for target in bench.TARGETS} <= set(figures)


@pytest.mark.parametrize("num_bytes", bench.SIZES.values())
def test_groups_have_the_size_they_stand_for(num_bytes: int) -> None:
    assert num_bytes - 8 <= len(encode_group(make_group(num_bytes))) <= num_bytes


def test_what_is_measured_is_the_real_path() -> None:
    with serving() as server, Pair() as pair:
        for url in server.urls.values():
            server.clear()
            job = Job(url, num_bytes=4096, num_groups=50)
            begin_run(job)
            assert pair.seconds(deliver_groups, train_groups, job) > 0
            client = connect(url)
            ledger = Buffer(client, RUN).ledger()
            client.close()
            assert ledger.balanced
            assert (ledger.states["trained"], ledger.states["issued"]) == (50, 50)


def _stay(job: int, start: Start) -> None:
    start()


def _fail(job: int, start: Start) -> None:
    raise ZeroDivisionError(job)


@pytest.mark.parametrize("sides", [(_fail, _stay), (_stay, _fail)])
def test_a_side_that_fails_ends_the_measurement(sides: tuple[Side, Side]) -> None:
    with Pair() as pair, pytest.raises(ZeroDivisionError):
        pair.seconds(*sides, 1)
