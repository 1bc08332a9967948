"""Checkpoints are whole or not there; a damaged one is passed over, never loaded."""

import json
import logging

import pytest

from learner.checkpoint import MANIFEST, Checkpoint, Checkpoints, Totals
from protocol.errors import CheckpointError


def _checkpoint(step, *, session=1, entry_ids=()):
    return Checkpoint(
        run_id="run",
        session=session,
        step=step,
        version=step,
        epoch=1,
        layout="layout",
        first_ticket=0,
        next_ticket=100,
        entry_ids=list(entry_ids),
        totals=Totals(groups_trained=step),
    )


def _state(text):
    def save(directory):
        (directory / "state").mkdir()
        (directory / "state" / "weights.pt").write_text(text)

    return save


def _write(checkpoints, checkpoint, save):
    fresh = checkpoints.begin(checkpoint)
    return checkpoints.complete(checkpoint, lambda: save(fresh))


def _load(checkpoints):
    loaded = []
    checkpoint = checkpoints.load_newest(lambda place, _: loaded.append((place / "state" / "weights.pt").read_text()))
    return checkpoint, loaded


def test_what_is_written_is_what_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert _load(checkpoints) == (None, [])
    written = _checkpoint(20, entry_ids=["1-0", "2-0"])
    place = _write(checkpoints, written, _state("twenty"))
    assert place.name == "session-000001-step-000000020"
    checkpoint, loaded = _load(checkpoints)
    assert loaded == ["twenty"]
    assert checkpoint.model_copy(update={"files": {}}) == written
    assert list(checkpoint.files) == ["state/weights.pt"]


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / ".session-000001-step-000000007.new").mkdir()
    for step in (10, 20, 30):
        _write(checkpoints, _checkpoint(step), _state(str(step)))
    assert sorted(p.name[-2:] for p in tmp_path.iterdir()) == ["20", "30"]


def test_a_later_session_outranks_a_fenced_one_that_got_further(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    _write(checkpoints, _checkpoint(40, session=3), _state("successor"))
    _write(checkpoints, _checkpoint(60, session=2), _state("zombie"))
    assert _load(checkpoints)[1] == ["successor"]


def _truncate(place):
    (place / "state" / "weights.pt").write_text("3")


def _flip(place):
    (place / "state" / "weights.pt").write_text("31")


def _remove(place):
    (place / "state" / "weights.pt").unlink()


def _no_manifest(place):
    (place / MANIFEST).unlink()


def _bad_manifest(place):
    (place / MANIFEST).write_text("{")


def _half_manifest(place):
    content = json.loads((place / MANIFEST).read_text())
    del content["entry_ids"]
    (place / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [_truncate, _flip, _remove, _no_manifest, _bad_manifest, _half_manifest])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path, keep=3)
    _write(checkpoints, _checkpoint(20), _state("20"))
    damage(_write(checkpoints, _checkpoint(30), _state("30")))
    with caplog.at_level(logging.WARNING):
        checkpoint, loaded = _load(checkpoints)
    assert (checkpoint.step, loaded) == (20, ["20"])
    assert "session-000001-step-000000030 is passed over" in caplog.text


def test_a_state_that_refuses_to_load_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (20, 30):
        _write(checkpoints, _checkpoint(step), _state(str(step)))

    def load(_, checkpoint):
        if checkpoint.step == 30:
            raise CheckpointError("of another model")

    assert checkpoints.load_newest(load).step == 20


def test_no_usable_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    _remove(_write(checkpoints, _checkpoint(20), _state("20")))
    with pytest.raises(CheckpointError, match=r"can be loaded.*weights\.pt"):
        _load(checkpoints)


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("killed")])
def test_an_interrupted_write_harms_nothing(tmp_path, error):
    checkpoints = Checkpoints(tmp_path, keep=1)
    _write(checkpoints, _checkpoint(20), _state("20"))

    def save(directory):
        (directory / "half").write_text("3")
        raise error

    with pytest.raises(CheckpointError if isinstance(error, OSError) else RuntimeError):
        _write(checkpoints, _checkpoint(30), save)
    checkpoint, loaded = _load(checkpoints)
    assert (checkpoint.step, loaded) == (20, ["20"])
    _write(checkpoints, _checkpoint(30), _state("30"))
    assert [p.name for p in tmp_path.iterdir()] == ["session-000001-step-000000030"]
