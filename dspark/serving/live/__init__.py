"""The live page: its static files, its runs, and the engines that decode them.

A visitor's run comes in through `routes`; `engines` opens one engine per drafter, verifier and
schedule on the server's target; `run` decodes the prompt on it and plainly, beside a
background load, and tells what happens as server-sent events. Only `server` and `metrics` use it.
"""
