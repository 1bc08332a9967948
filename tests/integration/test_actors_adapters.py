"""LoRA on the way from learner to actor: only adapters are written and read, and what is delivered is merged."""

import queue
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from buffer_samples import begin

from actors.weights.chain import ChainReader
from actors.weights.follower import WeightFollower
from buffer.payloads import Deadline, RawTensor, StagedVersion
from buffer.run import Buffer
from buffer.store import WeightStore
from learner.publisher import Publisher, Snapshot
from learner.weights import RAW_DTYPES, merged_tensors, raw_tensors
from protocol.manifest import Manifest, Probe

PROBE = Probe(tokens=((1, 2),), logprobs=((-1.0,),))
FROZEN = {"norm.weight": torch.randn(64), "q.weight": torch.randn(64, 64)}


class CountingStore(WeightStore):
    """Notes the kind and size of every payload that is read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[tuple[int, str]] = []

    def read(
        self, manifest: Manifest, base: StagedVersion | None = None, deadline: Deadline | None = None
    ) -> list[RawTensor]:
        self.reads.append((manifest.version, manifest.kind))
        return super().read(manifest, base, deadline)


def bundle(version: int) -> dict[str, torch.Tensor]:
    """As an engine gives it: the frozen tensors are the same objects every time."""
    generator = torch.Generator().manual_seed(version)
    return FROZEN | {
        "q.lora_A": torch.randn(2, 64, generator=generator),
        "q.lora_B": torch.randn(64, 2, generator=generator),
    }


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(str(tmp_path))


@pytest.fixture
def publisher(buffer: Buffer, store: CountingStore) -> Iterator[Publisher]:
    publisher = Publisher(buffer, store, epoch=begin(buffer), versions_kept=3, full_every=2, frozen=True)
    yield publisher
    publisher.close()


def publish(publisher: Publisher, version: int) -> None:
    publisher.submit(Snapshot(version, version, bundle(version), PROBE))
    publisher.finish()


def check(staged: StagedVersion, version: int) -> None:
    expected = merged_tensors(bundle(version))
    assert staged.manifest.version == version
    assert [tensor.name for tensor in staged.tensors] == list(expected)
    for tensor in staged.tensors:
        dtype = {name: dtype for dtype, name in RAW_DTYPES.items()}[tensor.dtype]
        found = torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)
        assert torch.equal(found, expected[tensor.name])


def test_only_adapters_are_written_after_the_first_version(
    buffer: Buffer, publisher: Publisher, store: CountingStore
) -> None:
    for version in range(8):
        publish(publisher, version)
    manifests = [m for v in range(8) if (m := buffer.clock.manifest(v)) is not None]
    assert [(m.version, m.kind, m.base) for m in manifests] == [
        (0, "full", None),
        *((version, "delta", 0) for version in (5, 6, 7)),
    ]
    adapter_bytes = sum(entry.num_bytes for entry in manifests[0].tensors if "lora" in entry.name)
    for manifest in manifests[1:]:
        assert manifest.payload_bytes < adapter_bytes + 1000


def test_an_actor_reads_frozen_weights_once_and_a_late_joiner_two_payloads(
    buffer: Buffer, publisher: Publisher, store: CountingStore
) -> None:
    delivered: queue.Queue[StagedVersion] = queue.Queue()
    follower = WeightFollower(buffer.clock, store, delivered.put, lambda error: pytest.fail(str(error)))
    publish(publisher, 0)
    follower.start()
    try:
        for version in range(6):
            if version:
                publish(publisher, version)
            check(delivered.get(timeout=10), version)
    finally:
        follower.stop()
    assert store.reads == [(0, "full"), *((version, "delta") for version in range(1, 6))]
    assert follower.fetch_failures == follower.fetch_fallbacks == 0
    store.reads.clear()
    late = ChainReader(buffer.clock, store)
    newest = buffer.clock.latest_manifest()
    assert newest is not None
    late.fetch(newest, Deadline.after(10))
    assert store.reads == [(0, "full"), (5, "delta")]


def test_damaged_adapters_leave_the_version_before(
    buffer: Buffer, publisher: Publisher, store: CountingStore, tmp_path: Path
) -> None:
    delivered: queue.Queue[StagedVersion] = queue.Queue()
    follower = WeightFollower(buffer.clock, store, delivered.put, lambda error: pytest.fail(str(error)))
    publish(publisher, 0)
    publish(publisher, 1)
    follower.start()
    try:
        check(delivered.get(timeout=10), 1)
        manifest = store.write(2, publisher._epoch, 2, raw_tensors(bundle(2)), PROBE, publisher._published)
        payload = tmp_path / manifest.payload
        payload.write_bytes(payload.read_bytes()[:-1] + b"\x01")
        buffer.clock.publish(manifest, [])
        deadline = time.monotonic() + 10
        while not follower.fetch_failures and time.monotonic() < deadline:
            time.sleep(0.01)
        assert follower.fetch_failures
        publish(publisher, 3)
        check(delivered.get(timeout=15), 3)
    finally:
        follower.stop()
