"""VICReg's loss, forward and backward, B 512, D 4096, against explicit D×D covariances (plain re-implementation)."""

import torch

from service.losses import vicreg_terms
from tests.bench._report import alternate, close, ratio

BATCH, DIM, REPEATS = 512, 4096, 5


def plain(z1, z2):
    """The loss as the paper writes it, covariance matrices and all."""
    total = 25 * (z1 - z2).square().mean()
    for z in (z1, z2):
        total = total + 25 * torch.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()
        centred = z - z.mean(0)
        covariance = centred.T @ centred / (len(z) - 1)
        total = total + (covariance - torch.diag(covariance.diagonal())).square().sum() / z.shape[1]
    return total


def ours(z1, z2):
    terms = vicreg_terms(z1, z2, gamma=1.0, cov_norm="paper")
    return 25 * terms["inv"] + 25 * terms["std"] + terms["cov"]


def main():
    torch.manual_seed(0)
    views = [torch.randn(BATCH, DIM, requires_grad=True) for _ in range(2)]

    def step(loss):
        def work():
            for view in views:
                view.grad = None
            loss(*views).backward()
            return [view.grad for view in views]

        return work

    for a, b in zip(step(ours)(), step(plain)(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
    times = alternate({"gram": step(ours), "covariance": step(plain)}, REPEATS)
    speedup = ratio(times, "gram", "covariance")
    close("vicreg_loss", sorted(times["gram"])[REPEATS // 2], "s", "explicit D×D covariance, re-implemented", speedup)


if __name__ == "__main__":
    main()
