"""The client for actors written with asyncio keeps the contract of the one with threads, beside which it works."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis
from buffer_samples import begin, make_group, publish_next
from plain_servers import VALKEY
from server_faults import kill
from topologies import cluster, replicated

from buffer.aio import AsyncBuffer, connect_async
from buffer.connection import connect
from buffer.embedded import EmbeddedServer
from buffer.run import Buffer
from protocol.errors import BufferUnavailableError, CodecError
from protocol.records import ActorStatus
from protocol.trajectory import Ticket


@asynccontextmanager
async def actor_of(url: str, run: str, *, reconnect_seconds: float = 5.0) -> AsyncIterator[AsyncBuffer]:
    """An actor's buffer on a connection of its own."""
    client = await connect_async(url, run=run, reconnect_seconds=reconnect_seconds)
    try:
        yield AsyncBuffer(client, run)
    finally:
        await client.aclose()


def test_groups_go_from_tasks_to_the_learner(redis_url: str, buffer: Buffer) -> None:
    async def act() -> list[Ticket]:
        async with actor_of(redis_url, buffer.run) as actor:
            clock = await actor.clock.read()
            assert clock is not None
            assert (clock.version, clock.epoch) == (0, epoch)
            tickets = (await actor.tickets.issue(clock.version, 6, 60)).tickets
            assert await actor.tickets.renew([*tickets, Ticket(99, 0)], 60) == [Ticket(99, 0)]
            assert await actor.tickets.give_back(tickets[4:5]) == 1
            await actor.tickets.fail(tickets[5], "scorer")
            accepted = await asyncio.gather(*(actor.groups.submit(make_group(t), 5) for t in tickets[:4]))
            assert accepted == [True] * 4
            assert not await actor.groups.submit(make_group(tickets[4]), 5)  # its lease is gone
            return tickets

    epoch = begin(buffer)
    publish_next(buffer, epoch)
    tickets = asyncio.run(act())
    leased = buffer.groups.lease(epoch, 10, 1)
    assert {item.group.ticket for item in leased} == set(tickets[:4])
    assert buffer.groups.commit(epoch, [item.entry_id for item in leased], step=1) == 4
    ledger = buffer.ledger()
    assert ledger.discrepancies == []
    assert (ledger.states["trained"], ledger.states["retry"], ledger.events["failed"]) == (4, 2, 1)


def test_a_task_that_waits_is_woken_by_a_version(redis_url: str, buffer: Buffer) -> None:
    async def act() -> tuple[str, float]:
        async with actor_of(redis_url, buffer.run) as actor:
            refused = await actor.tickets.issue(0, 1, 60)
            publication = asyncio.get_running_loop().call_later(0.2, publish_next, buffer, epoch)
            started = time.monotonic()
            await actor.tickets.wait(refused.cursor, 20)
            waited = time.monotonic() - started
            assert publication.when() <= asyncio.get_running_loop().time()
            assert len((await actor.tickets.issue(0, 1, 60)).tickets) == 1
            return refused.reason, waited

    epoch = begin(buffer)
    reason, waited = asyncio.run(act())
    assert reason == "admission"
    assert 0.1 < waited < 5


def test_a_full_buffer_holds_tasks_up_until_the_learner_takes_groups(redis_url: str, buffer: Buffer) -> None:
    async def act() -> None:
        async with actor_of(redis_url, buffer.run) as actor:
            first, second, third = (await actor.tickets.issue(0, 3, 60)).tickets
            assert await actor.groups.submit(make_group(first), 1)
            with pytest.raises(BufferUnavailableError, match="no room for"):
                await actor.groups.submit(make_group(third), 0.1)
            asyncio.get_running_loop().call_later(0.2, buffer.groups.lease, epoch, 1, 1)
            assert await actor.groups.submit(make_group(second), 10)

    epoch = begin(buffer, max_bytes=1)
    publish_next(buffer, epoch)
    asyncio.run(act())
    assert buffer.ledger().discrepancies == []


def test_a_group_nobody_could_train_on_is_refused(redis_url: str, buffer: Buffer) -> None:
    async def act() -> None:
        async with actor_of(redis_url, buffer.run) as actor:
            group = make_group(Ticket(0, 0))
            group.completions[0].logprobs[0] = float("nan")
            with pytest.raises(CodecError):
                await actor.groups.submit(group, 1)

    asyncio.run(act())


def test_actors_of_tasks_are_registered(redis_url: str, buffer: Buffer) -> None:
    async def act() -> None:
        async with actor_of(redis_url, buffer.run) as actor:
            await actor.actors.heartbeat("a", ActorStatus(state="serving", pid=1, host="here", tokens_generated=7))
            assert [name for name, _, _ in buffer.actors.list(60)] == ["a"]
            await actor.actors.leave("a")
            await actor.actors.leave("unknown")

    begin(buffer)
    asyncio.run(act())
    assert buffer.actors.list(60) == []
    assert buffer.actors.totals().tokens_generated == 7


def test_a_server_that_comes_back_is_waited_for(server_directory: Path) -> None:
    server = EmbeddedServer.start(server_directory)
    client = connect(server.url)
    run = Buffer(client, "run")
    publish_next(run, begin(run))

    async def act() -> bool:
        async with actor_of(server.url, "run", reconnect_seconds=20) as actor:
            (ticket,) = (await actor.tickets.issue(0, 1, 60)).tickets
            client.execute_command("WAITAOF", 1, 0, 5000)
            kill(server)
            restart = asyncio.create_task(asyncio.to_thread(restart_later))
            accepted = await actor.groups.submit(make_group(ticket), 20)  # the scripts are gone too
            await restart
            return accepted

    def restart_later() -> None:
        time.sleep(0.5)
        EmbeddedServer.start(server_directory)

    assert asyncio.run(act())
    assert run.ledger().discrepancies == []
    client.close()


def test_a_server_that_stays_away_is_an_error_in_time(server_directory: Path) -> None:
    server = EmbeddedServer.start(server_directory)

    async def act() -> None:
        async with actor_of(server.url, "run", reconnect_seconds=0.5) as actor:
            assert (await actor.tickets.issue(0, 1, 60)).reason == "no run"
            kill(server)
            with pytest.raises(BufferUnavailableError, match="cannot be reached"):
                await actor.tickets.wait("0-1", 30)

    started = time.monotonic()
    asyncio.run(act())
    assert time.monotonic() - started < 5


def test_nobody_at_the_address_is_an_error_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(BufferUnavailableError, match=f"127.0.0.1:{port}/0 cannot be reached"):
        asyncio.run(connect_async(f"redis://127.0.0.1:{port}", wait=False))
    with pytest.raises(ValueError, match="is not a Redis URL"):
        asyncio.run(connect_async("http://127.0.0.1"))


def test_tasks_follow_a_failover(tmp_path: Path) -> None:
    with replicated(VALKEY, tmp_path) as servers:
        client = connect(servers.url, reconnect_seconds=15)
        run = Buffer(client, "run")
        publish_next(run, begin(run))
        assert client.execute_command("WAIT", 1, 5000) == 1

        async def act() -> bool:
            async with actor_of(servers.url, "run", reconnect_seconds=15) as actor:
                (ticket,) = (await actor.tickets.issue(0, 1, 60)).tickets
                client.execute_command("WAIT", 1, 5000)
                servers.master.kill()
                return await actor.groups.submit(make_group(ticket), 15)

        assert asyncio.run(act())
        assert run.ledger().discrepancies == []
        client.close()


def test_tasks_find_and_follow_the_owner_in_a_cluster(tmp_path: Path) -> None:
    with cluster(VALKEY, tmp_path) as servers:
        name = next(name for name in (f"run-{n}" for n in range(100)) if servers.owner(name) == 2)
        client = connect(servers.url, run=name, reconnect_seconds=10)
        run = Buffer(client, name)
        publish_next(run, begin(run))

        async def act() -> None:
            async with actor_of(servers.url, name, reconnect_seconds=10) as actor:
                first, second = (await actor.tickets.issue(0, 2, 60)).tickets
                assert await actor.groups.submit(make_group(first), 5)
                servers.move(name, 2, 0)
                assert await actor.groups.submit(make_group(second), 10)

        asyncio.run(act())
        with redis.Redis.from_url(servers.nodes[0].url) as owner:
            assert owner.dbsize() > 0
        assert run.ledger().states["buffered"] == 2
        client.close()
