"""`vespo bench scale` with a few actors: every path of it, on a real server, with the ledger proved at the end."""

import math
import multiprocessing

import pytest

from deploy.bench import BENCHES
from deploy.bench.fleet import FleetJob, make_group, running
from deploy.bench.harness import run_bench
from deploy.bench.scale import QUICK
from protocol.codec import decode_group, encode_group
from protocol.trajectory import Ticket


def test_a_short_run_measures_every_figure() -> None:
    report = run_bench("scale", quick=True)
    figures = report["figures"]
    for num_actors in QUICK.actors:
        assert figures[f"server_us_per_group_{num_actors}"]["median"] > 0
        assert 10 < figures[f"groups_per_second_{num_actors}"]["median"] < 2 * QUICK.groups_per_second
        for call in ("issue", "submit"):
            middle, slow = (figures[f"{call}_p{percent}_ms_{num_actors}"]["median"] for percent in (50, 99))
            assert 0 < middle <= slow
    few, many = (figures[f"server_us_per_group_{num_actors}"]["median"] for num_actors in QUICK.actors)
    assert math.isclose(figures["server_cost_growth"]["median"], many / few)
    assert figures[f"server_us_per_group_{QUICK.actors[-1]}_half_waiting"]["median"] > 0
    assert report["targets"]["server_cost_growth"]["target"] == 1.2
    assert multiprocessing.active_children() == []


def test_actors_that_cannot_connect_end_the_bench() -> None:
    with (
        running([FleetJob("redis://nobody:wrong@127.0.0.1:1/0?socket_connect_timeout=bad", "run", 1, 0.1)]) as fleet,
        pytest.raises(RuntimeError, match="ended or hangs"),
    ):
        fleet.wait_connected()
    assert multiprocessing.active_children() == []


def test_the_groups_are_ones_a_learner_takes() -> None:
    group = decode_group(encode_group(make_group(Ticket(3, 1), 7)))
    assert group.ticket == Ticket(3, 1)
    assert {span.version for completion in group.completions for span in completion.spans} == {7}
    assert "scale" in BENCHES
