#!/usr/bin/env bash
# Boots systemd over a copy-on-write view of this machine, to try units for real. As root:
#
#     unshare --fork --pid --mount --mount-proc --cgroup --ipc --uts --net bash tests/deploy/boot.sh
#     nsenter --target $(pgrep -f unit=basic.target) --all bash
#
# What it writes is in memory and gone when it is killed: the root that it gets is an overlay, and
# nothing of the machine's own file system stays in reach (systemd empties /tmp when it boots).
set -euo pipefail
[ "$$" = 1 ] || { echo "run by unshare --pid --fork --mount" >&2; exit 1; }
mount --make-rprivate /
mkdir -p /mnt
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/scratch /mnt/new
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/scratch /mnt/new
cd /mnt/new
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs tmpfs dev; mkdir dev/shm dev/pts
for n in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do IFS=: read -r a b c <<<"$n"; mknod -m 666 "dev/$a" c "$b" "$c"; done
mount -t devpts devpts dev/pts
mount -t tmpfs tmpfs dev/shm; mkdir dev/mqueue dev/hugepages; ln -s /proc/self/fd dev/fd; ln -s fd/0 dev/stdin; ln -s fd/1 dev/stdout; ln -s fd/2 dev/stderr; ln -s pts/ptmx dev/ptmx
for d in run tmp var/tmp; do mount -t tmpfs tmpfs "$d"; done
ip link set lo up
export container=other
mkdir -p /mnt/new/mnt
pivot_root . mnt
umount -l /mnt
exec /lib/systemd/systemd --system --unit=basic.target --log-target=console --log-level=warning --show-status=no
