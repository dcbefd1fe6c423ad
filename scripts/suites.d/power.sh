# shellcheck shell=bash
# The power cut below the volume's file system, on a disk that loses and tears what was not flushed. First without a
# volume: what ext4 promises holds, or the disk is wrong. Not MariaDB there: it can lose a tablespace whose first page
# was torn, doublewrite or not.

suite_power() {
    crash power "$1" --plain --doublewrite on --load records,names,sqlite-wal,sqlite-rollback,mysql
    crash power "$1"
}
