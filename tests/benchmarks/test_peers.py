"""Reading llama.cpp's programs, and the comparison with peers on a tiny pair."""

import json
from dataclasses import replace

import pytest

from benchmarks import peers
from benchmarks.llama_cpp import parse_completion, parse_speculative
from benchmarks.peer_drafters import Pair, compare, gained, same_text
from benchmarks.peer_servers import read_event
from benchmarks.peers import ratios, table
from benchmarks.peers_figure import draw, read_lines
from dspark.errors import UsageError
from dspark.request import Output, Request, Stats

# Recorded: build b11434, the bundled pair (F16) on two cores of an AMD EPYC.
PROMPT = "<|im_start|>user\nTom has 7 apples.<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "Tom has 7*4=24 apples.\nTom has 24/4=12 apples.\n#### 12"
OUT = f"\n\n{PROMPT}{ANSWER}\n\n\n"
LOG = """\
0.00.551.161 I common_speculative_impl_draft_dflash: - block_size=7, mask_token_id=3, n_extract=5
0.00.849.332 I encoded   29 tokens in    0.066 seconds, speed:  439.874 t/s
0.00.849.363 I decoded   33 tokens in    0.233 seconds, speed:  141.909 t/s
0.00.849.404 I n_draft   = 7
0.00.849.426 I n_predict = 33
0.00.849.447 I n_drafted = 49
0.00.849.467 I n_accept  = 26
0.00.849.488 I accept    = 53.061%
"""


def test_a_speculative_run_is_read_in_full():
    run = parse_speculative(OUT, LOG, PROMPT)
    assert (run.prompt_tokens, run.encode_s, run.tokens, run.decode_s) == (29, 0.066, 33, 0.233)
    assert (run.drafted, run.accepted, run.rounds) == (49, 26, 7)
    assert run.drafted == run.rounds * 7
    assert run.accepted_length == pytest.approx(33 / 7)
    assert run.text == ANSWER


@pytest.mark.parametrize(
    ("out", "log", "words"),
    [
        (OUT, "".join(LOG.splitlines(keepends=True)[:1]), "without its figures"),
        (OUT, "error: failed to load model", "failed to load model"),
        ("\n\nanother prompt", LOG, "did not repeat its prompt"),
    ],
)
def test_a_run_that_failed_is_no_figure(out, log, words):
    with pytest.raises(ValueError, match=words):
        parse_speculative(out, log, PROMPT)


def test_an_answer_of_the_server_is_read_in_full():
    timings = {
        "cache_n": 0, "prompt_n": 29, "prompt_ms": 61.5, "predicted_n": 5, "predicted_ms": 40.0,
        "predicted_per_second": 125.0, "draft_n": 14, "draft_n_accepted": 3,
    }  # fmt: skip
    answer = parse_completion({"content": "a", "tokens": [4, 5, 6, 7], "timings": timings})
    assert (answer.token_ids, answer.generated) == ((4, 5, 6, 7), 5)
    assert (answer.prompt_tokens, answer.prefill_s, answer.decode_s) == (29, 0.0615, 0.04)
    assert (answer.drafted, answer.accepted) == (14, 3)
    with pytest.raises(ValueError, match="exceeds"):
        parse_completion({"error": {"message": "the prompt exceeds the context"}})


def test_events_of_a_stream():
    assert read_event(b'data: {"choices": [{"text": "a"}]}\n') == {"choices": [{"text": "a"}]}
    assert read_event(b"data: [DONE]\n") is None
    assert read_event(b": keep-alive\n") is None
    assert read_event(b"\n") is None


def run_of(tokens, accepted, text=ANSWER):
    log = LOG.replace("   33 tokens", f"   {tokens} tokens").replace("= 26", f"= {accepted}")
    return parse_speculative(f"\n\n{PROMPT}{text}\n\n\n", log, PROMPT)


def test_equal_lengths_are_told_from_others():
    def pairs(shift):
        made = []
        for i in range(30):
            theirs = 20 + (i + 2) % 5 + shift
            ours = Output("", ANSWER, (), "stop", Stats(rounds=10, tokens=20 + i % 5))
            run = run_of(theirs, theirs - 10)
            made.append(Pair(ours, ANSWER, theirs, run.rounds, run, run_of(30, 0)))
        return made

    requests = [Request(tuple(range(28)))] * 30
    same, other = compare(pairs(0), requests), compare(pairs(3), requests)
    assert (same["ours"], same["llama_cpp"], same["equal"]) == (2.2, 2.2, True)
    assert same["ci95"][0] < 0 < same["ci95"][1]
    assert (other["llama_cpp"], other["equal"]) == (2.5, False)
    assert (same["same_prompt_tokens"], same["same_text_as_ours"]) == (30, 30)
    assert same["same_rounds"] == 30
    assert compare([*pairs(0)[:29], _changed(pairs(0)[29])], requests)["same_text_as_plain"] == 29


def _changed(pair):
    return replace(pair, plain=run_of(30, 0, text="Something else."))


@pytest.mark.parametrize(
    ("end", "text", "limit", "wanted"),
    [
        (30, ANSWER, 8, (8, 2)),  # the limit falls on the end of a round
        (30, ANSWER, 9, (9, 3)),  # and into one
        (10, ANSWER, 20, (10, 3)),  # an end token in the middle of a round
        (10, "Something else.", 20, (12, 3)),  # where plain decoding does not tell the end
    ],
)
def test_what_llama_cpp_gained_ends_where_our_answer_would(end, text, limit, wanted):
    rounds = "".join(
        f"D accepted {kept}/7 draft tokens, the last target token is: (5)\n" for kept in (2, 4, 3)
    )
    theirs = parse_speculative(OUT, rounds + LOG.replace("   33 tokens", "   12 tokens"), PROMPT)
    assert theirs.gains == (3, 5, 4)
    assert gained(theirs, run_of(end, 0, text=text), limit) == wanted


def test_a_last_round_may_pass_the_limit():
    assert same_text("a b", "a b c")
    assert not same_text("a b", "a c")


def test_ratios_compare_with_the_best_of_each_group():
    speeds = {
        "dspark": 10.0, "dspark draft": 30.0, "transformers": 8.0, "transformers lookup": 12.0,
        "llama.cpp F16": 20.0, "llama.cpp F16 draft": 15.0, "llama.cpp Q4_1": 25.0,
    }  # fmt: skip
    found = ratios(speeds)
    assert found["dspark over transformers"] == 1.25
    assert found["dspark over llama.cpp F16 plain"] == 0.5
    assert found["dspark draft over llama.cpp best of 16 bits"] == 1.5
    assert found["dspark draft over llama.cpp best"] == 1.2
    assert ratios({"dspark": 1.0}) == {}


def test_a_table_is_aligned_and_has_every_field():
    lines = table([{"way": "a", "x": 1.0}, {"way": "long", "x": 10.0, "y": 2}]).splitlines()
    assert lines == ["way       x  y", "a      1.00  -", "long  10.00  2"]


FEW = ("--prompts", "1", "--max-new-tokens", "5", "--repeats", "1")


def test_one_request_at_a_time(run):
    line = run(peers, *FEW)
    assert set(line["ways"]) == {"dspark", "dspark draft", "transformers", "transformers lookup"}
    assert {way["same_as_dspark"] for way in line["ways"].values()} == {1.0}
    assert all(way["decode_tokens_per_s"] > 0 for way in line["ways"].values())
    assert line["ways"]["dspark draft"]["accepted_length"] >= 1
    assert "dspark draft over transformers" in line["ratios"]


def test_contexts_and_batches_and_their_figure(run, tmp_path):
    pytest.importorskip("matplotlib")
    contexts = run(peers, *FEW, "--context", "--lengths", "8", "40", "400", "--no-transformers")
    assert {n: list(row) for n, row in contexts["context"].items()} == {
        "dspark": ["8", "40"],
        "dspark draft": ["8", "40"],
    }
    batches = run(peers, *FEW, "--batch", "--sizes", "1", "3")
    assert all(speed > 0 for row in batches["batch"].values() for speed in row.values())
    lines = tmp_path / "lines.json"
    ways = {"dspark": {"decode_tokens_per_s": 2.0}, "transformers": {"decode_tokens_per_s": 1.0}}
    one = batches | {"mode": "decoding", "ways": ways}
    lines.write_text("\n".join(map(json.dumps, (one, contexts, batches))))
    draw(read_lines(lines), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_options_that_do_not_fit_are_refused(run):
    with pytest.raises(UsageError, match="weights"):
        run(peers, *FEW, "--weights", "heavy")
    for words in (("--gguf", "F16=x.gguf"), ("--llama-cpp", "bin"), ("--gguf-draft", "x.gguf")):
        with pytest.raises(SystemExit):
            run(peers, *FEW, *words)


@pytest.mark.slow
def test_servers_answer_the_same_client(run):
    line = run(
        peers, *FEW, "--servers", "--users", "1", "2", "--requests", "1", "--max-length", "128"
    )
    for name in ("dspark", "dspark draft"):
        assert {u: row["tokens_per_s"] > 0 for u, row in line["servers"][name].items()} == {
            "1": True,
            "2": True,
        }
