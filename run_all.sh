#!/usr/bin/env bash
# shellcheck disable=SC2016,SC2034,SC2329  # tasks and sizes are called by name
# The experiments of the paper: each run is trained and measured, then all are reported.
#   bash run_all.sh           the whole paper on a GPU, some 100 hours of an H100, or with --cpu
#   bash run_all.sh --small   the same with narrow networks: a day on two CPU cores
#   bash run_all.sh --quick   the same in miniature: minutes on two CPU cores
#   bash run_all.sh --test    ruff and the tests
# With the first three: --list prints the jobs as shell lines, which run from here in any order and
# at once; --shard I/N takes every N-th job from the I-th on; flags behind -- go to every train.py;
# only the parts named are run: table1, standard (AutoAttack on its runs; not in the paper), budget
# (Figures 2, 3, 4, 8, 11, 12), rate (Figure 5, C.2.3), width (C.2.4), connect (C.2.5), theory
# (Figure 1), or fig5, c24 ... SEEDS="0 1 2" are run (--quick: "0 1"; connect takes two seeds a pair),
# JOBS=1 at once (--small, --quick: one per core). DATA_DIR=data holds mnist.npz, cifar10.npz.
# PYTHON=python3 is used if it has the packages, else a .venv is made. The same command resumes.
set -euo pipefail

# The table: rows EXPERIMENT:TASK:SCHEDULE:EPS:LR:WIDTH[:SEED]. A task is DATASET_MODEL and holds
# further flags of train.py.
paper() {  # cost: minutes of an H100, by arithmetic; table1 2,860
    mnist_lenet='--trace 2000' cifar10_resnet18='--trace 2000' cifar10_vgg='' curve=''
    evaluate='' standard='' pgd='' hessian=''
    similarity='--n-examples 10000' surface='--n-examples 1000'
    rows=({table1,standard}:mnist_lenet:{constant,cosine,linear}:0.4:1e-4:16
        {table1,standard}:cifar10_{vgg,resnet18}:{constant,cosine,linear}{,_periodic}:8/255:0.1:8
        budget:mnist_lenet:constant:{0,0.1,0.2,0.3,0.4}:1e-4:16
        budget:cifar10_resnet18:constant:{0,2/255,4/255,8/255}:0.1:8  # 1,180
        rate:mnist_lenet:{constant,cosine,linear,warmup}:0.4:{{1,3}e-{5,4,3},1e-2}:16  # 1,580
        width:mnist_lenet:constant:{0,0.4}:1e-4:{1,2,4,16}  # 200
        connect:mnist_lenet:constant:{0,0.4}:1e-4:16
        connect:cifar10_resnet18:constant:{0,8/255}:0.1:8)  # 190 with that of MNIST
}
small() {  # cost: seconds of a core
    local digits='--n-iter 10 --step-size eps/8 --n-eval 500'
    mnist_lenet="--n-train 6000 --epochs 15 $digits"
    mnist5k_lenet="--epochs 40 --batch-size 64 --trace 500 $digits"
    local cifar10='--epochs 100 --batch-size 32 --n-iter 5 --step-size 2.5/255 --n-eval 250'
    cifar10_lenet="--n-train 2000 $cifar10" cifar10_resnet18="--n-train 1000 $cifar10"
    cifar10_vgg=$cifar10_resnet18
    evaluate='--n-examples 500' standard=$evaluate pgd='--n-examples 2000' hessian=$evaluate
    similarity='--n-examples 250 --a 0 .02 .1 .5' surface='--n-examples 250 --grid 11'
    curve='--n-examples 500 --epochs 40 --lr 0.02 --points 11'
    rows=({table1,standard}:cifar10_resnet18:{linear,constant,cosine}{,_periodic}:8/255:0.05:4
        {table1,standard}:cifar10_vgg:linear:8/255:0.05:4
        {table1,standard}:cifar10_lenet:{linear,constant,cosine}{,_periodic}:8/255:0.02:8
        {table1,standard}:mnist_lenet:{constant,cosine,linear}{,_periodic}:0.2:3e-3:4
        {table1,standard}:mnist_lenet:{constant,cosine,linear}:0.4:3e-3:4
        budget:mnist5k_lenet:constant:{0,0.1,0.2,0.3}:1e-3:4  # 6,200
        rate:mnist_lenet:{constant,cosine,linear,warmup}:0.2:{1e-3,3e-3,1e-2}:4  # 2,900
        width:mnist5k_lenet:constant:{0,0.3}:1e-3:{1,2,4}  # 1,900
        connect:mnist5k_lenet:constant:{0,0.2}:1e-3:4)  # 1,200
}
quick() {  # cost: seconds of a core
    mnist5k_lenet='--n-train 2000 --epochs 6 --clock batch --batch-size 20 --n-iter 5 --n-eval 200'
    mnist5k_lenet+=' --step-size eps/4 --trace 100'
    evaluate='--n-examples 50' standard='--n-examples 10' pgd=$evaluate hessian='--n-examples 100'
    similarity='--n-examples 50 --a 0 0.1 0.5' surface='--n-examples 50 --grid 7'
    curve='--n-examples 100 --epochs 20 --lr 0.02 --points 7'
    rows=(table1:mnist5k_lenet:{constant,cosine,linear}:0.4:4e-3:4
        {table1,standard}:mnist5k_lenet:linear_periodic:0.4:4e-3:4:"$first"  # 260
        budget:mnist5k_lenet:constant:{0,0.1}:4e-3:4  # 140
        rate:mnist5k_lenet:{{constant,linear}:0.4:{1e-3,4e-3},warmup:0.4:4e-3}:4:"$first"  # 70
        width:mnist5k_lenet:constant:{0.4:4e-3:1,{0,0.1,0.4}:4e-3:4}  # 45
        connect:mnist5k_lenet:constant:{0,0.1}:4e-3:4)  # 40
}

plan() {  # sets jobs to the name and shell line of each, report to the last command
    runs='' jobs=() studies='' study='' n=0 due=${list:+$parts}
    for row in "${rows[@]}"; do
        IFS=: read -r part task sched eps lr width only <<< "$row"
        pair='' flags=${sched/warmup/constant --lr-warmup 0.5}
        for seed in ${only:-$seeds}; do
            name=${task}_${sched}_eps${eps%/*}_lr${lr}_w${width}_s$seed run=ckpts/$size/$part/$name
            [[ ! $runs =~ (ckpts/[^ ]*/$name)\  ]] || run=${BASH_REMATCH[1]}  # of a row above
            runs+="$run " line=''
            add "train.py --out $run --dataset ${task%_*} --model ${task#*_} --width $width" \
                "--eps $eps --eps-sched ${flags/_/ --}" \
                "--lr $lr ${!task} --seed $seed$extra"
            case $part in
                table1) add "evaluate.py $run $evaluate" ;;
                standard) add "evaluate.py $run --standard $standard" ;;
                budget) add "hessian.py $run $hessian"
                    [[ $eps == 0 ]] || add "landscape.py similarity $run $similarity"
                    [[ $seed != "$first" ]] || add "landscape.py surface $run $surface" ;;
                rate) add "evaluate.py $run --attacks pgd $pgd" ;;
                width) add "landscape.py dead $run" ;;
                connect) [[ -n $pair ]] || { pair="$run $line" && continue; }  # the first of two
                    line="${pair#* } && $line"
                    add "landscape.py connect ${pair%% *} $run $curve" && pair='' ;;
            esac
            [[ $parts != *$part* || $((n++ % N)) != $((I - 1)) ]] ||
                jobs+=("$size/$part/$name" "$line")
            [[ $part =~ budget|rate|width && (-e $run/config.json || $due == *$part*) ]] || continue
            [[ $study == "$part $task" ]] || studies+=" --$part"  # a study of each task
            study="$part $task" studies+=" $run"
        done
    done
    [[ $parts != *theory* || $I != 1 ]] || jobs+=(theory "$py theory.py")
    report="$py report.py ckpts/$size$studies --out results/${size#paper}"
}

add() { line+="${line:+ && }$py $*$shared"; }
fail() { echo "error: $*" >&2 && exit 1; }

setup() {  # sets python to PYTHON or, if that lacks packages, to that of .venv, which is made
    for python in "$base" .venv/bin/python; do
        "$python" -c 'from importlib.metadata import version
for name, least in (line.split(">=") for line in open("requirements.txt")):
    assert [*map(int, version(name).split(".")[:2])] >= [*map(int, least.split("."))]
' 2> /dev/null && return
    done
    [[ -n $list ]] || (
        until mkdir .venv.lock; do sleep 2; done  # of workers that start together, one makes it
        trap 'rmdir .venv.lock' EXIT
        echo 'bringing .venv up to requirements.txt: some minutes, some GB'
        "$base" -m venv .venv && "$python" -m pip install -q -r requirements.txt
    ) || fail 'no .venv: it takes Python 3.10 or newer with venv (python3-venv) and a network'
}

job() {  # RUNNER NAME LINE: runs a line of the plan unless it is done; prints how it failed
    log=logs/$2.log stamp=logs/$2.done line=$3
    run=${line#*--out } run=${run%% *}
    [[ $line == *--out* ]] || run=evals  # of theory.py
    kill -0 "$1" 2> /dev/null || exit 255  # without run_all.sh, xargs starts no further job
    [[ ! -s $stamp ]] || grep -qvxFf <(state) "$stamp" || return 0  # it ended well, no file is gone
    mkdir -p "${log%/*}" && echo "$2 ..." >&2
    bash -c "$line" >> "$log" 2>&1 < /dev/null && state > "$stamp" ||
        echo "$log: $(tail -n 1 "$log")"
}

state() { echo "$line $code"; ls "$run" 2> /dev/null || true; }  # what a stamp holds

main() {
    size=paper parts='' list='' cpu='' test='' I=1 N=1 extra='' data='' seeds='0 1 2'
    while [[ $# -gt 0 && $1 != -- ]]; do
        case $1 in
            --small | --quick) size=${1#--} ;;
            --list | --cpu | --test) printf -v "${1#--}" 1 ;;
            --shard) N=${2:?--shard takes I/N} I=${2%/*} N=${2#*/} && shift ;;
            -h | --help) sed -n '3,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
            table1 | standard | budget | rate | width | connect | theory) parts+=" $1" ;;
            fig[2348] | fig1[12] | c22) parts+=' budget' ;; fig5 | c23) parts+=' rate' ;;
            fig1) parts+=' theory' ;; c24) parts+=' width' ;; c25) parts+=' connect' ;;
            *) fail "'$1' is unknown; bash run_all.sh --help names all" ;;
        esac
        shift
    done
    [[ $I/$N =~ ^[1-9][0-9]*/[1-9][0-9]*$ && $I -le $N ]] || fail "--shard takes I/N, not $I/$N"
    [[ ! " $*" =~ \ --(out|seed|data-dir|device) ]] ||
        fail 'the table itself gives train.py --out, --seed, --data-dir and --device'
    [[ $# -lt 2 ]] || extra=$(printf ' %q' "${@:2}")
    [[ -z ${DATA_DIR:-} ]] || data=" --data-dir $(cd "$DATA_DIR" > /dev/null && printf %q "$PWD")"
    base=$(command -v "${PYTHON:-python3}") || fail "${PYTHON:-python3} is not installed"
    [[ $base == /* ]] || base=$PWD/$base
    cd "$(dirname "${BASH_SOURCE[0]}")"
    setup
    [[ -z $test ]] || { "$python" -m ruff check . && "$python" -m ruff format --check . &&
        "$python" -m pytest; exit; }
    py=$(printf %q "$python")
    [[ $size == paper ]] || py="OMP_NUM_THREADS=1 $py" cpu=1 JOBS=${JOBS:-$(nproc)}
    [[ $size != quick ]] || seeds='0 1'
    shared="$data${cpu:+ --device cpu}" seeds=${SEEDS:-$seeds} first=${seeds%% *}
    : "${parts:=table1 standard budget rate width connect theory}"
    [[ $seeds =~ ^[0-9]+(\ [0-9]+)*$ ]] || fail "SEEDS=\"$seeds\" is not a list such as \"0 1 2\""
    "$size" && plan
    [[ ${#jobs[@]} -gt 0 ]] || { echo 'no job is of this part, SEEDS and shard' && exit; }
    [[ -z $extra ]] || "$python" -c 'import sys, train; train.config_of(sys.argv[1:])' "${@:2}" ||
        fail "train.py does not take$extra"
    [[ -z $list ]] || { printf '%.0s%s\n' "${jobs[@]}" && echo "$report" >&2 && exit; }
    [[ -n $cpu || ${jobs[*]} != *train.py* ]] || "$python" -c 'import torch; torch.cuda.init()' \
        2> /dev/null || fail 'no GPU is here: use --quick (minutes), --small (a day) or --cpu'
    mkdir -p "ckpts/$size" && echo "$((${#jobs[@]} / 2)) jobs, ${JOBS:=1} at once; output: logs/"
    code=$(cat -- *.py lib/*.py paper/*.py | cksum) && export code && export -f job state
    failed=$(printf '%s\0' "${jobs[@]}" | xargs -0 -n 2 -P "$JOBS" bash -c 'job "$@"' - $$) ||
        fail 'interrupted; the same command resumes'
    plan  # again, with the runs that are there now
    eval "$report" || failed+=$'\nthe report'
    [[ -z $failed ]] || fail $'these failed; the same command tries them again:\n'"$failed"
}
main "$@"; exit
