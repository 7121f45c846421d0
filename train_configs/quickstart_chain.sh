#!/usr/bin/env bash
# Usage: quickstart_chain.sh [FOLDER [--section.key=value ...]]      (default: outputs/chain)
# Whole pipeline on a CPU: joint training, export of the tuned tokenizer, latent caching, second stage on the cache,
# sampling, evaluation, export in the published layout, import, and sampling again, which must produce identical images.
# Overrides apply to both trainings (default: 300 steps). IMAGES (default: 200) sets the number of samples.
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
# Overrides that point the second stage to outputs of the first.
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
printf '\nThe %s images of the re-imported model are identical to those of the run. All outputs are in %s/\n' "$images" "$out"
