"""What a client is told when something goes wrong, in OpenAI's shape:

    {"error": {"message": …, "type": …, "param": …, "code": …}}

``to_api_error`` is the only place where an exception becomes text for a client: whatever it does not know
becomes "unexpected error, id …" and the details go to the log.
"""

from __future__ import annotations

from lowbit.engine.messages import TokenEvent
from lowbit.errors import printable

_MESSAGE_LIMIT = 2000

_TYPE_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

# The status of an error event's code; the codes that are the client's doing come from the engine's refusals.
_STATUS_BY_CODE = {
    "engine_restarting": 503,
    "draining": 503,
    "queue_timeout": 503,
    "request_timeout": 504,
    "client_too_slow": 503,
    "model_numerical_error": 500,
    "out_of_memory": 503,
    "prompt_too_long": 400,
    "never_fits": 400,
    "empty_prompt": 400,
    "invalid_token": 400,
    "invalid_number": 400,
}


class ApiError(Exception):
    """An answer other than 200. ``code`` is the snake_case name, ``param`` the request field at fault."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = printable(message, _MESSAGE_LIMIT)
        self.param = param
        self.retry_after = retry_after
        self.close = close

    def body(self) -> dict[str, object]:
        """The JSON a client gets."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPE_BY_STATUS.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that go with the answer."""
        headers = []
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.close:
            headers.append((b"connection", b"close"))
        return headers


class ClientGoneError(Exception):
    """The client closed the connection or does not read: nobody to answer."""


def bad_request(code: str, message: str, param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, code, message, param=param)


def to_api_error(error: BaseException, request_id: str) -> ApiError:
    """The error a client sees. The caller logs those with code "internal"."""
    if isinstance(error, ApiError):
        return error
    return ApiError(500, "internal", f"unexpected error, id {request_id}; see the server log")


def from_event(event: TokenEvent, request_id: str) -> ApiError:
    """The error that a final event with ``finish_reason`` "error" stands for."""
    status = _STATUS_BY_CODE.get(event.error_code)
    if status is None:
        # An engine's LowbitError has a code like E0512; other codes are unknown here: say nothing of them.
        return to_api_error(RuntimeError(event.error), request_id)
    message = event.error
    if event.error_code == "model_numerical_error":
        message = f"{message}. Please report with id {request_id}"
    retry_after = 1 if status == 503 else None
    return ApiError(status, event.error_code, message, retry_after=retry_after)
