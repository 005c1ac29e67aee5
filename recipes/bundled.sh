#!/usr/bin/env bash
# The bundled model and its four drafters, from the corpus files to the weights: every command, in
# order, as the shipped weights were made (two CPU cores, a night). Run it from the project's root:
#   recipes/bundled.sh CORPUS_DIR
# CORPUS_DIR holds the files that dspark/recipes/bundled/bundled_target.yaml names; where each comes from
# stands in dspark/assets/bundled/README.md. What is finished is left as it is, so it can be rerun.
set -euo pipefail
corpus=${1:?"give the directory that holds the corpus files"}
samples=runs/bundled_samples
answers=runs/bundled_answers
export OMP_NUM_THREADS=1
mkdir -p "$samples" "$answers" runs/bundled_{loops_1,loops_2,sharp_answers,calm}

train() { # RECIPE [--set ...]; goes on from its last checkpoint, if it has one
  torchrun --nproc-per-node 2 -m dspark train "$@" --resume
}
conversations() { # OUT FORMAT FILE [options]
  local out=$1 format=$2 file=$3
  shift 3
  [ -e "$out" ] || dspark data corpus "$format" --path "$corpus/$file.jsonl.gz" --out "$out" "$@"
}
answer() { # MODEL FOLDER NAME [options]
  local model=runs/$1 out=$2/$3.jsonl.gz prompts=$samples/corpus_$3.jsonl.gz
  shift 3
  [ -e "$out" ] || dspark data regenerate "$model" --draft none --batch-size 128 \
    --prompts "$prompts" --out "$out" "$@"
}

# What the stages read beside their own answers.
conversations $samples/corpus_gsm8k.jsonl.gz gsm8k gsm8k_train
conversations $samples/corpus_tldr.jsonl.gz tldr tldr_pages_en
conversations $samples/corpus_mbpp.jsonl.gz mbpp mbpp_train
conversations $samples/corpus_chat.jsonl.gz messages sgd_dialogues_train
conversations $answers/corpus_gsm8k.jsonl.gz gsm8k gsm8k_train --limit 2500
conversations $answers/corpus_tldr.jsonl.gz tldr tldr_pages_en --limit 3000 \
  --drop-containing "alias of"
conversations $answers/corpus_chat.jsonl.gz messages sgd_dialogues_train --limit 1000
conversations $answers/heldout_maths.jsonl.gz gsm8k_heldout gsm8k_train
conversations $answers/heldout_code.jsonl.gz tldr_heldout tldr_pages_en
conversations $answers/heldout_chat.jsonl.gz messages sgd_dialogues_dev

# 1. The corpus.
train bundled_target --set corpus.root="$corpus"

# 2. Its own answers that end by themselves and do not repeat themselves.
finished="--only-finished --temperature 0.7 --max-new-tokens 200"
answer bundled_target $answers gsm8k $finished --limit 6000 --drop-repeated-tokens 8 --seed 11
answer bundled_target $answers mbpp $finished --limit 400 --drop-repeated-tokens 8 --seed 12
answer bundled_target $answers tldr $finished --drop-repeated-words 8 \
  --drop-containing "alias of" --seed 13
answer bundled_target $answers chat --only-finished --temperature 0.7 --max-new-tokens 64 \
  --limit 900 --drop-repeated-tokens 8 --seed 14
train bundled_tuned

# 3. Where its greedy answers repeat themselves, it unlearns that: twice.
greedy="--temperature 0 --max-new-tokens 80"
answer bundled_tuned runs/bundled_loops_1 gsm8k $greedy --limit 4500
answer bundled_tuned runs/bundled_loops_1 tldr $greedy --limit 4500
answer bundled_tuned runs/bundled_loops_1 mbpp $greedy --limit 300
train bundled_straight
answer bundled_straight runs/bundled_loops_2 gsm8k $greedy --limit 4000
answer bundled_straight runs/bundled_loops_2 tldr $greedy --limit 4500
answer bundled_straight runs/bundled_loops_2 mbpp $greedy --limit 300
train bundled_straighter

# 4. Its own finished answers again, now that most of them are good.
finished="--only-finished --temperature 0.5 --drop-repeated-words 8"
answer bundled_straighter runs/bundled_sharp_answers gsm8k $finished --limit 3500 \
  --max-new-tokens 140 --drop-repeated-tokens 8 --seed 31
answer bundled_straighter runs/bundled_sharp_answers tldr $finished --limit 3000 \
  --max-new-tokens 100 --drop-containing "alias of" --seed 32
answer bundled_straighter runs/bundled_sharp_answers mbpp $finished --limit 400 \
  --max-new-tokens 140 --drop-repeated-tokens 8 --seed 33
answer bundled_straighter runs/bundled_sharp_answers chat $finished --limit 1000 \
  --max-new-tokens 64 --seed 34
train bundled_sharp

# 5. The drafters, on the target's answers at temperature 1; DSpark, the one that is used by default,
# three times as long as the baselines and on calmer answers as well, which are nearer to greedy text.
answer bundled_sharp $samples gsm8k --limit 5000 --max-new-tokens 200 --seed 21
answer bundled_sharp $samples mbpp --limit 464 --max-new-tokens 200 --seed 22
answer bundled_sharp $samples tldr --limit 4000 --max-new-tokens 160 --seed 23
answer bundled_sharp $samples chat --limit 2000 --max-new-tokens 64 --seed 24
answer bundled_sharp runs/bundled_calm gsm8k --temperature 0.5 --max-new-tokens 200 --seed 41
answer bundled_sharp runs/bundled_calm mbpp --temperature 0.5 --max-new-tokens 200 --seed 42
answer bundled_sharp runs/bundled_calm tldr --temperature 0.5 --max-new-tokens 160 --limit 4000 \
  --seed 43
answer bundled_sharp runs/bundled_calm chat --temperature 0.5 --max-new-tokens 64 --limit 2000 \
  --seed 44
for drafter in dspark mtp dflash eagle3; do
  train bundled_$drafter
done
