"""Ten unpicked answers per domain, as the model card shows them: the first held-out prompts.

Prints Markdown; nothing is chosen by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.prompts import DOMAINS, domain_requests
from dspark.engine.loading import load
from dspark.request import SamplingParams


def main() -> None:
    """Print the answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled", help="target directory")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--count", type=int, default=10, help="answers per domain")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args()
    model = load(options.model)
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=0
    )
    for domain in DOMAINS:
        requests = domain_requests(model, options.data, domain, options.count, params)
        outputs = model.engine(requests, batch_size=options.count).run(requests)
        print(f"\n#### {domain}\n")
        for number, (request, output) in enumerate(zip(requests, outputs, strict=True), 1):
            prompt = model.target.tokenizer.decode(request.prompt_ids, skip_special_tokens=True)
            print(f"{number}. *{_line(prompt)}*\n\n   > {_line(output.text)}\n")


def _line(text: str) -> str:
    """Text on one line, cut where it is long, so that a list of it stays readable."""
    joined = " ⏎ ".join(part.strip() for part in text.strip().splitlines() if part.strip())
    return joined if len(joined) <= 400 else joined[:400] + " …"


if __name__ == "__main__":
    main()
