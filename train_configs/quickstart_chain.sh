#!/usr/bin/env bash
# Usage: quickstart_chain.sh [FOLDER [--section.key=value ...]]      (default: outputs/chain)
# From nothing to a measured model and back, on a CPU: joint training, export of the tuned tokenizer, cached latents, a second
# stage on them, samples, numbers, export in the published layout, import, and samples again, which must be identical.
# Values go to both trainings, which take 300 steps unless one says otherwise. IMAGES=200 samples are drawn.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
out=${1:-outputs/chain} images=${IMAGES:-200}
shift $(($# > 0))
values=(--training.steps=300 "$@")

# shellcheck source=trainer/setup_env.sh
source "$root/trainer/setup_env.sh"
# shellcheck disable=SC2119
setup_python

titanrepa() {
  printf '\n$ titanrepa %s\n' "$*"
  "$PYTHON" -m trainer "$@"
}

first=$root/train_configs/quickstart.toml second=$root/train_configs/quickstart_second_stage.toml
# What the second stage needs of the first, in the config's own words.
stage=(--tokenizer.checkpoint="$out/tokenizer/tokenizer.safetensors"
  --latent_norm.statistics="$out/tokenizer/latent_norm.safetensors" --dataset.size="$((20 * images))")

titanrepa train "$first" --run.dir="$out/joint" "${values[@]}"
titanrepa evaluate "$out/joint" --reconstruction --encoder=tiny_vit --metrics=psnr,ssim --max-images="$images" \
  --dataset.split=heldout
titanrepa export "$out/joint" --format=safetensors --out="$out/tokenizer"
titanrepa export "$out/joint" --format=diffusers --out="$out/diffusers"

titanrepa encode "$second" --features --out="$out/latents" "${stage[@]}"
titanrepa train "$second" --run.dir="$out/second" "${values[@]}" --latent_cache.path="$out/latents" "${stage[@]}"

titanrepa sample "$out/second" --num-samples="$images" --out="$out/samples"
titanrepa evaluate "$out/samples" --reference=dataset --encoder=tiny_vit

titanrepa export "$out/second" --format=repae --name=second --out="$out/published"
titanrepa import "$out/published/second.pt" --config="$out/second/config.toml" --out="$out/imported"
titanrepa sample "$out/imported" --num-samples="$images" --out="$out/samples_again"

for file in "$out"/samples/0*.png; do
  cmp "$file" "$out/samples_again/$(basename "$file")"
done
printf '\nThe %s images of the re-imported model are identical to those of the run. All of it is in %s/\n' "$images" "$out"
