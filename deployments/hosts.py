"""Host names that mean the machine itself."""

import ipaddress


def is_this_machine(host: str) -> bool:
    """Whether a host is a loopback address, ``localhost`` or ``*.localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
