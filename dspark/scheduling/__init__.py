"""How many drafts are worth verifying: numbers in, lengths out."""
