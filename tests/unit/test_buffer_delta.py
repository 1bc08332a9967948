"""Deltas: exact for any bits and any pattern of change, small where little changed, and typed errors for any bytes."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer import delta
from protocol.errors import WeightsDamagedError

ITEM_BYTES = (1, 2, 4, 8)


def changed(num_elements: int, num_changed: int, item_bytes: int, seed: int = 0) -> tuple[bytes, bytes]:
    generator = np.random.default_rng(seed)
    old = generator.integers(0, 256, (num_elements, item_bytes), dtype=np.uint8)
    new = old.copy()
    rows = generator.choice(num_elements, num_changed, replace=False)
    new[rows, generator.integers(0, item_bytes, num_changed)] ^= 1
    return old.tobytes(), new.tobytes()


def applied(old: bytes, change: bytes, item_bytes: int) -> bytes:
    target = bytearray(old)
    delta.apply(target, change, item_bytes)
    return bytes(target)


@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from(ITEM_BYTES), st.integers(0, 2**32 - 1))
def test_what_comes_out_is_the_new_tensor_to_the_bit(
    num_elements: int, share: float, item_bytes: int, seed: int
) -> None:
    old, new = changed(num_elements, round(share * num_elements), item_bytes, seed)
    change = delta.encode(memoryview(old), memoryview(new), item_bytes)
    assert bool(change) == (old != new)
    if change:
        once = applied(old, change, item_bytes)
        assert once == new
        assert applied(once, change, item_bytes) == new


@pytest.mark.parametrize("positions", [[0], [254], [255], [256], [510], [99_999], [0, 99_999], [1000, 1255, 1511]])
def test_gaps_of_any_length(positions: list[int]) -> None:
    old = bytes(200_000)
    new = np.zeros(100_000, np.uint16)
    new[positions] = 7
    change = delta.encode(memoryview(old), memoryview(new.tobytes()), 2)
    assert applied(old, change, 2) == new.tobytes()
    assert len(change) < 120


def test_bits_are_compared_not_numbers() -> None:
    """Zero and minus zero, and every NaN, are what they are."""
    old = np.array([0.0, np.nan, 1.0], np.float32).view(np.uint32)
    new = old.copy()
    new[0], new[1] = 1 << 31, old[1] + 1
    change = delta.encode(memoryview(old.tobytes()), memoryview(new.tobytes()), 4)
    assert applied(old.tobytes(), change, 4) == new.tobytes()
    assert delta.encode(memoryview(new.tobytes()), memoryview(new.tobytes()), 4) == b""


def test_one_element_in_fifty_costs_a_thirtieth_of_the_whole() -> None:
    old, new = changed(200_000, 4_000, 2)
    assert len(delta.encode(memoryview(old), memoryview(new), 2)) < len(old) / 30


def test_tensors_of_different_sizes_have_no_delta() -> None:
    with pytest.raises(ValueError, match="4 and 6 bytes"):
        delta.encode(memoryview(bytes(4)), memoryview(bytes(6)), 2)


def test_damaged_deltas_are_typed_errors_and_touch_nothing_else() -> None:
    generator = random.Random(0)
    old, new = changed(5000, 300, 2)
    change = delta.encode(memoryview(old), memoryview(new), 2)
    refused = 0
    for _ in range(3000):
        data = bytearray(change)
        for _ in range(generator.randint(1, 3)):
            match generator.randrange(4):
                case 0:
                    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
                case 1:
                    data[generator.randrange(delta.HEAD.size)] ^= 1 << generator.randrange(8)
                case 2:
                    data = data[: generator.randrange(1, len(data) + 1)].ljust(delta.HEAD.size, b"\0")
                case 3:
                    data += generator.randbytes(3)
        target = bytearray(old)
        try:
            delta.apply(target, bytes(data), 2)
        except WeightsDamagedError:
            refused += 1
        assert len(target) == len(old)
    assert refused > 1500


@pytest.mark.parametrize("num_changed", [0, 5001, 2**63])
def test_impossible_counts_are_refused_before_anything_is_allocated(num_changed: int) -> None:
    old, new = changed(5000, 300, 2)
    change = delta.encode(memoryview(old), memoryview(new), 2)
    forged = delta.HEAD.pack(num_changed, *delta.HEAD.unpack_from(change)[1:]) + change[delta.HEAD.size :]
    with pytest.raises(WeightsDamagedError, match=f"changes {num_changed} of 5000"):
        applied(old, forged, 2)


def test_a_frame_that_claims_more_than_it_may_is_refused_before_anything_is_allocated() -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    forged = delta.HEAD.pack(300, 300, len(bomb)) + bomb
    with pytest.raises(WeightsDamagedError, match=f"holds {1 << 24} bytes instead of 300"):
        applied(bytes(10_000), forged, 2)


def test_a_delta_of_another_tensor_is_refused() -> None:
    old, new = changed(5000, 300, 2)
    change = delta.encode(memoryview(old), memoryview(new), 2)
    with pytest.raises(WeightsDamagedError, match="the delta changes element"):
        applied(bytes(4000), change, 2)
