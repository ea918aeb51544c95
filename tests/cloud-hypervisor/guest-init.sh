#!/bin/busybox sh
# First process of the guest. Commands come as files in the directory that the device shows: N.sh, then N.go; the answer
# is N.out, then N.status. A device that says EIO has forgotten this guest: it is mounted again.
export PATH=/bin HOME=/
/bin/busybox mkdir -p /proc /sys /dev /mnt/shared /mnt/second
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/boot); do
    insmod "/modules/$module.ko" || echo "init: cannot load $module" >/dev/console
done
until mount -t virtiofs shared /mnt/shared; do usleep 100000; done
run=/mnt/shared/.run
echo booted >>$run/boots
number=1
while [ -e $run/$number.status ]; do number=$((number + 1)); done
while :; do
    until [ -e $run/$number.go ]; do
        usleep 20000
        ls $run >/dev/null 2>&1 || { umount -l /mnt/shared; mount -t virtiofs shared /mnt/shared; }
    done
    script=$run/$number
    number=$((number + 1))
    (
        sh $script.sh >$script.out 2>&1
        echo $? >$script.part
        mv $script.part $script.status
    ) &
done
