from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from dspark.errors import CompatibilityError, DataError, UsageError
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey

MACHINE = MachineKey("a processor", 2, "float32", "some/target", "some/drafter")


def table_of(cost, requests=(1, 2, 4, 8), tokens=(1, 2, 4, 8), draft_ms=lambda r: 1 + r / 8):
    """A table of a cost function, probed at so many tokens per request."""
    points = [CostPoint(r * t, r, cost(r * t, r), draft_ms(r)) for r in requests for t in tokens]
    return CostTable(tuple(points), MACHINE)


def a_noisy_table(seed):
    generator = np.random.default_rng(seed)
    return table_of(lambda t, r: (10 + 0.1 * t + 0.3 * r) * generator.uniform(0.8, 1.2))


def test_probes_come_back_and_lines_lie_between():
    table = table_of(lambda t, r: 10 + 0.5 * t + 2 * r)
    for point in table.points:
        assert table.verify_ms(point.tokens, point.requests) == pytest.approx(point.verify_ms)
    assert table.verify_ms(3, 1) == pytest.approx(10 + 1.5 + 2)
    assert table.draft_ms(4) == pytest.approx(1.5)
    assert table.draft_ms(6) == pytest.approx(1.75)
    assert table.off_ms(4) == pytest.approx(10 + 2 + 8)
    steps = table.step_ms(4, 12)
    assert steps.tolist() == pytest.approx([20 + 1.5 + 0.5 * n for n in range(13)])


def test_nothing_is_known_beyond_the_last_probe():
    table = table_of(lambda t, r: 10 + t)
    assert len(table.step_ms(4, 1000)) == 32 - 4 + 1
    assert table.most_tokens(6) == 48
    assert len(table.step_ms(6, 1000)) == 48 - 6 + 1
    assert len(table.step_ms(6, 5)) == 6
    assert [table.covers(r) for r in (0, 1, 8, 9)] == [False, True, True, False]
    for call in (
        lambda: table.verify_ms(33, 4),
        lambda: table.verify_ms(3, 4),
        lambda: table.step_ms(9, 4),
        lambda: table.off_ms(0),
        lambda: table.draft_ms(9),
    ):
        with pytest.raises(UsageError, match="'auto'"):
            call()
    with pytest.raises(UsageError, match="drafts is -1"):
        table.step_ms(2, -1)


@pytest.mark.parametrize("seed", range(10))
def test_steps_never_get_cheaper_with_tokens_whatever_was_measured(seed):
    table = a_noisy_table(seed)
    for requests in range(1, 9):
        assert (np.diff(table.step_ms(requests, 100)) >= 0).all()
    for tokens in (8, 12, 16):
        measured = [table.verify_ms(tokens, r) for r in (2, 4, 8)]
        assert measured == sorted(measured)


@pytest.mark.parametrize("seed", range(10))
def test_the_envelope_is_the_mean_of_two_obvious_ones(seed):
    table = a_noisy_table(seed)
    for p in table.points:
        smaller = [
            q.verify_ms for q in table.points if q.tokens <= p.tokens and q.requests <= p.requests
        ]
        larger = [
            q.verify_ms for q in table.points if q.tokens >= p.tokens and q.requests >= p.requests
        ]
        expected = (max(smaller) + min(larger)) / 2
        assert table.verify_ms(p.tokens, p.requests) == pytest.approx(expected)


def test_a_stair_stays_a_stair_where_probes_stand_on_both_sides():
    points = [CostPoint(t, 1, 10.0 if t <= 16 else 20.0, 1.0) for t in (1, 8, 16, 17, 24, 32)]
    steps = CostTable(tuple(points), MACHINE).step_ms(1, 31)
    assert steps.tolist() == pytest.approx([11.0] * 16 + [21.0] * 16)


def test_requests_between_two_curves_without_common_tokens():
    """4 requests were probed up to 32 tokens, 64 from 64 on; 16 need what lies between."""
    table = table_of(lambda t, r: 5 + t / 8, requests=(4, 64))
    assert table.most_tokens(16) == 128
    assert table.step_ms(16, 112) == pytest.approx([5 + (16 + n) / 8 + 1 + 2 for n in range(113)])


def test_one_probe_and_probes_in_any_order():
    single = CostTable((CostPoint(1, 1, 5.0, 1.0),), MACHINE)
    assert single.step_ms(1, 7).tolist() == [6.0]
    table = table_of(lambda t, r: 10 + t)
    turned = CostTable(table.points[::-1], MACHINE)
    assert turned.step_ms(3, 20).tolist() == table.step_ms(3, 20).tolist()


def test_flat_and_noisy_tables_are_said():
    assert table_of(lambda t, r: 10 + t).warnings() == []
    (flat,) = table_of(lambda t, r: 10 + t / 100).warnings()
    assert "flat" in flat
    assert "6 %" in flat
    assert table_of(lambda t, r: 10 + t / 100, requests=(1,), tokens=(1, 2)).warnings() == []
    points = [CostPoint(t, 1, ms, 1.0) for t, ms in ((1, 10.0), (2, 30.0), (4, 11.0), (8, 20.0))]
    (noisy,) = CostTable(tuple(points), MACHINE).warnings()
    assert "noisy" in noisy
    assert "1 requests" in noisy


def test_save_and_load_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = a_noisy_table(0)
    path = table.save()
    assert path.parent == tmp_path / "dspark" / "costs"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert CostTable.load(machine=MACHINE) == table
    assert CostTable.load(path) == table
    assert replace(MACHINE, dtype="bfloat16").path() != path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert MACHINE.path().parent == tmp_path / "home" / ".cache" / "dspark" / "costs"
    with pytest.raises(DataError, match="dspark profile"):
        CostTable.load(machine=MACHINE)
    with pytest.raises(UsageError, match="path"):
        CostTable.load()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hardware", "another"),
        ("threads", 3),
        ("dtype", "bfloat16"),
        ("target", "other"),
        ("drafter", ""),
    ],
)
def test_a_table_of_another_machine_is_refused(tmp_path, field, value):
    path = a_noisy_table(0).save(tmp_path / "costs.json")
    with pytest.raises(CompatibilityError, match=f"{field} .*'auto'"):
        CostTable.load(path, replace(MACHINE, **{field: value}))


def test_files_that_are_no_tables_are_refused_with_the_fallback(tmp_path):
    path = a_noisy_table(0).save(tmp_path / "costs.json")
    good = json.loads(path.read_text())
    point = asdict(a_noisy_table(0).points[0])
    bad = [
        "",
        "[]",
        "{",
        json.dumps({**good, "version": 1}),
        json.dumps({**good, "points": []}),
        json.dumps({**good, "points": 5}),
        json.dumps({**good, "points": [5]}),
        json.dumps({**good, "machine": None}),
        json.dumps({"version": 2}),
        json.dumps({**good, "points": [{**point, "more": 1}]}),
        json.dumps({**good, "points": [{**point, "verify_ms": "4"}]}),
        json.dumps({**good, "points": [{**point, "verify_ms": float("nan")}]}),
        json.dumps({**good, "points": [{**point, "verify_ms": 0}]}),
        json.dumps({**good, "points": [{**point, "draft_ms": -1}]}),
        json.dumps({**good, "points": [{**point, "single_share": 1.5}]}),
        json.dumps({**good, "points": [{**point, "tokens": 0}]}),
        json.dumps({**good, "points": [{**point, "requests": 1.5}]}),
    ]
    for text in bad:
        path.write_text(text)
        with pytest.raises(DataError, match="'auto'") as caught:
            CostTable.load(path)
        assert str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="'auto'"):
        CostTable.load(path)
    with pytest.raises(DataError, match=r"empty.*'auto'"):
        CostTable((), MACHINE)


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        a_noisy_table(0).save(tmp_path / "file" / "costs.json")
