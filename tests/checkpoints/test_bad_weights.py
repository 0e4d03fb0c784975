"""Damaged and hostile weight files: one `WeightsError` in one line, before anything large is allocated."""

import json
import os
import resource
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dinov2
from dinov2.checkpoints.files import read_file, save_teacher, write_tensors
from dinov2.checkpoints.open import open_checkpoint
from dinov2.errors import WeightsError
from dinov2.models.config import BackboneConfig
from tests.models.tiny_backbones import huggingface_folder, tiny

STATE = tiny().state_dict()
CONFIG = BackboneConfig.from_model(tiny(), mean=[0.5] * 3, std=[0.25] * 3)
TABLE = CONFIG.table()
DIGITS = int("9" * 4000)


def refused(path: Path | str) -> str:
    """The sentence of the refusal by `dinov2.load`, which must be one line of sane length."""
    with pytest.raises(WeightsError) as refusal:
        dinov2.load(path)
    sentence = str(refusal.value)
    assert "\n" not in sentence and len(sentence) < 700
    return sentence


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Settings.

ABSURD_SETTINGS: dict[str, list[Any]] = {
    "mlp_ratio": [60000.0, float("nan"), float("inf"), -1, 0, "4", None, [4], True],
    "num_register_tokens": [10**12, -1, "٤", 1, 2.0, None, True],
    "depth": [0, -2, 3, True, "2", DIGITS],
    "embed_dim": [0, -64, "64", 10**12],
    "num_heads": [0, -1, 3, "x", 10**12, 0.5],
    "patch_size": [0, -14, 7, 10**12, "14"],
    "in_chans": [0, 1, 10**12],
    "img_size": [[98], [98, 98, 98], 98, "98", [0, 0], [-98, -98], [10**9, 10**9], [98, "98"], [], None, [49, 98]],
    "mean": [[0.5] * 5, [], "x", [float("nan")] * 3, ["٤"] * 3, [None] * 3, {"a": 1}, [DIGITS] * 3],
    "std": [[0.0] * 3, [0.5, 0.5, 0], [-1] * 3, [float("nan")] * 3, [float("inf")] * 3, [0.5] * 5, [1e-300] * 3],
    "interpolate_offset": [float("nan"), float("inf"), -1, "0.1", None, 1e300],
    "interpolate_antialias": ["no", None, 2],
    "ffn_layer": ["mixer", None, [], 5],
    "qkv_bias": ["yes", False, None],
    "layerscale": [False, None, "x"],
    "version": [2, None, "1"],
}


@pytest.mark.parametrize("key", ABSURD_SETTINGS)
def test_an_absurd_setting_in_a_model_table_is_refused(tmp_path, key):
    before = peak_memory()
    for value in ABSURD_SETTINGS[key]:
        write_tensors(tmp_path / "w.safetensors", STATE, {**TABLE, key: value})
        assert str(tmp_path) in refused(tmp_path / "w.safetensors")
    assert peak_memory() - before < 500e6


def test_a_setting_is_named_with_its_value():
    with pytest.raises(WeightsError, match=r"describes no model \(std is \(0.5, 0.5, 0\)\); copy the file again"):
        BackboneConfig.from_table({**TABLE, "std": [0.5, 0.5, 0]})
    assert BackboneConfig.from_table({**TABLE, "mean": [0.5], "std": [1]}).table() == {
        **TABLE,
        "mean": [0.5],
        "std": [1],
    }


@pytest.mark.parametrize(
    "key", ["hidden_size", "patch_size", "image_size", "num_attention_heads", "interpolate_offset"]
)
def test_an_absurd_value_in_a_configuration_is_refused(tmp_path, key):
    folder = huggingface_folder(tmp_path / "m", tiny())
    original = json.loads((folder / "config.json").read_text())
    for value in [None, "١٤", "14", -1, 10**12, DIGITS, float("nan"), [], {}, [[1]], "x" * 100_000]:
        (folder / "config.json").write_text(json.dumps({**original, key: value}))
        refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [0.5] * 5},
        {"image_std": [0, 0, 0]},
        {"image_std": [float("nan")] * 3},
        {"image_mean": [10**400] * 3},
        {"image_mean": "x"},
        {"image_mean": ["٤"] * 3},
        {"image_std": 0},
        {"image_mean": [[1]] * 3},
    ],
)
def test_absurd_statistics_of_a_preprocessor_are_refused(tmp_path, change):
    folder = huggingface_folder(tmp_path / "m", tiny())
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    key = next(iter(change)).removeprefix("image_")
    assert f"{folder} describes no model ({key} is " in refused(folder)


JSON_FILES = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_python_cannot_hold_is_refused(tmp_path, name):
    folder = huggingface_folder(tmp_path / "m", tiny())
    for text in ("[" * 200_000, '{"a":' * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", "\0" * 100, "null"):
        (folder / name).write_text(text)
        assert str(folder / name) in refused(folder)


# Files that are no regular ones, or larger than what they hold.


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_folder(path: Path) -> None:
    path.mkdir()


def as_socket(path: Path) -> None:
    """A node of a file system without a server: Unix sockets have short names."""
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        server.bind(path.name)
    finally:
        os.chdir(here)
        server.close()


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (as_fifo, "is a named pipe"),
    "device": (as_device, "is a device"),
    "folder": (as_folder, "is a folder"),
    "socket": (as_socket, "is a socket"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="of POSIX systems")
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path, kind):
    make, reason = SPECIAL[kind]
    make(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=reason):
        read_file(tmp_path / "w.pth")
    for name in JSON_FILES:
        folder = huggingface_folder(tmp_path / name.partition(".")[0] / name.partition(".")[2], tiny())
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        assert reason in refused(folder)


def test_sparse_files_are_refused_before_they_are_read(tmp_path):
    before = peak_memory()
    for name, start in (("a.pth", b""), ("b.pth", b"PK\3\4"), ("c.pth", b"\x80\x02"), ("d.safetensors", b"{")):
        with open(tmp_path / name, "wb") as file:
            file.write(start)
            file.truncate(1 << 40)
        assert "of memory" in refused(tmp_path / name)
        os.truncate(tmp_path / name, 3 << 30)
        refused(tmp_path / name)
    folder = huggingface_folder(tmp_path / "m", tiny())
    os.truncate(folder / "config.json", 1 << 40)
    assert "too large for a configuration file" in refused(folder)
    assert peak_memory() - before < 500e6


@pytest.mark.parametrize("name", ["a" * 5000 + ".pth", "no\0file.pth", "~nobody-here/w.pth", "\udcff.pth", "loop.pth"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop.pth", "loop.pth")
    refused(name)


# Tensors.

FIRST = "blocks.0.mlp.fc1.weight"
ODD_TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "complex": (lambda weight: weight.to(torch.complex64), "is complex64"),
    "int8": (lambda weight: weight.to(torch.int8), "is int8"),
    "bool": (lambda weight: weight.bool(), "is bool"),
    "int64": (lambda weight: weight.long(), "is int64"),
    "float8": (lambda weight: weight.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
    "sparse": (lambda weight: weight.to_sparse(), "sparse, nested or quantised"),
    "compressed": (lambda weight: weight.to_sparse_csr(), "sparse, nested or quantised"),
    "meta": (lambda weight: weight.to("meta"), "has no values"),
    "scalar": (lambda weight: torch.tensor(1.0), "of another shape"),
    "empty": (lambda weight: torch.zeros(0), "mlp_ratio is 0.0"),
    "too many dimensions": (lambda weight: weight[None, None], "does not fit"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_tensors_that_are_no_weights_are_refused(tmp_path, kind):
    change, reason = ODD_TENSORS[kind]
    torch.save({**STATE, FIRST: change(STATE[FIRST])}, tmp_path / "w.pth")
    assert reason in refused(tmp_path / "w.pth")


@pytest.mark.parametrize("key", ["cls_token", "pos_embed", "patch_embed.proj.weight", "register_tokens", "reg_token"])
@pytest.mark.parametrize("shape", [(), (3,), (1, 0, 64), (1, 1, 1, 1, 1)])
def test_tensors_of_other_shapes_are_refused(tmp_path, key, shape):
    torch.save({**STATE, key: torch.zeros(shape)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth")


def test_half_and_double_precision_are_weights(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({key: value.to(dtype) for key, value in STATE.items()}, tmp_path / "w.pth")
        assert torch.equal(dinov2.load(tmp_path / "w.pth").backbone.norm.weight, STATE["norm.weight"].to(dtype).float())


def test_views_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    """A tensor with a stride of zero takes four bytes in the file and gigabytes in memory."""
    one, before = torch.zeros(1), peak_memory()
    sizes = {64: 100_000, 192: 300_000, 256: 400_000}
    wide = {key: one.expand([sizes.get(size, size) for size in value.shape]) for key, value in STATE.items()}
    for state in (wide, {**STATE, "register_tokens": one.expand(1, 10**12, 64)}, {"teacher": wide}):
        torch.save(state, tmp_path / "w.pth")
        assert "claims" in refused(tmp_path / "w.pth")
    many = {f"blocks.{index}.mlp.fc1.weight": torch.zeros(1 << 18) for index in range(2)}
    shared = {f"blocks.{index}.norm1.weight": many["blocks.0.mlp.fc1.weight"] for index in range(2, 600)}
    torch.save({**STATE, **many, **shared}, tmp_path / "w.pth")
    assert "claim" in refused(tmp_path / "w.pth")
    assert peak_memory() - before < 500e6


@pytest.mark.parametrize(
    "block",
    ["999999999", "9" * 5000, "١", "²", "-1", "1.1.1"],
    ids=["many", "digits", "arabic", "squared", "minus", "deep"],
)
def test_odd_numbers_of_blocks_are_refused(tmp_path, block):
    state = {key.replace("blocks.1.", f"blocks.{block}."): value for key, value in STATE.items()}
    torch.save(state, tmp_path / "w.pth")
    refused(tmp_path / "w.pth")


def test_keys_that_are_no_text_are_passed_over(tmp_path):
    torch.save(dict(enumerate(STATE.values())), tmp_path / "w.pth")
    assert "holds no DINOv2 backbone" in refused(tmp_path / "w.pth")
    torch.save({**STATE, 3: torch.ones(2), None: torch.zeros(1), (1, 2): 3}, tmp_path / "w.pth")
    assert dinov2.load(tmp_path / "w.pth").report.matched == len(STATE)


def test_dictionaries_within_each_other_end(tmp_path):
    inside: dict[str, Any] = {"weight": torch.zeros(1)}
    inside["self"] = inside
    for _ in range(40):
        inside = {"a": inside, "b": inside}
    torch.save(inside, tmp_path / "w.pth")
    assert "holds no DINOv2 backbone" in refused(tmp_path / "w.pth")


# Archives and other formats.


def test_an_archive_that_unpacks_to_more_than_it_has_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as source, zipfile.ZipFile(tmp_path / "w.pth", "w", 8) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("good/data/99", bytes(64 << 20))
    assert "is compressed or claims more bytes than it has" in refused(tmp_path / "w.pth")


def test_a_torchscript_program_is_called_by_its_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl"):
            archive.writestr(f"w/{name}", b"")
    assert "is a TorchScript program; open it with torch.jit.load" in refused(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("w.pth", b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write it"),
        ("w.onnx", b"\x08\x07\x12", "an ONNX model"),
        ("w.pth", b"\x08\x07\x12\x07pytorch", "an ONNX model"),
        ("w.pth", b"\x1c\0\0\0TFL3", "a TensorFlow Lite model"),
        ("saved_model.pb", b"\x0a\x01", "a TensorFlow graph"),
        ("m.ckpt.data-00000-of-00001", b"\0\1", "a part of a TensorFlow checkpoint"),
        ("w.pth", b"\x1f\x8b\x08", "a gzip archive, which has to be unpacked first"),
        ("w.pth", bytes(257) + b"ustar", "a tar archive"),
        ("w.gguf", b"GGUF\3", "a GGUF file"),
        ("w.pth", b'{"error": "not found"}', "a text file"),
        ("w.pth", b"\xef\xbb\xbf<html>", "a web page"),
    ],
)
def test_other_formats_are_called_by_their_names(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert f"is no weight file but {reason}" in refused(tmp_path / name)


def test_other_archives_are_called_by_their_names(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.ones(3))
    assert "is a NumPy archive and no weight file" in refused(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "x")
    assert "is a zip archive of other files ('readme.txt')" in refused(tmp_path / "w.pth")


def test_a_half_downloaded_file_says_how_much_is_there_and_how_to_replace_it(tmp_path, monkeypatch):
    write_tensors(tmp_path / "w.safetensors", STATE, TABLE)
    size = (tmp_path / "w.safetensors").stat().st_size
    os.truncate(tmp_path / "w.safetensors", size // 2)
    there = f"is only a part of a weight file ({size // 2:,} of {size} bytes); "
    assert there + "download or copy it again" in refused(tmp_path / "w.safetensors")
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    again = "delete w.safetensors there and give the same command again, which downloads it anew"
    assert there + again in refused(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a":1}',
        b'{"a":' * 50_000,
        b'{"__metadata__":{"model":"{"}}',
        b'{"__metadata__":5}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0",4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,%s]}}' % (b"9" * 5000),
    ],
    ids=range(8),
)
def test_an_absurd_safetensors_header_is_refused(tmp_path, header):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(tmp_path / "w.safetensors")


# Damage.


@pytest.mark.parametrize("name", ["t.pth", "backbone.safetensors"])
def test_a_flipped_bit_is_noticed(tmp_path, name):
    save_teacher(tmp_path / "t.pth", {f"backbone.{key}": value for key, value in STATE.items()}, CONFIG)
    good = (tmp_path / name).read_bytes()
    place = good.index(STATE["blocks.1.mlp.fc1.weight"].numpy().tobytes()) + 17
    (tmp_path / name).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    assert "is damaged (its content does not have the checksum in it)" in refused(tmp_path / name)
    generator = np.random.default_rng(0)
    for place in generator.integers(len(good), size=40):
        (tmp_path / name).write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            opened = open_checkpoint(tmp_path / name)  # the bit lies in padding, or in a figure that nobody reads
        except WeightsError:
            continue
        assert opened.config == CONFIG and all(torch.equal(opened.state[key], value) for key, value in STATE.items())


def test_a_changed_setting_is_noticed(tmp_path):
    write_tensors(tmp_path / "w.safetensors", STATE, TABLE)
    good = (tmp_path / "w.safetensors").read_bytes()
    assert good.count(b'interpolate_offset\\": 0.1') == 1
    (tmp_path / "w.safetensors").write_bytes(good.replace(b'interpolate_offset\\": 0.1', b'interpolate_offset\\": 0.3'))
    assert "is damaged" in refused(tmp_path / "w.safetensors")


def test_files_without_a_checksum_still_load(tmp_path):
    torch.save(
        {"teacher": {f"backbone.{key}": value for key, value in STATE.items()}, "model": TABLE}, tmp_path / "t.pth"
    )
    assert open_checkpoint(tmp_path / "t.pth").config == CONFIG
