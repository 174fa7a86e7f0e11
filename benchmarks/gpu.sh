#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine: python3 with torch, numpy and pytest; to build, also nvcc and ninja.
#
#   benchmarks/gpu.sh [OUT_DIR]          OUT_DIR: gpu-results by default
#
# Neither a virtual environment nor a network is used. Libraries built elsewhere serve if they load, else they are
# built in place. One line a step, a log of each in OUT_DIR, steps.json for machines. A step that fails hides none
# of the later ones; a step starts only while time is left. Exit status: 0 all well, 1 a step failed, 2 no GPU here.
#
# Environment:
#   PYTHON        the interpreter (python3)
#   GPU_SECONDS   time for everything together (530)
#   GPU_STEPS     steps to run, all by default: build tests memcheck racecheck tucker2 pair network large
#   GPU_DTYPES    dtypes of the suites (float16,tf32); also bfloat16, float32
#   GPU_LAYOUTS   layouts of suite tucker2 (nhwc); also nchw
#   GPU_SUITE_SECONDS   time of each suite (tucker2 130, pair 50, network 70)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
total=${GPU_SECONDS:-530}
wanted=${GPU_STEPS:-build tests memcheck racecheck tucker2 pair network large}
dtypes=${GPU_DTYPES:-float16,tf32}
layouts=${GPU_LAYOUTS:-nhwc}
out=${1:-gpu-results}

mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
table=$(mktemp)
trap 'rm -f "$table"' EXIT
failed=0

# note RESULT NAME SECONDS REASON: one line for people, the same in steps.json.
note() {
  printf '%-7s %s (%s s) %s\n' "$1" "$2" "$3" "$4"
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$table"
  "$python" - "$table" "$out/steps.json" <<'END' || true
import json, pathlib, sys
rows = [line.split("\t", 3) for line in pathlib.Path(sys.argv[1]).read_text().splitlines()]
keys = ("result", "name", "seconds", "reason")
steps = [dict(zip(keys, row)) | {"seconds": int(row[2])} for row in rows]
pathlib.Path(sys.argv[2]).write_text(json.dumps(steps, indent=1) + "\n")
END
  if [[ $1 == FAILED ]]; then failed=1; fi
}

last_line() {
  grep -v '^[[:space:]]*$' "$1" | tail -n 1 | tr '\t' ' ' | cut -c 1-200
}

# room LIMIT: the seconds a step may take: its own limit or what is left.
room() {
  local left=$((total - SECONDS))
  echo $(($1 < left ? $1 : left))
}

# step NAME LIMIT COMMAND...: in COMMAND the word {limit} becomes the seconds the step may take, less a few to end in.
step() {
  local name=$1 limit begin=$SECONDS status=0 log=$out/$1.log
  limit=$(room "$2")
  shift 2
  if ((limit < 10)); then
    note skipped "$name" 0 "no time left of $total s"
    return 1
  fi
  timeout --kill-after=10 "$limit" "${@//\{limit\}/$((limit > 30 ? limit - 12 : limit / 2))}" >"$log" 2>&1 || status=$?
  if ((status == 0)); then
    note ok "$name" $((SECONDS - begin)) "$(last_line "$log")"
  elif ((status == 124 || status == 137)); then
    note FAILED "$name" $((SECONDS - begin)) "took longer than $limit s; see $name.log"
  elif grep -q 'Device not supported' "$log"; then
    note skipped "$name" $((SECONDS - begin)) "the tool says: Device not supported"
    return 0
  else
    note FAILED "$name" $((SECONDS - begin)) "status $status: $(last_line "$log")"
  fi
  return "$status"
}

asked() { [[ " $wanted " == *" $1 "* ]]; }
has_module() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

# --- is there a GPU? ---

if ! "$python" -c 'import torch' 2>"$out/device.log"; then
  note skipped device 0 "$python cannot import torch: $(last_line "$out/device.log")"
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$out/device.log"; then
  note skipped device 0 "no GPU: $("$python" -c 'import torch; print("torch", torch.__version__, "sees no CUDA device")')"
  exit 2
fi
{
  nvidia-smi || echo 'no nvidia-smi'
  nvcc --version || echo 'no nvcc'
  "$python" -c 'import torch; print(torch.__config__.show()); print(torch.cuda.get_device_properties())'
} >"$out/device.log" 2>&1
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
note ok device "$SECONDS" "$("$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)')"

# --- what is missing ---

export PYTHONUNBUFFERED=1 TENSORCOMP_CACHE_DIR=$out/cache PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
missing=()
for module in numpy scipy safetensors typing_extensions pytest; do
  has_module "$module" || missing+=("$module")
done
if ((${#missing[@]})); then
  note skipped packages 0 "not installed: ${missing[*]}"
fi

# --- native code ---

loads='from tensorcomp_ext import _native; s = _native.cuda_status(); print(s.reason or "CUDA library loaded"); raise SystemExit(not s.ok)'
if asked build && ! "$python" -c "$loads" >"$out/load.log" 2>&1; then
  arch=$capability
  if [[ $arch == 9.0 ]]; then arch=9.0a; fi
  if command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
    step build 300 env TENSORCOMP_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" MAX_JOBS="$(nproc)" \
      "$python" setup.py build_ext --inplace
  else
    note skipped build 0 'no nvcc here'
  fi
fi
native=1
step load 60 "$python" -c "$loads" || native=0

# --- tests ---

pytest=("$python" -m pytest -c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider -v
  --tb=short -o faulthandler_timeout=60)
if ! has_module pytest; then
  asked tests && note skipped tests 0 'pytest is not installed'
elif ((native == 0)); then
  asked tests && note skipped tests 0 'the CUDA library does not load'
elif asked tests; then
  step tests 200 "${pytest[@]}" -m 'not slow' -k 'not on_cpu' --maxfail=60 tests/cuda
fi

for tool in memcheck racecheck; do
  if ! asked "$tool"; then
    continue
  elif ! command -v compute-sanitizer >/dev/null; then
    note skipped "$tool" 0 'no compute-sanitizer here'
  elif ((native == 0)); then
    note skipped "$tool" 0 'the CUDA library does not load'
  else
    # Without torch's pool every tensor is an allocation of its own: an access beyond its end is one into nothing.
    step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" benchmarks/gpu_small_cases.py --seconds '{limit}'
  fi
done

# --- suites ---

suite() {
  asked "$1" || return 0
  local name=$1 limit=${GPU_SUITE_SECONDS:-$2}
  shift 2
  step "$name" "$limit" "$python" -m tensorcomp_ext.bench --suite "$name" --device cuda --dtype "$dtypes" \
    --json "$out/$name.json" --limit '{limit}' "$@"
}
suite tucker2 130 --layout "$layouts" --seconds 0.1
suite pair 50 --seconds 0.1
suite network 70 --seconds 0.5

if asked large && ((native)) && has_module pytest; then
  step large 60 "${pytest[@]}" -m slow tests/cuda
fi

cp "$table" "$out/summary.txt"
if ((failed)); then
  echo "some steps failed; logs in $out"
else
  echo "no step failed; logs in $out"
fi
exit "$failed"
