"""Where results go, and places that are refused before any work."""

import os
import re
import time
from pathlib import Path

import pytest

from dinov2.apps.places import fresh_folder, output_folder
from dinov2.errors import ConfigError


def test_a_fresh_folder_has_date_and_task_and_is_not_made(here):
    folder = fresh_folder("knn")
    assert re.fullmatch(r"runs/\d{8}-\d{6}-knn-[0-9a-f]{8}", folder.as_posix())
    assert not folder.exists() and not (here / "runs").exists()
    assert fresh_folder("knn", root=here / "elsewhere").parent == here / "elsewhere"


def test_folders_of_commands_that_start_in_one_second_differ(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    names = {fresh_folder("train").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("20260102-030405-train-") for name in names)


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_folder_means_a_fresh_one(nothing, here):
    assert output_folder(nothing, task="knn").parent == Path("runs")
    assert list(here.iterdir()) == []


def test_a_folder_that_was_asked_for_is_taken_as_it_is_and_not_made(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    (here / "there").mkdir()
    for folder in (".", "there", "a/b ü/c", here / "x"):
        assert output_folder(folder, task="knn") == Path(folder)
    assert output_folder("~/mine", task="knn") == here / "mine"
    assert [path.name for path in here.iterdir()] == ["there"]


def test_a_file_in_the_way_is_refused(here):
    (here / "file").write_text("mine")
    with pytest.raises(ConfigError, match="the output folder file is a file; choose another path"):
        output_folder("file", task="knn")
    for below in ("file/x", "file/x/y"):
        with pytest.raises(ConfigError, match=f"{below} cannot be made, because .*file is a file; choose another"):
            output_folder(below, task="knn")


@pytest.mark.parametrize("folder", [None, "closed", "closed/new"])
def test_a_place_without_permission_is_refused(here, monkeypatch, folder):
    (here / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"nothing can be written to .* \(Permission denied\); choose another"):
        output_folder(folder, task="knn")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_really_closed_is_refused(here):
    (here / "closed").mkdir(mode=0o555)
    with pytest.raises(ConfigError, match="nothing can be written to"):
        output_folder("closed/new", task="knn")
