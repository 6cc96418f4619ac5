#!/bin/sh
# Puts certferry on this host, upgrades it, or takes it away again. Needs root, asks nothing.
#
#     sh install.sh                                     install, or upgrade
#     sh install.sh example.com --from up.example.net   the same, then certferry with these words
#     sh install.sh --uninstall                         remove what was put here; certificates stay
#     curl -fsSL URL/install.sh | CERTFERRY_URL=URL sh  fetch the other files from URL, https only
#
# PREFIX=/usr/local, DESTDIR= and PYTHON= (an interpreter's path) may be given in the environment.
# The last line starts everything, so a script that was cut off on its way does nothing. And no
# function's name begins with a command that does harm: a cut may leave just that.

# What belongs to this script, and must match when fetched: tests/test_install.py --write-sums
files_and_sums='
852dffaaa2546423f657fd1dfb72a53dcf72eff0d76affe99fc3859e1844f982  certferry.py
75a77db0cfe038dc5e0870a29a2eb0e73db60b8062d1ebbcbfa7c5c6a53b0906  certferry.service
9d314e9fd31553212358ad1877c9213f46bbbf52ad8ee84b0f79868e7ca1ae74  certferry.timer
'

usage() {
    echo 'usage: sh install.sh [NAME [OPTION...]]   install or upgrade, then run certferry NAME ...'
    echo '       sh install.sh --uninstall            remove it; certificates stay'
    echo 'environment: PREFIX=/usr/local DESTDIR= PYTHON= CERTFERRY_URL=https://...'
}

complain() {   # what is wrong, and what to do
    echo "certferry: $1" >&2
}

fail() {
    complain "$1"
    exit 1
}

has() {
    command -v "$1" >/dev/null 2>&1
}

is_root() {
    [ "$(id -u)" -eq 0 ]
}

booted_with_systemd() {
    [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]
}

came_through_a_pipe() {   # then $0 is the shell, and standard input is this script
    case $0 in
        *.sh) return 1 ;;
    esac
}


# What this host has, and what it lacks

how_to_get() {   # packages: the command that installs them here
    if has apt-get; then echo "apt-get install $*" | sed 's/python3/python3-minimal/'
    elif has dnf; then echo "dnf install $*" | sed 's/cron$/cronie/'
    elif has yum; then echo "yum install $*" | sed 's/cron$/cronie/'
    elif has apk; then echo "apk add $*"
    elif has zypper; then echo "zypper install $*"
    elif has pacman; then echo "pacman -S $*" | sed 's/python3/python/'
    elif has pkg; then echo "pkg install $*"
    else echo "install $* with this system's package manager"
    fi
}

choose_python() {   # sets $python: the system's own before one that somebody's PATH brings in
    for python in ${PYTHON:-/usr/bin/python3 python3 /usr/libexec/platform-python}; do
        if python=$("$python" -IS -c 'import ssl, sys; print(sys.executable)
sys.exit(sys.version_info < (3, 6))' 2>/dev/null); then
            return
        fi
    done
    python=
}

choose_python_of_tree() {   # the same for a DESTDIR: it can perhaps not run here
    for python in ${PYTHON:-/usr/bin/python3 /usr/libexec/platform-python}; do
        if is_in_tree "$python"; then return; fi
    done
    python=${PYTHON:-/usr/bin/python3}
}

is_in_tree() {   # path of a program; a link may lead to nothing here
    [ -x "$DESTDIR$1" ] || [ -L "$DESTDIR$1" ]
}

check_needs() {
    missing=
    if [ -n "$DESTDIR" ]; then
        choose_python_of_tree
        has sha256sum || has openssl || missing=' openssl'
    else
        choose_python
        [ -n "$python" ] || [ -z "$PYTHON" ] || fail "PYTHON=$PYTHON does not start, is older than \
Python 3.6 or lacks the ssl module. Give another one, or none"
        [ -n "$python" ] || missing=' python3'
        has openssl || missing="$missing openssl"
    fi
    [ -z "$missing" ] || fail "this host lacks$missing (Python 3.6 or later and the openssl \
command are needed). Try: $(how_to_get "${missing# }")"
    case $python in
        *[!A-Za-z0-9/._+-]* | [!/]*) fail "PYTHON=$python: must be an absolute path, no blanks" ;;
    esac
}

has_trust_store() {
    for store in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt \
        /etc/ssl/ca-bundle.pem /etc/ssl/cert.pem /usr/local/share/certs/ca-root-nss.crt; do
        [ ! -e "$store" ] || return 0
    done
    return 1
}

choose_scheduler() {   # sets $scheduler to user, systemd, cron or busybox, and $daemon to cron's
    scheduler=user
    if ! is_root && [ -z "$DESTDIR" ]; then
        [ "$PREFIX" != /usr/local ] ||
            fail 'root is needed (or, for yourself alone, PREFIX=~/.local). Try: sudo sh install.sh'
        return
    fi
    choose_cron
    if is_for_systemd; then scheduler=systemd; fi
}

choose_cron() {
    scheduler=cron
    for daemon in /usr/sbin/cron /usr/sbin/crond /usr/bin/crond /sbin/crond; do
        if is_in_tree "$daemon"; then
            case $(readlink "$DESTDIR$daemon") in
                *busybox*) scheduler=busybox ;;   # it reads no /etc/cron.d
            esac
            return
        fi
    done
    daemon=
}

is_for_systemd() {
    # What an earlier run chose stays.
    if [ -f "$DESTDIR$cron_file" ] && [ -n "$daemon" ]; then return 1; fi
    if [ -d "$DESTDIR/run/systemd/system" ]; then return 0; fi
    # It is not running. Debian's cron brings its files along where it never will: cron is the
    # safer one, for it runs under systemd too.
    if [ -z "$DESTDIR" ]; then [ -z "$daemon" ] && has_systemd_files; return; fi
    # A tree without /etc is a package in the making.
    [ ! -d "$DESTDIR/etc" ] || [ -f "$DESTDIR$units/certferry.timer" ] || has_systemd_files
}

has_systemd_files() {
    [ -x "$DESTDIR/usr/lib/systemd/systemd" ] || [ -x "$DESTDIR/lib/systemd/systemd" ]
}

digest_of() {   # file: its SHA-256
    if has sha256sum; then sha256sum <"$1"; else openssl dgst -sha256 -r <"$1"; fi | cut -c 1-64
}

right_file() {   # file: is it the one that belongs to this script?
    case $files_and_sums in
        *"
$(digest_of "$1")  $(basename "$1")
"*) ;;
        *) return 1 ;;
    esac
}


# Timers, certferry's and another program's

is_active() {   # timer: does it run?
    if booted_with_systemd; then systemctl -q is-active "$1"; else is_enabled "$1"; fi
}

is_enabled() {   # timer: does it start at boot?
    if booted_with_systemd; then
        # a unit without [Install] is "static", which counts as a success
        [ "$(systemctl is-enabled "$1" 2>/dev/null)" = enabled ]
    else
        [ -L "$DESTDIR$units/timers.target.wants/$1" ]
    fi
}

how_to_switch() {   # enable or disable, timer: what to type for it
    if [ -n "$DESTDIR" ]; then
        echo "systemctl --root='$DESTDIR' $1 $2"
    else
        echo "systemctl $1 --now $2"
    fi
}

refuse_another_program() {
    [ "$scheduler" != user ] || return 0
    other=certferry-renew.timer
    if is_active "$other" || is_enabled "$other"; then
        fail "$other of another program of this name is active. Try: $(how_to_switch disable \
"$other")"
    fi
}

ferried_names() {   # the lineages that are set up here, a line each
    {
        for file in "$DESTDIR$config_dir"/certferry/*.conf; do
            name=${file##*/}
            [ ! -f "$file" ] || echo "${name%.conf}"
        done
        for file in "$DESTDIR$config_dir"/live/*/.current; do
            name=${file%/.current}
            name=${name##*/}
            case $(readlink "$file") in
                "../../archive/$name@"*) echo "$name" ;;
            esac
        done
    } | sort -u
}

tell_of_timer() {   # lineages are here, and nothing renews them
    [ "$scheduler" = systemd ] || return 0
    [ -n "$DESTDIR" ] || booted_with_systemd || return 0
    if is_active certferry.timer && is_enabled certferry.timer; then return; fi
    # shellcheck disable=SC2046  # names have no blanks
    set -- $(ferried_names)
    case $# in
        0) return ;;
        1) who="$1 is" ;;
        *) who="$1 and $(($# - 1)) more are" ;;
    esac
    echo "$who set up here and no timer is on. Try: $(how_to_switch enable certferry.timer)"
}


# Getting the files

download() {   # name
    if has curl; then
        curl --proto =https --tlsv1.2 -fsSL --max-time 300 -o "$work/$1" "$CERTFERRY_URL/$1"
    elif has wget; then
        straight=--max-redirect=0   # wget could be led away from https; busybox has no such option
        wget --version >/dev/null 2>&1 || straight=
        wget -q -t 3 -T 60 ${straight:+"$straight"} -O "$work/$1" "$CERTFERRY_URL/$1"
    else
        fail "curl or wget is needed here. Try: $(how_to_get curl)"
    fi || fail "could not fetch $CERTFERRY_URL/$1: nothing was changed"
    right_file "$work/$1" ||
        fail "$CERTFERRY_URL/$1 is damaged, or not of this script's version: nothing was changed"
}

gather() {   # into $work: from beside this script, or from CERTFERRY_URL
    beside=/dev/null
    came_through_a_pipe || beside=$(dirname "$0")
    [ -n "$CERTFERRY_URL" ] || [ -f "$beside/certferry.py" ] ||
        fail 'certferry.py is not beside this script: set CERTFERRY_URL=https://... to fetch it'
    for name in certferry.py certferry.service certferry.timer; do
        if [ -n "$CERTFERRY_URL" ]; then
            download "$name"
        else
            cp "$beside/$name" "$work/$name"
            right_file "$work/$name" ||
                complain "$name is not as it came with install.sh: installed as it is"
        fi
    done
}

use_private_folder() {   # sets $work
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
}

check_start() {   # the way it will be started, but from $work
    [ -z "$DESTDIR" ] || return 0
    launcher "$work" >"$work/certferry"
    "$python" -IS "$work/certferry" --version >/dev/null ||
        fail "certferry does not start with $python: nothing was changed"
}


# Putting them in place

ensure_folder() {   # path: with its parents; $made lists the new ones, deepest first
    if [ ! -d "$DESTDIR$1" ]; then
        ensure_folder "$(dirname "$1")"
        mkdir "$DESTDIR$1"
        made="$1 $made"
    fi
}

put() {   # file, path, mode, what to call it: by one rename, and only where something differs
    if [ -f "$DESTDIR$2" ] && [ "$(digest_of "$1")" = "$(digest_of "$DESTDIR$2")" ]; then
        chmod "$3" "$DESTDIR$2"
        return
    fi
    new=$DESTDIR$(dirname "$2")/.certferry.new
    rm -f "$new"
    cp "$1" "$new"
    chmod "$3" "$new"
    mv -f "$new" "$DESTDIR$2"
    changed="$changed, $4"
}

launcher() {   # folder of the module
    # -IS: the standard library alone, no environment, no code of any other package at start.
    # The folder comes last: nothing in it can stand in for a part of the standard library.
    cat <<END
#!$python -IS
# install.sh made this. The program is $1/certferry.py.
import sys

sys.path.append("$1")
import certferry

certferry.command()
END
}

put_program() {   # the module first: at every instant what is at $program works
    ensure_folder "$PREFIX/bin"
    ensure_folder "$lib"
    made="$made$(made_before)"
    put_module
    changed_module=$changed
    changed=
    launcher "$lib" >"$work/certferry"
    [ -z "$made" ] || echo "# install.sh made these folders: $made" >>"$work/certferry"
    put "$work/certferry" "$program" 755 "$program"
    changed=$changed$changed_module
}

put_module() {
    put "$work/certferry.py" "$lib/certferry.py" 644 "$lib"
    # Python knows a stale cache by its time in seconds and its size: these may be the same.
    [ -z "$changed" ] || rm -rf "$DESTDIR$lib/__pycache__"
    compile_module
    # Root runs it, and any user may: whatever was there before, and with any umask.
    ! is_root || chown -R 0:0 "$DESTDIR$lib"
    chmod -R u=rwX,go=rX "$DESTDIR$lib"
}

compile_module() {   # a matter of speed alone: what is not compiled here root's first run will do
    if [ -n "$DESTDIR" ] && is_in_tree "$python"; then return; fi
    # By importing it: some minimal Pythons lack what compileall needs.
    "$python" -IS -c 'import sys
sys.path.append(sys.argv[1])
import certferry' "$DESTDIR$lib" >/dev/null 2>&1 || true
}

made_before() {   # the folders that an earlier run made, as the installed program's last line says
    [ ! -f "$DESTDIR$program" ] ||
        LC_ALL=C sed -n '$s/^# install.sh made these folders: //p' "$DESTDIR$program"
}

put_units() {
    before=$changed
    sed "s|/usr/local/bin/certferry|$program|" "$work/certferry.service" >"$work/unit"
    put "$work/unit" "$units/certferry.service" 644 certferry.service
    put "$work/certferry.timer" "$units/certferry.timer" 644 certferry.timer
    if booted_with_systemd && [ "$changed" != "$before" ]; then
        systemctl daemon-reload
        ! is_active certferry.timer || systemctl restart certferry.timer
    fi
}

put_cron_file() {
    {
        echo "# Twice a day; --jitter adds a delay of up to 12 hours that is this host's own."
        echo 'SHELL=/bin/sh'
        echo 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
        schedule_line 'root '
    } >"$work/cron"
    put "$work/cron" "$cron_file" 644 "$cron_file"
}

schedule_line() {   # user field
    echo "17 1,13 * * * $1$program renew --jitter 43200 -q"
}

install_certferry() {
    choose_scheduler
    check_needs
    refuse_another_program
    use_private_folder
    gather
    check_start
    made=
    changed=
    [ -z "$DESTDIR" ] || mkdir -p "$DESTDIR"
    notice_another_program
    case $scheduler in
        systemd)
            ensure_folder "$units"
            put_program
            put_units
            rm -f "$DESTDIR$cron_file"   # of a time before systemd: one of them is enough
            ;;
        cron) ensure_folder /etc/cron.d; put_program; put_cron_file ;;
        *) put_program ;;
    esac
    rm -rf "$work"
    if [ -n "$changed" ]; then echo "installed ${changed#, }"; else echo "unchanged $program"; fi
    say_what_to_do
}

notice_another_program() {   # the compiled cert-ferry is called certferry too
    if [ -f "$DESTDIR$program" ] && ! is_script "$DESTDIR$program"; then
        complain "$program was another program of this name, and is replaced"
    fi
}

is_script() {
    [ "$(head -c 2 "$1")" = '#!' ]
}

say_what_to_do() {
    [ "$scheduler" != busybox ] || say_crontab
    [ -z "$DESTDIR" ] || return 0
    case $scheduler in
        user) echo "put into crontab -e: $(schedule_line '') --config-dir DIR" ;;
        cron)
            [ -n "$daemon" ] ||
                complain "there is no cron here to run it twice a day. Try: $(how_to_get cron)"
            ;;
        systemd)
            booted_with_systemd || echo "systemd is installed and does not run: where it never" \
                "will, install again once cron is here. Try: $(how_to_get cron)"
            ;;
    esac
    has_trust_store || complain "there are no public certificate authorities here (your own: \
--ca-file). Try: $(how_to_get ca-certificates)"
}

say_crontab() {
    crontab=$DESTDIR/etc/crontabs/root
    grep -qs "$program" "$crontab" ||
        echo "nothing runs it twice a day. Try: echo '$(schedule_line '')' >>$crontab"
}


# The way back

uninstall() {
    choose_scheduler
    removed=
    made=$(made_before)
    if [ -f "$DESTDIR$program" ] && is_script "$DESTDIR$program"; then
        remove "$program" "$program"
    fi
    if [ -f "$DESTDIR$lib/certferry.py" ]; then
        rm -rf "$DESTDIR$lib/__pycache__"
        remove "$lib/certferry.py" "$lib"
    fi
    rmdir "$DESTDIR$lib" 2>/dev/null || true
    if [ "$scheduler" != user ]; then
        disable_timer
        remove "$units/certferry.service" certferry.service
        remove "$units/certferry.timer" certferry.timer
        remove "$cron_file" "$cron_file"
        rm -f "$DESTDIR/var/lib/systemd/timers/stamp-certferry.timer"
    fi
    if [ "$scheduler" != user ] && booted_with_systemd; then
        systemctl daemon-reload
        systemctl -q reset-failed certferry.service 2>/dev/null || true
    fi
    for folder in $made; do
        rmdir "$DESTDIR$folder" 2>/dev/null || true
    done
    if [ -n "$removed" ]; then echo "removed ${removed#, }"; else echo 'certferry was not here'; fi
    say_what_stays
}

remove() {   # path, what to call it
    rm -f "$DESTDIR$(dirname "$1")/.certferry.new"   # what a killed install left
    [ -f "$DESTDIR$1" ] || return 0
    rm -f "$DESTDIR$1"
    removed="$removed, $2"
}

disable_timer() {
    if booted_with_systemd; then
        systemctl -q disable --now certferry.timer 2>/dev/null || true
    elif has systemctl; then
        systemctl -q --root="$DESTDIR/" disable certferry.timer 2>/dev/null || true
    fi
    rm -f "$DESTDIR$units/timers.target.wants/certferry.timer"
}

say_what_stays() {
    [ ! -d "$DESTDIR$lib" ] || echo "kept $lib, which holds files that are not certferry's"
    for file in "$units/certferry.service.d" "$units/certferry.timer.d"; do
        [ ! -e "$DESTDIR$file" ] || echo "kept $file, which systemctl edit made"
    done
    for file in /etc/crontabs/root /var/spool/cron/crontabs/root; do
        ! grep -qs "$program" "$DESTDIR$file" || echo "to remove by hand: certferry's line in $file"
    done
    if is_root; then   # a user's own copy was not what renewed root's
        say_what_ends
    elif crontab -l 2>/dev/null | grep -q "$program"; then
        echo "to remove by hand: certferry's line (crontab -e)"
    fi
}

say_what_ends() {
    kept=
    for name in $(ferried_names); do
        live=$DESTDIR$config_dir/live/$name
        [ ! -d "$live" ] || kept="$kept, $name (until $(day_it_ends "$live"))"
    done
    [ -z "$kept" ] || echo "kept $config_dir: nothing renews these now: ${kept#, }"
}

day_it_ends() {   # live/NAME: the date when what is in service runs out
    cert=$1/fullchain.pem
    [ -e "$cert" ] || cert=$1/cert.pem
    if ! end=$(openssl x509 -noout -enddate -in "$cert" 2>/dev/null); then echo unknown; return; fi
    # shellcheck disable=SC2086  # notAfter=Feb 20 12:00:00 2027 GMT
    set -- ${end#*=}
    before=JanFebMarAprMayJunJulAugSepOctNovDec
    before=${before%%"$1"*}
    printf '%s-%02d-%02d\n' "$4" $((${#before} / 3 + 1)) "$2"
}


main() {
    set -eu
    umask 022
    PREFIX=${PREFIX:-/usr/local}
    PREFIX=${PREFIX%/}
    DESTDIR=${DESTDIR:-}
    DESTDIR=${DESTDIR%/}
    PYTHON=${PYTHON:-}
    CERTFERRY_URL=${CERTFERRY_URL:-}
    CERTFERRY_URL=${CERTFERRY_URL%/}
    program=$PREFIX/bin/certferry
    lib=$PREFIX/lib/certferry
    units=/etc/systemd/system
    cron_file=/etc/cron.d/certferry
    config_dir=/etc/letsencrypt
    [ "$(uname -s)" != FreeBSD ] || config_dir=/usr/local/etc/letsencrypt
    case $PREFIX in
        *[!A-Za-z0-9/._+-]* | [!/]*) fail "PREFIX=$PREFIX: must be an absolute path, no blanks" ;;
    esac
    case $CERTFERRY_URL in
        '' | https://*) ;;
        *) fail "CERTFERRY_URL=$CERTFERRY_URL: must begin with https://" ;;
    esac
    case ${1:-} in
        -h | --help) usage ;;
        --uninstall) uninstall ;;
        -*) usage >&2; exit 2 ;;
        '') install_certferry; tell_of_timer ;;
        *) install_and_run "$@" ;;
    esac
}

install_and_run() {   # NAME [OPTION...]
    [ -z "$DESTDIR" ] || fail "DESTDIR is another system: certferry $1 must run there"
    for word in "$@"; do
        case $word in
            - | --key=-)
                ! came_through_a_pipe ||
                    fail 'standard input is this script and can bring no key: give --key FILE'
                ;;
        esac
    done
    install_certferry
    status=0
    "$program" "$@" || status=$?
    tell_of_timer
    exit "$status"
}

{ main "$@"; exit; }
