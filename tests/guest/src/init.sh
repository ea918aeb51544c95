#!/bin/busybox sh
# First process of a test guest. Loads the modules, then runs what the host asks for, each command in a process of its
# own, so that one that hangs holds up nothing else.
#
# The host writes one line per command to the virtio port: ID SECONDS BASE64-OF-A-SHELL-SCRIPT. The answer, in any
# order: a line "= ID STATUS", the output (standard output and error together) as base64, and a line with a dot.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/jobs
# Messages of level warning and worse reach the console: that is where the host looks for trouble.
dmesg -n 5

for module in $(cat /modules/boot); do
    insmod "/modules/$module.ko" || echo "init: cannot load $module" >/dev/console
done

port=/dev/vport0p1
until [ -c "$port" ]; do usleep 5000; done
exec 8<>"$port"

mkfifo /run/done
exec 7<>/run/done
while read -r id status <&7; do
    echo "= $id $status"
    [ -f "/run/jobs/$id.out" ] && base64 "/run/jobs/$id.out"
    echo .
    rm -f "/run/jobs/$id.out" "/run/jobs/$id"
done >&8 &

echo "0 0" >&7
while :; do
    # No line means that the host's end is not connected yet.
    read -r id seconds script <&8 || { usleep 20000; continue; }
    (
        exec </dev/null
        echo "$script" | base64 -d >"/run/jobs/$id"
        timeout -s KILL "$seconds" sh "/run/jobs/$id" >"/run/jobs/$id.out" 2>&1
        echo "$id $?" >&7
    ) &
done
