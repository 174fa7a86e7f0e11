#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine: python3 with torch, numpy and pytest; to build, also nvcc and ninja.
#
#   benchmarks/gpu.sh [OUT_DIR]          OUT_DIR: gpu-results by default
#
# Neither a virtual environment nor a network is used. Libraries built elsewhere serve if they load and were built
# from the sources here (tensorcomp_ext/_native_build.json, carried with them, says so), else they are built in place.
# One line a step, a log of each in OUT_DIR, steps.json for machines: {"status", "not_run", "steps"}. A step that fails
# hides none of the later ones; a step starts only while time is left, the most important first. The limits of all
# steps but build fit into GPU_SECONDS; a build takes its time from the last ones.
# Exit status: 0 all asked for ran and went well, 1 a step failed, 2 no GPU here, 3 none failed but some did not run.
#
# Environment:
#   PYTHON        the interpreter (python3)
#   GPU_SECONDS   time for everything together (530)
#   GPU_STEPS     steps to run, all by default: build tests tucker2 pair chain embedding lowrank_sparse network compiled
#                 compilers memcheck racecheck large
#   GPU_DTYPES    dtypes of the suites (bfloat16,tf32); also float16, float32. Suite embedding, which has no products
#                 that TF32 could round, takes float32 for tf32
#   GPU_LAYOUTS   layouts of suite tucker2 (nhwc); also nchw
#   GPU_SUITE_SECONDS   time of each suite (tucker2 65, pair 30, chain 30, embedding 20, lowrank_sparse 25, network 35,
#                 compiled 35)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
total=${GPU_SECONDS:-530}
wanted=${GPU_STEPS:-build tests tucker2 pair chain embedding lowrank_sparse network compiled compilers memcheck
  racecheck large}
dtypes=${GPU_DTYPES:-bfloat16,tf32}
layouts=${GPU_LAYOUTS:-nhwc}
out=${1:-gpu-results}

mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
table=$(mktemp)
trap 'rm -f "$table"' EXIT
failed=0
not_run=()

# write_steps STATUS: steps.json anew; the status is null until the end.
write_steps() {
  "$python" - "$table" "$out/steps.json" "$1" <<'END' || true
import json, pathlib, sys
rows = [line.split("\t", 3) for line in pathlib.Path(sys.argv[1]).read_text().splitlines()]
keys = ("result", "name", "seconds", "reason")
steps = [dict(zip(keys, row)) | {"seconds": int(row[2])} for row in rows]
not_run = [step["name"] for step in steps if step["result"] == "skipped"]
result = {"status": json.loads(sys.argv[3]), "not_run": not_run, "steps": steps}
pathlib.Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")
END
}

# note RESULT NAME SECONDS REASON: one line for people, the same in steps.json.
note() {
  printf '%-7s %s (%s s) %s\n' "$1" "$2" "$3" "$4"
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$table"
  case $1 in
    FAILED) failed=1 ;;
    skipped) not_run+=("$2") ;;
  esac
  write_steps null
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
  write_steps 2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$out/device.log"; then
  note skipped device 0 "no GPU: $("$python" -c 'import torch; print("torch", torch.__version__, "sees no CUDA device")')"
  write_steps 2
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
  note missing packages 0 "not installed: ${missing[*]}"
fi

# --- native code ---

loads='from tensorcomp_ext import _native; s = _native.cuda_status(); print(s.reason or "CUDA library loaded"); raise SystemExit(not s.ok)'
built_from() { "$python" tensorcomp_ext/_native_build.py; }
fits() { built_from && "$python" -c "$loads"; }

if asked build && ! fits >"$out/fits.log" 2>&1; then
  arch=$capability
  if [[ $arch == 9.0 ]]; then arch=9.0a; fi
  module=1
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' ||
    { module=0 && note missing Python.h 0 'the Python module _C is left out of the build; no op needs it'; }
  if ! command -v nvcc >/dev/null && [[ ! -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]]; then
    note skipped build 0 "needed ($(last_line "$out/fits.log")), but no nvcc is here"
  elif ! "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null; then
    note skipped build 0 "needed ($(last_line "$out/fits.log")), but setuptools >= 77 is not here"
  else
    step build 300 env TENSORCOMP_CUDA=1 TENSORCOMP_PYTHON_MODULE=$module TORCH_CUDA_ARCH_LIST="$arch" \
      MAX_JOBS="$(nproc)" "$python" setup.py build_ext --inplace --force
  fi
fi
native=1
# Libraries of other sources fail here: nothing measured with them would say anything of these.
step load 20 bash -c "\"\$0\" -c '$loads' && \"\$0\" tensorcomp_ext/_native_build.py" "$python" || native=0

# --- tests ---

pytest=("$python" -m pytest -c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider -v
  --tb=short -o faulthandler_timeout=60)

# runs NAME MODULE: whether a step is asked for and can run, its reason noted where it cannot.
runs() {
  asked "$1" || return 1
  if ! has_module "$2"; then
    note skipped "$1" 0 "$2 is not installed"
  elif ((native == 0)); then
    note skipped "$1" 0 'no CUDA library that loads and was built from these sources'
  else
    return 0
  fi
  return 1
}

compilers=tests/cuda/test_with_compilers.py
if runs tests pytest; then
  step tests 120 "${pytest[@]}" -m 'not slow' -k 'not on_cpu' --maxfail=60 --ignore="$compilers" tests/cuda
fi

# --- suites ---

suite() {
  runs "$1" torch || return 0
  local name=$1 limit=${GPU_SUITE_SECONDS:-$2} kind=$3
  shift 3
  step "$name" "$limit" "$python" -m tensorcomp_ext.bench --suite "$kind" --device cuda \
    --json "$out/$name.json" --limit '{limit}' "$@"
}
suite tucker2 65 tucker2 --dtype "$dtypes" --layout "$layouts" --seconds 0.1
suite chain 30 chain --dtype "$dtypes" --seconds 0.1
suite embedding 20 embedding --dtype "${dtypes//tf32/float32}" --seconds 0.1
suite lowrank_sparse 25 lowrank_sparse --dtype "$dtypes" --seconds 0.1
suite pair 30 pair --dtype "$dtypes" --seconds 0.1
suite network 35 network --dtype "$dtypes" --seconds 0.5

# Against torch.compile: as many of the large bfloat16 channels-last inference rows as its time allows.
inductor='import torch; print(torch.compile(lambda x: x * 2 + 1)(torch.ones(64, device="cuda")).sum().item())'
if asked compiled; then
  if timeout --kill-after=5 "$(($(room 30) > 0 ? $(room 30) : 1))" "$python" -c "$inductor" >"$out/inductor.log" 2>&1; then
    suite compiled 35 tucker2 --compiled best --dtype bfloat16 --layout nhwc --direction forward --seconds 0.1
  else
    note skipped compiled 0 "torch.compile does not work here: $(last_line "$out/inductor.log")"
  fi
fi

# --- what a run cut short can do without ---

if runs compilers pytest; then
  step compilers 40 "${pytest[@]}" --maxfail=20 "$compilers"
fi
for tool in memcheck racecheck; do
  if asked "$tool" && ! command -v compute-sanitizer >/dev/null; then
    note skipped "$tool" 0 'no compute-sanitizer here'
  elif runs "$tool" torch; then
    # Without torch's pool every tensor is an allocation of its own: an access beyond its end is one into nothing.
    step "$tool" 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" benchmarks/gpu_small_cases.py --few --seconds 10
  fi
done
if runs large pytest; then
  step large 20 "${pytest[@]}" -m slow tests/cuda
fi

cp "$table" "$out/summary.txt"
status=0
if ((failed)); then
  status=1
  echo "some steps failed; logs in $out"
elif ((${#not_run[@]})); then
  status=3
  echo "no step failed; logs in $out"
else
  echo "all steps ran and went well; logs in $out"
fi
if ((${#not_run[@]})); then
  echo "${#not_run[@]} steps not run: ${not_run[*]}"
fi
write_steps "$status"
exit "$status"
