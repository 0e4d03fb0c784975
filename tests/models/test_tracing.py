"""A graph recorded or compiled at one size computes what the model does at others."""

import io

import pytest
import torch
from torch.testing import assert_close

from dinov2.models.vision_transformer import DinoVisionTransformer, vit_small
from tests.golden.loading import golden_tensors
from tests.golden.recipe import fill, images

REGISTERS = {"num_register_tokens": 2, "interpolate_offset": 0.0, "interpolate_antialias": True}
KINDS = {
    "plain": {},
    "registers": REGISTERS,
    "size rule": {"interpolate_offset": 0.0},
    "antialiased offset": {"interpolate_antialias": True},
}
RECORDED_AT = (2, 28, 42)
# One side native (with antialiasing and an offset only the other is resized), larger, native; another batch each time.
RUN_AT = [(1, 28, 56), (2, 56, 70), (3, 70, 84), (2, 56, 56)]
ONE_PATCH = (1, 14, 14)

# Tracing is on its way out of PyTorch, and people have traced models in use.
tracing = pytest.mark.filterwarnings("ignore:.*torch.jit.(trace|save|load)")


def tiny(**options) -> DinoVisionTransformer:
    settings = {"img_size": 56, "patch_size": 14, "embed_dim": 64, "depth": 2, "num_heads": 1, "block_chunks": 0}
    return fill(DinoVisionTransformer(**{**settings, "init_values": 1.0, **options})).eval()


@pytest.mark.parametrize("kind", KINDS)
@tracing
def test_a_traced_model_runs_at_other_sizes(kind):
    model = tiny(**KINDS[kind])
    traced = torch.jit.trace(model, (images(*RECORDED_AT),))
    with torch.no_grad():
        for size in (*RUN_AT, ONE_PATCH):
            assert_close(traced(images(*size)), model(images(*size)), atol=1e-5, rtol=0, msg=str(size))


@tracing
def test_a_traced_model_survives_a_file(tmp_path):
    model = tiny()
    torch.jit.save(torch.jit.trace(model, (images(*RECORDED_AT),)), tmp_path / "model.pt")
    with torch.no_grad():
        loaded = torch.jit.load(tmp_path / "model.pt")
        assert_close(loaded(images(3, 70, 84)), model(images(3, 70, 84)), atol=1e-5, rtol=0)


class Maps(torch.nn.Module):
    """What dense tasks read: maps and class tokens of the last two blocks."""

    def __init__(self, model: DinoVisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        pairs = self.model.get_intermediate_layers(x, n=2, reshape=True, return_class_token=True)
        return tuple(tensor for pair in pairs for tensor in pair)


class Masked(torch.nn.Module):
    """Tokens with masked patches."""

    def __init__(self, model: DinoVisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x, masks):
        return self.model.forward_features(x, masks)["x_norm_patchtokens"]


@tracing
def test_traced_maps_and_masks_have_the_shape_of_their_images():
    maps, masked = Maps(tiny(**REGISTERS)), Masked(tiny(**REGISTERS))
    traced_maps = torch.jit.trace(maps, (images(*RECORDED_AT),))
    traced_masked = torch.jit.trace(masked, (images(*RECORDED_AT), torch.rand(2, 6) > 0.5))
    x, masks = images(3, 70, 84), torch.rand(3, 30) > 0.5
    with torch.no_grad():
        for got, expected in zip(traced_maps(x), maps(x), strict=True):
            assert_close(got, expected, atol=1e-5, rtol=0)
        assert_close(traced_masked(x, masks), masked(x, masks), atol=1e-5, rtol=0)


def free(patch_size: int) -> dict[int, object]:
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "h", "w"))
    return {0: batch, 2: patch_size * height, 3: patch_size * width}


AUTOMATIC = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)


# A program takes two patches a side or more: whether memory is contiguous is another question with one.
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [free(14), AUTOMATIC], ids=["named", "automatic"])
def test_an_exported_program_runs_at_other_sizes(kind, axes):
    model = tiny(**KINDS[kind])
    # With gradients enabled, as users call it: what training does on short sequences must not enter the graph.
    program = torch.export.export(model, (images(*RECORDED_AT),), dynamic_shapes={"x": axes})
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "upsample" in name or "autocast" in name]
    with torch.no_grad():
        for size in RUN_AT:
            assert_close(program.module()(images(*size)), model(images(*size)), atol=1e-5, rtol=0, msg=str(size))


@pytest.mark.slow
def test_an_exported_program_survives_a_file():
    model = tiny(**REGISTERS)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (images(*RECORDED_AT),), dynamic_shapes={"x": free(14)}), file)
    file.seek(0)
    with torch.no_grad():
        loaded = torch.export.load(file).module()
        assert_close(loaded(images(3, 70, 84)), model(images(3, 70, 84)), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_compiled_model_runs_at_other_sizes():
    torch.compiler.reset()
    model = tiny()
    # Python is compiled, code is not generated: that takes half a minute.
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for size in (RECORDED_AT, *RUN_AT, ONE_PATCH):
            assert_close(compiled(images(*size)), model(images(*size)), atol=1e-5, rtol=0, msg=str(size))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "registers"])
def test_a_compiled_model_of_generated_code_runs_at_other_sizes(kind):
    torch.compiler.reset()
    model = tiny(**KINDS[kind])
    compiled = torch.compile(model, dynamic=True)
    with torch.no_grad():
        for size in ((3, 70, 84), RECORDED_AT, (2, 56, 56)):
            assert_close(compiled(images(*size)), model(images(*size)), atol=1e-5, rtol=0, msg=str(size))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "registers"])
@tracing
def test_vit_small_traced_at_one_size_equals_the_release_at_three(kind):
    golden = golden_tensors("backbone_vits14_reg" if kind == "registers" else "backbone_vits14")
    options = {**REGISTERS, "num_register_tokens": 4} if kind == "registers" else {}
    model = fill(vit_small(patch_size=14, img_size=518, init_values=1.0, block_chunks=0, **options)).eval()
    traced = torch.jit.trace(Maps(model), (images(1, 42, 56),), check_trace=False)
    with torch.no_grad():
        for batch, height, width in ((2, 224, 224), (2, 98, 154), (1, 518, 518)):
            *_, maps, cls = traced(images(batch, height, width))
            expected = golden[f"{height}x{width}.layer11.cls"]
            assert_close(cls, expected, atol=1e-4, rtol=0)
            assert_close(maps, Maps(model)(images(batch, height, width))[-2], atol=1e-4, rtol=0)
