"""The losses by hand, against autograd and the definitions."""

from __future__ import annotations

import pytest
import torch

from lorastack.train import loss
from lorastack.train.loss import SoftTargets, drift_loss, hard_loss, soft_loss

P, N, H, J = 150, 9, 8, 3


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two full slices and a piece."""
    monkeypatch.setattr(loss, "_CPU_LOGITS", 1)


def test_hard_loss_matches_autograd() -> None:
    torch.manual_seed(2)
    r_PH, rows_NH = torch.randn(P, H, requires_grad=True), torch.randn(N, H)
    columns_P = torch.randint(N, (P,))
    wanted = torch.nn.functional.cross_entropy(r_PH @ rows_NH.T, columns_P, reduction="sum")
    wanted.backward()
    found, gradient_PH = hard_loss(r_PH.detach(), rows_NH, columns_P)
    torch.testing.assert_close(found, wanted.detach())
    torch.testing.assert_close(gradient_PH, r_PH.grad)


def test_hard_loss_of_a_sure_head_is_finite() -> None:
    r_PH, rows_NH = torch.tensor([[400.0]]), torch.tensor([[1.0], [-1.0]])
    for column in (0, 1):
        found, gradient_PH = hard_loss(r_PH, rows_NH, torch.tensor([column]))
        assert bool(found.isfinite()) and float(gradient_PH) == -2.0 * column * -1.0


def test_soft_loss_matches_autograd() -> None:
    """J tokens of their own and the rest as one event; some places stand for no token."""
    torch.manual_seed(3)
    r_PH, rows_NH = torch.randn(P, H, requires_grad=True), torch.randn(N, H)
    columns_PJ = torch.stack([torch.randperm(N)[:J] for _ in range(P)])
    shares = torch.softmax(torch.randn(P, J + 2), -1)
    probs_PJ, rest_P = shares[:, :J].clone(), shares[:, J]  # the last share is lost
    unknown_P = torch.rand(P) < 0.5
    probs_PJ[unknown_P, 1], columns_PJ[unknown_P, 1] = 0.0, columns_PJ[unknown_P, 0]
    soft = SoftTargets(columns_PJ, probs_PJ, rest_P)

    log_PN = torch.log_softmax(r_PH @ rows_NH.T, -1)
    wanted = torch.zeros(())
    for p in range(P):
        own = [j for j in range(J) if probs_PJ[p, j] > 0]
        others = sorted(set(range(N)) - {int(columns_PJ[p, j]) for j in own})
        for j in own:
            ratio = probs_PJ[p, j].log() - log_PN[p, columns_PJ[p, j]]
            wanted = wanted + probs_PJ[p, j] * ratio
        wanted = wanted + rest_P[p] * (rest_P[p].log() - log_PN[p, others].logsumexp(-1))
    wanted.backward()
    found, gradient_PH = soft_loss(r_PH.detach(), rows_NH, soft)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient_PH, r_PH.grad, rtol=1e-4, atol=1e-5)


def test_soft_loss_is_least_where_the_head_agrees() -> None:
    torch.manual_seed(4)
    r_PH, rows_NH = torch.randn(P, H), torch.randn(N, H)
    probs_PN = torch.softmax(r_PH @ rows_NH.T, -1)
    best = probs_PN.topk(J)
    soft = SoftTargets(best.indices, best.values, 1 - best.values.sum(-1))
    found, gradient_PH = soft_loss(r_PH, rows_NH, soft)
    assert abs(float(found)) < 1e-3
    assert float(gradient_PH.abs().max()) < 1e-5


@pytest.mark.parametrize("num_outputs", [9, 4096, 49152])
def test_no_more_logits_are_alive_than_said(
    monkeypatch: pytest.MonkeyPatch, num_outputs: int
) -> None:
    monkeypatch.setattr(loss, "_CPU_LOGITS", 1 << 22)
    parts = list(loss.slices(2048, torch.empty(num_outputs, 1)))
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(2048))
    assert max(part.stop - part.start for part in parts) * num_outputs <= 1 << 22


def test_drift_loss_matches_autograd() -> None:
    torch.manual_seed(4)
    x_PH, base_PH = torch.randn(P, H, requires_grad=True), torch.randn(P, H)
    base_PH[::3] = x_PH.detach()[::3]
    rows_VH = torch.randn(N, H)
    own, base = ((each @ rows_VH.T).log_softmax(-1) for each in (x_PH, base_PH))
    wanted = torch.nn.functional.kl_div(own, base, log_target=True, reduction="sum")
    wanted.backward()
    found, gradient_PH, same = drift_loss(x_PH.detach(), base_PH, rows_VH)
    torch.testing.assert_close(found, wanted.detach())
    torch.testing.assert_close(gradient_PH, x_PH.grad)
    assert P / 3 <= int(same) == int((own.argmax(-1) == base.argmax(-1)).sum()) < P


def test_nothing_drifts_from_itself() -> None:
    x_PH, rows_VH = 50 * torch.randn(P, H), torch.randn(N, H)
    found, gradient_PH, same = drift_loss(x_PH, x_PH, rows_VH)
    assert float(found) == 0.0 and int(same) == P and not bool(gradient_PH.any())
