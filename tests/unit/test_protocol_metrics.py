"""What an actor exports is its status, read when it is asked."""

from prometheus_client import CollectorRegistry, generate_latest

from protocol.metrics import ACTOR_COUNTERS, ACTOR_GAUGES, ActorCollector
from protocol.records import ActorStatus


def test_an_actor_exports_what_its_status_says_now() -> None:
    status = ActorStatus(state="starting", pid=1, host="h")
    registry = CollectorRegistry()
    registry.register(ActorCollector("run-1", "actor-0.1", lambda: status))
    status = status.model_copy(update={"state": "serving", "served_version": 7, "tokens_generated": 120})
    text = generate_latest(registry).decode()
    assert 'vespo_actor_served_version{actor="actor-0.1",run="run-1"} 7.0' in text
    assert 'vespo_actor_tokens_total{actor="actor-0.1",run="run-1"} 120.0' in text
    assert 'vespo_actor_state{actor="actor-0.1",run="run-1",state="serving"} 1.0' in text


def test_every_exported_field_is_one_of_the_status() -> None:
    assert set(ACTOR_COUNTERS) | set(ACTOR_GAUGES) <= set(ActorStatus.model_fields)
