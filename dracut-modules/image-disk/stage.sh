#!/bin/sh
# Write an image of a whole disk to a disk of the node, as it comes, and prove that it is there.
#
# What makes a disk bootable is written last. The first MiB of the image is kept back, and a mark of ours lies in sector 0
# meanwhile; then comes everything else, and is read back from the disk behind the writer. When the digests of what came
# and of what lies there are right, the MiB is written, read back, and at the very end sector 0. So whatever ends an
# install, a wrong image or a power cut, leaves a disk that nothing boots from, and that the next boot knows for its own.
# shellcheck disable=SC2154 # anchor_disk_* are this stage's parameters, anchor_recall and others are set by the core

ANCHOR_DISK_CHUNK=33554432 # bytes that are written before they are read back
ANCHOR_DISK_ANSWER_S=300

# usage: anchor_disk_run
# Sees to it that the wanted image is on the disk, and says how the boot goes on. Safe to repeat.
anchor_disk_run() {
    anchor_untraced anchor_disk__run
}

# usage: anchor_disk__run
# The same, traced: a URL may hold a password.
anchor_disk__run() {
    local anchor_disk__dir="${ANCHOR_ROOT:-}/run/anchor/disk" anchor_registry_user='' anchor_registry_password='' urls sha256="$anchor_disk_sha256" size=''
    anchor_fetch_mirrors "$anchor_disk_url" "$anchor_disk_mirrors"
    urls=$anchor_fetch_urls
    if [ -n "${anchor_manifest_urls:-}" ]; then
        urls=$anchor_manifest_urls
        sha256=$anchor_manifest_sha256
        size=$anchor_manifest_size
    fi
    case $anchor_disk_then:$anchor_disk_installed in
        *kexec*) anchor_disk__kexec_possible || return 1 ;;
    esac
    if ! rm -rf "${anchor_disk__dir:?}" || ! mkdir -m 700 "$anchor_disk__dir"; then
        anchor_fail "cannot write to $anchor_disk__dir" "is /run full?"
        return 1
    fi
    anchor_disk__target || return 1
    [ -n "$urls" ] || anchor_disk__reference || return 1
    if anchor_disk__recognise; then
        anchor_info "$anchor_disk__name has the image already: $anchor_disk__recorded"
        anchor_note installed already
        anchor_disk__finish "$anchor_disk_installed"
        return
    fi
    anchor_disk__unused && anchor_disk__permitted && anchor_disk__confirmed && anchor_disk__install || return 1
    anchor_note installed now
    anchor_disk__finish "$anchor_disk__then"
}

# usage: anchor_disk__reference
# Asks the registry what $anchor_disk_tag means; of $anchor_disk_blob all is known. Sets urls (for people), sha256 and, of a
# tag, size.
anchor_disk__reference() {
    local reference="$anchor_disk_tag$anchor_disk_blob" scheme=https digest bytes type
    [ "$anchor_disk_allow_no_tls" != 1 ] || scheme=http
    case $reference in
        *[!A-Za-z0-9._:/@\[\]-]*)
            anchor_fail "the reference of the image has a character that none has" "write REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST"
            return 1
            ;;
    esac
    anchor_oci_open "$anchor_disk__dir/oci" "$scheme://$reference" || return 1
    urls=$scheme://$reference
    if [ -n "$anchor_disk_blob" ]; then
        digest=$anchor_oci_digest
        if [ -z "$digest" ]; then
            anchor_fail "rd.anchor.disk.blob names no blob" "write REGISTRY/NAME@sha256:DIGEST, or use rd.anchor.disk.tag"
            return 1
        fi
    else
        anchor_oci_resolve || return 1
        if [ "$anchor_oci_count" -ne 1 ]; then
            anchor_fail "$reference has $anchor_oci_count layers: which one is the image?" "publish it as an artifact with one layer"
            return 1
        fi
        read -r digest bytes type <"$anchor_oci_dir/layers"
        case $type in
            *tar*)
                anchor_fail "$reference is a container image ($type), not the image of a disk" "publish the disk as an artifact with one layer"
                return 1
                ;;
        esac
        size=$bytes
    fi
    if [ -n "$sha256" ] && [ "$sha256" != "$digest" ]; then
        anchor_fail "$reference is another image: its digest is $digest, expected $sha256" "see rd.anchor.disk.sha256"
        return 1
    fi
    sha256=$digest
}

# usage: anchor_disk__fetch
# Brings the image to the sink. Reads urls, sha256 and size.
anchor_disk__fetch() {
    if [ -n "$anchor_disk_tag$anchor_disk_blob" ]; then
        anchor_oci_stream "$sha256" "$size" "$anchor_disk__dir/stream" anchor_disk__sink
    else
        anchor_fetch_stream "$urls" "$anchor_disk__dir/stream" "$sha256" "$size" anchor_disk__sink
    fi
}

# usage: anchor_disk__finish reboot|poweroff|boot|kexec
anchor_disk__finish() {
    case $1 in
        kexec) anchor_disk__kexec && anchor_finish kexec ;;
        boot)
            anchor_keep "$anchor_disk__dir/boot" "$anchor_disk__name"
            anchor_finish root
            ;;
        *) anchor_finish "$1" ;;
    esac
}

# usage: anchor_disk__confirmed
# Whether nobody had to be asked, or somebody said yes.
anchor_disk__confirmed() {
    local answer='' console="${ANCHOR_ROOT:-}/dev/console"
    [ "$anchor_disk_ask" = 1 ] || return 0
    anchor_disk__list
    anchor_info "disks:$anchor_disk__list"
    printf '\nanchor: everything on %s will be overwritten. Type its name to go on: ' "$anchor_disk__name" >"$console"
    answer=$(timeout --foreground "$ANCHOR_DISK_ANSWER_S" head -n 1 <"$console")
    [ "$answer" != "$anchor_disk__name" ] || return 0
    anchor_fail "nobody confirmed that $anchor_disk__name may be overwritten" \
        "type $anchor_disk__name when asked, or leave out rd.anchor.disk.ask"
}

# usage: anchor_disk__install
# Fetches, writes, verifies. Sets anchor_disk__then: what may follow. Reads urls, sha256 and size.
anchor_disk__install() {
    local anchor_fetch_limit="$((anchor_disk__size + anchor_disk__size / 1000 + 1048576))" anchor_fetch_limit_why amount
    local anchor_disk__bytes anchor_disk__sum rest
    anchor_fetch_amount "$anchor_disk__size"
    amount=$anchor_fetch_amount
    anchor_fetch_limit_why="$anchor_disk__name has $amount"
    anchor_info "writing ${urls##*/} to $anchor_disk__name ($amount)"
    anchor_disk__fetch || return 1
    anchor_recall "$anchor_disk__dir/bytes"
    anchor_disk__bytes=$anchor_recall
    read -r anchor_disk__sum rest <"$anchor_disk__dir/raw.sha256"
    anchor_note raw_sha256 "$anchor_disk__sum"
    anchor_note_number raw_bytes "$anchor_disk__bytes"
    if [ -n "$anchor_disk_raw_sha256" ] && [ "$anchor_disk__sum" != "$anchor_disk_raw_sha256" ]; then
        anchor_fail "the unpacked image is not what it should be: its SHA-256 digest is $anchor_disk__sum, expected \
$anchor_disk_raw_sha256" "see whether rd.anchor.disk.raw_sha256 is of another version; the disk cannot be booted from"
        return 1
    fi
    read -r rest amount <"$anchor_disk__dir/back.sha256"
    if [ "$rest" != "$anchor_disk__sum" ]; then
        anchor_fail "$anchor_disk__name does not hold what was written to it: the SHA-256 digest of what it gives back is \
$rest, and was $anchor_disk__sum" "the disk or its controller is broken; the disk cannot be booted from"
        return 1
    fi
    anchor_disk__complete
}

# usage: anchor_disk__sink <STREAM
# Unpacks the image and writes it, but for its beginning. Leaves in the directory: head (the beginning), bytes, raw.sha256
# (of the unpacked image) and back.sha256 (of head, and of what the disk gave back).
anchor_disk__sink() {
    local dir="$anchor_disk__dir" unpack reader status why
    rm -f "$dir/magic" "$dir/raw" "$dir/why" "$dir/hint" "$dir/unpacked" "$dir/unpack-error" "$dir/bytes" "$dir/head"
    dd of="$dir/magic" bs=6 count=1 iflag=fullblock 2>/dev/null && mkfifo -m 600 "$dir/raw" || return 2
    case $(od -A n -t x1 "$dir/magic") in
        ' 1f 8b'*) unpack='gzip -dc' ;;
        ' 28 b5 2f fd'*) unpack='zstd -dcq' ;;
        ' fd 37 7a 58 5a 00') unpack='xz -dc' ;;
        *) unpack='cat' ;;
    esac
    anchor_note packed "${unpack%% *}"
    if ! command -v "${unpack%% *}" >/dev/null; then
        anchor_fail "the image is packed with ${unpack%% *}, which is not in the initramfs" "install it where the initramfs is built"
        return 2
    fi
    anchor_fetch_digest <"$dir/raw" >"$dir/raw.sha256" &
    reader=$!
    {
        cat "$dir/magic" - | {
            # shellcheck disable=SC2086 # a program and its options
            $unpack 2>"$dir/unpack-error"
            printf '%s\n' "$?" >"$dir/unpacked"
        }
    } | tee "$dir/raw" | anchor_disk__write | anchor_disk__read_back | anchor_fetch_digest >"$dir/back.sha256"
    wait "$reader"
    anchor_recall "$dir/unpacked"
    status=${anchor_recall:-1}
    anchor_recall "$dir/why"
    why=$anchor_recall
    # What looks wrong may have been cut off; and who writes to nobody ends by SIGPIPE (13).
    case $status:$why in
        0:1:* | 141:1:*) ;;
        *:1:*) why='' ;;
    esac
    if [ -n "$why" ]; then
        anchor_recall "$dir/hint"
        anchor_fail "${why#*:}" "$anchor_recall"
        return "${why%%:*}"
    fi
    [ "$status" -ne 0 ] || return 0
    while IFS= read -r why; do
        [ -z "$why" ] || break
    done <"$dir/unpack-error"
    anchor_fail "${unpack%% *} cannot unpack it: ${why:-status $status}" "publish the image anew"
}

# usage: anchor_disk__cannot STATUS WHY [HINT]
# Says why writing ended, for anchor_disk__sink in another process. Returns 1.
anchor_disk__cannot() {
    anchor_keep "$anchor_disk__dir/hint" "${3:-}"
    anchor_keep "$anchor_disk__dir/why" "$1:$2"
    return 1
}

# usage: anchor_disk__write <IMAGE >CHUNKS
# Writes the unpacked image; prints "OFFSET BYTES" of each part that was written.
anchor_disk__write() {
    local dir="$anchor_disk__dir" bs count chunk offset bytes rest
    dd of="$dir/head" bs="$ANCHOR_DISK_HEAD" count=1 iflag=fullblock 2>/dev/null
    anchor_fetch_size "$dir/head"
    offset=$anchor_fetch_size
    anchor_disk__head_fits && anchor_disk__begin || return 1
    printf '0 0\n'
    bs=$((anchor_disk_bs / 4096 * 4096))
    count=$(((ANCHOR_DISK_CHUNK + bs - 1) / bs))
    chunk=$((bs * count))
    [ "$offset" -lt "$ANCHOR_DISK_HEAD" ] || while :; do
        bytes=
        # A device that went away must not become a file.
        dd of="$anchor_disk__device" bs="$bs" count="$count" seek="$offset" iflag=fullblock oflag=seek_bytes \
            conv=notrunc,nocreat 2>"$dir/written" || {
            anchor_disk__broke "$offset"
            return 1
        }
        while read -r bytes rest; do
            case $rest in
                byte*) break ;;
            esac
        done <"$dir/written"
        [ "${bytes:-0}" -eq 0 ] || printf '%s %s\n' "$offset" "$bytes"
        offset=$((offset + ${bytes:-0}))
        [ "${bytes:-0}" -eq "$chunk" ] || break
    done
    printf '%s\n' "$offset" >"$dir/bytes"
}

# usage: anchor_disk__broke OFFSET
# Says why dd could not write. Returns 1.
anchor_disk__broke() {
    local line error=''
    while IFS= read -r line; do
        case $line in
            dd:*) error=${line##*: } ;;
        esac
    done <"$anchor_disk__dir/written"
    case $error in
        *"No space left"*)
            anchor_fetch_amount "$anchor_disk__size"
            anchor_disk__cannot 1 "the image is larger than $anchor_disk__name, which has $anchor_fetch_amount" \
                "choose a larger disk (rd.anchor.disk.target), or make the image smaller"
            ;;
        *) anchor_disk__cannot 2 "cannot write to $anchor_disk__name at byte $1: ${error:-dd failed}" "see dmesg: the disk may be broken" ;;
    esac
}

# usage: anchor_disk__head_fits
# Whether the beginning of the image looks like one, and of one for a disk of this size. Reads offset, its bytes, and unpack.
anchor_disk__head_fits() {
    local head="$anchor_disk__dir/head"
    if [ "$offset" -lt 4096 ]; then
        anchor_disk__cannot 1 "it is no image of a disk: it has $offset bytes unpacked" "check the URL"
        return
    fi
    case $unpack:$(od -A n -t u1 -N 1 "$head") in
        cat:*\ 60 | cat:*\ 123)
            anchor_disk__cannot 1 "it is no image of a disk but HTML or JSON, perhaps an error message of the server" "check the URL"
            return
            ;;
    esac
    anchor_disk__kind "$head"
    anchor_disk__needs "$head"
    [ "$anchor_disk__needs" -gt "$anchor_disk__size" ] || return 0
    anchor_fetch_amount "$anchor_disk__needs"
    set -- "$anchor_fetch_amount"
    anchor_fetch_amount "$anchor_disk__size"
    anchor_disk__cannot 2 "$anchor_disk__name is too small: the image needs $1, and it has $anchor_fetch_amount" \
        "choose a larger disk (rd.anchor.disk.target), or make the image smaller"
}

# usage: anchor_disk__begin
# Takes away what boots or describes the disk, at its beginning and, where it was in use, at its end, and marks it.
anchor_disk__begin() {
    local sector="$anchor_disk__dir/mark" zeros=$((ANCHOR_DISK_HEAD / 512 - 1))
    anchor_disk__text "$ANCHOR_DISK_UNFINISHED" >"$sector"
    {
        dd if="$sector" of="$anchor_disk__device" conv=notrunc,nocreat,fsync &&
            dd if=/dev/zero of="$anchor_disk__device" bs=512 count="$zeros" seek=1 conv=notrunc,nocreat,fsync &&
            if [ -n "$anchor_disk__used" ]; then
                dd if=/dev/zero of="$anchor_disk__device" bs="$ANCHOR_DISK_HEAD" count=1 oflag=seek_bytes \
                    seek="$((anchor_disk__size - ANCHOR_DISK_HEAD))" conv=notrunc,nocreat,fsync
            fi
    } 2>"$anchor_disk__dir/written" || {
        anchor_disk__broke 0
        return 1
    }
    # Partitions that are gone must not stay in the kernel's mind; where there were none, both may refuse.
    blockdev --rereadpt "$anchor_disk__device" 2>/dev/null || partx -d "$anchor_disk__device" 2>/dev/null || :
}

# usage: anchor_disk__text LINE...
# Prints a sector of text.
anchor_disk__text() {
    local text='' line
    for line; do
        text="$text$line
"
    done
    printf '%s' "$text"
    printf '%*s' $((512 - ${#text})) ''
}

# usage: anchor_disk__read_back <CHUNKS
# Prints what the disk holds, as far as CHUNKS says that it was written: past all caches, for what has only been in memory
# proves nothing. The first line stands for the beginning, which is not there yet.
anchor_disk__read_back() {
    local offset bytes direct=direct,
    read -r offset bytes || return 1
    cat "$anchor_disk__dir/head"
    while read -r offset bytes; do
        # Not every device can be read without a cache: there it is written out and dropped.
        [ -z "$direct" ] || dd if="$anchor_disk__device" of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null || direct=
        [ -n "$direct" ] || blockdev --flushbufs "$anchor_disk__device"
        if [ $((bytes % ANCHOR_DISK_HEAD)) -eq 0 ]; then
            anchor_disk__read "$offset" "$bytes"
        else
            anchor_disk__read "$offset" "$bytes" | head -c "$bytes"
        fi
    done
}

# usage: anchor_disk__read OFFSET BYTES
# Prints at least BYTES, if the disk has them. Reads direct.
anchor_disk__read() {
    dd if="$anchor_disk__device" bs="$ANCHOR_DISK_HEAD" skip="$1" count=$((($2 + ANCHOR_DISK_HEAD - 1) / ANCHOR_DISK_HEAD)) \
        iflag="${direct}skip_bytes" 2>/dev/null
}

# usage: anchor_disk__complete
# Writes what was kept back, with the record in it: sector 0, in which the mark is, comes last. Sets anchor_disk__then.
anchor_disk__complete() {
    local head="$anchor_disk__dir/head" direct=direct, sum back rest length="$ANCHOR_DISK_HEAD"
    [ "$anchor_disk__bytes" -ge "$length" ] || length=$anchor_disk__bytes
    anchor_disk__then=$anchor_disk_then
    anchor_disk__kind "$head"
    anchor_disk__place "$head" "$anchor_disk__bytes"
    anchor_disk__record || return 1
    {
        dd if="$head" of="$anchor_disk__device" bs="$ANCHOR_DISK_HEAD" skip=512 seek=512 iflag=skip_bytes oflag=seek_bytes \
            conv=notrunc,nocreat,fsync &&
            dd if="$head" of="$anchor_disk__device" bs=512 count=1 conv=notrunc,nocreat,fsync
    } 2>"$anchor_disk__dir/written" || {
        anchor_disk__broke 0
        anchor_recall "$anchor_disk__dir/why"
        anchor_fail "${anchor_recall#*:}" "see dmesg: the disk may be broken"
        return 1
    }
    read -r sum rest <<EOT
$(anchor_fetch_digest <"$head")
EOT
    dd if="$anchor_disk__device" of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null || direct=
    [ -n "$direct" ] || blockdev --flushbufs "$anchor_disk__device"
    read -r back rest <<EOT
$(anchor_disk__read 0 "$length" | head -c "$length" | anchor_fetch_digest)
EOT
    if [ "$sum" != "$back" ]; then
        dd if="$anchor_disk__dir/mark" of="$anchor_disk__device" conv=notrunc,nocreat,fsync 2>/dev/null
        anchor_fail "$anchor_disk__name does not hold what was written to its beginning" "the disk or its controller is broken"
        return 1
    fi
    anchor_disk__reread
    anchor_fetch_amount "$anchor_disk__bytes"
    anchor_info "$anchor_disk__name has the image: $anchor_fetch_amount, written and read back, sha256 $anchor_disk__sum"
}

# usage: anchor_disk__record
# Puts the record into head, or at the end of the disk. Without a place for it, nothing may follow that could begin again.
anchor_disk__record() {
    local file="$anchor_disk__dir/record" to="$anchor_disk__dir/head"
    if [ -z "$anchor_disk__place" ]; then
        anchor_warn "there is no room on $anchor_disk__name to note what was installed: the next boot will not know it"
        anchor_note record none
        [ "$anchor_disk__then" != reboot ] || anchor_disk__then=poweroff
        return 0
    fi
    anchor_recall "${anchor_step_dir:-}/note-sha256" # of what was fetched, as anchor_fetch took it
    anchor_disk__plain_url
    anchor_disk__text "$ANCHOR_DISK_RECORD" "sha256 ${anchor_recall:--}" "raw_sha256 $anchor_disk__sum" \
        "size $anchor_disk__bytes" "kind $anchor_disk__kind" "url $anchor_disk__url" >"$file"
    [ "$anchor_disk__place" -lt "$ANCHOR_DISK_HEAD" ] || to=$anchor_disk__device
    anchor_note_number record_at "$anchor_disk__place"
    dd if="$file" of="$to" oflag=seek_bytes seek="$anchor_disk__place" conv=notrunc,nocreat,fsync 2>/dev/null && return 0
    anchor_fail "cannot note on $anchor_disk__name what was installed" "see dmesg: the disk may be broken"
}

# usage: anchor_disk__reread
# Lets the kernel see the new partitions; udev may have the disk open for a moment. Not doing so is no failure by itself.
anchor_disk__reread() {
    local tries=0 error
    until error=$(LC_ALL=C blockdev --rereadpt "$anchor_disk__device" 2>&1); do
        tries=$((tries + 1))
        case $tries:$error in
            ?:*busy*) sleep 0.2 ;;
            *)
                partx -u "$anchor_disk__device" 2>/dev/null || [ "$anchor_disk__kind" = none ] ||
                    anchor_warn "the kernel does not take over the partitions of $anchor_disk__name"
                break
                ;;
        esac
    done
    udevadm settle --timeout=10 2>/dev/null || :
}

# usage: anchor_disk_root DIR
# Mounts the root file system of the installed disk on DIR, for writing. Safe to repeat.
anchor_disk_root() {
    local name device each tried='' mounted rest
    anchor_recall "${ANCHOR_ROOT:-}/run/anchor/disk/boot"
    name=$anchor_recall
    while read -r device mounted rest; do
        [ "$mounted" != "$1" ] || return 0
    done </proc/self/mounts
    anchor_disk__roots "$name"
    for each in $anchor_disk__roots; do
        tried="$tried $each"
        anchor_disk__mount "$each" "$1" && return 0
    done
    if [ -n "$anchor_disk_root" ]; then
        anchor_fail "there is no root on $name that is $anchor_disk_root" "check rd.anchor.disk.root; tried:${tried:- nothing}"
    else
        anchor_fail "found no root to boot on $name; tried:${tried:- nothing}" \
            "name it: rd.anchor.disk.root=LABEL=..., or let the firmware boot the disk (rd.anchor.disk.installed=reboot)"
    fi
}

# usage: anchor_disk__mount NAME DIR
# Mounts the file system if there is a system on it.
anchor_disk__mount() {
    local error
    if ! error=$(mount -o rw "${ANCHOR_ROOT:-}/dev/$1" "$2" 2>&1); then
        anchor_warn "cannot mount $1: $error"
        return 1
    fi
    for error in sbin/init usr/sbin/init usr/lib/systemd/systemd lib/systemd/systemd; do
        # A link in there may be absolute: only that it is one counts.
        if [ -e "$2/$error" ] || [ -L "$2/$error" ]; then
            anchor_note root "$1"
            return 0
        fi
    done
    umount "$2"
    return 1
}

# usage: anchor_disk__roots NAME
# Sets anchor_disk__roots: the partitions of the disk, or the disk itself, that may be the root: those that
# $anchor_disk_root means, or else the likely ones first: of the type of roots (Discoverable Partitions Specification),
# with a label that says so, and all other Linux file systems.
anchor_disk__roots() {
    local each part key value first='' second='' third='' wanted number
    anchor_disk__roots=
    for each in "${ANCHOR_ROOT:-}/sys/class/block/$1" "${ANCHOR_ROOT:-}/sys/class/block/$1/$1"*; do
        [ -e "$each/dev" ] || continue
        part=${each##*/}
        number=
        [ ! -e "$each/partition" ] || anchor_recall "$each/partition"
        [ ! -e "$each/partition" ] || number=$anchor_recall
        wanted='' key=third
        [ "$anchor_disk_root" != "${number:-0}" ] || wanted=1
        while IFS= read -r value; do
            case $value in
                PART_ENTRY_TYPE=4f68bce3-e8cd-4db1-96e7-fbcaf984b709 | PART_ENTRY_TYPE=b921b045-1df0-41c3-af44-4c6f280d3fae) key=first ;;
                LABEL=root | LABEL=rootfs | LABEL=cloudimg-rootfs | PART_ENTRY_NAME=root | PART_ENTRY_NAME=rootfs) [ "$key" = first ] || key=second ;;
                TYPE=vfat | TYPE=swap | TYPE=crypto_LUKS | TYPE=LVM2_member | TYPE=linux_raid_member) key='' ;;
            esac
            case $value in
                PART_ENTRY_NAME=*) value=PARTLABEL=${value#*=} ;;
                PART_ENTRY_UUID=*) value=PARTUUID=${value#*=} ;;
            esac
            [ "$value" != "$anchor_disk_root" ] || wanted=1
            [ "${value%%=*}" != TYPE ] || number=fs
        done <<EOT
$(blkid -p -o export "${ANCHOR_ROOT:-}/dev/$part" 2>/dev/null)
EOT
        [ "$number" = fs ] || continue
        case ${anchor_disk_root:+given}:$key in
            given:*) [ -z "$wanted" ] || first="$first $part" ;;
            :first) first="$first $part" ;;
            :second) second="$second $part" ;;
            :third) third="$third $part" ;;
        esac
    done
    anchor_disk__roots="$first$second$third"
}
