"""Traced, compiled and exported models; `row n` counts the known defects of the stock classes."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.hf.model_cases import CLASSES, FAMILIES, NETWORKS, difference, images, our_model

pytestmark = [
    pytest.mark.parametrize("family", FAMILIES),
    # The framework and transformers on their own recorders and names, not on what is recorded.
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

EVERY_CLASS = pytest.mark.parametrize("kind", CLASSES)
EVERY_CLASS_SLOWLY = pytest.mark.parametrize(
    "kind", ["Model", *(pytest.param(kind, marks=pytest.mark.slow) for kind in CLASSES[1:])]
)
SIZES = ((40, 56), (32, 32), (24, 48), (64, 64))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


# Rows 1, 3, 4 and 8: recorded once, right at every size.
@EVERY_CLASS
@pytest.mark.parametrize("network, example", [("MLP", (32, 32)), ("SwiGLU", (40, 56))])
def test_the_documented_trace_recipe_runs_at_every_size(
    family: str, kind: str, network: str, example: tuple[int, int]
) -> None:
    model = our_model(family, kind, **NETWORKS[network])
    model.config.return_dict = False
    traced = torch.jit.trace(model, [images(1, *example)])
    with torch.no_grad():
        for size in SIZES:
            x = images(2, *size)
            assert difference(traced(x), model(x)) <= 1e-4


# Row 8.
def test_a_traced_model_with_all_its_outputs_is_saved_and_read_again(family: str) -> None:
    model = our_model(family, "Model", return_dict=False, output_hidden_states=True, output_attentions=True)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, [images()]), file)
    file.seek(0)
    found = torch.jit.load(file)(images(1, 64, 24))
    assert len(found) == 4
    assert difference(found, model(images(1, 64, 24))) <= 1e-4


# Row 6.
@EVERY_CLASS
def test_a_config_for_torchscript_gives_tuples_to_the_tracer(family: str, kind: str) -> None:
    model = our_model(family, kind)
    expected = model(images(1, 24, 48)).to_tuple()
    model.config.torchscript = True
    traced = torch.jit.trace(model, [images()])
    assert difference(traced(images(1, 24, 48)), expected) <= 1e-4


# Row 7.
@EVERY_CLASS
def test_tracing_that_is_not_strict_records_a_dictionary(family: str, kind: str) -> None:
    model = our_model(family, kind)
    traced = torch.jit.trace(model, [images()], strict=False)
    found, expected = traced(images(1, 24, 48)), model(images(1, 24, 48))
    assert found.keys() == expected.keys()
    assert difference(tuple(found.values()), expected.to_tuple()) <= 1e-4


# Row 47. The graph is what matters here; the default compiler has a test of its own.
@EVERY_CLASS_SLOWLY
def test_one_compiled_graph_answers_every_request(family: str, kind: str) -> None:
    model = our_model(family, kind, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for told in ({}, {"output_hidden_states": True, "output_attentions": True, "return_dict": False}):
            found, expected = compiled(images(1, 24, 48), **told), model(images(1, 24, 48), **told)
            assert type(found) is type(expected)
            assert difference(_values(found), _values(expected)) <= 1e-4
        assert difference(_values(compiled(images())), _values(model(images()))) <= 1e-4


@pytest.mark.slow
def test_the_default_compiler_agrees(family: str) -> None:
    model = our_model(family, "ForImageClassification", use_swiglu_ffn=family == "Dinov2", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(images()).logits, model(images()).logits) <= 1e-4
        assert difference(compiled(images(3, 24, 48)).logits, model(images(3, 24, 48)).logits) <= 1e-4


@pytest.mark.slow
@EVERY_CLASS
def test_an_exported_program_runs_at_every_size(family: str, kind: str) -> None:
    model = our_model(family, kind)
    sizes = {"pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)}
    program = torch.export.export(model, (images(2, 40, 56),), dynamic_shapes=sizes, strict=False)
    for size in SIZES:
        x = images(3, *size)
        assert difference(_values(program.module()(x)), _values(model(x))) <= 1e-4


# Row 67, and the plain family beside it.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Model", "ForImageClassification", "Backbone"])
def test_an_onnx_file_runs_at_every_size(family: str, kind: str, tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = our_model(family, kind, return_dict=False)
    path = tmp_path / "model.onnx"
    sizes = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(model, (images(2, 40, 56),), path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        x = images(3, *size)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        expected = model(x)[0]
        assert difference(found, expected[0] if kind == "Backbone" else expected) <= 1e-4


def _values(output: Any) -> tuple[Any, ...]:
    return tuple(output.values()) if hasattr(output, "values") else output
