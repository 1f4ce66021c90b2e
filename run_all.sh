#!/usr/bin/env bash
# The experiments. What a row does not say is train.py's default, which is the paper's.
#
#   bash run_all.sh          Table 1 of the paper: 15 settings x 3 seeds, for a GPU
#   bash run_all.sh --quick  the main job in miniature, on 5,000 real digits, on two CPU cores
#   bash run_all.sh --landscape  Figures 1 to 4 and 12, C.2.4, C.2.5 in miniature: hours, on a CPU
#   bash run_all.sh --test   the tests
#
# Each sets itself up: the packages of $PYTHON (default: python3) if they are there, else a .venv
# made here. Finished work is skipped and interrupted work goes on, so it may be given again.
# SEEDS="0" runs one seed, DATA_DIR=... holds mnist.npz and cifar10.npz, --cpu insists without GPU.
set -euo pipefail

main() {
    [[ $# -le 1 ]] || fail "one word at most, got: $*"
    case "${1:-}" in
        --quick) setup; quick ;;
        --landscape) setup; landscape ;;
        --test)  setup; "$python" -m pytest -q tests ;;
        '')      setup
                 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
                     fail "no GPU here, and Table 1 needs months on a few CPU cores. Use" \
                          "--quick, which takes minutes, or --cpu to begin all the same"
                 table1 ;;
        --cpu)   setup; table1 ;;
        *)       sed -n '2,11s/^# \{0,1\}//p' run_all.sh
                 [[ "$1" == --help || "$1" == -h ]] || fail "'$1' is unknown" ;;
    esac
}

table1() {
    local seed sched model
    for seed in ${SEEDS:-0 1 2}; do
        for sched in constant cosine linear; do
            job mnist_lenet_${sched}_s$seed --dataset mnist --eps-sched $sched --seed $seed
            for model in vgg resnet18; do
                local row=(--dataset cifar10 --model $model --eps-sched $sched --seed $seed)
                job cifar10_${model}_${sched}_s$seed "${row[@]}"
                job cifar10_${model}_${sched}_periodic_s$seed "${row[@]}" --periodic
            done
        done
    done
    "$python" report.py "${jobs[@]}"
}

# At this width and learning rate a constant budget never leaves the plateau and a warm-up does.
quick() {
    local sched row=(--dataset mnist5k --width 4 --epochs 8 --clock batch --batch-size 32 --lr 4e-3
                     --step-size 0.07 --n-iter 7 --n-eval 100)
    examples=(--n-examples 100)
    for sched in constant cosine linear; do
        job quick_$sched "${row[@]}" --eps-sched $sched
    done
    job quick_linear_periodic "${row[@]}" --eps-sched linear --periodic
    "$python" report.py "${jobs[@]}" --out results/quick
}

# The landscape at several budgets, and of narrow models; small, but where the paper's effects show.
landscape() {
    local seed eps sched width data=(--data-dir "${DATA_DIR:-data}")
    analysed() {  # WIDTH EPS SCHED SEED: a run, its Hessian, similarities and dead units
        local run=ckpts/w$1_eps$2_$3_s$4
        "$python" train.py --width $1 --eps $2 --eps-sched $3 --seed $4 --epochs 40 --lr 1e-3 \
            --batch-size 64 --n-iter 10 --step-size "$([[ $2 == 0 ]] && echo 0.01 || echo $2/8)" \
            --trace 500 --n-eval 500 --out $run "${data[@]}"
        "$python" landscape.py dead $run "${data[@]}"
        jobs+=($run)
        [[ $1 == 4 ]] || return 0
        "$python" hessian.py $run --n-examples 500 "${data[@]}"
        "$python" landscape.py similarity $run --n-examples 250 \
            --a 0 .02 .1 .5 "${data[@]}"
    }
    local seeds=(${SEEDS:-0 1})
    for seed in "${seeds[@]}"; do
        for eps in 0 0.1 0.2 0.3 0.4; do
            analysed 4 $eps constant $seed
        done
        for width in 1 2; do
            for eps in 0 0.3; do
                analysed $width $eps constant $seed
            done
        done
    done
    for eps in 0.1 0.2 0.3 0.4; do
        analysed 4 $eps linear ${seeds[0]}
    done
    for eps in 0 0.2; do  # between the first two seeds
        [[ ${#seeds[@]} -gt 1 ]] || continue
        "$python" landscape.py connect ckpts/w4_eps${eps}_constant_s${seeds[0]} \
            ckpts/w4_eps${eps}_constant_s${seeds[1]} --n-examples 500 --epochs 40 --lr 0.02 \
            --points 11 "${data[@]}"
    done
    "$python" landscape.py surface ckpts/w4_eps0.2_constant_s${seeds[0]} --n-examples 250 \
        --grid 11 "${data[@]}"
    "$python" landscape.py theory "${data[@]}"
    "$python" report.py "${jobs[@]}" --out results/landscape
}

jobs=() examples=()
job() {  # NAME FLAGS...: a run and what is computed from it
    local run=ckpts/$1 data=${DATA_DIR:-data}
    "$python" train.py --out "$run" --data-dir "$data" "${@:2}"
    "$python" evaluate.py "$run" --data-dir "$data" ${examples[@]+"${examples[@]}"}
    jobs+=("$run")
}

setup() {
    local name=${PYTHON:-python3} hint='(PYTHON=/path/to/python3 names another)'
    python=$(cd "$started" && command -v "$name") ||
        fail "$name is not installed; Python 3.10 or newer is needed $hint"
    [[ "$python" != */* || "$python" == /* ]] || python=$started/$python
    "$python" -c '' || fail "$name does not run $hint"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version 2>&1) is too old; Python 3.10 or newer is needed $hint"
    local packages='import torch, torchvision, numpy, matplotlib, tqdm, mlxtend, pytest
assert tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 11)'
    if "$python" -c "$packages" 2> /dev/null; then return; fi
    if ! .venv/bin/python -c "$packages" 2> /dev/null; then
        echo 'setting up .venv from requirements.txt: some minutes, some GB'
        "$python" -m venv --clear .venv ||
            fail "no .venv could be made; on Debian and Ubuntu: apt-get install python3-venv"
        .venv/bin/python -m pip install --quiet -r requirements.txt ||
            fail "the packages of requirements.txt could not be installed; is there a network?"
    fi
    python=.venv/bin/python
}

fail() {
    echo "error: $*" >&2
    exit 1
}

started=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
main "$@"
