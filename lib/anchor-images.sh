#!/bin/sh
# Container images that the initramfs brings along (anchor-build initramfs --embed-image), handed to the booted system as
# an OCI layout in /run/anchor/images.
#
# They are one squashfs in /etc/anchor. A loop device holds that file open: when switch_root empties the initramfs its
# name goes, and its bytes stay where they are. So they are in memory once, and nothing is copied.

# usage: anchor_images_run
# Mounts the images read-only. Safe to repeat. Nobody unmounts them: they belong to the booted system. Status 0 or 1.
anchor_images_run() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/images" error
    ! anchor_mounted "$dir" || return 0
    [ -d /sys/module/loop ] || modprobe -q loop 2>/dev/null
    error=$({ mkdir -p "$dir" &&
        mount -t squashfs -o loop,ro,nosuid,nodev,noexec "${ANCHOR_ROOT:-}/etc/anchor/images.squashfs" "$dir"; } 2>&1) && return 0
    anchor_fail "cannot mount the container images that are in the initramfs: $error" \
        "does this kernel have loop and squashfs with zstd? (see dmesg)"
    return 1
}
