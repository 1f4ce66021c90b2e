#!/usr/bin/env bash
# The experiments of the paper. What a row does not say is train.py's default, which is the paper's.
#
#   bash run_all.sh           the whole paper, on a GPU: Table 1, all figures, appendix C.2
#   bash run_all.sh --small   the same, small: hours on two CPU cores
#   bash run_all.sh --quick   the same in miniature: some minutes on two CPU cores
#   bash run_all.sh --test    the tests
#
# Behind the first three, in any order:
#   PART...      only these: table1 fig1 fig2 fig3 fig4 fig5 fig8 fig11 fig12, c22 (Hessian and
#                similarity on MNIST), c23 (lr warm-up), c24 (dead layers), c25 (curves between
#                minima), or appendix: fig8, fig11, fig12 and every c
#   --list       prints the jobs as shell lines and runs nothing: Slurm, parallel or xargs can run
#                them from here as they are, in any order and at once
#   --shard I/N  every N-th job from the I-th on, for worker I of 1..N
#   --cpu        the whole paper although no GPU is here
#   -- FLAGS     go to every train.py
#
# Finished jobs are skipped, interrupted ones go on, failed ones are named at the end, with logs.
# SEEDS="0 1 2" are run (0 1 of --small and --quick; c25 takes them two and two), JOBS=1 at once (a
# job a core for --small and --quick). DATA_DIR=data holds mnist.npz and cifar10.npz. Set-up: the
# packages of PYTHON=python3 if they are there, else a .venv is made here.
set -euo pipefail

# A table is made of jobs, a job of commands. PARTS says what of the paper a command is for; COST is
# minutes of one GPU, from the arithmetic at 15 TFLOP/s, not measured; or seconds of a CPU core.
#   run PARTS COST NAME FLAGS...   a job: train.py --out ckpts/NAME FLAGS; ckpts/NAME is then $run
#   again PARTS NAME               the job of that name goes on, for PARTS, too
#   also PARTS COST COMMAND...     what is computed from the run
#   join PARTS COST A B FLAGS...   a job: the runs A and B, and a curve between them (C.2.5)

paper() {
    local seed sched lr eps width mnist='--dataset mnist' cifar='--dataset cifar10' trace
    for seed in $seeds; do
        for sched in constant cosine linear; do  # Table 1
            [[ $sched == constant ]] && trace='--trace 2000' || trace=
            run table1 20 mnist_lenet_${sched}_s$seed $mnist --eps-sched $sched --seed $seed $trace
            also table1 2 evaluate.py $run
            run table1 40 cifar10_vgg_${sched}_s$seed $cifar --model vgg --eps-sched $sched \
                --seed $seed
            also table1 7 evaluate.py $run
            run table1 40 cifar10_vgg_${sched}_periodic_s$seed $cifar --model vgg \
                --eps-sched $sched --seed $seed --periodic
            also table1 20 evaluate.py $run
            run table1 71 cifar10_resnet18_${sched}_s$seed $cifar --eps-sched $sched --seed $seed \
                $trace
            also table1 12 evaluate.py $run
            run table1 71 cifar10_resnet18_${sched}_periodic_s$seed $cifar --eps-sched $sched \
                --seed $seed --periodic
            also table1 35 evaluate.py $run
        done
        for eps in 0 2/255 4/255 8/255; do  # Figures 2, 3, 4, 11, 12
            if [[ $eps == 8/255 ]]; then
                again fig2,fig3,fig4,fig11,fig12 cifar10_resnet18_constant_s$seed
            else
                run fig2,fig3,fig4,fig11,fig12 71 cifar10_resnet18_constant_eps${eps%/*}_s$seed \
                    $cifar --eps $eps --seed $seed --trace 2000
            fi
            also fig3,fig4,fig12 11 hessian.py $run
            [[ $eps == 0 ]] || also fig4 8 landscape.py similarity $run --n-examples 10000
            also fig12 3 landscape.py surface $run --n-examples 1000
        done
        for eps in 0 0.1 0.2 0.3 0.4; do  # Figure 8, and Figures 3, 4 and 11 on MNIST
            if [[ $eps == 0.4 ]]; then
                again fig8,fig11,c22 mnist_lenet_constant_s$seed
            else
                run fig8,fig11,c22 20 mnist_lenet_constant_eps${eps}_s$seed $mnist --eps $eps \
                    --seed $seed --trace 2000
            fi
            also c22 2 hessian.py $run
            [[ $eps == 0 ]] || also c22 4 landscape.py similarity $run --n-examples 10000
        done
        for lr in 1e-5 3e-5 1e-4 3e-4 1e-3 3e-3 1e-2; do  # Figure 5, and C.2.3 beside it
            for sched in constant cosine linear; do
                if [[ $lr == 1e-4 ]]; then
                    again fig5,c23 mnist_lenet_${sched}_s$seed
                else
                    run fig5,c23 20 mnist_lenet_${sched}_lr${lr}_s$seed $mnist --lr $lr \
                        --eps-sched $sched --seed $seed
                fi
                also fig5,c23 1 evaluate.py $run --attacks pgd
            done
            run c23 20 mnist_lenet_constant_lr${lr}_warmup_s$seed $mnist --lr $lr \
                --lr-warmup 0.5 --seed $seed
            also c23 1 evaluate.py $run --attacks pgd
        done
        for width in 1 2 4 16; do  # C.2.4
            for eps in 0 0.4; do
                case $width,$eps in
                    16,0)   again c24 mnist_lenet_constant_eps0_s$seed ;;
                    16,0.4) again c24 mnist_lenet_constant_s$seed ;;
                    *)      run c24 10 mnist_lenet_constant_w${width}_eps${eps}_s$seed $mnist \
                                --width $width --eps $eps --seed $seed ;;
                esac
                also c24 1 landscape.py dead $run
            done
        done
    done
    pairs c25 10 mnist_lenet_constant_eps0  # C.2.5
    pairs c25 50 mnist_lenet_constant
    pairs c25 20 cifar10_resnet18_constant_eps0
    pairs c25 105 cifar10_resnet18_constant
    theory
}

# LeNets of width 4 and less, on thousands of digits: from budget 0.4 on, a constant one is stuck.
small() {
    local seed sched kind lr eps width digits='--dataset mnist --width 4 --n-train 6000
        --epochs 15 --n-iter 10 --step-size 0.05 --n-eval 500'
    local few='--epochs 40 --lr 1e-3 --batch-size 64 --n-iter 10 --trace 500 --n-eval 500'
    for seed in $seeds; do
        for lr in 1e-3 3e-4 3e-3 1e-4 1e-2; do  # Table 1, Figure 5 and C.2.3
            for sched in constant linear cosine; do
                run table1,fig5,c23 170 small_lr${lr}_${sched}_s$seed $digits --lr $lr \
                    --eps-sched $sched --seed $seed
                also fig5,c23 8 evaluate.py $run --attacks pgd --n-examples 2000
                [[ $lr != 3e-3 ]] || also table1 180 evaluate.py $run --n-examples 500
            done
            run c23 170 small_lr${lr}_warmup_s$seed $digits --lr $lr --lr-warmup 0.5 --seed $seed
            also c23 8 evaluate.py $run --attacks pgd --n-examples 2000
        done
        for sched in constant linear; do  # Figures 8, 3, 4, 11 and 12, and C.2.4
            for eps in 0 0.1 0.2 0.3 0.4; do
                [[ $sched,$eps != linear,0 ]] || continue
                run fig8,fig11,fig12,c22,c24 300 small_w4_eps${eps}_${sched}_s$seed $few --width 4 \
                    --eps $eps --step-size $(eighth $eps) --eps-sched $sched --seed $seed
                also c22,fig12 120 hessian.py $run --n-examples 500
                also c22 90 landscape.py similarity $run --n-examples 250 --a 0 .02 .1 .5
                also c24 3 landscape.py dead $run
                [[ $sched,$seed != constant,${seeds%% *} ]] ||
                    also fig12 90 landscape.py surface $run --n-examples 250 --grid 11
            done
        done
        for width in 1 2; do
            for eps in 0 0.3; do
                run c24 150 small_w${width}_eps${eps}_constant_s$seed $few --width $width \
                    --eps $eps --step-size $(eighth $eps) --seed $seed
                also c24 3 landscape.py dead $run
            done
        done
    done
    for eps in 0 0.2; do
        pairs c25 600 small_w4_eps${eps}_constant --n-examples 500 --epochs 40 --lr 0.02 --points 11
    done
    theory
}

# At this learning rate a constant budget of 0.4 never leaves the plateau, and a warm-up does.
quick() {
    local seed sched eps width digits='--width 4 --n-train 2000 --epochs 6 --clock batch
        --batch-size 20 --n-iter 5 --n-eval 200 --trace 100'
    local few='--n-examples 50' first=${seeds%% *}
    for seed in $seeds; do
        for sched in constant cosine linear; do  # Table 1
            run table1 21 quick_${sched}_s$seed $digits --step-size 0.1 --lr 4e-3 \
                --eps-sched $sched --seed $seed
            also table1 15 evaluate.py $run $few
        done
        for eps in 0 0.1; do  # Figures 8, 3, 4, 11 and 12, and C.2.4
            run fig8,fig11,fig12,c22,c24,c25 20 quick_eps${eps}_s$seed $digits --step-size 0.025 \
                --lr 4e-3 --eps $eps --seed $seed
            also c22,fig12 8 hessian.py $run --n-examples 100
            [[ $eps == 0 ]] || also c22 8 landscape.py similarity $run $few --a 0 0.1 0.5
            also c24 3 landscape.py dead $run
        done
        run c24 10 quick_w1_eps0.4_s$seed $digits --step-size 0.1 --lr 4e-3 --width 1 --seed $seed
        also c24 3 landscape.py dead $run
    done
    for eps in 0 0.1; do
        again fig12 quick_eps${eps}_s$first
        also fig12 8 landscape.py surface $run $few --grid 7
        pairs c25 20 quick_eps$eps --n-examples 100 --epochs 20 --lr 0.02 --points 7
    done
    again c24 quick_constant_s$first
    also c24 3 landscape.py dead $run
    run table1 25 quick_linear_periodic_s$first $digits --step-size 0.1 --lr 4e-3 \
        --eps-sched linear --periodic --seed $first
    also table1 15 evaluate.py $run $few
    for sched in constant linear; do  # Figure 5 and C.2.3
        again fig5,c23 quick_${sched}_s$first
        also fig5,c23 2 evaluate.py $run $few --attacks pgd
        run fig5,c23 21 quick_${sched}_lr1e-3_s$first $digits --step-size 0.1 --lr 1e-3 \
            --eps-sched $sched --seed $first
        also fig5,c23 2 evaluate.py $run $few --attacks pgd
    done
    run c23 21 quick_warmup_s$first $digits --step-size 0.1 --lr 4e-3 --lr-warmup 0.5 --seed $first
    also c23 2 evaluate.py $run $few --attacks pgd
    theory
}

theory() {
    job theory
    add fig1 1 "$quoted landscape.py theory$data"
}

pairs() {  # PARTS COST NAME FLAGS...: curves between the runs NAME of the seeds, two and two
    local seed last=
    for seed in $seeds; do
        if [[ -z $last ]]; then
            last=$seed
        else
            join "$1" "$2" "$3_s$last" "$3_s$seed" "${@:4}"
            last=
        fi
    done
}

eighth() {  # of a budget; of none, where no step is taken, the paper's
    [[ $1 == 0 ]] && echo 0.01 || echo "$1/8"
}

# The words of the tables: job i is names[i], command j is of job owner[j].
names=() owner=() parts=() costs=() commands=() current=0 run=

job() {  # NAME
    current=${#names[@]} names+=("$1")
}

add() {  # PARTS COST COMMAND
    owner+=("$current") parts+=("$1") costs+=("$2") commands+=("$3")
}

also() {
    add "$1" "$2" "$quoted ${*:3}$shared --wait"
}

run() {
    run=ckpts/$3
    job "$3"
    also "$1" "$2" train.py --out "$run" "${@:4}" ${extra[@]+"${extra[@]}"}
}

trained() {  # NAME: sets found to the number of its train.py among the commands
    for found in "${!commands[@]}"; do
        [[ ${commands[found]} != *" train.py --out ckpts/$1 "* ]] || return 0
    done
    fail "the table has no run $1"
}

again() {
    trained "$2"
    run=ckpts/$2 current=${owner[found]} parts[found]+=,$1
}

join() {
    job "$3-$4"
    local name
    for name in "$3" "$4"; do
        trained "$name"
        add "$1" "${costs[found]}" "${commands[found]}"
    done
    also "$1" "$2" landscape.py connect "ckpts/$3" "ckpts/$4" "${@:5}"
}

choose() {  # sets lines to "NAME:COST:COMMAND && COMMAND ..." of the jobs asked for, total to COSTs
    local wanted=,$only, i j n=0 part line cost of counted='|'
    set -f
    [[ $wanted != *,appendix,* ]] || wanted+=fig8,fig11,fig12,c22,c23,c24,c25,
    for part in ${only//,/ }; do
        [[ " $known " == *" $part "* ]] || fail "there is no part '$part'; --help names them"
    done
    for i in "${!names[@]}"; do
        line='' cost=0 of=,
        for j in "${!commands[@]}"; do
            [[ ${owner[j]} == "$i" ]] || continue
            for part in ${parts[j]//,/ }; do
                [[ $wanted == ,, || $wanted == *,$part,* ]] || continue
                [[ $of == *,$part,* ]] || of+=$part,
                [[ $line == *"${commands[j]}"* ]] || line+="${line:+ && }${commands[j]}"
                [[ $counted != *"|${commands[j]}|"* ]] || continue  # a run counts once
                cost=$((cost + costs[j])) counted+="${commands[j]}|"
            done
        done
        [[ -n $line ]] || continue
        n=$((n + 1))
        [[ $(((n - 1) % workers)) == $((worker - 1)) ]] || continue
        of=${of#,}
        lines+=("${names[i]}:$cost:$line") about+=("${of%,}") total=$((total + cost))
    done
    [[ $n -gt 0 ]] || fail "nothing to do for $only with SEEDS=\"$seeds\" in this table"
}

list() {
    local job rest i=0
    for job in ${lines[@]+"${lines[@]}"}; do
        rest=${job#*:}
        echo "$prefix${rest#*:} # ${rest%%:*} $unit, for ${about[i++]}"
    done
    echo "${#lines[@]} jobs, $total $unit" >&2
}

plain() {  # LINE: its commands, one a line, without what is of this machine only
    local text=${1//"$shared"/}
    text=${text//"$data"/}
    sed -E 's/.* ([a-z]+\.py )/\1/' <<< "${text// && /$'\n'}"
}

intact() {  # NAME: whether all that the job has left is still here
    local text
    [[ -f logs/$1.done ]] || return 1
    while IFS= read -r text; do
        [[ -e $text ]] || return 1
    done <<< "$(grep -E '^(ckpts|evals)/' "logs/$1.done")"
}

finished() {  # NAME LINE: whether all its commands have ended well
    local text
    intact "$1" || return 1
    while IFS= read -r text; do
        grep -Fxq -e "$text" "logs/$1.done" || return 1
    done <<< "$(plain "$2")"
}

work() {  # NUMBER:NAME:COST:LINE: runs a job
    local number=${1%%:*} name line folders folder began=$SECONDS log new
    line=${1#*:} name=${line%%:*} line=${line#*:*:}
    log=logs/$name.log new=logs/.$name.$$.done
    kill -0 "$runner" 2> /dev/null || exit 255  # what began this is gone; xargs stops, too
    [[ $(ps -o stat= -p "$runner" 2> /dev/null) != Z* ]] || exit 255
    trap 'exit 255' INT
    echo "$number $name ..."
    intact "$name" || rm -f "logs/$name.done"
    if ! : >> "$log"; then
        echo "$number $name FAILED: $log cannot be written"
        return
    fi
    if (eval "$prefix$line") >> "$log" 2>&1 < /dev/null; then
        folders=$(grep -Eo '(ckpts/[^ ]+|theory)' <<< "$line" | sed 's/^theory/evals/' | sort -u)
        for folder in $folders; do
            if [[ -e $folder/last.pt ]]; then
                echo "$number $name: stopped, and the same command goes on: $(tail -n 1 "$log")"
                return
            fi
        done
        {
            [[ ! -f logs/$name.done ]] || grep -Ev '^(ckpts|evals)/' "logs/$name.done"
            plain "$line"
            # shellcheck disable=SC2086
            find $folders -maxdepth 1 ! -name '.*' \
                \( -name '*.json*' -o -name '*.npz' -o -name 'period*.pt' \)
        } > "$new"
        mv "$new" "logs/$name.done"
        echo "$number $name: done, $((SECONDS - began)) s"
    else
        echo "$number $name FAILED: $(tail -n 1 "$log")"
    fi
}

no_gpu() {
    fail "no GPU is here. These ${#lines[@]} jobs take about $((total / 60)) hours of one, and a" \
        "CPU core some hundred times as long. Use --quick, which takes minutes, --small, hours," \
        "or --cpu to begin all the same"
}

start() {  # runs the jobs, JOBS at once, those first that come first, and reports
    local i=0 job name rest total=0 disk=0 open=() failed=() runs=() free report=
    mkdir -p ckpts evals logs
    for job in ${lines[@]+"${lines[@]}"}; do
        name=${job%%:*} rest=${job#*:} i=$((i + 1))
        ! finished "$name" "${rest#*:}" || continue
        open+=("$i/${#lines[@]}:$job") total=$((total + ${rest%%:*}))
        [[ $rest != *" hessian.py "* ]] || disk=$((disk + 7 * megabytes))
        disk=$((disk + megabytes))
    done
    free=$(df -Pm . | awk 'NR == 2 { for (i = 2; i <= NF; i++) if ($i ~ /%$/) print $(i - 1) }')
    echo "$((${#lines[@]} - ${#open[@]})) of ${#lines[@]} jobs are finished. The others take" \
        "about $total $unit, $JOBS at once, and $disk MB of the $free MB free here. More: logs/"
    [[ ${#open[@]} == 0 || ! $free =~ ^[0-9]+$ || $disk -lt $free ]] ||
        fail "the disk is too small"
    if [[ ${#open[@]} -gt 0 ]]; then
        export runner=$$ prefix shared data
        export -f work plain intact
        printf '%s\0' "${open[@]}" | xargs -0 -n 1 -P "$JOBS" bash -c 'work "$1"' work ||
            fail 'interrupted; the same command goes on'
    fi
    for name in "${names[@]}"; do
        [[ ! -f ckpts/$name/config.json ]] || runs+=("ckpts/$name")
    done
    [[ ${#runs[@]} -gt 0 ]] || runs=(--empty)
    "$python" report.py "${runs[@]}" --out "$results" --wait || report=failed
    for job in ${lines[@]+"${lines[@]}"}; do
        name=${job%%:*} rest=${job#*:}
        finished "$name" "${rest#*:}" || failed+=("logs/$name.log")
    done
    [[ ${#failed[@]} == 0 ]] || fail "${#failed[@]} of ${#lines[@]} jobs failed or stopped;" \
        "the same command tries them again:"$'\n'"$(printf '  %s\n' "${failed[@]}")"
    [[ -z $report ]] || fail 'no report could be made, for the reason above; the runs are complete'
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
    export packages
    export -f install fail
    "$python" -c 'import fcntl, subprocess, sys
with open("requirements.txt", "r+") as lock:  # workers that begin together make one .venv
    fcntl.flock(lock, fcntl.LOCK_EX)
    sys.exit(subprocess.call(sys.argv[1:]))' bash -c 'install "$1"' install "$python"
    python=.venv/bin/python
}

install() {  # PYTHON: makes .venv, with the packages of requirements.txt, unless it is there
    if .venv/bin/python -c "$packages" 2> /dev/null; then return; fi
    echo 'setting up .venv from requirements.txt: some minutes, some GB'
    "$1" -m venv --clear .venv ||
        fail "no .venv could be made; on Debian and Ubuntu: apt-get install python3-venv"
    .venv/bin/python -m pip install --quiet -r requirements.txt ||
        fail "the packages of requirements.txt could not be installed; is there a network?"
}

fail() {
    echo "error: $*" >&2
    exit 1
}

flags() {  # FLAGS...: sets extra to them, quoted, unless the table itself needs them
    case " $* " in
        *' --o '* | *' --ou'* | *' --se'* | *' --data-'* | *' --de'* | *' --wa'*)
            fail "the table itself gives train.py --out, --seed, --data-dir, --device and --wait;" \
                "SEEDS and DATA_DIR say otherwise" ;;
    esac
    [[ $# == 0 ]] || extra=($(printf '%q ' "$@"))
}

# The tests in two halves at once, as each keeps to one core; what the second says is shown at the end.
tests() {
    local said failed=0 half
    said=$(mktemp)
    "$python" -m pytest -q tests/test_[cdh-r]*.py > "$said" 2>&1 & half=$!
    trap "kill $half 2> /dev/null || :; rm -f '$said'" EXIT
    "$python" -m pytest -q tests/test_[!cdh-r]*.py || failed=1
    wait $half || failed=1
    cat "$said"
    return $failed
}

main() {
    local table=paper list='' cpu='' test=''
    only='' worker=1 workers=1 extra=()
    while [[ $# -gt 0 ]]; do
        case $1 in
            --quick | --small) table=${1#--} ;;
            --list) list=1 ;;
            --cpu) cpu=1 ;;
            --test) test=1 ;;
            --shard)
                [[ ${2:-} =~ ^([0-9]+)/([0-9]+)$ ]] && worker=$((10#${BASH_REMATCH[1]})) \
                    workers=$((10#${BASH_REMATCH[2]})) && ((1 <= worker && worker <= workers)) ||
                    fail "--shard takes I/N with I in 1..N, not '${2:-}'"
                shift ;;
            --) flags "${@:2}"; break ;;
            -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' run_all.sh; exit ;;
            -* | '') fail "'$1' is unknown; bash run_all.sh --help names all" ;;
            *) only+=${only:+,}$1 ;;
        esac
        shift
    done
    data='' seeds=${SEEDS:-0 1 2} results=results lines=() about=() total=0
    known='table1 fig1 fig2 fig3 fig4 fig5 fig8 fig11 fig12 c22 c23 c24 c25 appendix'
    if [[ -n ${DATA_DIR:-} ]]; then
        data=" --data-dir $(cd "$started" && cd "$DATA_DIR" && printf %q "$PWD")" ||
            fail "DATA_DIR=$DATA_DIR is no folder"
    fi
    shared=$data prefix='' unit='minutes of a GPU' megabytes=40
    if [[ $table != paper ]]; then
        seeds=${SEEDS:-0 1} results=results/$table unit='seconds of a CPU core' megabytes=5
        shared+=' --device cpu' prefix='export OMP_NUM_THREADS=1; '
        : "${JOBS:=$(getconf _NPROCESSORS_ONLN)}"
    fi
    : "${JOBS:=1}"
    [[ $JOBS =~ ^[1-9][0-9]*$ ]] || fail "JOBS=$JOBS is no number of jobs at once, 1 or more"
    [[ $seeds =~ ^(0|[1-9][0-9]*)(\ (0|[1-9][0-9]*))*$ &&
        -z $(tr ' ' '\n' <<< "$seeds" | sort | uniq -d) ]] ||
        fail "SEEDS=$seeds is no list of different seeds such as SEEDS=\"0 1 2\""
    if [[ -n $test ]]; then
        setup
        tests
        exit
    fi
    if [[ -z $list ]]; then
        setup
    elif [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
        python=.venv/bin/python
    else
        python=${PYTHON:-python3}
        [[ "$python" != */* || "$python" == /* ]] || python=$started/$python
    fi
    quoted=$(printf %q "$python")
    "$table"
    choose
    if [[ -n $list ]]; then
        list
        return
    fi
    [[ $table != paper || -n $cpu ]] ||
        "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || no_gpu
    start
}

started=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
main "$@"
