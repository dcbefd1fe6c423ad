# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# The file systems below: ext4, XFS and btrfs, each on a loop device, and with a full one. What byokfs refuses: a
# file system whose locks are leases.

suite_backings() {
    local dir=$1 type
    need_packages e2fsprogs xfsprogs btrfs-progs attr acl rsync
    for type in ext4 xfs btrfs; do
        modprobe "$type" 2>/dev/null || true
        if ! grep -qw "$type" /proc/filesystems; then
            say "skipped: this kernel has no $type"
            continue
        fi
        backings_basic "$dir" "$type"
    done
    backings_refused "$dir"
}

backings_basic() { # DIR TYPE
    local below=$1/$2 box=$1/$2/box want again got
    loop_mount "$2" 512M "$below"
    box_up "$box"
    backings_operations "$1"
    # Space: true numbers, and ENOSPC without harm to what is there.
    # The daemon's own log grows below, so now and then the two are looked at a moment apart.
    wait_until 10 backings_same_numbers "$below" "$mnt" || { say "$2: statfs differs from the file system below" && return 1; }
    head -c 3000000 /dev/urandom >"$mnt/kept"
    want=$(sha256sum <"$mnt/kept")
    if cat /dev/zero >"$mnt/filler" 2>"$1/full"; then say "$2: a full disk went unnoticed" && return 1; fi
    grep -q 'No space left' "$1/full" || { cat "$1/full" && return 1; }
    # More than XFS gets back when it ends the preallocation of the file before.
    if head -c 100000000 /dev/urandom 2>/dev/null >>"$mnt/kept"; then
        say "$2: an append to a full disk went unnoticed"
        return 1
    fi
    got=$(head -c 3000000 "$mnt/kept" | sha256sum)
    [[ $want == "$got" ]] || { say "$2: a file is damaged by a full disk" && return 1; }
    cat "$mnt/filler" >/dev/null
    rm "$mnt/filler"
    # The kernel tells the daemon of the inode's end a moment after the name's.
    # btrfs counts the space as free from its next commit on.
    wait_until 10 backings_free "$mnt" "$below" || { say "$2: the space of a removed file does not come back" && return 1; }
    head -c 1000000 /dev/urandom >"$mnt/again"
    # And all of it after a new mount.
    again=$(sha256sum <"$mnt/again")
    "$repo/scripts/sandbox" down "$box" >>"$box.log" 2>&1
    "$repo/scripts/sandbox" up "$box" >>"$box.log" 2>&1
    [[ $(sha256sum <"$mnt/again") == "$again" && $(head -c 3000000 "$mnt/kept" | sha256sum) == "$want" ]] ||
        { say "$2: contents differ after a new mount" && return 1; }
    no_integrity_failure "$box"
    box_down "$box"
    loop_unmount "$below"
    say "$2: ok"
}

backings_same_numbers() { # DIR DIR
    [[ $(stat -f -c '%a %b %S %c' "$1") == $(stat -f -c '%a %b %S %c' "$2") ]]
}

backings_free() { # DIR BELOW
    sync -f "$2"
    (($(stat -f -c '%a * %S' "$1") > 50000000))
}

# One of each operation, each checked.
backings_operations() { # DIR
    (
        cd "$mnt" || exit
        mkdir -p d/e
        echo one >d/a
        ln d/a d/b
        ln -s a d/l
        [[ $(cat d/l) == one && $(stat -c %h d/a) == 2 ]]
        mv d/a d/e/a
        mkfifo d/f
        setfattr -n user.x -v value d/b
        [[ $(getfattr --only-values -n user.x d/e/a) == value ]]
        setfacl -m u:daemon:r d/b
        getfacl -p d/b | grep -qx 'user:daemon:r--'
        truncate -s 100M sparse
        printf x | dd of=sparse bs=1 seek=50000000 conv=notrunc status=none
        (($(stat -c %b sparse) < 1000))
        fallocate -l 1M allocated
        (($(stat -c %b allocated) >= 2048))
        fallocate -p -o 0 -l 1M allocated
        fallocate -z -o 4096 -l 4096 sparse
        dd if=/dev/zero of=direct bs=4k count=16 oflag=direct,dsync status=none
        dd if=direct of=/dev/null bs=512 iflag=direct status=none
        cp --reflink=auto sparse copied
        cmp sparse copied
        for name in {1..300}; do : >"d/e/$name"; done
        [[ $(find d/e -mindepth 1 | wc -l) == 301 ]]
        touch -d '2033-05-18 03:33:20.123456789' d/b
        [[ $(stat -c %Y d/b) == 2000000000 ]]
        sync d/b
        # Open, and without a name.
        exec 3<>d/e/1
        rm d/e/1
        echo unlinked >&3
        [[ $(cat /proc/self/fd/3) == unlinked ]]
        exec 3>&-
        rm -r d/e
    )
}

# A FUSE file system stands for those that could be anywhere: byokfs on byokfs.
backings_refused() { # DIR
    local box=$1/outer status=0
    box_up "$box"
    # shellcheck source=/dev/null
    (. "$box/env" && byokfs init "$mnt/inner" --kek "$BYOKFS_KEK") >"$1/refused" 2>&1 || status=$?
    if ((status != 5)) || ! grep -q 'file system' "$1/refused"; then
        cat "$1/refused"
        say "a volume on a file system that may be remote is not refused (exit $status)"
        return 1
    fi
    [[ ! -e $mnt/inner ]] || { say "the refused volume left something behind" && return 1; }
    say "refused: $(head -n 1 "$1/refused")"
}
