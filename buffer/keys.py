"""Every Redis key of a run. The braces are a Cluster hash tag: one run, one slot, so that scripts are atomic."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one run; every Lua script gets all of them, in this order (`scripts/common.lua`)."""

    run: str
    clock: str = field(init=False)
    """hash: run_id, version, step, epoch, published_epoch, base, base_version, groups_per_version, max_lag,
    max_attempts, max_bytes, published_at (server time, ms)"""
    tickets: str = field(init=False)
    """hash: `first` and `next` index, and the ledger's counters of states, events and bytes"""
    generating: str = field(init=False)
    """zset: lease `index:attempt` → its expiry (server time, ms)"""
    retry: str = field(init=False)
    """list: `index:attempt` to issue before new tickets, next one at the left"""
    groups: str = field(init=False)
    """stream: an entry (ticket, bytes, payload) per group that is buffered or leased; one consumer group per epoch"""
    payload: str = field(init=False)
    """prefix of strings: `payload:NAME` holds an encoded group. Apart from the stream, so that scripts move groups
    without touching their bytes. Sent before the script that accepts it, with a time to live that acceptance ends"""
    dead: str = field(init=False)
    """stream: index, attempts, error of each ticket given up"""
    done: str = field(init=False)
    """bitmap: bit (index - first) is set once the ticket is trained or filtered"""
    weights: str = field(init=False)
    """hash: version → manifest JSON, and `latest`"""
    events: str = field(init=False)
    """stream, capped: notices of what lets actors go on (a version, room for tickets, the run's state), never state"""
    versions: str = field(init=False)
    """stream, capped: notices of new versions alone"""
    space: str = field(init=False)
    """stream, capped: notices that bytes got free, for groups that wait to be submitted"""
    actors: str = field(init=False)
    """hash: actor name → status JSON, of every actor that ever was"""
    heartbeats: str = field(init=False)
    """zset: actor name → last heartbeat (server time, ms); an actor that left is not in it"""
    control: str = field(init=False)
    """hash: state of the run and the reason for it"""
    progress: str = field(init=False)
    """string: JSON of the learner's newest step record"""
    store: str = field(init=False)
    """hash: weight payloads in chunks, where `weights.store` is "redis" (`buffer/stores/server.py`)"""

    def __post_init__(self) -> None:
        if not self.run or any(character in "{}\r\n\0" for character in self.run):
            raise ValueError(f"run name {self.run!r} is empty or holds braces or line ends")
        for item in fields(self):
            if item.name != "run":
                object.__setattr__(self, item.name, f"vespo:{{{self.run}}}:{item.name}")

    def all(self) -> list[str]:
        """Every key, in the order in which scripts receive them."""
        return [getattr(self, item.name) for item in fields(self) if item.name != "run"]
