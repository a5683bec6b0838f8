#!/usr/bin/env bash
# Everything there is to know from one GPU, in one go of 530 seconds at most and without a network:
#
#   bench/gpu.sh DIR
#
# A report of the machine, the tests marked gpu, the check of every operation (a case in two dtypes of four: `fastamp
# check` has them all, and takes twice as long to compile), small cases of every kernel under compute-sanitizer where
# that is there, all suites of the benchmark, training steps a second (on TREC where carry/data/trec has it), and, in the
# time that is left, a search for better launches; with it, measured times of main launches over those that compiled code
# predicts for an H200. Logs and JSON go to DIR, a dozen files. A step that fails or runs out of time does not keep the
# next one from running; the code at the end is 1 if any did. Takes the python3 on PATH (or $PYTHON) with its torch,
# triton and rich, and changes nothing in it; packages it lacks can be put as wheels into carry/ beforehand:
#   python3 -m pip download --no-deps -d carry rich
# BERT's steps are timed where there is transformers. DEVICE=cpu rehearses it all, with fewer cases, rounds, shapes and
# networks, on a machine without a GPU, and takes up to four times as long.
set -u
TOGETHER=525  # seconds, from the start to the last step's end
KILL=3  # that a step has to end in when its time is over

die() { echo "gpu.sh: $*" >&2; exit 2; }

[ $# -eq 1 ] || die "usage: bench/gpu.sh DIR"
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
command -v "$python" >/dev/null || die "no $python on PATH; set PYTHON"
mkdir -p "$1" || die "cannot make $1"
out=$(cd "$1" && pwd)

# The checkout as a package, kernels/amp in its place, without installing anything.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/fastamp"
ln -s "$root"/fastamp/* "$site/fastamp/"
ln -s "$root/kernels/amp" "$site/fastamp/kernels"
if ls "$root"/carry/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --target "$site" "$root"/carry/*.whl || die "cannot unpack carry/*.whl"
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$site" || die "cannot enter $site"  # and not the checkout, whose fastamp/ lacks the kernels

for package in torch triton rich; do
    "$python" -c "import $package" 2>/dev/null ||
        die "$python has no $package; on a machine with a network: pip download --no-deps -d carry $package"
done
if [ "$device" = cuda ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || die "torch finds no GPU on this machine"
fi

# A CPU is slower, and not paid for by the second.
factor=1
[ "$device" = cpu ] && factor=4
TOGETHER=$((factor * TOGETHER))
began=$SECONDS
: >"$out/summary.txt"

# step NAME LOG SECONDS COMMAND...: runs it with its output added to LOG.txt and its outcome to summary.txt
step() {
    local name=$1 log=$out/$2.txt limit=$((factor * $3)) start=$SECONDS code=0
    shift 3
    # A step has its own limit, and all of them have one together.
    local left=$((TOGETHER - SECONDS - KILL))
    [ $limit -gt $left ] && limit=$left
    if [ $limit -lt 5 ]; then
        echo "$name: not run, the $TOGETHER s of all steps are over" | tee -a "$out/summary.txt"
        return
    fi
    timeout -k $KILL "$limit" "$@" >>"$log" 2>&1 || code=$?
    local said="failed with code $code"
    [ $code -eq 0 ] && said="passed"
    [ $code -eq 124 ] || [ $code -eq 137 ] && said="ran out of its $limit s"
    echo "$name: $said after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

steps=("$python" "$root/bench/gpu_steps.py" --device "$device")
[ "$device" = cpu ] && steps+=(--quick)
for log in setup tests bench; do : >"$out/$log.txt"; done
command -v nvidia-smi >/dev/null && step nvidia-smi setup 10 nvidia-smi
step machine setup 15 "${steps[@]}" machine "$out"

workers=()
[ "$device" = cuda ] && "$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)
# First all that proves and compiles, side by side; nothing is being timed. Large shapes, which need the memory that the
# tests take, are compiled after them.
prove() {
    if ! "$python" -c 'import pytest' 2>/dev/null; then
        echo "tests: not run, $python has no pytest" | tee -a "$out/summary.txt"
        return
    fi
    step tests tests 105 "$python" -m pytest "$root/tests" -c "$root/pyproject.toml" --rootdir "$root" -o addopts= \
        -p no:cacheprovider -m gpu "${workers[@]}"
}
{ prove; [ "$device" = cuda ] && step warm-large setup 60 "${steps[@]}" warm-large "$out"; } &
# The check before the warm-up, for both want all the cores that are left.
{ step check setup 95 "${steps[@]}" check "$out"; step warm setup 115 "${steps[@]}" warm "$out"; } &
step sanitize setup 165 "$python" "$root/bench/sanitize.py" "$out" --device "$device" --seconds 155 &
wait
# Then the clocks, alone.
step ops bench 25 "${steps[@]}" ops "$out"
step head bench 95 "${steps[@]}" head "$out"
step layers bench 75 "${steps[@]}" layers "$out"
step scaling bench 25 "${steps[@]}" scaling "$out"
step vocabulary bench 40 "${steps[@]}" vocabulary "$out"
step training bench 25 "${steps[@]}" training "$out"
# What is left of the time.
tuning=(env FASTAMP_AUTOTUNE=1 FASTAMP_CACHE="$out")
[ "$device" = cpu ] && tuning+=(TRITON_INTERPRET=1)
step launches bench 60 "${tuning[@]}" "${steps[@]}" launches "$out"
step predicted bench 10 "${steps[@]}" predicted "$out"
[ "$device" = cuda ] && step autotune bench 120 "${steps[@]}" autotune "$out"

echo "all of it: $((SECONDS - began)) s" | tee -a "$out/summary.txt"
if grep -vE "^(autotune|launches|predicted)" "$out/summary.txt" | grep -qE "failed|ran out|not run"; then exit 1; fi
