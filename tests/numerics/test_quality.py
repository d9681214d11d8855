"""Every metric against its formula in NumPy and SciPy, and against what is known of simple features."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist

from service.evaluate import quality

SHAPES = [(40, 6), (6, 40), (12, 12)]


def features(n, d, seed=0, views=1):
    """Correlated features that are not centred."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d)) * np.arange(1, d + 1) ** -0.5
    return rng.normal(size=(views, n, d)) @ mixing + rng.normal(size=d)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(float(got), want, rtol=tolerance, atol=1e-12)


def entropy_rank(values, eps=0.0):
    p = values / values.sum() + eps
    p = p[p > 0]
    return math.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_spread_and_spectrum(n, d):
    [x] = features(n, d)
    t = torch.from_numpy(x)
    np.testing.assert_allclose(quality.deviations(t), x.std(0, ddof=1), rtol=1e-12)
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    variances = singular**2 / (n - 1)
    got = quality.spectrum(t)
    assert len(got) == min(n, d)
    np.testing.assert_allclose(got, variances, rtol=1e-9, atol=1e-11 * variances[0])
    close(quality.effective_rank(got), entropy_rank(singular), 1e-6)
    raw = np.linalg.svd(x, compute_uv=False)
    close(quality.rankme(t), entropy_rank(raw, quality.EPS), 1e-6)
    close(quality.isotropy(got, d), iso_score(np.linalg.eigvalsh(np.cov(x.T))), 1e-9)
    close(quality.variance_explained(got, 3), variances[:3].sum() / variances.sum())


def iso_score(variances):
    """The eight steps of Rudman et al. 2022 from the covariance's eigenvalues on."""
    n = len(variances)
    scaled = np.sqrt(n) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(scaled - 1) / np.sqrt(2 * (n - np.sqrt(n)))
    used = (n - defect**2 * (n - np.sqrt(n))) ** 2 / n**2
    return (n * used - 1) / (n - 1)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_correlation_uniformity_and_alignment(n, d):
    a, b = features(n, d, views=2)
    x = torch.from_numpy(np.stack([a, b]))
    r = np.abs(np.corrcoef(a.T))
    close(quality.correlation(x[0]), (r.sum() - d) / (d * (d - 1)))
    u, v = (y / np.linalg.norm(y, axis=1, keepdims=True) for y in (a, b))
    close(quality.uniformity(x[0]), math.log(np.exp(-2 * pdist(u) ** 2).mean()))
    close(quality.alignment(x), ((u - v) ** 2).sum(1).mean())
    third = torch.cat([x, x[:1]])  # views 1 and 3 coincide: two pairs of three are apart
    close(quality.alignment(third), ((u - v) ** 2).sum(1).mean() * 2 / 3)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize(("n", "d"), [(40, 6), (5, 40), (9, 17)])
def test_lidar(n, d, views):
    x = features(n, d, views=views)
    means = x.mean(0)
    between = np.cov(means.T)
    off = (x - means).reshape(-1, d)
    within = off.T @ off / (n * (views - 1)) + quality.LIDAR_DELTA * np.eye(d)
    root = np.linalg.inv(sqrtm(within).real)
    values = np.linalg.eigvalsh(root @ between @ root).clip(0)[-min(n, d) :]
    close(quality.lidar(torch.from_numpy(x)), entropy_rank(values, quality.EPS), 1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_alpha_of_a_power_law(alpha):
    variances = torch.arange(1, 65, dtype=torch.float64) ** -alpha
    close(quality.alpha_req(variances), alpha)
    close(quality.alpha_req(torch.cat([variances, torch.zeros(8)])), alpha)


def test_alpha_weighs_octaves_alike():
    variances = np.sort(np.random.default_rng(0).random(30))[::-1].copy()
    j = np.arange(1, 31)
    slope, _ = np.polyfit(np.log(j), np.log(variances), 1, w=j**-0.5)  # polyfit squares its weights
    close(quality.alpha_req(torch.from_numpy(variances)), -slope)


def test_isotropic_features_have_full_rank():
    raw = np.random.default_rng(0).normal(size=(200, 9))
    raw[:, 0] = 1
    x = torch.from_numpy(np.linalg.qr(raw)[0][:, 1:]) * 199**0.5  # columns orthogonal to one another and to the mean
    got = quality.report(x[None])
    for name, want in {
        "effective_rank": 8,
        "rank_ratio": 1,
        "isotropy": 1,
        "variance": 1,
        "std_mean": 1,
        "std_min": 1,
        "variance_explained_1": 1 / 8,
        "variance_explained_10": 1,
    }.items():
        assert got[name] == pytest.approx(want, rel=1e-9), name
    assert got["rankme"] == pytest.approx(8, rel=1e-4)
    assert abs(got["correlation"]) < 1e-12 and abs(got["alpha_req"]) < 1e-9
    assert "alignment" not in got and "lidar" not in got


def test_features_on_a_line_have_rank_one():
    line = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * torch.arange(1, 9, dtype=torch.float64)
    got = quality.report(line[None])
    for name, want in {"effective_rank": 1, "rankme": 1, "variance_explained_1": 1, "correlation": 1}.items():
        assert got[name] == pytest.approx(want, abs=1e-4), name
    assert got["isotropy"] == pytest.approx(0, abs=1e-9) and "alpha_req" not in got
    assert got["rank_ratio"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("shape", [(2, 5, 4), (1, 1, 4), (2, 1, 4), (1, 3, 1), (2, 2, 9)])
def test_constant_features_have_collapsed(shape):
    got = quality.report(torch.full(shape, 3.0))
    for name in ("std_mean", "std_min", "variance", "effective_rank", "isotropy", "correlation", "norm_std"):
        assert got[name] == 0, name
    assert got["norm_mean"] == pytest.approx(3 * shape[2] ** 0.5)
    assert got["rankme"] == pytest.approx(1, abs=1e-4) and got["variance_explained_1"] == 1
    assert got.get("uniformity", 0.0) == pytest.approx(0, abs=1e-12) and ("uniformity" in got) == (shape[1] > 1)
    assert "alpha_req" not in got
    if shape[0] == 2:
        assert got["alignment"] == pytest.approx(0, abs=1e-12) and got["lidar"] == 0
    assert quality.verdicts(got)["variance"] == quality.verdicts(got)["rank_ratio"] == "collapsed"


def test_zeros_have_no_rank_and_nan_is_told():
    assert quality.report(torch.zeros(1, 4, 3))["rankme"] == 0
    broken = torch.ones(2, 4, 3)
    broken[1, 2, 0] = math.inf
    got = quality.report(broken)
    assert list(got) == ["variance"] and math.isnan(got["variance"])
    assert quality.verdicts(got) == {"variance": "collapsed"}


def test_views_are_samples_of_their_own():
    x = torch.from_numpy(features(20, 5, views=2))
    together, apart = quality.report(x), quality.report(x.flatten(0, 1)[None])
    for name in apart.keys() - {"uniformity"}:
        assert together[name] == pytest.approx(apart[name], rel=1e-12), name
    close(together["uniformity"], (quality.uniformity(x[0]) + quality.uniformity(x[1])) / 2)
    assert together["lidar"] > 0 and together["alignment"] > 0


def test_half_precision_is_measured_in_float64():
    x = torch.from_numpy(features(30, 6, views=2)).to(torch.bfloat16)
    assert quality.report(x) == quality.report(x.double())


def test_many_dimensions_correlate_by_an_even_sample():
    x = torch.from_numpy(features(10, 1030))
    assert quality.report(x)["correlation"] == pytest.approx(float(quality.correlation(x[0, :, ::3])), rel=1e-12)


def test_verdicts_follow_the_limits():
    judged = quality.verdicts({"variance": 0.05, "rank_ratio": 0.6, "uniformity": -0.1, "norm_mean": 1.0})
    assert judged == {"variance": "low", "rank_ratio": "healthy", "uniformity": "collapsed"}
    assert quality.verdicts({"variance": 0.1, "uniformity": -2.0}) == {"variance": "healthy", "uniformity": "healthy"}
    assert quality.verdicts({"variance": 0.009, "uniformity": -1.0}) == {"variance": "collapsed", "uniformity": "low"}
