#!/bin/sh
# anchor-cmdline.sh: the kernel command line as names and values; the node's half of anchor_build/cmdline.py.
#
# Words follow the kernel's own rules (next_arg in its lib/cmdline.c): white space ends a word, except between
# double quotes; the value follows the first '=' (a leading one belongs to the name); a quote at the start of the
# word or of the value is taken off together with one at the very end; nothing escapes a quote; a word -- without
# a value ends the line. One difference: byte 0xA0, white space to the kernel, would cut UTF-8 letters apart.
#
# Nothing here evaluates text, splits words by IFS or globs data. tests/vectors/cmdline.json proves the rules.
# shellcheck disable=SC3043 # `local` is the one extension that dash, busybox and bash share

# A pattern of 128 characters: shells look for the end of a word in quadratic time, so lines are cut to pieces first.
ANCHOR_CMDLINE_PIECE='????????????????????????????????'
ANCHOR_CMDLINE_PIECE=$ANCHOR_CMDLINE_PIECE$ANCHOR_CMDLINE_PIECE$ANCHOR_CMDLINE_PIECE$ANCHOR_CMDLINE_PIECE

# anchor_cmdline__word WORD CALLBACK: takes a raw word apart and hands it over. Status 1 if the word ends the line.
anchor_cmdline__word() {
    local name="$1" value='' has_value=0 quoted=''
    case $name in
        \"*)
            quoted=1
            name=${name#\"}
            ;;
    esac
    case $name in
        ?*=*)
            has_value=1
            value=${name#?*=}
            name=${name%%"=$value"}
            case $value in
                \"*) quoted=1 ;;
            esac
            value=${value#\"}
            ;;
    esac
    case $quoted$has_value in
        10) name=${name%\"} ;;
        11) value=${value%\"} ;;
    esac
    [ "$has_value$name" != 0-- ] || return 1
    "$2" "$name" "$value" "$has_value"
    return 0
}

# anchor_cmdline_split LINE CALLBACK
# Calls CALLBACK NAME VALUE HAS_VALUE for each word, in order; HAS_VALUE is 0 for a word without '=', else 1.
# What CALLBACK returns does not matter. Always returns 0.
anchor_cmdline_split() {
    local LC_ALL=C line="$1" callback="$2" piece run word='' in_quote=0
    while [ -n "$line" ]; do
        piece=$line
        # shellcheck disable=SC2295 # a pattern on purpose
        line=${line#$ANCHOR_CMDLINE_PIECE}
        if [ "$piece" = "$line" ]; then
            line=''
        else
            piece=${piece%%"$line"}
        fi
        while [ -n "$piece" ]; do
            if [ "$in_quote" = 1 ]; then
                run=${piece%%\"*}
            else
                run=${piece%%[[:space:]\"]*}
            fi
            word=$word$run
            piece=${piece#"$run"}
            case $piece in
                '') ;;
                \"*)
                    word=$word\"
                    in_quote=$((1 - in_quote))
                    ;;
                *)
                    [ -z "$word" ] || anchor_cmdline__word "$word" "$callback" || return 0
                    word=''
                    ;;
            esac
            piece=${piece#?}
        done
    done
    [ -z "$word" ] || anchor_cmdline__word "$word" "$callback" || return 0
}

# anchor_cmdline__parameter LINE CALLBACK: hands over one NAME=VALUE as it stands.
anchor_cmdline__parameter() {
    case $1 in
        *=*) "$2" "${1%%=*}" "${1#*=}" 1 ;;
        ?*) "$2" "$1" '' 0 ;;
    esac
}

# anchor_cmdline__file FILE READER CALLBACK: calls READER LINE CALLBACK for each line of FILE, if there is one.
# Sets $anchor_cmdline_source. Status 1 if FILE cannot be read.
anchor_cmdline__file() {
    local text='' line newline='
'
    [ -f "$1" ] || return 0
    {
        while IFS= read -r line || [ -n "$line" ]; do
            text=$text$line$newline
        done
    } <"$1" || return 1
    anchor_cmdline_source=$1
    while [ -n "$text" ]; do
        line=${text%%"$newline"*}
        case $text in
            *"$newline"*) text=${text#*"$newline"} ;;
            *) text='' ;;
        esac
        "$2" "$line" "$3"
    done
    return 0
}

# anchor_cmdline_each CALLBACK
# Calls CALLBACK as anchor_cmdline_split does, for all that was said to this node, the weakest first: the defaults
# baked in at build time, then the files and the kernel command line that dracut reads. A quote left open and a
# word -- end with their line. Sets $anchor_cmdline_source to the file. Status 1 if a file could not be read.
anchor_cmdline_each() {
    anchor_untraced anchor_cmdline__each "$1"
}

# usage: anchor_cmdline__each CALLBACK
# The same, traced.
anchor_cmdline__each() {
    local LC_ALL=C root="${ANCHOR_ROOT:-}" callback="$1" file status=0
    anchor_cmdline__file "$root/etc/anchor/params" anchor_cmdline__parameter "$callback" || status=1
    case $- in
        *f*)
            set +f
            set -- "$root"/etc/cmdline.d/*.conf
            set -f
            ;;
        *) set -- "$root"/etc/cmdline.d/*.conf ;;
    esac
    for file in "$@" "$root/etc/cmdline" "$root/proc/cmdline"; do
        anchor_cmdline__file "$file" anchor_cmdline_split "$callback" || status=1
    done
    return "$status"
}
