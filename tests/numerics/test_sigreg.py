"""SIGReg against the published forms written out, its gradient, its slices, and what it is for."""

import numpy as np
import pytest
import torch
from scipy import stats

from service.sigreg import KNOTS, directions, epps_pulley, sigreg


def embeddings(count=40, dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, dim, dtype=dtype, generator=generator) * 1.3 + 0.2


def published(x, variant):
    """Both statistics with complex exponentials, as their papers' codes define them, (S,)."""
    t = np.linspace(-3, 3, 10) if variant == "bcs" else np.linspace(0, 3, 17)
    window = np.exp(-(t**2) / 2)
    ecf = np.exp(1j * x[:, :, None] * t).mean(0)
    error = np.abs(ecf - window) ** 2 * window
    return np.trapezoid(error, t, axis=1) if variant == "bcs" else len(x) * 2 * np.trapezoid(error, t, axis=1)


@pytest.mark.parametrize("variant", ["bcs", "lejepa"])
def test_the_statistic_is_the_published_one(variant):
    z = embeddings()
    slices = directions(7, 6, 11, z)
    expected = published((z @ slices).numpy(), variant)
    ours = epps_pulley(z @ slices, KNOTS[variant]) * (len(z) if variant == "lejepa" else 1)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)
    assert sigreg(z, 7, slices=11, variant=variant).item() == pytest.approx(expected.mean(), rel=1e-10)


@pytest.mark.parametrize("variant", ["bcs", "lejepa"])
def test_gradients_are_those_of_finite_differences(variant, monkeypatch):
    monkeypatch.setattr("service.sigreg._CHUNK", 30)  # several chunks
    z = embeddings(10, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sigreg(z, 3, slices=7, variant=variant), z)


def test_fp32_stays_close_over_all_knots():
    z = embeddings(200, 8, torch.float32) * 3
    for variant in ("bcs", "lejepa"):
        single, double = (sigreg(x, 1, slices=64, variant=variant).item() for x in (z, z.double()))
        assert single == pytest.approx(double, rel=1e-4)


def test_slices_are_uniform_on_the_sphere_and_follow_the_seed():
    slices = directions(1, 3, 20_000, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(20_000, dtype=torch.float64))
    for coordinate in slices.numpy():  # on a sphere in three dimensions each coordinate is uniform (Archimedes)
        assert stats.kstest(coordinate, stats.uniform(-1, 2).cdf).pvalue > 0.01
    assert torch.equal(slices, directions(torch.tensor(1), 3, 20_000, slices))
    assert not torch.allclose(slices, directions(2, 3, 20_000, slices))


@pytest.mark.parametrize("variant", ["bcs", "lejepa"])
def test_it_is_least_for_a_standard_normal_and_sees_a_collapse(variant):
    normal = torch.randn(2000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = sigreg(normal, 0, slices=64, variant=variant)
    for worse in (normal * 0.01, normal * 3, normal + 1, normal.clamp(-0.7, 0.7), normal[:, :1].expand(-1, 8)):
        assert sigreg(worse, 0, slices=64, variant=variant) > 5 * best
