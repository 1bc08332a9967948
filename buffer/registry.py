"""Which actors are alive, what they do, and what all that ever were have done together."""

from dataclasses import dataclass

import redis

from buffer.connection import command
from buffer.keys import Keys
from buffer.scripts import Scripts
from protocol.records import ActorStatus


@dataclass(frozen=True, slots=True)
class ActorTotals:
    """Sums over every actor that ever sent a heartbeat; `parity_max` is their maximum."""

    actors: int
    tokens_generated: int
    groups_submitted: int
    busy_seconds: float
    wall_seconds: float
    parity_max: float


class ActorRegistry:
    """The run's actors. A name belongs to one incarnation of one process."""

    def __init__(self, client: redis.Redis, keys: Keys, scripts: Scripts) -> None:
        self._client = client
        self._keys = keys
        self._scripts = scripts

    def heartbeat(self, name: str, status: ActorStatus) -> None:
        """Say that actor `name` is alive, at the server's time."""
        self._scripts.run("heartbeat", name, status.model_dump_json())

    def list(self, alive_within_seconds: float) -> "list[tuple[str, float, ActorStatus]]":
        """Name, seconds since its heartbeat and status of each actor heard of within `alive_within_seconds`."""
        reply = self._scripts.run("alive", round(1000 * alive_within_seconds))
        return sorted(
            (name.decode(), age_ms / 1000, ActorStatus.model_validate_json(status)) for name, age_ms, status in reply
        )

    def leave(self, name: str) -> None:
        """Take an actor off the list of the living; its totals stay."""
        data = command(self._client, "HGET", self._keys.actors, name)
        self._scripts.run("leave", name, status_of_the_gone(data))

    def totals(self) -> ActorTotals:
        """Sums over all actors that ever were."""
        values = command(self._client, "HVALS", self._keys.actors)
        every = [ActorStatus.model_validate_json(value) for value in values]
        return ActorTotals(
            actors=len(every),
            tokens_generated=sum(status.tokens_generated for status in every),
            groups_submitted=sum(status.groups_submitted for status in every),
            busy_seconds=sum(status.busy_seconds for status in every),
            wall_seconds=sum(status.wall_seconds for status in every),
            parity_max=max((status.parity_max for status in every), default=0.0),
        )


def status_of_the_gone(data: bytes | None) -> str:
    """The last status of an actor as it stays for the totals; empty if there was none."""
    if data is None:
        return ""
    return ActorStatus.model_validate_json(data).model_copy(update={"state": "left"}).model_dump_json()
