# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# mount(8), umount(8) and fstab lines; read-only mounts and remounts; two volumes at once; names in the clear; what is
# refused.

suite_mounting() {
    local dir=$1
    need_packages attr
    helpers_up
    box_up "$dir/one"
    # shellcheck source=/dev/null
    . "$dir/one/env"
    echo content >"$mnt/file"
    byokfs umount "$mnt"
    mounting_by_type "$dir"
    mounting_fstab "$dir"
    mounting_read_only "$dir"
    mounting_remount "$dir"
    mounting_noatime "$dir"
    mounting_two "$dir"
    mounting_plaintext "$dir"
    mounting_refused "$dir"
    mount -t byokfs "$BYOKFS_BACK" "$mnt"
    box_down "$dir/one"
}

# expect_refusal EXIT PATTERN COMMAND...: the command fails with that exit code (- for any but 0) and says so.
expect_refusal() {
    local want=$1 pattern=$2 status=0 output
    shift 2
    output=$("$@" 2>&1) || status=$?
    if ((status == 0)) || [[ $want != - && $status != "$want" ]] || ! grep -qiE -- "$pattern" <<<"$output"; then
        say "$*: exit $status, expected $want and '$pattern': $output"
        return 1
    fi
}

mounting_by_type() { # DIR
    mount -t byokfs "$BYOKFS_BACK" "$mnt" -o "noexec,config=$BYOKFS_CONFIG"
    [[ $(findmnt -n -o FSTYPE,SOURCE "$mnt" | tr -s ' ') == "fuse.byokfs $BYOKFS_BACK" ]]
    findmnt -n -o OPTIONS "$mnt" | grep -q noexec
    findmnt -n -o OPTIONS "$mnt" | grep -q 'nosuid,nodev'
    [[ $(cat "$mnt/file") == content ]]
    # Busy while someone is in it, and gone when umount has returned: it can be mounted again at once.
    (cd "$mnt" && expect_refusal - 'busy|in use' umount "$mnt")
    umount "$mnt"
    mount -t fuse.byokfs "$BYOKFS_BACK" "$mnt"
    umount "$mnt"
    # -f (fake) and -n change nothing.
    mount -f -n -t byokfs "$BYOKFS_BACK" "$mnt"
    ! is_mounted "$mnt"
    say "mount -t byokfs, umount: ok"
}

mounting_fstab() { # DIR
    local options="noauto,nofail,_netdev,noatime,x-systemd.requires=network-online.target,x-systemd.device-timeout=10,comment=x"
    printf '%s %s byokfs %s,config=%s 0 0\n' "$BYOKFS_BACK" "$mnt" "$options" "$BYOKFS_CONFIG" >"$1/fstab"
    # noauto: not with -a.
    (unset BYOKFS_CONFIG && mount --fstab "$1/fstab" -a)
    ! is_mounted "$mnt"
    (unset BYOKFS_CONFIG && mount --fstab "$1/fstab" "$mnt")
    [[ $(cat "$mnt/file") == content ]]
    byokfs umount "$mnt"
    sed -i 's/noauto,/defaults,ro,/' "$1/fstab"
    (unset BYOKFS_CONFIG && mount --fstab "$1/fstab" -a)
    findmnt -n -o OPTIONS "$mnt" | grep -q '^ro,'
    byokfs umount "$mnt"
    say "fstab lines: ok"
}

mounting_read_only() { # DIR
    local before
    mount -t byokfs -o ro "$BYOKFS_BACK" "$mnt"
    before=$(cd "$BYOKFS_BACK" && find . -type f ! -name lock -printf '%p %T@ %s\n' | sort)
    [[ $(cat "$mnt/file") == content ]]
    for command in "touch $mnt/new" "rm $mnt/file" "mv $mnt/file $mnt/other" "chmod 600 $mnt/file" "truncate -s 0 $mnt/file" \
        "mkdir $mnt/dir" "setfattr -n user.a -v b $mnt/file" "ln $mnt/file $mnt/link"; do
        # shellcheck disable=SC2086
        expect_refusal - 'read-only' $command
    done
    expect_refusal - 'mounted read-only' mount -o remount,rw "$mnt"
    umount "$mnt"
    [[ $(cd "$BYOKFS_BACK" && find . -type f ! -name lock -printf '%p %T@ %s\n' | sort) == "$before" ]] ||
        { say "a read-only mount has changed the volume" && return 1; }
    say "read-only: ok"
}

mounting_remount() { # DIR
    mount -t byokfs "$BYOKFS_BACK" "$mnt"
    exec 4>>"$mnt/open"
    expect_refusal - 'open for writing|busy' mount -o remount,ro "$mnt"
    exec 4>&-
    wait_until 5 mount -o remount,ro "$mnt"
    findmnt -n -o OPTIONS "$mnt" | grep -q '^ro,nosuid,nodev'
    expect_refusal - 'read-only' touch "$mnt/new"
    mount -o remount,rw,noexec "$mnt"
    findmnt -n -o OPTIONS "$mnt" | grep -q '^rw,nosuid,nodev,noexec'
    touch "$mnt/new"
    rm "$mnt/new" "$mnt/open"
    umount "$mnt"
    say "remount: ok"
}

mounting_noatime() { # DIR
    local before
    mount -t byokfs -o noatime "$BYOKFS_BACK" "$mnt"
    touch -a -d '2001-01-01' "$mnt/file"
    before=$(stat -c %X "$mnt/file")
    cat "$mnt/file" >/dev/null
    ls "$mnt" >/dev/null
    umount "$mnt"
    mount -t byokfs "$BYOKFS_BACK" "$mnt"
    [[ $(stat -c %X "$mnt/file") == "$before" ]] || { say "noatime: a read moved the access time" && return 1; }
    umount "$mnt"
    say "noatime: ok"
}

mounting_two() { # DIR
    mkdir "$1/back2" "$1/mnt2"
    byokfs init "$1/back2" --kek "$BYOKFS_KEK" >/dev/null
    mount -t byokfs "$BYOKFS_BACK" "$mnt"
    mount -t byokfs "$1/back2" "$1/mnt2"
    echo second >"$1/mnt2/file"
    [[ $(cat "$mnt/file") == content && $(cat "$1/mnt2/file") == second ]]
    byokfs status "$1/mnt2" --json | grep -q Available
    # Each can go first; one volume is mounted once; a mount point takes one volume.
    mkdir "$1/mnt3"
    expect_refusal 9 'mounted already' byokfs mount "$1/back2" "$1/mnt3"
    umount "$mnt"
    expect_refusal 9 'mounted already|not empty' byokfs mount "$BYOKFS_BACK" "$1/mnt2"
    [[ $(cat "$1/mnt2/file") == second ]]
    umount "$1/mnt2"
    # A copy opens nothing before it is confirmed, and never with an envelope of another volume.
    cp -a "$1/back2" "$1/forged"
    cp "$BYOKFS_BACK/envelope.json" "$1/forged/envelope.json"
    byokfs mount "$1/forged" "$1/mnt3" 2>/dev/null
    ! ls "$1/mnt3" >/dev/null 2>&1
    expect_refusal - 'belongs to volume' byokfs revalidate "$1/mnt3"
    ! ls "$1/mnt3" >/dev/null 2>&1
    umount "$1/mnt3"
    rm -r "$1/back2" "$1/forged"
    say "two volumes: ok"
}

mounting_plaintext() { # DIR
    local name clear
    mkdir "$1/plain"
    byokfs init "$1/plain" --kek "$BYOKFS_KEK" --plaintext-names >/dev/null
    byokfs info "$1/plain" --json | grep -q '"encrypted_names": *false'
    mount -t byokfs "$1/plain" "$mnt"
    name=$(printf 'n%.0s' {1..255})
    mkdir "$mnt/directory"
    echo seashell-content >"$mnt/directory/findable"
    echo long >"$mnt/$name"
    ln -s seashell-target "$mnt/link"
    setfattr -n user.seashell-attribute -v seashell-value "$mnt/directory/findable"
    [[ $(cat "$mnt/$name") == long && $(readlink "$mnt/link") == seashell-target ]]
    byokfs umount "$mnt"
    [[ -f $1/plain/tree/directory/findable && -f $1/plain/tree/$name ]] || { say "the names are not in the clear" && return 1; }
    clear=$(
        grep -ral seashell "$1/plain" || true
        getfattr -Rhd -m - "$1/plain" 2>/dev/null | grep seashell || true
        find "$1/plain" -type l -lname '*seashell*'
    )
    [[ -z $clear ]] || { say "more than names is in the clear: $clear" && return 1; }
    mount -t byokfs "$1/plain" "$mnt"
    [[ $(cat "$mnt/directory/findable") == seashell-content && $(readlink "$mnt/link") == seashell-target ]]
    byokfs umount "$mnt"
    rm -r "$1/plain"
    say "names in the clear: ok"
}

mounting_refused() { # DIR
    expect_refusal - 'bogus' mount -t byokfs -o bogus "$BYOKFS_BACK" "$mnt"
    expect_refusal 2 'bogus' byokfs mount "$BYOKFS_BACK" "$mnt" -o bogus
    expect_refusal 2 'nosuid' byokfs mount "$BYOKFS_BACK" "$mnt" -o suid
    expect_refusal 2 'user_id' byokfs mount "$BYOKFS_BACK" "$mnt" -o user_id=5
    expect_refusal 2 'absolute' byokfs mount "$BYOKFS_BACK" "$mnt" -o config=relative
    expect_refusal - 'no such file|cannot' byokfs mount "$BYOKFS_BACK" "$1/nowhere"
    mkdir "$1/nothing"
    expect_refusal 4 'not a byokfs volume' byokfs mount "$1/nothing" "$mnt"
    expect_refusal 10 'no volume is mounted' byokfs umount "$mnt"
    ! is_mounted "$mnt"
    say "refusals: ok"
}
