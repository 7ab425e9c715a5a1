"""Every error this server raises on purpose, as one tree. A leaf owns its HTTP status, type and code.

BuddyError
├── ConfigError                        at start: the file, the field, the value, what is allowed
│   └── FieldError                     one that two fields, or a field and the model, disagree on
├── EngineStartError                   at start: why there is no engine
├── StoreUnreachable                   the database and why; clients see StoreAway
├── BoardUnreachable                   processes of a fleet do not hear of each other
│   └── RedisUnreachable               the Redis they share and why; clients see StoreAway
└── ApiError                           rendered by `api/errors_handler.py`
    ├── InvalidRequest           400   code null, param names the field
    │   ├── InvalidBudget        400   invalid_budget
    │   ├── ContextLengthExceeded 400  context_length_exceeded
    │   └── UnsupportedField     400   unsupported_parameter
    ├── InvalidApiKey            401   invalid_api_key
    ├── TenantDisabled           403   tenant_disabled
    ├── ModelNotFound            404   model_not_found
    ├── RouteNotFound            404   route_not_found
    ├── TenantNotFound           404   tenant_not_found
    ├── TierNotFound             404   tier_not_found
    ├── KeyNotFound              404   key_not_found
    ├── MethodNotAllowed         405   method_not_allowed
    ├── BodyTooSlow              408   request_timeout
    ├── Conflict                 409   conflict
    ├── BodyTooLarge             413   request_too_large
    ├── RateLimited              429   rate_limit_exceeded, with retry-after
    │   └── InsufficientQuota    429   insufficient_quota, no retry
    ├── ClientDisconnected       499   never seen by a client; closes the request's records
    ├── InternalError            500   internal_error
    └── Overloaded               503   overloaded, with retry-after
        ├── NotReady             503   not_ready, with retry-after
        └── StoreAway            503   store_unreachable, with retry-after
"""

import itertools
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

Outcome = Literal["finished", "refused", "limited", "overloaded", "cancelled", "error"]
"""How a request can end, as the metrics count it. A limit of its tenant ends it as "limited"."""

_SHOWN_CHARS = 80
_SHOWN_BITS = 4096
"""Python refuses to print integers of more than 4,300 digits."""


class _Shortened(reprlib.Repr):
    """repr() of the beginning of a value, whatever its size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = _SHOWN_CHARS // 3

    def repr_str(self, x: str, _level: int) -> str:
        return repr(x[:_SHOWN_CHARS])

    def repr_int(self, x: int, _level: int) -> str:
        if x.bit_length() <= _SHOWN_BITS:
            return repr(x)
        return repr(x // 10 ** (int(x.bit_length() * math.log10(2)) - _SHOWN_CHARS)) + "..."

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        # The base class sorts all keys.
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict + 1)), level)


_shortened = _Shortened()


def shown(value: object) -> str:
    """`value` for an error message: its repr, shortened, but null, true and false as in JSON and YAML. Never use it for
    secrets."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = _shortened.repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


class BuddyError(Exception):
    """Anything this server deliberately refuses or reports as failed."""


class ConfigError(BuddyError):
    """The configuration cannot be used; the message names file, field, value and what is allowed."""


class FieldError(ConfigError):
    """A field whose value does not go together with others, or with the model. `location` is the way to it."""

    def __init__(self, location: tuple[str, ...], reason: str) -> None:
        super().__init__(f"{'.'.join(location)}: {reason}")
        self.location = location


class EngineStartError(BuddyError):
    """The engine's process could not build the engine. The message is that of one of BUILD_ERRORS (engine/build.py), or
    states how the process ended."""


class StoreUnreachable(BuddyError):
    """The store's database does not answer, or cannot do what it is asked. The message has its URL without the
    password, and is for the operator alone."""


class BoardUnreachable(BuddyError):
    """Processes that serve the same tenants cannot hear of each other. The message is for the operator alone."""


class RedisUnreachable(BoardUnreachable):
    """The Redis that servers share does not answer. The message is for the operator alone."""


class ApiError(BuddyError):
    """An error a client sees as `{"error": {"message", "type", "param", "code"}}`."""

    status: ClassVar[int]
    type: ClassVar[str]
    code: ClassVar[str | None] = None
    outcome: ClassVar[Outcome] = "refused"

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


class InvalidRequest(ApiError):
    """The request is malformed or a value is not allowed."""

    status = 400
    type = "invalid_request_error"


class InvalidBudget(InvalidRequest):
    """The budget is neither "auto" nor a number this model can honour."""

    code = "invalid_budget"

    def __init__(self, message: str):
        super().__init__(message, param="budget")


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together do not fit the model's context, or the cache of this server."""

    code = "context_length_exceeded"


class UnsupportedField(InvalidRequest):
    """A known field that would give a wrong answer if it were silently ignored."""

    code = "unsupported_parameter"


class InvalidApiKey(ApiError):
    """No key, or a key of no tenant. The message never repeats the key."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str):
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class TenantDisabled(ApiError):
    """The key is valid, but its tenant may not use the server now."""

    status = 403
    type = "invalid_request_error"
    code = "tenant_disabled"

    def __init__(self, tenant: str):
        super().__init__(f"The tenant {tenant!r} is disabled.")


class ModelNotFound(ApiError):
    """The request names a model that this server does not serve."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, asked: str, available: str):
        super().__init__(f"The model {shown(asked)} does not exist; available: {available!r}.", param="model")


class RouteNotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "route_not_found"


class TenantNotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "tenant_not_found"

    def __init__(self, name: str):
        super().__init__(f"There is no tenant {shown(name)}.")


class TierNotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "tier_not_found"

    def __init__(self, name: str):
        super().__init__(f"There is no tier {shown(name)}.")


class KeyNotFound(ApiError):
    """No key of the store has this id. The message does not repeat it: it may be a whole key by mistake."""

    status = 404
    type = "invalid_request_error"
    code = "key_not_found"

    def __init__(self) -> None:
        super().__init__("There is no key with this id; an id is the 12 hexadecimal digits between 'sk-' and '_'.")


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTooSlow(ApiError):
    """The client stopped sending before its request was complete. Clients may retry."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"

    def __init__(self, pause_s: float):
        super().__init__(
            f"Nothing more of the request body arrived for {pause_s:g} seconds.", headers={"connection": "close"}
        )


class Conflict(ApiError):
    """The change does not fit what there is: a name is taken, in use, or belongs to the configuration file."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"

    def __init__(self, max_bytes: int):
        super().__init__(f"The request body is larger than the {max_bytes} bytes allowed.")


class RateLimited(ApiError):
    """The request would pass a limit of its tenant's tier. `headers` tell where the tenant stands. Without a
    `retry_after_s`, no retry of the same request can succeed."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    outcome = "limited"

    def __init__(self, message: str, headers: Mapping[str, str], retry_after_s: float | None) -> None:
        retry = {"x-should-retry": "false"}
        if retry_after_s is not None:
            retry = {
                "retry-after": str(math.ceil(retry_after_s)),
                "retry-after-ms": str(math.ceil(retry_after_s * 1000)),
            }
        super().__init__(message, headers={**headers, **retry})


class InsufficientQuota(RateLimited):
    """The tenant's quota of the month does not cover the request."""

    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(self, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(message, headers, None)


class ClientDisconnected(ApiError):
    """The client closed the connection; 499 is nginx's status for this in logs."""

    status = 499
    type = "invalid_request_error"
    outcome = "cancelled"

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


class InternalError(ApiError):
    """A failure of the server. The message reveals no internals; the log has the rest under the x-request-id."""

    status = 500
    type = "server_error"
    code = "internal_error"
    outcome = "error"

    def __init__(self) -> None:
        super().__init__("The server failed on this request. Quote the x-request-id when you report it.")


class Overloaded(ApiError):
    """Too many requests are waiting; a retry may succeed."""

    status = 503
    type = "server_error"
    code = "overloaded"
    outcome = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0):
        super().__init__(message, headers={"retry-after": str(max(1, math.ceil(retry_after_s)))})


class NotReady(Overloaded):
    """The engine is not available: it is restarting after a failure, or stopping."""

    code = "not_ready"


class StoreAway(Overloaded):
    """The store does not answer. The message reveals nothing about it; the log has the StoreUnreachable."""

    code = "store_unreachable"

    def __init__(self, what: str = "The store of tenants and usage"):
        super().__init__(f"{what} does not answer; try again in a moment.")
