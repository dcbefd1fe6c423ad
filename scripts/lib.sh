# shellcheck shell=bash
# Shared by the scripts beside it; sourced, never run.
#
# Duty: packages, the build, a cleanup stack, waiting, a key vault with a volume mounted on it, and a
# private MariaDB. Everything that is started is remembered by process id, and nothing else is ever
# signalled. Nothing here reads standard input.

set -euo pipefail
export LC_ALL=C

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
byokfs=byokfs # build_release sets the path
started=$(date +%s.%N)

# ---- talking ---------------------------------------------------------------------------------------

if [[ -t 1 ]]; then bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' plain=$'\e[0m'; else bold='' dim='' red='' plain=''; fi

say() { printf '%s\n' "$*"; }
note() { printf '%s    %s%s\n' "$dim" "$*" "$plain"; }
die() {
    printf '%s%s: %s%s\n' "$red" "${0##*/}" "$*" "$plain" >&2
    exit 1
}

# seconds_since START: with one decimal.
seconds_since() { awk -v from="$1" -v to="$(date +%s.%N)" 'BEGIN { printf "%.1f", to - from }'; }

# Steps with their times: `step TITLE` ends the step before it; `steps_table` prints them all.
step_titles=() step_times=() step_from=''
step() {
    step_end
    step_titles+=("$1")
    step_from=$(date +%s.%N)
    printf '%s%d. %s%s\n' "$bold" "${#step_titles[@]}" "$1" "$plain"
}
step_end() {
    [[ -n $step_from ]] || return 0
    step_times+=("$(seconds_since "$step_from")")
    step_from=''
}
steps_table() {
    step_end
    local i
    for i in "${!step_titles[@]}"; do
        printf '  %6s s  %s\n' "${step_times[$i]}" "${step_titles[$i]}"
    done
    printf '  %6s s  in all\n' "$(seconds_since "$started")"
}

# ---- cleanup ---------------------------------------------------------------------------------------

# Commands to run at the end, last one first; each one may fail without stopping the others.
cleanups=()
on_exit() { cleanups+=("$(printf '%q ' "$@")"); }
forget_cleanups() { cleanups=(); }
run_cleanups() {
    local status=$? i
    trap - EXIT
    trap '' INT TERM HUP
    set +e
    for ((i = ${#cleanups[@]} - 1; i >= 0; i--)); do
        eval "${cleanups[$i]}"
    done
    exit "$status"
}
trap run_cleanups EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# ---- waiting and processes -------------------------------------------------------------------------

# wait_until SECONDS COMMAND...: true as soon as the command succeeds, false at the timeout.
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

# True while the process exists and is not a zombie.
alive() {
    local state
    state=$(awk '$1 == "State:" { print $2 }' "/proc/$1/status" 2>/dev/null) || return 1
    [[ -n $state && $state != Z && $state != X ]]
}
dead() { ! alive "$1"; }

# end_process PID NAME [SECONDS]: SIGTERM, then SIGKILL, to a process that is (still) called NAME.
end_process() {
    local pid=$1 name=$2 limit=${3:-20}
    [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$name"* ]] || return 0
    kill "$pid" 2>/dev/null || return 0
    wait_until "$limit" dead "$pid" && return 0
    kill -9 "$pid" 2>/dev/null || true
    wait_until 10 dead "$pid"
}

# Starts a command that outlives this shell and prints its process id: detached LOG COMMAND...
detached() {
    local log=$1
    shift
    setsid "$@" </dev/null >>"$log" 2>&1 &
    echo $!
    disown
}

random_word() { od -An -N"${1:-6}" -tx1 /dev/urandom | tr -d ' \n'; }

# ---- what the machine must have --------------------------------------------------------------------

need_root() { [[ $(id -u) == 0 ]] || die "run it as root: it installs packages and mounts"; }

need_fuse() {
    [[ -c /dev/fuse ]] || modprobe fuse 2>/dev/null || true
    [[ -c /dev/fuse ]] || die "/dev/fuse is missing: load the fuse module, or give the container the device"
}

# False, and a word about it, where FUSE refuses MAP_SHARED of files that are open for direct I/O: before Linux 6.6.
kernel_maps_shared() {
    [[ $(printf '6.6\n%s\n' "$(uname -r)" | sort -V | head -n 1) == 6.6 ]] && return 0
    note "this kernel maps no file of the mount shared: without what needs that"
    return 1
}

# need_packages NAME...: installs what is missing, quietly; the output is shown only if it fails.
need_packages() {
    local missing=() package log
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    [[ $(id -u) == 0 ]] || die "missing packages: ${missing[*]} (run it as root to have them installed)"
    note "installing ${missing[*]}"
    log=$(mktemp)
    if ! (export DEBIAN_FRONTEND=noninteractive
        apt-get update -q && apt-get install -y -q --no-install-recommends "${missing[@]}") </dev/null >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        die "apt-get could not install ${missing[*]}"
    fi
    rm -f "$log"
}

need_cargo() {
    # shellcheck disable=SC1090,SC1091
    if ! command -v cargo >/dev/null && [[ -r ${CARGO_HOME:-$HOME/.cargo}/env ]]; then . "${CARGO_HOME:-$HOME/.cargo}/env"; fi
    command -v cargo >/dev/null || die "cargo is missing: install Rust (https://rustup.rs)"
    need_packages gcc libc6-dev
}

# Builds this clone's release binary and sets `byokfs` to its path; BYOKFS_BINARY names another one.
build_release() {
    if [[ -n ${BYOKFS_BINARY:-} ]]; then
        byokfs=$(realpath "$BYOKFS_BINARY")
        return 0
    fi
    need_cargo
    (cd "$repo" && cargo build --release --locked --bin byokfs </dev/null)
    local target
    target=$(cd "$repo" && cargo metadata --format-version 1 --no-deps --offline | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
    byokfs=$target/release/byokfs
    [[ -x $byokfs ]] || die "no binary at $byokfs after the build"
}

# ---- a key vault with a volume on it ---------------------------------------------------------------
#
# One directory holds all of it: vault/ back/ mnt/ config/ log/ run/ env. The functions are shared by
# quickstart and sandbox, so that both show the same verbs.

key_name='volume-kek'
identity_name='byokfs-host'

# True if something is mounted exactly there.
is_mounted() { mountpoint -q "$1" 2>/dev/null || grep -qF " $1 " /proc/self/mounts; }

vault_ready_or_dead() { # DIR PID
    [[ -s $1/vault/url && -s $1/vault/identity.url ]] || dead "$2"
}

vault_start() { # DIR
    local dir=$1 pid
    rm -f "$dir/vault/url" "$dir/vault/identity.url"
    pid=$(detached "$dir/log/vault.log" "$byokfs" vault serve "$dir/vault")
    echo "$pid" >"$dir/run/vault.pid"
    basename "$byokfs" >"$dir/run/vault.name"
    if ! wait_until 30 vault_ready_or_dead "$dir" "$pid" || dead "$pid"; then
        tail -n 20 "$dir/log/vault.log" >&2
        die "the key vault did not start"
    fi
}

vault_stop() { # DIR
    local dir=$1 name=byokfs
    [[ -s $dir/run/vault.pid ]] || return 0
    # BYOKFS_BINARY may have been another one then.
    [[ ! -s $dir/run/vault.name ]] || name=$(cat "$dir/run/vault.name")
    # As much as the kernel keeps of it.
    end_process "$(cat "$dir/run/vault.pid")" "${name:0:15}"
    rm -f "$dir/run/vault.pid" "$dir/run/vault.name"
}

# Runs a vault verb on DIR's vault: in_vault DIR VERB...
in_vault() {
    local dir=$1
    shift
    BYOKFS_VAULT=$dir/vault "$byokfs" vault "$@"
}

kek_url() { # DIR
    printf '%s/keys/%s\n' "$(sed 's,/*$,,' "$1/vault/url")" "$key_name"
}

# volume_config DIR [FENCE_LINES]: the daemon's configuration for this volume.
volume_config() {
    local dir=$1 fence=${2:-}
    cat >"$dir/config/byokfs.toml" <<TOML
[key]
identity = "app-service"
identity_endpoint = "$(cat "$dir/vault/identity.url")"
identity_header_file = "$dir/config/identity.header"
ca_file = "$dir/vault/ca.pem"

[watcher]
interval = "2s"
deadline = "2s"

[audit]
file = "$dir/log/audit.jsonl"

[log]
file = "$dir/log/byokfs.log"

[run]
dir = "$dir/run"
TOML
    [[ -z $fence ]] || printf '\n[fence]\n%s\n' "$fence" >>"$dir/config/byokfs.toml"
}

volume_directories() { # DIR
    mkdir -p "$1/back" "$1/mnt" "$1/log"
    install -d -m 700 "$1/config" "$1/run"
    export BYOKFS_CONFIG=$1/config/byokfs.toml
}

# vault_create DIR: a key vault of its own, running, with an identity, an RSA key and the grant of what a host needs.
vault_create() {
    local dir=$1
    "$byokfs" vault init "$dir/vault" >>"$dir/log/vault.log"
    vault_start "$dir"
    {
        in_vault "$dir" identity create "$identity_name" --header-file "$dir/config/identity.header"
        in_vault "$dir" key create --name "$key_name" --kty RSA --size 3072
        in_vault "$dir" grant --identity "$identity_name" --key-permissions get,list,wrapKey,unwrapKey
    } >>"$dir/log/vault.log"
}

# What a shell sources to use this volume.
volume_env() { # DIR
    local dir=$1
    cat >"$dir/env" <<SH
case ":\$PATH:" in *":$(dirname "$byokfs"):"*) ;; *) PATH=$(printf %q "$(dirname "$byokfs")"):\$PATH ;; esac
export PATH
export BYOKFS_CONFIG=$(printf %q "$dir/config/byokfs.toml")
export BYOKFS_VAULT=$(printf %q "$dir/vault")
export BYOKFS_BACK=$(printf %q "$dir/back")
export BYOKFS_MNT=$(printf %q "$dir/mnt")
export BYOKFS_KEK=$(printf %q "$(kek_url "$dir")")
SH
}

# Lets FUSE use io_uring until the script ends; false where this kernel cannot. What is mounted stays as it is.
fuse_ring=/sys/module/fuse/parameters/enable_uring
allow_fuse_ring() {
    [[ -w $fuse_ring ]] || return 1
    fuse_ring_before=$(cat "$fuse_ring")
    on_exit restore_fuse_ring
    note "FUSE over io_uring is allowed for now: $fuse_ring"
    echo Y >"$fuse_ring"
}
restore_fuse_ring() { echo "$fuse_ring_before" >"$fuse_ring"; }

# Ends the mount and its daemon, whatever state they are in; what uses the mount must have ended before.
volume_unmount() { # DIR
    local dir=$1
    is_mounted "$dir/mnt" || return 0
    timeout 60 "$byokfs" umount "$dir/mnt" && return 0
    note "byokfs umount failed; detaching $dir/mnt"
    umount --lazy "$dir/mnt"
}

# search_tree DIR WORD: files that hold the word, and names that do.
search_tree() {
    grep -raFl -- "$2" "$1" || true
    find "$1" -name "*$2*"
}

# True if the directory answers an error.
refuses() { ! ls "$1" >/dev/null 2>&1; }

# ---- a private MariaDB -----------------------------------------------------------------------------
#
# The server is Debian's, run as the user mysql without any of /etc/mysql's options, reachable only by
# a socket in a directory of its own.

# A starting server removes the temporary files of all others beside its own: each has a TMPDIR.
mariadb_create() { # DATADIR SOCKETDIR LOG
    local log=$3
    setpriv --reuid=mysql --regid=mysql --clear-groups -- env HOME=/nonexistent TMPDIR="$2" \
        mariadb-install-db --no-defaults --datadir="$1" --skip-test-db --skip-name-resolve \
        --auth-root-authentication-method=normal </dev/null >>"$log" 2>&1 ||
        { tail -n 20 "$log" >&2 && die "mariadb-install-db failed"; }
}

# mariadb_start DATADIR SOCKETDIR LOG [OPTION...]: starts the server, waits until it answers, sets mariadb_pid.
mariadb_start() {
    local data=$1 sockets=$2 log=$3
    shift 3
    detached "$log" setpriv --reuid=mysql --regid=mysql --clear-groups -- env TMPDIR="$sockets" mariadbd --no-defaults \
        --datadir="$data" --socket="$sockets/mysqld.sock" --pid-file="$sockets/mysqld.pid" --skip-networking \
        --log-error="$log" --innodb-buffer-pool-size=64M --skip-name-resolve "$@" >"$sockets/launched.pid"
    mariadb_pid=$(cat "$sockets/launched.pid")
    wait_until 60 mariadb_answers_or_dead "$sockets" || true
    if ! mariadb_answers "$sockets"; then
        tail -n 20 "$log" >&2
        die "MariaDB did not start"
    fi
}
mariadb_answers() { sql "$1" -e 'SELECT 1' >/dev/null 2>&1; }
mariadb_answers_or_dead() { mariadb_answers "$1" || dead "$mariadb_pid"; }

# sql SOCKETDIR ARGUMENT...: the client as root of that server, values only.
sql() {
    local sockets=$1
    shift
    mariadb --no-defaults --user=root --socket="$sockets/mysqld.sock" --skip-column-names --batch "$@"
}

mariadb_stop() { # SOCKETDIR
    local pid
    pid=$(cat "$1/launched.pid" 2>/dev/null) || return 0
    end_process "$pid" mariadbd 60
    rm -f "$1/launched.pid"
}
