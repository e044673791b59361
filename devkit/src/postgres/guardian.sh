# Runs one Postgres server for an owner and outlives it: whatever ends the owner, SIGKILL included, closes our standard input.
# Arguments: the postgres program, the data folder, the log file, the folder to remove at the end (empty: none).
# Standard input:  `fast` or `immediate` stop the server; `release` leaves the files and ends; the end of input stops and removes.
# Standard output: `started PID`, then `exited CODE`.

# The owner may be gone when we write, and a terminal's signals are not for us.
trap '' HUP INT TERM PIPE

exec 3<&0
"$1" -D "$2" </dev/null >>"$3" 2>&1 3<&- &
server=$!
# Only the parent of a process knows for sure whose its number is, so only this shell signals the server.
trap 'kill -s INT "$server"' USR1
trap 'kill -s QUIT "$server"' USR2
echo "started $server"

(
    while read -r word; do
        case $word in
            fast) kill -s USR1 $$ ;;
            immediate) kill -s USR2 $$ ;;
            release) exit 0 ;;
        esac
    done
    kill -s USR1 $$
    exit 1
) <&3 >/dev/null 2>&1 &
reader=$!
exec 3<&-

while :; do
    wait "$server"
    code=$?
    # A trapped signal ends `wait` too; then the server is still there.
    kill -0 "$server" 2>/dev/null || break
done
trap '' USR1 USR2
echo "exited $code" 2>/dev/null

# Stay after the server is gone: while it is stopped, the files still need somebody who removes them if the owner dies.
wait "$reader" && exit 0
if [ -n "$4" ]; then
    # Whoever started us may have had no PATH to speak of.
    PATH="$PATH:/usr/bin:/bin"
    cd / && rm -rf "$4"
fi
