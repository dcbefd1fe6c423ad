# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# pjdfstest, by root and two other users: every case must end on byokfs as it does on the ext4 below
# it. Cases that may differ are in pjdfstest.exceptions, each with its reason; one that is listed and
# does not differ fails the suite too.

suite_pjdfstest() {
    local dir=$1 differ=0 name below here
    need_packages libacl1-dev acl
    need_crate pjdfstest 0.2.2
    mkdir -p /dev/shm
    cat >"$dir/config.toml" <<'TOML'
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = true
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
TOML
    # Short, because some cases make paths as long as the name of a socket can be.
    loop_mount ext4 1G "$dir/e"
    pjdfstest_run "$dir" "$dir/e" "$dir/below"
    helpers_up
    box_up "$dir/e/b"
    # For the helpers, which mount(8) tells nothing of the sandbox's configuration.
    # shellcheck source=/dev/null
    . "$dir/e/b/env"
    pjdfstest_run "$dir" "$mnt" "$dir/here"
    no_integrity_failure "$dir/e/b" || differ=1
    sed -E '/^(#|$)/d; s/ .*//' "$repo/scripts/suites.d/pjdfstest.exceptions" | sort >"$dir/excepted"
    while read -r name below here; do
        if [[ $below == "$here" ]]; then
            if grep -qxF -- "$name" "$dir/excepted"; then
                say "$name: is listed as an exception, but is the same: $here"
                differ=1
            fi
        elif ! grep -qxF -- "$name" "$dir/excepted"; then
            say "$name: $below on ext4, $here on byokfs"
            grep -F -A3 -- "$name " "$dir/here.log" | sed -n 2,4p
            differ=1
        fi
    done < <(join -a 1 -a 2 -e missing -o 0,1.2,2.2 "$dir/below" "$dir/here")
    say "$(wc -l <"$dir/here") cases, $(grep -c ' ok$' "$dir/here") pass, $(wc -l <"$dir/excepted") exceptions"
    # Both lists must be whole for the comparison to mean something.
    (($(wc -l <"$dir/here") > 390)) || differ=1
    return "$differ"
}

# pjdfstest_run DIR WHERE OUT: writes `CASE RESULT` lines, sorted.
pjdfstest_run() {
    local pjdfstest=("$tools/bin/pjdfstest" -c "$1/config.toml" -p "$2" -s /dev/shm)
    NO_COLOR=1 "${pjdfstest[@]}" >"$3.log" 2>&1 || true
    sed -nE 's/^([a-z0-9_:]+) +(ok|FAILED|skipped)$/\1 \2/p' "$3.log" | sort >"$3"
}
