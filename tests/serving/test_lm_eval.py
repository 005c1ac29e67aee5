"""lm-evaluation-harness against the server: log-likelihoods are those of transformers.

`DSPARK_LM_EVAL` names the Python that has `lm_eval[api]`; docs/serving.md says how to make one.
"""

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark.sources.names import BUNDLED

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif("DSPARK_LM_EVAL" not in os.environ, reason="needs lm-evaluation-harness"),
]
DOCS = [
    {
        "question": "Tom has 3 apples and buys 4 more. He has",
        "choices": [" 7 apples.", " 12 apples.", " no apples at all, since he ate them."],
        "gold": 0,
    },
    {"question": "What does `tar` do? It", "choices": [" archives", " sings"], "gold": 0},
    {"question": "A", "choices": [" train travels", " naïve café"], "gold": 0},
]
COMMON = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """task: local_choice
output_type: multiple_choice
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}]
"""
WRITING = """task: local_writing
output_type: generate_until
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["."], max_gen_toks: 16, temperature: 0}
metric_list: [{metric: bypass}]
"""
SCRIPT = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    found = lm_eval.simple_evaluate(
        model=given["model"], model_args=given["args"], tasks=[given["task"]],
        task_manager=TaskManager(include_path=given["folder"], include_defaults=False),
        apply_chat_template=given["chat"], log_samples=True, bootstrap_iters=0,
    )
    print(json.dumps([sample["resps"] for sample in found["samples"][given["task"]]]))
"""


@pytest.fixture
def harness(live, tmp_path):
    """Runs a task, and gives back the harness's view of the answers."""
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    common = COMMON.format(path=data)
    (tmp_path / "choice.yaml").write_text(CHOICE + common)
    (tmp_path / "writing.yaml").write_text(WRITING + common)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def run(model, route, task, *, chat=False):
        args = {
            "model": "bundled",
            "base_url": f"http://127.0.0.1:{live.port}/v1/{route}",
            "num_concurrent": 2,
            "tokenizer": str(BUNDLED),
            "tokenizer_backend": None if chat else "huggingface",
            "max_length": 256,
        }
        given = {"model": model, "args": args, "task": task, "chat": chat, "folder": str(tmp_path)}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
        done = subprocess.run(
            [os.environ["DSPARK_LM_EVAL"], script, json.dumps(given)],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, **offline},
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_log_likelihoods_are_those_of_transformers(live, harness):
    before = live.figures()["vllm:spec_decode_num_draft_tokens_total",]
    found = harness("local-completions", "completions", "local_choice")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    count = 0
    for doc, answers in zip(DOCS, found, strict=True):
        begin = len(tokenizer(doc["question"], add_special_tokens=False)["input_ids"])
        for choice, [(value, greedy)] in zip(doc["choices"], answers, strict=True):
            ids_T = torch.tensor(
                tokenizer(doc["question"] + choice, add_special_tokens=False)["input_ids"]
            )
            with torch.inference_mode():
                rows_TV = model(ids_T[None]).logits[0, begin - 1 : -1].log_softmax(-1)
            wanted = rows_TV.gather(1, ids_T[begin:, None]).sum().item()
            assert float(value) == pytest.approx(wanted, abs=1e-4)
            assert (str(greedy) == "True") == bool((rows_TV.argmax(dim=1) == ids_T[begin:]).all())
            count += 1
    assert count == 7
    assert live.figures()["vllm:spec_decode_num_draft_tokens_total",] >= before


@pytest.mark.parametrize("chat", [False, True])
def test_generations_are_the_servers_own(live, harness, kit, chat):
    model, route = ("local-chat-completions", "chat/completions") if chat else (
        "local-completions", "completions")  # fmt: skip
    found = harness(model, route, "local_writing", chat=chat)
    for doc, [[text]] in zip(DOCS, found, strict=True):
        ask = {"max_tokens": 16, "stop": ["."], "seed": 1234}
        if chat:
            ask["messages"] = kit.messages(doc["question"])
            wanted = live.post("/v1/chat/completions", ask).json["choices"][0]["message"]["content"]
        else:
            ask["prompt"] = doc["question"]
            wanted = live.post("/v1/completions", ask).json["choices"][0]["text"]
        assert text == wanted
