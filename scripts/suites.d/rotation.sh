# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# Keys are rotated again and again while sysbench works on MariaDB. The KEK: to new versions, by hand and by itself, and
# to a second vault with an identity and an authority of its own and back; what each rotation left behind is taken away
# at once. Beside it the DEKs of all files. No client sees an error, and when the server is killed in the middle nothing
# acknowledged is missing.

suite_rotation() {
    local dir=$1 writers load deks number done_after=0
    need_packages mariadb-server mariadb-client sysbench
    box_up "$dir/box"
    # shellcheck source=/dev/null
    . "$dir/box/env"
    rotation_second_vault "$dir"
    install -d -o mysql -g mysql -m 700 "$mnt/mysql" "$dir/server"
    install -o mysql -g mysql /dev/null "$dir/server/log"
    mariadb_create "$mnt/mysql" "$dir/server" "$dir/server/log"
    on_exit mariadb_stop "$dir/server"
    mariadb_start "$mnt/mysql" "$dir/server" "$dir/server/log"
    sql "$dir/server" -e 'CREATE DATABASE sbtest; CREATE DATABASE d; CREATE TABLE d.acknowledged (client INT, n INT, pad VARCHAR(500), PRIMARY KEY (client, n))'
    rotation_sysbench "$dir" prepare --threads=1 >"$dir/prepare.log" || { tail "$dir/prepare.log" && return 1; }

    # Deadlocks are the database's own affair, and tried again; any other error ends sysbench.
    rotation_sysbench "$dir" run --threads=4 --time=60 --mysql-ignore-errors=1213 >"$dir/sysbench.log" 2>&1 &
    load=$!
    writers=()
    for number in 1 2; do
        rotation_writer "$dir" "$number" &
        writers+=($!)
    done
    rotation_deks "$dir" "$load" &
    deks=$!
    rotations=0
    while alive "$load"; do
        rotation_round "$dir"
        alive "$load" && done_after=$rotations
    done
    wait "$load" || { tail -n 20 "$dir/sysbench.log" && say "sysbench saw an error" && return 1; }
    grep -Eq 'reconnects: +0 ' "$dir/sysbench.log" || { tail -n 20 "$dir/sysbench.log" && say "a connection was lost" && return 1; }
    wait "$deks" || { cat "$dir/deks" && say "a rotation of the DEKs failed" && return 1; }
    ((done_after >= 5)) || { say "only $done_after rotations under load" && return 1; }
    say "$done_after rotations under sysbench: $(sed -n 's/.*transactions: *\([0-9]*\) *(\([0-9.]*\) per sec.*/\1 transactions, \2 a second/p' "$dir/sysbench.log"), no error"

    # In the middle of one more round the server is killed, and the volume comes back under whichever key it has.
    byokfs rotate dek "$mnt" --rate 4MiB --no-wait >>"$dir/deks"
    (trap - EXIT && sleep 2 && kill -9 "$mariadb_pid") &
    rotation_round "$dir"
    wait_until 30 dead "$mariadb_pid"
    wait "${writers[@]}" 2>/dev/null || true
    byokfs umount "$mnt"
    byokfs mount "$BYOKFS_BACK" "$mnt"
    mariadb_start "$mnt/mysql" "$dir/server" "$dir/server/log"
    byokfs rotate dek "$mnt" --rate 0B >>"$dir/deks"
    rotation_compare "$dir"
    mariadb_stop "$dir/server"
    if grep -s '"MakeInaccessible"' "$dir/box/log/audit.jsonl"; then
        say "the volume was cut off" && return 1
    fi
    no_integrity_failure "$dir/box"
}

# A vault that shares nothing with the box's, and the section that names it.
rotation_second_vault() { # DIR
    local second=$1/second
    mkdir -p "$second/log"
    install -d -m 700 "$second/config" "$second/run"
    on_exit vault_stop "$second"
    vault_create "$second"
    cat >>"$1/box/config/byokfs.toml" <<TOML

[[service]]
keys = "$(cat "$second/vault/url")"
identity = "app-service"
identity_endpoint = "$(cat "$second/vault/identity.url")"
identity_header_file = "$second/config/identity.header"
ca_file = "$second/vault/ca.pem"
TOML
}

rotation_sysbench() { # DIR COMMAND [OPTION...]
    sysbench oltp_read_write --mysql-socket="$1/server/mysqld.sock" --mysql-user=root --mysql-db=sbtest --tables=4 \
        --table-size=10000 --rand-seed=1 "${@:3}" "$2" </dev/null
}

# Writes rows, and down which of them the server has acknowledged, until the server is gone.
rotation_writer() { # DIR NUMBER
    local row
    trap - EXIT
    for row in {1..1000000}; do
        printf "INSERT INTO acknowledged VALUES (%d, %d, REPEAT('p', 500)); SELECT 'ack', %d, %d;\n" "$2" "$row" "$2" "$row"
    done | sql "$1/server" d --unbuffered 2>/dev/null | grep --line-buffered '^ack' >"$1/ack.$2" || true
}

# Gives all files other DEKs, again and again, while that process runs.
rotation_deks() { # DIR PID
    local count=0
    trap - EXIT
    while alive "$2"; do
        byokfs rotate dek "$mnt" --rate 32MiB >>"$1/deks" 2>&1 || return 1
        count=$((count + 1))
    done
    say "the DEKs of all files were rotated $count times under sysbench"
}

rotation_kek() { byokfs status "$mnt" --json | sed -n 's/.*"kek": *"\([^"]*\)".*/\1/p'; }
rotation_is_at() { [[ $(rotation_kek) == "$1"* ]]; }

# rotation_enable BOX KID true|false
rotation_enable() {
    in_vault "$1" key set-attributes --name "$key_name" --version "${2##*/}" --enabled "$3" >/dev/null
}

# New version, by hand; the other vault; a new version there, by itself; and back. Each key is disabled once it is left.
rotation_round() { # DIR
    local box=$1/box second=$1/second first next
    first=$(rotation_kek)
    # The service tells the age of versions by the second.
    sleep 1.1
    next=$(in_vault "$box" key rotate --name "$key_name")
    byokfs rotate kek "$mnt" >/dev/null
    rotation_expect "$next"
    rotation_enable "$box" "$first" false
    byokfs rotate kek "$mnt" --to "$(kek_url "$second")" >/dev/null
    rotation_expect "$(kek_url "$second")"
    rotation_enable "$box" "$next" false
    first=$(rotation_kek)
    next=$(in_vault "$second" key rotate --name "$key_name")
    wait_until 60 rotation_is_at "$next" || { say "the version $next is not followed" && return 1; }
    rotation_expect "$next"
    rotation_enable "$second" "$first" false
    in_vault "$box" key rotate --name "$key_name" >/dev/null
    byokfs rotate kek "$mnt" --to "$(kek_url "$box")" >/dev/null
    rotation_expect "$(kek_url "$box")"
    rotation_enable "$second" "$next" false
    in_vault "$second" key rotate --name "$key_name" >/dev/null
}

rotation_expect() { # KID: the volume has it, and serves.
    local status
    status=$(byokfs status "$mnt" --json)
    [[ $(rotation_kek) == "$1"* ]] || { say "the volume has $(rotation_kek), not $1" && return 1; }
    if grep -q '"state": *"Inaccessible"' <<<"$status"; then
        say "$status" && return 1
    fi
    rotations=$((rotations + 1))
}

rotation_compare() { # DIR
    local missing tables bad count
    sql "$1/server" d -e "SELECT 'ack', client, n FROM acknowledged" | sort >"$1/there"
    missing=$(cat "$1"/ack.* | grep -P '^ack\t\d+\t\d+$' | sort | comm -23 - "$1/there" | wc -l)
    count=$(cat "$1"/ack.* | wc -l)
    say "$count rows acknowledged through $rotations rotations, $missing of them missing after a crash"
    ((missing == 0 && count > 0)) || return 1
    tables=$(sql "$1/server" -e "SELECT CONCAT(table_schema, '.', table_name) FROM information_schema.tables WHERE table_schema IN ('d', 'sbtest')" | paste -sd,)
    bad=$(sql "$1/server" -e "CHECK TABLE $tables EXTENDED" | awk -F'\t' '$NF != "OK"')
    [[ -z $bad ]] || { say "$bad" && return 1; }
}
