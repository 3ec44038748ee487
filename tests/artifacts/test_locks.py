"""Two runs on one output, and what runs leave that were killed."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from epmq_deploy.artifacts import locks
from epmq_deploy.artifacts.folders import (
    atomic_folder,
    refuse_existing,
    remove_leftovers,
    reserved,
    unfinished_folder,
)
from epmq_deploy.artifacts.locks import locked
from epmq_deploy.errors import RecipeError

# Writes half of an output, says so, and waits to be killed; REPLACING stops between two renames.
SCRIPT = """
import sys, time
from pathlib import Path
from epmq_deploy.artifacts.folders import atomic_folder, reserved
target, replacing = Path(sys.argv[1]), sys.argv[2] == "replacing"
rename = Path.rename
def stop(self, new):
    if not replacing or self.name.endswith(".partial"):
        print("here", flush=True)
        time.sleep(60)
    return rename(self, new)
Path.rename = stop
with reserved(target, "merge", overwrite=True), atomic_folder(target) as folder:
    (folder / "weights").write_bytes(b"half")
"""


@contextmanager
def other_run(target: Path, kind: str = "writing") -> Iterator[subprocess.Popen[str]]:
    """Another process that has come to the end of its output's temporary folder."""
    command = [sys.executable, "-P", "-c", SCRIPT, str(target), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        try:
            yield process
        finally:
            process.kill()


def killed_run(target: Path, kind: str = "writing") -> None:
    with other_run(target, kind) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def finished_output(target: Path) -> None:
    target.mkdir()
    (target / "manifest.json").write_text('{"stage": "merge", "fingerprint": "x"}')


def test_the_second_run_is_told_who_the_first_is(tmp_path: Path) -> None:
    with other_run(tmp_path / "out") as process:
        with (
            pytest.raises(RecipeError) as caught,
            reserved(tmp_path / "out", "merge", overwrite=False),
        ):
            pass
        assert re.fullmatch(
            rf"{tmp_path}/out: another run is using it \(process {process.pid} on \S+, since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d\); wait for it, or choose another output",
            str(caught.value),
        )
        # What the live run has written so far is still there.
        assert len(list(tmp_path.glob(".out-*.partial/weights"))) == 1
    with reserved(tmp_path / "out", "merge", overwrite=False):
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    killed_run(tmp_path / "out")
    killed_run(tmp_path / "out2")
    others = [
        ".out-backup",
        ".out-my_notes",
        ".out",
        "out-abcdefgh.partial",
        ".out-ABCDEFGH.partial",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".out-abcdefgh.partial").write_text("a file")
    (tmp_path / ".out-12345678.partial").symlink_to(tmp_path / ".out-backup")
    before = {path.name for path in tmp_path.iterdir()}
    with reserved(tmp_path / "out", "merge", overwrite=False):
        pass
    gone = before - {path.name for path in tmp_path.iterdir()}
    assert len(gone) == 2
    assert ".out.lock" in gone
    assert all(re.fullmatch(r"\.out(\.lock|-[a-z0-9_]{8}\.partial)", name) for name in gone)


def test_an_output_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    finished_output(tmp_path / "out")
    killed_run(tmp_path / "out", "replacing")
    assert not (tmp_path / "out").exists()
    with (
        pytest.raises(RecipeError, match="already exists"),
        reserved(tmp_path / "out", "merge", overwrite=False),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_what_was_replaced_is_deleted_when_the_new_output_is_there(tmp_path: Path) -> None:
    finished_output(tmp_path / "out")
    (tmp_path / ".out-abcdefgh.replaced").mkdir()
    remove_leftovers(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_taken_again_here_but_not_in_another_thread(tmp_path: Path) -> None:
    errors = []

    def in_thread() -> None:
        try:
            with locked(tmp_path / "out"):
                pass
        except RecipeError as error:
            errors.append(str(error))

    with locked(tmp_path / "out"), locked(tmp_path / "out"), locked(tmp_path / "other"):
        thread = Thread(target=in_thread)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert f"process {os.getpid()} " in errors[0]
    assert list(tmp_path.iterdir()) == []
    in_thread()
    assert len(errors) == 1


def lock_left_by(tmp_path: Path, **changes: object) -> Path:
    holder = {
        "process": 999_999_999,
        "host": locks.socket.gethostname(),
        "machine": locks._machine(),
        "since": "2026-01-01 00:00:00+00:00",
    }
    file = tmp_path / ".out.lock"
    file.write_text(json.dumps(holder | changes))
    return file


def test_a_lock_of_another_machine_stays(tmp_path: Path) -> None:
    file = lock_left_by(tmp_path, host="elsewhere", machine="another")
    with (
        pytest.raises(
            RecipeError, match=rf"on elsewhere, .*; if it is no longer running, delete {file}"
        ),
        locked(tmp_path / "out"),
    ):
        pass
    file.unlink()
    with locked(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    "changes",
    [{}, {"machine": "before the machine started anew"}, {"host": "a container that is gone"}],
)
def test_a_lock_of_a_dead_run_on_this_machine_is_taken(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    file = lock_left_by(tmp_path, **changes)
    with locked(tmp_path / "out"):
        assert json.loads(file.read_text())["process"] == os.getpid()
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00\xff"])
def test_a_damaged_lock_that_nobody_holds_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / ".out.lock").write_text(text)
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_of_the_file_system_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock_left_by(tmp_path, process=os.getpid() if alive else 999_999_999)
    if alive:
        with pytest.raises(RecipeError, match="another run is using it"), locked(tmp_path / "out"):
            pass
    else:
        with locked(tmp_path / "out"):
            pass


def test_folders_made_for_a_lock_go_with_it(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b" / ".out.lock").is_file()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b" / "out"), atomic_folder(tmp_path / "a" / "b" / "out"):
        pass
    assert (tmp_path / "a" / "b" / "out").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"), locked(tmp_path / "file" / "out"):
        pass


def test_names_of_hidden_folders(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "out", "merge", overwrite=False)
    assert unfinished_folder(tmp_path / "out") == tmp_path.resolve() / ".out.unfinished"
