"""Keys of the JSON objects that commands promise."""

GENERATE = frozenset(
    {
        "outputs",
        "rounds",
        "tokens",
        "drafted",
        "verified",
        "accepted",
        "accepted_length",
        "conditional_acceptance",
        "tokens_per_s",
        "draft_ms",
        "schedule_ms",
        "verify_ms",
    }
)
COMPARE = GENERATE | {"plain_tokens_per_s", "speedup", "identical"}
