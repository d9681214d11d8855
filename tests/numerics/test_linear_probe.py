"""The linear probe finds scikit-learn's optimum, alone and for many label draws at once."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from datasets_prep.errors import UserError
from service.data.draws import key, permutation
from service.evaluate import linear_probe, report


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = permutation(key(0), len(labels))
    train, test = linear_probe.standardise(*torch.tensor(images[order], dtype=torch.float32).split((1297, 500)))
    return train, torch.tensor(labels[order][:1297]), test, torch.tensor(labels[order][1297:])


@pytest.fixture(scope="module")
def random_features(digits):
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    train, test = linear_probe.standardise((digits[0] @ weight).relu(), (digits[2] @ weight).relu())
    return train, digits[1], test, digits[3]


def sklearn_probe(x, y, c):
    return LogisticRegression(C=c, tol=1e-10, max_iter=20000).fit(x.double().numpy(), y.numpy())


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("features", ["digits", "random_features"])
def test_all_labels_agree_with_sklearn(features, c, request):
    train, train_y, test, test_y = request.getfixturevalue(features)
    ours = linear_probe.accuracy(linear_probe.fit(train, train_y, 10, c), test, test_y)[0].item()
    theirs = 100 * sklearn_probe(train, train_y, c).score(test.numpy(), test_y.numpy())
    assert ours == pytest.approx(theirs, abs=0.5)


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("features", ["digits", "random_features"])
def test_few_labels_agree_with_sklearn(features, c, request):
    train, train_y, test, test_y = request.getfixturevalue(features)
    index = torch.from_numpy(report.label_draws(train_y.numpy(), 10, 3, 4, seed=0))
    ours = linear_probe.accuracy(linear_probe.fit(train[index], train_y[index], 10, c), test, test_y)[0]
    theirs = [100 * sklearn_probe(train[i], train_y[i], c).score(test.numpy(), test_y.numpy()) for i in index]
    np.testing.assert_allclose(ours, theirs, atol=0.5)


@pytest.mark.parametrize("per_class", [4, 40])  # fewer and more samples than the 64 features
def test_weights_equal_sklearn(digits, per_class):
    index = report.label_draws(digits[1].numpy(), 10, per_class, 1, seed=0)[0]
    x, y = digits[0][index].double(), digits[1][index]
    ours, theirs = linear_probe.fit(x, y, 10, 0.5, tolerance=1e-9), sklearn_probe(x, y, 0.5)
    np.testing.assert_allclose(ours.weight.T, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.bias, theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)


def test_problems_do_not_touch_each_other(digits):
    x, y = digits[0][:80].reshape(2, 40, 64), digits[1][:80].reshape(2, 40)
    together, alone = (
        linear_probe.fit(x, y, 10, 1.0, tolerance=1e-8),
        linear_probe.fit(x[1], y[1], 10, 1.0, tolerance=1e-8),
    )
    np.testing.assert_allclose(together.weight[1], alone.weight, atol=1e-5)


def test_chunks_change_nothing(digits, monkeypatch):
    x, y = digits[0][:300].double(), digits[1][:300]
    whole = linear_probe.fit(x, y, 10, 1.0, tolerance=1e-8)
    predicted = linear_probe.predict(whole, digits[2].double())
    monkeypatch.setattr(linear_probe, "_CHUNK", 64 * 37)
    np.testing.assert_allclose(linear_probe.fit(x, y, 10, 1.0, tolerance=1e-8).weight, whole.weight, atol=1e-6)
    assert torch.equal(linear_probe.predict(whole, digits[2].double()), predicted)


def test_standardised_features_have_mean_0_and_mean_variance_1():
    x = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 6.0]])
    train, other = linear_probe.standardise(x, x + 1)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-7)
    assert train.var(0, correction=0).mean().item() == pytest.approx(1.0)
    np.testing.assert_allclose(other - train, (3 / 5) ** 0.5, rtol=1e-6)  # variances 1, 0, 4
    assert linear_probe.standardise(torch.ones(4, 2))[0].abs().max() == 0


def test_features_of_a_diverged_encoder_are_an_error():
    with pytest.raises(UserError, match=r"1 of 2 features hold infinite values or NaN"):
        linear_probe.standardise(torch.tensor([[1.0, 2.0], [float("nan"), 3.0]]))


def test_collapsed_features_score_chance():
    x, y = linear_probe.standardise(torch.ones(100, 8))[0], torch.arange(100) % 10
    assert linear_probe.accuracy(linear_probe.fit(x, y, 10, 1.0), x, y)[0].item() == pytest.approx(10.0)


def test_an_unfinished_fit_warns(digits, caplog):
    linear_probe.fit(*digits[:2], 10, 1.0, iterations=2)
    assert "stopped early" in caplog.text


def test_standard_error_is_binomial():
    probe = linear_probe.Probe(torch.eye(2), torch.zeros(2))
    x = torch.tensor([[1.0, 0.0]] * 100)
    percent, error = linear_probe.accuracy(probe, x, (torch.arange(100) >= 80).long())
    assert (percent.item(), error.item()) == (pytest.approx(80.0), pytest.approx(4.0))


def test_label_draws_are_nested_balanced_and_of_the_seed(digits):
    labels = digits[1].numpy()
    one, five = (report.label_draws(labels, 10, count, 7, seed=3) for count in (1, 5))
    assert five.shape == (7, 50)
    assert all(np.isin(one[r], five[r]).all() for r in range(7))
    np.testing.assert_array_equal(labels[five], np.repeat(np.arange(10), 5)[None].repeat(7, 0))
    assert all(len(set(row)) == 50 for row in five.tolist())
    np.testing.assert_array_equal(one[:3], report.label_draws(labels, 10, 1, 3, seed=3))
    assert (one != report.label_draws(labels, 10, 1, 7, seed=4)).any()


def test_too_few_samples_of_a_class_is_an_error():
    with pytest.raises(UserError, match=r"labels_per_class=3 exceeds the 2 training samples of class 1"):
        report.label_draws(np.array([0, 0, 0, 1, 1]), 2, 3, 1, seed=0)


def test_labels_outside_the_classes_are_an_error(digits):
    settings = {"c": 1.0, "k": 5, "temperature": 0.07, "labels_per_class": (), "draws": 2, "seed": 0}
    with pytest.raises(UserError, match=r"500 of 500 test samples have a label outside 0…9, such as -1"):
        report.evaluate_features(*digits[:3], torch.full((500,), -1), classes=10, **settings)


def test_paired_interval_is_students():
    mean, half = report.paired_interval(np.array([3.0, 5.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    assert mean == pytest.approx(3.0)
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(2) at 97.5 %, standard deviation 1


def test_report_scores_digits_and_compares_with_the_better_baseline(digits, random_features):
    settings = {"classes": 10, "c": 1.0, "k": 20, "temperature": 0.07, "labels_per_class": (1, 5), "draws": 20}
    raw, other = (report.evaluate_features(*data, **settings, seed=0) for data in (digits, random_features))
    numbers = report.percentages(raw)
    assert list(numbers) == ["1", "5", "all", "knn"]
    assert numbers["1"] == pytest.approx(66, abs=4)
    assert numbers["5"] == pytest.approx(85, abs=3)
    assert numbers["all"] == pytest.approx(96, abs=1.5)
    assert numbers["knn"] == pytest.approx(98, abs=1.5)
    share = numbers["all"] / 100
    assert raw["all"].standard_error == pytest.approx(100 * (share * (1 - share) / 500) ** 0.5, rel=1e-3)
    rows = {"random": other, "raw": raw, "same": raw}
    for column, gain in report.gains(rows).items():
        best = max(numbers[column], report.percentages(other)[column])
        assert gain["points"] == pytest.approx(numbers[column] - best, abs=2e-3)
        assert gain["over"] in ("random", "raw")
