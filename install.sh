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
3ba36803b4189b373f5c327f17e5a098c679733c9840bd7f13ccec177479639e  certferry.py
75a77db0cfe038dc5e0870a29a2eb0e73db60b8062d1ebbcbfa7c5c6a53b0906  certferry.service
9d314e9fd31553212358ad1877c9213f46bbbf52ad8ee84b0f79868e7ca1ae74  certferry.timer
'

usage() {
    echo 'usage: sh install.sh [NAME [OPTION...]]   install or upgrade, then run certferry NAME ...'
    echo '       sh install.sh --uninstall            remove it; certificates stay'
    echo 'environment: PREFIX=/usr/local DESTDIR= PYTHON= CERTFERRY_URL=https://...'
}

fail() {
    echo "certferry: $1" >&2
    exit 1
}

has() {
    command -v "$1" >/dev/null 2>&1
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
        if [ -n "$DESTDIR" ]; then   # another system's: it can perhaps not run here
            if [ -x "$DESTDIR$python" ] || [ -L "$DESTDIR$python" ]; then return; fi
        elif path=$("$python" -IS -c 'import ssl, sys; print(sys.executable)
sys.exit(sys.version_info < (3, 6))' 2>/dev/null); then
            python=$path
            return
        fi
    done
    python=${PYTHON:-/usr/bin/python3}
    [ -n "$DESTDIR" ]
}

check_needs() {
    missing=
    choose_python || missing=' python3'
    has openssl || { [ -n "$DESTDIR" ] && has sha256sum; } || missing="$missing openssl"
    [ -z "$missing" ] ||
        fail "needs$missing here (Python 3.6 or later): $(how_to_get "${missing# }")"
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
    if [ "$(id -u)" != 0 ] && [ -z "$DESTDIR" ]; then
        [ "$PREFIX" != /usr/local ] || fail "needs root: sudo sh install.sh; or PREFIX=~/.local"
        return
    fi
    scheduler=systemd
    if [ -d "$DESTDIR/run/systemd/system" ] || [ -x "$DESTDIR/usr/lib/systemd/systemd" ] ||
        [ -x "$DESTDIR/lib/systemd/systemd" ] || [ -f "$DESTDIR$units/certferry.timer" ] ||
        [ ! -d "$DESTDIR/etc" ]; then
        return   # a DESTDIR without /etc is a package in the making
    fi
    scheduler=cron
    for daemon in usr/sbin/cron usr/sbin/crond usr/bin/crond sbin/crond none; do
        if [ -x "$DESTDIR/$daemon" ] || [ -L "$DESTDIR/$daemon" ]; then break; fi
    done
    case $(readlink "$DESTDIR/$daemon") in
        *busybox*) scheduler=busybox ;;   # it reads no /etc/cron.d
    esac
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


# Getting the files

download() {   # name
    if has curl; then
        curl --proto =https --tlsv1.2 -fsSL --max-time 300 -o "$work/$1" "$CERTFERRY_URL/$1"
    elif has wget; then
        straight=--max-redirect=0   # wget could be led away from https; busybox has no such option
        wget --version >/dev/null 2>&1 || straight=
        wget -q -t 3 -T 60 ${straight:+"$straight"} -O "$work/$1" "$CERTFERRY_URL/$1"
    else
        fail "needs curl or wget here: $(how_to_get curl)"
    fi || fail "could not fetch $CERTFERRY_URL/$1: nothing was changed"
    right_file "$work/$1" ||
        fail "$CERTFERRY_URL/$1 is damaged, or not of this script's version: nothing was changed"
}

gather() {   # into $work: from beside this script, or from CERTFERRY_URL
    beside=/dev/null
    case $0 in
        *.sh) beside=$(dirname "$0") ;;   # and not "sh", which reads this from a pipe
    esac
    [ -n "$CERTFERRY_URL" ] || [ -f "$beside/certferry.py" ] ||
        fail 'certferry.py is not beside this script: set CERTFERRY_URL=https://... to fetch it'
    for name in certferry.py certferry.service certferry.timer; do
        if [ -n "$CERTFERRY_URL" ]; then
            download "$name"
        else
            cp "$beside/$name" "$work/$name"
            right_file "$work/$name" ||
                echo "certferry: $name is not as it came with install.sh: installed as it is" >&2
        fi
    done
}

use_private_folder() {   # sets $work
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
}


# Putting them in place

ensure_folder() {   # path: with its parents; $made lists the new ones, deepest first
    if [ ! -d "$DESTDIR$1" ]; then
        ensure_folder "$(dirname "$1")"
        mkdir "$DESTDIR$1"
        made="$1 $made"
    fi
}

put() {   # file, path, mode: by one rename, and only where something differs
    if [ -f "$DESTDIR$2" ] && [ "$(digest_of "$1")" = "$(digest_of "$DESTDIR$2")" ]; then
        chmod "$3" "$DESTDIR$2"
        return
    fi
    new=$DESTDIR$(dirname "$2")/.certferry.new
    rm -f "$new"
    cp "$1" "$new"
    chmod "$3" "$new"
    mv -f "$new" "$DESTDIR$2"
    changed="$changed $2"
}

put_program() {
    ensure_folder "$PREFIX/bin"
    made="$made$(made_before)"
    # -IS: nothing but the standard library, and no code of any other package at start.
    sed "1s|^#!.*|#!$python -IS|" "$work/certferry.py" >"$work/certferry"
    [ -z "$made" ] || echo "# install.sh made these folders: $made" >>"$work/certferry"
    put "$work/certferry" "$program" 755
}

made_before() {   # the folders that an earlier run made, as the installed program's last line says
    [ ! -f "$DESTDIR$program" ] ||
        LC_ALL=C sed -n '$s/^# install.sh made these folders: //p' "$DESTDIR$program"
}

put_units() {
    sed "s|/usr/local/bin/certferry|$program|" "$work/certferry.service" >"$work/unit"
    put "$work/unit" "$units/certferry.service" 644
    put "$work/certferry.timer" "$units/certferry.timer" 644
    if booted_with_systemd && [ -n "$changed" ]; then
        systemctl daemon-reload
        ! systemctl -q is-active certferry.timer || systemctl restart certferry.timer
    fi
}

put_cron_file() {
    {
        echo "# Twice a day; --jitter adds a delay of up to 12 hours that is this host's own."
        echo 'SHELL=/bin/sh'
        echo 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
        schedule_line 'root '
    } >"$work/cron"
    put "$work/cron" "$cron_file" 644
}

schedule_line() {   # user field
    echo "17 1,13 * * * $1$program renew --jitter 43200 -q"
}

booted_with_systemd() {
    [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]
}

install_certferry() {
    choose_scheduler
    check_needs
    use_private_folder
    gather
    [ -n "$DESTDIR" ] || "$python" -IS "$work/certferry.py" --version >/dev/null ||
        fail "certferry does not start with $python: nothing was changed"
    notice_older
    made=
    changed=
    case $scheduler in
        systemd) ensure_folder "$units"; put_program; put_units ;;
        cron) ensure_folder /etc/cron.d; put_program; put_cron_file ;;
        *) put_program ;;
    esac
    rm -rf "$work"
    if [ -n "$changed" ]; then echo "installed$changed"; else echo "unchanged $program"; fi
    if [ -n "$older" ] && [ "$scheduler" != user ]; then oust_older; fi
    say_what_to_do
}

say_what_to_do() {
    if [ "$scheduler" = busybox ]; then
        echo "put into /etc/crontabs/root: $(schedule_line '')"
    fi
    [ -z "$DESTDIR" ] || return 0
    case $scheduler in
        user) echo "put into crontab -e: $(schedule_line '') --config-dir DIR" ;;
        cron)
            [ "$daemon" != none ] ||
                echo "certferry: no cron here to run it twice a day: $(how_to_get cron)" >&2
            ;;
        systemd)
            booted_with_systemd || echo "systemd is installed and does not run: where it never" \
                "does, put into root's crontab: $(schedule_line '')"
            ;;
    esac
    has_trust_store || echo "certferry: no public certificate authorities here:" \
        "$(how_to_get ca-certificates); or give --ca-file" >&2
}


# The older one, and the way back

notice_older() {   # sets $older: the Rust cert-ferry's compiled program and its timer
    older=
    for file in /usr/local/bin/certferry /usr/bin/certferry; do
        if [ -f "$DESTDIR$file" ] && ! is_script "$DESTDIR$file"; then older="$older $file"; fi
    done
    for file in "$units/certferry-renew.timer" /usr/lib/systemd/system/certferry-renew.timer; do
        if [ -f "$DESTDIR$file" ]; then older="$older $file"; fi
    done
}

oust_older() {
    disable_timer certferry-renew
    echo "certferry: the older cert-ferry was here:$older: certferry-renew.timer is disabled" >&2
    for folder in "$DESTDIR$config_dir"/live/*/; do
        if [ -f "$folder/privkey.pem" ] && [ -f "$folder/cert.pem" ] && [ ! -L "$folder/cert.pem" ]
        then
            echo "  to take over its certificate: certferry $(basename "$folder")" >&2
        fi
    done
}

is_script() {
    [ "$(head -c 2 "$1")" = '#!' ]
}

disable_timer() {   # name
    if booted_with_systemd; then
        systemctl -q disable --now "$1.timer" 2>/dev/null || true
    elif has systemctl; then
        systemctl -q --root="$DESTDIR/" disable "$1.timer" 2>/dev/null || true
    fi
    rm -f "$DESTDIR$units/timers.target.wants/$1.timer"
}

uninstall() {
    choose_scheduler
    removed=
    made=$(made_before)
    if [ -f "$DESTDIR$program" ] && is_script "$DESTDIR$program"; then remove "$program"; fi
    if [ "$scheduler" != user ]; then
        disable_timer certferry
        remove "$units/certferry.service"
        remove "$units/certferry.timer"
        remove "$cron_file"
        rm -f "$DESTDIR/var/lib/systemd/timers/stamp-certferry.timer"
    fi
    if [ "$scheduler" = systemd ] && booted_with_systemd; then
        systemctl daemon-reload
        systemctl -q reset-failed certferry.service 2>/dev/null || true
    fi
    for folder in $made; do
        rmdir "$DESTDIR$folder" 2>/dev/null || true
    done
    if [ -n "$removed" ]; then echo "removed$removed"; else echo 'certferry was not here'; fi
    say_what_stays
}

remove() {   # path
    [ -f "$DESTDIR$1" ] || return 0
    rm -f "$DESTDIR$1"
    removed="$removed $1"
}

say_what_stays() {
    for file in "$units/certferry.service.d" "$units/certferry.timer.d"; do
        [ ! -e "$DESTDIR$file" ] || echo "kept $file, which systemctl edit made"
    done
    for file in /etc/crontabs/root /var/spool/cron/crontabs/root; do
        ! grep -qs "$program" "$DESTDIR$file" || echo "to remove by hand: certferry's line in $file"
    done
    [ "$(id -u)" -eq 0 ] || ! crontab -l 2>/dev/null | grep -q "$program" ||
        echo "to remove by hand: certferry's line (crontab -e)"
    kept=
    for folder in "$DESTDIR$config_dir"/live/*/; do
        [ ! -L "$folder/.current" ] ||
            kept="$kept, $(basename "$folder") (until $(day_it_ends "$folder/cert.pem"))"
    done
    # a user's own copy was not what renewed root's
    [ -z "$kept" ] || [ "$(id -u)" -ne 0 ] ||
        echo "kept $config_dir: nothing renews these now: ${kept#, }"
}

day_it_ends() {   # certificate: the date when it runs out
    if ! end=$(openssl x509 -noout -enddate -in "$1" 2>/dev/null); then echo unknown; return; fi
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
    DESTDIR=${DESTDIR:-}
    DESTDIR=${DESTDIR%/}
    CERTFERRY_URL=${CERTFERRY_URL:-}
    CERTFERRY_URL=${CERTFERRY_URL%/}
    program=$PREFIX/bin/certferry
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
        '') install_certferry ;;
        *)
            [ -z "$DESTDIR" ] || fail "DESTDIR is another system: certferry $1 must run there"
            install_certferry
            "$program" "$@"
            ;;
    esac
}

{ main "$@"; exit; }
