#!/bin/sh
# An image that is read where it is, every block checked before it is used: the kernel's dm-verity over a loop device.
#
# One file has the file system, zeros up to a multiple of 4096 bytes, and from there on what `veritysetup format IMAGE IMAGE
# --hash-offset=BYTES` writes: the superblock (512 bytes, in a block of its own) and the tree of hashes. Only the root hash is
# believed. The superblock says with which salt and how deep the tree is; whatever it says, a block counts only where its hash
# leads up to the root hash. A lie about the depth would turn hashes into data, or the image's first block into hashes: so that
# block is read, and is looked at, before anything is mounted.
#
# anchor_verity_close takes away what anchor_verity_open made. A stage that names this library in `libs` needs the binaries
# dmsetup and losetup. Needs anchor-report.sh.

ANCHOR_VERITY_NAME=anchor-image
ANCHOR_VERITY_DEVICE="${ANCHOR_ROOT:-}/dev/mapper/$ANCHOR_VERITY_NAME"
# Seconds that anything may take which reads the file: it may be a server's.
ANCHOR_VERITY_LIMIT=30

# usage: anchor_verity_ready
# Loads the drivers; called before the rest. Status 1 where this kernel has no dm-verity.
anchor_verity_ready() {
    local modules="${ANCHOR_ROOT:-}/sys/module"
    # All that can do SHA-256: with the processor's own instructions it takes a fraction of the time.
    if ! [ -d "$modules/loop" ] || ! [ -d "$modules/dm_verity" ]; then
        modprobe -q -a loop dm-verity crypto-sha256 </dev/null >/dev/null 2>&1
    fi
    [ -d "$modules/dm_verity" ]
}

# usage: anchor_verity_open FILE SIZE USED ROOTHASH
# Makes ANCHOR_VERITY_DEVICE of the first USED bytes of FILE, which has SIZE bytes, and reads its first block. Status 1 with a
# report; then nothing is left.
anchor_verity_open() {
    local file="$1" size="$2" root="$4" blocks=$((($3 + 4095) / 4096)) salt loop error
    local says="${ANCHOR_ROOT:-}/run/anchor/verity.error"
    anchor_verity__superblock || return 1
    # What an earlier try left.
    if ! anchor_verity_close; then
        anchor_fail "cannot set up dm-verity: another device $ANCHOR_VERITY_NAME is in use" "see what is mounted from it"
        return 1
    fi
    anchor_verity__detach "$file"
    anchor_verity__hide
    # It may warn of a size that is no multiple of 512, and go on.
    loop=$(timeout -k 2 "$ANCHOR_VERITY_LIMIT" losetup -r -f --show "$file" 2>"$says" </dev/null)
    anchor_recall "$says"
    rm -f "$says"
    case ${loop#/dev/loop} in
        '' | *[!0-9]*)
            anchor_verity__detach "$file"
            anchor_fail "cannot make a loop device of the image: ${anchor_recall:-no answer within $ANCHOR_VERITY_LIMIT s}" \
                "is the file still there, and may this node read it?"
            return 1
            ;;
    esac
    # Without udev: where it runs in the initramfs it has no rules for these devices, and would be waited for in vain.
    if error=$(dmsetup create "$ANCHOR_VERITY_NAME" --readonly --noudevsync --table "0 $((blocks * 8)) verity 1 $loop $loop \
4096 4096 $blocks $((blocks + 1)) sha256 $root $salt" 2>&1 </dev/null); then
        error=
    else
        error=${error:-dmsetup says no more}
    fi
    # It goes now, or with the device that reads it.
    losetup -d "$loop" 2>/dev/null </dev/null
    if [ -n "$error" ]; then
        anchor_verity_close
        anchor_fail "cannot set up dm-verity: ${error%%
*}" "see dmesg for what the kernel says of device-mapper"
        return 1
    fi
    anchor_verity_node && anchor_verity__look && return 0
    anchor_verity_close
    return 1
}

# usage: anchor_verity_close
# Takes the device away, and its loop device with it. What is mounted from it has to be unmounted before. Status 1, with a
# warning, where it is still in use after 5 s.
anchor_verity_close() {
    local until removing
    [ -d "${ANCHOR_ROOT:-}/sys/module/dm_verity" ] || return 0
    anchor_uptime_ms
    until=$((anchor_uptime_ms + 5000))
    while anchor_verity__there; do
        anchor_uptime_ms
        if [ "$anchor_uptime_ms" -ge "$until" ]; then
            anchor_warn "$ANCHOR_VERITY_DEVICE is in use and cannot be taken away"
            return 1
        fi
        # udev, or an unmount that is under way, may have it open for a moment. Beside this shell: with the device goes the
        # last use of an export that was unmounted lazily, and the kernel says good-bye to its server, which may be silent.
        dmsetup remove --noudevsync "$ANCHOR_VERITY_NAME" >/dev/null 2>&1 </dev/null &
        removing=$!
        while kill -0 "$removing" 2>/dev/null && [ "$anchor_uptime_ms" -lt "$until" ]; do
            sleep 0.05
            anchor_uptime_ms
        done
    done
    # Where udev has not made it.
    [ ! -L "$ANCHOR_VERITY_DEVICE" ] || rm -f "$ANCHOR_VERITY_DEVICE"
}

# usage: anchor_verity__detach FILE
# Takes away loop devices of FILE that an earlier try left, broken off before anything used them; one that is used stays.
anchor_verity__detach() {
    local each
    for each in "${ANCHOR_ROOT:-}"/sys/block/loop*/loop/backing_file; do
        anchor_recall "$each"
        each=${each%/loop/backing_file}
        [ "$anchor_recall" != "$1" ] || losetup -d "/dev/${each##*/}" 2>/dev/null </dev/null
    done
}

# usage: anchor_verity__hide
# Keeps udev, here and in the booted system, from looking for file systems and volumes on the loop device itself: what is there
# has not been checked, and whoever serves the file may put there later what looks like a volume of the node's own.
anchor_verity__hide() {
    local dir="${ANCHOR_ROOT:-}/run/udev/rules.d"
    (
        umask 022
        mkdir -p "$dir" && printf '%s, %s, %s\n' \
            'SUBSYSTEM=="block", KERNEL=="loop*", ATTR{loop/backing_file}=="/run/anchor/*"' \
            'ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1", ENV{SYSTEMD_READY}="0"' 'OPTIONS+="nowatch"' \
            >"$dir/00-anchor-image.rules"
    ) 2>/dev/null
}

# usage: anchor_verity__there
# Whether there is a device of our name.
anchor_verity__there() {
    dmsetup info -c --noheadings -o name "$ANCHOR_VERITY_NAME" >/dev/null 2>&1 </dev/null
}

# usage: anchor_verity__superblock
# Reads the superblock, which comes from whoever has the file. Reads file, size and blocks; sets salt, as hexadecimal digits or
# "-" where there is none. Status 1 with a report. The layout is struct verity_sb of cryptsetup (lib/verity/verity.c), numbers
# little-endian: magic at 0, version 8, hash type 12, UUID 16, algorithm 32, data block size 64, hash block size 68, number of
# data blocks 72, size of the salt 80, salt 88.
anchor_verity__superblock() {
    local n level="$blocks" total tree=0
    # shellcheck disable=SC2046 # od prints numbers
    set -- $(LC_ALL=C timeout -k 2 "$ANCHOR_VERITY_LIMIT" od -A n -v -t u1 -j "$((blocks * 4096))" -N 512 "$file" \
        2>/dev/null </dev/null)
    if [ $# -ne 512 ] || [ "$1 $2 $3 $4 $5 $6 $7 $8" != '118 101 114 105 116 121 0 0' ]; then
        anchor_fail "the image has no hash tree behind its file system" \
            "make it with anchor-build image --verity, or with veritysetup format --hash-offset=$((blocks * 4096))"
        return 1
    fi
    shift 8
    if [ "$1.$2.$3.$4 $5.$6.$7.$8" != '1.0.0.0 1.0.0.0' ]; then
        anchor_verity__refuse "it is not of version 1 and hash type 1"
        return 1
    fi
    shift 24
    if [ "$1 $2 $3 $4 $5 $6 $7" != '115 104 97 50 53 54 0' ]; then
        anchor_verity__refuse "its hashes are not SHA-256"
        return 1
    fi
    shift 32
    if [ "$1.$2.$3.$4 $5.$6.$7.$8" != '0.16.0.0 0.16.0.0' ]; then
        anchor_verity__refuse "its blocks are not of 4096 bytes"
        return 1
    fi
    shift 8
    # blocks is below 2^36, so what has a seventh byte is wrong anyway, and no sum overflows.
    total=$(($1 + ($2 << 8) + ($3 << 16) + ($4 << 24) + ($5 << 32) + ($6 << 40)))
    if [ "$7 $8" != '0 0' ] || [ "$total" -ne "$blocks" ]; then
        anchor_verity__refuse "it is not of the $blocks blocks that the file system has"
        return 1
    fi
    n=$((${9} + (${10} << 8)))
    if [ "$n" -gt 256 ]; then
        anchor_verity__refuse "its salt is longer than 256 bytes"
        return 1
    fi
    # A block holds 128 hashes of the level below it, up to the one block whose hash is the root hash.
    while [ "$level" -gt 1 ]; do
        level=$(((level + 127) / 128))
        tree=$((tree + level))
    done
    if [ "$size" -lt $(((blocks + 1 + tree) * 4096)) ]; then
        anchor_verity__refuse "it is cut off: the file has $size bytes, and should have $(((blocks + 1 + tree) * 4096))"
        return 1
    fi
    shift 16
    salt=
    while [ "$n" -gt 0 ]; do
        salt="$salt $1"
        shift
        n=$((n - 1))
    done
    # shellcheck disable=SC2086 # numbers
    [ -z "$salt" ] || salt=$(printf '%02x' $salt)
    salt=${salt:--}
}

# usage: anchor_verity__refuse WHY
# Always returns 1.
anchor_verity__refuse() {
    anchor_fail "the image's hash tree cannot be used: $1" \
        "make the image anew: anchor-build image --verity"
}

# usage: anchor_verity_node
# Sees to it that ANCHOR_VERITY_DEVICE leads to the device: dmsetup makes it, unless it leaves that to udev. Status 1 with a
# report.
anchor_verity_node() {
    local file tries=50
    while [ ! -e "$ANCHOR_VERITY_DEVICE" ]; do
        if [ "$tries" -eq 0 ]; then
            anchor_fail "dm-verity was set up, but $ANCHOR_VERITY_DEVICE does not appear" "see dmesg"
            return 1
        fi
        for file in "${ANCHOR_ROOT:-}"/sys/block/dm-*/dm/name; do
            anchor_recall "$file"
            [ "$anchor_recall" = "$ANCHOR_VERITY_NAME" ] || continue
            file=${file%/dm/name}
            mkdir -p "${ANCHOR_VERITY_DEVICE%/*}" && ln -sfn "../${file##*/}" "$ANCHOR_VERITY_DEVICE"
        done
        tries=$((tries - 1))
        sleep 0.1
    done
}

# usage: anchor_verity__look
# Reads the first block, which shows whether this is the image of the root hash.
anchor_verity__look() {
    anchor_verity_within dd if="$ANCHOR_VERITY_DEVICE" of=/dev/null bs=4096 count=1 iflag=fullblock >/dev/null 2>&1
    case $? in
        0) ;;
        124) anchor_verity_silent read ;;
        *)
            anchor_fail "the image is not the one of the root hash $root: its first block does not check out" \
                "someone changed the file, or the root hash is that of another version; dmesg has the kernel's words"
            ;;
    esac
}

# usage: anchor_verity_within COMMAND [ARGUMENT...]
# Runs what reads the device, and returns its status, or 124 where it has not ended after ANCHOR_VERITY_LIMIT seconds. Not by
# timeout(1): who reads a device below which a server has fallen silent does not end even when it is killed. Its output may
# not go through a pipe, at whose other end somebody waits for it.
anchor_verity_within() {
    local until running
    anchor_uptime_ms
    until=$((anchor_uptime_ms + ANCHOR_VERITY_LIMIT * 1000))
    "$@" </dev/null &
    running=$!
    while kill -0 "$running" 2>/dev/null && [ "$anchor_uptime_ms" -lt "$until" ]; do
        sleep 0.02
        anchor_uptime_ms
    done
    ! kill -KILL "$running" 2>/dev/null || return 124
    wait "$running"
}

# usage: anchor_verity_silent WHAT
# Says that there was no answer when the image was WHAT. Always returns 1.
anchor_verity_silent() {
    anchor_fail "no answer within $ANCHOR_VERITY_LIMIT s when the image was $1" "does its server still run?"
}
