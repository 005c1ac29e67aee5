"""What a token's law is, and whether a draft may stay."""
