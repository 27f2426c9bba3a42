# shellcheck shell=bash
# Read by dracut with its configuration, and by the stand-in for dracut-install: what a build does for dracut itself,
# instead of the programs that dracut would start some hundred times. installer.py is the other end.
# shellcheck disable=SC2154 # anchor_place, the work directory, is set before

anchor_real=/usr/lib/dracut/dracut-install
# seconds: longer than the build ever takes to answer, so it was killed
ANCHOR_PATIENCE=60

# anchor_ask WORDS…: let the build do what a program would do with these arguments. Reads $anchor_place. Fails where the
# program has to do it, or the rest of it, after all. When nobody answers nobody is asked again, in any shell.
anchor_ask() {
    local LC_ALL=C anchor_id=$BASHPID.$RANDOM$RANDOM anchor_answer='' anchor_words="$PATH $*" anchor_umask
    [[ -p $anchor_place/turn && -z ${DRACUT_INSTALL_PATH-}${DESTROOTDIR-} ]] || return 1
    # Directories would get other modes; for cpio dracut has another. This is umask without a shell for it: proc(5).
    mapfile -s 1 -n 1 -t anchor_umask 2>/dev/null </proc/self/status
    [[ $1 == cpio || ${anchor_umask[0]-} == Umask:*0022 ]] || return 1
    # A pipe takes 64 KiB that nobody reads, if the build was killed.
    ((${#anchor_words} + 2 * $# < 60000)) || return 1
    # Pipes that are opened for both directions wait for nobody. One asks at a time.
    if IFS= read -r -N 1 -t "$ANCHOR_PATIENCE" anchor_answer <>"$anchor_place/turn"; then
        printf '%s\0' "$anchor_id" "$PATH" "$#" "$@" 1<>"$anchor_place/ask"
        if IFS= read -r -t "$ANCHOR_PATIENCE" anchor_answer <>"$anchor_place/answer"; then
            printf . 1<>"$anchor_place/turn"
            [[ $anchor_answer == "$anchor_id done" ]]
            return
        fi
    fi
    rm -f -- "$anchor_place/turn"
    return 1
}

# cpio OPTIONS…: pack the files that standard input names.
cpio() {
    if [[ " $* " != *' -o '* ]]; then
        command cpio "$@"
        return
    fi
    cat >"$anchor_place/names"
    anchor_ask cpio "$PWD" "$@" || command cpio "$@" <"$anchor_place/names"
}

# mkdir OPTIONS… DIRECTORY
mkdir() {
    case $#:$* in
        '2:-p '* | '4:-m 0755 -p '*) anchor_ask mkdir "${@:$#}" && return ;;
    esac
    command mkdir "$@"
}

# sed -nr SCRIPT FILE: print the programs, owners or groups that a file of udev's rules names.
sed() {
    local anchor_lines anchor_line anchor_pattern anchor_rest='([^ "]+).*/\1/p'
    if (($# != 3)) || [[ $1 != -nr || $2 != 's/.*'[A-Z]*"$anchor_rest" || ! -f $3 || ! -r $3 ]]; then
        command sed "$@"
        return
    fi
    anchor_pattern=${2#s/}
    anchor_pattern=${anchor_pattern%'.*/\1/p'}
    mapfile -t anchor_lines <"$3"
    for anchor_line in "${anchor_lines[@]}"; do
        # sed's expressions are slow here: only for lines that can match
        [[ $anchor_line == *[A-Z]*=*\"* && $anchor_line =~ $anchor_pattern ]] && printf '%s\n' "${BASH_REMATCH[1]}"
    done
    return 0
}

# grep -Eq ^NAME: FILE, grep -q -F WORD FILE: as dracut looks for users, groups and udev's rules.
grep() {
    local anchor_lines anchor_line
    if [[ $#:$1 == 3:-Eq && $2 =~ ^\^[a-z_-]+:$ && -f $3 && -r $3 ]]; then
        mapfile -t anchor_lines <"$3"
        for anchor_line in "${anchor_lines[@]}"; do
            [[ $anchor_line != "${2#^}"* ]] || return 0
        done
        return 1
    elif [[ "$#:$1 $2" == '4:-q -F' && $3 == initqueue && -f $4 && -r $4 ]]; then
        mapfile -t anchor_lines <"$4"
        [[ "${anchor_lines[*]}" == *"$3"* ]]
    else
        command grep "$@"
    fi
}
