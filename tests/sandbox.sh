#!/usr/bin/env bash
# scripts/sandbox: one lives, loses its key in each way, gets it back, ends, and comes up as it was.
# Run by scripts/test.

# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

sandbox=$repo/scripts/sandbox
dir=$(mktemp -d "${TMPDIR:-/tmp}/byokfs-sandbox.XXXXXX")
on_exit rm -rf --one-file-system "$dir"
on_exit "$sandbox" down "$dir"
"$sandbox" up "$dir" -o noatime
# shellcheck source=/dev/null
. "$dir/env"
kept() { [[ $(setpriv --reuid=nobody --regid=nogroup --clear-groups cat "$dir/mnt/file") == kept ]]; }

echo kept >"$dir/mnt/file"
kept
for loss in disable delete; do
    "$sandbox" key "$dir" "$loss"
    wait_until 60 refuses "$dir/mnt" || die "the mount still answers after: key $loss"
    if [[ $loss == delete ]]; then "$sandbox" key "$dir" recover; else "$sandbox" key "$dir" enable; fi
    byokfs revalidate "$dir/mnt"
    kept
done
"$sandbox" down "$dir"
"$sandbox" up "$dir"
kept
"$sandbox" key "$dir" expire
wait_until 60 refuses "$dir/mnt" || die "the mount still answers with an expired key"
"$sandbox" down "$dir"
! is_mounted "$dir/mnt"
