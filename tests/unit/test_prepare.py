"""What is compared before the first step."""

import pytest

from dstrain.errors import UserError
from dstrain.prepare import _check_same_data


def test_hosts_with_different_data_are_named():
    _check_same_data([("a", "1"), ("a", "1"), ("b", "1")])
    with pytest.raises(UserError, match="a and b have different training data: give every host the same"):
        _check_same_data([("a", "1"), ("a", "1"), ("b", "2")])
