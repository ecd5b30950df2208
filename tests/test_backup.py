import hashlib
import json
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from clients.backup import back_up, restore
from clients.local import LocalError, lock
from tests.command import typed


def stack(folder: Path) -> Path:
    """Return a data folder with something of everything."""
    for name, text in {
        "store/passages.lance/data/1.lance": "passages",
        "tuning/adapters/a/adapter_model.safetensors": "weights" * 300_000,
        "evaluation/comparisons/c/answers.jsonl": '{"line": 1}\n',
        "evaluation/tmp/upload": "half",
        "generation/adapter": "fetched",
        "logs/gateway.log": "words",
        "state.json": "{}",
        "lock": "1",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with sqlite3.connect(folder / "tuning" / "tuning.db") as database:
        database.execute("CREATE TABLE adapters (name)")
        database.execute("INSERT INTO adapters VALUES ('house')")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def quiet(done: int, of: int) -> None:
    pass


def test_what_is_restored_is_what_was_backed_up(tmp_path: Path) -> None:
    data = stack(tmp_path / "data")
    told: list[tuple[int, int]] = []
    manifest = back_up(data, tmp_path / "copy", lambda done, of: told.append((done, of)))
    assert told[-1] == (manifest.size, manifest.size)
    assert all(path.split("/")[0] in ("store", "tuning", "evaluation") for path in (
        file.path for file in manifest.files
    ))  # fmt: skip
    data.rename(tmp_path / "lost")
    restore(tmp_path / "copy", data, quiet)
    assert files(data) == files(tmp_path / "copy" / "data")
    with sqlite3.connect(data / "tuning" / "tuning.db") as database:
        assert database.execute("SELECT name FROM adapters").fetchall() == [("house",)]


def test_data_that_is_there_is_not_touched(tmp_path: Path) -> None:
    data = stack(tmp_path / "data")
    back_up(data, tmp_path / "copy", quiet)
    before = files(data)
    with pytest.raises(LocalError, match="move that folder away"):
        restore(tmp_path / "copy", data, quiet)
    assert files(data) == before


def damage(copy: Path, how: str) -> None:
    file = copy / "data" / "tuning" / "adapters" / "a" / "adapter_model.safetensors"
    manifest = copy / "manifest.json"
    if how == "a changed byte":
        file.write_bytes(b"W" + file.read_bytes()[1:])
    elif how == "a missing file":
        file.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "half a manifest":
        manifest.write_text(manifest.read_text()[:100])
    else:
        fields = json.loads(manifest.read_text())
        fields["files"][0]["path"] = "../outside"
        manifest.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "how",
    ["a changed byte", "a missing file", "no manifest", "half a manifest", "a path that leads out"],
)
def test_a_damaged_backup_restores_nothing(how: str, tmp_path: Path) -> None:
    back_up(stack(tmp_path / "data"), tmp_path / "copy", quiet)
    damage(tmp_path / "copy", how)
    with pytest.raises(LocalError):
        restore(tmp_path / "copy", tmp_path / "new", quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "data"]


def forged(copy: Path, path: object, size: object = 7) -> None:
    """Have the manifest name one more file, with the hash of what stands in "outside"."""
    manifest = copy / "manifest.json"
    fields = json.loads(manifest.read_text())
    sha256 = hashlib.sha256(b"outside").hexdigest()
    fields["files"].append({"path": path, "size": size, "sha256": sha256})
    manifest.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("state.json", 7),  # `tworoads down` ends the processes that it names
        ("weaviate.key", 7),
        ("tuning/tmp/x", 7),
        ("store/link", 7),
        ("store/folder/outside", 7),
        ("store/pipe", 7),
        ("store/nul\0", 7),
        ("", 7),
        (5, 7),
        ("store/file", "7"),
    ],
)
def test_a_backup_with_what_no_backup_has_is_refused(path, size, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    back_up(stack(tmp_path / "data"), copy, quiet)
    (tmp_path / "outside").write_text("outside")
    store = copy / "data" / "store"
    (store / "link").symlink_to(tmp_path / "outside")
    (store / "folder").symlink_to(tmp_path)
    os.mkfifo(store / "pipe")
    for name in ("state.json", "weaviate.key", "tuning/tmp/x", "store/file"):
        (copy / "data" / name).parent.mkdir(exist_ok=True)
        (copy / "data" / name).write_text("outside")
    forged(copy, path, size)
    with pytest.raises(LocalError):
        restore(copy, tmp_path / "new", quiet)
    assert not (tmp_path / "new").exists()


def test_neither_a_backup_nor_what_is_restored_is_open_to_other_users(tmp_path: Path) -> None:
    copy, new = tmp_path / "copy", tmp_path / "new"
    back_up(stack(tmp_path / "data"), copy, quiet)
    file = "evaluation/comparisons/c/answers.jsonl"
    (copy / "data" / file).chmod(0o6755)
    restore(copy, new, quiet)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (copy / "data", new)] == [0o700] * 2
    assert stat.S_IMODE((new / file).stat().st_mode) == 0o755  # it runs as nobody else


@pytest.mark.parametrize("target", ["data/copy", "taken"])
def test_a_backup_goes_to_a_new_folder_elsewhere(target: str, tmp_path: Path) -> None:
    data = stack(tmp_path / "data")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = files(tmp_path)
    with pytest.raises(LocalError):
        back_up(data, tmp_path / target, quiet)
    assert files(tmp_path) == before


def test_a_backup_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    data = stack(tmp_path / "data")

    def gone(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_up(data, tmp_path / "copy", gone)
    assert not (tmp_path / "copy").exists()


def test_a_stack_that_runs_is_stopped_first(tmp_path, monkeypatch, capsys) -> None:
    data = stack(tmp_path / "data")
    with lock(data):
        words = ("backup", tmp_path / "copy", "--data", data)
        ended = typed(words, b"", monkeypatch, capsys)
    assert ended.code == 1
    assert f"stop it first with `tworoads down --data {data}`" in ended.err
    assert not (tmp_path / "copy").exists()


def test_the_commands_say_what_they_did(tmp_path, monkeypatch, capsys) -> None:
    def command(*words: object):
        return typed(words, b"", monkeypatch, capsys)

    data = stack(tmp_path / "data")
    saved = command("backup", tmp_path / "copy", "--data", data)
    assert (saved.code, saved.out.split(",")[0]) == (0, "4 files")
    again = str(tmp_path / "again")
    restored = command("restore", tmp_path / "copy", "--data", again)
    assert restored.code == 0
    assert f"`tworoads up --data {again}` starts" in restored.out
    assert os.path.exists(f"{again}/evaluation/comparisons/c/answers.jsonl")
    nothing = command("backup", tmp_path / "x", "--data", tmp_path / "none")
    assert nothing.code == 1
    assert not (tmp_path / "none").exists()
