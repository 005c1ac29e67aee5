from __future__ import annotations

import json
import sys

from benchmarks import scheduling


def test_it_ends_with_one_json_line(monkeypatch, capsys):
    arguments = ["--rounds", "4", "--every", "128", "--repeats", "5", "--drafts", "3"]
    monkeypatch.setattr(sys, "argv", ["scheduling", *arguments])
    scheduling.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["benchmark"] == "scheduling"
    assert line["loads"] == [1, 128, 256]
    assert set(line["load"]["mixed"]["staircase"]["lagged"]) >= {"over_hindsight", "over_better"}
    assert set(line["floors"]) == {"lagged_over_hindsight", "lagged_over_better"}
    assert line["decision"]["prefix"]["least_ms"] > 0
