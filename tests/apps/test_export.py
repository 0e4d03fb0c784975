"""Exported files compute what the model computes, at any size, and nothing else is left behind."""

import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dinov2.apps import export as exporting
from dinov2.apps import export_files
from dinov2.apps.export import ExportComparison, ExportReport, export, export_backbone
from dinov2.apps.export_files import open_onnx, open_program
from dinov2.checkpoints.files import save_teacher
from dinov2.errors import ConfigError, DinoError, MissingDependency, WeightsError
from dinov2.models.config import BackboneConfig
from dinov2.models.heads import LinearHead, linear_logits
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_small
from tests.golden.recipe import fill, images

REGISTERS = {"num_register_tokens": 4, "interpolate_offset": 0.0, "interpolate_antialias": True}
SIZES = [(1, 224, 224), (1, 518, 518), (3, 98, 154)]


def tiny(**options) -> DinoVisionTransformer:
    settings = {"img_size": 518, "patch_size": 14, "embed_dim": 64, "depth": 1, "num_heads": 1, "block_chunks": 0}
    return fill(DinoVisionTransformer(**{**settings, "init_values": 1.0, **options})).eval()


def classifier(layers: int) -> tuple[DinoVisionTransformer, LinearHead]:
    return tiny(depth=layers, img_size=56), fill(LinearHead(64, layers=layers, num_classes=10)).eval()


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def all_tokens(model: DinoVisionTransformer, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"cls": model(x), "tokens": model.norm(model.forward_features(x)["x_prenorm"])}


@pytest.fixture(scope="module")
def registers(tmp_path_factory) -> tuple[DinoVisionTransformer, ExportReport]:
    """A small model with registers and its file, with what int8 makes of it."""
    model, folder = tiny(**REGISTERS), tmp_path_factory.mktemp("export")
    facts = {"mean": [0.5, 0.25, 0.125], "licence": "Apache-2.0"}
    return model, export_backbone(model, folder / "m.onnx", facts=facts, int8=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, REGISTERS], ids=["plain", "registers"])
def test_one_onnx_file_of_vit_small_equals_pytorch_at_three_sizes(tmp_path, options):
    model = fill(vit_small(patch_size=14, img_size=518, init_values=1.0, block_chunks=0, **options)).eval()
    report = export_backbone(model, tmp_path / "s.onnx", check_sizes=[(42, 56)])
    run = open_onnx(report.path)
    for size in SIZES:
        x = images(*size)
        for name, expected in all_tokens(model, x).items():
            assert_close(run(x)[name], expected, atol=1e-4, rtol=0, msg=lambda text, at=(size, name): f"{at}: {text}")


@pytest.mark.slow
def test_a_small_file_equals_pytorch_at_other_sizes_and_batches(registers):
    model, report = registers
    run = open_onnx(report.path)
    for size in [*SIZES, (2, 28, 700), (5, 14, 14)]:
        x = images(*size)
        for name, expected in all_tokens(model, x).items():
            assert_close(run(x)[name], expected, atol=1e-5, rtol=0, msg=f"{name} at {size}")


@pytest.mark.slow
def test_the_file_says_what_it_is_and_not_where_it_was_made(registers):
    import onnx

    _, report = registers
    content = onnx.load(report.path)
    onnx.checker.check_model(content, full_check=True)
    metadata = {entry.key: entry.value for entry in content.metadata_props}
    assert json.loads(metadata["patch_size"]) == 14 and json.loads(metadata["num_register_tokens"]) == 4
    assert json.loads(metadata["mean"]) == [0.5, 0.25, 0.125] and metadata["licence"] == "Apache-2.0"
    assert "multiples of 14" in metadata["input"] and json.loads(metadata["outputs"]) == ["cls", "tokens"]
    assert not {"Resize", "Upsample"} & {node.op_type for node in content.graph.node}
    assert content.opset_import[0].version == 20
    assert str(Path(exporting.__file__).parent).encode() not in report.path.read_bytes()


@pytest.mark.slow
def test_the_report_compares_native_flat_and_usual_sizes_with_one_and_three_images(registers):
    _, report = registers
    assert [found.size for found in report.comparisons] == [(1, 224, 224), (3, 98, 154), (1, 518, 518)]
    assert all(0 < error < 1e-5 for found in report.comparisons for error in found.errors.values())
    assert report.outputs == ("cls", "tokens") and report.size_bytes == report.path.stat().st_size


@pytest.mark.slow
def test_int8_is_written_beside_it_and_measured(registers):
    import onnx

    model, report = registers
    assert files_of(report.path.parent) == ["m.int8.onnx", "m.onnx"]
    assert report.int8.path == report.path.with_name("m.int8.onnx")
    assert report.int8.size_bytes == report.int8.path.stat().st_size < report.size_bytes
    assert min(report.int8.milliseconds.values()) > 0
    x = images(3, 98, 154)
    got, expected = open_onnx(report.int8.path)(x)["cls"], all_tokens(model, x)["cls"]
    cosine = torch.nn.functional.cosine_similarity(got, expected).min()
    assert 0.99 < cosine < 0.9999999  # coarser, and close
    assert set(report.int8.cosine) == set(report.int8.relative_l2) == {"cls", "patches"}
    assert all(0.99 < value < 1 for value in report.int8.cosine.values())
    assert all(0 < value < 0.15 for value in report.int8.relative_l2.values())
    metadata = {entry.key for entry in onnx.load(report.int8.path).metadata_props}
    assert {"patch_size", "mean", "precision"} <= metadata and not any("quant" in key for key in metadata)


@pytest.mark.slow
@pytest.mark.parametrize("layers, name", [(1, "c.onnx"), (4, "c.onnx"), (1, "c.pt2"), (4, "c.pt2")])
def test_a_classifier_gives_its_logits(tmp_path, layers, name):
    model, head = classifier(layers)
    # int8 of a classifier is a case of its own for the quantiser: its last product has a transposed weight.
    report = export_backbone(model, tmp_path / name, head=head, int8=name == "c.onnx")
    assert report.outputs == ("logits",)
    run = open_onnx(report.path) if name == "c.onnx" else open_program(report.path)
    x = images(2, 42, 84)
    with torch.no_grad():
        assert_close(run(x)["logits"], linear_logits(model, head, x), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_program_equals_pytorch_and_carries_its_facts(tmp_path):
    model = tiny()
    report = export_backbone(model, tmp_path / "m.pt2", outputs="tokens", facts={"std": [0.5]})
    x = images(2, 70, 28)
    found = open_program(report.path)(x)
    assert list(found) == ["tokens"]
    assert_close(found["tokens"], all_tokens(model, x)["tokens"], atol=1e-5, rtol=0)
    extra = {"dinov2.json": ""}
    torch.export.load(report.path, extra_files=extra)
    assert json.loads(extra["dinov2.json"])["std"] == [0.5]
    assert str(Path(exporting.__file__).parent).encode() not in report.path.read_bytes()
    assert files_of(tmp_path) == ["m.pt2"]


@pytest.mark.slow
def test_a_model_in_training_and_half_precision_is_exported_as_a_copy(tmp_path):
    model = tiny(img_size=56, drop_path_rate=0.5).bfloat16().train()
    report = export_backbone(model, tmp_path / "m.pt2", outputs="cls")
    assert model.training and model.pos_embed.dtype == torch.bfloat16
    x = images(1, 56, 28)
    with torch.no_grad():
        expected = tiny(img_size=56).bfloat16().float()(x)
    assert_close(open_program(report.path)(x)["cls"], expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export_files, "_LARGEST_FILE", 1000)
    model = tiny(img_size=56)
    report = export_backbone(model, tmp_path / "m.onnx", int8=True)
    names = files_of(tmp_path)
    assert {"m.onnx", "m.onnx.data", "m.int8.onnx"} <= set(names) and len(names) == 4
    assert report.size_bytes == sum((tmp_path / name).stat().st_size for name in ("m.onnx", "m.onnx.data"))
    x = images(1, 28, 42)
    assert_close(open_onnx(report.path)(x)["cls"], all_tokens(model, x)["cls"], atol=1e-5, rtol=0)
    assert open_onnx(report.int8.path)(x)["cls"].isfinite().all()


@pytest.mark.slow
def test_a_weight_file_becomes_a_file_named_after_it_with_its_normalisation(here):
    model = tiny(img_size=56)
    table = BackboneConfig.from_model(model, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    save_teacher(here / "mine.pth", {f"backbone.{key}": value for key, value in model.state_dict().items()}, table)
    (here / "out").mkdir()
    report = export(here / "mine.pth", output="out", format="torch", json_file="summary.json")
    assert report.path == Path("out/mine.pt2") and report.path.is_file()
    summary = json.loads((here / "summary.json").read_text())
    assert summary["metadata"]["mean"] == [0.1, 0.2, 0.3] and summary["metadata"]["std"] == [0.4, 0.5, 0.6]
    assert len(summary["metadata"]["sha256"]) == 64 and "licence" not in summary["metadata"]
    assert summary["comparisons"][0]["errors"]["cls"] == report.comparisons[0].errors["cls"]


@pytest.mark.slow
def test_other_operator_sets_and_gated_networks_are_written_without_remarks(tmp_path, capsys, caplog):
    import onnx

    model = tiny(img_size=56, ffn_layer="swiglufused")
    report = export_backbone(model, tmp_path / "m.onnx", opset=18, outputs="cls")
    assert onnx.load(report.path).opset_import[0].version == 18
    assert max(found.errors["cls"] for found in report.comparisons) < 1e-5
    with pytest.raises(ConfigError, match="cannot be written in ONNX opset 99, only in 18; ask for 18"):
        export_backbone(model, tmp_path / "new.onnx", opset=99)
    assert files_of(tmp_path) == ["m.onnx"]
    assert (
        "".join(capsys.readouterr()) == "" and [record.name for record in caplog.records if "onnx" in record.name] == []
    )


# What is refused: nothing is recorded for these, or the recording is replaced.


@pytest.fixture
def recorded_wrongly(monkeypatch):
    """Files that are written at once and compute something else."""
    monkeypatch.setattr(exporting, "write_onnx", lambda model, example, path, **options: path.write_bytes(b"new"))

    def open_wrong(path):
        assert path.read_bytes() == b"new"
        return lambda x: {"cls": tiny(img_size=56)(x).detach() + 3e-4}

    monkeypatch.setattr(exporting, "open_onnx", open_wrong)


def test_a_file_that_differs_is_not_kept_and_the_one_before_it_is(tmp_path, recorded_wrongly):
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(DinoError) as refusal:
        export_backbone(tiny(img_size=56), tmp_path / "m.onnx", outputs="cls", tolerance=1e-5)
    assert "was not kept: its cls differs from PyTorch's by 3.0e-04" in str(refusal.value)
    assert "1e-05 of the largest value" in str(refusal.value) and "--tolerance" in str(refusal.value)
    assert files_of(tmp_path) == ["m.onnx"] and (tmp_path / "m.onnx").read_bytes() == b"old"


def test_a_tolerance_that_allows_it_keeps_the_file(tmp_path, recorded_wrongly):
    report = export_backbone(tiny(img_size=56), tmp_path / "new" / "m.onnx", outputs="cls", tolerance=1e-3)
    assert report.path.read_bytes() == b"new" and files_of(report.path.parent) == ["m.onnx"]


@pytest.mark.parametrize("error, exceeds", [(1e-4, False), (2.1e-4, True), (float("nan"), True)])
def test_the_tolerance_is_relative_to_large_values(error, exceeds):
    assert ExportComparison((1, 28, 28), {"cls": error}, {"cls": 2.0}).exceeds(1e-4) is exceeds
    assert ExportComparison((1, 28, 28), {"cls": 1.1e-4}, {"cls": 0.01}).exceeds(1e-4)


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, name):
    def refuse(model, example, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "write_onnx", refuse)
    monkeypatch.setattr(exporting, "write_program", lambda program, path, metadata: refuse(program, None, path))
    monkeypatch.setattr(torch.export, "export", lambda *arguments, **options: None)
    with pytest.raises(DinoError, match=f"{name} could not be written .No space left on device."):
        export_backbone(tiny(img_size=56), tmp_path / name)
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("missing", [["onnx"], ["onnxscript", "onnxruntime"]])
def test_missing_packages_are_named_with_the_extra(tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency) as refusal:
        export_backbone(tiny(), tmp_path / "m.onnx")
    said = str(refusal.value)
    assert "extra `export`" in said and "pip install '" + missing[0] in said
    assert all(f"'{name}>=" in said for name in missing)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("m.pth", {}, "end it in .onnx or .pt2"),
        ("m.onnx", {"format": "torch"}, "wrong ending for the format torch; end it in .pt2"),
        ("m.onnx", {"format": "tflite"}, "the format is 'tflite'; write onnx or torch"),
        ("m.onnx", {"outputs": "logits"}, "no classifier and so no logits"),
        ("m.onnx", {"outputs": "patches"}, "choose one of cls, tokens, both, logits"),
        ("m.onnx", {"check_sizes": [(224, 225)]}, "is 1x224x225; .* multiples of the patch size 14"),
        ("m.onnx", {"check_sizes": [(1, 14, 28)]}, "two patches or more"),
        ("m.onnx", {"check_sizes": [(0, 28, 28)]}, "is 0x28x28"),
        ("m.onnx", {"opset": 17}, "opset 17 lacks operators of this graph; the oldest that has them is 18"),
        ("m.pt2", {"int8": True}, "int8 is made by onnxruntime"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(tmp_path, name, options, words):
    with pytest.raises(ConfigError, match=words):
        export_backbone(tiny(img_size=56), tmp_path / name, **options)
    assert files_of(tmp_path) == []


def test_a_model_of_another_library_is_refused(here, monkeypatch):
    monkeypatch.setattr(exporting, "load", lambda *_, **__: SimpleNamespace(backbone=nn.Identity(), name="timm:other"))
    with pytest.raises(ConfigError, match="timm:other is a model of another library; export it with that library"):
        export("timm:other", output="m.onnx")


def test_a_head_of_another_width_is_refused(here):
    torch.save(tiny(img_size=56).state_dict(), "w.pth")
    torch.save(LinearHead(384).state_dict(), "head.pth")
    with pytest.raises(WeightsError, match="head.pth reads 768 features"):
        export("w.pth", output="m.pt2", head="head.pth")
    assert not Path("m.pt2").exists()


def test_weights_that_are_not_finite_are_named_as_the_cause(here):
    model = vit_small(img_size=28, patch_size=14, depth=1, embed_dim=64, num_heads=1, block_chunks=0)
    model.norm.weight.data[0] = float("nan")
    torch.save(model.state_dict(), "w.pth")
    with pytest.raises(WeightsError, match=r"1 of \d+ tensors of w.pth hold values that are not finite \(first no"):
        export("w.pth", output="w.pt2")
    assert not Path("w.pt2").exists()
