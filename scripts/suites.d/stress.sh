# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# stress-ng's file system stressors, with verification, a minute in all. It ends with 0 though stressors failed, so
# its output counts.

# In the class, and not about the file system under test: they mount others, or read /proc.
stress_excluded=(bind-mount binderfs procfs)

suite_stress() {
    local dir=$1 stressors name seconds running=()
    need_packages stress-ng
    box_up "$dir/box"
    mkdir "$mnt/stress"
    stressors=$(stress-ng --class 'filesystem?' 2>&1 | sed -n "s/^class 'filesystem' stressors: //p")
    [[ -n $stressors ]] || { say "stress-ng names no stressors" && return 1; }
    for name in $stressors; do
        [[ " ${stress_excluded[*]} " == *" $name "* ]] || running+=("$name")
    done
    seconds=$((60 / ${#running[@]}))
    ((seconds > 0)) || seconds=1
    say "${#running[@]} stressors, $seconds s each"
    stress-ng --class filesystem --sequential 1 --timeout "$seconds" --verify --temp-path "$mnt/stress" \
        --exclude "$(IFS=, && echo "${stress_excluded[*]}")" --metrics-brief >"$dir/log" 2>&1 || true
    if grep -E 'fail:|error:|corrupt' "$dir/log"; then return 1; fi
    grep -qE 'successful run completed|passed: [1-9]' "$dir/log" || { tail -n 20 "$dir/log" && return 1; }
    no_integrity_failure "$dir/box"
    # The mount still serves.
    echo after >"$mnt/after"
}
