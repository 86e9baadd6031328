"""Host names that mean this machine."""

import ipaddress


def is_this_machine(host: str) -> bool:
    """Whether a host is a loopback address, ``localhost`` or ``*.localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return _is_localhost(host)


def is_address_or_localhost(host: str) -> bool:
    """Whether a host is an IP address, ``localhost`` or ``*.localhost``: no one can make these point elsewhere."""
    if _is_localhost(host):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_localhost(host: str) -> bool:
    return host == "localhost" or host.endswith(".localhost")
