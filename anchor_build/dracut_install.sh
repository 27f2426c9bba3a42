# shellcheck shell=bash
# dracut-install ARGUMENTS…: called by dracut's xargs at the end, for all programs (-D DIRECTORY -R -- PROGRAM…); of most
# the build knows what they are linked with. dracut's own calls go to a function of this path.

anchor_place=${0%/*/*}
# shellcheck source=anchor_build/dracut_functions.sh
. "$anchor_place/dracut_functions.sh"

anchor_ask "$@" || exec "$anchor_real" "$@"
mapfile -d '' -t libraries <"$anchor_place/libraries"
mapfile -d '' -t programs <"$anchor_place/programs"
status=0
if ((${#libraries[@]})); then
    "$anchor_real" -D "$2" -a "${libraries[@]}" || status=$?
fi
if ((${#programs[@]})); then
    "$anchor_real" -D "$2" -R -- "${programs[@]}" || status=$?
fi
exit "$status"
