import json
from dataclasses import replace

import pytest
import torch

from dinov2.checkpoints.files import state_digest
from dinov2.encode.cache import (
    cached_features,
    content_key,
    dataset_fingerprint,
    load_features,
    save_features,
)
from dinov2.encode.scoring import Scoring
from dinov2.encode.stream import Features
from dinov2.errors import DataError

PARTS = {"weights": "ab12", "transform": {"crop": 224, "resize": 256}, "data": "cd34"}
FEATURES = Features(
    features=torch.rand(4, 3),
    labels=torch.tensor([0, 1, 0, 1]),
    class_names=("cat", "dog"),
    unreadable=(("a.jpg", "truncated"),),
    indices=torch.tensor([0, 1, 2, 4]),
)


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


def test_the_fingerprint_of_files_ignores_their_order_and_sees_sizes_and_classes():
    files = [("a/1.jpg", 10), ("b/2.jpg", 20)]
    assert dataset_fingerprint(files) == dataset_fingerprint(files[::-1])
    assert dataset_fingerprint(files) != dataset_fingerprint([("a/1.jpg", 11), ("b/2.jpg", 20)])
    assert dataset_fingerprint(files) != dataset_fingerprint(files, class_names=["a", "b"])


def test_features_come_back_as_they_were_saved(tmp_path):
    save_features(tmp_path, FEATURES, parts=PARTS)
    loaded = load_features(tmp_path, parts=PARTS)
    for name in ("features", "labels", "indices"):
        assert torch.equal(getattr(loaded, name), getattr(FEATURES, name))
    assert (loaded.class_names, loaded.unreadable) == (FEATURES.class_names, FEATURES.unreadable)
    assert load_features(tmp_path, parts={**PARTS, "data": "ef56"}) is None


def test_identifiers_and_rules_of_scoring_come_back_and_older_entries_have_none(tmp_path):
    scoring = Scoring(
        own_classes=True,
        label_sets=torch.tensor([[0, 1], [1, -1], [-1, -1], [1, -1]]),
        parts=(("fog", 1), ("snow", 5)),
        part_numbers=torch.tensor([0, 0, 1, 1]),
    )
    entry = save_features(tmp_path, replace(FEATURES, class_ids=("n1", "n2"), scoring=scoring), parts=PARTS)
    loaded = load_features(tmp_path, parts=PARTS)
    assert loaded.class_ids == ("n1", "n2")
    assert (loaded.scoring.own_classes, loaded.scoring.parts) == (True, scoring.parts)
    assert loaded.scoring.class_mapping is None
    for name in ("label_sets", "part_numbers"):
        assert torch.equal(getattr(loaded.scoring, name), getattr(scoring, name))
    manifest = json.loads((entry / "manifest.json").read_text())
    older = {key: value for key, value in manifest.items() if key not in ("class_ids", "scoring")}
    (entry / "manifest.json").write_text(json.dumps(older))
    loaded = load_features(tmp_path, parts=PARTS)
    assert loaded.class_ids is None and loaded.scoring is None and loaded.class_names == ("cat", "dog")


def test_an_entry_without_a_manifest_does_not_exist(tmp_path):
    entry = save_features(tmp_path, FEATURES, parts=PARTS)
    (entry / "manifest.json").unlink()
    assert load_features(tmp_path, parts=PARTS) is None


def test_a_changed_tensor_file_is_refused_and_computed_anew(tmp_path):
    entry = save_features(tmp_path, FEATURES, parts=PARTS)
    content = bytearray((entry / "features.safetensors").read_bytes())
    content[-1] ^= 1
    (entry / "features.safetensors").write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"damaged \(checksum"):
        load_features(tmp_path, parts=PARTS)
    again = cached_features(tmp_path, lambda: FEATURES, parts=PARTS)
    assert again is FEATURES
    assert torch.equal(load_features(tmp_path, parts=PARTS).features, FEATURES.features)


def test_a_half_written_manifest_is_refused(tmp_path):
    entry = save_features(tmp_path, FEATURES, parts=PARTS)
    text = (entry / "manifest.json").read_text()
    (entry / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match="damaged"):
        load_features(tmp_path, parts=PARTS)


def test_features_are_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return FEATURES

    for _ in range(3):
        found = cached_features(tmp_path, compute, parts=PARTS)
    assert len(calls) == 1
    assert torch.equal(found.features, FEATURES.features)
    cached_features(None, compute, parts=PARTS)
    assert len(calls) == 2


def test_the_manifest_says_what_the_features_are(tmp_path):
    entry = save_features(tmp_path, FEATURES, parts=PARTS)
    manifest = json.loads((entry / "manifest.json").read_text())
    assert manifest["parts"] == PARTS
    assert (manifest["rows"], manifest["width"]) == (4, 3)
