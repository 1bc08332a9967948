"""Publishing in the background: order, retries, deadlines, and errors that reach the training thread."""

import threading
import time

import pytest
import torch
from buffer_samples import begin

import learner.publisher
from buffer.store import WeightStore
from learner.publisher import Publisher, Snapshot
from learner.weights import raw_tensors
from protocol.errors import FencedError, WeightStoreError
from protocol.manifest import Probe

PROBE = Probe(tokens=((1, 2),), logprobs=((-1.0,),))


def _snapshot(version):
    return Snapshot(version, 10 * version, {"w": torch.full((3,), float(version))}, PROBE)


class UnreliableStore(WeightStore):
    """Refuses the first `failures` writes; blocks in every write until `gate` is set."""

    def __init__(self, url, failures=0):
        super().__init__(url)
        self.failures = failures
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def write(self, *arguments):
        self.entered.set()
        self.gate.wait(30)
        if self.failures:
            self.failures -= 1
            raise WeightStoreError("no space")
        return super().write(*arguments)


@pytest.fixture
def fast_retries(monkeypatch):
    monkeypatch.setattr(learner.publisher, "RETRY_SECONDS", (0.01, 0.01))


def _publisher(buffer, store, epoch, kept=4, full_every=1):
    return Publisher(buffer, store, epoch=epoch, versions_kept=kept, full_every=full_every)


def test_versions_appear_in_order_with_their_payload(buffer, tmp_path, monkeypatch):
    monkeypatch.setattr("buffer.retention.GRACE_SECONDS", 0.0)
    store = WeightStore(str(tmp_path))
    publisher = _publisher(buffer, store, begin(buffer), kept=2)
    for version in range(4):
        publisher.submit(_snapshot(version))
        publisher.finish()
        manifest = buffer.clock.latest_manifest()
        assert (manifest.version, manifest.step, manifest.probe) == (version, 10 * version, PROBE)
        assert torch.frombuffer(bytearray(store.read(manifest)[0].data), dtype=torch.float32).tolist() == [version] * 3
    publisher.close()
    assert publisher.last_seconds > 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_submitting_does_not_wait_and_the_newest_waiting_snapshot_wins(buffer, tmp_path, caplog):
    store = UnreliableStore(str(tmp_path))
    publisher = _publisher(buffer, store, begin(buffer))
    store.gate.clear()
    publisher.submit(_snapshot(0))
    assert store.entered.wait(10)
    started = time.monotonic()
    for version in (1, 2, 3):
        publisher.submit(_snapshot(version))
    assert time.monotonic() - started < 1
    store.gate.set()
    publisher.finish()
    publisher.close()
    assert buffer.clock.read().version == 3
    assert [buffer.clock.manifest(v) is not None for v in range(4)] == [True, False, False, True]
    assert publisher.num_superseded == 2
    assert "version 1 is superseded by 2" in caplog.text


def test_a_store_that_recovers_is_tried_again(buffer, tmp_path, fast_retries, caplog):
    store = UnreliableStore(str(tmp_path), failures=2)
    publisher = _publisher(buffer, store, begin(buffer))
    publisher.submit(_snapshot(0))
    publisher.finish()
    publisher.close()
    assert buffer.clock.read().version == 0
    assert "version 0 is not written, next try in 0.01 s: no space" in caplog.text


def test_a_store_that_stays_away_ends_the_learner_by_name(buffer, tmp_path, fast_retries):
    publisher = _publisher(buffer, UnreliableStore(str(tmp_path), failures=3), begin(buffer))
    publisher.submit(_snapshot(0))
    with pytest.raises(WeightStoreError, match="no space"):
        publisher.finish()
    with pytest.raises(WeightStoreError, match="no space"):
        publisher.submit(_snapshot(1))
    assert buffer.clock.read().version == -1
    publisher.close()


def test_a_store_that_hangs_is_not_waited_for_beyond_the_deadline(buffer, tmp_path, monkeypatch):
    monkeypatch.setattr(learner.publisher, "DEADLINE_SECONDS", 0.2)
    store = UnreliableStore(str(tmp_path))
    publisher = _publisher(buffer, store, begin(buffer))
    store.gate.clear()
    publisher.submit(_snapshot(0))
    with pytest.raises(WeightStoreError, match=r"publishing version 0 .* has not ended within 0\.2 s"):
        publisher.finish()
    store.gate.set()
    publisher.close()


def test_a_fenced_learner_learns_of_it(buffer, tmp_path):
    publisher = _publisher(buffer, WeightStore(str(tmp_path)), begin(buffer))
    begin(buffer)
    publisher.submit(_snapshot(0))
    with pytest.raises(FencedError):
        publisher.finish()
    assert buffer.clock.read().version == -1
    publisher.close()


def _small_change(version):
    weights = torch.arange(1000.0)
    weights[version] = -1.0
    return Snapshot(version, version, {"w": weights}, PROBE)


def _kinds(buffer):
    manifests = [buffer.clock.manifest(version) for version in buffer.clock.versions()]
    return [(m.version, m.kind, m.base) for m in manifests]


def test_one_version_in_so_many_is_full_and_the_others_are_deltas(buffer, tmp_path):
    publisher = _publisher(buffer, WeightStore(str(tmp_path)), begin(buffer), kept=9, full_every=3)
    for version in range(5):
        publisher.submit(_small_change(version))
        publisher.finish()
    publisher.close()
    deltas = [(1, "delta", 0), (2, "delta", 1), (4, "delta", 3)]
    assert _kinds(buffer) == sorted([(0, "full", None), (3, "full", None), *deltas])


def test_a_delta_that_would_not_pay_is_not_published(buffer, tmp_path):
    publisher = _publisher(buffer, WeightStore(str(tmp_path)), begin(buffer), full_every=8)
    for version, weights in enumerate((torch.zeros(1000), torch.randn(1000), torch.randn(1000))):
        publisher.submit(Snapshot(version, 0, {"w": weights}, PROBE))
        publisher.finish()
    publisher.close()
    assert [kind for _, kind, _ in _kinds(buffer)] == ["full"] * 3


def test_a_delta_builds_on_the_last_version_that_was_published(buffer, tmp_path):
    store = UnreliableStore(str(tmp_path))
    publisher = _publisher(buffer, store, begin(buffer), full_every=8)
    publisher.submit(_small_change(0))
    publisher.finish()
    store.gate.clear()
    store.entered.clear()
    publisher.submit(_small_change(1))
    assert store.entered.wait(10)
    publisher.submit(_small_change(2))  # superseded by the next
    publisher.submit(_small_change(3))
    store.gate.set()
    publisher.finish()
    publisher.close()
    assert _kinds(buffer) == [(0, "full", None), (1, "delta", 0), (3, "delta", 1)]


def test_an_epoch_begins_with_a_full_version_and_collects_what_the_last_one_left(buffer, tmp_path, monkeypatch):
    monkeypatch.setattr("buffer.retention.GRACE_SECONDS", 0.0)
    store = WeightStore(str(tmp_path))
    publisher = _publisher(buffer, store, begin(buffer), full_every=8)
    for version in range(2):
        publisher.submit(_small_change(version))
        publisher.finish()
    publisher.close()
    weights = raw_tensors(_small_change(2).tensors)
    store.write(2, 1, 2, weights, PROBE)  # killed before the clock
    publisher = _publisher(buffer, store, begin(buffer), full_every=8)
    publisher.submit(_small_change(2))
    publisher.finish()
    publisher.close()
    assert _kinds(buffer) == [(0, "full", None), (1, "delta", 0), (2, "full", None)]
    assert {path.name for path in tmp_path.iterdir()} == {
        "v00000000-e1.safetensors",
        "v00000001-e1.delta",
        "v00000002-e2.safetensors",
    }
