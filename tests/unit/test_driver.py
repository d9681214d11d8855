"""The driver of a run: what it calls bad input."""

import pytest

from datasets_prep.errors import UserError
from jobs.train import _is_user_error
from service.data.store import NotFound, StoreUnavailable


class Wrapped(Exception):
    """As Ray hands on what a worker raised."""

    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


@pytest.mark.parametrize("wrap", [Wrapped, lambda error: error])
def test_an_outage_of_the_storage_is_no_bad_input(wrap):
    assert _is_user_error(wrap(UserError("data.uri=x: no such data set")))
    assert _is_user_error(wrap(NotFound("s3://bucket/x does not exist")))
    assert not _is_user_error(wrap(StoreUnavailable("s3://bucket/x gave no answer for 60 s")))
    assert not _is_user_error(wrap(RuntimeError("out of memory")))
