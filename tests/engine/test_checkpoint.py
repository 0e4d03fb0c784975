"""Checkpoints: equal to the bit, complete or absent, and never lost to a kill or a full disk."""

import json
import logging
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.testing import assert_close

from dinov2 import distributed
from dinov2.engine.checkpoint import CheckpointStore
from dinov2.errors import ConfigError, DinoError, WeightsError

BIG = 600  # a square matrix of this side is too big to be packed


def trained_model(seed=0):
    """A model with small and big parameters and an AdamW that has made two steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, BIG), nn.Linear(BIG, BIG))
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(model.parameters())])
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def raw_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found, expected):
    """Equal in type, order and every bit; NaN equals NaN."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert raw_bytes(found) == raw_bytes(expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert type(found) is type(expected)
        assert found == expected


def tiny(value=0.0):
    return {"weights": torch.full((3,), value), "step": 7}


def test_everything_that_a_training_remembers_comes_back_to_the_bit(tmp_path):
    model, optimizer = trained_model()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "random": {"torch": torch.get_rng_state(), "python": random.getstate()},
        "odd": {
            "nan": math.nan,
            "infinite": -math.inf,
            "third": 1 / 3,
            "long": 2**200,
            "bytes": b"\x00\xff",
            "none": None,
            "text": "é",
            "nested": [(1, [True, {}]), []],
            "$sign": {3: "three", "3": "text"},
            "bf16": torch.randn(5).bfloat16(),
            "flags": torch.tensor([True, False]),
            "scalar": torch.tensor(3, dtype=torch.int64),
            "none at all": torch.empty(0, 4),
            "minus zero": torch.tensor([-0.0, math.nan]),
            "transposed": torch.randn(3, 4).t(),
        },
        "a.b": torch.ones(BIG, BIG),
        "a": {"b": torch.zeros(BIG, BIG)},
    }
    store = CheckpointStore(tmp_path / "checkpoints")
    folder = store.save(1250, state)
    assert folder == tmp_path / "checkpoints" / "step_0001250"
    assert_same(store.load(1250), state)


def test_an_optimiser_that_is_loaded_makes_the_same_next_step(tmp_path):
    model, optimizer = trained_model()
    store = CheckpointStore(tmp_path)
    store.save(2, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = nn.Sequential(nn.Linear(4, BIG), nn.Linear(BIG, BIG))
    fresh = torch.optim.AdamW([{"params": [p]} for p in resumed.parameters()])
    saved = store.load(2, into={"model": resumed.state_dict()})
    fresh.load_state_dict(saved["optimizer"])
    for network, adam in ((model, optimizer), (resumed, fresh)):
        adam.zero_grad()
        network(torch.ones(3, 4)).square().mean().backward()
        adam.step()
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))


def test_loading_into_fills_the_very_tensors_and_returns_the_rest(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"part": {"big": torch.ones(BIG, BIG), "small": torch.ones(2)}, "other": torch.ones(3), "n": 4})
    mine = {"part": {"big": nn.Parameter(torch.zeros(BIG, BIG)), "small": torch.zeros(2)}}
    state = store.load(1, into=mine)
    assert state["part"]["big"] is mine["part"]["big"]
    assert state["part"]["small"] is mine["part"]["small"]
    assert float(mine["part"]["big"].detach().sum()) == BIG * BIG
    assert mine["part"]["small"].tolist() == [1, 1]
    assert state["other"].tolist() == [1, 1, 1]
    assert state["n"] == 4


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ({"part": {"a": torch.zeros(2), "c": torch.zeros(2)}}, r"lacks part.c and has part.b too much"),
        ({"part": {"a": torch.zeros(2)}}, r"lacks nothing and has part.b too much"),
        ({"part": {"a": torch.zeros(3), "b": torch.zeros(2)}}, r"part.a is \[2\] there and \[3\] here"),
        ({"whole": {}}, r"lacks whole"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path, into, message):
    store = CheckpointStore(tmp_path)
    store.save(1, {"part": {"a": torch.ones(2), "b": torch.ones(2)}})
    with pytest.raises(WeightsError, match=message):
        store.load(1, into=into)
    assert not any(tensor.any() for tensor in into.get("part", {}).values())


def test_only_the_last_ones_stay_counted_on_disk(tmp_path):
    for step in range(1, 4):
        CheckpointStore(tmp_path, keep=2).save(step, tiny())  # each time a new store, as after restarts
    assert CheckpointStore(tmp_path).steps() == [2, 3]
    CheckpointStore(tmp_path, keep=0).save(4, tiny())
    assert CheckpointStore(tmp_path).steps() == [2, 3, 4]
    CheckpointStore(tmp_path, keep=1).save(1, tiny())  # just written, though not the highest number
    assert CheckpointStore(tmp_path).steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001"]


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, tiny(1.0))
    store.save(5, tiny(2.0))
    assert store.load(5)["weights"].tolist() == [2, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000005"]


def test_a_kill_while_a_step_is_replaced_loses_neither(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(5, tiny(1.0))
    os.rename(tmp_path / "step_0000005", tmp_path / ".step_0000005.replaced")
    assert store.latest() == 5
    assert store.load(5)["weights"].tolist() == [1, 1, 1]
    store.save(6, tiny(2.0))
    assert store.steps() == [6]
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000006"]


def test_there_is_no_latest_without_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert (store.latest(), store.steps()) == (None, [])
    with pytest.raises(WeightsError, match=r"no complete checkpoint of step 3 .* it has: none"):
        store.load(3)


@pytest.mark.parametrize("damage", ["no meta", "short tensors", "no values", "meta is no JSON", "hidden"])
def test_an_incomplete_folder_is_not_found(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    store.save(1, tiny())
    newest = store.save(2, tiny())
    match damage:
        case "no meta":
            (newest / "meta.json").unlink()
        case "short tensors":
            os.truncate(next(newest.glob("*.distcp")), 10)
        case "no values":
            (newest / "state.json").unlink()
        case "meta is no JSON":
            (newest / "meta.json").write_text("{")
        case "hidden":
            os.rename(newest, newest.with_name(".step_0000002.saving"))
    assert store.latest() == 1


def damage(folder, name, how):
    """Change a file without changing its size, or `meta.json` in one of several ways."""
    file = folder / name
    match how:
        case "one bit":
            content = bytearray(file.read_bytes())
            content[len(content) * 3 // 5] ^= 0x10
            file.write_bytes(content)
        case "zeros":
            file.write_bytes(bytes(file.stat().st_size))
        case "nested deep":
            file.write_text("[" * 200_000)
        case "long number":
            file.write_text("9" * 5_000)
        case _:
            facts = json.loads(file.read_text())
            file.write_text(json.dumps({key: value for key, value in facts.items() if key != how}))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "meta.json"])
@pytest.mark.parametrize("how", ["one bit", "zeros"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, name, how):
    store = CheckpointStore(tmp_path)
    store.save(1, tiny(1.0))
    newest = store.save(2, {"weights": torch.zeros(500), "step": 7})
    damage(newest, name, how)
    with caplog.at_level("WARNING", logger="dinov2"):
        logging.getLogger("dinov2").propagate = True
        assert store.latest() == 1
    if 2 in store.steps():  # else it is not even complete
        assert f"the checkpoint {newest} is damaged and passed over: " in caplog.text
        with pytest.raises(WeightsError, match=r"is damaged \(.*\); remove the folder to resume from step 1$"):
            store.load(2)
    assert store.load(store.latest())["weights"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("how", ["nested deep", "long number", "files", "digests", "world_size"])
def test_damaged_facts_are_no_checkpoint_or_one_that_is_whole(tmp_path, how):
    store = CheckpointStore(tmp_path)
    store.save(1, tiny(1.0))
    damage(store.save(2, tiny(2.0)), "meta.json", how)
    assert store.latest() == (2 if how == "digests" else 1)  # without digests it is of an older version


@pytest.mark.parametrize("name", [".metadata", "state.json", "__0_0.distcp"])
def test_a_checkpoint_without_digests_fails_in_one_sentence(tmp_path, name):
    store = CheckpointStore(tmp_path)
    folder = store.save(2, tiny(2.0))
    damage(folder, "meta.json", "digests")
    damage(folder, name, "zeros")
    with pytest.raises(DinoError) as caught:
        store.load(2)
    assert "\n" not in str(caught.value)


def test_tensors_that_claim_more_than_the_files_hold_are_refused_before_memory_is_taken(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    folder = store.save(1, tiny(1.0))
    damage(folder, "meta.json", "digests")
    huge = torch.distributed.checkpoint.metadata.TensorStorageMetadata(
        torch.distributed.checkpoint.metadata.TensorProperties(torch.float32), torch.Size([10**12]), []
    )
    index = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata()
    index.state_dict_metadata = dict.fromkeys(index.state_dict_metadata, huge)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    monkeypatch.setattr("dinov2.engine.checkpoint._is_complete", lambda folder: True)
    with pytest.raises(WeightsError, match="4,000,000,000,000 bytes, more than its files hold.*none before it"):
        store.load(1)


def test_a_step_that_was_passed_over_is_dropped_before_those_that_are_intact(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, tiny(1.0))
    damage(store.save(3, tiny(3.0)), "state.json", "one bit")
    assert store.latest() == 1
    store.save(2, tiny(2.0))
    assert store.steps() == [1, 2]


def test_the_facts_of_a_checkpoint_are_plain_json(tmp_path):
    store = CheckpointStore(tmp_path)
    folder = store.save(3, tiny(), meta={"config": "a: 1\n", "data": "abc", "versions": {"dinov2": "0.1"}})
    assert store.read_meta(3) == json.loads((folder / "meta.json").read_text())
    facts = store.read_meta(3)
    assert (facts["step"], facts["config"], facts["data"], facts["world_size"]) == (3, "a: 1\n", "abc", 1)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["dinov2"] == "0.1"


def test_objects_are_refused_with_their_place(tmp_path):
    with pytest.raises(DinoError, match=r"holds a set at 'a\.1\.where'"):
        CheckpointStore(tmp_path).save(1, {"a": [0, {"where": {1}}]})
    with pytest.raises(ConfigError, match="keep is -1"):
        CheckpointStore(tmp_path, keep=-1)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_an_index_with_foreign_objects_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore(tmp_path)
    folder = store.save(1, tiny())
    content = pickle.dumps(Evil())
    (folder / ".metadata").write_bytes(content)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][".metadata"] = len(content)
    del meta["digests"]  # as a version without them wrote it
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(WeightsError, match="has no place there"):
        store.load(1)
    assert not Path("evil-was-here").exists()


def test_many_small_tensors_cost_few_entries(tmp_path):
    # Each entry of the format costs 0.2 ms, a step of a tiny model some 50 ms.
    folder = CheckpointStore(tmp_path).save(1, {f"t{i}": torch.full((i,), i) for i in range(500)})
    reader = torch.distributed.checkpoint.FileSystemReader(folder)
    assert len(reader.read_metadata().state_dict_metadata) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on file sizes to simulate a full disk with")
@pytest.mark.parametrize("limit", [0, 300_000], ids=["from the first byte", "within the tensors"])
def test_a_full_disk_is_one_sentence_and_earlier_checkpoints_stay(tmp_path, limit):
    import resource

    store = CheckpointStore(tmp_path)
    store.save(1, tiny(1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            DinoError, match=r"of step 2 could not be written .*File too large.* earlier checkpoints are intact"
        ):
            store.save(2, {"big": torch.ones(BIG, BIG)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001"]
    assert store.load(1)["weights"].tolist() == [1, 1, 1]
    store.save(2, tiny(2.0))
    assert store.latest() == 2


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DinoError, match="could not be written"):
        CheckpointStore(tmp_path / "file").save(1, tiny())


KILLED_WHILE_SAVING = """
import os, signal, sys
import torch
from dinov2.engine import checkpoint
folder, moment = sys.argv[1:]
store = checkpoint.CheckpointStore(folder, keep=1)
store.save(1, {"weights": torch.full((3,), 1.0)})
def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)
match moment:
    case "tensors":
        os.fsync = die
    case "values":
        checkpoint._write_synced = die
    case "rename":
        os.rename = die
    case "removal of the old":
        checkpoint.CheckpointStore._drop_oldest = die
store.save(2, {"weights": torch.full((3,), 2.0)})
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    ("moment", "survivor"), [("tensors", 1), ("values", 1), ("rename", 1), ("removal of the old", 2)]
)
def test_a_kill_during_a_save_leaves_the_last_complete_one(tmp_path, moment, survivor):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), moment]
    died = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    store = CheckpointStore(tmp_path, keep=1)
    assert store.latest() == survivor
    assert store.load(survivor)["weights"].tolist() == [survivor] * 3
    store.save(3, tiny(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000003"], "leftovers of the kill are still there"


def _rank_of_two(rank: int, folder: str, port: int) -> None:
    """Two processes load what one wrote, and write what one loads."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    six = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(six | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"})
    distributed.enable()
    mesh = init_device_mesh("cpu", (2,))
    store = CheckpointStore(folder, keep=2)

    def sharded(shape):
        return distribute_tensor(torch.zeros(shape), mesh, [Shard(0)])

    mine = {"big": sharded((BIG, BIG)), "small": sharded((4, 2)), "plain": torch.zeros(3)}
    state = store.load(1, into={"part": mine})
    assert state["n"] == 1
    assert_close(mine["big"].full_tensor(), torch.arange(BIG * BIG).reshape(BIG, BIG).float())
    assert_close(mine["small"].full_tensor(), torch.arange(8.0).reshape(4, 2))
    assert mine["plain"].tolist() == [0, 1, 2]
    store.save(2, {"part": {name: tensor * 2 for name, tensor in mine.items()}, "n": 2})
    assert store.steps() == [1, 2]
    with pytest.raises(DinoError, match="could not be written"):  # in both, though only one makes folders
        CheckpointStore(Path(folder) / "step_0000002" / "meta.json").save(3, tiny())
    distributed.barrier()
    distributed.disable()


@pytest.mark.slow
def test_one_process_and_two_read_each_others_checkpoints(tmp_path):
    from tests.test_distributed import _free_port

    part = {"big": torch.arange(BIG * BIG).reshape(BIG, BIG).float(), "small": torch.arange(8.0).reshape(4, 2)}
    part["plain"] = torch.arange(3.0)
    store = CheckpointStore(tmp_path)
    store.save(1, {"part": part, "n": 1})
    torch.multiprocessing.spawn(_rank_of_two, args=(str(tmp_path), _free_port()), nprocs=2)
    assert store.read_meta(2)["world_size"] == 2
    assert_same(store.load(2), {"part": {name: tensor * 2 for name, tensor in part.items()}, "n": 2})
