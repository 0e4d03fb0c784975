import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dinov2.encode.stream import Features, decoded_batches, extract_features
from dinov2.errors import ConfigError, DataError

PIXELS = torch.arange(10 * 3 * 4 * 4, dtype=torch.float32).view(10, 3, 4, 4) / 100


class Images:
    """Ten tiny images of two classes, some of which cannot be read."""

    class_names = ("cat", "dog")

    def __init__(self, broken=(), *, labels=True, dtype=torch.float32):
        self.broken, self.labels, self.dtype = set(broken), labels, dtype

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError("truncated file")
        return PIXELS[index].to(self.dtype), index % 2 if self.labels else None

    def path_of(self, index):
        return f"pictures/{index}.jpg"


def mean_colour(images):
    return images.mean(dim=(2, 3))


def test_rows_are_in_the_order_of_the_data_set_whatever_the_batch():
    features = extract_features(mean_colour, Images(), batch_size=3)
    assert_close(features.features, PIXELS.mean(dim=(2, 3)))
    assert features.labels.tolist() == [0, 1] * 5
    assert features.class_names == ("cat", "dog")
    assert features.unreadable == ()


def test_loader_workers_change_nothing():
    alone, helped = (extract_features(mean_colour, Images([3]), batch_size=3, num_workers=n) for n in (0, 2))
    assert torch.equal(alone.features, helped.features)
    assert alone.unreadable == helped.unreadable


def test_unreadable_images_are_left_out_and_listed():
    features = extract_features(mean_colour, Images([0, 4, 5]), batch_size=2)
    kept = torch.tensor([1, 2, 3, 6, 7, 8, 9])
    assert_close(features.features, PIXELS[kept].mean(dim=(2, 3)))
    assert features.indices.tolist() == kept.tolist()
    assert features.labels.tolist() == (kept % 2).tolist()
    assert features.unreadable[0] == ("pictures/0.jpg", "truncated file")
    assert len(features.unreadable) == 3


def test_a_data_set_of_unreadable_images_is_an_error_that_names_the_first():
    with pytest.raises(DataError, match=r"none of the 10 images.*pictures/0\.jpg: truncated"):
        extract_features(mean_colour, Images(range(10)))


def test_an_empty_data_set_is_an_error():
    with pytest.raises(DataError, match="no images"):
        extract_features(mean_colour, [])


def test_images_without_labels_give_features_without_labels():
    assert extract_features(mean_colour, Images(labels=False)).labels is None


def test_images_that_are_no_normalised_tensors_are_refused():
    for images in (Images(dtype=torch.uint8), [("a picture", 0)]):
        with pytest.raises(DataError, match="image 0 of the data set is .*; give a transform to normalised float"):
            extract_features(mean_colour, images)


def test_images_of_different_sizes_keep_their_order():
    images = [(torch.full((3, 2 + i % 2, 4), float(i)), None) for i in range(5)]
    features = extract_features(mean_colour, images, batch_size=4)
    assert features.features[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("threads, workers", [(0, 0), (1, 0), (3, 0), (0, 2)])
def test_batches_are_the_same_whoever_decodes_them(threads, workers):
    batches = [range(4), range(4, 8), range(8, 10)]
    decoded = list(decoded_batches(Images([3, 8, 9]), batches, threads=threads, workers=workers))
    assert [batch.indices for batch in decoded] == [[0, 1, 2], [4, 5, 6, 7], []]
    assert [batch.targets for batch in decoded] == [[0, 1, 0], [0, 1, 0, 1], []]
    assert decoded[2].unreadable == [("pictures/8.jpg", "truncated file"), ("pictures/9.jpg", "truncated file")]
    assert torch.equal(decoded[1].groups[0][1], PIXELS[4:8]) and decoded[1].sizes == [(4, 4)] * 4


def test_a_model_that_returns_patches_is_refused_with_what_it_returned():
    with pytest.raises(ConfigError, match=r"\[B, D\].*shape \[10, 3, 16\]"):
        extract_features(lambda x: x.flatten(2), Images())


def test_every_training_flag_is_restored_and_dropout_is_off_meanwhile():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(48))
    model[2].eval()
    before = [module.training for module in model.modules()]
    features = extract_features(model, Images())
    assert [module.training for module in model.modules()] == before == [True, True, True, False]
    assert_close(features.features, PIXELS.flatten(1) / (1 + 1e-5) ** 0.5)


def test_training_flags_are_restored_when_the_model_fails():
    model = nn.Sequential(nn.Conv2d(5, 1, 1))
    with pytest.raises(RuntimeError):
        extract_features(model, Images())
    assert model.training


def test_a_classifier_can_train_on_the_features():
    features = extract_features(nn.Flatten(), Images()).features
    classifier = nn.Linear(48, 2)
    classifier(features).sum().backward()
    assert_close(classifier.weight.grad[0], features.sum(dim=0))


def test_autocast_runs_the_model_in_the_asked_precision_and_returns_float32():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    features = extract_features(model, Images(), autocast_dtype=torch.bfloat16)
    assert seen == [torch.bfloat16]
    assert features.features.dtype == torch.float32


def test_extraction_draws_no_random_number_of_the_training_around_it():
    before = torch.get_rng_state()
    extract_features(mean_colour, Images())
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_counts_unreadable_images_too():
    calls = []
    extract_features(mean_colour, Images([1]), batch_size=4, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 10), (8, 10), (10, 10)]


def test_taking_rows_takes_their_labels_and_positions():
    features = Features(torch.eye(3), torch.tensor([5, 6, 7]), indices=torch.tensor([0, 2, 4]))
    taken = features.take(torch.tensor([2, 0]))
    assert taken.labels.tolist() == [7, 5]
    assert taken.indices.tolist() == [4, 0]
    assert features.take(torch.tensor([1])).features.tolist() == [[0.0, 1.0, 0.0]]
