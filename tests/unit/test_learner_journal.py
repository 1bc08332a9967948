"""The run's identity survives, and metrics.jsonl has one line per step of the surviving lineage."""

import json

import pytest
from learner_samples import make_record

from learner.journal import Journal, open_session


def test_identity_is_made_once_and_sessions_are_counted(tmp_path):
    first_id, first = open_session(tmp_path / "run")
    second_id, second = open_session(tmp_path / "run")
    assert (first, second) == (1, 2)
    assert first_id == second_id
    assert open_session(tmp_path / "other")[0] != first_id


def test_an_identity_that_is_there_is_left_alone(tmp_path):
    content = '{"run_id": "mine", "name": "kept"}'
    (tmp_path / "run.json").write_text(content)
    assert open_session(tmp_path) == ("mine", 1)
    assert (tmp_path / "run.json").read_text() == content


@pytest.mark.parametrize(
    ("file", "content"),
    [("run.json", "{"), ("run.json", "[]"), ("run.json", "{}"), ("learner.json", '{"sessions": "many"}')],
)
def test_a_damaged_file_is_named(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        open_session(tmp_path)


def test_lines_beyond_the_resumed_step_are_removed(tmp_path):
    journal = Journal(tmp_path, step=0)
    for step in range(1, 6):
        journal.append(make_record(step))
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "cut off')
    journal = Journal(tmp_path, step=3)
    journal.append(make_record(4))
    journal.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_line_is_on_disk_when_append_returns(tmp_path):
    journal = Journal(tmp_path, step=0)
    journal.append(make_record(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    journal.close()
