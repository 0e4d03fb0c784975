"""Features that evaluations keep: found by content, opened like any other, and those of earlier days."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from dinov2.checkpoints.files import state_digest
from dinov2.encode.store import open_features
from dinov2.encode.store.cache import content_key, has_features, load_features, save_features
from dinov2.encode.stream import Features
from dinov2.errors import DataError

PARTS = {"weights": "ab12", "transform": {"crop": 224, "resize": 256}, "data": "cd34"}
ABOUT = {"request": {"model": {"sha256": "ab12"}}, "source": "photos"}
FEATURES = Features(
    features=torch.rand(4, 3),
    labels=torch.tensor([0, 1, -1, 1]),
    class_names=("cat", "dog"),
    unreadable=(("a.jpg", "truncated"),),
    indices=torch.tensor([0, 1, 2, 4]),
)


def save(folder, features=FEATURES, column="cls"):
    return save_features(folder, features, parts=PARTS, column=column, about=ABOUT)


def load(folder, column="cls", **changes):
    return load_features(folder, parts={**PARTS, **changes}, column=column)


def assert_same(loaded, expected=FEATURES):
    for name in ("features", "labels", "indices"):
        assert torch.equal(getattr(loaded, name), getattr(expected, name))
    assert (loaded.class_names, loaded.unreadable) == (expected.class_names, expected.unreadable)


def test_the_key_depends_on_every_value_but_not_on_the_order():
    key = content_key(PARTS)
    assert key == content_key(dict(reversed(PARTS.items())))
    assert key != content_key({**PARTS, "transform": {"crop": 224, "resize": 224}})
    assert key != content_key({**PARTS, "weights": "ab13"})


def test_a_key_part_that_json_cannot_say_is_refused():
    with pytest.raises(DataError, match="plain JSON values"):
        content_key({"dtype": torch.float16})


def test_the_digest_of_weights_sees_names_shapes_types_and_values_but_not_the_order():
    state = {"a": torch.arange(4.0), "b": torch.tensor(1.0)}
    digest = state_digest(state)
    assert digest == state_digest({"b": torch.tensor(1.0), "a": torch.arange(4.0)})
    others = [
        {**state, "a": torch.arange(4.0).view(2, 2)},
        {**state, "a": torch.arange(4.0).double()},
        {**state, "a": torch.arange(4.0).flip(0)},
        {"c": state["a"], "b": state["b"]},
    ]
    assert digest not in {state_digest(other) for other in others}
    assert state_digest({"a": torch.ones(2, dtype=torch.bfloat16)}) != state_digest({"a": torch.zeros(2).bfloat16()})


@pytest.mark.parametrize("column", ["cls", "mean"])
def test_features_come_back_as_they_were_saved(tmp_path, column):
    assert not has_features(tmp_path, PARTS)
    save(tmp_path, column=column)
    assert has_features(tmp_path, PARTS)
    assert_same(load(tmp_path, column))
    assert load(tmp_path, column, data="ef56") is None


def test_images_without_labels_or_numbers_come_back_numbered(tmp_path):
    save(tmp_path, Features(FEATURES.features))
    loaded = load(tmp_path)
    assert loaded.labels is None and loaded.class_names is None
    assert loaded.indices.tolist() == [0, 1, 2, 3]


def test_an_entry_opens_like_any_other_features(tmp_path):
    stored = open_features(save(tmp_path))
    assert set(stored.columns) == {"index", "label", "cls"} and len(stored) == 4
    assert torch.equal(torch.tensor(stored.read("cls")), FEATURES.features)
    assert stored.read("label").tolist() == [0, 1, -1, 1]
    assert stored.manifest["class_names"] == ["cat", "dog"]
    assert stored.manifest["request"] == ABOUT["request"] and stored.manifest["key"] == PARTS


def test_an_entry_of_earlier_days_is_read_and_replaced(tmp_path):
    entry = tmp_path / content_key(PARTS)
    entry.mkdir()
    tensors = {"features": FEATURES.features, "labels": FEATURES.labels, "indices": FEATURES.indices}
    save_file(tensors, entry / "features.safetensors")
    checksum = hashlib.sha256((entry / "features.safetensors").read_bytes()).hexdigest()
    manifest = {
        "parts": PARTS, "sha256": checksum, "rows": 4, "width": 3, "class_names": ["cat", "dog"],
        "unreadable": [["a.jpg", "truncated"]],
    }  # fmt: skip
    (entry / "manifest.json").write_text(json.dumps(manifest))
    assert_same(load(tmp_path))
    (entry / "manifest.json").write_text(json.dumps({**manifest, "sha256": "0" * 64}))
    with pytest.raises(DataError, match="damaged"):
        load(tmp_path)
    save(tmp_path)
    assert not (entry / "manifest.json").exists()
    assert_same(load(tmp_path))


def test_an_entry_without_a_manifest_does_not_exist(tmp_path):
    (save(tmp_path) / "_manifest.json").unlink()
    assert load(tmp_path) is None


@pytest.mark.parametrize("name", ["features.npy", "features.label.npy"])
def test_a_changed_file_is_refused(tmp_path, name):
    file = save(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"damaged .{name} is not as it was written"):
        load(tmp_path)


def test_a_half_written_manifest_is_refused(tmp_path):
    manifest = save(tmp_path) / "_manifest.json"
    text = manifest.read_text()
    for content in (text[: len(text) // 2], '{"files": {}}', "{}"):
        manifest.write_text(content)
        with pytest.raises(DataError, match="damaged"):
            load(tmp_path)
