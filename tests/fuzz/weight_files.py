"""Weight files that are wrong: damaged, hostile, of another kind, or of a model that cannot be.

`weight_files` gives as many as are asked for, always the same ones: the kinds below and in `weight_bytes` in turn, each
with random numbers of its own. What must be refused is marked so; the rest may load (a NaN is a number, an unknown key
of a table is none of our business), and must then work.
"""

import json
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.fuzz import weight_bytes  # noqa: F401 -- its kinds enter the table
from tests.fuzz.ingredients import Ingredients
from tests.fuzz.weight_maker import (
    ABSURD,
    KINDS,
    NESTED,
    BadFile,
    Maker,
    copied,
    kind,
    parts_of,
    safetensors_file,
    torch_file,
)

__all__ = ["weight_files"]


def weight_files(folder: Path, good: Ingredients, count: int) -> Iterator[tuple[str, Callable[[], BadFile]]]:
    """Names, and functions that write the file of that name, each into a folder of its own below `folder`."""
    kinds = list(KINDS)
    for number in range(count):
        kind, turn = kinds[number % len(kinds)], number // len(kinds)
        name = f"{kind}-{turn}"

        def write(name: str = name, kind: str = kind) -> BadFile:
            place = folder / name
            place.mkdir(parents=True)
            make, refused = KINDS[kind]
            return BadFile(name, make(Maker(random.Random(name), place, good)), refused)

        yield name, write


# Tensors


@kind(refused=False)
def tensor_type(make: Maker) -> Path:
    types = [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int8, torch.bool, torch.int64]
    types += [torch.uint16, torch.float8_e4m3fn]
    kind, state = make.rng.choice(types), make.state()
    for key in [make.key()] if make.rng.random() < 0.5 else list(state):
        state[key] = state[key].to(kind)
    return make.saved(state)


@kind(refused=True)
def tensor_shape(make: Maker) -> Path:
    state, key = make.state(), make.key()
    value: Tensor = state[key]
    state[key] = make.rng.choice(
        [
            value.flatten()[:0],
            value.flatten()[0],
            value[None],
            torch.cat([value, value]),
            value.new_zeros(tuple(side + 1 for side in value.shape)),
            value.new_zeros((*value.shape, 0)),
            value.new_zeros(()),
        ]
    )
    return make.saved(state)


@kind(refused=True)
def tensor_stride(make: Maker) -> Path:
    """Views that claim more numbers than their memory holds."""
    state, key = make.state(), make.key()
    sides = make.rng.choice([(10**12,), (10**6, 10**6), (1, 10**12, 64), (60_000, 60_000), (3, 10**9)])
    state[key] = torch.zeros(1).expand(sides)
    return make.saved(state)


@kind(refused=True)
def wide_model_of_one_number(make: Maker) -> Path:
    """A whole state dict, consistent in itself, whose tensors are all views of one number."""
    width = make.rng.choice([64_000, 1 << 20, 64 * 10**6])
    state = {
        key: torch.zeros(1).expand([side * (width // 64) if side % 64 == 0 else side for side in value.shape])
        for key, value in make.good.state.items()
    }
    return make.saved(state)


@kind(refused=True)
def tensor_layout(make: Maker) -> Path:
    state, key = make.state(), make.key()
    value: Tensor = state[key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layouts: list[Callable[[], Tensor]] = [
            lambda: value.to_sparse(),
            lambda: value.reshape(1, -1).to_sparse_csr(),
            lambda: torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**12,)),
            lambda: value.to("meta"),
            lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        ]
        state[key] = make.rng.choice(layouts)()
    return make.saved(state)


@kind(refused=True)
def all_tensors_without_memory(make: Maker) -> Path:
    layout = make.rng.choice(["meta", "sparse"])
    return make.saved(
        {key: value.to("meta") if layout == "meta" else value.to_sparse() for key, value in make.good.state.items()}
    )


@kind(refused=False)
def numbers(make: Maker) -> Path:
    """NaN, infinity, and numbers whose products overflow."""
    state, value = make.state(), make.rng.choice([float("nan"), float("inf"), 3e38, -1e30])
    for key in [make.key()] if make.rng.random() < 0.5 else list(state):
        state[key] = torch.full_like(state[key], value)
    return make.saved(state)


# Keys and what stands beside the tensors


@kind(refused=True)
def missing_tensor(make: Maker) -> Path:
    state = make.state()
    del state[make.rng.choice([key for key in sorted(state) if key != "mask_token"])]
    return make.saved(state)


@kind(refused=True)
def renamed_tensor(make: Maker) -> Path:
    state, key = make.state(), make.rng.choice([key for key in sorted(make.good.state) if key != "mask_token"])
    name = make.rng.choice(
        [key + "x", key[:-1], key.upper(), key.replace(".", "/"), "é" + key, key + "\n", "\udce9" + key]
    )
    state[name] = state.pop(key)
    return make.saved(state)


@kind(refused=False)
def odd_keys(make: Maker) -> Path:
    odd: list[Any] = [7, None, b"cls_token", (1, "a"), 1.5, True, "", "x" * 10**6, "a\nb", "\udce9", "blocks.", "."]
    return make.saved({**make.state(), make.rng.choice(odd): make.rng.choice([torch.zeros(2), 3, None, "x"])})


@kind(refused=True)
def only_odd_keys(make: Maker) -> Path:
    odd: list[Any] = [7, None, b"cls_token", (1, "a"), 1.5, True, "", "a\nb", "\udce9"]
    return make.saved({key: torch.zeros(2) for key in make.rng.sample(odd, 3)})


@kind(refused=True)
def block_numbers(make: Maker) -> Path:
    number = make.rng.choice(["999999999999", "-1", "٣", "0x0", "1" * 5000, "00", "1.5", "3.7.2", "²"])
    state = {key.replace("blocks.0.", f"blocks.{number}."): value for key, value in make.state().items()}
    return make.saved({**make.state(), **state} if make.rng.random() < 0.5 and number != "00" else state)


@kind(refused=False)
def odd_values(make: Maker) -> Path:
    odd: list[Any] = [3, None, "x", b"x", [1, 2], {"a": 1}, torch.float32, {1, 2}, 10**5000, (torch.zeros(1),)]
    return make.saved(
        {**make.state(), make.rng.choice(["epoch", "model", "teacher", make.key()]): make.rng.choice(odd)}
    )


@kind(refused=True)
def no_dictionary(make: Maker) -> Path:
    return make.saved(make.rng.choice([[torch.zeros(1)], torch.zeros(3), 7, None, "model", {}, OrderedDict(), {1: 2}]))


@kind(refused=False)
def nested(make: Maker) -> Path:
    """The state dict far down, in itself, or beside another one."""
    state, depth = make.state(), make.rng.choice([1, 3, 100])
    content: dict[Any, Any] = state
    for _ in range(depth):
        content = {make.rng.choice(["model", "state_dict", "teacher", "x", 7]): content}
    loop: dict[Any, Any] = {"model": state}
    loop["self"] = loop
    if make.rng.random() < 0.5:
        loop["model"] = loop
    return make.saved(make.rng.choice([content, loop, {"student": state, "teacher": {"a": state, "b": state}}]))


@kind(refused=True)
def deep(make: Maker) -> Path:
    """Nested until readers run out of stack."""
    depth = make.rng.choice([5_000, 100_000])
    start, below = b"\x80\x02", b"}X\x01\x00\x00\x00a" if make.rng.random() < 0.5 else b"]"
    closing = b"s" if below.startswith(b"}") else b"a"
    return make.written(torch_file(data=start + below * depth + b"}" + closing * depth + b"."))


@kind(refused=True)
def positions(make: Maker) -> Path:
    state = make.state()
    tokens = make.rng.choice([0, 1, 3, 8, 10**9])
    state["pos_embed"] = torch.zeros(1).expand(1, tokens, 64) if tokens > 8 else torch.zeros(1, tokens, 64)
    if make.rng.random() < 0.3:
        state["pos_embed"] = torch.zeros(2, 5, 64)
    return make.saved(state)


# Tables


def _wrong_table(make: Maker) -> dict[str, Any]:
    table = dict(make.good.table)
    for key in make.rng.sample(sorted(table), make.rng.choice([1, 1, 1, 2])):
        table[key] = make.rng.choice(ABSURD)
    return table


@kind(refused=False)
def table_of_safetensors(make: Maker) -> Path:
    header, data = parts_of(make.good.weights)
    header["__metadata__"]["model"] = json.dumps(_wrong_table(make))
    return make.written(safetensors_file(header, data), "bad.safetensors")


@kind(refused=False)
def table_of_pickle(make: Maker) -> Path:
    backbone = {f"backbone.{key}": value for key, value in make.state().items()}
    return make.saved({"teacher": backbone, "model": _wrong_table(make)})


@kind(refused=False)
def statistics(make: Maker) -> Path:
    numbers = [
        [0.0] * 3,
        [1e-300] * 3,
        [0.5] * 5,
        ["a"] * 3,
        [None] * 3,
        [float("nan")] * 3,
        [-1.0] * 3,
        [[1.0]] * 3,
        0.5,
    ]
    numbers += [[10**400] * 3, [1e308] * 3, "abc", [True] * 3, []]
    header, data = parts_of(make.good.weights)
    table = {**make.good.table, make.rng.choice(["std", "std", "mean"]): make.rng.choice(numbers)}
    table.setdefault("mean", [0.5] * 3)
    table["mean"], table["std"] = table["mean"] or [0.5] * 3, table["std"] or [0.5] * 3
    header["__metadata__"]["model"] = json.dumps(table)
    return make.written(safetensors_file(header, data), "bad.safetensors")


@kind(refused=False)
def no_table(make: Maker) -> Path:
    texts = [
        NESTED,
        '{"a":' * 100_000,
        "{",
        "{}",
        "[]",
        '{"version": 1}',
        "1" * 5000,
        "\ud800",
        '{"embed_dim": 1' + "0" * 5000 + "}",
    ]
    header, data = parts_of(make.good.weights)
    header["__metadata__"] = {"model": make.rng.choice(texts)}
    return make.written(safetensors_file(header, data), "bad.safetensors")


# Folders


@kind(refused=False)
def config_values(make: Maker) -> Path:
    folder = copied(make.good.hf, make.folder / "hf")
    config = json.loads((folder / "config.json").read_text())
    for key in make.rng.sample(sorted(config), make.rng.choice([1, 1, 2])):
        config[key] = make.rng.choice(ABSURD)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@kind(refused=True)
def config_family(make: Maker) -> Path:
    folder = copied(make.good.hf, make.folder / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = make.rng.choice(
        ["vit", "", None, 7, ["dinov2"], "dinov2_with_registers", {}, "DINOV2", "x" * 10**5]
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@kind(refused=False)
def json_text(make: Maker) -> Path:
    """A JSON file of a folder that is none, or not one of an object."""
    folder = copied(make.good.hf, make.folder / "hf")
    name = make.rng.choice(["config.json", "config.json", "preprocessor_config.json"])
    good = (folder / name).read_bytes()
    texts = [
        b"",
        b"[]",
        b"7",
        b"null",
        b'"x"',
        b"{",
        good[:-3],
        b"\xef\xbb\xbf" + good,
        good.decode().encode("utf-16"),
        b"\xff",
    ]
    texts += [NESTED.encode(), b'{"a":' * 100_000, b'{"image_size": 1' + b"0" * 5000 + b"}", b"\0" * 100, good + good]
    (folder / name).write_bytes(make.rng.choice(texts))
    return folder


@kind(refused=False)
def preprocessor_values(make: Maker) -> Path:
    folder = copied(make.good.hf, make.folder / "hf")
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text())
    keys = ["image_std", "image_std", "image_mean", "crop_size", "size", "rescale_factor", "do_normalize", "resample"]
    values = [*ABSURD, [0.0, 0.0, 0.0], [0.5] * 5, ["a"] * 3, [float("nan")] * 3, [10**400] * 3, [True] * 3]
    config[make.rng.choice(keys)] = make.rng.choice(values)
    file.write_text(json.dumps(config))
    return folder


@kind(refused=True)
def shards(make: Maker) -> Path:
    folder = copied(make.good.hf, make.folder / "hf")
    shard, index = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / shard)
    header, _ = parts_of(folder / shard)
    keys = [key for key in header if key != "__metadata__"]
    place = make.rng.choice(
        ["../good.safetensors", "/etc/passwd", "missing.safetensors", index, "", ".", "..", 7, None, ["x"], "a/b",
        "x\0y",
         "config.json", f"./{shard}/", "x" * 300, "\udce9", str(folder / shard), "loop"]
    )  # fmt: skip
    (folder / "loop").symlink_to("loop")
    places: Any = dict.fromkeys(keys, place)
    if make.rng.random() < 0.2:
        places = make.rng.choice([{}, [], None, 7, {"absent": shard}, [shard], {"a": {"b": shard}}])
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@kind(refused=False)
def timm_folder(make: Maker) -> Path:
    folder = copied(make.good.hf, make.folder / "timm")
    for name in ("preprocessor_config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "model.safetensors").write_bytes(make.good.weights.read_bytes())
    config = {"architecture": "vit_small_patch14_dinov2", "model_args": {"num_heads": 1}, "pretrained_cfg": {}}
    where = make.rng.choice(["architecture", "model_args", "pretrained_cfg", "num_heads", "mean", "std", "input_size"])
    value = make.rng.choice([*ABSURD, [0.0, 0.0, 0.0], [0.5] * 5])
    if where == "num_heads":
        config["model_args"] = {where: value}
    elif where in ("mean", "std", "input_size"):
        config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, where: value}
    else:
        config[where] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@kind(refused=True)
def folder_without_weights(make: Maker) -> Path:
    what = make.rng.randrange(4)
    folder = make.folder / "model"
    folder.mkdir()
    if what == 1:
        (folder / "config.json").write_bytes((make.good.hf / "config.json").read_bytes())
    elif what == 2:
        for name in ("a.pth", "b.pth"):
            (folder / name).write_bytes(make.good.release.read_bytes())
    elif what == 3:
        (folder / "model.safetensors").mkdir()
    return folder


@kind(refused=True)
def run_folder(make: Maker) -> Path:
    """A run whose newest teacher or whose configuration is damaged."""
    teacher = make.folder / "run" / "eval" / make.rng.choice(["training_9", "training_x", "9", "training_٣"])
    teacher.mkdir(parents=True)
    content = make.rng.choice(
        [b"", b"\x80\x02", make.good.release.read_bytes()[:5000], b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."]
    )
    (teacher / "teacher_checkpoint.pth").write_bytes(content)
    (make.folder / "run" / "config.yaml").write_bytes(make.rng.choice([b"", b"[", b"\xff", NESTED.encode()]))
    return make.folder / "run"


@kind(refused=True)
def head_alone(make: Maker) -> Path:
    """A linear classifier, good or bad, where a backbone is asked for."""
    heads: list[dict[str, Any]] = [
        {"weight": torch.zeros(3, 128), "bias": torch.zeros(3)},
        {"weight": torch.zeros(3, 77), "bias": torch.zeros(2)},
        {"weight": torch.zeros(1).expand(10**12, 128), "bias": torch.zeros(1).expand(10**12)},
        {"weight": torch.zeros(3), "bias": 7},
        {"linear.weight": torch.zeros(3, 128)},
    ]
    return make.saved(make.rng.choice(heads))
