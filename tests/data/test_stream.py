from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from dinov2.data.stream import SampleStream, hash_keys, permute, to_unit_interval
from dinov2.errors import DataError


def uniforms(seed, numbers, count):
    return to_unit_interval(hash_keys(seed, "test", numbers[:, None], np.arange(count)))


def test_hashes_are_the_same_in_every_process_and_version():
    # Written down once: a changed hash would change every resumed run.
    frozen = [5208338254661898466, 16294208416658607535, 16490336266968443936]
    assert [int(hash_keys(1, "crop", 5)), int(hash_keys(0)), int(hash_keys(-1))] == frozen


def test_hashes_depend_on_every_key_and_on_the_order():
    words = [int(hash_keys(*keys)) for keys in [(1, 2), (2, 1), (1,), (1, 2, 0), (1, "2"), (-1, 2)]]
    assert len(set(words)) == len(words)


def test_arrays_of_keys_give_what_single_keys_give():
    numbers, crops = np.arange(5), np.arange(3)[:, None]
    words = hash_keys(7, "tag", numbers, crops)
    assert words.shape == (3, 5)
    assert int(words[2, 4]) == int(hash_keys(7, "tag", 4, 2))


def test_uniforms_fill_the_unit_interval_evenly():
    draws = uniforms(0, np.arange(1000), 100)
    assert draws.shape == (1000, 100)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * np.sqrt(2 * 99)  # chi square with 99 degrees of freedom


def test_uniforms_of_neighbouring_numbers_are_uncorrelated():
    draws = uniforms(3, np.arange(20_000), 2)
    for left, right in [(draws[:-1, 0], draws[1:, 0]), (draws[:, 0], draws[:, 1])]:
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(20_000)


def test_the_unit_interval_excludes_one():
    assert to_unit_interval(np.array([2**64 - 1], dtype=np.uint64))[0] < 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 100, 1000, 4097])
def test_a_feistel_network_permutes_any_number_of_elements(n):
    order = permute(np.arange(n), n, key=3)
    assert sorted(order.tolist()) == list(range(n))


def test_all_orders_of_five_elements_are_equally_frequent():
    orders = [tuple(permute(np.arange(5), 5, key=key).tolist()) for key in range(6000)]
    counts = Counter(orders)
    chi_square = sum((counts[order] - 50) ** 2 / 50 for order in permutations(range(5)))
    assert chi_square < 119 + 5 * np.sqrt(2 * 119)


def test_a_permutation_is_read_one_by_one_or_at_once():
    at_once = permute(np.arange(20), 1000, key=9)
    assert [int(permute(np.array(position), 1000, key=9)) for position in range(20)] == at_once.tolist()


@pytest.mark.parametrize("n_images", [1, 3, 50, 1009])
def test_every_image_is_seen_once_an_epoch(n_images):
    indices = SampleStream(n_images, seed=5).index_of(np.arange(3 * n_images)).reshape(3, n_images)
    assert all(sorted(epoch.tolist()) == list(range(n_images)) for epoch in indices)


def test_epochs_and_seeds_have_different_orders():
    numbers = np.arange(200)
    stream = SampleStream(100, seed=0)
    first, second = stream.index_of(numbers).reshape(2, 100)
    other_seed = SampleStream(100, seed=1).index_of(numbers[:100])
    for one, other in [(first, second), (first, other_seed), (second, other_seed)]:
        assert (one == other).sum() < 10


def test_a_sample_can_be_looked_up_alone_and_far_ahead():
    stream = SampleStream(12_345, seed=2)
    far = 10**12
    assert stream.index_of(far + 7) == stream.index_of(np.arange(far, far + 10))[7]


def test_substitutes_try_every_image_before_repeating():
    stream = SampleStream(20, seed=0)
    assert sorted(stream.substitute(7, attempt) for attempt in range(1, 21)) == list(range(20))
    assert [stream.substitute(7, attempt) for attempt in range(1, 6)] != [
        stream.substitute(8, attempt) for attempt in range(1, 6)
    ]


def test_a_stream_of_nothing_is_refused():
    with pytest.raises(DataError, match="no image"):
        SampleStream(0, seed=0)
