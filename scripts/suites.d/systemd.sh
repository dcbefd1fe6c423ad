# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# config/byokfs@.service under a real systemd, with Debian's own unit of MariaDB: the order of starts and stops, what
# systemctl shows, the key taken away and given back, the daemon killed, the machine switched off.
#
# systemd is the first process of a container whose tree is this machine's with a layer above that takes all changes.

suite_systemd() {
    local dir=$1
    # What the key vault and the volume need is that of any other volume; the daemon's side is in the container.
    need_packages systemd systemd-container mariadb-server mariadb-client
    mkdir "$dir/box"
    volume_directories "$dir/box"
    on_exit vault_stop "$dir/box"
    vault_create "$dir/box"
    # Neither depends on byokfs, of which nothing runs there yet.
    if ! layer_over_root "$dir" || ! system_up "$dir"; then
        cat "$dir/boot.log"
        say "skipped: systemd does not boot in a container here"
        return 0
    fi
    system_furnish "$dir"

    systemd_start
    systemd_order
    systemd_busy
    systemd_revocation "$dir"
    systemd_killed
    systemd_reboot "$dir"
}

# inside COMMAND...: in the container, with nothing of this environment.
inside() { nsenter -t "$system" -m -p -u -i -C -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root "$@" </dev/null; }

# show UNIT PROPERTY
show() { inside systemctl show "$1" --property "$2" --value; }

# is UNIT STATE: active, inactive, failed.
is() { [[ $(show "$1" ActiveState) == "$2" ]]; }

# status_is WORD: what the volume's unit says of itself.
status_is() { [[ $(show "$unit" StatusText) == *"$1"* ]]; }

has_ended() { ! is "$1" active && ! is "$1" deactivating; }

rows() { inside mariadb -N -e 'SELECT COUNT(*) FROM test.t'; }

add_rows() { inside mariadb -e 'INSERT INTO test.t (word) SELECT seq FROM test.seq_1_to_1000'; }

# The system may be gone before it has answered.
power_off() { inside systemctl --no-block poweroff || true; }

mounted_inside() { inside mountpoint -q /srv/mysql; }

# fails_with WHAT: says what a unit says of itself.
fails_with() {
    say "$1"
    inside systemctl status --no-pager --lines 60 "$unit" mariadb || true
    return 1
}

# layer_over_root DIR: a tree like this machine's, whose changes are kept in memory.
layer_over_root() {
    local dir=$1
    mkdir "$dir/memory" "$dir/root"
    mount -t tmpfs -o mode=755 tmpfs "$dir/memory" 2>"$dir/boot.log" || return 1
    on_exit umount --lazy "$dir/memory"
    mkdir "$dir/memory/upper" "$dir/memory/work"
    mount -t overlay -o "lowerdir=/,upperdir=$dir/memory/upper,workdir=$dir/memory/work" overlay "$dir/root" 2>"$dir/boot.log" || return 1
    on_exit umount --lazy "$dir/root"
    : >"$dir/root/etc/fstab"
}

# system_furnish DIR: the binary, the unit as it is shipped, and what an administrator adds.
system_furnish() {
    local dir=$1 root=$1/root etc=$1/root/etc/byokfs
    unit=byokfs@srv-mysql.service
    # Nothing of this machine's own byokfs, and no settings of its database server.
    rm -rf "$etc" "$root/etc/systemd/system/mariadb.service" "$root/etc/systemd/system/mariadb.service.d"
    install -m 755 "$byokfs" "$root/usr/bin/byokfs"
    install -m 644 "$repo/config/byokfs@.service" "$root/etc/systemd/system/"

    install -d -m 700 "$etc"
    volume_config "$dir/box"
    sed -e "s,$dir/box/config,/etc/byokfs,; s,$dir/box/vault,/etc/byokfs,; s,$dir/box/log,/var/log/byokfs,; /^\[run\]/,\$d" \
        "$dir/box/config/byokfs.toml" >"$etc/srv-mysql.toml"
    printf '\n[fence]\nenabled = true\nsocket = "/run/mysqld/mysqld.sock"\n' >>"$etc/srv-mysql.toml"
    install -m 600 "$dir/box/config/identity.header" "$dir/box/vault/ca.pem" "$etc/"
    printf 'BACK=/var/lib/byokfs/mysql\nMNT=/srv/mysql\n' >"$etc/srv-mysql.mount"
    mkdir -p "$root/srv/mysql"

    mkdir "$root/etc/systemd/system/mariadb.service.d"
    # As the unit's head has it.
    printf '[Unit]\nRequires=%s\nAfter=%s\n' "$unit" "$unit" >"$root/etc/systemd/system/mariadb.service.d/byokfs.conf"
    rm -rf "$root/etc/mysql"
    mkdir -p "$root/etc/mysql"
    printf '[mysqld]\ndatadir=/srv/mysql/data\nskip-networking\ninnodb-buffer-pool-size=64M\n' >"$root/etc/mysql/my.cnf"
    printf '#!/bin/sh\n' >"$root/etc/mysql/debian-start"
    chmod 755 "$root/etc/mysql/debian-start"
    inside systemctl daemon-reload
}

# system_up DIR: boots it; sets nspawn and system, the process ids of the container and of its systemd.
system_up() {
    local dir=$1
    nspawn=$(detached "$dir/boot.log" systemd-nspawn --quiet --directory "$dir/root" --machine "byokfs-$(random_word 4)" \
        --boot --register=no --keep-unit --private-users=no --capability=all --console=pipe --link-journal=no \
        --bind=/dev/fuse --bind="$dir/box/back:/var/lib/byokfs" -- --unit=basic.target)
    on_exit system_down
    system=''
    wait_until 60 system_runs || return 1
    say "booted: $(inside systemctl --version | head -n 1)"
}

system_runs() {
    system=$(pgrep -P "$nspawn" | head -n 1)
    # Degraded where a unit of this machine, which is none of ours, does not work in a container.
    [[ -n $system && $(inside systemctl is-system-running) =~ ^(running|degraded)$ ]]
}

system_down() {
    alive "$nspawn" || return 0
    end_process "$nspawn" systemd-nspawn
}

systemd_start() {
    inside byokfs init /var/lib/byokfs/mysql --kek "$(kek_url "$dir/box")" --config /etc/byokfs/srv-mysql.toml
    inside systemctl start "$unit" || fails_with "$unit does not start"
    # It is active when the mount is there, and says how it is.
    mounted_inside || fails_with "active without a mount"
    status_is Available || fails_with "the status says: $(show "$unit" StatusText)"
    inside install -d -o mysql -g mysql -m 750 /srv/mysql/data
    inside setpriv --reuid=mysql --regid=mysql --clear-groups -- mariadb-install-db --skip-test-db >/dev/null
    inside systemctl start mariadb || fails_with "mariadb does not start"
    inside mariadb -e 'CREATE DATABASE test; CREATE TABLE test.t (id SERIAL, word VARCHAR(100)) ENGINE=InnoDB'
    add_rows
    say "systemctl start: ok ($(show "$unit" StatusText))"
}

systemd_order() {
    # Who uses the mount is stopped first, so that there is none to refuse the unmount.
    inside systemctl stop "$unit" || fails_with "$unit does not stop"
    is mariadb inactive || fails_with "mariadb is $(show mariadb ActiveState)"
    [[ $(show mariadb Result) == success && $(show "$unit" Result) == success ]] || fails_with "not stopped in order"
    ! mounted_inside || fails_with "stopped, and still mounted"
    # And the volume is there before who needs it.
    inside systemctl start mariadb || fails_with "mariadb does not start"
    is "$unit" active || fails_with "$unit is $(show "$unit" ActiveState)"
    [[ $(rows) == 1000 ]] || fails_with "rows: $(rows)"
    inside systemctl restart "$unit" || fails_with "$unit does not restart"
    wait_until 60 is mariadb active || fails_with "mariadb is not back after a restart of the volume"
    [[ $(rows) == 1000 ]] || fails_with "rows: $(rows)"
    say "systemctl stop, start, restart: ok"
}

# Somebody else uses the mount: the stop says who, and is done as soon as he has ended.
systemd_busy() {
    inside systemd-run --quiet --unit holder --working-directory /srv/mysql sleep 600
    inside systemctl --no-block stop "$unit"
    wait_until 60 status_is sleep || fails_with "the status says: $(show "$unit" StatusText)"
    mounted_inside || fails_with "not mounted any more"
    inside systemctl stop holder
    wait_until 60 is "$unit" inactive || fails_with "$unit is $(show "$unit" ActiveState)"
    [[ $(show "$unit" Result) == success ]] || fails_with "not stopped in order"
    ! mounted_inside || fails_with "stopped, and still mounted"
    inside systemctl start mariadb || fails_with "mariadb does not start"
    say "systemctl stop while the mount is used: ok"
}

systemd_revocation() { # DIR
    add_rows
    in_vault "$1/box" key set-attributes --name "$key_name" --enabled false >/dev/null
    wait_until 60 is mariadb inactive || fails_with "a minute after the key was disabled mariadb is $(show mariadb ActiveState)"
    [[ $(show mariadb Result) == success ]] || fails_with "mariadb was not shut down in order"
    wait_until 30 status_is Inaccessible || fails_with "the status says: $(show "$unit" StatusText)"
    is "$unit" active || fails_with "$unit is $(show "$unit" ActiveState)"
    ! inside ls /srv/mysql >/dev/null 2>&1 || fails_with "the mount still answers"
    in_vault "$1/box" key set-attributes --name "$key_name" --enabled true >/dev/null
    inside byokfs revalidate /srv/mysql --config /etc/byokfs/srv-mysql.toml >/dev/null
    status_is Available || wait_until 30 status_is Available || fails_with "the status says: $(show "$unit" StatusText)"
    inside systemctl start mariadb || fails_with "mariadb does not start"
    [[ $(rows) == 2000 ]] || fails_with "rows: $(rows)"
    say "the key disabled, enabled, revalidated: ok"
}

systemd_killed() {
    local guard daemon
    guard=$(show "$unit" MainPID)
    daemon=$(inside pgrep -P "$guard" -o)
    add_rows
    inside kill -KILL "$daemon"
    # The guard fences the server, whose data is out of reach, and then fails: nobody takes that for a stop.
    wait_until 60 is "$unit" failed || fails_with "$unit is $(show "$unit" ActiveState) without a daemon"
    wait_until 60 has_ended mariadb || fails_with "mariadb is $(show mariadb ActiveState) without a volume"
    # The server's unit may have it restarted, as after any crash, and was started often by now.
    inside systemctl stop mariadb
    inside systemctl reset-failed mariadb
    inside systemctl start mariadb || fails_with "mariadb does not start"
    [[ $(rows) == 3000 ]] || fails_with "rows: $(rows)"
    say "the daemon killed, started again: ok"
}

# The whole machine, in whatever order systemd finds, and up again.
systemd_reboot() { # DIR
    local checked
    add_rows
    power_off
    wait_until 120 dead "$nspawn" || fails_with "the container does not end"
    system_up "$1"
    checked=$(inside byokfs fsck /var/lib/byokfs/mysql --config /etc/byokfs/srv-mysql.toml 2>&1) || { say "$checked" && return 1; }
    inside systemctl start mariadb || fails_with "mariadb does not start"
    [[ $(rows) == 4000 ]] || fails_with "rows: $(rows)"
    say "the machine switched off and on: ok; fsck: $(tail -n 1 <<<"$checked")"
    power_off
    wait_until 120 dead "$nspawn" || fails_with "the container does not end"
}
