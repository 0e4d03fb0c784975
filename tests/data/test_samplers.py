import json
from itertools import islice
from pathlib import Path

import pytest

from dinov2.data.release import EpochSampler, InfiniteSampler, ShardedInfiniteSampler
from dinov2.errors import DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "samplers.json").read_text())
CASES = [case for case in GOLDEN["cases"] if case["type"] != "DISTRIBUTED"]


def sampler_of(case):
    shared = {
        "sample_count": case["sample_count"],
        "shuffle": case["shuffle"],
        "seed": case["seed"],
        "start": case["rank"],
        "step": case["world_size"],
    }
    match case["type"]:
        case "EPOCH":
            size = case["size"] if case["size"] > 0 else case["sample_count"]
            sampler = EpochSampler(size=size, **shared)
            sampler.set_epoch(case["epoch"])
            return sampler
        case "INFINITE":
            return InfiniteSampler(advance=case["advance"], **shared)
        case kind:
            new = kind == "SHARDED_INFINITE_NEW"
            return ShardedInfiniteSampler(advance=case["advance"], use_new_shuffle_tensor_slice=new, **shared)


@pytest.mark.parametrize("kind", ["EPOCH", "INFINITE", "SHARDED_INFINITE", "SHARDED_INFINITE_NEW"])
def test_orders_are_those_of_the_release(kind):
    cases = [case for case in CASES if case["type"] == kind]
    assert len(cases) >= 84
    for case in cases:
        assert list(islice(sampler_of(case), GOLDEN["first"])) == case["indices"], case


def test_an_epoch_sampler_knows_its_length():
    cases = [case for case in CASES if case["type"] == "EPOCH"]
    assert [len(sampler_of(case)) for case in cases] == [case["length"] for case in cases]


def test_epochs_of_a_shuffled_sampler_differ():
    sampler = EpochSampler(size=50, sample_count=50, shuffle=True, seed=3, start=0, step=1)
    sampler.set_epoch(1)
    first = list(sampler)
    sampler.set_epoch(2)
    assert sorted(first) == sorted(sampler) == list(range(50))
    assert first != list(sampler)


@pytest.mark.parametrize("new", [False, True], ids=["one by one", "at once"])
@pytest.mark.parametrize("start, step, advance", [(0, 1, 0), (1, 2, 0), (0, 1, 29)])
def test_another_iteration_of_a_shard_goes_on_with_the_pass_it_was_in(new, start, step, advance):
    def passes(first, taken):
        """`taken` indices from the beginning of pass `first` on, of a sampler that starts there."""
        fresh = ShardedInfiniteSampler(
            sample_count=12,
            shuffle=True,
            seed=5,
            start=start,
            step=step,
            advance=12 * first,
            use_new_shuffle_tensor_slice=new,
        )
        return list(islice(fresh, taken))

    sampler = ShardedInfiniteSampler(
        sample_count=12, shuffle=True, seed=5, start=start, step=step, advance=advance, use_new_shuffle_tensor_slice=new
    )
    shard = 12 // step
    skipped = advance % 12
    assert list(islice(sampler, 2 * shard + 1)) == passes(advance // 12, skipped + 2 * shard + 1)[skipped:]
    in_pass = advance // 12 + (skipped + 2 * shard) // shard
    assert list(islice(sampler, shard)) == passes(in_pass, skipped + shard)[skipped:]


def test_other_samplers_begin_again():
    for sampler in (
        InfiniteSampler(sample_count=7, shuffle=True, seed=3, start=0, step=1, advance=2),
        EpochSampler(size=20, sample_count=7, shuffle=True, seed=3, start=0, step=1),
        ShardedInfiniteSampler(sample_count=7, start=0, step=1, advance=2),
    ):
        assert list(islice(sampler, 16)) == list(islice(sampler, 16))


def test_in_one_process_a_sampler_takes_everything():
    sampler = InfiniteSampler(sample_count=5, shuffle=False)
    assert list(islice(sampler, 7)) == [0, 1, 2, 3, 4, 0, 1]


def test_indices_are_plain_integers():
    sampler = ShardedInfiniteSampler(sample_count=9, shuffle=True, start=0, step=2)
    assert {type(index) for index in islice(sampler, 10)} == {int}


def test_an_empty_data_set_and_too_many_processes_are_refused():
    with pytest.raises(DataError, match="at least one sample"):
        InfiniteSampler(sample_count=0, start=0, step=1)
    with pytest.raises(DataError, match="fewer processes"):
        next(iter(ShardedInfiniteSampler(sample_count=3, shuffle=True, start=0, step=4)))
