# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# fsx: 100,000 operations in all for each of five seeds, half of them with mappings and half without,
# each with fallocate and holes; then sizes and offsets as O_DIRECT has them.

suite_fsx() {
    local dir=$1 seed run runs=() wrong=0 mappings=10
    kernel_maps_shared || mappings=0
    need_crate fsx 0.3.2
    box_up "$dir/box"
    mkdir "$dir/artifacts"
    fsx_config "$dir/mapped.toml" "$mappings" 1
    fsx_config "$dir/unmapped.toml" 0 1
    fsx_config "$dir/direct.toml" 0 512
    # Aligned, fsx asks for no bytes at all now and then, which is an error.
    sed -i '/^posix_fallocate/d' "$dir/direct.toml"
    # Together: one waits for its own requests most of the time.
    for seed in 1 2 3 4 5; do
        fsx_run "$dir" "$seed" mapped 50000 &
        runs+=($!)
        fsx_run "$dir" "$seed" unmapped 50000 &
        runs+=($!)
    done
    fsx_run "$dir" 6 direct 20000 &
    runs+=($!)
    for run in "${runs[@]}"; do wait "$run" || wrong=1; done
    no_integrity_failure "$dir/box"
    ((wrong == 0)) || return 1
    say "520000 operations, none went wrong"
}

fsx_config() { # FILE MAPPINGS ALIGNMENT
    cat >"$1" <<TOML
flen = 1048576
[opsize]
max = 131072
min = 0
align = $3
[weights]
close_open = 1
invalidate = 1
mapread = $2
mapwrite = $2
read = 10
write = 10
truncate = 5
fsync = 0.2
fdatasync = 0.2
posix_fallocate = 3
punch_hole = 5
sendfile = 2
posix_fadvise = 1
copy_file_range = 3
TOML
}

fsx_run() { # DIR SEED CONFIG OPERATIONS
    local name=$3-$2
    trap - EXIT
    "$tools/bin/fsx" -q -S "$2" -N "$4" -P "$1/artifacts" -f "$1/$3.toml" "$mnt/$name" >"$1/$name.log" 2>&1 && return 0
    tail -n 40 "$1/$name.log" >&2
    say "fsx, seed $2, $3: failed"
    return 1
}
