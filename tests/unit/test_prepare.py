"""What is compared before the first step."""

import pytest

from dstrain.data.build import check_same_data
from dstrain.errors import UserError


def test_hosts_with_different_data_are_named():
    check_same_data([("a", "1"), ("a", "1"), ("b", "1")])
    with pytest.raises(UserError, match="a and b have different training data: give every host the same"):
        check_same_data([("a", "1"), ("a", "1"), ("b", "2")])
