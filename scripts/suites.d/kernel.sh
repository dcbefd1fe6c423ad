# shellcheck shell=bash
# shellcheck disable=SC2154 # set by scripts/suites
# An older kernel than this machine's, in an emulated machine: operations on a mount, the golden volumes, and the daemon
# killed under load. Its tree is this machine's, read-only, with a layer in memory above; volumes lie on an ext4 of its own.
#
# The kernel is Debian's own for this release, or that of the package that BYOKFS_KERNEL names (a .deb).

suite_kernel() {
    local dir=$1 deb=${BYOKFS_KERNEL:-} tests
    [[ $(uname -m) == x86_64 ]] || { say "skipped: for x86_64 only" && return 0; }
    need_packages qemu-system-x86 busybox-static kmod cpio xz-utils attr acl python3
    need_cargo
    [[ -z $deb || $deb == /* ]] || die "BYOKFS_KERNEL is no absolute path: $deb"
    [[ -n $deb ]] || deb=$(kernel_package "$dir")
    dpkg-deb -x "$deb" "$dir/kernel"
    kernel_initramfs "$dir"
    tests=$(cd "$repo" && cargo test --no-run --locked --test mount --test golden --test crash </dev/null 2>&1) ||
        { tail -n 20 <<<"$tests" >&2 && return 1; }
    kernel_job "$dir" "$tests"
    kernel_run "$dir"
}

# kernel_package DIR: fetches the package with Debian's kernel, and prints its path.
kernel_package() {
    local name
    apt-get update -q >"$1/fetch" 2>&1 || { tail -n 5 "$1/fetch" >&2 && return 1; }
    # Which one that is, a package without one of its own says.
    name=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    (cd "$1" && apt-get download -q "${name:-linux-image-amd64}" >>"$1/fetch" 2>&1) || { tail -n 5 "$1/fetch" >&2 && return 1; }
    printf '%s\n' "$1"/linux-image-*.deb
}

# kernel_initramfs DIR: what mounts the tree and runs the job in it.
kernel_initramfs() {
    local dir=$1 tree=$1/initramfs modules version base file number=100
    # Below /lib, or in newer packages /usr/lib.
    modules=$(find "$dir/kernel" -path '*/lib/modules/*' -type d -prune)
    version=$(basename "$modules")
    base=${modules%/lib/modules/*}
    depmod -b "$base" "$version"
    mkdir -p "$tree"/{bin,modules,proc,sys,dev,lower,layer,root}
    cp "$(command -v busybox)" "$tree/bin/"
    for file in virtio_pci virtio_blk virtio_rng 9pnet_virtio 9p overlay ext4 fuse loop; do
        modprobe -d "$base" -S "$version" --show-depends "$file" | awk '$1 == "insmod" { print $2 }'
    done | awk '!seen[$0]++' | while read -r file; do
        number=$((number + 1))
        case $file in
        *.xz) xz -dc "$file" >"$tree/modules/$number.ko" ;;
        *) cp "$file" "$tree/modules/$number.ko" ;;
        esac
    done
    cat >"$tree/init" <<SH
#!/bin/busybox sh
b=/bin/busybox
\$b mount -t proc proc /proc; \$b mount -t sysfs sys /sys; \$b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do \$b insmod \$module; done
\$b mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=262144,ro host /lower
\$b mount -t tmpfs -o size=75% tmpfs /layer; \$b mkdir /layer/upper /layer/work
\$b mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /root
for each in proc sys dev; do \$b mount --move /\$each /root/\$each; done
exec \$b switch_root /root /bin/bash $dir/job
SH
    chmod 755 "$tree/init"
    (cd "$tree" && find . | cpio --quiet -o -H newc | gzip -1) >"$dir/initramfs.gz"
}

# test_binary NAME WHAT-CARGO-SAID: its path.
test_binary() { (cd "$repo" && realpath "$(sed -n "s|.*Executable tests/$1/main.rs (\(.*\))|\1|p" <<<"$2")"); }

# kernel_job DIR WHAT-CARGO-SAID: what the machine does.
kernel_job() {
    local tests=$2
    cat >"$1/job" <<SH
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C RUST_BACKTRACE=0
export TMPDIR=/volumes BYOKFS_BINARY=$byokfs CARGO_MANIFEST_DIR=$repo
mkdir -p /dev/pts /dev/shm /volumes
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount /dev/vda /volumes
chmod 1777 /volumes
ip link set lo up
cd $repo
failed=0
$(test_binary golden "$tests") --color never || failed=1
# What takes its time even on a machine that is not emulated is left to that.
$(test_binary mount "$tests") --color never --test-threads 3 --skip a_million --skip hundred_thousand --skip differential --skip sixty_four || failed=1
$(test_binary crash "$tests") kill --load records,names --kills 3 || failed=1
echo "the job has ended: \$failed"
sync
echo o >/proc/sysrq-trigger
SH
}

# kernel_run DIR: starts the machine, shows what it says, and waits for it.
kernel_run() {
    local dir=$1 console=$1/console pid
    truncate -s 6G "$dir/volumes.img"
    mkfs.ext4 -q "$dir/volumes.img"
    timeout 3600 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 6144 -display none -monitor none -no-reboot \
        -serial "file:$console" -kernel "$(echo "$dir"/kernel/boot/vmlinuz-*)" -initrd "$dir/initramfs.gz" \
        -append 'console=ttyS0 panic=-1 loglevel=4 mitigations=off' \
        -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \
        -device virtio-9p-pci,fsdev=host,mount_tag=host -device virtio-rng-pci \
        -drive "file=$dir/volumes.img,if=virtio,format=raw,cache=none,aio=threads" </dev/null >"$dir/qemu" 2>&1 &
    pid=$!
    on_exit end_process "$pid" qemu
    wait "$pid" || true
    tr -d '\r' <"$console" | grep -E '^(test |running|thread|----|assertion| +left| +right|kill:|the job)' | grep -vE '\.\.\. ok$|seconds$' || true
    grep -q 'the job has ended: 0' "$console" || { tail -n 30 "$console" "$dir/qemu" && return 1; }
}
