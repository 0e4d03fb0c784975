"""`embed`: features of a folder on disk, equal to the model's own, whatever happens on the way."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from dinov2.apps.embed import embed, image_source, rows_per_shard
from dinov2.data.datasets.files import ImageFiles
from dinov2.encode.store import open_features, shards
from dinov2.errors import ConfigError, DataError, DinoError, WeightsError
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.pretrained import digest_of_files, load
from tests.golden.recipe import fill
from tests.runs import TABLE_FORMATS, pictures

REPOSITORY = Path(__file__).resolve().parents[2]


def small(path: Path, **changes) -> Path:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 1, "block_chunks": 0}
    torch.save(fill(DinoVisionTransformer(**{**options, **changes})).state_dict(), path)
    return path


@pytest.fixture
def model(here) -> Path:
    return small(here / "model.pth", num_register_tokens=2)


@pytest.fixture
def photos(here) -> Path:
    """20 images of 24 pixels in two classes, three of them unreadable."""
    folder = pictures(here / "photos", n=20, classes=2)
    for name in ("class0/000.png", "class1/009.png", "class1/019.png"):
        (folder / name).write_bytes(b"no picture")
    return folder


def run(photos, model, output, **options):
    return embed(str(photos), **{"model": model, "output": output, "part_rows": 6, "batch_size": 4, **options})


def stop_after(images):
    """A display that asks for the end once that many images are done."""

    def show(done, total):
        if done >= images:
            os.kill(os.getpid(), signal.SIGTERM)

    return lambda label: show


def files_of(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"{name}*")) if path.is_file()}


def test_rows_are_what_the_model_says_about_each_image_in_the_order_of_the_source(here, photos, model):
    options = {"registers": True, "mean": True, "patches": True, "layers": [1, -1], "precision": "fp32"}
    report = run(photos, model, "out.npz", **options)
    stored = open_features("out.npz")
    readable = [path for path in sorted(photos.rglob("*.png")) if path.read_bytes() != b"no picture"]
    assert stored.read("path").tolist() == [path.relative_to(photos).as_posix() for path in readable]
    assert (report.images, report.rows, report.unreadable, report.parts, report.computed) == (20, 17, 3, 4, 20)
    assert stored.read("index").tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 18]
    assert stored.read("label").tolist() == [0] * 9 + [1] * 8
    assert stored.manifest["class_names"] == ["class0", "class1"]
    assert set(stored.read("height")) == set(stored.read("width")) == {24}
    loaded = load(model, precision="fp32", device="cpu")
    for row, path in enumerate(readable):
        features = loaded.features(path, layers=[1, 2])
        for prefix, expected in (("", features), ("layer1_", features.layers[1]), ("layer2_", features.layers[2])):
            assert_allclose(stored.read(f"{prefix}cls")[row], expected.cls, atol=1e-5)
            assert_allclose(stored.read(f"{prefix}registers")[row], expected.registers, atol=1e-5)
            assert_allclose(stored.read(f"{prefix}mean")[row], expected.patches.mean((0, 1)), atol=1e-5)
            assert_allclose(stored.patches(f"{prefix}patches")[row], expected.patches, atol=4e-3)
    listing = json.loads((here / "out.npz.unreadable.json").read_text())
    assert [Path(entry["path"]).name for entry in listing] == ["000.png", "009.png", "019.png"]
    assert all("cannot be read as an image" in entry["reason"] for entry in listing)


def test_sizes_are_those_of_the_files_height_first(here, model):
    (here / "wide").mkdir()
    Image.new("RGB", (40, 24)).save(here / "wide" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (40, 24)).save(here / "wide" / "b.jpg", exif=exif)
    embed("wide", model=model, output="out.parquet")
    stored = open_features("out.parquet")
    assert list(zip(stored.read("height"), stored.read("width"), strict=True)) == [(24, 40), (40, 24)]
    assert "label" not in stored.columns


@pytest.mark.parametrize("fit", ["aspect", "pad"])
def test_images_of_several_sizes_in_a_batch_keep_their_order(here, model, fit):
    for number, size in enumerate((24, 33, 24, 40)):
        (here / "mixed").mkdir(exist_ok=True)
        Image.effect_noise((size, 24), 90).convert("RGB").save(here / f"mixed/{number}-{size}.png")
    embed("mixed", model=model, output="out.npz", fit=fit, size=32, mean=True, precision="fp32")
    loaded = load(model, precision="fp32", device="cpu")
    stored = open_features("out.npz")
    for row, path in enumerate(sorted((here / "mixed").iterdir())):
        expected = loaded.features(path, fit=fit)
        assert_allclose(stored.read("cls")[row], expected.cls, atol=1e-5)
        assert_allclose(stored.read("mean")[row], expected.patches.mean((0, 1)), atol=1e-5)
    with pytest.raises(DataError, match="patch features need images of one size"):
        embed("mixed", model=model, output="patches.npz", fit=fit, size=32, patches=True)
    assert not list(here.rglob("*.tmp"))


def test_sources_are_folders_lists_patterns_names_and_files(here, photos, model):
    names = ["photos/class1/001.png", "photos/class0/002.png"]
    (here / "list.txt").write_text("\n".join(names))
    for number, source in enumerate((names, ["list.txt"], "photos/**/00[12].png", "toy:n=5", [names[0]])):
        embed(source, model=model, output=f"{number}.npz")
    paths = [open_features(f"{number}.npz").read("path").tolist() for number in range(5)]
    assert paths[0] == paths[1] == names
    assert paths[2] == sorted(names)
    assert len(paths[3]) == 5
    assert paths[4] == names[:1]
    assert isinstance(image_source("photos/*/*.png"), ImageFiles)


@pytest.mark.parametrize("kind", TABLE_FORMATS)
def test_a_run_that_was_stopped_and_resumed_has_the_same_bytes(here, photos, model, kind):
    run(photos, model, f"calm.{kind}", patches=True)

    said = []
    first = run(photos, model, f"stopped.{kind}", patches=True, progress=stop_after(3), say=said.append)
    assert first.stopped_by == "SIGTERM" and "finishing the part at hand" in said[0]
    assert not (here / f"stopped.{kind}").exists()
    second = run(photos, model, f"stopped.{kind}", patches=True, progress=stop_after(9))
    assert (second.stopped_by, second.parts_kept) == ("SIGTERM", 1)
    third = run(photos, model, f"stopped.{kind}", patches=True)
    assert (third.stopped_by, third.parts_kept, third.computed) == (None, 2, 8)
    calm, stopped = files_of(here, "calm"), files_of(here, "stopped")
    assert len(calm) == len(stopped) > 2
    for name, content in calm.items():
        expected = content.replace(b"calm.", b"stopped.") if name.endswith(".json") else content
        assert stopped[name.replace("calm", "stopped")] == expected
    again = run(photos, model, f"stopped.{kind}", patches=True)
    assert (again.computed, again.rows, again.images_per_second) == (0, 17, None)
    assert files_of(here, "stopped") == stopped


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(here, photos, model):
    run(photos, model, "calm.parquet")
    command = [
        sys.executable, "-c",
        "import sys, time\nfrom dinov2.apps.embed import embed\n"
        "embed('photos', model='model.pth', output='killed.parquet', part_rows=6, batch_size=4,"
        " progress=lambda label: lambda done, total: time.sleep(0.2))",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    killed = 0
    for parts_wanted in (1, 2, 3):
        process = subprocess.Popen(command, env=environment)
        while len(list(here.glob("killed.parquet.parts/_part-*.json"))) < parts_wanted and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.1 * parts_wanted)
        process.kill()
        process.wait()
        if not (here / "killed.parquet").exists():  # a fast machine may have been done
            killed += 1
            assert (here / ".killed.parquet.at-work.lock").exists()  # which nobody holds any more
    assert killed >= 1
    subprocess.run(command, env=environment, check=True)
    assert (here / "killed.parquet").read_bytes() == (here / "calm.parquet").read_bytes()
    assert not (here / ".killed.parquet.at-work.lock").exists()


def test_a_second_command_for_the_same_output_is_refused_while_the_first_one_runs(here, photos, model):
    run(photos, model, "calm.npz")
    refusals = []

    def meanwhile(done, total):
        for options in ({}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=r"another command is writing out\.npz just now; wait") as refusal:
                run(photos, model, "out.npz", **options)
            refusals.append(refusal)

    report = run(photos, model, "out.npz", progress=lambda label: meanwhile)
    assert refusals and report.rows == 17
    assert (here / "out.npz").read_bytes() == (here / "calm.npz").read_bytes()
    assert run(photos, model, "out.npz").computed == 0
    assert not list(here.glob(".*.lock"))


def test_what_changed_since_the_beginning_is_refused_by_name(here, photos, model):
    run(photos, model, "out.npz", progress=stop_after(3))
    other = small(here / "other.pth", num_register_tokens=2, depth=4)
    for options, named in (
        ({"model": other}, "model.sha256"),
        ({"size": 40}, "transform.size (32 before, 40 now)"),
        ({"mean": True}, "mean (False before, True now)"),
        ({"precision": "fp16"}, "precision"),
        ({"part_rows": 8}, "part_rows (6 before, 8 now)"),
    ):
        with pytest.raises(DataError) as refusal:
            run(photos, **{"model": model, "output": "out.npz", **options})
        assert named in str(refusal.value)
    Image.new("RGB", (24, 24)).save(photos / "class0" / "new.png")
    with pytest.raises(DataError, match=r"source.images \(20 before, 21 now\)"):
        run(photos, model, "out.npz")
    assert run(photos, model, "out.npz", overwrite=True).rows == 18


def test_what_was_begun_with_a_digest_of_the_files_goes_on(here, photos, model):
    """Manifests had that one before the digest of the tensors, and it changed with the bytes of equal weights."""
    run(photos, model, "out.npz", progress=stop_after(3))
    manifest = here / "out.npz.parts" / "_manifest.json"
    content = json.loads(manifest.read_text())
    assert content["request"]["model"]["sha256"] == load(model).digest
    content["request"]["model"]["sha256"] = digest_of_files([model])
    manifest.write_text(json.dumps(content))
    assert run(photos, model, "out.npz").parts_kept > 0
    again = torch.load(model, weights_only=True)
    torch.save({"state_dict": again}, model)  # the same weights in other bytes
    with pytest.raises(DataError, match="model.sha256"):
        run(photos, model, "out.npz")
    run(photos, model, "new.npz", progress=stop_after(3))
    torch.save(again, model)
    assert run(photos, model, "new.npz").parts_kept > 0


def test_the_stride_is_a_setting_that_the_manifest_keeps(here, photos, model):
    report = run(photos, model, "f.npz", patches=True, stride=4)
    assert open_features(report.output).manifest["request"]["model"]["stride"] == 4
    assert np.load(here / "f.patches.npy").shape[1:] == (7, 7, 64)
    with pytest.raises(DataError, match=r"model.stride \(4 before, none now\)"):
        run(photos, model, "f.npz", patches=True)


def test_a_command_that_was_refused_after_its_first_image_does_not_bind_the_next_one(here, photos, model):
    for file in photos.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the images could be read"):
        run(photos, model, "out.npz", mean=True)
    pictures(photos, n=20, classes=2)
    assert run(photos, model, "out.npz").rows == 20


def test_a_moved_folder_of_images_can_be_gone_on_with(here, photos, model):
    run(photos, model, "out.npz", progress=stop_after(3))
    photos.rename(here / "bilder")
    assert run("bilder", model, "out.npz").parts_kept == 1
    assert open_features("out.npz").manifest["root"] == str(here / "bilder")


def test_parts_that_are_uniform_in_themselves_but_not_alike_are_refused_together(here, model):
    for name, side in (("a", 24), ("b", 40)):
        pictures(here / "photos" / name, n=6, size=side)
    with pytest.raises(DataError, match="part 1 has another grid than part 0; use --fit crop"):
        embed(str(here / "photos"), model=model, output="out.npy", patches=True, fit="pad", part_rows=6, batch_size=6)


def test_a_full_disk_is_one_sentence_and_the_command_goes_on_later(here, photos, model, monkeypatch):
    real, calls = os.fsync, iter(range(99))

    def full(descriptor):
        if next(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DinoError, match=r"no space is left on the disk of out.npz; finished parts are kept"):
            run(photos, model, "out.npz", patches=True)
    assert not list(here.rglob("*.tmp"))
    assert run(photos, model, "out.npz", patches=True).parts_kept == 1


def test_a_dry_run_writes_nothing_and_tells_how_much_it_would_be(here, photos, model):
    before = sorted(here.iterdir())
    report = run(photos, model, "out.npz", dry_run=True, mean=True, layers=[0], patches=True)
    assert sorted(here.iterdir()) == before
    assert report.columns == [
        "index", "path", "height", "width", "label",
        "cls", "mean", "patches", "layer0_cls", "layer0_mean", "layer0_patches",
    ]  # fmt: skip
    assert report.bytes == 20 * (64 + 2 * (2 * 4 * 64 + 2 * 64 * 16)) and report.parts == 4
    run(photos, model, "out.npz", mean=True, layers=[0], patches=True)
    assert set(np.load("out.npz").files) | {"patches", "layer0_patches"} == set(report.columns)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"output": "out"}, "the suffix of out names no format; end it in one of .parquet, .npz, .npy"),
        ({"output": "out.npz", "table_format": "npy"}, "out.npz ends like npz, but --format says npy"),
        ({"output": ""}, "the output has no name"),
        ({"output": "out.safetensors"}, "safetensors are no longer written; write out.npz or .parquet instead"),
        ({"output": "out", "table_format": "safetensors"}, "safetensors are no longer written; write out.npz"),
        ({"output": "model.pth/out.npz"}, "because .*model.pth is a file"),
        ({"output": "photos/out.npy"}, "lies in the folder of the images"),
        ({"output": "photos/out.npz", "patches": True}, "lies in the folder of the images"),
        ({"layers": [3]}, "there is no block 3; this model has blocks 0 to 2"),
        ({"size": 33}, "the size 33 is no multiple of the model's patch of 8 pixels; write 32"),
        ({"batch_size": 0}, "the batch is 0"),
        ({"device": "gpu"}, "no device is called 'gpu'"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_computed(here, photos, model, options, reason):
    before = sorted(here.rglob("*"))
    with pytest.raises(ConfigError, match=reason):
        run(photos, **{"model": model, "output": "out.npz", **options})
    assert sorted(here.rglob("*")) == before


def test_registers_of_a_model_without_them_are_refused(here, photos):
    with pytest.raises(ConfigError, match="plain.pth has no registers to keep"):
        run(photos, small(here / "plain.pth"), "out.npz", registers=True)


@pytest.mark.parametrize(
    "source, reason",
    [
        ("nowhere", "is no existing path, and 'nowhere' is no known data set"),
        ("empty", "no image was found in"),
        ("empty/*.jpg", "no image matches empty/\\*.jpg; small and capital letters differ"),
        ([], "no images were named"),
        ("", "no images were named"),
        (["photos", "empty"], "photos is a folder among 2 sources"),
        (["photos/class0/002.png", "no.png"], "there is no image file no.png"),
        ("model.pth", "is a file and no list of images"),
    ],
)
def test_sources_without_images_are_refused(here, photos, model, source, reason):
    (here / "empty").mkdir()
    with pytest.raises(DataError, match=reason):
        embed(source, model=model, output="out.npz")


def test_a_missing_model_is_refused(here, photos):
    with pytest.raises(WeightsError, match="there is no weight file no.pth"):
        run(photos, "no.pth", "out.npz")


def test_a_set_of_which_no_image_can_be_read_is_refused(here, model):
    (here / "broken").mkdir()
    (here / "broken" / "a.jpg").write_bytes(b"?")
    with pytest.raises(DataError, match="none of the images could be read; the first reason is: .*a.jpg"):
        embed("broken", model=model, output="out.npz")


def test_a_name_without_suffix_is_a_folder_of_parts(here, photos, model):
    report = run(photos, model, "features", table_format="npz")
    assert report.files[0] == Path("features") and len(list((here / "features").glob("part-*.npz"))) == 4
    assert len(open_features("features")) == 17


def test_features_may_lie_among_the_images_where_they_are_no_images(here, photos, model):
    run(photos, model, "photos/out.parquet")
    assert run(photos, model, "photos/out.parquet").computed == 0


def test_threads_change_nothing(here, photos, model):
    run(photos, model, "one.npz", threads=1)
    run(photos, model, "many.npz", threads=7)
    assert (here / "one.npz").read_bytes() == (here / "many.npz").read_bytes()


def test_parts_of_small_and_large_sets_are_bounded():
    assert rows_per_shard(1000, 1600, 32) == 256
    assert rows_per_shard(100_000, 1600, 32) == 6240
    assert rows_per_shard(10_000_000, 1600, 32) == 8192
    assert rows_per_shard(10_000_000, 256 * 384 * 2, 32) == 2720  # half a GiB of patches
    assert rows_per_shard(10_000_000, 1 << 30, 32) == 32


def test_memory_does_not_grow_with_the_number_of_images(here, model, monkeypatch):
    """Of all parts only the one in the making is in memory, and joining them reads one at a time."""
    import gc
    import weakref

    kept = []
    real = shards.write_table

    def write_table(path, pieces, *rest, **options):
        kept.append([weakref.ref(array) for piece in pieces for array in piece.values()])
        return real(path, pieces, *rest, **options)

    monkeypatch.setattr(shards, "write_table", write_table)
    embed("toy:n=64", model=model, output="out.npz", part_rows=4, batch_size=4)
    gc.collect()
    assert len(kept) == 16
    assert not any(reference() is not None for references in kept for reference in references)


def both_ranks(rank: int, folder: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=2)
    report = run("photos", "model.pth", "two.parquet", patches=True)
    Path(f"rank{rank}.txt").write_text(f"{report.rows} {report.computed} {len(report.files)}")
    try:
        run("photos", "model.pth", "two.parquet", mean=True)
    except DataError as error:
        Path(f"refused{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_write_what_one_does(here, photos, model):
    run(photos, model, "one.parquet", patches=True)
    torch.multiprocessing.start_processes(both_ranks, (str(here),), nprocs=2, start_method="spawn")
    assert (here / "two.parquet").read_bytes() == (here / "one.parquet").read_bytes()
    assert (here / "two.patches.npy").read_bytes() == (here / "one.patches.npy").read_bytes()
    assert (here / "two.parquet.unreadable.json").read_bytes() == (here / "one.parquet.unreadable.json").read_bytes()
    assert (here / "rank0.txt").read_text() == "17 20 4" and (here / "rank1.txt").read_text() == "0 0 0"
    assert (here / "refused0.txt").read_text() == (here / "refused1.txt").read_text()
    assert_array_equal(open_features("two.parquet").read("index"), open_features("one.parquet").read("index"))
