#!/usr/bin/env bash
# Drafters of SmolLM2-135M-Instruct on equal data and steps: its own prompts and answers, then
# DSpark, DFlash, Eagle3 and MTP-1. Run it from the project's root:
#   recipes/smollm2.sh CORPUS_DIR
# CORPUS_DIR holds gsm8k_train.jsonl.gz and mbpp_train.jsonl.gz. What is finished is left as it is.
set -euo pipefail
corpus=${1:?"give the directory that holds the corpus files"}
out=runs/smollm2_answers
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p $out

prompts() { # NAME FORMAT FILE
  [ -e "$out/$1_prompts.jsonl.gz" ] ||
    dspark data corpus "$2" --path "$corpus/$3.jsonl.gz" --out "$out/$1_prompts.jsonl.gz"
}
answer() { # NAME PROMPTS
  [ -e "$out/$1.jsonl.gz" ] || dspark data regenerate smollm2 --draft none --batch-size 32 \
    --temperature 0.7 --max-new-tokens 256 --prompts "$2" --out "$out/$1.jsonl.gz"
}
[ -e $out/self_prompts.jsonl ] ||
  dspark data prompts --self smollm2 --count 6000 --seed 1 --out $out/self_prompts.jsonl
prompts gsm8k gsm8k gsm8k_train
prompts mbpp mbpp mbpp_train
answer self $out/self_prompts.jsonl
answer gsm8k $out/gsm8k_prompts.jsonl.gz
answer mbpp $out/mbpp_prompts.jsonl.gz
for drafter in dspark dflash eagle3 mtp; do
  dspark train smollm2_$drafter --resume
done
