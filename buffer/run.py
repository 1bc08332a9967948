"""One run's buffer: the object that actors, learner and operators hold."""

import redis

from buffer.clock import PolicyClock
from buffer.connection import command
from buffer.control import Control
from buffer.events import Events
from buffer.groups import Groups
from buffer.keys import Keys
from buffer.ledger import Ledger, read_ledger
from buffer.peek import Peeked, peek_groups
from buffer.registry import ActorRegistry
from buffer.repair import payload_keys, repair_run
from buffer.scripts import Scripts
from buffer.tickets import Tickets


class Buffer:
    """Everything one run keeps in Redis.

    Attributes:
        run: name of the run.
        tickets, groups: work for actors, and what they deliver.
        clock: policy versions and their manifests.
        actors: who is alive.
        control: state of the run, progress.
        events: what actors block on.
    """

    def __init__(self, client: redis.Redis, run: str) -> None:
        self.run = run
        self._client = client
        self._keys = Keys(run)
        self._scripts = Scripts(client, self._keys)
        self.events = Events(client, self._keys.events)
        versions, space = Events(client, self._keys.versions), Events(client, self._keys.space)
        self.tickets = Tickets(client, self._keys, self._scripts, self.events)
        self.groups = Groups(client, self._keys, self._scripts, self.events, space)
        self.clock = PolicyClock(client, self._keys, self._scripts, versions)
        self.actors = ActorRegistry(client, self._keys, self._scripts)
        self.control = Control(client, self._keys, self._scripts, self.events)

    def begin_epoch(
        self,
        *,
        run_id: str,
        groups_per_version: int,
        max_lag: int,
        max_attempts: int,
        max_bytes: int,
        first_ticket: int = 0,
        step: int = 0,
    ) -> int:
        """Make the calling learner the run's only one, and create the run if it is new; on the server's disk at return.

        Every uncommitted group will be delivered again, in order; whatever an older epoch still tries is refused. The
        run's state becomes "running".

        Args:
            run_id: identity of the run directory.
            groups_per_version, max_lag: the admission rule.
            max_attempts: failures after which a ticket is dead.
            max_bytes: bytes of buffered groups above which submitters wait.
            first_ticket: where a new run starts counting tickets.
            step: optimizer updates already done.

        Returns:
            The epoch, to be handed to `Groups` and put in manifests.

        Raises:
            RunMismatchError: the buffer holds a run of another identity under this name.
        """
        if min(groups_per_version, max_attempts, max_bytes) < 1 or min(max_lag, first_ticket, step) < 0:
            raise ValueError(
                f"groups_per_version {groups_per_version}, max_attempts {max_attempts} and max_bytes {max_bytes} must "
                f"be positive, max_lag {max_lag}, first_ticket {first_ticket} and step {step} not negative"
            )
        self._scripts.forget_recent()
        return int(
            self._scripts.run_durably(
                "begin_epoch", run_id, groups_per_version, max_lag, max_attempts, max_bytes, first_ticket, step
            )
        )

    def ledger(self) -> Ledger:
        """Where every ticket of the run is, verified."""
        return read_ledger(self._scripts)

    def repair(self) -> list[str]:
        """Put a ledger that does not balance in order; returns what was changed apart from counters, in words.

        Raises:
            BufferUnavailableError: the run's own description is gone; the message says what to do.
        """
        return repair_run(self._client, self._keys, self._scripts)

    def peek(self, count: int) -> list[Peeked]:
        """The next `count` groups that the learner has not taken, without their tokens."""
        return peek_groups(self._client, self._keys, count)

    def purge(self) -> bool:
        """Delete everything the run has in Redis, and nothing else; returns whether there was anything."""
        found = bool(command(self._client, "UNLINK", *self._keys.all()))
        for keys in payload_keys(self._client, self._keys):
            command(self._client, "UNLINK", *keys)
            found = True
        return found
