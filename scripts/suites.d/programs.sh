# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# The programs a database directory meets: what goes in comes out, with its attributes.

suite_programs() {
    local dir=$1
    need_packages git tar rsync attr acl sqlite3
    box_up "$dir/box"
    programs_tree "$dir/tree"
    programs_listing "$dir/tree" >"$dir/tree.list"
    programs_git "$dir"
    programs_tar "$dir"
    programs_rsync "$dir"
    # Its index is a file that its processes share by mapping it.
    if kernel_maps_shared; then programs_sqlite "$dir" wal; fi
    programs_sqlite "$dir" delete
    no_integrity_failure "$dir/box"
}

# Something of everything: sizes around the block's, holes, hard links, symbolic links, a fifo, owners, modes, times,
# attributes, access lists, long names, names that are no text.
programs_tree() { # DIR
    local size name
    mkdir -p "$1/sub/deep" "$1/empty"
    for size in 0 1 4095 4096 4097 491519 491520 491521 3000000; do
        head -c "$size" /dev/urandom >"$1/size-$size"
    done
    truncate -s 20M "$1/sparse"
    printf middle | dd of="$1/sparse" bs=1 seek=9000000 conv=notrunc status=none
    ln "$1/size-4097" "$1/sub/hard"
    ln -s ../size-1 "$1/sub/soft"
    ln -s "$(printf 'x%.0s' {1..3000})" "$1/sub/long-target"
    mkfifo "$1/sub/fifo"
    name=$(printf 'n%.0s' {1..255})
    echo long >"$1/sub/$name"
    echo bytes >"$1/sub/"$'\xff\xfe new\nline'
    echo secret >"$1/sub/deep/attributes"
    setfattr -n user.note -v "some value" "$1/sub/deep/attributes"
    setfattr -n trusted.note -v "for root" "$1/sub/deep/attributes"
    setfacl -m u:daemon:rw,g:daemon:r "$1/sub/deep/attributes"
    setfacl -d -m u:daemon:rwx "$1/sub/deep"
    chown 1234:5678 "$1/size-1"
    chmod 4750 "$1/size-0"
    chmod 2755 "$1/sub"
    touch -d '2001-02-03 04:05:06.123456789' "$1/size-1" "$1/sub/deep"
    touch -h -d '1960-01-01 00:00:00.5' "$1/sub/soft"
}

# All of a tree that a copy must keep: kinds, modes, owners, link counts, sizes, times, targets, contents, attributes, access lists.
programs_listing() { # DIR
    (
        cd "$1" || exit
        find . -printf '%y %m %U:%G %n %s %T@ %p -> %l\0' | sed -z -E 's/^(d [^ ]* [^ ]*) [0-9]* [0-9]*/\1/' | sort -z | tr '\0' '\n'
        find . -type f -print0 | sort -z | xargs -0 sha256sum
        getfattr -R -h -d -m '^(user|trusted)\.' . | LC_ALL=C sort
        find . ! -type l -print0 | sort -z | xargs -0 getfacl -p
    )
}

programs_same() { # DIR WHAT
    programs_listing "$2" >"$1/copy.list"
    diff "$1/tree.list" "$1/copy.list" >"$1/diff" && return 0
    head -n 20 "$1/diff"
    say "$2 differs"
    return 1
}

programs_git() { # DIR
    # A repository of this machine's own making: the project may have been unpacked without one.
    git init -q "$1/repository"
    cp -a "$repo/src" "$repo/scripts" "$1/repository/"
    git -C "$1/repository" add -A
    git -C "$1/repository" -c user.name=suite -c user.email=suite@localhost commit -q -m import
    git clone -q --no-local "$1/repository" "$mnt/clone"
    git -C "$mnt/clone" fsck --full --strict
    git -C "$mnt/clone" gc -q --aggressive --prune=now
    git -C "$mnt/clone" fsck --full --strict
    diff -r --exclude=.git "$1/repository" "$mnt/clone"
    [[ -z $(git -C "$mnt/clone" status --porcelain) ]]
    say "git: clone, gc and fsck"
}

programs_tar() { # DIR
    local tar=(tar --warning=no-timestamp --acls --xattrs --xattrs-include='*' --sparse --numeric-owner)
    mkdir "$mnt/tar" "$1/tar"
    "${tar[@]}" -C "$1/tree" -cf - . | "${tar[@]}" -C "$mnt/tar" -xpf -
    programs_same "$1" "$mnt/tar"
    (($(stat -c %b "$mnt/tar/sparse") < 1000)) || { say "the sparse file has lost its holes" && return 1; }
    "${tar[@]}" -C "$mnt/tar" -cf - . | "${tar[@]}" -C "$1/tar" -xpf -
    programs_same "$1" "$1/tar"
    say "tar: in and out, with attributes, access lists, links and holes"
}

programs_rsync() { # DIR
    local rsync=(rsync -aHAXS --numeric-ids)
    "${rsync[@]}" "$1/tree/" "$mnt/rsync/"
    programs_same "$1" "$mnt/rsync"
    # A second time nothing is to be done.
    [[ -z $("${rsync[@]}" -i "$1/tree/" "$mnt/rsync/") ]] || { say "rsync sees differences in its own copy" && return 1; }
    "${rsync[@]}" --checksum --inplace "$mnt/rsync/" "$1/rsync/"
    programs_same "$1" "$1/rsync"
    say "rsync: in and out, and nothing left to do"
}

# Several writers at once, killed half-way: SQLite's own check, and no acknowledged row missing.
programs_sqlite() { # DIR JOURNAL
    local db=$mnt/$2.db writer row writers=() acknowledged rows
    sqlite3 "$db" "PRAGMA journal_mode=$2; CREATE TABLE t (writer INT, row INT, pad TEXT); CREATE INDEX i ON t (writer, row);" >"$1/sqlite.log"
    for writer in 1 2 3; do
        (
            trap - EXIT
            for row in {1..40}; do
                sqlite3 -cmd '.timeout 30000' "$db" "PRAGMA synchronous=FULL; INSERT INTO t SELECT $writer, $row, hex(randomblob(2000));" &&
                    echo "$writer $row" >>"$1/acknowledged.$2.$writer"
            done
        ) &
        writers+=($!)
    done
    sleep 1
    kill -9 "${writers[0]}" 2>/dev/null || true
    wait "${writers[@]}" 2>/dev/null || true
    [[ $(sqlite3 "$db" 'PRAGMA integrity_check') == ok ]] || { say "SQLite ($2): the integrity check fails" && return 1; }
    acknowledged=$(cat "$1/acknowledged.$2".* | sort -u)
    rows=$(sqlite3 -separator ' ' "$db" 'SELECT DISTINCT writer, row FROM t')
    row=$(comm -23 <(printf '%s\n' "$acknowledged") <(printf '%s\n' "$rows" | sort))
    [[ -z $row ]] || { say "SQLite ($2): acknowledged, and not there: $row" && return 1; }
    sqlite3 "$db" 'DELETE FROM t WHERE row % 2 = 0; VACUUM; PRAGMA integrity_check;' | grep -qx ok
    say "SQLite, journal_mode=$2: $(wc -l <<<"$acknowledged") acknowledged rows there, integrity ok"
}
