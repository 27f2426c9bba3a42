#!/bin/sh
# Where a join token comes from. A token never becomes an argument of a program.

# usage: anchor_token__find
# Sets anchor_token__token, and anchor_token__from to where it was. Reads the stage's parameters.
anchor_token__find() {
    local source
    anchor_token__token=
    for source in ${anchor_token_from:-build file fw-cfg smbios url}; do
        anchor_token__from=$source
        case $source in
            build) anchor_token__token=$anchor_token_token ;;
            file) anchor_token__read "${ANCHOR_ROOT:-}$anchor_token_file" ;;
            fw-cfg)
                modprobe -q qemu_fw_cfg 2>/dev/null
                anchor_token__read "${ANCHOR_ROOT:-}/sys/firmware/qemu_fw_cfg/by_name/opt/anchor/token/raw"
                ;;
            smbios) anchor_token__smbios ;;
            url) [ -z "$anchor_token_url" ] || anchor_token__ask || return 1 ;;
        esac
        [ -z "$anchor_token__token" ] || break
    done
    if [ -z "$anchor_token__token" ]; then
        anchor_fail "this node has no join token${anchor_token_from:+ (looked for it in: $anchor_token_from)}" \
            "put it into $anchor_token_file of the initramfs, the SMBIOS OEM string anchor-token=, fw_cfg opt/anchor/token, \
rd.anchor.token.url= or --set rd.anchor.token.token=@FILE"
    elif ! anchor_token__is_token; then
        anchor_fail "the join token ($anchor_token__from) is not one" \
            "a token is one line of 16 to 512 letters, digits and - . _ ~ + / ="
    fi
}

# usage: anchor_token__is_token
# Whether anchor_token__token can be one (RFC 6750, b64token).
anchor_token__is_token() {
    local LC_ALL=C
    case $anchor_token__token in
        *[!A-Za-z0-9._~+/=-]*) return 1 ;;
    esac
    [ ${#anchor_token__token} -ge 16 ] && [ ${#anchor_token__token} -le 512 ]
}

# usage: anchor_token__read FILE
# Takes the first line of a file, if there is one.
anchor_token__read() {
    local cr
    cr=$(printf '\r')
    if [ -f "$1" ] && [ -r "$1" ]; then
        IFS= read -r anchor_token__token <"$1"
        anchor_token__token=${anchor_token__token%"$cr"}
    fi
}

# usage: anchor_token__smbios
# Takes the OEM string (SMBIOS type 11) that begins with anchor-token=. The table is that of the System Management BIOS
# Reference Specification (DSP0134), 6.1: each structure is its type, its length, the rest of that many bytes, and
# strings that end with a NUL each; one more NUL ends them.
anchor_token__smbios() {
    local table="${ANCHOR_ROOT:-}/sys/firmware/dmi/tables/DMI" byte part="type" type='' left=0 text='' strings=0
    [ -r "$table" ] || return 0
    while read -r byte; do
        case $part in
            type)
                type=$byte
                part=length
                [ "$type" -ne 127 ] || break
                ;;
            length)
                left=$((byte - 2))
                part=rest
                [ "$left" -ge 2 ] || break
                ;;
            rest)
                left=$((left - 1))
                [ "$left" -gt 0 ] || part=strings text='' strings=0
                ;;
            strings)
                case $byte:$text in
                    0:)
                        # A structure without strings has two of these.
                        [ "$strings" -eq 0 ] || part="type"
                        strings=1
                        ;;
                    0:*)
                        [ "$type" -ne 11 ] || anchor_token__oem_string "$text" || break
                        text=
                        strings=1
                        ;;
                    *) [ "$type" -ne 11 ] && text=- || text="$text\\$((byte / 64))$((byte / 8 % 8))$((byte % 8))" ;;
                esac
                ;;
        esac
    done <<END
$(od -An -v -tu1 -w1 "$table" 2>/dev/null)
END
}

# usage: anchor_token__oem_string ESCAPES
# Takes the token from a string that has one; status 1 ends the search.
anchor_token__oem_string() {
    local text
    # shellcheck disable=SC2059 # nothing but escapes
    text=$(printf "$1")
    case $text in
        anchor-token=*)
            anchor_token__token=${text#*=}
            return 1
            ;;
    esac
}

# usage: anchor_token__ask
# Takes the answer of rd.anchor.token.url. Without TLS anybody on the way could read the token or give another, so plain
# HTTP is for addresses that no router passes on.
anchor_token__ask() {
    local answer="$anchor_token__dir/found" host anchor_token__sends=''
    host=${anchor_token_url#http://}
    host=${host%%[/?]*}
    host=${host##*@}
    case $anchor_token_url in
        https://*) ;;
        *)
            case ${host%%:*} in
                169.254.*[!0-9.]*) host=other ;;
                169.254.* | \[fe80) ;;
                *) host=other ;;
            esac
            if [ "$host" = other ]; then
                anchor_fail "refused to ask for the join token over plain HTTP" \
                    "use https:// in rd.anchor.token.url=, or a link-local address such as http://169.254.169.254/"
                return 1
            fi
            anchor_warn "the join token comes over plain HTTP: whoever is on this node's link can read or replace it"
            ;;
    esac
    anchor_token__until_answered "$anchor_token_url" "$answer" 4096 || return 1
    anchor_token__read "$answer"
    rm -f "$answer"
}
