"""Addresses of clusters that are not there."""

from __future__ import annotations

import pytest

from factsmith.cluster.engine import Ray
from factsmith.core.errors import ClusterError

pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "nothing answers"),
        ("http://127.0.0.1:80", "host:port"),
        ("somewhere", "host:port"),
        ("ray://127.0.0.1:1", "nothing answers"),
    ],
)
def test_an_address_without_a_cluster_is_refused_quickly(address: str, words: str) -> None:
    with pytest.raises(ClusterError, match=words) as caught:
        Ray(address).__enter__()
    assert caught.value.argument == "address"
