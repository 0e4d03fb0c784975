"""Key maps of other libraries: complete for every released size, exact in both directions."""

import hashlib

import pytest
import torch
from torch import Tensor

from dinov2.checkpoints.adapters import (
    flat_key,
    from_original,
    layout_of,
    release_order,
    split_classifier,
    to_original,
)
from dinov2.checkpoints.adapters.huggingface import with_classifier
from dinov2.errors import WeightsError
from tests.golden.loading import golden_json
from tests.models.tiny_backbones import tiny

NAMES = {
    f"vit{letter}14{reg}": f"dinov2-{'with-registers-' if reg else ''}{size}"
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
    for reg in ("", "_reg")
}
VARIANTS = {
    "plain": {},
    "registers": {"num_register_tokens": 4},
    "swiglu": {"ffn_layer": "swiglufused"},
    "swiglu with registers": {"ffn_layer": "swiglufused", "num_register_tokens": 2},
    "without biases": {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
    "without LayerScale": {"init_values": None},
    "no square": {"img_size": (42, 70), "num_register_tokens": 1},
}


def released(name: str) -> dict[str, Tensor]:
    """The keys and shapes of a released file, without the numbers."""
    return {key: torch.empty(shape, device="meta") for key, shape in golden_json(f"backbone_{name}.keys").items()}


def digest(state: dict[str, Tensor]) -> str:
    lines = sorted(f"{key} {'x'.join(str(side) for side in value.shape)}" for key, value in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def in_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that Hugging Face's classes have had since version 5.18."""
    new = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "mlp.weights_out": "mlp.down_proj",
    }
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".mlp.weights_in." in key:
            for name, part in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True):
                result[key.replace("weights_in", name)] = part
            continue
        for ours, theirs in new.items():
            key = key.replace(ours, theirs)
        result[key] = value
    return result


@pytest.mark.parametrize("name", NAMES)
def test_every_released_size_has_the_keys_and_shapes_of_hugging_faces_files(name):
    golden = golden_json("hf_keys")["file"]
    state = from_original(released(name), "hf").state
    assert len(state) == golden[NAMES[name]]["tensors"]
    assert digest(state) == golden[NAMES[name]]["sha256"]
    dim = state["layernorm.weight"].shape[0]
    head = {"weight": torch.empty(1000, 2 * dim, device="meta"), "bias": torch.empty(1000, device="meta")}
    classifier = with_classifier(state, head, registers="_reg" in name)
    assert digest(classifier) == golden[f"{NAMES[name]}-imagenet1k-1-layer"]["sha256"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["hf", "timm", "original"])
def test_every_released_size_comes_back_with_its_keys_in_the_released_order(name, layout):
    state = released(name)
    there = from_original(state, layout).state
    assert layout_of(there) == layout
    back = to_original(there, layout).state
    assert [(key, value.shape) for key, value in back.items()] == [(key, value.shape) for key, value in state.items()]


def test_the_names_in_memory_are_those_of_the_golden_table():
    """So that `in_memory`, by which reading them is tested, is no invention."""
    golden = golden_json("hf_keys")["memory_5_18"]
    for name, theirs in NAMES.items():
        if theirs in golden:
            assert digest(in_memory(from_original(released(name), "hf").state)) == golden[theirs]["sha256"]


@pytest.mark.parametrize("name", ["vits14", "vits14_reg", "vitg14"])
def test_timm_has_the_published_number_of_tensors_and_no_mask_token(name):
    state = from_original(released(name), "timm").state
    assert len(state) == {"vits14": 174, "vits14_reg": 175, "vitg14": 566}[name]
    assert "mask_token" not in state and ("reg_token" in state) == ("_reg" in name)
    assert state["pos_embed"].shape[1] == (1369 if "_reg" in name else 1370)
    assert not any("w12" in key or "w3." in key for key in state)


@pytest.mark.parametrize("variant", ["plain", "registers", "swiglu", "no square"])
@pytest.mark.parametrize("newer", [False, True])
def test_the_way_to_hugging_face_and_back_changes_no_bit(variant, newer):
    state = tiny(**VARIANTS[variant]).state_dict()
    there, notes = from_original(state, "hf")
    assert notes == ()
    back, notes = to_original(in_memory(there) if newer else there, "hf")
    assert notes == () and list(back) == list(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize("variant", ["without biases", "without LayerScale"])
def test_parts_that_hugging_face_always_has_are_filled_in_so_that_nothing_changes(variant):
    state = tiny(**VARIANTS[variant]).state_dict()
    there, notes = from_original(state, "hf")
    assert len(notes) == 1 and "added, which Hugging Face always has" in notes[0]
    back = to_original(there, "hf").state
    assert all(torch.equal(back[key], value) for key, value in state.items())
    added = {key: value for key, value in back.items() if key not in state}
    assert added and all(bool((value == (1 if key.endswith("gamma") else 0)).all()) for key, value in added.items())


@pytest.mark.parametrize("variant", ["plain", "swiglu", "without biases"])
def test_timm_without_registers_loses_nothing_but_the_mask_token(variant):
    state = tiny(**VARIANTS[variant]).state_dict()
    there, notes = from_original(state, "timm")
    assert notes == ("mask_token: left out, timm has none",)
    back, notes = to_original(there, "timm")
    assert notes == ("mask_token: zeros, the source has none",)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], value) for key, value in state.items() if key != "mask_token")
    assert not back["mask_token"].any()


@pytest.mark.parametrize("variant", ["registers", "swiglu with registers"])
def test_timm_with_registers_holds_the_sum_of_class_token_and_its_position(variant):
    state = tiny(**VARIANTS[variant]).state_dict()
    there, notes = from_original(state, "timm")
    assert any(note.startswith("cls_token: the sum") for note in notes)
    assert torch.equal(there["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(there["pos_embed"], state["pos_embed"][:, 1:])
    back, notes = to_original(there, "timm")
    assert any(note.startswith("cls_token: holds the sum") for note in notes)
    assert not back["pos_embed"][:, 0].any()
    assert torch.equal(back["pos_embed"][:, 1:], state["pos_embed"][:, 1:])


def test_half_precision_weights_keep_their_sum_exact():
    state = {key: value.bfloat16() for key, value in tiny(num_register_tokens=2).state_dict().items()}
    there = from_original(state, "timm").state
    assert there["cls_token"].dtype == torch.float32 and there["reg_token"].dtype == torch.bfloat16
    expected = state["cls_token"].double() + state["pos_embed"][:, :1].double()
    torch.testing.assert_close(there["cls_token"].double(), expected, rtol=1e-7, atol=0)


def test_one_switch_of_timm_covers_the_biases_of_two_layers():
    there, notes = from_original(tiny(ffn_bias=False).state_dict(), "timm")
    assert "biases of zero added, which timm always has" in notes
    assert not there["blocks.0.mlp.fc1.bias"].any() and there["blocks.0.attn.proj.bias"].any()


@pytest.mark.parametrize("layout", ["hf", "timm"])
def test_a_transformer_without_feed_forward_networks_has_no_name_elsewhere(layout):
    with pytest.raises(WeightsError, match="no name for a transformer without feed-forward networks"):
        from_original(tiny(ffn_layer="identity").state_dict(), layout)


def test_a_part_that_is_missing_is_named():
    there = from_original(tiny().state_dict(), "hf").state
    del there["encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(WeightsError, match=r"of blocks.1.attn.qkv.weight only 2 of 3 parts are there"):
        to_original(there, "hf")


def test_keys_that_no_map_knows_stay_as_they_are():
    there = {**from_original(tiny().state_dict(), "hf").state, "pooler.dense.weight": torch.zeros(1)}
    assert "pooler.dense.weight" in to_original(there, "hf").state
    there = {**from_original(tiny().state_dict(), "timm").state, "head.weight": torch.zeros(1)}
    assert list(to_original(there, "timm").state)[-1] == "head.weight"


def test_a_mask_token_that_hugging_face_was_told_to_leave_out_becomes_zeros():
    there = from_original(tiny().state_dict(), "hf").state
    del there["embeddings.mask_token"]
    back, notes = to_original(there, "hf")
    assert notes == ("mask_token: zeros, the source has none",)
    assert back["mask_token"].shape == (1, 64) and not back["mask_token"].any()


@pytest.mark.parametrize("prefix", ["dinov2.", "dinov2_with_registers."])
def test_classifiers_are_read_below_their_prefix(prefix):
    model = tiny(num_register_tokens=2)
    head = {"weight": torch.ones(3, 128), "bias": torch.zeros(3)}
    state = with_classifier(from_original(model.state_dict(), "hf").state, head, registers="registers" in prefix)
    assert all(key.startswith((prefix, "classifier.")) for key in state)
    backbone, found = split_classifier(state)
    assert found is not None and torch.equal(found["weight"], head["weight"])
    assert layout_of(backbone) == "hf" and list(to_original(backbone, "hf").state) == list(model.state_dict())


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["weight", "bias"],
        ["embeddings.patch_embeddings.projection.weight", "encoder.layer.0.layernorm_before.weight"],
        ["pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"],
        ["reg_token", "patch_embed.proj.weight", "blocks.0.ls1.gamma"],
    ],
)
def test_models_of_other_kinds_have_no_layout(keys):
    assert layout_of({key: torch.zeros(1) for key in keys}) is None


def test_chunked_keys_become_flat_and_any_order_the_released_one():
    state = tiny(block_chunks=2).state_dict()
    assert [flat_key(key) for key in state] == list(tiny().state_dict())
    shuffled = {key: state[key] for key in sorted(state, reverse=True)}
    assert list(to_original(shuffled, "original").state) == list(tiny().state_dict())
    assert list(release_order(dict(reversed(tiny().state_dict().items())))) == list(tiny().state_dict())
