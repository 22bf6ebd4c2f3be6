"""The command that tries installations goes on where it stopped, and says what this machine lacks."""

import json

from tests import installs


def test_what_passed_is_not_tried_again(tmp_path, monkeypatch):
    tried = []

    def attempt(row, *_):
        tried.append(str(row))
        if row.versions == "lowest":
            raise installs.Failed("plots fail")
        return {"torch": "2"}

    def call(words, *_):
        if words[1:3] == ("python", "find") and words[3] == "3.13":
            raise installs.Failed("none here")
        return ""

    for name, made in {"attempt": attempt, "call": call, "build": lambda *_: {"wheel": None}}.items():
        monkeypatch.setattr(installs, name, made)
    monkeypatch.setattr(installs.shutil, "which", lambda *_, **__: "uv")
    rows = [installs.Row("3.11", "newest", "wheel"), installs.Row("3.11", "lowest", "wheel"),
            installs.Row("3.13", "newest", "wheel")]  # fmt: skip
    found = [record for _, record in installs.tried(rows, tmp_path, again=False)]
    assert [record["failed"] for record in found] == ["", "plots fail", ""]
    assert found[0]["versions"] == {"torch": "2"}
    assert found[2]["absent"] == "this machine has no Python 3.13"
    assert len(list(installs.tried(rows, tmp_path, again=False))) == 3
    assert tried == ["3.11 newest wheel", "3.11 lowest wheel", "3.11 lowest wheel"]
    list(installs.tried(rows[:1], tmp_path, again=True))
    assert tried[-1] == "3.11 newest wheel"
    path = tmp_path / "3.11-newest-wheel.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "of other sources"}))
    list(installs.tried(rows[:1], tmp_path, again=False))
    assert tried[-1] == "3.11 newest wheel"
    assert len(tried) == 5


def test_every_row_has_its_own_record_and_needs_no_extra_where_it_has_none():
    assert len({str(row) for row in installs.ROWS}) == len(installs.ROWS)
    needs = {word for words in installs.COMMANDS for word in words if installs.BARE.search(word)}
    assert needs == {"export", "--tensorboard"}
    assert {row.python for row in installs.ROWS} == set(installs.PYTHONS)
