import json

import numpy as np
import pytest

from tests.golden import recapture


@pytest.mark.parametrize("name", recapture.NAMES)
def test_twenty_steps_give_the_pinned_losses(name, digits):
    pinned = json.loads(recapture.FILE.read_text())["losses"][name]
    assert len(pinned) == 20 and len(set(pinned)) == 20
    np.testing.assert_allclose(recapture.losses(name, digits), pinned, rtol=1e-9)
