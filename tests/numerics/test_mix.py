"""Mix-up and CutMix: who mixes with whom, by how much, and that neither ranks nor views matter."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from datasets_prep.errors import UserError
from service.data.mix import draw_mixes, mix
from tests.families import family_config

CPU = torch.device("cpu")


def drawn(positions, per_partition=4, step=3, **alphas):
    return draw_mixes(7, step, positions, per_partition, device=CPU, **{"mixup": 0.8, "cutmix": 1.0, **alphas})


def test_partners_are_others_of_the_same_partition_each_taken_once():
    shifts = set()
    for step in range(20):
        partner = drawn(range(24), step=step).partner
        assert sorted(partner.tolist()) == list(range(24))
        assert (partner != torch.arange(24)).all()
        assert torch.equal(partner // 4, torch.arange(24) // 4)
        shifts |= set(((partner - torch.arange(24)) % 4).tolist())
    assert shifts == {1, 2, 3}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_mix_as_one_process_does(world):
    views = torch.randn(2, 24, 3, 8, 8, dtype=torch.float64)
    whole = mix(views, drawn(range(24)))
    size = 24 // world
    for rank, part in enumerate(views.chunk(world, 1)):
        positions = range(rank * size, (rank + 1) * size)
        assert torch.equal(mix(part, drawn(positions)), whole[:, positions.start : positions.stop])
    assert not torch.equal(whole, mix(views, drawn(range(24), step=4)))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_shares_are_beta_distributed(name, alpha):
    mixes = drawn(range(4000), **{"mixup": 0.0, "cutmix": 0.0, name: alpha})
    assert kstest(mixes.share.numpy(), beta(alpha, alpha).cdf).statistic < 0.03
    assert mixes.cut.all() == (name == "cutmix") and mixes.cut.any() == (name == "cutmix")


def test_with_both_each_sample_takes_either():
    mixes = drawn(range(4000))
    assert abs(mixes.cut.float().mean() - 0.5) < 0.03
    assert kstest(mixes.share[mixes.cut].numpy(), beta(1, 1).cdf).statistic < 0.04
    assert kstest(mixes.share[~mixes.cut].numpy(), beta(0.8, 0.8).cdf).statistic < 0.04


def test_mixup_blends_and_all_views_alike():
    views = torch.randn(2, 8, 3, 6, 6, dtype=torch.float64)
    mixes = drawn(range(8), cutmix=0.0)
    share = mixes.share.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(mix(views, mixes), share * views + (1 - share) * views[:, mixes.partner])
    assert share.std() > 0.1


def test_cutmix_takes_a_rectangle_of_the_partner_from_views_of_any_size():
    mixes = drawn(range(64), mixup=0.0)
    for size in (40, 20):
        own = torch.arange(64.0).view(1, -1, 1, 1, 1).expand(2, 64, 3, size, size)
        mixed = mix(own, mixes)
        taken = mixed == mixes.partner.view(1, -1, 1, 1, 1)
        assert ((mixed == own) | taken).all() and torch.equal(taken[0], taken[1])
        rows, columns = taken[0, :, 0].any(2), taken[0, :, 0].any(1)
        assert torch.equal(taken[0, :, 0], rows[:, :, None] & columns[:, None, :])
        top, left, height, width = (mixes.box * size).unbind(1)
        torch.testing.assert_close(rows.sum(1).float(), height, atol=1.0, rtol=0)
        torch.testing.assert_close(columns.sum(1).float(), width, atol=1.0, rtol=0)
    inner = (mixes.box[:, :2] > 0).all(1) & ((mixes.box[:, :2] + mixes.box[:, 2:]) < 1).all(1)
    area = mixes.box[:, 2] * mixes.box[:, 3]
    assert inner.sum() > 5
    np.testing.assert_allclose(area[inner], 1 - mixes.share[inner], atol=1e-5)
    assert (area <= 1 - mixes.share + 1e-5).all()


def test_one_sample_of_a_partition_has_no_partner():
    with pytest.raises(UserError, match="need two samples of a partition.*lower data.partitions"):
        family_config("image_vicreg", "data.augment.mixup=0.8", "data.partitions=64")


def test_samples_that_the_loss_tells_apart_are_not_mixed():
    with pytest.raises(UserError, match="mixup and cutmix with family.loss.kind=nt_xent: it pushes a sample away"):
        family_config("image_vicreg", "data.augment.cutmix=1.0", "family.loss.kind=nt_xent")
