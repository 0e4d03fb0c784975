"""Weight files: read safely, loaded strictly, written whole, and each architecture rebuilt from its table."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dinov2.checkpoints.files import read_file, save_teacher
from dinov2.checkpoints.load import load_into
from dinov2.checkpoints.open import checkpoint_from
from dinov2.errors import DinoError, WeightsError
from dinov2.models.config import BackboneConfig, ratio_for
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.loading import golden_json
from tests.golden.recipe import fill, images

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = golden_json("backbone_tiny")["constructor"]


def tiny(variant: str = "plain_mlp", **changes) -> DinoVisionTransformer:
    return fill(DinoVisionTransformer(**{**TINY[variant], **changes})).eval()


def small(**changes) -> DinoVisionTransformer:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "block_chunks": 0}
    return fill(DinoVisionTransformer(**{**options, **changes})).eval()


def as_teacher(model: DinoVisionTransformer) -> dict[str, torch.Tensor]:
    """A training's teacher: backbone and a head."""
    tensors = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    return {**tensors, "dino_head.last_layer.weight_v": torch.ones(4, 2)}


# Tables.


@pytest.mark.parametrize("variant", TINY)
def test_a_model_rebuilt_from_its_table_computes_the_same(variant):
    model = tiny(variant)
    rebuilt = BackboneConfig.from_model(model).build().eval()
    report = load_into(rebuilt, model.state_dict())
    assert report.matched == len(model.state_dict()) and report.resized == () and report.dropped == ()
    patch = TINY[variant]["patch_size"]
    for rows, columns in ((7, 7), (5, 8)):  # the second size resizes positions, by the rule of the table
        x = images(2, rows * patch, columns * patch)
        with torch.no_grad():
            assert torch.equal(rebuilt(x), model(x))


@pytest.mark.parametrize(
    "options",
    [
        {"in_chans": 5},
        {"img_size": (32, 48)},
        {"mlp_ratio": 61 / 64},
        {"ffn_layer": "identity"},
        {"ffn_layer": "swiglu", "mlp_ratio": 2.7},
        {"num_register_tokens": 1, "interpolate_offset": 0.25},
    ],
)
def test_unusual_options_survive_the_table(options):
    model = small(**options)
    table = BackboneConfig.from_model(model, mean=(0.5,), std=(0.25,))
    assert (table.mean, table.std) == ((0.5,), (0.25,))
    assert BackboneConfig.from_table(table.table()) == table
    rebuilt = table.build()
    assert BackboneConfig.from_model(rebuilt, mean=(0.5,), std=(0.25,)) == table
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_ratio_gives_back_exactly_the_hidden_width():
    for width in (192, 384, 448, 1536):
        assert all(int(width * ratio_for(hidden, width)) == hidden for hidden in range(1, 4 * width + 1))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"version": 2}, "has version 2, this package reads 1; update the package"),
        ({"version": None}, "has version None"),
        ({"depth": None}, "describes no model"),
        ({"ffn_layer": "mixer"}, "describes no model (ffn_layer is 'mixer'"),
        ({"patch_size": 0}, "describes no model"),
        ({"num_heads": 0}, "describes no model"),
        ({"img_size": 32}, "describes no model"),
        ("embed_dim", "describes no model ('embed_dim' is missing)"),
        ("img_size", "describes no model ('img_size' is missing)"),
    ],
)
def test_a_table_that_describes_no_model_is_refused(change, reason):
    table = BackboneConfig.from_model(small()).table()
    table = {**table, **change} if isinstance(change, dict) else {k: v for k, v in table.items() if k != change}
    with pytest.raises(WeightsError) as refusal:
        BackboneConfig.from_table(table).build()
    assert reason in str(refusal.value)


# Loading.


WRAPPINGS = {
    "bare": lambda s: s,
    "teacher file": lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()}, "model": {"version": 1}},
    "teacher keys": lambda s: {f"teacher.backbone.{k}": v for k, v in s.items()},
    "student beside teacher": lambda s: {
        f"{who}.backbone.{k}": v if who == "teacher" else v + 1 for who in ("student", "teacher") for k, v in s.items()
    },
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": {f"teacher.backbone.{k}": v for k, v in s.items()}, "optimizer": {"state": {}}},
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled module": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_backbones_are_found_in_every_wrapping(wrapping):
    model = small()
    checkpoint = checkpoint_from(WRAPPINGS[wrapping](model.state_dict()), "w.pth")
    state = checkpoint.state
    assert checkpoint.dropped == () and list(state) == list(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_heads_are_left_out_and_counted():
    model = small()
    report = load_into(small(), as_teacher(model))
    assert report.dropped == ("dino_head.last_layer.weight_v",)
    assert str(report) == f"{report.matched} tensors loaded; 1 of projection heads left out"


@pytest.mark.parametrize("of_file, of_model", [(0, 2), (2, 0), (1, 2)])
def test_flat_and_chunked_blocks_load_into_each_other(of_file, of_model):
    source, target = small(block_chunks=of_file), small(block_chunks=of_model)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    load_into(target, source.state_dict())
    x = images(1, 32, 32)
    with torch.no_grad():
        assert torch.equal(source(x), target(x))


def test_only_the_position_grid_may_differ_and_is_resized():
    model = small(img_size=48)
    report = load_into(model, small().state_dict())
    assert report.resized == ("pos_embed 16 -> 36 patches",)
    assert "resized: pos_embed" in str(report)
    assert torch.equal(model.pos_embed[:, :1], small().pos_embed[:, :1])
    with pytest.raises(WeightsError, match="a position grid of 12 patches, which is not square"):
        load_into(model, {**small().state_dict(), "pos_embed": torch.zeros(1, 13, 64)}, source="w.pth")


@pytest.mark.parametrize(
    "file, model, reason",
    [
        ({"num_register_tokens": 4}, {}, "unexpected register_tokens. The file is of a model with registers: set "),
        ({}, {"num_register_tokens": 4}, "missing register_tokens. The file is of a model without registers: set "),
        ({"ffn_layer": "swiglu"}, {}, "One of the two has a SwiGLU feed-forward network: check student.ffn_layer"),
        ({}, {"ffn_layer": "swiglu"}, "One of the two has a SwiGLU feed-forward network: check student.ffn_layer"),
        ({"depth": 3}, {}, "unexpected blocks.2.norm1.weight"),
        ({"depth": 3}, {}, "The depths differ: check student.arch"),
        ({}, {"depth": 3}, "The depths differ: check student.arch"),
        ({"depth": 4, "block_chunks": 2}, {"depth": 2}, "The depths differ: check student.arch"),
        ({"init_values": 1.0}, {}, "One of the two has no LayerScale: check student.layerscale"),
        ({}, {"qkv_bias": False}, "Check student.ffn_layer, qkv_bias, proj_bias and ffn_bias"),
        ({"patch_size": 16}, {"img_size": 16}, "patch_embed.proj.weight is [64, 3, 16, 16], wanted [64, 3, 8, 8]"),
        ({"in_chans": 1}, {}, "Check student.arch, patch_size and in_chans"),
        ({"embed_dim": 128}, {}, "cls_token is [1, 1, 128], wanted [1, 1, 64]"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_likely_cause(file, model, reason):
    target = small(**model)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError, match=r"w\.pth does not fit this model") as refusal:
        load_into(target, small(**file).state_dict(), source="w.pth")
    assert reason in str(refusal.value)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_other_kinds_of_files_are_refused_with_the_likely_cause():
    with pytest.raises(WeightsError, match="w.pth holds no backbone weights"):
        load_into(small(), {}, source="w.pth")
    with pytest.raises(WeightsError, match="looks like a linear head, not a backbone"):
        load_into(small(), {"weight": torch.zeros(10, 64), "bias": torch.zeros(10)})
    for key, family in (
        ("decoder_pos_embed", "MAE"),
        ("dist_token", "DeiT"),
        ("blocks.0.attn.qkv.lora_A.weight", "LoRA"),
    ):
        with pytest.raises(WeightsError, match=family):
            load_into(small(), {**small().state_dict(), key: torch.zeros(1)})


def test_weights_without_a_mask_token_get_zeros():
    model, state = small(), small().state_dict()
    del state["mask_token"]
    assert load_into(model, state).notes == ("mask_token: zeros, the source has none",)
    assert not bool(model.mask_token.any()) and torch.equal(model.norm.weight, small().norm.weight)


# Reading.


class Code:
    """Would create a file when it is unpickled."""

    def __reduce__(self):
        return open, ("code has run", "w")


def test_both_formats_are_read(tmp_path):
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "w.safetensors", metadata={"model": '{"depth": 3}'})
    save_file(state, tmp_path / "other.safetensors", metadata={"model": "a name"})
    assert torch.equal(read_file(tmp_path / "w.pth")["a"], state["a"])
    assert torch.equal(read_file(str(tmp_path / "old.pth"))["a"], state["a"])
    assert read_file(tmp_path / "w.safetensors")["model"] == {"depth": 3}
    assert "model" not in read_file(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "value", [Code(), {"teacher": Code()}, torch.nn.Linear(2, 2)], ids=["code", "nested", "module"]
)
@pytest.mark.parametrize("by", ["torch", "old torch", "pickle"])
def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path, monkeypatch, value, by):
    monkeypatch.chdir(tmp_path)
    match by:
        case "torch":
            torch.save(value, "w.pth")
        case "old torch":
            torch.save(value, "w.pth", _use_new_zipfile_serialization=False)
        case "pickle":
            Path("w.pth").write_bytes(pickle.dumps(value))
    with pytest.raises(WeightsError, match="holds Python objects besides tensors and was refused"):
        read_file("w.pth")
    assert os.listdir() == ["w.pth"]


def test_any_damage_is_a_weights_error(tmp_path):
    """Cut anywhere, or with wrong bytes in its first part: whatever the readers raise, one sentence comes out."""
    state = small(depth=1).state_dict()
    torch.save(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "w.safetensors")
    generator = torch.Generator().manual_seed(0)

    def number(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    refused: list[str] = []
    for file in [tmp_path / name for name in ("w.pth", "old.pth", "w.safetensors")]:
        data = file.read_bytes()
        for attempt in range(60):
            damaged = bytearray(data[: number(len(data))] if attempt % 2 else data)
            for _ in range(5 * (attempt % 3)):
                damaged[number(min(len(damaged), 900))] = number(256)
            broken = tmp_path / f"broken{file.suffix}"
            broken.write_bytes(damaged)
            try:
                assert isinstance(read_file(broken), dict)  # what was hit does not matter to a reader
            except WeightsError as error:
                refused.append(str(error))
    assert len(refused) > 120
    assert all(f"{tmp_path / 'broken'}." in sentence for sentence in refused)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is no weight file (or only a part of one); download or copy it again"),
        (b"P", "is no weight file"),
        (b"<!DOCTYPE html><title>404</title>", "is no weight file"),
        (b"GLOBAL Unsupported cos\nsystem\n", "is no weight file"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_text_under_the_name_of_a_weight_file_is_refused(tmp_path, content, reason, suffix):
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsError) as refusal:
        read_file(file)
    assert f"{file} {reason}" in str(refusal.value)


def test_what_is_no_file_or_no_dictionary_is_refused(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="there is no weight file .*nowhere.pth; check the path"):
        read_file(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="is a folder; give the weight file in it"):
        read_file(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list, not a dictionary of tensors"):
        read_file(tmp_path / "list.pth")

    def forbidden(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", forbidden)  # root may read everything
    with pytest.raises(WeightsError, match=r"list.pth cannot be read \(Permission denied\); check its permissions"):
        read_file(tmp_path / "list.pth")


# Writing.


@pytest.mark.parametrize("variant", ["plain_mlp", "plain_mlp_chunked", "plain_bare", "reg_swiglu_chunked"])
def test_a_teacher_is_written_as_the_release_does_and_as_safetensors_beside_it(tmp_path, variant):
    model = tiny(variant)
    teacher, table = as_teacher(model), BackboneConfig.from_model(model, mean=[0.5] * 3, std=[0.2] * 3)
    file = tmp_path / "eval" / "training_0" / "teacher_checkpoint.pth"
    save_teacher(file, teacher, table)
    assert sorted(path.name for path in file.parent.iterdir()) == ["backbone.safetensors", "teacher_checkpoint.pth"]

    content = torch.load(file, weights_only=True)
    assert list(content) == ["teacher", "model", "checksum"] and content["model"] == table.table()
    assert list(content["teacher"]) == list(teacher)  # chunked keys stay, as released training files have them
    with safe_open(file.with_name("backbone.safetensors"), framework="pt") as beside:
        flat = DinoVisionTransformer(**{**TINY[variant], "block_chunks": 0}).state_dict()
        assert set(beside.keys()) == set(flat)

    for path in (file, file.with_name("backbone.safetensors")):
        rebuilt = BackboneConfig.from_table(read_file(path)["model"]).build().eval()
        load_into(rebuilt, read_file(path))
        x = images(1, 98, 98)
        with torch.no_grad():
            assert torch.equal(rebuilt(x), model(x))


def test_a_write_that_fails_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "teacher_checkpoint.pth"
    save_teacher(file, as_teacher(small()), BackboneConfig.from_model(small()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(value, path):
        Path(path).write_bytes(b"PK half of it")
        raise RuntimeError("[enforce fail at inline_container.cc:815] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        DinoError, match="teacher_checkpoint.pth could not be written .the disk may be full.; free some"
    ):
        save_teacher(file, as_teacher(small(depth=3)), BackboneConfig.from_model(small(depth=3)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "eval").write_text("in the way")
    with pytest.raises(DinoError, match="could not be written"):
        save_teacher(
            tmp_path / "eval" / "training_0" / "t.pth", as_teacher(small()), BackboneConfig.from_model(small())
        )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
@pytest.mark.parametrize("limit, file", [(10_000, "t.pth"), (450_000, "backbone.safetensors")])
def test_a_disk_that_is_really_full_is_one_sentence_for_either_file(tmp_path, limit, file):
    """A limit on file sizes fails in the same places of the writers as a full disk."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import types, torch
from dinov2.errors import DinoError
from dinov2.checkpoints.files import save_teacher
shared = torch.zeros(100_000)  # 400 kB, which torch writes once and safetensors twice
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    no_config = types.SimpleNamespace(table=dict)
    save_teacher({str(tmp_path / "t.pth")!r}, {{"backbone.a": shared, "backbone.b": shared}}, no_config)
except DinoError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert f"{tmp_path / file} could not be written" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ([] if file == "t.pth" else ["t.pth"])
