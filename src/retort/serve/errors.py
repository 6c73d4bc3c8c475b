"""Errors as clients see them: OpenAI's shape, and nothing of our insides."""

from __future__ import annotations

from typing import Any

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}

_UNREAD = (408, 413, 431)  # the rest of the request is not wanted


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status; 4xx is the client's to mend, and its SDK retries 408, 409, 429 and 5xx.
        message: one sentence for the client.
        param: the request field at fault.
        code: a stable word for programs.
        retry_after: seconds after which to try again.
        retry: False tells SDKs not to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.retry = retry_after, retry

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that tell a client whether and when to try again, and to hang up."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if not self.retry:
            headers["x-should-retry"] = "false"
        if self.status in _UNREAD:
            headers["connection"] = "close"
        return headers


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that can never be answered: 400."""
    return ApiError(400, message, param=param, code=code)


def engine_fault() -> ApiError:
    """The engine failed on this request; the reason is in the server's log."""
    return ApiError(500, "the engine failed on this request; see the server's log", code="engine")
