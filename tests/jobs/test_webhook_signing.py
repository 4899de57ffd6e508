"""Signatures, held against the library that receivers use."""

from __future__ import annotations

import base64
import re
import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from jobs.redaction import redact
from jobs.webhook_signing import new_secret, signed_headers

BODY = '{"type":"job.succeeded","data":{"name":"ä"}}'.encode()


def test_the_kept_library_takes_our_signatures() -> None:
    secret = new_secret()
    headers = signed_headers(secret, id="dlv_x", timestamp=int(time.time()), body=BODY)
    assert Webhook(secret).verify(BODY, headers)["type"] == "job.succeeded"


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_it_refuses_what_was_changed(name: str) -> None:
    secret = new_secret()
    at = int(time.time())
    headers = signed_headers(secret, id="dlv_x", timestamp=at, body=BODY)
    other = signed_headers(new_secret(), id="dlv_y", timestamp=at + 1, body=BODY)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(BODY, headers | {name: other[name]})
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(BODY + b" ", headers)


def test_the_example_of_the_specification() -> None:
    """Its secret, id, time and body; the signature as its libraries' tests have it."""
    headers = signed_headers(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        timestamp=1614265330,
        body=b'{"test": 2432232314}',
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_secret_is_long_new_and_redacted() -> None:
    secrets = {new_secret() for _ in range(20)}
    assert len(secrets) == 20
    for secret in secrets:
        assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", secret)
        assert len(base64.b64decode(secret[6:])) == 32
        assert redact(f"secret={secret}, url") == "secret=whsec_***, url"
