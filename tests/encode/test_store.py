"""Features on disk: formats that other programs open, parts that survive a kill, and the way back."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dinov2.encode.store import merge as merging
from dinov2.encode.store import open_features
from dinov2.encode.store.merge import begin, complete_output, finish
from dinov2.encode.store.shards import PatchFile, Shard, ShardFolder, differences, disk_full_as_error
from dinov2.encode.store.tables import TABLE_FORMATS as ALL_FORMATS
from dinov2.encode.store.tables import StoredTable, format_from_suffix, write_table
from dinov2.errors import ConfigError, DataError, DinoError
from tests.runs import NEEDS_PYARROW, TABLE_FORMATS

REQUEST = {"source": {"images": 9, "fingerprint": "f"}, "model": {"sha256": "a" * 64}, "layers": (3,), "mean": False}
NAMES = ("grün/a b.png", 'b,"c"\'.png', "", "c\n.png", "末.jpg", "e", "f" * 300, "g", "h")


def columns(first: int = 0, rows: int = 9) -> dict[str, np.ndarray]:
    every = slice(first, first + rows)
    generator = np.random.default_rng(5)
    return {
        "index": np.arange(9)[every],
        "path": np.array(NAMES[every], dtype=np.str_),
        "height": np.arange(9, dtype=np.int32)[every],
        "label": np.array([0, -1, 2, 3, 4, 5, 6, 7, 8])[every],
        "cls": generator.normal(size=(9, 3)).astype(np.float32)[every],
        "registers": generator.normal(size=(9, 2, 3)).astype(np.float32)[every],
    }


def patches() -> np.ndarray:
    return np.random.default_rng(6).normal(size=(9, 2, 4, 3)).astype(np.float32)


def parts_of(output: Path, *, request=REQUEST, with_patches: bool = False, only=(0, 1, 2)) -> ShardFolder:
    """Three parts of 4, 0 and 5 rows."""
    folder = ShardFolder(output, format_from_suffix(output) or "npz")
    assert not begin(folder, request, {"class_names": None}, overwrite=False)
    for number, (first, rows) in enumerate(((0, 4), (4, 0), (4, 5))):
        if number not in only:
            continue
        files = {}
        if with_patches and rows:
            files["patches"] = PatchFile(folder.patch_file("patches", number), (2, 4, 3))
            for row in range(first, first + rows):
                files["patches"].append(patches()[row : row + 1])
        unreadable = [] if rows else [("broken.png", "no image")]
        folder.write(number, columns(first, rows) if rows else None, unreadable=unreadable, patches=files)
    return folder


def joined(folder: ShardFolder, merge: str = "auto") -> list[Path]:
    records = folder.finished()
    return finish(folder, [records[n] for n in sorted(records)], merge=merge, manifest={"request": REQUEST})


@pytest.mark.parametrize("merge", ["always", "never"])
@pytest.mark.parametrize("kind", TABLE_FORMATS)
def test_every_format_gives_back_what_went_in_as_one_file_and_as_a_folder(tmp_path, kind, merge):
    output = tmp_path / f"out.{kind}"
    files = joined(parts_of(output, with_patches=True), merge)
    assert output.is_dir() == (merge == "never")
    assert all(file.exists() for file in files)
    assert not list(tmp_path.glob("*.parts"))
    stored = open_features(output)
    assert len(stored) == 9
    assert set(stored.columns) == set(columns())
    for name, expected in columns().items():
        got = stored.read(name)
        assert_array_equal(got, expected)
        assert got.dtype == expected.dtype or expected.dtype.kind == "U"
    assert stored.patches().shape == (9, 2, 4, 3)
    for row in range(9):
        assert_array_equal(stored.patches()[row], patches()[row].astype(np.float16))
    assert stored.manifest["rows"] == 9 and stored.manifest["unreadable"] == 1
    listing = json.loads((tmp_path / f"out.{kind}.unreadable.json").read_text())
    assert listing == [{"path": "broken.png", "reason": "no image"}]


def test_the_files_are_what_other_programs_expect(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for kind in ALL_FORMATS:
        write_table(tmp_path / f"t.{kind}", [columns(0, 4), columns(4, 5)], kind, notes={"model": "m"})
    table = parquet.read_table(tmp_path / "t.parquet").to_pydict()
    assert table["path"] == list(NAMES)
    assert table["label"][:3] == [0, None, 2]
    assert_array_equal(np.array(table["registers"], dtype=np.float32), columns()["registers"])
    assert parquet.read_schema(tmp_path / "t.parquet").metadata[b"dinov2"] == b'{"model": "m"}'
    assert_array_equal(np.load(tmp_path / "t.npz")["cls"], columns()["cls"])
    assert_array_equal(np.load(tmp_path / "t.npy", mmap_mode="r"), columns()["cls"])
    assert np.load(tmp_path / "t.path.npy").tolist() == list(NAMES)


def test_a_table_in_safetensors_of_earlier_days_is_read(tmp_path):
    from safetensors.numpy import save_file

    tensors = {name: array for name, array in columns().items() if name != "path"}
    texts = [name.encode() for name in NAMES]
    tensors["path_utf8"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
    tensors["path_ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    save_file(tensors, tmp_path / "out.safetensors")
    stored = open_features(tmp_path / "out.safetensors")
    assert set(stored.columns) == set(columns())
    for name, expected in columns().items():
        assert_array_equal(stored.read(name), expected)


@pytest.mark.parametrize("kind", TABLE_FORMATS)
def test_the_bytes_do_not_depend_on_how_rows_were_cut_into_pieces_nor_on_the_time(tmp_path, kind, monkeypatch):
    once = write_table(tmp_path / f"a.{kind}", [columns()], kind)
    monkeypatch.setattr("time.time", lambda: 2e9)
    pieces = [columns(0, 4), columns(4, 5)]
    again = write_table(tmp_path / f"a.{kind}", pieces, kind)
    assert again == write_table(tmp_path / f"a.{kind}", pieces, kind)
    if kind != "parquet":  # whose row groups are the pieces
        assert once == again


def test_a_folder_of_parquet_parts_reads_as_one_table(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    joined(parts_of(tmp_path / "out.parquet", with_patches=True), "never")
    assert parquet.read_table(tmp_path / "out.parquet")["index"].to_pylist() == list(range(9))


def test_small_parts_become_one_file_and_large_ones_stay_a_folder(tmp_path, monkeypatch):
    joined(parts_of(tmp_path / "small.npz"))
    monkeypatch.setattr(merging, "SMALL", 100)
    joined(parts_of(tmp_path / "large.npz"))
    assert (tmp_path / "small.npz").is_file() and (tmp_path / "large.npz").is_dir()


def test_finished_parts_are_kept_and_torn_ones_are_made_again(tmp_path):
    folder = parts_of(tmp_path / "out.npz", with_patches=True)
    assert set(folder.finished()) == {0, 1, 2}
    whole = folder.table(2).read_bytes()
    folder.table(2).write_bytes(whole[:-1])
    assert set(folder.finished()) == {0, 1}
    assert set(parts_of(tmp_path / "out.npz", only=(2,), with_patches=True).finished()) == {0, 1, 2}
    assert folder.table(2).read_bytes() == whole
    changed = bytearray(folder.table(0).read_bytes())
    changed[-1] ^= 1
    folder.table(0).write_bytes(changed)
    folder.patch_file("patches", 2).unlink()
    assert set(folder.finished()) == {1}


def test_a_record_without_its_words_is_no_record(tmp_path):
    folder = parts_of(tmp_path / "out.npz")
    (folder.path / "_part-00000.json").write_text('{"number": 0')
    (folder.path / "_part-00002.json").write_text("[]")
    assert set(folder.finished()) == {1}


def test_what_a_kill_left_half_written_is_swept_away(tmp_path):
    folder = parts_of(tmp_path / "out.npz", only=())
    torn = [folder.path / ".part-00000.npz.77.tmp", folder.path / "_patches" / ".part-00000.npy.77.tmp"]
    for file in torn:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"half")
    begin(folder, REQUEST, {}, overwrite=False)
    assert not any(file.exists() for file in torn)


def test_other_settings_are_refused_by_name_and_overwrite_starts_anew(tmp_path):
    output = tmp_path / "out.npz"
    folder = parts_of(output, only=(0,))
    other = {**REQUEST, "model": {"sha256": "b" * 64}, "mean": True}
    for _ in ("unfinished", "finished"):
        with pytest.raises(DataError) as refusal:
            begin(folder, other, {}, overwrite=False)
        assert "model.sha256 (aaaaaaaaaaaa... before, bbbbbbbbbbbb... now)" in str(refusal.value)
        assert "mean (False before, True now)" in str(refusal.value) and "--overwrite" in str(refusal.value)
        if not output.exists():
            joined(folder)
    assert begin(folder, REQUEST, {}, overwrite=False)
    assert not begin(folder, other, {}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz.parts"]
    assert folder.finished() == {}


@pytest.mark.parametrize("kind", TABLE_FORMATS)
def test_overwriting_leaves_nothing_of_the_old_files(tmp_path, kind):
    output = tmp_path / f"out.{kind}"
    (tmp_path / "out.txt").write_text("mine")
    for merge in ("always", "never"):
        joined(parts_of(output, with_patches=True), merge)
        begin(ShardFolder(output, kind), REQUEST, {}, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"out.{kind}.parts", "out.txt"]


def test_what_is_not_ours_is_never_replaced_unasked_and_no_folder_ever(tmp_path):
    (tmp_path / "out.npz").write_bytes(b"mine")
    folder = ShardFolder(tmp_path / "out.npz", "npz")
    with pytest.raises(ConfigError, match="holds no features of ours; choose another output, or replace it"):
        begin(folder, REQUEST, {}, overwrite=False)
    assert not begin(folder, REQUEST, {}, overwrite=True)
    (tmp_path / "photos.npz").mkdir()
    (tmp_path / "photos.npz" / "a.jpg").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="choose another output"):
            begin(ShardFolder(tmp_path / "photos.npz", "npz"), REQUEST, {}, overwrite=overwrite)
    assert (tmp_path / "photos.npz" / "a.jpg").exists()


@pytest.mark.parametrize("merge", ["always", "never"])
@pytest.mark.parametrize("where", ["write_json", "write_table", "rmtree", "replace"])
def test_joining_can_be_killed_anywhere_and_repeated(tmp_path, monkeypatch, merge, where):
    expected = tmp_path / "calm" / "out.npz"
    joined(parts_of(expected, with_patches=True), merge)
    output = tmp_path / "killed" / "out.npz"
    folder = parts_of(output, with_patches=True)
    module = {"rmtree": "shutil", "replace": "os"}.get(where, "dinov2.encode.store.merge")
    interrupted = True
    for call in range(1, 30):
        if not interrupted:
            break
        interrupted = False
        calls = iter(range(1, 99))
        with monkeypatch.context() as patch:
            real = getattr(__import__(module, fromlist=[where]), where)

            def killed(*args, call=call, calls=calls, real=real, **options):
                if next(calls) == call:
                    raise KeyboardInterrupt
                return real(*args, **options)

            patch.setattr(f"{module}.{where}", killed)
            try:
                if not begin(folder, REQUEST, {"class_names": None}, overwrite=False):
                    joined(folder, merge)
            except KeyboardInterrupt:
                interrupted = True
    assert not interrupted
    assert {p.relative_to(output.parent): p.read_bytes() for p in output.parent.rglob("*") if p.is_file()} == {
        p.relative_to(expected.parent): p.read_bytes() for p in expected.parent.rglob("*") if p.is_file()
    }
    assert complete_output(output)


def test_a_full_disk_is_one_sentence_and_costs_only_the_part_at_hand(tmp_path, monkeypatch):
    output = tmp_path / "out.npz"
    folder = parts_of(output, only=(0, 1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        sentence = "no space is left on the disk of .*give the same command again"
        with pytest.raises(DinoError, match=sentence), disk_full_as_error(output):
            folder.write(2, columns(4, 5))
    assert set(folder.finished()) == {0, 1}
    assert not list(folder.path.rglob("*.tmp"))
    with pytest.raises(PermissionError), disk_full_as_error(output):
        raise PermissionError("something else")


def test_half_precision_keeps_what_is_beyond_its_range_finite(tmp_path):
    file = PatchFile(tmp_path / "p" / "x.npy", (1, 1, 2))
    file.append(np.array([[[[1e6, -1e6]]]], dtype=np.float32))
    file.finish()
    assert np.load(tmp_path / "p" / "x.npy").ravel().tolist() == [65504, -65504]


def test_patch_grids_of_two_sizes_are_refused(tmp_path):
    file = PatchFile(tmp_path / "p" / "x.npy", (2, 4, 3))
    with pytest.raises(DataError, match="a grid of 3 x 4 patches follows one of 2 x 4; use --fit crop"):
        file.append(np.zeros((1, 3, 4, 3)))
    file.discard()
    assert list((tmp_path / "p").iterdir()) == []


def test_a_set_without_a_readable_image_is_refused(tmp_path):
    folder = parts_of(tmp_path / "out.npz", only=(1,))
    with pytest.raises(DataError, match="none of the images could be read; the first reason is: no image"):
        joined(folder)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("no.npz", None, "there are no features"),
        ("x.npz", b"PK\x03\x04half", "cannot be read as npz"),
        pytest.param("x.parquet", b"PAR1", "cannot be read as parquet", marks=NEEDS_PYARROW),
        ("x.safetensors", b"\xff" * 99, "cannot be read as safetensors"),
        ("x.npy", b"", "cannot be read as npy"),
        ("x.jpg", b"", "holds no features; expected a .parquet"),
    ],
)
def test_what_holds_no_features_is_one_sentence(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        open_features(tmp_path / name)


def test_unfinished_features_say_how_to_go_on(tmp_path):
    folder = parts_of(tmp_path / "out.npz", only=(0,))
    for path in (folder.path, folder.output):
        with pytest.raises(DataError, match="are not finished; repeat the command"):
            open_features(path)


def test_a_table_alone_can_be_read_and_names_its_columns(tmp_path):
    write_table(tmp_path / "alone.npz", [columns()], "npz")
    stored = open_features(tmp_path / "alone.npz")
    assert len(stored) == 9 and stored.manifest == {}
    with pytest.raises(DataError, match="no column 'mean'; its columns are index, path"):
        stored.read("mean")
    with pytest.raises(DataError, match="embed with --patches"):
        stored.patches()
    write_table(tmp_path / "other.npz", [{"x": np.zeros(3)}], "npz")
    with pytest.raises(DataError, match="no column cls"):
        open_features(tmp_path / "other.npz")


def test_columns_of_npy_are_not_those_of_a_neighbour(tmp_path):
    write_table(tmp_path / "a.npy", [columns()], "npy")
    write_table(tmp_path / "a.b.npy", [columns()], "npy")
    np.save(tmp_path / "a.patches.npy", np.zeros(3))
    assert set(columns()) <= set(StoredTable(tmp_path / "a.npy")) and "patches" not in StoredTable(tmp_path / "a.npy")
    assert set(StoredTable(tmp_path / "a.b.npy")) == set(columns())


def test_differences_name_what_is_only_on_one_side():
    assert differences({"a": 1, "b": {"c": (1,)}}, {"b": {"c": [1], "d": 2}}) == [
        "a (1 before, none now)",
        "b.d (none before, 2 now)",
    ]


def test_records_are_plain_values(tmp_path):
    record = parts_of(tmp_path / "out.npz", with_patches=True).finished()[0]
    assert isinstance(record, Shard)
    assert (record.rows, record.unreadable, record.patches) == (4, (), {"patches": (2, 4, 3)})
