#!/usr/bin/env bash
# Trains what docs/results compares: DSpark with each sequential head, DFlash at two depths, Eagle3
# and MTP-1, all on the same answers of the bundled target for the same 3,000 steps. A run that was
# cut goes on. The answers and the target come from recipes/bundled.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
one() { dspark train "$1" --resume --set run.output_dir="runs/study_$2" "${@:3}"; }
one study_dspark gated --set drafter.markov_head_type=gated
one study_dspark rnn --set drafter.markov_head_type=rnn
one bundled_dflash dflash_5 --set drafter.num_layers=5
one study_dspark vanilla
one bundled_dflash dflash
one bundled_eagle3 eagle3
one bundled_mtp mtp
one study_dspark dspark_1 --set drafter.num_layers=1
