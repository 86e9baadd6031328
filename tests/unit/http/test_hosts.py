import pytest

from deployments.http.hosts import is_address_or_localhost, is_this_machine


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "app.localhost"])
def test_loopback_addresses_and_localhost_are_this_machine(host: str) -> None:
    assert is_this_machine(host)
    assert is_address_or_localhost(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "2001:db8::1"])
def test_other_addresses_cannot_be_pointed_elsewhere_but_are_not_this_machine(host: str) -> None:
    assert not is_this_machine(host)
    assert is_address_or_localhost(host)


@pytest.mark.parametrize("host", ["", "example.com", "localhost.example.com", "notlocalhost", "127.0.0.1.example.com"])
def test_other_names_are_neither(host: str) -> None:
    assert not is_this_machine(host)
    assert not is_address_or_localhost(host)
