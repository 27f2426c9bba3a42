#!/bin/sh
# Which disk is meant, whether it may be written to, and what an earlier install left on it. Nothing here writes.
#
# Two marks of our own lie on disks, each one sector of text:
#   sector 0, while an install runs   "anchor-disk-unfinished 1": takes the place of the boot record until all else is right
#   a sector that no partition has    "anchor-disk 1": what was installed (see anchor_disk__place)
# shellcheck disable=SC2154 # anchor_disk_* are the stage's parameters, anchor_recall and others are set by the core

ANCHOR_DISK_HEAD=1048576 # bytes at the beginning that are written last; partitions begin behind them
ANCHOR_DISK_UNFINISHED='anchor-disk-unfinished 1'
ANCHOR_DISK_RECORD='anchor-disk 1'

# usage: anchor_disk__target
# Waits for the disk that $anchor_disk_target means, at most $anchor_disk_timeout seconds. Sets anchor_disk__name (the
# kernel's), anchor_disk__device and anchor_disk__size (bytes).
anchor_disk__target() {
    local until names='' settled=''
    anchor_uptime_ms
    until=$((anchor_uptime_ms + anchor_disk_timeout * 1000))
    while :; do
        case $anchor_disk_target in
            /*) anchor_disk__by_path || return 1 ;;
            serial:* | wwn:*) anchor_disk__each anchor_disk__by_identity ;;
            *)
                # Which one is the smallest is known when all are there.
                [ -n "$settled" ] || udevadm settle --timeout="$anchor_disk_timeout" 2>/dev/null
                settled=1
                anchor_disk__by_rule
                ;;
        esac
        [ -z "$names" ] || break
        anchor_uptime_ms
        if [ "$anchor_uptime_ms" -ge "$until" ]; then
            anchor_disk__list
            anchor_fail "no disk is $anchor_disk_target after $anchor_disk_timeout s; there are:${anchor_disk__list:- none}" \
                "check rd.anchor.disk.target, and that the initramfs has the driver of the disk's controller"
            return 1
        fi
        sleep 0.2
    done
    case $names in
        ' '*' '*)
            anchor_fail "several disks are $anchor_disk_target:$names" \
                "name one: rd.anchor.disk.target=/dev/disk/by-id/..., serial:... or wwn:..."
            return 1
            ;;
    esac
    anchor_disk__name=${names# }
    anchor_disk__device="${ANCHOR_ROOT:-}/dev/$anchor_disk__name"
    anchor_recall "${ANCHOR_ROOT:-}/sys/class/block/$anchor_disk__name/size"
    # Always in units of 512 bytes, whatever the disk's sectors are.
    anchor_disk__size=$((${anchor_recall:-0} * 512))
    anchor_note disk "$anchor_disk__name"
    anchor_note_number disk_bytes "$anchor_disk__size"
    anchor_disk__is_disk
}

# usage: anchor_disk__by_path
# Adds the disk whose device file or link has the path to names; nothing while it is not there. Status 1 when it is no disk.
anchor_disk__by_path() {
    local path="${ANCHOR_ROOT:-}$anchor_disk_target" number
    [ -e "$path" ] || return 0
    if [ ! -b "$path" ]; then
        anchor_fail "$anchor_disk_target is not a disk but a $(stat -L -c %F "$path")" "check rd.anchor.disk.target"
        return 1
    fi
    number=$(stat -L -c '%t %T' "$path") || return 1
    number=$((0x${number% *})):$((0x${number#* }))
    anchor_disk__each anchor_disk__by_number partitions
}

# usage: anchor_disk__by_number NAME
anchor_disk__by_number() {
    anchor_recall "${ANCHOR_ROOT:-}/sys/class/block/$1/dev"
    [ "$anchor_recall" != "$number" ] || names="$names $1"
}

# usage: anchor_disk__each FUNCTION [partitions]
# Calls FUNCTION with the name of each disk of this node. What the kernel makes of other disks, or of memory, counts
# only, as partitions do, with the second argument.
anchor_disk__each() {
    local each
    for each in "${ANCHOR_ROOT:-}/sys/class/block"/*; do
        [ -e "$each/dev" ] || continue
        case ${2:-}:${each##*/} in
            :loop* | :ram* | :zram* | :sr* | :fd* | :md* | :dm-* | :nbd* | :mtdblock* | :drbd* | :bcache*) continue ;;
        esac
        [ -n "${2:-}" ] || [ ! -e "$each/partition" ] || continue
        "$1" "${each##*/}"
    done
}

# usage: anchor_disk__by_identity NAME
# Adds NAME to names if its serial number or WWN is the wanted one. Two paths to one disk are two disks here.
anchor_disk__by_identity() {
    local wanted="${anchor_disk_target#*:}" each
    anchor_disk__identities "$1" "${anchor_disk_target%%:*}"
    anchor_disk__plain_wwn "$wanted"
    for each in $anchor_disk__identities; do
        case $anchor_disk_target in
            wwn:*)
                wanted=$anchor_disk__wwn
                anchor_disk__plain_wwn "$each"
                each=$anchor_disk__wwn
                anchor_disk__wwn=$wanted
                ;;
        esac
        [ "$each" = "$wanted" ] || continue
        names="$names $1"
        return
    done
}

# usage: anchor_disk__plain_wwn TEXT
# Sets anchor_disk__wwn: a WWN without the prefix that programs put before it (0x, naa., eui., t10.), in lower case.
anchor_disk__plain_wwn() {
    anchor_type__lower "$1"
    anchor_disk__wwn=${anchor_value#0x}
    anchor_disk__wwn=${anchor_disk__wwn#naa.}
    anchor_disk__wwn=${anchor_disk__wwn#eui.}
}

# usage: anchor_disk__identities NAME serial|wwn
# Sets anchor_disk__identities: what the kernel (virtio, NVMe) and udev (all others) say of the disk, blanks as _.
anchor_disk__identities() {
    local sys="${ANCHOR_ROOT:-}/sys/class/block/$1" file line files keys
    case $2 in
        serial)
            files="$sys/serial $sys/device/serial"
            keys=' ID_SERIAL_SHORT ID_SCSI_SERIAL ID_SERIAL '
            ;;
        *)
            files="$sys/wwid $sys/device/wwid"
            keys=' ID_WWN ID_WWN_WITH_EXTENSION '
            ;;
    esac
    anchor_disk__identities=
    for file in $files; do
        anchor_recall "$file"
        anchor_disk__add "$anchor_recall"
    done
    anchor_recall "$sys/dev"
    file="${ANCHOR_ROOT:-}/run/udev/data/b$anchor_recall"
    [ -r "$file" ] || return 0
    while IFS= read -r line; do
        case $line in
            E:*=*)
                line=${line#E:}
                case $keys in
                    *" ${line%%=*} "*) anchor_disk__add "${line#*=}" ;;
                esac
                ;;
        esac
    done <"$file"
}

# usage: anchor_disk__add TEXT
# Adds TEXT to anchor_disk__identities as one word, without the blanks that pad it.
anchor_disk__add() {
    local text="${1#"${1%%[! ]*}"}"
    text=${text%"${text##*[! ]}"}
    while [ "$text" != "${text#* }" ]; do
        text=${text%% *}_${text#* }
    done
    # A pattern in it must not become the names of files.
    case $text in
        '' | *[*?[]*) ;;
        *) anchor_disk__identities="$anchor_disk__identities $text" ;;
    esac
}

# usage: anchor_disk__by_rule
# Sets names to the non-removable disk that the rule chooses, or to all among which it cannot choose.
anchor_disk__by_rule() {
    local best=''
    names=
    anchor_disk__each anchor_disk__compare
}

# usage: anchor_disk__compare NAME
anchor_disk__compare() {
    local sys="${ANCHOR_ROOT:-}/sys/class/block/$1" size
    anchor_recall "$sys/removable"
    [ "$anchor_recall" = 0 ] || return 0
    anchor_recall "$sys/size"
    size=${anchor_recall:-0}
    [ "$size" -gt 0 ] || return 0
    case $anchor_disk_target:$((size > ${best:-$size})):$((size < ${best:-$size})) in
        smallest:1:* | largest:*:1) return 0 ;;
        smallest:*:1 | largest:1:*) names= ;;
    esac
    best=$size
    names="$names $1"
}

# usage: anchor_disk__list
# Sets anchor_disk__list: the disks that are there, for a message.
anchor_disk__list() {
    anchor_disk__list=
    anchor_disk__each anchor_disk__list_one
}

# usage: anchor_disk__list_one NAME
anchor_disk__list_one() {
    anchor_recall "${ANCHOR_ROOT:-}/sys/class/block/$1/size"
    anchor_fetch_amount $((${anchor_recall:-0} * 512))
    anchor_disk__identities "$1" serial
    anchor_disk__list="$anchor_disk__list $1 ($anchor_fetch_amount${anchor_disk__identities:+, serial${anchor_disk__identities}})"
}

# usage: anchor_disk__is_disk
# Refuses what can be no target, whatever is on it.
anchor_disk__is_disk() {
    local sys="${ANCHOR_ROOT:-}/sys/class/block/$anchor_disk__name"
    if [ -e "$sys/partition" ]; then
        anchor_fail "$anchor_disk_target is a partition, not a disk" "an image is of a whole disk: name the disk"
        return 1
    fi
    anchor_recall "$sys/ro"
    if [ "$anchor_recall" = 1 ]; then
        anchor_fail "$anchor_disk__name is read-only" "see its write protection, or choose another disk"
        return 1
    fi
    [ "$anchor_disk__size" -gt 0 ] && return 0
    anchor_fail "$anchor_disk__name has no size: there is no medium in it" "choose another disk"
}

# usage: anchor_disk__unused
# Refuses a disk that is in use: mounted, swapped to, or a part of what md, LVM, dm-crypt, multipath or bcache make.
anchor_disk__unused() {
    local sys="${ANCHOR_ROOT:-}/sys/class/block/$anchor_disk__name" each name numbers=' ' id parent dev root dir rest used=''
    for each in "$sys" "$sys/$anchor_disk__name"*; do
        [ -e "$each/dev" ] || continue
        name=${each##*/}
        anchor_recall "$each/dev"
        numbers="$numbers$anchor_recall "
        for rest in "$each"/holders/*; do
            [ ! -e "$rest" ] || used="$used; $name is a part of ${rest##*/}"
        done
        while read -r dev rest; do
            [ "$dev" != "/dev/$name" ] || used="$used; $name is swap"
        done <"${ANCHOR_ROOT:-}/proc/swaps"
    done
    while read -r id parent dev root dir rest; do
        case $numbers in
            *" $dev "*) used="$used; it is mounted on $dir" ;;
        esac
    done <"${ANCHOR_ROOT:-}/proc/self/mountinfo"
    [ -n "$used" ] || return 0
    anchor_fail "$anchor_disk__name is in use: ${used#; }" "nothing may use the disk that an image is written to"
}

# usage: anchor_disk__permitted
# Whether what is on the disk may go. Reads anchor_disk_overwrite. Sets anchor_disk__used to 1 where something is on it.
anchor_disk__permitted() {
    local line type held='' partition=''
    anchor_disk__used=1
    anchor_disk__sector 0
    if [ "$anchor_disk__first" = "$ANCHOR_DISK_UNFINISHED" ]; then
        anchor_info "an earlier install on $anchor_disk__name was cut off: it begins again"
        anchor_note resumed "an install that was cut off"
        return 0
    fi
    for line in "${ANCHOR_ROOT:-}/sys/class/block/$anchor_disk__name/$anchor_disk__name"*; do
        [ ! -e "$line/partition" ] || partition="partitions"
    done
    if ! type=$(LC_ALL=C wipefs -p "$anchor_disk__device" 2>&1); then
        anchor_fail "cannot see what is on $anchor_disk__name: ${type##*: }" "see dmesg: the disk may be broken"
        return 1
    fi
    while IFS= read -r line; do
        case $line in
            '' | \#*) continue ;;
        esac
        line=${line##*,}
        case " $held " in
            *" $line "*) ;;
            *) held="$held${held:+ }$line" ;;
        esac
    done <<EOT
$type
EOT
    held=${held:-$partition}
    if [ -z "$held" ]; then
        anchor_disk__used=
        return 0
    fi
    case $anchor_disk_overwrite:${anchor_disk__recorded:+1} in
        always:* | installed:1) return 0 ;;
        *:1)
            anchor_fail "$anchor_disk__name holds another image, which this node installed: $anchor_disk__recorded" \
                "rd.anchor.disk.overwrite=installed replaces it and all that was written since"
            ;;
        *)
            anchor_fail "$anchor_disk__name holds data: $held" \
                "rd.anchor.disk.overwrite=always destroys it; or empty the disk (wipefs -a), or choose another"
            ;;
    esac
}

# usage: anchor_disk__sector OFFSET
# Reads 512 bytes of the disk into the file sector; sets anchor_disk__first to their first line if they are text of ours.
anchor_disk__sector() {
    anchor_disk__first=
    dd if="$anchor_disk__device" of="$anchor_disk__dir/sector" bs=512 count=1 skip="$1" iflag=skip_bytes 2>/dev/null || return 1
    # To read a boot record as text would bring warnings about its zeros.
    # shellcheck disable=SC2046 # od prints numbers
    set -- $(od -A n -t u1 -N 11 "$anchor_disk__dir/sector")
    [ "$*" != '97 110 99 104 111 114 45 100 105 115 107' ] || IFS= read -r anchor_disk__first <"$anchor_disk__dir/sector"
}

# usage: anchor_disk__recognise
# Whether what is wanted is installed already: a record says so, and the partition table is of the kind that was written.
# Sets anchor_disk__recorded to what the record says, if there is one of a disk that can be booted. Reads sha256 and urls.
anchor_disk__recognise() {
    local offset key value digest raw kind url at=''
    anchor_disk__recorded=
    anchor_disk__sector 0
    [ "$anchor_disk__first" != "$ANCHOR_DISK_UNFINISHED" ] || return 1
    for offset in $((ANCHOR_DISK_HEAD - 512)) $((anchor_disk__size - 4096)); do
        anchor_disk__sector "$offset" || continue
        [ "$anchor_disk__first" != "$ANCHOR_DISK_RECORD" ] || at=$offset
        [ -z "$at" ] || break
    done
    [ -n "$at" ] || return 1
    digest='' raw='' kind='' url=''
    while read -r key value; do
        case $key in
            sha256) digest=$value ;;
            raw_sha256) raw=$value ;;
            kind) kind=$value ;;
            url) url=$value ;;
        esac
    done <"$anchor_disk__dir/sector"
    # Somebody who emptied the disk, by wipefs for example, left the record alone.
    dd if="$anchor_disk__device" of="$anchor_disk__dir/sector" bs=1024 count=1 2>/dev/null || return 1
    anchor_disk__kind "$anchor_disk__dir/sector"
    [ "$anchor_disk__kind" = "$kind" ] || return 1
    [ "$kind" != none ] || blkid -p "$anchor_disk__device" >/dev/null 2>&1 || return 1
    anchor_disk__recorded="sha256 $digest from $url"
    if [ -n "$sha256" ]; then
        [ "$digest" = "$sha256" ]
    elif [ -n "$anchor_disk_raw_sha256" ]; then
        [ "$raw" = "$anchor_disk_raw_sha256" ]
    else
        anchor_disk__plain_url
        [ "$url" = "$anchor_disk__url" ]
    fi
}

# usage: anchor_disk__plain_url
# Sets anchor_disk__url: the first of urls as the record has it, without what may be secret, and not longer than it may be.
anchor_disk__plain_url() {
    anchor_fetch_plain "${urls%% *}"
    anchor_disk__url=$(printf '%.200s' "$anchor_fetch_url")
}

# usage: anchor_disk__kind FILE
# Sets anchor_disk__kind to the kind of partition table in FILE's first KiB: gpt, dos or none. A boot record ends with
# 55 AA; a GPT header begins with "EFI PART" in sector 1 (UEFI specification, 5.3).
anchor_disk__kind() {
    local mark header
    mark=$(od -A n -t x1 -j 510 -N 2 "$1" 2>/dev/null)
    header=$(od -A n -t x1 -j 512 -N 8 "$1" 2>/dev/null)
    anchor_disk__kind=none
    [ "$mark" = ' 55 aa' ] || return 0
    anchor_disk__kind=dos
    [ "$header" != ' 45 46 49 20 50 41 52 54' ] || anchor_disk__kind=gpt
}

# usage: anchor_disk__needs FILE
# Sets anchor_disk__needs: how many bytes the disk must have by the GPT header in FILE, where its copy lies at the very end
# (eight bytes at 32); or 0.
anchor_disk__needs() {
    anchor_disk__needs=0
    [ "$anchor_disk__kind" = gpt ] || return 0
    # shellcheck disable=SC2046 # od prints numbers
    set -- $(od -A n -t u8 -j 544 -N 8 "$1")
    case ${1:-} in
        '' | *[!0-9]* | ????????????????*) ;;
        *) anchor_disk__needs=$((($1 + 1) * 512)) ;;
    esac
}

# usage: anchor_disk__place FILE BYTES
# Sets anchor_disk__place: where the record can lie so that nothing of an image of BYTES, which begins as FILE does, is
# touched. That is the last sector before the first partition, if no partition has it and the image has nothing but zeros
# there: boot loaders begin at the other end of that gap, and tools that grow partitions do not move it. Or else near the
# end of a disk that is larger than the image. Empty if there is no place.
anchor_disk__place() {
    local a b c d start rest zeros
    anchor_disk__place=$((ANCHOR_DISK_HEAD - 512))
    zeros=$(od -A n -v -t x1 -j "$anchor_disk__place" -N 512 "$1")
    case $zeros in
        *[!0[:space:]]*) anchor_disk__place= ;;
    esac
    if [ "$anchor_disk__kind" = none ] || [ "$2" -lt "$ANCHOR_DISK_HEAD" ]; then
        anchor_disk__place=
    elif [ "$anchor_disk__kind" = gpt ]; then
        # Entries of 128 bytes, most often in the sectors 2 to 33: their type is 16 bytes, their first sector 8 at 32.
        # shellcheck disable=SC2046 # od prints numbers
        set -- "$1" "$2" $(od -A n -t u4 -j 584 -N 16 "$1")
        [ "$3:$4:$6" = 2:0:128 ] && [ "$5" -le 1024 ] || anchor_disk__place=
        while [ -n "$anchor_disk__place" ] && read -r a b c d start rest; do
            [ "$a:$b" != 0:0 ] || continue
            case $start in
                ? | ?? | ??? | 0* | 1??? | 20[0-3]? | 204[0-7]) anchor_disk__place= ;;
            esac
        done <<EOT
$(od -A n -v -w128 -t u8 -j 1024 -N $(($5 * 128)) "$1")
EOT
    else
        # Four entries of 16 bytes: the type at 4, the first sector at 8.
        while read -r a b c d; do
            # Little-endian: the type is the lowest byte of the second number.
            [ $((b % 256)) -eq 0 ] || [ "$c" -ge 2048 ] || anchor_disk__place=
        done <<EOT
$(od -A n -v -w16 -t u4 -j 446 -N 64 "$1")
EOT
    fi
    [ -z "$anchor_disk__place" ] || return 0
    [ $((anchor_disk__size - 4096)) -lt "$2" ] || anchor_disk__place=$((anchor_disk__size - 4096))
}
