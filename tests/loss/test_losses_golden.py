"""The losses give the figures of the public release, in one process and in two."""

import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from tests.golden.loading import golden_tensors
from tests.golden.recipe import values

TEMPERATURE = 0.5


def u(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(values(name, shape)) * float(torch.tensor(shape[1:]).prod()) ** 0.5


def check_rank(rank: int, world: int) -> None:
    """Everything that is stored for this rank; what equals the single process is stored there alone."""
    golden = golden_tensors("ssl_step_losses")

    def expect(name: str, actual: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
        key = f"world{world}.rank{rank}.{name}"
        expected = golden[key if key in golden else f"world1.rank{rank}.{name}"]
        assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{key}: {text}")

    dino = DINOLoss(32)
    dino.center.copy_(0.1 * u("losses.dino.center", (1, 32)))
    teacher = u(f"losses.dino.teacher.rank{rank}", (6, 32))
    student = u(f"losses.dino.student.rank{rank}", (6, 32)).requires_grad_()
    expect("dino.sinkhorn", dino.sinkhorn_knopp_teacher(teacher, TEMPERATURE))
    expect("dino.sinkhorn_one_iteration", dino.sinkhorn_knopp_teacher(teacher, TEMPERATURE, n_iterations=1))
    expect("dino.softmax_center.0", dino.softmax_center_teacher(teacher, TEMPERATURE))
    dino.update_center(teacher)
    expect("dino.softmax_center.1", dino.softmax_center_teacher(teacher, TEMPERATURE))
    expect("dino.center.1", dino.center)
    loss = dino(student.chunk(2), dino.sinkhorn_knopp_teacher(teacher, TEMPERATURE).chunk(2))
    expect("dino.loss", loss)
    loss.backward()
    expect("dino.loss.grad", student.grad)

    ibot, rows = iBOTPatchLoss(32), 5 + 2 * rank
    ibot.center.copy_(0.1 * u("losses.ibot.center", (1, 1, 32)))
    teacher = u(f"losses.ibot.teacher.rank{rank}", (rows, 32))
    student = u(f"losses.ibot.student.rank{rank}", (rows, 32)).requires_grad_()
    targets = ibot.sinkhorn_knopp_teacher(teacher, TEMPERATURE, torch.tensor([rows]))
    expect("ibot.sinkhorn", targets)
    expect("ibot.softmax_center.0", ibot.softmax_center_teacher(teacher, TEMPERATURE))
    ibot.update_center(teacher[None])
    expect("ibot.softmax_center.1", ibot.softmax_center_teacher(teacher, TEMPERATURE))
    expect("ibot.center.1", ibot.center)
    masks = golden.get(f"world1.rank{rank}.ibot.masks", golden.get(f"world{world}.rank{rank}.ibot.masks")).bool()
    padding = torch.full((3, 32), 1 / 32)
    padded = torch.cat([student, u("losses.ibot.pad", (3, 32))])
    loss = ibot.forward_masked(padded, torch.cat([targets, padding]), masks, n_masked_patches=rows)
    expect("ibot.loss_masked", loss)
    loss.backward()
    expect("ibot.loss_masked.grad", student.grad)
    full_student = u(f"losses.ibot.full_student.rank{rank}", (4, 9, 32))
    full_teacher = u(f"losses.ibot.full_teacher.rank{rank}", (4, 9, 32)).softmax(dim=-1)
    expect("ibot.loss_full", ibot(full_student, full_teacher, masks))

    koleo = KoLeoLoss()
    features = u(f"losses.koleo.rank{rank}", (7, 24)).requires_grad_()
    loss = koleo(features)
    expect("koleo.loss", loss)
    loss.backward()
    expect("koleo.grad", features.grad)
    normalised = torch.nn.functional.normalize(features.detach(), dim=-1)
    assert torch.equal(koleo.pairwise_NNs_inner(normalised), golden[f"world{world}.rank{rank}.koleo.neighbours"]
                       if f"world{world}.rank{rank}.koleo.neighbours" in golden
                       else golden[f"world1.rank{rank}.koleo.neighbours"])  # fmt: skip
    duplicate = features.detach().clone()
    duplicate[1] = duplicate[0]
    expect("koleo.duplicate.loss", koleo(duplicate))


def test_one_process():
    check_rank(0, world=1)


def two_process_worker(rank: int, folder: str) -> None:
    sys.stdout = sys.stderr
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=Path(folder, "rendezvous").as_uri(), rank=rank, world_size=2
    )
    try:
        check_rank(rank, world=2)
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(two_process_worker, args=(str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("centering", ["sinkhorn_knopp_teacher", "softmax_center_teacher"])
def test_assignments_are_distributions_in_float32(centering):
    scores = torch.randn(10, 7).bfloat16()
    assignments = getattr(DINOLoss(7), centering)(scores, 0.07)
    assert assignments.dtype == torch.float32
    assert_close(assignments.sum(dim=1), torch.ones(10))
