#!/bin/sh
# The manifest: a small text file that says which image a node boots, and where it is. With a public key baked in
# (/etc/anchor/manifest.pub) only a manifest that its private key signed is believed.
#
# Lines of "KEY VALUE", the first one "anchor-manifest 1", the last one "signature BASE64" over all bytes before it:
#   image      1     the image stage that boots it: squashfs, disk, or oci for one at a registry
#   format     0-1   what the image is, for people: squashfs, erofs
#   sha256     1     digest of the image; with oci, of its manifest or index
#   size       1     bytes of what has this digest
#   verity     0-1   root hash of the hash tree in an image of the stage squashfs (dm-verity)
#   unpacked   0-1   bytes of all files in it
#   created    1     when the manifest was made, in seconds since the epoch
#   expires    0-1   when it ends, likewise
#   file       0-1   the image's name beside the manifest
#   mirror     any   a URL of the image; with oci, https://REGISTRY/NAME[:TAG]
#   peer       any   likewise, on another node
#   kernel     any   a kernel release whose modules are in the image
#   x-...      any   not for the node
# An unknown key is refused: what has to be understood must not be passed over. anchor_build/manifest.py is the other
# half; tests/vectors/manifest.json holds both to the same answers.
#
# Needs anchor-report.sh, anchor-types.sh, anchor-params.sh and anchor-fetch.sh.
# shellcheck disable=SC2154 # anchor_manifest, anchor_value, anchor_reason and anchor_recall are set elsewhere

ANCHOR_MANIFEST_MAX=65536
# A manifest may come from the future by so many seconds: clocks differ.
ANCHOR_MANIFEST_SKEW=600

# usage: anchor_manifest_forget
# Empties what a manifest says and what is allowed for fetching one: nothing from before, and nothing that the
# environment holds (the kernel makes variables of words that it does not know), may count.
anchor_manifest_forget() {
    anchor_fetch_limit='' anchor_fetch_signed=''
    anchor_manifest_image='' anchor_manifest_format='' anchor_manifest_sha256='' anchor_manifest_size=''
    anchor_manifest_verity=''
    anchor_manifest_unpacked='' anchor_manifest_created='' anchor_manifest_expires='' anchor_manifest_file=''
    anchor_manifest_urls='' anchor_manifest_kernels=''
}

# usage: anchor_manifest_run
# The step: fetches the manifest from every URL in $anchor_manifest (comma list), and leaves the newest one that may be
# believed in /run/anchor/manifest/current. Status 0 or 1.
anchor_manifest_run() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/manifest" rest="$anchor_manifest," url best='' count=0 good=0 asked=0
    if ! rm -rf "${dir:?}" || ! mkdir -m 700 "$dir"; then
        anchor_fail "cannot make $dir" "is /run full?"
        return 1
    fi
    while [ -n "$rest" ]; do
        asked=$((asked + 1))
        rest=${rest#*,}
    done
    rest="$anchor_manifest,"
    while [ -n "$rest" ]; do
        url=${rest%%,*}
        rest=${rest#*,}
        count=$((count + 1))
        mkdir "$dir/$count" || return 1
        if anchor_manifest__try "$url" "$dir/$count" "$asked"; then
            good=$((good + 1))
            anchor_manifest__newer "$dir/$count" "$best" && best=$dir/$count
        fi
    done
    if [ -z "$best" ]; then
        [ "$asked" -gt 1 ] || return 1
        anchor_recall "$dir/1/error"
        rest=$anchor_recall
        anchor_recall "$dir/1/hint"
        anchor_fail "none of $asked URLs has a manifest that can be used; the first: $rest" "$anchor_recall"
        return 1
    fi
    [ "$good" -eq "$asked" ] || anchor_warn "$((asked - good)) of $asked URLs had no manifest that can be used"
    anchor_manifest__keep "$best" "$dir"
}

# usage: anchor_manifest_use
# Takes over what the step found out: sets $anchor_image to the stage that the manifest names, and
#   anchor_manifest_urls      where the image is, with blanks between
#   anchor_manifest_sha256    its digest
#   anchor_manifest_size      its size in bytes
#   anchor_manifest_verity    the root hash of its hash tree, or nothing
# Status 1, with a report, if this initramfs cannot boot it.
anchor_manifest_use() {
    anchor_untraced anchor_manifest__use
}

# usage: anchor_manifest__use
# The same, traced: a URL may hold a password.
anchor_manifest__use() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/manifest" wanted="$anchor_image" url
    anchor_manifest_parse "$dir/current" || return 1
    if [ -n "$anchor_manifest_file" ]; then
        while IFS= read -r url; do
            anchor_manifest_urls="$anchor_manifest_urls ${url%/*}/$anchor_manifest_file"
        done <"$dir/beside"
        anchor_manifest_urls=${anchor_manifest_urls# }
    fi
    if [ -z "$anchor_manifest_urls" ]; then
        anchor_fail "the manifest does not say where the image is" "make it anew: anchor-build image names the file"
        return 1
    fi
    if [ -n "$wanted" ] && ! anchor_params_same_name "$wanted" "$anchor_manifest_image" &&
        [ "$wanted" != "$anchor_manifest_image" ]; then
        anchor_fail "rd.anchor.image= and the manifest name different image stages: $wanted, $anchor_manifest_image" \
            "leave out rd.anchor.image="
        return 1
    fi
    anchor_params_bad=0
    anchor_params_error=
    if ! anchor_params_choose image "$anchor_manifest_image" || [ "$anchor_params_bad" -gt 0 ]; then
        anchor_fail "this node cannot boot an image of type $anchor_manifest_image: $anchor_params_error" \
            "build the initramfs with --image $anchor_manifest_image"
        return 1
    fi
    anchor_image=$anchor_chosen
}

# usage: anchor_manifest__try URL DIR URLS
# Fetches and judges one manifest; with several URLS one failure is not the step's. Leaves DIR/body.
anchor_manifest__try() {
    local url
    (
        if [ "$3" -gt 1 ]; then
            anchor_step_dir=$2
            anchor_fetch_attempts=$(((anchor_fetch_attempts + $3 - 1) / $3))
            anchor_fetch_timeout=$(((anchor_fetch_timeout + $3 - 1) / $3))
        fi
        anchor_fetch_limit=$ANCHOR_MANIFEST_MAX
        anchor_fetch_signed=0
        ! anchor_params_signed || anchor_fetch_signed=1
        anchor_fetch "$1" "$2/manifest" || exit 1
        anchor_fetch_plain "$1"
        anchor_manifest_judge "$2/manifest" "$anchor_fetch_url" || exit 1
        url=${1%%[?#]*}
        # Without a path, the last / is one of those before the host.
        case ${url#*://} in
            */*) ;;
            *) url=$url/ ;;
        esac
        printf '%s\n' "$url" >"$2/url"
        sha256sum <"$2/body" >"$2/digest"
    )
}

# usage: anchor_manifest_judge FILE NAME
# Whether the manifest in FILE, called NAME in messages, may be believed now. Leaves FILE's bytes up to the signature,
# which are all that counts, in body beside it.
anchor_manifest_judge() {
    local name="$2" dir="${1%/*}"
    anchor_manifest__split "$1" "$dir" || return 1
    if anchor_params_signed; then
        anchor_manifest__verify "$dir" || return 1
    else
        anchor_info "no manifest key is in this initramfs: nothing but the server vouches for $name"
    fi
    anchor_manifest_parse "$dir/body" "$name" && anchor_manifest__timely
}

# usage: anchor_manifest__refuse WHY [HINT]
# Reads name. Always returns 1.
anchor_manifest__refuse() {
    anchor_fail "$name is not a manifest that this node accepts: $1" "${2:-make it with anchor-build image, and publish it anew}"
}

# usage: anchor_manifest__split FILE DIR
# Copies the lines before the signature to DIR/body and the signature to DIR/signature (binary; empty without one).
# Everything after this works on these copies, so what was verified is what is read.
anchor_manifest__split() {
    local LC_ALL=C line='' signature='' size seen=0
    size=$(stat -c %s "$1") || size=0
    : >"$2/signature"
    if [ "$size" -gt "$ANCHOR_MANIFEST_MAX" ]; then
        anchor_manifest__refuse "it has $size bytes, and $ANCHOR_MANIFEST_MAX are allowed" "is this the URL of a manifest?"
        return 1
    fi
    while IFS= read -r line; do
        if [ -n "$signature" ]; then
            anchor_manifest__refuse "something follows its signature"
            return 1
        fi
        seen=$((seen + ${#line} + 1))
        case $line in
            '' | *[!\ -~]*)
                anchor_manifest__refuse "it has a line that is not printable ASCII" "is this the URL of a manifest?"
                return 1
                ;;
            signature\ ?*) signature=${line#signature } ;;
            signature\ ) signature='!' ;;
            *) printf '%s\n' "$line" ;;
        esac
    done <"$1" >"$2/body"
    if [ -n "$line" ]; then
        anchor_manifest__refuse "its last line has no end: it was cut off"
        return 1
    fi
    # Shells pass over NUL bytes, and may end a line there.
    if [ "$seen" -ne "$size" ]; then
        anchor_manifest__refuse "it has a line that is not printable ASCII" "is this the URL of a manifest?"
        return 1
    fi
    [ -n "$signature" ] || return 0
    # openssl takes what it can of anything else.
    case $((${#signature} % 4)):$signature in
        [1-3]:* | *:*[!A-Za-z0-9+/=]* | *=[!=]* | *===) ;;
        *) printf '%s\n' "$signature" | openssl base64 -d -A >"$2/signature" 2>/dev/null && [ -s "$2/signature" ] && return 0 ;;
    esac
    anchor_manifest__refuse "its signature is not base64"
}

# usage: anchor_manifest__verify DIR
# Whether one of the baked-in keys made DIR/signature over DIR/body. Notes that key's fingerprint.
anchor_manifest__verify() {
    local dir="$1" line keys=0 n=0 mark
    if [ ! -s "$dir/signature" ]; then
        anchor_manifest__refuse "it is not signed, and this initramfs has a manifest key" "sign it: anchor-build image --sign-key"
        return 1
    fi
    while IFS= read -r line; do
        case $line in
            *BEGIN\ PUBLIC*)
                keys=$((keys + 1))
                : >"$dir/key-$keys"
                ;;
        esac
        [ "$keys" -eq 0 ] || printf '%s\n' "$line" >>"$dir/key-$keys"
    done <"${ANCHOR_ROOT:-}/etc/anchor/manifest.pub"
    while [ "$n" -lt "$keys" ]; do
        n=$((n + 1))
        openssl dgst -sha256 -verify "$dir/key-$n" -signature "$dir/signature" "$dir/body" >/dev/null 2>&1 || continue
        mark=$(openssl pkey -pubin -in "$dir/key-$n" -outform DER 2>/dev/null | sha256sum)
        anchor_note key "${mark%% *}"
        return 0
    done
    anchor_manifest__refuse "none of the $keys manifest keys in this initramfs made its signature" \
        "sign it with the key that belongs to them, or build the initramfs with the key's public half (--manifest-key)"
}

# usage: anchor_manifest_parse FILE [NAME]
# Reads a manifest's lines before its signature. Sets the anchor_manifest_* variables. Status 1, with a report.
anchor_manifest_parse() {
    local LC_ALL=C key value line number=0 name="${2:-the manifest}"
    anchor_manifest_forget
    while IFS= read -r line; do
        number=$((number + 1))
        key=${line%% *}
        value=${line#"$key"}
        value=${value# }
        if [ "$number" -eq 1 ]; then
            anchor_manifest__magic "$line" && continue
            return 1
        fi
        anchor_reason=
        anchor_manifest__take "$key" "$value" && continue
        if [ -n "$anchor_reason" ]; then
            anchor_manifest__refuse "line $number: $anchor_reason"
        else
            anchor_manifest__refuse "line $number: $key is not a known key" \
                "if the manifest is newer than this initramfs, build that anew"
        fi
        return 1
    done <"$1"
    [ "$number" -gt 0 ] || anchor_manifest__magic '' || return 1
    for key in "image ${anchor_manifest_image:+1}" "sha256 ${anchor_manifest_sha256:+1}" "size ${anchor_manifest_size:+1}" \
        "created ${anchor_manifest_created:+1}"; do
        [ -z "${key#* }" ] || continue
        anchor_manifest__refuse "it has no ${key% }"
        return 1
    done
    if [ -n "$anchor_manifest_verity" ] && [ "$anchor_manifest_image" != squashfs ]; then
        anchor_manifest__refuse "verity is only for image squashfs"
        return 1
    fi
}

# usage: anchor_manifest__magic LINE
# Whether a manifest's first LINE is what it should be. Reads name.
anchor_manifest__magic() {
    case $1 in
        'anchor-manifest 1') return 0 ;;
        anchor-manifest\ *) anchor_manifest__refuse "its format is newer" "build the initramfs anew" ;;
        *) anchor_manifest__refuse "it does not begin with \"anchor-manifest 1\"" "is this the URL of a manifest?" ;;
    esac
}

# usage: anchor_manifest__take KEY VALUE
# Keeps one line. Status 1 with anchor_reason, which is empty for an unknown key.
anchor_manifest__take() {
    case $1 in
        image) anchor_manifest__once "$1" "$anchor_manifest_image" name "$2" && anchor_manifest_image=$anchor_value ;;
        format) anchor_manifest__once "$1" "$anchor_manifest_format" name "$2" && anchor_manifest_format=$anchor_value ;;
        file) anchor_manifest__once "$1" "$anchor_manifest_file" name "$2" && anchor_manifest_file=$anchor_value ;;
        sha256) anchor_manifest__once "$1" "$anchor_manifest_sha256" sha256 "$2" && anchor_manifest_sha256=$anchor_value ;;
        size) anchor_manifest__once "$1" "$anchor_manifest_size" int "$2" 1 && anchor_manifest_size=$anchor_value ;;
        verity) anchor_manifest__once "$1" "$anchor_manifest_verity" sha256 "$2" && anchor_manifest_verity=$anchor_value ;;
        unpacked) anchor_manifest__once "$1" "$anchor_manifest_unpacked" int "$2" 0 && anchor_manifest_unpacked=$anchor_value ;;
        created) anchor_manifest__once "$1" "$anchor_manifest_created" int "$2" 0 && anchor_manifest_created=$anchor_value ;;
        expires) anchor_manifest__once "$1" "$anchor_manifest_expires" int "$2" 0 && anchor_manifest_expires=$anchor_value ;;
        mirror | peer)
            anchor_manifest__once "$1" '' url "$2" &&
                anchor_manifest_urls="$anchor_manifest_urls${anchor_manifest_urls:+ }$anchor_value"
            ;;
        kernel)
            case $2 in
                '' | *[!A-Za-z0-9._+~-]*)
                    anchor_reason="$1 is not a kernel release"
                    return 1
                    ;;
            esac
            anchor_manifest_kernels="$anchor_manifest_kernels $2"
            ;;
        x-?*) ;;
        *) return 1 ;;
    esac
}

# usage: anchor_manifest__once KEY PRESENT TYPE VALUE [OPTION...]
# Checks a value by its type; PRESENT is what an earlier line gave, which there must not be.
anchor_manifest__once() {
    local key="$1" present="$2" type="$3"
    shift 3
    if [ -n "$present" ]; then
        anchor_reason="$key is there twice"
        return 1
    fi
    "anchor_type_$type" "$@" && return 0
    anchor_reason="$key $anchor_reason"
    return 1
}

# usage: anchor_manifest__timely
# Whether the manifest that was parsed last is of this time: neither expired, nor older than the initramfs allows, nor
# from the future. Reads name. What is wrong may be the clock, and a message says so.
anchor_manifest__timely() {
    local now since clock
    if ! clock=$(date -u '+%s %Y-%m-%d %H:%M:%S UTC'); then
        anchor_manifest__refuse "whether it is of this time cannot be told" "date failed: is it in the initramfs?"
        return 1
    fi
    now=${clock%% *}
    clock=${clock#* }
    anchor_recall "${ANCHOR_ROOT:-}/etc/anchor/manifest-since"
    since=${anchor_recall:-0}
    case $since in
        *[!0-9]* | ???????????????????*)
            anchor_fail "/etc/anchor/manifest-since does not hold a time" "build the initramfs anew"
            return 1
            ;;
    esac
    if [ "$anchor_manifest_created" -lt "$since" ]; then
        anchor_manifest__date "$anchor_manifest_created"
        anchor_manifest__refuse "it is of $anchor_manifest_date, older than this initramfs allows (--manifest-since)" \
            "somebody serves an old manifest, or the initramfs is newer than the image: publish the manifest anew"
        return 1
    fi
    if [ "$anchor_manifest_created" -gt $((now + ANCHOR_MANIFEST_SKEW)) ]; then
        anchor_manifest__date "$anchor_manifest_created"
        anchor_manifest__refuse "it is of $anchor_manifest_date, but the clock says $clock" \
            "set the clock: rd.anchor.clock.ntp=, or the node's hardware clock"
        return 1
    fi
    [ -n "$anchor_manifest_expires" ] && [ "$anchor_manifest_expires" -le "$now" ] || return 0
    anchor_manifest__date "$anchor_manifest_expires"
    anchor_manifest__refuse "it expired at $anchor_manifest_date: the clock says $clock" \
        "publish a new one if the clock is right, or set the clock (rd.anchor.clock.ntp=)"
}

# usage: anchor_manifest__date SECONDS
# Sets anchor_manifest_date: SECONDS since the epoch for people.
anchor_manifest__date() {
    anchor_manifest_date=$(date -u -d "@$1" '+%Y-%m-%d %H:%M:%S UTC' 2>/dev/null) || anchor_manifest_date="second $1"
}

# usage: anchor_manifest__newer DIR BEST
# Whether the manifest in DIR was made after that in BEST, which may be empty.
anchor_manifest__newer() {
    local created
    [ -n "$2" ] || return 0
    anchor_manifest_parse "$1/body" || return 1
    created=$anchor_manifest_created
    anchor_manifest_parse "$2/body" && [ "$created" -gt "$anchor_manifest_created" ]
}

# usage: anchor_manifest__keep BEST DIR
# Keeps the manifest in BEST as DIR/current, and in DIR/beside the URLs that have the same one. Tells what it says.
anchor_manifest__keep() {
    local best="$1" dir="$2" kernel file digest
    anchor_manifest_parse "$best/body" || return 1
    anchor_recall "$best/digest"
    digest=$anchor_recall
    for file in "$dir"/*/digest; do
        anchor_recall "$file"
        [ "$anchor_recall" != "$digest" ] || cat "${file%/digest}/url"
    done >"$dir/beside"
    if ! mv -f "$best/body" "$dir/current"; then
        anchor_fail "cannot write to $dir" "is /run full?"
        return 1
    fi
    # Of several manifests each had a record of its own; this one is the step's.
    for file in "$best"/note-* "$best"/number-*; do
        anchor_recall "$file"
        case $file in
            */note-\* | */number-\*) ;;
            */note-*) anchor_note "${file##*/note-}" "$anchor_recall" ;;
            *) anchor_note_number "${file##*/number-}" "$anchor_recall" ;;
        esac
    done
    anchor_manifest__date "$anchor_manifest_created"
    anchor_note created "$anchor_manifest_date"
    anchor_note image_sha256 "$anchor_manifest_sha256"
    anchor_note image_format "${anchor_manifest_format:-$anchor_manifest_image}"
    anchor_note_number image_bytes "$anchor_manifest_size"
    kernel=$(cat /proc/sys/kernel/osrelease)
    # Who names an image without looking into it knows neither its size nor its modules.
    case "$anchor_manifest_kernels:$anchor_manifest_unpacked" in
        : | *" $kernel:"* | *" $kernel "*:*) ;;
        *)
            anchor_warn "the image has no modules for this kernel, $kernel; it has them for:${anchor_manifest_kernels:- none}"
            anchor_note warning "no modules for kernel $kernel"
            ;;
    esac
    # The stage is chosen by the caller too; here a failure still belongs to this step.
    anchor_manifest_use
}
