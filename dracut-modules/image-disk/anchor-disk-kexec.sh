#!/bin/sh
# The kernel that an installed disk boots: which it is, what it is told, and how it takes the place of the running one.
#
# What boot loaders read is read here: entries of the Boot Loader Specification (https://uapi-group.org/specifications/;
# loader/entries/*.conf, of systemd-boot, Fedora and Enterprise Linux), of which the newest counts, but no rescue system; or
# else grub.cfg, of which the first kernel counts, because grub-mkconfig puts the default there. Nothing of them is
# evaluated: words with GRUB's variables are left out, but for $kernelopts, which is in grubenv on Enterprise Linux 8.
# shellcheck disable=SC2154 # anchor_disk__* and anchor_recall are set by the stage and the core

# usage: anchor_disk__kexec_possible
# Whether this node can start another kernel at all: better said before a disk is written than afterwards.
anchor_disk__kexec_possible() {
    if ! command -v kexec >/dev/null; then
        anchor_fail "this initramfs has no kexec" "install kexec-tools where it is built, or choose reboot or boot instead"
        return 1
    fi
    anchor_recall "${ANCHOR_ROOT:-}/proc/sys/kernel/kexec_load_disabled"
    if [ "${anchor_recall:-1}" != 0 ]; then
        anchor_fail "this kernel starts no other (kernel.kexec_load_disabled)" "choose reboot or boot instead of kexec"
        return 1
    fi
    ! anchor_disk__locked || anchor_info "this kernel is locked down: it starts only one that is signed with a key that it knows"
}

# usage: anchor_disk__locked
# Whether the kernel is locked down, by Secure Boot or lockdown= (kernel_lockdown(7)), as far as can be seen.
anchor_disk__locked() {
    # Such as "none [integrity] confidentiality".
    anchor_recall "${ANCHOR_ROOT:-}/sys/kernel/security/lockdown"
    case $anchor_recall in
        *\[integrity\]* | *\[confidentiality\]*) return 0 ;;
    esac
    return 1
}

# usage: anchor_disk__kexec
# Loads the kernel that $anchor_disk__name boots, so that `kexec -e` starts it.
anchor_disk__kexec() {
    local dir="$anchor_disk__dir/files" sys="${ANCHOR_ROOT:-}/sys/class/block/$anchor_disk__name" each tried='' status=2
    local kernel initrd words entry
    if ! mkdir -p "$dir"; then
        anchor_fail "cannot write to $anchor_disk__dir" "is /run full?"
        return 1
    fi
    for each in "$sys/$anchor_disk__name"* "$sys"; do
        [ -e "$each/dev" ] || continue
        mount -o ro,nodev,nosuid,noexec "${ANCHOR_ROOT:-}/dev/${each##*/}" "$dir" 2>/dev/null || continue
        tried="$tried ${each##*/}"
        if anchor_disk__entry "$dir"; then
            anchor_disk__kexec_load "${each##*/}"
            status=$?
        fi
        umount "$dir" || umount -l "$dir"
        [ "$status" -eq 2 ] || return "$status"
    done
    anchor_fail "found no kernel to start on $anchor_disk__name: neither loader/entries/*.conf nor a grub.cfg names one; \
looked at:${tried:- nothing}" "let the firmware boot the disk (reboot), or mount its root (boot)"
}

# usage: anchor_disk__kexec_load PARTITION
# Hands the kernel over. Reads what anchor_disk__entry set.
anchor_disk__kexec_load() {
    local file="$anchor_disk__dir/initrd" error status hint="is it a kernel for this machine? Or let the firmware boot the disk (reboot)"
    anchor_note entry "$1:${entry#"$dir"}"
    anchor_note kernel "${kernel#"$dir"}"
    anchor_info "starting the kernel ${kernel#"$dir"} of $1: $words"
    # shellcheck disable=SC2086 # paths without blanks
    if ! cat ${initrd:-/dev/null} >"$file"; then
        anchor_fail "cannot read the kernel's initramfs from $1" "see dmesg: is the disk broken, or the memory full?"
        return 1
    fi
    set -- "--command-line=$words" "$kernel"
    [ -z "$initrd" ] || set -- "--initrd=$file" "$@"
    # The kernel reads and checks the file itself (-s): a kernel that is locked down takes it in no other way.
    error=$(LC_ALL=C kexec -s -l "$@" 2>&1)
    status=$?
    case $status:$error in
        0:*) ;;
        # Refused for its signature, or for the lack of one. The older way, which asks for none, is no way around that.
        *:*'not permitted'* | *:*[Kk]'ey '* | *:*'No data available'* | *:*'Bad message'* | *:*'Package not installed'*)
            hint="the running kernel wants it signed with a key that it has: under Secure Boot those of the firmware and of \
shim (MOK), with lockdown= alone its own; or let the firmware boot the disk (reboot)"
            case $error in *'No data available'*) error="$error (it has no signature)" ;; esac
            ;;
        *)
            anchor_info "kexec_file_load does not take it: $(printf '%.200s' "$error"); trying kexec_load"
            error=$(LC_ALL=C kexec -l "$@" 2>&1)
            status=$?
            ;;
    esac
    rm -f "$file"
    [ "$status" -ne 0 ] || return 0
    anchor_fail "this kernel does not take ${kernel#"$dir"}: $(printf '%.300s' "$error")" "$hint"
}

# usage: anchor_disk__entry DIR
# Finds what a boot loader starts from the file system on DIR. Sets kernel and initrd (files; of the latter several, with
# blanks between), words (the command line) and entry (the file that says so). Status 1 where nothing does.
anchor_disk__entry() {
    local list="$anchor_disk__dir/entries" top="$1" key value version unusable
    for entry in "$top"/loader/entries/*.conf "$top"/boot/loader/entries/*.conf; do
        version=${entry##*/}
        case $version in
            *rescue*) continue ;;
        esac
        [ -f "$entry" ] || continue
        while read -r key value; do
            [ "$key" != version ] || version=$value
        done <"$entry"
        printf '%s|%s\n' "$version" "$entry"
    done | sort -rV >"$list"
    while IFS='|' read -r version entry; do
        kernel='' initrd='' words='' unusable=''
        while read -r key value; do
            anchor_disk__entry_line "$key" "$value"
        done <"$entry"
        anchor_disk__usable && return 0
    done <"$list"
    for entry in "$top"/boot/grub/grub.cfg "$top"/boot/grub2/grub.cfg "$top"/grub/grub.cfg "$top"/grub2/grub.cfg; do
        [ -f "$entry" ] || continue
        kernel='' initrd='' words='' unusable=''
        while read -r key value; do
            case $key in
                linux | linux16 | linuxefi)
                    [ -z "$kernel$unusable" ] || break
                    anchor_disk__entry_line linux "${value%%[ 	]*}"
                    anchor_disk__entry_line options "${value#"${value%%[ 	]*}"}"
                    ;;
                initrd | initrd16 | initrdefi) [ -z "$kernel" ] || anchor_disk__entry_line initrd "$value" ;;
                '}') [ -z "$kernel$unusable" ] || break ;;
            esac
        done <"$entry"
        anchor_disk__usable && return 0
    done
    return 1
}

# usage: anchor_disk__usable
# Whether the entry that was read is one that can be started; says why not, unless it is of something else.
anchor_disk__usable() {
    [ -z "$unusable" ] || anchor_warn "passing over ${entry#"$top"}: $unusable"
    [ -z "$unusable" ] && [ -n "$kernel" ]
}

# usage: anchor_disk__entry_line KEY VALUE
# Takes over one line of an entry. Reads top; sets kernel, initrd, words and unusable.
anchor_disk__entry_line() {
    local each globs=''
    case $- in *f*) ;; *) globs=1 ;; esac
    set -f
    for each in $2; do
        case $1:$each in
            linux:* | initrd:/*) anchor_disk__file "$1" "$each" ;;
            options:\$kernelopts) anchor_disk__grubenv ;;
            options:*\$*) ;;
            options:*) words="$words${words:+ }$each" ;;
        esac
    done
    [ -z "$globs" ] || set +f
    case $words in
        *[!\ -~]*) unusable="its options are not printable ASCII" ;;
    esac
}

# usage: anchor_disk__file linux|initrd PATH
# Finds PATH as boot loaders do, from the top of the file system that the entry is on; where /boot is no file system of its
# own, some entries leave it out. A link must not lead to a file of this initramfs.
anchor_disk__file() {
    local file real
    for file in "$top/${2#/}" "$top/boot/${2#/}"; do
        [ -f "$file" ] || continue
        real=$(readlink -f "$file")
        case $real:$1 in
            *[\ \	]*) ;;
            "$top"/*:linux)
                kernel=$real
                return
                ;;
            "$top"/*:initrd)
                initrd="$initrd${initrd:+ }$real"
                return
                ;;
        esac
    done
    unusable="$2 is not on this file system"
}

# usage: anchor_disk__grubenv
# Adds what $kernelopts stands for to words: a line of grubenv, which is beside grub.cfg.
anchor_disk__grubenv() {
    local line file
    for file in "$top"/grub2/grubenv "$top"/boot/grub2/grubenv; do
        while IFS= read -r line; do
            case $line in
                kernelopts=*)
                    line=${line#*=}
                    words="$words${words:+ }${line%"${line##*[! ]}"}"
                    return
                    ;;
            esac
        done 2>/dev/null <"$file"
    done
    unusable="what its \$kernelopts are is not in a grubenv of this file system"
}
