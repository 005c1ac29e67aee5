"""The KV cache: which pages a request holds, where they lie, and which can be found again.

`memory` is what the engine asks: it claims and returns the pages of a request for the target's rows
and the drafter's. Under it the page manager counts and evicts, the page allocator chooses places,
and the prefix cache finds pages by the tokens that they hold. Nothing here knows of rounds.
"""
