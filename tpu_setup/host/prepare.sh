#!/usr/bin/env bash
# prepare.sh DIGEST: make the source that this script came with, in looplm/source.new, the one this host runs.
set -euo pipefail
# shellcheck source=tpu_setup/host/run_state.sh
source "$(dirname "${BASH_SOURCE[0]}")/run_state.sh"

digest=$1

main() {
  if [[ $(cat "$home/prepared" 2>/dev/null) == "$digest" ]]; then
    rm -rf "$home/source.new"
    say "prepared already"
    return
  fi
  if alive; then
    say "another source is in use by a run: tpu stop" >&2
    return 1
  fi
  rm -f "$home/prepared"
  rm -rf "$home/source"
  mv "$home/source.new" "$home/source"
  install
  echo "$digest" >"$home/prepared"
  say "prepared"
}

# The images of Cloud TPU hold an older Python than we need; uv brings one where it is missing.
install() {
  [[ -x $home/uv/bin/uv ]] || python3 -m pip install --quiet --target "$home/uv" uv==0.13.9
  "$home/uv/bin/uv" venv --quiet --allow-existing --python '>=3.11,<3.13' "$home/venv"
  "$home/uv/bin/uv" pip install --quiet --python "$home/venv/bin/python" \
    --requirement "$home/source/requirements.txt" 'jax[tpu]' gcsfs
  "$home/uv/bin/uv" pip install --quiet --python "$home/venv/bin/python" --no-deps --editable "$home/source"
}

main
