# shellcheck shell=bash
# The power cut below the volume's file system, on a disk that loses and tears what was not flushed. First without a
# volume: what ext4 promises holds, or the disk is wrong.

suite_power() {
    crash power "$1" --plain --load records,names,sqlite-wal,sqlite-rollback
    crash power "$1"
}
