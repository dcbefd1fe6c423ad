# shellcheck shell=bash
# The daemon killed under load, the volume remounted, each time everything acknowledged looked for.

suite_kill() {
    crash kill "$1"
}
