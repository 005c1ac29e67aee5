"""Lets `python -m dspark` stand for `dspark`."""

from __future__ import annotations

from dspark.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
