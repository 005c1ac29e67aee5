"""The OpenAI-compatible API: HTTP bodies become engine requests, and outputs become replies.

Routes (`chat`, `completions`, `responses`, `models`) validate a body (`fields`, `chat_fields`,
`response_fields`, `tools`), turn it into token ids (`chat_template`) and constraints (`grammar`),
submit it to the engine service, and write its outputs as JSON or server-sent events (`streaming`,
`output_parser`). Only `server` includes these routes.
"""
