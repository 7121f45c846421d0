#!/usr/bin/env bash
# Usage: run.sh [OPTION ...] [--section.key=value ...]
#
# The paper's claims on the embedded dataset (docs/proof.md): trains every arm with every seed, then compares them. An
# arm is an ordinary run in FOLDER/ARM-seedN: one that was killed goes on, one that is finished is kept.
#
#   --out=FOLDER   default: outputs/proof, or outputs/proof-quick with --quick
#   --seeds=N      seeds 0 to N - 1 (default: 3 for ldm, repa, repae and repa_tuned, 1 for the others and with --quick)
#   --arms=...     default: all; see `options` below
#   --jobs=N       runs side by side, one thread each (default: number of cores)
#   --quick        a third of the steps
#   --tokenizer-steps=N   steps of the tokenizer that the arms start from (default: 1500; 500 with --quick)
# Overrides apply to every arm, but not to the tokenizer that they start from.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
root=$(dirname "$(dirname "$here")")
all=ldm,repa,repae,repae_scratch,naive_e2e,no_stop_gradient,no_batch_norm,no_reconstruction,no_gan,repae_irepa,reg
all+=,repa_lightningdit,repa_tuned,repa_tuned_lightningdit
out='' seeds='' arms=$all jobs=$(nproc) quick='' steps='' values=()

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

for argument in "$@"; do
  case $argument in
    -h | --help)
      sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | grep -v '^set '
      exit
      ;;
    --out=*) out=${argument#*=} ;;
    --seeds=*) seeds=${argument#*=} ;;
    --arms=*) arms=${argument#*=} ;;
    --jobs=*) jobs=${argument#*=} ;;
    --quick) quick=1 ;;
    --tokenizer-steps=*) steps=${argument#*=} ;;
    --*.*=*) values+=("$argument") ;;
    *) fail "'$argument': expected --out, --seeds, --arms, --jobs, --quick, --tokenizer-steps or --section.key=value; see --help" ;;
  esac
done
out=${out:-outputs/proof${quick:+-quick}}
[[ ${seeds:-1} =~ ^[1-9][0-9]*$ && $jobs =~ ^[1-9][0-9]*$ && ${steps:-1} =~ ^[1-9][0-9]*$ ]] ||
  fail '--seeds, --jobs and --tokenizer-steps: expected positive numbers'
((quick)) && values=(--training.steps=400 --evaluation.every=50 "${values[@]}")

# options ARM SEED: prints, one per line, what distinguishes an arm from base.toml.
options() {
  local tuned=$out/repae-seed$2/tokenizer/tokenizer.safetensors
  local ldit=(--denoiser.name=lightningdit)
  case $1 in
    ldm | repa | repae | naive_e2e) printf '%s\n' "--recipe.name=$1" ;;
    repae_scratch) printf '%s\n' --tokenizer.checkpoint= ;;
    no_stop_gradient) printf '%s\n' --recipe.stop_gradient=false ;;
    no_batch_norm) printf '%s\n' --latent_norm.fixed=true ;;
    no_reconstruction) printf '%s\n' --losses.l1.weight=0 --losses.kl.weight=0 ;;
    no_gan) printf '%s\n' --losses.patchgan.weight=0 ;;
    repae_irepa) printf '%s\n' --losses.cosine.head=conv --losses.cosine.spatial_norm=true --losses.cosine.gamma=0.6 ;;
    reg) printf '%s\n' --recipe.name=reg --denoiser.class_token_dim=96 ;;
    repa_tuned) printf '%s\n' --recipe.name=repa "--tokenizer.checkpoint=$tuned" ;;
    repa_lightningdit) printf '%s\n' --recipe.name=repa "${ldit[@]}" ;;
    repa_tuned_lightningdit) printf '%s\n' --recipe.name=repa "${ldit[@]}" "--tokenizer.checkpoint=$tuned" ;;
    *) fail "--arms: no arm '$1'; available: ${all//,/, }" ;;
  esac
}

# shellcheck source=trainer/setup_env.sh
source "$root/trainer/setup_env.sh"
# shellcheck disable=SC2119
setup_python
export OMP_NUM_THREADS=1

# train NAME CONFIG [options]: trains in $out/NAME, with its output in $out/NAME.txt.
train() {
  local folder=$out/$1 call="$*"
  if [[ -e $folder/finished && $(<"$folder/finished") == "$call" ]]; then
    return
  fi
  printf 'training %s\n' "$1"
  # A complete run with problems, such as collapsed latents, has an exit status of its own; a stopped one has none.
  "$PYTHON" -m trainer train "$2" --run.dir="$folder" "${@:3}" >"$folder.txt" 2>&1 || true
  if ! grep -q '^Done: ' "$folder.txt"; then
    tail -n 5 "$folder.txt" >&2
    printf '%s failed; see %s.txt\n' "$1" "$folder" >&2
    return 1
  fi
  printf '%s\n' "$call" >"$folder/finished"
}

# arm ARM SEED
arm() {
  local extra
  mapfile -t extra < <(options "$1" "$2")
  local start=--tokenizer.checkpoint=$out/tokenizer/tokenizer/tokenizer.safetensors
  train "$1-seed$2" "$here/base.toml" "$start" --training.seed="$2" "${extra[@]}" "${values[@]}"
}

# export_tokenizer NAME
export_tokenizer() {
  [[ -e $out/$1/tokenizer/tokenizer.safetensors ]] ||
    "$PYTHON" -m trainer export "$out/$1" --format=safetensors --parts=tokenizer --out="$out/$1/tokenizer" >/dev/null
}

mkdir -p "$out"
IFS=, read -ra arms <<<"$arms"
declare -A count # seeds of each arm
most=1
for name in "${arms[@]}"; do
  options "$name" 0 >/dev/null
  case $name in
    ldm | repa | repae | repa_tuned) count[$name]=${seeds:-$((quick ? 1 : 3))} ;;
    *) count[$name]=${seeds:-1} ;;
  esac
  ((count[$name] > most)) && most=${count[$name]}
  # A tuned tokenizer comes from this arm.
  [[ $name != repa_tuned* || " ${arms[*]} " == *' repae '* ]] || fail "--arms: $name needs repae"
done
steps=${steps:-$((quick ? 500 : 1500))}
train tokenizer "$here/tokenizer.toml" --training.steps="$steps" --losses.patchgan.start_step="$((steps / 3))"
export_tokenizer tokenizer

trap 'trap - INT TERM; kill 0' INT TERM # a run saves a checkpoint when it is interrupted
failed=0
for second in 0 1; do # the second stage needs the first one's tokenizers
  for ((seed = 0; seed < most; seed++)); do
    for name in "${arms[@]}"; do
      ((seed < count[$name])) || continue
      [[ $name == repa_tuned* ]] && tuned=1 || tuned=0
      ((tuned == second)) || continue
      while (($(jobs -rp | wc -l) >= jobs)); do wait -n || failed=1; done
      arm "$name" "$seed" &
    done
  done
  while (($(jobs -rp | wc -l))); do wait -n || failed=1; done
  ((failed)) && fail 'a run failed; the same command goes on'
  if ((!second)) && [[ " ${arms[*]} " == *' repa_tuned'* ]]; then
    for ((seed = 0; seed < count[repae]; seed++)); do export_tokenizer "repae-seed$seed"; done
  fi
done

runs=()
for name in "${arms[@]}"; do
  folders=''
  for ((seed = 0; seed < count[$name]; seed++)); do folders+=,$out/$name-seed$seed; done
  runs+=("$name=${folders#,}")
done
metrics=fd_judge,rfd_judge,psnr,latent/spatial_variance,latent/total_variation,speed/images_per_s
for name in "${arms[@]}"; do
  [[ $name == ldm || $name == naive_e2e || $metrics == *align* ]] || metrics+=,denoiser/align
done
reach=()
[[ " ${arms[*]} " == *' ldm '* ]] && reach=(--reach=ldm)
"$PYTHON" -m trainer compare "${runs[@]}" --out="$out/compare" "${reach[@]}" \
  --metric="$metrics"
