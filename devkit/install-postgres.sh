#!/bin/sh
# Installs what the local stack and the tests need beside Rust, where it is missing: the PostgreSQL server's programs and a C compiler.
#
# Does nothing where both are there. No server is started and none is set up: devkit runs its own. The places looked at are those of
# devkit/src/postgres/binaries.rs, which finds the programs at run time.
set -eu

oldest=14
newest=18

say() { echo "postgres: $*"; }

fail() {
    echo "postgres: $*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# usable FOLDER: does it hold the programs, in a version that devkit works with?
usable() {
    [ -x "$1/initdb" ] && [ -x "$1/pg_ctl" ] && [ -x "$1/postgres" ] || return 1
    # Prints `postgres (PostgreSQL) 17.2 (Debian 17.2-1)`.
    major=$("$1/postgres" --version 2>/dev/null | sed -n 's/^.*(PostgreSQL) \([0-9][0-9]*\).*$/\1/p')
    [ -n "$major" ] && [ "$major" -ge "$oldest" ] && [ "$major" -le "$newest" ]
}

# Is there a server's folder on PATH (or behind a link there), or where distributions put one?
found() {
    if program=$(command -v postgres); then
        real=$(readlink -f "$program" 2>/dev/null || echo "$program")
        usable "$(dirname "$real")" && return
    fi
    for folder in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin \
        /Applications/Postgres.app/Contents/Versions/*/bin; do
        usable "$folder" && return
    done
    return 1
}

# as_root COMMAND...: as it is for root, otherwise through sudo; without a terminal there is nobody to type a password.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif [ -t 0 ]; then
        sudo "$@"
    else
        sudo -n "$@"
    fi
}

# quietly COMMAND...: its output is shown only if it fails.
quietly() {
    log=$(mktemp)
    if "$@" >"$log" 2>&1; then
        rm -f "$log"
        return
    fi
    cat "$log" >&2
    rm -f "$log"
    return 1
}

# Debian sets up and starts a server of its own with the package, unless this file says not to. An existing file is the user's.
without_default_cluster() {
    conf=/etc/postgresql-common/createcluster.conf
    [ -e "$conf" ] && return
    as_root mkdir -p "${conf%/*}"
    as_root tee "$conf" >/dev/null <<'CONF'
# Written by Countersign's devkit/install-postgres.sh, which needs the programs of PostgreSQL and no server.
# Remove this line to have a cluster `main` made and started with the next version of PostgreSQL that is installed.
create_main_cluster = false
ssl = on
CONF
}

install_with_apt() {
    if [ "$(id -u)" -ne 0 ] && ! have sudo; then
        fail "missing: $packages; as root, run: apt-get install $packages"
    fi
    say "installing $packages with apt-get"
    case $packages in
        *postgresql*) without_default_cluster || fail "root is needed to install; run: sudo apt-get install $packages" ;;
    esac
    # Old lists of packages are often enough; if they are not, the next command says so.
    quietly as_root apt-get -q update || say "the lists of packages could not all be updated"
    # shellcheck disable=SC2086 # a list of packages
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $packages ||
        fail "apt-get could not install $packages"
}

packages=
if [ -n "${PG_BIN:-}" ]; then
    usable "$PG_BIN" || fail "PG_BIN=$PG_BIN holds no initdb, pg_ctl and postgres of PostgreSQL $oldest to $newest"
else
    found || packages=postgresql
fi
if ! have cc; then
    # The crate `ring` has parts in C and assembly.
    say "no C compiler found (cc), and the crate ring needs one"
    packages="$packages${packages:+ }gcc libc6-dev"
fi
[ -n "$packages" ] || exit 0

if have apt-get; then
    install_with_apt
else
    case $packages in
        *gcc*) fail "install a C compiler (macOS: xcode-select --install; elsewhere the package gcc or clang), then try again" ;;
    esac
    have brew || fail "install the server of PostgreSQL $oldest to $newest (its package is often called postgresql-server), or set PG_BIN"
    say "installing postgresql@17 with Homebrew"
    quietly brew install postgresql@17 || fail "Homebrew could not install postgresql@17"
fi

[ -n "${PG_BIN:-}" ] || found || fail "what was installed is not PostgreSQL $oldest to $newest; install one of these, or set PG_BIN"
have cc || fail "there is still no cc on PATH"
say "done"
