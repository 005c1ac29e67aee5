"""Settings of the server, apart from those of its engine."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    Attributes:
        model_name: what requests call the model.
        api_keys: a request to `/v1` or `/metrics` must bear one of these; none for no check.
        cors_origins: web origins that browsers let read the answers; none switches CORS off.
        max_body_bytes: size of a request's body at most.
        body_timeout_s: seconds in which a body must have come.
        requests_per_minute: of each client (its key, or else its address); None for any number.
        request_timeout_s: seconds after which an answer ends as it is; None for never.
        default_max_tokens: new tokens where a request does not say.
        seed: names the randomness of sampled requests without a seed of their own, by their
            order; None draws it from the system.
        log_prompts: whether logs may hold prompts and answers.
        drain_s: seconds that open answers have to end once the server is to stop.

    Raises:
        UsageError: a value cannot be used.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 30.0
    requests_per_minute: int | None = None
    request_timeout_s: float | None = None
    default_max_tokens: int = 256
    seed: int | None = None
    log_prompts: bool = False
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        if not all(self.api_keys):
            raise UsageError("An API key is empty; give at least one character.")
        for name in (
            "max_body_bytes",
            "body_timeout_s",
            "requests_per_minute",
            "request_timeout_s",
            "default_max_tokens",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}, but must be above 0.")
        if not self.drain_s >= 0:
            raise UsageError(f"drain_s is {self.drain_s}, but must be at least 0.")
