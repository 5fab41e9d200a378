"""What every route shares: health, limits, ids, disconnects."""

from __future__ import annotations

import httpx


def test_health_says_that_requests_are_served(http: httpx.Client) -> None:
    for path in ("/health", "/ping", "/startup"):
        assert http.get(path).status_code == 200


def test_a_reply_carries_the_callers_request_id(http: httpx.Client) -> None:
    reply = http.get("/health", headers={"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
