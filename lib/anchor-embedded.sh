#!/bin/sh
# Container images that the initramfs brings along (anchor-build initramfs --embed-image), handed to the booted system as
# an OCI layout in /run/anchor/images.
#
# They are one squashfs in /etc/anchor. A loop device holds that file open: when switch_root empties the initramfs its
# name goes, and its bytes stay where they are. So they are in memory once, and nothing is copied.
#
# Needs anchor-report.sh and anchor-mounts.sh.
# shellcheck disable=SC2154 # anchor_mount_error is set by anchor_mount_file

# usage: anchor_embedded_run
# Mounts the images read-only. Safe to repeat. Nobody unmounts them: they belong to the booted system. Status 0 or 1.
anchor_embedded_run() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/images"
    ! anchor_mounted "$dir" || return 0
    anchor_mount_file squashfs "${ANCHOR_ROOT:-}/etc/anchor/images.squashfs" "$dir" nosuid,nodev,noexec && return 0
    anchor_fail "cannot mount the container images that are in the initramfs: $anchor_mount_error" \
        "does this kernel have loop and squashfs with zstd? (see dmesg)"
    return 1
}
