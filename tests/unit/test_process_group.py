"""The interface by which a training worker speaks to the others."""

import psutil

from graft.training.process_group import interface_of


def test_the_interface_is_found_by_its_address() -> None:
    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    assert any(entry.address == "127.0.0.1" for entry in psutil.net_if_addrs()[loopback])


def test_an_address_that_no_interface_has_is_left_to_gloo() -> None:
    assert interface_of("203.0.113.7") is None
