"""SIGReg, forward and backward, both published forms, against their definitions (plain re-implementations).

`bcs`: B 256, D 128, 256 slices; the peer takes complex exponentials at all ten knots. `lejepa`: B 256, D 128, 1024
slices; the peer takes cosines and sines at all 17 knots at once. Both peers hold (B, slices, knots) in memory.
"""

import sys

import torch

from service.sigreg import directions, sigreg
from tests.bench._report import alternate, close, ratio

BATCH, DIM, REPEATS = 256, 128, 7
SLICES = {"bcs": 256, "lejepa": 1024}


def plain_bcs(z, slices):
    """Mean over slices of ∫ |E e^{itx} − e^{−t²/2}|² e^{−t²/2} dt over ten knots of [−3, 3]."""
    t = torch.linspace(-3, 3, 10)
    normal = torch.exp(-t.square() / 2)
    transform = torch.exp(1j * (z @ slices)[:, :, None] * t).mean(0)
    return torch.trapezoid((transform - normal).abs().square() * normal, t, dim=1).mean()


def plain_lejepa(z, slices):
    """B times the mean over slices of twice the same over 17 knots of [0, 3]."""
    t = torch.linspace(0, 3, 17)
    normal = torch.exp(-t.square() / 2)
    turned = (z @ slices)[:, :, None] * t
    apart = (turned.cos().mean(0) - normal).square() + turned.sin().mean(0).square()
    return 2 * len(z) * torch.trapezoid(apart * normal, t, dim=1).mean()


PEERS = {"bcs": plain_bcs, "lejepa": plain_lejepa}


def contestants(variant):
    """Forward and backward of ours and of the peer, each with directions drawn anew; they return the gradient."""
    torch.manual_seed(0)
    z = torch.randn(BATCH, DIM, requires_grad=True)
    count = SLICES[variant]

    def ours():
        z.grad = None
        sigreg(z, 0, slices=count, variant=variant).backward()
        return z.grad

    def drawn():
        slices = torch.randn(DIM, count)
        return slices / slices.norm(dim=0)

    def plain(slices=None):
        z.grad = None
        PEERS[variant](z, drawn() if slices is None else slices).backward()
        return z.grad

    torch.testing.assert_close(ours(), plain(directions(0, DIM, count, z)), rtol=1e-3, atol=1e-6)
    return ours, plain


def main():
    ratios, medians = {}, {}
    for variant in SLICES:
        print(variant, file=sys.stderr)
        ours, plain = contestants(variant)
        times = alternate({"recurrence": ours, "plain": plain}, REPEATS)
        ratios[variant] = ratio(times, "recurrence", "plain")
        medians[variant] = sorted(times["recurrence"])[REPEATS // 2]
    close(
        "sigreg",
        medians["lejepa"],
        "s",
        "published form on the full grid of knots, re-implemented",
        min(ratios.values()),
        **{f"ratio_{variant}": value for variant, value in ratios.items()},
    )


if __name__ == "__main__":
    main()
