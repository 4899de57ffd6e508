"""Which URLs may be named, and which addresses may be called."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest

from jobs.webhook_targets import (
    Resolver,
    Target,
    TargetRefused,
    TargetUnknown,
    addresses_of,
    is_public,
    meant_by,
    parse_target,
    resolve,
)

PUBLIC = "203.0.114.7"  # of nobody's documentation


def answering(*addresses: str) -> Resolver:
    return lambda host, port: addresses


@pytest.mark.parametrize(
    ("url", "target", "authority"),
    [
        ("https://a.example/x?y=1", Target("https", "a.example", 443, "/x?y=1"), "a.example"),
        ("HTTPS://A.Example", Target("https", "a.example", 443, "/"), "a.example"),
        ("https://a.example?q", Target("https", "a.example", 443, "/?q"), "a.example"),
        ("https://a:8443/%20", Target("https", "a", 8443, "/%20"), "a:8443"),
        ("http://a:443/", Target("http", "a", 443, "/"), "a:443"),
        ("https://[2606:4700:0::1]:8443/", Target("https", "2606:4700::1", 8443, "/"), None),
        ("https://1.2.3.4/", Target("https", "1.2.3.4", 443, "/"), "1.2.3.4"),
        ("https://a.example/@x:1//y", Target("https", "a.example", 443, "/@x:1//y"), "a.example"),
    ],
)
def test_a_url_is_taken_apart(url: str, target: Target, authority: str | None) -> None:
    found = parse_target(url)
    assert found == target
    assert found.authority == (authority or "[2606:4700::1]:8443")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "no URL like"),
        ("hooks.example/x", "no URL like"),
        ("//hooks.example/x", "no URL like"),
        ("https:hooks.example", "no URL like"),
        ("ftp://hooks.example/", "must begin with https"),
        ("file:///etc/passwd", "must begin with https"),
        ("gopher://hooks.example:70/_x", "must begin with https"),
        ("https:///path", "no valid host"),
        ("https://?x", "no valid host"),
        ("https://user@hooks.example/", "user name or password"),
        ("https://user:pass@hooks.example/", "user name or password"),
        ("https://hooks.example:443@127.0.0.1/", "user name or password"),
        ("https://127.0.0.1\\@hooks.example/", "no URL like"),
        ("https://hooks.example/#x", "fragment"),
        ("https://hooks.example#@127.0.0.1/", "fragment"),
        ("https://hooks example/", "no URL like"),
        ("https://hooks.example/\r\nX-Evil: 1", "no URL like"),
        ("https://hooks.example/\x00", "no URL like"),
        ("https://höoks.example/", "Punycode"),
        ("https://hooks.example/ü", "no URL like"),
        ("https://hooks.example:0/", "port must be"),
        ("https://hooks.example:22/", "port must be"),
        ("https://hooks.example:25/", "port must be"),
        ("https://hooks.example:65536/", "port must be"),
        ("https://hooks.example:/", "port is not a number"),
        ("https://hooks.example:+80/", "port is not a number"),
        ("https://hooks.example:80:80/", "port is not a number"),
        ("https://2130706433/", "four decimal numbers"),
        ("https://0x7f000001/", "four decimal numbers"),
        ("https://0x7f.0.0.0x1/", "four decimal numbers"),
        ("https://0177.0.0.1/", "four decimal numbers"),
        ("https://127.0.0.01/", "four decimal numbers"),
        ("https://127.1/", "four decimal numbers"),
        ("https://017700000001/", "four decimal numbers"),
        ("https://1.2.3.4.5/", "four decimal numbers"),
        ("https://256.1.1.1/", "four decimal numbers"),
        ("https://hooks..example/", "no valid name"),
        ("https://.hooks.example/", "no valid name"),
        ("https://127.0.0.1./", "no valid name"),
        ("https://-hooks.example/", "no valid name"),
        ("https://hooks.example%2f.evil/", "no valid name"),
        ("https://%31%32%37.0.0.1/", "four decimal numbers"),
        ("https://%6cocalhost/", "no valid name"),
        ("https://" + "a" * 64 + ".example/", "no valid name"),
        ("https://[::1/", "no valid host"),
        ("https://[::1%25lo]/", "no valid host"),
        ("https://[1.2.3.4]/", "no IPv6 address"),
        ("https://[:::]/", "no IPv6 address"),
        ("https://hooks.example/" + "x" * 2000, "more than 2000"),
    ],
)
def test_an_odd_url_is_refused(url: str, words: str) -> None:
    with pytest.raises(TargetRefused, match=words):
        parse_target(url)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254",
        "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1",
        "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
        "239.255.255.250", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe",
        "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1",
        "2001:0:7f00:1::", "2001:db8::1", "2002:7f00:1::1", "2002:a00:1::1", "3fff::1", "5f00::1",
        "fc00::1", "fd12:3456::1", "fe80::1", "fec0::1", "ff02::1", "ff0e::1",
    ],
)  # fmt: skip
def test_what_not_everybody_can_reach_is_not_called(address: str) -> None:
    assert not is_public(meant_by(ip_address(address)))
    target = parse_target("https://hooks.example/")
    with pytest.raises(TargetRefused, match="not public"):
        addresses_of(target, resolver=answering(address))
    literal = f"[{address}]" if ":" in address else address
    with pytest.raises(TargetRefused, match="not public"):
        addresses_of(parse_target(f"https://{literal}/"))


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "::ffff:8.8.8.8", "2606:4700::1111", "2a00:1450::1"]
)
def test_what_everybody_can_reach_is_called_over_https(address: str) -> None:
    resolver = answering(address)
    found = addresses_of(parse_target("https://hooks.example/"), resolver=resolver)
    assert found == [ip_address(address)]
    with pytest.raises(TargetRefused, match="https alone"):
        addresses_of(parse_target("http://hooks.example/"), resolver=resolver)


def test_one_address_that_is_not_public_spoils_them_all() -> None:
    target = parse_target("https://hooks.example/")
    for addresses in ([PUBLIC, "10.0.0.1"], ["::1", PUBLIC]):
        with pytest.raises(TargetRefused, match="not public"):
            addresses_of(target, resolver=answering(*addresses))
    both = [PUBLIC, "2606:4700::1111"]
    assert [str(each) for each in addresses_of(target, resolver=answering(*both))] == both


def test_a_setting_opens_networks_also_to_plain_http() -> None:
    allowed = [ip_network("10.1.0.0/16"), ip_network("fd00::/8")]
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::7"):
        for scheme in ("http", "https"):
            target = parse_target(f"{scheme}://hooks.example/")
            resolver = answering(address)
            assert addresses_of(target, resolver=resolver, allowed=allowed)
    for address in ("10.2.0.1", "127.0.0.1", "fc00::1"):
        with pytest.raises(TargetRefused):
            addresses_of(parse_target("https://x/"), resolver=answering(address), allowed=allowed)


def test_a_host_without_an_address_is_told_apart() -> None:
    def fails(host: str, port: int) -> Sequence[str]:
        raise OSError("no such host")

    for resolver in (fails, answering()):
        with pytest.raises(TargetUnknown, match=r"hooks\.example does not resolve"):
            addresses_of(parse_target("https://hooks.example/"), resolver=resolver)


def test_the_systems_resolver_tells_addresses() -> None:
    assert set(resolve("localhost", 443)) <= {"127.0.0.1", "::1"}
    with pytest.raises(TargetRefused, match="not public"):
        addresses_of(parse_target("https://localhost/"))
