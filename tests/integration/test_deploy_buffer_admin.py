"""`vespo buffer ...` against a real server: what operators see, and that nothing is destroyed unasked."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import redis
from buffer_samples import begin, payload_key, publish_next, submit_new
from typer.testing import CliRunner, Result

from buffer.keys import Keys
from buffer.run import Buffer
from deploy.buffer_admin import buffer_app

Vespo = Callable[..., Result]


@pytest.fixture
def vespo(buffer: Buffer, redis_url: str) -> Vespo:
    """Runs `vespo buffer COMMAND...` on a run with groups in several states; `answer` is typed at its questions."""
    epoch = begin(buffer, groups_per_version=8, max_attempts=1)
    publish_next(buffer, epoch)
    submit_new(buffer, 4)
    buffer.groups.lease(epoch, 1, 1)
    buffer.tickets.fail(buffer.tickets.issue(0, 1, 60).tickets[0], "the scorer said no")

    def run(*arguments: str, answer: str = "") -> Result:
        return CliRunner().invoke(
            buffer_app, [*arguments, "--url", redis_url, "--run", buffer.run], input=answer, terminal_width=200
        )

    return run


def test_stats_and_audit_of_a_sound_run(vespo: Vespo) -> None:
    shown = vespo("stats")
    assert shown.exit_code == 0, shown.output
    assert "buffered 3  leased 1" in shown.output
    audited = vespo("audit")
    assert audited.exit_code == 0, audited.output
    assert "the ledger balances" in audited.output


def test_audit_fails_and_repairs_when_asked(vespo: Vespo, buffer: Buffer, redis_client: redis.Redis) -> None:
    redis_client.delete(payload_key(redis_client, Keys(buffer.run), 2))
    broken = vespo("audit")
    assert broken.exit_code == 1
    assert "has 0 bytes of" in broken.output
    refused = vespo("audit", "--repair", answer="n\n")
    assert refused.exit_code == 1
    assert not buffer.ledger().balanced
    repaired = vespo("audit", "--repair", "--yes")
    assert repaired.exit_code == 0, repaired.output
    assert "repaired: 1 groups are dropped" in repaired.output
    assert vespo("audit", "--repair").exit_code == 0


def test_peek_shows_what_comes_next_and_no_tokens(vespo: Vespo, buffer: Buffer, redis_client: redis.Redis) -> None:
    keys = Keys(buffer.run)
    redis_client.set(payload_key(redis_client, keys, 2), b"junk")
    lines = vespo("peek", "--limit", "2").output.splitlines()
    assert [line.split()[0] for line in lines] == ["ticket", "1", "2"]
    assert lines[1].split()[4:] == ["2", "8", "0", "1.000", "actor"]
    assert "DAMAGED" in lines[2]


def test_dead_tickets_are_shown_and_tried_again(vespo: Vespo, buffer: Buffer) -> None:
    assert "the scorer said no" in vespo("dead").output
    assert "0 tickets" in vespo("retry-dead", "--ticket", "1").output
    assert "1 tickets" in vespo("retry-dead", "--ticket", "4").output
    assert vespo("dead").output == "no ticket is dead\n"
    assert buffer.ledger().states["retry"] == 1


def test_draining_and_purging_ask(vespo: Vespo, buffer: Buffer) -> None:
    assert vespo("drain", answer="n\n").exit_code == 1
    assert buffer.control.state() == "running"
    assert vespo("drain", "--yes").exit_code == 0
    assert buffer.control.state() == "draining"
    assert vespo("drain", "--yes").exit_code == 1
    assert vespo("purge", answer="\n").exit_code == 1
    assert buffer.clock.read() is not None
    assert "deleted" in vespo("purge", answer="y\n").output
    assert "there was nothing" in vespo("purge", "--yes").output
    assert "no learner has begun it" in vespo("stats").output
    assert vespo("peek").output == "no group waits\n"


def test_an_answer_comes_at_once(vespo: Vespo, buffer: Buffer, redis_url: str) -> None:
    code = "from deploy.buffer_admin import buffer_app; buffer_app()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "stats", "--url", redis_url, "--run", buffer.run], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_utime + usage.ru_stime < 1.0  # processor time: the wall clock depends on what else is running
