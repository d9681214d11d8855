"""Weighted k-NN against a plain NumPy vote."""

import numpy as np
import pytest
import torch

from service.evaluate import knn


def oracle(train, labels, queries, classes, k, temperature):
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, queries)]
    out = []
    for query in unit[1]:
        similarity = unit[0] @ query
        votes = np.zeros(classes)
        for i in np.argsort(-similarity)[:k]:
            votes[labels[i]] += np.exp(similarity[i] / temperature)
        out.append(votes.argmax())
    return np.array(out)


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    centres = rng.normal(size=(5, 8))
    return centres[labels] + rng.normal(size=(300, 8)), labels, rng.normal(size=(60, 8))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 1.0)])
def test_votes_equal_the_plain_vote(clouds, k, temperature):
    train, labels, queries = clouds
    got = knn.predict(*map(torch.tensor, clouds), classes=5, k=k, temperature=temperature)
    np.testing.assert_array_equal(got, oracle(train, labels, queries, 5, k, temperature))


def test_chunks_change_nothing(clouds, monkeypatch):
    tensors = [torch.tensor(part) for part in clouds]
    whole = knn.predict(*tensors, classes=5, k=10, temperature=0.07)
    monkeypatch.setattr(knn, "_CHUNK", 300 * 7)
    assert torch.equal(knn.predict(*tensors, classes=5, k=10, temperature=0.07), whole)


def test_more_neighbours_than_samples_are_all_of_them():
    train, labels = torch.eye(3), torch.tensor([0, 1, 1])
    got = knn.predict(train, labels, torch.tensor([[1.0, 0.9, 0.9]]), classes=2, k=20, temperature=1.0)
    assert got.tolist() == [1]


def test_tiny_temperature_leaves_the_nearest(clouds):
    train, labels, _ = (torch.tensor(part) for part in clouds)
    got = knn.predict(train, labels, train + 1e-4, classes=5, k=20, temperature=1e-6)
    assert (got == labels).double().mean() == 1.0


def test_accuracy_is_percent_with_binomial_error():
    x, y = torch.eye(2), torch.tensor([0, 1])
    queries, truth = x.repeat(50, 1), torch.tensor([0, 1] * 40 + [1, 0] * 10)
    got = knn.accuracy(x, y, queries, truth, classes=2, k=1, temperature=0.1)
    assert got == (pytest.approx(80.0), pytest.approx(4.0))
