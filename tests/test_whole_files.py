"""A file is the old one or the new one, whatever happens while it is written."""

import errno
import itertools
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov2.whole_files import atomic_write, escape_name, unescape_name, utf8_path, write_text


def test_a_file_takes_the_place_of_the_old_one_when_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_write(path) as unfinished:
        assert unfinished.parent == path.parent and unfinished.name.startswith(".")
        unfinished.write_text("old")
        assert not path.exists()
    with atomic_write(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as unfinished:
            unfinished.write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_the_same_file_take_turns(tmp_path: Path) -> None:
    path, started = tmp_path / "file.txt", threading.Event()

    def other() -> None:
        started.set()
        with atomic_write(path) as unfinished:
            assert path.read_text() == "one"
            unfinished.write_text("other")

    thread = threading.Thread(target=other)
    with atomic_write(path) as unfinished:
        unfinished.write_text("on")
        thread.start()
        started.wait(timeout=60)
        with open(unfinished, "a") as file:
            file.write("e")
    thread.join(timeout=60)
    assert path.read_text() == "other"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_gone_after_the_next_writing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    (tmp_path / ".file.txt.tmp").write_text("half of the file that a killed process was writ")
    (tmp_path / ".file.txt.lock").touch()
    with atomic_write(path) as unfinished, open(unfinished, "a") as file:
        file.write("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_file_may_be_read_by_those_who_may_read_any_new_file(tmp_path: Path) -> None:
    usual = tmp_path / "usual.txt"
    usual.touch()
    with atomic_write(tmp_path / "secret.txt") as unfinished:
        unfinished.write_text("written by a program that trusts nobody")
        unfinished.chmod(0o600)
    with atomic_write(tmp_path / "tensors.safetensors") as unfinished:
        save_file({"x": torch.zeros(2)}, unfinished)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["secret.txt"] == modes["tensors.safetensors"] == modes["usual.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_file_takes_no_place_of_a_pipe_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="device or a pipe"), atomic_write(tmp_path / "pipe"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_name_that_is_no_text_is_escaped_so_that_it_can_be_read_back() -> None:
    assert escape_name("caf\udce9.jpg") == r"caf\udce9.jpg" and escape_name("café 犬 a\\b.jpg") == "café 犬 a\\b.jpg"
    names = [
        "".join(words) for n in range(5) for words in itertools.product(["\\", "\udce9", "udce9", "u", "é"], repeat=n)
    ]
    escaped = [escape_name(name) for name in names]
    assert [unescape_name(text) for text in escaped] == names
    assert len(set(escaped)) == len(set(names)) and all(text.encode() for text in escaped[1:])


def test_text_with_a_name_that_is_no_text_is_written_as_utf8_which_json_reads_back(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", json.dumps({"é": "x\udce9"}, ensure_ascii=False))
    assert path.read_bytes() == b'{"\xc3\xa9": "x\\udce9"}'
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": "x\udce9"}


def test_a_library_that_takes_utf8_names_alone_gets_one(tmp_path: Path) -> None:
    plain, strange = tmp_path / "a", tmp_path / os.fsdecode(b"\xe9")
    for path in (plain, strange):
        try:
            path.write_text(path.name, errors="surrogateescape")
        except OSError:
            pytest.skip("the file system takes names in UTF-8 alone")
        with utf8_path(path) as name:
            assert Path(name.encode().decode()).read_bytes() == os.fsencode(path.name)
    with utf8_path(plain) as name:
        assert name == str(plain)
