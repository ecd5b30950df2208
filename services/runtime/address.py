"""What an address says about who can reach it."""

from ipaddress import ip_address

ON_THIS_MACHINE = ("unix:", "unix-abstract:")


def is_loopback(address: str) -> bool:
    """Say whether an address, HOST:PORT or a gRPC URI, never leaves this machine.

    A name other than localhost may be anywhere: only this name and numbers are believed.
    """
    if address.startswith(ON_THIS_MACHINE):
        return True
    scheme, separator, rest = address.partition(":")
    if separator and scheme in ("dns", "ipv4", "ipv6"):
        address = rest.rpartition("/")[2]
    return all(_is_loopback_host(_host(endpoint)) for endpoint in address.split(","))


def _host(endpoint: str) -> str:
    if endpoint.startswith("["):
        return endpoint[1:].partition("]")[0]
    return endpoint.rpartition(":")[0] or endpoint


def _is_loopback_host(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
