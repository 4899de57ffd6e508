"""Where a webhook may point. Whoever names a URL has this host call it, from inside of our network:
so its host must resolve to public addresses, unless a setting allows others.

`parse_target` takes a URL apart once, strictly: what it lets through cannot be read in two ways.
`addresses_of` says which addresses may be connected to; a caller connects to one of these and does
not resolve the name again, or its owner could answer with another one the second time.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

from jobs.errors import JobsError

MAX_URL = 2000
_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)(#.*)?")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last 32 bits
# IANA's special-purpose registries, where Python's own lists are shorter in some of its versions.
_SPECIAL = tuple(
    ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20")
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Sequence[str]]


class TargetRefused(JobsError):
    """A URL that is not called, whatever it would answer. `pointer`: see UploadRejected."""

    code = "webhook-url-refused"
    pointer: str | None = None


class TargetUnknown(JobsError):
    """A host that does not resolve now."""

    code = "webhook-host-unknown"
    pointer: str | None = None


@dataclass(frozen=True)
class Target:
    """`host`: a name in lower case or an address, without brackets; `path`: with its query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """As the header Host has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_target(url: str) -> Target:
    """TargetRefused where the URL is not one of http or https with a host and nothing odd."""
    if len(url) > MAX_URL:
        raise TargetRefused(f"The URL has more than {MAX_URL} characters.")
    match = _URL.fullmatch(url) if re.fullmatch(r"[\x21-\x7e]+", url) else None
    if match is None or re.search(r'[\\"<>^`{|}]', url):
        raise TargetRefused(
            "This is no URL like https://hooks.example/path: characters outside of ASCII are "
            "written as %XX, and in the host's name in Punycode."
        )
    scheme, authority, path, fragment = match.groups()
    scheme = scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise TargetRefused("The URL must begin with https:// (or http://).")
    if "@" in authority:
        raise TargetRefused("The URL must not hold a user name or password before an @.")
    if fragment is not None:
        raise TargetRefused("The URL must not have a fragment (what follows a #).")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise TargetRefused("The URL has no valid host, or its port is not a number.")
    port = _DEFAULT_PORTS[scheme] if parts[2] is None else int(parts[2])
    if port not in (80, 443) and not 1024 <= port <= 65535:
        raise TargetRefused("The URL's port must be 80, 443 or one from 1024 to 65535.")
    path = path if path.startswith("/") else f"/{path}"
    return Target(scheme, _host(parts[1].lower()), port, path)


def _host(written: str) -> str:
    if written.startswith("["):
        try:
            return str(IPv6Address(written[1:-1]))
        except ValueError:
            raise TargetRefused("The URL's host is no IPv6 address.") from None
    labels = written.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # Systems read 2130706433, 0x7f.1 and 0177.0.0.1 as addresses too, each as it likes.
        try:
            return str(IPv4Address(written))
        except ValueError:
            raise TargetRefused(
                "The URL's host is no IPv4 address: write four decimal numbers, or a name."
            ) from None
    if len(written) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise TargetRefused("The URL's host is no valid name.")
    return written


def resolve(host: str, port: int) -> list[str]:
    """By the system: addresses, the preferred first. OSError where there are none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def addresses_of(
    target: Target, *, resolver: Resolver = resolve, allowed: Sequence[Network] = ()
) -> list[Address]:
    """All of the host's addresses, each of which may be called. TargetRefused if one of them may
    not, TargetUnknown if there are none. Plain http reaches `allowed` networks alone."""
    try:
        found = [ip_address(target.host)]
    except ValueError:
        try:
            texts = resolver(target.host, target.port)
        except (OSError, UnicodeError):
            texts = []
        found = [ip_address(text.partition("%")[0]) for text in texts]
    if not found:
        raise TargetUnknown(f"The host {target.host} does not resolve to an address.")
    for address in found:
        address = meant_by(address)
        if any(address in network for network in allowed):
            continue
        if not is_public(address):
            raise TargetRefused(
                f"The host {target.host} has an address that is not public. The service's "
                "operator may allow networks in WIDTHWISE_WEBHOOK_ALLOWED_NETWORKS."
            )
        if target.scheme != "https":
            raise TargetRefused("Events travel to public addresses over https alone.")
    return found


def meant_by(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, where it does."""
    if isinstance(address, IPv4Address):
        return address
    embedded = address.ipv4_mapped or address.sixtofour
    if embedded is None and address in _NAT64:
        embedded = IPv4Address(int(address) & 0xFFFFFFFF)
    return embedded or address


def is_public(address: Address) -> bool:
    """Whether anybody on the Internet can reach it; of neither kind that is special."""
    special = (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
        or (isinstance(address, IPv6Address) and address.is_site_local)
        or any(address in network for network in _SPECIAL)
    )
    return address.is_global and not special
