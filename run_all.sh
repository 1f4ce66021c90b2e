#!/usr/bin/env bash
# The experiments of the paper: each run is trained and measured, then all are reported.
#
#   bash run_all.sh           the whole paper on a GPU: some 100 hours of an H100
#   bash run_all.sh --small   narrow networks, few images: some 30 hours on two CPU cores
#   bash run_all.sh --quick   the whole paper in miniature: minutes on two CPU cores
#   bash run_all.sh --test    ruff and the tests
#
# The same command resumes. Parts that are named are run alone, by these names or as fig5, c24 ...
#   table1    Table 1                              rate      Figure 5, C.2.3
#   standard  AutoAttack on the runs of Table 1    width     C.2.4
#   controls  what periods gain over other ways    connect   C.2.5, two seeds a pair
#   budget    Figures 2, 3, 4, 8, 11, 12, C.2.2    theory    Figure 1
# --list prints the jobs: shell lines that run from here in any order and at once. --shard I/N takes
# every N-th job, from the I-th on. --cpu needs no GPU. Flags behind -- go to every train.py.
# SEEDS="0 1 2" (--small: 0 to 4, --quick: 0 1), JOBS=1 at once (--small, --quick: one per core),
# PYTHON=python3 (if it lacks packages, a .venv is made), DATA_DIR=data of mnist.npz, cifar10.npz.

# shellcheck disable=SC2086,SC2329  # no word of a line holds a space; functions are called by name
set -euo pipefail

# ---- The runs. A line is: run PART DATASET MODEL SCHED EPS LR WIDTH

declare -A train_flags  # of DATASET_MODEL, beside those that its line gives
evaluate='' standard='' pgd='' hessian='' similarity='' surface='' curve=''  # flags of measurements
held_out='' half='' quarter=''  # flags of train.py in the part controls, and of evaluate.py:
two_attacks='--standard --attacks apgd_ce apgd_t'

paper() {  # hours of an H100, by arithmetic: table1 48, budget 20, rate 26, width 3, connect 3
    seeds=${SEEDS:-0 1 2}
    train_flags=([mnist_lenet]='--trace 2000' [cifar10_resnet18]='--trace 2000')
    similarity='--n-examples 10000' surface='--n-examples 1000'
    held_out='--n-val 500 --ema 0.999' half='--epochs 100' quarter='--epochs 50'
    for part in table1 standard; do
        for sched in constant cosine linear; do run $part mnist lenet $sched 0.4 1e-4 16; done
        for sched in {constant,cosine,linear}{,_periodic}; do
            run $part cifar10 vgg $sched 8/255 0.1 8
            run $part cifar10 resnet18 $sched 8/255 0.1 8
        done
    done
    for sched in linear_{snapshots,pas}; do run controls cifar10 resnet18 $sched 8/255 0.1 8; done
    independent cifar10 resnet18 linear 8/255 0.1 8
    for eps in 0 0.1 0.2 0.3 0.4; do run budget mnist lenet constant $eps 1e-4 16; done
    for eps in 0 2/255 4/255 8/255; do run budget cifar10 resnet18 constant $eps 0.1 8; done
    for lr in 1e-5 3e-5 1e-4 3e-4 1e-3 3e-3 1e-2; do
        for sched in constant cosine linear warmup; do run rate mnist lenet $sched 0.4 $lr 16; done
    done
    for width in 1 2 4 16; do run width mnist lenet constant 0 1e-4 $width; done
    for width in 1 2 4 16; do run width mnist lenet constant 0.4 1e-4 $width; done
    for eps in 0 0.4; do run connect mnist lenet constant $eps 1e-4 16; done
    for eps in 0 8/255; do run connect cifar10 resnet18 constant $eps 0.1 8; done
}

small() {
    seeds=${SEEDS:-0 1 2 3 4}  # five seeds, fixed before the runs; none added, none left out
    local three_seeds=${SEEDS:-0 1 2} three_pairs=${SEEDS:-0 1 2 3 4 5}
    local digits='--n-iter 10 --step-size eps/8 --n-eval 500'
    local images='--epochs 100 --batch-size 32 --n-iter 5 --step-size 2.5/255 --n-eval 250'
    train_flags[mnist_lenet]="--n-train 6000 --epochs 15 $digits"
    train_flags[mnist5k_lenet]="--epochs 40 --batch-size 64 --trace 500 $digits"
    train_flags[cifar10_lenet]="--n-train 2000 $images"
    train_flags[cifar10_vgg]="--n-train 1000 $images"
    train_flags[cifar10_resnet18]="--n-train 1000 $images"
    evaluate='--n-examples 500' standard=$evaluate hessian=$evaluate pgd='--n-examples 2000'
    held_out='--n-val 500 --ema 0.995' half='--epochs 50' quarter='--epochs 25'
    similarity='--n-examples 250 --a 0 .02 .1 .5' surface='--n-examples 250 --grid 11'
    curve='--n-examples 500 --epochs 40 --lr 0.02 --points 11'
    for part in table1 standard; do
        for sched in {linear,constant,cosine}{,_periodic}; do
            run $part cifar10 resnet18 $sched 8/255 0.05 4
            run $part cifar10 lenet $sched 8/255 0.02 8
            run $part mnist lenet $sched 0.2 3e-3 4
        done
        run $part cifar10 vgg linear 8/255 0.05 4
        for sched in constant cosine linear; do  # at 0.4 a constant schedule does not train
            seeds=$three_seeds run $part mnist lenet $sched 0.4 3e-3 4
        done
    done
    for sched in {linear,constant}_{snapshots,pas,lr,eps}; do
        run controls cifar10 lenet $sched 8/255 0.02 8
    done
    for sched in linear_{snapshots,pas}; do run controls cifar10 resnet18 $sched 8/255 0.05 4; done
    for sched in linear constant; do independent cifar10 lenet $sched 8/255 0.02 8; done
    independent cifar10 resnet18 linear 8/255 0.05 4
    for eps in 0 0.1 0.2 0.3; do run budget mnist5k lenet constant $eps 1e-3 4; done
    for lr in 1e-3 3e-3 1e-2; do
        for sched in constant cosine linear warmup; do run rate mnist lenet $sched 0.2 $lr 4; done
    done
    for width in 1 2 4; do run width mnist5k lenet constant 0 1e-3 $width; done
    for width in 1 2 4; do run width mnist5k lenet constant 0.3 1e-3 $width; done
    for eps in 0 0.2; do seeds=$three_pairs run connect mnist5k lenet constant $eps 1e-3 4; done
}

quick() {
    seeds=${SEEDS:-0 1}
    train_flags[mnist5k_lenet]='--n-train 2000 --epochs 6 --clock batch --batch-size 20 --n-iter 5'
    train_flags[mnist5k_lenet]+=' --n-eval 200 --step-size eps/4 --trace 100'
    evaluate='--n-examples 50' standard='--n-examples 10' hessian='--n-examples 100' pgd=$evaluate
    similarity='--n-examples 50 --a 0 0.1 0.5' surface='--n-examples 50 --grid 7'
    curve='--n-examples 100 --epochs 20 --lr 0.02 --points 7'
    for sched in constant cosine linear; do run table1 mnist5k lenet $sched 0.4 4e-3 4; done
    for part in budget width connect; do run $part mnist5k lenet constant 0 4e-3 4; done
    for part in budget width connect; do run $part mnist5k lenet constant 0.1 4e-3 4; done
    for width in 1 4; do run width mnist5k lenet constant 0.4 4e-3 $width; done
    seeds=${seeds%% *}  # the first seed is enough for the rest
    for part in table1 standard; do run $part mnist5k lenet linear_periodic 0.4 4e-3 4; done
    for lr in 1e-3 4e-3; do run rate mnist5k lenet constant 0.4 $lr 4; done
    for lr in 1e-3 4e-3; do run rate mnist5k lenet linear 0.4 $lr 4; done
    run rate mnist5k lenet warmup 0.4 4e-3 4
}

# ---- The parts: what is measured on the run in $folder

table1() { add "evaluate.py $folder $evaluate" && job; }
standard() { add "evaluate.py $folder --standard $standard" && job; }
rate() { add "evaluate.py $folder --attacks pgd $pgd" && job; }
width() { add "landscape.py dead $folder" && job; }
theory() { folder=evals part=theory commands="$prefix theory.py" && job; }

budget() {
    add "hessian.py $folder $hessian"
    if [[ $folder != *_eps0_* ]]; then add "landscape.py similarity $folder $similarity"; fi
    if [[ $folder == *_s${seeds%% *} ]]; then add "landscape.py surface $folder $surface"; fi
    job
}

controls() {  # by all of AutoAttack where most depends on it, else by its first two attacks
    local all=() two=('') flags
    case $folder in
        *_snapshots_*)
            all=('--member 3' '--member 3 --weights best') two=('--member 3 --weights ema' '') ;;
        *_pas_*) all=('' '--member 1') two=('--member 3' '--weights best' '--weights ema') ;;
    esac
    for flags in "${all[@]}"; do add "evaluate.py $folder $flags --standard $standard"; done
    for flags in "${two[@]}"; do add "evaluate.py $folder $flags $two_attacks $standard"; done
    job
}

independent() {  # DATASET MODEL SCHED EPS LR WIDTH: an ensemble of three runs, as long as periods
    local part=controls commands='' members i
    for i in $seeds; do
        seed=$i && train $1 $2 $3_half "${@:4}" && members=$folder
        seed=1$i && train $1 $2 $3_quarter "${@:4}" && members+=" $folder"
        seed=2$i && train $1 $2 $3_quarter "${@:4}" && members+=" $folder"
        add "evaluate.py --ensemble $members $two_attacks $standard" && job
    done
}

connect() {
    if [[ -z $first ]]; then first=$folder && return; fi  # of a pair, which is one job
    add "landscape.py connect $first $folder $curve" && job
    first=''
}

# ---- The machinery

run() {  # PART DATASET MODEL SCHED EPS LR WIDTH: the jobs that train and measure, one a seed
    local part=$1 first='' commands=''
    for seed in $seeds; do
        train "${@:2}"
        $part
    done
}

train() {  # DATASET MODEL SCHED EPS LR WIDTH: adds the training of the run in $folder
    local sched=${3%%_*} more=''
    case $3 in
        warmup) sched='constant --lr-warmup 0.5' ;;
        *_periodic) sched+=' --periodic' ;;
        *_pas) more="--periodic $held_out" ;;
        *_snapshots) more="--periodic --restart none $held_out" ;;
        *_lr | *_eps) more="--periodic --restart ${3#*_} $held_out" ;;
        *_half) more=$half ;;
        *_quarter) more=$quarter ;;
    esac
    folder=ckpts/$size/$1_$2_$3_eps${4%/*}_lr$5_w$6_s$seed
    add "train.py --out $folder --dataset $1 --model $2 --width $6 --eps $4 --eps-sched $sched" \
        "--lr $5 ${train_flags[$1_$2]:-} $more --seed $seed$extra"
}

add() { commands+="${commands:+ && }$prefix $*$shared"; }  # SCRIPT FLAGS: adds it to the job
job() {  # ends the job and, if its part is wanted, prints its folder, part and shell line
    if [[ " $parts " == *" $part "* ]]; then printf '%s\t%s\t%s\n' "$folder" $part "$commands"; fi
    commands=''
}

execute() {  # RUNNER FOLDER PART LINE: runs a job unless it is done; prints how it failed
    local log=logs/${2#ckpts/}_$3.log stamp=logs/${2#ckpts/}_$3.done
    kill -0 "$1" 2> /dev/null || exit 255  # without run_all.sh, xargs begins no further job
    if [[ -s $stamp ]] && ! grep -qvxFf <(state "$2" "$4") "$stamp"; then return; fi
    mkdir -p "${log%/*}" && echo "$2: $3" >&2
    if bash -c "$4" >> "$log" 2>&1 < /dev/null; then
        state "$2" "$4" > "$stamp"
    else
        echo "$log: $(tail -n 1 "$log")"
    fi
}

state() { printf '%s\n' "$2" "$code" && ls "$1"; }  # FOLDER LINE: a job is done while this holds
fail() { echo "error: $*" >&2 && exit 1; }

find_python() {  # sets python to PYTHON or, if that lacks packages, to that of .venv, which is made
    for python in "$base" .venv/bin/python; do
        "$python" -c 'from importlib.metadata import version
for line in open("requirements.txt"):
    name, least = line.split("#")[0].split(">=")
    assert [*map(int, version(name).split(".")[:2])] >= [*map(int, least.split("."))]
' 2> /dev/null && return
    done
    if [[ -z $list ]]; then make_venv; fi
}

make_venv() (  # in a subshell, whose end frees the lock
    until mkdir .venv.lock; do sleep 2; done  # of workers that start together, one makes it
    trap 'rmdir .venv.lock' EXIT
    echo 'bringing .venv up to requirements.txt: some minutes, some GB'
    "$base" -m venv .venv || fail 'a .venv takes Python 3.10 or newer with venv (python3-venv)'
    "$python" -m pip install -q -r requirements.txt || fail 'a .venv takes a network'
)

main() {
    size=paper parts='' list='' cpu='' test='' shard=1/1 extra=''
    while [[ $# -gt 0 && $1 != -- ]]; do
        case $1 in
            --small | --quick) size=${1#--} ;;
            --list | --cpu | --test) declare -g "${1#--}=1" ;;
            --shard) shard=${2:?--shard takes I/N} && shift ;;
            -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
            table1 | standard | controls) parts+=" $1" ;;
            budget | fig[2348] | fig1[12] | c22) parts+=' budget' ;;
            rate | fig5 | c23) parts+=' rate' ;;
            width | c24) parts+=' width' ;;
            connect | c25) parts+=' connect' ;;
            theory | fig1) parts+=' theory' ;;
            *) fail "'$1' is unknown; bash run_all.sh --help names all" ;;
        esac
        shift
    done
    parts=${parts:-table1 standard controls budget rate width connect theory}
    I=${shard%/*} N=${shard#*/}
    [[ $I/$N =~ ^[1-9][0-9]*/[1-9][0-9]*$ && $I -le $N ]] || fail "--shard takes I/N, not $shard"
    [[ ${SEEDS:-0} =~ ^[0-9]+(\ [0-9]+)*$ ]] || fail "SEEDS is a list such as \"0 1\", not $SEEDS"
    [[ ! " $*" =~ \ --(out|seed|data-dir|device) ]] || fail "run_all.sh sets${BASH_REMATCH[0]}"
    shared=${DATA_DIR:+ --data-dir $(cd "$DATA_DIR" > /dev/null && printf %q "$PWD")}
    base=$(command -v "${PYTHON:-python3}") || fail "${PYTHON:-python3} is not installed"
    if [[ $base != /* ]]; then base=$PWD/$base; fi
    cd "$(dirname "$0")"
    find_python
    if [[ -n $test ]]; then
        "$python" -m ruff check . && "$python" -m ruff format --check . && "$python" -m pytest
        exit
    fi
    if [[ $# -gt 1 ]]; then
        extra=$(printf ' %q' "${@:2}")
        "$python" -c 'import sys, train; train.config_of(sys.argv[1:])' "${@:2}" ||
            fail "train.py does not take$extra"
    fi
    prefix=$(printf %q "$python") out=results
    if [[ $size != paper ]]; then
        prefix="OMP_NUM_THREADS=1 $prefix" out=results/$size cpu=1 JOBS=${JOBS:-$(nproc)}
    fi
    shared+=${cpu:+ --device cpu}
    jobs=$({ $size; theory; } | awk "NR % $N == $I % $N")
    report="$prefix report.py ckpts/$size --out $out"
    if [[ -z $jobs ]]; then
        echo 'no job is of this part, SEEDS and shard'
    elif [[ -n $list ]]; then
        cut -f 3 <<< "$jobs"
        echo "$report" >&2
    else
        execute_all
    fi
}

execute_all() {
    if [[ -z $cpu && $jobs == *train.py* ]]; then
        "$python" -c 'import torch; torch.cuda.init()' 2> /dev/null ||
            fail 'no GPU is here: use --quick (minutes), --small (30 hours) or --cpu'
    fi
    mkdir -p "ckpts/$size" && echo "$(wc -l <<< "$jobs") jobs, ${JOBS:=1} at once; output: logs/"
    code=$(cat -- *.py lib/*.py paper/*.py | cksum) && export code && export -f execute state
    failed=$(tr '\t\n' '\0\0' <<< "$jobs" | xargs -0 -n 3 -P "$JOBS" bash -c 'execute "$@"' - $$) ||
        fail 'interrupted; the same command resumes'
    bash -c "$report" || failed+=$'\nthe report'
    [[ -z $failed ]] || fail $'these failed; the same command tries them again:\n'"$failed"
}
main "$@"; exit
