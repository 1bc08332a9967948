"""Connection, key names and error mapping, as far as they need no server."""

import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import redis

from buffer.connection import DeadlineRetry, check_server, connect, guard, redact_url
from buffer.keys import Keys
from buffer.scripts import load, typed_error
from buffer.tickets import parse_ticket, ticket_member
from buffer.topology import Target, parse_target
from protocol.errors import BufferPolicyError, BufferUnavailableError, FencedError, RunMismatchError
from protocol.trajectory import Ticket


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("rediss://user:s3cret@host:6380/1", "rediss://user:***@host:6380/1"),
        ("redis://:s3cret@host", "redis://:***@host"),
        ("unix:///run/redis.sock?db=1&password=s3cret", "unix:///run/redis.sock?db=1&password=***"),
        ("s3://bucket/run?aws_secret_access_key=s3cret", "s3://bucket/run?aws_secret_access_key=***"),
        ("/plain/path", "/plain/path"),
        ("redis://u:s3/c@ret@host:not-a-port", "redis://u:***@host:not-a-port"),
    ],
)
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_closed_port_is_refused_at_once() -> None:
    port = closed_port()
    started = time.monotonic()
    with pytest.raises(BufferUnavailableError, match=f"127.0.0.1:{port}/0 cannot be reached") as raised:
        connect(f"redis://user:s3cret@127.0.0.1:{port}/0", wait=False)
    assert time.monotonic() - started < 1.5
    assert "s3cret" not in str(raised.value)


def test_a_server_that_accepts_and_says_nothing_is_refused_soon() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        started = time.monotonic()
        with pytest.raises(BufferUnavailableError, match="cannot be reached"):
            connect(f"redis://127.0.0.1:{listener.getsockname()[1]}", wait=False)
        assert time.monotonic() - started < 1.5


def test_waiting_for_a_server_is_bounded() -> None:
    started = time.monotonic()
    with pytest.raises(BufferUnavailableError):
        connect(f"redis://127.0.0.1:{closed_port()}", reconnect_seconds=0.5)
    assert time.monotonic() - started < 2.0


def test_wrong_credentials_are_not_retried() -> None:
    attempts = []

    def refuse() -> None:
        attempts.append(1)
        raise redis.AuthenticationError("invalid username-password pair")

    with pytest.raises(redis.AuthenticationError):
        DeadlineRetry(60).call_with_retry(refuse, lambda error: None)
    assert len(attempts) == 1


@pytest.mark.parametrize("url", ["http://host", "host:6379", ""])
def test_a_url_of_another_kind_is_the_callers_mistake(url: str) -> None:
    with pytest.raises(ValueError, match="not a Redis URL"):
        connect(url)


@pytest.mark.parametrize(
    ("url", "mistake"),
    [
        ("redis+sentinel://u:s3cret@host:26379", "the name of the service is missing"),
        ("redis+sentinel://u:s3cret@host:26379/name/first", "database 'first' is no number"),
        ("redis+sentinel://u:s3cret@host:port/name", "'host:port' is no HOST:PORT"),
        ("redis+sentinel://u:s3cret@a:1,/name", "'' is no HOST:PORT"),
        ("redis+cluster://u:s3cret@host:70000", "'host:70000' is no HOST:PORT"),
        ("redis+cluster://u:s3cret@host:7000/1", "no database but 0"),
        ("redis+other://u:s3cret@host:7000", "none of these forms"),
        ("redis+cluster://u:s3cret@host:7000?socket_timeout=soon", "socket_timeout"),
    ],
)
def test_what_is_wrong_with_a_url_is_said_without_its_secrets(url: str, mistake: str) -> None:
    with pytest.raises(ValueError, match=mistake) as raised:
        connect(url, run="run", wait=False)
    assert "redis+cluster://" in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_a_cluster_needs_the_run() -> None:
    with pytest.raises(ValueError, match="name of the run decides the node"):
        connect("redis+cluster://127.0.0.1:7000", wait=False)


def test_urls_of_several_servers_are_read() -> None:
    target = parse_target("rediss+sentinel://u:p%40ss@a,[::1]:5/name/3?sentinel_password=x&ssl_ca_certs=/ca.pem", None)
    assert target.url == "rediss://u:p%40ss@localhost/3?ssl_ca_certs=%2Fca.pem"
    assert target.tls
    assert str(target.locator) == "master of name by Sentinels a:26379,::1:5"
    target = parse_target("redis+cluster://:pw@a,b:7001", "run")
    assert (target.url, target.tls) == ("redis://:pw@localhost/0", False)
    assert str(target.locator) == "owner of the run by Cluster nodes a:6379,b:7001"
    assert parse_target("redis://host:1/2", None) == Target("redis://host:1/2")


@pytest.mark.parametrize("name", ["", "a{b", "a}b", "a\nb"])
def test_run_names_that_would_break_the_hash_tag_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="run name"):
        Keys(name)


def test_all_keys_of_a_run_share_its_hash_tag() -> None:
    keys = Keys("run").all()
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("vespo:{run}:") for key in keys)


def test_error_replies_become_typed_errors() -> None:
    for position in (
        " script: on @user_script:12.",
        " script: 0a1b, on @user_script:12.",
        "",
    ):  # Valkey, Redis, neither
        fenced = typed_error(redis.ResponseError(f"FENCED epoch 1 is over{position}"))
        assert isinstance(fenced, FencedError)
        assert str(fenced) == "epoch 1 is over"
    assert isinstance(typed_error(redis.ResponseError("MISMATCH another run")), RunMismatchError)
    assert isinstance(typed_error(redis.ResponseError("INVALID version 1")), ValueError)
    other = redis.ResponseError("WRONGTYPE Operation against a key")
    assert typed_error(other) is other


def test_refusals_of_the_server_are_attributed_to_it() -> None:
    client = redis.Redis()
    with pytest.raises(BufferUnavailableError, match="localhost:6379/0 refuses commands: READONLY"), guard(client):
        raise redis.exceptions.ReadOnlyError("You can't write against a read only replica.", status_code="READONLY")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"), guard(client):
        raise redis.ResponseError("WRONGTYPE Operation against a key")


def test_old_servers_are_refused() -> None:
    sections = {"server": {"redis_version": "6.2.14"}, "memory": {}, "persistence": {}}
    pool = SimpleNamespace(connection_kwargs={"host": "old", "port": 1})
    client = SimpleNamespace(info=sections.__getitem__, connection_pool=pool)
    with pytest.raises(BufferPolicyError, match=r"old:1/0 is version 6\.2\.14"):
        check_server(client, embedded=False)  # type: ignore[arg-type]


def test_tickets_survive_their_spelling() -> None:
    assert parse_ticket(ticket_member(Ticket(12, 3)).encode()) == Ticket(12, 3)


def test_scripts_say_what_they_take() -> None:
    for name in ("issue", "submit", "lease", "commit", "publish", "begin_epoch"):
        source, digest = load(name)
        assert source.startswith("#!lua")
        assert "ARGV" in source
        assert len(digest) == 40


def test_reading_the_buffer_needs_no_heavy_import() -> None:
    heavy = "('torch', 'fsspec', 'safetensors', 'ray', 'vllm', 'deepspeed', 'transformers')"
    code = (
        f"import sys, buffer.run, buffer.embedded; sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 0, result.stderr
