"""Kinds of bad weight files that are no weight files, or damaged or hostile ones: bytes, archives, pickles, headers."""

import io
import os
import socket
import zipfile
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.weight_maker import (
    NESTED,
    TEBIBYTE,
    Global,
    Maker,
    archive_file,
    copied,
    kind,
    members_of,
    parts_of,
    persistent,
    plain,
    reduced,
    safetensors_file,
    torch_file,
)

__all__: list[str] = []


# Bytes


@kind(refused=True)
def truncated(make: Maker) -> Path:
    source = make.source()
    content = source.read_bytes()
    return make.written(
        content[: make.rng.choice([make.rng.randrange(1, len(content)), len(content) - 1])], source.name
    )


@kind(refused=False)
def flipped_bits(make: Maker) -> Path:
    source = make.source()
    content = bytearray(source.read_bytes())
    # Most bits are those of numbers; half of the flips go where the structure is.
    area = len(content) if make.rng.random() < 0.5 else min(len(content), 3000)
    for _ in range(make.rng.choice([1, 8, 100])):
        content[-1 - make.rng.randrange(area) if source == make.good.release else make.rng.randrange(area)] ^= (
            1 << make.rng.randrange(8)
        )
    return make.written(bytes(content), source.name)


@kind(refused=False)
def blanked(make: Maker) -> Path:
    """A stretch of zeros, as a disk or a copy leaves it."""
    source = make.source()
    content = bytearray(source.read_bytes())
    start = make.rng.randrange(len(content))
    end = min(len(content), start + make.rng.choice([16, 512, 65536]))
    content[start:end] = bytes(end - start)
    return make.written(bytes(content), source.name)


@kind(refused=True)
def other_content(make: Maker) -> Path:
    array = io.BytesIO()
    torch.zeros(3).numpy().dump(array)
    contents = [
        b"", b"\0", b"PK", b"PK\3\4", b"\x80", b"\x80\x02", b"hello\n", b"\xff\xfem\0o\0d\0e\0l\0", b"{}", b"[]",
        b"<!DOCTYPE html><html><body>404</body></html>", b"  \n<html>", b"<?xml version='1.0'?><Error/>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", b"\x89PNG\r\n\x1a\n" + bytes(50),
        b"\x89HDF\r\n\x1a\n" + bytes(600), b"GGUF\3\0\0\0" + bytes(100), b"\x1f\x8b\x08\0" + bytes(50), b"BZh91AY&SY",
        b"\x93NUMPY\1\0v\0{'descr': '<f4'}", array.getvalue(), b"7z\xbc\xaf\x27\x1c", b"(lp0\n.", b"7767517\n1 2\n",
        b"\x08\x08\x12\x07pytorch" + bytes(90), b"Lightning", b"\0" * 4096, b"%PDF-1.4", b"ustar" * 300,
    ]  # fmt: skip
    name = make.rng.choice(["bad.pth", "bad.safetensors", "bad.bin", "bad.pt", "bad.ckpt"])
    return make.written(make.rng.choice(contents), name)


@kind(refused=True)
def noise(make: Maker) -> Path:
    start = make.rng.choice([b"", b"PK\3\4", b"\x80\x02", b"\x80\x04\x95", (99).to_bytes(8, "little") + b"{"])
    return make.written(start + make.rng.randbytes(make.rng.choice([10, 1000, 100_000])))


@kind(refused=True)
def sparse(make: Maker) -> Path:
    """A terabyte that takes no place on the disk."""
    source = make.rng.choice([None, None, make.good.weights, make.good.release])
    path = make.written(b"" if source is None else source.read_bytes(), f"bad{source.suffix if source else '.pth'}")
    if source is None:
        starts = [
            b"",
            b"PK\3\4",
            b"\x80\x02",
            (1 << 29).to_bytes(8, "little") + b"{",
            (90).to_bytes(8, "little") + b"{",
        ]
        path.write_bytes(make.rng.choice(starts))
    os.truncate(path, TEBIBYTE)
    return path


@kind(refused=True)
def no_regular_file(make: Maker) -> Path:
    path, what = make.folder / make.rng.choice(["bad.pth", "bad.safetensors"]), make.rng.randrange(9)
    if what == 0:
        os.mkfifo(path)
    elif what == 1:
        path.mkdir()
    elif what == 2:
        path.symlink_to(path.name)
    elif what == 3:
        path.symlink_to("nowhere")
    elif what == 4:
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            try:  # the name of a socket is short
                os.chdir(make.folder)
                listener.bind(path.name)
            finally:
                os.chdir(here)
    else:
        path.symlink_to(["/dev/zero", "/dev/random", "/dev/full", "/dev/null"][what - 5])
    return path


@kind(refused=False)
def fifo_in_folder(make: Maker) -> Path:
    folder = copied(make.good.hf, make.folder / "hf")
    name = make.rng.choice(["config.json", "model.safetensors", "model.safetensors.index.json"])
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    return folder


# Archives and pickles


@kind(refused=True)
def archive(make: Maker) -> Path:
    good = members_of(make.good.release)
    root = next(iter(good)).split("/")[0]
    what = make.rng.randrange(7)
    if what == 0:
        good.pop(f"{root}/data.pkl")
    elif what == 1:
        good = {f"../{name}": content for name, content in good.items()}
    elif what == 2:
        good.pop(make.rng.choice([name for name in good if "/data/" in name]))
    elif what == 3:
        name = make.rng.choice([name for name in good if "/data/" in name])
        good[name] = good[name][: len(good[name]) // 2]
    elif what == 4:  # TorchScript
        good |= {
            f"{root}/constants.pkl": b"\x80\x02).",
            f"{root}/code/__torch__.py": b"class Module(Module):\n  pass\n",
        }
        good[f"{root}/data.pkl"] = b"\x80\x02c__torch__\nModule\nq\x00)\x81."
    elif what == 5:
        good = {"word/document.xml": b"<w/>", "[Content_Types].xml": b"<Types/>"}
    else:
        good = {f"{root}/data.pkl": b"\x80\x02X\x04\x00\x00\x00text.", f"{root}/version": b"3\n"}
    return make.written(archive_file(good))


@kind(refused=False)
def deflated(make: Maker) -> Path:
    """Members that torch cannot map, one of them two gigabytes of zeros in two megabytes."""
    members = members_of(make.good.release)
    target, size = next(name for name in members if name.endswith("data.pkl")), make.rng.choice([1 << 20, 1 << 28])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            with zipped.open(name, "w") as member:
                member.write(content)
                for _ in range(size >> 20 if name == target else 0):
                    member.write(bytes(1 << 20))
    return make.written(file.getvalue()[: make.rng.choice([None, -10])])


class Call:
    """A pickle that calls a function when it is opened."""

    def __init__(self, module: str, name: str, arguments: tuple[Any, ...]) -> None:
        self.call = module, name, arguments

    def pickled(self) -> bytes:
        module, name, arguments = self.call
        # The arguments without their protocol and their stop.
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + plain(arguments) + b"R."


CALLS = [
    Call("os", "system", ("touch out/made_by_a_weight_file",)),
    Call("posix", "system", ("touch out/made_by_a_weight_file",)),
    Call("builtins", "eval", ("open('made_by_a_weight_file', 'w')",)),
    Call("builtins", "exec", ("import os; os.mkdir('made_by_a_weight_file')",)),
    Call("subprocess", "Popen", (["touch", "out/made_by_a_weight_file"],)),
    Call("builtins", "open", ("made_by_a_weight_file", "w")),
    Call("builtins", "getattr", ("", "format")),
    Call("torch.hub", "load_state_dict_from_url", ("http://localhost/x",)),
    Call("torch", "load", ("good.pth",)),
    Call("runpy", "run_path", ("x.py",)),
    Call("numpy", "fromfile", ("/dev/zero",)),
    Call("pytorch_lightning.utilities", "AttributeDict", ()),
    Call("torch.distributed._shard.sharded_tensor.api", "ShardedTensor", ()),
]


@kind(refused=True)
def code(make: Maker) -> Path:
    content = make.rng.choice(CALLS).pickled()
    return make.written(make.rng.choice([content, torch_file(data=content)]))


@kind(refused=True)
def pickled_tensors(make: Maker) -> Path:
    """Tensors by hand, whose sizes, strides, offsets or storages lie."""
    numbers = make.rng.choice([4, 10**12, -1, 2**63])
    size = make.rng.choice([(4,), (10**12,), (-4,), (10**6, 10**6), (2**40, 2**40), ()])
    stride = make.rng.choice([(1,), (0,), (-1,), (10**12,), (1, 1), ()])
    offset = make.rng.choice([0, 10**12, -4, 3])
    storage = ("storage", Global("torch", "FloatStorage"), "0", "cpu", numbers)
    tensor = reduced(
        "torch._utils", "_rebuild_tensor_v2",
        [persistent(storage), plain(offset), plain(size), plain(stride), plain(False), reduced("collections",
        "OrderedDict", [])],
    )  # fmt: skip
    return make.written(torch_file(data=b"\x80\x02}" + plain("cls_token") + tensor + b"s.", **{"data/0": bytes(16)}))


@kind(refused=False)
def old_format(make: Maker) -> Path:
    """The format of torch before 1.6, whole, cut or flipped."""
    path = make.saved(make.state(), _use_new_zipfile_serialization=False)
    content = bytearray(path.read_bytes())
    if make.rng.random() < 0.7:
        content = content[: make.rng.randrange(len(content))]
    for _ in range(make.rng.choice([0, 1, 20])):
        content[make.rng.randrange(min(len(content), 2000))] ^= 1 << make.rng.randrange(8)
    return make.written(bytes(content))


# Headers of safetensors files


@kind(refused=True)
def header_length(make: Maker) -> Path:
    content = make.good.weights.read_bytes()
    length = make.rng.choice([0, 1, 2, len(content), 2**63, 2**64 - 1, (1 << 30) - 1, 10, 100_000_001])
    return make.written(length.to_bytes(8, "little") + content[8:], "bad.safetensors")


@kind(refused=True)
def header_text(make: Maker) -> Path:
    _, data = parts_of(make.good.weights)
    good = make.good.weights.read_bytes()
    text = good[8 : 8 + int.from_bytes(good[:8], "little")]
    texts = [
        text.replace(b"{", b"[", 1), text[:-20], b"{" + b"\xff" * 40 + b"}", text.replace(b'"cls_token"',
        b'"mask_token"'),
        b"{" + NESTED.encode(), b'{"a":' * 100_000 + b"1" + b"}" * 100_000, text.replace(b"F32", b"F\0\0"), b"{}", b"{",
        text.replace(b"cls_token", b"\xe9ls_token"), b"{" + b" " * 1_000_000, b'{"__metadata__": 7}',
        b'{"__metadata__": {"model": 7}}',
        text.replace(b":[", b":[1" + b"0" * 5000 + b",", 1), b'{"a": null}', b'{"__metadata__": null, "a": {}}',
    ]  # fmt: skip
    text = make.rng.choice(texts)
    return make.written(len(text).to_bytes(8, "little") + text + data, "bad.safetensors")


@kind(refused=True)
def header_offsets(make: Maker) -> Path:
    header, data = parts_of(make.good.weights)
    start, end = header[(key := make.key())]["data_offsets"]
    offsets = [[end, start], [start, end + 4], [-4, end], [start, 10**15], [start], [start, end, end], [0, 0], "x"]
    offsets += [
        [start + 4, end + 4],
        [float(start), float(end)],
        None,
        [2**63, 2**63 + end - start],
        {},
        [str(start), str(end)],
    ]
    header[key]["data_offsets"] = make.rng.choice(offsets)
    return make.written(safetensors_file(header, data), "bad.safetensors")


@kind(refused=True)
def header_type_or_shape(make: Maker) -> Path:
    header, data = parts_of(make.good.weights)
    entry = header[make.key()]
    if make.rng.random() < 0.4:
        entry["dtype"] = make.rng.choice(["f32", "F99", "", 7, None, "F64", "BOOL", "F16", "U8", ["F32"]])
    else:
        shapes = [
            [10**12],
            [10**6, 10**6],
            [-1, -64],
            [2**32, 2**32],
            [1.5],
            ["1"],
            [],
            None,
            64,
            [[64]],
            [0],
            [1] * 1000,
        ]
        entry["shape"] = make.rng.choice(shapes)
    if make.rng.random() < 0.2:
        del entry[make.rng.choice(["dtype", "shape", "data_offsets"])]
    return make.written(safetensors_file(header, data), "bad.safetensors")


@kind(refused=True)
def header_size(make: Maker) -> Path:
    """Bytes too many, too few, or for nobody."""
    header, data = parts_of(make.good.weights)
    change = make.rng.randrange(3)
    if change == 0:
        return make.written(safetensors_file(header, data + bytes(64)), "bad.safetensors")
    if change == 1:
        return make.written(safetensors_file(header, data[:-4]), "bad.safetensors")
    del header[make.key()]
    return make.written(safetensors_file(header, data), "bad.safetensors")
