#!/bin/busybox sh
# The guest's first process. ROLE, FS, EXECUTOR, SEED and DURABLE come from the kernel's command line.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
while read -r module; do insmod "$module"; done </modules
mkdir -p /disk
case "$ROLE" in
    node)
        export BEDPLATE_SOCKET=/run/bedplate.sock
        mount -t "$FS" /dev/vda /disk
        bedplate serve --state /run/state --disk /disk --mount /run/mount --executor "$EXECUTOR" --fuse-transport classic &
        bedplate-power volumes --seed "$SEED" --volumes /run/mount/volumes --notes /dev/vdb
        ;;
    files) bedplate-power files --seed "$SEED" --fs "$FS" --device /dev/vda --notes /dev/vdb --durable "$DURABLE" ;;
esac
# It ends only when something fails; the host sees the machine end, and reads why.
echo "the load has ended"
poweroff -f
