#!/bin/sh
# Run vLLM with adapters, without systemd.
#
#   deploy/serve.sh start      start it, and wait until it answers
#   deploy/serve.sh stop
#   deploy/serve.sh restart    the adapters in $RUN/adapters come back under their names
#   deploy/serve.sh status     exit code 0 if it answers
#
# Settings are environment variables; these are their defaults:
: "${MODEL:=model}"            # the base model: a folder or a hub id
: "${NAME:=base}"              # the name that requests give for the base model
: "${PORT:=8000}"
: "${HOST:=127.0.0.1}"         # 0.0.0.0 lets other machines in: set VLLM_API_KEY, too
: "${RUN:=run}"                # the folder of the pid file, the log and the list of adapters
: "${VLLM:=vllm}"              # the program
: "${MAX_LORA_RANK:=16}"       # at least the number of facts in one layer
: "${MAX_LORAS:=2}"            # adapters in one batch
: "${SECONDS_TO_START:=600}"
: "${OPTIONS:=}"               # further options of vLLM
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
set -eu
mkdir -p "$RUN"

runs() { [ -s "$RUN/pid" ] && kill -0 "$(cat "$RUN/pid")" 2>/dev/null; }
answers() { curl -fs -o /dev/null "http://127.0.0.1:$PORT/health"; }

start() {
    if runs; then echo "vLLM runs already, with pid $(cat "$RUN/pid")"; return; fi
    modules=""
    if [ -s "$RUN/adapters" ]; then modules="--lora-modules $(tr '\n' ' ' < "$RUN/adapters")"; fi
    # shellcheck disable=SC2086  # options and adapters are several words
    nohup "$VLLM" serve "$MODEL" --served-model-name "$NAME" --host "$HOST" --port "$PORT" \
        --enable-lora --max-lora-rank "$MAX_LORA_RANK" --max-loras "$MAX_LORAS" \
        $OPTIONS $modules >> "$RUN/log" 2>&1 < /dev/null &
    echo $! > "$RUN/pid"
    waited=0
    until answers; do
        if ! runs || [ "$waited" -ge "$SECONDS_TO_START" ]; then
            echo "vLLM does not start; the end of $RUN/log:" >&2
            tail -n 20 "$RUN/log" >&2
            stop
            exit 1
        fi
        sleep 1
        waited=$((waited + 1))
    done
    echo "vLLM answers at http://127.0.0.1:$PORT, with pid $(cat "$RUN/pid")"
}

stop() {
    if runs; then
        pid=$(cat "$RUN/pid")
        kill "$pid"
        waited=0
        while kill -0 "$pid" 2>/dev/null; do
            if [ "$waited" -ge 30 ]; then kill -9 "$pid"; break; fi
            sleep 1
            waited=$((waited + 1))
        done
    fi
    rm -f "$RUN/pid"
}

case "${1:-}" in
    start) start ;;
    stop) stop ;;
    restart) stop; start ;;
    status) runs && answers ;;
    *) sed -n '2,9p' "$0"; exit 2 ;;
esac
