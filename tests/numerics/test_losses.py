import numpy as np
import pytest
import torch

from service import losses


def oracle(z1, z2, gamma, cov_norm):
    """VICReg's terms from their definitions, with explicit covariance matrices."""
    std, cov = 0.0, 0.0
    for z in (z1, z2):
        n, d = z.shape
        c = np.cov(z.T)
        std += np.maximum(0, gamma - np.sqrt(np.diag(c) + 1e-4)).mean()
        off = (c**2).sum() - (np.diag(c) ** 2).sum()
        cov += off / (d if cov_norm == "paper" else d * (d - 1))
    return {"inv": ((z1 - z2) ** 2).mean(), "std": std, "cov": cov}


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (2, 3), (8, 8)], ids=str)
@pytest.mark.parametrize("cov_norm", ["paper", "offdiag_mean"])
def test_terms_equal_the_definition(shape, cov_norm):
    rng = np.random.default_rng(0)
    z1, z2 = rng.normal(size=(2, *shape)) * 0.7
    got = losses.vicreg_terms(torch.tensor(z1), torch.tensor(z2), gamma=1.0, cov_norm=cov_norm)
    for name, value in oracle(z1, z2, 1.0, cov_norm).items():
        np.testing.assert_allclose(got[name].item(), value, rtol=1e-10)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7)], ids=["moments", "gram"])
def test_gradients_equal_finite_differences(shape):
    torch.manual_seed(0)
    z1, z2 = (torch.randn(shape, dtype=torch.float64, requires_grad=True) * 0.5 for _ in range(2))

    def total(a, b):
        terms = losses.vicreg_terms(a, b, gamma=1.0, cov_norm="paper")
        return terms["inv"] + 2 * terms["std"] + 3 * terms["cov"]

    assert torch.autograd.gradcheck(total, (z1.detach().requires_grad_(), z2.detach().requires_grad_()))


def test_gram_trick_keeps_fp32_gradients():
    torch.manual_seed(1)
    z = torch.randn(64, 512)
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = z.detach().clone().to(dtype).requires_grad_()
        losses.variance_covariance(x, gamma=1.0, cov_norm="paper")[1].backward()
        grads.append(x.grad.double())
    relative = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert relative < 1e-5


def test_hinge_is_silent_above_gamma_and_sees_collapse():
    spread = torch.randn(4096, 4, dtype=torch.float64) * 3
    assert losses.variance_covariance(spread, gamma=1.0, cov_norm="paper")[0] == 0
    collapsed = torch.ones(16, 4, dtype=torch.float64)
    np.testing.assert_allclose(losses.variance_covariance(collapsed, gamma=1.0, cov_norm="paper")[0], 1 - 1e-2)


def test_statistics_stay_fp32_under_autocast():
    z = torch.randn(8, 32)
    plain = losses.vicreg_terms(z, z + 0.1, gamma=1.0, cov_norm="paper")
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses.vicreg_terms(z, z + 0.1, gamma=1.0, cov_norm="paper")
    for name in plain:
        assert torch.equal(plain[name], inside[name])


def nt_xent_oracle(z1, z2, temperature):
    """SimCLR's eq. 1, pair by pair."""
    z = np.concatenate([z1, z2])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    n, total = len(z1), 0.0
    for i in range(2 * n):
        others = [np.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i]
        total -= np.log(np.exp(z[i] @ z[(i + n) % (2 * n)] / temperature) / np.sum(others))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_its_definition(temperature):
    z1, z2 = np.random.default_rng(0).normal(size=(2, 7, 4)) * 3
    got = losses.nt_xent(torch.tensor(z1), torch.tensor(z2), temperature)
    np.testing.assert_allclose(got.item(), nt_xent_oracle(z1, z2, temperature), rtol=1e-12)


def test_nt_xent_has_the_gradients_of_finite_differences_and_ignores_lengths():
    z1, z2 = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    views = [z.requires_grad_() for z in (z1.clone(), z2.clone())]
    assert torch.autograd.gradcheck(lambda a, b: losses.nt_xent(a, b, 0.2), views)
    torch.testing.assert_close(losses.nt_xent(9 * z1, z2 / 9, 0.2), losses.nt_xent(z1, z2, 0.2), rtol=1e-12, atol=0)


def test_nt_xent_of_a_collapse_is_chance_and_of_apart_pairs_nothing():
    collapsed = torch.ones(8, 3, dtype=torch.float64)
    np.testing.assert_allclose(losses.nt_xent(collapsed, collapsed, 0.1), np.log(15), rtol=1e-12)
    apart = torch.eye(8, dtype=torch.float64)
    assert losses.nt_xent(apart, apart, 0.05) < 1e-6
